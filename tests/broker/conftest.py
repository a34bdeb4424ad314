"""Lets the tests of this folder share its modules that are no tests, and checks batches with compiled code."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _fast_checksums() -> None:
    from checksums import use_fast_checksums  # noqa: PLC0415 - imports Kafka clients, whose warnings are ignored by now

    use_fast_checksums()
