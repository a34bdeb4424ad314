"""Runs the demo: broker, worker, traffic and a reader of what the service says, in one process."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from stream_xp.adapters.embedded_broker import EmbeddedBroker
from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.load_generator import LoadGenerator
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.errors import DependencyError, StreamXpError
from stream_xp.services.demo.board import Board
from stream_xp.services.demo.report import DemoReport, Measured, build_report
from stream_xp.services.demo.tail import Tail
from stream_xp.services.demo.world import ALLOWED_LATENESS_MS, DURATION_S, World, build_world
from stream_xp.services.publish import plan_application, publish
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings
from stream_xp.simulator import TOPICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ACTIVATION_DELAY_MS: Final = 1_000
LEAD_MS: Final = 500
"""From now to the start of the traffic, once everything is ready."""
POLL_MS: Final = 50
SAMPLE_EVERY: Final = 7
SETTLE_TIMEOUT_S: Final = 20.0
"""Without any progress; a busy machine may take much longer for all of it."""


class Moment(NamedTuple):
    """How the demo stands, for whoever watches it; times in seconds from the start of the traffic."""

    phase: str
    elapsed_s: float
    duration_s: float
    sent: int
    world: World
    board: Board


def run_demo(
    seed: int, *, duration_s: float = DURATION_S, watch: Callable[[Moment], None] | None = None
) -> DemoReport:
    """Run the demo for its whole duration and report.

    It does not end early when the canary is stopped and the artwork is shipped: the A/A test is looked at
    for as long as was planned, whatever the others do.

    Args:
        seed: of the traffic.
        duration_s: of the traffic; the number of units stays the same.
        watch: called some twenty times a second, in this thread.

    Raises:
        ConfigError: the duration is out of range, or confluent-kafka is not installed.
        DependencyError: the broker or the worker failed.

    """
    world = build_world(seed, duration_s=duration_s)
    with ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker())
        settings = Settings(
            bootstrap=broker.bootstrap,
            broker="embedded",
            allowed_lateness_ms=ALLOWED_LATENESS_MS,
            activation_delay_ms=ACTIVATION_DELAY_MS,
        )
        for topic in declared_topics(settings):
            broker.create_topic(topic.name, topic.partitions)
        _apply_specs(world, settings)
        return _Run(world, settings, watch or (lambda _moment: None)).run(stack)


def _apply_specs(world: World, settings: Settings) -> None:
    for traffic in world.traffic.scenario.experiments:
        now_ms = time.time_ns() // 1_000_000
        publish(settings, plan_application(settings, traffic.spec, now_ms=now_ms))


class _Run:
    """One run on a broker that has the topics and the specs."""

    def __init__(self, world: World, settings: Settings, watch: Callable[[Moment], None]) -> None:
        self._world = world
        self._settings = settings
        self._watch = watch
        self._board = Board()
        self._start_s = 0.0
        self._start_ms = 0

    def run(self, stack: ExitStack) -> DemoReport:
        """Start the worker, send the traffic, wait until all of it is counted."""
        generator = stack.enter_context(LoadGenerator(self._settings, sample_every=SAMPLE_EVERY))
        self._show("starting the worker; the first start compiles for a while", generator)
        began_s = time.monotonic()
        with _working(self._settings) as worker, Tail(self._settings) as tail:
            self._start_ms = time.time_ns() // 1_000_000 + ACTIVATION_DELAY_MS + LEAD_MS
            self._start_s = time.monotonic() + (ACTIVATION_DELAY_MS + LEAD_MS) / 1000
            with self._sending(generator) as sender:
                while sender.is_alive():
                    self._step("running", worker, tail, generator)
            self._settle(worker, tail, generator)
        engine_s = time.monotonic() - began_s
        measured = Measured(
            start_s=self._start_s,
            start_ms=self._start_ms,
            engine_s=engine_s,
            sent={name: generator.delivered[self._settings.topic(name)] for name in TOPICS},
            dead_letters=self._dead_letters(),
        )
        self._board.passed_over.tell()
        delays = self._board.delays(generator.samples, self._settings.prefix)
        return build_report(self._world, self._board, delays, measured)

    @contextmanager
    def _sending(self, generator: LoadGenerator) -> Iterator[threading.Thread]:
        """Send the traffic in a thread of its own, and stop it if this one is left early."""
        stop, failures = threading.Event(), list[BaseException]()

        def send() -> None:
            try:
                chunks = self._world.traffic.chunks(self._start_ms)
                generator.send(chunks, start_ms=self._start_ms, stop=stop)
            except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
                failures.append(error)

        sender = threading.Thread(target=send, name="stream-xp-demo-traffic", daemon=True)
        sender.start()
        try:
            yield sender
        finally:
            stop.set()
            sender.join()
        for failure in failures:
            raise failure

    def _settle(self, worker: WorkerThread, tail: Tail, generator: LoadGenerator) -> None:
        """Wait until results stand on every record, and every unit's window is over."""
        progress, deadline = self._progress(), time.monotonic() + SETTLE_TIMEOUT_S
        while not self._settled(generator):
            self._step("waiting for the last windows to end", worker, tail, generator)
            if self._progress() != progress:
                progress, deadline = self._progress(), time.monotonic() + SETTLE_TIMEOUT_S
            if time.monotonic() > deadline:
                raise DependencyError(
                    f"the service stood still for {SETTLE_TIMEOUT_S:.0f} s before it had counted all records"
                )

    def _progress(self) -> tuple[int, int]:
        """Return how many records the results stand on, and how far their watermarks have come in all."""
        results = self._board.results.values()
        read = sum(result.exposure_outcomes.read + result.reward_outcomes.read for result in results)
        marks = (at.watermark_ms or 0 for result in results for at in result.offsets.values())
        return read, sum(marks)

    def _settled(self, generator: LoadGenerator) -> bool:
        sent = [generator.delivered[self._settings.topic(name)] for name in TOPICS]
        return len(self._board.results) == len(self._world.expected) and all(
            [result.exposure_outcomes.read, result.reward_outcomes.read] == sent
            and min(offsets.watermark_ms or 0 for offsets in result.offsets.values()) >= self._complete_ms()
            for result in self._board.results.values()
        )

    def _complete_ms(self) -> int:
        """Return the watermark at which every unit is mature."""
        scenario = self._world.traffic.scenario
        windows = (traffic.spec.longest_window_ms for traffic in scenario.experiments)
        return self._start_ms + scenario.duration_ms + max(windows) + scenario.allowed_lateness_ms

    def _step(self, phase: str, worker: WorkerThread, tail: Tail, generator: LoadGenerator) -> None:
        for seen in tail.poll(POLL_MS):
            self._board.take(seen)
        with _errors_of_worker():
            worker.check()
        self._show(phase, generator)

    def _show(self, phase: str, generator: LoadGenerator) -> None:
        elapsed_s = time.monotonic() - self._start_s if self._start_s else 0.0
        duration_s = self._world.traffic.scenario.duration_ms / 1000
        sent = sum(generator.delivered.values())
        self._watch(Moment(phase, max(elapsed_s, 0.0), duration_s, sent, self._world, self._board))

    def _dead_letters(self) -> dict[str, int]:
        names = {self._settings.topic(name): name for name in TOPICS}
        with TopicReader(self._settings, self._settings.topic("deadletter")) as reader:
            letters = [
                self._board.passed_over.decoded(
                    record.value, DeadLetter, topic=record.topic, place=record.place
                )
                for record in reader.backlog()
            ]
        return dict(
            Counter(
                f"{names.get(letter.topic, letter.topic)} {letter.reason}" for letter in letters if letter
            )
        )


@contextmanager
def _working(settings: Settings) -> Iterator[WorkerThread]:
    """Run a worker, and say of every error of its own that it is the worker's."""
    worker = WorkerThread(settings)
    with _errors_of_worker():
        worker.__enter__()
    try:
        yield worker
    except BaseException as error:
        worker.__exit__(type(error), error, error.__traceback__)
        raise
    with _errors_of_worker():
        worker.__exit__(None, None, None)


@contextmanager
def _errors_of_worker() -> Iterator[None]:
    try:
        yield
    except StreamXpError:
        raise
    except Exception as error:
        # Anything can end a worker, Faust's own faults too; whoever runs the demo is told in one line.
        raise DependencyError(f"the worker failed: {error!r}") from error
