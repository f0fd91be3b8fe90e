"""SHERL's anti-redundant consolidation of taps (Diao et al., ECCV 2024; multi-tiered sensing
adaption), for all taps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.guided import guided_consolidation
from sherl_pipe.stages.quantize import turn
from torch import Tensor, nn
from torch.nn import functional as F

GATE_SCALE = 0.1
# tanh(0.2 / 0.1) = 0.96: open, and still steep enough to be learned.
OPEN_GATE = 0.2


@dataclass(frozen=True)
class Variant:
    """What differs between the published consolidations.

    Attributes:
        epsilon: of unit vectors and of the weights' normalisation.
        gated: reduction by a gated two-layer block; else by linear and LayerNorm.
        std: of the initial linear weights; None is PyTorch's default.
    """

    epsilon: float
    gated: bool
    std: float | None


VARIANTS = {
    "t5": Variant(1e-6, gated=True, std=0.01),
    "clipvil": Variant(1e-6, gated=True, std=0.02),
    "bert": Variant(1e-8, gated=False, std=None),
}

INITIALISATIONS = ("paper", "residual")


class StackedLinear(nn.Module):
    """K linear layers at once: `[K, n, d] -> [K, n, h]`; weight `[K, h, d]`, bias `[K, h]`."""

    def __init__(self, count: int, inputs: int, outputs: int, std: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs))
        if std is None:
            # What nn.Linear starts from: uniform in +-1/sqrt(inputs), weight and bias.
            bound = inputs**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=std)

    def forward(self, values: Tensor, group: int = 0) -> Tensor:
        """`group`: of turned values (see `quantize.decode`)."""
        weight = turn(self.weight, group)
        return torch.baddbmm(self.bias.unsqueeze(1), values, weight.transpose(1, 2))


class Consolidation(nn.Module):
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
        self.tail_norm = None if kind.gated else nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.0 if kind.gated else 0.1)
        self.gate = nn.Parameter(torch.zeros(1))
        if init == "residual":
            self._start_residual()

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
        tail = self.tail(F.relu(fused).unsqueeze(0))[0]
        if self.tail_norm is not None:
            tail = self.tail_norm(tail)
        share = torch.tanh(self.gate / GATE_SCALE)
        out: Tensor = self.dropout(tail).view_as(last) + share * last
        return out

    def _reduce(self, taps: Tensor, group: int = 0) -> Tensor:
        """`[K, n, d] -> [K, n, h]` (SPEC 2.1, 2.3)."""
        reduced = self.fc1(taps, group)
        if VARIANTS[self.variant].gated:
            reduced = F.relu(reduced)
            gated: Tensor = (self.fc2(reduced) + reduced) * torch.sigmoid(self.fc3(reduced))
            return gated
        normed = F.layer_norm(reduced, reduced.shape[-1:], eps=1e-5)
        return normed * self.norm_weight.unsqueeze(1) + self.norm_bias.unsqueeze(1)

    def _guide(self, reduced: Tensor) -> Tensor:
        """Guided consolidation (SPEC 1.1): `[K, n, h] -> [n, h]`."""
        return guided_consolidation(
            reduced[:-1],
            reduced[-1],
            self.score.weight[0, 0],
            self.score.bias[0, 0],
            VARIANTS[self.variant].epsilon,
        )

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor], variant: str) -> Consolidation:
        """A consolidation with the published parameters.

        Args:
            params: tensors by the papers' names (`hor_block.0.fc1.weight`, ...; SPEC 2.1-2.3).
            variant: `t5`, `clipvil` or `bert`.

        Raises InputError for an unknown variant, or for names that are missing or left over.
        """
        if variant not in VARIANTS:
            raise InputError(explain("variant", expected=f"one of {list(VARIANTS)}", found=variant))
        first = "fc1" if VARIANTS[variant].gated else "fc.0"
        count = sum(name.endswith(f".{first}.weight") for name in params)
        probe = params.get(f"hor_block.0.{first}.weight")
        if probe is None:
            raise InputError(
                explain("parameters", expected=f"hor_block.0.{first}.weight", found=sorted(params))
            )
        module = cls(probe.shape[1], probe.shape[0], count, variant)
        mine = module.reference_parameters()
        if mine.keys() != params.keys():
            odd = sorted(mine.keys() ^ params.keys())
            raise InputError(explain("parameters", expected="the published names", found=odd))
        with torch.no_grad():
            for name, view in mine.items():
                view.copy_(params[name])
        return module

    def reference_parameters(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """Views of the parameters, or of their gradients, under the papers' names."""

        def pick(parameter: Tensor) -> Tensor:
            if not gradients:
                return parameter.detach()
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

        def linear(module: StackedLinear, place: int, name: str) -> dict[str, Tensor]:
            return {
                f"{name}.weight": pick(module.weight)[place],
                f"{name}.bias": pick(module.bias)[place],
            }

        named: dict[str, Tensor] = {"gate_params": pick(self.gate)}
        gated = self.tail_norm is None
        for tap in range(self.fc1.weight.shape[0]):
            block = f"hor_block.{tap}"
            if gated:
                for part in ("fc1", "fc2", "fc3"):
                    named |= linear(getattr(self, part), tap, f"{block}.{part}")
            else:
                named |= linear(self.fc1, tap, f"{block}.fc.0")
                named[f"{block}.fc.1.weight"] = pick(self.norm_weight)[tap]
                named[f"{block}.fc.1.bias"] = pick(self.norm_bias)[tap]
        named |= linear(self.score, 0, "guide_block.fc_attn")
        named |= linear(self.tail, 0, "fc_out" if gated else "fc_out.1")
        if self.tail_norm is not None:
            named["fc_out.2.weight"] = pick(self.tail_norm.weight)
            named["fc_out.2.bias"] = pick(self.tail_norm.bias)
        return named
