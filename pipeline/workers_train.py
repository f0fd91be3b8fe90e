"""One large tuning on Ray: the workers of Ray Train take every step together.

Each worker has the whole side network and a part of every batch (see `Team`). Ray Train starts the
workers, connects them (gloo on CPU, nccl on CUDA), and starts all of them again where one is lost;
they go on from the tuning's checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sherl_pipe.cache import SherlPipeError, WorkerError
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.machine import pick_device
from sherl_pipe.pipeline.passes import outcome_of, receipt
from sherl_pipe.pipeline.tuning import Ended, Work
from sherl_pipe.pipeline.workers import Share
from sherl_pipe.pipeline.workers_tune import (
    describe,
    engaged,
    error_of,
    error_text,
    job_of,
    opened,
    raise_unless_lost,
    settle,
)
from sherl_pipe.stages.team import Team

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Two seconds between looks at the workers are most of the time of a small tuning.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

# Ray Train's own notes, and what the workers came to; gone when it ends.
NOTES, OUTCOME = ".ray-train", "outcome.json"
# The others wait while the first one fits the head, or writes a checkpoint.
PATIENCE = timedelta(hours=12)


def train_together(work: Work, bars: Bars) -> Sequence[Ended]:
    """Train one pass on all workers together.

    Returns what its tunings came to; a WorkerError for each where workers were lost too often.
    Raises what training raises; InputError, WorkerError without a cluster that fits.
    """
    with engaged(work.config, NOTES) as (each, notes):
        say(f"{each.workers} workers of {each.cpus} processors share every batch")
        _fit(work, each, notes)
        return _outcomes(work, notes)


def _fit(work: Work, each: Share, notes: Path) -> None:
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"described": describe(work, each), "notes": str(notes)},
        torch_config=TorchConfig(
            backend="nccl" if each.gpus else "gloo", timeout_s=int(PATIENCE.total_seconds())
        ),
        scaling_config=ScalingConfig(
            num_workers=each.workers,
            use_gpu=bool(each.gpus),
            resources_per_worker={"CPU": each.cpus, **({"GPU": 1} if each.gpus else {})},
        ),
        run_config=RunConfig(
            name="tuning",
            storage_path=str(notes),
            failure_config=FailureConfig(max_failures=work.config.tune.retries),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        # What the workers came to says more, and is nothing where they were lost.
        if not (notes / OUTCOME).is_file():
            raise_unless_lost(getattr(error, "worker_failures", {}).values())


def _outcomes(work: Work, notes: Path) -> Sequence[Ended]:
    (job,) = work.jobs
    if not (notes / OUTCOME).is_file():
        names = ", ".join(f"{task} {settings.name}" for task, settings in job)
        error = WorkerError(
            f"workers died {work.config.tune.retries + 1} times while they trained {names}. Lower "
            "--workers or --batch-size if memory is short; run the same command again to go on."
        )
        return [error] * len(job)
    found = json.loads((notes / OUTCOME).read_text())
    if "error" in found:
        raise error_of(found["error"])
    return [outcome_of(each) for each in found["receipts"]]


def _loop(config: dict[str, Any]) -> None:
    """What every worker runs."""
    values, notes = json.loads(config["described"]), LocalStore(Path(config["notes"]))
    if notes.exists(OUTCOME):
        # Begun again after an error that was no accident.
        return
    device = get_device()
    team = Team.of_group(device if device.type == "cuda" else pick_device("cpu"))
    values["config"]["device"] = str(device)
    try:
        settle(values)
        outcomes = opened(values, team=team).run(job_of(values, 0))
    except SherlPipeError as error:
        notes.replace(OUTCOME, json.dumps({"error": error_text(error)}).encode())
        # The others wait for this worker's part, and would for hours.
        raise
    if team.rank == 0:
        receipts = [receipt(each) for each in outcomes]
        notes.replace(OUTCOME, json.dumps({"receipts": receipts}).encode())
