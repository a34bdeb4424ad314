"""What follows from signals: the experiment record with the weight epoch that names one, and then the config.

Each step is taken only once the one before was read back from its topic, so that the order of the topic counts, not
that of this process. Whatever is missing is written at the next evaluation, by whoever is the owner then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import structlog

from stream_xp.adapters.clock import Clock
from stream_xp.domain.decision import Action, ConfigRecord
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.tracing import SpanName, Tracer
from stream_xp.engine.registry import FOREVER, Registry
from stream_xp.engine.standing import Demand
from stream_xp.engine.steering import config_after, config_is_due, epoch_after, epochs_spent, owed_epoch
from stream_xp.services.decide.heard import Heard
from stream_xp.services.decide.look import Look, Version
from stream_xp.services.decide.spans import about_config, about_epoch
from stream_xp.services.decide.topics import READ_BACK_MS, Topics
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)


class _Epoch(NamedTuple):
    """A weight epoch that was written and not read back: after how many others, for which signal, and when."""

    after: int
    signal_id: str
    written_ms: int


class Chain:
    """Writes the weight epochs and configs that are missing."""

    def __init__(
        self,
        settings: Settings,
        *,
        topics: Topics,
        heard: Heard,
        registry: Registry,
        clock: Clock,
        tracer: Tracer,
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._heard = heard
        self._registry = registry
        self._clock = clock
        self._tracer = tracer
        self._epochs: dict[Version, _Epoch] = {}

    async def follow_up(self, looks: Sequence[Look]) -> None:
        """Take the next step of each chain from signal to config where one is missing; come back for the one after."""
        owed: list[tuple[Look, Demand]] = []
        untold: list[ExperimentRecord] = []
        for look in looks:
            missing = self._missing(look)
            if isinstance(missing, Demand):
                owed.append((look, missing))
            elif missing is not None:
                untold.append(missing)
        await self._send_epochs(owed)
        await self._send_configs(untold)

    def drop(self) -> None:
        """Forget what is on its way back."""
        self._epochs.clear()

    def _missing(self, look: Look) -> Demand | ExperimentRecord | None:
        """The weight epoch that is asked for, or else the record whose config is missing."""
        record, heard = look.record, self._heard.standing(look.record)
        owed = owed_epoch(record, heard)
        if owed is None and not self._is_untold(record):
            return None
        in_force = self._registry.in_force(look.version[0], FOREVER - 1)
        over = isinstance(in_force, int)
        if not isinstance(in_force, int) and in_force[0].version > look.version[1]:
            return None  # Only the newer version can move now.
        if owed is None:
            return record if not over or record.epochs[-1].final else None
        return self._ended(record, owed) if over or epochs_spent(record) else owed

    def _is_untold(self, record: ExperimentRecord) -> bool:
        """Whether applications do not know yet where all that was said has brought an experiment."""
        heard = self._heard.standing(record)
        held = self._heard.config(record.spec.experiment)
        return owed_epoch(record, heard) is None and config_is_due(record, heard, held)

    def _ended(self, record: ExperimentRecord, owed: Demand) -> ExperimentRecord | None:
        """How an experiment ended that takes no more weight epochs: applications are told of it all the same."""
        if owed.action not in (Action.STOP, Action.SHIP):
            return None
        effective_ms = self._clock.now_ms() + self._settings.lead_ms
        last = epoch_after(record, owed, effective_ms=effective_ms)
        ended = msgspec.structs.replace(record, epochs=(*record.epochs, last))
        return ended if self._is_untold(ended) else None

    # --- the weight epoch ------------------------------------------------------------------------------------

    async def _send_epochs(self, owed: Sequence[tuple[Look, Demand]]) -> None:
        """Write the weight epochs that signals ask for, but for those that are on their way back already."""
        now_ms = self._clock.now_ms()
        written: dict[Version, _Epoch] = {}
        moved = []
        for look, demand in owed:
            look.watched.changed = True
            epoch = _Epoch(len(look.record.epochs), demand.signal_id, now_ms)
            if not self._is_on_its_way(look.version, epoch):
                written[look.version] = epoch
                after = epoch_after(look.record, demand, effective_ms=now_ms + self._settings.lead_ms)
                moved.append(msgspec.structs.replace(look.record, epochs=(*look.record.epochs, after)))
        with self._tracer.spans(SpanName.WEIGHT_EPOCH, [about_epoch(record) for record in moved]):
            await self._topics.write("experiments", [(record.spec.experiment, record) for record in moved])
        self._epochs |= written
        for record in moved:
            newest = record.epochs[-1]
            named = {"experiment": record.spec.experiment, "signal": newest.signal_id}
            log.info("weight epoch", **named, epoch=newest.epoch)

    def _is_on_its_way(self, version: Version, epoch: _Epoch) -> bool:
        """Whether it was written not long ago and must be read back yet."""
        written = self._epochs.get(version)
        if written is None or (written.after, written.signal_id) != (epoch.after, epoch.signal_id):
            return False
        return epoch.written_ms < written.written_ms + READ_BACK_MS

    # --- the config ------------------------------------------------------------------------------------------

    async def _send_configs(self, untold: Sequence[ExperimentRecord]) -> None:
        """Write the configs that follow from the newest weight epochs, unless they are there."""
        if not untold:
            return
        # Others write configs too: `apply` gives a new experiment its first.
        await self._heard.hear()
        configs = [self._config(record) for record in untold if self._is_untold(record)]
        with self._tracer.spans(SpanName.CONFIG, [about_config(config) for config in configs]):
            await self._topics.write("config", [(config.experiment, config) for config in configs])
        self._heard.wrote(configs)

    def _config(self, record: ExperimentRecord) -> ConfigRecord:
        held = self._heard.config(record.spec.experiment)
        in_force_ms = self._registry.known_from(record.spec.experiment, record.spec.version)
        return config_after(
            record,
            self._heard.standing(record),
            config_version=1 if held is None else held.config_version + 1,
            lead_ms=self._settings.lead_ms,
            known_ms=in_force_ms + self._settings.clocks_apart_ms,
        )
