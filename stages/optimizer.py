"""The optimizer of a tuning, and what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from sherl_pipe.stages.methods.guided import GATE_SCALE
from sherl_pipe.stages.settings import TuneSettings
from torch import Tensor, nn


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Shorten all gradients together to the norm `most`, if they are longer; returns the norm that
    they had."""
    held = [each for each in parameters if each.grad is not None]
    norm = nn.utils.get_total_norm([each.grad for each in held if each.grad is not None])
    # Otherwise every gradient would be read and written once more to be multiplied by one.
    if norm > most:
        nn.utils.clip_grads_with_norm_(held, most, total_norm=norm)
    return norm


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TuneSettings
) -> torch.optim.Optimizer:
    """A fresh optimizer of the parameters that are tuned; a group's rate is `lr` x `share`.

    A gate is divided by GATE_SCALE before it acts. Adam moves every parameter by about the rate,
    whatever its gradient, so an open gate that learned at the full rate would be closed within a
    few dozen steps, and with it the way of the frozen state. The published start has its gate
    closed and trains it at the full rate.
    """
    rates: dict[float, list[nn.Parameter]] = {1.0: [], GATE_SCALE: []}
    for name, parameter in parameters.items():
        slow = settings.init == "residual" and name.rpartition(".")[2] == "gate"
        rates[GATE_SCALE if slow else 1.0].append(parameter)
    groups = [{"params": members, "share": share} for share, members in rates.items()]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
