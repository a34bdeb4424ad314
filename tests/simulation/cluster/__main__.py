"""Run schedules: `python -m tests.simulation.cluster --schedules 20000`; one again, with what happens: `--trace`.

How long they are (`--steps`) is a matter of what is looked for. Of the mutants, most are found as often a minute by 20
steps as by 150; those that need several things to meet, by 150 steps several times as often as by 60, and not by 20.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

from tests.simulation.cluster.batches import batches
from tests.simulation.cluster.schedule import Kind
from tests.simulation.cluster.watch import BrokenError
from tests.simulation.cluster.world import installed


def traced(seed: int, kind: Kind) -> bool:
    """Run one schedule and print what happens; whether everything holds."""
    lines: list[str] = []
    with installed():
        try:
            kind.schedule(seed, trace=lines).run()
        except BrokenError as error:
            lines.append(str(error)[:2000])
            return False
        finally:
            print("\n".join(lines))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--schedules", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, help="of each schedule; drawn from 60, 150 and 300 where it is not given"
    )
    either = argparse.BooleanOptionalAction
    parser.add_argument("--hangs", action=either, help="writes hang; by the seed where it is not said")
    parser.add_argument("--orders", action=either, help="people order things; by the seed too")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="default: one for each core"
    )
    parser.add_argument(
        "--trace", action="store_true", help="print what happens in the one schedule of --seed"
    )
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first fault")
    parser.add_argument("--minutes", type=float, help="begin no more schedules after so long")
    given = parser.parse_args()
    kind = Kind(steps=given.steps, hangs=given.hangs, orders=given.orders)
    if given.trace:
        return 0 if traced(given.seed, kind) else 1
    began_s, schedules, broken, cpu_s, counts = time.monotonic(), 0, 0, 0.0, Counter[str]()
    seeds = range(given.seed, given.seed + given.schedules)
    for batch in batches(seeds, kind, processes=given.processes):
        schedules, cpu_s = schedules + batch.schedules, cpu_s + batch.cpu_s
        broken += len(batch.broken)
        counts.update(batch.counts)
        for error in batch.broken:
            print(error, flush=True)
        spent_s = time.monotonic() - began_s
        if (broken and not given.keep_going) or (given.minutes and spent_s > 60 * given.minutes):
            break
    for what, times in sorted(counts.items()):
        print(f"{times:9d} {what}")
    print(
        f"{schedules} schedules, {broken} broken, {spent_s:.1f} s: {60 * schedules / spent_s:.0f} a minute, "
        f"{60 * schedules / cpu_s:.0f} a minute of processor time"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
