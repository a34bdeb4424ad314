"""The suite bites: a worker that acknowledges before its snapshot, or forgets its offsets, is found out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from broker.worker_process import ends, statistics, wait_for
from chaos.audit import against_commits

if TYPE_CHECKING:
    from chaos.harness import Rig


def applied_to_the_end(rig: Rig) -> bool:
    """Whether every partition with statistics stands at its end, whatever those statistics are."""
    wanted = ends(rig.settings)
    parts = statistics(rig.settings)
    return bool(parts) and all(
        getattr(part, topic).next_offset == wanted[topic, part.partition]
        for part in parts
        for topic in ("exposures", "rewards")
    )


@pytest.mark.chaos("teeth: acknowledged before the snapshot", short=True)
def test_acknowledging_before_the_snapshot_is_found(rig: Rig) -> None:
    # Commits go out every second; snapshots are so rare that a kill falls between the two.
    rig.change(snapshot_interval_ms=20_000)
    rig.prepare()
    traffic = rig.traffic()
    with traffic.flowing():
        with rig.worker(faults=("--acknowledge-first",)) as worker:
            worker.wait_started()
            # The audit finds it while the snapshot is not there yet; that is the moment to kill.
            wait_for(
                lambda: any(against_commits(rig.settings)),
                "a commit is found that no snapshot covers",
            )
            worker.kill()
            rig.faulted()
        with rig.worker(faults=("--acknowledge-first",)) as worker:
            worker.wait_started()
            time.sleep(2)
    with rig.worker(faults=("--acknowledge-first",)):
        wait_for(lambda: applied_to_the_end(rig), "the worker believes that it is done")
        findings = rig.findings()
    assert any("engine" in one and "oracle" in one for one in findings), findings
    assert any("records read" in one for one in findings), findings


@pytest.mark.chaos("teeth: offsets forgotten")
def test_applying_again_is_found(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    with rig.worker() as worker:
        worker.wait_started()
        traffic.send(600)
        rig.check()
        worker.kill()
        rig.faulted()
    traffic.send(100)
    with rig.worker(faults=("--apply-again",)):
        wait_for(lambda: applied_to_the_end(rig), "the worker believes that it is done")
        findings = rig.findings()
    assert any("duplicate" in one for one in findings), findings
    assert any("records read" in one for one in findings), findings
