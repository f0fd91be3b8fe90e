"""Ray: joining or starting a cluster, and how it is divided among workers.

The only file that imports Ray, and nobody imports it before workers are asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import IO, Any, cast

from sherl_pipe.cache import InputError, WorkerError
from sherl_pipe.cache.errors import explain
from sherl_pipe.pipeline.crew import WorkerDiedError

try:
    # Read when Ray is imported: nobody who extracts features asked to be counted.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else what it has to say twice is kept, and printed among the results at the end.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray
except ImportError as error:
    raise InputError(
        f"more than one worker needs Ray, which is not installed here ({error}). Install it with "
        "`pip install 'ray>=2.50'`, or leave out --workers and --ray-address: both stages run in "
        "one process without it."
    ) from error

# Ray's own store holds only what passes between driver and workers; features go through the cache.
OBJECT_STORE_BYTES = 100 << 20
# Ray itself waits for minutes at an address where nobody answers.
PROBE_SECONDS = 5.0
# Ray gives up a start after 30 s, which a machine that is busy with other things may need.
START_TRIES = 3
_JOIN = (
    "Start one with `ray start --head`. If that one wants a token, as Ray's newer ones may, set "
    "RAY_AUTH_MODE=token and have its ~/.ray/auth_token on this machine too (docs/cluster.md). "
)


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster offers, busy or not."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """What each worker gets.

    Attributes:
        workers: how many there are.
        cpus: processors, and threads, of each.
        gpus: 1 where it has a GPU of its own, else 0.
    """

    workers: int
    cpus: int
    gpus: int


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def connect(
    address: str | None, *, cpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES
) -> Iterator[list[Node]]:
    """Join the Ray cluster at `address`, or start one on this machine, without a word from it.

    A cluster that was started here ends with the block, and with this process if that is killed.
    Where this process is connected already, that connection is used and stays.

    Args:
        address: `host:port`, or `auto` for the cluster that `ray start` began on this machine; None
            starts one.
        cpus: that a cluster started here offers; by default the processors of this machine.
        object_store_bytes: of shared memory for Ray's object store, of a cluster started here.

    Yields the machines of the cluster. Raises InputError for an odd address, WorkerError where no
    cluster answers or none can be started.
    """
    with redirect_stdout(cast(IO[str], _WithoutRay(sys.stdout))):
        if ray.is_initialized():
            yield nodes()
            return
        _start(address, cpus, object_store_bytes)
        try:
            yield nodes()
        finally:
            ray.shutdown()


class _WithoutRay:
    """Standard output without what threads of Ray print, such as that a worker died."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._out.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _start(
    address: str | None, cpus: int | None, object_store_bytes: int, tries: int = START_TRIES
) -> None:
    """Join or start a cluster as `connect` says."""
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        arguments |= {
            "address": "local",
            "num_cpus": max(processors(), cpus or 1),
            "include_dashboard": False,
            "object_store_memory": object_store_bytes,
        }
    else:
        _probe(address)
        arguments["address"] = address
    before = _handlers()
    ended = False
    try:
        ray.init(**arguments)
    except SystemExit:
        ended = True  # by Ray's own handler of SIGTERM, which came meanwhile
    except Exception as error:  # noqa: BLE001 - Ray raises plain ones where a start fails
        ray.shutdown()  # of what had been started by then
        if address is None and tries > 1:
            _start(address, cpus, object_store_bytes, tries - 1)
            return
        where = "on this machine" if address is None else f"at {address}"
        raise WorkerError(
            f"no Ray cluster {where} ({' '.join(str(error).split())[:200]}). "
            + ("" if address is None else _JOIN)
            + "`ray status` says whether one runs."
        ) from error
    finally:
        # Ray ends the process its own way on SIGTERM; the command has one that says how to go on.
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended:
        ray.shutdown()
        signal.raise_signal(signal.SIGTERM)


def _handlers() -> dict[signal.Signals, Any]:
    """What handles signals now; only the main thread can put it back."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _probe(address: str) -> None:
    """Raise unless `address` has the right form and somebody listens there."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise InputError(
            explain(
                "ray address",
                expected="host:port, or auto for the cluster of this machine",
                found=address,
                todo="`ray start --head` prints it. Run the command on a machine of the cluster.",
            )
        )
    try:
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise WorkerError(
            f"no Ray cluster answers at {address} ({error}). Start one with `ray start --head`, or "
            "give --ray-address as that command printed it."
        ) from error


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in found]


def share(found: Sequence[Node], workers: int | None, device: str) -> Share:
    """Divide a cluster among workers: a GPU for each where there are any, else processors.

    Args:
        found: the machines.
        workers: how many; None is one for each GPU, or for each machine without any.
        device: `auto`, `cpu` or `cuda`.

    Raises InputError where they do not fit, or for another device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(
            explain(
                "device of several workers",
                expected="auto, cpu or cuda: Ray deals out GPUs",
                found=device,
                todo="CUDA_VISIBLE_DEVICES chooses among those of a machine.",
            )
        )
    gpus, processors = sum(node.gpus for node in found), sum(node.cpus for node in found)
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    room = gpus if on_gpu else processors
    machines = sum(bool(node.cpus) for node in found)
    workers = workers or max(1, gpus if on_gpu else machines)
    if workers > room:
        what = "GPUs" if on_gpu else "processors"
        raise InputError(
            explain(
                "workers",
                expected=f"at most {room}, one for each of the cluster's {what}",
                found=workers,
                todo="Ask for fewer." if room else "Use --device cpu.",
            )
        )

    def fits(cpus: int) -> bool:
        """Whether every worker has a place; a machine's share is not split over machines."""
        places = (min(n.cpus // cpus, n.gpus) if on_gpu else n.cpus // cpus for n in found)
        return sum(places) >= workers

    most = max((node.cpus for node in found), default=1)
    cpus = next((each for each in range(most, 0, -1) if fits(each)), 0)
    return Share(workers, cpus, int(on_gpu))


def hire(kind: type, cpus: int, gpus: int, calls: int) -> Any:
    """An actor of `kind` on the cluster that works on so many calls at a time. It is not restarted,
    and none of its calls is repeated: who hired it decides."""
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    return ray.remote(kind).options(max_concurrency=calls, **options).remote()


def call(worker: Any, method: str, *arguments: Any) -> Any:
    """Begin a call of an actor; its reference."""
    return getattr(worker, method).remote(*arguments)


def first_done(calls: Sequence[Any], seconds: float) -> Sequence[Any]:
    """Those of some calls that are over, once there are any or the time is."""
    done, _ = ray.wait(list(calls), num_returns=1, timeout=seconds)
    return list(done)


def result(call: Any) -> Any:
    """What a call gave.

    Raises what it raised, as the actor raised it; WorkerDiedError where the actor, its machine or
    what it answered is gone.
    """
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise WorkerDiedError(_reason(error)) from error


def dismiss(worker: Any) -> None:
    """End an actor, whatever it does."""
    ray.kill(worker, no_restart=True)


def _reason(error: Exception) -> str:
    """What Ray says of a death, in one line without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "class_name" not in line and "_id:" not in line]
    return " ".join(told)[:300]
