"""The state of an unfinished training, in one file that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sherl_pipe.cache.errors import CorruptCacheError
from sherl_pipe.cache.store import LocalStore
from torch import Tensor, nn

NAME = "checkpoint.bin"
_DIGEST = hashlib.sha256
_DIGEST_BYTES = _DIGEST().digest_size


def save(
    folder: Path,
    key: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    random_state: Tensor,
    step: int,
    seconds: float,
) -> None:
    """Write everything that a resumed run needs to end with the same weights.

    Args:
        folder: of the adapter.
        key: names the tuning; a checkpoint of another one is not resumed.
        parameters, optimizer: what is trained, and AdamW's moments of it.
        random_state: of the tuning's own generator.
        step, seconds: done so far.
    """
    tensors = {"rng": random_state}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"first.{name}"] = state["exp_avg"]
        tensors[f"second.{name}"] = state["exp_avg_sq"]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    notes = {"key": key, "step": str(step), "seconds": str(seconds)}
    data = save_tensors(tensors, metadata=notes)
    LocalStore(folder).replace(NAME, _DIGEST(data).digest() + data)


def resume(
    folder: Path,
    key: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float, Tensor | None]:
    """Restore a checkpoint of this tuning: its step, seconds and random state; zeros and None
    where there is none.

    Raises CorruptCacheError for a damaged file.
    """
    path = folder / NAME
    if not path.is_file():
        return 0, 0.0, None
    raw = path.read_bytes()
    digest, data = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if _DIGEST(data).digest() != digest:
        raise CorruptCacheError(f"{path} is damaged. Delete it to train from the start.")
    header = int.from_bytes(data[:8], "little")
    notes = json.loads(data[8 : 8 + header])["__metadata__"]
    if notes["key"] != key:
        return 0, 0.0, None  # of another tuning; it will be replaced
    tensors = load_tensors(data)
    step = int(notes["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
            }
    return step, float(notes["seconds"]), tensors["rng"]
