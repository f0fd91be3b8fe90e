"""Task metrics as GLUE defines them, in percent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain

Numbers = npt.NDArray[Any]


def _accuracy(labels: Numbers, predictions: Numbers) -> float:
    return float((labels == predictions).mean())


def _f1(labels: Numbers, predictions: Numbers) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(labels: Numbers, predictions: Numbers) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: Numbers, predictions: Numbers) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: Numbers, predictions: Numbers) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predictions)


def _correlation(how: Callable[..., Any], labels: Numbers, predictions: Numbers) -> float:
    # A constant has no correlation with anything; GLUE's scripts score it 0.
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(how(labels, predictions).statistic)


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def evaluate(names: Sequence[str], labels: Numbers, predictions: Numbers) -> dict[str, float]:
    """Every named metric, in percent. Raises InputError for an unknown name."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InputError(explain("metric", expected=f"one of {list(METRICS)}", found=unknown[0]))
    return {name: 100 * METRICS[name](labels, predictions) for name in names}


def headline(metrics: dict[str, float]) -> float:
    """One number per task: the mean of its metrics, as GLUE averages them; of free text the exact
    matches."""
    if "exact_match" in metrics:
        return metrics["exact_match"]
    return math.fsum(metrics.values()) / len(metrics)
