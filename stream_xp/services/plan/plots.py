"""The picture of a plan: power and half width over units, as SVG or PNG. matplotlib is an extra."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from stream_xp.errors import ConfigError
from stream_xp.services.plan.report import ExperimentPlan, PlannedTest
from stream_xp.services.plan.words import title

# matplotlib's Axes; the checker need not have the extra.
Axes: TypeAlias = Any

KINDS: Final = (".svg", ".png")
MAX_TESTS: Final = 24
_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#c8501e", "#3a8a4d", "#777777"
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stream-xp",  # same picture, same bytes
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.usetex": False,
    "text.parse_math": False,  # a name may hold a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_plot(file: Path) -> None:
    """Refuse unless the file's kind is known and matplotlib is installed.

    Raises:
        ConfigError: one of them is not so.
    """
    if file.suffix.lower() not in KINDS:
        raise ConfigError(f"{file}: a plot is {' or '.join(KINDS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib, the extra `plot`: pip install 'stream-xp[plot]'")


def write_plot(plan: ExperimentPlan, file: Path) -> None:
    """Write a row of two pictures for each test; the same plan gives the same bytes.

    Raises:
        ConfigError: nothing is planned or too much for one picture, matplotlib is not installed, or the file
            cannot be written.
    """
    require_plot(file)
    if not 0 < len(plan.tests) <= MAX_TESTS:
        raise ConfigError(f"a plot has 1 to {MAX_TESTS} tests, the plan has {len(plan.tests)}")
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(9.0, 2.9 * len(plan.tests)), layout="constrained")
        rows = figure.subplots(len(plan.tests), 2, squeeze=False)
        _draw(plan.tests, rows)
        _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    try:
        if file.suffix.lower() == ".svg":
            svg = importlib.import_module("matplotlib.backends.backend_svg")
            svg.FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
        else:
            agg = importlib.import_module("matplotlib.backends.backend_agg")
            agg.FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from error


def _draw(tests: Sequence[PlannedTest], rows: Any) -> None:
    for at, (test, (left, right)) in enumerate(zip(tests, rows, strict=True)):
        _power(left, test, legend=at == 0)
        _width(right, test, legend=at == 0)
        for axes in (left, right):
            axes.axvline(test.planned_units, color=_GREY, lw=0.8, ls=":")
            _log_scale(axes, "x")
            axes.set_xlabel("units of all arms (dotted: planned sample)")
        left.set_title(title(test), loc="left", fontsize=9.0)


def _log_scale(axes: Axes, which: str) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0), numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _power(axes: Axes, test: PlannedTest, *, legend: bool) -> None:
    curve = test.curve
    axes.plot(curve.units, curve.sequential, color=_BLUE, lw=1.6, label="sequential")
    axes.plot(curve.units, curve.group_sequential, color=_GREEN, lw=1.0, label="group sequential (5 looks)")
    axes.plot(curve.units, curve.fixed, color=_ORANGE, lw=1.0, ls="--", label="fixed (one look)")
    axes.plot([test.planned_units], [test.power.sequential], "o", ms=4.0, color=_BLUE)
    axes.set_ylim(0.0, 1.02)
    axes.set_ylabel("power")
    if legend:
        axes.legend(frameon=False, loc="upper left", fontsize=8.0)


def _width(axes: Axes, test: PlannedTest, *, legend: bool) -> None:
    curve = test.curve
    axes.plot(curve.units, curve.half_width, color=_BLUE, lw=1.6, label="confidence sequence")
    axes.plot(
        curve.units, curve.half_width_fixed, color=_ORANGE, lw=1.0, ls="--", label="interval (one look)"
    )
    if test.half_width is not None:
        axes.plot([test.planned_units], [test.half_width], "o", ms=4.0, color=_BLUE)
    _log_scale(axes, "y")
    axes.set_ylabel("half width")
    if legend:
        axes.legend(frameon=False, loc="upper right", fontsize=8.0)
