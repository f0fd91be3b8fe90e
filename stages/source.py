"""One split of one task as it was found: its inputs, ids, labels and targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.stages.pictures import identify_pictures
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.templates import Input, PictureTemplate, Template


@dataclass(frozen=True)
class Source:
    """One split of one task as it was found.

    Attributes:
        task, role: such as `sst2` and `train`.
        rows: one mapping per row.
        columns: the text columns, or the one that holds images; these are `Picture`s there.
        label_column: None where there are no labels.
        target_column: of free-text targets, instead of labels.
        origin: file or hub id, for messages.
        stream: of a dual encoder's cache, the one that takes them: `text` or `image`.
    """

    task: str
    role: str
    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    label_column: str | None
    origin: str
    target_column: str | None = None
    stream: str | None = None

    @property
    def name(self) -> str:
        """The split's name in a cache."""
        return f"{self.task}/{self.role}"

    @property
    def key(self) -> str:
        """Tells it from all others of the data; a split may have texts and images."""
        return self.name if self.stream is None else f"{self.name}/{self.stream}"

    def inputs(self, template: Template) -> list[Input]:
        """The texts or the image of every row. Raises InputError for a missing or odd value."""
        if isinstance(template, PictureTemplate):
            return [template.render(row) for row in self.rows]
        return [*self.texts(template)]

    def ids(self, template: Template, progress: Progress = silent) -> list[bytes]:
        """The example id of every row.

        Raises InputError for a missing or odd value, and what `Picture.pixels` raises.
        """
        if isinstance(template, PictureTemplate):
            pictures: Any = self.inputs(template)
            return identify_pictures(pictures, progress)
        return [example_id(texts) for texts in self.texts(template)]

    def texts(self, template: Template) -> list[tuple[str, ...]]:
        """Rendered segments of every row. Raises InputError for a missing or odd value."""
        return [self._render(number, row, template) for number, row in enumerate(self.rows)]

    def labels(self) -> list[Any]:
        """The raw label of every row. Raises InputError for a row without one."""
        values = [row.get(self.label_column or "") for row in self.rows]
        if all(isinstance(value, str) for value in values):
            values = _numbers(values)
        for number, value in enumerate(values):
            good = isinstance(value, (int, float, str)) and value != ""
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(
                    explain(
                        f"{self.origin}, row {number + 1}, column {self.label_column!r}",
                        expected="a label (text or a finite number)",
                        found="nothing" if value is None else repr(value),
                        todo="Give every row a label, or remove the row.",
                    )
                )
        # JSON's true and false are classes 1 and 0.
        return [int(value) if isinstance(value, bool) else value for value in values]

    def targets(self) -> list[str]:
        """The free text of every row. Raises InputError for a row with none."""
        column, found = self.target_column or "", []
        for number, row in enumerate(self.rows):
            where = f"{self.origin}, row {number + 1}, column {column!r}"
            value = row.get(column)
            check_text(value, where)
            if not str(value).strip():
                raise InputError(
                    explain(
                        where,
                        expected="a target with more than blanks",
                        found=repr(value),
                        todo="Give every row a target, or remove the row.",
                    )
                )
            found.append(str(value))
        return found

    def _render(self, number: int, row: Mapping[str, Any], template: Template) -> tuple[str, ...]:
        for column in template.columns:
            check_text(row.get(column), f"{self.origin}, row {number + 1}, column {column!r}")
        texts: Any = template.render(row)
        return tuple(texts)


def check_text(value: Any, where: str) -> None:
    """Raise InputError unless `value` is text that a tokenizer can read."""
    if not isinstance(value, str):
        found = "nothing" if value is None else f"{type(value).__name__} {value!r}"
        raise InputError(explain(where, expected="text", found=found))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            explain(where, expected="text in Unicode", found=f"half a character in {value!r}")
        ) from error


def _numbers(values: list[Any]) -> list[Any]:
    """Text labels of a CSV file as numbers where all of them are."""
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values
