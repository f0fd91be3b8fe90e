"""Tiny backbones of every family with a tokenizer, and tiny data sets, made on the spot."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

_TEXT = (
    "a an the cat dog bird sees likes hates big small red old and or not very 0 1 2 3 4 5 . : "
    "sentence sentence1 sentence2 colour mood size mixed good bad"
)
WORDS = _TEXT.split()
SEQ2SEQ = ("t5", "t5-gated", "bart")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert")
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
VISION = ("vit", "deit", "dinov2")
FAMILIES = (*SEQ2SEQ, *ENCODERS, *CAUSAL)

_BART = {"layers": 5, "attention_heads": 4, "ffn_dim": 48}
# What the config of a family has beside, or instead of, what all have.
_OWN: dict[str, dict[str, Any]] = {
    "bert": {"add_pooling_layer": False},
    "roberta": {"add_pooling_layer": False},
    "mpnet": {"add_pooling_layer": False, "pad_token_id": 1},
    "distilbert": {"hidden_dim": 48},
    # Embeddings that are narrower than the blocks, as its small model has them.
    "electra": {"embedding_size": 24},
    # Blocks that look at a window of tokens among others, with rotary positions of their own.
    "modernbert": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "local_attention": 8,
        "hidden_size": 32,
    },
    "gpt2": {"pad_token_id": None},
    # Fewer keys than queries; heads that are wider than a fourth of the states.
    "llama": {"num_key_value_heads": 2, "head_dim": 12, "pad_token_id": None},
    "mistral": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5},
    "qwen2": {
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    # Relative positions in buckets, and a convolution behind the first block.
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 6,
        "max_relative_positions": 16,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "type_vocab_size": 0,
    },
}


def save_model(folder: Path, family: str, seed: int = 0) -> str:
    """A random model of `family` with its tokenizer or image processor; the folder's path."""
    torch.manual_seed(seed)
    tokenizer = _processor(family) if family in VISION else make_tokenizer(family)
    model = _vision(family) if family in VISION else _model(family, len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            # Random norms and biases too, so that nothing is the identity by accident.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _model(family: str, vocabulary: int) -> Any:
    if family.startswith("t5"):
        gated = family == "t5-gated"
        config = T5Config(
            vocab_size=vocabulary,
            d_model=36,
            d_kv=8,
            d_ff=48,
            num_layers=5,
            num_decoder_layers=4 if gated else 5,
            num_heads=4,
            feed_forward_proj="gated-gelu" if gated else "relu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            dropout_rate=0.1,
        )
        model = T5ForConditionalGeneration(config)
        if gated:
            # An untied head, as T5 1.1 has it.
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, 36))
        return model
    if family == "bart":
        shape = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in _BART.items()}
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=vocabulary,
                d_model=36,
                max_position_embeddings=64,
                scale_embedding=True,
                pad_token_id=0,
                bos_token_id=3,
                eos_token_id=1,
                decoder_start_token_id=1,
                forced_bos_token_id=None,
                forced_eos_token_id=1,
                **shape,
            )
        )
        model.final_logits_bias.copy_(0.3 * torch.randn(1, vocabulary))
        return model
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 36,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    own = dict(_OWN.get(family, {}))
    pooler = {name: own.pop(name) for name in ("add_pooling_layer",) if name in own}
    return AutoModel.from_config(AutoConfig.for_model(family, **shape | own), **pooler)


def _vision(family: str) -> Any:
    """A model of images of 12 x 8 pixels: a grid of 3 x 2 patches. Those of DINOv2 are 12 x 12, its
    positions those of a larger square, as its checkpoints have them."""
    shape = {
        "hidden_size": 36,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 20 if family == "dinov2" else [12, 8],
        "patch_size": 4,
    }
    pooler = {} if family == "dinov2" else {"add_pooling_layer": False}
    return AutoModel.from_config(AutoConfig.for_model(family, **shape), **pooler)


def _processor(family: str) -> Any:
    """Shrinks, or for DINOv2 shrinks and crops, images of any size to those of the model."""
    if family == "dinov2":
        return BitImageProcessorPil(
            size={"shortest_edge": 13}, crop_size={"height": 12, "width": 12}, do_center_crop=True
        )
    return ViTImageProcessorPil(size={"height": 12, "width": 8})


def make_tokenizer(family: str, words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    if family == "qwen2":  # it is loaded as this class, whatever is saved
        return _byte_level(special, words)
    if family == "mpnet":  # its padding is 1, whatever its config says
        special = ["<s>", "<pad>", "</s>", "<unk>"]
    ordered = [*special, *words]
    if family == "clip-old":
        ordered.append(ordered.pop(special.index("</s>")))
    vocabulary = {word: number for number, word in enumerate(ordered)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    ends = [(word, vocabulary[word]) for word in ("</s>", "<s>")]
    if family.startswith("t5"):
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A $B </s>", special_tokens=ends
        )
    elif family not in CAUSAL:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
        )
    kinds = ["input_ids", "attention_mask"] + (
        ["token_type_ids"] if family in ("bert", "electra") else []
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=kinds,
    )


def _byte_level(special: list[str], words: list[str]) -> Qwen2Tokenizer:
    """Merges that make one token of every word, at the start of a text and behind a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    backend.train_from_iterator([text for word in words for text in (word, f" {word}")], trainer)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct ragged sentences of 1 to 14 words."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS[:17]) for _ in range(rng.randint(1, 14)))] = None
    return list(found)


def labels_of(task: str, text: str) -> int | float:
    """A labelling that the words decide, so that it can be learned."""
    words = text.split()
    if task == "colour":
        return int("red" in words)
    if task == "mood":
        return (words.count("likes") - words.count("hates") > 0) + (len(words) > 7)
    return float(min(5, len(words) // 3))  # size: graded


def picture(number: int) -> Image.Image:
    """A small image of noise with a bright upper or lower half; odd numbers are bright above."""
    rng = np.random.default_rng(number)
    high, wide = rng.integers(12, 20, size=2)
    pixels = rng.integers(0, 120, size=(high, wide, 3), dtype=np.uint8)
    half = slice(None, high // 2) if number % 2 else slice(high // 2, None)
    pixels[half] += 120
    return Image.fromarray(pixels)


def write_images(
    folder: Path, tasks: tuple[str, ...] = ("colour",), train: int = 40, validation: int = 20
) -> Path:
    """`<folder>/<task>/<split>/<class>/<number>.png`, the same images in every task."""
    for task, number in product(tasks, range(train + validation)):
        role = "train" if number < train else "validation"
        file = folder / task / role / ("above" if number % 2 else "below") / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    return folder


def write_data(
    folder: Path, tasks: tuple[str, ...] = ("colour",), train: int = 40, validation: int = 20
) -> Path:
    """`<folder>/<task>/<split>.jsonl`, the same sentences in every task."""
    texts = sentences(train + validation)
    for task in tasks:
        for role, part in (("train", texts[:train]), ("validation", texts[train:])):
            file = folder / task / f"{role}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"sentence": text, "label": labels_of(task, text)} for text in part]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
