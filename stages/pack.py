"""Stage two, the loop: tunings over the same rows, trained in one pass over the cache."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from sherl_pipe.cache import InputError, NonFiniteError
from sherl_pipe.stages import checkpoint
from sherl_pipe.stages.features import Batch, FeatureSource, Ints, Reading
from sherl_pipe.stages.memory import PeakMemory
from sherl_pipe.stages.probe import head_inputs, start_head, starts_from_probe
from sherl_pipe.stages.progress import Progress, loading, silent
from sherl_pipe.stages.residency import Home
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tune import Streams, Tuner, train_step

CHECKPOINT_SECONDS = 60.0

Outcome = TuneResult | NonFiniteError


def pass_key(task: Task, settings: TuneSettings) -> Hashable:
    """Tunings with equal keys can share a pass: they read the same taps of the same rows."""
    return (
        task.train.ids,
        task.held_out.ids,
        settings.method,
        settings.late,
        settings.epochs,
        settings.batch_size,
        settings.precision,
    )


class Pack:
    """Tunings that share a pass over the rows.

    Tunings with the same seed see the same batches, decoded once. Each ends with the weights that
    it would have alone (see `train_step`).

    Args:
        tuners: of equal `pass_key`, on one backbone; none of them finished. Features live where
            the first of them wants its own.

    Raises InputError for tunings that cannot share a pass.
    """

    def __init__(self, tuners: Sequence[Tuner]) -> None:
        first = tuners[0]
        keys = {pass_key(tuner.task, tuner.settings) for tuner in tuners}
        if len(keys) != 1 or any(t.task.backbone is not first.task.backbone for t in tuners):
            raise InputError("these tunings do not read the same taps of the same rows")
        self.tuners = list(tuners)
        self._memory = PeakMemory(first.task.backbone.device)
        self.train, self._training = self._source(train=True)
        self.held_out, self._evaluation = self._source(train=False, beside=[self.train.home])

    def run(self, progress: Progress = silent) -> list[Outcome]:
        """Train, evaluate, save; goes on from checkpoints of the same tunings.

        Returns the result of every tuning, or the error that ended it alone.
        """
        outcomes: dict[int, Outcome] = {}
        optimizers = [tuner.optimizer() for tuner in self.tuners]
        steps: dict[int, list[int]] = {}
        spent = {}
        for place, (tuner, optimizer) in enumerate(zip(self.tuners, optimizers, strict=True)):
            step, spent[place], state = checkpoint.resume(
                tuner.folder, tuner.key, tuner.parameters, optimizer
            )
            if state is not None:
                tuner.randomness.state = state
            steps.setdefault(step, []).append(place)
        self._start_heads(steps.get(0, []), spent, progress)
        # One group, unless only some of them were begun before.
        for step, places in sorted(steps.items()):
            group = _Group(self, places, optimizers, spent)
            outcomes.update(group.train(step, progress))
        left = [place for place in range(len(self.tuners)) if place not in outcomes]
        begun = time.perf_counter()
        found = self._evaluate(left, progress)
        seconds = (time.perf_counter() - begun) / max(1, len(left))
        for place in left:
            tuner = self.tuners[place]
            try:
                outcomes[place] = tuner.finish(
                    tuner.ordered(found[place]),
                    seconds=spent[place] + seconds,
                    seconds_per_epoch=spent[place] / tuner.settings.epochs,
                    peak_mib=self._memory.peak_mib(),
                )
            except NonFiniteError as error:
                outcomes[place] = error
        return [outcomes[place] for place in range(len(self.tuners))]

    def batch(self, place: int, batch: Batch) -> Batch:
        """A batch of the shared source as one tuning sees it."""
        return replace(batch, streams=_view(batch, self._training[place]))

    def _start_heads(
        self, places: Sequence[int], spent: dict[int, float], progress: Progress
    ) -> None:
        """Fit the heads that start from a linear model, in one pass over the training rows."""
        places = [place for place in places if starts_from_probe(self.tuners[place])]
        if not places:
            return
        begun = time.perf_counter()
        inputs: dict[int, list[tuple[Ints, torch.Tensor]]] = {place: [] for place in places}
        batches = self.train.in_order(self.tuners[0].settings.batch_size * 4)
        for number, batch in enumerate(self.train.read(batches)):
            for place in places:
                streams = _view(batch, self._training[place])
                found = head_inputs(self.tuners[place], streams)
                inputs[place].append((batch.rows, found))
            progress("starting heads", number + 1, len(batches), "batches")
        for place in places:
            start_head(self.tuners[place], inputs[place])
        for place in places:
            spent[place] += (time.perf_counter() - begun) / len(places)

    def _evaluate(
        self, places: Sequence[int], progress: Progress
    ) -> dict[int, list[tuple[Ints, torch.Tensor]]]:
        found: dict[int, list[tuple[Ints, torch.Tensor]]] = {place: [] for place in places}
        if places:
            size = self.tuners[0].settings.batch_size * 4
            told = loading(progress, "evaluation")
            for batch in self.held_out.read(self.held_out.in_order(size), told):
                for place in places:
                    scores = self.tuners[place].scores(_view(batch, self._evaluation[place]))
                    found[place].append((batch.rows, scores))
        return found

    def _source(
        self, *, train: bool, beside: Sequence[Home] = ()
    ) -> tuple[FeatureSource, list[dict[str, str]]]:
        """One source for all, and for every tuning the source's name of each of its roles."""
        if len(self.tuners) == 1:
            alone = self.tuners[0].train if train else self.tuners[0].held_out
            return alone, [{role: role for role in alone.readings}]
        readings: dict[str, Reading] = {}
        names: list[dict[str, str]] = []
        for tuner in self.tuners:
            own = {}
            for role, reading in tuner.readings(train=train).items():
                same = [name for name, other in readings.items() if other == reading]
                own[role] = same[0] if same else f"{role}-{len(readings)}"
                readings[own[role]] = reading
            names.append(own)
        return self.tuners[0].source(readings, train=train, beside=beside), names


class _Group:
    """Tunings of a pack that go on from the same step."""

    def __init__(
        self,
        pack: Pack,
        places: Sequence[int],
        optimizers: Sequence[torch.optim.Optimizer],
        spent: dict[int, float],
    ) -> None:
        self._pack, self._spent = pack, spent
        self._optimizers = {place: optimizers[place] for place in places}
        self._settings = pack.tuners[0].settings
        self._seeds = sorted({pack.tuners[place].settings.seed for place in places})
        tasks = ", ".join(dict.fromkeys(pack.tuners[place].task.name for place in places))
        many = f"{len(places)} tunings" if len(places) > 1 else f"seed {self._seeds[0]}"
        self._what = f"{tasks} {self._settings.method} {many}"

    def train(self, step: int, progress: Progress) -> dict[int, NonFiniteError]:
        """All steps from `step` on; the tunings that came to no end."""
        settings = self._settings
        failed: dict[int, NonFiniteError] = {}
        # Shards meet in other windows in every epoch, so epochs differ in their last batches.
        ends = np.cumsum([len(self._epoch(0, epoch)) for epoch in range(settings.epochs)])
        total = int(ends[-1])
        saved = last = time.perf_counter()
        while step < total and self._optimizers:
            epoch = int(np.searchsorted(ends, step, "right"))
            for place in self._optimizers:
                self._pack.tuners[place].route.train()
            for batches in self._batches(epoch, int(ends[epoch]) - step, progress):
                failed |= self._step(batches, step, total)
                step += 1
                progress(self._what, step, total, "steps")
                now = time.perf_counter()
                for place in self._optimizers:
                    self._spent[place] += (now - last) / len(self._optimizers)
                last = now
                if now - saved > CHECKPOINT_SECONDS and step < total:
                    self._save(step)
                    saved = time.perf_counter()
                if not self._optimizers:
                    break
        return failed

    def _epoch(self, seed: int, epoch: int) -> list[Ints]:
        return self._pack.train.epoch(seed, epoch, self._settings.batch_size)

    def _batches(self, epoch: int, left: int, progress: Progress) -> Iterator[dict[int, Batch]]:
        """By seed, the batches of an epoch's last `left` steps."""
        orders = [self._epoch(seed, epoch)[-left:] for seed in self._seeds]
        in_turn = [rows for step in zip(*orders, strict=True) for rows in step]
        with closing(self._pack.train.read(in_turn, loading(progress, self._what))) as batches:
            for _ in range(left):
                yield {seed: next(batches) for seed in self._seeds}

    def _step(self, batches: dict[int, Batch], step: int, total: int) -> dict[int, NonFiniteError]:
        """One step of every tuning; those that fail are left out from then on."""
        places = list(self._optimizers)
        tuners = [self._pack.tuners[place] for place in places]
        own = [
            self._pack.batch(place, batches[tuner.settings.seed])
            for place, tuner in zip(places, tuners, strict=True)
        ]
        optimizers = list(self._optimizers.values())
        errors = train_step(tuners, own, optimizers, step, total)
        failed = {p: error for p, error in zip(places, errors, strict=True) if error is not None}
        for place in failed:
            del self._optimizers[place]
        return failed

    def _save(self, step: int) -> None:
        for place, optimizer in self._optimizers.items():
            tuner = self._pack.tuners[place]
            checkpoint.save(
                tuner.folder,
                tuner.key,
                tuner.parameters,
                optimizer,
                tuner.randomness.state,
                step,
                self._spent[place],
            )


def packs(
    asked: Iterable[tuple[Task, TuneSettings]], size: int
) -> list[list[tuple[Task, TuneSettings]]]:
    """Tunings that can share a pass, at most `size` together; in the order asked for."""
    groups: dict[Hashable, list[list[tuple[Task, TuneSettings]]]] = {}
    for task, settings in asked:
        members = groups.setdefault(pass_key(task, settings), [[]])
        if len(members[-1]) == size:
            members.append([])
        members[-1].append((task, settings))
    return [members for found in groups.values() for members in found]


def _view(batch: Batch, names: dict[str, str]) -> Streams:
    return {role: batch.streams[name] for role, name in names.items()}
