"""Hypothesis chooses what happens in the cluster, and shrinks what breaks it to a few steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.simulation.cluster.schedule import Schedule, run_out
from tests.simulation.cluster.verdict import Verdict
from tests.simulation.cluster.world import SOURCES, World, installed

_TURNS = st.integers(1, 12)


class Cluster(RuleBasedStateMachine):
    """The happenings of a schedule as rules; invariants after each, the verdict at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._context = contextlib.ExitStack()
        self._context.enter_context(installed())
        self._schedule: Schedule | None = None

    @property
    def world(self) -> World:
        assert self._schedule is not None
        return self._schedule.world

    @initialize(seed=st.integers(0, 10_000), nodes=st.integers(1, 3), orders=st.booleans())
    def start(self, seed: int, nodes: int, orders: bool) -> None:
        self._schedule = Schedule(seed, orders=orders)
        for _ in range(nodes):
            self.world.spawn()
        self._do(self._schedule.release, 30)

    def _do(self, happening: Callable[[], Any], times: int = 1) -> None:
        for _ in range(times):
            happening()
            self.world.loop.settle()
            self.world.watch.check()

    def _among(self, *happenings: str, times: int) -> None:
        """Some steps, each one of these by the world's own chance."""
        for _ in range(times):
            self._do(getattr(self._schedule, self.world.rng.choice(happenings)))

    @rule(
        topic=st.sampled_from(SOURCES),
        kind=st.sampled_from([None, "repeat", "late", "early", "poison"]),
        n=_TURNS,
    )
    def produce(self, topic: str, kind: str | None, n: int) -> None:
        self._do(lambda: self.world.produce(topic, kind=kind), n)

    @rule(n=_TURNS)
    def poll(self, n: int) -> None:
        self._among("fetch", "release", "release", times=4 * n)

    @rule(n=_TURNS)
    def flush(self, n: int) -> None:
        self._do(self._schedule.flush)  # type: ignore[union-attr]
        self._among("write", "release", times=4 * n)

    @rule(n=_TURNS)
    def evaluate(self, n: int) -> None:
        self._do(self._schedule.evaluate)  # type: ignore[union-attr]
        self._among("write", "release", times=4 * n)

    @rule(n=_TURNS)
    def answer(self, n: int) -> None:
        self._among("write", "release", "orphan", times=3 * n)

    @rule(
        how=st.sampled_from(["commit", "refuse", "displace", "starve", "feed", "pass_time", "long_silence"])
    )
    def disturb(self, how: str) -> None:
        self._do(getattr(self._schedule, how))

    @rule(how=st.sampled_from(["crash", "stop", "pause", "wake", "expire", "expire_dead", "spawn"]))
    def processes(self, how: str) -> None:
        self._do(getattr(self._schedule, how))

    @rule(n=_TURNS)
    def rebalance(self, n: int) -> None:
        self._do(self._schedule.rebalance)  # type: ignore[union-attr]
        self._among("tell", "expire_dead", "release", "write", times=3 * n)

    @rule(how=st.sampled_from(["compact", "truncate", "cut", "spoil"]))
    def storage(self, how: str) -> None:
        self._do(getattr(self._schedule, how))

    @rule(at=st.integers(0, 10))
    def change_config(self, at: int) -> None:
        self._do(lambda: self.world.change_specs(at))

    @rule(n=_TURNS)
    def order(self, n: int) -> None:
        self._among("order", "evaluate", "release", "write", times=n)

    @invariant()
    def nothing_is_broken(self) -> None:
        if self._schedule is not None:
            self.world.watch.check()

    def teardown(self) -> None:
        try:
            if self._schedule is not None:
                whole = run_out(self.world)
                Verdict(self.world).give(whole=whole)
        finally:
            if self._schedule is not None:
                self.world.close()
            self._context.close()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=6,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
