"""The door: from evidence to the weights of the next epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from stream_xp.domain.experiment import Direction
from stream_xp.engine.allocation import contexts, strata
from stream_xp.engine.allocation.best import ranking
from stream_xp.engine.allocation.constraints import (
    Constraints,
    Update,
    Weights,
    burning_in,
    check_distribution,
    constrained,
    moved,
    rounded,
)
from stream_xp.engine.allocation.evidence import Conversions, Evidence, Sums, Values
from stream_xp.engine.allocation.policies import Policy, shares
from stream_xp.engine.allocation.posterior import (
    FLAT,
    UNIFORM,
    Posterior,
    Prior,
    conversion_posterior,
    mean_posterior,
)
from stream_xp.stats import Undetermined

NO_EVIDENCE = "no evidence"


@dataclass(frozen=True, slots=True)
class ContextAllocation:
    """Weights for units of one context.

    Attributes:
        weights: of every arm; a distribution.
        probability_best: of every arm in this context; 0 for a closed one, empty while undetermined.
        moved: least share of the context's units that must change arms.
    """

    weights: Weights
    probability_best: Weights
    moved: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Weights to publish, and why.

    Attributes:
        weights: of every arm; a distribution. Of a contextual policy: for units of no known context.
        probability_best: of every arm; 0 for a closed one, empty while undetermined.
        reason: the policy and what held it back.
        moved: least share of units that must change arms, half the sum of |w' - w|; of a contextual policy the
            average over the units' contexts.
        by_context: of a contextual policy.
    """

    weights: Weights
    probability_best: Weights
    reason: str
    moved: float
    by_context: dict[str, ContextAllocation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a policy wants of the open arms; None where it does not know yet."""

    target: Weights | None
    best: Weights
    reason: str


def allocate(
    policy: Policy,
    evidence: Sequence[Evidence],
    current: Mapping[str, float],
    *,
    control: str,
    constraints: Constraints,
    direction: Direction = Direction.INCREASE,
    priors: Mapping[str, Prior] | None = None,
    closed: AbstractSet[str] = frozenset(),
    current_by_context: Mapping[str, Mapping[str, float]] | None = None,
) -> Allocation:
    """Weights of the next epoch: a pure function, in which no order of the rows or arms has a say.

    Until every open arm has its burn-in the wish is equal weights, or those in force. Where the evidence does not
    determine a posterior the weights in force are the wish. `fixed` keeps the weights in force and knows no floor; a
    closed arm falls to 0 under every policy.

    Args:
        policy: how weights follow evidence.
        evidence: sums per arm, weight epoch and context, of one metric. Rows of 0 units tell its kind before the first.
        current: weights in force of every arm, a distribution.
        control: the arm that is never closed.
        constraints: what every published distribution keeps.
        direction: the good direction of the metric.
        priors: of arms of which something is known; Beta(1, 1) for rates and flat for means otherwise.
        closed: arms that their guardrail closed.
        current_by_context: weights in force per context; `current` for those not named.

    Raises:
        ValueError: an unknown arm, a closed control, weights that are no distribution, floors over 1, sums of several
            kinds, or a prior of another kind.
    """
    check_distribution("current", current)
    _check_arms(evidence, current, control, closed)
    opened = [arm for arm in sorted(current) if arm not in closed]
    if policy is Policy.FIXED:
        return _fixed(evidence, current, opened, constraints, direction=direction, priors=priors or {})
    constraints.floor_steps(len(current))
    rows = [row for row in evidence if row.arm in opened]
    lacks = burning_in(*_seen(rows, opened), constraints.burn_in)
    if policy is Policy.CONTEXTUAL:
        return _contextual(
            rows,
            current,
            opened,
            constraints,
            direction=direction,
            priors=priors or {},
            lacks=lacks,
            current_by_context=current_by_context or {},
        )
    even = constraints.burn_in.even
    wish = _wish(policy, _posterior(rows, opened, priors or {}), opened, direction, lacks=lacks, even=even)
    update = _update(wish, current, opened, constraints)
    return Allocation(
        update.weights,
        _of_all(wish.best, current),
        "; ".join((wish.reason, *update.notes)),
        moved(update.weights, current),
    )


def _check_arms(
    evidence: Sequence[Evidence], current: Mapping[str, float], control: str, closed: AbstractSet[str]
) -> None:
    known = set(current)
    if control not in known:
        raise ValueError(f"control {control!r} is no arm")
    if control in closed:
        raise ValueError(f"control {control!r} must not be closed")
    strangers = sorted(({row.arm for row in evidence} | set(closed)) - known)
    if strangers:
        raise ValueError(f"{strangers[0]!r} is no arm")
    if len({(type(row.sums), getattr(row.sums, "step", None)) for row in evidence}) > 1:
        raise ValueError("sums of one metric must be of one kind and step")


def _seen(rows: Sequence[Evidence], opened: Sequence[str]) -> tuple[Weights, Weights | None]:
    """Units and conversions of each open arm."""
    units = {arm: math.fsum(row.sums.units for row in rows if row.arm == arm) for arm in opened}
    if any(isinstance(row.sums, Values) for row in rows):
        return units, None
    return units, {
        arm: math.fsum(
            row.sums.conversions for row in rows if row.arm == arm and isinstance(row.sums, Conversions)
        )
        for arm in opened
    }


def _posterior(
    rows: Sequence[Evidence], opened: Sequence[str], priors: Mapping[str, Prior]
) -> Posterior | Undetermined:
    if not rows:
        return Undetermined(NO_EVIDENCE)
    sums = strata.adjusted(strata.tabled(_without_contexts(rows)), opened, nothing=_nothing(rows))
    if isinstance(sums, Undetermined):
        return sums
    rates = [s for s in sums.values() if isinstance(s, Conversions)]
    if len(rates) == len(opened):
        return conversion_posterior(rates, [priors.get(arm, UNIFORM) for arm in opened])
    means = [s for s in sums.values() if isinstance(s, Values)]
    return mean_posterior(means, [priors.get(arm, FLAT) for arm in opened])


def _without_contexts(rows: Sequence[Evidence]) -> list[Evidence]:
    """The rows with each pair of epoch and context as an epoch: weights may differ between contexts as well."""
    pairs = sorted({(row.context, row.epoch) for row in rows})
    number = {pair: i for i, pair in enumerate(pairs)}
    return [Evidence(row.arm, row.sums, number[row.context, row.epoch]) for row in rows]


def _nothing(rows: Sequence[Evidence]) -> Sums:
    sums = rows[0].sums
    return Values(0, 0, 0, sums.step) if isinstance(sums, Values) else Conversions(0, 0)


def _wish(
    policy: Policy,
    posterior: Posterior | Undetermined,
    opened: Sequence[str],
    direction: Direction,
    *,
    lacks: Sequence[str] = (),
    even: bool = True,
) -> _Wish:
    burning = dict.fromkeys(opened, 1.0 / len(opened)) if lacks and even else None
    if isinstance(posterior, Undetermined):
        return _Wish(burning, {}, f"burn-in: {lacks[0]}" if lacks else f"weights stay: {posterior.reason}")
    try:
        ranks = ranking(posterior, direction)
    except ArithmeticError as error:
        return _Wish(None, {}, f"weights stay: {error}")
    best = dict(zip(opened, ranks.best.tolist(), strict=True))
    if lacks:
        return _Wish(burning, best, f"burn-in: {lacks[0]}")
    return _Wish(dict(zip(opened, shares(policy, ranks).tolist(), strict=True)), best, str(policy.value))


def _update(
    wish: _Wish, current: Mapping[str, float], opened: Sequence[str], constraints: Constraints
) -> Update:
    closed = set(current) - set(opened)
    if wish.target is not None:
        return constrained(wish.target, current, constraints=constraints, closed=closed)
    # The weights in force have the slice in them: with another one they would drift to equality.
    least = max(constraints.floor, constraints.uniform_slice / len(opened))
    held = replace(constraints, floor=least, uniform_slice=0.0)
    return constrained({arm: current[arm] for arm in opened}, current, constraints=held, closed=closed)


def _of_all(best: Weights, arms: Mapping[str, float]) -> Weights:
    return {arm: best.get(arm, 0.0) for arm in arms} if best else {}


def _fixed(
    evidence: Sequence[Evidence],
    current: Mapping[str, float],
    opened: Sequence[str],
    constraints: Constraints,
    *,
    direction: Direction,
    priors: Mapping[str, Prior],
) -> Allocation:
    rows = [row for row in evidence if row.arm in opened]
    wish = _wish(Policy.THOMPSON, _posterior(rows, opened, priors), opened, direction)
    weights = dict(current)
    kept = math.fsum(current[arm] for arm in opened)
    if any(current[arm] > 0 for arm in current if arm not in opened):
        even = {arm: current[arm] / kept if kept > 0 else 1.0 / len(opened) for arm in opened}
        weights = dict.fromkeys(current, 0.0) | rounded(even, constraints.grid)
    return Allocation(weights, _of_all(wish.best, current), "fixed", moved(weights, current))


def _contextual(
    rows: Sequence[Evidence],
    current: Mapping[str, float],
    opened: Sequence[str],
    constraints: Constraints,
    *,
    direction: Direction,
    priors: Mapping[str, Prior],
    lacks: Sequence[str],
    current_by_context: Mapping[str, Mapping[str, float]],
) -> Allocation:
    names = sorted({row.context for row in rows} | set(current_by_context))
    found = _pooled(rows, opened, names, priors)
    whole = found if isinstance(found, Undetermined) else found.whole
    even = constraints.burn_in.even
    wish = _wish(Policy.CONTEXTUAL, whole, opened, direction, lacks=lacks, even=even)
    update = _update(wish, current, opened, constraints)
    by_context = {}
    for name in names:
        posterior = found if isinstance(found, Undetermined) else found.by_context[name]
        held = current_by_context.get(name, current)
        inside = _wish(Policy.CONTEXTUAL, posterior, opened, direction, lacks=lacks, even=even)
        weights = _update(inside, held, opened, constraints).weights
        by_context[name] = ContextAllocation(weights, _of_all(inside.best, current), moved(weights, held))
    return Allocation(
        update.weights,
        _of_all(wish.best, current),
        "; ".join((wish.reason, *_context_notes(by_context, moving=not lacks))),
        _average_moved(rows, by_context, moved(update.weights, current)),
        by_context,
    )


def _context_notes(by_context: Mapping[str, ContextAllocation], *, moving: bool) -> list[str]:
    """Where weights move; a few names, because there may be hundreds."""
    names = [name or "(none)" for name, held in by_context.items() if held.moved > 0]
    if not names:
        return ["the change is too small to publish in every context"] if by_context and moving else []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"weights move in {', '.join(names[:_NAMED])}{more}"]


_NAMED = 5


def _pooled(
    rows: Sequence[Evidence], opened: Sequence[str], names: Sequence[str], priors: Mapping[str, Prior]
) -> contexts.Pooled | Undetermined:
    if not rows:
        return Undetermined(NO_EVIDENCE)
    sums: dict[str, dict[str, Sums]] = {}
    for name in names:
        table = strata.tabled(row for row in rows if row.context == name)
        adjusted = strata.adjusted(table, opened, nothing=_nothing(rows))
        if isinstance(adjusted, Undetermined):
            return adjusted
        sums[name] = adjusted
    return contexts.pooled(sums, opened, priors)


def _average_moved(
    rows: Sequence[Evidence], by_context: Mapping[str, ContextAllocation], otherwise: float
) -> float:
    units = {name: math.fsum(row.sums.units for row in rows if row.context == name) for name in by_context}
    everyone = math.fsum(units.values())
    if everyone <= 0:
        return otherwise
    return math.fsum(units[name] / everyone * held.moved for name, held in by_context.items())
