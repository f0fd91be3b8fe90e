"""What the C library does with freed memory, and the peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import psutil
import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_GLIBC = platform.libc_ver()[0] == "glibc"
# Numbers of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# Of its thresholds: larger than anything here, and smaller than what a shard or a batch needs.
_ALL, _SMALL = 1 << 30, 8 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is glibc.

    A training step on the CPU frees and asks again for the same tens of megabytes; pages that come
    fresh from the system each time cost a tenth of a step at the size of t5-base. All threads share
    one arena, so that a step reuses what readers of shards have freed.
    """
    _tell_glibc(_ARENA_MAX, 1)
    for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        _tell_glibc(option, _ALL)


def return_freed_memory() -> None:
    """Let the C library give large pieces back as they are freed, where it is glibc.

    While shards are written, or read beside training steps, pieces of many sizes come and go, and
    what is kept of them breaks into holes that fit nothing: a third of a gigabyte with 43 shards of
    MiniLM.
    """
    for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        _tell_glibc(option, _SMALL)


def return_holes() -> None:
    """Let the C library give back what lies free between pieces in use, where it is glibc.

    Once a shard is seldom enough to cost little, and often enough that holes do not add up: batches
    that are computed side by side are of many sizes, and those that a shard leaves fit few of the
    next one's.
    """
    if _GLIBC:
        ctypes.CDLL(None).malloc_trim(0)


def _tell_glibc(option: int, value: int) -> None:
    if _GLIBC:
        ctypes.CDLL(None).mallopt(option, value)


class PeakMemory:
    """Measures from its making on: the allocator's peak on CUDA, resident memory elsewhere.

    Resident memory includes what the allocator keeps for later; runs compared with one another
    should each have a process of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if _RESET.exists():
            # Linux: forget the process's high-water mark.
            _RESET.write_text("5")
        self._before = psutil.Process().memory_info().rss

    def peak_mib(self) -> float:
        """MiB above the start, at the highest point so far."""
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20
        peak = _high_water() if _STATUS.exists() else psutil.Process().memory_info().rss
        return max(0.0, (peak - self._before) / 2**20)


def _high_water() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
