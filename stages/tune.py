"""Stage two: train a route on cached features."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from sherl_pipe.cache import (
    InputError,
    NonFiniteError,
)
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.stages import checkpoint, metrics
from sherl_pipe.stages.adapter import CONFIG_NAME, AdapterConfig, save_adapter
from sherl_pipe.stages.features import Batch, FeatureSource, Ints
from sherl_pipe.stages.memory import PeakMemory
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.base import Route, RouteSpec, trainable
from sherl_pipe.stages.methods.consolidation import GATE_SCALE
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.settings import PRECISIONS, TuneResult, TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.words import Scoring
from torch import Tensor, nn
from torch.nn import functional as F

RESULT_NAME = "result.json"
CHECKPOINT_SECONDS = 60.0


class Tuner:
    """One tuning: a task, a method, settings and a seed.

    Args:
        task: what to learn.
        settings: how.
        folder: where the adapter, and checkpoints on the way, are written.
        budget: bytes of host memory for features.
    """

    def __init__(self, task: Task, settings: TuneSettings, folder: Path, *, budget: int) -> None:
        method = find_method(settings.method)
        if settings.precision not in PRECISIONS:
            raise InputError(
                explain("precision", expected=f"one of {PRECISIONS}", found=settings.precision)
            )
        self.task, self.settings, self.folder = task, settings, folder
        backbone = task.backbone
        self.memory = PeakMemory(backbone.device)
        cached = {kind: spec.taps for kind, spec in task.cache.identity.streams.items()}
        taps, last = method.choose_taps(backbone, settings.late, cached)
        if not 1 <= settings.reduction <= backbone.width:
            raise InputError(
                explain("reduction", expected=f"1 to {backbone.width}", found=settings.reduction)
            )
        self.spec = RouteSpec(
            settings.method,
            taps,
            last,
            settings.late,
            settings.reduction,
            # The papers' own for text-to-text, and for a joint encoder with an answer head.
            "t5" if backbone.family.seq2seq else "clipvil",
            settings.init,
            task.outputs,
            settings.pool,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.route: Route = method.build(backbone, self.spec)
        self.scoring = Scoring.of(task.tree, settings.loss) if task.tree else None
        reads = self.route.reads()
        self.train = task.source(task.train, reads, self.scoring, budget=budget, train=True)
        left = budget - (self.train.coded_bytes if self.train.resident else 0)
        self.held_out = task.source(task.held_out, reads, self.scoring, budget=left, train=False)
        self.parameters = trainable(self.route)

    @property
    def key(self) -> str:
        """Names everything that determines the result."""
        labels = [
            (table.role, [i.hex() for i in table.ids], list(table.labels))
            for table in (self.task.train, self.task.held_out)
        ]
        identity = self.task.cache.identity.fingerprint()
        return hash_json([asdict(self.settings), self.spec.to_json(), identity, labels])

    def finished(self) -> TuneResult | None:
        """The result, if this very tuning was finished in its folder before."""
        path = self.folder / RESULT_NAME
        if not path.is_file() or not (self.folder / CONFIG_NAME).is_file():
            return None
        body = json.loads(path.read_text())
        return TuneResult(**body["result"]) if body.get("key") == self.key else None

    def run(self, progress: Progress = silent) -> TuneResult:
        """Train, evaluate, save. Goes on from a checkpoint of the same tuning.

        Raises NonFiniteError where the loss is no number.
        """
        done = self.finished()
        if done is not None:
            return done
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            seconds = self._train(progress)
        outputs = self.outputs(self.held_out, self.settings.batch_size * 4)
        labels = np.array(self.task.held_out.labels)
        found = metrics.evaluate(self.task.spec.metrics, labels, self.task.predictions(outputs))
        result = TuneResult(
            task=self.task.name,
            method=self.settings.method,
            seed=self.settings.seed,
            lr=self.settings.lr,
            metrics=found,
            score=metrics.headline(found),
            role=self.task.held_out.role,
            examples=len(labels),
            trainable=sum(p.numel() for p in self.parameters.values()),
            backbone=self.task.backbone.parameters,
            seconds=time.perf_counter() - start,
            seconds_per_epoch=seconds / self.settings.epochs,
            peak_mib=self.memory.peak_mib(),
            folder=str(self.folder),
        )
        self._save(result)
        return result

    def outputs(self, source: FeatureSource, batch_size: int) -> Tensor:
        """Head outputs or word scores `[N, C]`, in the order of the source's table."""
        self.route.eval()
        found: list[tuple[Ints, Tensor]] = []
        with torch.inference_mode():
            for batch in source.read(source.in_order(batch_size)):
                found.append((batch.rows, self._outputs(batch).float().cpu()))
        rows = np.concatenate([each for each, _ in found])
        result = torch.cat([each for _, each in found])
        ordered = torch.empty_like(result)
        ordered[torch.from_numpy(rows)] = result
        if not torch.isfinite(ordered).all():
            raise NonFiniteError(
                f"{self.task.name}: the tuned model's outputs are not finite. Lower --lr, or use "
                "--precision float32."
            )
        return ordered

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a training batch."""
        (hidden,) = self.route.hidden([self.route], [batch.streams])
        return self._loss(hidden, batch.rows)

    def _loss(self, hidden: Tensor, rows: Ints) -> Tensor:
        task, device = self.task, hidden.device
        labels = [task.train.labels[row] for row in rows.tolist()]
        if self.scoring is not None:
            logits = self.route.logits(hidden, self.scoring.tokens).float()
            return self.scoring.loss(logits, torch.from_numpy(task.words_of(labels)))
        logits = self.route.logits(hidden).float()
        if task.spec.kind == "classification":
            return F.cross_entropy(logits, torch.tensor(labels, device=device))
        mean, spread = task.scaling
        wanted = (torch.tensor(labels, dtype=torch.float32, device=device) - mean) / spread
        return F.mse_loss(logits[:, 0], wanted)

    def _outputs(self, batch: Batch) -> Tensor:
        scoring = self.scoring
        with self._autocast():
            tree, tokens = (scoring.tree, scoring.tokens) if scoring else (None, None)
            (hidden,) = self.route.hidden([self.route], [batch.streams], tree)
            logits = self.route.logits(hidden, tokens).float()
        return scoring.score(logits) if scoring else logits

    def _autocast(self) -> torch.autocast:
        kind = self.task.backbone.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _train(self, progress: Progress) -> float:
        """All epochs that are left; the seconds of training."""
        settings = self.settings
        optimizer = self.optimizer()
        what = f"{self.task.name} {settings.method} seed {settings.seed}"
        self.train.preload(lambda done, all_: progress(f"{what}: loading", done, all_, "shards"))
        # Shards meet in other windows in every epoch, so epochs differ in their last batches.
        ends = np.cumsum(
            [
                len(self.train.epoch(settings.seed, epoch, settings.batch_size))
                for epoch in range(settings.epochs)
            ]
        )
        total = int(ends[-1])
        step, seconds = checkpoint.resume(self.folder, self.key, self.parameters, optimizer)
        saved = begun = time.perf_counter()
        while step < total:
            epoch = int(np.searchsorted(ends, step, "right"))
            batches = self.train.epoch(settings.seed, epoch, settings.batch_size)
            batches = batches[len(batches) - (int(ends[epoch]) - step) :]
            self.route.train()
            for batch in self.train.read(batches):
                self.step(batch, optimizer, step, total)
                step += 1
                progress(what, step, total, "steps")
                if time.perf_counter() - saved > CHECKPOINT_SECONDS and step < total:
                    now = time.perf_counter()
                    checkpoint.save(
                        self.folder,
                        self.key,
                        self.parameters,
                        optimizer,
                        step,
                        seconds + now - begun,
                    )
                    saved = now
        return seconds + time.perf_counter() - begun

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer of the parameters that are tuned; a group's rate is `lr` x `share`.

        A gate is divided by GATE_SCALE before it acts. Adam moves every parameter by about the
        rate, whatever its gradient, so an open gate that learned at the full rate would be closed
        within a few dozen steps, and with it the way of the frozen state. The published start has
        its gate closed and trains it at the full rate.
        """
        settings = self.settings
        rates: dict[float, list[nn.Parameter]] = {1.0: [], GATE_SCALE: []}
        for name, parameter in self.parameters.items():
            slow = settings.init == "residual" and name.rpartition(".")[2] == "gate"
            rates[GATE_SCALE if slow else 1.0].append(parameter)
        groups = [{"params": members, "share": share} for share, members in rates.items()]
        return torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Take step `step` of `total` on a training batch.

        Raises NonFiniteError where the gradient is no number.
        """
        for group in optimizer.param_groups:
            rate = self.settings.lr * schedule(step, total, self.settings.warmup)
            group["lr"] = group["share"] * rate
        with self._autocast():
            loss = self.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"{self.task.name}: the gradient at step {step} is not finite. Lower --lr, or use "
                "--precision float32."
            )
        optimizer.step()

    def _save(self, result: TuneResult) -> None:
        identity, settings = self.task.cache.identity, self.settings
        where = self.task.cache.places[self.task.train.ids[0]][0]
        stream = self.task.backbone.family.main
        config = AdapterConfig(
            task=self.task.name,
            labels=self.task.spec,
            route=self.spec,
            backbone={
                field: identity.backbone.get(field)
                for field in ("name", "revision", "fingerprint", "config")
            },
            tokenizer=identity.tokenizer,
            template=self.task.cache.stream(where, stream).notes["template"],
            max_length=identity.max_length,
            scaling=self.task.scaling,
            loss=settings.loss,
        )
        save_adapter(self.folder, config, self.route)
        store = LocalStore(self.folder)
        body = {"key": self.key, "result": asdict(result), "settings": asdict(settings)}
        store.replace(RESULT_NAME, json.dumps(body, indent=1).encode())
        store.delete(checkpoint.NAME)


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: up in `warmup` of the steps (500 at most), then linearly
    down to zero."""
    rising = min(500, math.ceil(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return (total - step) / max(1, total - rising)
