"""How far `sherl-pipe plan` is from what then happens: sizes and times, planned over found.

Plan, extraction, a cached epoch and a live epoch of every task run in processes of their own, one
after another, on an otherwise idle machine; each figure is the median of the rounds::

    python benchmarks/plan_accuracy.py --rounds 3            # the embedded demo, every codec
    python benchmarks/plan_accuracy.py --model t5-base --data glue/cola --codec int8

A ratio of 1.00 is a plan that came true; sizes should be within 10 %, times within 30 %.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.cache import CODECS
from sherl_pipe.pipeline import opening, planning, report_plan, steps, tuning
from sherl_pipe.pipeline.config import RunConfig, make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.stages.adapter import TunedModel
from sherl_pipe.stages.inputs import pad_id
from sherl_pipe.stages.survey import survey
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.tune import Tuner
from torch import nn

QUIET = Bars(None)
MUCH = 1 << 62


def planned(config: RunConfig) -> Any:
    """The plan's JSON."""
    return report_plan.describe(planning.run_plan(config, QUIET))


def extracted(config: RunConfig) -> tuple[int, float]:
    """Bytes of the cache, and seconds without the model's loading."""
    loading: list[float] = []
    prepare = opening.prepare

    def noted(config: RunConfig, bars: Bars) -> opening.Prepared:
        ready = prepare(config, bars)
        loading.append(ready.loading_seconds)
        return ready

    setattr(steps, "prepare", noted)  # noqa: B010 - for mypy it is imported, not defined, there
    begun = time.perf_counter()
    steps.run_extract(config, QUIET)
    seconds = time.perf_counter() - begun - sum(loading)
    files = (file for file in Path(str(config.cache_path)).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files), seconds


def tuned(config: RunConfig) -> dict[str, float]:
    """Seconds of an epoch from the cache, by task."""
    return {each.task: each.seconds_per_epoch for each in tuning.run_tune(config, QUIET)}


def live(config: RunConfig) -> dict[str, float]:
    """Seconds of an epoch of the live model with the same route in it, by task."""
    ready = opening.prepare(config)
    counted = survey(
        ready.sources, ready.templates, ready.tokenizer, ready.identity.max_length, seconds=1e9
    )
    inputs = {
        identity: row
        for split in counted.splits
        for identity, row in zip(split.ids, split.tokens.inputs, strict=True)
    }
    cache, backbone, tokenizer = steps.open_for_tuning(config, QUIET, whole=True)
    settings = opening.tunings(config, backbone.family, cache.specs())[0]
    found = {}
    for name in sorted(cache.tasks):
        task = Task(cache, name, backbone, tokenizer)
        tuner = Tuner(task, settings, config.tune.out, budget=MUCH)
        tokens = Tokens([inputs[each] for each in task.train.ids], 0)
        model = TunedModel(backbone, tuner.route)
        model.train()
        model.model.eval()  # as the features were captured: no dropout in frozen blocks
        optimizer = tuner.optimizer()
        begun = time.perf_counter()
        for rows in tuner.train.epoch(0, 0, settings.batch_size):
            batch = tokens.batch(rows.tolist(), pad_id(tokenizer))
            batch = {key: values.to(backbone.device) for key, values in batch.items()}
            loss = model(**batch, labels=_labels(task, rows.tolist())).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(tuner.parameters.values(), settings.clip)
            if torch.isfinite(norm):
                optimizer.step()
        found[name] = time.perf_counter() - begun
    return found


def _labels(task: Task, rows: list[int]) -> torch.Tensor:
    labels = [task.train.labels[row] for row in rows]
    device = task.backbone.device
    if task.tree is None:
        kind = torch.long if task.spec.kind == "classification" else torch.float32
        return torch.tensor(labels, dtype=kind, device=device)
    words = [torch.tensor(task.tree.words[word]) for word in task.words_of(labels)]
    padded = nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=-100)
    return padded.to(device)


def apart(work: Callable[[RunConfig], Any], config: RunConfig) -> Any:
    """`work` in a process of its own: what one warms up does not help the next."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, config).result()


def compare(config: RunConfig) -> list[tuple[str, float, float]]:
    """What was planned and what was found, by name."""
    plan = apart(planned, config)
    size, seconds = apart(extracted, config)
    rows = [
        ("bytes", float(plan["codecs"][config.extract.codec]["bytes"]), float(size)),
        ("extraction s", plan["extraction_seconds"], seconds),
    ]
    for name, work in (("cached", tuned), ("live", live)):
        for task, taken in sorted(apart(work, config).items()):
            wanted = plan["tasks"][task][f"{name}_seconds_per_epoch"]
            if name == "cached":
                # A tuning's seconds an epoch hold a share of what it took to start; here all of it.
                starts = plan["tasks"][task]
                wanted += starts["starting_seconds"] + starts["reading_seconds"]
            rows.append((f"{name} epoch s, {task}", wanted, taken))
    return rows


def main() -> None:
    """Print a table for every codec."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--codec", action="append", choices=list(CODECS))
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    for codec in options.codec or CODECS:
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory(prefix="plan-", dir=".") as folder:
                rounds.append(compare(configured(options, codec, Path(folder))))
        print(f"\n{codec}\n{'':28}{'planned':>16}{'found':>16}{'ratio':>8}")
        for rows in zip(*rounds, strict=True):
            wanted, found, ratio = (
                statistics.median(each)
                for each in zip(*((w, f, w / f) for _, w, f in rows), strict=True)
            )
            print(f"{rows[0][0]:28}{wanted:16,.2f}{found:16,.2f}{ratio:8.2f}", flush=True)


def configured(options: argparse.Namespace, codec: str, folder: Path) -> RunConfig:
    """A run in an empty folder."""
    data = {"source": options.data, "tasks": tuple(options.task), "limit": options.limit}
    values = {
        "model": options.model,
        "cache": folder / "cache",
        "data": data,
        "extract": {"codec": codec},
        # A plan is of one tuning alone; in one pass they share what they read.
        "tune": {"epochs": 1, "together": 1, "out": folder / "runs"},
    }
    return make_config(values, "plan_accuracy")


if __name__ == "__main__":
    main()
