"""What each policy wants of the open arms, before constraints.

* `fixed`: the weights in force.
* `thompson`: the probability to be best. What randomised Thompson sampling does on average, without its draws.
* `top_two`: half of that, and half of the probability to be second best *of the same joint posterior*. The leader keeps
  about a half however sure it is, and its rival gets the rest: less reward than `thompson`, more certainty about
  the best arm. Two arms get a half each. Russo's version instead draws again until another arm leads, a after j with
  probability P(a) / (1 - P(j)), and so asks for the ratio of probabilities however small they are.
* `contextual`: `thompson` in each context, on partly pooled posteriors.

Sources: Thompson (1933), Biometrika 25, 285-294; Russo (2020), Operations Research 68(6), 1625-1647.
"""

from __future__ import annotations

from enum import StrEnum

from stream_xp.engine.allocation.best import Ranking
from stream_xp.engine.allocation.posterior import FloatArray

LEADER_SHARE = 0.5
"""beta of top-two sampling."""


class Policy(StrEnum):
    """How weights follow evidence."""

    FIXED = "fixed"
    THOMPSON = "thompson"
    TOP_TWO = "top_two"
    CONTEXTUAL = "contextual"


def shares(policy: Policy, ranks: Ranking) -> FloatArray:
    """Shares of the arms under an adaptive policy; they sum to 1.

    Raises:
        ValueError: the policy is `fixed`.
    """
    if policy is Policy.FIXED:
        raise ValueError("fixed weights follow no ranks")
    if policy is Policy.TOP_TWO and len(ranks.best) > 1:
        return LEADER_SHARE * ranks.best + (1.0 - LEADER_SHARE) * ranks.second
    return ranks.best
