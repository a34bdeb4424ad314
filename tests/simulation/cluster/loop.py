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
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

OWNER: contextvars.ContextVar[Any] = contextvars.ContextVar("OWNER", default=None)
"""The node whose code runs: whatever it schedules belongs to it."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """What asyncio's tasks, futures, locks and timeouts need of a loop, and nothing else."""

    def __init__(self) -> None:
        self.now_ms = 0
        self._ready: deque[tuple[asyncio.Handle, Any]] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Any]] = []
        self._scheduled = 0
        self._held: dict[Any, list[tuple[asyncio.Handle, Any]]] = {}
        self._tasks: dict[Any, list[asyncio.Task[Any]]] = {}

    # --- what the world does with it ------------------------------------------------------------------------

    def settle(self) -> None:
        """Run callbacks until none is left; those of a paused node wait, those of a dead one are dropped."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                handle, owner = self._ready.popleft()
                if handle.cancelled() or (owner is not None and not owner.alive):
                    continue
                if owner is not None and owner.paused:
                    self._held.setdefault(owner, []).append((handle, owner))
                else:
                    handle._run()
        finally:
            asyncio._set_running_loop(outer)

    def advance(self, step_ms: int) -> None:
        """Move time on, timer by timer."""
        until_ms = self.now_ms + step_ms
        while self._timers and self._timers[0][0] * 1000 <= until_ms:
            when_s, _, handle, owner = heapq.heappop(self._timers)
            if handle.cancelled():
                continue
            self.now_ms = max(self.now_ms, round(when_s * 1000))
            self._ready.append((handle, owner))
            self.settle()
        self.now_ms = until_ms

    def start(self, work: Coroutine[Any, Any, Any], owner: Any = None) -> asyncio.Task[Any]:
        """A task that belongs to a node, from outside of it."""
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        return self.create_task(work, context=context)

    def resume(self, owner: Any) -> None:
        """Let a paused node go on where it stood."""
        self._ready.extend(self._held.pop(owner, []))

    def discard(self, owner: Any) -> None:
        """End all tasks of a node where they stand; the node must count as dead already."""
        self._held.pop(owner, None)
        for task in self._tasks.pop(owner, []):
            if not task.done():
                with contextlib.suppress(Exception):
                    task.get_coro().close()

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
        owner = OWNER.get() if context is None else context.get(OWNER)
        self._tasks.setdefault(owner, []).append(task)
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, OWNER.get() if context is None else context.get(OWNER)))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._scheduled += 1
        owner = OWNER.get() if context is None else context.get(OWNER)
        heapq.heappush(self._timers, (when, self._scheduled, handle, owner))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: a cancelled timer is passed over when its time comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Do nothing: failures that nobody awaits any more are those of writes of nodes that are gone."""
