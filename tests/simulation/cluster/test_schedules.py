"""A few hundred random schedules of a whole cluster; `python -m tests.simulation.cluster` runs as many as wanted.

Each schedule is judged by everything in watch.py and verdict.py. Not judged here: that decisions keep their error
rate under continuous looks (I11) is what `stream-xp calibrate` and tests/simulation/test_calibration.py measure; label
sets of metrics (I14) are held by tests/unit/test_prometheus.py and tests/unit/services/test_telemetry.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from stream_xp.domain.decision import RolloutStatus
from stream_xp.domain.operator import OperatorAction
from stream_xp.engine.snapshot_log import KeyedRecord, Snapshot
from tests.simulation.cluster.schedule import Schedule
from tests.simulation.cluster.watch import BrokenError
from tests.simulation.cluster.world import World, installed

BATCHES, SCHEDULES = 4, 25
WORDS = (
    *("KILLED", "paused", "wakes", "thrown out", "FAILS", "slips", "seeks", "event=hole", "now begins at"),
    *("is damaged", "is gone", "a dead node:", "no answers", "asked to stop"),
    *("and a spec comes into force", "no writes to"),
    *("no whole snapshot is left", "the log starts at"),
)
"""What traces say of what was done to the workers, and of what they met."""
SEEDS = (11, 15, 24, 26, 29, 61)
"""Together they reach everything, nearly all of it twice; too rare to be asked for are remains without a manifest."""

ORDERED = (3, 5, 49, 142, 187, 195)
"""With these, people do all that they can, and applications are told all that they can be."""
DAMAGED = ((64, False), (66, True))
"""At the end of these a page of the newest snapshot is damaged, and nobody is left to write it again: whoever loads the
partition begins before what is published. `Verdict.check_restart` judges it."""


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.parametrize("batch", range(BATCHES))
def test_nothing_is_lost_or_doubled(batch: int) -> None:
    for seed in range(batch * SCHEDULES, (batch + 1) * SCHEDULES):
        Schedule(seed).run()


def test_what_people_order_is_followed() -> None:
    seen: Counter[str] = Counter()
    for seed in ORDERED:
        schedule = Schedule(seed, orders=True)
        schedule.run()
        watch = schedule.world.watch
        seen.update(f"ordered {order.data.action}" for order in watch.orders)
        seen.update(f"told {config.status}" for config in watch.configs)
        seen["told of a pause"] += sum(config.paused for config in watch.configs)
        seen["taken back"] += len(watch.taken_back)
        seen["proposed"] += sum(signal.data.proposed for signal in watch.signals)
    orders = [f"ordered {action}" for action in OperatorAction if action is not OperatorAction.SET_STAGE]
    told = [*(f"told {status}" for status in RolloutStatus), "told of a pause"]
    missing = [what for what in (*orders, *told, "taken back", "proposed") if not seen[what]]
    assert not missing, f"choose other seeds: these do not reach {missing}"


@pytest.mark.parametrize(("seed", "hangs"), DAMAGED)
def test_damage_of_the_newest_snapshot_costs_a_replay_and_no_truth(seed: int, hangs: bool) -> None:
    schedule = Schedule(seed, hangs=hangs)
    schedule.run()
    assert schedule.world.watch.replayed


def test_a_seed_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(seed: int) -> list[str]:
        lines: list[str] = []
        Schedule(seed, trace=lines).run()
        return lines

    def slow(self: Snapshot) -> Iterator[KeyedRecord]:
        time.sleep(0.01)
        yield from pages(self)

    first, pages = [trace(seed) for seed in range(5)], Snapshot.pages
    # Another machine, which takes longer: 20 times as long until the next snapshot, were it measured.
    monkeypatch.setattr(Snapshot, "pages", slow)
    assert first == [trace(seed) for seed in range(5)]
    assert min(map(len, first)) > 30


def test_what_does_not_hold_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def produce(self: World, topic: str, **named: object) -> None:
        self.watch.fail("I0", "never")

    monkeypatch.setattr(World, "produce", produce)
    with pytest.raises(BrokenError, match="--seed 7 --no-hangs --no-orders: I0: never"):
        Schedule(7).run()


def reached(seed: int) -> Counter[str]:
    """How often what may happen did in one schedule."""
    lines: list[str] = []
    schedule = Schedule(seed, trace=lines)
    schedule.run()
    watch, log, text = schedule.world.watch, schedule.world.log, "\n".join(lines)
    seen = Counter({word: text.count(word) for word in WORDS})
    seen["forked"] = len(watch.forked)
    seen["counts again from damage before a cut"] = len(watch.spoilt & watch.shortened)
    seen["statistics"] = len(watch.published)
    seen["commits"] = len(watch.commits)
    seen["decisions"] = len(watch.signals)
    seen["decisions that came late"] = len(watch.late_signals)
    seen["dead letters"] = len(log.history("xp.deadletter"))
    seen["changed specs"] = len(log.history("xp.experiments")) - 1
    return seen


def test_the_schedules_reach_everything() -> None:
    """Faults that never come, or never meet anything, would prove nothing."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        seen.update(reached(seed))
    missing = [word for word, times in seen.items() if not times]
    assert not missing, f"choose other seeds: these do not reach {missing}"
