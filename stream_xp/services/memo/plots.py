"""The pictures of a memo: each effect with its sequence over the looks, and the weights over time. SVG."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any, Final, TypeAlias

from stream_xp.errors import ConfigError
from stream_xp.services.memo.build import with_plots
from stream_xp.services.memo.record import Memo, MetricMemo

# matplotlib's Axes; the checker need not have the extra.
Axes: TypeAlias = Any

_COLOURS: Final = ("#1f5fa8", "#c8501e", "#3a8a4d", "#777777", "#8a3a87", "#a8861f")
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


def can_plot() -> bool:
    """Whether matplotlib, the extra `plot`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(memo: Memo, folder: Path, stem: str) -> Memo:
    """Write the pictures, and return the memo with their names; the same memo gives the same bytes.

    A metric without an effect, and weights that never changed, have no picture.

    Raises:
        ConfigError: a file cannot be written.
    """
    matplotlib = importlib.import_module("matplotlib")
    plots: dict[tuple[str, str], str] = {}
    with matplotlib.rc_context(_STYLE):
        for at, metric in enumerate(memo.metrics):
            if metric.history:
                name = f"{stem}-{at + 1}-{_plain(metric.metric)}-{_plain(metric.arm)}.svg"
                _write(folder / name, lambda axes, metric=metric: _effect(axes, metric))
                plots[metric.metric, metric.arm] = name
        weights = f"{stem}-weights.svg" if len(memo.epochs) > 1 else None
        if weights is not None:
            _write(folder / weights, lambda axes: _weights(axes, memo))
    return with_plots(memo, plots, weights)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", text)


def _write(file: Path, draw: Any) -> None:
    figures = importlib.import_module("matplotlib.figure")
    svg = importlib.import_module("matplotlib.backends.backend_svg")
    figure = figures.Figure(figsize=(7.0, 2.9), layout="constrained")
    draw(figure.subplots())
    try:
        svg.FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from error


def _effect(axes: Axes, metric: MetricMemo) -> None:
    points = metric.history
    units = [point.units for point in points]
    axes.axhline(0.0, color="#777777", lw=0.8, ls=":")
    nan = float("nan")
    lower = [nan if point.lower is None else point.lower for point in points]
    upper = [nan if point.upper is None else point.upper for point in points]
    axes.fill_between(units, lower, upper, color=_COLOURS[0], alpha=0.2, lw=0, label="confidence sequence")
    axes.plot(units, [point.estimate for point in points], color=_COLOURS[0], lw=1.4, label="estimate")
    axes.plot(units[-1:], [points[-1].estimate], "o", ms=4.0, color=_COLOURS[0])
    shrunk = metric.shrunk
    if shrunk.effect is not None:
        axes.errorbar(
            units[-1:],
            [shrunk.effect],
            yerr=[shrunk.sd],
            fmt="s",
            ms=4.0,
            color=_COLOURS[1],
            label="shrunk (± sd)",
        )
    if len(points) == 1 and None not in (points[0].lower, points[0].upper):
        axes.vlines(units, lower, upper, color=_COLOURS[0], alpha=0.5)
    axes.set_xlabel("units of the control and the arm")
    axes.set_ylabel("effect")
    axes.set_title(f"{metric.metric} in {metric.arm}", loc="left", fontsize=9.0)
    axes.legend(frameon=False, fontsize=8.0)


def _weights(axes: Axes, memo: Memo) -> None:
    began_ms = memo.epochs[0].effective_ms
    hours = [(epoch.effective_ms - began_ms) / 3_600_000 for epoch in memo.epochs]
    end = max(hours[-1] * 1.05, hours[-1] + 1e-6)
    lines = {arm.key: [epoch.weights[arm.key] for epoch in memo.epochs] for arm in memo.spec.arms}
    for at, (arm, weights) in enumerate(lines.items()):
        colour = _COLOURS[at % len(_COLOURS)]
        axes.step([*hours, end], [*weights, weights[-1]], where="post", color=colour, lw=1.4, label=arm)
    coverage = [epoch.coverage for epoch in memo.epochs]
    axes.step(
        [*hours, end],
        [*coverage, coverage[-1]],
        where="post",
        color="#000000",
        lw=0.9,
        ls="--",
        label="coverage",
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("hours since the first weight epoch")
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=8.0)
