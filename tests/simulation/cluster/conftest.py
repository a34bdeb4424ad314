"""What a killed worker leaves behind is swept up here, and is no other test's warning."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# A worker that dies between two effects never awaits what it had begun; that is the point of killing it.
_LEFT = ("ignore:coroutine .* was never awaited:RuntimeWarning", "ignore:unclosed event loop:ResourceWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            for warning in (*_LEFT, "ignore::pytest.PytestUnraisableExceptionWarning"):
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _sweep() -> Iterator[None]:
    """Collect what is left while the warnings are still those of this test."""
    yield
    gc.collect()
