"""A plan in words and letters: titles, numbers, and the small chart of the table."""

from __future__ import annotations

import math
from collections.abc import Iterator

from stream_xp.services.plan.report import Effect, PlannedTest

_BARS = " ▁▂▃▄▅▆▇█"


def title(test: PlannedTest) -> str:
    """Metric, quantile, test and true effect."""
    quantile = "" if test.quantile is None else f" at {test.quantile:g}"
    return f"{test.metric}{quantile}, {aim(test)}"


def aim(test: PlannedTest) -> str:
    """What the test is to show, under which truth."""
    if test.test == "safety":
        return f"safety: harm < {size(test.null, signed=False)}"
    return f"{test.test} {size(test.effect)}"


def size(effect: Effect, *, signed: bool = True) -> str:
    """An effect in metric units and as a share of the control's mean."""
    absolute = f"{effect.absolute:+.3g}" if signed else f"{abs(effect.absolute):.3g}"
    if effect.relative is None:
        return absolute
    share = 100 * effect.relative
    return f"{absolute} ({share:+.3g} %)" if signed else f"{absolute} ({abs(share):.3g} %)"


def count(units: float | None) -> str:
    """Units, in three digits or whole below a million."""
    if units is None:
        return "-"
    return f"{math.ceil(units - 1e-6):,}" if units < 1e9 else f"{units:.3g}"


def chart(test: PlannedTest) -> Iterator[str]:
    """Power over units as two rows of bars, under them the units, with the planned sample marked."""
    curve = test.curve
    if len(curve.units) < 2:
        return
    low, high = math.log(curve.units[0]), math.log(curve.units[-1])
    planned = round((math.log(test.planned_units) - low) / (high - low) * (len(curve.units) - 1))
    yield f"{'sequential':>12}  {''.join(map(_bar, curve.sequential))}"
    yield f"{'fixed':>12}  {''.join(map(_bar, curve.fixed))}"
    if 0 <= planned < len(curve.units):
        yield f"{'':>12}  {' ' * planned}^ planned sample, {count(test.planned_units)}"
    ends = count(curve.units[0]), count(curve.units[-1])
    yield f"{'units':>12}  {ends[0]}{ends[1]:>{len(curve.units) - len(ends[0])}}"


def _bar(power: float) -> str:
    return _BARS[min(len(_BARS) - 1, math.floor(power * (len(_BARS) - 1) + 0.5))]
