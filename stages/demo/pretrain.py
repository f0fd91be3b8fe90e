"""Pre-trains the demo's T5 on text of the demo grammar: ``python -m ... --out FOLDER``.

Everything follows from the seed: text, vocabulary, noise and weights.  One thread is used, so
that the sums of a machine come out in the same order every time.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.stages.demo.grammar import pretraining_text
from sherl_pipe.stages.demo.lexicon import TASKS
from sherl_pipe.stages.demo.noise import Pair, look_alikes, repair, span_corruption
from sherl_pipe.stages.demo.probe import probe
from sherl_pipe.stages.demo.vocabulary import SENTINELS, build_tokenizer, whole_words
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SEED = 20240
_IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """What the published weights were made with."""

    sentences: int = 60_000
    steps: int = 5_000
    batch: int = 64
    rate: float = 2e-3
    warm_up: int = 300
    repair_share: float = 0.4
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


class Batches:
    """Endless batches of noisy sentences, of similar length each."""

    _POOL = 16

    def __init__(
        self, settings: Settings, tokenizer: PreTrainedTokenizerFast, lines: list[str]
    ) -> None:
        self.settings = settings
        self.rng = random.Random(settings.seed)
        self.sentences: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"]
        self.prefixes: list[list[int]] = tokenizer(
            [f"{task} sentence:" for task in TASKS], add_special_tokens=False
        )["input_ids"]
        ids: Any = tokenizer.convert_tokens_to_ids(list(SENTINELS))
        self.sentinels: list[int] = ids
        self.alike = look_alikes(whole_words(tokenizer))
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = self.settings.batch
        while True:
            pool = [self.pair(self.rng.choice(self.sentences)) for _ in range(size * self._POOL)]
            pool.sort(key=lambda pair: (len(pair[0]) + 2 * len(pair[1]), pair))
            chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
            self.rng.shuffle(chunks)
            yield from map(self.collate, chunks)

    def pair(self, ids: list[int]) -> Pair:
        """One sentence under one of the two objectives, with or without a task's prefix."""
        if self.rng.random() < self.settings.repair_share:
            source, target = repair(ids, self.alike, self.rng)
        else:
            source, target = span_corruption(ids, self.sentinels, self.rng)
        if self.rng.random() < self.settings.prefix_share:
            source = self.rng.choice(self.prefixes) + source
        return [*source, self.end], [*target, self.end]

    def collate(self, pairs: list[Pair]) -> dict[str, Tensor]:
        """Tensors for the model's forward pass."""
        sources = _padded([source for source, _ in pairs], self.pad)
        return {
            "input_ids": sources,
            "attention_mask": (sources != self.pad).long(),
            "labels": _padded([target for _, target in pairs], _IGNORED),
        }


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def rate_factor(step: int, warm_up: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to nothing."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def pretrain(folder: Path, settings: Settings) -> float:
    """Train tokenizer and model, save both to ``folder`` and return the last mean loss."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    lines = pretraining_text(settings.sentences, settings.seed)
    tokenizer = build_tokenizer(lines)
    shape: dict[str, Any] = {**settings.sizes, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **shape)
    model = T5ForConditionalGeneration(config)
    loss = _train(model, Batches(settings, tokenizer, lines), settings)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def _train(model: T5ForConditionalGeneration, batches: Batches, settings: Settings) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, settings.warm_up, settings.steps)
    )
    model.train()
    started, recent = time.monotonic(), []
    mean = math.nan
    for step, batch in zip(range(1, settings.steps + 1), batches, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 200 == 0 or step == settings.steps:
            mean = sum(recent) / len(recent)
            recent.clear()
            sys.stderr.write(
                f"step {step:5d}  loss {mean:.3f}  {time.monotonic() - started:.0f} s\n"
            )
    return mean


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
