"""Traffic that is wrong in every way, and a worker that is killed under it."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from chaos.traffic import Mix, account

if TYPE_CHECKING:
    from chaos.harness import Rig

MIXES = {
    "duplicates": Mix(duplicates=0.05, late=0, skewed=0, unknown=0, nobody=0, poison=0),
    "rewards before exposures": Mix(reversed_order=1.0),
    "late to the millisecond": Mix(boundary=1.0, late=0.05),
    "clocks an hour off": Mix(skewed=0.3),
    "unknown experiments": Mix(unknown=0.3),
    "poison": Mix(poison=0.2, nobody=0.1),
}


@pytest.mark.chaos("bad traffic")
@pytest.mark.parametrize("name", MIXES)
def test_bad_traffic(rig: Rig, name: str) -> None:
    rig.name = f"traffic: {name}"
    rig.prepare()
    traffic = rig.traffic(mix=MIXES[name])
    for _ in range(rig.count(dev=1, short=1, full=2)):
        with rig.worker() as worker, traffic.flowing():
            worker.wait_started()
            if name == "poison":
                traffic.send_poison()
            time.sleep(rig.count(dev=3, short=3, full=8))
            rig.kill(worker)
    with rig.worker() as last:
        rig.check()
        last.finish()
    assert_injected(rig, name)


def assert_injected(rig: Rig, name: str) -> None:
    """What the class is about was there; otherwise the check proved nothing."""
    accounts = account(rig.settings).values()
    outcomes = sum((one.outcomes for one in accounts), Counter())
    from_limit_ms = sum((one.from_limit_ms for one in accounts), Counter())
    (sent,) = (traffic.sent for traffic in rig.traffics)
    if name == "duplicates":
        assert outcomes["duplicate"] == sent.copies.total() > 50
    elif name == "late to the millisecond":
        assert all(from_limit_ms[at] > 0 for at in (-1, 0, 1)), from_limit_ms
    elif name == "clocks an hour off":
        assert sent.bad["time_out_of_range"] > 20
        assert outcomes["late"] > 20
    elif name == "unknown experiments":
        assert outcomes["unknown_experiment"] > 50
    elif name == "poison":
        reasons = {"invalid_json", "invalid_field", "too_large", "empty_value", "unknown_arm"}
        assert reasons | {"missing_key", "key_mismatch"} <= set(sent.bad)
