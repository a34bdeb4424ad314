"""The table of cases: every method, on which data, at which shares, and the shortcuts that must fail.

A row of `Case` says what is simulated and what it must show; nothing else in this package knows a method's
name. Cases that the quick run has are marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stream_xp.services.calibrate.adapting import DelayedRewards, Epochs, Scores
from stream_xp.services.calibrate.bounded import ArmValue, Bernstein, Betting, hoeffding
from stream_xp.services.calibrate.case import ALPHA, Case, Simulation, Study
from stream_xp.services.calibrate.conversions import EarlyAndLate, LabelPrediction, RelativeRisk
from stream_xp.services.calibrate.counts import FirstConversions, events_reject
from stream_xp.services.calibrate.data import (
    CLUSTERED_COUNTS,
    DENSE_RATIO,
    DRIFTING,
    DRIFTING_NORMAL,
    DRIFTING_REVENUE,
    EXPONENTIAL,
    GROWING_SPREAD,
    IDLE_COVARIATE,
    JUMPING_SPREAD,
    LOGNORMAL_2,
    LOGNORMAL_15,
    NORMAL,
    SKEWED_COVARIATE,
    SPARSE_RATIO,
    WITH_COVARIATE,
    ZERO_INFLATED,
    BoolArray,
    Data,
    Design,
    FloatArray,
    IntArray,
    OneArm,
    Ramp,
    Sample,
    Share,
    Thompson,
    bernoulli,
    beta,
)
from stream_xp.services.calibrate.families import (
    ManyMetrics,
    StoppedByPosterior,
    levels_of_bonferroni,
    peeked_loss,
    peeked_probability,
    without_correction,
)
from stream_xp.services.calibrate.known import KnownVariance, known_variance_z
from stream_xp.services.calibrate.linear import FTest, TTest
from stream_xp.services.calibrate.means import (
    AtTheMargin,
    Difference,
    Lift,
    Means,
    Quantity,
    conversions_reject,
    naive_z,
    z_of_difference,
)
from stream_xp.services.calibrate.quantiles import (
    Band,
    Quantile,
    QuantileDifference,
    SameDistribution,
    SeparateBands,
)
from stream_xp.services.calibrate.rates import OneRate, RateMargin
from stream_xp.services.calibrate.running import EVERY_10TH, EVERY_25TH, EVERY_UNIT, Looks
from stream_xp.services.calibrate.runs import Msprt, WornOff, intersected, smallest_p
from stream_xp.services.calibrate.sequential import Declared, Peeked
from stream_xp.services.calibrate.shares import SharesStudy, chi_square
from stream_xp.services.calibrate.traps import ClusteredEvents, DelayedConversions, SpreadsOut, TurnsSparse
from stream_xp.stats.group_sequential import Spending
from stream_xp.stats.multiplicity import e_bh, e_holm
from stream_xp.stats.sample_ratio import sample_ratio_dirichlet_log_e, sample_ratio_log_e

Errs = Callable[[Sample, float], BoolArray]

THREE_SHARES = (Share(0.02), Share(0.1), Share(0.5))
UNIT_DATA = (
    NORMAL,
    EXPONENTIAL,
    LOGNORMAL_15,
    LOGNORMAL_2,
    bernoulli(0.02),
    bernoulli(0.002),
    ZERO_INFLATED,
)
# Dense while the variances are young, where the methods err most.
DENSE_THEN_5TH = Looks("every unit to 500, then every 5th", step=5, dense=500)
EVERY_50TH, EVERY_100TH = Looks("every 50th unit", step=50), Looks("every 100th unit", step=100)
EVERY_250TH = Looks("every 250th unit", step=250)
EVERY_500TH = Looks("every 500th unit", step=500)
RAMP_WEIGHTS = ((0.9, 0.1), (0.7, 0.3), (0.5, 0.5))
THREE_ARMS = ((0.8, 0.1, 0.1), (0.4, 0.3, 0.3), (0.2, 0.4, 0.4))


def _case(row: str, method: str, data: Data, design: Design, errs: Errs, **more: Any) -> Case:
    """A method on a data model under a design."""
    lift = more.pop("lift", 0.0)
    called = more.pop("called", None)
    simulate = Study(data, design, errs, lift=lift, alpha=more.get("nominal", ALPHA))
    looks = more.pop("looks", getattr(errs, "looks", EVERY_UNIT))
    name = called or (data.name if lift == 0 else f"{data.name}, lift {100 * lift:+.0f} %")
    named = looks if isinstance(looks, str) else looks.name
    return Case(row=row, method=method, data=name, share=design.name, simulate=simulate, looks=named, **more)


def _own(row: str, method: str, data: str, share: str, simulate: Simulation, **more: Any) -> Case:
    """A simulation of its own."""
    looks = more.pop("looks", getattr(simulate, "looks", EVERY_UNIT))
    named = looks if isinstance(looks, str) else looks.name
    return Case(row=row, method=method, data=data, share=share, simulate=simulate, looks=named, **more)


def _grid(
    row: str, method: str, data: Iterable[Data], designs: Iterable[Design], errs: Errs, **more: Any
) -> Iterator[Case]:
    """A method on every data model under every design; the quick run has the pairs in `quick`."""
    chosen = more.pop("quick", ())
    designs = tuple(designs)
    for model in data:
        for design in designs:
            quick = (model.name, design.name) in chosen
            yield _case(row, method, model, design, errs, quick=quick, **more)


# ---- a: means ----------------------------------------------------------------------------------------


def _means() -> Iterator[Case]:
    yield _case("a1", "mean, known variance", NORMAL, OneArm(), KnownVariance(), quick=True)
    yield _case("a1", "mean, known variance, one-sided", NORMAL, OneArm(), KnownVariance(sides=1))
    rare, zeros = bernoulli(0.02).name, ZERO_INFLATED.name
    quick = {(rare, "0.1"), (zeros, "0.02"), (NORMAL.name, "0.5")}
    yield from _grid("a2", "difference of means", UNIT_DATA, THREE_SHARES, Difference(), quick=quick)
    yield from _grid(
        "a2", "difference of means", [DRIFTING_NORMAL, CLUSTERED_COUNTS], [Share(0.1)], Difference()
    )
    by_epoch = Difference(Means(looks=DENSE_THEN_5TH))
    yield _case("a2", "difference of means, by epoch", DRIFTING, Ramp(), by_epoch, quick=True)
    yield _case("a2", "difference of means, by epoch", DRIFTING_REVENUE, Ramp(), by_epoch)
    falling = Ramp((0.5, 0.3, 0.1))
    yield _case("a2", "difference of means, by epoch", GROWING_SPREAD, falling, by_epoch, quick=True)
    yield _own(
        "a2",
        "difference of means, by epoch",
        "normal, sd rising from 1 to 3 in treatment alone",
        falling.name,
        SpreadsOut(falling, by_epoch, ALPHA),
        looks=DENSE_THEN_5TH,
    )
    yield from _at_the_margin()
    lifted = [EXPONENTIAL, LOGNORMAL_15, ZERO_INFLATED]
    shares = [Share(0.1), Share(0.5), Share(0.9)]
    quick = {(zeros, "0.5")}
    yield from _grid("a3", "lift by Fieller", lifted, shares, Lift(), lift=0.2, quick=quick)
    yield from _grid("a3", "lift by Fieller", [bernoulli(0.05)], shares, Lift(), lift=-0.2)
    yield from _grid("a3", "lift by Fieller", [bernoulli(0.05), ZERO_INFLATED], [Share(0.02)], Lift())


def _at_the_margin() -> Iterator[Case]:
    harm = AtTheMargin(-0.02, "absolute", "below")
    safe = AtTheMargin(-0.2, "relative", "above")
    shares = [Share(0.1), Share(0.5)]
    yield from _grid("a2", "harm at the margin, one-sided", [bernoulli(0.1)], shares, harm, lift=-0.2)
    yield from _grid("a3", "no worse than the margin, one-sided", [bernoulli(0.1)], shares, safe, lift=-0.2)


def _shortcuts_of_means() -> Iterator[Case]:
    unguarded, half = Means(guard=False), Share(0.5)
    yield _case(
        "a2",
        "naive z",
        NORMAL,
        half,
        naive_z,
        quick=True,
        looks="every unit from 100",
        fails_because="1.96 is for one look; from 5,000 looks the largest is taken",
    )
    yield _case(
        "a2",
        "unguarded small share",
        bernoulli(0.02),
        Share(0.1),
        Difference(unguarded),
        quick=True,
        fails_because="while an arm is small its estimated variance is often near 0",
    )
    yield _case(
        "a2",
        "pooled ramp",
        DRIFTING,
        Ramp(),
        Difference(Means(pooled=True)),
        quick=True,
        fails_because="the arm that got its traffic later has the later, higher rate",
    )
    yield _case(
        "a2",
        "pooled over Thompson weights",
        DRIFTING,
        Thompson(),
        Difference(Means(pooled=True, looks=EVERY_10TH)),
        fails_because="weights and rate move together over time",
        quick=True,
    )
    yield _case(
        "l2",
        "epochs averaged, one variance for all",
        JUMPING_SPREAD,
        Ramp((0.5, 0.05)),
        Epochs(constant_spread=True),
        quick=True,
        fails_because="it does not see that the spread grew after the arm got most of its units",
    )
    yield _case(
        "a3",
        "delta-method lift",
        ZERO_INFLATED,
        half,
        Lift(unguarded, delta=True),
        quick=True,
        lift=0.2,
        fails_because="few units have a value, and the control mean in the denominator is skewed",
    )
    yield _own(
        "a2",
        "immature outcomes",
        "conversions with a delay",
        "0.5",
        DelayedConversions(EVERY_UNIT, _conversions_reject, matured=False),
        quick=True,
        fails_because="treatment only converts sooner, and the late ones of control are not in yet",
    )


def _limits_of_means() -> Iterator[Case]:
    for share in (0.1, 0.5):
        yield _own(
            "a2",
            "difference of means, guarded",
            "exponential; in treatment 95 % zeros, same mean",
            f"{share:g}",
            TurnsSparse(share, Difference(), ALPHA),
            quick=True,
            known_limit=True,
            fails_because="the guard lends a small arm the variance of both; an arm that alone becomes rare and "
            "large shows too little of its own until it has many units. Plan for such a metric by its sparse "
            "arm, or count conversions",
        )


def _conversions_reject(units: IntArray, successes: IntArray) -> BoolArray:
    return conversions_reject(units, successes, ALPHA)


def _matured() -> Iterator[Case]:
    yield _own(
        "a2",
        "difference of means, matured outcomes",
        "conversions with a delay",
        "0.5",
        DelayedConversions(EVERY_UNIT, _conversions_reject, matured=True),
        quick=True,
    )


def _noisier() -> Iterator[Case]:
    """One arm three times as noisy as the other, without a difference of means."""
    for share in (Share(0.1), Share(0.9)):
        yield _case(
            "a2",
            "difference of means",
            NORMAL,
            share,
            Difference(),
            lift=2.0,
            called="normal, sd 3 in treatment",
        )
    yield _case(
        "a6",
        "t test, unequal variances",
        NORMAL,
        Share(0.1),
        TTest(DENSE_THEN_5TH),
        lift=2.0,
        called="normal, sd 3 in treatment",
        quick=True,
        fails_because="its model has one variance for both arms",
    )


def _adjusted() -> Iterator[Case]:
    adjusted: tuple[tuple[str, str, Quantity], ...] = (
        ("a4", "CUPED", "cuped"),
        ("a5", "ANCOVA, interacted", "ancova"),
    )
    for row, name, of in adjusted:
        test = Difference(Means(of, looks=DENSE_THEN_5TH))
        data = [WITH_COVARIATE, SKEWED_COVARIATE]
        yield from _grid(row, name, data, THREE_SHARES, test, quick={(SKEWED_COVARIATE.name, "0.1")})
        by_epoch = Difference(Means(of, looks=EVERY_10TH))
        yield _case(row, name, SKEWED_COVARIATE, Ramp(), by_epoch)
    shares = [Share(0.1), Share(0.5)]
    yield from _grid(
        "a6", "t test, equal variances", [NORMAL], shares, TTest(DENSE_THEN_5TH), quick={(NORMAL.name, "0.5")}
    )
    yield _case("a6", "F test of two coefficients", IDLE_COVARIATE, Share(0.5), FTest(DENSE_THEN_5TH))


def _ratios() -> Iterator[Case]:
    sparse = SPARSE_RATIO.name
    data = [DENSE_RATIO, SPARSE_RATIO]
    tests: tuple[tuple[str, Quantity], ...] = (
        ("difference of ratios", "ratio"),
        ("equality of ratios", "equality of ratios"),
    )
    for name, of in tests:
        test = Difference(Means(of, looks=DENSE_THEN_5TH))
        yield from _grid("f", name, data, THREE_SHARES, test, quick={(sparse, "0.1")})
    lift = Lift(Means("ratio", looks=DENSE_THEN_5TH))
    yield from _grid("f", "lift of ratios by Fieller", data, [Share(0.1), Share(0.5)], lift, lift=0.2)


# ---- b, c: conversions, counts, sample ratio -----------------------------------------------------------


def _rates() -> Iterator[Case]:
    quick = {(bernoulli(0.02).name, "one arm")}
    data = [bernoulli(0.02), bernoulli(0.002), bernoulli(0.3), beta(1, 9)]
    yield from _grid("b1", "one rate", data, [OneArm()], OneRate(), quick=quick)
    yield _case("b1", "one rate, flat prior", bernoulli(0.3), OneArm(), OneRate(flat=True))
    yield _case("b1", "one rate, one-sided above", bernoulli(0.02), OneArm(), OneRate("above"))
    yield _case("b1", "one rate, one-sided below", bernoulli(0.3), OneArm(), OneRate("below"))
    worse, better = RateMargin("above", EVERY_25TH), RateMargin("below", EVERY_25TH)
    shares = [Share(0.1), Share(0.5)]
    yield from _grid("b1", "two rates at the margin, above", [bernoulli(0.1)], shares, worse, lift=-0.2)
    yield from _grid(
        "b1",
        "two rates at the margin, below",
        [bernoulli(0.02)],
        shares,
        better,
        quick={(bernoulli(0.02).name, "0.1")},
    )


def _conversions() -> Iterator[Case]:
    test = LabelPrediction(looks=DENSE_THEN_5TH)
    rates = [bernoulli(0.02), bernoulli(0.002), bernoulli(0.3)]
    quick = {(rates[0].name, "0.1")}
    yield from _grid("b2", "conversion test", rates, THREE_SHARES, test, quick=quick)
    early = EarlyAndLate(DENSE_THEN_5TH)
    averaged = "conversion test averaged with the difference"
    yield from _grid("b2", averaged, rates[:2], THREE_SHARES, early, quick=quick)
    yield _case("b2", "conversion test", DRIFTING, Ramp(), LabelPrediction(looks=EVERY_10TH), quick=True)
    for floor in (0.05, 0.1):
        yield _case("b2", "conversion test", DRIFTING, Thompson(floor), LabelPrediction(looks=EVERY_25TH))
    for side in ("above", "below"):
        one = LabelPrediction(side, looks=DENSE_THEN_5TH)
        yield _case("b2", f"conversion test, one-sided {side}", bernoulli(0.1), Share(0.1), one)
    risk = RelativeRisk(EVERY_25TH)
    yield from _grid(
        "b2",
        "relative risk",
        [bernoulli(0.1)],
        THREE_SHARES,
        risk,
        lift=-0.2,
        quick={(bernoulli(0.1).name, "0.1")},
    )
    yield _case(
        "b2",
        "relative risk, one-sided",
        bernoulli(0.1),
        Share(0.5),
        RelativeRisk(EVERY_25TH, "above"),
        lift=-0.2,
    )


def _first_conversions() -> Iterator[Case]:
    rate = bernoulli(0.1)
    test, by_epoch = FirstConversions(EVERY_25TH), FirstConversions(EVERY_25TH, by_epoch=True)
    yield from _grid("b4", "first conversions", [rate], THREE_SHARES, test, quick={(rate.name, "0.1")})
    yield _case("b4", "first conversions", bernoulli(0.02), Share(0.5), test, lift=-0.3)
    yield _case("b4", "first conversions, by epoch", DRIFTING, Ramp(), by_epoch)
    yield _case("b4", "first conversions, by epoch", rate, Ramp(), by_epoch, lift=-0.3)


def _counts() -> Iterator[Case]:
    yield _own(
        "c1",
        "event counts, first event of a unit",
        "clustered events",
        "0.5",
        ClusteredEvents(EVERY_10TH, events_reject, first_only=True),
        quick=True,
    )
    for k in (10, 100, 1000):
        test = SharesStudy(((0.5, 0.5),), EVERY_UNIT, _Dirichlet(k))
        yield _own("c2", f"sample ratio, k = {k}", "units", "0.5", test, quick=k == 100)
    yield _own(
        "c2", "sample ratio, k = 100", "units", "0.1", SharesStudy(((0.9, 0.1),), EVERY_UNIT, _Dirichlet(100))
    )
    for name, weights in (("ramp 0.1/0.3/0.5", RAMP_WEIGHTS), ("ramp, 3 arms", THREE_ARMS)):
        tilt = SharesStudy(weights, EVERY_10TH, tilt_rejects)
        yield _own("c3", "sample ratio by tilts", "units", name, tilt, quick=len(weights[0]) == 2)
        yield _own(
            "c3",
            "sample ratio, epochs multiplied",
            "units",
            name,
            SharesStudy(weights, EVERY_UNIT, _Dirichlet(100)),
        )


@dataclass(frozen=True, slots=True)
class _Dirichlet:
    """Rejects by the Dirichlet mixture of one concentration."""

    concentration: float

    def __call__(self, counts: IntArray, weights: FloatArray) -> BoolArray:
        """Whether the e-value has reached 1 / alpha, per look."""
        log_e = sample_ratio_dirichlet_log_e(counts, weights, concentration=self.concentration)
        return log_e >= -math.log(ALPHA)


def tilt_rejects(counts: IntArray, weights: FloatArray) -> BoolArray:
    """Whether the tilt mixture has reached 1 / alpha, per look."""
    return sample_ratio_log_e(counts, weights) >= -math.log(ALPHA)


def final_weights_reject(counts: IntArray, weights: FloatArray) -> BoolArray:
    """Totals held against the last weights."""
    return tilt_rejects(counts.sum(axis=-2, keepdims=True), weights[-1:])


def _shortcuts_of_counts() -> Iterator[Case]:
    yield _own(
        "c1",
        "clustered Poisson",
        "clustered events, 10 a unit",
        "0.5",
        ClusteredEvents(EVERY_10TH, events_reject),
        quick=True,
        fails_because="events of one unit are not independent: it takes all of them to its arm",
    )
    yield _own(
        "c2",
        "peeked chi-square sample ratio",
        "units",
        "0.5",
        SharesStudy(((0.5, 0.5),), EVERY_UNIT, chi_square),
        quick=True,
        fails_because="a test of one look, looked at all along",
    )
    yield _own(
        "c3",
        "totals against the final weights",
        "units",
        "ramp 0.1/0.3/0.5",
        SharesStudy(RAMP_WEIGHTS, EVERY_10TH, final_weights_reject),
        quick=True,
        fails_because="earlier units were assigned by earlier weights",
    )


# ---- d, h, i: bounded means, whole runs ------------------------------------------------------------------


def _bounded() -> Iterator[Case]:
    rate, skewed = bernoulli(0.3), beta(1, 9)
    yield _case("d1", "Hoeffding mixture", bernoulli(0.5), OneArm(), hoeffding)
    yield _case("d1", "Hoeffding mixture", skewed, OneArm(), hoeffding, quick=True)
    yield _case("d2", "empirical Bernstein", rate, OneArm(), Bernstein(EVERY_25TH), quick=True)
    yield _case("d2", "empirical Bernstein", skewed, OneArm(), Bernstein(EVERY_25TH))
    yield _case(
        "d2", "empirical Bernstein, 8 partitions", rate, OneArm(), Bernstein(EVERY_25TH, partitions=8)
    )
    yield _case("d3", "betting", rate, OneArm(), Betting(EVERY_50TH), quick=True)
    yield _case("d3", "betting", skewed, OneArm(), Betting(EVERY_50TH))
    yield _case("d3", "betting, 8 partitions", skewed, OneArm(), Betting(EVERY_50TH, partitions=8))


def _quantiles() -> Iterator[Case]:
    for q in (0.01, 0.5, 0.9, 0.99):
        test = Quantile(q, EVERY_10TH)
        yield _case("e1", f"quantile {q:g}, in bins", EXPONENTIAL, OneArm(), test, quick=q == 0.99)
    yield _case("e2", "band of a distribution", EXPONENTIAL, OneArm(), Band(EVERY_50TH), quick=True)
    for share in (Share(0.1), Share(0.5)):
        average = QuantileDifference(0.9, EVERY_100TH)
        yield _case("e3", "difference of quantiles .9", EXPONENTIAL, share, average, quick=share.share == 0.1)
    product = QuantileDifference(0.5, EVERY_100TH, "product")
    yield _case("e3", "difference of medians, product", EXPONENTIAL, Share(0.5), product)
    whole = SameDistribution(EVERY_250TH)
    yield _case("e3", "equality of distributions", EXPONENTIAL, Share(0.5), whole, quick=True)
    bands = SeparateBands(EVERY_500TH)
    yield _case("e3", "bands of two distributions", EXPONENTIAL, Share(0.5), bands)


def _whole_runs() -> Iterator[Case]:
    yield _case("h", "smallest p of the run", NORMAL, OneArm(), smallest_p, quick=True)
    yield _case("h", "intersection, constant effect", EXPONENTIAL, Share(0.5), intersected)
    fading = "normal, effect wears off"
    yield _own("h", "latest interval", fading, "0.5", WornOff(intersect=False))
    yield _own(
        "h",
        "intersection while the effect wears off",
        fading,
        "0.5",
        WornOff(intersect=True),
        quick=True,
        fails_because="the parameter moves; the intersection holds on to where it was",
    )
    pairs = "every pair of units"
    for tau2 in (0.01, 0.1, 1.0):
        test = Msprt(tau2, variance=2.0)
        yield _case("i", f"mixture SPRT, τ² {tau2:g}", NORMAL, OneArm(), test, looks=pairs, quick=tau2 == 0.1)
    for tau2 in (0.0001, 0.01):
        yield _case(
            "i",
            f"mixture SPRT, plug-in variance, τ² {tau2:g}",
            bernoulli(0.3),
            OneArm(),
            Msprt(tau2),
            looks=pairs,
        )


# ---- g, j, k -----------------------------------------------------------------------------------------


def _designs() -> Iterator[Case]:
    five = "5 declared looks"
    designs: tuple[tuple[str, Spending, float | None], ...] = (
        ("Lan-DeMets O'Brien-Fleming", "obrien_fleming", None),
        ("Lan-DeMets Pocock", "pocock", None),
        ("power family, φ 2", "power", 2.0),
        ("classic O'Brien-Fleming", "classic_obrien_fleming", None),
        ("classic Pocock", "classic_pocock", None),
    )
    for name, spending, phi in designs:
        design = Declared(known_variance_z, spending, phi=phi)
        yield _case(
            "g",
            f"group sequential, {name}",
            NORMAL,
            OneArm(),
            design,
            looks=five,
            multiple=5,
            quick=spending == "obrien_fleming",
        )
    uneven = Declared(known_variance_z, "obrien_fleming", information=(0.1, 0.35, 0.5, 0.8, 1.0), sides=1)
    yield _case(
        "g", "group sequential, uneven looks, one-sided", NORMAL, OneArm(), uneven, looks=five, multiple=5
    )
    means = Declared(z_of_difference, "obrien_fleming")
    yield _case("g", "group sequential, estimated variances", EXPONENTIAL, Share(0.5), means, looks=five)
    for name, spending, _ in designs[:2]:
        peeked = Peeked(Declared(known_variance_z, spending))
        yield _case(
            "g",
            f"over-peeked group sequential, {name}",
            NORMAL,
            OneArm(),
            peeked,
            looks="500 even looks",
            fails_because="its critical values are for the declared looks and no others",
            quick=True,
            multiple=5,
        )


def _posteriors() -> Iterator[Case]:
    prior = "effects from the prior"
    yield _own(
        "j",
        "sign at P(better) > 97.5 %, known prior",
        prior,
        "one arm",
        StoppedByPosterior(),
        nominal=0.025,
        quick=True,
    )
    yield _own(
        "j",
        "95 % posterior interval at that stop, learned prior",
        prior,
        "one arm",
        StoppedByPosterior(interval=True, learned=True),
    )
    flat = "a posterior promises something on average over the prior, nothing about an effect of 0"
    yield _case(
        "j",
        "peeked P(better), flat prior",
        NORMAL,
        OneArm(),
        peeked_probability,
        quick=True,
        looks="every unit from 100",
        fails_because=flat,
    )
    yield _case(
        "j",
        "peeked expected loss, flat prior",
        NORMAL,
        OneArm(),
        peeked_loss,
        quick=True,
        looks="every unit from 100",
        fails_because=flat,
    )


def holm_rejects(log_e: FloatArray, alpha: float) -> BoolArray:
    """e-Holm on the e-values of one look."""
    return e_holm(log_e, alpha=alpha).rejected


def bh_rejects(log_e: FloatArray, alpha: float) -> BoolArray:
    """e-BH on the e-values of one look."""
    return e_bh(log_e, alpha=alpha).rejected


def _many_metrics() -> Iterator[Case]:
    data = "15 metrics, r .3, no effect"
    for name, procedure in (
        ("sequential Bonferroni, any error", levels_of_bonferroni),
        ("e-Holm, any error", holm_rejects),
        ("e-BH, false discoveries", bh_rejects),
    ):
        yield _own(
            "k", name, data, "one arm", ManyMetrics(procedure, EVERY_10TH), quick=procedure is bh_rejects
        )
    yield _own(
        "k",
        "15 metrics without correction",
        data,
        "one arm",
        ManyMetrics(without_correction, EVERY_10TH),
        quick=True,
        fails_because="each metric spends the whole level",
    )


# ---- l: adaptive weights -------------------------------------------------------------------------------


def _adaptive() -> Iterator[Case]:
    looks = "every unit from 100"
    data = [bernoulli(0.1), DRIFTING, ZERO_INFLATED, DRIFTING_REVENUE]
    yield from _grid(
        "l1",
        "propensity scores",
        data,
        [Thompson()],
        Scores(),
        looks=looks,
        quick={(DRIFTING.name, Thompson().name)},
    )
    yield _case("l1", "propensity scores", DRIFTING, Ramp(), Scores(), looks=looks)
    yield _case(
        "l1",
        "propensity scores, frozen centre",
        bernoulli(0.1),
        Thompson(),
        Scores(running=False),
        looks=looks,
    )
    epochs = Epochs(looks=EVERY_25TH)
    yield from _grid(
        "l2",
        "epochs averaged",
        [*data, GROWING_SPREAD],
        [Thompson()],
        epochs,
        quick={(DRIFTING.name, Thompson().name)},
    )
    yield _case("l2", "epochs averaged", DRIFTING, Thompson(0.1), epochs)
    yield _case("l2", "epochs averaged", DRIFTING_REVENUE, Ramp(), Epochs(looks=EVERY_10TH))
    yield _case("l2", "epochs averaged", JUMPING_SPREAD, Ramp((0.5, 0.05)), Epochs(), quick=True)
    value = ArmValue(EVERY_100TH)
    yield _case("l3", "exact value of an arm", bernoulli(0.3), Thompson(), value, quick=True)
    yield _case("l3", "exact value of an arm", beta(1, 9), Thompson(), value)
    yield _case("l3", "exact value of an arm", bernoulli(0.3), Ramp(), value)
    yield _own(
        "l4",
        "delayed rewards",
        "rewards after 200 and 400 units",
        "ramp 0.1/0.3/0.5",
        DelayedRewards(EVERY_100TH),
        quick=True,
    )


CASES: tuple[Case, ...] = (
    *_means(),
    *_matured(),
    *_noisier(),
    *_adjusted(),
    *_shortcuts_of_means(),
    *_limits_of_means(),
    *_rates(),
    *_conversions(),
    *_first_conversions(),
    *_counts(),
    *_shortcuts_of_counts(),
    *_bounded(),
    *_quantiles(),
    *_ratios(),
    *_designs(),
    *_whole_runs(),
    *_posteriors(),
    *_many_metrics(),
    *_adaptive(),
)
