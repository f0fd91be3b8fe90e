"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click


def stack(options: Iterable[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Several click options as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


FOLDER = click.Path(file_okay=False, path_type=Path)


class _PlaceType(click.ParamType):  # type: ignore[type-arg] # takes none in older clicks
    """A folder, or a URL of an object store."""

    name = "folder or url"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from sherl_pipe.cache.place import parse_place

        place = parse_place(value)
        return FOLDER.convert(value, param, ctx) if isinstance(place, Path) else place


PLACE = _PlaceType()
CACHE = click.option(
    "--cache",
    type=PLACE,
    required=True,
    help="Folder of the cache, or s3://bucket/prefix (gs://, az://).",
)
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
MOVED = click.option("--model", help="Where the backbone is, if it has moved.")
JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
TEXT_COLUMNS = click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    help="Column with the text, twice for pairs; of a dual encoder each with captions.",
)
IMAGE_COLUMN = click.option(
    "--image-column", help="Column with the path, relative to the file, or the bytes of an image."
)
LABEL_COLUMN = click.option("--label-column", help="Column with the label.  [default: label]")
TARGET_COLUMN = click.option(
    "--target-column",
    help="Column with free text that the model learns to say, instead of labels.",
)
