"""From when applications follow new weights: never before units that are drawn with them can be counted."""

from __future__ import annotations

import asyncio
import functools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.events import Exposure
from stream_xp.engine.registry import Entry, Registry
from stream_xp.errors import RecordRejected
from stream_xp.settings import Settings
from tests.unit.services.decide_world import Log, T, block, settle, stage
from tests.unit.services.test_decide_rollout import BETTER, HARMED, RAMP, Applied, experiment, statistics

DELAY_MS = Settings().activation_delay_ms
APART_MS = DELAY_MS // 2


class SlowLog(Log):
    """A topic of specs whose broker appends so much later than the worker wrote, by the broker's clock."""

    lag_ms = 0

    def entries(self) -> list[Entry]:
        return [
            msgspec.structs.replace(entry, in_force_ms=T + self.lag_ms + DELAY_MS)
            for entry in super().entries()
        ]


@functools.cache
def moved(lag_ms: int, *, harmed: bool = False) -> tuple[ConfigRecord, Registry]:
    """The config after one decision of a ramp, and what the engine knows by then."""
    log = SlowLog()
    log.lag_ms = lag_ms
    with pytest.MonkeyPatch.context() as patch:
        log.serve(patch)
        record = experiment(ramp=RAMP)
        decide = stage(log, Applied(record))  # type: ignore[arg-type]

        async def scenario() -> None:
            await decide.on_block(block(statistics(record, 400, **(HARMED if harmed else BETTER))))
            await settle(decide)

        asyncio.run(scenario())
    return log.configs()[-1], log.registries[0]


def taken(config: ConfigRecord, registry: Registry, *, log_ms: int) -> bool:
    """Whether an exposure that was drawn with the weights of the config is counted in their epoch."""
    exposure = Exposure(
        id="e",
        time=config.effective_ms,
        experiment="exp",
        unit="u",
        arm="a",
        weight_epoch=config.weight_epoch,
    )
    try:
        slot, _, epoch, _ = registry.route_exposure(exposure, log_ms)
    except RecordRejected:
        return False
    return slot >= 0 and epoch == config.weight_epoch


@given(st.sampled_from([-APART_MS, 0, 1, APART_MS, 60_000]), st.integers(0, APART_MS), st.integers(0, 10_000))
def test_a_unit_drawn_with_new_weights_counts_if_clocks_are_no_further_apart_than_is_allowed(
    lag_ms: int, ahead_ms: int, sending_ms: int
) -> None:
    """The application's clock is so far ahead of that of the broker which appends what it sends."""
    config, registry = moved(lag_ms)
    assert (config.status, config.weight_epoch) == (RolloutStatus.RUNNING, 1)
    assert taken(config, registry, log_ms=config.effective_ms - ahead_ms + sending_ms)


@pytest.mark.parametrize("lag_ms", [0, 1, 30_000])
def test_and_not_if_they_are_further_apart(lag_ms: int) -> None:
    config, registry = moved(lag_ms)
    assert config.effective_ms == T + lag_ms + DELAY_MS + APART_MS
    assert not taken(config, registry, log_ms=config.effective_ms - APART_MS - 1)


def test_the_weight_epoch_begins_as_late_where_its_record_is_appended_at_once() -> None:
    """Or exposures that name no epoch would be taken to be drawn with weights that nobody follows yet."""
    config, registry = moved(0)
    record = registry.newest("exp", 1)
    assert record is not None
    assert record.epochs[-1].effective_ms == config.effective_ms


def test_a_stop_is_followed_at_once_however_late_its_record_is() -> None:
    config, registry = moved(30_000, harmed=True)
    assert (config.status, config.effective_ms) == (RolloutStatus.STOPPED, T)
    assert registry.known_from("exp", 1) == T + 30_000 + DELAY_MS
