"""Label tests that do not mistake a broken assignment for an effect.

An exact test of labels trusts the logged weights: if units fall into the arms in other shares, it can reject
although outcomes do not depend on the arm. A sample-ratio test finds that in time, but nothing may ship before.
Divided by the largest likelihood ratio that the labels alone can give to *any* shares, constant inside an epoch,

    log e' = log e - sum_e sum_a n_ea ln(n_ea / (n_e rho_ea)),

the e-value is an e-value under every such assignment: with the true shares in place of the best ones the last term
would turn the null's label probabilities into the true ones, and the best ones only subtract more. Where the
weights hold it costs about half a nat for each epoch.

Source: this project's own, after the universal inference of Wasserman, Ramdas and Balakrishnan (2020), PNAS
117(29), 16880-16890, theorem 1 (a denominator maximised over the null).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import rel_entr

from stream_xp.stats._checks import FloatArray
from stream_xp.stats._counts import epochs

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def assignment_deviance(units: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Log likelihood ratio of the observed shares of each epoch against the logged weights.

    Args:
        units: (..., E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) or (..., E, K) logged weights; rows sum to 1 within 1e-9; above 0 wherever there is a
            unit. A row of zeros pads an experiment with fewer epochs.

    Returns:
        Array of the broadcast shape without the last two axes, >= 0 and finite, in nats. Subtract it from the log
        e-value of a test of labels to make that robust against wrong shares.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module.

    """
    n, rho = epochs(units, weights, name="units")
    expected = n.sum(axis=-1, keepdims=True) * rho
    return np.asarray(np.maximum(rel_entr(n, np.where(n > 0, expected, 1.0)).sum(axis=(-2, -1)), 0.0))
