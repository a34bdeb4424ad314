"""kill -9 of the decide stage between evaluating, publishing and what follows from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import pytest
from broker.worker_process import SPEC, now_ms, records, wait_for
from chaos.audit import against_decisions

from stream_xp.adapters.topic_writer import TopicWriter

if TYPE_CHECKING:
    from chaos.harness import Rig

    from stream_xp.settings import Settings

BOUNDARIES = (
    "after evaluated",
    "before signals",
    "after signals",
    "before experiments",
    "after experiments",
    "before config",
    "after config",
    "before results",
    "after results",
    "after stats",
)
UNITS = 300


def send_to_one_arm(settings: Settings, experiment: str, *, first: int = 0) -> None:
    """A sample-ratio mismatch, at which the policy stops the experiment."""
    with TopicWriter(settings) as writer:
        for n in range(first, first + UNITS):
            unit = f"{experiment}-{n}"
            event = {"id": f"x{unit}", "time": now_ms(), "experiment": experiment, "unit": unit, "arm": "a"}
            writer.send(settings.topic("exposures"), key=unit.encode(), value=json.dumps(event).encode())


def stopped(settings: Settings) -> set[str]:
    """Experiments that applications were told to stop."""
    return {one["experiment"] for one in records(settings, "config") if one["status"] == "stopped"}


@pytest.mark.chaos("kill -9 of decide, between effects", short=True)
def test_killed_between_effects(rig: Rig) -> None:
    boundaries = list(BOUNDARIES[: rig.count(dev=3, short=3, full=len(BOUNDARIES))]) * rig.count(
        dev=1, short=1, full=3
    )
    rig.random.shuffle(boundaries)
    names = [f"decided-{n}" for n in range(len(boundaries))]
    rig.prepare(*(msgspec.structs.replace(SPEC, experiment=name) for name in names))
    for name, boundary in zip(names, boundaries, strict=True):
        # Of each step of a decision there is one at a time; of what is written at every look, any may be the last.
        often = boundary.split()[-1] not in ("signals", "experiments", "config")
        at = f"{boundary}:{rig.random.randint(1, 4) if often else 1}"
        with rig.worker(faults=("--at", at)) as worker:
            # It first goes on with what the one before it had begun, which may bring it to its moment at once.
            worker.wait_started(may_end=True)
            send_to_one_arm(rig.settings, name)
            assert worker.wait_ended() == -9, f"{at}: {worker.log[-2000:]}"
            rig.faulted()
        rig.note(against_decisions(rig.settings))
    with rig.worker() as last:
        wait_for(lambda: stopped(rig.settings) == set(names), "every experiment is stopped")
        # More of the same changes no decision.
        for name in names[:2]:
            send_to_one_arm(rig.settings, name, first=UNITS)
        rig.check()
        last.finish()
    signals = records(rig.settings, "signals")
    assert {one["subject"] for one in signals} == set(names)
    configs = [one for one in records(rig.settings, "config") if one["status"] == "stopped"]
    assert sorted(one["experiment"] for one in configs) == sorted(names)
