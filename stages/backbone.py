"""Hugging Face models as frozen backbones: families, loading, fingerprints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.cache import InputError, StaleCacheError, UnsafeError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.stages.families import blocks_of, family_of
from sherl_pipe.stages.weights import weights_fingerprint
from torch import nn

DEMO_MODEL = "demo"

# Keys of a config that do not change what the weights compute.
_IDLE_CONFIG = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "task_specific_params",
    "id2label",
    "label2id",
    "_attn_implementation",
}


class Backbone:
    """A frozen model in eval mode, with what the cache needs to know of it.

    Attributes:
        model: the Hugging Face module; no parameter requires a gradient.
        family: its entry in `FAMILIES`.
        name: as it was asked for.
        revision: the hub's commit, None for a local folder.
        home: of a backbone that may have none of its weights, the device that they belong on.
        language: of a causal model that speaks, the whole with its head; `model` is its body.
        words: what is there of the output head where only some of its rows are (see `load_part`).
    """

    words: nn.Module | None = None
    language: nn.Module | None = None

    def __init__(self, model: Any, name: str = "model", revision: str | None = None) -> None:
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.name, self.revision = name, revision
        self.home: torch.device | None = None
        self.config: Any = model.config
        self.family = family_of(self.config)
        if not self.family.seq2seq:
            self.config.use_cache = False  # nothing is generated
        else:
            # T5 starts from its padding token; a config made by hand often does not say so.
            generation: Any = getattr(model, "generation_config", None)
            for config in (self.config, generation):
                if config is not None and getattr(config, "decoder_start_token_id", None) is None:
                    config.decoder_start_token_id = self.config.pad_token_id

    @property
    def width(self) -> int:
        """Of the states; of a dual encoder that of the embeddings."""
        if self.family.towers:
            return int(self.config.projection_dim)
        width = getattr(self.config, "d_model", None) or self.config.hidden_size
        return int(width)

    def width_of(self, stream: str) -> int:
        """Of a stream's states."""
        tower = self.family.towers.get(stream)
        if tower is None:
            return self.width
        norm: Any = self.model.get_submodule(tower.norm)
        return int(norm.weight.shape[0])

    @property
    def start(self) -> int:
        """Token id that decoding starts from; text-to-text backbones only."""
        return int(self.config.decoder_start_token_id)

    @property
    def device(self) -> torch.device:
        """Where its weights are, or would be; `meta` if neither is known."""
        places = (parameter.device for parameter in self.model.parameters())
        meta = torch.device("meta")
        return next((place for place in places if place != meta), self.home or meta)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def whole(self) -> bool:
        """Whether all its weights are there; `load_part` leaves some out."""
        return not any(parameter.is_meta for parameter in self.model.parameters())

    def blocks(self, stream: str) -> nn.ModuleList:
        """The blocks of a stream, in order."""
        return blocks_of(self.model, self.family, stream)

    @cached_property
    def parameters(self) -> int:
        """Number of weights; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def config_hash(self) -> str:
        """Hash of the config fields that change what the weights compute."""
        return hash_json(_computing(self.config.to_dict()))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every weight: name, type, shape and bytes."""
        return weights_fingerprint(self.model)

    def require(self, expected: Mapping[str, Any], where: str) -> None:
        """Raise StaleCacheError unless this is the backbone that `where` was made with.

        Args:
            expected: its `name`, `fingerprint` and `config`.
            where: the cache or adapter, for the message.
        """
        for field, found in (("fingerprint", self.fingerprint), ("config", self.config_hash)):
            if expected[field] != found:
                raise StaleCacheError(
                    explain(
                        f"{where}: backbone {field}",
                        expected=f"{expected[field]} ({expected['name']})",
                        found=f"{found} ({self.name})",
                        todo="Give --model the backbone that it was made with.",
                    )
                )

    def cast(self, dtype: torch.dtype) -> Backbone:
        """This backbone, or a copy of it in another dtype."""
        if dtype == self.dtype:
            return self
        twin = Backbone(copy.deepcopy(self.model), self.name, self.revision)
        _cast(twin.model, dtype)
        twin.language = self.language
        twin.__dict__["fingerprint"] = self.fingerprint  # of the weights before they are rounded
        return twin


def _computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of the configs in it, that are not idle."""
    return {
        key: _computing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _IDLE_CONFIG
    }


def resolve_model(name: str) -> str:
    """`demo` is the embedded backbone; anything else is a folder or a hub id."""
    if name == DEMO_MODEL and not Path(name).exists():
        return str(files("sherl_pipe.stages.demo") / "model")
    return name


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    head: bool = False,
) -> Backbone:
    """Load a frozen backbone from a folder or the hub.

    With `head` a causal model brings its language-model head, as `Backbone.language`.

    Weights come from safetensors files only and no code of a repository is run.

    Raises:
        InputError: not found, hub unreachable, unknown family, or weights that are missing.
        UnsafeError: only pickled weights, or a model that needs its own code.
    """
    loader, config, extra = model_class(name, revision)
    if speaks := head and family_of(config).causal:
        loader = _causal_class()
    with loading_errors(name, "model"):
        model, report = loader.from_pretrained(
            resolve_model(name),
            revision=revision or "main",
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise InputError(
            explain(
                f"weights of {name}",
                expected="every weight of the model",
                found=f"{len(wrong)} missing or of another shape, such as {wrong[0]}",
                todo="Use a complete checkpoint.",
            )
        )
    body = model.base_model if speaks else model
    backbone = Backbone(body, name, getattr(model.config, "_commit_hash", None))
    if speaks:
        backbone.language = model.eval().requires_grad_(False)
    _ = backbone.fingerprint  # of the weights as loaded, before a cast rounds them
    _cast(model.to(device), dtype)
    return backbone


def _causal_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of the weights, and not of tables that are computed, such as angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def model_class(name: str, revision: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """The Auto class that loads a model, the model's config, and arguments of the model's own.

    Raises InputError, UnsafeError as `load_backbone`.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Loading reports go to stderr unasked; what is missing is checked by the caller.
    logging.set_verbosity_error()
    with loading_errors(name, "config"):
        config = AutoConfig.from_pretrained(
            resolve_model(name), revision=revision or "main", trust_remote_code=False
        )
    family = family_of(config)
    return AutoModelForSeq2SeqLM if family.seq2seq else AutoModel, config, dict(family.arguments)


class loading_errors:  # noqa: N801 - reads as a statement: `with loading_errors(...)`
    """Turns what Hugging Face raises while loading into one message with a remedy."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        expected = OSError, ValueError, KeyError, ImportError, SafetensorError
        if error is None or not isinstance(error, expected):
            return
        text = " ".join(str(error).split())
        if isinstance(error, SafetensorError):
            raise InputError(
                f"cannot load the {self.what} of {self.name!r}: its safetensors file is damaged "
                f"({text[:200]}). Copy or download it again."
            ) from error
        if "trust_remote_code" in text or "custom code" in text:
            raise UnsafeError(
                f"{self.name} needs code from its own repository, which is never run. "
                "Use a model of a family that transformers has."
            ) from error
        if "safetensors" in text and "does not appear" in text:
            raise UnsafeError(
                f"{self.name} has no safetensors weights, and pickled ones are never read. "
                "Convert it: model.save_pretrained(folder) writes safetensors."
            ) from error
        raise InputError(
            f"cannot load the {self.what} of {self.name!r}: it is no folder with one, and the "
            f"hub did not give it ({text[:200]}). Check the name, or point --model at a local "
            "folder that has config.json, model.safetensors and the files of its tokenizer or "
            "image processor."
        ) from error
