"""A TCP proxy on loopback that does to a connection what networks do: slow, late, cut up, silent, cut off.

A broker tells its clients its own address, and they would go around a proxy. `Proxy` knows nothing of Kafka: it is for
a broker that advertises the proxy's port. `RewritingProxy` is for every other broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

READ_BYTES = 65_536
_HELD_PIECES = 64
DEADLINE_S = 240.0
"""It ends a test that hangs."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How bytes travel.

    Attributes:
        latency_ms: how long each piece is on its way.
        jitter_ms: up to so much longer, drawn for each piece; pieces keep their order.
        slice_bytes: longest piece; 0 leaves pieces as they were read.
        bytes_per_s: limit of each direction of each connection; 0 is none.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    slice_bytes: int = 0
    bytes_per_s: float = 0.0


class Proxy:
    """One port on loopback that leads to another one; its port is known before the upstream exists.

    Args:
        upstream_port: where connections lead.
        seed: of the jitter.
    """

    def __init__(self, upstream_port: int = 0, *, seed: int = 0) -> None:
        self.upstream_host = "127.0.0.1"
        self.upstream_port = upstream_port
        self.shape = Shape()
        self._random = random.Random(seed)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._admits = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, sock=self._socket))
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """The address for clients."""
        return f"127.0.0.1:{self.port}"

    def stall(self) -> None:
        """Keep every byte to itself; connections stay open, and new ones are taken: half-open."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def resume(self) -> None:
        """Pass on what was kept, and go on."""
        self._loop.call_soon_threadsafe(self._flows.set)

    def reset(self) -> int:
        """Cut all connections that are open now; how many there were."""
        return self._do(self._reset())

    def refuse(self) -> None:
        """Cut every new connection at once."""
        self._admits = False

    def heal(self) -> None:
        """Be a proxy that changes nothing."""
        self.shape, self._admits = Shape(), True
        self.resume()

    def _do(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=DEADLINE_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._admits:
            writer.transport.abort()
            return
        task: Any = asyncio.current_task()
        self._tasks.add(task)
        opened = [writer]
        try:
            to_upstream, from_upstream = await asyncio.open_connection(self.upstream_host, self.upstream_port)
            opened.append(from_upstream)
            self._writers.update(opened)
            await asyncio.gather(self._pass(reader, from_upstream), self._pass(to_upstream, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for one in opened:
                one.transport.abort()
            self._writers.difference_update(opened)
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read pieces into a short queue and write each when it is due; when either side ends, both end."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD_PIECES)
        write = asyncio.create_task(self._write(pieces, writer))
        try:
            with contextlib.suppress(OSError):
                while data := await self._read(reader):
                    for piece in self._cut(data):
                        await pieces.put((self._due_s(), piece))
            if not write.done():
                await pieces.put((0.0, b""))
            await write
        finally:
            write.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """Return what has come, nothing at the end."""
        return await reader.read(READ_BYTES)

    def _cut(self, data: bytes) -> list[bytes]:
        size = self.shape.slice_bytes or len(data)
        return [data[at : at + size] for at in range(0, len(data), size)]

    def _due_s(self) -> float:
        shape = self.shape
        delay_ms = shape.latency_ms + shape.jitter_ms * self._random.random()
        return self._loop.time() + delay_ms / 1000

    async def _write(self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due_s, piece = await pieces.get()
            if not piece:
                # The other side goes on until it ends too.
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            await asyncio.sleep(max(0.0, due_s - self._loop.time()))
            await self._flows.wait()
            writer.write(piece)
            await writer.drain()
            if self.shape.bytes_per_s:
                await asyncio.sleep(len(piece) / self.shape.bytes_per_s)

    async def _reset(self) -> int:
        open_now = list(self._writers)
        for writer in open_now:
            connection = writer.get_extra_info("socket")
            # Lingering for no time makes the kernel send a reset, not an orderly end.
            with contextlib.suppress(OSError, AttributeError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        return len(open_now) // 2

    async def _close(self) -> None:
        self._server.close()
        await self._reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class RewritingProxy(Proxy):
    """A proxy in front of the Kafka broker at `upstream`, that puts its own port in the place of the broker's.

    The port stands in the broker's answers as four bytes after the host; so answers are passed on whole.
    """

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        host, port = upstream.rsplit(":", 1)
        super().__init__(int(port), seed=seed)
        self.upstream_host = host
        self._own, self._told = (host.encode() + at.to_bytes(4) for at in (self.port, self.upstream_port))

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        try:
            size = await reader.readexactly(4)
            frame = await reader.readexactly(int.from_bytes(size))
        except asyncio.IncompleteReadError:
            return b""
        return size + frame.replace(self._told, self._own)
