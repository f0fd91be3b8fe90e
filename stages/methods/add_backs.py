"""DTL's side networks in late blocks that several routes share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sherl_pipe.stages.methods.dtl import CompactSide
from sherl_pipe.stages.methods.route import joined
from torch import Tensor, nn


@contextmanager
def adding_back(
    blocks: nn.ModuleList,
    first: int,
    sides: Sequence[CompactSide],
    gathered: Sequence[Tensor],
) -> Iterator[None]:
    """Inside, each side network reports of, and is added to, its own part of the blocks' batch.

    Hooks of one pass: another one has other side networks.

    Args:
        blocks: the late ones.
        first: the number of the first of them in the whole backbone.
        sides: one for every part of the batch.
        gathered: their accumulators in front of the first block, its own report included, as padded
            as the states: `[B, S, d]`.
    """
    held, sizes = list(gathered), [len(each) for each in gathered]

    def enter(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        for place, (side, part) in enumerate(zip(sides, states.split(sizes), strict=True)):
            reported = side.report(block, part, held[place])
            held[place] = held[place] if reported is None else reported

    def leave(block: int, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        parts = zip(sides, states.split(sizes), held, strict=True)
        added = joined([side.add(block, part, own) for side, part, own in parts])
        return (added, *output[1:]) if isinstance(output, tuple) else added

    handles = []
    for number, block in enumerate(blocks, first):
        if number > first:
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, number=number: enter(number, args, kwargs),
                    with_kwargs=True,
                )
            )
        handles.append(
            block.register_forward_hook(lambda _, __, output, number=number: leave(number, output))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
