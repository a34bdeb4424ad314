"""`stream-xp` as a child that does something terrible to itself at a chosen moment. For the chaos tests only.

    python tests/chaos/child.py --at "after signals:1" --then kill -- worker

The service has no switch for any of this: the faults are put in from outside, by replacing functions of the
running program.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from stream_xp.adapters.faust_transport import BlockConsumer
from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.cli import main
from stream_xp.services.decide import service as decide
from stream_xp.services.ingest import Ingest


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of one that is there; a name that has gone must not go unnoticed."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, function)


_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Moment:
    """Counts how often an effect was reached, and strikes at the one that was asked for.

    Effects: `chunk` and `manifest` of a snapshot, `stats`, `deadletter`, `results`, `signals`, `experiments` (a
    weight epoch), `config`, each before or after the broker has it; `commit` of offsets; `evaluated`, when tests are
    computed and nothing of them is written.
    """

    def __init__(self, at: str, then: str) -> None:
        self._effect, _, count = at.rpartition(":")
        self._wanted = int(count)
        self._then = then
        self._reached: Counter[str] = Counter()

    def reach(self, effect: str) -> None:
        self._reached[effect] += 1
        if effect == self._effect and self._reached[effect] == self._wanted:
            os.kill(os.getpid(), _SIGNALS[self._then])

    def install(self) -> None:
        self._install_writes()
        self._around(BlockConsumer, "_commit", "commit")
        evaluate_all = vars(decide)["evaluate_all"]

        def evaluated(*arguments: Any) -> Any:
            found = evaluate_all(*arguments)
            if found:
                self.reach("after evaluated")
            return found

        _replace(decide, "evaluate_all", evaluated)

    def _install_writes(self) -> None:
        """A write to the state topic is a chunk or a manifest, which its key tells."""
        keys: dict[str, bytes] = {}
        send, durable = LogWriter.send, LogWriter.durable

        async def note_key(writer: LogWriter, topic: str, **arguments: Any) -> Any:
            keys[topic] = arguments["key"]
            return await send(writer, topic, **arguments)

        async def around(writer: LogWriter, sent: Any, topic: str) -> None:
            name = topic.rpartition(".")[2]
            if name == "state":
                name = "chunk" if keys[topic].count(b"/") > 1 else "manifest"
            if sent:
                self.reach(f"before {name}")
            await durable(writer, sent, topic)
            if sent:
                self.reach(f"after {name}")

        _replace(LogWriter, "send", note_key)
        _replace(LogWriter, "durable", around)

    def _around(self, owner: type, method: str, effect: str) -> None:
        original: Callable[..., Awaitable[Any]] = getattr(owner, method)

        async def around(*arguments: Any, **named: Any) -> Any:
            self.reach(f"before {effect}")
            found = await original(*arguments, **named)
            self.reach(f"after {effect}")
            return found

        _replace(owner, method, around)


def acknowledge_first() -> None:
    """Commit what was applied before any snapshot covers it, and go on where the group has committed.

    This is how a consumer with state in memory is usually written. It loses what was applied between the last
    snapshot and the crash, and the chaos suite must find that.
    """
    apply = Ingest._apply

    async def apply_and_acknowledge(self: Ingest, task: Any, topic: str, block: Any, span: Any) -> None:
        await apply(self, task, topic, block, span)
        self._source.durable(self._settings.topic(topic), task.state.partition, task.next_offset(topic))

    async def go_on_at_the_commit(self: Ingest, task: Any, topic: str, found: int) -> None:
        _stand_at(task, topic, found)
        await self._source.seek(self._settings.topic(topic), task.state.partition, found)

    _replace(Ingest, "_apply", apply_and_acknowledge)
    _replace(Ingest, "_seek_back", go_on_at_the_commit)


def apply_again() -> None:
    """After loading a snapshot, forget how far it had come, as if its offsets were not in the same record."""
    load = Ingest._load

    async def load_and_forget(self: Ingest, partition: int, span: Any) -> Any:
        task = await load(self, partition, span)
        for topic, start in task.starts.items():
            if task.next_offset(topic) > start:
                _stand_at(task, topic, max(start, task.next_offset(topic) - 40))
        return task

    _replace(Ingest, "_load", load_and_forget)


def _stand_at(task: Any, topic: str, next_offset: int) -> None:
    held = task.state.progress[topic]
    first = next_offset if held.first_offset is None else held.first_offset
    task.state.progress[topic] = msgspec.structs.replace(
        held, first_offset=first, applied_offset=next_offset - 1
    )


def apply_slowly(pause_ms: float) -> None:
    """Take so long for every block, without keeping the event loop from anything else."""
    on_block = Ingest.on_block

    async def slowly(self: Ingest, block: Any) -> None:
        await asyncio.sleep(pause_ms / 1000)
        await on_block(self, block)

    _replace(Ingest, "on_block", slowly)


def run() -> None:
    """Read the faults, put them in, and be `stream-xp` with what is left of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", help="an effect and which one of its kind: 'after stats:3'")
    parser.add_argument("--then", choices=sorted(_SIGNALS), default="kill")
    parser.add_argument("--acknowledge-first", action="store_true")
    parser.add_argument("--apply-again", action="store_true")
    parser.add_argument("--apply-slowly-ms", type=float)
    parser.add_argument("--file-bytes", type=int, help="longest file that may be written")
    parser.add_argument("command", nargs="+")
    chosen = parser.parse_args()
    if chosen.at:
        Moment(chosen.at, chosen.then).install()
    if chosen.acknowledge_first:
        acknowledge_first()
    if chosen.apply_again:
        apply_again()
    if chosen.apply_slowly_ms:
        apply_slowly(chosen.apply_slowly_ms)
    if chosen.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (chosen.file_bytes, chosen.file_bytes))
    main(chosen.command, prog_name="stream-xp")


if __name__ == "__main__":
    run()
