"""The two stages as a person runs them: resolve, say what will happen, do it, record it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from sherl_pipe.cache import CacheWriter, FeatureCache, InputError, NonFiniteError, TaskSpec
from sherl_pipe.cache.stores import open_store
from sherl_pipe.pipeline.added import (
    naming_the_extraction,
    say_what_is_added,
    say_what_is_left,
    specs_of,
)
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.opening import (
    DTYPES,
    Prepared,
    check_folder,
    check_words,
    copies,
    held_examples,
    method_settings,
    parse_bytes,
    pick_device,
    prepare,
    spare_threads,
    tunings,
)
from sherl_pipe.pipeline.planning import require_space
from sherl_pipe.pipeline.pruning import Pruning
from sherl_pipe.pipeline.record import RECORD, write_record
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.extract import Extractor, Report, missing_words
from sherl_pipe.stages.inputs import check_preprocessor, load_preprocessor
from sherl_pipe.stages.memory import keep_freed_memory
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.pack import Outcome, Pack, packs
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tokens import load_tokenizer
from sherl_pipe.stages.tune import Tuner
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
        cache = FeatureCache.open(config.cache_path, copies=copies(config))
    return cache, backbone, tokenizer


def word_check(cache: FeatureCache, model: str | None = None) -> Callable[[str, TaskSpec], None]:
    """What refuses label words that the cache's tokenizer cannot tell apart."""
    name = model or str(cache.identity.backbone["name"])
    tokenizer = load_tokenizer(name, cache.identity.backbone.get("revision"))
    check_preprocessor(cache.identity.tokenizer, tokenizer, str(cache.path))

    return lambda task, spec: check_words(task, spec, tokenizer)


def run_tune(config: RunConfig, bars: Bars, model: str | None = None) -> list[TuneResult]:
    """Stage two: every task, learning rate and seed, in as few passes as can be. Resumes.

    Raises what opening the cache, training and storage raise; a NonFiniteError of one tuning
    after all others are done.
    """
    tune = config.tune
    check_folder(tune.out, "out")
    cache, backbone, tokenizer = open_for_tuning(config, bars, model)
    names = tune.tasks or tuple(sorted(cache.tasks))
    if not names:
        raise InputError(
            f"{cache.path} has no labels. Attach some with `sherl-pipe label --cache {cache.path}`."
        )
    # All of them first: a name that is wrong must not wait for the tunings before it.
    tasks = [Task(cache, name, backbone, tokenizer) for name in dict.fromkeys(names)]
    wanted = tunings(config, backbone.family, specs_of(cache, names))
    asked = [(task, settings) for task in tasks for settings in wanted]
    with naming_the_extraction(cache.path):
        for task, settings in asked:
            _ = task.route_spec(settings)
    budget, where = parse_bytes(tune.memory_budget), _where(cache)
    pruning = Pruning(config, cache, tokenizer, model, bars)
    outcomes: dict[tuple[str, str], Outcome] = {}
    for members in packs(asked, tune.together):
        tuners = [
            Tuner(
                task,
                settings,
                tune.out / task.name / settings.name,
                budget=budget,
                residency=tune.residency,
                readers=tune.readers,
            )
            for task, settings in members
        ]
        results = _one_pass(tuners, pruning, bars)
        for tuner, outcome in zip(tuners, results, strict=True):
            outcomes[tuner.task.name, tuner.settings.name] = outcome
            # An interruption may have come between the two files.
            if isinstance(outcome, TuneResult) and not (tuner.folder / "run.json").is_file():
                write_record(tuner.folder, _resolved(config, tuner.settings), where)
    found = [outcomes[task.name, settings.name] for task, settings in asked]
    for outcome in found:
        if isinstance(outcome, NonFiniteError):
            raise outcome
    return [outcome for outcome in found if isinstance(outcome, TuneResult)]


def _one_pass(tuners: Sequence[Tuner], pruning: Pruning, bars: Bars) -> list[Outcome]:
    """Train what is not finished, having said what and where."""
    done = [tuner.finished() for tuner in tuners]
    for tuner, result in zip(tuners, done, strict=True):
        if result is not None:
            say(f"tune: {tuner.task.name}, {tuner.settings.name}: finished before")
    left = [tuner for tuner, result in zip(tuners, done, strict=True) if result is None]
    if not left:
        return [result for result in done if result is not None]
    for tuner in left:
        if tuner.settings.init in find_method(tuner.settings.method).given:
            tuner.start_from(pruning.weights(tuner))
    pack, first = Pack(left), left[0]
    for tuner in left:
        say(f"tune: {tuner.task.name}, {tuner.settings.name}")
    say(
        f"{len(left)} {'tuning' if len(left) == 1 else 'tunings in one pass'} on "
        f"{first.task.backbone.device}; {len(first.task.train.ids):,} training rows; "
        f"{pack.train.summary}"
    )
    fresh = iter(pack.run(bars))
    return [next(fresh) if result is None else result for result in done]


def _resolved(config: RunConfig, settings: TuneSettings) -> dict[str, Any]:
    """The config as JSON, with what a tuning's method and preset made of it."""
    body = config.model_dump(mode="json")
    chosen = {name: value for name, value in asdict(settings).items() if name in body["tune"]}
    for name in ("lr", "seed"):
        chosen[name] = [chosen[name]]
    return {**body, "tune": {**body["tune"], **chosen}}


def _where(cache: FeatureCache) -> dict[str, str]:
    return {"path": str(cache.path), "identity": cache.identity.fingerprint()}
