"""Workers that misbehave, and the command line with them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from sherl_pipe.cache import StorageError
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline import crew, entry, staff
from sherl_pipe.pipeline.actor import ShardActor
from sherl_pipe.stages.shards import Done, ShardJob


@contextmanager
def hired(kind: type) -> Iterator[None]:
    """Workers are of this kind. Ray sends classes that are made in functions by value."""
    with patch.object(staff, "employed", partial(crew.employed, kind=kind)):
        yield


def deadly(marked: bytes, once: Path | None = None, *, in_commit: bool = False) -> type:
    """Workers that the example `marked` kills: always, or where the file `once` is not there yet.

    In the middle of a commit, when the shard's files are there and its receipt is not, or before.
    """

    class Deadly(ShardActor):
        def run(self, job: ShardJob) -> Done:
            if marked not in job.ids or (once is not None and once.exists()):
                return super().run(job)
            if once is not None:
                once.touch()
            if not in_commit:
                os.kill(os.getpid(), signal.SIGKILL)
            create = LocalStore.create

            def die(store: LocalStore, key: str, data: bytes) -> None:
                if "receipts" in key:
                    os.kill(os.getpid(), signal.SIGKILL)
                create(store, key, data)

            with patch.object(LocalStore, "create", die):
                return super().run(job)

    return Deadly


def refusing() -> type:
    """Workers whose disk is full."""

    class Refusing(ShardActor):
        def run(self, job: ShardJob) -> Done:
            raise StorageError(28, f"{job.split}: No space left on device (5 bytes needed).")

    return Refusing


def slow(seconds: float) -> type:
    """Workers that need so long for each shard."""

    class Slow(ShardActor):
        def run(self, job: ShardJob) -> Done:
            time.sleep(seconds)
            return super().run(job)

    return Slow


def slow_main() -> None:
    """The console script with slow workers; the seconds come first."""
    seconds = float(sys.argv.pop(1))
    with hired(slow(seconds)):
        entry.main()
