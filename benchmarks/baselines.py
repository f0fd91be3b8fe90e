"""Methods compared on GLUE with the MiniLM-L6 encoder.

A method is a function of a task, a learning rate, a seed and a number of epochs, entered in
``METHODS``. Everything but the building of its model is shared, see ``training``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sherl_pipe.cache import CODECS
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from cached import TUNINGS, tuned
from glue_tasks import FloatArray, TaskData, holdout_rows, score
from training import Meter, PooledClassifier, RunResult, load_encoder, predict, train_and_score

PROBE_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBE_ALPHA = (1.0, 10.0, 100.0, 1e3, 1e4)


class Method(Protocol):
    """The call every entry of ``METHODS`` supports."""

    def __call__(self, task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
        """Train on ``task.train`` and score on ``task.evaluation``."""
        ...


def lora(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """Low-rank adapters on the query and value projections, and the head."""
    encoder = load_encoder()
    meter = Meter()
    torch.manual_seed(seed)
    # The head is drawn first, so that it is the same for every method with this seed.
    head = nn.Linear(encoder.config.hidden_size, task.spec.outputs)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"], bias="none"
    )
    model = PooledClassifier(get_peft_model(encoder, config), head)
    return train_and_score(
        model, list(head.parameters()), task, meter, lr=lr, seed=seed, epochs=epochs
    )


def full(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """Fine-tuning of every weight of the encoder, and the head."""
    encoder = load_encoder()
    meter = Meter()
    torch.manual_seed(seed)
    head = nn.Linear(encoder.config.hidden_size, task.spec.outputs)
    encoder.requires_grad_(True)
    model = PooledClassifier(encoder, head)
    return train_and_score(
        model, list(head.parameters()), task, meter, lr=lr, seed=seed, epochs=epochs
    )


def probe(task: TaskData, *, lr: float | None, seed: int, epochs: int) -> RunResult:
    """A linear model on the frozen encoder's pooled features.

    There is no learning rate, no random choice and one pass over the data, which counts as the
    epoch; it includes the selection of the regularisation on a slice held out of the training
    rows.
    """
    del lr, seed, epochs
    regression = task.spec.regression
    encoder = load_encoder()
    # An identity in place of the head makes the classifier return the pooled features.
    pooled = PooledClassifier(encoder, nn.Identity())
    meter = Meter()
    features = predict(pooled, task.train, regression)
    labels = task.train.labels
    held = holdout_rows(len(task.train), task.spec.holdout)
    grid = PROBE_ALPHA if regression else PROBE_C

    def fit(strength: float, first: int) -> Any:
        linear = Ridge(strength) if regression else LogisticRegression(C=strength, max_iter=5000)
        return make_pipeline(StandardScaler(), linear).fit(features[first:], labels[first:])

    def outputs(model: Any, rows: FloatArray) -> FloatArray:
        values = model.predict(rows) if regression else model.predict_proba(rows)
        return np.asarray(values, dtype=np.float64).reshape(len(rows), task.spec.outputs)

    slice_scores = [
        score(task.name, outputs(fit(strength, held), features[:held]), labels[:held])["score"]
        for strength in grid
    ]
    best = grid[int(np.argmax(slice_scores))]
    model = fit(best, 0)
    meter.stop()
    predicted = outputs(model, predict(pooled, task.evaluation, regression))
    return RunResult(
        metrics=score(task.name, predicted, task.evaluation.labels),
        seconds_per_epoch=meter.seconds,
        cpu_seconds_per_epoch=meter.cpu_seconds,
        # Two classes need one weight vector, as the regression does.
        trainable_parameters=features.shape[1] + 1,
        peak_rss_mib=meter.peak_rss_mib,
        selected={"alpha" if regression else "C": best},
    )


METHODS: dict[str, Method] = {
    "probe": probe,
    "lora": lora,
    "full": full,
}
NAMES = (*METHODS, *TUNINGS)
# What is compared at one rate, that of another method.
RATES_OF = {f"sherl_{codec}": "sherl" for codec in CODECS}

# Seeds of the search, where they are more than one. Three of SHERL's take less time than one of
# LoRA's, and its runs with high rates differ much.
SEARCH_SEEDS = {"sherl": 3, "sherl_paper": 3, "sherl_late1": 3}  # of the others one

# The rates tried per method. A method without rates has nothing to search and no randomness, and
# is run once.
LR_GRIDS: dict[str, tuple[float, ...]] = {
    "probe": (),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "full": (2e-5, 5e-5, 1.5e-4, 5e-4),
    "sherl": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "sherl_paper": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "sherl_late1": (1e-3, 3e-3, 6e-3, 1.2e-2),
    "sherl_late1_paper": (1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    "lst": (1e-3, 3e-3, 1e-2, 3e-2),
    "dtl": (1e-3, 3e-3, 1e-2, 3e-2),
    "unipt": (3e-4, 1e-3, 3e-3, 1e-2),
    "weighted": (3e-3, 1e-2, 3e-2, 1e-1),
    "linear": (3e-3, 1e-2, 3e-2, 1e-1),
}


def trained(
    name: str, task: TaskData, rates: Sequence[float | None], seeds: Sequence[int], epochs: int
) -> dict[tuple[float | None, int], RunResult]:
    """Every rate with every seed; one after another, or from a cache in one pass."""
    if name in TUNINGS:
        given = [rate for rate in rates if rate is not None]
        return tuned(name, task, given, seeds, epochs)
    method = METHODS[name]
    return {
        (rate, seed): method(task, lr=rate, seed=seed, epochs=epochs)
        for rate in rates
        for seed in seeds
    }


def rates(name: str) -> tuple[float, ...]:
    """The rates tried for a method."""
    return LR_GRIDS[RATES_OF.get(name, name)]
