"""A worker of stage one, as it lives on some machine of a cluster."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sherl_pipe.cache import Identity, InputError, StaleCacheError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.place import Place
from sherl_pipe.pipeline.machine import pick_device, spare_threads
from sherl_pipe.pipeline.opening import DTYPES
from sherl_pipe.pipeline.record import versions
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.memory import return_freed_memory
from sherl_pipe.stages.shards import Done, ShardJob, ShardWorker


@dataclass(frozen=True)
class Setup:
    """What a worker needs before its first shard.

    Attributes:
        threads: that it computes with.
        token: that lets it commit.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    threads: int
    path: Place
    identity: Identity
    token: str
    pad_id: int
    batch_tokens: int


class ShardActor:
    """A worker: loads the backbone once and works through shards."""

    _worker: ShardWorker

    def place(self) -> str:
        """The machine that it is on."""
        return socket.gethostname()

    def load(self, setup: Setup) -> None:
        """Load the backbone. Raises what that raises, and for packages or weights of others."""
        return_freed_memory()
        torch.set_num_threads(setup.threads)
        here = f"worker on {self.place()}"
        try:
            _check_versions(setup.identity.versions)
            backbone = load_backbone(
                setup.model,
                revision=setup.revision,
                dtype=DTYPES[setup.dtype],
                device=pick_device(setup.device),
            )
            backbone.require(setup.identity.backbone, str(setup.path))
        except (InputError, StaleCacheError) as error:
            raise type(error)(f"{here}: {error}") from error
        spare_threads(backbone)
        self._worker = ShardWorker(
            setup.path,
            setup.identity,
            setup.token,
            backbone,
            pad_id=setup.pad_id,
            batch_tokens=setup.batch_tokens,
        )

    def run(self, job: ShardJob) -> Done:
        """Compute a shard and commit it. Raises what `ShardWorker` raises."""
        buffer = self._worker.compute(job)
        begun = time.perf_counter()
        receipt = self._worker.commit(job, buffer)
        return Done(
            job.shard, receipt, f"{self.place()}:{os.getpid()}", time.perf_counter() - begun
        )


def _check_versions(expected: Mapping[str, str]) -> None:
    """Raise InputError where this machine's packages are not those of the driver."""
    for name, found in versions().items():
        if found != expected[name]:
            raise InputError(
                explain(
                    f"version of {name}",
                    expected=f"{expected[name]}, as where the command runs",
                    found=found,
                    todo="Install the same packages on all machines.",
                )
            )
