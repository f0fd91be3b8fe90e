"""A sweep: the tunings of a `sweep:` section, trained as any others, and one table of them all."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from sherl_pipe.cache import InputError, NonFiniteError, WorkerError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.config import RunConfig, Space, Span, TuneConfig
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.tuning import Ended, run_tunings
from sherl_pipe.stages.halving import Halted, Halving
from sherl_pipe.stages.settings import TuneResult, TuneSettings

TABLE = "sweep.parquet"
RUNGS = ".rungs"
# Of a drawn number; it is part of a folder's name.
DIGITS = 3

Row = dict[str, Any]


def run_sweep(config: RunConfig, bars: Bars, model: str | None = None) -> list[Row]:
    """Every tuning of a sweep, and `sweep.parquet` in the folder of the adapters. Resumes.

    Returns one row for each tuning: its settings, what it came to and its costs. A tuning that
    fails alone is a row and no error, unless all of them fail.

    Raises InputError for a sweep without a space, what `run_tunings` raises, and a WorkerError
    after all others are done.
    """
    sweep = config.sweep
    halving = None
    if sweep.stop is not None:
        folder = config.tune.out / RUNGS
        halving = Halving(folder, sweep.stop.grace, sweep.stop.factor)
    ended = run_tunings(config, bars, variants(config), model, halving)
    rows = [_row(task, settings, outcome) for task, settings, outcome in ended]
    store = LocalStore(config.tune.out)
    store.replace(TABLE, _parquet(rows))
    errors = [end for _, _, end in ended if isinstance(end, NonFiniteError | WorkerError)]
    lost = next((each for each in errors if isinstance(each, WorkerError)), None)
    if lost is not None:
        raise lost
    if len(errors) == len(rows):
        raise errors[0]
    return rows


def variants(config: RunConfig) -> list[TuneConfig]:
    """The section `tune` once for every point of the space, in a fixed order."""
    sweep = config.sweep
    if not any(_axes(space) for space in sweep.space):
        raise InputError(
            explain(
                "sweep.space",
                expected="settings of `tune` with the values to try",
                found="none",
                todo="Give it in the config, such as `space: {lr: [0.003, 0.006]}`.",
            )
        )
    found = []
    for number, space in enumerate(sweep.space):
        axes = _axes(space)
        points = _grid(axes) if sweep.search == "grid" else _draws(axes, config, number)
        for point in points:
            change = {key: (value,) if key == "lr" else value for key, value in point.items()}
            found.append(config.tune.model_copy(update=change))
    return found


def _axes(space: Space) -> dict[str, Any]:
    return {key: value for key in Space.model_fields if (value := getattr(space, key)) is not None}


def _grid(axes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, values in axes.items():
        if isinstance(values, Span):
            raise InputError(
                explain(
                    f"sweep.space.{key}",
                    expected="a list of values for a grid",
                    found=f"a range, {values.low:g} to {values.high:g}",
                    todo="List values, or use `search: random`.",
                )
            )
    for point in product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def _draws(axes: Mapping[str, Any], config: RunConfig, number: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([config.sweep.seed, number])
    for _ in range(config.sweep.samples):
        yield {key: _draw(values, rng) for key, values in axes.items()}


def _draw(values: Any, rng: np.random.Generator) -> Any:
    if not isinstance(values, Span):
        return values[int(rng.integers(len(values)))]
    if values.scale == "log":
        drawn = float(np.exp(rng.uniform(np.log(values.low), np.log(values.high))))
    else:
        drawn = float(rng.uniform(values.low, values.high))
    # Rounding may lead out of the range.
    return min(max(float(f"{drawn:.{DIGITS}g}"), values.low), values.high)


def _row(task: str, settings: TuneSettings, outcome: Ended) -> Row:
    row: Row = {"task": task, **asdict(settings), "name": settings.name}
    row |= dict.fromkeys(("score", "metrics", "role", "examples", "trainable", "seconds"))
    row |= dict.fromkeys(("seconds_per_epoch", "peak_mib", "folder", "error"))
    if isinstance(outcome, TuneResult):
        costs = {key: value for key, value in asdict(outcome).items() if key in row}
        row |= costs | {"status": "finished", "epochs_done": settings.epochs}
    elif isinstance(outcome, Halted):
        row |= {"status": "stopped", "epochs_done": outcome.epoch}
        row |= {"score": outcome.score, "seconds": outcome.seconds}
    else:
        status = "lost" if isinstance(outcome, WorkerError) else "failed"
        row |= {"status": status, "epochs_done": None, "error": str(outcome)}
    return row


def _parquet(rows: Sequence[Row]) -> bytes:
    names = sorted({name for row in rows for name in row["metrics"] or ()})
    flat = []
    for row in rows:
        metrics = row["metrics"] or {}
        rest = {key: value for key, value in row.items() if key != "metrics"}
        flat.append(rest | {f"metric_{name}": metrics.get(name) for name in names})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), buffer)
    return buffer.getvalue()
