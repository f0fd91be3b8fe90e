"""The two stages as a person runs them: resolve, say what will happen, do it, record it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sherl_pipe.cache import CacheWriter, FeatureCache, TaskSpec
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.added import (
    say_what_is_added,
    say_what_is_left,
    specs_of,
)
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.opening import (
    DTYPES,
    Prepared,
    check_words,
    held_examples,
    method_settings,
    pick_device,
    prepare,
    spare_threads,
)
from sherl_pipe.pipeline.planning import require_space
from sherl_pipe.pipeline.record import RECORD, write_record
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.extract import Extractor, Report, missing_words
from sherl_pipe.stages.inputs import check_preprocessor, load_preprocessor
from sherl_pipe.stages.memory import keep_freed_memory
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.tokens import load_tokenizer
from sherl_pipe.stages.words import tokens_of


def run_extract(config: RunConfig, bars: Bars) -> list[Report]:
    """Stage one: features, labels and label words of every split. Resumes.

    Raises what loading, extraction and storage raise; StorageError before anything is written
    where the disk cannot hold it.
    """
    ready = prepare(config, bars)
    path, identity = ready.path, ready.identity
    say(_before_extract(ready))
    say_what_is_added(path, identity)
    require_space(ready, bars)
    reports = []
    with CacheWriter.open(path, identity) as writer:
        extractor = Extractor(
            writer,
            ready.backbone,
            ready.tokenizer,
            batch_tokens=config.extract.batch_tokens,
            shard_bytes=config.extract.shard_mib << 20,
            progress=bars,
            announce=say,
        )
        known = held_examples(path)
        for source in ready.sources:
            reports += extractor.split(source, ready.templates[source.name], known)
        for table in ready.tables:
            changed = writer.write_labels(table)
            if changed:
                say(f"labels of {table.task}/{table.role}: {changed} rows new or changed")
        if ready.backbone.family.seq2seq:
            reports += _extract_words(extractor, FeatureCache.open(path), whole=True)
        where = {"path": str(path), "identity": writer.identity.fingerprint()}
        write_record(path, config.model_dump(mode="json"), where, name=RECORD)
    say_what_is_left(FeatureCache.open(path))
    return reports


def _extract_words(
    extractor: Extractor, cache: FeatureCache, *, whole: bool = False
) -> list[Report]:
    """Decoder states that label words still lack, from the cached encoder; with `whole`, those of
    added taps too."""
    missing = missing_words(cache, extractor.tokenizer, extractor.backbone.start, whole=whole)
    return [each for split, tree in missing for each in extractor.words(cache, split, tree)]


def _before_extract(ready: Prepared) -> str:
    config, backbone, streams = ready.config, ready.backbone, ready.identity.streams
    taps = "; ".join(f"{name} {list(spec.taps)}" for name, spec in streams.items())
    free = LocalStore(ready.path).free_bytes() / 2**30
    return (
        f"extract: {config.model} ({backbone.parameters / 1e6:.1f} M parameters, "
        f"{config.extract.dtype}) on {backbone.device}; {len(ready.sources)} splits of "
        f"{config.data_source}; taps {taps}; codec {ready.identity.codec.name}; into "
        f"{ready.path} ({free:.0f} GiB free)"
    )


def open_for_tuning(
    config: RunConfig, bars: Bars, model: str | None = None, *, whole: bool = False
) -> tuple[FeatureCache, Backbone, Any]:
    """A cache with its backbone, and what label words still lacked extracted.

    Args:
        config: of the run; its cache, device and tuning.
        bars: for the progress of an extraction.
        model: overrides the name in the cache, for a backbone that has moved.
        whole: whether the live model is wanted too, and not only what its route runs.

    Raises what loading and extraction raise, and StaleCacheError for another backbone.
    """
    keep_freed_memory()
    cache = FeatureCache.open(config.cache_path)
    own = method_settings(config.tune, specs_of(cache, config.tune.tasks))
    late = find_method(config.tune.method).late_blocks(own["late"])
    name = model or str(cache.identity.backbone["name"])
    revision = cache.identity.backbone.get("revision")
    device = pick_device(config.device)
    # The late route trains in float32 whatever the features were computed in.
    load_whole = partial(load_backbone, name, revision=revision, device=device)
    if whole:
        backbone, tokenizer = load_whole(), load_preprocessor(name, revision)
    else:
        tokenizer = load_preprocessor(name, revision)
        tables = [table for roles in cache.tasks.values() for table in roles.values()]
        words = [word for table in tables for word in table.spec.words]
        scored = "decoder" in cache.identity.streams and own["loss"] == "words"
        tokens = tokens_of(words, tokenizer) if scored else None
        backbone = load_part(name, late, tokens=tokens, revision=revision, device=device)
    backbone.require(cache.identity.backbone, str(cache.path))
    spare_threads(backbone)
    check_preprocessor(cache.identity.tokenizer, tokenizer, str(cache.path))
    if backbone.family.seq2seq and missing_words(cache, tokenizer, backbone.start):
        # Attached after the extraction; in the dtype of the other features.
        full = backbone if backbone.whole else load_whole()
        twin = full.cast(DTYPES[str(cache.identity.backbone["dtype"])])
        with CacheWriter.open(cache.path, cache.identity) as writer:
            _extract_words(Extractor(writer, twin, tokenizer, progress=bars, announce=say), cache)
        cache = FeatureCache.open(config.cache_path)
    return cache, backbone, tokenizer


def word_check(cache: FeatureCache, model: str | None = None) -> Callable[[str, TaskSpec], None]:
    """What refuses label words that the cache's tokenizer cannot tell apart."""
    name = model or str(cache.identity.backbone["name"])
    tokenizer = load_tokenizer(name, cache.identity.backbone.get("revision"))
    check_preprocessor(cache.identity.tokenizer, tokenizer, str(cache.path))

    return lambda task, spec: check_words(task, spec, tokenizer)
