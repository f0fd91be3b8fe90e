"""The method `weighted`: a linear model on the softmax-weighted sum of all taps, as SUPERB has it
(Yang et al., Interspeech 2021)."""

from __future__ import annotations

from collections.abc import Mapping

from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.methods.base import cached_taps, require_late
from sherl_pipe.stages.methods.linear import Linear, late_input


class Weighted(Linear):
    """`linear`, but on the sum of all cached taps; of T5's decoder with what leaves its last block,
    cached or not."""

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """All cached taps, of T5's decoder up to the late blocks.

        Raises InputError as `Linear.choose_taps`, and where there is only one state to sum.
        """
        if not backbone.family.seq2seq:
            require_late(late, 0, 0, "weighted on an encoder")
            every = range(len(backbone.blocks("hidden")) + 1)
            return {"hidden": cached_taps("hidden", cached["hidden"], every, 2)}, {}
        taps, last = late_input(backbone, late, cached, "weighted")
        below = range(len(backbone.blocks("decoder")) - late + 1)
        least = 1 if late else 2
        return {**taps, "decoder": cached_taps("decoder", cached["decoder"], below, least)}, last
