"""The method `linear`: a linear model on the last frozen state, the least that a tuning can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.methods.base import Method, cached_taps, require_late
from sherl_pipe.stages.methods.readout import ReadoutEncoder
from sherl_pipe.stages.methods.readout_seq2seq import ReadoutSeq2Seq
from sherl_pipe.stages.methods.route import RouteSpec


class Linear(Method):
    """On an encoder a head on the pooled last cached tap; on T5 a trained final norm on the last
    decoder state, in front of the frozen head (see `ReadoutSeq2Seq`)."""

    usual: ClassVar[Mapping[str, Any]] = {"reduction": 1, "late": 0, "init": "random"}
    inits = ("random",)

    @classmethod
    def usual_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """A head that starts where it would end on frozen states alone. T5's frozen late blocks are
        those behind the last cached decoder tap."""
        decoder = streams.get("decoder")
        if decoder is None:
            return {**cls.usual, "head": "probe"}
        return {**cls.usual, "late": decoder.blocks - decoder.taps[-1]}

    @classmethod
    def published_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """A fresh head."""
        return {} if "decoder" in streams else {"head": "random"}

    @staticmethod
    def late_blocks(late: int) -> dict[str, int]:
        """As many of T5's decoder; none of an encoder."""
        return {"decoder": late} if late else {}

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """The last cached tap of an encoder. Of T5's decoder the state that leaves the last block,
        or enters the late ones.

        Raises InputError for late blocks of an encoder, and where T5's late blocks have no input.
        """
        if not backbone.family.seq2seq:
            require_late(late, 0, 0, "linear on an encoder")
            return {"hidden": cached["hidden"][-1:]}, {}
        taps, last = late_input(backbone, late, cached, "linear")
        return {**taps, "decoder": () if late else (len(backbone.blocks("decoder")),)}, last

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> ReadoutEncoder | ReadoutSeq2Seq:
        """A fresh route; only its own parameters require gradients.

        Raises InputError for a reduction: nothing is reduced.
        """
        if spec.reduction != 1:
            wanted = f"1 ({spec.method} reduces nothing)"
            raise InputError(explain("reduction", expected=wanted, found=spec.reduction))
        kind = ReadoutSeq2Seq if backbone.family.seq2seq else ReadoutEncoder
        return kind(backbone, spec).to(backbone.device)


def late_input(
    backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]], method: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """`RouteSpec.taps` without the decoder's, and `RouteSpec.last`, for T5's frozen late blocks.

    Raises InputError where the cache lacks what enters them, or what they attend to.
    """
    blocks = len(backbone.blocks("decoder"))
    require_late(late, 0, blocks - 1, method)
    cached_taps("decoder", cached["decoder"], [blocks - late])
    if not late:
        return {}, {}
    top = len(backbone.blocks("encoder"))
    taps = {"encoder": cached_taps("encoder", cached["encoder"], [top])}
    return taps, {"decoder": blocks - late}
