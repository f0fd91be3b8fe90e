"""A task of a cache: its rows, targets and what outputs mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import FeatureCache, InputError, LabelTable, TaskSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Ints, Reading
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.base import RouteSpec
from sherl_pipe.stages.settings import HEADS, PRECISIONS, TuneSettings
from sherl_pipe.stages.words import PrefixTree, Scoring
from torch import Tensor

HOLD_OUT = 10  # one in so many training examples, where a task has no validation split


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
        self.tree: PrefixTree | None = None
        if backbone.family.seq2seq:
            self.tree = PrefixTree.of_words(self.spec.words, tokenizer, backbone.start)
        numbers = np.array(self.train.labels, np.float64)
        spread = float(numbers.std()) if self.spec.kind == "regression" else 1.0
        mean = float(numbers.mean()) if self.spec.kind == "regression" else 0.0
        self.scaling = (mean, spread or 1.0)

    @property
    def splits(self) -> set[str]:
        """Where the cache holds its examples."""
        return splits_of(self.cache, (self.train, self.held_out))

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

    def readings(
        self,
        table: LabelTable,
        reads: Mapping[str, tuple[int, ...]],
        scoring: Scoring | None,
        *,
        train: bool,
    ) -> dict[str, Reading]:
        """What is read for a table's rows; of decoder states those that `scoring` needs, in
        training the label's own path, else every word's."""
        found = {}
        for role, taps in reads.items():
            if role == "decoder" and self.tree is not None and scoring is not None:
                paths = scoring.paths if train else (scoring.nodes,)
                choices = self.words_of(table.labels).tolist() if train else [0] * len(table.ids)
                found[role] = Reading(self.tree.stream, taps, paths, tuple(choices))
            else:
                found[role] = Reading(role, taps)
        return found

    def route_spec(self, settings: TuneSettings) -> RouteSpec:
        """The structure of what a tuning trains.

        Raises InputError for settings that do not fit the backbone or the cache.
        """
        method, backbone = find_method(settings.method), self.backbone
        for name, known in (("precision", PRECISIONS), ("head", HEADS), ("init", method.inits)):
            found = getattr(settings, name)
            if found not in known:
                raise InputError(explain(name, expected=f"one of {known}", found=found))
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
            self.outputs,
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

    def predictions(self, outputs: Tensor) -> npt.NDArray[Any]:
        """Classes or numbers from head outputs or word scores `[N, outputs]`.

        A graded task on words gives the mean of the grades, weighted by the words' probability.
        """
        return predictions(self.spec, outputs, self.scaling)


def splits_of(cache: FeatureCache, tables: Iterable[LabelTable]) -> set[str]:
    """The splits of a cache that hold the examples of label tables, as far as it has them."""
    places = cache.places
    return {places[each][0] for table in tables for each in table.ids if each in places}


def predictions(spec: TaskSpec, outputs: Tensor, scaling: tuple[float, float]) -> npt.NDArray[Any]:
    """Classes `int64 [N]`, or numbers `float64 [N]`, from outputs `[N, C]`."""
    if spec.kind == "classification":
        return outputs.argmax(-1).cpu().numpy()
    if outputs.shape[-1] == 1:
        return outputs[:, 0].double().cpu().numpy() * scaling[1] + scaling[0]
    grades = torch.tensor([float(word) for word in spec.words], dtype=torch.float64)
    return (outputs.double().cpu().softmax(-1) @ grades).numpy()


def train_and_held_out(tables: Mapping[str, LabelTable]) -> tuple[LabelTable, LabelTable]:
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
