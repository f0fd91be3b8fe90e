"""Families of backbones: where a model type keeps its blocks, and what else a route needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from torch import nn


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its blocks.

    Attributes:
        seq2seq: whether it is an encoder-decoder whose answers are words.
        streams: by stream name, the path of the `ModuleList` of blocks.
        embeddings: paths of the modules that only token ids go through.
        lent: path in the first block of what every block of its stream uses.
    """

    seq2seq: bool
    streams: Mapping[str, str]
    embeddings: tuple[str, ...]
    lent: str | None = None

    @property
    def main(self) -> str:
        """The stream that reads the inputs."""
        return "encoder" if self.seq2seq else "hidden"

    def needs(self, weight: str, first: Mapping[str, int]) -> bool:
        """Whether states that enter the model at a block need a weight on their way out.

        Args:
            weight: its name in the model.
            first: by stream, the block that they enter at; no entry where none is run.
        """
        for stream, path in self.streams.items():
            if weight.startswith(f"{path}."):
                number, _, rest = weight.removeprefix(f"{path}.").partition(".")
                if stream not in first:
                    return False
                lent = self.lent is not None and number == "0" and rest.startswith(f"{self.lent}.")
                return lent or int(number) >= first[stream]
        return not any(weight.startswith(f"{path}.") for path in self.embeddings)


_ENCODER = Family(False, {"hidden": "encoder.layer"}, ("embeddings",))
_T5 = Family(
    True,
    {"encoder": "encoder.block", "decoder": "decoder.block"},
    ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    lent="layer.0.SelfAttention.relative_attention_bias",
)

# By the `model_type` of a Hugging Face config.
FAMILIES: dict[str, Family] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "t5": _T5,
    "mt5": _T5,
}


def family_of(config: Any) -> Family:
    """The family of a config. Raises InputError naming the known ones."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            explain(
                "model type",
                expected=f"one of {', '.join(sorted(FAMILIES))}",
                found=config.model_type,
                todo="A family is an entry in FAMILIES of stages/families.py.",
            )
        )
    return family


def blocks_of(model: nn.Module, family: Family, stream: str) -> nn.ModuleList:
    """The `ModuleList` of a stream."""
    blocks = model.get_submodule(family.streams[stream])
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{family.streams[stream]} is no ModuleList")
    return blocks
