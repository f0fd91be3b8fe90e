"""What a run takes of this machine: device, threads, memory and folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.copies import Copies, used_bytes
from sherl_pipe.cache.copies import check_folder as check_copies
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.stages.backbone import Backbone

# Parameters below which threads do not pay.
TINY = 5_000_000
# Bytes of copies of streamed shards, unless more are asked for.
MOST_COPIES = 50 * 10**9


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises InputError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(device.type)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            explain("device", expected="auto, cpu, or a CUDA device of this machine", found=wanted)
        ) from error
    return device


def spare_threads(backbone: Backbone) -> None:
    """One thread for a tiny model on the CPU: its kernels are too small to be shared, and on a
    busy machine threads that wait for one another cost many times the work."""
    if backbone.device.type == "cpu" and backbone.parameters < TINY:
        torch.set_num_threads(1)


def parse_bytes(text: str | None, what: str = "memory budget") -> int:
    """`4GB`, `512MiB`, ... in bytes; half of the free memory where None. Raises InputError."""
    if text is None:
        return int(psutil.virtual_memory().available // 2)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if match is None:
        raise InputError(explain(what, expected="such as 4GB or 512MiB", found=text))
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


AnyPlace = TypeVar("AnyPlace", bound=Place)


def copies(config: RunConfig) -> Copies | None:
    """Where streamed shards are kept; None for a cache in a folder.

    Raises InputError, StorageError.
    """
    if isinstance(config.cache_path, Path):
        return None
    tune = config.tune
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = tune.local_copies or base / "sherl-pipe" / "shards"
    check_copies(folder)
    if tune.local_copies_size is not None:
        return Copies(folder, parse_bytes(tune.local_copies_size, "local copies size"))
    return Copies(
        folder, min(MOST_COPIES, (LocalStore(folder).free_bytes() + used_bytes(folder)) // 2)
    )


def check_folder(path: AnyPlace, option: str) -> AnyPlace:
    """`path`, if a folder is or can be there; a URL is. Raises InputError naming the option."""
    if isinstance(path, Path) and path.exists() and not path.is_dir():
        raise InputError(explain(option, expected="a folder, new or old", found=f"the file {path}"))
    return path
