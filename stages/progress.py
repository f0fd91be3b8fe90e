"""How long work tells whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

# (what, done, all, unit): `done` of `all` units of `what`.
Progress = Callable[[str, int, int, str], None]


def silent(_: str, __: int, ___: int, ____: str) -> None:
    """No progress."""


def loading(progress: Progress, what: str) -> Callable[[int, int], None]:
    """Tells of shards that `what` waits for."""
    return lambda done, total: progress(f"{what}: loading", done, total, "shards")
