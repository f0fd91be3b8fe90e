"""What a tuning is judged by, and its learning rate, against values found by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sherl_pipe.cache import InputError
from sherl_pipe.stages import metrics
from sherl_pipe.stages.settings import schedule


def test_schedule() -> None:
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert shares[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])
    assert schedule(0, 10, 0.0) == 1.0 and schedule(9, 10, 0.0) == pytest.approx(0.1)
    assert schedule(499, 100_000, 0.5) == 1.0 > schedule(501, 100_000, 0.5)  # 500 steps at most


def test_metrics_by_hand() -> None:
    labels, found = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 0, 0, 1, 1])
    # 3 true and 1 false positives, 1 true and 1 false negatives.
    names = ("accuracy", "f1", "matthews")
    expected = {"accuracy": 400 / 6, "f1": 75.0, "matthews": 100 * (3 * 1 - 1 * 1) / 8}
    assert metrics.evaluate(names, labels, found) == pytest.approx(expected)
    numbers, guesses = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    # Deviations (-1.5, -.5, .5, 1.5) and (-3, -1, -2, 6); ranks differ by one, twice.
    expected = {"pearson": 100 * 13 / (5 * 50) ** 0.5, "spearman": 100 * (1 - 6 * 2 / 60)}
    assert metrics.evaluate(tuple(expected), numbers, guesses) == pytest.approx(expected)
    assert metrics.headline(expected) == pytest.approx(sum(expected.values()) / 2)
    constant = np.zeros(4)
    assert metrics.evaluate(("pearson", "spearman"), numbers, constant)["pearson"] == 0.0
    assert metrics.evaluate(("f1", "matthews"), labels, 0 * labels) == {"f1": 0.0, "matthews": 0.0}
    with pytest.raises(InputError, match="metric: expected one of"):
        metrics.evaluate(("bleu",), labels, found)
