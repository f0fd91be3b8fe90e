"""The command line, called inside this process: a new one would import for seconds."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sherl_pipe.pipeline import entry


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def sherl(*argv: object) -> Answer:
    """`sherl-pipe argv...`, as its console script runs it."""
    out, err = io.StringIO(), io.StringIO()
    line = ["sherl-pipe", *map(str, argv)]
    with (
        patch.object(sys, "argv", line),
        patch.object(os, "fsync", lambda _: None),  # waiting for the disk was most of the time
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = entry.run()
    return Answer(code, out.getvalue(), err.getvalue())


def done(*argv: object) -> Answer:
    """`sherl-pipe argv...`, which has to succeed without a word on stderr."""
    answer = sherl(*argv)
    assert (answer.code, answer.err) == (0, "")
    return answer


def refused(code: int, *parts: str, argv: tuple[object, ...]) -> str:
    """`sherl-pipe argv...`, which has to fail with one line that has all of `parts`."""
    answer = sherl(*argv)
    assert answer.code == code, answer
    assert answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
    assert "Traceback" not in answer.err
    for part in parts:
        assert part in answer.err, (part, answer.err)
    return answer.err


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as jsonl."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def snapshot(folder: Path, part: str = "") -> dict[str, tuple[int, bytes]]:
    """Inode and bytes of every file below `folder` whose path has `part` in it."""
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and part in str(file.relative_to(folder))
    }


def size_of(folder: Path) -> int:
    """Bytes of every file below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
