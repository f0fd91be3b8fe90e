"""What routes hook into live backbones in the same way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import Family, blocks_of, stack_of
from sherl_pipe.stages.surgery import TapRecorder, cut_after, move_positions, share
from torch import Tensor, nn


def live_stack(
    backbone: Backbone, taps: Sequence[int], states_of: Callable[[Tensor, dict[str, Any]], Tensor]
) -> nn.Module:
    """An encoder up to the last of some taps, whose output is made of them; weights are shared.

    Args:
        backbone: the frozen model.
        taps: ascending.
        states_of: from taps `[K, B, S, d]` and what the encoder was called with to the output
            `[B, S, d]`.
    """
    model = cut_after(backbone, "hidden", taps[-1])
    recorder = TapRecorder(blocks_of(model, backbone.family, "hidden"), taps)

    def replace(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = states_of(recorder.stacked(taps), kwargs)
        return output

    model.register_forward_hook(replace, with_kwargs=True)
    return model


def live_encoder(
    backbone: Backbone, taps: Sequence[int], states_of: Callable[[Tensor, Tensor], Tensor]
) -> nn.Module:
    """`live_stack` for states that depend on a mask `[B, S]` alone, True where there is a token."""

    def masked(stacked: Tensor, told: dict[str, Any]) -> Tensor:
        return states_of(stacked, inside(told.get("attention_mask"), stacked))

    return live_stack(backbone, taps, masked)


def enter_with(block: nn.Module, states_of: Callable[[], Tensor]) -> None:
    """Let a block take other states than it is given; `states_of` is called when it is."""

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (states_of(), *args[1:]), kwargs

    block.register_forward_pre_hook(substitute, with_kwargs=True)


def inside(mask: Tensor | None, taps: Tensor) -> Tensor:
    """A mask `[B, S]` of zeros and ones as True and False; of None, all tokens of `[K, B, S, d]`
    are there."""
    if mask is None:
        return torch.ones(taps.shape[1:3], dtype=torch.bool, device=taps.device)
    return mask.bool()


def two_memories(
    model: Any,
    family: Family,
    width: int,
    side: Callable[[Tensor | None], Tensor],
    first: int,
) -> None:
    """Let an encoder hand on the frozen and a side memory side by side, `[B, S, d + h]`.

    So whatever `generate` does to encoder outputs (beams, batches) happens to both.

    Args:
        model: to be hooked, a structure of its own.
        family: of its backbone.
        width: d.
        side: the side memory `[B, S, h]`, called with the encoder's mask after it has run.
        first: the first decoder block that takes the side memory; those below it take the frozen
            one.
    """

    def join(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        own = output.last_hidden_state
        output.last_hidden_state = torch.cat([own, side(kwargs.get("attention_mask"))], dim=-1)
        return output

    blocks = blocks_of(model, family, "decoder")
    # Among the positional arguments, behind the block itself.
    place = list(inspect.signature(type(blocks[0]).forward).parameters)
    at = place.index("encoder_hidden_states") - 1

    def part(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            memory = args[at]
            # Torch takes both parts for trained because one is; backpropagation would run through
            # all the frozen blocks for nothing.
            memory = memory[..., width:] if number >= first else memory[..., :width].detach()
            return (*args[:at], memory, *args[at + 1 :]), kwargs

        return hook

    stack_of(model, family, "encoder").register_forward_hook(join, with_kwargs=True)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(part(number), with_kwargs=True)


def count_tokens(model: nn.Module, family: Family) -> None:
    """Let an encoder with learned positions count tokens from the first that its mask shows, so
    that padding in front does not move them. Those of a batch padded behind stay what they are."""
    stack, told = stack_of(model, family, "encoder"), list[Tensor | None]([None])

    def listen(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told[0] = kwargs.get("attention_mask")

    def places() -> Tensor | None:
        return None if told[0] is None else (told[0].long().cumsum(-1) - 1).clamp(min=0)

    stack.register_forward_pre_hook(listen, with_kwargs=True)
    move_positions(stack, family, places)


def speaking(backbone: Backbone, body: nn.Module) -> nn.Module:
    """A causal model with its own head behind `body`; its weights are shared."""
    if backbone.language is None:
        raise TypeError(f"{backbone.name} was loaded without its head")
    language: Any = share(backbone.language)
    setattr(language, language.base_model_prefix, body)
    whole: nn.Module = language
    return whole
