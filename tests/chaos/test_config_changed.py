"""The experiments topic says strange things about a running experiment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from broker.worker_process import SPEC, now_ms, statistics, wait_for
from chaos.traffic import Mix

from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.publication import next_record

if TYPE_CHECKING:
    from chaos.harness import Process, Rig

KEY = SPEC.experiment.encode()


def say(rig: Rig, value: bytes | None, *, key: bytes = KEY) -> None:
    """Put a record on the experiments topic, and let its activation delay pass."""
    with TopicWriter(rig.settings) as writer:
        writer.send(rig.settings.topic("experiments"), key=key, value=value)
    rig.faulted(recovers=False)
    time.sleep(rig.settings.activation_delay_ms / 1000 + 0.3)


def record(**changed: Any) -> bytes:
    """The experiment record with another design, under the same version."""
    held = msgspec.to_builtins(next_record(None, SPEC, effective_ms=now_ms()))
    held["spec"] |= changed
    return msgspec.json.encode(held)


MALFORMED: dict[str, bytes] = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "another schema": b'{"version": "one"}',
    "deep": b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
}


def refused(worker: Process) -> int:
    return len(worker.events("experiment record refused"))


def wait_refused(worker: Process, times: int) -> None:
    wait_for(lambda: refused(worker) == times, f"{times} records are refused")


@pytest.mark.chaos("config malformed or rewritten")
def test_a_malformed_or_rewritten_spec_changes_nothing(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    design = {
        "another alpha": record(alpha=0.2),
        "another arm": record(
            arms=[{"key": "a", "weight": 0.5, "control": True}, {"key": "c", "weight": 0.5}]
        ),
    }
    with rig.worker() as worker:
        worker.wait_started()
        with traffic.flowing():
            for n, value in enumerate([*MALFORMED.values(), *design.values()], start=1):
                say(rig, value)
                wait_refused(worker, n)
            time.sleep(1)
        rig.check()
        rig.kill(worker)
    with rig.worker() as again:
        rig.check()
        again.finish()
    assert {(part.experiment, part.version) for part in statistics(rig.settings)} == {(SPEC.experiment, 1)}


@pytest.mark.chaos("config tombstone under traffic")
def test_a_tombstone_ends_the_experiment_and_keeps_its_state(rig: Rig) -> None:
    rig.prepare()
    # What names an archived experiment is inactive before it is late or repeated, which the account does not know.
    traffic = rig.traffic(mix=Mix(duplicates=0, late=0, skewed=0, nobody=0))
    with rig.worker() as worker:
        worker.wait_started()
        with traffic.flowing():
            time.sleep(2)
            say(rig, None)
            time.sleep(2)
            rig.kill(worker)
    with rig.worker() as again:
        rig.check()
        again.finish()
    parts = statistics(rig.settings)
    assert sum(part.exposure_outcomes.inactive_experiment for part in parts) > 0
    assert sum(row.units for part in parts for row in part.statistics.units) > 0
