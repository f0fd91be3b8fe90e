"""Taps that an extraction adds to a cache: what people are told of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sherl_pipe.cache import FeatureCache, Identity, InputError, StreamSpec
from sherl_pipe.cache.added import stored_identity
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.stores import open_store
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import say
from sherl_pipe.pipeline.record import RECORD
from sherl_pipe.stages.taps import LackingTapsError
from sherl_pipe.stages.task_rows import splits_of


def say_what_is_added(path: Place, wanted: Identity) -> None:
    """Say which taps the extraction of `wanted` adds to the cache at `path`, and which stay.

    Raises StaleCacheError for a cache of other settings; what reading it raises.
    """
    found = stored_identity(open_store(path))
    if found is None:
        return
    found.require(wanted, str(path))
    missing = found.missing(wanted)
    for name in found.streams:
        held = list(found.held(name).taps)
        if name in missing:
            say(f"extract: {name} taps {list(missing[name].taps)} are added to {held}, which stay")
        elif held != list(wanted.held(name).taps):
            say(f"extract: the cache has {name} taps {held}; they stay, and new texts get them")


def say_what_is_left(cache: FeatureCache) -> None:
    """Say which added taps some splits still lack, whose texts were not in the extraction."""
    for split in cache.splits:
        for name, spec in cache.specs([split]).items():
            if left := sorted({*cache.identity.held(name).taps} - {*spec.taps}):
                say(
                    f"extract: {split} still lacks {name} taps {left}: extract its texts with "
                    f"--taps {','.join(map(str, left))}"
                )


def specs_of(cache: FeatureCache, tasks: Sequence[str]) -> Mapping[str, StreamSpec]:
    """The taps that the splits of some tasks have in common; of all tasks where none is named."""
    tables = [
        table
        for task, roles in cache.tasks.items()
        if not tasks or task in tasks
        for table in roles.values()
    ]
    return cache.specs(splits_of(cache, tables) or None)


@contextmanager
def naming_the_extraction(path: Place) -> Iterator[None]:
    """Add to an error about taps that a cache lacks the command that adds them."""
    try:
        yield
    except LackingTapsError as error:
        command = adding(path, error.taps)
        raise InputError(f"{error} Here: {command}" if command else str(error)) from error


def adding(path: Place, taps: Sequence[int]) -> str:
    """The command that extracted into the cache at `path` last, but for `taps`; empty where that is
    not recorded."""
    try:
        record = json.loads(open_store(path).read(RECORD))
        config = RunConfig.model_validate(record["config"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""
    data, extract = config.data, config.extract
    options: dict[str, Any] = {
        "--model": config.model,
        "--revision": config.revision,
        "--data": config.data_source,
        "--cache": path,
        "--task": data.tasks,
        "--text-column": data.text_columns,
        "--image-column": data.image_column,
        "--label-column": data.label_column,
        "--limit": data.limit,
        "--codec": extract.codec,
        "--taps": ",".join(map(str, taps)),
        "--template": extract.template,
        "--max-length": extract.max_length,
        "--shard-mib": extract.shard_mib,
        "--dtype": extract.dtype,
    }
    words = ["sherl-pipe", "extract"]
    for option, value in options.items():
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            words += [option, str(each)]
    return shlex.join(words)
