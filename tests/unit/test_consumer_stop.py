"""Stopping the consumer's thread while its fetcher pauses after a failed fetch."""

from __future__ import annotations

import asyncio

from stream_xp.adapters.faust_transport import BlockConsumerThread


class PausingConsumer:
    """Does what aiokafka's consumer does when `close` cancels a fetch that stands in its pause."""

    def __init__(self):
        self.closed = False
        self._client = self

    async def stop(self):
        pause = asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        pause.cancel()
        await pause

    async def close(self):
        self.closed = True


def test_a_fetch_that_pauses_does_not_break_the_stop():
    consumer = PausingConsumer()
    thread = BlockConsumerThread.__new__(BlockConsumerThread)
    thread._method_queue = None
    thread._consumer = consumer
    asyncio.run(thread.on_thread_stop())
    assert consumer.closed
