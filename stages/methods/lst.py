"""LST: side blocks on a ladder beside the frozen ones (Ladder Side-Tuning, Sung et al., NeurIPS
2022).

Nothing frozen runs behind what is trained, so a tuning needs the cache and the head alone. The
paper has T5; on an encoder the same ladder ends in a pooled head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.base import Method
from sherl_pipe.stages.methods.ladder import encoder_ladder, layers_of, projection, side_of
from sherl_pipe.stages.methods.live import live_stack
from sherl_pipe.stages.methods.lst_seq2seq import LstSeq2Seq
from sherl_pipe.stages.methods.route import PooledRoute, RouteSpec, pooled
from sherl_pipe.stages.taps import LackingTapsError, paper_blocks
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class LstEncoder(PooledRoute):
    """LST on an encoder: the ladder, its way back to the backbone's width, a pooled head.

    Args:
        backbone: the frozen model.
        spec: `spec.taps["hidden"]` are tap 0 and the outputs of the blocks that have a side block
            beside them.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        self.spec, self.late = spec, None
        self.ladder = encoder_ladder(backbone, layers_of(spec, "hidden"), spec.reduction)
        self.upsample = projection(self.ladder.first.out_features, backbone.width)
        self.head = nn.Linear(backbone.width, spec.outputs)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """Pooled states `[B, d]`; there is no tree."""
        packed = streams["hidden"]
        mask = packed.mask()
        side = self.ladder(self.ladder.reduce(packed), attention_mask=mask.long())
        # Pooling is linear too, and leaves little to be brought back to the full width.
        return (self.upsample(pooled(side, mask, self.spec.pool, self.spec.front)),)

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live backbone up to the last tap, giving the ladder's states; weights are shared."""

        def climb(stacked: Tensor, told: dict[str, Any]) -> Tensor:
            kept = {name: told.get(name) for name in ("attention_mask", "position_ids")}
            side: Tensor = self.upsample(self.ladder(self.ladder.reduce_live(stacked), **kept))
            return side

        return live_stack(backbone, self.spec.taps["hidden"], climb)


class Lst(Method):
    """The method `lst`."""

    usual: ClassVar[Mapping[str, Any]] = {"reduction": 8, "late": 0, "init": "random"}
    inits = ("random", "fisher")
    given = frozenset({"fisher"})

    @classmethod
    def published_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """On T5, which alone the paper has, side blocks pruned from the frozen ones, and answers
        that compete with the whole vocabulary (SPEC 4)."""
        return {"init": "fisher", "loss": "vocabulary"} if "decoder" in streams else {}

    @staticmethod
    def late_blocks(late: int) -> dict[str, int]:
        """None. Streams are named all the same: side blocks start from T5's position tables."""
        return {"hidden": 0, "encoder": 0, "decoder": 0}

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Tap 0 and the outputs of T5's published side layers, or of all blocks of an encoder.

        Caches for SHERL lack the output of the last block of the stream that ends in the head;
        there is no side block beside that one then. Of a cache that lacks another of these taps
        every tap is read. Raises InputError where tap 0 is not cached, or nothing else is, and for
        late blocks.
        """
        if late != 0:
            raise InputError(explain("late", expected="0 (lst has no late blocks)", found=late))
        taps = {}
        for stream, held in cached.items():
            blocks = len(backbone.blocks(stream))
            seq2seq = backbone.family.seq2seq
            layers = paper_blocks(blocks) if seq2seq else range(blocks)
            usual = [0, *(layer + 1 for layer in layers)]
            complete = {*usual} - {*held} <= {blocks}
            chosen = [tap for tap in held if tap in usual or not complete]
            if 0 not in chosen or len(chosen) < 2:
                wanted = f"{usual}, or tap 0 and some others"
                raise LackingTapsError(stream, wanted, held, usual)
            taps[stream] = tuple(chosen)
        return taps, {}

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> LstEncoder | LstSeq2Seq:
        """A fresh route; only its own parameters require gradients.

        The paper prunes T5 by the gradient of its own answers; an encoder has none without a head.

        Raises InputError for a reduction that leaves nothing of some width, for an encoder that is
        to start from pruned weights, and for a family that the ladder does not fit.
        """
        if spec.init in Lst.given and backbone.family.lent is None:
            wanted = "random (fisher prunes T5's blocks only)"
            raise InputError(explain("init", expected=wanted, found=spec.init))
        _ = side_of(backbone)
        kind = LstSeq2Seq if backbone.family.seq2seq else LstEncoder
        return kind(backbone, spec).to(backbone.device)

    @staticmethod
    def from_reference(
        backbone: Backbone,
        params: Mapping[str, Tensor],
        layers: Mapping[str, Sequence[int] | None],
        reduction: int,
    ) -> LstSeq2Seq:
        """A route with the papers' parameters (SPEC 4)."""
        return LstSeq2Seq.from_reference(backbone, params, layers, reduction)
