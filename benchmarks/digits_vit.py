"""A small vision transformer on scikit-learn's digits: SHERL, DTL and others from one cache, beside
a linear probe and live full fine-tuning.

The backbone is trained here, to tell odd from even digits. Then the same images are labelled a
second time, by the digit itself, which the backbone was never told: its last state has been drawn
together to two groups, and the digit is to be found below. The images are extracted once. Rates are
chosen on a slice of the training rows, whose labels are attached to the same cache as a task of
their own; three seeds with the best of them are scored on images that the backbone has not seen::

    python benchmarks/digits_vit.py            # everything below build/digits_vit; minutes
    python benchmarks/digits_vit.py --toy      # few rows, in seconds: does it still work?
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from cached import sherl_pipe
from records import markdown, mean_sd
from training import Meter, cpu_model

WORK = Path(__file__).resolve().parent.parent / "build" / "digits_vit"
# Of 1,797 images; the last 240 training images are where rates are chosen.
TRAIN, HELD_OUT = 1200, 240
SEEDS = (0, 1, 2)
BATCH_SIZE = 32
PUBLISHED = "sherl --preset paper"
RATES = {
    "sherl": (3e-4, 1e-3, 3e-3, 1e-2),
    PUBLISHED: (1e-2, 3e-2, 1e-1),
    "lst": (3e-3, 6e-3, 1.2e-2),
    "dtl": (1e-2, 3e-2, 1e-1),
    "dtl+": (1e-2, 3e-2, 1e-1),
    "unipt": (3e-3, 6e-3, 1.2e-2),
    "weighted": (1e-2, 3e-2, 1e-1),
    "linear": (1e-2, 3e-2, 1e-1),
    "full": (3e-4, 1e-3, 3e-3),
}
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Digits:
    """The images as the model reads them.

    Attributes:
        pixels: `[1797, 3, 8, 8]`.
        digits: `[1797]`.
        train, held_out, validation: rows.
    """

    pixels: Tensor
    digits: Tensor
    train: Tensor
    held_out: Tensor
    validation: Tensor


def write_images(folder: Path, rows: int) -> list[Path]:
    """The first `rows` images of a seeded shuffle as `<folder>/digit/<split>/<class>/*.png`, in the
    order of the shuffle; the first two thirds are for training."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[:rows]
    files = []
    for number, place in enumerate(order):
        role = "train" if number < rows * TRAIN // len(data.target) else "validation"
        file = folder / "digit" / role / str(data.target[place]) / f"{number:04}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.round(data.images[place] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(file)
        files.append(file)
    return files


def read(model: Path, files: Sequence[Path]) -> Digits:
    """The images through the image processor that belongs to the model."""
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    images = [Image.open(file) for file in files]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    rows = torch.arange(len(files))
    ends = sum(file.parent.parent.name == "train" for file in files)
    begins = ends - HELD_OUT * len(files) // 1797
    digits = torch.tensor([int(file.parent.name) for file in files])
    return Digits(pixels, digits, rows[:begins], rows[begins:ends], rows[ends:])


class Classifier(nn.Module):
    """A vision transformer and a linear layer on the mean of its patches."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, classes)

    def pooled(self, pixels: Tensor) -> Tensor:
        """`[B, d]` of the last layer, behind the final norm."""
        states: Tensor = self.backbone(pixel_values=pixels).last_hidden_state
        return states[:, 1:].mean(1)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.head(self.pooled(pixels))
        return out


def train(
    model: Classifier, pixels: Tensor, labels: Tensor, *, lr: float, epochs: int, seed: int
) -> float:
    """Train all weights; seconds an epoch. AdamW, warm-up over a tenth of the steps, then linearly
    down, clipping at 1.0: as `sherl-pipe tune` does."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    total = epochs * -(-len(labels) // BATCH_SIZE)
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / max(1, total - warm))
    )
    model.train()
    begun = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.from_numpy(rng.permutation(len(labels))).split(BATCH_SIZE):
            loss = functional.cross_entropy(model(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    return (time.perf_counter() - begun) / epochs


def accuracy(model: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """In per cent."""
    with torch.inference_mode():
        right = model(pixels).argmax(-1) == labels
    return 100 * float(right.float().mean())


def make_backbone(folder: Path, files: Sequence[Path], epochs: int) -> str:
    """Train the backbone on odd and even, unless it is there; a line about it."""
    note = folder / "note.txt"
    if note.exists():
        return note.read_text()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
    )
    model = Classifier(ViTModel(config, add_pooling_layer=False), 2)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    data = read(folder, files)
    seen = torch.cat([data.train, data.held_out])
    begun = time.perf_counter()
    train(model, data.pixels[seen], data.digits[seen] % 2, lr=1e-3, epochs=epochs, seed=0)
    seconds = time.perf_counter() - begun
    found = accuracy(model, data.pixels[data.validation], data.digits[data.validation] % 2)
    model.backbone.save_pretrained(folder)
    parameters = sum(each.numel() for each in model.backbone.parameters())
    text = (
        f"Backbone: {parameters:,} parameters, {epochs} epochs ({seconds:.0f} s) on odd "
        f"and even, {found:.1f} % right on the validation images."
    )
    note.write_text(text)
    return text


def full(model: Path, files: Sequence[Path], epochs: int, threads: int) -> dict[str, Any]:
    """Live full fine-tuning: the rate of the held-out slice, then three seeds."""
    torch.set_num_threads(threads)
    data = read(model, files)

    def run(rows: Tensor, scored: Tensor, lr: float, seed: int) -> tuple[float, float, int]:
        torch.manual_seed(seed)
        tuned = Classifier(AutoModel.from_pretrained(model, add_pooling_layer=False), 10)
        seconds = train(
            tuned, data.pixels[rows], data.digits[rows], lr=lr, epochs=epochs, seed=seed
        )
        found = accuracy(tuned, data.pixels[scored], data.digits[scored])
        return found, seconds, sum(each.numel() for each in tuned.parameters())

    meter = Meter()
    run(data.train, data.held_out, RATES["full"][0], 0)
    meter.stop()
    best = max(RATES["full"], key=lambda lr: run(data.train, data.held_out, lr, 0)[0])
    seen = torch.cat([data.train, data.held_out])
    runs = [run(seen, data.validation, best, seed) for seed in SEEDS]
    return {
        "lr": best,
        "scores": [score for score, _, _ in runs],
        "seconds": statistics.median(seconds for _, seconds, _ in runs),
        "trainable": runs[0][2],
        "peak": meter.peak_rss_mib,
    }


def probe(model: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Logistic regression on the frozen last layer; its penalty is that of the held-out slice."""
    data = read(model, files)
    frozen = Classifier(AutoModel.from_pretrained(model, add_pooling_layer=False), 10).eval()
    with torch.inference_mode():
        features = frozen.pooled(data.pixels).double().numpy()
    digits = data.digits.numpy()

    def score(rows: Tensor, scored: Tensor, strength: float) -> float:
        fitted = LogisticRegression(C=strength, max_iter=5000).fit(features[rows], digits[rows])
        return 100 * float(fitted.score(features[scored], digits[scored]))

    best = max(PENALTIES, key=lambda each: score(data.train, data.held_out, each))
    seen = torch.cat([data.train, data.held_out])
    trainable = features.shape[1] * 10 + 10
    found = score(seen, data.validation, best)
    return {"lr": None, "scores": [found], "seconds": None, "trainable": trainable, "peak": None}


def extract(model: Path, data: Path, cache: Path, files: Sequence[Path]) -> float:
    """The cache of all images, and the labels of the slice; seconds of the command."""
    begun = time.perf_counter()
    sherl_pipe(
        ["extract", "--model", str(model), "--data", str(data), "--cache", str(cache),
         "--taps", "all"]
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    ends = sum(file.parent.parent.name == "train" for file in files)
    begins = ends - HELD_OUT * len(files) // 1797
    named = []
    for role, part in (("train", files[:begins]), ("validation", files[begins:ends])):
        table = cache.parent / "slice" / f"{role}.csv"
        table.parent.mkdir(exist_ok=True)
        with table.open("w", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(["image", "label"])
            rows.writerows([str(file), file.parent.name] for file in part)
        named += ["--file", str(table)]
    sherl_pipe(["label", "--cache", str(cache), "--task", "slice", "--partial", *named])
    return seconds


def tuned(cache: Path, out: Path, method: str, epochs: int) -> dict[str, Any]:
    """A method from the cache: the rate of the held-out slice, then three seeds."""
    fixed = ["tune", "--cache", str(cache), "--out", str(out), "--method", *method.split()]
    fixed += ["--epochs", str(epochs), "--batch-size", str(BATCH_SIZE), "--json"]
    rates = [part for lr in RATES[method] for part in ("--lr", str(lr))]
    tried = json.loads(sherl_pipe([*fixed, "--task", "slice", *rates]))
    best = max(tried, key=lambda each: float(each["score"]))["lr"]
    seeds = [part for seed in SEEDS for part in ("--seed", str(seed))]
    # One after another: what they cost is compared with runs that are alone.
    final = [*fixed, "--task", "digit", "--lr", str(best), *seeds, "--together", "1"]
    runs = json.loads(sherl_pipe(final))
    return {
        "lr": best,
        "scores": [each["score"] for each in runs],
        "seconds": statistics.median(each["seconds_per_epoch"] for each in runs),
        "trainable": runs[0]["trainable"],
        "peak": max(each["peak_mib"] for each in runs),
    }


def line(name: str, found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        name,
        mean_sd(found["scores"]),
        "–" if found["lr"] is None else f"{found['lr']:g}",
        f"{found['trainable']:,}",
        "–" if found["seconds"] is None else f"{found['seconds']:.2f}",
        "–" if found["peak"] is None else f"{found['peak']:.0f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="of every tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=[name for name in RATES if name != "full"])
    parser.add_argument("--toy", action="store_true", help="300 images, one epoch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows, trained, epochs = (300, 1, 1) if options.toy else (1797, 20, options.epochs)
    work = WORK / f"{rows}-{epochs}"
    data, model, cache = work / "images", work / f"model-{trained}", work / "cache"
    files = write_images(data, rows)
    print(make_backbone(model, files, trained), file=sys.stderr)
    seconds = extract(model, data, cache, files)
    lines = [line("linear probe of the last layer, live", probe(model, files))]
    for method in options.methods:
        lines.append(line(f"`{method}`, cached", tuned(cache, work / "runs", method, epochs)))
        print(lines[-1], file=sys.stderr)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        job = pool.submit(full, model, files, epochs, options.threads)
        lines.append(line("full fine-tuning, live", job.result()))
    print(make_backbone(model, files, trained))
    print(f"Extraction of {rows:,} images: {seconds:.0f} s, the start of the process included.")
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}.\n")
    header = ["method", "accuracy %", "lr", "trainable", "s/epoch", "peak MiB"]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
