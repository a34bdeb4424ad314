"""Runs cases in parallel; the same seed gives the same rates for any number of processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from stream_xp.services.calibrate.case import Case, Measurement

# Paths that are simulated together. It is part of the result: random numbers hang on the chunk.
CHUNK_PATHS = 50

Progress: TypeAlias = Callable[[int, int, Measurement | None], None]
Counted: TypeAlias = tuple[int, int, int]  # index of the case, paths that erred, paths that counted


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some paths of one case; all that another process needs."""

    index: int
    case: Case
    number: int
    paths: int
    n: int
    seed: int

    def run(self) -> Counted:
        """Simulate; a warning of numpy is an error here."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                outcome = self.case.simulate(self._generator(), self.paths, self.n)
            except Exception as error:
                # Nothing is handled: a fault of any kind, in another process, is raised with where it arose.
                error.add_note(f"in the calibration of {self.case.name}, chunk {self.number}")
                raise
        counted = np.ones(self.paths, np.bool_) if outcome.counted is None else outcome.counted
        return self.index, int((outcome.erred & counted).sum()), int(counted.sum())

    def _generator(self) -> np.random.Generator:
        digest = hashlib.sha256(self.case.name.encode()).digest()
        words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
        return np.random.default_rng(np.random.SeedSequence([self.seed, *words], spawn_key=(self.number,)))


def measure(
    cases: Sequence[Case],
    *,
    paths: int,
    seed: int,
    jobs: int = 1,
    max_units: int | None = None,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Simulate every case.

    Args:
        cases: with names that differ.
        paths: per case, times its `multiple`.
        seed: of everything; each case and chunk derives its own stream from it.
        jobs: processes; 1 runs in this one.
        max_units: shortens the paths; None leaves them.
        progress: called after each chunk with chunks done, chunks in all, and the case that is done by it.

    Returns:
        One measurement per case, in the order of the cases.

    Raises:
        ValueError: two cases have one name.

    """
    if len({case.name for case in cases}) < len(cases):
        raise ValueError("cases must have names that differ")
    chunks = [chunk for i, case in enumerate(cases) for chunk in _chunks(i, case, paths, seed, max_units)]
    open_chunks = np.bincount([chunk.index for chunk in chunks], minlength=len(cases))
    units = {chunk.index: chunk.n for chunk in chunks}
    sums = np.zeros((len(cases), 2), np.int64)
    # Closed whatever happens, so that an interrupted run does not go on in the background.
    with closing(_results(chunks, jobs)) as results:
        for done, (index, erred, counted) in enumerate(results, start=1):
            sums[index] += erred, counted
            open_chunks[index] -= 1
            if progress is not None:
                whole = None if open_chunks[index] else _measurement(cases[index], sums[index], units[index])
                progress(done, len(chunks), whole)
    return [_measurement(case, sums[i], units[i]) for i, case in enumerate(cases)]


def _chunks(index: int, case: Case, paths: int, seed: int, max_units: int | None) -> Iterator[Chunk]:
    total = paths * case.multiple
    n = case.n if max_units is None else min(case.n, max_units)
    for number, start in enumerate(range(0, total, CHUNK_PATHS)):
        yield Chunk(index, case, number, min(CHUNK_PATHS, total - start), n, seed)


def _measurement(case: Case, sums: np.ndarray, n: int) -> Measurement:
    return Measurement(case, int(sums[0]), int(sums[1]), n)


def _results(chunks: Sequence[Chunk], jobs: int) -> Generator[Counted, None, None]:
    if jobs == 1:
        return (chunk.run() for chunk in chunks)
    return _parallel(chunks, jobs)


def _parallel(chunks: Sequence[Chunk], jobs: int) -> Generator[Counted, None, None]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interrupts_to_parent)
    try:
        futures = [pool.submit(Chunk.run, chunk) for chunk in chunks]
        for future in as_completed(futures):
            yield future.result()
    finally:
        # One call: a second one without cancelling, as at the end of a with, would take the cancelling back.
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
