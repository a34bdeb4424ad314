"""A worker that stands still past its session, while others take over, and then goes on as if nothing had been."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from broker.worker_process import SPEC, records, statistics, wait_for
from chaos.audit import against_commits
from chaos.test_decide_killed import UNITS, send_to_one_arm, stopped

from stream_xp.services.evidence import read_signals

if TYPE_CHECKING:
    from chaos.harness import Process, Rig

MOMENTS = ("before chunk", "before manifest", "after manifest", "before stats", "before commit")


def past_the_session(rig: Rig) -> None:
    time.sleep(rig.settings.session_timeout_ms / 1000 + 1.5)


def positions(rig: Rig) -> dict[tuple[str, int], tuple[int, int, int]]:
    """How far the statistics have come that a reader believes."""
    return {(part.experiment, part.partition): part.position() for part in statistics(rig.settings)}


def wait_taken_over(rig: Rig, heir: Process) -> None:
    def all_loaded() -> bool:
        loaded = {line["partition"] for line in heir.events("partition loaded")}
        return heir.ended() or loaded == set(range(rig.settings.partitions))

    wait_for(all_loaded, "another worker has all partitions")
    assert not heir.ended(), heir.log[-3000:]


@pytest.mark.chaos("SIGSTOP past the session, then SIGCONT", short=True)
def test_a_zombie_changes_nothing_that_a_reader_believes(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    moments = list(MOMENTS) * rig.count(dev=1, short=1, full=3)
    rig.random.shuffle(moments)
    with traffic.flowing():
        # At a moment of the clock, and between two effects, where a write of the zombie is still to come.
        for moment in [None, *moments[: rig.count(dev=1, short=1, full=8)]]:
            faults = (
                () if moment is None else ("--at", f"{moment}:{rig.random.randint(2, 5)}", "--then", "stop")
            )
            with rig.worker(faults=faults) as zombie:
                if moment is None:
                    zombie.wait_started()
                    time.sleep(rig.random.uniform(0.2, 1.0))
                    zombie.stop()
                else:
                    zombie.wait_stopped()
                with rig.worker() as heir:
                    wait_taken_over(rig, heir)
                    past_the_session(rig)
                    before = positions(rig)
                    zombie.go_on()
                    rig.faulted()
                    time.sleep(2)
                    after = positions(rig)
                    rig.note([f"{key}: went back" for key in before if after[key] < before[key]])
                    rig.note(list(against_commits(rig.settings)))
                    rig.kill(heir)
    with rig.worker() as last:
        rig.check()
        last.finish()


@pytest.mark.chaos("SIGSTOP between a decision and its signal")
@pytest.mark.parametrize("moment", ["before signals", "after signals", "before config"])
def test_a_zombie_decides_nothing(rig: Rig, moment: str) -> None:
    rig.prepare()
    with rig.worker(faults=("--at", f"{moment}:1", "--then", "stop")) as zombie:
        zombie.wait_started()
        send_to_one_arm(rig.settings, SPEC.experiment)
        zombie.wait_stopped()
        # So that the heir mostly sees other statistics, and its decision is not the zombie's; it may look before that.
        send_to_one_arm(rig.settings, SPEC.experiment, first=UNITS)
        with rig.worker() as heir:
            wait_taken_over(rig, heir)
            wait_for(lambda: bool(stopped(rig.settings)), "the heir decides")
            past_the_session(rig)
            believed = list(read_signals(rig.settings))
            configs = records(rig.settings, "config")
            zombie.go_on()
            rig.faulted()
            wait_for(
                lambda: zombie.ended() or len(zombie.events("partitions assigned")) > 1,
                "the zombie learns that it has lost its partitions",
            )
            time.sleep(1)
            assert len(believed) == 1
            assert list(read_signals(rig.settings)) == believed
            # It may write again what the heir wrote, byte for byte; that changes nothing for anybody.
            assert [one for one in records(rig.settings, "config") if one not in configs] == []
            told: dict[str, dict[str, Any]] = {}
            for signal in records(rig.settings, "signals"):
                assert decided(signal) == told.setdefault(signal["id"], decided(signal))


def decided(signal: dict[str, Any]) -> dict[str, Any]:
    """What a signal says, all that its id stands for: not when, nor at whose look, the same statistics were tested."""
    result = signal["data"]["result"]
    tested = ("version", "design_hash", "statistics_hash", "metrics", "sample_ratio", "decision")
    return {name: result[name] for name in tested} | {"told": signal["data"]["decision"]}
