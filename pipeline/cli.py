"""The command line. Only click is imported until a command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sherl_pipe.pipeline.options import (
    CACHE,
    DEVICE,
    EXTRACT,
    FOLDER,
    IMAGE_COLUMN,
    JSON,
    LABEL_COLUMN,
    MOVED,
    PLAN,
    RAY_ADDRESS,
    TARGET_COLUMN,
    TEXT_COLUMNS,
    TUNE,
    TUNE_WORKERS,
    extract_values,
    stack,
)

if TYPE_CHECKING:
    from sherl_pipe.cache.place import Place
    from sherl_pipe.pipeline.config import RunConfig

DEBUG = "SHERL_PIPE_DEBUG"
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="sherl-pipe")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Run a frozen backbone once, tune many tasks from its cached hidden states."""
    if debug:
        os.environ[DEBUG] = "1"


@cli.command()
@stack(EXTRACT)
def extract(**options: Any) -> None:
    """Stage one: run the frozen backbone once and cache its hidden states.

    Run again after an interruption: only what is missing is done.
    """
    from sherl_pipe.pipeline.config import make_config

    _extract(make_config(extract_values(options), "extract"))


@cli.command()
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


@cli.command()
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


@cli.command()
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


@cli.command()
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


@cli.command()
@stack(
    [
        click.option("--adapter", type=FOLDER, required=True, help="Folder that tune wrote."),
        MOVED,
        click.option("--text", "texts", multiple=True, help="Repeatable; pairs: two for each."),
        click.option(
            "--image",
            "images",
            multiple=True,
            type=click.Path(exists=True, path_type=Path),
            help="A file or a folder of images (repeatable); with --text what a dual encoder ranks "
            "for each text.",
        ),
        click.option(
            "--top", type=click.IntRange(1), default=5, help="Images that are shown for each text."
        ),
        click.option(
            "--file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="jsonl, csv, tsv or parquet.",
        ),
        TEXT_COLUMNS,
        IMAGE_COLUMN,
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1),
            default=64,
            help="Of a generated text, at most; for adapters of free-text tasks.",
        ),
        DEVICE,
        JSON,
    ]
)
def predict(
    adapter: Path,
    model: str | None,
    texts: tuple[str, ...],
    images: tuple[Path, ...],
    top: int,
    file: Path | None,
    text_columns: tuple[str, ...],
    image_column: str | None,
    max_new_tokens: int,
    device: str,
    as_json: bool,
) -> None:
    """Answer with an adapter on the live backbone."""
    if texts and images and file is None:
        _rank(adapter, model, texts, images, device, top, as_json)
        return
    if sum((bool(texts), bool(images), file is not None)) != 1:
        raise click.UsageError("give --text, --image or --file, and one of them only")
    from sherl_pipe.pipeline import console
    from sherl_pipe.pipeline.predict import Predictor

    predictor = Predictor(adapter, model=model, device=device, max_new_tokens=max_new_tokens)
    if file is not None:
        rows = predictor.rows_of_file(file, text_columns, image_column)
    else:
        rows = predictor.rows_of_images(images) if images else predictor.rows_of_texts(texts)
    with console.bars() as bars:
        answers = predictor.predict(rows, bars)
    if as_json:
        for answer in answers:
            _print_json(answer.__dict__, indent=None)
        return
    cells = [
        [
            answer.label if isinstance(answer.label, str) else f"{answer.label:.3f}",
            "-" if answer.probability is None else f"{answer.probability:.3f}",
            " | ".join(answer.text),
        ]
        for answer in answers
    ]
    console.results().print(
        console.table(
            "",
            (predictor.config.task, "probability", "image" if predictor.images else "text"),
            cells,
        )
    )


@cli.command()
@stack(
    [
        CACHE,
        click.option("--ids", "split", metavar="SPLIT", help="Only the example ids of this split."),
        JSON,
    ]
)
def inspect(cache: Place, split: str | None, as_json: bool) -> None:
    """Show what is in a cache."""
    from sherl_pipe.cache import FeatureCache
    from sherl_pipe.pipeline import console, report

    found = FeatureCache.open(cache)
    if split is not None:
        ids = report.example_ids(found, split)
        if as_json:
            _print_json(ids)
        else:
            click.echo("\n".join(ids))
        return
    description = report.describe(found)
    if as_json:
        _print_json(description)
        return
    for part in report.inspect_tables(description):
        console.results().print(part)


@cli.command()
@CACHE
def verify(cache: Place) -> None:
    """Check every committed byte of a cache (exit 4 if one is wrong)."""
    from sherl_pipe.cache import CorruptCacheError, FeatureCache
    from sherl_pipe.pipeline import console

    found = FeatureCache.open(cache)
    problems = found.verify()
    if problems:
        raise CorruptCacheError(
            "\n".join(problems) + "\nTo restore: delete the split's folder and extract again."
        )
    files = len(found.content())
    console.results().print(f"{cache}: {files} files of {len(found.splits)} splits are whole")
    for name, (done, total) in sorted(found.incomplete.items()):
        console.results().print(f"incomplete: {name}, {done} of {total} shards")


@cli.command()
@stack(
    [
        CACHE,
        MOVED,
        click.option("--task", required=True, help="Name of the task."),
        click.option(
            "--file",
            "files",
            multiple=True,
            required=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Labels with ids, texts or images; train.jsonl, validation.jsonl, ... "
            "(repeatable).",
        ),
        click.option("--role", help="Split of the labels.  [default: the file's name]"),
        TEXT_COLUMNS,
        IMAGE_COLUMN,
        LABEL_COLUMN,
        TARGET_COLUMN,
        click.option("--id-column", help="Column with example ids, instead of texts."),
        click.option("--partial", is_flag=True, help="Examples without a label are fine."),
        DEVICE,
    ]
)
def label(
    cache: Place, model: str | None, task: str, files: tuple[Path, ...], device: str, **options: Any
) -> None:
    """Attach or replace a task's labels; features are not extracted again."""
    from sherl_pipe.cache import FeatureCache
    from sherl_pipe.pipeline import console
    from sherl_pipe.pipeline.label import LabelOptions, attach_labels

    found = FeatureCache.open(cache)
    scored = "decoder" in found.identity.streams
    if scored:
        from sherl_pipe.pipeline import steps

        check = steps.word_check(found, model)
        changed = attach_labels(found, task, files, LabelOptions(**options), check)
    else:
        changed = attach_labels(found, task, files, LabelOptions(**options))
    for role, count in changed.items():
        console.results().print(f"{task}/{role}: {count:,} rows new or changed")
    if scored:
        from sherl_pipe.pipeline.config import RunConfig

        with console.bars() as bars:
            steps.open_for_tuning(RunConfig(cache=cache, device=device), bars, model)


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
        _print_json(report_plan.describe(planned))
        return
    for part in report_plan.tables(planned):
        console.results().print(part)


def _rank(
    adapter: Path,
    model: str | None,
    texts: tuple[str, ...],
    images: tuple[Path, ...],
    device: str,
    top: int,
    as_json: bool,
) -> None:
    from sherl_pipe.pipeline import console, report
    from sherl_pipe.pipeline.retrieve import Retriever

    retriever = Retriever(adapter, model=model, device=device)
    with console.bars() as bars:
        rankings = retriever.rank(texts, images, top, bars)
    if as_json:
        for ranking in rankings:
            _print_json(ranking, indent=None)
        return
    console.results().print(report.rank_table(rankings))


def _tune(config: RunConfig, *, as_json: bool, model: str | None) -> None:
    from dataclasses import asdict

    from sherl_pipe.pipeline import console, report
    from sherl_pipe.pipeline.tuning import run_tune

    with console.bars() as bars:
        results = run_tune(config, bars, model)
    if as_json:
        _print_json([asdict(result) for result in results])
        return
    console.results().print(report.tune_table(results))


def _sweep(config: RunConfig, *, as_json: bool, model: str | None) -> None:
    from sherl_pipe.pipeline import console, report
    from sherl_pipe.pipeline.sweep import run_sweep

    with console.bars() as bars:
        rows = run_sweep(config, bars, model)
    if as_json:
        _print_json(rows)
        return
    console.results().print(report.sweep_table(rows))


def _print_json(data: Any, indent: int | None = 1) -> None:
    import json

    click.echo(json.dumps(data, indent=indent, ensure_ascii=False))
