"""Chooses cases, measures them, writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stream_xp import __version__
from stream_xp.errors import ConfigError
from stream_xp.services.calibrate.case import Case, Measurement
from stream_xp.services.calibrate.plots import write_plots
from stream_xp.services.calibrate.report import Run, page
from stream_xp.services.calibrate.table import CASES

FULL_PATHS = 2_000
QUICK_PATHS = 200
QUICK_UNITS = 2_000
IMAGES = "images"


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement in plain values, for JSON."""

    row: str
    method: str
    data: str
    share: str
    nominal: float
    must_fail: bool
    measured: float
    error: float
    status: str
    looks: str
    n: int
    paths: int


def choose(*, quick: bool = False, only: Sequence[str] = ()) -> list[Case]:
    """Return the cases of a run.

    Args:
        quick: a few cases of each method only.
        only: rows ("a2") or parts of a method's name; empty for all.

    Raises:
        ConfigError: an entry of `only` names no method.

    """
    for text in only:
        if not any(_named(case, text) for case in CASES):
            rows = ", ".join(dict.fromkeys(case.row for case in CASES))
            raise ConfigError(f"no method is called {text!r}; give a part of a name, or a row: {rows}")
    kept = (case for case in CASES if not only or any(_named(case, text) for text in only))
    return [case for case in kept if case.quick or not quick]


def write_page(measured: Sequence[Measurement], output: Path, *, seed: int, paths: int) -> list[Path]:
    """Write the page and, beside it, the pictures; return the paths of the files.

    Raises:
        ConfigError: matplotlib is not installed.

    """
    files = write_plots(measured, output.parent / IMAGES, seed=seed)
    run = Run(seed=seed, paths=paths, version=__version__, numpy_version=np.__version__)
    output.write_text(page(measured, run, images=IMAGES), encoding="utf-8")
    return [output, *files]


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Return the measurements as plain values."""
    return [_row(m) for m in measured]


def _named(case: Case, text: str) -> bool:
    return case.row == text or text.lower() in case.method.lower()


def _row(m: Measurement) -> Row:
    case = m.case
    return Row(
        row=case.row,
        method=case.method,
        data=case.data,
        share=case.share,
        nominal=case.nominal,
        must_fail=case.must_fail,
        measured=m.rate,
        error=m.error,
        status=m.status,
        looks=case.looks,
        n=m.n,
        paths=m.trials,
    )
