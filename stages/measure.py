"""A sample of an extraction, run as the extraction would run it, to see its size and its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sherl_pipe.cache import CODECS, CacheWriter, Identity, NonFiniteError, StreamWriter
from sherl_pipe.cache.layout import Layout, assign, same_shards, shard_capacity
from sherl_pipe.stages.amounts import Amount, StreamBytes, StreamSample
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Ints
from sherl_pipe.stages.inputs import pad_id
from sherl_pipe.stages.passes import MainPass, States, WordsPass
from sherl_pipe.stages.sample import Sample
from sherl_pipe.stages.scratch import opened, stream_bytes
from sherl_pipe.stages.shard_buffer import ShardBuffer
from sherl_pipe.stages.survey import Split, Survey, Trees, padded_tokens
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor

# A stream's forward passes are timed for about so long, and gone through so often at most.
PACE_SECONDS, MOST_ROUNDS = 1.0, 64
# A forward pass that takes so long says how fast the backbone is.
PROBE_SECONDS = 0.1


@dataclass(frozen=True)
class Setup:
    """An extraction's settings; as for `Extractor`."""

    backbone: Backbone
    tokenizer: Any
    identity: Identity
    shard_bytes: int
    batch_tokens: int

    @property
    def capacity(self) -> int:
        """Tokens in a shard of the main stream."""
        spec = self.identity.streams[self.backbone.family.main]
        return shard_capacity(spec, self.identity.codec, self.shard_bytes)

    @property
    def enough(self) -> int:
        """Tokens of which more would show no more: a shard of the largest codec, two batches."""
        spec = self.identity.streams[self.backbone.family.main]
        largest = max(CODECS.values(), key=lambda codec: codec.code_bytes(spec.width))
        return max(shard_capacity(spec, largest, self.shard_bytes), 2 * self.batch_tokens)

    def main_pass(self, tokens: Tokens) -> MainPass:
        """The forward passes over `tokens`."""
        stream = self.backbone.family.main
        spec, pad = self.identity.streams[stream], pad_id(self.tokenizer)
        return MainPass(self.backbone, stream, spec, tokens, pad, self.batch_tokens)


class Clock:
    """Seconds between calls of `lap`, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the making."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def tokens_a_second(setup: Setup, counted: Survey) -> float:
    """Speed of the forward passes, roughly; the device is warm then."""
    tokens = max(counted.splits, key=lambda each: len(each.known)).tokens
    main, lengths = setup.main_pass(tokens), tokens.lengths
    order = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")
    clock = Clock(setup.backbone.device)
    count = 8
    with torch.inference_mode():
        main.of(order[:count])
        while True:
            clock.lap()
            main.of(order[:count])
            seconds, done = clock.lap(), int(lengths[order[:count]].sum())
            if seconds > PROBE_SECONDS or done > setup.batch_tokens or count >= len(order):
                return done / seconds
            count *= 2


def measure_streams(
    setup: Setup,
    counted: Survey,
    sample: Sample,
    trees: Trees,
    target: CacheWriter,
    others: Sequence[CacheWriter] = (),
    *,
    seconds: float,
) -> list[StreamSample]:
    """Extract the sample into caches and measure that.

    Args:
        trees: label words and the splits that need them; measured one after another until
            `seconds` are over, those first that take the most.
        target: the cache that times are taken of, with the codec of `setup`.
        others: caches with other codecs.

    Raises NonFiniteError for states that the codec of `setup` cannot hold, StorageError.
    """
    run = _Run(setup, target, others)
    splits = [split for split in counted.splits if len(sample.members[split.name])]
    found = [run.main(split, sample.members[split.name]) for split in splits]
    examples = {split.name: len(split.ids) for split in counted.splits}
    clock, spent = Clock(setup.backbone.device), 0.0

    def nodes(each: tuple[PrefixTree, Sequence[str]]) -> int:
        tree, needed = each
        return len(tree.flat_nodes) * sum(examples[name] for name in needed)

    for tree, needed in sorted(trees, key=nodes, reverse=True):
        if spent <= seconds:
            found += [run.words(split.name, tree) for split in splits if split.name in needed]
            spent += clock.lap()
    return found


class _Run:
    """Extracts parts of streams."""

    def __init__(self, setup: Setup, target: CacheWriter, others: Sequence[CacheWriter]) -> None:
        self._setup, self._target, self._others = setup, target, others

    def main(self, split: Split, members: Ints) -> StreamSample:
        setup = self._setup
        tokens = replace(split.tokens, inputs=[split.tokens.inputs[place] for place in members])
        return self._measure(
            split.name,
            setup.backbone.family.main,
            [split.ids[place] for place in split.known[members]],
            assign(tokens.lengths, setup.capacity, setup.identity.seed),
            split.inputs.notes(tokens),
            tokens.lengths,
            setup.main_pass(tokens).states,
        )

    def words(self, split: str, tree: PrefixTree) -> StreamSample:
        setup = self._setup
        encoder = opened(self._target).stream(split, "encoder")
        spec = setup.identity.streams["decoder"]
        return self._measure(
            split,
            tree.stream,
            [row.tobytes() for row in encoder.ids],
            same_shards(encoder.layout, len(tree.nodes)),
            {"tree": tree.to_json()},
            encoder.layout.index[:, 2] + len(tree.flat_nodes),
            WordsPass(setup.backbone, spec, encoder, tree, setup.batch_tokens).states,
        )

    def _measure(
        self,
        split: str,
        stream: str,
        ids: list[bytes],
        layout: Layout,
        notes: Mapping[str, Any],
        lengths: Ints,
        states: Callable[[Sequence[int], Layout], States],
    ) -> StreamSample:
        """Extract a stream; `lengths` are those of the examples in a batch."""
        device = self._setup.backbone.device
        clock = Clock(device)
        out = self._target.stream(split, stream, ids, layout, notes)
        fixed, commit = clock.lap(), 0.0
        others = [each.stream(split, stream, ids, layout, notes) for each in self._others]
        for shard in range(layout.shards):
            kept = list(states([shard], layout))
            coded = _coded(out, shard, kept, ids).arrays()
            clock.lap()
            out.commit(shard, *coded)
            commit += clock.lap()
            others = [each for each in others if _committed(each, shard, kept, ids)]
        clock.lap()
        out.finish()
        fixed += clock.lap()
        compute = self._pace(out, layout, states)
        for each in others:
            each.finish()
        rows = int(layout.index[:, 2].sum())
        amount = Amount(
            split,
            stream,
            examples=len(ids),
            rows=rows,
            padded=padded_tokens(layout, lengths, self._setup.batch_tokens),
            shards=layout.shards,
            values=rows * len(out.spec.taps) * out.spec.width,
        )
        sizes: dict[str, StreamBytes | None] = {e.identity.codec.name: None for e in self._others}
        for each in (out, *others):
            sizes[each.identity.codec.name] = stream_bytes(each.store, split, stream)
        return StreamSample(amount, sizes, compute, commit, fixed)

    def _pace(
        self,
        out: StreamWriter,
        layout: Layout,
        states: Callable[[Sequence[int], Layout], States],
    ) -> float:
        """Seconds that a stream's forward passes and encoding take, once everything is warm.

        All of it again and again without a break, so that threads that compute batches side by side
        are all busy until close to the end, as they are in a long extraction.
        """
        device = self._setup.backbone.device
        rows = sum(map(layout.used_rows, range(layout.shards)))
        shards = list(range(layout.shards))
        clock, rounds = Clock(device), 1
        while rows:
            clock.lap()
            buffer = ShardBuffer(out.identity.codec, out.spec, rows, device)
            for batch in states(shards * rounds, layout):
                if buffer.full:
                    buffer = ShardBuffer(out.identity.codec, out.spec, rows, device)
                buffer.add(batch)
            seconds = clock.lap()
            if seconds > PACE_SECONDS / 2 or rounds >= MOST_ROUNDS:
                return seconds / rounds
            # What one round takes alone is more than its share of many.
            rounds = min(MOST_ROUNDS, max(2 * rounds, math.ceil(PACE_SECONDS / seconds * rounds)))
        return 0.0


def _coded(
    out: StreamWriter, shard: int, batches: Sequence[Tensor], ids: list[bytes]
) -> ShardBuffer:
    """Code a shard of states as its stream does. Raises NonFiniteError."""
    rows, device = out.layout.used_rows(shard), batches[0].device
    buffer = ShardBuffer(out.identity.codec, out.spec, rows, device)
    for batch in batches:
        buffer.add(batch)
    buffer.check(f"{out.split} {out.stream}", shard, out.layout, ids)
    return buffer


def _committed(out: StreamWriter, shard: int, batches: Sequence[Tensor], ids: list[bytes]) -> bool:
    """Write a shard of states with a stream's own codec; False where that cannot hold them."""
    try:
        buffer = _coded(out, shard, batches, ids)
    except NonFiniteError:
        return False
    out.commit(shard, *buffer.arrays())
    return True
