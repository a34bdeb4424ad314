"""Experiment files: what is no spec at all, many faults at once, and any bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.fields import duration_ms
from stream_xp.errors import ConfigError
from stream_xp.services.spec_file import MAX_FILE_BYTES, SpecFault, SpecFaults, load_spec, parse_spec, scalars

if TYPE_CHECKING:
    from pathlib import Path
from tests.unit.spec_file_world import VALID, edited, faults_of

WHOLE_FILES: dict[str, tuple[str | bytes, int, int, str]] = {
    "empty": (b"", 1, 1, "is empty"),
    "only comments": ("# nothing\n\n", 1, 1, "is empty"),
    "only a marker": ("---\n...\n", 2, 1, "expected fields, got nothing"),
    "a list": ("- a\n", 1, 1, "expected fields, got a list"),
    "a word": ("hello\n", 1, 1, "expected fields, got the text 'hello'"),
    "an alias": ("*a\n", 1, 1, "aliases"),
    "an unclosed list": (VALID + "x: [1, 2\n", 33, 1, "is not YAML: expected ',' or ']'"),
    "an unclosed quote": ('a: 1\nb: "x\n', 3, 1, "is not YAML: found unexpected end of stream"),
    "a tabulator": ("arms:\n\t- key: a\n", 2, 1, "is not YAML: found character '\\t'"),
    "wrong indentation": ("a: 1\n b: 2\n", 2, 3, "is not YAML: mapping values are not allowed here"),
    "not UTF-8": (b"owner: x\nunit: \xff\n", 2, 7, "is not UTF-8 from here on"),
    "UTF-16": ("owner: x".encode("utf-16"), 1, 1, "is not UTF-8 from here on"),
    "a control character": ("owner: x\nunit: a\x07b\n", 2, 8, "has a character that YAML does not allow"),
    "deep": ("[" * 10_000, 1, 21, "more than 20 levels"),
    "deep fields": ("a: " + "{a: " * 10_000, 1, 77, "more than 20 levels"),
    "wide": ("- a\n" * 20_000, 10_000, 3, "more than 10000 values"),
    "too long": (b"#" * (MAX_FILE_BYTES + 1), 1, 1, f"is longer than {MAX_FILE_BYTES} bytes"),
    "bomb": (
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n",
        2,
        8,
        "aliases (*name) are not allowed",
    ),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_files_that_are_no_spec_at_all(case: str) -> None:
    text, line, column, message = WHOLE_FILES[case]
    found = faults_of(text)
    assert any((f.line, f.column) == (line, column) and message in f.message for f in found), found[:5]


def test_two_documents_are_one_too_many_and_the_first_is_checked() -> None:
    found = faults_of(edited("alpha: 0.05", "alpha: 5") + "---\n" + VALID)
    assert [(fault.line, fault.path) for fault in found] == [(27, "alpha"), (32, "")]
    assert "second document" in found[1].message


def test_all_faults_come_at_once_in_the_order_of_the_file() -> None:
    text = """\
experiment: "bad key"
unit: 5
arms:
  - {key: a, weight: 0.9, control: true, controll: false}
  - key: a
    weight: 1e-1
metrics:
  - key: m
    kind: convrsion
    role: guardrail
    direction: up
    attribution_window: 1 hour
  - key: m
    kind: mean
    role: primary
    direction: increase
    attribution_window: 0s
    margin: {absolute: 1, relative: 2}
    critical: yes
planned_sample: 20.5
planned_sample: 3
alpha: 1.5
maximum_runtime: 0s
extra: 1
"""
    assert [(fault.line, fault.path) for fault in faults_of(text)] == [
        (1, "hypothesis"),
        (1, "owner"),
        (1, "experiment"),
        (2, "unit"),
        (4, "arms[0].controll"),
        (5, "arms[1].key"),
        (6, "arms[1].weight"),
        (9, "metrics[0].kind"),
        (10, "metrics[0].role"),
        (11, "metrics[0].direction"),
        (12, "metrics[0].attribution_window"),
        (13, "metrics[1].key"),
        (14, "metrics[1].kind"),
        (17, "metrics[1].attribution_window"),
        (18, "metrics[1].margin"),
        (18, "metrics[1].margin"),
        (19, "metrics[1].critical"),
        (20, "planned_sample"),
        (21, "planned_sample"),
        (22, "alpha"),
        (23, "maximum_runtime"),
        (24, "extra"),
    ]


UNREADABLE = {
    "weight": ("weight: 0.1", "weight: x", {"arms[1].weight"}),
    "control": ("control: true", "control: x", {"arms[0].control"}),
    "arm": ("  - key: new\n    weight: 0.1", "  - 7", {"arms[1]"}),
    "arms": (
        "  - key: old\n    weight: 0.9\n    control: true\n  - key: new\n    weight: 0.1",
        "  7",
        {"arms"},
    ),
    "role": ("role: guardrail", "role: x", {"metrics[0].role"}),
    "kind": ("kind: mean", "kind: x", {"metrics[1].kind"}),
    "bound": ("bound: 100", "bound: x", {"metrics[1].bound"}),
    "scale": ("scale: 0.01", "scale: x", {"metrics[1].scale"}),
    "margin": ("      absolute: 0.005", "      absolute: x", {"metrics[0].margin.absolute"}),
    "minimum": ("minimum_runtime: 1d", "minimum_runtime: x", {"minimum_runtime"}),
    "maximum": ("maximum_runtime: 7d", "maximum_runtime: x", {"maximum_runtime"}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_no_rule_is_called_broken_because_a_field_could_not_be_read(case: str) -> None:
    old, new, paths = UNREADABLE[case]
    assert {fault.path for fault in faults_of(edited(old, new))} == paths


def test_a_rule_that_no_reading_heals_is_told_beside_the_unreadable_field() -> None:
    text = edited("role: guardrail", "role: x").replace("weight: 0.9", "weight: 0.8")
    text = text.replace("    bound: 100\n", "").replace("- key: spend", "- key: errors")
    assert {fault.path for fault in faults_of(text)} == {
        "metrics[0].role",
        "arms",
        "metrics[1].kind",
        "metrics[1].key",
    }


def test_the_format_of_a_line() -> None:
    with pytest.raises(SpecFaults) as caught:
        parse_spec(edited("role: secondary", "role: guardrail").encode(), "dir/f.yaml")
    assert str(caught.value) == "dir/f.yaml:21:11: metrics[1].role: a guardrail needs a margin"
    assert isinstance(caught.value, ConfigError)
    assert caught.value.lines() == [str(caught.value)]


def test_a_message_is_one_printable_line_whatever_the_file_holds() -> None:
    hostile = 'unit: "x"\n"\\e[31m\\n": 1\nexperiment: "\\e[2J\\u202e"\n'
    for fault in faults_of(hostile):
        assert (fault.path + fault.message).isprintable()
    assert all(len(f.message) < 300 for f in faults_of(f"experiment: {'x y' * 10_000}\n"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SpecFaults, match=re.escape(f"{path}:1:1: cannot be read: ")):
            load_spec(path)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(VALID)
    assert load_spec(str(path)) == load_spec(path)


def test_a_constraint_the_walk_does_not_know_is_still_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "_in_range", lambda number, kind: number)
    found = faults_of(edited("planned_sample: 20_000", "planned_sample: 1"))
    assert [(fault.line, fault.message) for fault in found] == [(1, "Expected `int` >= 100")]


@given(st.binary(max_size=200))
def test_no_bytes_bring_another_exception(raw: bytes) -> None:
    with pytest.raises(SpecFaults):
        parse_spec(raw, "f")


@given(st.data())
def test_no_edit_of_a_valid_file_brings_another_exception(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(VALID)))
    end = data.draw(st.integers(start, min(len(VALID), start + 40)))
    text = VALID[:start] + data.draw(st.text(max_size=12)) + VALID[end:]
    try:
        spec = parse_spec(text.encode("utf-8", "surrogatepass"), "f")
    except SpecFaults as error:
        faults = error.faults
    else:
        faults = (SpecFault(1, 1, "", "none"),)
        assert msgspec.json.decode(msgspec.json.encode(spec), type=ExperimentSpec) == spec
        assert duration_ms(spec.minimum_runtime) >= 0
    assert faults
    assert all(fault.line >= 1 and fault.column >= 1 for fault in faults)
