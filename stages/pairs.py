"""Images with captions: which texts and which images there are, and which belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sherl_pipe.cache import InputError, LabelTable, TaskSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.pictures import Picture
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.retrieval import RECALLS
from sherl_pipe.stages.source import Source, check_text
from sherl_pipe.stages.templates import PictureTemplate, Template

SPEC = TaskSpec("retrieval", (), (), RECALLS)
# How texts and images of pairs are rendered, whatever their columns were called.
CAPTION, IMAGE = Template(((("", "caption"),),)), PictureTemplate.of("image")
_USUAL = ("caption", "captions", "text", "sentence")


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split.

    Attributes:
        texts, images: a row for every pair; they are stored in streams of their own.
    """

    texts: Source
    images: Source

    @property
    def sources(self) -> tuple[Source, Source]:
        return self.texts, self.images

    @property
    def templates(self) -> dict[str, Template]:
        """By the sources' keys."""
        return {self.texts.key: CAPTION, self.images.key: IMAGE}

    def table(self, progress: Progress = silent) -> LabelTable:
        """The pairs as labels beside the features. Raises what `Picture.pixels` raises."""
        images = self.images.ids(IMAGE, progress)
        numbers = {each: number for number, each in enumerate(dict.fromkeys(images))}
        rows = dict.fromkeys(
            (text, numbers[image])
            for text, image in zip(self.texts.ids(CAPTION), images, strict=True)
        )
        ids, labels = zip(*rows, strict=True)
        return LabelTable(self.texts.task, self.texts.role, SPEC, ids, labels, tuple(numbers))


def pairs_of(source: Source, text_columns: Sequence[str] = ()) -> Pairs:
    """The pairs of a split of images.

    Args:
        source: `columns` names the column of the images.
        text_columns: each has a caption of the row's image, or a list of them; of the usual names
            by default. An image may be in several rows, and a text beside several images.

    Raises InputError for missing columns, and for a caption that is no text, or empty.
    """
    (column,) = source.columns
    names = tuple(text_columns) or _usual_columns(source, column)
    if column in names or any(name not in source.rows[0] for name in names):
        raise InputError(
            explain(
                f"{source.origin}: caption columns",
                expected=f"{list(names)} beside {column!r}",
                found=sorted(map(str, source.rows[0])),
                todo="Name the columns of captions with --text-column.",
            )
        )
    # A file that several rows name is decoded once.
    files: dict[Path | bytes, Picture] = {}
    texts: list[Mapping[str, Any]] = []
    images: list[Mapping[str, Any]] = []
    for number, row in enumerate(source.rows):
        picture: Picture = row[column]
        picture = files.setdefault(picture.content, picture)
        for name in names:
            where = f"{source.origin}, row {number + 1}, column {name!r}"
            for text in _captions(row.get(name), where):
                texts.append({"caption": text})
                images.append({"image": picture})
    return Pairs(
        _part(source, texts, ("caption",), "text"), _part(source, images, ("image",), "image")
    )


def _part(
    source: Source, rows: list[Mapping[str, Any]], columns: tuple[str, ...], stream: str
) -> Source:
    return Source(source.task, source.role, rows, columns, None, source.origin, stream=stream)


def _usual_columns(source: Source, column: str) -> tuple[str, ...]:
    found = [name for name in _USUAL if name in source.rows[0] and name != column]
    if not found:
        raise InputError(
            explain(
                f"{source.origin}: caption columns",
                expected=f"one of {', '.join(_USUAL)}, beside the images",
                found=sorted(map(str, source.rows[0])),
                todo="Pairs come from files (jsonl, csv, tsv, parquet) with a column of images; "
                "name those of captions with --text-column.",
            )
        )
    return (found[0],)


def _captions(value: Any, where: str) -> Iterator[str]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(explain(where, expected="a caption", found="an empty list"))
    for each in values:
        check_text(each, where)
        if not each.strip():
            raise InputError(
                explain(
                    where,
                    expected="a caption",
                    found="an empty text",
                    todo="Write one, or remove the row.",
                )
            )
        yield each
