"""Tuned modules on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sherl_pipe.cache import InputError, TaskSpec
from sherl_pipe.cache.errors import CorruptCacheError, UnsafeError, explain
from sherl_pipe.cache.fingerprint import hash_bytes
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.stages.methods.route import RouteSpec, trainable
from torch import Tensor, nn

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter.safetensors"
ADAPTER_FORMAT = 1


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter needs to be attached again.

    Attributes:
        task: its name.
        labels: kind, classes, words, metrics.
        route: structure of the tuned modules.
        backbone: `name`, `revision`, `fingerprint`, `config` of the backbone.
        tokenizer: fingerprint; of an image processor where inputs are images.
        template: how columns become inputs, as `Template.to_json` writes it.
        max_length: tokens after which an input is cut; those of every image.
        scaling: (mean, spread) of regression labels.
        loss: how label words are scored, as they were trained.
    """

    task: str
    labels: TaskSpec
    route: RouteSpec
    backbone: Mapping[str, Any]
    tokenizer: str
    template: Any
    max_length: int
    scaling: tuple[float, float]
    loss: str

    def to_json(self) -> dict[str, Any]:
        return {
            "format": ADAPTER_FORMAT,
            "task": self.task,
            "labels": self.labels.to_json(),
            "route": self.route.to_json(),
            "backbone": dict(self.backbone),
            "tokenizer": self.tokenizer,
            "template": self.template,
            "max_length": self.max_length,
            "scaling": list(self.scaling),
            "loss": self.loss,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterConfig:
        return cls(
            task=data["task"],
            labels=TaskSpec.from_json(data["labels"]),
            route=RouteSpec.from_json(data["route"]),
            backbone=data["backbone"],
            tokenizer=data["tokenizer"],
            template=data["template"],
            max_length=int(data["max_length"]),
            scaling=(float(data["scaling"][0]), float(data["scaling"][1])),
            loss=data["loss"],
        )


def save_adapter(folder: str | Path, config: AdapterConfig, route: nn.Module) -> None:
    """Write `adapter.safetensors` and `adapter_config.json`, the config (which makes it whole)
    last."""
    store = LocalStore(Path(folder))
    weights = {name: p.detach().cpu().contiguous() for name, p in trainable(route).items()}
    data = save_tensors(weights)
    store.replace(WEIGHTS_NAME, data)
    body = config.to_json() | {"weights_sha256": hash_bytes(data)}
    store.replace(CONFIG_NAME, json.dumps(body, indent=1).encode())


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter's config and weights.

    Raises:
        InputError: no adapter there.
        CorruptCacheError: the weights are not those that were saved.
        UnsafeError: a config or weights that cannot be parsed.
    """
    store = LocalStore(Path(folder))
    try:
        raw, data = store.read(CONFIG_NAME), store.read(WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is no adapter: {error.filename} is missing. "
            "Point --adapter at a folder that `sherl-pipe tune` wrote."
        ) from error
    path = store.path(CONFIG_NAME)
    try:
        body = json.loads(raw)
        config = AdapterConfig.from_json(body)
        expected = body["weights_sha256"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UnsafeError(f"{path} is no adapter config: {error!r}") from error
    if hash_bytes(data) != expected:
        raise CorruptCacheError(
            explain(
                f"{store.path(WEIGHTS_NAME)}: sha256",
                expected=expected,
                found=hash_bytes(data),
                todo="Tune again.",
            )
        )
    return config, load_tensors(data)
