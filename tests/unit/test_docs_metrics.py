"""docs/metrics.md is generated from the definitions, and says the defaults that the settings have."""

from __future__ import annotations

import re

from stream_xp.domain.metric_defs import OTHER
from stream_xp.services.metrics_page import PAGE, page
from stream_xp.settings import Settings


def test_the_page_is_as_generated() -> None:
    assert PAGE.read_text() == page(), "run python -m stream_xp.services.metrics_page --write"


def test_it_says_the_defaults() -> None:
    text = PAGE.read_text()
    settings = Settings()
    assert settings.metrics_port is None
    assert f"| `STREAM_XP_METRICS_HOST` | `{settings.metrics_host}` |" in text
    assert f"| `STREAM_XP_METRICS_MAX_SERIES` | `{settings.metrics_max_series}` |" in text
    assert set(re.findall(r"`(_\w+)`", text)) == {OTHER}
