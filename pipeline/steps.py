"""The two stages as a person runs them: resolve, say what will happen, do it, record it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from sherl_pipe.cache import (
    CODECS,
    CacheWriter,
    FeatureCache,
    Identity,
    InputError,
    TaskSpec,
)
from sherl_pipe.cache.errors import IncompleteSplitError, explain
from sherl_pipe.cache.schema import check_name
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.record import versions, write_record
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.data import DEMO_DATA, load_sources
from sherl_pipe.stages.extract import Extractor, Report, identify, missing_words
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.targets import label_tables
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.templates import make_template
from sherl_pipe.stages.tokens import check_tokenizer, load_tokenizer
from sherl_pipe.stages.tune import Tuner
from sherl_pipe.stages.words import PrefixTree

# Parameters below which threads do not pay.
TINY = 5_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Encoders: best on held-out training rows of the four tasks of docs/results.md. T5: as published.
DEFAULT_LR = {"seq2seq": 3e-3, "encoder": 6e-3}


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises InputError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(device.type)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            explain("device", expected="auto, cpu, or a CUDA device of this machine", found=wanted)
        ) from error
    return device


def spare_threads(backbone: Backbone) -> None:
    """One thread for a tiny model on the CPU: its kernels are too small to be shared, and on a
    busy machine threads that wait for one another cost many times the work."""
    if backbone.device.type == "cpu" and backbone.parameters < TINY:
        torch.set_num_threads(1)


def parse_bytes(text: str | None) -> int:
    """`4GB`, `512MiB`, ... in bytes; half of the free memory where None. Raises InputError."""
    if text is None:
        return int(psutil.virtual_memory().available // 2)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if match is None:
        raise InputError(explain("memory budget", expected="such as 4GB or 512MiB", found=text))
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


def run_extract(config: RunConfig, bars: Bars) -> list[Report]:
    """Stage one: features, labels and label words of every split. Resumes.

    Raises what loading, extraction and storage raise.
    """
    data, path = config.data, check_folder(config.cache_path, "cache")
    sources = load_sources(
        config.data_source,
        text_columns=data.text_columns,
        label_column=data.label_column,
        tasks=data.tasks,
        limit=data.limit,
    )
    for source in sources:
        check_name(source.name)  # now, and not when its turn comes after hours
    backbone, tokenizer, identity = _open_for_extraction(config)
    seq2seq = backbone.family.seq2seq
    say(_before_extract(config, backbone, identity, len(sources), path))
    templates = {
        source.name: make_template(identity.template, source.task, source.columns, seq2seq=seq2seq)
        for source in sources
    }
    tables = label_tables(sources, templates)
    for table in tables if seq2seq else ():
        check_words(table.task, table.spec, tokenizer)  # now, and not after the encoder
    reports = []
    with CacheWriter.open(path, identity) as writer:
        extractor = Extractor(
            writer,
            backbone,
            tokenizer,
            batch_tokens=config.extract.batch_tokens,
            shard_bytes=config.extract.shard_mib << 20,
            progress=bars,
            announce=say,
        )
        known = _held_examples(path)
        for source in sources:
            reports.append(extractor.split(source, templates[source.name], known))
        for table in tables:
            changed = writer.write_labels(table)
            if changed:
                say(f"labels of {table.task}/{table.role}: {changed} rows new or changed")
        if seq2seq:
            reports += _extract_words(extractor, FeatureCache.open(path))
        where = {"path": str(path), "identity": identity.fingerprint()}
        write_record(path, config.model_dump(mode="json"), where, name="_run.json")
    return reports


def _open_for_extraction(config: RunConfig) -> tuple[Backbone, Any, Identity]:
    """The backbone as the config wants it, its tokenizer, and the identity of their cache."""
    settings = config.extract
    backbone = load_backbone(
        config.model,
        revision=config.revision,
        dtype=DTYPES[settings.dtype],
        device=pick_device(config.device),
    )
    spare_threads(backbone)
    tokenizer = load_tokenizer(config.model, config.revision)
    # The demo's tasks label the same sentences.
    named = backbone.family.seq2seq and config.data_source != DEMO_DATA
    identity = identify(
        backbone,
        tokenizer,
        template=settings.template or ("task" if named else "neutral"),
        max_length=min(settings.max_length, positions(backbone) or settings.max_length),
        codec=CODECS[settings.codec],
        taps=settings.taps,
        versions=versions(),
    )
    return backbone, tokenizer, identity


def check_folder(path: Path, option: str) -> Path:
    """`path`, if a folder is or can be there. Raises InputError naming the option."""
    if path.exists() and not path.is_dir():
        raise InputError(explain(option, expected="a folder, new or old", found=f"the file {path}"))
    return path


def positions(backbone: Backbone) -> int | None:
    """Tokens that a model with learned positions can read; None where any number goes."""
    embeddings = getattr(backbone.model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if table is None:
        return None
    # RoBERTa counts positions from behind its padding index.
    return int(table.num_embeddings) - (0 if table.padding_idx is None else table.padding_idx + 1)


def _held_examples(path: Path) -> dict[bytes, str]:
    try:
        places = FeatureCache.open(path).places
    except IncompleteSplitError:
        return {}
    return {identity: split for identity, (split, _) in places.items()}


def _extract_words(extractor: Extractor, cache: FeatureCache) -> list[Report]:
    """Decoder states that label words still lack, from the cached encoder."""
    missing = missing_words(cache, extractor.tokenizer, extractor.backbone.start)
    return [extractor.words(cache, split, tree) for split, tree in missing]


def _before_extract(
    config: RunConfig, backbone: Backbone, identity: Identity, splits: int, path: Path
) -> str:
    taps = "; ".join(f"{name} {list(spec.taps)}" for name, spec in identity.streams.items())
    free = LocalStore(path).free_bytes() / 2**30
    return (
        f"extract: {config.model} ({backbone.parameters / 1e6:.1f} M parameters, "
        f"{config.extract.dtype}) on {backbone.device}; {splits} splits of {config.data_source}; "
        f"taps {taps}; codec {identity.codec.name}; into {path} ({free:.0f} GiB free)"
    )


def open_for_tuning(
    config: RunConfig, bars: Bars, model: str | None = None
) -> tuple[FeatureCache, Backbone, Any]:
    """A cache with its backbone, and what label words still lacked extracted.

    `model` overrides the name in the cache, for a backbone that has moved.
    """
    cache = FeatureCache.open(config.cache_path)
    name = model or str(cache.identity.backbone["name"])
    revision = cache.identity.backbone.get("revision")
    device = pick_device(config.device)
    # The late route trains in float32 whatever the features were computed in.
    backbone = load_backbone(name, revision=revision, device=device)
    backbone.require(cache.identity.backbone, str(cache.path))
    spare_threads(backbone)
    tokenizer = load_tokenizer(name, revision)
    check_tokenizer(cache.identity.tokenizer, tokenizer, str(cache.path))
    if backbone.family.seq2seq and missing_words(cache, tokenizer, backbone.start):
        # Attached after the extraction; in the dtype of the other features.
        twin = backbone.cast(DTYPES[str(cache.identity.backbone["dtype"])])
        with CacheWriter.open(cache.path, cache.identity) as writer:
            _extract_words(Extractor(writer, twin, tokenizer, progress=bars, announce=say), cache)
        cache = FeatureCache.open(config.cache_path)
    return cache, backbone, tokenizer


def word_check(cache: FeatureCache, model: str | None = None) -> Callable[[str, TaskSpec], None]:
    """What refuses label words that the cache's tokenizer cannot tell apart."""
    name = model or str(cache.identity.backbone["name"])
    tokenizer = load_tokenizer(name, cache.identity.backbone.get("revision"))
    check_tokenizer(cache.identity.tokenizer, tokenizer, str(cache.path))

    return lambda task, spec: check_words(task, spec, tokenizer)


def check_words(task: str, spec: TaskSpec, tokenizer: Any) -> None:
    """Raise InputError for label words that are the same to the tokenizer."""
    try:
        PrefixTree.of_words(spec.words, tokenizer, 0)
    except InputError as error:
        raise InputError(f"task {task}: {error}") from error


def run_tune(config: RunConfig, bars: Bars, model: str | None = None) -> list[TuneResult]:
    """Stage two: every task, learning rate and seed, one after another. Resumes.

    Raises what opening the cache, training and storage raise.
    """
    tune = config.tune
    check_folder(tune.out, "out")
    cache, backbone, tokenizer = open_for_tuning(config, bars, model)
    names = tune.tasks or tuple(sorted(cache.tasks))
    if not names:
        raise InputError(
            f"{cache.path} has no labels. Attach some with `sherl-pipe label --cache {cache.path}`."
        )
    budget = parse_bytes(tune.memory_budget)
    where = {"path": str(cache.path), "identity": cache.identity.fingerprint()}
    # All of them first: a name that is wrong must not wait for the tunings before it.
    tasks = [Task(cache, name, backbone, tokenizer) for name in dict.fromkeys(names)]
    results = []
    for task in tasks:
        for settings in tunings(config, seq2seq=backbone.family.seq2seq):
            name = settings.name
            folder = tune.out / task.name / name
            tuner = Tuner(task, settings, folder, budget=budget)
            done = tuner.finished()
            say(
                f"tune: {task.name}, {name} on {backbone.device}; {len(task.train.ids):,} training "
                f"rows; {'finished before' if done else tuner.train.residency}"
            )
            result = done or tuner.run(bars)
            # An interruption may have come between the two files.
            if done is None or not (folder / "run.json").is_file():
                write_record(folder, config.model_dump(mode="json"), where)
            results.append(result)
    return results


def tunings(config: RunConfig, *, seq2seq: bool) -> Sequence[TuneSettings]:
    """The settings of every tuning of a task: learning rates times seeds."""
    tune = config.tune
    rates = tune.lr or (DEFAULT_LR["seq2seq" if seq2seq else "encoder"],)
    base = TuneSettings(
        method=tune.method,
        reduction=tune.reduction or 4,
        late=tune.late,
        epochs=tune.epochs,
        batch_size=tune.batch_size,
        warmup=tune.warmup,
        weight_decay=tune.weight_decay,
        clip=tune.clip,
        init=tune.init,
        pool=tune.pool,
        precision=tune.precision,
    )
    return [replace(base, lr=lr, seed=seed) for lr in rates for seed in tune.seed]
