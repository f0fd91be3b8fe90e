"""Compare tuning methods on GLUE with the MiniLM-L6 encoder.

``search`` tries each method's learning rates on a slice held out of the training rows, ``final``
trains with the best of them for several seeds and scores on the validation file, ``costs``
measures time and memory of one epoch of every method side by side (on an otherwise idle machine),
``table`` prints what has been measured. Every finished run is appended to a JSON-lines file, and
runs found there are skipped, so that an interrupted series can be continued with the
same command::

    python benchmarks/minilm_glue.py search --methods lora full
    python benchmarks/minilm_glue.py final --methods probe lora full
    python benchmarks/minilm_glue.py costs --threads 2
    python benchmarks/minilm_glue.py table
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

from baselines import NAMES, RATES_OF, SEARCH_SEEDS, rates, trained
from cached import TUNINGS
from glue_tasks import TASKS, TRAIN_ROWS, load_task
from records import (
    Record,
    Run,
    cost_table,
    markdown,
    matching,
    read_records,
    run_of,
    score_table,
)
from training import cpu_model, load_tokenizer

LOG = logging.getLogger("minilm_glue")
REPOSITORY = Path(__file__).resolve().parent.parent
EPOCHS = 3
FINAL_SEEDS = (0, 1, 2)


def configure_logging() -> None:
    """Progress goes to stderr."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)


def execute(runs: Sequence[Run], data: Path, threads: int) -> list[Record]:
    """Carry out runs that differ in rate and seed; called in a process of its own."""
    configure_logging()
    torch.set_num_threads(threads)
    first = runs[0]
    task = load_task(data, first.task, first.phase, load_tokenizer(), first.rows)
    rates = list(dict.fromkeys(run.lr for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    results = trained(first.method, task, rates, seeds, first.epochs)
    return [
        {
            **asdict(run),
            "train_rows": len(task.train),
            "evaluation_rows": len(task.evaluation),
            **asdict(results[run.lr, run.seed]),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cpu": cpu_model(),
            "threads": threads,
        }
        for run in runs
    ]


def commands(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that one command trains; those of a cached method whose rates and seeds are a grid."""
    groups: dict[Run, list[Run]] = {}
    for run in runs:
        groups.setdefault(replace(run, seed=0, lr=None), []).append(run)
    found: list[list[Run]] = []
    for key, group in groups.items():
        grid = {run.lr for run in group}, {run.seed for run in group}
        whole = key.method in TUNINGS and len(group) == len(grid[0]) * len(grid[1])
        found += [group] if whole else [[run] for run in group]
    return found


def carry_out(runs: Iterable[Run], arguments: argparse.Namespace) -> None:
    """Carry out the runs not yet recorded, and record them."""
    results: Path = arguments.results
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {run_of(record) for record in read_records(results)}
    context = multiprocessing.get_context("spawn")
    runs = list(runs)
    LOG.info("already recorded: %d of %d", sum(run in done for run in runs), len(runs))
    for group in commands([run for run in runs if run not in done]):
        for run in group:
            LOG.info("start: %s", run)
        # A fresh process per run: memory that an earlier run gave back to the allocator, but not
        # to the system, would hide part of this run's growth.
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            records = pool.submit(execute, group, arguments.data, arguments.threads).result()
        for record in records:
            with results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
            LOG.info("metrics %s, %.1f s an epoch", record["metrics"], record["seconds_per_epoch"])


def search(arguments: argparse.Namespace) -> None:
    """Try the learning rates of each method on each task."""
    carry_out(
        (
            Run("search", method, task, seed, lr, arguments.epochs, arguments.rows)
            for task in arguments.tasks
            for method in arguments.methods
            if method not in RATES_OF
            for lr in rates(method)
            for seed in range(SEARCH_SEEDS.get(method, 1))
        ),
        arguments,
    )


def chosen_lr(
    records: Sequence[Record], arguments: argparse.Namespace, name: str, task: str
) -> float:
    """The rate that was best on the held-out slice, over all seeds; the lower one of equals."""
    name = RATES_OF.get(name, name)
    scores: dict[float, list[float]] = {lr: [] for lr in rates(name)}
    for record in matching(records, "search", arguments.epochs, arguments.rows):
        if (record["method"], record["task"]) == (name, task) and record["lr"] in scores:
            scores[record["lr"]].append(record["metrics"]["score"])
    missing = [lr for lr in rates(name) if len(scores[lr]) < SEARCH_SEEDS.get(name, 1)]
    if missing:
        sys.exit(f"{name} on {task}: run search first, these rates are missing: {missing}")
    return max(sorted(rates(name)), key=lambda lr: statistics.mean(scores[lr]))


def final(arguments: argparse.Namespace) -> None:
    """Train with the chosen rates and score on the validation rows."""
    records = read_records(arguments.results)
    runs: list[Run] = []
    for task in arguments.tasks:
        for name in arguments.methods:
            lr = chosen_lr(records, arguments, name, task) if rates(name) else None
            seeds = arguments.seeds if lr is not None else arguments.seeds[:1]
            runs += [
                Run("final", name, task, seed, lr, arguments.epochs, arguments.rows)
                for seed in seeds
            ]
    carry_out(runs, arguments)


def costs(arguments: argparse.Namespace) -> None:
    """Time one epoch of every method, task by task, so that all see the same machine."""
    runs = [
        Run("cost", name, task, 0, next(iter(rates(name)), None), 1, arguments.rows)
        for task in arguments.tasks
        for name in arguments.methods
    ]
    carry_out(runs, arguments)


def lr_table(records: Sequence[Record], arguments: argparse.Namespace) -> str:
    """The rates that were chosen."""
    rows = [
        [name, *(f"{chosen_lr(records, arguments, name, task):g}" for task in TASKS)]
        for name in arguments.methods
        if rates(name) and name not in RATES_OF
    ]
    return markdown(["method", *(f"{task} lr" for task in TASKS)], rows)


def table(arguments: argparse.Namespace) -> None:
    """Print the tables."""
    records = read_records(arguments.results)
    # Runs with a rate that a wider grid has overtaken stay in the file and out of the table.
    final_records = [
        record
        for record in matching(records, "final", arguments.epochs, arguments.rows)
        if not rates(record["method"])
        or record["lr"] == chosen_lr(records, arguments, record["method"], record["task"])
    ]
    print(score_table(final_records, arguments.methods))
    print()
    print(lr_table(records, arguments))
    print()
    print(cost_table(matching(records, "cost", 1, arguments.rows), arguments.methods))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    options.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "minilm_glue.jsonl"
    )
    options.add_argument("--epochs", type=int, default=EPOCHS)
    options.add_argument("--rows", type=int, default=TRAIN_ROWS, help="training rows at most")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    training.add_argument("--threads", type=int, default=1)
    training.add_argument(
        "--data",
        type=Path,
        default=REPOSITORY.parent / "shared" / "data" / "glue",
        help="folder with a folder per task (default: ../shared/data/glue from the repository)",
    )
    main_parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main_parser.add_subparsers(required=True)
    for function in (search, final, costs):
        command = commands.add_parser(
            function.__name__, parents=[options, training], help=function.__doc__
        )
        command.set_defaults(function=function)
        if function is final:
            command.add_argument("--seeds", nargs="+", type=int, default=list(FINAL_SEEDS))
    command = commands.add_parser("table", parents=[options], help=table.__doc__)
    command.set_defaults(function=table)
    return main_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = parser().parse_args(argv)
    configure_logging()
    threads = str(getattr(arguments, "threads", 1))
    # Read by the libraries when the process of a run imports them.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS=threads,
        OPENBLAS_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
    )
    arguments.function(arguments)


if __name__ == "__main__":
    main()
