"""What the audit of the locked packages comes to, whatever the advisory service says."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / ".ci" / "audit"
FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("report", "code", "line"),
    [
        ([FINE], 0, "1 packages, nothing known"),
        ([FINE, BAD], 1, "b 2: X-1, fixed in 3"),
        ([FINE, UNKNOWN], 1, "c: not found"),
        ([UNKNOWN, UNKNOWN], 3, "NOT compared"),
        (None, 3, "NOT compared"),
    ],
    ids=["fine", "vulnerable", "one unknown", "no answer", "no report"],
)
def test_a_vulnerable_package_fails_and_no_answer_is_said(monkeypatch, capsys, tmp_path, report, code, line):
    spec = importlib.util.spec_from_loader("audit", SourceFileLoader("audit", str(PATH)))
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip-audit").touch()
    monkeypatch.setattr(audit, "HOME", tmp_path)
    monkeypatch.setattr(audit, "audited", lambda lock: report)
    assert audit.main() == code
    out = capsys.readouterr()
    assert line in out.out + out.err
