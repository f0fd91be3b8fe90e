"""Ladder side-tuning on encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of, stack_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.ladder import Ladder, bart_ladder, layers_of, projection, t5_ladder
from sherl_pipe.stages.methods.live import two_memories
from sherl_pipe.stages.methods.published import Names, Published, pair
from sherl_pipe.stages.methods.route import RouteSpec, WordRoute
from sherl_pipe.stages.surgery import TapRecorder, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn

STREAMS = ("encoder", "decoder")


class LstSeq2Seq(WordRoute, Published):
    """LST on T5 (SPEC 4), and on BART in the same way: a ladder beside each stack, the
    decoder's attending to the encoder's.

    Args:
        backbone: the frozen model.
        spec: `spec.taps["encoder"]` and `["decoder"]` are tap 0 and the outputs of the blocks that
            have a side block beside them.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__(backbone, spec)
        self.late = None
        model: Any = backbone.model

        def ladder(stream: str) -> Ladder:
            stack = stack_of(model, backbone.family, stream)
            make = t5_ladder if backbone.family.lent else bart_ladder
            return make(stack, layers_of(spec, stream), spec.reduction)

        self.encoder, self.decoder = ladder("encoder"), ladder("decoder")
        self.upsample = projection(self.decoder.first.out_features, backbone.width)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """States `[B, P, d]` for the head, P being the nodes of a tree if there is one."""
        encoder, decoder = streams["encoder"], streams["decoder"]
        inside = encoder.mask().long()
        memory = self.encoder(self.encoder.reduce(encoder), attention_mask=inside)
        reduced, mask = self.decoder.reduce(decoder), None
        if tree is not None:
            # Nodes that several paths share stand in each of them.
            reduced = [each[:, tree.flat_nodes] for each in reduced]
            mask = tree.flat_mask(reduced[0].dtype).to(reduced[0].device)
        out = self.decoder(
            reduced,
            attention_mask=mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=inside,
            use_cache=False,
        )
        if tree is not None:
            out = out[:, tree.first_places().to(out.device)]
        return (self.upsample(out) * self.scale,)

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live model with both ladders beside it; its weights are shared.

        Keys and values of the side blocks are in the model's own KV cache, behind those of its
        blocks.
        """
        model: Any = share(backbone.model)
        width, taps = backbone.width, self.reads()
        family = backbone.family
        blocks = blocks_of(model, family, "decoder")
        encoder_states = TapRecorder(blocks_of(model, family, "encoder"), taps["encoder"])
        decoder_states = TapRecorder(blocks, taps["decoder"])
        depth, rungs = len(blocks), len(self.decoder.layers)

        def memory(mask: Tensor | None) -> Tensor:
            reduced = self.encoder.reduce_live(encoder_states.stacked(taps["encoder"]))
            side: Tensor = self.encoder(reduced, attention_mask=mask)
            return side

        def climb(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            cache = output.past_key_values
            out = self.decoder(
                self.decoder.reduce_live(decoder_states.stacked(taps["decoder"])),
                attention_mask=kwargs.get("attention_mask"),
                encoder_hidden_states=kwargs["encoder_hidden_states"][..., width:],
                encoder_attention_mask=kwargs.get("encoder_attention_mask"),
                past_key_values=None if cache is None else _side_cache(cache, depth, rungs),
                use_cache=cache is not None,
            )
            output.last_hidden_state = self.upsample(out)
            return output

        two_memories(model, family, width, memory, depth)
        stack_of(model, family, "decoder").register_forward_hook(climb, with_kwargs=True)
        live: nn.Module = model
        return live

    def published(self) -> Names:
        """By published name (SPEC 4), where a tensor is kept."""
        named = pair("side_final_upsample", self.upsample)
        for stream, ladder in (("encoder", self.encoder), ("decoder", self.decoder)):
            named |= {f"{stream}.{name}": kept for name, kept in ladder.published().items()}
        return named

    @classmethod
    def from_reference(
        cls,
        backbone: Backbone,
        params: Mapping[str, Tensor],
        layers: Mapping[str, Sequence[int] | None],
        reduction: int,
    ) -> LstSeq2Seq:
        """A route with the published parameters (SPEC 4); arguments as for
        `Method.from_reference`. Gates of blocks without a side block, which the papers' programs
        keep and do not use, are left out.

        Raises InputError for names or shapes that do not fit.
        """
        taps = {}
        for stream in STREAMS:
            listed = layers[stream]
            chosen = range(len(backbone.blocks(stream))) if listed is None else sorted(listed)
            taps[stream] = (0, *(layer + 1 for layer in chosen))
        spec = RouteSpec(
            method="lst",
            taps=taps,
            last={},
            late=0,
            reduction=reduction,
            variant=None,
            init="random",
            outputs=0,
            pool="mean",
        )
        route = cls(backbone, spec)
        mine = route.published()
        route.load_published(
            {
                name: values
                for name, values in params.items()
                if name in mine or not name.partition(".")[2].startswith("side_gate_params.")
            }
        )
        return route


def _side_cache(cache: Any, depth: int, rungs: int) -> Any:
    """The side blocks' part of a KV cache, as a cache of its own.

    Its layers are the very layers that follow the first `depth` of the whole cache, so what
    happens to that between two steps (another order of beams) happens to them.
    """
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    parts = []
    for half in (cache.self_attention_cache, cache.cross_attention_cache):
        half.layers.extend(DynamicLayer() for _ in range(depth + rungs - len(half.layers)))
        part = DynamicCache()
        part.layers = half.layers[depth : depth + rungs]
        parts.append(part)
    return EncoderDecoderCache(*parts)
