"""Eight tunings in one pass over a cache, against the same eight one by one.

Two learning rates and four seeds of SHERL on MiniLM and CoLA, as somebody types them: eight
commands, one command that trains them one after another, and one command that trains them in one
pass. All take turns; their adapters are compared byte for byte::

    python benchmarks/together.py
    python benchmarks/together.py --toy      # few rows, in seconds: does it still work?
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from cached import extracted, sherl_pipe
from glue_tasks import BATCH_SIZE, load_task
from minilm_glue import EPOCHS, REPOSITORY
from records import markdown
from training import cpu_model, load_tokenizer

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


WAYS = {
    "eight commands": (1, "1"),
    "one command, one after another (`--together 1`)": (8, "1"),
    "one command, in one pass (`--together 8`)": (8, "8"),
}


def adapters(out: Path) -> dict[str, str]:
    """The hash of every adapter's weights."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("adapter.safetensors"))
    }


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
    rows = 60 if options.toy else options.rows
    seeds = SEEDS[:1] if options.toy else SEEDS
    task = load_task(options.data, "cola", "final", load_tokenizer(), rows)
    cache = extracted(task, "int8")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found = []
    for _ in range(1 if options.toy else options.rounds):
        for way, (size, together) in WAYS.items():
            with tempfile.TemporaryDirectory() as out:
                begun = time.perf_counter()
                for command in commands(cache, Path(out), size, seeds):
                    sherl_pipe([*command, "--together", together])
                seconds[way].append(time.perf_counter() - begun)
                found.append(adapters(Path(out)))
    if any(each != found[0] for each in found) or len(found[0]) != len(RATES) * len(seeds):
        sys.exit("the adapters differ")
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    base = medians["eight commands"]
    print(f"{rows:,} training rows, {EPOCHS} epochs")
    lines = [[way, f"{found:.1f}", f"{found / base:.2f}"] for way, found in medians.items()]
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}\n")
    print(markdown(["eight tunings of SHERL, CoLA", "seconds", "ratio"], lines))


if __name__ == "__main__":
    main()
