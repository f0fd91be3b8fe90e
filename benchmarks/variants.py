"""Variants of SHERL that `beyond.py` compares, and how redundant the taps of a cache are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import FeatureCache
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.methods import METHODS
from sherl_pipe.stages.methods.route import RouteSpec
from sherl_pipe.stages.methods.sherl import Sherl
from torch import nn

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """One way to tune with SHERL.

    Attributes:
        late, init: as of `sherl-pipe tune`.
        tail: whether the tail starts as published, whatever `init` says.
        gate: what it starts at, whatever `init` says; 0.055 lets half of the last state through.
        taps: which are read; a name of `CHOICES`, or None for all below the late route.
    """

    late: int = 2
    init: str = "residual"
    tail: bool = False
    gate: float | None = None
    taps: str | None = None


VARIANTS = {
    "default": Variant(),
    "late 1": Variant(late=1),
    "late 3": Variant(late=3),
    "published start": Variant(init="paper"),
    "gate open, tail as published": Variant(tail=True),
    "gate half open, else as published": Variant(init="paper", gate=0.055),
    "taps as published for T5": Variant(taps="t5"),
    "3 taps, least redundant": Variant(taps="least"),
    "3 taps, evenly spaced": Variant(taps="even"),
    "3 taps, most redundant": Variant(taps="most"),
}
SOME = 3  # taps of the small choices


def register(taps: Mapping[str, Sequence[int]]) -> None:
    """Make every variant a method of its own name, given the taps of every choice."""
    for name, variant in VARIANTS.items():
        METHODS[name] = type(
            "VariantOfSherl",
            (Sherl,),
            {
                "choose_taps": staticmethod(partial(_chosen, variant, taps)),
                "build": staticmethod(partial(_built, variant)),
            },
        )


def _chosen(
    variant: Variant,
    choices: Mapping[str, Sequence[int]],
    backbone: Backbone,
    late: int,
    cached: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    taps, last = Sherl.choose_taps(backbone, late, cached)
    if variant.taps is not None:
        taps = {"hidden": tuple(choices[variant.taps])}
    return taps, last


def _built(variant: Variant, backbone: Backbone, spec: RouteSpec) -> Any:
    route: Any = Sherl.build(backbone, spec)
    tail = route.consolidation.tail
    with torch.no_grad():
        if variant.tail:
            nn.init.normal_(tail.weight, std=0.02)  # as published for this kind of model
        if variant.gate is not None:
            route.consolidation.gate.fill_(variant.gate)
    return route


def redundancy(cache: FeatureCache, split: str, rows: int = 4000) -> dict[str, FloatArray]:
    """How much each pair of taps says the same, `[K, K]`, over `rows` tokens of a split.

    `rho`: SHERL's own measure, relu of the cosine of the two states of a token, here of the states
    themselves, each tap's mean taken off. `cka`: linear centred kernel alignment (Kornblith et
    al., ICML 2019).
    """
    stream = cache.stream(split, "hidden")
    data = stream.read_shard(0)
    scales = None if data.scales is None else data.scales[:, :rows]
    states = stream.codec.decode(data.codes[:, :rows], scales, stream.spec.width)[data.picks]
    centred = states.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    count = len(centred)
    rho, cross = np.ones((count, count)), np.ones((count, count))
    for a in range(count):
        for b in range(count):
            rho[a, b] = np.maximum((unit[a] * unit[b]).sum(-1), 0).mean()
            cross[a, b] = np.linalg.norm(centred[a].T @ centred[b]) ** 2
    own = np.sqrt(cross.diagonal())
    return {"rho": rho, "cka": cross / own[:, None] / own[None, :]}


def greedy(similar: FloatArray, top: int, count: int, sign: int = 1) -> list[int]:
    """`count` taps of 0 to `top`, `top` among them: one after another that which is least like
    those that are there (`sign` 1), or most (-1)."""
    found = [top]
    while len(found) < count:
        left = [tap for tap in range(top) if tap not in found]
        found.append(min(left, key=lambda tap: sign * max(similar[tap, each] for each in found)))
    return sorted(found)


def even(top: int, count: int) -> list[int]:
    """`count` taps from 0 to `top`, about evenly spaced."""
    return sorted({round(top * place / (count - 1)) for place in range(count)})
