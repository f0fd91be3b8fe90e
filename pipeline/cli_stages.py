"""The commands that run stages. Only click is imported until one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sherl_pipe.pipeline.options import JSON, MOVED, stack
from sherl_pipe.pipeline.options_stages import (
    EXTRACT,
    PLAN,
    RAY_ADDRESS,
    TUNE,
    TUNE_WORKERS,
    extract_values,
)

if TYPE_CHECKING:
    from sherl_pipe.pipeline.config import RunConfig


@click.command()
@stack(EXTRACT)
def extract(**options: Any) -> None:
    """Stage one: run the frozen backbone once and cache its hidden states.

    Run again after an interruption: only what is missing is done.
    """
    from sherl_pipe.pipeline.config import make_config

    _extract(make_config(extract_values(options), "extract"))


@click.command()
@stack(PLAN)
def plan(tunings: int | None, as_json: bool, **options: Any) -> None:
    """Say what extract and tune would take, after some seconds of measuring.

    Takes the options of extract, and of tune those that change its costs. Plans for an empty cache
    and writes nothing to it.
    """
    from sherl_pipe.pipeline.config import make_config

    names = "method", "preset", "reduction", "late", "epochs", "batch_size", "residency"
    tune = {name: options.pop(name) for name in (*names, "memory_budget")}
    config = make_config({**extract_values(options), "tune": tune}, "plan")
    _plan(config, tunings=tunings, as_json=as_json)


@click.command()
@stack(TUNE)
def tune(**options: Any) -> None:
    """Stage two: tune side modules for the tasks of a cache."""
    from sherl_pipe.pipeline.config import make_config

    whole = {key: options.pop(key) for key in ("cache", "device", "ray_address")}
    as_json, model = options.pop("as_json"), options.pop("model")
    data = {key: options.pop(key) for key in ("source", "text_columns")}
    options["seed"] = options["seed"] or (0,)
    config = make_config({**whole, "data": data, "tune": options}, "tune")
    _tune(config, as_json=as_json, model=model)


@click.command()
@stack(
    [
        click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
        MOVED,
        TUNE_WORKERS,
        RAY_ADDRESS,
        JSON,
    ]
)
def sweep(
    config: Path,
    model: str | None,
    workers: int | str | None,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Stage two many times over: tasks, methods, settings and seeds, as CONFIG's sweep says.

    The features are in the cache already. Run again after an interruption: what is finished is not
    done again. One row for each tuning is in sweep.parquet beside the adapters.
    """
    from sherl_pipe.pipeline.config import read_config

    settings = read_config(config)
    change: dict[str, Any] = {}
    if workers is not None:
        change["tune"] = settings.tune.model_copy(update={"workers": workers})
    if ray_address is not None:
        change["ray_address"] = ray_address
    _sweep(settings.model_copy(update=change), as_json=as_json, model=model)


@click.command()
@click.argument(
    "config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def run(config: Path | None) -> None:
    """Both stages, as a pipeline.yaml says; a sweep if it has a space for one.

    Without CONFIG: ./pipeline.yaml if it is there, else the embedded demo.
    """
    from importlib.resources import as_file, files

    from sherl_pipe.pipeline.config import read_config

    here = Path("pipeline.yaml")
    with as_file(files("sherl_pipe.stages.demo") / "pipeline.yaml") as embedded:
        settings = read_config(config or (here if here.is_file() else embedded))
    _extract(settings)
    if settings.sweep.space:
        _sweep(settings, as_json=False, model=None)
    else:
        _tune(settings, as_json=False, model=None)


def _extract(config: RunConfig) -> None:
    from sherl_pipe.pipeline import console, report, steps

    with console.bars() as bars:
        reports = steps.run_extract(config, bars)
    console.results().print(report.extract_table(reports, f"cache {config.cache_path}"))


def _plan(config: RunConfig, *, tunings: int | None, as_json: bool) -> None:
    from sherl_pipe.pipeline import console, planning, report_plan

    with console.bars() as bars:
        planned = planning.run_plan(config, bars, tunings)
    if as_json:
        console.print_json(report_plan.describe(planned))
        return
    for part in report_plan.tables(planned):
        console.results().print(part)


def _tune(config: RunConfig, *, as_json: bool, model: str | None) -> None:
    from dataclasses import asdict

    from sherl_pipe.pipeline import console, report
    from sherl_pipe.pipeline.tuning import run_tune

    with console.bars() as bars:
        results = run_tune(config, bars, model)
    if as_json:
        console.print_json([asdict(result) for result in results])
        return
    console.results().print(report.tune_table(results))


def _sweep(config: RunConfig, *, as_json: bool, model: str | None) -> None:
    from sherl_pipe.pipeline import console, report
    from sherl_pipe.pipeline.sweep import run_sweep

    with console.bars() as bars:
        rows = run_sweep(config, bars, model)
    if as_json:
        console.print_json(rows)
        return
    console.results().print(report.sweep_table(rows))
