"""Stage two, the loop: tunings over the same rows, trained in one pass over the cache."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import torch
from sherl_pipe.cache import InputError, NonFiniteError
from sherl_pipe.stages import checkpoint
from sherl_pipe.stages.features import Batch, FeatureSource, Ints, Reading
from sherl_pipe.stages.group import Group
from sherl_pipe.stages.halving import Halted, Halving
from sherl_pipe.stages.memory import PeakMemory
from sherl_pipe.stages.paired import AnySource
from sherl_pipe.stages.probe import head_inputs, start_head, starts_from_probe
from sherl_pipe.stages.progress import Progress, loading, silent
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.team import Team
from sherl_pipe.stages.tune import Streams, Tuner

Outcome = TuneResult | NonFiniteError | Halted


def pass_key(task: Task, settings: TuneSettings) -> Hashable:
    """Tunings with equal keys can share a pass: they read the same taps of the same rows."""
    return (
        task.train.ids,
        task.held_out.ids,
        task.train.image_ids,
        task.held_out.image_ids,
        task.texts is not None,
        settings.head == "words",
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
        halving: stops some of them early.
        team: of processes that train them together, each with tuners of its own.

    Raises InputError for tunings that cannot share a pass.
    """

    def __init__(
        self,
        tuners: Sequence[Tuner],
        *,
        halving: Halving | None = None,
        team: Team | None = None,
    ) -> None:
        first = tuners[0]
        keys = {pass_key(tuner.task, tuner.settings) for tuner in tuners}
        if len(keys) != 1 or any(t.task.backbone is not first.task.backbone for t in tuners):
            raise InputError("these tunings do not read the same taps of the same rows")
        if team is not None and first.task.backbone.family.towers:
            raise InputError("a pair is told from all others of its batch, which is not divided")
        self.tuners, self.halving, self.team = list(tuners), halving, team
        self._memory = PeakMemory(first.task.backbone.device)
        self.train, self._training = self._source(train=True)
        self.held_out, self._evaluation = self._source(train=False, beside=self.train.sources)

    def run(self, progress: Progress = silent) -> list[Outcome]:
        """Train, evaluate, save; goes on from checkpoints of the same tunings.

        Returns the result of every tuning, or what ended it alone. In a team the first process
        has the results, and the others none.
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
        if self.team is not None:
            self.team.same([step for step, places in steps.items() for _ in places])
        if self.first:
            self._start_heads(steps.get(0, []), spent, progress)
        if self.team is not None:
            self.team.share(p for tuner in self.tuners for p in tuner.parameters.values())
        # One group, unless only some of them were begun before.
        for step, places in sorted(steps.items()):
            group = Group(self, places, optimizers, spent)
            outcomes.update(group.train(step, progress))
        if not self.first:
            return []
        left = [place for place in range(len(self.tuners)) if place not in outcomes]
        begun = time.perf_counter()
        found = self.evaluate(left, progress)
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

    @property
    def first(self) -> bool:
        """Whether this process is the one that evaluates and writes."""
        return self.team is None or self.team.rank == 0

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
        batches = self.train.in_order(self.tuners[0].settings.batch_size)
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

    def evaluate(
        self, places: Sequence[int], progress: Progress
    ) -> dict[int, list[tuple[Ints, torch.Tensor]]]:
        """Outputs of batches of the held-out rows, by place of the tuning."""
        found: dict[int, list[tuple[Ints, torch.Tensor]]] = {place: [] for place in places}
        if places:
            size = self.tuners[0].settings.batch_size
            told = loading(progress, "evaluation")
            for batch in self.held_out.read(self.held_out.in_order(size), told):
                for place in places:
                    scores = self.tuners[place].scores(
                        _view(batch, self._evaluation[place]), batch.rows
                    )
                    found[place].append((batch.rows, scores))
        return found

    def _source(
        self, *, train: bool, beside: Sequence[FeatureSource] = ()
    ) -> tuple[AnySource, list[dict[str, str]]]:
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
