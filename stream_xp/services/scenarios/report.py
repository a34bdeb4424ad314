"""The page `docs/scenarios.md`, from the file of results beside it; and the same for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from stream_xp.services.scenarios.measures import STANDARD_ERRORS, Measure, Summary


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What the page is made of: all that a run has measured.

    Attributes:
        runs: of each scenario.
        seed: of every number.
        version: of stream_xp.
        numpy_version: of numpy, whose generator drew the numbers.
    """

    runs: int
    seed: int
    version: str
    numpy_version: str
    scenarios: tuple[Summary, ...]


WORDS = {
    "stopped": "runs that were stopped",
    "false_stops": "runs stopped although nothing harmed yet",
    "shipped": "runs that shipped",
    "shipped_best": "runs that shipped the arm that is best over all contexts",
    "sample_ratio_counted": "runs whose sample ratio was ever off among all units counted so far",
    "futile": "runs that were stopped for futility",
    "false_claims": "runs that ever called an effect proven that the units counted do not have",
    "false_safe": "runs that ever called a guardrail safe that was harmed by its margin or more",
    "reached_last_stage": "runs that came to the last stage",
    "ended_h_p50": "hours to the conclusion, median",
    "ended_h_p95": "hours to the conclusion, 95 %",
    "delay_h_p50": "hours from the begin of the harm to its end, median",
    "delay_h_p95": "hours from the begin of the harm to its end, 95 %",
    "units_harmed_p50": "units harmed, median",
    "units_harmed_p95": "units harmed, 95 %",
    "rejected": "runs that rejected",
    "regret": "regret: what units lost against the best arm, mean",
    "regret_share": "regret as a share of that of a uniform split",
    "on_best": "share of the units on the best arm of their context",
    "on_best_at_end": "share of the traffic on the best arm of its context at the end",
    "best_at_end": "runs in which the best arm has the most weight at the end, in every context",
}
"""What a measure is; of a comparison, what follows its dot."""

_COMPARED = {
    "fixed_sample": "one z-test at the planned sample",
    "fixed_known": "one z-test at the sample for just this effect",
    "peeked": "z-test at every look",
    "pooled": "pooled z-test at the horizon",
    "immature": "z-test at every look of units whose windows are open",
    "uniform": "uniform split",
    "context_free": "thompson without contexts",
}


def page(results: Results) -> str:
    """Return the whole page in Markdown."""
    text = files(__package__).joinpath("page.md").read_text(encoding="utf-8")
    claims = [claim for one in results.scenarios for claim in one.claims]
    return text.format(
        run=results,
        errors=STANDARD_ERRORS,
        scenarios="\n".join(_section(one) for one in results.scenarios),
        claims=_claims(results.scenarios),
        result=f"**{sum(claim.holds for claim in claims)} of {len(claims)} claims hold.**",
    )


def results_path(output: Path) -> Path:
    """The file of results beside a page."""
    return output.with_suffix(".json")


def write_page(results: Results, output: Path) -> list[Path]:
    """Write the results, and the page that follows from them alone; return the paths."""
    raw = msgspec.json.format(msgspec.json.encode(results), indent=2)
    beside = results_path(output)
    beside.write_bytes(raw + b"\n")
    output.write_text(page(read_results(beside)), encoding="utf-8")
    return [beside, output]


def read_results(path: Path) -> Results:
    """Results that `write_page` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def complaints(summaries: Sequence[Summary]) -> list[str]:
    """One sentence for each claim that does not hold."""
    return [
        f"{one.scenario}: {claim.measure} is {_value(_of(one, claim.measure))}, claimed {claim.words}"
        for one in summaries
        for claim in one.claims
        if not claim.holds
    ]


def lines(one: Summary) -> list[str]:
    """A scenario for a terminal: a line for each measure."""
    verdicts = {claim.measure: f"  {claim.words}: {_verdict(holds=claim.holds)}" for claim in one.claims}
    width = max(len(measure.name) for measure in one.measures)
    return [
        f"{one.scenario}: {one.title}",
        *(f"  {m.name:{width}}  {_value(m)}{verdicts.get(m.name, '')}" for m in one.measures),
    ]


def _of(one: Summary, name: str) -> Measure:
    return next(measure for measure in one.measures if measure.name == name)


def _verdict(*, holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _claims(summaries: Sequence[Summary]) -> str:
    rows = [
        (
            one.scenario,
            said(claim.measure),
            _value(_of(one, claim.measure)),
            _words(one, claim.words),
            _verdict(holds=claim.holds),
        )
        for one in summaries
        for claim in one.claims
    ]
    return _table(("scenario", "measure", "measured", "claim", ""), rows)


def _words(one: Summary, words: str) -> str:
    """A claim in words; where its bound is another measure, with that one's value."""
    bound = words.removeprefix("at most ").removeprefix("at least ")
    named = [measure for measure in one.measures if measure.name == bound]
    return f"{words.removesuffix(bound)}that of {said(bound)}, {_value(named[0])}" if named else words


def _section(one: Summary) -> str:
    rows = [(said(measure.name), _value(measure) + _of_runs(one, measure)) for measure in one.measures]
    about = f"{one.title} {one.runs:,} runs, {one.looks:,} looks each at most."
    return f"### {one.scenario}\n\n{about}\n\n{_table(('measure', 'measured'), rows)}"


def said(name: str) -> str:
    """A measure in words."""
    compared, dot, rest = name.partition(".")
    return f"{_COMPARED[compared]}: {WORDS[rest]}" if dot else WORDS[name]


def _of_runs(one: Summary, measure: Measure) -> str:
    return "" if measure.runs == one.runs else f", of {measure.runs:,} runs"


def _value(measure: Measure) -> str:
    if measure.runs == 0:
        return "no run"
    if measure.value is None:
        return "beyond the horizon"
    # Units of thousands are read as such, and not as powers of ten.
    large = abs(measure.value) >= 1000
    shown = f"{measure.value:,.0f}" if large else f"{measure.value:.4g}"
    if measure.error is None:
        return shown
    return f"{shown} ± {measure.error:,.0f}" if large else f"{shown} ± {measure.error:.2g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    listed = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in listed)
