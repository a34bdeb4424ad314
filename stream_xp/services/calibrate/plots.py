"""The pictures of `docs/calibration.md`, as SVG. matplotlib is an extra and imported only here."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from stream_xp.errors import ConfigError
from stream_xp.services.calibrate.case import ALPHA, PLANNED, UNITS, Measurement
from stream_xp.stats import Moments, Stratum, Undetermined, mean_difference, summarise, tuned_rho2

# matplotlib's Axes; the checker need not have the extra.
Axes: TypeAlias = Any

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8501e", "#777777"
_SCALE = 1e-6
_EFFECT = 0.25
# The fixed interval that a t test gives for one look.
_FIXED = 1.96
_RATE_LABEL = "share of paths that ever err, ± 1 standard error; grey: nominal"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stream-xp",  # same picture, same bytes
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_matplotlib() -> None:
    """Refuse unless matplotlib is installed.

    Raises:
        ConfigError: it is not.

    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib, the extra `plot`: pip install 'stream-xp[plot]'")


def write_plots(measured: Sequence[Measurement], folder: Path, *, seed: int) -> list[Path]:
    """Write all pictures into a folder and return their paths.

    Raises:
        ConfigError: matplotlib is not installed.

    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"calibration-{name}.svg" for name in ("rates", "must-fail", "narrowing")]
    _draw_rates([m for m in measured if not m.case.must_fail], files[0])
    _draw_must_fail([m for m in measured if m.case.must_fail and not m.case.known_limit], files[1])
    _draw_narrowing(files[2], seed=seed)
    return files


@contextmanager
def _axes(file: Path, *, width: float, height: float) -> Iterator[Axes]:
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    svg = importlib.import_module("matplotlib.backends.backend_svg")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot()
        svg.FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


def _draw_rates(measured: Sequence[Measurement], file: Path) -> None:
    methods = list(dict.fromkeys((m.case.row, m.case.method) for m in measured))
    with _axes(file, width=9.0, height=1.0 + 0.3 * len(methods)) as axes:
        for place, method in enumerate(methods):
            cases = [m for m in measured if (m.case.row, m.case.method) == method]
            spread = np.linspace(-0.3, 0.3, len(cases)) if len(cases) > 1 else np.zeros(1)
            for m, off in zip(cases, spread, strict=True):
                _point(axes, m, place + float(off), _BLUE)
                axes.plot([m.case.nominal] * 2, [place - 0.5, place + 0.5], color=_GREY, lw=0.8)
        _label_rows(axes, [f"{row}  {name}" for row, name in methods])
        axes.set_xlim(left=-0.001)
        axes.set_xlabel(_RATE_LABEL)


def _draw_must_fail(measured: Sequence[Measurement], file: Path) -> None:
    with _axes(file, width=9.0, height=1.0 + 0.3 * max(len(measured), 1)) as axes:
        for place, m in enumerate(measured):
            _point(axes, m, float(place), _ORANGE)
            axes.plot([m.case.nominal] * 2, [place - 0.5, place + 0.5], color=_GREY, lw=0.8)
        _label_rows(axes, [m.case.method for m in measured])
        axes.set_xlim(0.0, 1.02)
        axes.set_xlabel(_RATE_LABEL)


def _point(axes: Axes, m: Measurement, place: float, colour: str) -> None:
    axes.errorbar(m.rate, place, xerr=m.error, fmt="o", ms=3.0, lw=1.0, color=colour)


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", lw=0.3)


def _draw_narrowing(file: Path, *, seed: int) -> None:
    at, estimate, half, fixed = _one_path(seed)
    with _axes(file, width=9.0, height=4.0) as axes:
        axes.fill_between(at, estimate - half, estimate + half, color=_BLUE, alpha=0.2, lw=0)
        axes.plot(at, estimate, color=_BLUE, lw=1.2, label="estimate and its 95 % confidence sequence")
        for sign in (-1, 1):
            label = "interval of a t test: valid at one look only" if sign > 0 else None
            axes.plot(at, estimate + sign * fixed, color=_ORANGE, lw=0.8, ls="--", label=label)
        axes.axhline(_EFFECT, color=_GREY, lw=0.8, label="truth")
        axes.axhline(0.0, color="black", lw=0.6)
        axes.set_xscale("log")
        axes.set_ylim(-1.5, 2.0)
        axes.set_xlabel("units of both arms (exponential outcomes, half in treatment)")
        axes.set_ylabel("difference of means")
        axes.legend(frameon=False, loc="upper right")


def _one_path(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # Units seen; estimate, half width of the sequence and of the fixed interval at each.
    rng = np.random.default_rng(seed)
    treated = rng.random(UNITS) < 0.5
    y = rng.standard_exponential(UNITS) + _EFFECT * treated
    ticks = np.rint(y / _SCALE).astype(np.int64)
    rho2, rows = tuned_rho2(PLANNED, ALPHA), []
    for at in np.unique(np.geomspace(50, UNITS, 300).astype(int)):
        arms = [Moments.from_values(ticks[:at][treated[:at] == arm].tolist()) for arm in (False, True)]
        means = summarise([Stratum(*arms)], scale=_SCALE)
        if isinstance(means, Undetermined):
            continue
        evidence = mean_difference(means, alpha=ALPHA, rho2=rho2)
        fixed = _FIXED * math.sqrt(means.control_variance + means.treatment_variance)
        rows.append((at, evidence.estimate, evidence.upper - evidence.estimate, fixed))
    at, estimate, half, fixed = np.array(rows).T
    return at, estimate, half, fixed
