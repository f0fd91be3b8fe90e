"""Training steps on a sample, with features from a cache and with features computed anew."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sherl_pipe.cache import CacheWriter, FeatureCache, LabelTable
from sherl_pipe.cache.place import Place
from sherl_pipe.stages.amounts import StepSample
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.extract import Extractor
from sherl_pipe.stages.features import Ints
from sherl_pipe.stages.inputs import pad_id
from sherl_pipe.stages.measure import Clock, Setup
from sherl_pipe.stages.missing import missing_words
from sherl_pipe.stages.passes import LivePass
from sherl_pipe.stages.probe import head_inputs, start_seconds, starts_from_probe
from sherl_pipe.stages.sample import Sample
from sherl_pipe.stages.scratch import opened
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.survey import Survey
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.tune import Tuner
from sherl_pipe.stages.words import PrefixTree

UNLIMITED = 1 << 62
# Steps on one batch; as many of them as there is time for, one at least.
MOST_REPEATS = 5
# Steps before those that count; fewer where they are long.
WARM_UPS = 4


def measure_steps(
    setup: Setup,
    counted: Survey,
    sample: Sample,
    tables: Mapping[str, LabelTable],
    writer: CacheWriter,
    settings: TuneSettings,
    *,
    seconds: float,
) -> list[StepSample]:
    """Take the steps of a sample's batches both ways.

    Args:
        tables: the training rows of every task.
        writer: of the cache that holds the sample; gets labels, and the label words that it lacks.
        settings: of the tunings.
        seconds: for all tasks together, those with the most rows and words first. What every task
            costs beside its steps comes on top; no other is begun after twice as many. A task of
            free text is left out.

    Raises InputError for settings that do not fit the backbone, NonFiniteError for label words that
    the codec cannot hold, StorageError.
    """
    clock, spent = Clock(setup.backbone.device), 0.0
    found: list[StepSample] = []
    # Steps train in float32 whatever the frozen forward runs in, and lead nowhere.
    trained, settings = setup.backbone.cast(torch.float32), replace(settings, lr=0.0)
    extractor = Extractor(writer, setup.backbone, setup.tokenizer, batch_tokens=setup.batch_tokens)

    def most(task: str) -> tuple[int, int]:
        return len(tables[task].ids), _nodes(setup, tables[task])

    scored = [task for task in sample.batches if tables[task].spec.kind != "text"]
    for task in sorted(scored, key=most, reverse=True):
        if found and spent > 2 * seconds:
            break
        batches, whole = sample.batches[task], tables[task]
        rows = np.unique(np.concatenate(batches))
        table = replace(
            whole,
            ids=tuple(whole.ids[row] for row in rows),
            labels=tuple(whole.labels[row] for row in rows),
        )
        writer.write_labels(table)
        writer.write_labels(replace(table, role="validation"))
        if setup.backbone.family.seq2seq:
            held = opened(writer)
            for split, tree in missing_words(held, setup.tokenizer, setup.backbone.start):
                extractor.words(held, split, tree)
        cache, count = opened(writer), len(whole.ids)
        rehearsal = _Rehearsal(setup, trained, counted, table, cache, settings, count)
        share = seconds / len(sample.batches)
        found.append(rehearsal.run([np.searchsorted(rows, each) for each in batches], share))
        spent += clock.lap()
    return found


def _nodes(setup: Setup, table: LabelTable) -> int:
    """Decoder positions that a task's label words take; 0 where there is no decoder."""
    if not setup.backbone.family.seq2seq:
        return 0
    words = table.spec.words
    return len(PrefixTree.of_words(words, setup.tokenizer, setup.backbone.start).flat_nodes)


class _Rehearsal:
    """The steps of one task, which has so many training `rows`; `table` has some of them."""

    def __init__(
        self,
        setup: Setup,
        trained: Backbone,
        counted: Survey,
        table: LabelTable,
        cache: FeatureCache,
        settings: TuneSettings,
        rows: int,
    ) -> None:
        self._rows = rows
        task = Task(cache, table.task, trained, setup.tokenizer)
        # Nothing is written there: a rehearsal ends before a tuning would.
        self._tuner = Tuner(task, settings, Path(os.devnull), budget=UNLIMITED)
        tokens = _tokens_of(counted, table)
        self._lengths = tokens.lengths
        self._words = task.words_of(table.labels) if task.tree is not None else None
        reads = self._tuner.route.reads()
        scoring = self._tuner.scoring
        tree = scoring.tree if scoring else None
        self._live = LivePass(setup.backbone, reads, tokens, pad_id(setup.tokenizer), tree)
        self._optimizer = self._tuner.optimizer()
        self._clock = Clock(setup.backbone.device)
        main = setup.backbone.family.main
        splits = {cache.places[each][0] for each in table.ids}
        self._loaded_tokens = sum(cache.stream(split, main).rows for split in splits)

    def run(self, batches: Sequence[Ints], seconds: float) -> StepSample:
        """The steps of `batches`, again and again until `seconds` are over."""
        tuner, clock = self._tuner, self._clock
        _forget(tuner.task.cache.path)
        clock.lap()
        tuner.train.preload()
        load = clock.lap()
        start, fit = self._start(batches)
        tuner.route.train()
        # Not in turns: each would find the processor's caches full of the other's data.
        (cached,) = _medians(self._cached_steps, batches, seconds / 2)
        forward, live = _medians(self._live_steps, batches, seconds / 2)
        return StepSample(
            task=tuner.task.name,
            tokens=sum(int(self._lengths[rows].sum()) for rows in batches),
            cached_seconds=cached,
            live_seconds=live,
            forward_seconds=forward,
            loaded_tokens=self._loaded_tokens,
            loaded_bytes=sum(each.home.size for each in tuner.train.sources),
            load_seconds=load,
            start_seconds=start,
            fit_seconds=fit,
            rows=self._rows,
        )

    def _start(self, batches: Sequence[Ints]) -> tuple[float, float]:
        """Seconds for what the head reads of the batches, and for fitting it to the task's rows; 0
        where it does not start so."""
        tuner = self._tuner
        if not starts_from_probe(tuner):
            return 0.0, 0.0
        head_inputs(tuner, next(iter(tuner.train.read([batches[0]]))).streams)  # warms up
        self._clock.lap()
        found = [
            (batch.rows, head_inputs(tuner, batch.streams)) for batch in tuner.train.read(batches)
        ]
        read = self._clock.lap()
        return read, start_seconds(tuner, found, self._rows, self._clock.lap)

    def _cached_steps(self, batches: Sequence[Ints]) -> Iterator[tuple[float]]:
        """Seconds of each step; features are read as in an epoch, in one reading for all."""
        self._clock.lap()
        for batch in self._tuner.train.read(batches):
            self._tuner.step(batch, self._optimizer, 0, 1)
            yield (self._clock.lap(),)

    def _live_steps(self, batches: Sequence[Ints]) -> Iterator[tuple[float, float]]:
        """Seconds of each frozen forward, and of the whole step."""
        for rows in batches:
            self._clock.lap()
            words = None if self._words is None else self._words[rows]
            batch = self._live.batch(rows, words)
            forward = self._clock.lap()
            self._tuner.step(batch, self._optimizer, 0, 1)
            yield forward, forward + self._clock.lap()


def _medians(
    steps: Callable[[Sequence[Ints]], Iterator[tuple[float, ...]]],
    batches: Sequence[Ints],
    seconds: float,
) -> list[float]:
    """Sums over the batches of the median of each number that `steps` gives for every batch.

    The first calls warm up and do not count; then all batches are gone through, once at least
    and again until `seconds` are over.
    """
    begun = time.perf_counter()
    for _ in range(WARM_UPS):
        list(steps(batches[:1]))
        if time.perf_counter() - begun > seconds / WARM_UPS:
            break
    found: list[list[tuple[float, ...]]] = [[] for _ in batches]
    begun = time.perf_counter()
    for _ in range(MOST_REPEATS):
        for repeats, taken in zip(found, steps(batches), strict=True):
            repeats.append(taken)
        if time.perf_counter() - begun > seconds:
            break
    return [
        sum(statistics.median(each[place] for each in repeats) for repeats in found)
        for place in range(len(found[0][0]))
    ]


def _tokens_of(counted: Survey, table: LabelTable) -> Tokens:
    """The tokenised inputs of a table's rows."""
    wanted = set(table.ids)
    found = {
        identity: inputs
        for split in counted.splits
        for place, inputs in zip(split.known, split.tokens.inputs, strict=True)
        if (identity := split.ids[place]) in wanted
    }
    inputs = [found[each] for each in table.ids]
    return replace(counted.splits[0].tokens, inputs=inputs, truncated=0)


def _forget(folder: Place) -> None:
    """Ask the system to drop a cache's files from memory, so that they are read from the disk."""
    if not isinstance(folder, Path) or not hasattr(os, "posix_fadvise"):
        return
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
