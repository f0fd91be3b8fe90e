"""A plain vision transformer under timm's names, for published parameters (Dosovitskiy et al.,
ICLR 2021).

Backbones that are tuned come from Hugging Face; this one only takes what was published for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.published import count, probe
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


@dataclass(frozen=True)
class VitSizes:
    """Sizes of a vision transformer.

    Attributes:
        width: d.
        inner: width inside the blocks' MLPs.
        depth: blocks.
        heads: of the attention, a divisor of `width`.
        patch: side of a patch, in pixels.
        grid: patches along a side of the square image.
        channels: of the image.
        classes: outputs of the head.
    """

    width: int
    inner: int
    depth: int
    heads: int
    patch: int
    grid: int
    channels: int
    classes: int

    @classmethod
    def of(cls, params: Mapping[str, Tensor], heads: int) -> VitSizes:
        """What timm's parameters tell; not the number of heads.

        Raises InputError where a telling parameter is missing or of another form, and for heads
        that do not divide the width.
        """
        width, channels, patch, _ = probe(params, "patch_embed.proj.weight", 4).shape
        if heads < 1 or width % heads:
            raise InputError(explain("heads", expected=f"a divisor of {width}", found=heads))
        return cls(
            width=width,
            inner=probe(params, "blocks.0.mlp.fc1.weight", 2).shape[0],
            depth=count(params, "blocks.", ".mlp.fc1.weight"),
            heads=heads,
            patch=patch,
            grid=isqrt(probe(params, "pos_embed", 3).shape[1] - 1),
            channels=channels,
            classes=probe(params, "head.weight", 2).shape[0],
        )


class Attention(nn.Module):
    """Self-attention over all tokens, `[B, S, d] -> [B, S, d]`; queries, keys and values packed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        packed = self.qkv(states).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two layers with an exact GELU between them, `[..., d] -> [..., d]`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(states)))
        return out


class Block(nn.Module):
    """A pre-norm block, `[B, S, d] -> [B, S, d]`."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, inner)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attn(self.norm1(states))
        out: Tensor = states + self.mlp(self.norm2(states))
        return out


class PatchEmbed(nn.Module):
    """Square patches of an image as tokens, row by row: `[B, c, H, W] -> [B, S, d]`."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.proj(image).flatten(2).transpose(1, 2)
        return out


class Vit(nn.Module):
    """A class token in front of the patches, blocks, and a head on the patches' mean."""

    def __init__(self, sizes: VitSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = PatchEmbed(sizes.channels, sizes.width, sizes.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.grid**2, sizes.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(sizes.width, sizes.inner, sizes.heads) for _ in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(sizes.width, eps=EPSILON)
        self.head = nn.Linear(sizes.width, sizes.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, channels, side, side]`.

        Raises InputError for an image of another size.
        """
        side = self.sizes.grid * self.sizes.patch
        if image.shape[1:] != (self.sizes.channels, side, side):
            wanted = [self.sizes.channels, side, side]
            raise InputError(explain("image", expected=wanted, found=list(image.shape[1:])))
        patches = self.patch_embed(image)
        states = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            states = block(states)
        out: Tensor = self.head(self.norm(states[:, 1:].mean(1)))
        return out
