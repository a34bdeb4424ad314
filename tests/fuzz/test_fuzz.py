"""Mutated records through every decoder: no crash, and one outcome for each (`python -m tests.fuzz` runs a million)."""

from __future__ import annotations

import os

import pytest
from fuzzing import DECIDED, SHARES, Fuzz

from stream_xp.errors import Reason

# A loaded machine may take minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEED = int(os.environ.get("STREAM_XP_TEST_FUZZ_SEED", "1"))
RECORDS = 50_000


def test_mutated_records_end_no_reader_and_lose_no_count() -> None:
    fuzz = Fuzz(SEED, oracle=True)
    fuzz.run(RECORDS)
    assert_every_record_has_one_outcome(fuzz)
    assert_every_reason_and_every_outcome_came_about(fuzz)
    assert_own_records_are_refused_and_accepted(fuzz)


def assert_every_record_has_one_outcome(fuzz: Fuzz) -> None:
    accounts = fuzz.accounts()
    for topic, account in accounts.items():
        assert account.records == sum(account.became.values())
        assert account.records == pytest.approx(RECORDS * SHARES[topic], abs=1)


def assert_every_reason_and_every_outcome_came_about(fuzz: Fuzz) -> None:
    """Were the mutations too tame or too wild, the fuzzing would say nothing."""
    assert set(fuzz.events.reasons) == set(Reason)
    counted = {topic: fuzz.events.accounts[topic].became for topic in ("exposures", "rewards")}
    for became in counted.values():
        assert became["counted"] > 100
        assert became["duplicate"] > 10
        assert became["late"] > 10
        assert became["dead_lettered"] > 1000
    assert counted["exposures"]["crossover"] > 10
    assert counted["rewards"]["waiting"] > 10


def assert_own_records_are_refused_and_accepted(fuzz: Fuzz) -> None:
    for topic in (*DECIDED, "deadletter"):
        became = fuzz.own[topic].account.became
        assert became["refused"] > 50, topic
        assert became["accepted"] > 20, topic
    assert fuzz.specs.account.became["accepted"] > 20
    assert fuzz.own["state"].account.became["passed over"] > 50
