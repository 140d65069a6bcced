"""Ends runs of tiny recipes at their writes, runs them again, and says what was lost, left over or told wrong.

For every recipe (windows, pruning, recovery) a run is ended before its first, ..., last write below the working folder,
the opening of the run folder included, by SIGKILL, SIGTERM and SIGINT in turn; then it is run to its end, and every
artifact is compared with an unbroken run's, bit for bit but for times. Children are forks of one process that has
imported everything, on one thread, with 20 s and 2 GiB each.

    python scripts/kill_sweep.py --kills 100 --out kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

# Read when libraries load: a process with more than one thread cannot be forked safely.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> int:
    """Sweep; 1 where something was not as promised."""
    from tests.forkserver import ForkServer
    from tests.kills import PRELOAD, RECIPES, SIGNALS, Bed, points

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=70, help="of each recipe, spread over all of its writes")
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds of one run")
    parser.add_argument("--first", type=int, default=0, help="which signal the first kill is: 0, 1 or 2")
    parser.add_argument("--out", type=Path, help="a JSON file with every case")
    options = parser.parse_args()
    cases = []
    with ForkServer(PRELOAD) as server, tempfile.TemporaryDirectory(prefix="kill-sweep-") as scratch:
        for kind in options.recipes:
            started = time.monotonic()
            bed = Bed(Path(scratch, kind), kind, server, timeout=options.timeout)
            wanted, writes = bed.whole()
            done = []
            for place, number in enumerate(points(writes, options.kills), options.first):
                done.append(bed.case(number, SIGNALS[place % len(SIGNALS)], wanted))
                for problem in done[-1].problems:
                    print(f"{kind}: write {number}, {done[-1].signal}: {problem}", flush=True)
            ends = Counter(f"{case.signal} {case.code}" for case in done)
            bad = sum(bool(case.problems) for case in done)
            told = f"{writes} writes, {len(done)} kills, {bad} with problems, {time.monotonic() - started:.0f} s"
            print(f"{kind}: {told}; " + ", ".join(f"{name}: {count}" for name, count in ends.items()), flush=True)
            cases += done
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n", encoding="utf-8")
    return int(any(case.problems for case in cases))


if __name__ == "__main__":
    sys.exit(main())
