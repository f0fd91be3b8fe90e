"""What a plan is made from: numbers that were counted or measured, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """How much a stream of a split holds, or will hold.

    Attributes:
        split, stream: which.
        examples: number of them.
        rows: tokens, or nodes of label words.
        padded: tokens in the batches that compute them, padding included.
        shards: number of them.
        values: taps x rows x width.
    """

    split: str
    stream: str
    examples: int
    rows: int
    padded: int
    shards: int
    values: int

    @property
    def main(self) -> bool:
        """Whether it is computed from the inputs, and not for label words."""
        return not self.stream.startswith("decoder")


@dataclass(frozen=True)
class StreamBytes:
    """Bytes of a stream's files.

    Attributes:
        features: of its shards; they grow with the rows.
        tables: of ids and index; they grow with the examples.
        fixed: of everything else.
    """

    features: int
    tables: int
    fixed: int


@dataclass(frozen=True)
class StreamSample:
    """A part of a stream, extracted to be measured.

    Attributes:
        amount: how much was extracted.
        sizes: by codec; None where it cannot hold the values.
        compute_seconds: forward passes and encoding.
        commit_seconds: compressing, hashing and writing shards.
        fixed_seconds: beginning and finishing the stream.
    """

    amount: Amount
    sizes: Mapping[str, StreamBytes | None]
    compute_seconds: float = 0.0
    commit_seconds: float = 0.0
    fixed_seconds: float = 0.0


@dataclass(frozen=True)
class TaskAmount:
    """What an epoch of a task goes through.

    Attributes:
        rows: training rows.
        tokens: of their inputs.
        held_tokens: of all inputs in the splits that hold them, whose shards are read.
        steps: batches.
    """

    task: str
    rows: int
    tokens: int
    held_tokens: int
    steps: int


@dataclass(frozen=True)
class StepSample:
    """Training steps that were taken both ways, on the same batches.

    Attributes:
        tokens: of the inputs of all these batches.
        cached_seconds: one step on each batch, its features from the cache in memory.
        live_seconds: the same steps, the frozen forward before each.
        forward_seconds: of that frozen forward alone.
        loaded_tokens, loaded_bytes: tokens whose features were brought into memory, and what
            these take there, coded.
        load_seconds: for reading, checking and decompressing them.
        start_seconds: for what a head reads of these batches, where it starts from a linear model.
        fit_seconds: for fitting that to as many rows as the task has.
        rows: so many.
    """

    task: str
    tokens: int
    cached_seconds: float
    live_seconds: float
    forward_seconds: float
    loaded_tokens: int
    loaded_bytes: int
    load_seconds: float
    start_seconds: float = 0.0
    fit_seconds: float = 0.0
    rows: int = 0
