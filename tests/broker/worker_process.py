"""What the worker tests share: a worker as a process, traffic with faults, and what stands on the topics."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
from kafka import KafkaAdminClient, TopicPartition

from stream_xp.adapters.kafka_admin import connect, declared_topics, ensure_topics
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.statistics import (
    ExperimentStatistics,
    Outcomes,
    PartitionStatistics,
    add_outcomes,
    merge,
)
from stream_xp.engine.snapshot_log import Manifest
from stream_xp.services.oracle.reading import open_reader
from stream_xp.services.oracle.service import check, read_statistics
from stream_xp.services.publish import plan_application, publish
from stream_xp.settings import Settings

PATIENT = Path(__file__).with_name("patient.py")
DEADLINE_S = 240.0
"""Of all that tests wait for, unless a time is the claim: it ends a test that hangs; it says nothing of how fast a
machine is."""

PARTITIONS = 4
LATENESS_MS = 3_000
"""A machine that stands still for a second or two between the clock and the log makes nothing late."""
SPEC = msgspec.convert(
    {
        "experiment": "checkout",
        "owner": "tests",
        "hypothesis": "nothing is lost and nothing is counted twice",
        "unit": "member",
        "planned_sample": 1_000_000,
        "minimum_runtime": "1h",
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {
                "key": "click",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "500ms",
            },
            {
                "key": "spend",
                "kind": "mean",
                "role": "secondary",
                "direction": "increase",
                "attribution_window": "500ms",
                "scale": 0.01,
                "bound": 1000,
            },
        ],
    },
    ExperimentSpec,
)


def quick(bootstrap: str, prefix: str, **changed: Any) -> Settings:
    """Settings under which a window is over, and everything is written, within seconds."""
    return Settings(
        **{
            "bootstrap": bootstrap,
            "prefix": prefix,
            "partitions": PARTITIONS,
            "group_id": f"{prefix}workers",
            "flush_interval_ms": 100,
            "snapshot_interval_ms": 250,
            "allowed_lateness_ms": LATENESS_MS,
            "activation_delay_ms": 100,
            "idle_grace_ms": 300,
            "session_timeout_ms": 2_000,
            **changed,
        }
    )


def prepare(settings: Settings, spec: ExperimentSpec = SPEC) -> None:
    """Make the topics, apply the spec, and let it come into force."""
    if settings.broker == "apache":
        with connect(settings) as client:
            ensure_topics(client, declared_topics(settings))
    publish(settings, plan_application(settings, spec, now_ms=now_ms()))
    time.sleep(settings.activation_delay_ms / 1000)


def remake(settings: Settings, *names: str) -> None:
    """Delete these topics with all their records, and make them again."""
    topics = [
        topic for topic in declared_topics(settings) if topic.name.removeprefix(settings.prefix) in names
    ]
    with connect(settings) as client:
        client.delete_topics([topic.name for topic in topics])
        wait_for(lambda: not {t.name for t in topics} & set(client.list_topics()), "deleted topics are gone")
        ensure_topics(client, topics)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    ends_at = time.monotonic() + DEADLINE_S
    while True:
        asked_s = time.monotonic()
        if condition():
            return
        now_s = time.monotonic()
        assert now_s < ends_at, f"not within {DEADLINE_S:g} s: {what}"
        # Reading topics takes longer than this pause; what is waited for needs the same cores.
        time.sleep(max(0.1, now_s - asked_s))


class CliProcess:
    """A command of `stream-xp` as a process of its own; killed at the end of the block, if it still runs."""

    program: tuple[str, ...] = ("-m", "stream_xp")

    def __init__(self, settings: Settings, folder: Path, command: str, *options: str) -> None:
        variables = {
            f"STREAM_XP_{name.upper()}": str(value)
            for name, value in msgspec.structs.asdict(settings).items()
            if isinstance(value, str | int)
        }
        others = {k: v for k, v in os.environ.items() if not k.startswith("STREAM_XP_")}
        self._log = folder / f"{command}-{len(list(folder.glob(f'{command}-*')))}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *self.program, command, *options],
                env={**others, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """Everything it wrote."""
        return self._log.read_text()

    def events(self, event: str) -> list[dict[str, Any]]:
        """Its log records of one event."""
        # A line that it is writing just now is there in part.
        whole = self._log.read_bytes().rpartition(b"\n")[0].decode()
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    def wait_said(self, event: str) -> dict[str, Any]:
        """The first log record of an event, once it is there."""
        wait_for(lambda: self.ended() or bool(self.events(event)), f"the log has {event!r}")
        assert not self.ended(), self.log
        return self.events(event)[0]

    def metrics_address(self) -> str:
        """Wait until metrics are served; where."""
        line = self.wait_said("metrics served")
        return f"{line['host']}:{line['port']}"

    def ended(self) -> bool:
        return self.process.poll() is not None

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait_ended()

    def wait_ended(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        try:
            return self.process.wait(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it did not end within {DEADLINE_S:g} s:\n{self.log[-4000:]}") from error

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class WorkerProcess(CliProcess):
    """`stream-xp worker`, with as much time for its end as it needs."""

    program = (str(PATIENT),)

    def __init__(self, settings: Settings, folder: Path, *options: str) -> None:
        super().__init__(settings, folder, "worker", *options)

    def wait_started(self) -> None:
        """Wait until it has joined and has the state of a partition."""
        self.wait_said("partition loaded")


class HurriedWorker(WorkerProcess):
    """`stream-xp worker` as it is: what it could not write in its seconds stays unwritten, and its exit code is 1."""

    program = CliProcess.program


def wait_shared(*workers: WorkerProcess) -> None:
    """Wait until each worker has some of the partitions, and together they have each partition once."""

    def are_shared() -> bool:
        assigned = [worker.events("partitions assigned") for worker in workers]
        held = [lines[-1]["partitions"] if lines else [] for lines in assigned]
        return all(held) and sorted(p for each in held for p in each) == list(range(PARTITIONS))

    wait_for(are_shared, "the partitions are shared")


MAX_UNFLUSHED = 500
"""Units that are sent before what was sent is waited for: after a stall of the machine more of them would be late."""


@contextmanager
def sending(
    settings: Settings,
    send_unit: Callable[[TopicWriter], None],
    *,
    per_s: float,
    every_s: float = 0.02,
) -> Iterator[None]:
    """Send units in the background at an even rate for as long as the block takes; what fails there fails here.

    Args:
        settings: brokers and prefix.
        send_unit: queues the records of the next unit.
        per_s: units a second.
        every_s: between two waits for what was sent, each of which makes a batch of records for each partition. The
            embedded broker gives out one batch a fetch, so more of them than there are fetches pile up.
    """
    failed: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            with TopicWriter(settings) as writer:
                begun, units = time.monotonic(), 0
                while not over.wait(every_s):
                    due = min(int((time.monotonic() - begun) * per_s), units + MAX_UNFLUSHED)
                    for _ in range(due - units):
                        send_unit(writer)
                    units = due
                    writer.flush()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failed, failed


class Traffic:
    """Exposures and rewards as applications send them: repeated, out of order, late, and some of them bad."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self._settings = settings
        self._random = random.Random(seed)
        self._units = 0
        self.sent: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()

    def send(self, units: int) -> None:
        """Send some units."""
        with TopicWriter(self._settings) as writer:
            for _ in range(units):
                self._send_unit(writer)
            writer.flush()

    def flowing(self, *, per_s: float = 300.0) -> AbstractContextManager[None]:
        """Send units in the background at an even rate, for as long as the block takes."""
        return sending(self._settings, self._send_unit, per_s=per_s)

    def _send_unit(self, writer: TopicWriter) -> None:
        draw = self._random
        self._units += 1
        unit, time_ms = f"m{self._units}", now_ms() - draw.randint(0, 200)
        events = [("exposures", {"id": f"x{unit}", "experiment": "checkout", "arm": draw.choice("ab")}, 0)]
        if draw.random() < 0.3:
            events.append(("rewards", {"id": f"c{unit}", "metric": "click"}, draw.randint(0, 450)))
        if draw.random() < 0.3:
            value = round(draw.uniform(-20, 500), 3)
            events.append(
                ("rewards", {"id": f"s{unit}", "metric": "spend", "value": value}, draw.randint(0, 450))
            )
        if draw.random() < 0.3:
            events.reverse()
        if draw.random() < 0.02:
            events.append(("exposures", {"id": f"y{unit}", "experiment": "checkout", "arm": "b"}, 1))
        if draw.random() < 0.02:
            events.append(("rewards", {"id": f"z{unit}", "metric": "click"}, -LATENESS_MS - 5_000))
        if draw.random() < 0.02:
            events.append(("exposures", {"id": f"w{unit}", "experiment": "checkout", "arm": "nobody"}, 0))
        for topic, event, after_ms in events:
            value = json.dumps({**event, "unit": unit, "time": time_ms + after_ms}).encode()
            copies = 2 if draw.random() < 0.1 and "nobody" not in event.values() and after_ms >= 0 else 1
            for _ in range(copies):
                writer.send(self._settings.topic(topic), key=unit.encode(), value=value)
            self.sent[topic] += copies
            self.duplicates[topic] += copies - 1


# What stands on the topics ---------------------------------------------------------------------------------


def statistics(settings: Settings) -> list[PartitionStatistics]:
    """The newest statistics of each partition."""
    with open_reader(settings) as reader:
        return read_statistics(reader, settings)


def ends(settings: Settings) -> dict[tuple[str, int], int]:
    """End offset of every partition of the raw topics."""
    with open_reader(settings) as reader:
        return {
            (topic, partition): reader.bounds(settings.topic(topic), partition)[1]
            for topic in ("exposures", "rewards")
            for partition in range(settings.partitions)
        }


def applied(parts: list[PartitionStatistics]) -> dict[tuple[str, int], int]:
    """Next offset of every partition that the statistics stand at."""
    return {
        (topic, part.partition): getattr(part, topic).next_offset or 0
        for part in parts
        for topic in ("exposures", "rewards")
    }


def final(settings: Settings) -> list[PartitionStatistics]:
    """The statistics, once they cover every record and every unit is mature."""
    wanted = ends(settings)
    parts: list[PartitionStatistics] = []

    def settled() -> bool:
        parts[:] = statistics(settings)
        return applied(parts) == wanted and all(map(_mature, parts))

    wait_for(settled, f"statistics cover {wanted} and are mature")
    return parts


def _mature(part: PartitionStatistics) -> bool:
    units = sum(row.units for row in part.statistics.units)
    cells = part.statistics.moments
    return part.reward_outcomes.waiting == 0 and all(
        sum(cell.n for cell in cells if cell.metric == metric) == units for metric in ("click", "spend")
    )


def merged(parts: list[PartitionStatistics]) -> ExperimentStatistics:
    return merge(part.statistics for part in parts)


def outcomes(parts: list[PartitionStatistics]) -> dict[str, Outcomes]:
    return {
        "exposures": add_outcomes(part.exposure_outcomes for part in parts),
        "rewards": add_outcomes(part.reward_outcomes for part in parts),
    }


def assert_true(settings: Settings, traffic: Traffic, parts: list[PartitionStatistics]) -> None:
    """The statistics are those of the raw topics, byte for byte, and every record sent has one outcome."""
    report = check(settings)
    assert report.equal, [str(difference) for difference in report.differences]
    assert report.checked == settings.partitions
    for topic, counted in outcomes(parts).items():
        assert counted.conserved()
        assert counted.read == traffic.sent[topic]
        assert counted.duplicate == repeated(settings, topic) <= traffic.duplicates[topic]
        assert counted.counted > 0
    assert not any(part.behind_watermark for part in parts)


def repeated(settings: Settings, topic: str) -> int:
    """Records of a raw topic that repeat one before them; one that came too late for that is late, and no duplicate.

    A copy is late where its sender was kept from running.
    """
    found = 0
    with open_reader(settings) as reader:
        for partition in range(settings.partitions):
            admitted, log_ms = set[str](), 0
            for record in reader.read_all(settings.topic(topic), partition):
                event = json.loads(record.value or b"")
                log_ms = max(log_ms, record.timestamp_ms)
                if event["time"] + settings.allowed_lateness_ms >= log_ms:
                    found += event["id"] in admitted
                    admitted.add(event["id"])
    return found


def committed(settings: Settings) -> dict[tuple[str, int], int]:
    """Offsets that the group has committed on the raw topics."""
    client = KafkaAdminClient(**settings.kafka_python_options())
    try:
        found = client.list_group_offsets({settings.group_id: None})[settings.group_id]
    finally:
        client.close()
    return {
        (at.topic.removeprefix(settings.prefix), at.partition): offset.offset
        for at, offset in found.items()
        if isinstance(at, TopicPartition)
        and at.topic.removeprefix(settings.prefix) in ("exposures", "rewards")
    }


def snapshots(settings: Settings) -> dict[tuple[str, int], int]:
    """Next offset of every partition that the newest snapshots stand at."""
    newest: dict[int, Manifest] = {}
    with open_reader(settings) as reader:
        for partition in range(settings.partitions):
            for record in reader.read_all(settings.topic("state"), partition):
                if record.key is not None and record.value is not None and record.key.count(b"/") == 1:
                    manifest = msgspec.json.decode(record.value, type=Manifest)
                    if partition not in newest or manifest.applied >= newest[partition].applied:
                        newest[partition] = manifest
    return {
        (topic, partition): getattr(manifest, topic).next_offset
        for partition, manifest in newest.items()
        for topic in ("exposures", "rewards")
    }


def records(settings: Settings, name: str) -> list[Any]:
    """Every record of a topic of ours, decoded."""
    with TopicReader(settings, settings.topic(name)) as reader:
        return [msgspec.json.decode(record.value) for record in reader.backlog() if record.value]
