"""Processes that train the same tunings together, each on its part of every batch.

Every process has all the weights. The gradient of a batch's mean loss is the sum of the gradients
of the parts' mean losses, weighted by what the parts hold of what the mean is over, so all
processes take the very step that one would take on the whole batch, up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from torch import distributed, nn


@dataclass(frozen=True)
class Team:
    """The processes of torch's default process group, as one of them sees it.

    Attributes:
        rank: of this process; the first one, 0, evaluates and writes.
        size: number of processes.
        device: of the weights.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_group(cls, device: torch.device) -> Team:
        """The team of the process group that is initialised here."""
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def same(self, steps: Sequence[int]) -> None:
        """Wait for all, and raise InputError unless all go on from the same steps."""
        own = torch.tensor(list(steps), dtype=torch.long, device=self.device)
        all_of_them = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(all_of_them, own)
        if any(not torch.equal(each, own) for each in all_of_them):
            raise InputError(
                explain(
                    "checkpoints",
                    expected="the same ones for every worker",
                    found=f"steps {[each.tolist() for each in all_of_them]}",
                    todo="Give a folder that all machines share as --out.",
                )
            )

    def share(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give the first process's weights to all."""
        for parameter in parameters:
            distributed.broadcast(parameter.data, 0)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes; None where no process has one."""
        sizes = [parameter.numel() for parameter in parameters]
        flat = parameters[0].new_zeros(sum(sizes) + len(sizes))
        parts = flat.split([*sizes, len(sizes)])
        for place, (parameter, part) in enumerate(zip(parameters, parts, strict=False)):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
                parts[-1][place] = 1
        distributed.all_reduce(flat)
        there: list[float] = parts[-1].tolist()
        for parameter, part, known in zip(parameters, parts, there, strict=False):
            parameter.grad = part.view_as(parameter).clone() if known else None
