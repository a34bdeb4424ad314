"""From what a policy wants to what may be published: floors, closed arms, a cap on change, a uniform slice, a grid.

In this order, which says what outranks what:

1. An arm closed by its guardrail has weight 0, at once. The floor is for the others.
2. Every open arm has at least the floor, and its part of the uniform slice. Where the weights in force have less (a
   closed arm, a raised floor), this is mended at once, whatever the cap says.
3. From there weights move towards the policy's along a straight line, no arm by more than the cap. Both ends of the
   line hold the floors, so every point of it does.
4. The result is rounded to a grid by largest remainders, with floors and cap taken in whole steps of the grid before,
   so that neither is broken by rounding.

Floors are held by the projection in relative entropy, w_a = max(f_a, c p_a): arms above the floor keep their ratios.

Source: Csiszar (1975), Annals of Probability 3(1), 146-158 (the projection in relative entropy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

Weights = dict[str, float]

SUM_TOLERANCE = 1e-9
_MIN_GRID, _MAX_SLICE = 1_000, 0.9
# A step of the grid that is only missed by rounding counts as reached.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnIn:
    """How much each open arm must have seen before weights follow the policy.

    Attributes:
        units: mature units, >= 0.
        conversions: of conversion metrics, >= 0.
        even: whether weights move to equality until then; otherwise those in force stay.
    """

    units: float = 100
    conversions: float = 40
    even: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.units < math.inf and 0 <= self.conversions < math.inf):
            raise ValueError("burn_in: units and conversions must be finite and not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What every published distribution keeps.

    Attributes:
        floor: least weight of an open arm, in [0, 1).
        maximum_change: most that a weight moves in one update, in (0, 1].
        minimum_change: an update in which no weight would move more than this is left out, in [0, 1).
        burn_in: equal weights, or those in force, until then.
        uniform_slice: share of units that is split evenly whatever the policy says, in [0, 0.9].
        grid: weights are multiples of 1 / grid; at least 1,000.
    """

    floor: float = 0.01
    maximum_change: float = 0.2
    minimum_change: float = 0.0
    burn_in: BurnIn = field(default_factory=BurnIn)
    uniform_slice: float = 0.0
    grid: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must lie in [0, 1), got {self.floor}")
        if self.grid < _MIN_GRID:
            raise ValueError(f"grid must be at least {_MIN_GRID}, got {self.grid}")
        if not 1 / self.grid <= self.maximum_change <= 1:
            raise ValueError(f"maximum_change must lie in [1 / grid, 1], got {self.maximum_change}")
        if not 0 <= self.minimum_change < 1:
            raise ValueError(f"minimum_change must lie in [0, 1), got {self.minimum_change}")
        if not 0 <= self.uniform_slice <= _MAX_SLICE:
            raise ValueError(f"uniform_slice must lie in [0, {_MAX_SLICE}], got {self.uniform_slice}")

    def floor_steps(self, arms: int) -> int:
        """Least steps of the grid of each of so many open arms: the floor, or its part of the slice if that is more.

        Raises:
            ValueError: so many floors are more than 1.
        """
        steps = math.ceil(max(self.floor, self.uniform_slice / arms) * self.grid - _ROUNDING)
        if steps * arms > self.grid:
            raise ValueError(f"floor {self.floor} of {arms} arms on a grid of {self.grid} is more than 1")
        return steps


def default_floor(arms: int, *, interval: bool) -> float:
    """The floor where a spec names none: 5 % where an interval is promised, else 1 %, and at least 1 / (10 arms)."""
    return max(0.05 if interval else 0.01, 0.1 / arms)


@dataclass(frozen=True, slots=True)
class Update:
    """Weights that may be published.

    Attributes:
        weights: of every arm, multiples of 1 / grid that sum to 1.
        notes: which constraints changed what the policy wanted.
    """

    weights: Weights
    notes: tuple[str, ...] = ()


def constrained(
    target: Mapping[str, float],
    current: Mapping[str, float],
    *,
    constraints: Constraints,
    closed: AbstractSet[str] = frozenset(),
) -> Update:
    """The weights nearest to the policy's that the constraints let through.

    Args:
        target: what the policy wants of the open arms; any numbers >= 0 that are not all 0.
        current: the weights in force, of every arm; a distribution.
        constraints: what holds.
        closed: arms that get nothing.

    Raises:
        ValueError: no arm is open, the floors are more than 1, or an argument is no distribution.
    """
    check_distribution("current", current)
    opened = [arm for arm in sorted(current) if arm not in closed]
    if not opened:
        raise ValueError("every arm is closed; the control never is")
    least = constraints.floor_steps(len(opened)) / constraints.grid
    wanted = _with_slice({arm: target[arm] for arm in opened}, least, constraints.uniform_slice)
    start = projected({arm: current[arm] for arm in opened}, dict.fromkeys(opened, least))
    mended = change(start, current) > SUM_TOLERANCE
    cap = math.floor(constraints.maximum_change * constraints.grid + _ROUNDING) / constraints.grid
    distance = change(wanted, start)
    notes = ("arms without their floor or closed are mended at once",) if mended else ()
    if not mended and distance <= constraints.minimum_change:
        return Update(dict(current), ("the change is too small to publish",) if distance else ())
    if distance > cap + SUM_TOLERANCE:
        notes = (*notes, f"moved by {cap:g} of {distance:.4g} at most")
    part = min(1.0, cap / distance) if distance > 0 else 0.0
    reached = {arm: start[arm] + part * (wanted[arm] - start[arm]) for arm in opened}
    return Update(dict.fromkeys(current, 0.0) | rounded(reached, constraints.grid), notes)


def _with_slice(target: Weights, least: float, uniform_slice: float) -> Weights:
    even = uniform_slice / len(target)
    # What the slice gives counts towards the floor; the policy's part owes only the rest.
    rest = max(0.0, (least - even) / (1.0 - uniform_slice))
    policy = projected(target, dict.fromkeys(target, rest))
    return {arm: even + (1.0 - uniform_slice) * share for arm, share in policy.items()}


def projected(shares: Mapping[str, float], floors: Mapping[str, float]) -> Weights:
    """The distribution at or above the floors that is nearest in relative entropy: max(floor, c * share).

    Exact: c solves sum = 1. The order of the arms has no say (sums are rounded once), arms above their floor keep
    their ratios, and more share never gives less weight.

    Args:
        shares: per arm, >= 0; equal shares stand in where all are 0.
        floors: per arm, >= 0, at most 1 together.

    Raises:
        ValueError: a share is negative or not finite, or the floors are more than 1.
    """
    if any(not 0 <= share < math.inf for share in shares.values()):
        raise ValueError("shares must be finite and not negative")
    if math.fsum(floors.values()) > 1 + SUM_TOLERANCE:
        raise ValueError("the floors are more than 1 together")
    largest = max(shares.values())
    # Relative to the largest, so that no sum of them overflows or vanishes.
    relative = {arm: share / largest if largest > 0 else 1.0 for arm, share in shares.items()}
    held: set[str] = set()
    while True:
        free = math.fsum(share for arm, share in relative.items() if arm not in held)
        mass = 1.0 - math.fsum(floors[arm] for arm in held)
        scale = mass / free if free > 0 else 0.0
        below = {arm for arm, share in relative.items() if scale * share < floors[arm]} - held
        if not below or len(below) + len(held) == len(relative):
            return {
                arm: floors[arm] if arm in held else max(floors[arm], scale * share)
                for arm, share in relative.items()
            }
        held |= below


def rounded(weights: Mapping[str, float], grid: int) -> Weights:
    """Weights in multiples of 1 / grid that sum to 1: largest remainders first, ties by name.

    Each is moved by less than one step, and one that is a multiple already stays.
    """
    steps = {arm: math.floor(weight * grid + _ROUNDING) for arm, weight in weights.items()}
    left = grid - sum(steps.values())
    order = sorted(weights, key=lambda arm: (round(steps[arm] - weights[arm] * grid, 6), arm))
    for arm in order[:left]:
        steps[arm] += 1
    return {arm: count / grid for arm, count in steps.items()}


def change(new: Mapping[str, float], old: Mapping[str, float]) -> float:
    """The largest change of a weight; an arm that is not in `new` has 0."""
    return max(abs(new.get(arm, 0.0) - weight) for arm, weight in old.items())


def moved(new: Mapping[str, float], old: Mapping[str, float]) -> float:
    """Least share of units that must change arms, half the sum of |w' - w|; in [0, 1]."""
    return 0.5 * math.fsum(abs(new[arm] - old[arm]) for arm in old)


def check_distribution(name: str, weights: Mapping[str, float]) -> None:
    """Raise ValueError unless the weights are finite, not negative and sum to 1 within 1e-9."""
    if not weights or any(not 0 <= weight <= 1 for weight in weights.values()):
        raise ValueError(f"{name}: weights must lie in [0, 1]")
    if abs(math.fsum(weights.values()) - 1.0) > SUM_TOLERANCE:
        raise ValueError(f"{name}: weights must sum to 1, they sum to {math.fsum(weights.values()):.12g}")


def burning_in(
    units: Mapping[str, float], conversions: Mapping[str, float] | None, limits: BurnIn
) -> Sequence[str]:
    """What open arms still lack, one sentence each; empty when the burn-in is over.

    An arm that would have twice the conversions at the rate of all arms has burnt in too: one that never converts would
    hold equal weights for ever.

    Args:
        units: of each open arm.
        conversions: of each open arm; None where the metric is none of conversions.
        limits: what each must have.
    """
    lacks = [f"{arm} has {n:.0f} of {limits.units:g} units" for arm, n in units.items() if n < limits.units]
    if conversions is None or lacks:
        return lacks
    everyone = math.fsum(units.values())
    rate = math.fsum(conversions.values()) / everyone if everyone > 0 else 0.0
    return [
        f"{arm} has {count:.0f} of {limits.conversions:g} conversions"
        for arm, count in conversions.items()
        if count < limits.conversions and units[arm] * rate < 2 * limits.conversions
    ]
