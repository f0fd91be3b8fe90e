"""GLUE tasks for the benchmarks: reading, tokenising, batching and scoring.

Everything here is shared by all methods, so that two methods compared on a task see the same
rows, in the same batches, and are scored by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import matthews_corrcoef
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
Phase = Literal["search", "final", "cost"]

MAX_LENGTH = 128
BATCH_SIZE = 32
WINDOW_BATCHES = 50
TRAIN_ROWS = 4000
SEARCH_ROWS = 1500
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class TaskSpec:
    """What distinguishes one GLUE task from another."""

    fields: tuple[str, ...]
    outputs: int
    holdout: int

    @property
    def regression(self) -> bool:
        """Whether the label is a number to be predicted and not a class."""
        return self.outputs == 1


TASKS: dict[str, TaskSpec] = {
    "cola": TaskSpec(("sentence",), outputs=2, holdout=500),
    "sst2": TaskSpec(("sentence",), outputs=2, holdout=500),
    "stsb": TaskSpec(("sentence1", "sentence2"), outputs=1, holdout=500),
    "rte": TaskSpec(("sentence1", "sentence2"), outputs=2, holdout=400),
}
LABEL_SCALE = 5.0  # STS-B similarities run from 0 to 5; the models regress on 0 to 1.


@dataclass(frozen=True)
class Split:
    """Tokenised rows of one split, not padded."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    labels: FloatArray

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, start: int, stop: int) -> Split:
        """The rows ``start`` to ``stop`` (exclusive) in their present order."""
        return Split(
            self.input_ids[start:stop], self.token_type_ids[start:stop], self.labels[start:stop]
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens per row."""
        return np.array([len(row) for row in self.input_ids], dtype=np.int64)


@dataclass(frozen=True)
class Batch:
    """One padded batch."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TaskData:
    """A task as a method gets it: rows to train on and rows to be scored on.

    In the search phase both come from the training file; the validation file is then not even
    read.
    """

    name: str
    spec: TaskSpec
    train: Split
    evaluation: Split
    phase: Phase
    train_rows: list[dict[str, Any]]
    evaluation_rows: list[dict[str, Any]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def tokenize(rows: list[dict[str, Any]], spec: TaskSpec, tokenizer: Any) -> Split:
    """Tokenise rows; sentence pairs go in as text and text pair."""
    texts = [[row[field] for row in rows] for field in spec.fields]
    encoded = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, return_token_type_ids=True)
    labels = np.array([row["label"] for row in rows], dtype=np.float64)
    if spec.regression:
        labels = labels / LABEL_SCALE
    return Split(encoded["input_ids"], encoded["token_type_ids"], labels)


def holdout_rows(available: int, wanted: int) -> int:
    """Size of the held-out slice: as specified, but at most a quarter of a tiny training set."""
    return min(wanted, available // 4)


def load_task(
    data: Path, name: str, phase: Phase, tokenizer: Any, rows: int = TRAIN_ROWS
) -> TaskData:
    """Load a task for one phase.

    ``rows`` bounds the training set. Below the default it bounds the evaluation rows as well,
    for quick trials. The search phase trains and scores on disjoint slices of the same shuffled
    training rows that the final phase trains on.
    """
    spec = TASKS[name]
    train = read_rows(data / name / "train.jsonl")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(train))[:rows]
    chosen = [train[i] for i in order]
    if phase == "search":
        held = holdout_rows(len(chosen), spec.holdout)
        chosen, evaluated = chosen[held : held + SEARCH_ROWS], chosen[:held]
    else:
        evaluated = read_rows(data / name / "validation.jsonl")
        if rows < TRAIN_ROWS:
            evaluated = evaluated[:rows]
    splits = [tokenize(part, spec, tokenizer) for part in (chosen, evaluated)]
    return TaskData(name, spec, splits[0], splits[1], phase, chosen, evaluated)


def bucketed_batches(
    lengths: npt.NDArray[np.int64], seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Row numbers of one epoch's batches, rows of similar length together.

    Sorting only within windows of a shuffled order keeps the batches random while saving most of
    the padding. The result depends on the seed and the epoch alone, hence is the same for every
    method.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches: list[npt.NDArray[np.int64]] = []
    window = WINDOW_BATCHES * BATCH_SIZE
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Row numbers of batches for inference, ordered by length over the whole split."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


def collate(split: Split, rows: npt.NDArray[np.int64], regression: bool) -> Batch:
    """Pad the given rows to the longest of them."""
    width = max(len(split.input_ids[i]) for i in rows)
    # Zero is BERT's [PAD] id and also the neutral value of the other two inputs.
    input_ids, mask, types = torch.zeros(3, len(rows), width, dtype=torch.long)
    for line, row in enumerate(rows):
        size = len(split.input_ids[row])
        input_ids[line, :size] = torch.tensor(split.input_ids[row])
        types[line, :size] = torch.tensor(split.token_type_ids[row])
        mask[line, :size] = 1
    dtype = torch.float32 if regression else torch.long
    return Batch(input_ids, mask, types, torch.tensor(split.labels[rows], dtype=dtype))


def iterate(
    split: Split, batches: list[npt.NDArray[np.int64]], regression: bool
) -> Iterator[tuple[npt.NDArray[np.int64], Batch]]:
    """Yield the row numbers and the padded batch for each entry of ``batches``."""
    for rows in batches:
        yield rows, collate(split, rows, regression)


def _correlation(function: Any, predictions: FloatArray, labels: FloatArray) -> float:
    """A correlation, counting the undefined one of a constant prediction as zero."""
    if np.ptp(predictions) == 0.0:
        return 0.0
    return float(function(predictions, labels).statistic)


def score(name: str, outputs: FloatArray, labels: FloatArray) -> dict[str, float]:
    """GLUE's metrics of a task; the entry ``score`` is the one that represents the task.

    ``outputs`` has one row per example: class scores, or one column for a regression.
    """
    if TASKS[name].regression:
        pearson = _correlation(pearsonr, outputs[:, 0], labels)
        spearman = _correlation(spearmanr, outputs[:, 0], labels)
        return {"score": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}
    predictions = outputs.argmax(axis=1)
    if name == "cola":
        matthews = float(matthews_corrcoef(labels.astype(np.int64), predictions))
        return {"score": matthews, "matthews": matthews}
    accuracy = float((predictions == labels).mean())
    return {"score": accuracy, "accuracy": accuracy}
