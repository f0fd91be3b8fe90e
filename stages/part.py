"""The part of a backbone that a route runs, in not much more memory than it takes.

Every weight of the checkpoint is read and hashed, so a changed backbone is found as if all of it
had been loaded; only what the route needs is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.stages.backbone import (
    Backbone,
    load_backbone,
    loading_errors,
    model_class,
    resolve_model,
)
from sherl_pipe.stages.families import family_of
from sherl_pipe.stages.surgery import replace_module
from sherl_pipe.stages.weights import (
    StoredTensor,
    UnusualCheckpointError,
    fingerprint_of,
    in_threads,
    read_and_hash,
    read_header,
    same_values,
)
from sherl_pipe.stages.words import WordHead
from torch import Tensor, nn


def load_part(
    name: str,
    late: Mapping[str, int],
    *,
    tokens: Sequence[int] | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load the last blocks of a frozen backbone and what lies behind them, in float32.

    The weights in front of those blocks stay on the meta device: they have shapes, take no memory,
    and running a module that needs one raises RuntimeError. Fingerprint, config hash and number
    of parameters are those of the whole backbone. Where a checkpoint is unusual (weights under
    other names or in quantized types, adapters beside it), all of it is loaded.

    Args:
        name: a folder or a hub id.
        late: by stream, how many of its last blocks are needed; no entry for none. Streams that
            the model lacks do not matter.
        tokens: those whose rows of the output head are enough, the backbone's `words`; all by
            default.
        revision: of the hub.
        device: where the weights that are kept go.

    Raises what `load_backbone` raises.
    """
    try:
        return _load(name, late, tokens, revision, torch.device(device))
    except UnusualCheckpointError:
        # Also what is broken or not there: Hugging Face's loading says best what it is.
        return load_backbone(name, revision=revision, device=device)


def _load(
    name: str,
    late: Mapping[str, int],
    tokens: Sequence[int] | None,
    revision: str | None,
    device: torch.device,
) -> Backbone:
    loader, config, extra = model_class(name, revision)
    if any(getattr(config, key, None) for key in ("quantization_config", "transformers_weights")):
        raise UnusualCheckpointError("the config says how its weights are named or coded")
    commit = getattr(config, "_commit_hash", None)
    held = _held(resolve_model(name), commit or revision or "main")
    with loading_errors(name, "model"):
        model = _skeleton(loader, config, extra)
    backbone = Backbone(model, name, commit)
    backbone.home = device
    family = backbone.family
    first = {
        stream: len(backbone.blocks(stream)) - late[stream]
        for stream in family.streams
        if stream in late
    }
    groups = _groups(model, held)
    for path in family.computed:
        table: Any = type(model.get_submodule(path))
        replace_module(model, path, table(model.config).to(device))
    stored = model.state_dict().keys()
    buffers = {name: each for name, each in model.named_buffers() if name not in stored}
    if any(each.is_meta and family.needs(name, first) for name, each in buffers.items()):
        raise UnusualCheckpointError("buffers that are computed and not stored")

    head = None if tokens is None else _head(model)

    def read(stored: StoredTensor) -> tuple[StoredTensor, Tensor, list[tuple[str, str]]]:
        names = groups[stored]
        keep: bool | Sequence[int] = any(
            family.needs(each, first) for each in names if each != head
        )
        if not keep and tokens is not None and head in names:
            keep = tokens
        values, hashes = read_and_hash(stored, names, keep)
        if values is not None and keep is True:
            return stored, values.to(device), hashes
        if values is not None:
            backbone.words = WordHead(values.to(device), tokens or ())
        return stored, torch.empty(stored.shape, dtype=torch.float32, device="meta"), hashes

    # The largest first, so that the others are not done long before it.
    order = sorted(groups, key=lambda stored: stored.elements * len(groups[stored]), reverse=True)
    hashes: list[tuple[str, str]] = []
    for stored, values, found in in_threads(read, order):
        _put(model, groups[stored], nn.Parameter(values, requires_grad=False))
        hashes += found
    backbone.__dict__["fingerprint"] = fingerprint_of(hashes)
    _guard(model)
    return backbone


def _held(name: str, revision: str) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by the names that they have there."""
    # Adapters, and the shards of a distributed run, would be loaded with or before the rest.
    if _find(name, "adapter_config.json", revision) or [*Path(name).glob("shard-*.safetensors")]:
        raise UnusualCheckpointError(f"{name} has more than one kind of weights")
    files = [_find(name, "model.safetensors", revision)]
    if files == [None]:
        files = [_find(name, shard, revision) for shard in _shards(name, revision)]
    held: dict[str, StoredTensor] = {}
    for file in files:
        if file is None:
            raise UnusualCheckpointError(f"{name} lacks a shard")
        tensors = read_header(file)
        if tensors.keys() & held.keys():
            raise UnusualCheckpointError(f"{file} has tensors that another shard has")
        held |= tensors
    return held


def _shards(name: str, revision: str) -> list[str]:
    index = _find(name, "model.safetensors.index.json", revision)
    if index is None:
        raise UnusualCheckpointError(f"{name} has no safetensors files")
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusualCheckpointError(f"{index}: {error}") from error


def _find(name: str, file: str, revision: str) -> Path | None:
    """A file of a folder or of a hub repository, downloaded if it must be; None without one."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, revision=revision)
    except OSError:
        # Not there, or out of reach. A checkpoint that seems to have no weights is then loaded by
        # Hugging Face, which tells these apart.
        return None
    return None if found is None else Path(found)


def _skeleton(loader: Any, config: Any, extra: Mapping[str, Any]) -> Any:
    """The model's structure on the meta device."""
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING

    # Looked up to be imported before the device is changed: tensors that belong to the code and
    # not to the model must not land on it.
    seq2seq = family_of(config).seq2seq
    _ = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if seq2seq else MODEL_MAPPING)[type(config)]
    with torch.device("meta"):
        return loader.from_config(config, dtype=torch.float32, **extra)


def _head(model: Any) -> str | None:
    """The name of the output head's weight; None for a model without one, or with a bias."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return None
    return next(f"{path}.weight" for path, module in model.named_modules() if module is head)


def _groups(model: Any, held: Mapping[str, StoredTensor]) -> dict[StoredTensor, list[str]]:
    """For every stored tensor the names of the weights that it is.

    As Hugging Face has it: a tied weight that is stored on its own is tied only if its values are
    those of the other.

    Raises UnusualCheckpointError where a weight is not found under its own name, with or without
    the base model's prefix, or has another shape.
    """
    stored = model.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in stored.items()}
    if not all(weight.is_floating_point() for weight in stored.values()):
        raise UnusualCheckpointError("weights that are whole numbers")
    found: dict[str, StoredTensor] = {}
    for name in shapes:
        for written in (name, f"{model.base_model_prefix}.{name}"):
            if written in held and found.setdefault(name, held[written]) is not held[written]:
                raise UnusualCheckpointError(f"{name} is there with and without a prefix")
    sources: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        sources.setdefault(source, []).append(target)
    for source, targets in sources.items():
        there = [name for name in (source, *targets) if name in found]
        if not there or (source not in found and len(there) > 1):
            raise UnusualCheckpointError(f"it is unclear what {source} is tied to")
        stored = found[there[0]]
        for name in (source, *targets):
            if name not in found or same_values(found[name], stored):
                found[name] = stored
    groups: dict[StoredTensor, list[str]] = {}
    for name, shape in shapes.items():
        if name not in found or found[name].shape != shape:
            raise UnusualCheckpointError(f"{name} is missing or of another shape")
        groups.setdefault(found[name], []).append(name)
    return groups


def _put(model: nn.Module, names: Iterable[str], weight: nn.Parameter) -> None:
    """Make `weight` the parameter of all these names, so that they stay tied."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        # A table beside the parameters, such as BART's bias of the logits.
        setattr(module, leaf, weight.data if leaf in module._buffers else weight)


def _guard(model: nn.Module) -> None:
    """Let every module that lacks a weight refuse to run."""
    for path, module in model.named_modules():
        if any(weight.is_meta for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(partial(_refuse, path))


def _refuse(path: str, *_: Any) -> None:
    raise RuntimeError(f"{path} was not loaded: this backbone is only the part that a route runs.")
