"""Plans: the engine's levels and tunings, numbers against simulation, baselines from files and from the topic."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.special import ndtri

from stream_xp import stats
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import MetricHistogram, Outcomes, PartitionStatistics, Progress, build
from stream_xp.engine.comparison import Comparison, Stratum
from stream_xp.engine.design import plans
from stream_xp.engine.quantile_findings import quantile_findings
from stream_xp.errors import ConfigError
from stream_xp.services.plan import (
    Aim,
    Baseline,
    ExperimentPlan,
    Known,
    PlannedTest,
    load_baselines,
    parse_effects,
    parse_given,
    plan_experiment,
)
from stream_xp.services.plan.plots import require_plot, write_plot
from stream_xp.services.plan.quantiles import quantile_of
from stream_xp.services.plan.topic import Past, baselines_from, join_pasts
from stream_xp.services.plan.words import chart, count
from stream_xp.services.spec_file import parse_spec
from stream_xp.stats.batch import MomentArrays, mean_difference_arrays, summarise_arrays
from stream_xp.stats.conversion_difference import RATIO_SD, success_ratio_log_e
from stream_xp.stats.log_histogram import bin_of
from stream_xp.stats.planning import fixed_sample

WINDOW = "attribution_window: 1h"
ORDER = f"key: order, kind: conversion, role: primary, direction: increase, {WINDOW}"
FAILURE = f"key: failure, kind: conversion, role: guardrail, direction: decrease, {WINDOW}"
SPEND = f"key: spend, kind: mean, role: primary, direction: increase, {WINDOW}, scale: 0.01, bound: 1000"
RATIO = f"key: rpm, kind: ratio, role: primary, direction: increase, {WINDOW}, scale: 0.01, bound: 1000"
COUNT = f"key: ring, kind: count, {WINDOW}"
PAGE = f"key: page, kind: latency, direction: decrease, {WINDOW}, scale: 1, bound: 60000"


def spec(
    *metrics: str, arms: dict[str, float] | None = None, more: str = "", planned: int = 20_000
) -> ExperimentSpec:
    weights = arms or {"a": 0.5, "b": 0.5}
    listed = "\n".join(
        f"  - {{key: {key}, weight: {weight}, control: {str(at == 0).lower()}}}"
        for at, (key, weight) in enumerate(weights.items())
    )
    rows = "\n".join(f"  - {{{metric}}}" for metric in metrics)
    text = f"""
experiment: x
owner: o
hypothesis: h
unit: member
planned_sample: {planned}
arms:
{listed}
metrics:
{rows}
{more}
"""
    return parse_spec(text.encode(), "spec.yaml")


def planned(of: ExperimentSpec, *given: str, effects: tuple[str, ...] = (), **aim: Any) -> ExperimentPlan:
    return plan_experiment(of, parse_given(given, of), Aim(effects=parse_effects(effects), **aim))


def only(found: ExperimentPlan, test: str = "effect", metric: str | None = None) -> PlannedTest:
    (one,) = (t for t in found.tests if t.test == test and metric in (None, t.metric))
    return one


def engine_plan(of: ExperimentSpec) -> Any:
    epoch = WeightEpoch(epoch=0, weights=of.weights, effective_ms=0)
    return plans(ExperimentRecord(spec=of, epochs=(epoch,), design_hash=of.design_hash()))[0]


# Levels and tunings ---------------------------------------------------------------------------------


def test_levels_and_tunings_are_the_engines() -> None:
    of = spec(
        ORDER,
        SPEND,
        f"{FAILURE}, margin: {{relative: 0.2}}",
        arms={"a": 0.4, "b": 0.3, "c": 0.3},
        more="alpha: 0.04\nguardrail_alpha: 0.03",
    )
    found = planned(of, "order:rate=0.1", "spend:mean=5,sd=5", "failure:rate=0.02")
    assert [(t.metric, t.test, t.arms) for t in found.tests] == [
        ("order", "effect", ("b", "c")),
        ("spend", "effect", ("b", "c")),
        ("failure", "harm", ("b", "c")),
        ("failure", "safety", ("b", "c")),
    ]
    order, spend, harm, safety = found.tests
    assert order.alpha == spend.alpha == pytest.approx(0.04 / 4)
    assert harm.alpha == pytest.approx(0.03 / 2)
    assert safety.alpha == pytest.approx(0.04)
    pair = 20_000 * 2 / 3
    assert spend.rho2 == stats.tuned_rho2(pair, spend.alpha)
    assert harm.rho2 == stats.one_sided_rho2(pair, harm.alpha)
    assert (spend.sequence_alpha, order.sequence_alpha) == (spend.alpha, pytest.approx(0.8 * order.alpha))
    assert spend.tuned_units * spend.traffic_share == pytest.approx(pair)
    assert (spend.share, spend.traffic_share) == (pytest.approx(3 / 7), pytest.approx(0.7))


def test_units_are_of_all_arms() -> None:
    two, three = (
        only(
            planned(
                spec(SPEND, arms=arms, more=f"alpha: {alpha}", planned=n),
                "spend:mean=5,sd=5",
                effects=("0.5",),
            )
        )
        for arms, alpha, n in (
            ({"a": 0.5, "b": 0.5}, 0.05, 4000),
            ({"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}, 0.15, 8000),
        )
    )
    assert three.units.for_power == pytest.approx(2 * (two.units.for_power or 0))
    assert three.power.sequential == pytest.approx(two.power.sequential)
    assert three.half_width == pytest.approx(two.half_width)


def test_a_fixed_test_is_the_textbooks() -> None:
    test = only(planned(spec(SPEND), "spend:mean=10,sd=20", effects=("spend=5%",)))
    per_arm = 2 * (20 / 0.5) ** 2 * (ndtri(0.975) + ndtri(0.8)) ** 2
    assert test.units.fixed == pytest.approx(2 * per_arm)
    assert test.price == pytest.approx((test.units.for_power or 0) / (2 * per_arm))
    assert 1.2 < (test.price or 0) < 3.0


def test_the_detectable_effect_has_the_power_aimed_at() -> None:
    for of, given in (
        (spec(ORDER), "order:rate=0.1"),
        (spec(SPEND), "spend:mean=10,sd=20"),
        (spec(f"{COUNT}, role: primary, direction: decrease"), "ring:share=0.1"),
    ):
        first = only(planned(of, given, power=0.7))
        assert first.power.sequential == pytest.approx(0.7, abs=0.01)
        assert first.effect == first.detectable
        again = only(planned(of, given, effects=(f"{abs(first.effect.absolute)}",), power=0.7))
        assert again.power.sequential == pytest.approx(0.7, abs=0.01)
        assert first.effect_source != again.effect_source == "given"


def test_a_guardrail_is_planned_for_harm_and_safety() -> None:
    found = planned(spec(f"{FAILURE}, margin: {{absolute: 0.004}}"), "failure:rate=0.02")
    harm, safety = only(found, "harm"), only(found, "safety")
    assert (harm.null.absolute, harm.effect.absolute) == (pytest.approx(0.004), pytest.approx(0.008))
    assert (safety.null.absolute, safety.effect.absolute) == (pytest.approx(0.004), 0.0)
    assert harm.detectable is not None
    assert harm.detectable.absolute > 0.004
    assert safety.detectable is not None
    assert safety.detectable.absolute > 0
    critical = planned(spec(f"{FAILURE}, margin: {{absolute: 0.004}}, critical: true"), "failure:rate=0.02")
    assert (only(critical, "harm").null.absolute, only(critical, "harm").effect.absolute) == (
        0.0,
        pytest.approx(0.004),
    )


def test_a_margin_of_a_metric_that_should_increase_is_negative() -> None:
    of = spec(
        f"key: m, kind: conversion, role: guardrail, direction: increase, {WINDOW}, margin: {{relative: 0.6}}"
    )
    found = planned(of, "m:rate=0.2")
    harm, safety = only(found, "harm"), only(found, "safety")
    # Twice the margin would be more than all there is.
    assert harm.effect.relative == pytest.approx(-0.8)
    assert safety.null.relative == pytest.approx(-0.6)


def test_a_covariate_saves_what_it_explains() -> None:
    covariate = "covariate: {scale: 0.01, bound: 100}"
    adjusted = spec(f"{SPEND}, adjustment: cuped", more=covariate)
    with_it = only(planned(adjusted, "spend:mean=10,sd=20,correlation=0.6", effects=("5%",)))
    without = only(planned(spec(SPEND), "spend:mean=10,sd=20", effects=("5%",)))
    assert with_it.variance == pytest.approx(0.64 * without.variance)
    assert with_it.units.fixed == pytest.approx(0.64 * (without.units.fixed or 0))


def test_a_ratio_has_the_variance_of_its_linearised_value() -> None:
    of = spec(f"{RATIO}, denominator: {{event: views, bound: 100}}")
    test = only(planned(of, "rpm:mean_m=2,mean_d=4,var_m=9,var_d=16,cov_md=8", effects=("5%",)))
    linear = (9 - 2 * 0.5 * 8 + 0.25 * 16) / 16
    assert test.variance == pytest.approx(4 * linear)
    assert test.effect.absolute == pytest.approx(0.025)


def test_days_wait_for_maturity_and_the_minimum_runtime() -> None:
    of = spec(SPEND, f"{FAILURE}, margin: {{relative: 0.5}}", more="minimum_runtime: 3d\nmaximum_runtime: 4d")
    given = ("spend:mean=10,sd=20", "failure:rate=0.1")
    found = planned(of, *given, effects=("5%",), units_per_day=10_000.0, allowed_lateness_ms=3_600_000)
    effect, harm = only(found), only(found, "harm")
    assert effect.days is not None
    assert harm.days is not None
    assert effect.days.for_power == pytest.approx(max(3.0, (effect.units.for_power or 0) / 10_000 + 2 / 24))
    assert effect.days.median is not None
    assert effect.days.median >= 3.0
    assert harm.days.for_power == pytest.approx((harm.units.for_power or 0) / 10_000 + 2 / 24)
    assert any("maximum runtime" in note for note in effect.notes)
    assert found.units_per_day == 10_000
    assert only(planned(of, *given)).days is None


def test_a_planned_sample_before_the_first_look_finds_nothing() -> None:
    of = spec(f"{ORDER}, minimum_effect: {{relative: 0.2}}", arms={"a": 0.98, "b": 0.02}, planned=1000)
    test = only(planned(of, "order:rate=0.1"))
    assert test.power.sequential == 0
    assert (test.detectable, test.half_width, test.units.expected) == (None, None, 1000)
    assert "the planned sample ends before the first look" in test.notes
    assert any(note.startswith("rough") for note in test.notes)
    (left_out,) = planned(
        spec(ORDER, arms={"a": 0.98, "b": 0.02}, planned=1000), "order:rate=0.1"
    ).not_planned
    assert "--effect" in left_out.reason


def test_nothing_is_silently_left_out() -> None:
    secondary = f"key: minutes, kind: mean, role: secondary, direction: increase, {WINDOW}, bound: 100"
    of = spec(ORDER, secondary, arms={"a": 0.5, "b": 0.5, "c": 0.0})
    found = planned(of, "order:rate=0.1")
    assert [(one.metric, one.arms) for one in found.not_planned] == [
        ("every metric", ("c",)),
        ("minutes", ("b", "c")),
    ]
    with_it = planned(of, "order:rate=0.1", "minutes:mean=3,sd=4")
    assert [t.metric for t in with_it.tests] == ["order", "minutes"]


# Against simulation -----------------------------------------------------------------------------------


def test_a_mean_against_simulated_experiments() -> None:
    of, rng, paths = (
        spec(f"{SPEND}, minimum_effect: {{absolute: 0.5}}", planned=4000),
        np.random.default_rng(7),
        1500,
    )
    test = only(planned(of, "spend:mean=5,sd=5"))
    # 100 looks, each of 20 units an arm; sums of so many are as good as normal.
    looks, block = 100, 20
    sums = [5.0 + effect + 5.0 * rng.standard_normal((paths, looks * block)) for effect in (0.0, 0.5)]
    steps = [np.rint(100 * values).astype(np.int64) for values in sums]
    n = np.arange(1, looks + 1) * block
    arms = [
        MomentArrays(
            np.broadcast_to(n, (paths, looks))[..., np.newaxis],
            np.cumsum(x, axis=1)[:, n - 1, np.newaxis],
            np.cumsum(x * x, axis=1)[:, n - 1, np.newaxis],
        )
        for x in steps
    ]
    found = mean_difference_arrays(
        summarise_arrays(*arms, scale=0.01),
        alpha=engine_plan(of).effect.alpha,
        rho2=engine_plan(of).effect.rho2,
    )
    decided = (found.log_e >= -math.log(0.05)) & (found.estimate > 0)
    share = decided.any(axis=1).mean()
    assert share == pytest.approx(test.power.sequential, abs=0.04)
    stopped = np.where(decided.any(axis=1), 2 * n[decided.argmax(axis=1)], 4000).mean()
    assert stopped == pytest.approx(test.units.expected, rel=0.04)


@pytest.mark.parametrize("name", ["harm", "safety"])
def test_a_count_against_simulated_events(name: str) -> None:
    share, n, paths = 0.2, 20_000, 1500
    of = spec(
        f"{COUNT}, role: guardrail, direction: decrease, margin: {{relative: 0.2}}",
        arms={"a": 0.8, "b": share},
        planned=n,
    )
    test, rng = only(planned(of, "ring:share=0.1"), name), np.random.default_rng(5)
    assert test.rho2 is not None
    assert test.rho2 < RATIO_SD**2
    rates = np.array([0.1, 0.1 + test.effect.absolute])
    critical = critical_hits(np.arange(1, 4000), share, test)
    hits = 0
    for _ in range(paths):
        arm = (rng.random(n) < share).astype(int)
        labels = arm[rng.random(n) < rates[arm]]
        of_arm, at = np.cumsum(labels), critical[: len(labels)]
        hits += bool((of_arm >= at).any() if name == "harm" else (of_arm <= at).any())
    assert hits / paths == pytest.approx(test.power.sequential, abs=0.04)


def critical_hits(totals: Any, share: float, test: PlannedTest) -> Any:
    up = test.test == "harm"
    null, side = math.log1p(test.null.relative or 0.0), "above" if up else "below"
    weights = np.array([[1 - share, share]])
    low, high = np.full_like(totals, -1), totals + 1
    for _ in range(13):
        middle = (low + high) // 2
        inside = np.clip(middle, 0, totals)
        counts = np.stack([totals - inside, inside], axis=-1)[:, np.newaxis, :]
        decided = success_ratio_log_e(counts, weights, null=null, side=side) >= -math.log(test.alpha)
        decided &= (middle >= 0) & (middle <= totals)
        low, high = np.where(decided == up, low, middle), np.where(decided == up, middle, high)
    return high if up else low


def test_a_quantile_against_the_engine() -> None:
    of = spec(f"{PAGE}, role: guardrail, margin: {{relative: 0.1}}, quantiles: [0.9]", planned=40_000)
    found = planned(of, "page:q0.5=200,q0.9=500")
    harm, safety = only(found, "harm"), only(found, "safety")
    assert harm.effect.absolute == pytest.approx(100.0)
    assert (harm.quantile, harm.units.expected) == (0.9, None)
    rng, spread, paths, decided = np.random.default_rng(3), math.log(2.5) / ndtri(0.9), 40, 0
    for _ in range(paths):
        rows = [histogram(arm, 200 * np.exp(spread * rng.standard_normal(20_000))) for arm in ("a", "b")]
        comparison = Comparison(engine_plan(of), "b", "", (Stratum(0, 0.5, *rows),))
        evidence = quantile_findings([comparison])[0].quantiles[0].safety
        assert evidence is not None
        decided += evidence.log_e >= evidence.threshold_log_e
    assert decided / paths == pytest.approx(safety.power.sequential, abs=0.25)
    assert safety.units.for_power is not None
    assert safety.units.for_power > (safety.units.fixed or 0)


def histogram(arm: str, values: Any) -> MetricHistogram:
    bins, counts = np.unique(bin_of(np.rint(values).astype(np.int64)), return_counts=True)
    return MetricHistogram("page", arm, 0, "", tuple(zip(bins.tolist(), counts.tolist(), strict=True)))


def test_an_effect_within_a_bin_is_never_found() -> None:
    found = planned(
        spec(f"{PAGE}, role: primary, minimum_effect: {{relative: 0.001}}, quantiles: [0.5]"),
        "page:q0.5=500,q0.9=900",
    )
    test = only(found)
    assert (test.units.for_power, test.price) == (None, None)
    assert any("bins" in note for note in test.notes)


def test_a_distribution_goes_through_its_quantiles() -> None:
    outcome = quantile_of(0.9, {0.5: 200.0, 0.9: 500.0, 0.99: 1500.0})
    assert outcome.base == pytest.approx(500.0)
    ranks = np.array([0.01, 0.4, 0.5, 0.7, 0.9, 0.95, 0.999])
    assert outcome.rank(outcome.value(ranks)) == pytest.approx(ranks)
    assert float(outcome.rank(np.array(-1.0))) == 0.0


# Baselines ------------------------------------------------------------------------------------------------


def test_a_missing_baseline_names_the_metric_and_what_to_give() -> None:
    covariate = "covariate: {scale: 0.01, bound: 100}"
    of = spec(
        ORDER,
        f"{SPEND}, adjustment: ancova",
        f"{RATIO}, denominator: {{event: views, bound: 100}}",
        f"{COUNT}, role: primary, direction: increase",
        f"{PAGE}, role: primary",
        more=covariate,
    )
    with pytest.raises(ConfigError) as caught:
        planned(of, "spend:mean=5,sd=2")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("order: no baseline: a conversion needs rate (")
    assert "--given order:rate=0.1" in lines[0]
    assert lines[1].startswith("spend: no baseline: a mean needs correlation (")
    assert "--given rpm:mean_m=3,mean_d=1.5,var_m=9,var_d=2,cov_md=3" in lines[2]
    assert "share (the share of units with an event)" in lines[3]
    assert "--given page:q0.5=120,q0.99=900" in lines[4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("order", "METRIC:FIELD=NUMBER"),
        ("order:rate", "METRIC:FIELD=NUMBER"),
        ("ordr:rate=0.1", "did you mean order?"),
        ("order:rate=2", "< 1.0"),
        ("order:rate=x", "Expected"),
        ("order:rat=0.1", "unknown field `rat`"),
        ("order:mean=0.1", "mean is not used, a plan of this conversion takes rate"),
        ("spend:mean=nan,sd=1", "mean must be finite"),
        ("spend:sd=0", "> 0.0"),
        ("rpm:mean_d=0", "mean_d must not be 0"),
        ("rpm:var_m=1,var_d=1,cov_md=2", "cov_md squared"),
        ("page:q0.5=100", "at least two"),
        ("page:q0.5=100,q0.9=90", "grow with the quantile"),
        ("page:q0.5=100,q1.9=190", "between 0 and 1"),
    ],
)
def test_a_wrong_baseline_is_refused(text: str, message: str) -> None:
    of = spec(ORDER, SPEND, f"{RATIO}, denominator: {{event: views, bound: 100}}", f"{PAGE}, role: primary")
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse_given([text], of)


def test_baseline_files(tmp_path: Path) -> None:
    of = spec(ORDER, SPEND, f"{PAGE}, role: primary")
    yaml, json = tmp_path / "b.yaml", tmp_path / "b.json"
    yaml.write_text("order: {rate: 1e-3}\nspend: {mean: 5, sd: 2}\npage: {quantiles: {0.5: 100, 0.9: 200}}\n")
    json.write_text('{"order": {"rate": 1e-3}, "page": {"quantiles": {"0.5": 100, "0.9": 200}}}')
    known = load_baselines(yaml, of)
    assert known["order"] == Known(Baseline(rate=0.001), str(yaml))
    assert known["page"].baseline == load_baselines(json, of)["page"].baseline
    assert set(known) == {"order", "spend", "page"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map metric keys"),
        ("- 1", "must map metric keys"),
        ("order: {rate: 0.1}\norder: {rate: 0.2}", "given twice"),
        ("order: &a {rate: 0.1}\nspend: *a", "aliases"),
        ("order: [", "is no YAML"),
        ("order: 3", "Expected `object`"),
        ("!!python/object:os.system {}", "is no YAML"),
        ("x" * 300_000, "longer than"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "b.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_baselines(file, spec(ORDER, SPEND))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_baselines(tmp_path / "none.yaml", spec(ORDER))


def test_fields_come_from_the_first_place_that_has_them() -> None:
    mine, theirs = Known(Baseline(mean=1.0), "here"), Known(Baseline(mean=2.0, sd=3.0), "there", ("note",))
    assert mine.over(theirs) == Known(Baseline(mean=1.0, sd=3.0), "here; there", ("note",))
    assert theirs.over(mine) == theirs
    assert mine.over(None) == mine


@pytest.mark.parametrize("text", ["", "x", "0", "-1%", "inf", "order=", "=1", "nan%"])
def test_a_wrong_effect_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_effects([text])


def test_effects_of_other_metrics_and_impossible_ones_are_refused() -> None:
    of = spec(ORDER, f"{FAILURE}, margin: {{absolute: 0.01}}")
    given = ("order:rate=0.1", "failure:rate=0.02")
    for effect, message in (
        ("ordr=1%", "the experiment has order, failure"),
        ("order=0.95", "can change by 0.95"),
        ("failure=0.01", "not beyond its margin"),
    ):
        with pytest.raises(ConfigError, match=message):
            planned(of, *given, effects=(effect,))
    with pytest.raises(ConfigError, match="given twice"):
        parse_effects(["order=1", "order=2"])
    for aim in ({"power": 1.0}, {"units_per_day": 0.0}, {"units_per_day": math.nan}):
        with pytest.raises(ConfigError):
            planned(of, *given, **aim)


# From the topic -------------------------------------------------------------------------------------------

OLD = (
    ORDER,
    f"{SPEND}, adjustment: cuped",
    f"{RATIO}, denominator: {{event: views, bound: 100, scale: 0.5}}",
    f"{COUNT}, role: primary, direction: increase",
    f"{PAGE}, role: primary",
)
COVARIATE = "covariate: {scale: 0.01, bound: 100}"


def past(rng: Any, of: ExperimentSpec, n: int = 400) -> tuple[Past, dict[str, Any]]:
    """An experiment with n units in the control, in two weight epochs."""
    values = {
        "order": (rng.random(n) < 0.3).astype(int),
        "spend": rng.integers(0, 5000, n),
        "rpm": rng.integers(0, 300, n),
        "page": rng.integers(50, 900, n),
    }
    others = {"spend": values["spend"] + rng.integers(0, 4000, n), "rpm": rng.integers(1, 20, n)}
    moments, products = {}, {}
    for epoch, part in enumerate((slice(0, n // 4), slice(n // 4, n))):
        for key in ("order", "spend", "rpm"):
            y = values[key][part]
            moments[key, "a", epoch, ""] = (len(y), int(y.sum()), int((y * y).sum()))
            if key in others:
                x = others[key][part]
                products[key, "a", epoch, ""] = (int(x.sum()), int((x * x).sum()), int((x * y).sum()))
    bins = dict(
        zip(*(part.tolist() for part in np.unique(bin_of(values["page"]), return_counts=True)), strict=True)
    )
    statistics = build(
        units={("a", 0, ""): n, ("b", 0, ""): 5 * n, ("a", 0, "s=1"): 7},
        moments=moments | {("order", "b", 0, ""): (5 * n, 0, 0), ("order", "a", 0, "s=1"): (7, 7, 7)},
        products=products,
        events={("ring", "a", 0, ""): (40, 90)},
        histograms={("page", "a", 0, ""): bins},
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )
    return Past(of, statistics), values | {"x": others}


def test_baselines_are_those_of_the_control_arm() -> None:
    of = spec(*OLD, more=COVARIATE)
    earlier, values = past(np.random.default_rng(1), of)
    known = baselines_from([earlier], of)
    assert known["order"].baseline.rate == pytest.approx(values["order"].mean())
    spend = known["spend"].baseline
    assert spend.mean == pytest.approx(0.01 * values["spend"].mean())
    assert spend.sd == pytest.approx(0.01 * values["spend"].std(ddof=1))
    assert spend.correlation == pytest.approx(np.corrcoef(values["spend"], values["x"]["spend"])[0, 1])
    ratio = known["rpm"].baseline
    covariance = np.cov(0.01 * values["rpm"], 0.5 * values["x"]["rpm"])
    assert (ratio.mean_m, ratio.mean_d) == pytest.approx(
        (0.01 * values["rpm"].mean(), 0.5 * values["x"]["rpm"].mean())
    )
    assert (ratio.var_m, ratio.var_d, ratio.cov_md) == pytest.approx(
        (covariance[0, 0], covariance[1, 1], covariance[0, 1])
    )
    assert known["ring"].baseline.share == pytest.approx(0.1)
    quantiles = known["page"].baseline.quantiles or {}
    middle = float(quantile_of(0.5, quantiles).value(0.5))
    assert middle == pytest.approx(np.median(values["page"]), rel=0.07)
    assert known["order"].source == "x version 1, 400 units of a"


def test_the_same_experiment_goes_before_a_larger_one() -> None:
    rng, of = np.random.default_rng(2), spec(ORDER, SPEND)
    mine, _ = past(rng, spec(ORDER, f"{SPEND}, aggregation: max"), n=200)
    large, _ = past(rng, renamed(spec(*OLD, more=COVARIATE), "large"), n=1200)
    small, _ = past(rng, renamed(spec(*OLD, more=COVARIATE), "small"), n=600)
    known = baselines_from([small, mine, large], of)
    assert known["order"].source.startswith("x version 1, 200 units")
    # Its spend folds in another way, so that it is not the same metric.
    assert known["spend"].source.startswith("large version 1, 1,200 units")
    few, _ = past(rng, of, n=80)
    assert "order" not in baselines_from([few], of)


def test_another_window_is_noted() -> None:
    rng, of = np.random.default_rng(3), spec(ORDER.replace("1h", "2h"))
    known = baselines_from([past(rng, spec(*OLD, more=COVARIATE))[0]], of)
    assert known["order"].notes == ("the baseline has an attribution window of 1h",)


def renamed(of: ExperimentSpec, name: str) -> ExperimentSpec:
    return msgspec.structs.replace(of, experiment=name)


def test_statistics_of_another_design_are_no_baseline() -> None:
    of = spec(ORDER)
    earlier, _ = past(np.random.default_rng(4), of)
    record = ExperimentRecord(spec=of, epochs=(), design_hash=of.design_hash())
    parts = [partition(earlier, at, of.design_hash()) for at in (0, 1)]
    (joined,) = join_pasts({"x": record}, parts)
    assert baselines_from([joined], of)["order"].source == "x version 1, 800 units of a"
    assert join_pasts({"x": record}, [partition(earlier, 0, "another")]) == []
    assert join_pasts({}, parts) == []


def partition(earlier: Past, number: int, design_hash: str) -> PartitionStatistics:
    return PartitionStatistics(
        experiment="x",
        version=1,
        design_hash=design_hash,
        partition=number,
        exposures=Progress(),
        rewards=Progress(),
        watermark_ms=None,
        allowed_lateness_ms=0,
        statistics=earlier.statistics,
        exposure_outcomes=Outcomes(),
        reward_outcomes=Outcomes(),
    )


# Shown ----------------------------------------------------------------------------------------------------


def test_a_chart_marks_the_planned_sample() -> None:
    test = only(planned(spec(f"{ORDER}, minimum_effect: {{relative: 0.2}}"), "order:rate=0.1"))
    lines = list(chart(test))
    assert [line.split()[0] for line in lines] == ["sequential", "fixed", "^", "units"]
    assert len({len(line.rstrip()) for line in (lines[0], lines[1])}) == 1
    assert [count(n) for n in (None, 12.2, 1234567.0, 2e12)] == ["-", "13", "1,234,567", "2e+12"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra `plot`")
def test_the_same_plan_is_the_same_picture(tmp_path: Path) -> None:
    found = planned(spec(f"{ORDER}, minimum_effect: {{relative: 0.2}}"), "order:rate=0.1")
    files = [tmp_path / name for name in ("a.svg", "b.svg", "c.png")]
    for file in files:
        write_plot(found, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<dc:date>" not in files[0].read_bytes()
    assert "order, effect +0.02 (+20 %)" in files[0].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_plot(found, tmp_path / "no" / "a.svg")


def test_a_plot_needs_its_extra_and_a_known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        require_plot(Path("a.pdf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"stream-xp\[plot\]"):
        require_plot(Path("a.svg"))


def test_the_fixed_sample_is_that_of_planning() -> None:
    test = only(planned(spec(f"{ORDER}, minimum_effect: {{relative: 0.2}}"), "order:rate=0.1"))
    assert test.units.fixed == pytest.approx(
        float(fixed_sample(0.02, 2 * (0.09 + 0.12 * 0.88), alpha=0.05, power=0.8))
    )
