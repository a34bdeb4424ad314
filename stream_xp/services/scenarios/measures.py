"""From the outcomes of runs to numbers with their Monte Carlo error, and claims about them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from stream_xp.domain.decision import Action
from stream_xp.services.scenarios.naive import TESTS
from stream_xp.services.scenarios.runs import RunOutcome
from stream_xp.services.scenarios.scenario import Claim, Comparison, World
from stream_xp.services.scenarios.truths import Floats, Truths
from stream_xp.services.scenarios.world import HOUR_MS
from stream_xp.services.spec_file import FieldPath

STANDARD_ERRORS = 3.0
"""A rate is above its promise if it is so by more than this many Monte Carlo errors."""


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """A number about all runs.

    Attributes:
        value: None where it lies beyond the horizon, or is of no run.
        error: Monte Carlo standard error; None where there is no value.
        runs: those that it is about.
    """

    name: str
    value: float | None
    error: float | None
    runs: int


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A claim, and whether it holds."""

    measure: str
    words: str
    holds: bool


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All that is reported of a scenario."""

    scenario: str
    title: str
    runs: int
    looks: int
    measures: tuple[Measure, ...]
    claims: tuple[Judged, ...]

    @property
    def holds(self) -> bool:
        """Whether every claim does."""
        return all(claim.holds for claim in self.claims)


def summary(world: World, outcomes: Sequence[RunOutcome]) -> Summary:
    """Everything that is reported of the runs of a scenario; its claims are those that `check_claims` let pass."""
    measures = _measures(world, outcomes)
    by_name = {measure.name: measure for measure in measures}
    return Summary(
        scenario=world.scenario.scenario,
        title=world.scenario.title,
        runs=len(outcomes),
        looks=world.looks,
        measures=measures,
        claims=tuple(_judged(claim, by_name) for claim in world.scenario.claims),
    )


def check_claims(world: World) -> None:
    """Refuse claims about measures that the scenario does not have; before the work rather than after it.

    Raises:
        SpecFaults: with the line of each.
    """
    known = [measure.name for measure in _measures(world, [_NOTHING, _NOTHING])]
    rule = f"is no measure of this scenario; it has {', '.join(known)}"
    named: list[tuple[int, str, float | str | None]] = [
        (at, field, name)
        for at, claim in enumerate(world.scenario.claims)
        for field, name in (
            ("measure", claim.measure),
            ("at_most", claim.at_most),
            ("at_least", claim.at_least),
        )
    ]
    faults: list[tuple[FieldPath, str]] = [
        (("claims", at, field), f"{name!r} {rule}")
        for at, field, name in named
        if isinstance(name, str) and name not in known
    ]
    if faults:
        raise world.refusal(faults)


_NOTHING = RunOutcome(
    action=None,
    arm=None,
    metric=None,
    ended_ms=None,
    onset_ms=None,
    false_stop=False,
    futile=False,
    harmed=0.0,
    erred=False,
    unsafe=False,
    stage=None,
    epochs=1,
    regret=0.0,
    uniform_regret=1.0,
    on_best=0.0,
    on_best_at_end=0.0,
    best_at_end=False,
    shipped_best=False,
    suspected=False,
    naive={test.value: (None, 0.0) for test in TESTS},
    context_free=(0.0, 0.0),
)


def _measures(world: World, runs: Sequence[RunOutcome]) -> tuple[Measure, ...]:
    """All measures; which these are follows from the scenario alone, and not from what became of its runs."""
    wanted = world.scenario.comparisons
    can_harm = Truths(world, 1).can_harm(world)
    found = [
        _rate("stopped", [run.action is Action.STOP for run in runs]),
        _rate("false_stops", [run.false_stop for run in runs]),
        _rate("shipped", [run.action is Action.SHIP for run in runs]),
        _rate("false_claims", [run.erred for run in runs]),
        *_quantiles("ended_h", [_hours(run.ended_ms) for run in runs]),
    ]
    found += _of_spec(world, runs)
    if can_harm:
        # A run that was stopped before the harm began has no delay, and cost no unit.
        harmful = [run for run in runs if run.onset_ms is not None and not _before(run, _stopped_ms(run))]
        found += _quantiles("delay_h", [_delay(run, _stopped_ms(run)) for run in harmful])
        found += _quantiles("units_harmed", [run.harmed for run in harmful])
    for test in TESTS:
        if test in wanted:
            found += _of_test(test.value, runs, can_harm=can_harm)
    if Comparison.UNIFORM in wanted:
        found += _regrets(runs)
    if Comparison.CONTEXT_FREE in wanted:
        others = np.array([run.context_free or (math.nan, math.nan) for run in runs])
        found += [_mean("context_free.regret", others[:, 0]), _mean("context_free.on_best", others[:, 1])]
    return tuple(found)


def _of_spec(world: World, runs: Sequence[RunOutcome]) -> list[Measure]:
    """Measures of what only some experiments have, or some traffic."""
    found = []
    if world.spec.guardrails:
        found.append(_rate("false_safe", [run.unsafe for run in runs]))
    if world.spec.primaries:
        found.append(_rate("shipped_best", [run.shipped_best for run in runs]))
    if world.spec.conclusion is not None and world.spec.conclusion.futility:
        found.append(_rate("futile", [run.futile for run in runs]))
    if world.scenario.arrivals:
        found.append(_rate("sample_ratio_counted", [run.suspected for run in runs]))
    if world.spec.ramp is not None:
        last = len(world.spec.ramp.stages) - 1
        found.append(_rate("reached_last_stage", [run.stage == last for run in runs]))
    return found


def _of_test(name: str, runs: Sequence[RunOutcome], *, can_harm: bool) -> list[Measure]:
    found = [_rate(f"{name}.rejected", [run.naive[name][0] is not None for run in runs])]
    if can_harm:
        # A test that rejects before the harm begins has found something else.
        early = [_before(run, run.naive[name][0]) for run in runs]
        harmful = [run for run, no in zip(runs, early, strict=True) if run.onset_ms is not None and not no]
        found.append(_rate(f"{name}.false_stops", early))
        found += _quantiles(f"{name}.delay_h", [_delay(run, run.naive[name][0]) for run in harmful])
        found += _quantiles(f"{name}.units_harmed", [run.naive[name][1] for run in harmful])
    return found


def _regrets(runs: Sequence[RunOutcome]) -> list[Measure]:
    policy = np.array([run.regret for run in runs])
    uniform = np.array([run.uniform_regret for run in runs])
    total = float(uniform.mean())
    share = float(policy.mean()) / total if total > 0 else math.nan
    found = [_mean("regret", policy), _mean("uniform.regret", uniform)]
    if total > 0:
        error = _mean("", policy - share * uniform).error or 0.0
        found.append(Measure(name="regret_share", value=share, error=error / total, runs=len(runs)))
    return [
        *found,
        _mean("on_best", np.array([run.on_best for run in runs])),
        _mean("on_best_at_end", np.array([run.on_best_at_end for run in runs])),
        _rate("best_at_end", [run.best_at_end for run in runs]),
    ]


def _before(run: RunOutcome, at_ms: int | None) -> bool:
    return at_ms is not None and (run.onset_ms is None or at_ms <= run.onset_ms)


def _stopped_ms(run: RunOutcome) -> int | None:
    return run.ended_ms if run.action is Action.STOP and not run.futile else None


def _delay(run: RunOutcome, at_ms: int | None) -> float:
    if at_ms is None or run.onset_ms is None or at_ms <= run.onset_ms:
        return math.inf
    return (at_ms - run.onset_ms) / HOUR_MS


def _hours(at_ms: int | None) -> float:
    return math.inf if at_ms is None else at_ms / HOUR_MS


# --- numbers with errors -------------------------------------------------------------------------------------


def _rate(name: str, hits: Sequence[bool]) -> Measure:
    # Half a hit more, so that the error is never 0.
    count, total = sum(hits), len(hits)
    likely = (count + 0.5) / (total + 1)
    return Measure(name=name, value=count / total, error=math.sqrt(likely * (1 - likely) / total), runs=total)


def _mean(name: str, values: Floats) -> Measure:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Measure(name=name, value=float(values.mean()), error=error, runs=len(values))


def _quantiles(name: str, values: Sequence[float]) -> list[Measure]:
    return [_quantile(f"{name}_p{round(100 * p)}", values, p) for p in (0.5, 0.95)]


def _quantile(name: str, values: Sequence[float], p: float) -> Measure:
    """A quantile of the runs; its error is half the distance of the values one binomial error above and below it."""
    ordered, n = sorted(values), len(values)
    if not n:
        return Measure(name=name, value=None, error=None, runs=0)
    spread = math.sqrt(p * (1 - p) * n)
    low, at, high = (
        ordered[min(n - 1, max(0, math.ceil(rank) - 1))] for rank in (p * n - spread, p * n, p * n + spread)
    )
    value = None if math.isinf(at) else at
    error = None if math.isinf(high) or value is None else (high - low) / 2
    return Measure(name=name, value=value, error=error, runs=n)


# --- claims --------------------------------------------------------------------------------------------------


def _judged(claim: Claim, by_name: dict[str, Measure]) -> Judged:
    measure, bound = by_name[claim.measure], claim.at_most
    most = bound is not None
    if bound is None:
        bound = claim.at_least
    limit = by_name[bound].value if isinstance(bound, str) else bound
    words = f"{'at most' if most else 'at least'} {bound if isinstance(bound, str) else f'{bound:g}'}"
    return Judged(
        measure=claim.measure,
        words=words,
        holds=_holds(measure, limit, most=most, promised=not isinstance(bound, str)),
    )


def _holds(measure: Measure, limit: float | None, *, most: bool, promised: bool) -> bool:
    """Whether a claim holds: a promised upper bound within Monte Carlo error, all others as they stand.

    Of two values beyond the horizon nobody knows which is the larger one, and of no runs nothing holds.
    """
    if measure.runs == 0 or (measure.value is None and (most or limit is None)):
        return False
    value = math.inf if measure.value is None else measure.value
    bound = math.inf if limit is None else limit
    if not most:
        return value >= bound
    return value - (STANDARD_ERRORS * (measure.error or 0.0) if promised else 0.0) <= bound
