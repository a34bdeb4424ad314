"""Runs scenarios in parallel; the same seed and number of runs give the same numbers for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing

from stream_xp.services.scenarios.measures import Summary, summary
from stream_xp.services.scenarios.runs import Chunk, RunOutcome
from stream_xp.services.scenarios.scenario import World

CHUNK_RUNS = 100
"""Runs that are simulated together. It is part of the result: random numbers hang on the chunk."""


def simulate(
    worlds: Sequence[World],
    *,
    runs: int,
    seed: int,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Summary]:
    """Simulate every scenario, and sum it up.

    Args:
        worlds: the scenarios.
        runs: of each.
        seed: of every number; scenarios with one seed share their random numbers, not their outcomes.
        processes: 1 runs in this one.
        progress: called with chunks done and chunks in all.
    """
    chunks = [chunk for world in worlds for chunk in _chunks(world, runs, seed)]
    outcomes: list[list[RunOutcome]] = []
    # Closed whatever happens, so that an interrupted run does not go on in the background.
    with closing(_results(chunks, processes)) as results:
        for found in results:
            outcomes.append(found)
            if progress is not None:
                progress(len(outcomes), len(chunks))
    each = len(chunks) // max(1, len(worlds))
    return [
        summary(world, [run for found in outcomes[at * each : (at + 1) * each] for run in found])
        for at, world in enumerate(worlds)
    ]


def _chunks(world: World, runs: int, seed: int) -> list[Chunk]:
    starts = range(0, runs, CHUNK_RUNS)
    return [Chunk(world, number, min(CHUNK_RUNS, runs - start), seed) for number, start in enumerate(starts)]


def _results(chunks: Sequence[Chunk], processes: int) -> Generator[list[RunOutcome], None, None]:
    if processes == 1:
        return (chunk.run() for chunk in chunks)
    return _parallel(chunks, processes)


def _parallel(chunks: Sequence[Chunk], processes: int) -> Generator[list[RunOutcome], None, None]:
    # One thread of linear algebra in each process, or they wait for one another.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_leave_interrupts_to_parent)
    try:
        yield from pool.map(Chunk.run, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
