"""Modules whose tensors also go by the names that the papers' programs gave them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]
# A tensor of a module, and which part of it, in which shape, a published name stands for.
Names = dict[str, tuple[Tensor, View]]


def whole(tensor: Tensor) -> Tensor:
    """All of it, as it is."""
    return tensor


def part(place: int) -> View:
    """What belongs to one tap, of a tensor `[K, ...]`."""
    return lambda tensor: tensor[place]


def pair(name: str, module: nn.Module, view: View = whole) -> Names:
    """Weight and bias of a layer."""
    return {
        f"{name}.{kind}": (module.get_parameter(kind), view)
        for kind in ("weight", "bias")
        if getattr(module, kind) is not None
    }


def pointwise(name: str, layer: nn.Linear) -> Names:
    """A linear layer over channels that was published as a 1 x 1 convolution."""
    return {
        f"{name}.weight": (layer.weight, lambda weight: weight[..., None, None]),
        f"{name}.bias": (layer.bias, whole),
    }


def batch_norm(name: str, norm: nn.BatchNorm1d) -> Names:
    """A batch norm with its running statistics."""
    return pair(name, norm) | {
        f"{name}.{kind}": (norm.get_buffer(kind), whole)
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    }


class Published(nn.Module):
    """A module that can be filled from, and compared with, published tensors."""

    @abstractmethod
    def published(self) -> Names:
        """By published name, where a tensor is kept."""

    def reference_parameters(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """Views of parameters and buffers under the papers' names, or of the parameters'
        gradients, which are zero where there is none."""
        named = self.published().items()
        if not gradients:
            return {name: view(tensor.detach()) for name, (tensor, view) in named}
        return {
            name: view(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
            for name, (tensor, view) in named
            if isinstance(tensor, nn.Parameter)
        }

    def load_published(self, params: Mapping[str, Tensor]) -> None:
        """Take over published tensors.

        Raises InputError for names that are missing or left over, and for a shape that does not
        fit; nothing is taken over then.
        """
        mine = self.reference_parameters()
        if mine.keys() != params.keys():
            odd = {"no": mine.keys() - params.keys(), "unknown": params.keys() - mine.keys()}
            found = " and ".join(f"{how} {sorted(names)}" for how, names in odd.items() if names)
            raise InputError(explain("parameters", expected="the published names", found=found))
        for name, view in mine.items():
            mine_is, theirs_is = list(view.shape), list(params[name].shape)
            if mine_is != theirs_is:
                raise InputError(
                    explain(f"parameters: shape of {name}", expected=mine_is, found=theirs_is)
                )
        with torch.no_grad():
            for name, view in mine.items():
                view.copy_(params[name])


def probe(params: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    """The tensor whose shape tells a module's sizes.

    Raises InputError where it is missing or has another number of axes.
    """
    found = params.get(name)
    if found is None:
        raise InputError(explain("parameters", expected=name, found=sorted(params)))
    if found.ndim != axes:
        raise InputError(
            explain(f"parameters: axes of {name}", expected=axes, found=list(found.shape))
        )
    return found


def count(params: Mapping[str, Tensor], before: str, after: str) -> int:
    """How many layers there are by the names `before`, a number, `after`."""
    return sum(
        name.startswith(before)
        and name.endswith(after)
        and name[len(before) : len(name) - len(after)].isdecimal()
        for name in params
    )
