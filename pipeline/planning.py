"""Measuring before anything big runs: `sherl-pipe plan`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sherl_pipe.cache import CODECS, CacheWriter, InputError, LabelTable, StorageError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.stores import open_store
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.machine import parse_bytes
from sherl_pipe.pipeline.opening import Prepared, prepare, tunings
from sherl_pipe.pipeline.plan import Measured, Plan, Wanted, make_plan
from sherl_pipe.pipeline.record import record_body
from sherl_pipe.stages.amounts import Amount
from sherl_pipe.stages.inputs import family_of_model
from sherl_pipe.stages.measure import Setup, measure_streams, tokens_a_second
from sherl_pipe.stages.missing import words_of
from sherl_pipe.stages.passes import tokens_in_batch
from sherl_pipe.stages.rehearse import UNLIMITED, measure_steps
from sherl_pipe.stages.residency import device_share
from sherl_pipe.stages.sample import choose
from sherl_pipe.stages.scratch import memory_writer
from sherl_pipe.stages.survey import Survey, Trees, amounts, survey, task_amounts
from sherl_pipe.stages.task_rows import train_and_held_out

# Seconds for each part of the measuring: tokenising, forward passes, label words, steps.
SECONDS = 1.5
# A sample is small beside this; with less free space it is not put on that disk.
ROOM = 1 << 30
# Rows of a label table whose size is measured.
LABEL_ROWS = 2000


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from.

    Attributes:
        sample_tokens: inputs that were run, in tokens.
        seconds: that measuring took, the model's loading aside.
    """

    ready: Prepared
    wanted: Wanted
    counted: Survey
    found: Measured
    plan: Plan
    sample_tokens: int
    seconds: float


def run_plan(config: RunConfig, bars: Bars, tunings_wanted: int | None = None) -> Planned:
    """Measure for some seconds what extraction and tuning will take. Leaves nothing behind.

    The plan is of a cache that is still empty.

    Args:
        config: of both stages; learning rates and seeds make no difference.
        tunings_wanted: how many tunings there will be; by default one for each task.

    Raises what an extraction raises before and at its first shard.
    """
    budget = parse_bytes(config.tune.memory_budget)
    if family_of_model(config.model, config.revision).towers:
        raise InputError(
            explain(
                "plan",
                expected="a model with one kind of inputs",
                found=f"the dual encoder {config.model}",
                todo="`extract` says beforehand how many tokens and bytes there are.",
            )
        )
    ready = prepare(config, bars)
    begun = time.perf_counter()
    say(f"plan: {config.model} on {ready.backbone.device}; measuring for some seconds")
    setup = setup_of(ready)
    counted, trees = count(ready, {}, bars)
    tables = _training_rows(ready.tables)
    sample = choose(counted, tables, config.tune.batch_size, sample_tokens(setup, counted))
    others = [
        memory_writer(replace(ready.identity, codec=codec))
        for codec in CODECS.values()
        if codec != ready.identity.codec
    ]
    settings = tunings(config, ready.backbone.family, ready.identity.streams)[0]
    with ExitStack() as stack:
        folder = stack.enter_context(_scratch(ready.path))
        target = stack.enter_context(CacheWriter.open(folder / "cache", ready.identity))
        samples = measure_streams(setup, counted, sample, trees, target, others, seconds=SECONDS)
        steps = measure_steps(setup, counted, sample, tables, target, settings, seconds=SECONDS)
    found = Measured(
        amounts_of(setup, counted, trees),
        samples,
        task_amounts(counted, tables, config.tune.batch_size) if steps else [],
        steps,
        other_bytes(ready),
        ready.data_seconds + counted.seconds,
    )
    wanted = Wanted(
        ready.identity.codec.name,
        config.tune.epochs,
        tunings_wanted or max(1, len(found.tasks)),
        _room(config.tune.residency, budget, ready.backbone.device),
        open_store(ready.path).free_bytes(),
    )
    tokens = sum(sample.amount.rows for sample in samples if sample.amount.main)
    seconds = time.perf_counter() - begun
    return Planned(ready, wanted, counted, found, make_plan(found, wanted), tokens, seconds)


def _room(residency: str, budget: int, device: torch.device) -> int:
    """Bytes of features that are not streamed. What is to stay is planned so, room or not."""
    rooms = {"auto": max(budget, device_share(device)), "stream": 0}
    return rooms.get(residency, UNLIMITED)


def setup_of(ready: Prepared) -> Setup:
    """What a sample of an extraction is measured with."""
    extract = ready.config.extract
    return Setup(
        ready.backbone,
        ready.tokenizer,
        ready.identity,
        extract.shard_mib << 20,
        tokens_in_batch(extract.batch_tokens, ready.backbone.width, ready.backbone.device),
    )


def count(ready: Prepared, held: Mapping[bytes, str], bars: Bars) -> tuple[Survey, Trees]:
    """The splits of an extraction, and the label words that they need."""
    counted = survey(
        ready.sources,
        ready.templates,
        ready.tokenizer,
        ready.identity.max_length,
        known=held,
        seconds=SECONDS,
        progress=bars,
    )
    if not ready.backbone.family.seq2seq:
        return counted, []
    start = ready.backbone.start
    return counted, words_of(ready.tables, counted.places, ready.tokenizer, start)


def amounts_of(setup: Setup, counted: Survey, trees: Trees) -> list[Amount]:
    """How much an extraction writes, stream by stream."""
    return amounts(
        counted,
        trees,
        setup.identity,
        shard_bytes=setup.shard_bytes,
        batch_tokens=setup.batch_tokens,
    )


def sample_tokens(setup: Setup, counted: Survey) -> float:
    """Tokens that the backbone reads in the time there is, and no more than show all there is."""
    return min(setup.enough, SECONDS * tokens_a_second(setup, counted))


def _training_rows(tables: Sequence[LabelTable]) -> dict[str, LabelTable]:
    """What every task is tuned on; a task without training rows is left out."""
    by_task: dict[str, dict[str, LabelTable]] = {}
    for table in tables:
        by_task.setdefault(table.task, {})[table.role] = table
    found = {}
    for task, roles in by_task.items():
        try:
            found[task] = train_and_held_out(roles)[0]
        except InputError:
            say(f"plan: {task} has no training rows, or too few to hold some out")
    return found


def other_bytes(ready: Prepared) -> int:
    """Bytes of a cache beside its streams: root, record and labels."""
    root = memory_writer(ready.identity)
    total = _size(root) + len(record_body(ready.config.model_dump(mode="json"), {}))
    for table in ready.tables:
        writer = memory_writer(ready.identity)
        empty = _size(writer)
        part = replace(table, ids=table.ids[:LABEL_ROWS], labels=table.labels[:LABEL_ROWS])
        writer.write_labels(part)
        total += (_size(writer) - empty) * len(table.ids) // len(part.ids)
    return total


def _size(writer: CacheWriter) -> int:
    return sum(writer.store.size(key) or 0 for key in writer.store.list())


@contextmanager
def _scratch(path: Place) -> Iterator[Path]:
    """A folder for a sample beside the cache at `path`, so that its disk is measured too.

    Where there is little room it is the system's own, and where it is in an object store: what is
    put there costs, and a bucket's speed is not that of a few small objects. Raises StorageError.
    """
    folder: Path | None = path.absolute().parent if isinstance(path, Path) else None
    while folder is not None and not folder.exists():
        folder = folder.parent
    if (open_store(path).free_bytes() or 0) < ROOM:
        folder = None
    try:
        made = tempfile.TemporaryDirectory(prefix=".sherl-pipe-plan-", dir=folder)
    except OSError as error:
        raise StorageError(
            error.errno,
            f"{folder or tempfile.gettempdir()}: {os.strerror(error.errno or 0)}. A plan puts a "
            "sample there for some seconds; choose a --cache in a folder that can be written.",
        ) from error
    with made as name:
        yield Path(name)
