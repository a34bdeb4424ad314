"""What `stream-xp status` shows of a champion."""

from __future__ import annotations

import io

import msgspec
from rich.console import Console

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.cli.status import _panel
from stream_xp.domain.decision import Result
from stream_xp.domain.layers import Champion
from stream_xp.services.evidence import Standing

RESULT = msgspec.json.decode((topics_dir() / "golden" / "result.v1.json").read_bytes(), type=Result)


def shown(result: Result) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    console.print(_panel(Standing(result=result, watermark_ms=0, data_age_ms=0, evaluated_age_ms=0)))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_champion_is_named_where_there_is_one() -> None:
    champion = Champion(experiment="colours", version=2, arm="[bold]green")
    text = shown(msgspec.structs.replace(RESULT, champion=champion))
    assert "champion, the control here: [bold]green of colours version 2" in text
    assert "champion" not in shown(RESULT)
