"""A broker behind a proxy, workers as processes, faults with their times, and what a class of faults came to."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import msgspec
from broker.worker_process import (
    SPEC,
    WorkerProcess,
    applied,
    ends,
    now_ms,
    prepare,
    quick,
    statistics,
    wait_for,
)
from chaos.audit import against_commits, audit, durable_offsets
from chaos.report import ClassResult
from chaos.traffic import Mix, Traffic
from kafka import KafkaConsumer, TopicPartition

from stream_xp.domain.statistics import PartitionStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from broker.proxy import Proxy
    from chaos.node import Node

    from stream_xp.domain.experiment import ExperimentSpec
    from stream_xp.settings import Settings

CHILD: Final = Path(__file__).with_name("child.py")
Places: TypeAlias = dict[tuple[str, int], int]
"""Next offset of each partition of the raw topics."""


class Process(WorkerProcess):
    """`stream-xp` as a process with faults of its own; see `child.py`.

    Args:
        faults: options of `child.py`.
        log: where its output goes; a file in `folder` if not given.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *command: str,
        faults: tuple[str, ...] = (),
        log: Path | None = None,
    ) -> None:
        self._log = log or folder / f"worker-{len(list(folder.glob('worker-*')))}.log"
        variables = {
            f"STREAM_XP_{name.upper()}": str(value)
            for name, value in msgspec.structs.asdict(settings).items()
            if isinstance(value, str | int)
        }
        others = {k: v for k, v in os.environ.items() if not k.startswith("STREAM_XP_")}
        program = [str(CHILD), *faults, "--"] if faults else ["-m", "stream_xp"]
        self.began_s = time.monotonic()
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *(command or ("worker",))],
                env={**others, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.kill()

    def wait_started(self, *, may_end: bool = False) -> None:
        """Wait until it has joined and has the state of a partition, or has ended where it may."""
        loaded = "partition loaded"
        wait_for(lambda: self.ended() or bool(self.events(loaded)), "the worker starts")
        assert may_end or not self.ended(), self.log[-4000:]

    def finish(self) -> None:
        """SIGTERM; it must have written everything."""
        self.wait_started()
        assert self.terminate() == 0, self.log[-4000:]

    def stop(self) -> None:
        """SIGSTOP: it stands still and knows nothing of it."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def wait_stopped(self) -> None:
        """Wait until it has stopped itself."""
        wait_for(lambda: self.ended() or self._state() == "T", "the process stops itself")
        assert not self.ended(), self.log[-4000:]

    def rss_bytes(self) -> int:
        """Resident memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024

    def _state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


class Rig:
    """What one test of a class of faults works with.

    Args:
        name: of the class, in `results.json`.
        intensity: how much of it.
        seed: of everything that is drawn.
    """

    def __init__(
        self, node: Node, proxy: Proxy, folder: Path, *, name: str, prefix: str, intensity: str, seed: int
    ) -> None:
        self.node = node
        self.proxy = proxy
        self.folder = folder
        self.name = name
        self.intensity = intensity
        self.random = random.Random(f"{seed} {name}")
        self.settings = quick(node.direct, prefix, snapshot_interval_ms=500)
        self.traffics: list[Traffic] = []
        self.faults = 0
        self._lifted: list[tuple[int, Places]] = []
        self._seed = f"{seed} {name}"
        self._checks = 0
        self._differences = 0
        self._began_s = time.monotonic()

    # --- what there is ------------------------------------------------------------------------------------

    def count(self, *, dev: int, short: int, full: int) -> int:
        """One of three numbers, by intensity."""
        return {"dev": dev, "short": short, "full": full}[self.intensity]

    @property
    def through_proxy(self) -> Settings:
        """Settings for workers."""
        return msgspec.structs.replace(self.settings, bootstrap=self.proxy.address)

    def change(self, **changed: Any) -> None:
        """Use other settings from here on."""
        self.settings = msgspec.structs.replace(self.settings, **changed)

    def prepare(self, *specs: ExperimentSpec) -> None:
        """Make the topics and apply the specs."""
        for spec in specs or (SPEC,):
            prepare(self.settings, spec)

    def traffic(self, *, mix: Mix = Mix(), **options: Any) -> Traffic:  # noqa: B008 (immutable)
        """A new source of traffic, whose records are counted in the audit."""
        one = Traffic(self.settings, f"{self._seed} {len(self.traffics)}", mix=mix, **options)
        self.traffics.append(one)
        return one

    def worker(self, *, faults: tuple[str, ...] = (), log: Path | None = None, **changed: Any) -> Process:
        """A worker that reaches the broker through the proxy."""
        settings = msgspec.structs.replace(self.through_proxy, **changed)
        return Process(settings, self.folder, faults=faults, log=log)

    # --- faults --------------------------------------------------------------------------------------------

    def faulted(self, count: int = 1, *, recovers: bool = True) -> None:
        """A fault is over now; how soon the statistics have caught up with this moment is measured."""
        self.faults += count
        if recovers:
            lifted_ms = now_ms()
            self._lifted.append((lifted_ms, ends(self.settings)))

    def kill(self, worker: Process) -> None:
        """SIGKILL a worker, and see that it had committed nothing that no snapshot covers."""
        worker.kill()
        self.faulted()
        self.note(list(against_commits(self.settings)))

    # --- checks --------------------------------------------------------------------------------------------

    def note(self, differences: list[str]) -> None:
        """Count findings; there must be none."""
        self._differences += len(differences)
        assert not differences, "\n".join(differences)

    def settle(self) -> list[PartitionStatistics]:
        """Wait until the statistics cover every record, and every unit is mature."""
        parts: list[PartitionStatistics] = []
        wanted = ends(self.settings)

        def settled() -> bool:
            parts[:] = statistics(self.settings)
            return (
                bool(parts)
                and all(
                    (getattr(part, topic).next_offset or 0) == wanted[topic, part.partition]
                    for part in parts
                    for topic in ("exposures", "rewards")
                )
                and all(part.reward_outcomes.waiting == 0 and _mature(part) for part in parts)
            )

        try:
            wait_for(settled, "everything is applied and mature")
        except AssertionError as error:
            raise AssertionError(f"{error}\nwanted {wanted}\nfound {applied(parts)}") from error
        return parts

    def settle_some(self) -> None:
        """Wait until some snapshots stand in every partition, so that there is something to damage."""

        def enough() -> bool:
            return all(durable_offsets(self.settings).values())

        wait_for(enough, "every partition has a snapshot")
        time.sleep(1)

    def findings(self) -> list[str]:
        """What the audit finds now."""
        self._checks += 1
        return audit(self.settings, [traffic.sent for traffic in self.traffics] or None)

    def check(self) -> None:
        """Wait until everything is applied, audit, and let there be no finding."""
        self.settle()
        self.note(self.findings())

    def result(self) -> ClassResult:
        """What this class came to."""
        sent = [traffic.sent for traffic in self.traffics]
        recoveries = recovery_times(self.settings, self._lifted) if self._lifted else []
        return ClassResult(
            name=self.name,
            faults=self.faults,
            bad_records=sum(one.bad.total() + one.copies.total() for one in sent),
            events=sum(ends(self.settings).values()) if self.traffics else 0,
            checks=self._checks,
            differences=self._differences,
            worst_recovery_s=round(max(recoveries), 1) if recoveries else None,
            seconds=round(time.monotonic() - self._began_s, 1),
        )


def _mature(part: PartitionStatistics) -> bool:
    units = sum(row.units for row in part.statistics.units)
    cells = part.statistics.moments
    return all(
        sum(cell.n for cell in cells if cell.metric == metric) == units for metric in ("click", "spend")
    )


def recovery_times(settings: Settings, lifted: list[tuple[int, Places]]) -> list[float]:
    """For each fault the seconds from its end until the statistics cover what was on the raw topics by then.

    Statistics count from the broker's append time.
    """
    moves = _moves(settings)
    found = []
    for lifted_ms, wanted in lifted:
        left = {place for place, end in wanted.items() if end}
        for at_ms, covered in moves:
            left -= {place for place, offset in covered.items() if offset >= wanted[place]}
            if not left:
                found.append(max(0, at_ms - lifted_ms) / 1000)
                break
    return found


def _moves(settings: Settings) -> list[tuple[int, Places]]:
    """Every statistics record: when the broker got it, and the next offsets it stands at."""
    topic = settings.topic("stats")
    consumer = KafkaConsumer(
        **settings.kafka_python_options(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    found: list[tuple[int, Places]] = []
    try:
        assigned = [TopicPartition(topic, partition) for partition in consumer.partitions_for_topic(topic)]
        consumer.assign(assigned)
        limits = consumer.end_offsets(assigned)
        while any(consumer.position(tp) < limits[tp] for tp in assigned):
            for batch in consumer.poll(timeout_ms=500).values():
                found += [(record.timestamp, _covered(record.value)) for record in batch]
    finally:
        consumer.close()
    return sorted(found, key=lambda move: move[0])


def _covered(value: bytes) -> Places:
    part = msgspec.json.decode(value, type=PartitionStatistics)
    return {
        (topic, part.partition): getattr(part, topic).next_offset or 0 for topic in ("exposures", "rewards")
    }


class Supervisor:
    """Starts a worker again whenever it ends, as whatever runs the service does.

    Args:
        start: makes a worker.
        pause_s: how long it waits before each start.
    """

    def __init__(self, start: Callable[[], Process], *, pause_s: float = 0.5) -> None:
        self._start = start
        self._pause_s = pause_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self.worker = start()
        self.codes: list[int] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.worker.__exit__()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            if self.worker.ended():
                self.codes.append(self.worker.process.returncode)
                if self._over.wait(self._pause_s):
                    return
                self.worker = self._start()


@contextlib.contextmanager
def supervised(start: Callable[[], Process], *, pause_s: float = 0.5) -> Iterator[Supervisor]:
    """A worker that is started again whenever it ends, for the block."""
    with Supervisor(start, pause_s=pause_s) as supervisor:
        yield supervisor
