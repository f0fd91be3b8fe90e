"""SHERL's anti-redundant consolidation of taps (Diao et al., ECCV 2024; multi-tiered sensing
adaption), for all taps at once.

Here are the forms that fuse token by token; those for CLIP4Clip and for feature maps lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.consolidation_clip import ClipConsolidation
from sherl_pipe.stages.methods.consolidation_maps import MapConsolidation
from sherl_pipe.stages.methods.gated import gated_reduction
from sherl_pipe.stages.methods.guided import GATE_SCALE, gated_tail, guided_consolidation
from sherl_pipe.stages.methods.parts import StackedLinear, stacked_norm
from sherl_pipe.stages.methods.published import Names, Published, count, pair, part, probe, whole
from torch import Tensor, nn
from torch.nn import functional as F

# tanh(0.2 / 0.1) = 0.96: open, and still steep enough to be learned.
OPEN_GATE = 0.2


@dataclass(frozen=True)
class Variant:
    """What differs between the published consolidations.

    Attributes:
        epsilon: of unit vectors and of the weights' normalisation.
        gated: reduction by a gated two-layer block; else by linear and LayerNorm, and the tail has
            a LayerNorm too.
        std: of the initial linear weights; None is PyTorch's default.
        names: published names of the first linear layer and of the norm of a reduction, of the
            tail and of its norm.
        tail_epsilon: of the tail's LayerNorm.
        dropout: behind the tail.
        projected: the taps' sum goes through a two-layer block before the guide is added; linear
            weights then start Xavier-uniform.
    """

    epsilon: float
    gated: bool
    std: float | None
    names: tuple[str, str, str, str]
    tail_epsilon: float = 1e-5
    dropout: float = 0.0
    projected: bool = False


_GATED = ("fc1", "", "fc_out", "")
VARIANTS = {
    "t5": Variant(1e-6, True, 0.01, _GATED),
    "clipvil": Variant(1e-6, True, 0.02, _GATED),
    "bert": Variant(1e-8, False, None, ("fc.0", "fc.1", "fc_out.1", "fc_out.2"), 1e-12, 0.1),
    "mdetr": Variant(1e-6, False, None, ("fc", "norm", "fc_out", "norm_out"), projected=True),
}
# Those that do not go token by token.
OTHERS: dict[str, type[ClipConsolidation] | type[MapConsolidation]] = {
    "clip4clip": ClipConsolidation,
    "resnet": MapConsolidation,
}

INITIALISATIONS = ("paper", "residual")


class Consolidation(Published):
    """Fuses K taps and the last feature into one state per token.

    Args:
        width: d, of the backbone.
        hidden: h, of the reduced vectors.
        taps: K, at least 2; the last one is the deep guide.
        variant: a key of `VARIANTS`.
        init: `paper` (the published start: the gate closed), or `residual` (the gate open and the
            tail zero, so that the result starts as the last feature itself).
    """

    def __init__(
        self, width: int, hidden: int, taps: int, variant: str = "t5", init: str = "paper"
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(explain("variant", expected=f"one of {list(VARIANTS)}", found=variant))
        if init not in INITIALISATIONS:
            raise InputError(explain("init", expected=f"one of {INITIALISATIONS}", found=init))
        if taps < 2 or hidden < 1:
            raise InputError(
                f"consolidation needs two taps and one hidden unit, found {taps} and {hidden}"
            )
        self.variant = variant
        kind = VARIANTS[variant]
        self.fc1 = StackedLinear(taps, width, hidden, kind.std)
        if kind.gated:
            self.fc2 = StackedLinear(taps, hidden, hidden, kind.std)
            self.fc3 = StackedLinear(taps, hidden, hidden, kind.std)
        else:
            self.norm_weight = nn.Parameter(torch.ones(taps, hidden))
            self.norm_bias = nn.Parameter(torch.zeros(taps, hidden))
        self.score = StackedLinear(1, hidden, 1, kind.std)
        self.tail = StackedLinear(1, hidden, width, kind.std)
        self.tail_norm = None if kind.gated else nn.LayerNorm(width, eps=kind.tail_epsilon)
        self.dropout = nn.Dropout(kind.dropout)
        self.gate = nn.Parameter(torch.zeros(1))
        self.project: nn.Sequential | None = None
        if kind.projected:
            self.project = nn.Sequential(
                nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, hidden), nn.LayerNorm(hidden)
            )
            self._start_xavier()
        if init == "residual":
            self._start_residual()

    def _start_xavier(self) -> None:
        for module in self.modules():
            if isinstance(module, StackedLinear):
                for weight in module.weight:
                    nn.init.xavier_uniform_(weight)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def _start_residual(self) -> None:
        with torch.no_grad():
            self.gate.fill_(OPEN_GATE)
            if self.tail_norm is not None:
                # A LayerNorm of zeros has no usable gradient; its own gain of zero has.
                self.tail_norm.weight.zero_()
            else:
                self.tail.weight.zero_()

    def forward(self, taps: Tensor | Sequence[Tensor], last: Tensor, group: int = 0) -> Tensor:
        """Consolidate.

        Args:
            taps: `[K, n, d]`, or K tensors `[..., d]` (with any leading shape).
            last: `[n, d]` or `[..., d]`, the backbone's last feature.
            group: of turned taps (see `quantize.decode`), else 0; `last` is never turned.

        Returns `[n, d]`, or the shape of `last`.
        """
        stacked = taps if isinstance(taps, Tensor) else torch.stack(list(taps))
        flat = stacked.reshape(stacked.shape[0], -1, stacked.shape[-1])
        fused = self._guide(self._reduce(flat, group))
        weight, bias = self.tail.weight.squeeze(0), self.tail.bias.squeeze(0)
        if self.tail_norm is None:
            rows = last.reshape(-1, last.shape[-1])
            return gated_tail(fused, weight, bias, self.gate, rows).view_as(last)
        tail = self.tail_norm(F.linear(F.relu(fused), weight, bias))
        share = torch.tanh(self.gate / GATE_SCALE)
        out: Tensor = self.dropout(tail).view_as(last) + share * last
        return out

    def _reduce(self, taps: Tensor, group: int = 0) -> Tensor:
        """`[K, n, d] -> [K, n, h]` (SPEC 2.1, 2.3, 2.6)."""
        if VARIANTS[self.variant].gated:
            return gated_reduction(taps, (self.fc1, self.fc2, self.fc3), group)
        return stacked_norm(self.fc1(taps, group), self.norm_weight, self.norm_bias)

    def _guide(self, reduced: Tensor) -> Tensor:
        """Guided consolidation (SPEC 1.1, 2.6): `[K, n, h] -> [n, h]`."""
        fused = guided_consolidation(
            reduced,
            None,
            self.score.weight[0, 0],
            self.score.bias[0, 0],
            VARIANTS[self.variant].epsilon,
            added=self.project is None,
        )
        if self.project is None:
            return fused
        projected: Tensor = self.project(fused)
        return projected + reduced[-1]

    @overload
    @classmethod
    def from_reference(
        cls, params: Mapping[str, Tensor], variant: Literal["t5", "clipvil", "bert", "mdetr"]
    ) -> Consolidation: ...

    @overload
    @classmethod
    def from_reference(
        cls, params: Mapping[str, Tensor], variant: Literal["clip4clip"]
    ) -> ClipConsolidation: ...

    @overload
    @classmethod
    def from_reference(
        cls, params: Mapping[str, Tensor], variant: Literal["resnet"]
    ) -> MapConsolidation: ...

    @overload
    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor], variant: str) -> Published: ...

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor], variant: str) -> Published:
        """A consolidation with the published parameters.

        Args:
            params: tensors by the papers' names (`hor_block.0.fc1.weight`, ...; SPEC 2.1-2.6).
            variant: a key of `VARIANTS` or `OTHERS`; one of the latter gives its own class.

        Raises InputError for an unknown variant, for names that are missing or left over, and for
        shapes that do not fit.
        """
        if variant in OTHERS:
            return OTHERS[variant].from_reference(params)
        if variant not in VARIANTS:
            known = [*VARIANTS, *OTHERS]
            raise InputError(explain("variant", expected=f"one of {known}", found=variant))
        first = VARIANTS[variant].names[0]
        hidden, width = probe(params, f"hor_block.0.{first}.weight", 2).shape
        module = cls(width, hidden, count(params, "hor_block.", f".{first}.weight"), variant)
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        first, norm, tail, tail_norm = VARIANTS[self.variant].names
        named: Names = {"gate_params": (self.gate, whole)}
        for tap in range(self.fc1.weight.shape[0]):
            block, own = f"hor_block.{tap}", part(tap)
            named |= pair(f"{block}.{first}", self.fc1, own)
            if self.tail_norm is None:
                named |= pair(f"{block}.fc2", self.fc2, own) | pair(f"{block}.fc3", self.fc3, own)
            else:
                named[f"{block}.{norm}.weight"] = (self.norm_weight, own)
                named[f"{block}.{norm}.bias"] = (self.norm_bias, own)
        named |= pair("guide_block.fc_attn", self.score, part(0)) | pair(tail, self.tail, part(0))
        if self.tail_norm is not None:
            named |= pair(tail_norm, self.tail_norm)
        if self.project is not None:
            for place in (0, 2, 3):
                named |= pair(f"guide_block.mlp.{place}", self.project[place])
        return named
