"""Passes of several routes through the frozen late blocks that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.route import joined
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


def decode_late(
    late: nn.Module,
    inputs: Sequence[Tensor],
    memories: Sequence[Tensor],
    batches: Sequence[Mapping[str, Packed]],
    tree: PrefixTree | None = None,
) -> list[Tensor]:
    """What leaves a decoder's last block, `[B, P, d]` of each batch.

    Args:
        late: as `late_decoder` gives it.
        inputs: `[B, P, d]`, what enters its first block, P being the nodes of a tree if there is
            one.
        memories: packed `[n, d]`, what its cross-attention reads.
        batches: cached features by stream.
        tree: label words.
    """
    encoders = [streams["encoder"] for streams in batches]
    size = max(each.longest for each in encoders)
    states, mask = on_paths(joined(inputs), tree), None
    if tree is not None:
        mask = tree.flat_mask(states.dtype).to(states.device)
    padded = [each.pad(memory, size) for each, memory in zip(encoders, memories, strict=True)]
    out = late(
        inputs_embeds=states,
        attention_mask=mask,
        encoder_hidden_states=joined(padded),
        encoder_attention_mask=joined([each.mask(size) for each in encoders]).long(),
        use_cache=False,
    ).last_hidden_state
    if tree is not None:
        out = out[:, tree.first_places().to(out.device)]
    return list(out.split([len(each.lengths) for each in encoders]))


def on_paths(states: Tensor, tree: PrefixTree | None) -> Tensor:
    """States `[B, nodes, d]` along the paths of a tree, `[B, P, d]`: nodes that several paths share
    stand in each of them. Without a tree the states as they are."""
    return states if tree is None else states[:, tree.flat_nodes]


def encode_late(
    late: nn.Module, inputs: Sequence[Tensor], batches: Sequence[Mapping[str, Packed]]
) -> list[tuple[Tensor, Tensor]]:
    """What leaves an encoder's last block, `[B, S, d]` of each batch, and its mask `[B, S]`.

    Args:
        late: as `late_encoder` gives it.
        inputs: packed `[n, d]`, what enters its first block.
        batches: cached features by stream.
    """
    packed = [streams["hidden"] for streams in batches]
    size = max(each.longest for each in packed)
    masks = [each.mask(size) for each in packed]
    padded = [each.pad(states, size) for each, states in zip(packed, inputs, strict=True)]
    out = late(inputs_embeds=joined(padded), attention_mask=joined(masks).long())
    parts = out.last_hidden_state.split([len(mask) for mask in masks])
    return list(zip(parts, masks, strict=True))
