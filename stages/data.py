"""Data: files or the hub, as splits of tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.files import SUFFIXES, read_rows
from sherl_pipe.stages.picture_files import image_column_of, image_folder, pictures_of
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.templates import GLUE_COLUMNS

DEMO_DATA = "demo"
# What GLUE writes where a test split has labels that are not public.
WITHHELD = (-1, "-1")
_USUAL_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"), ("question", "sentence"))


def load_sources(
    data: str,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    target_column: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    images: bool = False,
    image_column: str | None = None,
) -> list[Source]:
    """Find the splits that `data` names.

    Args:
        data: `demo`; a folder `NAME/<task>/<split>.{jsonl,csv,tsv,parquet}` or `<task>/<split>.*`;
            one such file; `glue`, `glue/<task>` or another hub id.
        text_columns: columns that hold the text; guessed for GLUE and the usual names.
        label_column: `label` where it exists by default.
        target_column: the task is free text, and this column has it; there are no labels then.
        tasks: keep these only.
        limit: keep the first rows of every split.
        images: read images: from folders `NAME/<task>/<split>/<class>/*.png` too (see
            `image_folder`), or from a column of such a file, which holds paths relative to the
            file, or the bytes of an image as `datasets` keeps them.
        image_column: holds the images; guessed for the usual names.

    Raises InputError naming the file and row.
    """
    if label_column is not None and target_column is not None:
        raise InputError(
            explain(
                "columns",
                expected="a label column or a target column",
                found=f"both, {label_column!r} and {target_column!r}",
                todo="Free text is --target-column, all else --label-column.",
            )
        )
    path = Path(data)
    if data == DEMO_DATA and not path.exists():
        found = _demo()
    elif path.is_file():
        found = [(path.stem, "train", read_rows(path), str(path))]
    elif path.is_dir():
        found = list(_folder(path)) or (list(image_folder(path)) if images else [])
    else:
        found = list(_hub(data, tasks))
    known = sorted({task for task, *_ in found})
    if not known:
        raise InputError(
            explain(
                f"data {data}",
                expected=f"files <task>/<split> that end in {', '.join(SUFFIXES)}"
                + (", or images <task>/<split>/<class>/*" if images else ""),
                found="none",
                todo="Point --data at such a folder, or at one file.",
            )
        )
    for task in tasks:
        if task not in known:
            raise InputError(
                explain(f"task of {data}", expected=f"one of {known}", found=repr(task))
            )
    sources = []
    for task, role, rows, origin in found:
        if tasks and task not in tasks:
            continue
        rows = rows[:limit] if limit is not None else rows
        if not rows:
            raise InputError(f"{origin} has no rows. Remove it or fill it.")
        asked = (*text_columns, *filter(None, (label_column, target_column)))
        if images:
            column = image_column_of(rows[0], image_column, origin)
            columns, label = _columns(task, rows[0], (column,), label_column, asked, origin)
            rows = pictures_of(rows, column, origin)
        else:
            columns, label = _columns(task, rows[0], text_columns, label_column, asked, origin)
        if target_column is not None:
            sources.append(Source(task, role, rows, columns, None, origin, target_column))
            continue
        if role.startswith("test") and all(row.get(label or "") in WITHHELD for row in rows):
            label = None
        sources.append(Source(task, role, rows, columns, label, origin))
    return sources


_Found = tuple[str, str, Sequence[Mapping[str, Any]], str]


def _folder(path: Path) -> Iterator[_Found]:
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    folders = [(path.resolve().name, files)] if files else []
    for folder in sorted(path.iterdir()):
        if folder.is_dir():
            inner = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
            folders.append((folder.name, inner))
    for task, members in folders:
        # Training data first, so that its shards own the texts that splits share.
        for file in sorted(members, key=lambda file: (file.stem != "train", file.stem)):
            yield task, file.stem, read_rows(file), str(file)


def _demo() -> list[_Found]:
    from sherl_pipe.stages.demo.data import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(folder)
        return [
            (task, role, rows, f"demo/{task}/{role}")
            for task, role, rows, _ in _folder(Path(folder))
        ]


def _hub(data: str, tasks: Sequence[str]) -> Iterator[_Found]:
    name, _, task = data.partition("/") if data.startswith("glue/") else (data, "", "")
    wanted: Sequence[str | None] = [None]
    if name == "glue":
        name = "nyu-mll/glue"
        wanted = (
            [task] if task else [known for known in GLUE_COLUMNS if not tasks or known in tasks]
        )
    try:
        import datasets

        datasets.disable_progress_bars()
        for config in wanted:
            for split, content in datasets.load_dataset(name, config).items():
                for column, kind in content.features.items():
                    if isinstance(kind, datasets.Image):  # as bytes: they are decoded here
                        content = content.cast_column(column, datasets.Image(decode=False))
                if not split.startswith("test"):  # GLUE's test labels are not public
                    origin = f"{name} {config or ''} {split}".replace("  ", " ")
                    yield config or name.rsplit("/", 1)[-1], split, content.to_list(), origin
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"cannot find the data {data!r}: there is no such folder or file here, and the hub "
            f"did not give the data set {name!r} ({' '.join(str(error).split())[:160]}). Point "
            "--data at a folder NAME/<task>/<split>.jsonl, or at one file with --text-column."
        ) from error


def _columns(
    task: str,
    row: Mapping[str, Any],
    text_columns: Sequence[str],
    label_column: str | None,
    needed: Sequence[str],
    origin: str,
) -> tuple[tuple[str, ...], str | None]:
    """Text and label columns of a split."""
    for asked in needed:
        if asked not in row:
            raise InputError(
                explain(
                    f"{origin}: columns",
                    expected=repr(asked),
                    found=sorted(map(str, row)),
                    todo="Name columns that are there with --text-column, --label-column or "
                    "--target-column.",
                )
            )
    label = label_column or ("label" if "label" in row else None)
    if text_columns:
        return tuple(text_columns), label
    for columns in (GLUE_COLUMNS.get(task, ()), *sorted(_USUAL_COLUMNS, key=len, reverse=True)):
        if columns and all(column in row for column in columns):
            return columns, label
    raise InputError(
        explain(
            f"{origin}: text columns",
            expected="one of the usual names, or --text-column",
            found=sorted(map(str, row)),
            todo="Name the columns with --text-column (twice for pairs).",
        )
    )
