"""What makes a schedule cheap and takes nothing from it: pure functions that need not be computed again and again.

Decoding and checking a spec, and decoding an event for the oracle, give the same for the same bytes, so each is done
once. The confidence sequences behind a decision cost more than everything else of a schedule, and are held by tests of
their own; most worlds put a count in their place (`quick_finding`, `quick_ratio`). It proves an effect after a few
units, and disproves it as fast, so that there are many decisions, and the next look would often make another one. The
rest, one world in `EXACT_SHARE`, evaluates in earnest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import msgspec

from stream_xp import stats
from stream_xp.domain import codec
from stream_xp.domain.decision import Evidence
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.experiment_rules import record_rules as _record_rules
from stream_xp.domain.statistics import MetricMoments
from stream_xp.engine import evaluate as evaluate_module
from stream_xp.engine.comparison import Comparison, Finding
from stream_xp.services import experiments as experiments_module
from stream_xp.services.oracle import recompute as oracle

EXACT_SHARE = 8
"""One world in so many (by its seed) evaluates as a deployment does."""
_PROVEN = 1
"""Steps by which an arm's sum must differ from the control's to prove an effect."""
_ASTRAY = 16
_MOST = 20_000


class Memo:
    """A function that remembers what it gave, or raised, for the newest arguments."""

    def __init__(
        self, function: Callable[..., Any], key: Callable[..., Hashable], *, most: int = _MOST
    ) -> None:
        self._function, self._key, self._most = function, key, most
        self._known: dict[Hashable, tuple[Any, Exception | None, tuple[Any, ...]]] = {}

    def __call__(self, *args: Any) -> Any:
        key = self._key(*args)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._most:
                self._known.clear()
            # The arguments are kept too: where an id is the key, nobody else may get it.
            found = self._known[key] = (*self._outcome(args), args)
        given, error, _ = found
        if error is not None:
            raise error.with_traceback(None)
        return given

    def _outcome(self, args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
        try:
            return self._function(*args), None
        except Exception as error:  # whatever the function raises is kept, and raised each time
            return None, error


def _same(*args: Any) -> Hashable:
    return args


class Evidences:
    """Tests of comparisons and of sample ratios: in earnest, or quickly."""

    def __init__(self) -> None:
        self.exact = True
        self._findings = evaluate_module._findings
        self.p_always_valid = stats.p_always_valid

    def findings(self, batch: Sequence[Comparison]) -> list[Finding]:
        """What `engine.evaluate` gets for the comparisons."""
        return self._findings(batch) if self.exact else [quick_finding(one) for one in batch]

    def sample_ratio_log_e(self, counts: Any, weights: Any) -> Any:
        """What `engine.evaluate` gets for the units of each arm."""
        return stats.sample_ratio_log_e(counts, weights) if self.exact else quick_ratio(counts, weights)


def quick_ratio(counts: Any, weights: Any) -> Any:
    """A sample ratio is wrong as soon as an arm is `_ASTRAY` units from where it should be."""
    expected = counts.sum(axis=-1, keepdims=True) * weights
    return abs(counts - expected).max(axis=(-1, -2)) - _ASTRAY


def quick_finding(comparison: Comparison) -> Finding:
    """An effect is proven as soon as the arm's sum is far enough from the control's, and later perhaps no more."""
    ahead = sum(_sum(one.arm) - _sum(one.control) for one in comparison.strata)
    effect = _evidence(ahead, comparison.effect, abs(ahead))
    if not comparison.guards:
        return Finding(*comparison.units, effect=effect)
    plan, (control_units, arm_units) = comparison.plan, comparison.units
    # Any odd number of units harms, so that a guardrail is soon harmed and often no more at the next look.
    harms = (control_units + arm_units) % 2
    harm, safety = _evidence(harms, plan.harm, harms), _evidence(harms, plan.safety, 1 - harms)
    return Finding(*comparison.units, effect=effect, harm=harm, safety=safety)


def _evidence(ahead: int, test: Any, steps: int) -> Evidence:
    """Proven where `steps` are enough."""
    # In this order: what is added to the threshold and taken away again leaves less than the threshold.
    log_e = test.threshold_log_e + (max(-100, min(steps, 100)) - _PROVEN)
    return Evidence(float(max(-100, min(ahead, 100))), None, None, log_e, 1.0, test.threshold_log_e)


def _sum(row: Any) -> int:
    return int(row.s) if isinstance(row, MetricMoments) else 0


EVIDENCES = Evidences()
decode_experiment = Memo(codec.decode_experiment, _same)
decode_record = Memo(lambda value: msgspec.json.decode(value, type=ExperimentRecord), _same)
record_rules = Memo(_record_rules, lambda record, experiment: (id(record), experiment))
timeline = Memo(oracle.Timeline, lambda experiments, delay_ms: (id(experiments), delay_ms), most=4)


def begin(seed: int) -> None:
    """A world with this seed begins."""
    EVIDENCES.exact = seed % EXACT_SHARE == 0


REPLACED: list[tuple[Any, str, Any]] = [
    (evaluate_module, "_findings", EVIDENCES.findings),
    (evaluate_module, "stats", EVIDENCES),
    (experiments_module, "decode_experiment", decode_experiment),
    (codec, "record_rules", record_rules),
    (oracle, "record_rules", record_rules),
    (oracle, "Timeline", timeline),
    (oracle, "decode_exposure", Memo(codec.decode_exposure, _same)),
    (oracle, "decode_reward", Memo(codec.decode_reward, _same)),
]
"""Where `world.installed` puts what."""
