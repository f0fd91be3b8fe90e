"""Stage one: the frozen backbone over every input, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from sherl_pipe.cache import CacheWriter, FeatureCache, Stream, StreamSpec, StreamWriter
from sherl_pipe.cache.layout import SHARD_BYTES, Layout, assign, same_shards, shard_capacity
from sherl_pipe.cache.names import stream_kind
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.inputs import pad_id, read_inputs
from sherl_pipe.stages.memory import return_holes
from sherl_pipe.stages.passes import MainPass, States, WordsPass, tokens_in_batch
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.shard_buffer import ShardBuffer, token_bytes
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.splits import inputs_of
from sherl_pipe.stages.templates import Template
from sherl_pipe.stages.text_passes import ContinuationsPass, TargetsPass
from sherl_pipe.stages.texts import TargetTexts
from sherl_pipe.stages.tokens import Tokens, tokenize
from sherl_pipe.stages.words import PrefixTree


@dataclass
class Report:
    """What an extraction did to one stream of one split.

    Attributes:
        reused: examples whose text another split already holds.
        done_before: shards that were committed by an earlier run.
        lost: shards that killed every worker that tried them.
    """

    split: str
    stream: str
    examples: int
    reused: int = 0
    rows: int = 0
    truncated: int = 0
    shards: int = 0
    done_before: int = 0
    bytes_written: int = 0
    lost: int = 0


class Extractor:
    """Runs a backbone over splits and commits what its taps show.

    Args:
        writer: the open cache.
        backbone: the frozen model, on its device.
        tokenizer: the model's own, or its image processor as a `PictureReader`.
        batch_tokens: padded tokens in a batch; None for what suits the device.
        shard_bytes: size of a full shard before compression.
        progress, announce: told of progress, and once per stream of what will be done.
    """

    def __init__(
        self,
        writer: CacheWriter,
        backbone: Backbone,
        tokenizer: Any,
        *,
        batch_tokens: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress = silent,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.writer, self.backbone, self.tokenizer = writer, backbone, tokenizer
        self.identity = writer.identity
        self.batch_tokens = tokens_in_batch(batch_tokens, backbone.width, backbone.device)
        self.shard_bytes = shard_bytes
        self.progress, self.announce = progress, announce

    def split(self, source: Source, template: Template, known: dict[bytes, str]) -> list[Report]:
        """Extract one split into the stream of its inputs, and into those of taps that were added
        to the cache. Each of them takes forward passes of its own.

        Args:
            source: its rows.
            template: renders them.
            known: the split of every example that the cache holds; this split's are added.

        Raises NonFiniteError, StaleCacheError, StorageError.
        """
        stream = source.stream or self.backbone.family.main
        ids, tokens, notes = self._read(source, template, known)
        spec = self.identity.streams[stream]
        capacity = shard_capacity(spec, self.identity.codec, self.shard_bytes)
        layout = assign(tokens.lengths, capacity, self.identity.seed)
        reports = []
        for part in self._parts(stream):
            out = self.writer.stream(source.name, part, ids, layout, notes)
            report = self._report(out, layout, reused=notes["reused"], truncated=tokens.truncated)
            if out.pending():
                self._extract_main(out, layout, ids, tokens, report)
            self._finish(out)
            reports.append(report)
        return reports

    def _read(
        self, source: Source, template: Template, known: dict[bytes, str]
    ) -> tuple[list[bytes], Tokens, dict[str, Any]]:
        """Ids and tokens of a split's inputs, whose texts are held no longer than this takes, and
        what its manifest says of them."""
        inputs = inputs_of(source, template, known)
        length = self.identity.max_length
        tokens = read_inputs(self.tokenizer, list(inputs.texts.values()), length, self.progress)
        return list(inputs.texts), tokens, inputs.notes(tokens)

    def words(self, cache: FeatureCache, split: str, tree: PrefixTree) -> list[Report]:
        """Extract the decoder states of a prefix tree for a split, from its cached encoder.

        The encoder is not run: its top tap is read back from the cache.

        Raises what `split` raises, and CorruptCacheError.
        """
        encoder = cache.stream(split, "encoder")
        layout = same_shards(encoder.layout, len(tree.nodes))
        ids = [row.tobytes() for row in encoder.ids]
        reports = []
        for part in self._parts(tree.stream):
            out = self.writer.stream(split, part, ids, layout, {"tree": tree.to_json()})
            report = self._report(out, layout)
            if out.pending():
                self._extract_words(out, layout, ids, encoder, tree, report)
            self._finish(out)
            reports.append(report)
        return reports

    def _parts(self, stream: str) -> list[str]:
        """The stored streams of a stream, itself last: when it is seen, all its taps are there."""
        first, *added = self.identity.parts(stream)
        return [*added, first]

    def targets(
        self,
        cache: FeatureCache,
        split: str,
        texts: TargetTexts,
        prompts: Mapping[bytes, tuple[str, ...]] | None = None,
    ) -> list[Report]:
        """Extract the states of free-text targets for a split: of a text-to-text backbone from its
        cached encoder, which is not run; of a causal one behind their prompts.

        Args:
            texts: the targets.
            prompts: a causal backbone's: rendered segments of the split's examples, by id.

        Raises what `words` raises.
        """
        main = cache.stream(split, self.backbone.family.main)
        ids = [row.tobytes() for row in main.ids]
        lengths = np.array([texts.rows(each) for each in ids], np.int64)
        layout = same_shards(main.layout, lengths)
        notes = {"targets": texts.key, "truncated": texts.truncated}
        reports = []
        for part in self._parts(texts.stream):
            out = self.writer.stream(split, part, ids, layout, notes)
            report = self._report(out, layout, truncated=texts.truncated)
            if out.pending():
                states = self._target_states(out.spec, main, ids, texts, prompts)
                self._run(out, layout, ids, states, report)
            out.finish()
            reports.append(report)
        return reports

    def _target_states(
        self,
        spec: StreamSpec,
        main: Stream,
        ids: Sequence[bytes],
        texts: TargetTexts,
        prompts: Mapping[bytes, tuple[str, ...]] | None,
    ) -> Callable[[Sequence[int], Layout], States]:
        if prompts is None:
            return TargetsPass(self.backbone, spec, main, texts, self.batch_tokens).states
        chosen = [prompts[each] for each in ids]
        tokens = tokenize(self.tokenizer, chosen, self.identity.max_length)
        return ContinuationsPass(
            self.backbone,
            spec,
            [tuple(each["input_ids"].tolist()) for each in tokens.inputs],
            [texts.of(each) for each in ids],
            texts,
            self.batch_tokens,
        ).states

    def _extract_main(
        self, out: StreamWriter, layout: Layout, ids: list[bytes], tokens: Tokens, report: Report
    ) -> None:
        pad, stream = pad_id(self.tokenizer), stream_kind(out.stream)
        pass_ = MainPass(self.backbone, stream, out.spec, tokens, pad, self.batch_tokens)
        self._run(out, layout, ids, pass_.states, report)

    def _extract_words(
        self,
        out: StreamWriter,
        layout: Layout,
        ids: list[bytes],
        encoder: Stream,
        tree: PrefixTree,
        report: Report,
    ) -> None:
        pass_ = WordsPass(self.backbone, out.spec, encoder, tree, self.batch_tokens)
        self._run(out, layout, ids, pass_.states, report)

    def _finish(self, out: StreamWriter) -> None:
        out.finish()

    def _report(self, out: StreamWriter, layout: Layout, **counts: int) -> Report:
        waiting = len(out.pending())
        return Report(
            out.split,
            out.stream,
            examples=len(layout.index),
            rows=int(layout.index[:, 2].sum()),
            shards=layout.shards,
            done_before=layout.shards - waiting,
            **counts,
        )

    def _say_what(
        self, out: StreamWriter, layout: Layout, pending: Sequence[int]
    ) -> tuple[str, int]:
        """Announce what is to be done; its name and its tokens."""
        what, total = f"{out.split} {out.stream}", sum(map(layout.used_rows, pending))
        need = total * token_bytes(self.identity.codec, out.spec)
        self.announce(f"{what}: {total:,} tokens to do, up to {need / 2**20:,.0f} MiB")
        return what, total

    def _run(
        self,
        out: StreamWriter,
        layout: Layout,
        ids: list[bytes],
        states: Callable[[Sequence[int], Layout], States],
        report: Report,
    ) -> None:
        """Compute pending shards; a thread encodes and commits each while the next one runs."""
        pending, done = out.pending(), 0
        what, total = self._say_what(out, layout, pending)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="commit") as pool,
            closing(states(pending, layout)) as batches,
        ):
            committing: Future[int] | None = None
            for shard in pending:
                buffer = ShardBuffer(
                    self.identity.codec, out.spec, layout.used_rows(shard), self.backbone.device
                )
                while not buffer.full and (batch := next(batches, None)) is not None:
                    buffer.add(batch)
                    done += batch.shape[1]
                    self.progress(what, done, total, "tokens")
                buffer.check(what, shard, layout, ids)
                return_holes()
                if committing is not None:
                    report.bytes_written += committing.result()
                committing = pool.submit(out.commit, shard, *buffer.arrays())
            if committing is not None:
                report.bytes_written += committing.result()
