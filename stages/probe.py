"""A linear model on frozen features: where a pooled head can start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sherl_pipe.stages.features import Ints, Packed
from sherl_pipe.stages.tune import Tuner
from torch import Tensor, nn
from torch.nn import functional

# Penalties that are tried, per row; one row in so many decides between them.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 8
# More rows hardly move a linear model.
MOST_ROWS = 20_000
STEPS = 100
# A fit of classes looks at all rows about so often in all, whatever their number; for a plan, so
# many steps are timed.
LOOKS, TIMED_STEPS = 400, 10


def starts_from_probe(tuner: Tuner) -> bool:
    """Whether a tuning's head starts from a linear model; one that scores label words has none."""
    return tuner.settings.head == "probe" and tuner.spec.outputs > 0


@torch.inference_mode()
def head_inputs(tuner: Tuner, streams: Mapping[str, Packed]) -> Tensor:
    """What a tuning's pooled head reads of a batch, `[B, d]`, as the route is now."""
    route = tuner.route.eval()
    with tuner.autocast():
        (hidden,) = route.hidden([route], [route.fuse(streams)], [streams])
    return hidden.float()


def start_head(tuner: Tuner, found: Sequence[tuple[Ints, Tensor]]) -> None:
    """Put a linear model into a tuning's head, fitted to the `head_inputs` of training rows."""
    head: Any = tuner.route.head
    weight, bias = fit(*_known(tuner, found), tuner.task.outputs)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def start_seconds(
    tuner: Tuner, found: Sequence[tuple[Ints, Tensor]], rows: int, lap: Callable[[], float]
) -> float:
    """What `start_head` will take for `rows` training rows, told from the `head_inputs` of some.

    Looks at as many rows as there will be are timed; `lap` gives the seconds since its last call.
    """
    (features, targets), outputs = _known(tuner, found), tuner.task.outputs
    many = torch.arange(min(rows, MOST_ROWS), device=features.device) % len(features)
    features, targets = features[many], targets[many]
    seconds = 0.0
    for _ in range(2):  # the first time warms up
        lap()
        if outputs == 1:
            fit(features, targets, outputs)
            seconds = lap()
        else:
            looks = _solve(features, targets, outputs, 1.0, TIMED_STEPS)[2]
            seconds = lap() / looks * LOOKS
    return seconds


def _known(tuner: Tuner, found: Sequence[tuple[Ints, Tensor]]) -> tuple[Tensor, Tensor]:
    """`head_inputs` of training rows `[N, d]`, and what is to be told from them `[N]`."""
    rows = np.concatenate([each for each, _ in found])
    inputs = torch.cat([each for _, each in found]).clone()  # out of the inference mode
    return inputs, tuner.task.targets(rows.tolist(), inputs.device)


def fit(features: Tensor, targets: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight `[outputs, d]` and bias `[outputs]` of a logistic or ridge regression.

    Features are standardised inside; the penalty on the weights is the one of PENALTIES that is
    best on rows left out, with which all rows are fitted again. No random choice is made.

    Args:
        features: `[N, d]`.
        targets: class numbers `[N]`, or numbers `[N]` where `outputs` is 1.
    """
    if len(features) > MOST_ROWS:
        kept = torch.linspace(0, len(features) - 1, MOST_ROWS, dtype=torch.float64).long()
        features, targets = features[kept], targets[kept]
    mean, spread = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    rows = (features - mean) / spread
    apart = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    apart[::HELD_OUT] = True
    if len(rows) < 2 * HELD_OUT:
        best = max(PENALTIES)
    else:
        losses = {}
        for penalty in PENALTIES:
            weight, bias, _ = _solve(rows[~apart], targets[~apart], outputs, penalty)
            found = functional.linear(rows[apart], weight, bias)
            losses[penalty] = float(_loss(found, targets[apart], outputs))
        best = min(losses, key=losses.__getitem__)
    weight, bias, _ = _solve(rows, targets, outputs, best)
    weight = weight / spread
    return weight, bias - weight @ mean


def _loss(found: Tensor, targets: Tensor, outputs: int) -> Tensor:
    if outputs == 1:
        return functional.mse_loss(found[:, 0], targets)
    return functional.cross_entropy(found, targets)


def _solve(
    rows: Tensor, targets: Tensor, outputs: int, penalty: float, steps: int = STEPS
) -> tuple[Tensor, Tensor, int]:
    """Weight, bias, and how often all rows were looked at."""
    if outputs == 1:
        mean = targets.mean()
        square = rows.T @ rows / len(rows) + penalty * torch.eye(rows.shape[1]).to(rows)
        weight = torch.linalg.solve(square, rows.T @ (targets - mean) / len(rows))
        return weight.unsqueeze(0), mean.unsqueeze(0), 1
    linear, looks = nn.Linear(rows.shape[1], outputs, device=rows.device, dtype=rows.dtype), 0
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    solver = torch.optim.LBFGS(
        linear.parameters(), max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def closure() -> Tensor:
        nonlocal looks
        looks += 1
        solver.zero_grad()
        loss = _loss(linear(rows), targets, outputs)
        loss = loss + penalty / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return linear.weight.detach(), linear.bias.detach(), looks
