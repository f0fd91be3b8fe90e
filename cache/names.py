"""Names in a cache: which are safe, and what those of streams say."""

from __future__ import annotations

import re

from sherl_pipe.cache.errors import UnsafeError, explain, shown

DECLARATIONS = "_taps"
MAX_NAME_BYTES = 128
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_ADDED = re.compile(r"(.+)\.([1-9][0-9]{0,8})\Z")


def check_name(name: str, what: str = "split") -> str:
    """`name` if it is safe as a path of folders below the cache; else UnsafeError."""
    parts = name.split("/")
    if "zarr.json" in parts:
        raise UnsafeError(
            f"{what} name {shown(name)}: 'zarr.json' is the name of Zarr's own files. Rename it."
        )
    return _check_parts(name, parts, what)


def check_part(name: str, what: str) -> str:
    """`name` if it is safe as one file or folder; else UnsafeError."""
    return _check_parts(name, [name], what)


def _check_parts(name: str, parts: list[str], what: str) -> str:
    size = len(name.encode("utf-8", "replace"))
    if size > MAX_NAME_BYTES or not all(map(_PART.match, parts)):
        raise UnsafeError(
            explain(
                f"{what} name {shown(name)}",
                expected=f"letters, digits, '.', '_', '-' (begins with a letter or digit, at "
                f"most {MAX_NAME_BYTES} bytes)",
                found="something else",
                todo="Rename it.",
            )
        )
    return name


def stream_kind(stream: str) -> str:
    """The entry of `Identity.streams` that describes a stream: `decoder` of `decoder-1a2b3c4d`, and
    of `decoder-1a2b3c4d.1`."""
    return stream_number(stream)[0].split("-", 1)[0]


def stream_number(stream: str) -> tuple[str, int]:
    """The stream whose added taps a stream holds, and of which addition: `hidden`, 2 of `hidden.2`;
    0 for a stream of the first extraction."""
    match = _ADDED.match(stream)
    return (match[1], int(match[2])) if match else (stream, 0)


def declaration(number: int) -> str:
    """Key of the file that says what the n-th addition holds."""
    return f"{DECLARATIONS}/{number}.json"
