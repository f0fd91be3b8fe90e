"""Eight tunings in one pass over a cache, against the same eight one by one, and against one.

Two learning rates and four seeds of SHERL on MiniLM and CoLA, as somebody types them: eight
commands, one command that trains them one after another, and one command that trains them in one
pass; beside them one tuning alone. All take turns. On a processor the adapters have to be the same
byte for byte; on a GPU, where sums are rounded otherwise in one pass, the largest difference of a
weight is printed::

    python benchmarks/together.py
    python benchmarks/together.py --toy      # few rows, in seconds: does it still work?
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from sherl_pipe.pipeline.machine import pick_device
from torch import Tensor

from cached import extracted, sherl_pipe
from glue_tasks import BATCH_SIZE, load_task
from minilm_glue import EPOCHS, REPOSITORY
from records import markdown
from training import load_tokenizer, machine

RATES, SEEDS = ("0.003", "0.006"), ("0", "1", "2", "3")


def commands(cache: Path, out: Path, size: int, seeds: Sequence[str]) -> list[list[str]]:
    """`sherl-pipe tune` for all tunings, `size` of them per command."""
    fixed = ["tune", "--cache", str(cache), "--epochs", str(EPOCHS)]
    fixed += ["--batch-size", str(BATCH_SIZE), "--out", str(out)]
    if size == 1:
        each = product(RATES, seeds)
        return [[*fixed, "--lr", rate, "--seed", seed] for rate, seed in each]
    options = [part for rate in RATES for part in ("--lr", rate)]
    options += [part for seed in seeds for part in ("--seed", seed)]
    return [[*fixed, *options]]


ONE, EIGHT = "one tuning", "eight commands"
# How many tunings a command is given, and how many of them share a pass.
WAYS = {
    ONE: (1, "1"),
    EIGHT: (1, "1"),
    "one command, one after another (`--together 1`)": (8, "1"),
    "one command, in one pass (`--together 8`)": (8, "8"),
}


def adapters(out: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of every adapter."""
    return {
        str(file.relative_to(out)): load_file(file)
        for file in sorted(out.rglob("adapter.safetensors"))
    }


def difference(
    first: Mapping[str, Mapping[str, Tensor]], second: Mapping[str, Mapping[str, Tensor]]
) -> float:
    """The largest one of two weights. Exits for other adapters or other weights."""
    if {name: each.keys() for name, each in first.items()} != {
        name: each.keys() for name, each in second.items()
    }:
        sys.exit("the ways left different adapters")
    pairs = [(first[name][key], second[name][key]) for name in first for key in first[name]]
    return max(float((one - other).abs().max()) for one, other in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--toy", action="store_true", help="few rows, one round, one seed")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "glue")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = pick_device("auto")
    rows = 60 if options.toy else options.rows
    seeds = SEEDS[:1] if options.toy else SEEDS
    task = load_task(options.data, "cola", "final", load_tokenizer(), rows)
    cache = extracted(task, "int8")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found, largest = None, 0.0
    for _ in range(1 if options.toy else options.rounds):
        for way, (size, together) in WAYS.items():
            with tempfile.TemporaryDirectory() as out:
                these = commands(cache, Path(out), size, seeds)[: 1 if way == ONE else None]
                begun = time.perf_counter()
                for command in these:
                    sherl_pipe([*command, "--together", together])
                seconds[way].append(time.perf_counter() - begun)
                if way != ONE:
                    left = adapters(Path(out))
                    found = found or left
                    largest = max(largest, difference(found, left))
    if device.type == "cpu" and largest:
        sys.exit(f"the adapters differ by {largest:.2g}")
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    print(f"{rows:,} training rows, {EPOCHS} epochs")
    lines = [
        [way, f"{each:.1f}", f"{each / medians[EIGHT]:.2f}", f"{each / medians[ONE]:.2f}"]
        for way, each in medians.items()
    ]
    print(f"{machine(device, options.threads)}; weights differ by {largest:.2g} at most\n")
    header = ["tunings of SHERL, CoLA", "seconds", "of eight commands", "of one tuning"]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
