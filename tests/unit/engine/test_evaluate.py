from __future__ import annotations

import math

import msgspec
import pytest

from stream_xp import stats
from stream_xp.domain.decision import ArmResult, Method, MetricResult, MetricState, SampleRatio
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import build, merge
from stream_xp.engine.design import pair_sample
from stream_xp.engine.evaluate import evaluate, evaluate_all, proven
from stream_xp.engine.policy import stop

PRIMARY = {
    "key": "play",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "1s",
}
SECONDARY = PRIMARY | {"key": "visit", "role": "secondary"}
GUARD = PRIMARY | {
    "key": "crash",
    "role": "guardrail",
    "direction": "decrease",
    "margin": {"absolute": 0.01},
}
SPEND = PRIMARY | {"key": "spend", "kind": "mean", "scale": 0.01, "bound": 1000.0}
EVEN = {"a": 0.5, "b": 0.5}


def record(*metrics, weights=EVEN, epochs=None, **fields):
    """An experiment whose control is `a`; `epochs` lists the weights of each epoch."""
    spec = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 10_000,
        "arms": [{"key": key, "weight": w, "control": key == "a"} for key, w in weights.items()],
        "metrics": metrics or [PRIMARY],
    } | fields
    spec = msgspec.convert(spec, ExperimentSpec)
    listed = [WeightEpoch(epoch=e, weights=w, effective_ms=e) for e, w in enumerate(epochs or [weights])]
    return ExperimentRecord(spec=spec, epochs=tuple(listed), design_hash=spec.design_hash())


def statistics(cells, *, units=None, settled=None, crossover_units=0):
    """Statistics from {(metric, arm, epoch): (n, s) or (n, s, q)}; units are those of the first metric.

    All of them are settled where nothing else is said.
    """
    moments = {(m, a, e, ""): (*v, v[1])[:3] if len(v) == 2 else v for (m, a, e), v in cells.items()}
    seen = {}
    for (_, arm, epoch, _), (n, _, _) in moments.items():
        seen.setdefault((arm, epoch, ""), n)
    if units is not None:
        seen = {(arm, epoch, ""): n for (arm, epoch), n in units.items()}
    return build(
        units=seen,
        settled=None if settled is None else {(arm, epoch, ""): n for (arm, epoch), n in settled.items()},
        moments=moments,
        crossover_units=crossover_units,
        first_exposure_ms=0,
        out_of_range={},
    )


def two_arms(metric, control, treatment):
    return {(metric, "a", 0): control, (metric, "b", 0): treatment}


def only(record, statistics):
    (result,) = evaluate(record, statistics).metrics
    return result


# ---- budgets -----------------------------------------------------------------------------------------


def test_budgets_are_split_over_metrics_and_arms():
    weights = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    metrics = [PRIMARY, PRIMARY | {"key": "take"}, SECONDARY, GUARD, GUARD | {"key": "lag"}]
    r = record(*metrics, weights=weights, alpha=0.06, guardrail_alpha=0.03)
    cells = {(m["key"], arm, 0): (1000, 300) for m in metrics for arm in weights}
    results = evaluate(r, statistics(cells)).metrics
    assert [(x.metric, x.arm) for x in results] == [(m["key"], arm) for m in metrics for arm in "bcd"]
    for result in results:
        shown = 0.06 / (2 * 3) if result.role == "primary" else 0.06
        assert result.effect.threshold_log_e == pytest.approx(math.log(1 / shown))
        assert result.lift.threshold_log_e == result.effect.threshold_log_e
        if result.role == "guardrail":
            assert result.harm.threshold_log_e == pytest.approx(math.log(2 * 3 / 0.03))
            assert result.safety.threshold_log_e == pytest.approx(math.log(1 / 0.06))
        else:
            assert result.harm is result.safety is None


SPENDING = {"key": "spend", "kind": "mean", "scale": 0.01, "bound": 1000.0}
SPEND_GUARD = GUARD | SPENDING | {"key": "lag"}


def test_evidence_is_that_of_the_statistical_functions():
    r = record(SPEND, SPEND_GUARD, planned_sample=7000, alpha=0.04, guardrail_alpha=0.02)
    spend, lag = (
        ((900, 9_000, 400_000), (1100, 13_000, 500_000)),
        ((900, 3_000, 90_000), (1100, 4_000, 99_000)),
    )
    cells = two_arms("spend", *spend) | two_arms("lag", *lag)
    shown_spend, shown_lag = evaluate(r, statistics(cells)).metrics
    means = stats.summarise([stats.Stratum(*(stats.Moments(*arm) for arm in spend))], scale=0.01)
    rho2 = stats.tuned_rho2(7000, 0.04)
    effect = stats.mean_difference(means, alpha=0.04, rho2=rho2)
    lift = stats.relative_lift(means, alpha=0.04, rho2=rho2)
    for shown, found in ((shown_spend.effect, effect), (shown_spend.lift, lift)):
        assert (shown.estimate, shown.lower, shown.upper) == (found.estimate, found.lower, found.upper)
        assert (shown.log_e, shown.p_always_valid) == (found.log_e, found.p_always_valid)
    assert (shown_spend.control_mean, shown_spend.arm_mean) == (0.1, pytest.approx(130 / 1100))
    assert shown_spend.method is Method.ASYMPTOTIC
    means = stats.summarise([stats.Stratum(*(stats.Moments(*arm) for arm in lag))], scale=0.01)
    for shown, alpha, side in ((shown_lag.harm, 0.02, "above"), (shown_lag.safety, 0.04, "below")):
        rho2 = stats.one_sided_rho2(7000, alpha)
        found = stats.one_sided_test(
            means, margin=0.01, margin_kind="absolute", side=side, alpha=alpha, rho2=rho2
        )
        assert shown.log_e == found.log_e
        assert shown.estimate == found.estimate
        ends = (end if math.isfinite(end) else None for end in (found.lower, found.upper))
        assert (shown.lower, shown.upper) == tuple(ends)
    assert shown_lag.harm.upper is shown_lag.safety.lower is None


def test_conversions_average_an_exact_test_with_the_asymptotic_one():
    r = record(PRIMARY, GUARD, planned_sample=7000)
    cells = two_arms("play", (900, 90), (1100, 150)) | two_arms("crash", (900, 30), (1100, 40))
    play, crash = evaluate(r, statistics(cells)).metrics
    assert play.method is crash.method is Method.EXACT_THEN_ASYMPTOTIC
    means = stats.summarise(
        [stats.Stratum(stats.Moments(900, 90, 90), stats.Moments(1100, 150, 150))], scale=1
    )
    asymptotic = stats.mean_difference(means, alpha=0.05, rho2=stats.tuned_rho2(7000, 0.05))
    units, successes = [[900, 1100]], [[90, 150]]
    exact = stats.conversion_log_e(units, successes, weights=[[0.5, 0.5]], side="above")
    exact -= stats.assignment_deviance(units, [[0.5, 0.5]])
    w = stats.EXACT_SHARE
    averaged = w / 2 * math.exp(exact) + (1 - w) * math.exp(asymptotic.log_e)
    assert play.effect.log_e == pytest.approx(math.log(averaged), rel=1e-12)
    assert play.effect.lower < asymptotic.lower  # a share of alpha is spent on the exact part
    assert play.effect.upper > asymptotic.upper
    means = stats.summarise([stats.Stratum(stats.Moments(900, 30, 30), stats.Moments(1100, 40, 40))], scale=1)
    rho2 = stats.one_sided_rho2(7000, 0.05)
    for shown, side in ((crash.harm, "above"), (crash.safety, "below")):
        found = stats.one_sided_test(
            means, margin=0.01, margin_kind="absolute", side=side, alpha=0.05, rho2=rho2
        )
        pair = stats.bernoulli_pair_log_e([900, 1100], [30, 40], margin=0.01, side=side)
        averaged = w * math.exp(pair) + (1 - w) * math.exp(found.log_e)
        assert shown.log_e == pytest.approx(math.log(averaged), rel=1e-12)


def test_a_relative_margin_is_tested_by_the_labels_of_the_successes():
    r = record(GUARD | {"margin": {"relative": 0.1}}, weights={"a": 0.9, "b": 0.1})
    result = only(r, statistics(two_arms("crash", (180, 0), (20, 9))))
    assert result.note == stats.TOO_FEW_UNITS
    found = stats.success_ratio([[0, 9]], [[0.9, 0.1]], alpha=0.05, null=math.log(1.1), side="above")
    assert result.harm.log_e == pytest.approx(found.log_e + math.log(stats.EXACT_SHARE), rel=1e-12)
    assert result.state is MetricState.HARMED


def test_an_epoch_whose_weights_are_not_known_has_no_exact_evidence():
    cells = {("play", "a", 1): (400, 1), ("play", "b", 1): (400, 50)}
    result = only(record(SPEND | {"key": "play"}), statistics(cells))
    mixed = only(record(), statistics(cells))
    # Label prediction of nothing is an e-value of 1.
    averaged = stats.EXACT_SHARE / 2 + (1 - stats.EXACT_SHARE) * math.exp(
        stats.mean_difference(
            stats.summarise([stats.Stratum(stats.Moments(400, 1, 1), stats.Moments(400, 50, 50))], scale=1),
            alpha=0.05,
            rho2=stats.tuned_rho2(10_000, 0.05),
        ).log_e
    )
    assert mixed.effect.log_e == pytest.approx(math.log(averaged), rel=1e-12)
    assert result.state is mixed.state is MetricState.BETTER


def test_experiments_tested_together_get_what_they_get_alone():
    wide = {"a": 0.5, "b": 0.3, "c": 0.2}
    looks = [
        (record(PRIMARY, GUARD, SPEND), statistics(two_arms("play", (900, 90), (1100, 150)))),
        (record(SPEND, weights=wide), statistics(two_arms("spend", (900, 9_000, 400_000), (90, 900, 9_000)))),
        (record(GUARD | {"margin": None}), statistics(two_arms("crash", (900, 9), (90, 9)))),
        (record(PRIMARY, SPEND_GUARD, epochs=RAMP), statistics(DRIFT)),
        (record(SPEND | {"scale": 1e-200}), statistics(two_arms("spend", (900, 90), (1100, 150)))),
        (record(), statistics({})),
    ]
    assert evaluate_all(looks) == [evaluate(*look) for look in looks]
    assert evaluate_all([]) == []


def test_tuning_is_frozen():
    """It depends on the plan alone: not on the weights, nor on the data."""
    assert pair_sample(record(planned_sample=9000).spec) == 9000
    weights = {"a": 0.98, "b": 0.01, "c": 0.01}
    assert pair_sample(record(weights=weights, planned_sample=9000).spec) == 6000
    assert pair_sample(record(weights=dict.fromkeys("abc", 1 / 3), planned_sample=9000).spec) == 6000
    cells = two_arms("spend", (900, 90), (100, 15))
    steep = only(record(SPEND, weights={"a": 0.9, "b": 0.1}), statistics(cells))
    assert steep == only(record(SPEND), statistics(cells))


# ---- orientation -------------------------------------------------------------------------------------

CASES = [
    ("increase", (5000, 1000), (5000, 1400), MetricState.BETTER),
    ("increase", (5000, 1400), (5000, 1000), MetricState.WORSE),
    ("decrease", (5000, 1000), (5000, 1400), MetricState.WORSE),
    ("decrease", (5000, 1400), (5000, 1000), MetricState.BETTER),
    ("increase", (5000, 1000), (5000, 1010), MetricState.INCONCLUSIVE),
]


@pytest.mark.parametrize(("direction", "control", "treatment", "state"), CASES)
def test_better_and_worse(direction, control, treatment, state):
    result = only(
        record(PRIMARY | {"direction": direction}), statistics(two_arms("play", control, treatment))
    )
    assert result.state is state
    assert proven(result.effect) == (state is not MetricState.INCONCLUSIVE)
    assert (result.effect.lower > 0 or result.effect.upper < 0) == proven(result.effect)
    rises = treatment[1] > control[1]
    assert (result.effect.estimate > 0) == (result.lift.estimate > 0) == rises


def test_a_lift_has_the_sign_of_the_difference_for_a_negative_mean():
    cells = two_arms("spend", (5000, -50_000, 600_000), (5000, -40_000, 500_000))
    result = only(record(SPEND), statistics(cells))
    assert result.control_mean == pytest.approx(-0.1)
    assert result.effect.estimate == pytest.approx(0.02)
    assert result.lift.estimate == pytest.approx(0.2)
    assert result.state is MetricState.BETTER


GUARDS = [
    # direction, margin, control, treatment, state without `critical`, with it
    ("decrease", {"absolute": 0.02}, 500, 490, MetricState.SAFE, MetricState.SAFE),
    ("decrease", {"absolute": 0.02}, 500, 800, MetricState.HARMED, MetricState.HARMED),
    ("decrease", {"absolute": 0.04}, 500, 700, MetricState.INCONCLUSIVE, MetricState.HARMED),
    ("decrease", {"absolute": 0.10}, 500, 700, MetricState.SAFE, MetricState.HARMED),
    ("decrease", {"absolute": 0.001}, 500, 500, MetricState.INCONCLUSIVE, MetricState.INCONCLUSIVE),
    ("decrease", {"relative": 0.3}, 500, 490, MetricState.SAFE, MetricState.SAFE),
    ("decrease", {"relative": 0.1}, 500, 800, MetricState.HARMED, MetricState.HARMED),
    ("decrease", {"relative": 1.5}, 500, 700, MetricState.SAFE, MetricState.HARMED),
    ("increase", {"absolute": 0.02}, 500, 510, MetricState.SAFE, MetricState.SAFE),
    ("increase", {"absolute": 0.02}, 800, 500, MetricState.HARMED, MetricState.HARMED),
    ("increase", {"relative": 0.3}, 500, 510, MetricState.SAFE, MetricState.SAFE),
    ("increase", {"relative": 0.1}, 800, 500, MetricState.HARMED, MetricState.HARMED),
    ("increase", {"relative": 0.9}, 800, 500, MetricState.SAFE, MetricState.HARMED),
]


@pytest.mark.parametrize(("direction", "margin", "control", "treatment", "plain", "critical"), GUARDS)
def test_guardrails(direction, margin, control, treatment, plain, critical):
    cells = statistics(two_arms("crash", (5000, control), (5000, treatment)))
    metric = GUARD | {"direction": direction, "margin": margin}
    assert only(record(metric), cells).state is plain
    strict = only(record(metric | {"critical": True}), cells)
    assert strict.state is critical
    # The margin still says what is safe.
    assert strict.safety == only(record(metric), cells).safety


def test_a_relative_margin_is_a_share_of_the_control_mean():
    cells = statistics(two_arms("crash", (4000, 400), (4000, 440)))
    result = only(record(GUARD | {"margin": {"relative": 0.2}}), cells)
    assert result.harm.estimate == pytest.approx(0.11 - 0.10 - 0.2 * 0.10)


# ---- strata ------------------------------------------------------------------------------------------

RAMP = [{"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}]
# The rate rises from 0.1 to 0.5 in both arms while b's share grows: pooled, b looks much better.
DRIFT = {
    ("play", "a", 0): (9000, 900),
    ("play", "b", 0): (1000, 100),
    ("play", "a", 1): (5000, 2500),
    ("play", "b", 1): (5000, 2500),
}


def test_epochs_are_never_pooled():
    result = only(record(epochs=RAMP), statistics(DRIFT))
    assert result.effect.estimate == pytest.approx(0.0, abs=1e-12)
    assert result.control_mean == pytest.approx(0.3)
    pooled = two_arms("play", (14_000, 3400), (6000, 2600))
    assert only(record(), statistics(pooled)).state is MetricState.BETTER


def test_an_epoch_with_an_empty_arm_is_skipped():
    lone = {("play", "a", 2): (4000, 4000)}
    epochs = [*RAMP, {"a": 1.0, "b": 0.0}]
    with_it, without = (only(record(epochs=epochs), statistics(DRIFT | more)) for more in (lone, {}))
    assert with_it.effect == without.effect
    assert (with_it.control_units, without.control_units) == (18_000, 14_000)


def test_segments_do_not_enter_twice():
    whole = statistics(DRIFT)
    rows = [msgspec.structs.replace(row, segment="os=x", n=9, s="4", q="4") for row in whole.moments]
    units = [msgspec.structs.replace(row, segment="os=x", units=9) for row in whole.units]
    both = msgspec.structs.replace(whole, moments=(*whole.moments, *rows), units=(*whole.units, *units))
    assert evaluate(record(epochs=RAMP), both) == evaluate(record(epochs=RAMP), whole)


def test_a_metric_is_quantised_by_its_scale():
    cells = two_arms("spend", (100, 12_345, 2_000_000), (100, 12_345, 2_000_000))
    assert only(record(SPEND), statistics(cells)).arm_mean == pytest.approx(1.2345)


# ---- undetermined ------------------------------------------------------------------------------------

SPARSE = [
    ({}, stats.TOO_FEW_UNITS),
    (two_arms("lag", (24, 12), (500, 20)), stats.TOO_FEW_UNITS),
    (two_arms("lag", (500, 20), (24, 12)), stats.TOO_FEW_UNITS),
    ({("lag", "a", 0): (500, 20)}, stats.TOO_FEW_UNITS),
    (two_arms("lag", (500, 0), (500, 0)), stats.NO_VARIANCE),
    (two_arms("lag", (500, 500), (500, 500)), stats.NO_VARIANCE),
]


@pytest.mark.parametrize(("cells", "note"), SPARSE)
def test_undetermined(cells, note):
    result = only(record(SPEND_GUARD), statistics(cells))
    assert result.state is MetricState.UNDETERMINED
    assert result.note == note
    assert result.effect is result.lift is result.harm is result.safety is result.arm_mean is None


EARLY = [
    (two_arms("crash", (24, 0), (24, 1)), MetricState.UNDETERMINED, stats.TOO_FEW_UNITS),
    (two_arms("crash", (500, 20), (24, 12)), MetricState.HARMED, stats.TOO_FEW_UNITS),
    (two_arms("crash", (500, 0), (500, 0)), MetricState.UNDETERMINED, stats.NO_VARIANCE),
    (two_arms("crash", (5000, 0), (5000, 0)), MetricState.SAFE, stats.NO_VARIANCE),
    (two_arms("crash", (5000, 5000), (5000, 5000)), MetricState.SAFE, stats.NO_VARIANCE),
]


@pytest.mark.parametrize(("cells", "state", "note"), EARLY)
def test_conversions_can_be_decided_before_the_asymptotic_sequence_begins(cells, state, note):
    result = only(record(GUARD), statistics(cells))
    assert result.state is state
    assert result.note == note
    assert result.lift is None
    assert result.effect.lower in (None, 0.0)
    assert result.effect.upper in (None, 0.0)


def test_without_units_in_both_arms_there_is_nothing_to_say():
    result = only(record(GUARD), statistics({("crash", "a", 0): (500, 20)}))
    assert result.effect is result.harm is result.safety is result.arm_mean is None
    assert result.note == stats.TOO_FEW_UNITS


def test_a_lift_is_undetermined_while_the_control_mean_may_be_zero():
    result = only(record(), statistics(two_arms("play", (500, 1), (500, 30))))
    assert result.lift is None
    assert result.effect is not None
    assert result.state is MetricState.BETTER


def test_no_success_in_one_arm_is_evidence_all_the_same():
    result = only(record(), statistics(two_arms("play", (5000, 0), (5000, 200))))
    assert result.state is MetricState.BETTER
    assert result.control_mean == 0.0


UNTESTABLE = [
    (GUARD, {"alpha": 0.5}, "alpha"),
    (GUARD, {"guardrail_alpha": 0.5}, "alpha"),
    (GUARD | {"direction": "increase", "margin": {"relative": 1.0}}, {}, "margin"),
    (GUARD | {"margin": {"absolute": math.inf}}, {}, "margin"),
    (GUARD | {"margin": None}, {}, "a guardrail needs a margin"),
    (SPEND | {"key": "crash", "scale": 1e-200}, {}, "scale"),
]


@pytest.mark.parametrize(("metric", "fields", "why"), UNTESTABLE)
def test_a_spec_beyond_the_method_is_invalid_and_never_fatal(metric, fields, why):
    cells = two_arms("crash", (500, 20), (500, 30))
    evaluation = evaluate(record(metric, **fields), statistics(cells))
    (result,) = evaluation.metrics
    assert result.state is MetricState.UNDETERMINED
    assert why in result.note
    assert evaluation.invalid == (f"crash {result.note}",)
    assert result.note.startswith("cannot be tested: ")


def test_an_untestable_secondary_metric_closes_nothing():
    metric = SPEND | {"key": "visit", "role": "secondary", "scale": 1e-200}
    cells = two_arms("play", (500, 50), (500, 50)) | two_arms("visit", (500, 50), (500, 50))
    evaluation = evaluate(record(PRIMARY, metric), statistics(cells))
    assert evaluation.invalid == ()
    assert evaluation.metrics[1].state is MetricState.UNDETERMINED


# ---- arms and sample ratio ---------------------------------------------------------------------------


def test_arms_have_units_and_what_their_weights_promise():
    evaluation = evaluate(record(epochs=RAMP), statistics(DRIFT))
    assert evaluation.arms == (
        ArmResult(arm="a", units=14_000, expected_units=14_000.0),
        ArmResult(arm="b", units=6000, expected_units=6000.0),
    )


def test_the_sample_ratio_is_tested_by_epoch():
    r = record(epochs=RAMP, sample_ratio_alpha=0.002)
    ratio = evaluate(r, statistics(DRIFT)).sample_ratio
    found = stats.sample_ratio([[9000, 1000], [5000, 5000]], [[0.9, 0.1], [0.5, 0.5]])
    assert ratio == SampleRatio(
        log_e=found.log_e,
        p_always_valid=found.p_always_valid,
        threshold_log_e=pytest.approx(math.log(500)),
        mismatch=False,
        counted_log_e=found.log_e,
    )
    # The totals of the ramp under its last weights would be a mismatch.
    pooled = statistics({}, units={("a", 0): 14_000, ("b", 0): 6000})
    assert evaluate(record(), pooled).invalid == ("sample-ratio mismatch",)


def test_units_that_have_not_matured_count_for_the_sample_ratio():
    evaluation = evaluate(record(), statistics({}, units={("a", 0): 6000, ("b", 0): 5000}))
    assert evaluation.sample_ratio.mismatch
    assert evaluation.metrics[0].note == stats.TOO_FEW_UNITS


def test_a_mismatch_among_units_that_are_not_settled_holds_and_does_not_stop():
    counted, fair = {("a", 0): 6000, ("b", 0): 5000}, {("a", 0): 4010, ("b", 0): 3990}
    evaluation = evaluate(record(), statistics({}, units=counted, settled=fair))
    ratio = evaluation.sample_ratio
    assert (ratio.mismatch, ratio.suspected) == (False, True)
    assert ratio.log_e == stats.sample_ratio([[4010, 3990]], [[0.5, 0.5]]).log_e < ratio.threshold_log_e
    assert ratio.counted_log_e == stats.sample_ratio([[6000, 5000]], [[0.5, 0.5]]).log_e
    assert ratio.counted_log_e >= ratio.threshold_log_e
    assert evaluation.invalid == ("sample-ratio mismatch, not proven on settled units yet",)
    assert stop(evaluation) is None
    # The late arm has caught up among all units, and those that are settled prove it: the evidence of these decides.
    turned = evaluate(record(), statistics({}, units={("a", 0): 6000, ("b", 0): 6000}, settled=counted))
    assert (turned.sample_ratio.mismatch, turned.sample_ratio.suspected) == (True, False)
    assert stop(turned).reason.startswith("sample-ratio mismatch: log_e ")


def test_units_of_a_worker_that_names_no_settled_ones_hold_and_do_not_stop():
    evaluation = evaluate(record(), statistics({}, units={("a", 0): 6000, ("b", 0): 5000}, settled={}))
    assert evaluation.sample_ratio.log_e == pytest.approx(0.0, abs=1e-9)
    assert evaluation.sample_ratio.suspected
    assert stop(evaluation) is None


def test_a_suspicion_is_diagnosed_on_the_units_that_it_is_about():
    one = record(segments={"os": ["tv"]})
    counted = {("a", 0, ""): 6000, ("b", 0, ""): 5000, ("a", 0, "os=tv"): 2000, ("b", 0, "os=tv"): 1000}
    settled = dict.fromkeys(counted, 900)
    found = build(
        units=counted, settled=settled, moments={}, crossover_units=0, first_exposure_ms=0, out_of_range={}
    )
    (tv,) = evaluate(one, found).sample_ratio.diagnosis
    assert (tv.segment, tv.units) == ("os=tv", 3000)


def test_a_unit_in_an_arm_of_weight_zero_is_none_as_long_as_an_earlier_exposure_may_come():
    units = {("a", 0): 500, ("b", 0): 500, ("c", 0): 1}
    one = record(weights=THREE[1], epochs=THREE)
    for settled, words in (
        (0, "sample-ratio mismatch, not proven on settled units yet"),
        (1, "sample-ratio mismatch"),
    ):
        found = evaluate(one, statistics({}, units=units, settled=units | {("c", 0): settled}))
        assert found.sample_ratio.mismatch == bool(settled)
        assert found.invalid == (words,)


THREE = [{"a": 0.5, "b": 0.5, "c": 0.0}, {"a": 0.4, "b": 0.3, "c": 0.3}]


def test_an_arm_of_weight_zero_takes_no_part_in_its_epoch():
    units = {("a", 0): 500, ("b", 0): 500, ("a", 1): 800, ("b", 1): 600, ("c", 1): 600}
    evaluation = evaluate(record(weights=THREE[1], epochs=THREE), statistics({}, units=units))
    assert not evaluation.sample_ratio.mismatch
    assert [arm.expected_units for arm in evaluation.arms] == pytest.approx([1300, 1100, 600])


@pytest.mark.parametrize(
    "units",
    [
        {("a", 0): 500, ("b", 0): 500, ("c", 0): 1},
        {("c", 0): 1},
        {("c", 0): 1, ("a", 1): 400, ("b", 1): 300, ("c", 1): 300},
    ],
    ids=["among others", "alone", "only then"],
)
def test_a_unit_in_an_arm_of_weight_zero_is_a_mismatch(units):
    evaluation = evaluate(record(weights=THREE[1], epochs=THREE), statistics({}, units=units))
    ratio = evaluation.sample_ratio
    assert ratio.mismatch
    assert ratio.log_e < ratio.threshold_log_e
    assert evaluation.invalid == ("sample-ratio mismatch",)


def test_all_traffic_to_one_arm_is_no_evidence():
    r = record(epochs=[{"a": 1.0, "b": 0.0}])
    evaluation = evaluate(r, statistics({}, units={("a", 0): 1000}))
    assert evaluation.sample_ratio.log_e == pytest.approx(0.0, abs=1e-9)
    assert evaluation.invalid == ()


# ---- invalid -----------------------------------------------------------------------------------------


def test_no_data_is_invalid():
    evaluation = evaluate(record(GUARD), statistics({}))
    assert evaluation.invalid == ("no data",)
    assert evaluation.sample_ratio is None
    assert [arm.units for arm in evaluation.arms] == [0, 0]


@pytest.mark.parametrize(("crossovers", "invalid"), [(0, False), (10, False), (11, True)])
def test_more_than_one_percent_of_crossovers_is_invalid(crossovers, invalid):
    units = {("a", 0): 495, ("b", 0): 495}
    evaluation = evaluate(record(), statistics({}, units=units, crossover_units=crossovers))
    reason = f"{crossovers} units were seen in two arms, more than 1 %"
    assert evaluation.invalid == ((reason,) if invalid else ())


def test_exposures_refused_for_too_many_units_are_invalid():
    units = {("a", 0): 500, ("b", 0): 500}
    full = msgspec.structs.replace(statistics({}, units=units), over_limit=7)
    reason = "the most units that a partition takes were reached, 7 exposures refused"
    assert reason in evaluate(record(), full).invalid
    assert reason not in evaluate(record(), statistics({}, units=units)).invalid


def test_crossovers_alone_are_invalid():
    evaluation = evaluate(record(), statistics({}, units={}, crossover_units=3))
    assert len(evaluation.invalid) == 2


def test_statistics_ahead_of_the_record_are_invalid():
    """Their sample ratio is open, but inside the new epoch the arms can be compared."""
    behind, current = record(epochs=RAMP[:1]), record(epochs=RAMP)
    evaluation = evaluate(behind, statistics(DRIFT))
    assert evaluation.invalid == ("units of an unknown weight epoch: 1",)
    assert evaluation.metrics[0].lift == evaluate(current, statistics(DRIFT)).metrics[0].lift
    assert not evaluation.sample_ratio.mismatch
    assert evaluate(current, statistics(DRIFT)).invalid == ()


def test_only_units_of_an_unknown_epoch():
    evaluation = evaluate(record(), statistics({}, units={("a", 7): 30, ("b", 3): 30}))
    assert evaluation.invalid == ("units of an unknown weight epoch: 3, 7",)
    assert evaluation.sample_ratio is None


def test_units_of_an_arm_that_the_record_does_not_have():
    units = {("a", 0): 500, ("b", 0): 500, ("z", 0): 500}
    assert evaluate(record(), statistics({}, units=units)).invalid == ("units of an unknown arm: z",)


def test_statistics_of_partitions_add():
    halves = [statistics({k: (v[0] // 2, v[1] // 2) for k, v in DRIFT.items()})] * 2
    assert evaluate(record(epochs=RAMP), merge(halves)) == evaluate(record(epochs=RAMP), statistics(DRIFT))


# ---- numbers that JSON can hold ----------------------------------------------------------------------

TRILLION = 10**12
LARGE = 2**62
EXTREMES = [
    two_arms("m", (TRILLION, 1), (TRILLION, 0)),
    two_arms("m", (TRILLION, 0), (TRILLION, TRILLION)),
    two_arms("m", (TRILLION, 10**11), (25, 0)),
    two_arms("m", (TRILLION, LARGE * TRILLION, LARGE**2 * TRILLION), (TRILLION, 0, 0)),
    two_arms("m", (TRILLION, -LARGE * TRILLION, LARGE**2 * TRILLION), (TRILLION, 0, TRILLION * LARGE**2)),
    two_arms("m", (25, 24), (25, 1)),
    {
        (m, arm, e): (n, n // 3)
        for m in "m"
        for arm, e, n in (("a", 0, TRILLION), ("b", 0, 1), ("a", 1, 1), ("b", 1, TRILLION))
    },
]


def numbers(value):
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, dict):
        yield from numbers(list(value.values()))


@pytest.mark.parametrize("scale", [1e-100, 1e-2, 1e100])
@pytest.mark.parametrize("cells", EXTREMES)
@pytest.mark.parametrize("margin", [{"absolute": 1e-300}, {"absolute": 1e100}, {"relative": 0.5}])
def test_extreme_statistics_stay_finite(cells, margin, scale):
    """No NaN and no infinity, which JSON does not have: msgspec would write null."""
    metric = SPEND | {"key": "m", "scale": scale, "bound": scale * 2**40}
    guard = metric | {"role": "guardrail", "margin": margin}
    for r in (record(metric, epochs=RAMP), record(guard, epochs=RAMP)):
        evaluation = evaluate(r, statistics(cells))
        shown = (evaluation.arms, evaluation.metrics, evaluation.sample_ratio)
        assert all(map(math.isfinite, numbers(msgspec.to_builtins(shown))))
        encoded = msgspec.json.encode(shown)
        kinds = tuple[tuple[ArmResult, ...], tuple[MetricResult, ...], SampleRatio]
        assert msgspec.json.decode(encoded, type=kinds) == shown
