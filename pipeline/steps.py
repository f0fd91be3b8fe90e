"""The two stages as a person runs them: resolve, say what will happen, do it, record it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sherl_pipe.cache import CacheWriter, FeatureCache, TaskSpec
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.cache.stores import open_store
from sherl_pipe.pipeline.added import (
    say_what_is_added,
    say_what_is_left,
    specs_of,
)
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.machine import copies, pick_device, spare_threads
from sherl_pipe.pipeline.opening import (
    DTYPES,
    Prepared,
    check_words,
    held_examples,
    method_settings,
    prepare,
)
from sherl_pipe.pipeline.record import RECORD, write_record
from sherl_pipe.pipeline.space import require_space
from sherl_pipe.pipeline.staff import staff_for
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.extract import Extractor, Report
from sherl_pipe.stages.inputs import check_preprocessor, load_preprocessor
from sherl_pipe.stages.memory import keep_freed_memory, return_freed_memory
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.missing import missing_targets, missing_words
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.tokens import load_tokenizer
from sherl_pipe.stages.words import tokens_of


def run_extract(config: RunConfig, bars: Bars) -> list[Report]:
    """Stage one: features, labels and label words of every split. Resumes.

    Raises what loading, extraction and storage raise; StorageError before anything is written
    where the disk cannot hold it; WorkerError for shards that kill their workers, after all others
    are done.
    """
    return_freed_memory()
    with staff_for(config) as employ:
        ready = prepare(config, bars)
        path, identity = ready.path, ready.identity
        say(_before_extract(ready))
        say_what_is_added(path, identity)
        require_space(ready, bars)
        with CacheWriter.open(path, identity) as writer:
            with employ(ready, writer, bars) as extractor:
                reports = _extract_all(ready, writer, extractor)
            where = {"path": str(path), "identity": writer.identity.fingerprint()}
            write_record(path, config.model_dump(mode="json"), where, name=RECORD)
    say_what_is_left(FeatureCache.open(path))
    return reports


def _extract_all(ready: Prepared, writer: CacheWriter, extractor: Extractor) -> list[Report]:
    """Features, labels and label words."""
    known = held_examples(ready.path)
    reports = []
    for source in ready.sources:
        reports += extractor.split(source, ready.templates[source.key], known)
    for table in ready.tables:
        changed = writer.write_labels(table)
        if changed:
            say(f"labels of {table.task}/{table.role}: {changed} rows new or changed")
    if all(report.lost for report in reports):
        return reports
    if ready.backbone.family.seq2seq:
        return reports + _extract_words(extractor, FeatureCache.open(ready.path), whole=True)
    return reports + _extract_continuations(extractor, FeatureCache.open(ready.path), ready)


def _extract_words(
    extractor: Extractor, cache: FeatureCache, *, whole: bool = False
) -> list[Report]:
    """Decoder states that label words and targets still lack, from the cached encoder; with
    `whole`, those of added taps too."""
    start = extractor.backbone.start
    missing = missing_words(cache, extractor.tokenizer, start, whole=whole)
    reports = [each for split, tree in missing for each in extractor.words(cache, split, tree)]
    for split, texts in missing_targets(cache, extractor.tokenizer, start, whole=whole):
        reports += extractor.targets(cache, split, texts)
    return reports


def _extract_continuations(
    extractor: Extractor, cache: FeatureCache, ready: Prepared
) -> list[Report]:
    """States of a causal model's targets that the cache still lacks, behind their prompts."""
    if not extractor.backbone.family.causal or ready.config.data.target_column is None:
        return []
    prompts = {
        example_id(texts): texts
        for source in ready.sources
        for texts in source.texts(ready.templates[source.key])
    }
    given = {table.task for table in ready.tables}
    return [
        each
        for split, texts in missing_targets(cache, extractor.tokenizer, None, given, whole=True)
        for each in extractor.targets(cache, split, texts, prompts)
    ]


def _before_extract(ready: Prepared) -> str:
    config, backbone, streams = ready.config, ready.backbone, ready.identity.streams
    taps = "; ".join(f"{name} {list(spec.taps)}" for name, spec in streams.items())
    free = open_store(ready.path).free_bytes()
    room = "" if free is None else f" ({free / 2**30:.0f} GiB free)"
    return (
        f"extract: {config.model} ({backbone.parameters / 1e6:.1f} M parameters, "
        f"{config.extract.dtype}) on {backbone.device}; {len(ready.sources)} splits of "
        f"{config.data_source}; taps {taps}; codec {ready.identity.codec.name}; into "
        f"{ready.path}{room}"
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
    cache = FeatureCache.open(config.cache_path, copies=copies(config))
    own = method_settings(config.tune, specs_of(cache, config.tune.tasks))
    late = find_method(config.tune.method).late_blocks(own["late"])
    name = model or str(cache.identity.backbone["name"])
    revision = cache.identity.backbone.get("revision")
    device = pick_device(config.device)
    # The late route trains in float32 whatever the features were computed in.
    tables = [table for roles in cache.tasks.values() for table in roles.values()]
    spoken = any(table.spec.kind == "text" for table in tables)
    head = spoken or own["head"] == "words"
    load_whole = partial(load_backbone, name, revision=revision, device=device, head=head)
    tokenizer = load_preprocessor(name, revision)
    # A causal model's own head comes with the whole of it.
    if whole or (head and "hidden" in cache.identity.streams):
        backbone = load_whole()
    else:
        words = [word for table in tables for word in table.spec.words]
        scored = "decoder" in cache.identity.streams and own["loss"] == "words" and not spoken
        tokens = tokens_of(words, tokenizer) if scored else None
        backbone = load_part(name, late, tokens=tokens, revision=revision, device=device)
    backbone.require(cache.identity.backbone, str(cache.path))
    spare_threads(backbone)
    check_preprocessor(cache.identity.tokenizer, tokenizer, str(cache.path))
    if _lacks_states(cache, backbone, tokenizer):
        # Attached after the extraction; in the dtype of the other features.
        full = backbone if backbone.whole else load_whole()
        twin = full.cast(DTYPES[str(cache.identity.backbone["dtype"])])
        with CacheWriter.open(cache.path, cache.identity) as writer:
            _extract_words(Extractor(writer, twin, tokenizer, progress=bars, announce=say), cache)
        cache = FeatureCache.open(config.cache_path, copies=copies(config))
    return cache, backbone, tokenizer


def _lacks_states(cache: FeatureCache, backbone: Backbone, tokenizer: Any) -> bool:
    """Whether labels were attached whose decoder states are not cached."""
    if not backbone.family.seq2seq:
        return False
    start = backbone.start
    return bool(missing_words(cache, tokenizer, start) or missing_targets(cache, tokenizer, start))


def word_check(cache: FeatureCache, model: str | None = None) -> Callable[[str, TaskSpec], None]:
    """What refuses label words that the cache's tokenizer cannot tell apart."""
    name = model or str(cache.identity.backbone["name"])
    tokenizer = load_tokenizer(name, cache.identity.backbone.get("revision"))
    check_preprocessor(cache.identity.tokenizer, tokenizer, str(cache.path))

    return lambda task, spec: check_words(task, spec, tokenizer)
