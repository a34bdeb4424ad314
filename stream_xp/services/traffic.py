"""Endless traffic of the demo's three experiments for a broker that is there: what an application would send.

Units come as a Poisson process, get an arm by the weights of the config record that applications follow, and do
something within a second. From a known moment on the canary harms. Once an experiment is stopped or shipped its
units are no longer exposed, as docs/operations.md asks of applications.
"""

from __future__ import annotations

import heapq
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.events import Exposure, Reward
from stream_xp.services.publish import plan_application, publish
from stream_xp.services.spec_file import load_spec
from stream_xp.simulator import EXPOSURES, REWARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stream_xp.settings import Settings

TICK_S: Final = 0.1
LONGEST_SPAN_MS: Final = 250
FOLLOW_S: Final = 1.0
REPORT_S: Final = 10.0
MEAN_DELAY_MS: Final = 300.0
LONGEST_DELAY_MS: Final = 900
"""Below the attribution window of the demo's metrics, which is one second."""

_SPECS: Final = Path(__file__).parent / "demo_specs"


class Truth(NamedTuple):
    """What is true of an experiment: its share of the units, and each arm's rates before and after the harm begins."""

    share: float
    rates: Mapping[str, Mapping[str, tuple[float, float]]]


WORLD: Final = {
    "checkout-canary": Truth(5 / 12, {"checkout_error": {"stable": (0.01, 0.01), "canary": (0.01, 0.03)}}),
    "artwork": Truth(
        5 / 12, {"take": {"cell-1": (0.3, 0.3), "cell-2": (0.342, 0.342), "cell-3": (0.318, 0.318)}}
    ),
    "aa": Truth(
        2 / 12,
        {
            "play": {"a": (0.2, 0.2), "b": (0.2, 0.2)},
            "playback_error": {"a": (0.02, 0.02), "b": (0.02, 0.02)},
        },
    ),
}


class Sending(NamedTuple):
    """One record to send; `topic` is without the prefix."""

    topic: str
    key: bytes
    value: bytes


class Crowd:
    """Draws who comes and what they do; a pure function of the seed and of what it is asked for.

    Args:
        seed: of all draws.
        run: begins every id, so that no unit or event of another run is met again.
        units_per_s: of all experiments together.
        harm_ms: from when on the canary harms, epoch milliseconds.
    """

    def __init__(self, seed: int, *, run: str, units_per_s: float, harm_ms: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._run = run
        self._units_per_ms = units_per_s / 1000
        self._harm_ms = harm_ms
        self._units = 0
        self._due: list[tuple[int, int, Sending]] = []

    def between(self, from_ms: int, to_ms: int, followed: Mapping[str, ConfigRecord]) -> Iterator[Sending]:
        """Give the records of a span of time: rewards that fall into it, and whoever comes in it, in this order."""
        while self._due and self._due[0][0] < to_ms:
            yield heapq.heappop(self._due)[2]
        for name, truth in WORLD.items():
            config = followed.get(name)
            count = self._draw.poisson(truth.share * self._units_per_ms * (to_ms - from_ms))
            if config is None or config.status is not RolloutStatus.RUNNING:
                continue
            for at_ms in np.sort(self._draw.integers(from_ms, to_ms, count)):
                yield self._exposed(name, truth, config, int(at_ms))

    def _exposed(self, name: str, truth: Truth, config: ConfigRecord, at_ms: int) -> Sending:
        self._units += 1
        unit = f"{self._run}-{self._units}"
        arms = list(config.weights)
        arm = arms[self._draw.choice(len(arms), p=np.array([config.weights[arm] for arm in arms]))]
        for metric, rates in truth.rates.items():
            if self._draw.random() < rates[arm][at_ms >= self._harm_ms]:
                self._promise(unit, metric, at_ms)
        exposure = Exposure(
            id=unit,
            time=at_ms,
            unit=unit,
            experiment=name,
            arm=arm,
            weight_epoch=config.weight_epoch,
            propensity=config.weights[arm],
        )
        return Sending(EXPOSURES, unit.encode(), msgspec.json.encode(exposure))

    def _promise(self, unit: str, metric: str, at_ms: int) -> None:
        delay_ms = min(LONGEST_DELAY_MS, 1 + int(self._draw.exponential(MEAN_DELAY_MS)))
        reward = Reward(id=f"{unit}-{metric}", time=at_ms + delay_ms, unit=unit, metric=metric)
        sending = Sending(REWARDS, unit.encode(), msgspec.json.encode(reward))
        heapq.heappush(self._due, (at_ms + delay_ms, len(self._due), sending))


class Sent(NamedTuple):
    """What has been sent until now, and how the experiments stand."""

    exposures: int
    rewards: int
    status: Mapping[str, str]


def send_traffic(
    settings: Settings,
    *,
    seed: int,
    units_per_s: float,
    harm_after_s: float,
    duration_s: float | None = None,
    report: Callable[[Sent], None],
) -> Sent:
    """Apply the demo's specs, then send until the duration is over, or for ever.

    Raises:
        ConfigError: a topic is missing, or another spec stands under one of the names.
        DependencyError: a broker did not answer, or a record was not acknowledged.
    """
    for name in WORLD:
        publish(settings, plan_application(settings, load_spec(_SPECS / f"{name}.yaml"), now_ms=_now_ms()))
    began_ms = _now_ms()
    crowd = Crowd(
        seed, run=f"{began_ms:x}", units_per_s=units_per_s, harm_ms=began_ms + round(1000 * harm_after_s)
    )
    end_ms = None if duration_s is None else began_ms + round(1000 * duration_s)
    with TopicReader(settings, settings.topic("config")) as reader, TopicWriter(settings) as writer:
        return _Run(settings, reader, writer, crowd, report).until(end_ms)


class _Run:
    def __init__(
        self,
        settings: Settings,
        reader: TopicReader,
        writer: TopicWriter,
        crowd: Crowd,
        report: Callable[[Sent], None],
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._writer = writer
        self._crowd = crowd
        self._report = report
        self._followed: dict[str, ConfigRecord] = {}
        self._counts = {EXPOSURES: 0, REWARDS: 0}

    def until(self, end_ms: int | None) -> Sent:
        at_ms = followed_ms = reported_ms = _now_ms()
        self._follow()
        while end_ms is None or at_ms < end_ms:
            time.sleep(TICK_S)
            now_ms = _now_ms()
            if now_ms - followed_ms >= 1000 * FOLLOW_S:
                followed_ms = now_ms
                self._follow()
            if now_ms > at_ms:
                # A machine that does not keep up sends fewer units, not old ones: they would be late.
                self._send(max(at_ms, now_ms - LONGEST_SPAN_MS), now_ms)
                at_ms = now_ms
            if now_ms - reported_ms >= 1000 * REPORT_S:
                reported_ms = now_ms
                self._report(self._sent())
        self._writer.flush()
        return self._sent()

    def _follow(self) -> None:
        for key, record in self._reader.newest_by_key().items():
            if key.decode(errors="replace") in WORLD and record.value is not None:
                self._followed[key.decode()] = decode_own(record.value, ConfigRecord)

    def _send(self, from_ms: int, to_ms: int) -> None:
        for sending in self._crowd.between(from_ms, to_ms, self._followed):
            self._writer.send(self._settings.topic(sending.topic), key=sending.key, value=sending.value)
            self._counts[sending.topic] += 1

    def _sent(self) -> Sent:
        status = {name: config.status.value for name, config in self._followed.items()}
        return Sent(self._counts[EXPOSURES], self._counts[REWARDS], status)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
