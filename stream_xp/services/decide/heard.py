"""What was said of experiments: the topics of signals and config, read from their beginning and followed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from stream_xp.adapters.kafka_log import LogTail
from stream_xp.domain.decision import ConfigRecord
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.engine.standing import NOTHING_SAID, Said, Standing, said, standing
from stream_xp.services.decide.look import Version
from stream_xp.services.decide.records import own_or_none, signal_or_none
from stream_xp.services.decide.topics import Topics

log = structlog.get_logger(__name__)

_HEAR_S = 0.05


class Heard:
    """All signals ever sent, in the order of the topic, and the newest config of each experiment.

    Args:
        on_signal: told the experiment of each signal that comes.
    """

    def __init__(self, topics: Topics, on_signal: Callable[[str], None]) -> None:
        self._topics = topics
        self._on_signal = on_signal
        self._said: dict[Version, list[Said]] = {}
        self._standings: dict[Version, tuple[int, Standing]] = {}
        self._configs: dict[str, ConfigRecord] = {}
        self._tails: dict[str, LogTail] = {}
        self._reading = asyncio.Lock()
        self._take: dict[str, Callable[[bytes], None]] = {
            "signals": self._take_signal,
            "config": self._take_config,
        }

    async def listen(self) -> None:
        """Connect, unless it is done, and read all that stands there."""
        async with self._reading:
            for name in [name for name in self._take if name not in self._tails]:
                tail = self._topics.tail(name)
                await tail.start()
                self._tails[name] = tail
        await self.hear()

    async def follow(self) -> None:
        """Read what is new, for ever; nothing before `listen`."""
        while True:
            await self.hear()
            await asyncio.sleep(_HEAR_S)

    async def hear(self) -> None:
        """Read what stands on the topics by now, and was not read before."""
        async with self._reading:
            await asyncio.gather(*(self._read_on(name, tail) for name, tail in self._tails.items()))

    async def stop(self) -> None:
        """Disconnect."""
        async with self._reading:
            while self._tails:
                await self._tails.popitem()[1].stop()

    def standing(self, record: ExperimentRecord) -> Standing:
        """Where a version stands after all that was heard of it."""
        key = (record.spec.experiment, record.spec.version)
        heard = self._said.setdefault(key, [])
        count, held = self._standings.get(key, (0, NOTHING_SAID))
        if count != len(heard):
            before, held = held, standing(record.spec, heard)
            self._standings[key] = (len(heard), held)
            for one in held.ignored[len(before.ignored) :]:
                log.warning(
                    "signal changes nothing",
                    experiment=key[0],
                    signal=one.id,
                    source=one.source,
                    rule=one.rule,
                )
        return held

    def config(self, experiment: str) -> ConfigRecord | None:
        """The newest config of an experiment."""
        return self._configs.get(experiment)

    def wrote(self, configs: Iterable[ConfigRecord]) -> None:
        """Keep configs that are on the topic now."""
        self._configs |= {config.experiment: config for config in configs}

    async def _read_on(self, name: str, tail: LogTail) -> None:
        at_end = False
        while not at_end:
            records, at_end = await tail.poll()
            for record in records:
                if record.value is not None:
                    with self._topics.place(name, record):
                        self._take[name](record.value)

    def _take_signal(self, value: bytes) -> None:
        """Keep what one record of the topic of signals says; what is none is reported and left out."""
        record = signal_or_none(value)
        if record is None:
            return
        one = said(record)
        self._said.setdefault((one.experiment, one.version), []).append(one)
        self._on_signal(one.experiment)

    def _take_config(self, value: bytes) -> None:
        """Keep the newest config: not the last one, for who has lost its partitions can still write an older one."""
        config = own_or_none(value, ConfigRecord)
        if config is None:
            return
        held = self._configs.get(config.experiment)
        if held is None or config.config_version >= held.config_version:
            self._configs[config.experiment] = config
