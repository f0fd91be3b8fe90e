"""Rows of data files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows of one file. Raises InputError naming the line."""
    if path.suffix not in SUFFIXES:
        raise InputError(
            explain(
                f"{path}",
                expected=f"a name that ends in {', '.join(SUFFIXES)}",
                found=repr(path.name),
            )
        )
    try:
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
            return rows
        return _read_table(path, "\t" if path.suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise InputError(
            explain(
                f"{path}",
                expected="UTF-8",
                found=f"another encoding ({error})",
                todo="Convert the file to UTF-8.",
            )
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_table(path: Path, delimiter: str) -> list[Mapping[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    rows: list[Mapping[str, Any]] = []
    # Spreadsheets put a byte order mark first. Strict, because a stray quote would otherwise make
    # one cell of many lines.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = [name for name in reader.fieldnames or () if name]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path}: two columns are named {twice!r}. Rename one of them.")
            for row in reader:
                extra = row.get(None, ())
                if extra:
                    raise InputError(
                        explain(
                            f"{path}, line {reader.line_num}",
                            expected=f"{len(row) - 1} cells",
                            found=len(row) - 1 + len(extra),
                            todo=f"Put texts that hold {delimiter!r} in double quotes.",
                        )
                    )
                rows.append(row)
        except csv.Error as error:
            raise InputError(
                f"{path}: the row that begins in line {reader.line_num + 1} cannot be read: "
                f"{error}. Inside a quoted text, write a quote twice; or use jsonl."
            ) from error
    return rows


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}, is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(
                    explain(f"{path}, line {number}", expected="a JSON object", found=repr(row))
                )
            rows.append(row)
    return rows
