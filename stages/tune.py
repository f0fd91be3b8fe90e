"""Stage two: train a route on cached features."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sherl_pipe.cache import (
    FeatureCache,
    Identity,
    InputError,
    LabelTable,
    NonFiniteError,
    StaleCacheError,
    TaskSpec,
)
from sherl_pipe.cache.errors import CorruptCacheError, explain
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.stages import metrics
from sherl_pipe.stages.adapter import CONFIG_NAME, AdapterConfig, Route, save_adapter
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.extract import Progress, silent
from sherl_pipe.stages.features import Batch, FeatureSource, Ints, Reading
from sherl_pipe.stages.memory import PeakMemory
from sherl_pipe.stages.methods import METHODS
from sherl_pipe.stages.methods.base import RouteSpec, trainable
from sherl_pipe.stages.methods.sherl import SherlSeq2Seq
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn
from torch.nn import functional as F

CHECKPOINT_NAME, RESULT_NAME = "checkpoint.bin", "result.json"
CHECKPOINT_SECONDS = 60.0
HOLD_OUT = 10  # one in so many training examples, where a task has no validation split
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class TuneSettings:
    """One tuning's settings; defaults follow the published runs where they fit a cache.

    Attributes:
        method: a key of `METHODS`.
        reduction: the backbone's width over the reduced width.
        late: frozen blocks behind the consolidation.
        lr: peak learning rate of AdamW.
        epochs, batch_size, seed: as usual.
        warmup: share of the steps with a rising rate, at most 500 steps.
        weight_decay, clip: of AdamW; largest gradient norm.
        init: of the consolidation, `residual` or `paper`.
        pool: of an encoder's head, `mean` or `first`.
        precision: `float32`, or `bf16` for autocast.
    """

    method: str = "sherl"
    reduction: int = 4
    late: int = 1
    lr: float = 3e-3
    epochs: int = 10
    batch_size: int = 32
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    init: str = "residual"
    pool: str = "mean"
    precision: str = "float32"


@dataclass(frozen=True)
class TuneResult:
    """What a tuning gave.

    Attributes:
        metrics: in percent, on `examples` rows of the `role` split.
        trainable, backbone: numbers of parameters.
        seconds: of training and evaluation; `seconds_per_epoch` of training alone.
        peak_mib: peak memory above what the process (or device) held before the features.
    """

    task: str
    method: str
    seed: int
    lr: float
    metrics: dict[str, float]
    score: float
    role: str
    examples: int
    trainable: int
    backbone: int
    seconds: float
    seconds_per_epoch: float
    peak_mib: float
    folder: str


def check_backbone(identity: Identity, backbone: Backbone) -> None:
    """Raise StaleCacheError unless the cache was made by this backbone."""
    for field, found in (("fingerprint", backbone.fingerprint), ("config", backbone.config_hash)):
        if identity.backbone[field] != found:
            raise StaleCacheError(
                explain(
                    f"backbone {field}",
                    expected=f"{identity.backbone[field]} (of {identity.backbone['name']})",
                    found=f"{found} ({backbone.name})",
                    todo="Give --model the backbone that the cache was extracted with.",
                )
            )


class Task:
    """A task of a cache, ready to be read: its splits, targets and meaning.

    Args:
        cache: the open cache.
        name: of the task.
        backbone: for the family and the start token.
        tokenizer: splits label words; needed for text-to-text backbones only.
    """

    def __init__(self, cache: FeatureCache, name: str, backbone: Backbone, tokenizer: Any) -> None:
        if name not in cache.tasks:
            raise InputError(
                explain(
                    "task",
                    expected=f"one of {sorted(cache.tasks)}",
                    found=repr(name),
                    todo="Attach labels with `sherl-pipe label`.",
                )
            )
        self.cache, self.name, self.backbone = cache, name, backbone
        self.train, self.held_out = _roles(cache.tasks[name])
        self.spec: TaskSpec = self.train.spec
        if self.held_out.spec != self.spec:
            raise InputError(
                explain(
                    f"labels of {name}/{self.held_out.role}",
                    expected=self.spec.to_json(),
                    found=self.held_out.spec.to_json(),
                    todo="Attach both splits' labels in one `sherl-pipe label` command.",
                )
            )
        self.tree: PrefixTree | None = None
        if backbone.family.seq2seq:
            start = int(backbone.config.decoder_start_token_id)
            self.tree = PrefixTree.of_words(self.spec.words, tokenizer, start)
        numbers = np.array(self.train.labels, np.float64)
        spread = float(numbers.std()) if self.spec.kind == "regression" else 1.0
        mean = float(numbers.mean()) if self.spec.kind == "regression" else 0.0
        self.scaling = (mean, spread or 1.0)

    @property
    def outputs(self) -> int:
        """Units of a pooled head; 0 where words are scored."""
        if self.tree is not None:
            return 0
        return 1 if self.spec.kind == "regression" else len(self.spec.classes)

    def words_of(self, labels: Sequence[float]) -> Ints:
        """The word that stands for every label."""
        if self.spec.kind == "classification":
            return np.array(labels, np.int64)
        grades = np.array([float(word) for word in self.spec.words])
        nearest: Ints = np.abs(np.array(labels)[:, None] - grades).argmin(axis=1)
        return nearest

    def source(
        self, table: LabelTable, reads: Mapping[str, tuple[int, ...]], *, budget: int, train: bool
    ) -> FeatureSource:
        """Features of a table's rows: in training the label's own path, else every word's."""
        readings = {}
        for role, taps in reads.items():
            stream = self.tree.stream if self.tree and role == "decoder" else role
            paths = self.tree.paths if self.tree and role == "decoder" and train else None
            readings[role] = Reading(stream, taps, paths)
        return FeatureSource(
            self.cache,
            table,
            readings,
            budget=budget,
            device=self.backbone.device,
            choices=self.words_of(table.labels) if self.tree else None,
        )

    def predictions(self, outputs: Tensor) -> npt.NDArray[Any]:
        """Classes or numbers from head outputs or word scores `[N, outputs]`.

        A graded task on words gives the mean of the grades, weighted by the words' probability.
        """
        return predictions(self.spec, outputs, self.scaling)


def predictions(spec: TaskSpec, outputs: Tensor, scaling: tuple[float, float]) -> npt.NDArray[Any]:
    """Classes `int64 [N]`, or numbers `float64 [N]`, from outputs `[N, C]`."""
    if spec.kind == "classification":
        return outputs.argmax(-1).cpu().numpy()
    if outputs.shape[-1] == 1:
        return outputs[:, 0].double().cpu().numpy() * scaling[1] + scaling[0]
    grades = torch.tensor([float(word) for word in spec.words], dtype=torch.float64)
    return (outputs.double().cpu().softmax(-1) @ grades).numpy()


def _roles(tables: Mapping[str, LabelTable]) -> tuple[LabelTable, LabelTable]:
    """Training and evaluation rows. Without a validation split, one training text in ten is held
    out, chosen by its id."""
    if "train" not in tables:
        raise InputError(
            explain(
                "labels",
                expected="a split named train",
                found=f"{sorted(tables)}",
                todo="Name the training file train.*, or attach labels with --role train.",
            )
        )
    train = tables["train"]
    others = [role for role in sorted(tables) if role.startswith("validation")]
    if others:
        return train, tables[others[0]]
    order = [int.from_bytes(identity[:4], "big") for identity in train.ids]
    # The least number too, so that a small file has something held out.
    held = [number % HOLD_OUT == 0 or number == min(order) for number in order]

    def part(wanted: bool, role: str) -> LabelTable:
        rows = [row for row, out in enumerate(held) if out == wanted]
        if not rows:
            raise InputError(
                f"task {train.task} has {len(held)} rows, too few to hold some out for "
                "evaluation. Add a validation split."
            )
        ids = tuple(train.ids[row] for row in rows)
        labels = tuple(train.labels[row] for row in rows)
        return replace(train, role=role, ids=ids, labels=labels)

    return part(False, "train"), part(True, "held-out")


class Tuner:
    """One tuning: a task, a method, settings and a seed.

    Args:
        task: what to learn.
        settings: how.
        folder: where the adapter, and checkpoints on the way, are written.
        budget: bytes of host memory for features.
    """

    def __init__(self, task: Task, settings: TuneSettings, folder: Path, *, budget: int) -> None:
        if settings.method not in METHODS:
            raise InputError(
                explain("method", expected=f"one of {sorted(METHODS)}", found=settings.method)
            )
        if settings.precision not in PRECISIONS:
            raise InputError(
                explain("precision", expected=f"one of {PRECISIONS}", found=settings.precision)
            )
        self.task, self.settings, self.folder = task, settings, folder
        backbone, method = task.backbone, METHODS[settings.method]
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
        reads = self.route.reads()
        self.train = task.source(task.train, reads, budget=budget, train=True)
        left = budget - (self.train.coded_bytes if self.train.resident else 0)
        self.held_out = task.source(task.held_out, reads, budget=left, train=False)
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
        task, rows = self.task, batch.rows
        labels = [task.train.labels[row] for row in rows.tolist()]
        device = task.backbone.device
        if isinstance(self.route, SherlSeq2Seq) and task.tree is not None:
            logits = self.route(batch.streams["encoder"], batch.streams["decoder"])
            words = [task.tree.words[word] for word in task.words_of(labels)]
            targets = torch.full(logits.shape[:2], -100)
            for row, word in enumerate(words):
                targets[row, : len(word)] = torch.tensor(word)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device))
        logits = self.route(batch.streams["hidden"]).float()
        if task.spec.kind == "classification":
            return F.cross_entropy(logits, torch.tensor(labels, device=device))
        mean, spread = task.scaling
        wanted = (torch.tensor(labels, dtype=torch.float32, device=device) - mean) / spread
        return F.mse_loss(logits[:, 0], wanted)

    def _outputs(self, batch: Batch) -> Tensor:
        with self._autocast():
            if isinstance(self.route, SherlSeq2Seq) and self.task.tree is not None:
                tree = self.task.tree
                streams = batch.streams
                return tree.score(
                    self.route.node_logits(streams["encoder"], streams["decoder"], tree).float()
                )
            outputs: Tensor = self.route(batch.streams["hidden"])
            return outputs

    def _autocast(self) -> torch.autocast:
        kind = self.task.backbone.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _train(self, progress: Progress) -> float:
        """All epochs that are left; the seconds of training."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay
        )
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
        step, seconds = self._resume(optimizer)
        saved = begun = time.perf_counter()
        while step < total:
            epoch = int(np.searchsorted(ends, step, "right"))
            batches = self.train.epoch(settings.seed, epoch, settings.batch_size)
            batches = batches[len(batches) - (int(ends[epoch]) - step) :]
            self.route.train()
            self.route.late.eval()
            for batch in self.train.read(batches):
                self._step(batch, optimizer, step, total)
                step += 1
                progress(what, step, total, "steps")
                if time.perf_counter() - saved > CHECKPOINT_SECONDS and step < total:
                    now = time.perf_counter()
                    self._checkpoint(optimizer, step, seconds + now - begun)
                    saved = now
        return seconds + time.perf_counter() - begun

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * schedule(step, total, self.settings.warmup)
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

    def _checkpoint(self, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
        """Everything a resumed run needs to end with the same weights, in one atomic file."""
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in self.parameters.items():
            state = optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"first.{name}"] = state["exp_avg"]
            tensors[f"second.{name}"] = state["exp_avg_sq"]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        notes = {"key": self.key, "step": str(step), "seconds": str(seconds)}
        data = save_tensors(tensors, metadata=notes)
        digest = hashlib.sha256(data).digest()
        LocalStore(self.folder).replace(CHECKPOINT_NAME, digest + data)

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Step and seconds of a checkpoint of this tuning, its state restored; else zeros."""
        path = self.folder / CHECKPOINT_NAME
        if not path.is_file():
            return 0, 0.0
        raw = path.read_bytes()
        digest, data = raw[:32], raw[32:]
        if hashlib.sha256(data).digest() != digest:
            raise CorruptCacheError(f"{path} is damaged. Delete it to train from the start.")
        header = int.from_bytes(data[:8], "little")
        notes = json.loads(data[8 : 8 + header])["__metadata__"]
        if notes["key"] != self.key:
            return 0, 0.0  # of another tuning; it will be replaced
        tensors = load_tensors(data)
        step = int(notes["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"first.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
                }
        torch.set_rng_state(tensors["rng"])
        return step, float(notes["seconds"])

    def _save(self, result: TuneResult) -> None:
        identity = self.task.cache.identity
        where = self.task.cache.places[self.task.train.ids[0]][0]
        stream = "encoder" if self.task.backbone.family.seq2seq else "hidden"
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
        )
        save_adapter(self.folder, config, self.route)
        store = LocalStore(self.folder)
        body = {"key": self.key, "result": asdict(result), "settings": asdict(self.settings)}
        store.replace(RESULT_NAME, json.dumps(body, indent=1).encode())
        store.delete(CHECKPOINT_NAME)


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: up in `warmup` of the steps (500 at most), then linearly
    down to zero."""
    rising = min(500, math.ceil(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return (total - step) / max(1, total - rising)
