"""The commands that use what there is, or look at it. Only click is imported until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sherl_pipe.pipeline.options import (
    CACHE,
    DEVICE,
    FOLDER,
    IMAGE_COLUMN,
    JSON,
    LABEL_COLUMN,
    MOVED,
    TARGET_COLUMN,
    TEXT_COLUMNS,
    stack,
)

if TYPE_CHECKING:
    from sherl_pipe.cache.place import Place


@click.command()
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
            console.print_json(answer.__dict__, indent=None)
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


@click.command()
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
            console.print_json(ids)
        else:
            click.echo("\n".join(ids))
        return
    description = report.describe(found)
    if as_json:
        console.print_json(description)
        return
    for part in report.inspect_tables(description):
        console.results().print(part)


@click.command()
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


@click.command()
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
            console.print_json(ranking, indent=None)
        return
    console.results().print(report.rank_table(rankings))
