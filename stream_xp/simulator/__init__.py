"""Traffic with a known truth: exposures and rewards of several experiments, with faults on demand.

A `Scenario` says what the world is like, `generate` draws it once from a seed, and the `Traffic` gives the
records in the order of their sending, together with exactly what the engine must make of them. Nothing
here reads a clock: `send_ms` and event times count from 0, and `start_ms` puts them on the calendar when
the records are encoded. The same scenario, seed and start give the same bytes.

A record's Kafka timestamp is `start_ms + send_ms`, and records are sent in that order; what is late, what
is a duplicate and what a reward belongs to (docs/semantics.md) therefore do not depend on partitions.
"""

from stream_xp.simulator.columns import EXPOSURES, REWARDS, TOPICS
from stream_xp.simulator.draw import generate
from stream_xp.simulator.encoder import Event
from stream_xp.simulator.malformed import MALFORMED, Malformed
from stream_xp.simulator.scenario import (
    Conversion,
    ExperimentTraffic,
    Faults,
    LogNormal,
    Outcome,
    Scenario,
    Since,
    WeightChange,
)
from stream_xp.simulator.traffic import START_MS, Chunk, Traffic
from stream_xp.simulator.truth import Truth

__all__ = [
    "EXPOSURES",
    "MALFORMED",
    "REWARDS",
    "START_MS",
    "TOPICS",
    "Chunk",
    "Conversion",
    "Event",
    "ExperimentTraffic",
    "Faults",
    "LogNormal",
    "Malformed",
    "Outcome",
    "Scenario",
    "Since",
    "Traffic",
    "Truth",
    "WeightChange",
    "generate",
]
