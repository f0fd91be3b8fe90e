"""Passes over a cache that train tunings, in this process or in a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sherl_pipe.cache import FeatureCache, NonFiniteError
from sherl_pipe.pipeline.added import specs_of
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.machine import parse_bytes
from sherl_pipe.pipeline.opening import method_settings
from sherl_pipe.pipeline.pruning import Pruning
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.halving import Halted, Halving
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.pack import Outcome, Pack
from sherl_pipe.stages.progress import Progress
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.team import Team
from sherl_pipe.stages.tune import Tuner

# A tuning, by the name of its task.
Asked = tuple[str, TuneSettings]


@dataclass(frozen=True)
class Opened:
    """A cache with what is run behind it, and its tasks."""

    cache: FeatureCache
    backbone: Backbone
    tokenizer: Any
    tasks: dict[str, Task]

    def task(self, name: str) -> Task:
        """A task of the cache. Raises InputError for one that it lacks."""
        if name not in self.tasks:
            self.tasks[name] = Task(self.cache, name, self.backbone, self.tokenizer)
        return self.tasks[name]


class Passes:
    """Trains tunings of one cache, pass after pass.

    Args:
        config: of the run; its cache, device and where features live.
        bars: for progress of what is not training.
        model: overrides the name in the cache, for a backbone that has moved.
        shared: have one copy of features in host memory for all processes of this host.
        halving: stops some tunings early.
        team: of processes that train together, as this one's part.

    Raises what opening the cache raises.
    """

    def __init__(
        self,
        config: RunConfig,
        bars: Bars,
        model: str | None = None,
        *,
        shared: bool = False,
        halving: Halving | None = None,
        team: Team | None = None,
    ) -> None:
        self._config, self._bars, self._model = config, bars, model
        self._shared, self._halving, self._team = shared, halving, team
        self._budget = parse_bytes(config.tune.memory_budget)
        self._streams = specs_of(FeatureCache.open(config.cache_path), config.tune.tasks)
        self._opened: tuple[Any, Opened] | None = None
        self._last: Pack | None = None

    def open(self, method: str, late: int | None, loss: str | None, head: str | None) -> Opened:
        """The cache with the part of the backbone that tunings run; kept until another is needed.

        Raises what `open_for_tuning` raises.
        """
        # Here: steps imports this file.
        from sherl_pipe.pipeline.steps import open_for_tuning

        change = {"method": method, "late": late, "loss": loss, "head": head}
        tune = self._config.tune.model_copy(update=change)
        found = method_settings(tune, self._streams)
        late_blocks = sorted(find_method(method).late_blocks(found["late"]).items())
        key = late_blocks, found["loss"], found["head"] == "words"
        if self._opened is None or self._opened[0] != key:
            self._opened = self._last = None
            config = self._config.model_copy(update={"tune": tune})
            opened = open_for_tuning(config, self._bars, self._model)
            self._opened = key, Opened(*opened, {})
        return self._opened[1]

    def run(self, members: Sequence[Asked], progress: Progress | None = None) -> list[Outcome]:
        """What tunings that can share a pass give; those that are finished are not redone.

        In a team, the first process has the outcomes and the others none.

        Raises what opening the cache, training and storage raise.
        """
        tune, settings = self._config.tune, members[0][1]
        losses = {each.loss for _, each in members}
        loss = "vocabulary" if "vocabulary" in losses else settings.loss
        opened = self.open(settings.method, settings.late, loss, settings.head)
        tuners = [
            Tuner(
                opened.task(task),
                each,
                tune.out / task / each.name,
                budget=self._budget,
                residency=tune.residency,
                readers=tune.readers,
                shared=self._shared,
            )
            for task, each in members
        ]
        done = [self._before(tuner) for tuner in tuners]
        for tuner, known in zip(tuners, done, strict=True):
            if known is not None:
                ended = "stopped" if isinstance(known, Halted) else "finished"
                say(f"tune: {tuner.task.name}, {tuner.settings.name}: {ended} before")
        left = [tuner for tuner, known in zip(tuners, done, strict=True) if known is None]
        fresh = iter(self._train(opened, left, progress or self._bars) if left else ())
        if self._team is not None and self._team.rank:
            return []
        return [next(fresh) if known is None else known for known in done]

    def _before(self, tuner: Tuner) -> Outcome | None:
        found = tuner.finished()
        if found is None and self._halving is not None:
            return self._halving.halted(tuner)
        return found

    def _train(
        self, opened: Opened, tuners: Sequence[Tuner], progress: Progress
    ) -> Sequence[Outcome]:
        pruning = Pruning(self._config, opened.cache, opened.tokenizer, self._model, self._bars)
        for tuner in tuners:
            if tuner.settings.init in find_method(tuner.settings.method).given:
                tuner.start_from(pruning.weights(tuner))
        pack, first = Pack(tuners, halving=self._halving, team=self._team), tuners[0]
        if self._shared:
            # Those of the last pass may be the same: they are let go of only now.
            pack.train.claim()
            pack.held_out.claim()
            self._last = pack
        for tuner in tuners:
            say(f"tune: {tuner.task.name}, {tuner.settings.name}")
        say(
            f"{len(tuners)} {'tuning' if len(tuners) == 1 else 'tunings in one pass'} on "
            f"{first.task.backbone.device}; {len(first.task.train.ids):,} training rows; "
            f"{pack.train.summary}"
        )
        return pack.run(progress)


def receipt(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON: what a worker hands back."""
    if isinstance(outcome, NonFiniteError):
        return {"failed": str(outcome)}
    return {"halted" if isinstance(outcome, Halted) else "result": asdict(outcome)}


def outcome_of(receipt: Mapping[str, Any]) -> Outcome:
    """The outcome of a receipt."""
    if "failed" in receipt:
        return NonFiniteError(receipt["failed"])
    if "halted" in receipt:
        return Halted(**receipt["halted"])
    return TuneResult(**receipt["result"])
