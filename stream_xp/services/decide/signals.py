"""The record of a decision; its id is derived from it, so that a repeat is recognised."""

from __future__ import annotations

import datetime as dt
import hashlib

from stream_xp.domain.decision import Action, Result, Signal, SignalData
from stream_xp.services.decide.look import Conclusion


def signal_of(one: Conclusion, *, group_id: str) -> Signal:
    """The signal that tells of a conclusion.

    Args:
        one: the conclusion.
        group_id: of the workers that decide.
    """
    result, since = one.result, one.known.since
    return Signal(
        id=signal_id(result, since),
        source=f"stream-xp/{group_id}",
        subject=result.experiment,
        time=dt.datetime.fromtimestamp(result.evaluated_ms / 1000, dt.UTC).isoformat(),
        data=SignalData(decision=result.decision, result=result, proposed=one.steering.proposed, since=since),
    )


def signal_id(result: Result, since: str | None = None) -> str:
    """Derived from what is decided: deriving the same decision again gives the same id.

    A conclusion is told by its statistics, an advance or allocation by the weight epochs it follows on.

    Args:
        result: with the decision.
        since: the newest reset: what is decided after it is another decision than the one it took back.
    """
    moves = result.decision.action in (Action.ADVANCE, Action.ALLOCATE)
    about = str(result.weight_epochs) if moves else result.statistics_hash
    parts = [result.experiment, str(result.version), result.decision.action, about]
    text = "\0".join([*parts, *([] if since is None else [since])])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
