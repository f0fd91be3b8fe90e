"""Stage two as a person runs it: which tunings there are, in which passes, and who trains them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sherl_pipe.cache import InputError, NonFiniteError, WorkerError
from sherl_pipe.pipeline.added import naming_the_extraction, specs_of
from sherl_pipe.pipeline.config import RunConfig, TuneConfig
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.machine import check_folder, parse_bytes
from sherl_pipe.pipeline.opening import tunings
from sherl_pipe.pipeline.passes import Asked, Passes
from sherl_pipe.pipeline.record import write_record
from sherl_pipe.stages.halving import Halving
from sherl_pipe.stages.pack import Outcome, packs
from sherl_pipe.stages.settings import TuneResult, TuneSettings

# Given up with: every attempt at a pass lost its worker.
Ended = Outcome | WorkerError
Job = Sequence[Asked]


@dataclass(frozen=True)
class Work:
    """What is to be tuned.

    Attributes:
        config: of the run.
        model: overrides the name in the cache, for a backbone that has moved.
        jobs: tunings of one pass each.
        halving: stops some tunings early.
        budget: bytes of host memory for features.
    """

    config: RunConfig
    model: str | None
    jobs: Sequence[Job]
    halving: Halving | None
    budget: int


def run_tune(config: RunConfig, bars: Bars, model: str | None = None) -> list[TuneResult]:
    """Stage two: every task, learning rate and seed, in as few passes as can be. Resumes.

    Raises what opening the cache, training and storage raise; a NonFiniteError of one tuning, or
    the WorkerError of one that was lost, after all others are done.
    """
    ended = run_tunings(config, bars, [config.tune], model)
    results = []
    for _, _, outcome in ended:
        if isinstance(outcome, NonFiniteError | WorkerError):
            raise outcome
        if isinstance(outcome, TuneResult):
            results.append(outcome)
    return results


def run_tunings(
    config: RunConfig,
    bars: Bars,
    variants: Sequence[TuneConfig],
    model: str | None = None,
    halving: Halving | None = None,
) -> list[tuple[str, TuneSettings, Ended]]:
    """Train the tunings of all variants; what each came to, in the order asked for.

    Args:
        config: of the run.
        bars: for progress.
        variants: of its section `tune`; each task, rate and seed of each is one tuning.
        model: overrides the name in the cache.
        halving: stops some tunings early.

    Raises what opening the cache, training and storage raise.
    """
    tune = config.tune
    check_folder(tune.out, "out")
    passes = Passes(config, bars, model, halving=halving)
    # All of them first: what is wrong must not wait for the tunings before it.
    asked = list(dict.fromkeys(_asked(passes, config, variants)))
    opened = passes.open(tune.method, tune.late, tune.loss, tune.head)
    cache = opened.cache
    where = {"path": str(cache.path), "identity": cache.identity.fingerprint()}
    workers = tune.workers not in (None, 1)
    together = tune.together
    if isinstance(tune.workers, int):
        # As many passes as there are workers, if there are as many tunings.
        together = max(1, min(together, -(-len(asked) // tune.workers)))
    members = packs(((opened.task(task), settings) for task, settings in asked), together)
    jobs = [[(task.name, settings) for task, settings in job] for job in members]
    found: dict[Asked, Ended] = {}

    def ended(job: Job, outcomes: Sequence[Ended]) -> None:
        for (task, settings), outcome in zip(job, outcomes, strict=True):
            found[task, settings] = outcome
            folder = tune.out / task / settings.name
            # An interruption may have come between the two files.
            if isinstance(outcome, TuneResult) and not (folder / "run.json").is_file():
                write_record(folder, _resolved(config, settings), where)

    work = Work(config, model, jobs, halving, parse_bytes(tune.memory_budget))
    if workers:
        # A pair is told from all others of its batch, which is therefore not divided.
        divided = len(asked) == 1 and "image" not in cache.identity.streams
        del passes, opened, cache
        _spread(work, bars, ended, divided)
    else:
        for job in jobs:
            ended(job, passes.run(job))
    return [(task, settings, found[task, settings]) for task, settings in asked]


def _spread(
    work: Work, bars: Bars, ended: Callable[[Job, Sequence[Ended]], None], divided: bool
) -> None:
    """With workers: one tuning that is `divided` is trained by all of them together, several by
    one each."""
    if divided:
        from sherl_pipe.pipeline.workers_train import train_together

        ended(work.jobs[0], train_together(work, bars))
        return
    from sherl_pipe.pipeline.workers_tune import train_apart

    train_apart(work, bars, ended)


def _asked(passes: Passes, config: RunConfig, variants: Sequence[TuneConfig]) -> list[Asked]:
    """Every tuning. Raises InputError for settings that do not fit the backbone or the cache."""
    tune = config.tune
    opened = passes.open(tune.method, tune.late, tune.loss, tune.head)
    cache, backbone = opened.cache, opened.backbone
    names = tune.tasks or tuple(sorted(cache.tasks))
    if not names:
        raise InputError(
            f"{cache.path} has no labels. Attach some with `sherl-pipe label --cache {cache.path}`."
        )
    found: list[Asked] = []
    for variant in variants:
        own = config.model_copy(update={"tune": variant})
        with naming_the_extraction(cache.path):
            for name in dict.fromkeys(names):
                for settings in tunings(own, backbone.family, specs_of(cache, names)):
                    _ = opened.task(name).route_spec(settings)
                    found.append((name, settings))
    return found


def _resolved(config: RunConfig, settings: TuneSettings) -> dict[str, Any]:
    """The config as JSON, with what a tuning's method, preset and sweep made of it."""
    body = config.model_dump(mode="json")
    chosen = {name: value for name, value in asdict(settings).items() if name in body["tune"]}
    for name in ("lr", "seed"):
        chosen[name] = [chosen[name]]
    return {**body, "tune": {**body["tune"], **chosen}}
