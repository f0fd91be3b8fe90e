"""DTL: a compact side network that is added back to the last blocks (Fu et al., AAAI 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.published import Names, Published, part, probe, whole
from sherl_pipe.stages.methods.vit import Vit, VitSizes
from sherl_pipe.stages.quantize import turn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


class CompactSide(nn.Module):
    """Low-rank reports of a backbone's blocks, summed up beside it and added to its last blocks.

    With an accumulator a, zero at first, block l of `before` adds (x A_l^T) B_l^T for the states x
    that enter it; behind block l of `after`, v = a * sigmoid(beta a) is added to the states, for
    DTL+ after a depth-wise convolution over the patches. a itself is never replaced (SPEC 5).

    No gradient is needed below the first block of `after`: the reports of the blocks below it
    reach the loss through a alone, and their inputs may be cached ones (see `gather`).

    Args:
        width: d, of the backbone.
        rank: r, of A `[r, d]` and B `[d, r]`.
        before: blocks in front of which is reported.
        after: blocks behind which is added.
        beta: sharpness of the sigmoid, above 0.
        fusion: side of the convolution's kernel, odd; 0 is DTL, which has none.
        grid: rows and columns of patches, the last tokens of an example; those in front of them
            (a class token) are not convolved. Needed for a fusion only.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        before: Iterable[int],
        after: Iterable[int],
        *,
        beta: float = 100.0,
        fusion: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after = tuple(sorted(set(before))), tuple(sorted(set(after)))
        if not self.before or self.before[0] < 0 or rank < 1:
            raise InputError(
                f"a side network needs a block and a rank, found {list(self.before)} and {rank}"
            )
        if not self.after or self.after[0] < self.before[0]:
            raise InputError(
                explain(
                    "blocks to add after",
                    expected=f"some from {self.before[0]} on, the first that reports",
                    found=list(self.after),
                )
            )
        if beta <= 0:
            raise InputError(explain("beta", expected="a number above 0", found=beta))
        if fusion < 0 or (fusion and fusion % 2 == 0):
            raise InputError(explain("fusion", expected="0 or an odd number", found=fusion))
        if fusion and grid is None:
            raise InputError("a fusion needs the grid of patches")
        self.beta, self.grid = beta, grid
        self.down = nn.Parameter(torch.empty(len(self.before), rank, width))
        # Kaiming-uniform with a = sqrt(5), of each block's own matrix.
        nn.init.uniform_(self.down, -(width**-0.5), width**-0.5)
        self.up = nn.Parameter(torch.zeros(len(self.before), width, rank))
        self.fusion: nn.Conv2d | None = None
        if fusion:
            self.fusion = nn.Conv2d(
                width, width, fusion, padding=fusion // 2, groups=width, bias=False
            )

    def report(self, block: int, states: Tensor, gathered: Tensor | None = None) -> Tensor | None:
        """The accumulator in front of a block.

        Args:
            block: its number; one that does not report leaves `gathered` as it is.
            states: what enters it, `[..., d]`.
            gathered: the accumulator so far, of that shape; None is zero.
        """
        if block not in self.before:
            return gathered
        place = self.before.index(block)
        added = F.linear(F.linear(states, self.down[place]), self.up[place])
        return added if gathered is None else gathered + added

    def gather(self, taps: Tensor, blocks: Sequence[int], group: int = 0) -> Tensor:
        """The accumulator `[n, d]` of several blocks at once, all of which report.

        Args:
            taps: `[K, n, d]`, what enters each of `blocks`.
            blocks: their numbers, K of them.
            group: of turned taps (see `quantize.decode`), else 0.

        Raises InputError for a block that does not report.
        """
        if not set(blocks) <= set(self.before):
            raise InputError(
                explain("blocks", expected=f"some of {list(self.before)}", found=list(blocks))
            )
        places = [self.before.index(block) for block in blocks]
        reduced = torch.bmm(taps, turn(self.down[places], group).transpose(1, 2))  # [K, n, r]
        # The sum over blocks is that of one product over all their ranks.
        return reduced.transpose(0, 1).flatten(1) @ self.up[places].transpose(1, 2).flatten(0, 1)

    def add(self, block: int, states: Tensor, gathered: Tensor | None) -> Tensor:
        """The states `[B, S, d]` behind a block, with the side network's where it has a part.

        Raises InputError for a fusion over fewer tokens than the grid has.
        """
        if block not in self.after or gathered is None:
            return states
        # a * sigmoid(beta a), in one pass forward and back.
        bent = F.silu(self.beta * gathered) / self.beta
        return states + (bent if self.fusion is None else self._fuse(bent))

    def _fuse(self, values: Tensor) -> Tensor:
        assert self.grid is not None and self.fusion is not None
        rows, columns = self.grid
        front = values.shape[1] - rows * columns
        if front < 0:
            raise InputError(
                explain("tokens", expected=f"{rows} x {columns} at least", found=values.shape[1])
            )
        maps = values[:, front:].transpose(1, 2).unflatten(2, (rows, columns))
        patches = self.fusion(maps).flatten(2).transpose(1, 2)
        return torch.cat([values[:, :front], patches], 1)

    def check(self, blocks: nn.ModuleList) -> None:
        """Raise InputError where the side network has a part in a block that is not there."""
        last = max(*self.before, *self.after)
        if last >= len(blocks):
            raise InputError(explain("blocks", expected=f"{last + 1} at least", found=len(blocks)))

    def attach(self, blocks: nn.ModuleList) -> list[RemovableHandle]:
        """Hook the side network into a live backbone's blocks; the handles take it out again.

        The blocks take their states first or as `hidden_states`, and give them back alone or as the
        first of a tuple, as those of Hugging Face do.

        Raises InputError where the side network has a part in a block that is not there.
        """
        self.check(blocks)
        first, last = self.before[0], max(*self.before, *self.after)
        gathered: list[Tensor | None] = [None]

        def enter(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            gathered[0] = self.report(block, states, None if block == first else gathered[0])

        def leave(block: int, output: Any) -> Any:
            held = gathered[0]
            if block == last:
                gathered[0] = None  # or the graph would live until the next pass
            if isinstance(output, tuple):
                return (self.add(block, output[0], held), *output[1:])
            return self.add(block, output, held)

        handles: list[RemovableHandle] = []
        for place in range(first, last + 1):
            handles += [
                blocks[place].register_forward_pre_hook(
                    lambda _, args, kwargs, place=place: enter(place, args, kwargs),
                    with_kwargs=True,
                ),
                blocks[place].register_forward_hook(
                    lambda _, __, output, place=place: leave(place, output)
                ),
            ]
        return handles


class DtlVit(Published):
    """A vision transformer with a compact side network in it (SPEC 5).

    Args:
        backbone: the transformer.
        side: the side network.

    Raises InputError where the side network has a part in a block that is not there.
    """

    def __init__(self, backbone: Vit, side: CompactSide) -> None:
        super().__init__()
        self.backbone, self.side = backbone, side
        side.check(backbone.blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, channels, side, side]`."""
        # For this pass only: hooks of a copied module would still run the original's side network.
        handles = self.side.attach(self.backbone.blocks)
        try:
            out: Tensor = self.backbone(image)
        finally:
            for handle in handles:
                handle.remove()
        return out

    def freeze(self) -> DtlVit:
        """Leave only the side network and the head to be tuned."""
        self.backbone.requires_grad_(False)
        self.backbone.head.requires_grad_(True)
        return self

    @classmethod
    def from_reference(
        cls,
        params: Mapping[str, Tensor],
        *,
        heads: int,
        lora_before: Sequence[int],
        add_after: Sequence[int],
        beta: float,
        fusion: int,
    ) -> DtlVit:
        """One with published parameters, none of them frozen.

        Args:
            params: tensors under timm's names, and `lora_dict.{l}.lora_A`, `.lora_B` and
                `lora_fusion.weight`.
            heads: of the attention, which no parameter tells.
            lora_before: 0-based blocks in front of which is reported.
            add_after: blocks behind which is added.
            beta: sharpness of the sigmoid.
            fusion: side of the convolution's kernel; 0 for none.

        Raises InputError for numbers that make no side network, for blocks that are not there, for
        names that are missing or left over and for shapes that do not fit.
        """
        sizes = VitSizes.of(params, heads)
        side = CompactSide(
            sizes.width,
            probe(params, f"lora_dict.{min(lora_before, default=0)}.lora_A", 2).shape[0],
            lora_before,
            add_after,
            beta=beta,
            fusion=fusion,
            grid=(sizes.grid, sizes.grid),
        )
        module = cls(Vit(sizes), side)
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        named: Names = {name: (tensor, whole) for name, tensor in self.backbone.named_parameters()}
        for place, block in enumerate(self.side.before):
            named[f"lora_dict.{block}.lora_A"] = (self.side.down, part(place))
            named[f"lora_dict.{block}.lora_B"] = (self.side.up, part(place))
        if self.side.fusion is not None:
            named["lora_fusion.weight"] = (self.side.fusion.weight, whole)
        return named


def from_reference(
    params: Mapping[str, Tensor],
    *,
    lora_before: Sequence[int],
    add_after: Sequence[int],
    beta: float,
    fusion: int,
    heads: int | None = None,
) -> DtlVit:
    """The published vision transformer with its side network; arguments and errors as for
    `DtlVit.from_reference`.

    Raises InputError without `heads`: parameters of one and the same shape are those of models with
    different numbers of them, and give other figures with each.
    """
    if heads is None:
        raise InputError(
            explain(
                "heads",
                expected="the number of the attention's heads",
                found=None,
                todo="No parameter tells it. Give heads=...; a published ViT-B/16 has 12.",
            )
        )
    return DtlVit.from_reference(
        params, heads=heads, lora_before=lora_before, add_after=add_after, beta=beta, fusion=fusion
    )
