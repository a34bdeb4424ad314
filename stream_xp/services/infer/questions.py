"""What can be asked: one type per method, told apart by the field `method`.

Only the shape is checked here: which fields there are, their types, and the ranges that a message can name
together with the arm. The functions that answer check the rest.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

Alpha: TypeAlias = Annotated[float, Meta(gt=0, lt=1)]
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=2**53)]
Units: TypeAlias = Annotated[int, Meta(ge=1, lt=2**53)]
Positive: TypeAlias = Annotated[float, Meta(gt=0)]
Spread: TypeAlias = Annotated[float, Meta(ge=0)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Side: TypeAlias = Literal["above", "below"]
Relative: TypeAlias = Literal["none", "fieller", "delta"]


class Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object inside a question."""


class Question(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="method"):
    """What every question has.

    Attributes:
        alpha: error level of both sides together.

    """

    alpha: Alpha = 0.05

    def __post_init__(self) -> None:
        """Check the rules between fields; ValueError names the field."""


class SidedQuestion(Question, frozen=True, kw_only=True):
    """A question with one or two sides.

    Attributes:
        sides: 2, or 1 for a test of H0: effect <= 0 with a lower bound.
        side: the side of a one-sided test: `above` shows that the effect is above 0, `below` tests
            H0: effect >= 0 with an upper bound.

    """

    sides: Literal[1, 2] = 2
    side: Side | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side is not None and self.sides == 2:
            raise ValueError("side: only with sides 1")
        if self.sides == 1 and self.alpha >= 0.5:
            raise ValueError("alpha: must be below 0.5 with sides 1")

    @property
    def tested_side(self) -> Side:
        """The side of a one-sided test."""
        return self.side or "above"

    @property
    def tail(self) -> Literal["both", "above", "below"]:
        """The side, or both."""
        return "both" if self.sides == 2 else self.tested_side


class TunedQuestion(SidedQuestion, frozen=True, kw_only=True):
    """A question to the normal mixture, whose tuning is fixed in advance.

    Attributes:
        n_star: planned units of both arms, at which the sequence is tightest.
        rho2: the tuning constant itself, per unit.

    """

    n_star: Positive | None = None
    rho2: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one(self, "n_star", "rho2")


def require_one(question: Struct, *names: str) -> None:
    """ValueError unless exactly one of the fields is given."""
    if sum(getattr(question, name) is not None for name in names) != 1:
        raise ValueError(f"{names[0]}: give exactly one of {' and '.join(names)}")


def require_together(question: Struct, *names: str) -> None:
    """ValueError unless all of the fields are given, or none."""
    given = [getattr(question, name) is not None for name in names]
    if any(given) and not all(given):
        raise ValueError(f"{names[given.index(False)]}: {' and '.join(names)} go together")


def require_absent(question: Struct, *names: str, unless: str) -> None:
    """ValueError if one of the fields is given."""
    for name in names:
        if getattr(question, name) is not None:
            raise ValueError(f"{name}: only with {unless}")


# ---- means --------------------------------------------------------------------------------------------


class NormalMixture(TunedQuestion, frozen=True, kw_only=True, tag="normal_mixture"):
    """An estimate with its variance (of the estimate, not of a unit) from `n` units."""

    estimate: float
    variance: Positive
    n: Units


class CovariateMoments(Part, frozen=True, kw_only=True):
    """A covariate from before the exposure, and its covariance with the metric; divisor n - 1."""

    mean: float
    variance: Spread
    covariance: float


class MeanArm(Part, frozen=True, kw_only=True):
    """Units, mean and variance (divisor n - 1) of one arm."""

    n: Units
    mean: float
    variance: Spread
    covariate: CovariateMoments | None = None


class MeanDifference(TunedQuestion, frozen=True, kw_only=True, tag="mean_difference"):
    """Treatment mean minus control mean, or the lift; raw or adjusted for a covariate."""

    control: MeanArm
    treatment: MeanArm
    guard: bool = True
    relative: Relative = "none"
    adjustment: Literal["none", "cuped", "ancova"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_two_sided(self)
        for name, arm in (("control", self.control), ("treatment", self.treatment)):
            if (arm.covariate is None) != (self.adjustment == "none"):
                raise ValueError(f"{name}.covariate: goes together with adjustment 'cuped' or 'ancova'")


class RatioArm(Part, frozen=True, kw_only=True):
    """Moments of numerator m and denominator d of the units of one arm; divisor n - 1."""

    n: Units
    mean_m: float
    mean_d: float
    var_m: Spread
    var_d: Spread
    cov_md: float


class RatioDifference(TunedQuestion, frozen=True, kw_only=True, tag="ratio_difference"):
    """Difference, or lift, of the arms' ratios of sums."""

    control: RatioArm
    treatment: RatioArm
    guard: bool = True
    relative: Relative = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_two_sided(self)


def require_two_sided(question: MeanDifference | RatioDifference) -> None:
    """ValueError if a lift is asked for with one side."""
    if question.relative != "none" and question.sides == 1:
        raise ValueError("relative: a lift has 2 sides here")


class LinearModel(Question, frozen=True, kw_only=True, tag="linear_model"):
    """A t or F statistic of a homoskedastic normal linear model, with a g-prior or an exact one."""

    t: float | None = None
    f: Spread | None = None
    df_model: Units | None = None
    df_residual: Units
    n: Units
    g: Positive | None = None
    phi: Positive | None = None
    z2: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one(self, "t", "f")
        require_together(self, "f", "df_model")
        require_one(self, "g", "phi")
        require_together(self, "phi", "z2")
        if self.n <= self.df_residual:
            raise ValueError("n: must be above df_residual")


# ---- conversions and counts ---------------------------------------------------------------------------


class BernoulliMean(SidedQuestion, frozen=True, kw_only=True, tag="bernoulli_mean"):
    """The mean of values in [0, 1] from their number and sum; `log_e` if a `null` is given."""

    n: Units
    successes: Spread
    t_opt: Positive | None = None
    a: Positive | None = None
    b: Positive | None = None
    null: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one(self, "t_opt", "a")
        require_together(self, "a", "b")


class Successes(Part, frozen=True, kw_only=True):
    """Units whose outcome is known, and those that converted."""

    n: Count
    successes: Count


class ConversionEpoch(Part, frozen=True, kw_only=True):
    """Logged assignment probabilities, and counts, of each arm in one weight epoch."""

    weights: dict[str, Share]
    counts: dict[str, Successes]


class ConversionDifference(SidedQuestion, frozen=True, kw_only=True, tag="conversion_difference"):
    """Whether the outcome depends on the arm, under any drift and any logged weights."""

    epochs: Annotated[tuple[ConversionEpoch, ...], Meta(min_length=1)]
    control: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.arms) < 2:
            raise ValueError("epochs: weights must name at least two arms")
        if self.control not in self.arms:
            raise ValueError("control: must be an arm that weights names")
        for i, epoch in enumerate(self.epochs):
            for arm in epoch.counts.keys() - epoch.weights.keys():
                raise ValueError(f"epochs[{i}].counts: arm {arm!r} has no weight")

    @property
    def arms(self) -> list[str]:
        """Every arm that has a weight, in the order of first mention."""
        return list(dict.fromkeys(arm for epoch in self.epochs for arm in epoch.weights))


class Counts(Question, frozen=True, kw_only=True, tag="counts"):
    """First events per arm, the control first."""

    counts: Annotated[tuple[Count, ...], Meta(min_length=2)]
    weights: Annotated[tuple[Share, ...], Meta(min_length=2)]
    k: Positive = 100.0


class RatioEpoch(Part, frozen=True, kw_only=True):
    """Weights and units of each arm in one weight epoch."""

    weights: Annotated[tuple[Share, ...], Meta(min_length=2)]
    counts: Annotated[tuple[Count, ...], Meta(min_length=2)]


class SampleRatio(Question, frozen=True, kw_only=True, tag="sample_ratio"):
    """Whether the arms get the shares that their weights promise."""

    epochs: Annotated[tuple[RatioEpoch, ...], Meta(min_length=1)]
    mixture: Literal["dirichlet", "tilt"] = "tilt"
    k: Positive | None = None
    s: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "s" if self.mixture == "dirichlet" else "k"
        require_absent(self, name, unless=f"mixture {'tilt' if name == 's' else 'dirichlet'}")
        arms = len(self.epochs[0].weights)
        for i, epoch in enumerate(self.epochs):
            for field, row in (("weights", epoch.weights), ("counts", epoch.counts)):
                if len(row) != arms:
                    raise ValueError(f"epochs[{i}].{field}: must have {arms} arms, as the first weights")


# ---- values and distributions -------------------------------------------------------------------------

Values: TypeAlias = Annotated[tuple[float, ...], Meta(min_length=1)]
Edges: TypeAlias = Annotated[tuple[float, ...], Meta(min_length=2)]
BinCounts: TypeAlias = Annotated[tuple[Count, ...], Meta(min_length=1)]


class BoundedMean(SidedQuestion, frozen=True, kw_only=True, tag="bounded_mean"):
    """The mean of values in [lower_bound, upper_bound], in the order in which they came.

    `log_e` if a `null` is given. `n_star` is the planned number of values; betting needs none.
    """

    values: Values
    construction: Literal["hoeffding", "empirical_bernstein", "betting"]
    lower_bound: float = 0.0
    upper_bound: float = 1.0
    n_star: Positive | None = None
    null: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.construction == "betting":
            require_absent(self, "n_star", unless="construction hoeffding or empirical_bernstein")


class ArmSample(Part, frozen=True, kw_only=True):
    """Values in any order, or a histogram: `counts[i]` values in [edges[i], edges[i + 1])."""

    values: Values | None = None
    edges: Edges | None = None
    counts: BinCounts | None = None

    def __post_init__(self) -> None:
        require_one(self, "values", "edges")
        require_together(self, "edges", "counts")


class Quantile(SidedQuestion, frozen=True, kw_only=True, tag="quantile"):
    """The q-quantile of a sample; `log_e` if a `null` is given."""

    q: Alpha
    values: Values | None = None
    edges: Edges | None = None
    counts: BinCounts | None = None
    n_star: Positive | None = None
    null: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one(self, "values", "edges")
        require_together(self, "edges", "counts")


class QuantileDifference(SidedQuestion, frozen=True, kw_only=True, tag="quantile_difference"):
    """The q-quantile of treatment minus that of control, or their ratio less 1."""

    q: Alpha
    control: ArmSample
    treatment: ArmSample
    n_star: Positive | None = None
    relative: bool = False
    combination: Literal["average", "product"] = "average"


class DistributionBand(Question, frozen=True, kw_only=True, tag="distribution_band"):
    """How far the empirical distribution function may be from the true one, everywhere at once."""

    n: Units
    t_min: Annotated[float, Meta(ge=1)]


# ---- designs and decisions ----------------------------------------------------------------------------


class GroupSequential(Question, frozen=True, kw_only=True, tag="group_sequential"):
    """Critical values for the looks at these shares of the planned information."""

    information: Annotated[tuple[float, ...], Meta(min_length=1)]
    spending: Literal["obrien_fleming", "pocock", "power", "classic_obrien_fleming", "classic_pocock"]
    phi: Positive | None = None
    sides: Literal[1, 2] = 2


class Bayes(Question, frozen=True, kw_only=True, tag="bayes"):
    """An estimate with its variance, and a normal prior."""

    estimate: float
    variance: Positive
    prior_mean: float
    prior_variance: Spread


class Multiplicity(Question, frozen=True, kw_only=True, tag="multiplicity"):
    """One current e-value per hypothesis of a family."""

    e_values: Annotated[tuple[Spread, ...], Meta(min_length=1)]
    procedure: Literal["e_bonferroni", "e_holm", "e_bh"]


class Segments(Question, frozen=True, kw_only=True, tag="segments"):
    """Effects in the values of one segment, with their standard errors; the asker says whether it was registered."""

    effects: Annotated[tuple[float, ...], Meta(min_length=2, max_length=1000)]
    standard_errors: Annotated[tuple[Positive, ...], Meta(min_length=2, max_length=1000)]
    registered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.effects) != len(self.standard_errors):
            raise ValueError("standard_errors: give as many as effects")


class ScoreSums(Part, frozen=True, kw_only=True):
    """Sums over all units of the augmented inverse-propensity score psi and of the inverse propensities.

    psi = mu1 - mu0 + A (y - mu1) / p - (1 - A) (y - mu0) / (1 - p), with A = 1 in treatment and p the
    propensity of treatment; treatment_inverse is the sum of 1 / p, control_inverse that of 1 / (1 - p).
    """

    n: Units
    psi: float
    psi_squares: Spread
    control_inverse: Positive
    treatment_inverse: Positive


class EpochArm(Part, frozen=True, kw_only=True):
    """Units, mean and variance of one arm in one epoch; an empty arm has no mean."""

    n: Count
    mean: float | None = None
    variance: Spread | None = None

    def __post_init__(self) -> None:
        if self.n >= 1 and self.mean is None:
            raise ValueError("mean: required unless n is 0")
        if self.n >= 2 and self.variance is None:
            raise ValueError("variance: required unless n is 0 or 1")


class ArmEpoch(Part, frozen=True, kw_only=True):
    """Both arms in one weight epoch."""

    control: EpochArm
    treatment: EpochArm


class Adaptive(TunedQuestion, frozen=True, kw_only=True, tag="adaptive"):
    """The difference of two means under adaptive weights, from score sums or from epochs."""

    sums: ScoreSums | None = None
    control: MeanArm | None = None
    treatment: MeanArm | None = None
    epochs: Annotated[tuple[ArmEpoch, ...], Meta(min_length=1)] | None = None
    guard: bool = True
    constant_spread: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one(self, "sums", "epochs")
        require_together(self, "sums", "control", "treatment")


ANY_QUESTION = (
    NormalMixture
    | MeanDifference
    | RatioDifference
    | BernoulliMean
    | ConversionDifference
    | Counts
    | SampleRatio
    | BoundedMean
    | Quantile
    | QuantileDifference
    | DistributionBand
    | GroupSequential
    | LinearModel
    | Bayes
    | Multiplicity
    | Segments
    | Adaptive
)
