"""The records of one draw, and their truth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from stream_xp.domain.statistics import ExperimentStatistics, Outcomes
from stream_xp.errors import Reason
from stream_xp.simulator.columns import EXPOSURE, FOREVER, REWARD, TOPICS, Columns
from stream_xp.simulator.encoder import Encoder, Event
from stream_xp.simulator.malformed import MALFORMED
from stream_xp.simulator.scenario import Scenario
from stream_xp.simulator.truth import Standing, Truth, history_of, standing_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

START_MS: Final = 1_750_000_000_000
"""Start of traffic that is not sent anywhere, epoch milliseconds."""


class Chunk(NamedTuple):
    """Consecutive records, all due once `due_ms` have passed since the start."""

    due_ms: int
    events: list[Event]


@dataclass(frozen=True)
class Traffic:
    """The records of one draw, in the order of sending; `generate` makes it."""

    scenario: Scenario
    seed: int
    injected: Mapping[str, int]
    _records: Columns = field(repr=False)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def last_send_ms(self) -> int:
        """When the last record is sent, from the start; 0 if there is none."""
        return int(self._records.send_ms[-1]) if len(self) else 0

    def count(self, topic: str) -> int:
        """Return the number of records of a logical topic."""
        return int((self._records.topic == TOPICS.index(topic)).sum())

    def chunks(self, start_ms: int = START_MS, *, chunk_ms: int = 50) -> Iterator[Chunk]:
        """Encode the records in steps of `chunk_ms`, for traffic that starts at `start_ms` (epoch ms).

        A step without records is left out.
        """
        encoder = Encoder(self.scenario, start_ms)
        send_ms = self._records.send_ms
        first = 0
        while first < len(self):
            due_ms = (int(send_ms[first]) // chunk_ms + 1) * chunk_ms
            last = int(np.searchsorted(send_ms, due_ms, side="left"))
            yield Chunk(due_ms, encoder.events(self._records.take(slice(first, last))))
            first = last

    def events(self, start_ms: int = START_MS) -> Iterator[Event]:
        """Every record, for traffic that starts at `start_ms` (epoch ms)."""
        for chunk in self.chunks(start_ms, chunk_ms=1000):
            yield from chunk.events

    def truth(self, start_ms: int = START_MS) -> Truth:
        """Return what the engine must have found when all is over."""
        return Truth(
            statistics={
                traffic.spec.experiment: self.statistics(traffic.spec.experiment, start_ms)
                for traffic in self.scenario.experiments
            },
            exposure_outcomes=self._exposure_outcomes(),
            reward_outcomes=self._reward_outcomes(),
            dead_letters=self._dead_letters(),
            injected=self.injected,
        )

    def statistics(self, experiment: str, start_ms: int = START_MS) -> ExperimentStatistics:
        """Return the final statistics of one experiment."""
        return self.history(experiment, [FOREVER], start_ms)[0]

    def history(
        self, experiment: str, watermarks_ms: Sequence[int], start_ms: int = START_MS
    ) -> list[ExperimentStatistics]:
        """Return the statistics of one experiment at each of several watermarks, counted from the start.

        The engine may know units a little newer than its watermark, which are left out here; it tests only
        what is mature, and that is equal. Crossovers are known here before they happen.
        """
        index = [traffic.spec.experiment for traffic in self.scenario.experiments].index(experiment)
        marks = np.asarray(watermarks_ms, dtype=np.int64)
        return history_of(self._standing, self.scenario, index, start_ms=start_ms, marks=marks)

    @cached_property
    def _standing(self) -> Standing:
        return standing_of(self._records, self.scenario)

    def _outcome_counts(self, topic: int) -> dict[str, int]:
        records, standing = self._records, self._standing
        here = records.topic == topic
        bad = records.malformed[here & (records.malformed >= 0)]
        dead = sum(MALFORMED[kind].reason is not None for kind in bad.tolist())
        return {
            "read": int(here.sum()),
            "late": int((here & standing.late).sum()),
            "duplicate": int((here & standing.duplicate).sum()),
            "dead_lettered": dead,
            "unknown_experiment": len(bad) - dead,
        }

    def _exposure_outcomes(self) -> Outcomes:
        shared = self._outcome_counts(EXPOSURE)
        crossed = int(self._standing.crossed[self._standing.exposures.unit].sum())
        return Outcomes(**shared, crossover=crossed, counted=len(self._standing.exposures) - crossed)

    def _reward_outcomes(self) -> Outcomes:
        shared = self._outcome_counts(REWARD)
        counted = int(self._standing.attributed.sum())
        return Outcomes(**shared, counted=counted, unattributed=len(self._standing.rewards) - counted)

    def _dead_letters(self) -> dict[tuple[str, Reason], int]:
        counts: Counter[tuple[str, Reason]] = Counter()
        for kind in self._records.malformed[self._records.malformed >= 0].tolist():
            entry = MALFORMED[kind]
            if entry.reason is not None:
                counts[entry.topic, entry.reason] += 1
        return dict(counts)
