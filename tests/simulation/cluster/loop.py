"""An event loop without sockets, threads and real time.

Callbacks run in the order in which they were scheduled. Time stands until `advance` moves it. Every callback belongs
to the node that is named by `OWNER` in its context, so that a node can be stopped between any two callbacks (as
SIGSTOP does) or ended there (as SIGKILL does, without a `finally` that could still do something).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any

OWNER: contextvars.ContextVar[Any] = contextvars.ContextVar("OWNER", default=None)
"""The node whose code runs: whatever it schedules belongs to it."""


_KEPT = 64
"""Tasks of a node that are kept before those among them that have ended are let go."""


class Callback:
    """What asyncio's `Handle` is, without what a loop for debugging needs."""

    __slots__ = ("args", "callback", "context", "gone", "owner")

    def __init__(
        self, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.callback, self.args, self.gone = callback, args, False
        self.context = contextvars.copy_context() if context is None else context
        self.owner = self.context.get(OWNER)

    def cancel(self) -> None:
        """Do not run it any more."""
        self.gone = True

    def run(self) -> None:
        """Run it; failures that nobody awaits any more are those of writes of nodes that are gone."""
        with contextlib.suppress(Exception, asyncio.CancelledError):
            self.context.run(self.callback, *self.args)


class VirtualLoop(asyncio.AbstractEventLoop):
    """What asyncio's tasks, futures, locks and timeouts need of a loop, and nothing else."""

    def __init__(self) -> None:
        self.now_ms = 0
        self._ready: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        self._scheduled = 0
        self._held: dict[Any, list[Callback]] = {}
        self._tasks: dict[Any, list[asyncio.Task[Any]]] = {}

    # --- what the world does with it ------------------------------------------------------------------------

    def settle(self) -> None:
        """Run callbacks until none is left; those of a paused node wait, those of a dead one are dropped."""
        if not self._ready:
            return
        with self._running():
            while self._ready:
                callback = self._ready.popleft()
                owner = callback.owner
                if callback.gone or (owner is not None and not owner.alive):
                    continue
                if owner is not None and owner.paused:
                    self._held.setdefault(owner, []).append(callback)
                else:
                    callback.run()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(outer)

    def advance(self, step_ms: int) -> None:
        """Move time on, timer by timer."""
        until_ms = self.now_ms + step_ms
        while self._timers and self._timers[0][0] * 1000 <= until_ms:
            when_s, _, callback = heapq.heappop(self._timers)
            if callback.gone:
                continue
            self.now_ms = max(self.now_ms, round(when_s * 1000))
            self._ready.append(callback)
            self.settle()
        self.now_ms = until_ms

    def leap(self, step_ms: int) -> None:
        """Move time on at once: every timer that is due then fires, in order, but late, as after a long stall."""
        self.now_ms += step_ms
        self.advance(0)

    def start(self, work: Coroutine[Any, Any, Any], owner: Any = None) -> asyncio.Task[Any]:
        """A task that belongs to a node, from outside of it."""
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        return self.create_task(work, context=context)

    def resume(self, owner: Any) -> None:
        """Let a paused node go on where it stood."""
        self._ready.extend(self._held.pop(owner, []))

    def discard(self, owner: Any) -> None:
        """End all tasks of a node where they stand; the node must count as dead already.

        What a `finally` of theirs begins is the dead node's too: it ends before it has run at all.
        """
        self._held.pop(owner, None)
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        with self._running(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            while tasks := self._tasks.pop(owner, []):
                for task in tasks:
                    if not task.done():
                        with contextlib.suppress(Exception):
                            context.run(task.get_coro().close)

    def close(self) -> None:
        """End what is left of all nodes."""
        for owner in list(self._tasks):
            self.discard(owner)

    # --- what asyncio asks of it ----------------------------------------------------------------------------

    def time(self) -> float:
        return self.now_ms / 1000

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        kept = self._tasks.setdefault(OWNER.get() if context is None else context.get(OWNER), [])
        kept.append(task)
        if len(kept) % _KEPT == 0:
            kept[:] = [one for one in kept if not one.done()]
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Callback:
        soon = Callback(callback, args, context)
        self._ready.append(soon)
        return soon

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Callback:
        return self.call_at(self.now_ms / 1000 + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Callback:
        then = Callback(callback, args, context)
        self._scheduled += 1
        heapq.heappush(self._timers, (when, self._scheduled, then))
        return then

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Do nothing: failures that nobody awaits any more are those of writes of nodes that are gone."""


async def wait_for(work: Awaitable[Any], timeout: float | None) -> Any:
    """In place of asyncio's: no task and no timer for what does not wait at all, as most calls here do not."""
    steps = work.__await__()
    try:
        first = next(steps)
    except StopIteration as done:
        return done.value
    async with asyncio.timeout(timeout):
        return await _Rest(steps, first)


class _Rest:
    """What is left to await of something that has begun, and waits for `first`."""

    def __init__(self, steps: Generator[Any, Any, Any], first: Any) -> None:
        self._steps, self._waits = steps, first

    def __await__(self) -> Generator[Any, Any, Any]:
        waits = self._waits
        try:
            while True:
                try:
                    answer = yield waits
                except BaseException as error:
                    waits = self._steps.throw(error)
                else:
                    waits = self._steps.send(answer)
        except StopIteration as done:
            return done.value
