"""Tunings of a pack that go on from the same step, and the loop that trains them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from sherl_pipe.cache import NonFiniteError
from sherl_pipe.stages import checkpoint
from sherl_pipe.stages.features import Batch, Ints
from sherl_pipe.stages.halving import Halted
from sherl_pipe.stages.progress import Progress, loading
from sherl_pipe.stages.step import train_step

if TYPE_CHECKING:
    from sherl_pipe.stages.pack import Pack

CHECKPOINT_SECONDS = 60.0


class Group:
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

    def train(self, step: int, progress: Progress) -> dict[int, NonFiniteError | Halted]:
        """All steps from `step` on; the tunings that came to no end."""
        settings = self._settings
        ended: dict[int, NonFiniteError | Halted] = {}
        # Shards meet in other windows in every epoch, so epochs differ in their last batches.
        ends = np.cumsum([len(self._epoch(0, epoch)) for epoch in range(settings.epochs)])
        total = int(ends[-1])
        saved = last = time.perf_counter()
        while step < total and self._optimizers:
            epoch = int(np.searchsorted(ends, step, "right"))
            if epoch and step == ends[epoch - 1]:
                last = time.perf_counter()
                ended |= self._halve(epoch, progress)
                if not self._optimizers:
                    break
                last = self._spend(last)
            for place in self._optimizers:
                self._pack.tuners[place].route.train()
            for batches in self._batches(epoch, int(ends[epoch]) - step, progress):
                ended |= self._step(batches, step, total)
                del batches  # else it would stay beside the next one
                step += 1
                progress(self._what, step, total, "steps")
                last = self._spend(last)
                if last - saved > CHECKPOINT_SECONDS and step < total and self._pack.first:
                    self._save(step)
                    saved = time.perf_counter()
                if not self._optimizers:
                    break
        return ended

    def _spend(self, since: float) -> float:
        """Account for the time since then; returns the time now."""
        now = time.perf_counter()
        for place in self._optimizers:
            self._spent[place] += (now - since) / len(self._optimizers)
        return now

    def _halve(self, epoch: int, progress: Progress) -> dict[int, NonFiniteError | Halted]:
        """Leave out the tunings that are stopped after so many epochs."""
        halving, ended = self._pack.halving, dict[int, NonFiniteError | Halted]()
        if halving is None or epoch not in halving.rungs(self._settings.epochs):
            return ended
        tuners = {place: self._pack.tuners[place] for place in self._optimizers}
        left = [place for place in tuners if not halving.kept(tuners[place], epoch)]
        scores: dict[int, float] = {}
        for place, found in self._pack.evaluate(left, progress).items():
            try:
                scores[place] = tuners[place].score(tuners[place].ordered(found))
            except NonFiniteError as error:
                ended[place] = error
        entries = [(tuners[place], score, self._spent[place]) for place, score in scores.items()]
        for place, verdict in zip(scores, halving.enter(entries, epoch), strict=True):
            if verdict is not None:
                ended[place] = verdict
        for place in ended:
            del self._optimizers[place]
        return ended

    def _epoch(self, seed: int, epoch: int) -> list[Ints]:
        return self._pack.train.epoch(seed, epoch, self._settings.batch_size)

    def _batches(
        self, epoch: int, left: int, progress: Progress
    ) -> Iterator[dict[int, tuple[Ints, Batch | None]]]:
        """By seed, the rows of an epoch's last `left` steps and their batches; of a team's
        batches this process's parts, None for one without rows."""
        team, source = self._pack.team, self._pack.train
        orders = [self._epoch(seed, epoch)[-left:] for seed in self._seeds]
        whole = [rows for step in zip(*orders, strict=True) for rows in step]
        own = whole if team is None else [source.part(r, team.rank, team.size) for r in whole]
        in_turn, pairs = [rows for rows in own if len(rows)], iter(zip(whole, own, strict=True))
        with closing(source.read(in_turn, loading(progress, self._what))) as batches:
            for _ in range(left):
                step = {}
                for seed in self._seeds:
                    rows, part = next(pairs)
                    step[seed] = rows, next(batches) if len(part) else None
                yield step

    def _step(
        self, batches: dict[int, tuple[Ints, Batch | None]], step: int, total: int
    ) -> dict[int, NonFiniteError]:
        """One step of every tuning; those that fail are left out from then on."""
        team, places = self._pack.team, list(self._optimizers)
        tuners = [self._pack.tuners[place] for place in places]
        own, shares = list[Batch | None](), list[float]()
        for place, tuner in zip(places, tuners, strict=True):
            rows, batch = batches[tuner.settings.seed]
            own.append(None if batch is None else self._pack.batch(place, batch))
            if team is not None:
                # What is drawn for a part must not depend on what was drawn before a restart.
                tuner.randomness.restart(tuner.settings.seed, step, team.rank)
                shares.append(tuner.amount(batch.rows) / tuner.amount(rows) if batch else 0.0)
        extra = () if team is None else (team, shares)
        optimizers = list(self._optimizers.values())
        errors = train_step(tuners, own, optimizers, step, total, *extra)
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
