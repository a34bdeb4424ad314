"""Asks for a verdict once, from a shell: the same view and the same function as the API, read for one answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from stream_xp.adapters.clock import Clock, WallClock
from stream_xp.domain.gate import Verdict
from stream_xp.services.api.follower import Follower
from stream_xp.services.api.view import TOPICS, View

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_xp.domain.gate import GateVerdict
    from stream_xp.settings import Settings

LOAD_S: Final = 30.0
"""How long reading the topics to their end may take, whether or not the verdict is waited for."""
POLL_S: Final = 0.1
_FINAL: Final = (Verdict.PASS, Verdict.STOP)


def ask(
    settings: Settings,
    experiment: str,
    arm: str | None,
    *,
    wait_s: float,
    clock: Clock | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> GateVerdict:
    """The verdict on an arm of an experiment, or on all its treatments.

    Args:
        settings: brokers and limits.
        experiment: its key.
        arm: a treatment arm; None for all of them.
        wait_s: how long to wait for a pass or a stop; 0 for the verdict of now.
        clock: wall clock.
        pause: sleeps.

    Returns:
        The last verdict; invalid, because of `starting`, where no broker answered.

    Raises:
        ConfigError: a topic is missing.
    """
    clock = clock or WallClock()
    deadline_s = time.monotonic() + wait_s
    view = View(settings, clock=clock)
    with Follower(settings, TOPICS, view.take, clock=clock) as follower:
        view.follow_clock_of(lambda: follower.read_ms)
        follower.wait(max(LOAD_S, wait_s))
        told = view.verdict(experiment, arm)
        while told.verdict not in _FINAL and time.monotonic() < deadline_s and follower.failure is None:
            pause(POLL_S)
            told = view.verdict(experiment, arm)
    return told
