"""Ladder side-tuning's side blocks beside one stack of frozen ones (Sung et al., NeurIPS 2022)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import FAMILIES, Side
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.guided import GATE_SCALE
from sherl_pipe.stages.methods.parts import StackedLinear, start_linear
from sherl_pipe.stages.methods.published import Names, Published, pair, part, whole
from sherl_pipe.stages.methods.route import RouteSpec
from sherl_pipe.stages.surgery import bare, without_embeddings
from torch import Tensor, nn

STD = 0.01  # of the initial down- and up-sampling weights


class Ladder(Published):
    """Side blocks fed by the taps of a frozen stack (SPEC 4).

    The side state starts as a projection of the embedding. In front of side block l it becomes
    m_l s + (1 - m_l) p_l, p_l being a projection of the frozen block's output and
    m_l = sigmoid(a_l / 0.1), with a_l = 0 at the start.

    Args:
        stack: the family's own model of side blocks, without embeddings; called with
            `inputs_embeds [B, S, h]`.
        path: where its blocks are.
        layers: numbers of the frozen blocks that they are beside.
        width: d, of the frozen stack.
        hidden: h, of the side blocks.
        before: rate of dropout on the embedding.
        after: rate of dropout on the result.
    """

    def __init__(
        self,
        stack: nn.Module,
        path: str,
        layers: Sequence[int],
        width: int,
        hidden: int,
        *,
        before: float,
        after: float,
    ) -> None:
        super().__init__()
        self.layers, self._path = tuple(layers), path
        self.first = projection(width, hidden)
        self.down = StackedLinear(len(layers), width, hidden, STD)
        self.gates = nn.Parameter(torch.zeros(len(layers)))
        self.stack = stack
        self.before, self.after = nn.Dropout(before), nn.Dropout(after)
        self._rungs: list[tuple[Tensor, Tensor]] = []  # of the forward pass that runs
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(_mix, self._rungs, number))

    def reduce(self, packed: Packed) -> list[Tensor]:
        """K projections, padded `[B, S, h]`, of packed taps: the embedding and K - 1 outputs."""
        first = self.first(self.before(packed.tap(0)))
        rows = torch.cat([first.unsqueeze(0), self.down(packed.states[1:], packed.group)])
        # Padded as one tensor: on a device every `pad` waits to know where rows are.
        padded = packed.pad(rows.transpose(0, 1).flatten(1))
        return list(padded.unflatten(-1, (len(rows), -1)).unbind(-2))

    def reduce_live(self, taps: Tensor) -> list[Tensor]:
        """The same of `[K, B, S, d]`."""
        rungs = self.down(taps[1:].flatten(1, 2)).unflatten(1, taps.shape[1:3])
        return [self.first(self.before(taps[0])), *rungs]

    def forward(self, reduced: Sequence[Tensor], **inputs: Any) -> Tensor:
        """Side states `[B, S, h]` behind the stack's final norm, if it has one.

        Args:
            reduced: as `reduce` gives them.
            inputs: for the stack: `attention_mask`, and for a decoder `encoder_hidden_states`, ...
        """
        shares = torch.sigmoid(self.gates / GATE_SCALE)
        self._rungs[:] = zip(shares, reduced[1:], strict=True)
        try:
            out = self.stack(inputs_embeds=reduced[0], **inputs)
        finally:
            self._rungs.clear()
        states: Tensor = self.after(out.last_hidden_state)
        return states

    @property
    def blocks(self) -> nn.ModuleList:
        """The side blocks."""
        blocks = self.stack.get_submodule(self._path)
        if not isinstance(blocks, nn.ModuleList):
            raise TypeError(f"{self._path} is no ModuleList")
        return blocks

    def published(self) -> Names:
        """By published name (SPEC 4), where a tensor is kept."""
        named = pair("side_first_downsample", self.first)
        for place, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            named[f"side_gate_params.{layer}"] = (self.gates, partial(_one, place))
            named |= pair(f"side_downsamples.{layer}", self.down, part(place))
            for name, parameter in block.named_parameters():
                named[f"side_block.{layer}.{name}"] = (parameter, whole)
        for name, parameter in self.stack.named_parameters():
            if name.startswith("final_layer_norm."):
                leaf = name.removeprefix("final_layer_norm.")
                named[f"final_side_layer_norm.{leaf}"] = (parameter, whole)
        return named


def _one(place: int, gates: Tensor) -> Tensor:
    return gates[place : place + 1]


def _mix(
    rungs: Sequence[tuple[Tensor, Tensor]], number: int, _: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """In front of side block `number`: its rung into the side state."""
    share, rung = rungs[number]
    state, *rest = args
    return (share * state + (1 - share) * rung, *rest)


def projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with the published start."""
    return start_linear(nn.Linear(inputs, outputs), STD)


def t5_ladder(stack: Any, layers: Sequence[int], reduction: int) -> Ladder:
    """Side blocks for a T5 stack, started as T5 itself is, with the frozen table of positions.

    Widths of states, heads and feed-forward are divided by the reduction and rounded down; there
    are as many heads (SPEC 4).

    Args:
        stack: the frozen `T5Stack`.
        layers: numbers of the frozen blocks with a side block; at least one.
        reduction: r.

    Raises InputError for a reduction that leaves nothing.
    """
    frozen, config = stack.config, copy.deepcopy(stack.config)
    _divide(config, reduction, {key: getattr(frozen, key) for key in ("d_model", "d_kv", "d_ff")})
    config.num_layers = len(layers)
    config.vocab_size = 1  # of an embedding that is not kept
    side = type(stack)(config)
    side.embed_tokens = None
    side.dropout = nn.Identity()
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    side.block[0].layer[0].SelfAttention.relative_attention_bias.load_state_dict(table.state_dict())
    rate = frozen.dropout_rate
    return Ladder(side, "block", layers, frozen.d_model, config.d_model, before=rate, after=rate)


def bart_ladder(stack: Any, layers: Sequence[int], reduction: int) -> Ladder:
    """Side blocks for a stack of BART, started as BART itself is.

    There are as many heads, each with its width divided by the reduction and rounded down. Learned
    positions are in the embedding, which the ladder reads.

    Args:
        stack: the frozen `BartEncoder` or `BartDecoder`.
        layers: numbers of the frozen blocks with a side block; at least one.
        reduction: r.

    Raises InputError for a reduction that leaves nothing.
    """
    frozen, config = stack.config, copy.deepcopy(stack.config)
    kind = "decoder" if hasattr(stack.layers[0], "encoder_attn") else "encoder"
    inner, heads = f"{kind}_ffn_dim", getattr(frozen, f"{kind}_attention_heads")
    widths = {"d_model": frozen.d_model // heads, inner: getattr(frozen, inner)}
    _divide(config, reduction, widths)
    config.d_model *= heads
    setattr(config, f"{kind}_layers", len(layers))
    config.vocab_size = 1 + (config.pad_token_id or 0)  # of an embedding that is not kept
    config.encoder_layerdrop = config.decoder_layerdrop = 0.0
    side = type(stack)(config)
    bare(side, FAMILIES["bart"])
    side.dropout = 0.0  # the ladder's own is on the embedding
    rate = frozen.dropout
    return Ladder(side, "layers", layers, frozen.d_model, config.d_model, before=rate, after=rate)


def encoder_ladder(backbone: Backbone, layers: Sequence[int], reduction: int) -> Ladder:
    """Side blocks for an encoder or a causal decoder, started as its family is.

    There are as many heads, each with its width divided by the reduction and rounded down, as SPEC
    4 has it for T5; h is what these heads take.

    Args:
        backbone: the frozen model.
        layers: numbers of the frozen blocks with a side block; at least one.
        reduction: r.

    Raises InputError for a reduction that leaves nothing.
    """
    family, frozen = backbone.family, backbone.config
    sizes, config = side_of(backbone), copy.deepcopy(frozen)
    heads, width = frozen.num_attention_heads, frozen.hidden_size
    inner = getattr(frozen, sizes.feed_forward) or 4 * width
    narrow = (getattr(frozen, "head_dim", None) or width // heads) // sizes.step
    _divide(config, reduction, {"hidden_size": narrow, sizes.feed_forward: inner})
    if getattr(frozen, "head_dim", None):
        config.head_dim = config.hidden_size * sizes.step
    config.hidden_size *= heads * sizes.step
    config.num_hidden_layers = len(layers)
    if getattr(frozen, "layer_types", None):
        config.layer_types = [frozen.layer_types[layer] for layer in layers]
    if not family.images:
        config.vocab_size = 1 + (config.pad_token_id or 0)  # of an embedding that is not kept
    model: Any = backbone.model
    side = type(model)(config, **family.arguments)
    without_embeddings(side, family)
    return Ladder(
        side,
        family.streams["hidden"],
        layers,
        width,
        config.hidden_size,
        before=getattr(frozen, sizes.dropout) if sizes.dropout else 0.0,
        after=0.0,
    )


def side_of(backbone: Backbone) -> Side:
    """How its side blocks are made. Raises InputError for a family that has none."""
    if backbone.family.side is None:
        raise InputError(
            explain(
                "backbone of lst",
                expected=f"one of {', '.join(sorted(n for n, f in FAMILIES.items() if f.side))}",
                found=backbone.config.model_type,
                todo="Use --method sherl.",
            )
        )
    return backbone.family.side


def _divide(config: Any, reduction: int, widths: Mapping[str, int]) -> None:
    """Set widths of a config to their quotients."""
    most = min(widths.values())
    if not 1 <= reduction <= most:
        raise InputError(explain("reduction", expected=f"1 to {most}", found=reduction))
    for key, width in widths.items():
        setattr(config, key, width // reduction)


def layers_of(spec: RouteSpec, stream: str) -> list[int]:
    """Numbers of the frozen blocks that have a side block beside them."""
    return [tap - 1 for tap in spec.taps[stream][1:]]
