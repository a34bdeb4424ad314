"""An order of a person takes effect at the next evaluation, whether or not there are new statistics by then."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from tests.unit.services.decide_world import Log, stage
from tests.unit.services.test_decide_rollout import RAMP, Applied, World, experiment, order


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def says(config: ConfigRecord) -> tuple[RolloutStatus, float, bool]:
    return config.status, config.coverage, config.paused


STOPPED = (RolloutStatus.STOPPED, 0.0, False)


@pytest.mark.parametrize(
    ("said", "wanted", "evaluations"),
    [
        ([("stop", {})], STOPPED, 2),
        ([("ship", {"arm": "b"})], (RolloutStatus.SHIPPED, 1.0, False), 2),
        ([("set_stage", {"stage": 1})], (RolloutStatus.RUNNING, 1.0, False), 2),
        # No weight epoch is needed, so no step has to be read back.
        ([("pause", {})], (RolloutStatus.RUNNING, 0.25, True), 1),
        # Taken back before anybody followed it.
        ([("stop", {}), ("reset", {})], (RolloutStatus.RUNNING, 0.25, False), 2),
    ],
    ids=["stop", "ship", "set_stage", "pause", "stop and reset"],
)
def test_an_order_needs_no_new_statistics(log: Log, said: Any, wanted: Any, evaluations: int) -> None:
    """One evaluation for each step from the order to the config, and none of them waits for data."""

    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP, minimum_runtime="9w"))
        decide = world.worker()
        # Too few units for a decision of its own.
        await world.look(decide, per_arm=200)
        looks, configs = len(log.results()), len(log.configs())
        for at, (action, fields) in enumerate(said):
            log.append("xp.signals", order(action, f"o{at}", **fields))
        await decide.hear()
        for _ in range(evaluations):
            assert len(log.configs()) == configs
            await decide.evaluate()
        assert says(world.config) == wanted
        # Each of them is shown too.
        assert len(log.results()) == looks + evaluations

    asyncio.run(scenario())


def test_nothing_is_evaluated_again_without_news(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP))
        decide = world.worker()
        await world.look(decide, per_arm=200)
        looks = len(log.results())
        # An order of another experiment is none of this one's.
        log.append("xp.signals", order("stop", "o1").replace(b'"experiment":"exp"', b'"experiment":"other"'))
        for _ in range(3):
            await decide.hear()
            await decide.evaluate()
        assert len(log.results()) == looks

    asyncio.run(scenario())


def test_an_order_of_before_the_first_exposure_counts_with_it(log: Log) -> None:
    """Nobody owns an experiment without statistics; the first of them bring the order into effect."""

    async def scenario() -> None:
        record = experiment(ramp=RAMP)
        decide = stage(log, Applied(record))  # type: ignore[arg-type]
        log.append("xp.signals", order("stop", "o1"))
        await decide.hear()
        await decide.evaluate()
        assert log.topics.keys() == {"xp.signals"}
        world = World(log, record)
        await world.look(decide, per_arm=1)
        assert says(world.config) == STOPPED
        assert json.loads(log.topics["xp.config"][-1])["signal_id"] == "o1"

    asyncio.run(scenario())
