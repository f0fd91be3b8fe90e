"""How the columns of a row become the text that a backbone reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.pictures import Picture

# Text segments, or an image.
Input = tuple[str, ...] | Picture

TEMPLATES = ("task", "neutral")

# GLUE's text fields as in the published runs (SPEC section 8); a field without a colon there has
# none here.
GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}
_NO_COLON = {("mnli", "hypothesis")}


@dataclass(frozen=True)
class Template:
    """How the columns of a row become the text segments of an input.

    Attributes:
        segments: per segment, pieces (prefix, column) that are joined by a blank.
    """

    segments: tuple[tuple[tuple[str, str], ...], ...]

    def render(self, row: Mapping[str, Any]) -> Input:
        """The texts of a row. Raises KeyError for a column that it lacks."""
        return tuple(
            " ".join(f"{prefix}{row[column]}" for prefix, column in pieces)
            for pieces in self.segments
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for pieces in self.segments for _, column in pieces)

    def reading(self, columns: Sequence[str]) -> Template:
        """The same texts from columns of other names, one for each of `columns`, in order."""
        names = dict(zip(self.columns, columns, strict=True))
        return Template(
            tuple(tuple((prefix, names[old]) for prefix, old in each) for each in self.segments)
        )

    def to_json(self) -> Any:
        return [[list(piece) for piece in pieces] for pieces in self.segments]

    @classmethod
    def from_json(cls, data: Any) -> Template:
        if isinstance(data, dict):
            return PictureTemplate.of(data["image"])
        return cls(tuple(tuple((p, c) for p, c in pieces) for pieces in data))


@dataclass(frozen=True)
class PictureTemplate(Template):
    """The column that holds the image of a row."""

    @classmethod
    def of(cls, column: str) -> PictureTemplate:
        """The template that reads this column."""
        return cls(((("", column),),))

    def render(self, row: Mapping[str, Any]) -> Input:
        """The image of a row. Raises KeyError for a column that it lacks."""
        picture: Picture = row[self.columns[0]]
        return picture

    def reading(self, columns: Sequence[str]) -> Template:
        (column,) = columns
        return self.of(column)

    def to_json(self) -> Any:
        return {"image": self.columns[0]}


def make_template(
    kind: str, task: str, columns: Sequence[str], *, joined: bool, images: bool = False
) -> Template:
    """The template of a task.

    Text-to-text and causal backbones read the columns `joined` to one string, `task name: value
    ...`; `neutral` leaves the task's name out. An encoder reads them as one or two segments, `task`
    putting the name before the first. Of `images` there is one column, and nothing to put in front.
    """
    known = TEMPLATES[1:] if images else TEMPLATES
    if kind not in known:
        raise InputError(explain("template", expected=f"one of {known}", found=kind))
    if images:
        (column,) = columns
        return PictureTemplate.of(column)
    lead = f"{task} " if kind == "task" else ""
    if joined:
        pieces = []
        for number, column in enumerate(columns):
            colon = "" if (task, column) in _NO_COLON else ":"
            pieces.append((f"{lead if number == 0 else ''}{column}{colon} ", column))
        return Template((tuple(pieces),))
    if len(columns) > 2:
        raise InputError(
            explain("text columns of an encoder", expected="one or two", found=list(columns))
        )
    return Template(
        tuple(((lead if number == 0 else "", column),) for number, column in enumerate(columns))
    )
