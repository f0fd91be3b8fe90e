"""Host memory of several workers that train from one cache, against that of one.

Each worker is a process with a backbone, a side network and all features of the training rows; all
of them are measured at the same moment, after each has touched every row. A page that several
processes map counts once (PSS, proportional set size)::

    python benchmarks/shared_memory.py                  # 3 GiB of features
    python benchmarks/shared_memory.py --mib 64         # does it still work?
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from records import markdown

WORKERS = 4
SHARDS = 64


def pss() -> int:
    """Bytes of this process, shared pages divided by those who map them."""
    with open("/proc/self/smaps_rollup") as file:  # noqa: PTH123 - no plain file
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))


def work(mib: int, *, shared: bool) -> None:
    """A worker: its features, said when they are there, and its memory when asked for."""
    import torch
    from sherl_pipe.stages.backbone import load_backbone
    from sherl_pipe.stages.commons import Commons
    from sherl_pipe.stages.shelf import Form, Room, Shelf, arrivals

    backbone = load_backbone("demo")
    rows = np.full(SHARDS, (mib << 20) // (SHARDS * 1024), np.int64)
    forms = {"hidden": Form(1, 1024, 0, rows)}

    def fill(shard: int, room: Room) -> None:
        room["hidden"][0][:] = shard

    commons = Commons(f"benchmark-{os.getppid()}", forms) if shared else None
    shelf = Shelf(forms, torch.device("cpu"), commons=commons)
    for shard in arrivals(shelf, [[number] for number in range(SHARDS)], fill, 1):
        where = shelf.starts("hidden", np.array([shard]))[0] + np.arange(rows[shard])
        codes, _ = shelf.rows("hidden", where, torch.device("cpu"))
        if not bool((codes == shard).all()):
            sys.exit(f"shard {shard} holds other rows")
    for _ in sys.stdin:
        print(json.dumps({"pss": pss(), "parameters": backbone.parameters}), flush=True)


def measure(workers: int, mib: int, *, shared: bool) -> int:
    """Bytes of so many workers together."""
    line = [sys.executable, __file__, "--work", "--mib", str(mib), *["--shared"] * shared]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    each = [subprocess.Popen(line, **pipes) for _ in range(workers)]  # type: ignore[call-overload]
    # Once to know that all are there, once more to measure them beside one another.
    for _ in range(2):
        found = []
        for process in each:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in each:
            found.append(json.loads(process.stdout.readline())["pss"])
    for process in each:
        process.stdin.close()
        process.wait()
    return sum(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=3072, help="of features")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        work(options.mib, shared=options.shared)
        return
    lines = []
    one = measure(1, options.mib, shared=True)
    for what, count, shared in (
        ("one worker", 1, True),
        (f"{WORKERS} workers, features shared", WORKERS, True),
    ):
        size = one if count == 1 else measure(count, options.mib, shared=shared)
        lines.append([what, f"{size / 2**20:,.0f}", f"{size / one:.2f}"])
    print(markdown([f"{options.mib:,} MiB of features", "MiB (PSS)", "ratio"], lines))


if __name__ == "__main__":
    main()
