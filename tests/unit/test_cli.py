"""The commands that ask no broker, and what all commands have in common."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from stream_xp.cli import COMMANDS, main

EXAMPLES = Path(__file__).parents[2] / "examples"
CANARY = str(EXAMPLES / "canary" / "spec.yaml")
WRITTEN = [name for name, (target, _) in COMMANDS.items() if find_spec(target.partition(":")[0])]
BAD = "experiment: a b\nunit: 5\n"


@pytest.fixture
def bad_file(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    return str(path)


def test_help_lists_every_command_and_imports_none() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name}" in result.output
        assert summary.split()[0] in result.output
    assert "Examples:" in result.output


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output.startswith("stream-xp, version ")


def test_an_unknown_command_is_one_error() -> None:
    result = CliRunner().invoke(main, ["nope"])
    assert result.exit_code == 2
    assert "No such command 'nope'" in result.stderr


@pytest.mark.parametrize("name", WRITTEN)
def test_every_command_explains_itself(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Examples:" in result.output
    assert "\\b" not in result.output
    assert "stream-xp " + name in result.output


def leaves(command: click.Command) -> list[click.Command]:
    if isinstance(command, click.Group):
        return [leaf for child in command.commands.values() for leaf in leaves(child)]
    return [command]


# A worker, an API and a notifier print nothing but their log, and that is JSON.
@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ("worker", "api", "notify")])
def test_every_command_has_json(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    for leaf in leaves(command):
        assert any("--json" in parameter.opts for parameter in leaf.params), leaf.name


def test_validating_imports_no_engine() -> None:
    program = (
        "import sys; from stream_xp.cli import main\n"
        f"main(['validate', {CANARY!r}], standalone_mode=False)\n"
        "heavy = {'faust', 'numba', 'scipy', 'numpy', 'kafka', 'aiokafka'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{CANARY}: checkout-canary version 1 is valid", "[]"]


def test_the_package_is_the_program() -> None:
    arguments = [sys.executable, "-m", "stream_xp", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: stream-xp ")


def test_valid_files() -> None:
    files = sorted(str(path) for path in EXAMPLES.glob("*/spec.yaml"))
    result = CliRunner().invoke(main, ["validate", *files])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == len(files)
    assert result.stderr == ""


def test_faults_go_to_standard_error_a_line_each(bad_file: str) -> None:
    result = CliRunner().invoke(main, ["validate", bad_file, CANARY])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert all(line.startswith(f"{bad_file}:") for line in lines)
    assert f"{bad_file}:1:1: arms: required field is missing" in lines
    assert f"{bad_file}:2:7: unit: expected text, got the number '5'; put it in quotes" in lines
    assert result.stdout == f"{CANARY}: checkout-canary version 1 is valid\n"


def test_faults_as_json(bad_file: str) -> None:
    result = CliRunner().invoke(main, ["validate", "--json", bad_file, CANARY])
    assert (result.exit_code, result.stderr) == (1, "")
    bad, good = json.loads(result.stdout)
    assert (bad["valid"], bad["experiment"]) == (False, None)
    assert {"line": 1, "column": 1, "path": "arms", "message": "required field is missing"} in bad["faults"]
    assert (good["valid"], good["experiment"], good["version"], good["faults"]) == (
        True,
        "checkout-canary",
        1,
        [],
    )
    assert len(good["design_hash"]) == 64


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert result.stderr == f"{tmp_path / 'none.yaml'}:1:1: cannot be read: No such file or directory\n"


def test_applying_a_bad_file_asks_no_broker(bad_file: str) -> None:
    result = CliRunner().invoke(main, ["apply", bad_file, "--bootstrap", "127.0.0.1:1"])
    assert result.exit_code == 2
    assert f"{bad_file}:1:1: arms: required field is missing" in result.stderr.splitlines()


@pytest.mark.parametrize("arguments", [[], [CANARY, "--archive", "x"]])
def test_apply_takes_a_file_or_an_experiment(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["apply", *arguments])
    assert result.exit_code == 2
    assert "give either FILE or --archive EXPERIMENT" in result.stderr


@pytest.mark.parametrize("command", ["validate", "apply"])
def test_what_is_to_be_watched_is_watched_and_needs_no_warning(tmp_path: Path, command: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(Path(CANARY).read_text() + "\nmonitors:\n  data_age: 5m\n")
    # Nobody listens at port 1: `apply` gets as far as the broker, past all that it says of the file.
    nowhere = ["--bootstrap", "127.0.0.1:1"] if command == "apply" else []
    done = CliRunner().invoke(main, [command, str(file), *nowhere])
    assert "monitors" not in done.output
    assert "nothing acts" not in done.output
    assert (done.exit_code == 0) == (command == "validate")
