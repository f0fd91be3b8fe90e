"""Routes on dual encoders: a side block over the taps of each tower ends in an embedding, and those
of texts and images are compared. No frozen block runs (SPEC 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sherl_pipe.stages import quantize
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.base import cached_taps, require_late
from sherl_pipe.stages.methods.live import inside
from sherl_pipe.stages.methods.route import Route, RouteSpec
from sherl_pipe.stages.surgery import TapRecorder, cut_after, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn
from torch.nn import functional as F

# Makes a side block of: width of the tower, reduced width, width of the embedding, taps.
MakeSide = Callable[[int, int, int, int], nn.Module]


class DualRoute(Route):
    """A side block for each tower, of `reduced` and `fused` as `ClipConsolidation` has them.

    Args:
        backbone: the frozen model; of its towers only the last norms and the projections are used.
        spec: `spec.taps[stream]` ends with the state that leaves the tower's last block.
        make: makes a side block.

    Attributes:
        scale: of cosines, as the frozen model has it; of no dimension.
    """

    scale: Tensor

    def __init__(self, backbone: Backbone, spec: RouteSpec, make: MakeSide) -> None:
        super().__init__()
        self.spec, self.late = spec, None
        self._towers = backbone.family.towers
        embed, model = backbone.width, backbone.model
        self.sides, self.norms, self.projections = (nn.ModuleDict() for _ in range(3))
        for stream, tower in self._towers.items():
            width, taps = backbone.width_of(stream), len(spec.taps[stream])
            self.sides[stream] = make(width, embed // spec.reduction, embed, taps)
            self.norms[stream] = share(model.get_submodule(tower.norm))
            self.projections[stream] = share(model.get_submodule(tower.projection))
        logit_scale: Any = model.logit_scale
        self.register_buffer("scale", logit_scale.detach().exp(), persistent=False)

    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream."""
        return dict(self.spec.taps)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """Unit embeddings of texts and images, `[2, B, E]`; there is no tree."""
        return (torch.stack([self._of_packed(stream, streams[stream]) for stream in self._towers]),)

    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """`[2, B, E]` as `[B, 2 E]`, a pair in a row; there are no tokens."""
        return torch.cat([*hidden], dim=1)

    def attach(self, backbone: Backbone) -> LiveDual:
        """The live towers with the side blocks behind them; weights are shared."""
        return LiveDual(self, backbone)

    def embed(self, stream: str, taps: Tensor, mask: Tensor) -> Tensor:
        """Unit embeddings `[B, E]` of taps `[K, B, S, d]`; `mask [B, S]` is True where there is a
        token."""
        # What is computed where there is none may be anything.
        taps = taps.masked_fill(~mask[..., None], 0)
        places = torch.arange(mask.shape[1], device=mask.device)
        at = places.expand_as(mask).masked_fill(~mask, -1).argmax(1)
        reduced = self._side(stream).reduced(taps.flatten(1, 2)).view(*taps.shape[:3], -1)
        if self._towers[stream].images:
            return self._finish(stream, taps[-1][:, 0], reduced, None, None)
        top = taps[-1][torch.arange(len(at), device=at.device), at]
        return self._finish(stream, top, reduced, mask, at)

    def _of_packed(self, stream: str, packed: Packed) -> Tensor:
        states = quantize.turn(packed.states, packed.group)
        reduced = self._side(stream).reduced(states)
        lengths, behind = packed.lengths, packed.lengths.cumsum(0)
        if self._towers[stream].images:  # all of one length
            grid = reduced.view(len(reduced), len(lengths), -1, reduced.shape[-1])
            return self._finish(stream, states[-1][behind - lengths], grid, None, None)
        padded = torch.stack([packed.pad(tap) for tap in reduced])
        return self._finish(stream, states[-1][behind - 1], padded, packed.mask(), lengths - 1)

    def _finish(
        self, stream: str, top: Tensor, reduced: Tensor, mask: Tensor | None, at: Tensor | None
    ) -> Tensor:
        """Unit embeddings `[B, E]`.

        Args:
            top: `[B, d]`, the state that the tower's own embedding is made of.
            reduced: `[K, B, S, h]`.
            mask, at: where texts have tokens, `[B, S]`, and their ends, `[B]`.
        """
        own = self.projections[stream](self.norms[stream](top))
        found: Tensor = self._side(stream).fused(reduced, own, mask, at)
        return F.normalize(found.float(), dim=-1)

    def _side(self, stream: str) -> Any:
        return self.sides[stream]


class LiveDual(nn.Module):
    """Live towers with the side blocks of a route behind them."""

    def __init__(self, route: DualRoute, backbone: Backbone) -> None:
        super().__init__()
        self._route = [route]  # a module elsewhere already
        self.towers = nn.ModuleDict()
        self._recorders: dict[str, TapRecorder] = {}
        for stream, tower in backbone.family.towers.items():
            taps = route.spec.taps[stream]
            model = cut_after(backbone, stream, taps[-1])
            self._recorders[stream] = TapRecorder(blocks_of(model, backbone.family, stream), taps)
            self.towers[stream] = model.get_submodule(tower.model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Any:
        """What `CLIPModel` gives of texts, of images, or of both: unit embeddings `text_embeds` and
        `image_embeds`, and of both `logits_per_text` and `logits_per_image`.

        Args:
            input_ids: `[B, S]`; padding may stand on either side, where the mask says so.
            attention_mask: `[B, S]`, 1 where there is a token; all ones by default.
            pixel_values: `[B, channels, height, width]`.
        """
        from transformers.models.clip.modeling_clip import CLIPOutput

        found: dict[str, Any] = {}
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            # Padding in front of the tokens does not move them.
            places = (mask.long().cumsum(-1) - 1).clamp(min=0)
            self.towers["text"](input_ids=input_ids, attention_mask=mask, position_ids=places)
            found["text_embeds"] = self._embeddings("text", mask)
        if pixel_values is not None:
            self.towers["image"](pixel_values=pixel_values)
            found["image_embeds"] = self._embeddings("image", None)
        if not found:
            raise TypeError("input_ids or pixel_values are missing")
        if len(found) == 2:
            logits = self._route[0].scale * found["text_embeds"] @ found["image_embeds"].T
            found |= {"logits_per_text": logits, "logits_per_image": logits.T}
        return CLIPOutput(**found)

    def _embeddings(self, stream: str, mask: Tensor | None) -> Tensor:
        route = self._route[0]
        taps = self._recorders[stream].stacked(route.spec.taps[stream])
        return route.embed(stream, taps, inside(mask, taps))


def dual_taps(
    backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]], method: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """All cached taps of both towers; the papers read all there are.

    Raises InputError for late blocks, and where the state behind a tower's last block is missing.
    """
    require_late(late, 0, 0, f"{method} on a dual encoder")
    for stream, held in cached.items():
        cached_taps(stream, held, [len(backbone.blocks(stream))])
    return dict(cached), {}
