"""What both stages begin with: models, data and settings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from sherl_pipe.cache import (
    CODECS,
    FeatureCache,
    Identity,
    InputError,
    LabelTable,
    StreamSpec,
    TaskSpec,
)
from sherl_pipe.cache.errors import IncompleteSplitError, explain
from sherl_pipe.cache.names import check_name
from sherl_pipe.cache.place import Place
from sherl_pipe.pipeline.config import RunConfig, TuneConfig
from sherl_pipe.pipeline.machine import check_folder, pick_device, spare_threads
from sherl_pipe.pipeline.record import versions
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.data import DEMO_DATA, load_sources
from sherl_pipe.stages.dual_reader import DualReader
from sherl_pipe.stages.families import Family
from sherl_pipe.stages.identity import identify
from sherl_pipe.stages.inputs import family_of_model, load_preprocessor
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.pairs import pairs_of
from sherl_pipe.stages.pictures import PictureReader
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.targets import label_tables
from sherl_pipe.stages.templates import Template, make_template
from sherl_pipe.stages.words import PrefixTree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Encoders: best on held-out training rows of the four tasks of docs/results.md. T5: as published.
DEFAULT_LR = {"seq2seq": 3e-3, "encoder": 6e-3, "dual": 1e-3}


@dataclass(frozen=True)
class Prepared:
    """An extraction that is ready to start.

    Attributes:
        path: of the cache.
        sources: splits of the data.
        templates: by split name.
        tables: labels of every labelled split.
        data_seconds, loading_seconds: that reading the data and loading the model took.
    """

    config: RunConfig
    path: Place
    sources: Sequence[Source]
    templates: Mapping[str, Template]
    tables: Sequence[LabelTable]
    backbone: Backbone
    tokenizer: Any
    identity: Identity
    data_seconds: float
    loading_seconds: float


def prepare(config: RunConfig, progress: Progress = silent) -> Prepared:
    """Find data and model of an extraction; refuse what would fail later.

    `progress` is told of images that are read to name them.

    Raises what loading raises, and InputError, UnsafeError for data that cannot be used.
    """
    begun = time.perf_counter()
    data, path = config.data, check_folder(config.cache_path, "cache")
    family = family_of_model(config.model, config.revision)
    known = time.perf_counter()
    _check_columns(config, family)
    sources = load_sources(
        config.data_source,
        text_columns=data.text_columns,
        image_column=data.image_column,
        images=family.images or bool(family.towers),
        label_column=data.label_column,
        target_column=data.target_column,
        tasks=data.tasks,
        limit=data.limit,
    )
    pairs = [pairs_of(source, data.text_columns) for source in sources] if family.towers else []
    sources = [each for pair in pairs for each in pair.sources] or sources
    for source in sources:
        check_name(source.name)  # now, and not when its turn comes after hours
    read = time.perf_counter()
    backbone, tokenizer, identity = _open(config)
    loaded = time.perf_counter()
    templates = {
        source.key: make_template(
            identity.template,
            source.task,
            source.columns,
            joined=family.joined,
            images=family.images or source.stream == "image",
        )
        for source in sources
    }
    for source in sources if family.images else ():
        source.ids(templates[source.key], progress)  # read all of them before anything is written
    tables = [each.table(progress) for each in pairs] or label_tables(sources, templates)
    if any(table.spec.kind == "text" for table in tables):
        require_speech(family)
    for table in tables if family.seq2seq else ():
        check_words(table.task, table.spec, tokenizer)  # now, and not after the encoder
    return Prepared(
        config,
        path,
        sources,
        templates,
        tables,
        backbone,
        tokenizer,
        identity,
        data_seconds=read - known + time.perf_counter() - loaded,
        loading_seconds=known - begun + loaded - read,
    )


def _check_columns(config: RunConfig, family: Family) -> None:
    """Raise InputError for columns that the backbone does not read, and for images without data."""
    data, images = config.data, family.images
    wrong, right = ("text", "image") if images else ("image", "text")
    if family.towers and data.label_column:
        raise InputError(
            explain(
                "label column",
                expected=f"none: {config.model} reads pairs of texts and images",
                found=repr(data.label_column),
            )
        )
    if not family.towers and (data.text_columns if images else data.image_column):
        raise InputError(
            explain(
                f"{wrong} column",
                expected=f"none: {config.model} reads {right}s",
                found=repr(data.text_columns if images else data.image_column),
                todo=f"Name the column with --{right}-column.",
            )
        )
    if (images or family.towers) and data.source is None:
        raise InputError(
            explain(
                "data",
                expected=f"images, for {config.model}",
                found="none",
                todo="Point --data at a folder <task>/<split>/<class>/*, or at a file.",
            )
        )


def _open(config: RunConfig) -> tuple[Backbone, Any, Identity]:
    """The backbone as the config wants it, its tokenizer, and the identity of their cache."""
    settings = config.extract
    backbone = load_backbone(
        config.model,
        revision=config.revision,
        dtype=DTYPES[settings.dtype],
        device=pick_device(config.device),
    )
    spare_threads(backbone)
    tokenizer = load_preprocessor(config.model, config.revision)
    room = positions(backbone)
    if room and config.data.target_column is not None and backbone.family.causal:
        room //= 2  # prompt and target are one sequence
    # The demo's tasks label the same sentences.
    named = backbone.family.seq2seq and config.data_source != DEMO_DATA
    longest = settings.max_length
    if isinstance(tokenizer, PictureReader):
        longest = tokenizer.tokens(backbone)  # as many of every image
    if isinstance(tokenizer, DualReader):
        tokenizer.pictures.tokens(backbone)  # whether the tower takes them
    identity = identify(
        backbone,
        tokenizer,
        template=settings.template or ("task" if named else "neutral"),
        max_length=min(longest, room or longest),
        codec=CODECS[settings.codec],
        taps=settings.taps,
        versions=versions(),
    )
    return backbone, tokenizer, identity


def positions(backbone: Backbone) -> int | None:
    """Tokens that a model with learned positions can read; None where any number goes."""
    path = backbone.family.positions
    table: Any = None if path is None else attrgetter(path)(backbone.model)
    if table is None:
        return None
    # RoBERTa counts positions from behind its padding index, BART from an offset.
    unused = 0 if table.padding_idx is None else table.padding_idx + 1
    return int(table.num_embeddings) - int(getattr(table, "offset", unused))


def check_words(task: str, spec: TaskSpec, tokenizer: Any) -> None:
    """Raise InputError for label words that are the same to the tokenizer."""
    try:
        PrefixTree.of_words(spec.words, tokenizer, 0)
    except InputError as error:
        raise InputError(f"task {task}: {error}") from error


def require_speech(family: Family) -> None:
    """Raise InputError for a family that cannot say a free text."""
    if not (family.seq2seq or family.causal):
        raise InputError(
            explain(
                "target column",
                expected="a model that generates text",
                found="an encoder",
                todo="Use a text-to-text or causal model, or --label-column for a classification.",
            )
        )


def held_examples(path: Place) -> dict[bytes, str]:
    """The split of every example in a cache. Raises what opening it raises."""
    try:
        places = FeatureCache.open(path).places
    except IncompleteSplitError:
        return {}
    return {identity: split for identity, (split, _) in places.items()}


def method_settings(tune: TuneConfig, streams: Mapping[str, StreamSpec]) -> dict[str, Any]:
    """The settings that methods have defaults of: `reduction`, `late`, `init`, `head` and `loss`.

    Args:
        tune: None there leaves a setting to its preset, and that to the method.
        streams: what the cache holds, or will hold.

    Raises InputError for an unknown method.
    """
    method = find_method(tune.method, dual="image" in streams)
    usual = {"head": TuneSettings.head, "loss": TuneSettings.loss, **method.usual_for(streams)}
    if tune.preset == "paper":
        usual |= method.published_for(streams)
    asked = {name: getattr(tune, name) for name in usual}
    return {name: usual[name] if found is None else found for name, found in asked.items()}


def tunings(
    config: RunConfig, family: Family, streams: Mapping[str, StreamSpec]
) -> Sequence[TuneSettings]:
    """The settings of every tuning of a task: learning rates times seeds.

    Args:
        config: of the run.
        family: of the backbone.
        streams: of the cache.
    """
    tune = config.tune
    kind = "seq2seq" if family.seq2seq else "dual" if family.towers else "encoder"
    rates = tune.lr or (DEFAULT_LR[kind],)
    base = TuneSettings(
        method=tune.method,
        **method_settings(tune, streams),
        epochs=tune.epochs,
        batch_size=tune.batch_size,
        warmup=tune.warmup,
        weight_decay=tune.weight_decay,
        clip=tune.clip,
        pool=tune.pool or family.pool,
        precision=tune.precision,
    )
    every = (replace(base, lr=lr, seed=seed) for lr in rates for seed in tune.seed)
    return list(dict.fromkeys(every))
