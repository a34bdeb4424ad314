"""What a killed worker leaves behind is collected here, and would be this test's warning, not a later one's."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _sweep() -> Iterator[None]:
    yield
    gc.collect()
