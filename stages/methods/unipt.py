"""UniPT: a parallel network that reads every tap and runs no frozen block (Diao et al., CVPR 2024).

Here are the forms over tokens; those for CLIP4Clip and for feature maps lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.interaction import parallel_interaction
from sherl_pipe.stages.methods.parts import StackedLinear, stacked_norm, start_linear
from sherl_pipe.stages.methods.published import Names, Published, count, pair, part, probe
from sherl_pipe.stages.methods.unipt_clip import ClipUniPT
from sherl_pipe.stages.methods.unipt_maps import MapUniPT
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Variant:
    """What differs between the published forms.

    Attributes:
        epsilon: of the weights' normalisation.
        deep: what the anchor found goes through two layers with a ReLU between them and is added to
            the anchor as it is; else through one, and the sum goes through a ReLU.
        std: of the initial linear weights; None is PyTorch's default.
        levels: published names of the reductions: of the first tap (none if it goes by number like
            the rest), and what stands before the number of the others.
        names: of the score, of the projection and of the tail.
    """

    epsilon: float
    deep: bool
    std: float | None
    levels: tuple[str, str]
    names: tuple[str, str, str]

    def reductions(self, taps: int) -> list[str]:
        """Published names of the taps' reductions."""
        first, prefix = self.levels
        numbered = [f"{prefix}.{k}" for k in range(taps - bool(first))]
        return [first, *numbered] if first else numbered


VARIANTS = {
    "bert": Variant(
        1e-8,
        False,
        None,
        ("", "downsample_layers"),
        ("gate_layer", "projection_layer", "upsample_layer.1"),
    ),
    "clipvil": Variant(
        1e-6,
        True,
        0.02,
        ("side_first_downsample_l", "side_downsamples_l"),
        ("side_gate_layer_l", "side_projection_l", "side_final_upsample_l.0"),
    ),
}
# Those that do not go token by token.
OTHERS: dict[str, type[ClipUniPT] | type[MapUniPT]] = {"clip4clip": ClipUniPT, "resnet": MapUniPT}


class UniPT(Published):
    """Reduces K taps and lets the last one look through the others.

    On packed features, `reduce` goes first (no padding is reduced), `interact` on what was padded,
    and `expand` on the tokens that are wanted; `forward` is the three in a row.

    Args:
        width: d, of the backbone.
        hidden: h, of the reduced vectors.
        taps: K, at least 2; the last one is the anchor.
        outputs: width of the result.
        variant: a key of `VARIANTS`.
    """

    def __init__(
        self, width: int, hidden: int, taps: int, outputs: int, variant: str = "bert"
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(explain("variant", expected=f"one of {list(VARIANTS)}", found=variant))
        if taps < 2 or hidden < 1:
            raise InputError(f"UniPT needs two taps and one hidden unit, found {taps} and {hidden}")
        self.variant = variant
        kind = VARIANTS[variant]
        self.down = StackedLinear(taps, width, hidden, kind.std)
        self.norm_weight = nn.Parameter(torch.ones(taps, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(taps, hidden))
        self.score = start_linear(nn.Linear(hidden, 1), kind.std)
        inner = width if kind.deep else hidden
        layers: list[nn.Module] = [start_linear(nn.Linear(hidden, inner), kind.std)]
        if kind.deep:
            layers += [nn.ReLU(), start_linear(nn.Linear(inner, hidden), kind.std)]
        self.project = nn.Sequential(*layers, nn.LayerNorm(hidden))
        self.tail = start_linear(nn.Linear(hidden, outputs), kind.std)

    def forward(self, taps: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The result for a padded batch.

        Args:
            taps: `[K, B, S, d]`, or K tensors `[B, S, d]`.
            mask: `[B, S]`, 1 or True where there is a token; all of them by default.

        Returns `[B, S, outputs]`; what stands at padded places means nothing.
        """
        stacked = taps if isinstance(taps, Tensor) else torch.stack(list(taps))
        reduced = self.reduce(stacked.flatten(1, 2)).view(*stacked.shape[:3], -1)
        return self.expand(reduced[-1], self.interact(reduced, mask))

    def reduce(self, taps: Tensor, group: int = 0) -> Tensor:
        """`[K, n, d] -> [K, n, h]`, token by token (SPEC 6.2, 6.5).

        Args:
            taps: of any tokens.
            group: of turned taps (see `quantize.decode`), else 0.
        """
        return stacked_norm(self.down(taps, group), self.norm_weight, self.norm_bias)

    def interact(self, reduced: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the anchor finds (SPEC 6.1): `[K, B, S, h] -> [B, S, h]`, with `mask [B, S]`."""
        epsilon = VARIANTS[self.variant].epsilon
        weight, bias = self.score.weight[0], self.score.bias[0]
        return parallel_interaction(reduced[:-1], reduced[-1], weight, bias, epsilon, mask)

    def expand(self, anchor: Tensor, found: Tensor) -> Tensor:
        """The result `[..., outputs]` of anchor and what it found, both `[..., h]`."""
        states = anchor + self.project(found)
        out: Tensor = self.tail(states if VARIANTS[self.variant].deep else F.relu(states))
        return out

    @overload
    @classmethod
    def from_reference(
        cls, params: Mapping[str, Tensor], variant: Literal["bert", "clipvil"]
    ) -> UniPT: ...

    @overload
    @classmethod
    def from_reference(
        cls, params: Mapping[str, Tensor], variant: Literal["clip4clip"]
    ) -> ClipUniPT: ...

    @overload
    @classmethod
    def from_reference(
        cls, params: Mapping[str, Tensor], variant: Literal["resnet"]
    ) -> MapUniPT: ...

    @overload
    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor], variant: str) -> Published: ...

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor], variant: str) -> Published:
        """A module with the published parameters.

        Args:
            params: tensors by the papers' names (`downsample_layers.0.0.weight`, ...; SPEC 6).
            variant: a key of `VARIANTS` or `OTHERS`; one of the latter gives its own class.

        Raises InputError for an unknown variant, for names that are missing or left over, and for
        shapes that do not fit.
        """
        if variant in OTHERS:
            return OTHERS[variant].from_reference(params)
        if variant not in VARIANTS:
            known = [*VARIANTS, *OTHERS]
            raise InputError(explain("variant", expected=f"one of {known}", found=variant))
        first, prefix = VARIANTS[variant].levels
        hidden, width = probe(params, f"{first or f'{prefix}.0'}.0.weight", 2).shape
        outputs = probe(params, f"{VARIANTS[variant].names[2]}.weight", 2).shape[0]
        taps = count(params, f"{prefix}.", ".0.weight") + bool(first)
        module = cls(width, hidden, taps, outputs, variant)
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        kind = VARIANTS[self.variant]
        score, project, tail = kind.names
        named = pair(score, self.score) | pair(tail, self.tail)
        for tap, name in enumerate(kind.reductions(self.down.weight.shape[0])):
            named |= pair(f"{name}.0", self.down, part(tap))
            named[f"{name}.1.weight"] = (self.norm_weight, part(tap))
            named[f"{name}.1.bias"] = (self.norm_bias, part(tap))
        for place, layer in enumerate(self.project):
            if not isinstance(layer, nn.ReLU):
                named |= pair(f"{project}.{place}", layer)
        return named


def reduce_packed(side: UniPT, packed: Packed) -> Tensor:
    """K reduced taps, padded `[K, B, S, h]`, of packed ones; no padding is reduced."""
    rows = side.reduce(packed.states, packed.group)
    # Padded as one tensor: on a device every `pad` waits to know where rows are.
    padded = packed.pad(rows.transpose(0, 1).flatten(1))
    return padded.view(*padded.shape[:2], len(rows), -1).movedim(2, 0)


def from_reference(params: Mapping[str, Tensor], variant: str) -> Published:
    """A module with the published parameters; arguments and errors as for
    `UniPT.from_reference`."""
    return UniPT.from_reference(params, variant)
