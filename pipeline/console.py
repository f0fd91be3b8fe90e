"""Talking to a person: progress and remarks on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Piped output is for logs and programs: no wrapping at some terminal's width.
PIPED_WIDTH = 160


def results() -> Console:
    """Where results go."""
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    # Users' texts and paths are shown as they are: [brackets] and :colons: are no markup.
    return Console(width=width, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A remark for whoever waits; nothing when piped."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        console.print(text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table; numbers stand to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        numbers = rows and all(row[place][:1].isdigit() or row[place] == "-" for row in rows)
        # Folded where a terminal is narrow: half a number would be worse than two lines.
        made.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


class _Rate(ProgressColumn):
    """Units a second since the task began."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s")


class Bars:
    """Shows what `stages` reports: one bar for each thing that is under way."""

    # A terminal redraws ten times a second; more updates than that are only cost.
    INTERVAL = 0.1

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._shown = 0.0

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        if self._progress is None:
            return
        now = time.monotonic()
        if done < total and what in self._tasks and now - self._shown < self.INTERVAL:
            return
        self._shown = now
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, unit=unit)
        self._progress.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(what))


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress bars on a terminal; silence elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bars(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


def print_json(data: Any, indent: int | None = 1) -> None:
    """A result for programs."""
    click.echo(json.dumps(data, indent=indent, ensure_ascii=False))
