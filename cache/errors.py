"""Every error that sherl-pipe raises on purpose, with the exit code that the CLI returns for it.

A message names the field or file, what was expected, what was found, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SherlPipeError(Exception):
    """Base of all errors; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(SherlPipeError, ValueError):
    """The data, an option or a file given by the user cannot be used (exit 3)."""

    exit_code = 3


class IncompleteSplitError(InputError):
    """A split was begun and not finished (exit 3)."""


class CorruptCacheError(SherlPipeError, RuntimeError):
    """Stored bytes are not the bytes that were committed (exit 4)."""

    exit_code = 4


class StaleCacheError(SherlPipeError, ValueError):
    """The cache or adapter was made with another model, tokenizer, template or data (exit 5)."""

    exit_code = 5


class LockedError(SherlPipeError, BlockingIOError):
    """Another process is writing this cache (exit 6)."""

    exit_code = 6


class StorageError(SherlPipeError, OSError):
    """The storage refused: no space, read-only, no permission (exit 7)."""

    exit_code = 7


class UnsafeError(SherlPipeError, ValueError):
    """Refused because following it could harm: odd names, links, absurd sizes, pickles (exit 8)."""

    exit_code = 8


class NonFiniteError(SherlPipeError, ArithmeticError):
    """NaN or infinite activations (exit 9)."""

    exit_code = 9


class WorkerError(SherlPipeError, RuntimeError):
    """Workers of a Ray cluster, or the cluster itself, failed (exit 10)."""

    exit_code = 10


def explain(what: str, *, expected: Any = None, found: Any = None, todo: str = "") -> str:
    """One message: what is wrong, what was expected and found, what to do."""
    parts = [what]
    if expected is not None or found is not None:
        parts.append(f"expected {expected}, found {found}")
    message = ": ".join(parts) + "."
    return f"{message} {todo}" if todo else message


def shown(value: Any) -> str:
    """A stored value for a message: one short line, whatever somebody has put there."""
    if not isinstance(value, str | int | float | None):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def hint(todo: str) -> Iterator[None]:
    """Add what to do to an error about stored bytes."""
    try:
        yield
    except (CorruptCacheError, UnsafeError) as error:
        raise type(error)(f"{error} {todo}") from error
