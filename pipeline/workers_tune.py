"""Many tunings on Ray: Ray Tune gives passes to workers, and again where it loses one.

A trial of Ray Tune is one pass, so that tunings that can share a pass do so on one worker. What a
worker keeps is in the tunings' own folders: a trial that is begun again, here or on another
machine, goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sherl_pipe.cache import SherlPipeError, WorkerError
from sherl_pipe.cache import errors as known_errors
from sherl_pipe.pipeline.config import RunConfig, make_config, model_from_root, place_from_root
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.passes import Asked, Passes, outcome_of, receipt
from sherl_pipe.pipeline.tuning import Ended, Job, Work
from sherl_pipe.pipeline.workers import Share, connect, share
from sherl_pipe.stages.commons import clear_all
from sherl_pipe.stages.halving import Halving
from sherl_pipe.stages.settings import TuneSettings

# Ray Tune reads these when it is imported, or a run begins. Its own logs are not wanted, and an
# interruption ends the command like any other.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
try:
    import torch
    from ray import tune
    from ray.exceptions import RayTaskError
    from ray.tune import Callback
except ImportError as error:
    from sherl_pipe.cache import InputError

    raise InputError(
        f"a part of Ray is not installed here ({error}). Install it with "
        "`pip install 'sherl-pipe[ray]'`, or leave out --workers."
    ) from error

# Ray Tune's own notes, in the folder of the adapters; gone when it ends.
NOTES = ".ray-tune"
# What a worker raises neither for lack of memory nor because another one is lost and connections to
# it break; both are RuntimeErrors.
_NO_LOSS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
# What a worker process has opened, for the next trial that it is given.
_opened: dict[str, Passes] = {}


def train_apart(work: Work, bars: Bars, ended: Callable[[Job, Sequence[Ended]], None]) -> None:
    """Train passes on workers, each by one.

    Args:
        work: what is to be tuned.
        bars: for progress.
        ended: is told of every pass what its tunings came to; a WorkerError for each tuning of a
            pass that lost its worker too often.

    Raises what training raises, after all passes have ended; InputError, WorkerError without a
    cluster that fits.
    """
    with engaged(work.config, NOTES) as (each, notes):
        say(f"{len(work.jobs)} passes over {each.workers} workers of {each.cpus} processors")
        _run(work, each, notes, bars, ended)


@contextmanager
def engaged(config: RunConfig, name: str) -> Iterator[tuple[Share, Path]]:
    """A cluster divided among the workers that are asked for, and an empty folder called `name` for
    Ray's own notes, beside the adapters. Both end with the block, and what workers have left in
    this host's memory.

    Raises InputError, WorkerError without a cluster that fits.
    """
    wanted = config.tune.workers if isinstance(config.tune.workers, int) else None
    notes = config.tune.out.resolve() / name
    shutil.rmtree(notes, ignore_errors=True)
    try:
        with connect(config.ray_address, cpus=wanted) as nodes:
            yield share(nodes, wanted, config.device), notes
    finally:
        shutil.rmtree(notes, ignore_errors=True)
        # Workers are ended, and have not tidied up.
        clear_all(patience=5.0)


def _run(
    work: Work,
    each: Share,
    notes: Path,
    bars: Bars,
    ended: Callable[[Job, Sequence[Ended]], None],
) -> None:
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    described = describe(work, each)
    trial = tune.with_parameters(_trial, described=described)
    told = _Told(bars, work, ended)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": each.cpus, "gpu": each.gpus}),
        param_space={"job": tune.grid_search(list(range(len(work.jobs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=each.workers, reuse_actors=True),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(notes),
            failure_config=tune.FailureConfig(max_failures=work.config.tune.retries),
            callbacks=[told],
            verbose=0,
        ),
    )
    raise_unless_lost(tuner.fit().errors)
    if told.errors:
        raise told.errors[min(told.errors)]


class _Told(Callback):
    """Tells how passes go, and records those that end: Ray Tune's own results do not say which pass
    it was whose worker died before it had answered at all.

    Attributes:
        errors: of passes that would end the same way on any worker, by the pass's number.
    """

    def __init__(
        self, bars: Bars, work: Work, ended: Callable[[Job, Sequence[Ended]], None]
    ) -> None:
        self._bars, self._work, self._ended, self._done = bars, work, ended, 0
        self.errors: dict[int, SherlPipeError] = {}

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Ray Tune's: a pass has ended."""
        number, found = trial.config["job"], trial.last_result
        if "error" in found:
            self.errors[number] = error_of(found["error"])
        else:
            outcomes = [outcome_of(each) for each in json.loads(found["receipts"])]
            self._ended(self._work.jobs[number], outcomes)
        self._count(number)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Ray Tune's: a pass has lost its worker too often."""
        number, retries = trial.config["job"], self._work.config.tune.retries
        job = self._work.jobs[number]
        error = WorkerError(
            f"the worker died {retries + 1} times in the pass of {_named(job)}. Lower --together "
            "or --batch-size if memory is short; run the same command again to go on."
        )
        self._ended(job, [error] * len(job))
        self._count(number)

    def _count(self, number: int) -> None:
        self._done += len(self._work.jobs[number])
        self._bars("sweep", self._done, sum(map(len, self._work.jobs)), "tunings")


def raise_unless_lost(errors: Iterable[Exception]) -> None:
    """Raise the first of what ended workers that neither a loss nor lack of memory explains."""
    for error in errors:
        found = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(found, _NO_LOSS):
            raise found


def describe(work: Work, each: Share) -> str:
    """All that a worker needs to know, as JSON; paths start at the root."""
    halving, config, model = work.halving, work.config, work.model
    source = config.data.source
    places: dict[str, Any] = {"cache": place_from_root(config.cache_path)}
    if source is not None and Path(source).exists():
        places["data"] = config.data.model_copy(update={"source": str(Path(source).resolve())})
    copies = config.tune.local_copies
    own = {"out": config.tune.out.resolve(), "local_copies": copies and copies.resolve()}
    places["tune"] = config.tune.model_copy(update=own)
    return json.dumps(
        {
            "config": config.model_copy(update=places).model_dump(mode="json"),
            "model": model and model_from_root(model),
            "budget": work.budget,
            "halving": halving and [str(halving.folder.resolve()), halving.grace, halving.factor],
            "jobs": [[[task, vars(settings)] for task, settings in job] for job in work.jobs],
            "threads": each.cpus,
            "folder": str(Path.cwd()),
        }
    )


def settle(described: dict[str, Any]) -> None:
    """Go where the command was typed, if that folder is on this machine: the model's name in the
    cache may be a path from there. Ray leads a worker into another folder for every pass."""
    with suppress(OSError):
        os.chdir(described["folder"])


def opened(described: dict[str, Any], **how: Any) -> Passes:
    """What `describe` describes, opened in a worker."""
    torch.set_num_threads(described["threads"])
    config: RunConfig = make_config(described["config"], "worker")
    # Measured once, and not by every worker beside the others.
    tuned = config.tune.model_copy(update={"memory_budget": str(described["budget"])})
    halving = described["halving"]
    return Passes(
        config.model_copy(update={"tune": tuned}),
        Bars(None),
        described["model"],
        shared=True,
        halving=halving and Halving(Path(halving[0]), *halving[1:]),
        **how,
    )


def job_of(described: dict[str, Any], number: int) -> list[Asked]:
    """A pass of those that `describe` describes."""
    return [(task, TuneSettings(**settings)) for task, settings in described["jobs"][number]]


def _trial(config: dict[str, Any], described: str) -> None:
    """One pass, in a worker."""
    values = json.loads(described)
    try:
        settle(values)
        if described not in _opened:
            _opened.clear()
            _opened[described] = opened(values)
        outcomes = _opened[described].run(job_of(values, config["job"]))
    except SherlPipeError as error:
        # No accident: it would be the same on any worker.
        tune.report({"error": error_text(error)})
        return
    tune.report({"receipts": json.dumps([receipt(each) for each in outcomes])})


def error_text(error: SherlPipeError) -> str:
    """An error of the package's own, as JSON."""
    # OSError's text begins with its number.
    return json.dumps([type(error).__name__, str(error.args[-1] if error.args else error)])


def error_of(text: str) -> SherlPipeError:
    """The error of `error_text`."""
    name, message = json.loads(text)
    found: type[SherlPipeError] = getattr(known_errors, name, SherlPipeError)
    return found(message)


def _named(job: Job) -> str:
    return ", ".join(f"{task} {settings.name}" for task, settings in job)
