"""What a tuning is asked for, and what it gives."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from sherl_pipe.cache.fingerprint import hash_json

PRECISIONS = ("float32", "bf16")
HEADS = ("random", "probe", "words")


@dataclass(frozen=True)
class TuneSettings:
    """One tuning's settings; defaults follow SHERL's published runs on T5 where they fit a cache.
    Methods have their own `reduction`, `late`, `init` and `head` (`Method.usual`).

    Attributes:
        method: a key of `METHODS`.
        reduction: the backbone's width over the reduced width.
        late: frozen blocks behind what is trained; 0 for a method that has none.
        lr: peak learning rate of AdamW.
        epochs, batch_size, seed: as usual.
        warmup: share of the steps with a rising rate, at most 500 steps.
        weight_decay, clip: of AdamW; largest gradient norm.
        init: what training starts from, one of `Method.inits`.
        pool: of a pooled head, one of `POOLS`.
        head: what an encoder's head starts from, `random` or `probe`, a linear model fitted to what
            it reads of the training rows at the start. With `words` a causal model keeps its own
            head, and its label words are scored by their first tokens.
        loss: of label words, `words` or `vocabulary` (see `Scoring`); text-to-text backbones.
        precision: `float32`, or `bf16` for autocast.
    """

    method: str = "sherl"
    reduction: int = 4
    late: int = 1
    lr: float = 3e-3
    epochs: int = 10
    batch_size: int = 32
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    init: str = "residual"
    pool: str = "mean"
    head: str = "random"
    loss: str = "words"
    precision: str = "float32"

    @property
    def name(self) -> str:
        """What the tuning's folder is called; other settings have another name."""
        rest = asdict(self)
        shown = "method", "reduction", "late", "init", "head", "lr", "epochs", "batch_size", "seed"
        named = {each: rest.pop(each) for each in shown}
        named["head"] = "" if self.head == TuneSettings.head else f"-{self.head}"
        usual = {each.name: each.default for each in fields(self)}
        # What is seldom changed is in the name as a hash, and only when it is changed.
        odd = f"-{hash_json(rest)[:6]}" if any(usual[each] != rest[each] for each in rest) else ""
        return (
            "{method}-r{reduction}-late{late}-{init}{head}-lr{lr:g}-e{epochs}-b{batch_size}-seed{seed}"
        ).format(**named) + odd


@dataclass(frozen=True)
class TuneResult:
    """What a tuning gave.

    Attributes:
        metrics: in percent but for `perplexity`, on `examples` rows of the `role` split.
        trainable, backbone: numbers of parameters.
        seconds: of training and evaluation; `seconds_per_epoch` of training alone.
        peak_mib: peak memory above what the process (or device) held before the features.
    """

    task: str
    method: str
    seed: int
    lr: float
    metrics: dict[str, float]
    score: float
    role: str
    examples: int
    trainable: int
    backbone: int
    seconds: float
    seconds_per_epoch: float
    peak_mib: float
    folder: str


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: up in `warmup` of the steps (500 at most), then linearly
    down to zero."""
    rising = min(500, math.ceil(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return (total - step) / max(1, total - rising)
