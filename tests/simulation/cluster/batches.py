"""Many schedules, some at a time in each of several processes.

A module of its own: a process that is begun anew cannot import what `python -m` runs as its main module.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import NamedTuple

from tests.simulation.cluster.schedule import Kind
from tests.simulation.cluster.watch import BrokenError
from tests.simulation.cluster.world import installed

_TOGETHER = 25
"""Schedules that a process runs before it says what came of them, and collects what they leave."""


class Batch(NamedTuple):
    """What came of some schedules."""

    schedules: int
    broken: list[str]
    counts: Counter[str]
    cpu_s: float


def run_batch(seeds: range, kind: Kind) -> Batch:
    """Run some schedules, without a collection of garbage in their midst.

    What the process held before is never looked at again: it is most of what a collection would go through.
    """
    gc.disable()
    gc.freeze()
    began_s, broken, counts = time.process_time(), [], Counter[str]()
    with installed():
        for seed in seeds:
            schedule = kind.schedule(seed)
            try:
                schedule.run()
            except BrokenError as error:
                broken.append(str(error)[:2000])
            counts.update(schedule.counts())
    gc.collect()
    return Batch(len(seeds), broken, counts, time.process_time() - began_s)


def batches(seeds: range, kind: Kind, *, processes: int) -> Iterator[Batch]:
    """What came of all schedules, as it comes."""
    run = partial(run_batch, kind=kind)
    parts = [seeds[at : at + _TOGETHER] for at in range(0, len(seeds), _TOGETHER)]
    if processes == 1 or len(parts) == 1:
        yield from map(run, parts)
        return
    pool = ProcessPoolExecutor(min(processes, len(parts)), mp_context=multiprocessing.get_context("spawn"))
    try:
        for done in as_completed([pool.submit(run, part) for part in parts]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)
