"""Lets the tests of this folder share `gate_world.py` and `api_process.py`, and one server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def one_server() -> Iterator[None]:
    """One server for all tests, whose application each test chooses: starting one takes longer than most of them."""
    import api_process  # noqa: PLC0415 (found on the path that is set above)

    with api_process.SERVER:
        yield
