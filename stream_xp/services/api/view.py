"""What the topics say, in memory: written by the thread that reads them, asked by whoever answers a request.

Every replica that has read the same records holds the same view; nothing of it is kept anywhere else.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from stream_xp.domain.codec import decode_experiment
from stream_xp.domain.decision import ConfigRecord, Result
from stream_xp.domain.experiment import ExperimentRecord, Role
from stream_xp.engine.gate import Known, Limits, Moment, gate_verdict, invalid_reasons
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.standing import NOTHING_SAID, Standing, said, standing
from stream_xp.engine.standing import Said as Heard
from stream_xp.errors import ConfigError
from stream_xp.services.api.history import History, HistoryPoint, point_of
from stream_xp.services.api.wire import Said, said_by
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.signal_records import experiment_of, readable

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_xp.adapters.clock import Clock
    from stream_xp.adapters.topic_reader import TopicRecord
    from stream_xp.domain.gate import GateVerdict
    from stream_xp.settings import Settings

Kind = TypeVar("Kind", ConfigRecord, Result)
TOPICS: Final = ("experiments", "config", "signals", "results")
SIGNALS_KEPT: Final = 100
"""Newest signals and orders of each experiment that are shown; all of them count."""


@dataclass(slots=True)
class Watched:
    """All that is known of one experiment.

    Attributes:
        record: the newest one that the engine does not refuse.
        said: what was said of each version, in the order of the topic.
        ids: source and id of all of it.
        valid_ms: evaluation time of the newest result of its version with valid data.
    """

    registry: Registry = field(default_factory=Registry)
    record: ExperimentRecord | None = None
    config: ConfigRecord | None = None
    result: Result | None = None
    valid_ms: int | None = None
    said: dict[int, list[Heard]] = field(default_factory=dict)
    ids: set[tuple[str, str]] = field(default_factory=set)
    standings: dict[int, tuple[int, Standing]] = field(default_factory=dict)
    signals: deque[Said] = field(default_factory=lambda: deque(maxlen=SIGNALS_KEPT))
    history: History = field(default_factory=History)

    def standing(self) -> Standing:
        """Where the record's version stands after all that was said of it."""
        if self.record is None:
            return NOTHING_SAID
        version = self.record.spec.version
        heard = self.said.get(version, [])
        count, held = self.standings.get(version, (0, NOTHING_SAID))
        if count != len(heard):
            held = standing(self.record.spec, heard)
            self.standings[version] = (len(heard), held)
        return held


class View:
    """All experiments, as the topics have them.

    Args:
        settings: how old what is known may be.
        clock: wall clock.
        read_ms: when the topics were last known to be read to their end; `Follower.read_ms`.
    """

    def __init__(
        self, settings: Settings, *, clock: Clock, read_ms: Callable[[], int | None] = lambda: None
    ) -> None:
        self._clock = clock
        self._read_ms = read_ms
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}
        self._passed_over = PassedOver()
        self.limits = Limits(settings.gate_maximum_age_ms, settings.gate_maximum_silence_ms)
        self.started_ms = clock.now_ms()

    def follow_clock_of(self, read_ms: Callable[[], int | None]) -> None:
        """Take the progress of a reader that was made after this."""
        self._read_ms = read_ms

    @property
    def passed_over(self) -> dict[str, int]:
        """How many records of each topic could not be read."""
        return dict(self._passed_over.counts)

    def moment(self) -> Moment:
        """Now, and how far reading is."""
        return Moment(self._clock.now_ms(), self.started_ms, self._read_ms())

    # --- asked ---------------------------------------------------------------------------------------------

    def verdict(self, experiment: str, arm: str | None = None) -> GateVerdict:
        """The verdict of every gate on an arm of an experiment, or on all its treatments."""
        return gate_verdict(experiment, arm, self.known(experiment), moment=self.moment(), limits=self.limits)

    def known(self, experiment: str) -> Known:
        """What the topics say of an experiment."""
        with self._lock:
            held = self._watched.get(experiment)
            if held is None:
                return Known()
            return Known(held.record, held.standing(), held.config, held.result, held.valid_ms)

    def names(self) -> list[str]:
        """Every experiment that has a record, in alphabetical order."""
        with self._lock:
            return sorted(name for name, held in self._watched.items() if held.record is not None)

    def signals(self, experiment: str) -> list[Said]:
        """The newest signals and orders of an experiment, oldest first."""
        with self._lock:
            held = self._watched.get(experiment)
            return [] if held is None else list(held.signals)

    def history(self, experiment: str) -> tuple[HistoryPoint, ...]:
        """Looks of an experiment that are remembered, oldest first."""
        with self._lock:
            held = self._watched.get(experiment)
            return () if held is None else held.history.points()

    def has_order(self, experiment: str, *, actor: str, reason: str) -> bool:
        """Whether somebody ordered something for this reason, of the version that is there."""
        with self._lock:
            held = self._watched.get(experiment)
            if held is None or held.record is None:
                return False
            heard = held.said.get(held.record.spec.version, ())
            orders = [one.order for one in heard if one.order is not None]
            return any((order.actor, order.reason) == (actor, reason) for order in orders)

    # --- written -------------------------------------------------------------------------------------------

    def take(self, topic: str, record: TopicRecord) -> None:
        """Take in a record; what is none is counted and left out.

        Args:
            topic: its name without the prefix.
            record: as the broker gave it.
        """
        if record.key is None:
            self._passed_over.note("without a key", topic=record.topic, place=record.place)
            return
        key = record.key.decode(errors="replace")
        {
            "experiments": self._take_experiment,
            "config": self._take_config,
            "signals": self._take_signal,
            "results": self._take_result,
        }[topic](key, record)

    def _take_experiment(self, key: str, record: TopicRecord) -> None:
        """The record that the engine goes by: the last one that it does not refuse."""
        found: ExperimentRecord | None = None
        if record.value is not None:
            try:
                found = decode_experiment(key, record.value)
            except ConfigError as error:
                self._passed_over.note(str(error), topic=record.topic, place=record.place)
                return
        entry = Entry(offset=record.offset, experiment=key, in_force_ms=record.log_time_ms, record=found)
        with self._lock:
            held = self._watched.setdefault(key, Watched())
            refused = held.registry.add([entry])
            if not refused:
                held.record = found
        for one in refused:
            self._passed_over.note(f"refused: {one.rule}", topic=record.topic, place=record.place)

    def _take_config(self, key: str, record: TopicRecord) -> None:
        found = None if record.value is None else self._decoded(record, ConfigRecord)
        if record.value is not None and (found is None or self._is_of_another(key, found.experiment, record)):
            return
        with self._lock:
            held = self._watched.setdefault(key, Watched())
            # A worker that has lost its partitions can still write an older one last.
            if found is None or held.config is None or found.config_version >= held.config.config_version:
                held.config = found

    def _take_signal(self, key: str, record: TopicRecord) -> None:
        if record.value is None:
            return
        found = readable(self._passed_over, record.value, topic=record.topic, place=record.place)
        if found is None or self._is_of_another(key, experiment_of(found), record):
            return
        one, shown = said(found), said_by(found)
        with self._lock:
            held = self._watched.setdefault(key, Watched())
            heard = held.said.setdefault(one.version, [])
            if (one.source, one.id) in held.ids:
                return  # A repeat counts once, and is shown once.
            held.ids.add((one.source, one.id))
            heard.append(one)
            held.signals.append(shown)

    def _take_result(self, key: str, record: TopicRecord) -> None:
        if record.value is None:
            with self._lock:
                held = self._watched.setdefault(key, Watched())
                held.result, held.valid_ms = None, None
            return
        found = self._decoded(record, Result)
        if found is None or self._is_of_another(key, found.experiment, record):
            return
        if any(metric.role not in _ROLES for metric in found.metrics):
            self._passed_over.note("of a role that is none", topic=record.topic, place=record.place)
            return
        point = point_of(found)
        with self._lock:
            held = self._watched.setdefault(key, Watched())
            before = held.result
            if before is not None and (found.version, found.look) < (before.version, before.look):
                return  # From a worker that has lost the experiment.
            if before is not None and before.version != found.version:
                held.valid_ms = None
            held.result = found
            held.history.add(point)
            if not invalid_reasons(found):
                held.valid_ms = found.evaluated_ms

    def _decoded(self, record: TopicRecord, kind: type[Kind]) -> Kind | None:
        return self._passed_over.decoded(record.value, kind, topic=record.topic, place=record.place)

    def _is_of_another(self, key: str, experiment: str, record: TopicRecord) -> bool:
        if key == experiment:
            return False
        self._passed_over.note(
            "under a key that is not its experiment", topic=record.topic, place=record.place
        )
        return True


_ROLES: Final = frozenset(role.value for role in Role)
