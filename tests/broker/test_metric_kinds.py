"""Every kind of metric, with a covariate, segments and a change of weights, through a worker that is killed."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest
from worker_process import (
    WorkerProcess,
    applied,
    ends,
    merged,
    now_ms,
    outcomes,
    prepare,
    quick,
    records,
    statistics,
    wait_for,
)

from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.decision import Method
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.oracle.service import check

if TYPE_CHECKING:
    from pathlib import Path

    from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.kafka, pytest.mark.slow]

SOON = {"attribution_window": "500ms", "direction": "increase", "role": "secondary"}
KINDS = {
    "click": ({"kind": "conversion", "role": "primary"}, Method.EXACT_THEN_ASYMPTOTIC),
    "spend": ({"kind": "mean", "scale": 0.01, "bound": 1000, "adjustment": "cuped"}, Method.CUPED),
    "watch": ({"kind": "mean", "bound": 1000, "adjustment": "ancova"}, Method.ANCOVA),
    "plays": (
        {"kind": "ratio", "bound": 100, "denominator": {"event": "visits", "bound": 100}},
        Method.RATIO,
    ),
    "fault": ({"kind": "count", "direction": "decrease"}, Method.RATE_RATIO),
    "wait": ({"kind": "latency", "scale": 0.001, "bound": 60, "direction": "decrease"}, Method.QUANTILE),
}


def spec(share: float) -> ExperimentSpec:
    fields = {
        "experiment": "kinds",
        "owner": "tests",
        "hypothesis": "every kind survives",
        "unit": "member",
        "planned_sample": 5_000,
        "minimum_runtime": "1h",
        "arms": [{"key": "a", "weight": 1 - share, "control": True}, {"key": "b", "weight": share}],
        "segments": {"os": ["ios", "web"]},
        "covariate": {"scale": 0.1, "bound": 100, "missing": 0},
        "metrics": [SOON | {"key": key} | kind for key, (kind, _) in KINDS.items()],
    }
    return msgspec.convert(fields, ExperimentSpec)


class Members:
    """Members who do a little of everything; what they did is counted here by hand."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._random, self.met = settings, random.Random(4), Counter[str]()
        self.did: Counter[tuple[str, str]] = Counter()

    def send(self, members: int, *, share: float) -> None:
        with TopicWriter(self._settings) as writer:
            for _ in range(members):
                self._send(writer, "ab"[self._random.random() < share])
            writer.flush()

    def _send(self, writer: TopicWriter, arm: str) -> None:
        draw = self._random
        unit, time_ms = f"m{self.met.total()}", now_ms() - 100
        self.met[arm] += 1
        exposure = {"experiment": "kinds", "arm": arm, "segments": {"os": draw.choice(["ios", "web", "tv"])}}
        if draw.random() < 0.9:
            exposure["covariate"] = round(draw.uniform(0, 100), 2)
        self._write(writer, "exposures", unit, time_ms, exposure)
        values = {"click": 1, "fault": 1, "wait": draw.lognormvariate(-2, 1)}
        values |= {
            "spend": draw.expovariate(0.1),
            "watch": draw.randint(0, 90),
            "plays": draw.randint(0, 9),
            "visits": draw.randint(1, 9),
        }
        for metric, value in values.items():
            if draw.random() < 0.4:
                self.did[metric, arm] += 1
                reward = {"metric": metric, "value": round(value, 3)}
                self._write(writer, "rewards", unit, time_ms + draw.randint(1, 90), reward)

    def _write(
        self, writer: TopicWriter, topic: str, unit: str, time_ms: int, event: dict[str, object]
    ) -> None:
        record = {"id": f"{topic}{unit}{event.get('metric')}", "unit": unit, "time": time_ms, **event}
        writer.send(self._settings.topic(topic), key=unit.encode(), value=json.dumps(record).encode())


def test_every_kind_of_metric_is_exact_and_tested(
    apache_kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    settings = quick(apache_kafka, topic_prefix)
    prepare(settings, spec(0.2))
    members = Members(settings)
    with WorkerProcess(settings, tmp_path) as first:
        first.wait_started()
        members.send(300, share=0.2)
        wait_for(lambda: sum(applied(statistics(settings)).values()) > 200, "some of it is counted")
        first.kill()
    prepare(settings, spec(0.5))
    with WorkerProcess(settings, tmp_path) as second:
        members.send(700, share=0.5)
        wait_for(lambda: matured(settings, members), "every member is mature")
        wait_for(lambda: evaluated(settings), "the newest result is of the newest statistics")
        assert second.terminate() == 0, second.log

    report = check(settings)
    assert report.equal, [str(difference) for difference in report.differences]
    parts = statistics(settings)
    whole = merged(parts)
    assert {row.epoch for row in whole.units} == {0, 1}
    assert all(counted.conserved() for counted in outcomes(parts).values())
    clicks = Counter[str]()
    for row in whole.moments:
        if row.metric == "click" and row.segment == "":
            clicks[row.arm] += int(row.s)
    assert clicks == {arm: members.did["click", arm] for arm in "ab"}
    faults = Counter[str]()
    for event in whole.events:
        if event.segment == "":
            faults[event.arm] += event.units
    assert faults == {arm: members.did["fault", arm] for arm in "ab"}

    result = records(settings, "results")[-1]
    found = {metric["metric"]: metric for metric in result["metrics"]}
    assert {key: metric["method"] for key, metric in found.items()} == {
        key: method.value for key, (_, method) in KINDS.items()
    }
    assert all(metric["effect"]["lower"] < metric["effect"]["upper"] for metric in found.values())
    assert {segment["segment"] for segment in result["segments"]} == {"os=ios", "os=web", "os=other"}


def matured(settings: Settings, members: Members) -> bool:
    parts = statistics(settings)
    clicks = sum(row.n for row in merged(parts).moments if row.metric == "click" and row.segment == "")
    return applied(parts) == ends(settings) and clicks == members.met.total()


def evaluated(settings: Settings) -> bool:
    results = records(settings, "results")
    return bool(results) and results[-1]["statistics_hash"] == merged(statistics(settings)).digest()
