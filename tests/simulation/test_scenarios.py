"""Some scenarios of examples/scenarios in short: every claim holds that so few runs can tell.

The full ones are `make scenarios`, which writes docs/scenarios.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_xp.services.scenarios.harness import simulate
from stream_xp.services.scenarios.scenario import load_scenario

EXAMPLES = Path(__file__).parents[2] / "examples" / "scenarios"


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("errors-times-3", 30),
        ("faster-conversions", 20),
        ("policy-thompson", 10),
        ("ramp-to-all", 10),
        ("ramp-with-drift", 30),
        ("short-game", 10),
        ("two-contexts", 5),
    ],
)
def test_claims_hold(name, runs, record_property):
    (found,) = simulate([load_scenario(EXAMPLES / f"{name}.yaml")], runs=runs, seed=1)
    for measure in found.measures:
        record_property(measure.name, measure.value)
    assert [claim.words for claim in found.claims if not claim.holds] == []
