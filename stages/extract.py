"""Stage one: the frozen backbone over every input, once."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import (
    CacheWriter,
    Codec,
    FeatureCache,
    Identity,
    StorageError,
    StreamSpec,
    StreamWriter,
)
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.cache.layout import SHARD_BYTES, Layout, assign, same_shards, shard_capacity
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.data import Source
from sherl_pipe.stages.passes import MainPass, ShardBuffer, WordsPass
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.taps import extracted_taps
from sherl_pipe.stages.templates import Template
from sherl_pipe.stages.tokens import tokenize, tokenizer_fingerprint
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor

BATCH_TOKENS = 4096


def identify(
    backbone: Backbone,
    tokenizer: Any,
    *,
    template: str,
    max_length: int,
    codec: Codec,
    taps: str | Sequence[int],
    versions: Mapping[str, str],
) -> Identity:
    """The identity of the cache that these settings make. Raises InputError for odd taps."""
    depths = {stream: len(backbone.blocks(stream)) for stream in backbone.family.streams}
    chosen = extracted_taps(backbone.family, depths, taps)
    return Identity(
        backbone={
            "name": backbone.name,
            "revision": backbone.revision,
            "architecture": type(backbone.model).__name__,
            "model_type": backbone.config.model_type,
            "parameters": backbone.parameters,
            "fingerprint": backbone.fingerprint,
            "config": backbone.config_hash,
            "dtype": str(backbone.dtype).removeprefix("torch."),
        },
        tokenizer=tokenizer_fingerprint(tokenizer),
        template=template,
        max_length=max_length,
        streams={
            stream: StreamSpec(chosen[stream], depths[stream], backbone.width) for stream in depths
        },
        codec=codec,
        versions=versions,
    )


@dataclass
class Report:
    """What an extraction did to one stream of one split.

    Attributes:
        reused: examples whose text another split already holds.
        done_before: shards that were committed by an earlier run.
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


class Extractor:
    """Runs a backbone over splits and commits what its taps show.

    Args:
        writer: the open cache.
        backbone: the frozen model, on its device.
        tokenizer: the model's own.
        batch_tokens: padded tokens in a batch; bounds memory.
        shard_bytes: size of a full shard before compression.
        progress, announce: told of progress, and once per stream of what will be done.
    """

    def __init__(
        self,
        writer: CacheWriter,
        backbone: Backbone,
        tokenizer: Any,
        *,
        batch_tokens: int = BATCH_TOKENS,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress = silent,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.writer, self.backbone, self.tokenizer = writer, backbone, tokenizer
        self.identity = writer.identity
        self.batch_tokens, self.shard_bytes = batch_tokens, shard_bytes
        self.progress, self.announce = progress, announce

    def split(self, source: Source, template: Template, known: dict[bytes, str]) -> Report:
        """Extract one split into the main stream.

        Args:
            source: its rows.
            template: renders them.
            known: the split of every example that the cache holds; this split's are added.

        Raises NonFiniteError, StaleCacheError, StorageError.
        """
        stream = "encoder" if self.backbone.family.seq2seq else "hidden"
        distinct: dict[bytes, tuple[str, ...]] = {}
        for texts in source.texts(template):
            distinct.setdefault(example_id(texts), texts)
        here = {
            identity: texts
            for identity, texts in distinct.items()
            if known.setdefault(identity, source.name) == source.name
        }
        tokens = tokenize(
            self.tokenizer, list(here.values()), self.identity.max_length, self.progress
        )
        spec = self.identity.streams[stream]
        capacity = shard_capacity(spec, self.identity.codec, self.shard_bytes)
        layout = assign(tokens.lengths, capacity, self.identity.seed)
        reused = len(distinct) - len(here)
        notes = {
            "template": template.to_json(),
            "reused": reused,
            "truncated": tokens.truncated,
        }
        ids = list(here)
        out = self.writer.stream(source.name, stream, ids, layout, notes)
        report = self._report(out, layout, reused=reused, truncated=tokens.truncated)
        if out.pending():
            pass_ = MainPass(self.backbone, stream, spec, tokens, self._pad_id(), self.batch_tokens)
            self._run(out, layout, ids, pass_.states, report)
        out.finish()
        return report

    def words(self, cache: FeatureCache, split: str, tree: PrefixTree) -> Report:
        """Extract the decoder states of a prefix tree for a split, from its cached encoder.

        The encoder is not run: its top tap is read back from the cache.

        Raises what `split` raises, and CorruptCacheError.
        """
        encoder = cache.stream(split, "encoder")
        layout = same_shards(encoder.layout, len(tree.nodes))
        ids = [row.tobytes() for row in encoder.ids]
        out = self.writer.stream(split, tree.stream, ids, layout, {"tree": tree.to_json()})
        report = self._report(out, layout)
        if out.pending():
            spec = self.identity.streams["decoder"]
            pass_ = WordsPass(self.backbone, spec, encoder, tree, self.batch_tokens)
            self._run(out, layout, ids, pass_.states, report)
        out.finish()
        return report

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

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def _run(
        self,
        out: StreamWriter,
        layout: Layout,
        ids: list[bytes],
        states: Callable[[int, Layout], Iterator[Tensor]],
        report: Report,
    ) -> None:
        """Compute pending shards; a thread encodes and commits each while the next one runs."""
        pending = out.pending()
        total = sum(layout.used_rows(shard) for shard in pending)
        done = 0
        what = f"{out.split} {out.stream}"
        self._check_space(out, total)
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as pool:
            committing: Future[int] | None = None
            for shard in pending:
                buffer = ShardBuffer(
                    self.identity.codec, out.spec, layout.used_rows(shard), self.backbone.device
                )
                for batch in states(shard, layout):
                    buffer.add(batch)
                    done += batch.shape[1]
                    self.progress(what, done, total, "tokens")
                buffer.check(what, shard, layout, ids)
                if committing is not None:
                    report.bytes_written += committing.result()
                committing = pool.submit(out.commit, shard, *buffer.arrays())
            if committing is not None:
                report.bytes_written += committing.result()

    def _check_space(self, out: StreamWriter, rows: int) -> None:
        """Say how big it gets. Raises StorageError where the disk cannot hold it."""
        codec, spec = self.identity.codec, out.spec
        row = codec.row_bytes(spec.width)
        need, free = rows * row * len(spec.taps), self.writer.store.free_bytes()
        self.announce(
            f"{out.split} {out.stream}: {rows:,} tokens to do, up to {need / 2**20:,.0f} MiB"
        )
        if need > free:
            raise StorageError(
                errno.ENOSPC,
                f"{self.writer.store.root}: {out.split} {out.stream} needs up to {need:,} bytes, "
                f"{free:,} are free. Free space, choose another --cache, or a smaller --codec.",
            )


def missing_words(cache: FeatureCache, tokenizer: Any, start: int) -> list[tuple[str, PrefixTree]]:
    """Splits and prefix trees whose decoder states the cache's tasks need and it lacks.

    Args:
        cache: of a text-to-text backbone.
        tokenizer: the backbone's.
        start: token id that decoding starts from.
    """
    needed: dict[str, tuple[PrefixTree, set[str]]] = {}
    for table in (table for roles in cache.tasks.values() for table in roles.values()):
        tree = PrefixTree.of_words(table.spec.words, tokenizer, start)
        splits = {cache.places[each][0] for each in table.ids if each in cache.places}
        needed.setdefault(tree.stream, (tree, set()))[1].update(splits)
    return [
        (split, tree)
        for stream, (tree, splits) in needed.items()
        for split in sorted(splits)
        if stream not in cache.streams(split)
    ]
