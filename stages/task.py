"""A task of a cache: its rows, targets and what outputs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import FeatureCache, InputError, LabelTable, TaskSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.cache.labels import Label
from sherl_pipe.stages import metrics
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Ints, Reading
from sherl_pipe.stages.first_tokens import FirstTokens
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.route import RouteSpec
from sherl_pipe.stages.retrieval import Pairing
from sherl_pipe.stages.settings import HEADS, PRECISIONS, TuneSettings
from sherl_pipe.stages.task_rows import splits_of, train_and_held_out
from sherl_pipe.stages.texts import TargetTexts, text_metrics
from sherl_pipe.stages.words import PrefixTree, Scoring
from torch import Tensor


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
        self._tokenizer = tokenizer
        self.train, self.held_out = train_and_held_out(cache.tasks[name])
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
        self._check_kind()
        self.tree: PrefixTree | None = None
        if backbone.family.seq2seq:
            self.tree = PrefixTree.of_words(self.spec.words, tokenizer, backbone.start)
        self.texts: TargetTexts | None = None
        self.held_out_texts: TargetTexts | None = None
        if self.spec.kind == "text":
            self.tree = None
            self.texts, self.held_out_texts = self._targets(tokenizer)
        self.scaling = (0.0, 1.0)
        if self.spec.kind == "regression":
            numbers = np.array(self.train.labels, np.float64)
            self.scaling = (float(numbers.mean()), float(numbers.std()) or 1.0)

    def _targets(self, tokenizer: Any) -> tuple[TargetTexts, TargetTexts]:
        """Of training and evaluation rows. What is held out of the training rows is of the same
        table."""
        family, roles = self.backbone.family, self.cache.tasks[self.name]
        start = self.backbone.start if family.seq2seq else None
        limit = self.cache.identity.max_length
        texts = TargetTexts.of_table(roles["train"], tokenizer, start, limit)
        other = roles.get(self.held_out.role)
        held_out = texts if other is None else TargetTexts.of_table(other, tokenizer, start, limit)
        return texts, held_out

    @property
    def rows(self) -> list[Any]:
        """Roles, ids and labels of its two tables, as JSON; of pairs the ids of their images."""
        found: list[Any] = []
        for each in (self.train, self.held_out):
            labels: list[Any] = [identity.hex() for identity in each.image_ids] or [*each.labels]
            found.append((each.role, [identity.hex() for identity in each.ids], labels))
        return found

    @cached_property
    def key(self) -> str:
        """Names what scores of the task are about: its features, rows and labels."""
        return hash_json([self.cache.identity.fingerprint(), self.rows])

    def _check_kind(self) -> None:
        """Raise InputError for labels that the backbone gives no answers to."""
        dual = bool(self.backbone.family.towers)
        if dual != (self.spec.kind == "retrieval"):
            kinds = "retrieval" if dual else "classification, regression or text"
            raise InputError(
                explain(f"labels of {self.name}", expected=kinds, found=self.spec.kind)
            )
        for table in (self.train, self.held_out) if dual else ():
            if len(set(table.labels)) < 2:
                raise InputError(
                    explain(
                        f"pairs of {self.name}/{table.role}",
                        expected="two images or more to be told apart",
                        found=f"{len(set(table.labels))}",
                    )
                )

    @cached_property
    def pairings(self) -> tuple[Pairing, Pairing]:
        """The pairs of the training rows and of the others; retrieval only."""
        return Pairing(self.train), Pairing(self.held_out)

    @property
    def splits(self) -> set[str]:
        """Where the cache holds its examples."""
        return splits_of(self.cache, (self.train, self.held_out))

    @property
    def outputs(self) -> int:
        """Units of a pooled head; 0 where words are scored, or texts, or embeddings compared."""
        if self.tree is not None or self.texts is not None:
            return 0
        return 1 if self.spec.kind == "regression" else len(self.spec.classes)

    def words_of(self, labels: Sequence[Label]) -> Ints:
        """The word that stands for every label."""
        if self.spec.kind == "classification":
            return np.array(labels, np.int64)
        grades = np.array([float(word) for word in self.spec.words])
        nearest: Ints = np.abs(np.array(labels)[:, None] - grades).argmin(axis=1)
        return nearest

    def readings(
        self,
        table: LabelTable,
        reads: Mapping[str, tuple[int, ...]],
        scoring: Scoring | FirstTokens | None,
        *,
        train: bool,
    ) -> dict[str, Reading]:
        """What is read for a table's rows; of decoder states those that `scoring` needs, in
        training the label's own path, else every word's."""
        found = {}
        for role, taps in reads.items():
            if role == "decoder" and self.tree is not None and isinstance(scoring, Scoring):
                paths = scoring.paths if train else (scoring.nodes,)
                choices = self.words_of(table.labels).tolist() if train else [0] * len(table.ids)
                found[role] = Reading(self.tree.stream, taps, paths, tuple(choices))
            elif role == "decoder" and (texts := self.texts_of(train=train)) is not None:
                found[role] = _reading(texts, table, taps)
            else:
                found[role] = Reading(role, taps)
        texts = self.texts_of(train=train)
        if texts is not None and self.backbone.family.causal:
            found["target"] = _reading(texts, table, found["hidden"].taps)
        return found

    def spoken(self, settings: TuneSettings) -> bool:
        """Whether the backbone's own head over the vocabulary answers.

        Raises InputError for `--head words` on another backbone than a causal one.
        """
        family = self.backbone.family
        if settings.head == "words" and not family.causal:
            raise InputError(
                explain(
                    "backbone of --head words",
                    expected="a causal model",
                    found=self.backbone.config.model_type,
                )
            )
        return family.seq2seq or self.texts is not None or settings.head == "words"

    def scoring(self, settings: TuneSettings) -> Scoring | FirstTokens | None:
        """How label words are told apart, where they are scored. Raises InputError for words that
        cannot be."""
        if self.tree is not None:
            return Scoring.of(self.tree, settings.loss)
        if self.texts is None and self.spoken(settings):
            return FirstTokens.of_words(self.spec.words, self._tokenizer)
        return None

    def texts_of(self, *, train: bool) -> TargetTexts | None:
        """The targets of training or evaluation rows; None for other tasks."""
        return self.texts if train else self.held_out_texts

    def target_tokens(self, rows: Ints, *, train: bool) -> list[tuple[int, ...]]:
        """Token ids of the targets of some rows of a free-text task."""
        table, texts = (self.train if train else self.held_out), self.texts_of(train=train)
        if texts is None:
            raise TypeError(f"{self.name} is no free-text task")
        return [texts.tokens[str(table.labels[row])] for row in rows.tolist()]

    def route_spec(self, settings: TuneSettings) -> RouteSpec:
        """The structure of what a tuning trains.

        Raises InputError for settings that do not fit the backbone or the cache.
        """
        backbone, dual = self.backbone, bool(self.backbone.family.towers)
        method = find_method(settings.method, dual=dual)
        heads = HEADS[:1] if dual else HEADS
        for name, known in (("precision", PRECISIONS), ("head", heads), ("init", method.inits)):
            found = getattr(settings, name)
            if found not in known:
                raise InputError(explain(name, expected=f"one of {known}", found=found))
        if dual and settings.batch_size < 2:
            wanted = "2 or more: other pairs of a batch are what a pair is told from"
            raise InputError(explain("batch size", expected=wanted, found=settings.batch_size))
        spoken = self.spoken(settings)
        if spoken and backbone.family.causal and not method.speaks:
            raise InputError(
                explain(
                    "method",
                    expected="sherl, where a causal model keeps its own head",
                    found=settings.method,
                    todo="Use --method sherl, or a pooled head.",
                )
            )
        cached = {kind: spec.taps for kind, spec in self.cache.specs(self.splits).items()}
        taps, last = method.choose_taps(backbone, settings.late, cached)
        if not 1 <= settings.reduction <= backbone.width:
            raise InputError(
                explain("reduction", expected=f"1 to {backbone.width}", found=settings.reduction)
            )
        return RouteSpec(
            settings.method,
            taps,
            last,
            settings.late,
            settings.reduction,
            method.variant(backbone.family),
            settings.init,
            0 if spoken else self.outputs,
            settings.pool,
            backbone.family.front,
            self.cache.identity.max_length if backbone.family.images else 0,
        )

    def targets(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """What a pooled head learns of `rows` of the training table: class numbers `[n]`, or
        numbers `[n]` of mean 0 and spread 1."""
        labels = [self.train.labels[row] for row in rows]
        if self.spec.kind == "classification":
            return torch.tensor(labels, dtype=torch.long, device=device)
        mean, spread = self.scaling
        return (torch.tensor(labels, dtype=torch.float32, device=device) - mean) / spread

    def measured(self, outputs: Tensor) -> dict[str, float]:
        """The metrics of outputs `[N, C]` for the held-out rows, in percent."""
        if self.spec.kind == "retrieval":
            return self.pairings[1].recalls(outputs)
        if self.spec.kind == "text":
            return text_metrics(outputs)
        labels = np.array(self.held_out.labels)
        return metrics.evaluate(self.spec.metrics, labels, self.predictions(outputs))

    def predictions(self, outputs: Tensor) -> npt.NDArray[Any]:
        """Classes or numbers from head outputs or word scores `[N, outputs]`.

        A graded task on words gives the mean of the grades, weighted by the words' probability.
        """
        return predictions(self.spec, outputs, self.scaling)


def _reading(texts: TargetTexts, table: LabelTable, taps: tuple[int, ...]) -> Reading:
    """Of every row of a table the states along its own target."""
    paths = [
        texts.path(identity, str(label))
        for identity, label in zip(table.ids, table.labels, strict=True)
    ]
    distinct = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    return Reading(texts.stream, taps, tuple(distinct), tuple(distinct[path] for path in paths))


def predictions(spec: TaskSpec, outputs: Tensor, scaling: tuple[float, float]) -> npt.NDArray[Any]:
    """Classes `int64 [N]`, or numbers `float64 [N]`, from outputs `[N, C]`."""
    if spec.kind == "classification":
        return outputs.argmax(-1).cpu().numpy()
    if outputs.shape[-1] == 1:
        return outputs[:, 0].double().cpu().numpy() * scaling[1] + scaling[0]
    grades = torch.tensor([float(word) for word in spec.words], dtype=torch.float64)
    return (outputs.double().cpu().softmax(-1) @ grades).numpy()
