"""Whether a disk is large enough for what an extraction still has to write."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace

from sherl_pipe.cache import FeatureCache, Identity, StorageError, StreamSpec
from sherl_pipe.cache.manifest import METADATA, read_root
from sherl_pipe.cache.names import stream_kind
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.stores import open_store
from sherl_pipe.pipeline import planning
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.opening import Prepared, held_examples
from sherl_pipe.pipeline.plan import stream_bytes
from sherl_pipe.pipeline.record import RECORD
from sherl_pipe.stages.amounts import Amount
from sherl_pipe.stages.dual_reader import DualReader
from sherl_pipe.stages.measure import measure_streams
from sherl_pipe.stages.sample import choose
from sherl_pipe.stages.scratch import memory_writer
from sherl_pipe.stages.survey import uncompressed_bytes, upper_bound
from sherl_pipe.stages.words import PrefixTree

# An addition takes about as much as if its first tap were so many: it has none before it to be
# coded against, and the others are further apart (docs/codecs.md, on the safe side).
FIRST_TAP = 1.5


def require_space(ready: Prepared, bars: Bars) -> None:
    """Raise StorageError where the disk cannot hold what an extraction still has to write.

    A bound that costs nothing is tried first; a sample is measured where the bound is too large.
    Raises what opening a cache raises.
    """
    free = open_store(ready.path).free_bytes()
    if free is None:
        return
    trees = _trees_of(ready)
    cache = _begun(ready)
    if cache is not None:  # what it has stays, and new texts get all of it
        missing = cache.identity.missing(ready.identity)
        ready = replace(ready, identity=_whole(cache.identity, missing))
    dual = ready.tokenizer if isinstance(ready.tokenizer, DualReader) else None
    if upper_bound(ready.sources, trees, ready.identity, dual.size if dual else None) <= free:
        return
    if dual is not None:
        size = uncompressed_bytes(ready.sources, ready.templates, dual, ready.identity)
        store = open_store(ready.path)  # what it holds is written already
        held = sum(store.size(key) or 0 for key in store.list())
        _require(size - held, free, ready.path, "--codec.")
        return
    say("extract: the disk is not obviously large enough; measuring a sample")
    setup = planning.setup_of(ready)
    counted, needed = planning.count(ready, held_examples(ready.path) if cache else {}, bars)
    if not any(split.ids for split in counted.splits):
        return  # all of it is in splits of that cache
    sample = choose(counted, {}, 1, planning.sample_tokens(setup, counted))
    target = memory_writer(ready.identity)
    samples = measure_streams(setup, counted, sample, needed, target, seconds=planning.SECONDS)
    need = 0 if open_store(ready.path).exists(RECORD) else planning.other_bytes(ready)
    for amount in planning.amounts_of(setup, counted, needed):
        size = stream_bytes(amount, samples, ready.identity.codec.name) or 0
        taps = len(ready.identity.spec(amount.stream).taps)
        need += round(size * (_left(cache, amount, taps) if cache is not None else 1))
    smaller = "--codec (`sherl-pipe plan` with the same options shows what each takes)."
    _require(need, free, ready.path, smaller)


def _require(need: int, free: int, path: Place, smaller: str) -> None:
    if need > free:
        raise StorageError(
            errno.ENOSPC,
            f"{path}: the extraction needs about {need:,} bytes, {free:,} are free. Free "
            f"space, choose another --cache, or a smaller {smaller}",
        )


def _begun(ready: Prepared) -> FeatureCache | None:
    """The cache that the extraction goes on with. Raises StaleCacheError for another one."""
    store = open_store(ready.path)
    if not store.exists(METADATA):
        return None
    identity, root = read_root(store)
    identity.require(ready.identity, str(ready.path))
    # Not `FeatureCache.open`, which wants something to read in it.
    return FeatureCache(store, identity, root)


def _whole(identity: Identity, missing: Mapping[str, StreamSpec]) -> Identity:
    """A cache as it would be if all of its taps had been extracted at once."""
    streams = {}
    for name in identity.streams:
        spec, more = identity.held(name), missing[name].taps if name in missing else ()
        streams[name] = replace(spec, taps=tuple(sorted((*spec.taps, *more))))
    return replace(identity, streams=streams, added=())


def _left(cache: FeatureCache, amount: Amount, taps: int | None = None) -> float:
    """The share of a stream that is still to be written; of `taps` in all, by default those that
    the cache has.

    The first tap of an addition is coded without one before it, which takes more.
    """
    kind = stream_kind(amount.stream)
    whole = amount.split in cache.splits and amount.stream in cache.streams(amount.split)
    left, known = 0.0, 0
    for number, part in enumerate(cache.identity.parts(amount.stream)):
        own = len(cache.identity.spec(part).taps)
        known += own
        done, shards = cache.incomplete.get(f"{amount.split}/{part}", (0, 0))
        share = 1 - done / shards if shards else float(not whole)
        left += share * (own + (FIRST_TAP - 1 if number else 0))
    every = taps or len(cache.identity.held(kind).taps)
    if every > known:
        left += every - known + FIRST_TAP - 1
    return left / every


def _trees_of(ready: Prepared) -> list[PrefixTree]:
    """The distinct trees of label words."""
    if not ready.backbone.family.seq2seq:
        return []
    start = ready.backbone.start
    found = [
        PrefixTree.of_words(table.spec.words, ready.tokenizer, start)
        for table in ready.tables
        if table.spec.kind != "text"
    ]
    return list({tree.stream: tree for tree in found}.values())
