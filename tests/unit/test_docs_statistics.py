"""docs/statistics.md: its numbers are those of the code, its methods those of the engine, its links lead somewhere."""

import importlib.util
import math
import re
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri

from stream_xp.domain.decision import Method
from stream_xp.domain.experiment import FOLDS, Adjustment, Metric, MetricKind
from stream_xp.engine.design import method_of
from stream_xp.engine.quantile_findings import BAND_FROM, COMBINATION
from stream_xp.stats import (
    EXACT_SHARE,
    Sample,
    assignment_deviance,
    bernoulli_pair_log_e,
    conversion_log_e,
    early_one_sided,
    early_two_sided,
    guarded_variance,
    log_e_two_sided,
    one_sided_rho2,
    quantile,
    quantile_concentration,
    quantile_difference,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    sample_ratio_log_e,
    success_ratio,
    tuned_rho2,
)
from stream_xp.stats.arm_stall import units_to_detect_stall
from stream_xp.stats.bayes import decision_errors
from stream_xp.stats.bernoulli import TunedPrior, bernoulli_bounds
from stream_xp.stats.bounded_mean import CONSTRUCTIONS, bounded_mean
from stream_xp.stats.distribution import LEVELS
from stream_xp.stats.group_sequential import group_sequential
from stream_xp.stats.log_loss import log_loss
from stream_xp.stats.mean_difference import GUARD_UNITS, MIN_UNITS_PER_ARM
from stream_xp.stats.planning import (
    conversion_variance,
    effect_variance,
    fixed_power,
    plan_difference,
    stopping_curve,
)
from stream_xp.stats.rate_monitor import records_to_detect
from stream_xp.stats.sample_ratio import TILT_SD
from stream_xp.stats.selection import MIN_EXPERIMENTS, design_errors, stopped_design_errors

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "statistics.md"
TEXT = PAGE.read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())
ALPHA, THRESHOLD = 0.05, math.log(20)
# Written by `make calibrate`, so it need not be there yet.
GENERATED = {"calibration.md", "scenarios.md"}


def says(sentence):
    """The page has these words, wherever its lines break."""
    assert " ".join(sentence.split()) in FLAT, sentence


def row(*cells):
    says("| " + " | ".join(cells) + " |")


def tables():
    """Every table of the page: its heading cells, then its rows."""
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE):
        yield [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in block.splitlines()]


def z(alpha):
    return -float(ndtri(alpha))


@cache
def drawing():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "images" / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the kernel and its cost --------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "sides"), [(0.05, 2), (0.01, 2), (0.05, 1)])
def test_widths_over_the_planned_sample(alpha, sides):
    tune, width = (
        (tuned_rho2, radius_multiplier_two_sided)
        if sides == 2
        else (one_sided_rho2, radius_multiplier_one_sided)
    )
    widths = [f"{width(x * tune(1.0, alpha), alpha):.3f}" for x in (0.01, 0.1, 0.3, 1, 3, 10, 100)]
    row(f"α = {alpha:g}, {'two' if sides == 2 else 'one'}-sided", *widths, f"{z(alpha / sides):.3f}")


def test_a_wrong_plan():
    width = [radius_multiplier_two_sided(x * tuned_rho2(1.0, ALPHA), ALPHA) for x in (1, 3, 0.3, 0.1, 10)]
    three, third, tenth, ten = (f"{100 * (w / width[0] - 1):.0f}" for w in width[1:])
    says(f"wrong by a factor of 3 costs {three} to {third} % of width. One that is wrong by 10")
    says(f"costs {tenth} % if it was too large, {ten} % if it was too small")
    says(f"the sequence is {width[0] / z(ALPHA / 2):.2f} times as wide as a t interval")


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.05, 0.9), (0.01, 0.8), (0.01, 0.9)])
def test_samples_against_a_fixed_test(alpha, power):
    plan = planned(alpha, power)
    found = (plan.n_star, plan.expected_n, plan.median_n, plan.expected_n_null)
    groups = (plan.group_sequential_n, plan.group_sequential_expected_n)
    times = [f"{n / plan.fixed_n:.2f}" for n in (*found, *groups)]
    row(f"{alpha:g}, {100 * power:.0f} %", *times[:4], ", ".join(times[4:]))
    if (alpha, power) == (0.05, 0.8):
        says(f"{times[0]} times as many if it comes to its end")
        says(f"at most {times[4]} times a t test's sample, {times[5]} times on average")


@cache
def planned(alpha, power):
    return plan_difference(1.0, 10_000.0, alpha=alpha, power=power)


def test_larger_effects_stop_sooner():
    n = planned(ALPHA, 0.8).n_star
    twice, thrice = (
        stopping_curve(effect, 10_000.0, alpha=ALPHA, n_star=n).expected(n) / n for effect in (2.0, 3.0)
    )
    says(f"at twice the planned effect the expected sample is {100 * twice:.0f} % of the planned one")
    says(f"at three times {100 * thrice:.0f} %")


@pytest.mark.parametrize("tests", [1, 2, 5, 10, 20])
def test_many_tests(tests):
    alpha = ALPHA / tests
    width = radius_multiplier_two_sided(tuned_rho2(1.0, alpha), alpha)
    one = radius_multiplier_two_sided(tuned_rho2(1.0, ALPHA), ALPHA)
    row(str(tests), f"{-math.log(alpha):.2f}", f"{width:.3f}", f"{(width / one) ** 2:.2f}")
    if tests == 10:
        says(
            f"With 10 values and α = 0.05 a sequence is {width:.3f} standard errors wide at N\\* instead of {one:.3f}"
        )


# ---- the table of methods -----------------------------------------------------------------------------


def test_the_table_of_methods_is_that_of_the_engine():
    (table,) = [t for t in tables() if t[0] == ["kind", "folds by", "adjustment", "`method`"]]
    written = {
        (kind, fold, adjustment): method.strip("`")
        for kind, folds, adjustment, method in table[2:]
        for fold in folds.split(", ")
    }
    assert written == dict(chosen())


def chosen():
    for kind in MetricKind:
        adjustable = kind in (MetricKind.CONVERSION, MetricKind.MEAN)
        for fold, adjustment in product(FOLDS[kind], Adjustment if adjustable else [Adjustment.NONE]):
            metric = Metric(
                key="m",
                kind=kind,
                role="primary",
                direction="increase",
                attribution_window="1h",
                aggregation=fold,
                adjustment=adjustment,
            )
            yield (kind.value, fold.value, adjustment.value), method_of(metric).value


def test_every_method_says_what_it_does_early():
    (table,) = [t for t in tables() if t[0][:2] == ["`method`", "from the first units on"]]
    assert {name.strip("`") for line in table[2:] for name in line[0].split(", ")} == {
        m.value for m in Method
    }
    assert f"from {MIN_UNITS_PER_ARM} units in each arm" in table[0][2]
    says(f"the band until each arm has {BAND_FROM} values")


def test_constants():
    says(f"max(s², (d · s² + {GUARD_UNITS} · s²_both) / (d + {GUARD_UNITS}))")
    says(f"e = {EXACT_SHARE:g} · e(exact) + {1 - EXACT_SHARE:g} · e(asymptotic)")
    says(
        f"guard {GUARD_UNITS} and {MIN_UNITS_PER_ARM} units, shares {EXACT_SHARE:g} and {1 - EXACT_SHARE:g}, "
        f"the grid of rates, tilt {TILT_SD:g}"
    )
    says(f"standard deviation {TILT_SD:g}; with more than two arms")
    says(f"it averages tests of {len(LEVELS)} quantile levels")


# ---- methods of the engine ----------------------------------------------------------------------------


def test_cost_of_averaging():
    two, one = tuned_rho2(1.0, ALPHA), one_sided_rho2(1.0, ALPHA)
    nothing = {"log_e_above": -np.inf, "log_e_below": -np.inf}
    wide = float(early_two_sided(0.0, 1.0, two, alpha=ALPHA, **nothing).upper)
    low = -float(early_one_sided(0.0, 1.0, one, alpha=ALPHA, above=True, log_e_exact=-np.inf).lower)
    both = 100 * (wide / radius_multiplier_two_sided(two, ALPHA) - 1)
    single = 100 * (low / radius_multiplier_one_sided(one, ALPHA) - 1)
    says(f"ln(1/0.8) = {-math.log(1 - EXACT_SHARE):.2f} of log_e, which is {both:.1f} % of width at N\\*")
    says(f"({single:.1f} % one-sided)")


def test_no_failure_anywhere_proves_safety():
    def needed(control):
        units = np.arange(500, 800)[:, np.newaxis] * [control, 1]
        exact = bernoulli_pair_log_e(units, np.zeros_like(units), margin=0.01, side="below")
        return int(units[math.log(EXACT_SHARE) + exact >= THRESHOLD][0, 1])

    even, canary = needed(1), needed(19)
    says(f"after {even:,} units in each arm, or {canary:,} in a canary beside {19 * canary:,} in the control")


@pytest.mark.parametrize(
    ("name", "rates", "share", "seed"),
    [
        ("5 % against 6 %, equal shares", (0.05, 0.06), 0.5, 1),
        ("0.2 % against 2 %, 5 % in treatment", (0.002, 0.02), 0.05, 2),
    ],
)
def test_power_of_the_parts_and_of_their_average(name, rates, share, seed):
    found = [f"{100 * power:.0f} %, {sample}" for power, sample in powers(rates, share, seed)]
    variance = effect_variance(*(conversion_variance(rate) for rate in rates), treatment_share=share)
    fixed = fixed_power(rates[1] - rates[0], variance, n=20_000, alpha=ALPHA)
    row(name, *found, f"{100 * fixed:.0f} %")


def powers(rates, share, seed, *, units=20_000, step=100, paths=500):
    """Share of paths that decide and median sample: label prediction, guarded difference, their average."""
    rng = np.random.default_rng(seed)
    looks = np.arange(step, units + 1, step)
    treated = rng.binomial(step, share, (paths, len(looks)))
    drawn = np.stack((step - treated, treated), axis=-1)
    n, s = drawn.cumsum(axis=1), rng.binomial(drawn, rates).cumsum(axis=1)
    weights = np.array([[1 - share, share]])
    table = n[..., np.newaxis, :], s[..., np.newaxis, :]
    deviance = assignment_deviance(table[0], weights)
    above, below, both = (
        conversion_log_e(*table, weights=weights, side=side) for side in ("above", "below", "both")
    )
    mean, pooled = s / np.maximum(n, 1), (s.sum(axis=-1) / n.sum(axis=-1))[..., np.newaxis]
    own = mean * (1 - mean) * n / np.maximum(n - 1, 1)
    variance = guarded_variance(own, pooled * (1 - pooled), degrees=np.maximum(n - 1, 0))
    begun = (n.min(axis=-1) >= MIN_UNITS_PER_ARM) & (pooled[..., 0] > 0)
    se = np.where(begun, np.sqrt((variance / np.maximum(n, 1)).sum(axis=-1)), 0.0)
    effect, k = mean[..., 1] - mean[..., 0], looks * tuned_rho2(units, ALPHA)
    late = np.where(
        begun, log_e_two_sided(effect / np.where(begun, se, 1.0), np.broadcast_to(k, se.shape)), 0.0
    )
    averaged = early_two_sided(
        effect, se, k, alpha=ALPHA, log_e_above=above - deviance, log_e_below=below - deviance
    ).log_e
    for log_e in (both, late, averaged):
        hit = log_e >= THRESHOLD
        first = np.where(hit.any(axis=1), looks[hit.argmax(axis=1)], np.iinfo(np.int64).max)
        median = int(np.sort(first)[paths // 2])
        yield hit.any(axis=1).mean(), f"{median:,}" if median <= units else "not reached"


def test_counts_of_first_events():
    upper = float(np.asarray(success_ratio([[500, 500]], [[0.5, 0.5]], alpha=ALPHA).upper))
    fixed = z(ALPHA / 2) * math.sqrt(2 / 500)
    says(f"the sequence of ln λ is {upper:.3f} to each side, {upper / fixed:.2f} times the fixed interval")


def test_latencies():
    n, q = 10_000, 0.5
    values = np.arange(1.0, n + 1)
    arms = Sample.from_values(values), Sample.from_values(values + 0.5)
    fixed = z(ALPHA / 2) * math.sqrt(n * q * (1 - q))
    one = quantile(arms[0], q, alpha=ALPHA, concentration=quantile_concentration(n, ALPHA))
    widths = [(one.upper - one.lower) / 2 / fixed]
    for alpha in (ALPHA, ALPHA / 2):
        concentration = quantile_concentration(n, ALPHA / 2)
        two = quantile_difference(*arms, q, alpha=alpha, concentration=concentration, combination=COMBINATION)
        widths.append((two.upper - two.lower) / 2 / (math.sqrt(2) * fixed))
    says(f"10,000 values and planned for that many, {widths[0]:.2f} times the fixed interval")
    says(
        f"The difference of two arms costs {widths[1]:.2f} times, and in the first epoch, at half the level,"
    )
    says(f"{widths[2]:.2f} times.")


def test_guardrails_are_one_sided():
    width = radius_multiplier_one_sided(one_sided_rho2(1.0, ALPHA), ALPHA)
    says(
        f"the sequence is {width:.3f} standard errors wide at N\\*, against {z(ALPHA):.3f} of a one-sided t test"
    )


def test_sample_ratio():
    n = np.arange(100, 20_000, 100)
    counts = np.stack((n * 52 // 100, n * 48 // 100), axis=-1)
    proven = sample_ratio_log_e(counts[:, np.newaxis, :], [[0.5, 0.5]]) >= math.log(1000)
    fixed = math.ceil((z(0.0005) / 0.04) ** 2)
    says(
        f"proven at 0.001 after {n[proven][0]:,} units, where a chi-square test of one look needs {fixed - 1:,}"
    )


# ---- more methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spending", "name"), [("obrien_fleming", "O'Brien-Fleming"), ("pocock", "Pocock")])
def test_critical_values(spending, name):
    design = group_sequential((0.2, 0.4, 0.6, 0.8, 1.0), alpha=ALPHA, spending=spending)
    says(f"{', '.join(f'{z:.3f}' for z in design.z)} ({name} type)")


def test_type_m_and_type_s():
    errors = decision_errors(0.03**2, z=z(ALPHA / 2), prior_variance=0.03**2)
    says(f"a t test that rejects shows an effect {errors.type_m:.2f} times its true size")
    says(f"the wrong sign in {100 * errors.type_s:.1f} % (type S)")


def test_one_rate():
    lower, upper = bernoulli_bounds(1000, 37, alpha=ALPHA, prior=TunedPrior(1000, ALPHA))
    says(f"37 successes of 1,000 give {lower:.4f} to {upper:.4f}")


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("a fair coin", lambda rng: np.arange(1000) % 2 == rng.integers(2)),
        ("a rate of 2 %", lambda rng: rng.permutation(1000) < 20),
        ("Beta(10, 30): standard deviation 0.07", lambda rng: rng.beta(10, 30, 1000)),
    ],
)
def test_bounded_means(name, draw):
    values = np.asarray(draw(np.random.default_rng(1)), dtype=np.float64)
    values = np.random.default_rng(2).permutation(values)
    fixed = z(ALPHA / 2) * float(values.std(ddof=1)) / math.sqrt(len(values))
    found = [bounded_mean(values, construction=c) for c in CONSTRUCTIONS]
    widths = [f"{(one.upper - one.lower) / 2 / fixed:.2f}" for one in found]
    if set(values) <= {0.0, 1.0}:
        lower, upper = bernoulli_bounds(1000, int(values.sum()), alpha=ALPHA, prior=TunedPrior(1000, ALPHA))
        widths.append(f"{(upper - lower) / 2 / fixed:.2f}")
    row(name, *widths, *["–"] * (4 - len(widths)))


def test_what_stops_early_exaggerates():
    plan = plan_difference(1.0, 10_000.0, alpha=ALPHA, power=0.8)
    n = np.geomspace(plan.n_star / 50, plan.n_star, 50)
    edges = radius_multiplier_two_sided(n * tuned_rho2(plan.n_star, ALPHA), ALPHA)
    stopped = [stopped_design_errors(d, (100 / np.sqrt(n)).tolist(), edges.tolist()) for d in (1, 0.5, 0.25)]
    first, half, quarter = (f"{errors.type_m:.2f}" for errors in stopped)
    says(f"when it stops, on average {first} times the effect it was planned for")
    says(f"if the true effect is half of that, {half} times, if a quarter, {quarter} times")
    fixed = [f"{m:.2f}" for m in design_errors([1, 0.5, 0.25], 100 / math.sqrt(plan.fixed_n)).type_m]
    says(f"A t test with its own sample: {fixed[0]}, {fixed[1]} and {fixed[2]} times")
    says(f"each at its own stop, {MIN_EXPERIMENTS} at least")


def test_futility_at_the_planned_sample():
    width = radius_multiplier_one_sided(one_sided_rho2(1.0, ALPHA), ALPHA)
    says(f"with an estimate of 0, m must be {width:.3f} standard errors at N\\*")


def test_monitors():
    half = units_to_detect_stall(0.5, alpha=ALPHA, units=10_000)
    says(f"{half} units of the others in a row prove a stall at 5 %")
    says(f"after 500 units in one of 5 %, {units_to_detect_stall(0.05, alpha=ALPHA, units=500)}")
    n = np.arange(1, 100)
    silent = log_loss(np.stack((n, 0 * n), axis=-1)[:, np.newaxis], [[0.5, 0.5]], largest_ratio=2.0).log_e
    says(f"a silent arm is proven at 5 % after {n[silent >= THRESHOLD][0]} rewards in the other")
    records = records_to_detect(0.1, threshold=0.02, run_length=1e6)
    says(f"a rise to 10 % takes some {records:.0f} records")


# ---- pictures -----------------------------------------------------------------------------------------


def test_what_is_said_of_the_path():
    at, estimate, half, fixed = drawing().one_path()
    rejects = at[np.abs(estimate) > fixed].astype(int)
    says(f"rejects for the first time at {rejects[0]:,} units and for the last at {rejects[-1]:,}.")
    assert (np.abs(estimate) < half).all()


def test_what_is_said_of_the_guard():
    at, low, high, guarded_low, guarded_high = drawing().guarded_path()
    wrong = at[(high < 0) | (low > 0)].astype(int)
    says(f"claims between {wrong[0]:,} and {wrong[-1]:,} units that the canary is better")
    assert (high[np.isin(at, wrong)] < 0).all()
    assert ((guarded_low < 0) & (guarded_high > 0)).all()
    cost = (guarded_high[-1] - guarded_low[-1]) / (high[-1] - low[-1]) - 1
    says(f"the guard costs {100 * cost:.0f} % of width")


def test_what_is_said_of_early_evidence():
    (at, _, late, both), failures = drawing().early_path()
    first, alone = (int(at[log_e >= THRESHOLD][0]) for log_e in (both, late))
    assert (failures < first).sum() == 6
    says(
        f"rejects at the sixth failure in the canary, after {first:,} units; the asymptotic part alone at {alone:,}."
    )


def test_pictures_are_those_of_their_script(tmp_path):
    drawn = drawing().draw(tmp_path)
    committed = PAGE.parent / "images"
    shown = re.findall(r"\(images/([^)]*\.svg)\)", TEXT)
    assert sorted(shown) == sorted(path.name for path in drawn)
    for path in drawn:
        new, old = path.read_text(encoding="utf-8"), (committed / path.name).read_text(encoding="utf-8")
        assert len(new) < 60_000
        if maker(new) == maker(old):  # another matplotlib may write the same picture otherwise
            assert new == old, f"{path.name} is out of date: python docs/images/draw.py"


def maker(svg):
    return re.findall(r"<dc:title>(Matplotlib.*?),", svg)


# ---- links --------------------------------------------------------------------------------------------


def anchors(path):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_links_lead_somewhere(link):
    name, _, anchor = link.partition("#")
    target = (PAGE.parent / name).resolve() if name else PAGE
    if name in GENERATED and not target.exists():
        return
    assert target.exists(), link
    if anchor:
        assert anchor in anchors(target), link


def test_names_of_code_exist():
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "stream_xp").rglob("*.py"))
    missing = [name for name in set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", TEXT)) if name not in code]
    assert not missing
