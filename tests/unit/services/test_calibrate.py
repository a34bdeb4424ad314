"""The harness that measures error rates: seeds, verdicts, the page, the command."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.errors import ConfigError
from stream_xp.services.calibrate import harness, plots, service, table
from stream_xp.services.calibrate.case import Case, Measurement, Outcome
from stream_xp.services.calibrate.data import (
    DRIFTING,
    NORMAL,
    Data,
    OneArm,
    Ramp,
    Share,
    Thompson,
    bernoulli,
    sample,
)
from stream_xp.services.calibrate.report import FAMILIES, Run, complaints, page
from stream_xp.services.calibrate.running import Looks, by_epoch, moment_arrays, totals

DOCS = Path(__file__).parents[3] / "docs"
RUN = Run(seed=1, paths=100, version="0.1.0", numpy_version="2.0")


class Errs:
    """A method that errs on a given share of paths."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, rng, paths, n):
        return Outcome(rng.random(paths) < self.rate)


def only_half_counts(rng, paths, n):
    counted = np.arange(paths) % 2 == 0
    return Outcome(~counted, counted)


def nothing_counts(rng, paths, n):
    return Outcome(np.ones(paths, np.bool_), np.zeros(paths, np.bool_))


def slow(rng, paths, n):
    time.sleep(0.2)
    return Outcome(np.zeros(paths, np.bool_))


def warns(rng, paths, n):
    return Outcome(np.log(np.zeros(paths)) > 0)


def case(rate=0.0, *, simulate=None, method="some method", **more):
    fields = {"row": "a1", "data": "normal", "share": "0.5"} | more
    return Case(method=method, simulate=simulate or Errs(rate), **fields)


def measured(rate, *, trials=1000, **more):
    return Measurement(case(**more), round(rate * trials), trials, 5000)


# ---- harness -----------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_number_of_processes():
    cases = [case(0.3), case(0.1, method="another", multiple=2)]
    alone = harness.measure(cases, paths=120, seed=5)
    together = harness.measure(cases, paths=120, seed=5, jobs=2)
    assert [(m.erred, m.trials) for m in alone] == [(m.erred, m.trials) for m in together]
    assert [m.trials for m in alone] == [120, 240]
    assert harness.measure(cases[1:], paths=120, seed=5)[0].erred == alone[1].erred
    assert harness.measure(cases, paths=120, seed=6)[0].erred != alone[0].erred


def test_each_chunk_and_each_case_has_numbers_of_its_own():
    chunks = [
        harness.Chunk(0, case(method=name), number, 1, 1, seed)
        for name in "ab"
        for number in (0, 1)
        for seed in (0, 1)
    ]
    drawn = {chunk._generator().random() for chunk in chunks}
    assert len(drawn) == len(chunks)


def test_paths_that_do_not_count():
    got = harness.measure([case(simulate=only_half_counts)], paths=100, seed=0)[0]
    assert (got.erred, got.trials, got.status) == (0, 50, "held")
    nothing = harness.measure([case(simulate=nothing_counts)], paths=100, seed=0)[0]
    assert (nothing.rate, nothing.status, nothing.as_it_must_be) == (0.0, "nothing counted", False)
    assert math.isfinite(nothing.error)


def test_short_paths_and_progress():
    seen = []
    harness.measure(
        [case(n=700), case(method="other", n=5000)],
        paths=60,
        seed=0,
        max_units=1000,
        progress=lambda *step: seen.append(step),
    )
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert {total for _, total, _ in seen} == {4}
    assert [m.n for _, _, m in seen if m is not None] == [700, 1000]


def interrupt(done, total, finished):
    raise KeyboardInterrupt


@pytest.mark.timeout(60)  # the whole run would take 200 s
def test_an_interrupted_run_ends():
    with pytest.raises(KeyboardInterrupt):
        harness.measure([case(simulate=slow)], paths=50 * 2000, seed=0, jobs=2, progress=interrupt)


def test_a_warning_is_an_error_that_names_the_case():
    with pytest.raises(RuntimeWarning) as caught:
        harness.measure([case(simulate=warns, method="the loud one")], paths=10, seed=0)
    assert "the loud one" in caught.value.__notes__[0]


def test_names_must_differ():
    with pytest.raises(ValueError, match="names"):
        harness.measure([case(), case()], paths=10, seed=0)


# ---- verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "because", "status"),
    [
        (0.0, "", "held"),
        (0.070, "", "held"),
        (0.072, "", "above"),
        (1.0, "", "above"),
        (0.074, "why", "did not fail"),  # above the limit, but not far above
        (0.076, "why", "failed as it must"),
        (0.0, "why", "did not fail"),
    ],
)
def test_verdict(rate, because, status):
    got = measured(rate, fails_because=because)
    assert got.status == status
    assert got.as_it_must_be == (status in {"held", "failed as it must"})
    assert bool(complaints([got])) != got.as_it_must_be


def test_few_paths_are_no_proof():
    assert measured(0.1, trials=20, fails_because="why").status == "did not fail"
    assert measured(0.15, trials=20).status == "held"


def test_standard_error_is_binomial_and_never_0():
    assert measured(0.05).error == pytest.approx(math.sqrt(0.05 * 0.95 / 1000))
    assert measured(0.0).error == pytest.approx(math.sqrt(0.001 * 0.999 / 1000))
    assert 0 < measured(1.0).error < 0.002


def test_complaints_name_the_numbers():
    text = complaints([measured(0.2), measured(0.01, fails_because="why"), measured(0.0)])
    assert len(text) == 2
    assert re.search(
        r"above nominal by more than 3 .*some method.*0\.2000 on 1000 paths, nominal 0\.05", text[0]
    )
    assert text[1].startswith("must fail and does not")


# ---- data and designs --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_share(share):
    drawn = sample(np.random.default_rng(1), NORMAL, Share(share), paths=20, n=2000)
    assert drawn.arms.treated.mean() == pytest.approx(share, abs=0.01)
    assert drawn.arms.ends == (2000,)
    assert (drawn.arms.weight == share).all()


def test_ramp_has_its_share_in_each_epoch():
    drawn = sample(np.random.default_rng(1), DRIFTING, Ramp(), paths=50, n=1000)
    assert drawn.arms.ends == (333, 666, 1000)
    for start, end, share in ((0, 333, 0.1), (333, 666, 0.3), (666, 1000, 0.5)):
        assert drawn.arms.treated[:, start:end].mean() == pytest.approx(share, abs=0.02)
        assert (drawn.arms.weight[:, start:end] == share).all()
    assert drawn.y[:, :100].mean() < 0.2 < 0.4 < drawn.y[:, -100:].mean()


def test_thompson_follows_the_better_arm_and_keeps_its_floor():
    rng = np.random.default_rng(1)
    drawn = sample(rng, bernoulli(0.4), Thompson(), paths=40, n=2000, lift=-0.5)
    assert drawn.arms.weight.min() == pytest.approx(0.05)
    assert (drawn.arms.weight[:, :100] == 0.5).all()
    assert drawn.arms.weight[:, -1].mean() < 0.1  # treatment is worse
    assert drawn.arms.ends[:2] == (100, 200)
    assert drawn.arms.ends[-1] == 2000
    assert drawn.arms.treated.mean() == pytest.approx(drawn.arms.weight.mean(), abs=0.01)


def test_lift_changes_treatment_only():
    rng = np.random.default_rng(2)
    drawn = sample(rng, bernoulli(0.5), Share(0.5), paths=50, n=1000, lift=-0.2)
    assert drawn.y[drawn.arms.treated].mean() == pytest.approx(0.4, abs=0.01)
    assert drawn.y[~drawn.arms.treated].mean() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="lift"):
        sample(rng, bernoulli(0.5), Share(0.5), paths=1, n=10, lift=0.2)
    constant = Data("constant", lambda rng, shape: (np.ones(shape), None))
    scaled = sample(rng, constant, Share(0.5), paths=2, n=100, lift=0.25)
    assert set(np.unique(scaled.y)) == {1.0, 1.25}


def test_a_method_that_needs_a_second_number_says_so():
    drawn = sample(np.random.default_rng(1), NORMAL, OneArm(), paths=1, n=5)
    with pytest.raises(TypeError, match="second number"):
        _ = drawn.second


# ---- sums along the paths ----------------------------------------------------------------------------


def test_looks():
    assert Looks("every").at(4).tolist() == [1, 2, 3, 4]
    assert Looks("3rd", step=3).at(7).tolist() == [3, 6, 7]
    assert Looks("dense", step=5, dense=4).at(10).tolist() == [1, 2, 3, 4, 9, 10]
    assert Looks("dense", step=5, dense=40).at(3).tolist() == [1, 2, 3]


def test_sums_of_epochs_and_arms():
    drawn = sample(np.random.default_rng(3), bernoulli(0.5), Ramp((0.5, 0.5)), paths=3, n=40)
    at = np.array([5, 20, 25, 40])
    got = by_epoch(drawn, drawn.ticks, at, arm=True)
    assert got.shape == (3, 4, 2)
    for path in range(3):
        values = np.where(drawn.arms.treated[path], drawn.y[path], 0)
        assert got[path, :, 0].tolist() == [values[: min(a, 20)].sum() for a in at]
        assert got[path, :, 1].tolist() == [values[20 : max(a, 20)].sum() for a in at]
    both = moment_arrays(drawn, at, arm=True).n.sum(axis=-1) + moment_arrays(drawn, at, arm=False).n.sum(
        axis=-1
    )
    assert (both == at).all()
    pooled = moment_arrays(drawn, at, arm=True, pooled=True)
    assert (pooled.s[..., 0] == got.sum(axis=-1)).all()
    assert (totals(drawn.y, at)[:, -1] == drawn.y.sum(axis=1)).all()


# ---- the table ---------------------------------------------------------------------------------------


def test_every_case_has_a_name_a_family_and_a_plausible_rate():
    assert len({case.name for case in table.CASES}) == len(table.CASES)
    for case in table.CASES:
        assert case.row[0] in FAMILIES
        assert 0 < case.nominal <= 0.1
        assert 2 <= case.n <= 5000
        assert case.looks


def test_the_quick_run_has_every_method_and_every_check_that_must_fail():
    full, quick = service.choose(), service.choose(quick=True)
    assert {case.row for case in full} == {case.row for case in quick}
    assert [case.name for case in full if case.must_fail and not case.quick] == []


def test_only():
    assert {case.row for case in service.choose(only=["a1"])} == {"a1"}
    named = service.choose(only=["sample ratio"])
    assert named
    assert all("sample ratio" in case.method for case in named)
    with pytest.raises(ConfigError, match="a1, "):
        service.choose(only=["nonsense"])


# ---- page and pictures -------------------------------------------------------------------------------

MEASURED = [
    measured(0.012),
    measured(0.2, row="b2", method="broken"),
    measured(0.4, method="a shortcut", fails_because="it is naive"),
    measured(0.3, method="ours", fails_because="it assumes more", known_limit=True),
]


def test_page():
    text = page(MEASURED, RUN, images="images")
    assert "**1 of 2 rows hold their rate; 2 of 2 checks that must fail do.**" in text
    assert (
        "| a1 | some method | normal | 0.5 | 0.05 | 0.0120 | 0.0034 | every unit | 5,000 | 1,000 | 1 | 0.1.0 |"
        in text
    )
    assert "0.2000 **above**" in text
    assert "- **a shortcut**: it is naive." in text
    shortcuts, limits = text.index("## Checks that must fail"), text.index("## Known limits")
    assert shortcuts < text.index("| a1 | a shortcut |") < limits < text.index("| a1 | ours |")
    assert "- **ours**: it assumes more." in text
    assert "### Means" in text
    assert "### Conversions" in text
    assert "](images/calibration-rates.svg)" in text
    assert "images/" not in page(MEASURED, RUN)
    columns = {row.count("|") for row in text.splitlines() if row.startswith("| a1")}
    assert columns == {13}


def test_pictures_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    first = [file.read_bytes() for file in plots.write_plots(MEASURED, tmp_path / "a", seed=1)]
    again = [file.read_bytes() for file in plots.write_plots(MEASURED, tmp_path / "b", seed=1)]
    assert first == again
    assert len(first) == 3
    assert all(svg.lstrip().startswith(b"<?xml") for svg in first)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="extra `plot`"):
        plots.write_plots(MEASURED, tmp_path, seed=1)


# ---- the command -------------------------------------------------------------------------------------


def run(monkeypatch, cases, *arguments):
    monkeypatch.setattr(service, "CASES", cases)
    return CliRunner().invoke(main, ["calibrate", "--jobs", "1", *arguments])


def test_command_ends_well_when_all_is_as_it_must_be(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    cases = (case(0.01, quick=True), case(0.5, method="a shortcut", fails_because="naive", quick=True))
    output = tmp_path / "docs" / "calibration.md"
    result = run(monkeypatch, cases, "--paths", "200", "--output", str(output), "--json")
    assert result.exit_code == 0, result.output
    assert [row["status"] for row in json.loads(result.stdout)] == ["held", "failed as it must"]
    assert "2 rows are as they must be" in result.stderr
    assert output.read_text().startswith("# Calibration")
    assert (output.parent / "images" / "calibration-narrowing.svg").exists()


def test_command_fails_loudly(monkeypatch):
    cases = (case(0.5, quick=True), case(0.01, method="a shortcut", fails_because="naive", quick=True))
    result = run(monkeypatch, cases, "--quick")
    assert result.exit_code == 1
    assert "2 of 2 rows are not right" in result.stderr
    assert "above nominal by more than 3 standard errors: a1 some method" in result.stderr
    assert "must fail and does not: a1 a shortcut" in result.stderr


def test_command_refuses_an_unknown_method():
    result = CliRunner().invoke(main, ["calibrate", "--only", "nonsense"])
    assert result.exit_code == 2
    assert "no method is called 'nonsense'" in result.stderr


def test_command_asks_for_matplotlib_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(monkeypatch, (case(0.0),), "--output", str(tmp_path / "page.md"))
    assert result.exit_code == 2
    assert "extra `plot`" in result.stderr
    assert not (tmp_path / "page.md").exists()


# ---- what is committed -------------------------------------------------------------------------------


def test_the_committed_page_is_of_this_table():
    text = (DOCS / "calibration.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:5]) for line in text.splitlines()}
    missing = [c.name for c in table.CASES if (c.row, c.method, c.data, c.share) not in rows]
    assert missing == []
    assert "**above**" not in text
    assert "**did not fail**" not in text
    for picture in re.findall(r"\]\((images/.*?)\)", text):
        assert (DOCS / picture).is_file()
