"""Effects by age: what is found from exact rows, that it is what `stats.novelty` says, and when it is flagged."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp import stats
from stream_xp.domain.decision import AgeChange, AgeResult
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.experiment_rules import rules
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.ages import DAY_MS, age_plans, age_results
from stream_xp.engine.evaluate import evaluate
from stream_xp.stats.batch import CrossArrays, MomentArrays

ENDS = ["1d", "3d", "7d"]
UNITS = 4000


def spec(**fields: Any) -> ExperimentSpec:
    shared = {"direction": "increase", "attribution_window": "1d", "role": "primary"}
    body: dict[str, Any] = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 2 * UNITS,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {"key": "spend", "kind": "mean", "bound": 1000.0, "scale": 0.5, **shared},
            {"key": "click", "kind": "conversion", **shared},
        ],
        "ages": {"metrics": ["spend"], "until": ENDS},
    }
    made = msgspec.convert(body | fields, ExperimentSpec)
    assert rules(made) == []
    return made


def record(made: ExperimentSpec, epochs: int = 1) -> ExperimentRecord:
    known = tuple(WeightEpoch(epoch=at, weights=made.weights, effective_ms=at) for at in range(epochs))
    return ExperimentRecord(spec=made, epochs=known, design_hash=made.design_hash())


def values(seed: int, effects: tuple[float, ...], *, days: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """Steps of each unit in each bucket, by arm: a level of the unit's own, and in `b` an effect per day."""
    rng = np.random.default_rng(seed)
    found = {}
    for arm in ("a", "b"):
        own = 20.0 + rng.gamma(4.0, 5.0, size=(UNITS, 1))
        more = np.array(effects) if arm == "b" else np.zeros(len(days))
        found[arm] = rng.poisson(own * np.array(days) + 2.0 * more * np.array(days)).astype(int)
    return found


def rows(drawn: dict[str, Any], *, epoch_of: Any = None, metric: str = "spend") -> ExperimentStatistics:
    moments, products, units = {}, {}, {}
    for arm, of_arm in drawn.items():
        epochs = np.zeros(len(of_arm), int) if epoch_of is None else epoch_of(len(of_arm))
        for epoch in np.unique(epochs).tolist():
            mine = of_arm[epochs == epoch]
            units[arm, epoch, ""] = len(mine)
            for at in range(mine.shape[1]):
                y = mine[:, at]
                key = (f"{metric}@age{at + 1}", arm, epoch, "")
                moments[key] = (len(y), int(y.sum()), int((y * y).sum()))
                if at == mine.shape[1] - 1:
                    x = mine[:, 0]
                    products[key] = (int(x.sum()), int((x * x).sum()), int((x * y).sum()))
    return build(
        units=units,
        moments=moments,
        products=products,
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )


def one(made: ExperimentSpec, statistics: ExperimentStatistics, epochs: int = 1) -> AgeResult:
    ((found,),) = age_results([(record(made, epochs), statistics)])
    return found


def cross(drawn: Any) -> CrossArrays:
    x, y = drawn[:, 0], drawn[:, -1]
    columns = (len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())
    return CrossArrays(*([[int(column)]] for column in columns))


def test_the_change_is_that_of_novelty_per_day() -> None:
    drawn = values(1, (3.0, 2.0, 1.0))
    found = one(spec(), rows(drawn))
    alpha = 0.05
    expected = stats.effect_change(
        cross(drawn["a"]),
        cross(drawn["b"]),
        early_days=1,
        late_days=4,
        scale=0.5,
        alpha=alpha,
        rho2=stats.tuned_rho2(2 * UNITS, alpha),
    )
    for name in ("early", "late", "change"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        for field in ("estimate", "lower", "upper", "log_e"):
            assert getattr(mine, field) == pytest.approx(float(np.squeeze(getattr(theirs, field)))), (
                name,
                field,
            )
    assert (found.control_units, found.arm_units, found.per_ms) == (UNITS, UNITS, DAY_MS)
    # By hand, from the values themselves.
    change = {arm: (of[:, 2] / 4 - of[:, 0]) * 0.5 for arm, of in drawn.items()}
    assert found.change is not None
    assert found.change.estimate == pytest.approx(change["b"].mean() - change["a"].mean())


def test_the_curve_has_each_bucket_at_its_share_of_the_level() -> None:
    drawn = values(2, (2.0, 2.0, 2.0))
    found = one(spec(), rows(drawn))
    sums = {
        arm: MomentArrays(
            *(
                [[[int(v)] for v in column]]
                for column in (
                    np.full(3, len(of)),
                    of.sum(axis=0),
                    (of * of).sum(axis=0),
                )
            )
        )
        for arm, of in drawn.items()
    }
    expected = stats.effects_by_age(
        sums["a"], sums["b"], scale=0.5, alpha=0.05, rho2=stats.tuned_rho2(2 * UNITS, 0.05 / 3)
    )
    spans = [(bucket.from_ms // DAY_MS, bucket.until_ms // DAY_MS) for bucket in found.buckets]
    assert spans == [(0, 1), (1, 3), (3, 7)]
    for at, bucket in enumerate(found.buckets):
        assert bucket.effect is not None
        assert bucket.effect.estimate == pytest.approx(expected.estimate[0, at])
        assert bucket.effect.lower == pytest.approx(expected.lower[0, at])


@pytest.mark.parametrize(
    ("effects", "kind"),
    [
        ((6.0, 3.0, 0.5), AgeChange.NOVELTY),
        ((0.0, 2.0, 6.0), AgeChange.HABITUATION),
        ((-5.0, 0.0, 5.5), AgeChange.HABITUATION),
        ((3.0, 3.0, 3.0), None),
    ],
)
def test_a_change_has_its_name(effects: tuple[float, ...], kind: AgeChange | None) -> None:
    found = one(spec(), rows(values(3, effects)))
    assert found.kind is kind
    assert found.note is None
    assert found.change is not None
    assert (found.change.log_e >= found.change.threshold_log_e) == (kind is not None)


def test_epochs_are_compared_inside_themselves() -> None:
    """More of the arm in an epoch in which every unit spends more and ages otherwise is no effect, and no change."""
    rng = np.random.default_rng(4)
    shares = {"a": 0.8, "b": 0.2}
    drawn, epochs = {}, {}
    for arm in ("a", "b"):
        epochs[arm] = (rng.random(UNITS) > shares[arm]).astype(int)
        rate = np.where(epochs[arm] == 1, 40.0, 10.0)[:, None] * np.array([1.0, 2.0, 4.0])
        rate[epochs[arm] == 1, 2] *= 2
        drawn[arm] = rng.poisson(rate)
    by_arm = iter((epochs["a"], epochs["b"]))
    stratified = one(spec(), rows(drawn, epoch_of=lambda n: next(by_arm)), epochs=2)
    pooled = one(spec(), rows(drawn))
    assert pooled.kind is not None
    assert stratified.kind is None
    assert stratified.change is not None
    assert abs(stratified.change.estimate or 9.0) < 0.6


def test_a_share_of_units_is_compared_by_bucket() -> None:
    made = spec(ages={"metrics": ["click"], "until": ["2d", "5d", "7d"]})
    rng = np.random.default_rng(5)
    drawn = {
        arm: (rng.random((UNITS, 3)) < np.array(shares)).astype(int)
        for arm, shares in (("a", [0.3, 0.3, 0.3]), ("b", [0.5, 0.4, 0.3]))
    }
    found = one(made, rows(drawn, metric="click"))
    assert found.per_ms == 2 * DAY_MS
    assert found.early is not None
    assert found.late is not None
    assert found.early.estimate == pytest.approx(drawn["b"][:, 0].mean() - drawn["a"][:, 0].mean())
    assert found.kind is AgeChange.NOVELTY


def test_levels_are_split_over_metrics_and_arms_and_take_nothing_from_shipping() -> None:
    arms = [{"key": key, "weight": 0.25, "control": key == "a"} for key in "abcd"]
    made = spec(arms=arms, ages={"metrics": ["spend", "click"], "until": ["1d", "2d", "3d"]})
    for plan in age_plans(record(made)):
        assert plan.change.effect.alpha == pytest.approx(0.05 / 6)
        assert [bucket.effect.alpha for bucket in plan.buckets] == pytest.approx([0.05 / 6 / 3] * 3)
    without = record(msgspec.structs.replace(made, ages=None))
    drawn = rows(values(6, (1.0, 1.0, 1.0)))
    with_ages, plain = (evaluate(one, drawn) for one in (record(made), without))
    assert with_ages.metrics == plain.metrics
    assert plain.ages == ()
    assert [(one.metric, one.arm) for one in with_ages.ages] == [
        (key, arm) for key in ("spend", "click") for arm in "bcd"
    ]


def test_nothing_is_said_before_last_buckets_are_over() -> None:
    drawn = values(7, (1.0, 1.0, 1.0))
    young = rows({arm: of[:, :2] for arm, of in drawn.items()})
    found = one(spec(), msgspec.structs.replace(young, products=()))
    assert (found.early, found.late, found.change, found.kind) == (None, None, None, None)
    assert found.note is not None
    assert [bucket.control_units for bucket in found.buckets] == [UNITS, UNITS, 0]
    assert found.buckets[0].effect is not None
    assert found.buckets[2].effect is None
    assert one(
        spec(), build(units={}, moments={}, crossover_units=0, first_exposure_ms=None, out_of_range={})
    ).note


def test_a_scale_beyond_the_method_is_this_experiments_fault_alone() -> None:
    metric = {
        "key": "spend",
        "kind": "mean",
        "role": "primary",
        "direction": "increase",
        "attribution_window": "1d",
        "bound": 1e-99,
        "scale": 1e-100,
    }
    far = {"metrics": ["spend"], "until": ["10000d", "15000d", "25000d"]}
    drawn = rows(values(8, (1.0, 1.0, 1.0)))
    looks = [(record(made), drawn) for made in (spec(metrics=[metric], ages=far), spec())]
    wrong, right = age_results(looks)
    assert wrong[0].note is not None
    assert wrong[0].note.startswith("cannot be tested")
    assert right == (one(spec(), drawn),)
