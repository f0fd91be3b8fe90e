"""LST's side blocks pruned from T5's own by Fisher importance (Sung et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.methods.lst_seq2seq import STREAMS, LstSeq2Seq
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.tokens import Tokens
from torch import Tensor, nn

EXAMPLES = 1024  # at most, that the importance is summed over
WHAT = "importance of weights"

# By the part of a block: its linear layers in the order in which states go through them. Those of
# one group have the same inputs, and lose the same outputs.
_GROUPS = {
    "SelfAttention": [["q", "k", "v"], ["o"]],
    "EncDecAttention": [["q", "k", "v"], ["o"]],
    "DenseReluDense": [["wi", "wi_0", "wi_1"], ["wo"]],
}


def importances(
    backbone: Backbone,
    tokens: Tokens,
    words: Sequence[Sequence[int]],
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Squared gradient of every matrix that is pruned, summed over single examples.

    The loss is T5's own: the mean cross-entropy of the answer's tokens, without dropout.

    Args:
        backbone: a whole T5, in float32.
        tokens: of the inputs.
        words: the answers' token ids, the end token included.
        progress: told of examples.

    Returns float32 tensors by the weights' names in the model.
    """
    model: Any = backbone.model
    weights = {"shared.weight": model.shared.weight, **dict(_matrices(model))}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for number, word in enumerate(words):
            inputs = {k: v.to(backbone.device) for k, v in tokens.batch([number], 0).items()}
            labels = torch.tensor([list(word)], device=backbone.device)
            loss = model(**inputs, labels=labels, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for total, gradient in zip(found.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient)
            progress(WHAT, number + 1, len(words), "examples")
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return found


def prune(
    backbone: Backbone, route: LstSeq2Seq, importance: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The side blocks and side norms that are left of the backbone's.

    States are followed through all blocks in order, those without a side block too, from the
    embedding to the end of the encoder and on through the decoder. A linear layer keeps the inputs
    that the layer before kept of its outputs, and of its own outputs as many as the side blocks
    have, the most important ones. Which channels these are is not matched across residual
    connections, and heads are no unit.

    Args:
        backbone: the whole T5.
        route: gives the widths and the layers that have a side block.
        importance: as `importances` gives it.

    Returns weights by the names of the route's parameters.
    """
    model: Any = backbone.model
    found: dict[str, Tensor] = {}
    width = route.encoder.first.out_features
    kept = _most(importance["shared.weight"].double().sum(0), width)
    for stream in STREAMS:
        stack, ladder = model.get_submodule(stream), getattr(route, stream)
        side: Any = ladder.stack
        places = {layer: place for place, layer in enumerate(ladder.layers)}
        inner = side.config.num_heads * side.config.d_kv
        sizes = {"q": inner, "o": width, "wo": width}
        for number, block in enumerate(stack.block):
            for at, layer in enumerate(block.layer):
                pruned = {"layer_norm.weight": layer.layer_norm.weight[kept]}
                part, groups = _parts(layer)
                for group in groups:
                    names = [f"{part}.{leaf}.weight" for leaf in group]
                    path = f"{stream}.block.{number}.layer.{at}"
                    product = torch.ones((), dtype=torch.float64, device=kept.device)
                    for name in names:
                        # Products of three squared gradients leave float32's range.
                        product = product * importance[f"{path}.{name}"][:, kept].double()
                    rows = _most(product.sum(1), sizes.get(group[0], side.config.d_ff))
                    for name in names:
                        weight = layer.get_parameter(name)
                        pruned[name] = weight[rows][:, kept]
                    kept = rows
                if number in places:
                    prefix = f"{stream}.stack.block.{places[number]}.layer.{at}"
                    found |= {f"{prefix}.{name}": values for name, values in pruned.items()}
        found[f"{stream}.stack.final_layer_norm.weight"] = stack.final_layer_norm.weight[kept]
    return {name: values.detach().cpu().contiguous() for name, values in found.items()}


def _matrices(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """All matrices of all blocks, by name."""
    for stream in STREAMS:
        for number, block in enumerate(model.get_submodule(stream).block):
            for at, layer in enumerate(block.layer):
                part, groups = _parts(layer)
                for leaf in (leaf for group in groups for leaf in group):
                    name = f"{part}.{leaf}.weight"
                    path = f"{stream}.block.{number}.layer.{at}"
                    yield f"{path}.{name}", layer.get_parameter(name)


def _parts(layer: nn.Module) -> tuple[str, list[list[str]]]:
    """What a part of a block computes with, and its groups of linear layers."""
    (part,) = (name for name in _GROUPS if hasattr(layer, name))
    inside = layer.get_submodule(part)
    return part, [[leaf for leaf in group if hasattr(inside, leaf)] for group in _GROUPS[part]]


def _most(norms: Tensor, count: int) -> Tensor:
    """Places of the `count` largest, in order; of equal ones the first."""
    return norms.argsort(descending=True, stable=True)[:count].sort().values
