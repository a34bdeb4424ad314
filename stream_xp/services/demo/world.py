"""The world of the demo: what is true of its three experiments, and what the service should make of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from stream_xp.domain.decision import Action, Decision
from stream_xp.engine.evaluate import evaluate_all
from stream_xp.engine.policy import decide
from stream_xp.errors import ConfigError
from stream_xp.services.spec_file import load_spec
from stream_xp.simulator import (
    START_MS,
    Conversion,
    ExperimentTraffic,
    Faults,
    Scenario,
    Since,
    Traffic,
    generate,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream_xp.domain.experiment import ExperimentSpec

CANARY: Final = "checkout-canary"
ARTWORK: Final = "artwork"
AA: Final = "aa"

DURATION_S: Final = 40
SHORTEST_S: Final = 20
LONGEST_S: Final = 60
ALLOWED_LATENESS_MS: Final = 500
LOOK_MS: Final = 250
LOOKS_TOGETHER: Final = 32

ONSET_SHARE: Final = 0.375
"""Share of the duration after which the canary begins to harm."""
MINIMUM_RUNTIME_SHARE: Final = 0.6
"""Share of the duration before which nothing is shipped; the spec says the same of the usual duration."""

UNITS: Final = {CANARY: 80_000, ARTWORK: 80_000, AA: 32_000}
"""Units in all. A shorter demo sends as many, only faster, so that it is as likely to come out right."""

FAULTS: Final = Faults(
    duplicated=0.01, out_of_order=0.02, late=0.001, malformed=0.002, reward_first=0.05, strays=0.005
)

_SPECS: Final = Path(__file__).parent.parent / "demo_specs"
_TAKE_RATE: Final = 0.3
_TAKE_RATIOS: Final = {"cell-1": 1.0, "cell-2": 1.14, "cell-3": 1.06}


class Expectation(NamedTuple):
    """The right decision; `onset_ms` is when the effect begins, None if there is none."""

    action: Action
    arm: str | None
    onset_ms: int | None


class World(NamedTuple):
    """The traffic of one demo and what is right."""

    traffic: Traffic
    expected: dict[str, Expectation]


def build_world(seed: int, *, duration_s: float = DURATION_S) -> World:
    """Draw the traffic of a demo.

    Raises:
        ConfigError: the duration is too short for the windows, or longer than the demo may take.

    """
    if not SHORTEST_S <= duration_s <= LONGEST_S:
        raise ConfigError(f"the duration must lie between {SHORTEST_S} and {LONGEST_S} s, got {duration_s:g}")
    duration_ms = round(duration_s * 1000)
    onset_ms = round(ONSET_SHARE * duration_ms)
    expected = {
        CANARY: Expectation(Action.STOP, "canary", onset_ms),
        ARTWORK: Expectation(Action.SHIP, "cell-2", 0),
        AA: Expectation(Action.HOLD, None, None),
    }
    return World(generate(_scenario(duration_ms, onset_ms), seed), expected)


def is_right(expected: Expectation, decision: Decision | None, decided_ms: int | None) -> bool:
    """Return whether a decision is the right one and did not come before there was anything to see.

    Args:
        expected: the right decision.
        decision: the signal's; None if there was no signal.
        decided_ms: when it came, from the start of the traffic.

    """
    if decision is None or decided_ms is None:
        return expected.action is Action.HOLD
    made = (decision.action, decision.arm)
    return made == (expected.action, expected.arm) and decided_ms >= (expected.onset_ms or 0)


class Scored(NamedTuple):
    """What the tests alone make of one experiment; `decided_ms` is the watermark at the decision."""

    experiment: str
    decision: Decision
    decided_ms: int | None
    right: bool


def score(seed: int, *, duration_s: float = DURATION_S) -> tuple[Scored, ...]:
    """Decide the traffic of a demo without a broker: evaluate and decide at a watermark every 250 ms.

    These are the statistics, tests and policy of the service, at regular looks. It takes about a second, so
    that the probability of a right demo can be measured over many seeds.
    """
    world = build_world(seed, duration_s=duration_s)
    return tuple(map(partial(_scored, world), world.traffic.scenario.experiments))


def _scored(world: World, traffic: ExperimentTraffic) -> Scored:
    experiment, record = traffic.spec.experiment, traffic.record(START_MS)
    last_ms = world.traffic.last_send_ms + traffic.spec.longest_window_ms + ALLOWED_LATENESS_MS
    marks = range(0, last_ms + LOOK_MS, LOOK_MS)
    looks = [
        (mark, statistics)
        for mark, statistics in zip(marks, world.traffic.history(experiment, marks), strict=True)
        if statistics.first_exposure_ms is not None
    ]
    decision, decided_ms = Decision(action=Action.HOLD, reason="no data"), None
    # In chunks, because looks that are tested together cost little more than one.
    for start in range(0, len(looks), LOOKS_TOGETHER):
        chunk = looks[start : start + LOOKS_TOGETHER]
        evaluations = evaluate_all([(record, statistics) for _, statistics in chunk])
        for (mark, statistics), evaluation in zip(chunk, evaluations, strict=True):
            runtime_ms = START_MS + mark - (statistics.first_exposure_ms or 0)
            decision = decide(traffic.spec, evaluation, runtime_ms=runtime_ms)
            if decision.action is not Action.HOLD:
                decided_ms = mark
                break
        if decided_ms is not None:
            break
    signal = None if decided_ms is None else decision
    return Scored(experiment, decision, decided_ms, is_right(world.expected[experiment], signal, decided_ms))


def _scenario(duration_ms: int, onset_ms: int) -> Scenario:
    takes: dict[str, Sequence[float]] = {arm: [_TAKE_RATE * ratio] for arm, ratio in _TAKE_RATIOS.items()}
    experiments = (
        _traffic(
            CANARY, duration_ms, {"checkout_error": {"stable": [0.01], "canary": [0.01, 0.03]}}, onset_ms
        ),
        _traffic(ARTWORK, duration_ms, {"take": takes}),
        _traffic(
            AA, duration_ms, {"play": {"a": [0.2], "b": [0.2]}, "playback_error": {"a": [0.02], "b": [0.02]}}
        ),
    )
    return Scenario(
        experiments=experiments,
        duration_ms=duration_ms,
        allowed_lateness_ms=ALLOWED_LATENESS_MS,
        faults=FAULTS,
    )


def _traffic(
    experiment: str, duration_ms: int, rates: dict[str, dict[str, Sequence[float]]], onset_ms: int = 0
) -> ExperimentTraffic:
    """Traffic whose conversion rates are given per metric and arm: from the start, and from the onset on."""
    return ExperimentTraffic(
        spec=_spec(experiment, duration_ms),
        units_per_s=1000 * UNITS[experiment] / duration_ms,
        outcomes={
            metric: {
                arm: tuple(
                    Since(outcome=Conversion(probability=p), from_ms=at)
                    for p, at in zip(steps, (0, onset_ms), strict=False)
                )
                for arm, steps in by_arm.items()
            }
            for metric, by_arm in rates.items()
        },
    )


def _spec(experiment: str, duration_ms: int) -> ExperimentSpec:
    spec = load_spec(_SPECS / f"{experiment}.yaml")
    if spec.minimum_runtime == "0s":
        return spec
    runtime_s = round(MINIMUM_RUNTIME_SHARE * duration_ms / 1000)
    return msgspec.structs.replace(spec, minimum_runtime=f"{runtime_s}s")
