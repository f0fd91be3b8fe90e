"""Where images are found: in folders by class, or in a column of a data file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.pictures import Picture

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# What systems and people leave beside images.
_BESIDE = {"Thumbs.db", "desktop.ini"}
_USUAL = ("image", "img", "picture", "file_name")
_LAYOUTS = "<task>/<split>/<class>/*, <split>/<class>/*, <task>/<split>/* or <split>/*"


def image_folder(path: Path) -> Iterator[tuple[str, str, list[Mapping[str, Any]], str]]:
    """Task, split, rows and origin of every split in folders of images.

    The layouts are `<task>/<split>/<class>/*`, and without the task's folder `<split>/<class>/*`,
    the task being named by `path`. Without labels they are `<task>/<split>/*` and `<split>/*`. A
    split named `train` tells those of one depth apart. Classes are labels by name. Training data
    comes first; files are in the order of their names.

    Raises InputError for a file that is no image by its name, and for other layouts.
    """
    files = sorted(_images(path))
    if not files:
        return
    depths = {len(file.relative_to(path).parts): file for file in files}
    first = {file.relative_to(path).parts[0] for file in files}
    depth = max(depths)
    tasks = depth == 4 or (depth == 3 and "train" not in first)
    labelled = depth - tasks == 3
    if len(depths) > 1 or depth not in (2, 3, 4):
        odd = [str(file.relative_to(path)) for file in depths.values()]
        raise InputError(
            explain(
                f"images in {path}", expected=f"{_LAYOUTS}, all of one depth", found=sorted(odd)[:3]
            )
        )
    splits: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for file in files:
        parts = file.relative_to(path).parts
        task, role = (parts[0], parts[1]) if tasks else (path.resolve().name, parts[0])
        row = {"image": Picture(file, str(file)), **({"label": parts[-2]} if labelled else {})}
        splits.setdefault((task, role), []).append(row)
    if tasks and not labelled and not any(role == "train" for _, role in splits):
        raise InputError(
            explain(
                f"images in {path}",
                expected=f"{_LAYOUTS}, with a split named train",
                found=f"folders {sorted(first)[:5]}",
            )
        )
    for task, role in sorted(splits, key=lambda each: (each[0], each[1] != "train", each[1])):
        where = path / task / role if tasks else path / role
        yield task, role, splits[task, role], str(where)


def _images(path: Path) -> Iterator[Path]:
    for file in path.rglob("*"):
        inside = file.relative_to(path).parts
        if file.is_dir() or any(part.startswith(".") for part in inside) or file.name in _BESIDE:
            continue
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(
                explain(
                    f"{file}",
                    expected=f"an image ({', '.join(IMAGE_SUFFIXES)})",
                    found=repr(file.name),
                    todo="Move the file elsewhere, or convert it.",
                )
            )
        yield file


def image_column_of(row: Mapping[str, Any], named: str | None, origin: str) -> str:
    """The column that holds images. Raises InputError where none has a usual name."""
    column = named or next((name for name in _USUAL if name in row), None)
    if column is None or column not in row:
        raise InputError(
            explain(
                f"{origin}: image column",
                expected=repr(named) if named else f"one of {', '.join(_USUAL)}",
                found=sorted(map(str, row)),
                todo="Name the column with --image-column.",
            )
        )
    return column


def pictures_of(
    rows: Sequence[Mapping[str, Any]], column: str, origin: str
) -> list[Mapping[str, Any]]:
    """The rows with a `Picture` in the image column.

    Args:
        rows: there with paths, a `Picture`, the bytes of an image file, or a mapping with `bytes`
            and `path`.
        column: of the images.
        origin: the file that rows come from; paths are relative to its folder.

    Raises InputError for any other value, and for a path where there is no file.
    """
    home = Path(origin).parent
    found: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows):
        value = row.get(column)
        if isinstance(value, Picture):
            found.append(row)
            continue
        where = f"{origin}, row {number + 1}, column {column!r}"
        content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            content = home / content
            if not content.is_file():
                raise InputError(
                    explain(
                        where,
                        expected="the path of an image, relative to this file",
                        found=f"{str(content)!r}, which is no file",
                    )
                )
            where = str(content)
        elif not isinstance(content, bytes) or not content:
            raise InputError(
                explain(
                    where,
                    expected="the path or the bytes of an image",
                    found="nothing" if content is None else f"{type(content).__name__}",
                )
            )
        found.append({**row, column: Picture(content, where)})
    return found
