"""Stage two, one tuning: what it trains, its loss, its steps, and what is left of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from sherl_pipe.cache import InputError, NonFiniteError
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.stages import checkpoint, metrics
from sherl_pipe.stages.adapter import CONFIG_NAME, AdapterConfig, put_weights, save_adapter
from sherl_pipe.stages.features import Batch, FeatureSource, Ints, Packed, Reading
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.base import Route, trainable
from sherl_pipe.stages.optimizer import clip_gradients, make_optimizer
from sherl_pipe.stages.randomness import Randomness
from sherl_pipe.stages.residency import Home
from sherl_pipe.stages.settings import TuneResult, TuneSettings, schedule
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.words import Scoring
from torch import Tensor
from torch.nn import functional as F

RESULT_NAME = "result.json"

Streams = Mapping[str, Packed]


class Tuner:
    """One tuning: a task, a method, settings and a seed.

    Args:
        task: what to learn.
        settings: how.
        folder: where the adapter, and checkpoints on the way, are written.
        budget, residency, readers: of features, as for `FeatureSource`. They change no result.
    """

    def __init__(
        self,
        task: Task,
        settings: TuneSettings,
        folder: Path,
        *,
        budget: int,
        residency: str = "auto",
        readers: int | None = None,
    ) -> None:
        self.task, self.settings, self.folder = task, settings, folder
        home = partial(FeatureSource, budget=budget, residency=residency, readers=readers)
        self._features = partial(home, task.cache, device=task.backbone.device)
        self.spec = task.route_spec(settings)
        method, backbone = find_method(settings.method), task.backbone
        self.randomness = Randomness(settings.seed, backbone.device)
        with Randomness(settings.seed, backbone.device).own():
            self.route: Route = method.build(backbone, self.spec)
        self.scoring = Scoring.of(task.tree, settings.loss) if task.tree else None
        self.parameters = trainable(self.route)
        self._ready = settings.init not in method.given

    def readings(self, *, train: bool) -> dict[str, Reading]:
        """What is read of the cache for training, or for evaluation."""
        table = self.task.train if train else self.task.held_out
        return self.task.readings(table, self.route.reads(), self.scoring, train=train)

    @cached_property
    def train(self) -> FeatureSource:
        """Features of the training rows."""
        return self.source(self.readings(train=True), train=True)

    @cached_property
    def held_out(self) -> FeatureSource:
        """Features of the rows that it is evaluated on."""
        return self.source(self.readings(train=False), train=False, beside=[self.train.home])

    def source(
        self, readings: Mapping[str, Reading], *, train: bool, beside: Sequence[Home] = ()
    ) -> FeatureSource:
        """Features of the rows for training, or for evaluation; errors as for `FeatureSource`."""
        table = self.task.train if train else self.task.held_out
        return self._features(table, readings, beside=beside)

    @property
    def key(self) -> str:
        """Names everything that determines the result."""
        labels = [
            (table.role, [i.hex() for i in table.ids], list(table.labels))
            for table in (self.task.train, self.task.held_out)
        ]
        identity = self.task.cache.identity.fingerprint_for(self.spec.taps)
        return hash_json([asdict(self.settings), self.spec.to_json(), identity, labels])

    def finished(self) -> TuneResult | None:
        """The result, if this very tuning was finished in its folder before."""
        path = self.folder / RESULT_NAME
        if not path.is_file() or not (self.folder / CONFIG_NAME).is_file():
            return None
        body = json.loads(path.read_text())
        return TuneResult(**body["result"]) if body.get("key") == self.key else None

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights of the live backbone's into the route, for an init of `Method.given`.

        Args:
            weights: by names of `parameters`; the others stay as they are.

        Raises InputError for weights of another route.
        """
        put_weights(self.parameters, weights, f"what {self.settings.name} starts from")
        self._ready = True

    def outputs(self, source: FeatureSource, batch_size: int) -> Tensor:
        """Head outputs or word scores `[N, C]`, in the order of the source's table."""
        batches = source.read(source.in_order(batch_size))
        return self.ordered([(each.rows, self.scores(each.streams)) for each in batches])

    def ordered(self, found: Sequence[tuple[Ints, Tensor]]) -> Tensor:
        """Outputs of batches, `[N, C]` in the order of the table.

        Raises NonFiniteError for a value that is no number.
        """
        rows = np.concatenate([each for each, _ in found])
        result = torch.cat([each for _, each in found])
        ordered = torch.empty_like(result)
        ordered[torch.from_numpy(rows)] = result
        if not torch.isfinite(ordered).all():
            raise self._not_finite("the tuned model's outputs are")
        return ordered

    @torch.inference_mode()
    def scores(self, streams: Streams) -> Tensor:
        """Head outputs or word scores `[B, C]` of a batch, on the host."""
        self.route.eval()
        scoring, route = self.scoring, self.route
        with self.autocast():
            tree, tokens = (scoring.tree, scoring.tokens) if scoring else (None, None)
            (hidden,) = route.hidden([route], [route.fuse(streams, tree)], [streams], tree)
            logits = route.logits(hidden, tokens).float()
        return (scoring.score(logits) if scoring else logits).cpu()

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a training batch."""
        return losses([self], [batch])[0]

    def loss_of(self, hidden: Tensor, rows: Ints) -> Tensor:
        """Mean loss of what the head reads for `rows` of the training table."""
        if self.scoring is not None:
            logits = self.route.logits(hidden, self.scoring.tokens).float()
            labels = [self.task.train.labels[row] for row in rows.tolist()]
            return self.scoring.loss(logits, torch.from_numpy(self.task.words_of(labels)))
        logits = self.route.logits(hidden).float()
        wanted = self.task.targets(rows.tolist(), hidden.device)
        if self.task.spec.kind == "classification":
            return F.cross_entropy(logits, wanted)
        return F.mse_loss(logits[:, 0], wanted)

    def autocast(self) -> torch.autocast:
        """In force during forward passes."""
        kind = self.task.backbone.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer; see `make_optimizer`. Raises InputError before `start_from`, where
        the init wants it."""
        if not self._ready:
            raise InputError(f"init {self.settings.init}: give its weights to `start_from` first")
        return make_optimizer(self.parameters, self.settings)

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Take step `step` of `total` on a training batch.

        Raises NonFiniteError where the gradient is no number.
        """
        (error,) = train_step([self], [batch], [optimizer], step, total)
        if error is not None:
            raise error

    def update(self, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Move the parameters along their gradients. Raises NonFiniteError."""
        for group in optimizer.param_groups:
            rate = self.settings.lr * schedule(step, total, self.settings.warmup)
            group["lr"] = group["share"] * rate
        if not torch.isfinite(clip_gradients(self.parameters.values(), self.settings.clip)):
            raise self._not_finite(f"the gradient at step {step} is")
        optimizer.step()

    def finish(self, outputs: Tensor, **costs: float) -> TuneResult:
        """Evaluate and save.

        Args:
            outputs: `[N, C]` for the held-out rows.
            costs: `seconds`, `seconds_per_epoch`, `peak_mib`.
        """
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
            folder=str(self.folder),
            **costs,
        )
        self._save(result)
        return result

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{self.task.name}, {self.settings.name}: {what} not finite. Lower --lr, or use "
            "--precision float32."
        )

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


def losses(tuners: Sequence[Tuner], batches: Sequence[Batch]) -> list[Tensor]:
    """Mean loss of each tuning's training batch; the late blocks run once for all of them.

    The tunings have one backbone, method, depth of the late route and precision.
    """
    routes = [tuner.route for tuner in tuners]
    streams = [batch.streams for batch in batches]
    with tuners[0].autocast():
        fused = []
        for tuner, own in zip(tuners, streams, strict=True):
            with tuner.randomness.own():
                fused.append(tuner.route.fuse(own))
        hidden = routes[0].hidden(routes, fused, streams)
        return [
            tuner.loss_of(states, batch.rows)
            for tuner, states, batch in zip(tuners, hidden, batches, strict=True)
        ]


def train_step(
    tuners: Sequence[Tuner],
    batches: Sequence[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    total: int,
) -> list[NonFiniteError | None]:
    """Take step `step` of `total` of several tunings (see `losses`), each on its own batch.

    On the CPU one after another, so that each is bit for bit what it is alone: larger products
    are no faster there. On CUDA together, equal up to the rounding of sums in another order.

    Returns for each tuning the error that ends it, if its gradient is no number; no other tuning
    is touched by that.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if tuners[0].task.backbone.device.type == "cpu":
        for tuner, batch in zip(tuners, batches, strict=True):
            tuner.loss(batch).backward()
    else:
        torch.stack(losses(tuners, batches)).sum().backward()
    errors: list[NonFiniteError | None] = []
    for tuner, optimizer in zip(tuners, optimizers, strict=True):
        try:
            tuner.update(optimizer, step, total)
            errors.append(None)
        except NonFiniteError as error:
            errors.append(error)
    return errors
