"""Stage one: the frozen backbone over every input, once."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import (
    CacheWriter,
    Codec,
    FeatureCache,
    Identity,
    LabelTable,
    NonFiniteError,
    StorageError,
    StreamSpec,
    StreamWriter,
)
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.cache.layout import SHARD_BYTES, Layout, assign, same_shards, shard_capacity
from sherl_pipe.stages import quantize
from sherl_pipe.stages.backbone import Backbone, blocks_of, tokenizer_fingerprint
from sherl_pipe.stages.data import Source, Template
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.surgery import TapRecorder, cut_after
from sherl_pipe.stages.taps import extracted_taps
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor

# (what, done, all, unit): `done` of `all` units of `what`.
Progress = Callable[[str, int, int, str], None]

BATCH_TOKENS = 4096


def silent(_: str, __: int, ___: int, ____: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized inputs.

    Attributes:
        inputs: per example, arrays of equal length by name (`input_ids`, `token_type_ids`, ...).
        truncated: examples that were cut at the maximum length.
    """

    inputs: list[dict[str, npt.NDArray[np.int64]]]
    truncated: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(each["input_ids"]) for each in self.inputs], np.int64)

    def batch(self, members: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """Right-padded `[B, S]` tensors of some examples, the attention mask included."""
        chosen = [self.inputs[member] for member in members]
        longest = max(len(each["input_ids"]) for each in chosen)
        out = {
            name: np.full((len(chosen), longest), pad_id if name == "input_ids" else 0, np.int64)
            for name in (*chosen[0], "attention_mask")
        }
        for row, each in enumerate(chosen):
            size = len(each["input_ids"])
            for name, values in each.items():
                out[name][row, :size] = values
            out["attention_mask"][row, :size] = 1
        return {name: torch.from_numpy(values) for name, values in out.items()}


def tokenize(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int, progress: Progress = silent
) -> Tokens:
    """Token ids of text segments, cut at `max_length`."""
    inputs: list[dict[str, npt.NDArray[np.int64]]] = []
    truncated = 0
    step = 2000
    for start in range(0, len(texts), step):
        part = texts[start : start + step]
        pairs = [each[1] for each in part] if part and len(part[0]) == 2 else None
        encoded = tokenizer(
            text=[each[0] for each in part],
            text_pair=pairs,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        truncated += sum(bool(each.overflowing) for each in encoded.encodings or ())
        for row in range(len(part)):
            inputs.append({name: np.asarray(rows[row], np.int64) for name, rows in encoded.items()})
        progress("tokenizing", len(inputs), len(texts), "examples")
    return Tokens(inputs, truncated)


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

    def split(
        self, source: Source, template: Template, known: Mapping[bytes, tuple[str, int]]
    ) -> Report:
        """Extract one split into the main stream.

        Args:
            source: its rows.
            template: renders them.
            known: examples that the cache holds, with their split.

        Raises NonFiniteError, StaleCacheError, StorageError.
        """
        stream = "encoder" if self.backbone.family.seq2seq else "hidden"
        distinct: dict[bytes, tuple[str, ...]] = {}
        for texts in source.texts(template):
            distinct.setdefault(example_id(texts), texts)
        here = {
            identity: texts
            for identity, texts in distinct.items()
            if known.get(identity, (source.name, 0))[0] == source.name
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
        row = codec.code_bytes(spec.width) + 2 * codec.scale_groups(spec.width)
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


class ShardBuffer:
    """The coded rows of one shard, copied from the device as they come."""

    def __init__(self, codec: Codec, spec: StreamSpec, rows: int, device: torch.device) -> None:
        self._codec, self._spec, self._device = codec, spec, device
        pin = device.type == "cuda"
        taps, groups = len(spec.taps), codec.scale_groups(spec.width)
        self._codes = torch.empty(
            taps, rows, codec.code_bytes(spec.width), dtype=torch.uint8, pin_memory=pin
        )
        self._scales = torch.empty(taps, rows, groups, dtype=torch.float16, pin_memory=pin)
        self._bad = torch.zeros(taps, rows, dtype=torch.bool, device=device)
        self._filled = 0

    def add(self, states: Tensor) -> None:
        """Encode `[K, n, d]` on its device and copy it here without waiting."""
        rows = slice(self._filled, self._filled + states.shape[1])
        self._filled = rows.stop
        self._bad[:, rows] = quantize.overflowed(self._codec, states)
        codes, scales = quantize.encode(self._codec, states)
        self._codes[:, rows].copy_(codes, non_blocking=True)
        if scales is not None:
            self._scales[:, rows].copy_(scales, non_blocking=True)

    def check(self, what: str, shard: int, layout: Layout, ids: Sequence[bytes]) -> None:
        """Raise NonFiniteError naming tap and examples; wait for the copies."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._filled != self._codes.shape[1]:
            raise RuntimeError(f"{what}: {self._filled} rows of {self._codes.shape[1]}")
        bad = self._bad.cpu().numpy()
        if not bad.any():
            return
        taps = [self._spec.taps[place] for place in np.flatnonzero(bad.any(axis=1))]
        rows = np.flatnonzero(bad.any(axis=0))
        members = layout.members(shard)
        starts = layout.index[members, 1]
        wrong = sorted({int(members[np.searchsorted(starts, row, "right") - 1]) for row in rows})
        names = ", ".join(ids[example].hex() for example in wrong[:8])
        raise NonFiniteError(
            f"{what}, shard {shard}: values that are not finite (or that {self._codec.name} cannot "
            f"hold) at tap {', '.join(map(str, taps))} of {len(wrong)} examples: {names}. The "
            "shard was not committed. Use --dtype float32 or bfloat16, or remove these examples."
        )

    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16] | None]:
        """Codes and scales as numpy arrays."""
        scales = self._scales.numpy() if self._scales.shape[-1] else None
        return self._codes.numpy(), scales


def token_batches(
    members: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], budget: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Cut members, ascending in length, into batches of at most `budget` padded tokens."""
    start = 0
    for end in range(1, len(members) + 1):
        longest = lengths[members[end]] if end < len(members) else 0
        if end == len(members) or longest * (end + 1 - start) > budget:
            yield members[start:end]
            start = end


class MainPass:
    """The backbone up to its last tap, over the tokens of a split."""

    def __init__(
        self,
        backbone: Backbone,
        stream: str,
        spec: StreamSpec,
        tokens: Tokens,
        pad_id: int,
        batch_tokens: int,
    ) -> None:
        model: Any = cut_after(backbone, stream, spec.taps[-1])
        self._recorder = TapRecorder(blocks_of(model, backbone.family, stream), spec.taps)
        self._model = model.encoder if backbone.family.seq2seq else model
        self._device, self._spec, self._tokens = backbone.device, spec, tokens
        self._pad_id, self._batch_tokens = pad_id, batch_tokens

    @torch.inference_mode()
    def states(self, shard: int, layout: Layout) -> Iterator[Tensor]:
        """`[K, n, d]` of the shard's rows, batch by batch, in their order."""
        members = layout.members(shard)
        for batch in token_batches(members, self._tokens.lengths, self._batch_tokens):
            inputs = self._tokens.batch(batch.tolist(), self._pad_id)
            inputs = {name: values.to(self._device) for name, values in inputs.items()}
            self._model(**inputs)
            mask = inputs["attention_mask"].bool()
            yield torch.stack([self._recorder.states[tap][mask] for tap in self._spec.taps])


class WordsPass:
    """The decoder over all label-word prefixes, fed by the cached encoder."""

    def __init__(
        self, backbone: Backbone, spec: StreamSpec, encoder: Any, tree: PrefixTree, batch: int
    ) -> None:
        model: Any = cut_after(backbone, "decoder", spec.taps[-1])
        self._recorder = TapRecorder(blocks_of(model, backbone.family, "decoder"), spec.taps)
        self._decoder = model.decoder
        self._norm = model.encoder.final_layer_norm
        self._encoder, self._tree, self._spec = encoder, tree, spec
        self._device, self._dtype, self._batch = backbone.device, backbone.dtype, batch

    @torch.inference_mode()
    def states(self, shard: int, layout: Layout) -> Iterator[Tensor]:
        """`[K, n, d]` of the shard's rows: all nodes of one example, then of the next."""
        stream = self._encoder
        top = stream.spec.taps[-1]
        data = stream.read_shard(shard, [top])
        members = layout.members(shard)
        index = stream.layout.index
        tokens = self._tree.flat_tokens().to(self._device)
        mask = self._tree.flat_mask(self._dtype).to(self._device)
        first = self._tree.first_places().to(self._device)
        for batch in token_batches(members, index[:, 2] + len(tokens), self._batch):
            rows = slice(int(index[batch[0], 1]), int(index[batch[-1], 1] + index[batch[-1], 2]))
            scales = None if data.scales is None else torch.from_numpy(data.scales[:, rows])
            state = quantize.decode(
                stream.codec,
                torch.from_numpy(data.codes[:, rows]).to(self._device),
                None if scales is None else scales.to(self._device),
                stream.spec.width,
            )
            lengths = torch.from_numpy(index[batch, 2]).to(self._device)
            packed = Packed(state, lengths)
            memory = packed.pad(self._norm(state[0].to(self._dtype)))
            self._decoder(
                input_ids=tokens.expand(len(batch), -1),
                attention_mask=mask.expand(len(batch), -1, -1, -1),
                encoder_hidden_states=memory,
                encoder_attention_mask=packed.mask.long(),
                use_cache=False,
            )
            states = torch.stack([self._recorder.states[tap] for tap in self._spec.taps])
            yield states[:, :, first].flatten(1, 2)


def word_trees(
    tables: Iterable[LabelTable], tokenizer: Any, start: int
) -> dict[str, tuple[PrefixTree, list[LabelTable]]]:
    """Prefix trees of the tasks of some label tables, by stream name, with their tables."""
    trees: dict[str, tuple[PrefixTree, list[LabelTable]]] = {}
    for table in tables:
        tree = PrefixTree.of_words(table.spec.words, tokenizer, start)
        trees.setdefault(tree.stream, (tree, []))[1].append(table)
    return trees


def complete_words(extractor: Extractor, cache: FeatureCache) -> list[Report]:
    """Extract every decoder stream that the cache's tasks need and that is not there."""
    tables = [table for roles in cache.tasks.values() for table in roles.values()]
    start = int(extractor.backbone.config.decoder_start_token_id)
    reports = []
    for stream, (tree, users) in word_trees(tables, extractor.tokenizer, start).items():
        needed = {
            cache.places[identity][0]
            for table in users
            for identity in table.ids
            if identity in cache.places
        }
        for split in sorted(needed):
            if stream not in cache.streams(split):
                reports.append(extractor.words(cache, split, tree))
    return reports
