"""`run.json`: what was run, with which versions, on which cache."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sherl_pipe.cache.place import Place
from sherl_pipe.cache.stores import open_store

# Of the last extraction into a cache that went to its end.
RECORD = "_run.json"
PACKAGES = ("sherl-pipe", "torch", "transformers", "zarr", "numcodecs", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of what shapes the results."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def record_body(config: Any, cache: dict[str, Any]) -> bytes:
    """The content of `run.json`.

    Args:
        config: the resolved settings, as JSON.
        cache: path and identity of the cache.
    """
    body = {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": config,
        "versions": versions(),
        "cache": cache,
    }
    return json.dumps(body, indent=1, default=str).encode()


def write_record(folder: Place, config: Any, cache: dict[str, Any], name: str = "run.json") -> None:
    """Write `run.json` into `folder`, replacing an earlier one; see `record_body`."""
    open_store(folder).replace(name, record_body(config, cache))
