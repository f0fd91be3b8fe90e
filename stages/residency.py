"""Where the coded rows of a task live while it is tuned: one choice, by size and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain

RESIDENCIES = ("auto", "device", "host", "stream")


@dataclass(frozen=True)
class Home:
    """Where coded rows live.

    Attributes:
        kind: `device`, `host` or `stream`.
        size: bytes of the coded rows, all shards together.
        room: bytes that there were for them: on the device, else in host memory.
        device: which trains.
    """

    kind: str
    size: int
    room: int
    device: torch.device

    def __str__(self) -> str:
        where = {
            "device": f"in the memory of {self.device}",
            "host": "in host memory",
            "stream": "streamed",
        }
        size, room = in_bytes(self.size), in_bytes(self.room)
        return f"{size} of coded features {where[self.kind]} (budget {room})"


def choose(
    wanted: str, size: int, budget: int, device: torch.device, beside: Sequence[Home] = ()
) -> Home:
    """The home of `size` bytes of coded rows.

    Args:
        wanted: one of RESIDENCIES. `auto` is the first of device, host and stream that has room;
            on the CPU `device` is `host`.
        budget: bytes of host memory for features.
        device: which trains; a CUDA device has its `device_share` for features.
        beside: what was housed before and takes of the same room.

    Raises InputError for another word, and where there is no room in what is wanted.
    """
    if wanted not in RESIDENCIES:
        raise InputError(explain("residency", expected=f"one of {RESIDENCIES}", found=wanted))
    cuda = device.type == "cuda"
    if wanted == "device" and not cuda:
        wanted = "host"
    rooms = {"device": device_share(device), "host": budget} if cuda else {"host": budget}
    for home in beside:
        if home.kind in rooms:
            rooms[home.kind] = max(0, rooms[home.kind] - home.size)
    for kind, room in rooms.items():
        if wanted in (kind, "auto") and size <= room:
            return Home(kind, size, room, device)
    if wanted in rooms:
        what, todo = {
            "device": (f"half of what is free on {device}", "Use --residency host, stream or auto"),
            "host": ("the memory budget", "Raise --memory-budget, or use --residency stream"),
        }[wanted]
        raise InputError(
            explain(
                f"residency {wanted}",
                expected=f"coded features of at most {in_bytes(rooms[wanted])} ({what})",
                found=in_bytes(size),
                todo=f"{todo}.",
            )
        )
    return Home("stream", size, rooms["host"], device)


def device_share(device: torch.device) -> int:
    """Bytes of a CUDA device that coded features may take: half of what is free there now.

    The other half is for decoded batches, activations and the optimizer. 0 on the CPU, whose
    memory is the host's.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    # What the allocator holds without using it, it gives to whoever asks next.
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + spare) // 2


def in_bytes(size: int) -> str:
    """`70 B`, `1.5 KiB`, `812 MiB`, `5.9 GiB`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            number = size / unit
            return f"{number:.1f} {name}" if number < 10 else f"{number:,.0f} {name}"
    return f"{size} B"
