"""Taps out of a backbone and a late route into it.

Nothing of a model's arithmetic is written again, but for attention with few queries and T5's norm
(see `attention.py` and `norm.py`). Taps are forward hooks on the model's own blocks; stage one runs
a copy of the model's structure (its weights shared) that ends after the last tap; the late route is
a copy that begins at the first late block.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from sherl_pipe.stages.attention import FewQueries, LonePosition
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import Family, blocks_of, stack_of
from sherl_pipe.stages.norm import by_hand
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def share(module: nn.Module) -> Any:
    """A copy of a module's structure over the very same weights and buffers.

    The copy can be cut and hooked without the original noticing.
    """
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def replace_module(model: nn.Module, path: str, new: nn.Module | None) -> None:
    """Put `new` where `path` points, or nothing."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def cut_after(backbone: Backbone, stream: str, last_tap: int) -> nn.Module:
    """The backbone's structure without the blocks that no tap up to `last_tap` needs."""
    model: nn.Module = share(backbone.model)
    blocks = blocks_of(model, backbone.family, stream)
    # What acts behind the first block alone has acted only where the second one begins.
    least = 2 if backbone.family.once else 1
    kept = nn.ModuleList(list(blocks)[: max(least, last_tap)])
    replace_module(model, backbone.family.streams[stream], kept)
    return model


class _Seen(threading.local):
    """States by tap, of each thread its own."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}


class TapRecorder:
    """Keeps the states at some taps of a list of blocks whenever they run.

    `states[tap]` is `[B, S, d]` after a forward pass, of the thread that ran it.
    """

    def __init__(self, blocks: nn.ModuleList, taps: Iterable[int]) -> None:
        self._seen = _Seen()
        for tap in taps:
            if tap < len(blocks):
                blocks[tap].register_forward_pre_hook(self._before(tap), with_kwargs=True)
            else:
                blocks[tap - 1].register_forward_hook(self._after(tap))

    @property
    def states(self) -> dict[int, Tensor]:
        """By tap, what this thread's last forward pass had there."""
        return self._seen.states

    def _before(self, tap: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.states[tap] = args[0] if args else kwargs["hidden_states"]

        return keep

    def _after(self, tap: int) -> Callable[..., None]:
        def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.states[tap] = output[0] if isinstance(output, tuple) else output

        return keep

    def stacked(self, taps: Sequence[int]) -> Tensor:
        """`[K, B, S, d]` of the listed taps."""
        return torch.stack([self.states[tap] for tap in taps])


class EmbeddingPassthrough(nn.Module):
    """Stands where embeddings were, and gives back the states that it is handed. A table of
    positions is handed none; what it gives is added to the states, and nothing is."""

    def forward(
        self, *given: Tensor | None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> Tensor:
        for each in (inputs_embeds, *given):
            if each is not None and each.is_floating_point():
                return each
        return torch.zeros(())


class PatchPassthrough(EmbeddingPassthrough):
    """The same for an image's. A model asks for the type of the weight that projects patches, and
    brings its inputs to it: that is the type of its blocks.

    Args:
        dtype: of the blocks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        projection = nn.Module()
        projection.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = projection


def _as_pixels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In front of a model of images: the name by which its forward hands on states."""
    return args, {"pixel_values": kwargs.pop("inputs_embeds"), **kwargs}


def without_embeddings(model: nn.Module, family: Family) -> None:
    """Let a model take `inputs_embeds [B, S, d]` as the very states that its blocks begin with,
    the first of which is like any other."""
    present = {name for name, _ in model.named_modules()}
    for path in present.intersection(family.embeddings):
        dtype = next(model.parameters()).dtype
        new = PatchPassthrough(dtype) if family.images else EmbeddingPassthrough()
        replace_module(model, path, new)
    if family.images:
        model.register_forward_pre_hook(_as_pixels, with_kwargs=True)
    for path in present.intersection(family.once):
        replace_module(model, path, None)


def late_encoder(backbone: Backbone, late: int) -> nn.Module:
    """The last `late` blocks of an encoder or a causal decoder, called with `inputs_embeds
    [B, S, d]` and `attention_mask [B, S]`, padded behind the tokens.

    The model's own forward builds masks, rotary tables, relative positions and the final norm; its
    weights are frozen and shared.
    """
    model: Any = share(backbone.model)
    family = backbone.family
    blocks = list(blocks_of(model, family, "hidden"))[-late:]
    replace_module(model, family.streams["hidden"], nn.ModuleList(blocks))
    without_embeddings(model, family)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = kinds[-late:]
    encoder: nn.Module = model
    return encoder


@contextmanager
def placed(stack: nn.Module, family: Family, places: Tensor | None) -> Iterator[None]:
    """Inside, tokens of a stack of an encoder-decoder stand at `places`, `[S]` or `[B, S]`, for its
    learned positions, instead of one behind another. Relative positions need no telling: these are
    the mask's."""
    if family.places is None or places is None:
        yield
        return
    handle = move_positions(stack, family, lambda: places)
    try:
        yield
    finally:
        handle.remove()


def move_positions(
    stack: nn.Module, family: Family, places_of: Callable[[], Tensor | None]
) -> RemovableHandle:
    """Let learned positions of a stack be those of `places_of()`, `[S]` or `[B, S]`, each smaller
    than the length of its batch; of None, what they are."""

    def move(_: nn.Module, __: tuple[Any, ...], rows: Tensor) -> Tensor:
        places = places_of()
        # Those of tokens one behind another are `[1, S, d]`, or the same for every example.
        return rows if places is None else rows.view(-1, *rows.shape[-2:])[0][places]

    return stack.get_submodule(family.places or "").register_forward_hook(move)


class NoPositions(nn.Module):
    """Stands where a table of positions was that is called with no states, and adds nothing."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())


def bare(stack: Any, family: Family) -> None:
    """Let a stack of an encoder-decoder with learned positions take `inputs_embeds [B, S, d]` as
    the very states that its blocks begin with."""
    stack.embed_tokens = None
    if family.places is not None:
        replace_module(stack, family.places, NoPositions())
    if family.entry is not None:
        replace_module(stack, family.entry, nn.Identity())


def late_decoder(backbone: Backbone, late: int) -> nn.Module:
    """The last `late` blocks of an encoder-decoder's decoder, without the final norm.

    Called with `inputs_embeds [B, P, d]` and `encoder_hidden_states [B, S, d]`.
    """
    family = backbone.family
    if family.lent is not None:
        return _late_t5(backbone, late)
    stack: Any = share(stack_of(backbone.model, family, "decoder"))
    name = family.streams["decoder"].rpartition(".")[2]
    setattr(stack, name, nn.ModuleList(list(getattr(stack, name))[-late:]))
    bare(stack, family)
    if family.norm is not None:
        replace_module(stack, family.norm, nn.Identity())
    decoder: nn.Module = stack
    return decoder


def _late_t5(backbone: Backbone, late: int) -> nn.Module:
    """The relative position bias belongs to block 0 of the whole stack and moves to the first block
    that is left."""
    stack: Any = share(backbone.model.get_submodule("decoder"))
    bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    stack.block = nn.ModuleList(list(stack.block)[-late:])
    attention = stack.block[0].layer[0].SelfAttention
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = bias
    for block in stack.block:
        block.layer[0].SelfAttention = LonePosition(block.layer[0].SelfAttention)
        block.layer[1].EncDecAttention = FewQueries(block.layer[1].EncDecAttention)
        for layer in block.layer:
            layer.layer_norm = by_hand(layer.layer_norm)
    stack.embed_tokens = None
    stack.final_layer_norm = nn.Identity()
    decoder: nn.Module = stack
    return decoder
