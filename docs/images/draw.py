"""The pictures of `docs/statistics.md`, as SVG: `python docs/images/draw.py [FOLDER]`, by default into this folder.

Every number in them comes from `stream_xp.stats`. The same matplotlib gives the same bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from stream_xp.stats import (
    ArmMeans,
    Moments,
    Stratum,
    early_one_sided,
    mean_difference,
    one_sided_rho2,
    one_sided_test,
    radius_multiplier_two_sided,
    success_ratio,
    summarise,
    tuned_rho2,
)
from stream_xp.stats.group_sequential import group_sequential, stopping
from stream_xp.stats.planning import plan_difference

Axes: TypeAlias = Any
Floats: TypeAlias = np.ndarray

ALPHA = 0.05
BLUE, ORANGE, GREEN, GREY, BLACK = "#1f5fa8", "#c8501e", "#2e7d4f", "#777777", "#222222"
STYLE = {
    "svg.fonttype": "path",  # looks the same wherever it is shown
    "svg.hashsalt": "statistics",  # same picture, same bytes
    "path.simplify_threshold": 0.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.3,
    "legend.frameon": False,
}
# One experiment each. The seeds are chosen to show what the text is about, not what happens most often.
PATH_SEED, GUARD_SEED, EARLY_SEED = 91, 3, 7


@contextmanager
def axes(file: Path, *, height: float = 3.4) -> Iterator[Axes]:
    """Yield the axes of one picture, and write it afterwards."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        yield figure.add_subplot()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


# ---- one path ----------------------------------------------------------------------------------------


def means_at(at: int, values: Floats, treated: Floats, *, guard: bool = True) -> ArmMeans | None:
    """Means after the first `at` units of a path of whole-number values; None while undetermined."""
    drawn = [values[:at][treated[:at] == arm] for arm in (False, True)]
    arms = [Moments(len(y), int(y.sum()), int((y * y).sum())) for y in drawn]
    means = summarise([Stratum(*arms)], scale=1.0, guard=guard)
    return means if isinstance(means, ArmMeans) else None


@cache
def one_path(*, units: int = 20_000, planned: int = 10_000) -> Floats:
    """Looks at one experiment without an effect: units, estimate, half widths of sequence and t interval."""
    rng = np.random.default_rng(PATH_SEED)
    treated, values = rng.random(units) < 0.5, np.rint(100 * rng.standard_exponential(units)).astype(int)
    rho2, rows = tuned_rho2(planned, ALPHA), []
    for at in np.unique(np.geomspace(60, units, 160).astype(int)).tolist():
        means = means_at(at, values, treated)
        if means is not None:
            evidence = mean_difference(means, alpha=ALPHA, rho2=rho2)
            error = math.sqrt(means.control_variance + means.treatment_variance)
            rows.append((at, evidence.estimate, evidence.upper - evidence.estimate, 1.96 * error))
    return np.array(rows).T


def draw_path(file: Path) -> None:
    """A confidence sequence narrows on one path, beside the interval of a t test."""
    at, estimate, half, fixed = one_path()
    with axes(file) as ax:
        ax.fill_between(at, estimate - half, estimate + half, color=BLUE, alpha=0.18, lw=0)
        ax.plot(at, estimate, color=BLUE, lw=1.2, label="estimate and its confidence sequence, 95 %")
        for sign in (-1, 1):
            label = "interval of a t test, 95 % at one look" if sign > 0 else None
            ax.plot(at, estimate + sign * fixed, color=ORANGE, lw=0.9, ls="--", label=label)
        wrong = np.abs(estimate) > fixed
        ax.plot(at[wrong], np.full(wrong.sum(), -38.0), "|", ms=5, color=ORANGE, label="the t test rejects")
        ax.axhline(0.0, color=BLACK, lw=0.8)
        ax.set(xscale="log", ylim=(-42, 60), xlabel="units of both arms", ylabel="difference of means")
        ax.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
        ax.legend(loc="upper right")


# ---- the guard ---------------------------------------------------------------------------------------


@cache
def guarded_path(*, units: int = 6_000, share: float = 0.05, rate: float = 0.02) -> Floats:
    """Looks at one canary without an effect: units, then lower and upper ends without and with the guard."""
    rng = np.random.default_rng(GUARD_SEED)
    treated, values = rng.random(units) < share, (rng.random(units) < rate).astype(int)
    rho2, rows = tuned_rho2(units / 2, ALPHA), []
    for at in np.unique(np.geomspace(400, units, 200).astype(int)).tolist():
        row = [float(at)]
        for guard in (False, True):
            means = means_at(at, values, treated, guard=guard)
            if means is not None:
                evidence = mean_difference(means, alpha=ALPHA, rho2=rho2)
                row += [100 * evidence.lower, 100 * evidence.upper]
        if len(row) == 5:
            rows.append(row)
    return np.array(rows).T


def draw_guard(file: Path) -> None:
    """A canary at 5 % without an effect: the sequence with and without the guard."""
    at, low, high, guarded_low, guarded_high = guarded_path()
    with axes(file) as ax:
        ax.fill_between(at, guarded_low, guarded_high, color=BLUE, alpha=0.18, lw=0, label="with the guard")
        ax.plot(at, low, color=ORANGE, lw=1.1, label="without: the variance of the arm as estimated")
        ax.plot(at, high, color=ORANGE, lw=1.1)
        ax.fill_between(
            at, high, 0.0, where=high < 0, color=ORANGE, alpha=0.45, lw=0, label="leaves out the truth"
        )
        ax.axhline(0.0, color=BLACK, lw=0.8)
        ax.set(xscale="log", ylim=(-12, 12), xlabel="units of both arms, 5 % of them in the canary")
        ax.set_ylabel("difference of rates, points")
        ax.set_xticks([500, 1000, 2000, 5000], ["500", "1,000", "2,000", "5,000"])
        ax.minorticks_off()
        ax.legend(loc="upper right")


# ---- early evidence ----------------------------------------------------------------------------------


@cache
def early_path(
    *,
    units: int = 14_000,
    share: float = 0.05,
    rates: tuple[float, float] = (0.002, 0.02),
    margin: float = 0.2,
) -> tuple[Floats, Floats]:
    """Looks at a harmful canary: units and log e of the exact, asymptotic and averaged test; failures' places."""
    rng = np.random.default_rng(EARLY_SEED)
    treated = rng.random(units) < share
    values = (rng.random(units) < np.where(treated, rates[1], rates[0])).astype(int)
    rho2, rows, weights = one_sided_rho2(20_000, ALPHA), [], np.array([[1 - share, share]])
    for at in range(100, units + 1, 100):
        failed = [int(values[:at][treated[:at] == arm].sum()) for arm in (False, True)]
        counts = np.array([[failed]])
        found = success_ratio(counts, weights, alpha=ALPHA, null=math.log1p(margin), side="above")
        exact = float(np.asarray(found.log_e)[0]) if sum(failed) else 0.0
        means = means_at(at, values, treated)
        excess, error, late = 0.0, 0.0, 0.0
        if means is not None:
            excess = means.treatment_mean - (1 + margin) * means.control_mean
            error = math.sqrt(means.treatment_variance + (1 + margin) ** 2 * means.control_variance)
            test = one_sided_test(
                means, margin=margin, margin_kind="relative", side="above", alpha=ALPHA, rho2=rho2
            )
            late = test.log_e
        both = early_one_sided(excess, error, at * rho2, alpha=ALPHA, above=True, log_e_exact=exact)
        rows.append((at, exact, late, float(both.log_e)))
    return np.array(rows).T, np.flatnonzero(treated & (values > 0))


def draw_early(file: Path) -> None:
    """Evidence of harm at a canary with ten times the failures: exact, asymptotic, averaged."""
    (at, exact, late, both), failures = early_path()
    with axes(file) as ax:
        ax.plot(at, exact, color=GREEN, lw=1.0, label="exact part alone")
        ax.plot(at, late, color=ORANGE, lw=1.0, ls="--", label="asymptotic part alone")
        ax.plot(at, both, color=BLUE, lw=1.6, label="the average, which is used")
        ax.axhline(-math.log(ALPHA), color=BLACK, lw=0.8)
        ax.text(400, -math.log(ALPHA) + 0.1, "rejects at 3.00", va="bottom")
        ax.plot(failures, np.full(len(failures), -2.6), "|", ms=6, color=GREY, label="failures in the canary")
        ax.set(xlim=(0, at[-1]), ylim=(-3, 14), xlabel="units of both arms, 5 % of them in the canary")
        ax.set_ylabel("log_e of harm")
        ax.legend(loc="upper left")


# ---- tuning and cost ---------------------------------------------------------------------------------


def draw_tuning(file: Path) -> None:
    """Width multiplier of the sequence over the sample, in parts of the planned one."""
    share = np.geomspace(0.01, 100, 161)
    with axes(file, height=4.0) as ax:
        for alpha, fixed, colour in ((0.05, 1.96, BLUE), (0.01, 2.576, GREEN), (0.001, 3.291, ORANGE)):
            width = np.asarray(radius_multiplier_two_sided(share * tuned_rho2(1.0, alpha), alpha))
            ax.plot(share, width, color=colour, lw=1.5, label=f"α = {alpha:g}")
            ax.axhline(fixed, color=colour, lw=0.9, ls="--", label=f"t test, {fixed:g}")
            ax.plot(1.0, width[80], "o", ms=4, color=colour)
            ax.annotate(f"{width[80]:.3f}", (1.0, width[80]), (0, 4), textcoords="offset points", ha="center")
        ax.set(xscale="log", ylim=(1.5, 9), xlabel="units of both arms / planned units (N / N*)")
        ax.set_ylabel("half width in standard errors")
        ax.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        ax.legend(loc="upper right", ncols=3)


def draw_cost(file: Path) -> None:
    """When a decision is there, under the effect that was planned for: sequential, group sequential, fixed."""
    plan = plan_difference(1.0, 10_000.0, alpha=ALPHA, power=0.8)
    unit, curve = plan.fixed_n, plan.curve
    looks = group_sequential((0.2, 0.4, 0.6, 0.8, 1.0), alpha=ALPHA)
    drift = math.sqrt(plan.group_sequential_n / plan.variance) * plan.effect
    reached = np.cumsum(stopping(looks.information, looks.z, drift=drift).upper)
    last = plan.n_star / unit
    n = np.array([x / unit for x in curve.n if x < plan.n_star] + [last])
    right = np.array([curve.power(min(x * unit, plan.n_star)) for x in n])
    with axes(file) as ax:
        ax.plot(n, right, color=BLUE, lw=1.6, label="confidence sequence, looked at after every unit")
        ax.plot(last, right[-1], "o", ms=4, color=BLUE)
        grid = plan.group_sequential_n / unit * np.array(looks.information)
        ax.step(
            [0, *grid], [0, *reached], where="post", color=GREEN, lw=1.2, label="group sequential, 5 looks"
        )
        ax.plot([0, 1, 1, last], [0, 0, 0.8, 0.8], color=ORANGE, lw=1.2, ls="--", label="t test, one look")
        ax.set(xlim=(0, 1.7), ylim=(0, 1), xlabel="units / units of a t test of power 80 %")
        ax.set_ylabel("share of experiments that have decided")
        ax.legend(loc="upper left")


PICTURES: dict[str, Callable[[Path], None]] = {
    "statistics-path.svg": draw_path,
    "statistics-guard.svg": draw_guard,
    "statistics-early.svg": draw_early,
    "statistics-tuning.svg": draw_tuning,
    "statistics-cost.svg": draw_cost,
}


def draw(folder: Path) -> list[Path]:
    """Write all pictures into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in PICTURES.items():
        write(folder / name)
    return [folder / name for name in PICTURES]


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
