"""The loop under the simulated cluster: what is killed does nothing more, not even in a `finally`."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass
from inspect import CORO_CREATED, getcoroutinestate
from types import CoroutineType

from tests.simulation.cluster.loop import VirtualLoop


@dataclass(eq=False)
class Owner:
    """A node, as far as the loop looks at it."""

    alive: bool = True
    paused: bool = False


async def waiting(done: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        done.append("finally")
        await asyncio.gather(ending(done), asyncio.create_task(ending(done)))
        done.append("waited")


async def ending(done: list[str]) -> None:
    done.append("a task of the finally")


def test_what_a_finally_of_a_dead_node_begins_never_runs() -> None:
    loop, dead, other = VirtualLoop(), Owner(), Owner()
    done: list[str] = []
    loop.start(waiting(done), dead)
    bystander = loop.start(asyncio.sleep(0, "lives"), other)
    loop.settle()
    dead.alive = False
    loop.discard(dead)
    loop.settle()
    assert done == ["finally"]
    assert bystander.result() == "lives"
    left = [one for one in gc.get_objects() if isinstance(one, CoroutineType)]
    assert [one.__qualname__ for one in left if getcoroutinestate(one) == CORO_CREATED] == []


def test_a_paused_node_goes_on_where_it_stood() -> None:
    loop, node = VirtualLoop(), Owner()
    task = loop.start(asyncio.sleep(0.01, "done"), node)
    loop.settle()
    node.paused = True
    loop.advance(20)
    assert not task.done()
    node.paused = False
    loop.resume(node)
    loop.settle()
    assert task.result() == "done"
