"""Shards as work that any process with the backbone can do.

A job says what to compute; how batches are made up depends on the shard alone, so whoever does it,
and however often, writes the same bytes. What is computed goes into the cache and not back: a
worker answers with the shard's receipt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache import FeatureCache, Identity, StreamSpec
from sherl_pipe.cache.fence import committing
from sherl_pipe.cache.layout import Layout, same_shards
from sherl_pipe.cache.manifest import Records
from sherl_pipe.cache.names import stream_kind
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.shard_writer import ShardWriter, stream_files
from sherl_pipe.cache.stores import open_store
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.memory import return_holes
from sherl_pipe.stages.passes import MainPass, States, WordsPass
from sherl_pipe.stages.shard_buffer import ShardBuffer
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.words import PrefixTree


@dataclass(frozen=True)
class ShardJob:
    """One shard that somebody is to compute and commit.

    Attributes:
        counts: the layout's numbers, as the stream's plan has them.
        ids: of its examples, in the order of their rows.
        rows: of each example, `int64 [examples]`.
        inputs: what the backbone reads of each; None for label words, whose encoder states are in
            the cache.
        tree: the label words' prefix tree as JSON.
    """

    split: str
    stream: str
    shard: int
    counts: Mapping[str, int]
    ids: tuple[bytes, ...]
    rows: npt.NDArray[np.int64]
    inputs: Tokens | None = None
    tree: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.split} {self.stream}, shard {self.shard}"

    def layout(self) -> Layout:
        """Of this shard's examples alone, under the number that the shard has in its split."""
        index = np.stack(
            [np.full_like(self.rows, self.shard), self.rows.cumsum() - self.rows, self.rows], axis=1
        )
        return Layout(self.counts["capacity"], self.counts["shards"], index)


@dataclass(frozen=True)
class Done:
    """A worker's answer.

    Attributes:
        receipt: what it committed of the shard.
        worker: machine and process that did it.
        commit_seconds: for compressing and writing.
    """

    shard: int
    receipt: Records
    worker: str
    commit_seconds: float


@dataclass(frozen=True)
class Lost:
    """A job that killed every worker that tried it, and how the last of them ended."""

    job: ShardJob
    reason: str


class Crew(Protocol):
    """Workers that share out the shards of a stream."""

    def work(
        self, shards: Sequence[int], job: Callable[[int], ShardJob], told: Callable[[Done], None]
    ) -> list[Lost]:
        """Have shards done. Raises what a worker raised, and WorkerError where none is left.

        Args:
            shards: their numbers.
            job: what has to be known of one.
            told: hears of each that is committed.
        """
        ...


class ShardWorker:
    """Computes shards and commits them.

    `compute` and `commit` may run in two threads, for one shard while the other is committed.

    Args:
        path: of the cache.
        identity: of the cache.
        token: that lets this run's workers in, see `sherl_pipe.cache.fence`.
        backbone: the cache's, on its device.
        pad_id: of its tokenizer.
        batch_tokens: padded tokens in a batch, the same for all workers.
    """

    def __init__(
        self,
        path: Place,
        identity: Identity,
        token: str,
        backbone: Backbone,
        *,
        pad_id: int,
        batch_tokens: int,
    ) -> None:
        self._path, self._identity, self._token = path, identity, token
        self._backbone, self._pad_id, self._batch_tokens = backbone, pad_id, batch_tokens
        self._main: tuple[str, MainPass] | None = None
        self._words: tuple[tuple[str, str], WordsPass, Layout] | None = None
        self._one_at_a_time = threading.Lock()

    def compute(self, job: ShardJob) -> ShardBuffer:
        """The coded rows of a shard. Raises NonFiniteError, CorruptCacheError."""
        spec = self._identity.spec(job.stream)
        buffer = ShardBuffer(self._identity.codec, spec, int(job.rows.sum()), self._backbone.device)
        with self._one_at_a_time:
            for batch in self._states(job, spec):
                buffer.add(batch)
            buffer.check(f"{job.split} {job.stream}", job.shard, job.layout(), job.ids)
            return_holes()
        return buffer

    def commit(self, job: ShardJob, buffer: ShardBuffer) -> Records:
        """Write a computed shard; a shard that is there already, whole, is left alone.

        Raises StorageError; LockedError where another run has taken the cache over.
        """
        files = stream_files(self._identity, job.split, job.stream, job.counts)
        writer = ShardWriter(open_store(self._path), files)
        with committing(self._path, self._token):
            # A worker that was given up for lost may have finished after all.
            return writer.receipt(job.shard) or writer.commit(job.shard, *buffer.arrays())

    def _states(self, job: ShardJob, spec: StreamSpec) -> States:
        if job.inputs is None:
            words, layout = self._words_pass(job, spec)
            return words.states([job.shard], layout)
        if self._main is None or self._main[0] != job.stream:
            stream = stream_kind(job.stream)
            made = MainPass(
                self._backbone, stream, spec, job.inputs, self._pad_id, self._batch_tokens
            )
            self._main = job.stream, made
        self._main[1].tokens = job.inputs
        return self._main[1].states([job.shard], job.layout())

    def _words_pass(self, job: ShardJob, spec: StreamSpec) -> tuple[WordsPass, Layout]:
        """The pass over the label words of a split; that of the last job where it is the same."""
        key = (job.split, job.stream)
        if self._words is None or self._words[0] != key:
            encoder = FeatureCache.open(self._path).stream(job.split, "encoder")
            tree = PrefixTree.from_json(job.tree or {})
            layout = same_shards(encoder.layout, len(tree.nodes))
            made = WordsPass(self._backbone, spec, encoder, tree, self._batch_tokens)
            self._words = key, made, layout
        return self._words[1:]
