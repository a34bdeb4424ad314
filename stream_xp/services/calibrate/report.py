"""The page `docs/calibration.md`, from what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

from stream_xp.services.calibrate.case import FAR_ABOVE, STANDARD_ERRORS, Measurement

FAMILIES = {
    "a": "Means",
    "b": "Conversions",
    "c": "Counts and sample ratio",
    "d": "Bounded outcomes",
    "e": "Quantiles and whole distributions",
    "f": "Ratios",
    "g": "Group sequential designs",
    "h": "Intersections",
    "i": "Mixture SPRT",
    "j": "Bayes",
    "k": "Many metrics",
    "l": "Adaptive weights",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What the numbers depend on.

    Attributes:
        seed: of all random numbers.
        paths: per case.
        version: of stream_xp.
        numpy_version: of numpy, whose generator drew the numbers.

    """

    seed: int
    paths: int
    version: str
    numpy_version: str


def page(measured: Sequence[Measurement], run: Run, *, images: str | None = None) -> str:
    """Return the whole page in Markdown; `images` is the folder of the plots, or None for no plots."""
    held = [m for m in measured if not m.case.must_fail]
    failing = [m for m in measured if m.case.must_fail]
    shortcuts = [m for m in failing if not m.case.known_limit]
    limits = [m for m in failing if m.case.known_limit]
    text = files(__package__).joinpath("page.md").read_text(encoding="utf-8")
    filled = text.format(
        run=run,
        standard_errors=STANDARD_ERRORS,
        far=FAR_ABOVE,
        result=_result(held, failing),
        rates=_picture(images, "calibration-rates.svg", "Measured rates of every method against nominal"),
        methods=_families(held, run),
        narrowing=_picture(images, "calibration-narrowing.svg", "A confidence sequence narrows on one path"),
        picture_of_shortcuts=_picture(
            images, "calibration-must-fail.svg", "Measured rates of the checks that must fail"
        ),
        failing=_table(shortcuts, run),
        reasons=_reasons(shortcuts),
        limits=_table(limits, run),
        limit_reasons=_reasons(limits),
    )
    return re.sub(r"\n{3,}", "\n\n", filled)


def complaints(measured: Sequence[Measurement]) -> list[str]:
    """Return one sentence for each case that is not as it must be."""
    return [_complaint(m) for m in measured if not m.as_it_must_be]


def line(m: Measurement) -> str:
    """Return one line about a case, for a terminal."""
    return f"{m.status:17} {m.rate:.4f} ± {m.error:.4f} (nominal {m.case.nominal:g})  {m.case.name}"


def _complaint(m: Measurement) -> str:
    numbers = f"measured {m.rate:.4f} on {m.trials} paths, nominal {m.case.nominal:g}"
    if m.status == "above":
        return f"above nominal by more than {STANDARD_ERRORS:g} standard errors: {m.case.name}: {numbers}"
    if m.status == "did not fail":
        return f"must fail and does not: {m.case.name}: {numbers}"
    return f"no path counted: {m.case.name}"


def _result(held: Sequence[Measurement], failing: Sequence[Measurement]) -> str:
    good = sum(m.as_it_must_be for m in held)
    bad = sum(m.as_it_must_be for m in failing)
    highest = max(held, key=lambda m: m.rate / m.case.nominal, default=None)
    text = (
        f"**{good} of {len(held)} rows hold their rate; {bad} of {len(failing)} checks that must fail do.**"
    )
    if highest is not None:
        text += (
            f"\nClosest to its promise, or beyond it: {highest.case.method} on {highest.case.data}, share "
            f"{highest.case.share}, {highest.rate:.4f} at nominal {highest.case.nominal:g}."
        )
    return text


def _picture(images: str | None, name: str, text: str) -> str:
    return f"![{text}]({images}/{name})" if images else ""


def _families(measured: Sequence[Measurement], run: Run) -> str:
    in_order = sorted(measured, key=lambda m: m.case.row[0])
    groups = groupby(in_order, key=lambda m: m.case.row[0])
    return "\n".join(f"### {FAMILIES[letter]}\n\n{_table(list(group), run)}" for letter, group in groups)


def _table(measured: Sequence[Measurement], run: Run) -> str:
    header = ("row", "method", "data", "share", "nominal", "measured", "error", "looks", "n", "paths")
    rows = [(*header, "seed", "version"), ("---",) * (len(header) + 2)]
    rows += [(*_cells(m), str(run.seed), run.version) for m in measured]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(m: Measurement) -> tuple[str, ...]:
    mark = "" if m.as_it_must_be else f" **{m.status}**"
    case = m.case
    numbers = (f"{case.nominal:g}", f"{m.rate:.4f}{mark}", f"{m.error:.4f}")
    return (case.row, case.method, case.data, case.share, *numbers, case.looks, f"{m.n:,}", f"{m.trials:,}")


def _reasons(failing: Sequence[Measurement]) -> str:
    reasons = dict.fromkeys((m.case.method, m.case.fails_because) for m in failing)
    return "".join(f"- **{method}**: {reason}.\n" for method, reason in reasons)
