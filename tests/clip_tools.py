"""Tiny CLIPs with their processors, and drawn shapes with captions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from cli_tools import write_rows
from model_tools import make_tokenizer
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

COLOURS = ("red", "green", "blue", "white")
SHAPES = ("circle", "square", "bar")
_WORDS = ["a", "the", "one", "big", "small", "very", *COLOURS, *SHAPES]
SIDE = 12


def save_clip(folder: Path, seed: int = 0, *, old: bool = False, **text: Any) -> str:
    """A random CLIP whose towers differ in width and depth; the folder's path. The config of an
    old one does not name the end token, which has the largest number."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("clip-old" if old else "clip", _WORDS)
    text |= {"eos_token_id": 2} if old else {}
    shape = {"num_attention_heads": 4, "intermediate_size": 48}
    config = CLIPConfig(
        text_config={
            **shape,
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "bos_token_id": 3,
            "eos_token_id": 1,
            **text,
        },
        vision_config={
            **shape,
            "hidden_size": 36,
            "num_hidden_layers": 2,
            "image_size": SIDE,
            "patch_size": 4,
        },
        projection_dim=20,
    )
    model: Any = CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random norms and biases too, so that nothing is the identity by accident.
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor: Any = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor.save_pretrained(folder)
    return str(folder)


def draw(colour: str, shape: str, seed: int) -> Image.Image:
    """A shape on black, a little elsewhere for every seed."""
    rng = random.Random(seed)
    image = Image.new("RGB", (18, 16))
    left, top = rng.randrange(2, 5), rng.randrange(1, 4)
    pen = ImageDraw.Draw(image)
    box = (left, top, left + 11, top + 11)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.rectangle((left, top + 5, left + 11, top + 7), fill=colour)
    image.putpixel((0, 0), (seed % 256, seed // 256, 0))  # all are different
    return image


def write_pairs(folder: Path, copies: int = 6) -> Path:
    """`<folder>/shapes/<split>.jsonl` and the images. Training images show every colour and shape
    `copies` times, with two captions each, of several lengths; held-out images one of each with
    one."""
    numbers = iter(range(10_000))
    for role, many in (("train", copies), ("validation", 1)):
        rows = []
        for _ in range(many):
            for colour in COLOURS:
                for shape in SHAPES:
                    number = next(numbers)
                    file = folder / "images" / f"{number}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    draw(colour, shape, number).save(file)
                    named = f"../images/{number}.png"
                    very = "very " * (number % 3)
                    captions = [f"a {colour} {shape}", f"the {very}big {colour} {shape}"]
                    texts = captions if role == "train" else [captions[number % 2]]
                    rows += [{"image": named, "caption": text} for text in texts]
        write_rows(folder / "shapes" / f"{role}.jsonl", rows)
    return folder
