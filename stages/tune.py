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
from sherl_pipe.stages.adapter import put_weights
from sherl_pipe.stages.adapter_files import CONFIG_NAME, AdapterConfig, save_adapter
from sherl_pipe.stages.features import Batch, FeatureSource, Ints, Packed, Reading
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.route import Route, trainable
from sherl_pipe.stages.optimizer import clip_gradients, make_optimizer
from sherl_pipe.stages.paired import AnySource, PairSource
from sherl_pipe.stages.randomness import Randomness
from sherl_pipe.stages.retrieval import contrastive
from sherl_pipe.stages.settings import TuneResult, TuneSettings, schedule
from sherl_pipe.stages.step import losses as losses
from sherl_pipe.stages.step import train_step as train_step
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.texts import IGNORED, judged, padded, text_loss
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
        budget, residency, readers, shared: of features, as for `FeatureSource`. They change no
            result.
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
        shared: bool = False,
    ) -> None:
        self.task, self.settings, self.folder = task, settings, folder
        kind: type[AnySource] = PairSource if task.backbone.family.towers else FeatureSource
        home = partial(kind, budget=budget, residency=residency, readers=readers, shared=shared)
        self._features = partial(home, task.cache, device=task.backbone.device)
        self.spec = task.route_spec(settings)
        method, backbone = find_method(settings.method), task.backbone
        self.randomness = Randomness(settings.seed, backbone.device)
        with Randomness(settings.seed, backbone.device).own():
            self.route: Route = method.build(backbone, self.spec)
        self.scoring = task.scoring(settings)
        self.parameters = trainable(self.route)
        self._ready = settings.init not in method.given

    def readings(self, *, train: bool) -> dict[str, Reading]:
        """What is read of the cache for training, or for evaluation."""
        table = self.task.train if train else self.task.held_out
        return self.task.readings(table, self.route.reads(), self.scoring, train=train)

    @cached_property
    def train(self) -> AnySource:
        """Features of the training rows."""
        return self.source(self.readings(train=True), train=True)

    @cached_property
    def held_out(self) -> AnySource:
        """Features of the rows that it is evaluated on."""
        return self.source(self.readings(train=False), train=False, beside=self.train.sources)

    def source(
        self,
        readings: Mapping[str, Reading],
        *,
        train: bool,
        beside: Sequence[FeatureSource] = (),
    ) -> AnySource:
        """Features of the rows for training, or for evaluation; errors as for `FeatureSource`."""
        table = self.task.train if train else self.task.held_out
        return self._features(table, readings, beside=beside)

    @property
    def key(self) -> str:
        """Names everything that determines the result."""
        identity = self.task.cache.identity.fingerprint_for(self.spec.taps)
        described = asdict(self.settings), self.spec.to_json(), identity, self.task.rows
        return hash_json(list(described))

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
        return self.ordered([(each.rows, self.scores(each.streams, each.rows)) for each in batches])

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
    def scores(self, streams: Streams, rows: Ints) -> Tensor:
        """Head outputs or word scores `[B, C]` of a batch of held-out `rows`, on the host; of free
        text what `text_metrics` takes, `[B, 3]`."""
        self.route.eval()
        scoring, route = self.scoring, self.route
        with self.autocast():
            tree, tokens = (scoring.tree, scoring.tokens) if scoring else (None, None)
            (hidden,) = route.hidden([route], [route.fuse(streams, tree)], [streams], tree)
            if self.task.texts is not None:
                said = padded(self.task.target_tokens(rows, train=False))
                return judged(route.logits, hidden, said.to(hidden.device)).cpu()
            logits = route.logits(hidden, tokens).float()
        return (scoring.score(logits) if scoring else logits).cpu()

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a training batch."""
        return losses([self], [batch])[0]

    def loss_of(self, hidden: Tensor, rows: Ints) -> Tensor:
        """Mean loss of what the head reads for `rows` of the training table."""
        if self.task.texts is not None:
            tokens = padded(self.task.target_tokens(rows, train=True)).to(hidden.device)
            inside = tokens != IGNORED
            return text_loss(self.route.logits(hidden[inside]).float(), tokens[inside])
        if self.scoring is not None:
            logits = self.route.logits(hidden, self.scoring.tokens).float()
            return self.scoring.loss(logits, torch.from_numpy(self._words(rows)))
        if self.task.spec.kind == "retrieval":
            texts, images = hidden
            others = self.task.pairings[0].others(rows)
            return contrastive(texts, images, self.route.get_buffer("scale"), others)
        logits = self.route.logits(hidden).float()
        wanted = self.task.targets(rows.tolist(), hidden.device)
        if self.task.spec.kind == "classification":
            return F.cross_entropy(logits, wanted)
        return F.mse_loss(logits[:, 0], wanted)

    def amount(self, rows: Ints) -> int:
        """How many examples or tokens the mean loss of `rows` of the training table is over."""
        if self.task.texts is not None:
            return sum(map(len, self.task.target_tokens(rows, train=True)))
        if self.scoring is None:
            return len(rows)
        return self.scoring.amount(torch.from_numpy(self._words(rows)))

    def _words(self, rows: Ints) -> Ints:
        return self.task.words_of([self.task.train.labels[row] for row in rows.tolist()])

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

    def score(self, outputs: Tensor) -> float:
        """The task's one number, of outputs `[N, C]` for the held-out rows."""
        return metrics.headline(self.task.measured(outputs))

    def finish(self, outputs: Tensor, **costs: float) -> TuneResult:
        """Evaluate and save.

        Args:
            outputs: `[N, C]` for the held-out rows.
            costs: `seconds`, `seconds_per_epoch`, `peak_mib`.
        """
        found = self.task.measured(outputs)
        result = TuneResult(
            task=self.task.name,
            method=self.settings.method,
            seed=self.settings.seed,
            lr=self.settings.lr,
            metrics=found,
            score=metrics.headline(found),
            role=self.task.held_out.role,
            examples=len(self.task.held_out.ids),
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
        family = self.task.backbone.family
        stream = "text" if family.towers else family.main
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
