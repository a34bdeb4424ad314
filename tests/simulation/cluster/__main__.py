"""Run schedules: `python -m tests.simulation.cluster --schedules 20000`, or one again: `--seed N --trace`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.cluster.schedule import Schedule
from tests.simulation.cluster.watch import BrokenError
from tests.simulation.cluster.world import installed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.cluster", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--schedules", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="print what happened")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first fault")
    given = parser.parse_args()
    began, broken, records = time.monotonic(), 0, 0
    with installed():
        for seed in range(given.seed, given.seed + given.schedules):
            trace: list[str] | None = [] if given.trace else None
            schedule = Schedule(seed, trace=trace)
            try:
                schedule.run()
            except BrokenError as error:
                broken += 1
                print(str(error)[:2000], flush=True)
            if trace:
                print("\n".join(trace))
            records += sum(schedule.world.log.topics[name][0].end for name in ("xp.exposures", "xp.rewards"))
            if broken and not given.keep_going:
                break
    spent_s = time.monotonic() - began
    print(
        f"{seed + 1 - given.seed} schedules, {broken} broken, {records} records of first partitions", end=", "
    )
    print(f"{spent_s:.1f} s, {60 * (seed + 1 - given.seed) / spent_s:.0f} schedules a minute")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
