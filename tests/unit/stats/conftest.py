"""What several tests of stratified means share."""

import numpy as np
import pytest


@pytest.fixture
def variance_of_mean():
    """The variance of an arm's stratified mean, spelled out epoch by epoch."""

    def variance(n, sizes, *, own, both, unit, spent=0, guard=True):
        """`n` and `sizes`: units of the arm and of both; `own`, `both`: sums of squares; `unit`: guarded, of a unit."""
        n, sizes, own, both = (np.array(column, dtype=float) for column in (n, sizes, own, both))
        squared = (sizes / sizes.sum()) ** 2
        level = unit * (squared / n).sum()
        if len(n) == 1:
            return level
        both = both / (sizes - 1)
        degrees = (n - 1).sum()
        ratio = own.sum() / (degrees - spent) / ((n - 1) @ both / degrees)
        if guard:
            ratio = max(ratio, (degrees * ratio + 200) / (degrees + 200))
        by_epoch = (own + 25 * ratio * both) / (n - 1 + 25)
        return max(level, squared @ (by_epoch / n))

    return variance
