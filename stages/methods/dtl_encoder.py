"""The methods `dtl` and `dtl+`: a compact side network that is added back to the last blocks (Fu et
al., AAAI 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.add_backs import adding_back
from sherl_pipe.stages.methods.base import Method, cached_taps, require_late
from sherl_pipe.stages.methods.dtl import CompactSide
from sherl_pipe.stages.methods.dtl_seq2seq import DtlSeq2Seq
from sherl_pipe.stages.methods.late import encode_late
from sherl_pipe.stages.methods.route import PooledRoute, RouteSpec, pooled
from sherl_pipe.stages.surgery import late_encoder, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn

RANK = 2  # as published
KERNEL = 3  # of DTL+


class DtlEncoder(PooledRoute):
    """DTL on an encoder: the cached blocks' reports at once, the late blocks live with what is
    added behind each of them, a pooled head (SPEC 5).

    Args:
        backbone: the frozen model.
        spec: `spec.taps["hidden"]` are what enters the cached blocks that report; the last of them
            enters the first late block.
    """

    late: nn.Module

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        self.spec = spec
        depth, width, taps = len(backbone.blocks("hidden")), backbone.width, spec.taps["hidden"]
        late = range(depth - spec.late, depth)
        grid = patch_grid(backbone, spec) if spec.method == "dtl+" else None
        self.side = CompactSide(
            width,
            width // spec.reduction,
            {*taps, *late},
            late,
            fusion=KERNEL if grid else 0,
            grid=grid,
        )
        self.late = late_encoder(backbone, spec.late)
        self._path = backbone.family.streams["hidden"]
        self.head = nn.Linear(width, spec.outputs)

    def fuse(
        self, streams: Mapping[str, Packed], tree: PrefixTree | None = None
    ) -> tuple[Tensor, Tensor]:
        """What enters the late blocks and what the blocks up to the first of them reported, both
        `[n, d]`; there is no tree."""
        packed = streams["hidden"]
        taps = self.spec.taps["hidden"]
        return packed.tap(-1), self.side.gather(packed.states, taps, packed.group)

    @staticmethod
    def hidden(
        routes: Sequence[DtlEncoder],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """Pooled states `[B, d]` of each route's batch; there is no tree."""
        first = routes[0]
        packed = [streams["hidden"] for streams in batches]
        size = max(each.longest for each in packed)
        gathered = [each.pad(part, size) for each, (_, part) in zip(packed, fused, strict=True)]
        blocks: Any = first.late.get_submodule(first._path)
        number = first.spec.taps["hidden"][-1]
        with adding_back(blocks, number, [route.side for route in routes], gathered):
            found = encode_late(first.late, [states for states, _ in fused], batches)
        return [
            pooled(states, mask, route.spec.pool, route.spec.front)
            for route, (states, mask) in zip(routes, found, strict=True)
        ]

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live backbone with the side network hooked in; its weights are shared."""
        model: nn.Module = share(backbone.model)
        self.side.attach(blocks_of(model, backbone.family, "hidden"))
        return model


class Dtl(Method):
    """The method `dtl`."""

    usual: ClassVar[Mapping[str, Any]] = {"reduction": 1, "late": 1, "init": "paper"}
    inits = ("paper",)

    @classmethod
    def usual_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """Rank 2, and an add-back behind each block of the upper half, as published; a head that
        starts from a probe of the frozen model, which the side network leaves as it is at first.

        The lower half comes from the cache, so the half that runs is what the paper trains through
        too. Where the cache lacks the state in the middle it is the last block alone, whose input
        every cache has.
        """
        stream = streams["decoder" if "decoder" in streams else "hidden"]
        half = max(1, stream.blocks // 2)
        late = half if stream.blocks - half in stream.taps else 1
        head = {} if "decoder" in streams else {"head": "probe"}
        return {**cls.usual, "reduction": max(1, stream.width // RANK), "late": late, **head}

    @classmethod
    def published_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """The upper half of the blocks, whether the cache has the state in the middle or not; a
        fresh head."""
        stream = streams["decoder" if "decoder" in streams else "hidden"]
        head = {} if "decoder" in streams else {"head": "random"}
        return {"late": max(1, stream.blocks // 2), **head}

    @staticmethod
    def late_blocks(late: int) -> dict[str, int]:
        """As many of the stream that ends in the head."""
        return {"hidden": late, "decoder": late}

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """What enters each block up to the first late one, and of T5's encoder what enters every
        block and leaves the last, as far as the cache has them; other blocks do not report.

        Raises InputError where the late route's own input is not cached, or nothing of T5's
        encoder but its top.
        """
        taps = {}
        for stream, held in cached.items():
            blocks = len(backbone.blocks(stream))
            if stream == "encoder":
                top = cached_taps(stream, held, [blocks])
                taps[stream] = cached_taps(stream, held, range(blocks)) + top
                continue
            require_late(late, 1, blocks - 1, "dtl")
            own = cached_taps(stream, held, [blocks - late])
            taps[stream] = tuple(tap for tap in held if tap < own[0]) + own
        return taps, {}

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> DtlEncoder | DtlSeq2Seq:
        """A fresh route; only its own parameters require gradients. Its rank is the backbone's
        width over the reduction."""
        kind = DtlSeq2Seq if backbone.family.seq2seq else DtlEncoder
        return kind(backbone, spec).to(backbone.device)


class DtlPlus(Dtl):
    """The method `dtl+`: what is added back goes through a convolution over the patches of an
    image first."""

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> DtlEncoder:
        """A fresh route. Raises InputError for a backbone that reads no patches."""
        patch_grid(backbone, spec)
        return DtlEncoder(backbone, spec).to(backbone.device)


def patch_grid(backbone: Backbone, spec: RouteSpec) -> tuple[int, int]:
    """Rows and columns of the patches that a vision transformer reads: those of its config, or of a
    square where images have another size.

    Raises InputError for a backbone that reads none, and for other images than these.
    """
    config = backbone.config
    if not backbone.family.images:
        raise InputError(
            explain(
                "method",
                expected="dtl for a backbone of texts (dtl+ has a convolution over patches)",
                found=f"dtl+ on {config.model_type}",
            )
        )
    sides = config.image_size, config.patch_size
    image, patch = ([each] * 2 if isinstance(each, int) else each for each in sides)
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    patches = spec.tokens - spec.front
    if rows * columns == patches:
        return rows, columns
    if isqrt(patches) ** 2 != patches:
        raise InputError(
            explain(
                "images of dtl+",
                expected=f"{rows} x {columns} patches, or a square of them",
                found=f"{patches} patches",
                todo="Use --method dtl.",
            )
        )
    return isqrt(patches), isqrt(patches)
