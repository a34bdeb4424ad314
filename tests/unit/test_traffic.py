"""The endless traffic: who comes, what they do, and that an experiment that has ended is left alone."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.events import Exposure, Reward
from stream_xp.services.spec_file import load_spec
from stream_xp.services.traffic import _SPECS, LONGEST_DELAY_MS, WORLD, Crowd, Sending
from stream_xp.simulator import EXPOSURES, REWARDS

HARM_MS = 150_000
END_MS = 300_000
TICK_MS = 100


def follow(**changed: RolloutStatus) -> dict[str, ConfigRecord]:
    return {
        name: ConfigRecord(
            experiment=name,
            version=1,
            status=changed.get(name.replace("-", "_"), RolloutStatus.RUNNING),
            weights=load_spec(_SPECS / f"{name}.yaml").weights,
            weight_epoch=3,
            effective_ms=0,
            config_version=1,
        )
        for name in WORLD
    }


def drawn(followed: dict[str, ConfigRecord], *, units_per_s: float = 200, seed: int = 5) -> list[Sending]:
    crowd = Crowd(seed, run="r", units_per_s=units_per_s, harm_ms=HARM_MS)
    return [
        sending
        for at in range(0, END_MS + 2 * LONGEST_DELAY_MS, TICK_MS)
        for sending in crowd.between(at, at + TICK_MS, followed if at < END_MS else {})
    ]


@pytest.fixture(scope="module")
def sent() -> list[Sending]:
    return drawn(follow())


def exposures(sent: list[Sending]) -> dict[str, Exposure]:
    found = [msgspec.json.decode(one.value, type=Exposure) for one in sent if one.topic == EXPOSURES]
    return {one.unit: one for one in found}


def rewards(sent: list[Sending]) -> list[Reward]:
    return [msgspec.json.decode(one.value, type=Reward) for one in sent if one.topic == REWARDS]


def test_the_specs_name_what_the_truth_names() -> None:
    for name, truth in WORLD.items():
        spec = load_spec(_SPECS / f"{name}.yaml")
        assert set(truth.rates) == {metric.listens_to for metric in spec.metrics}
        assert all(set(rates) == set(spec.weights) for rates in truth.rates.values())
        assert all(metric.window_ms > LONGEST_DELAY_MS for metric in spec.metrics)
    assert sum(truth.share for truth in WORLD.values()) == pytest.approx(1)


def test_keys_are_units_and_no_id_comes_twice(sent: list[Sending]) -> None:
    seen = exposures(sent)
    assert len(seen) == sum(one.topic == EXPOSURES for one in sent)
    assert {one.key for one in sent} <= {unit.encode() for unit in seen}
    ids = [reward.id for reward in rewards(sent)]
    assert len(set(ids)) == len(ids)
    assert all(one.weight_epoch == 3 for one in seen.values())


def test_rewards_come_after_their_exposures_within_the_window(sent: list[Sending]) -> None:
    seen = exposures(sent)
    delays = [reward.time - seen[reward.unit].time for reward in rewards(sent)]
    assert min(delays) >= 1
    assert max(delays) <= LONGEST_DELAY_MS
    order = [one.topic for one in sent]
    assert len(order) == len(delays) + len(seen)


def test_rates_arms_and_the_onset_are_as_told(sent: list[Sending]) -> None:
    seen = exposures(sent)
    late = {unit: int(one.time) >= HARM_MS for unit, one in seen.items()}
    units = Counter((one.experiment, one.arm, late[unit]) for unit, one in seen.items())
    hits = Counter(
        (seen[one.unit].experiment, one.metric, seen[one.unit].arm, late[one.unit]) for one in rewards(sent)
    )
    for name, truth in WORLD.items():
        for metric, rates in truth.rates.items():
            for arm, (before, after) in rates.items():
                for harmed, rate in ((False, before), (True, after)):
                    n = units[name, arm, harmed]
                    # Five standard errors: one of twenty checks fails by chance once in 100,000 seeds.
                    assert abs(hits[name, metric, arm, harmed] - n * rate) < 5 * (n * rate) ** 0.5 + 1
    total = len(seen)
    for name, config in follow().items():
        of_all = sum(units[name, arm, harmed] for arm in config.weights for harmed in (False, True))
        assert abs(of_all - total * WORLD[name].share) < 5 * total**0.5
        for arm, weight in config.weights.items():
            in_arm = units[name, arm, False] + units[name, arm, True]
            assert abs(in_arm - of_all * weight) < 5 * (of_all * weight) ** 0.5


def test_what_has_ended_is_exposed_no_more() -> None:
    sent = drawn(follow(checkout_canary=RolloutStatus.STOPPED, artwork=RolloutStatus.SHIPPED), units_per_s=50)
    assert {one.experiment for one in exposures(sent).values()} == {"aa"}


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert drawn(follow(), units_per_s=10) == drawn(follow(), units_per_s=10)
    assert drawn(follow(), units_per_s=10) != drawn(follow(), units_per_s=10, seed=6)
