"""Pre-trains the demo's T5 on text of the demo grammar: ``python -m ... --out FOLDER``.

Everything follows from the seed: text, vocabulary, noise and weights.  One thread is used, so
that the sums of a machine come out in the same order every time.
"""

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.stages.demo.grammar import pretraining_text
from sherl_pipe.stages.demo.objectives import Losses, Objectives
from sherl_pipe.stages.demo.probe import probe
from sherl_pipe.stages.demo.vocabulary import build_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

SEED = 20240
_REPORT = 200


@dataclass(frozen=True)
class Settings:
    """What the published weights were made with."""

    sentences: int = 60_000
    steps: int = 2_400
    batch: int = 64
    rate: float = 0.03
    warm_up: int = 100
    prefix_share: float = 0.5
    seed: int = SEED
    sizes: dict[str, int] = field(
        default_factory=lambda: {
            "d_model": 96,
            "d_kv": 16,
            "num_heads": 4,
            "d_ff": 192,
            "num_layers": 6,
            "num_decoder_layers": 6,
        }
    )


def rate_factor(step: int, warm_up: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to nothing."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def pretrain(folder: Path, settings: Settings) -> None:
    """Train tokenizer and model and save both to ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    lines = pretraining_text(settings.sentences, settings.seed)
    tokenizer = build_tokenizer(lines)
    shape: dict[str, Any] = {**settings.sizes, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **shape)
    model = T5ForConditionalGeneration(config)
    rng = random.Random(settings.seed)
    _train(
        Objectives(model, tokenizer, lines, settings.batch, settings.prefix_share, rng), settings
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(objectives: Objectives, settings: Settings) -> None:
    # Adafactor scales its steps by the size of each matrix, which T5's unlike scales need.
    optimizer = torch.optim.Adafactor(objectives.parameters(), lr=settings.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, settings.warm_up, settings.steps)
    )
    objectives.train()
    started = time.monotonic()
    recent: list[Losses] = []
    for step in range(1, settings.steps + 1):
        losses: Losses = objectives()
        (losses.spans + losses.foresight + losses.faults).backward()
        torch.nn.utils.clip_grad_norm_(objectives.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(Losses(*(each.detach() for each in vars(losses).values())))
        if step % _REPORT == 0 or step == settings.steps:
            _report(step, recent, time.monotonic() - started)
            recent.clear()


def _report(step: int, recent: list[Losses], seconds: float) -> None:
    means = "  ".join(
        f"{name} {sum(float(getattr(each, name)) for each in recent) / len(recent):.3f}"
        for name in vars(recent[0])
    )
    sys.stderr.write(f"step {step:5d}  {means}  {seconds:.0f} s\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line: train to a folder, or probe what is there."""
    parser = argparse.ArgumentParser(
        prog="python -m sherl_pipe.stages.demo.pretrain",
        description="Pre-train the demo's tiny T5.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--probe",
        action="store_true",
        help="do not train: print linear probes of the model in --out",
    )
    options = parser.parse_args(arguments)
    if options.probe:
        for task, (figure, baseline) in probe(options.out).items():
            sys.stdout.write(f"{task:14s} {figure:.3f}  (baseline {baseline:.3f})\n")
        return 0
    pretrain(options.out, Settings(steps=options.steps, seed=options.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
