"""Families of backbones: where a model type keeps its blocks, and what else a route needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from torch import nn


@dataclass(frozen=True)
class Side:
    """How LST's side blocks are made of a family's own config.

    Attributes:
        feed_forward: its key for the inner width of a block; four times the width where it is None.
        dropout: its key for the rate on the embedding; no dropout without one.
        step: widths of heads are multiples of it; rotary positions take two numbers at a time.
    """

    feed_forward: str = "intermediate_size"
    dropout: str | None = "hidden_dropout_prob"
    step: int = 1


@dataclass(frozen=True)
class Tower:
    """One of the stacks whose embeddings are compared with one another.

    Attributes:
        model: path of the module that runs it alone.
        norm: path of the norm behind the last block.
        projection: path of what makes the embedding of one token's normed state.
        images: whether it takes `pixel_values`, and its embedding is that of the first token. The
            other takes `input_ids`, and its embedding is that of the token that ends a text.
    """

    model: str
    norm: str
    projection: str
    images: bool = False


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its blocks, and what a route has to know beside that.

    `docs/families.md` says how to find these out for another model.

    Attributes:
        streams: by stream name, the path of the `ModuleList` of blocks. The names are `encoder` and
            `decoder`, `text` and `image`, or `hidden` for the only stack.
        embeddings: paths of the modules that only token ids, or their positions, go through.
        seq2seq: whether it is an encoder-decoder whose answers are words.
        causal: whether a state depends on no token behind it.
        lent: path in the first block of what every block of its stream uses.
        once: paths of modules that act behind the first block and nowhere else.
        computed: paths of modules that hold no weights but tables that the config gives.
        positions: path of the table of learned positions, which bounds the length of inputs.
        images: whether inputs are images, which the model takes as `pixel_values`; its
            embeddings take nothing else then.
        front: tokens of an image in front of those of its patches.
        places: of an encoder-decoder with learned positions in both stacks, the path of their table
            inside a stack.
        norm: of an encoder-decoder, the path inside a stack of the norm behind its last block; None
            where blocks end with a norm of their own.
        entry: path inside a stack of what acts between its embeddings and the first block.
        numbered: whether `position_ids`, from 0 at an example's first token, tell it where tokens
            are; padding in front would move them else.
        arguments: for the model's class.
        side: for LST; None where there are no side blocks.
        towers: by stream, of a dual encoder; empty for all others.
    """

    streams: Mapping[str, str]
    embeddings: tuple[str, ...]
    seq2seq: bool = False
    causal: bool = False
    lent: str | None = None
    once: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    positions: str | None = None
    places: str | None = None
    norm: str | None = None
    entry: str | None = None
    numbered: bool = False
    images: bool = False
    front: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    side: Side | None = None
    towers: Mapping[str, Tower] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The stream that reads the inputs, of a family without towers."""
        return "encoder" if self.seq2seq else "hidden"

    @property
    def pool(self) -> str:
        """What a pooled head reads by default: of causal states the last has seen everything."""
        return "last" if self.causal else "mean"

    @property
    def joined(self) -> bool:
        """Whether the columns of a row are one text, there being no second segment."""
        return self.seq2seq or self.causal

    def needs(self, weight: str, first: Mapping[str, int]) -> bool:
        """Whether states that enter the model at a block need a weight or a table on their way out.

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
        passed = (*self.embeddings, *(self.once if 0 not in first.values() else ()))
        return not any(weight.startswith(f"{path}.") for path in passed)


# A pooler would be random where the checkpoint has none; no tap depends on it.
_POOLER = {"add_pooling_layer": False}
_BERT = Family(
    {"hidden": "encoder.layer"},
    ("embeddings",),
    positions="embeddings.position_embeddings",
    numbered=True,
    arguments=_POOLER,
    side=Side(),
)
# They number tokens from behind the padding's id, by the ids themselves.
_ROBERTA = replace(_BERT, numbered=False)
_LLAMA = Family(
    {"hidden": "layers"},
    ("embed_tokens",),
    causal=True,
    computed=("rotary_emb",),
    numbered=True,
    side=Side(dropout=None, step=2),
)
# The class token stands in front; positions are part of the embeddings.
_VIT = Family(
    {"hidden": "layers"}, ("embeddings",), images=True, front=1, arguments=_POOLER, side=Side()
)
_T5 = Family(
    {"encoder": "encoder.block", "decoder": "decoder.block"},
    ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    seq2seq=True,
    lent="layer.0.SelfAttention.relative_attention_bias",
    norm="final_layer_norm",
    side=Side("d_ff", "dropout_rate"),
)
_BART = Family(
    {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
    (
        "model.shared",
        *(
            f"model.{stream}.{part}"
            for stream in ("encoder", "decoder")
            for part in ("embed_tokens", "embed_positions", "layernorm_embedding")
        ),
    ),
    seq2seq=True,
    positions="model.encoder.embed_positions",
    places="embed_positions",
    entry="layernorm_embedding",
    side=Side("", "dropout"),
)

_CLIP = Family(
    {"text": "text_model.encoder.layers", "image": "vision_model.encoder.layers"},
    ("vision_model.embeddings", "vision_model.pre_layrnorm", "text_model.embeddings"),
    positions="text_model.embeddings.position_embedding",
    numbered=True,
    towers={
        "text": Tower("text_model", "text_model.final_layer_norm", "text_projection"),
        "image": Tower("vision_model", "vision_model.post_layernorm", "visual_projection", True),
    },
)

# By the `model_type` of a Hugging Face config.
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": replace(
        _BERT,
        streams={"hidden": "transformer.layer"},
        arguments={},
        side=Side("hidden_dim", "dropout"),
    ),
    "electra": replace(_BERT, embeddings=("embeddings", "embeddings_project"), arguments={}),
    "mpnet": _ROBERTA,
    "deberta-v2": replace(_BERT, once=("encoder.conv",), arguments={}),
    "modernbert": Family(
        {"hidden": "layers"},
        ("embeddings",),
        computed=("rotary_emb",),
        numbered=True,
        side=Side(dropout="embedding_dropout", step=2),
    ),
    "gpt2": Family(
        {"hidden": "h"},
        ("wte", "wpe"),
        causal=True,
        positions="wpe",
        numbered=True,
        side=Side("n_inner", "embd_pdrop"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "t5": _T5,
    "mt5": _T5,
    "vit": _VIT,
    "clip": _CLIP,
    "deit": replace(_VIT, front=2),  # of which one is for distillation
    "dinov2": replace(
        _VIT,
        streams={"hidden": "encoder.layer"},
        arguments={},
        side=None,
    ),
    "bart": _BART,
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
                todo="A family is a few lines in a table; docs/families.md says how to add one.",
            )
        )
    return family


def blocks_of(model: nn.Module, family: Family, stream: str) -> nn.ModuleList:
    """The `ModuleList` of a stream."""
    blocks = model.get_submodule(family.streams[stream])
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{family.streams[stream]} is no ModuleList")
    return blocks


def stack_of(model: nn.Module, family: Family, stream: str) -> Any:
    """The module that a stream of an encoder-decoder is: embeddings, blocks and norm."""
    return model.get_submodule(family.streams[stream].rpartition(".")[0])


def norm_of(model: nn.Module, family: Family, stream: str) -> nn.Module:
    """What stands behind a stack's last block: its final norm, or nothing that changes a state."""
    if family.norm is None:
        return nn.Identity()
    norm: nn.Module = stack_of(model, family, stream).get_submodule(family.norm)
    return norm
