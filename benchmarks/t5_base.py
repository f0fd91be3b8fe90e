"""What a training step costs: t5-base, from the cache and otherwise, side by side in one run.

T5-base has random weights, which changes no cost; texts are CoLA's and SST-2's, cut by a real
wordpiece vocabulary. Every row runs in a process of its own, one after another; a row's figure is
the median over the rounds of the median of its steps::

    python benchmarks/t5_base.py run
    python benchmarks/t5_base.py run --toy        # a small model, in seconds: does it still work?
    python benchmarks/t5_base.py table
    python benchmarks/t5_base.py feed             # ready tensors and the cache, in turns
    python benchmarks/t5_base.py profile          # where a cached step spends its time
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from sherl_pipe.pipeline.machine import pick_device

from cached import sherl_pipe
from records import Record, markdown, read_records
from t5_rows import BATCH, CODECS, REPOSITORY, Bench, cached, feeding, rows_on
from training import machine

LOG = logging.getLogger("t5_base")
RESULTS = REPOSITORY / "benchmarks" / "results" / "t5_base.jsonl"
EPOCHS, TUNINGS = 20, 8


def measure(name: str, bench: Bench, threads: int) -> Record:
    """One row; called in a process of its own."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Every row needs it; loaded now, it is no part of any row's memory.
    importlib.import_module("transformers.models.t5.modeling_t5")
    return rows_on(bench.device)[name](bench)


def extract(bench: Bench, codec: str, *, many: bool = False) -> float:
    """Seconds of `sherl-pipe extract` into a new cache, which is not kept if it is of `many`."""
    folder = bench.folder / f"cache-{codec}{'-long' * many}"
    shutil.rmtree(folder, ignore_errors=True)
    texts = bench.long_texts if many else bench.texts
    options = {"--model": bench.model, "--data": texts, "--cache": folder, "--codec": codec}
    options["--device"] = bench.device
    if bench.toy:
        options["--shard-mib"] = "1"
    arguments = ["extract", *(str(part) for pair in options.items() for part in pair)]
    begun = time.perf_counter()
    sherl_pipe(arguments)
    seconds = time.perf_counter() - begun
    if many:
        shutil.rmtree(folder)
    return seconds


def bench_of(arguments: argparse.Namespace) -> Bench:
    """What is asked for."""
    return Bench(arguments.toy, arguments.data, pick_device(arguments.device))


def run(arguments: argparse.Namespace) -> None:
    """Measure every row and record it."""
    bench = bench_of(arguments)
    bench.prepare()
    results: Path = bench.folder / "results.jsonl" if arguments.toy else RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    circumstances = {
        "rows": bench.rows,
        "machine": machine(bench.device, arguments.threads),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

    def record(name: str, values: Record) -> None:
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"name": name, **values, **circumstances}) + "\n")
        LOG.info("%s: %s", name, values)

    for codec in CODECS:
        record(f"extraction, {codec}", {"seconds": extract(bench, codec)})
    more = {"seconds": extract(bench, "int8", many=True), "long_rows": bench.long_rows}
    record("long extraction, int8", more)
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.rounds):
        for name in rows_on(bench.device):
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
                values = pool.submit(measure, name, bench, arguments.threads).result()
            record(name, values)
    print(report(read_records(results)))


def profile(arguments: argparse.Namespace) -> None:
    """Print where a step from int8 in host memory spends its time; `run` has to come first."""
    torch.set_num_threads(arguments.threads)
    cached(bench_of(arguments), codec="int8", profile=arguments.operations)


def feed(arguments: argparse.Namespace) -> None:
    """Print what a step takes on ready tensors and from the cache, in turns in one process; `run`
    has to come first."""
    torch.set_num_threads(arguments.threads)
    found = feeding(bench_of(arguments))
    least = found["ready tensors"]
    lines = [[name, f"{each:.4f}", f"{each / least:.2f}"] for name, each in found.items()]
    print(markdown(["int8 from", "s/step", "ratio"], lines))


def tunings(steps: Mapping[str, float], extraction: float, rows: int) -> list[list[str]]:
    """Lines on whole tunings of `rows` training rows, their extraction included."""
    epoch, chosen = rows // BATCH, "cached sherl, int8, host"
    once = extraction + EPOCHS * epoch * steps[chosen]
    many = extraction + TUNINGS * EPOCHS * epoch * steps[chosen]
    one = f"{EPOCHS * epoch * steps['live sherl'] / once:.1f}x"
    eight = f"{TUNINGS * EPOCHS * epoch * steps['lora'] / many:.1f}x"
    return [
        [f"extraction of {rows:,} rows, int8", f"{extraction:.1f} s", ""],
        [f"... + {EPOCHS} epochs, against live sherl", f"{once:.1f} s", one],
        [f"... + {TUNINGS} tunings of {EPOCHS} epochs, against lora", f"{many:.1f} s", eight],
    ]


def report(records: Sequence[Record]) -> str:
    """The tables: a step, and whole tunings computed from it."""
    rounds: dict[str, list[Record]] = {}
    for record in records:
        rounds.setdefault(record["name"], []).append(record)
    seconds = {
        name: statistics.median(each["seconds"] for each in found) for name, found in rounds.items()
    }
    steps = {name: seconds[name] for name, found in rounds.items() if "trainable" in found[0]}
    peaks = {name: statistics.median(each["peak_mib"] for each in rounds[name]) for name in steps}
    lines = []
    for name in steps:
        ratios = [steps[base] / steps[name] for base in ("full fine-tuning", "lora", "live sherl")]
        lines.append(
            [
                name,
                f"{steps[name]:.3f}",
                *(f"{ratio:.1f}x" for ratio in ratios),
                f"{peaks[name]:,.0f}",
                f"{rounds[name][0]['trainable']:,}",
            ]
        )
    header = ["row", "s/step", "vs full", "vs lora", "vs live sherl", "peak MiB", "trainable"]
    long_rows: int = rounds["long extraction, int8"][0]["long_rows"]
    whole = [
        *tunings(steps, seconds["extraction, int8"], records[0]["rows"]),
        *tunings(steps, seconds["long extraction, int8"], long_rows),
    ]
    return "\n".join(
        [
            records[0]["machine"],
            "",
            markdown(header, lines),
            "",
            markdown(["computed from the steps", "time", "ratio"], whole),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--toy", action="store_true", help="a small model and few rows")
    shared.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    shared.add_argument("--device", default="auto")
    shared.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "glue")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", parents=[shared], help=run.__doc__)
    command.add_argument("--rounds", type=int, default=3, help="how often the series is run")
    command.set_defaults(function=run)
    command = commands.add_parser("profile", parents=[shared], help=profile.__doc__)
    command.add_argument("--operations", type=int, default=20)
    command.set_defaults(function=profile)
    command = commands.add_parser("feed", parents=[shared], help=feed.__doc__)
    command.set_defaults(function=feed)
    command = commands.add_parser("table", help="print the tables of the last run")
    command.set_defaults(function=lambda _: print(report(read_records(RESULTS))))
    arguments = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    arguments.function(arguments)


if __name__ == "__main__":
    main()
