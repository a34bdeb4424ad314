"""The oracle is a second program: nothing that it imports computes what it checks."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps(sorted(sys.modules)))
"""
FOREIGN = (
    "stream_xp.engine",
    "stream_xp.stats",
    "stream_xp.services.ingest",
    "faust",
    "aiokafka",
    "numba",
    "numpy",
)


@pytest.mark.parametrize("module", ["stream_xp.cli.oracle", "stream_xp.services.oracle.service"])
def test_the_oracle_loads_nothing_of_the_engine(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, module], capture_output=True, text=True, check=True)
    assert f'"{module}"' in done.stdout
    loaded = [name for name in FOREIGN if f'"{name}"' in done.stdout]
    assert loaded == []
