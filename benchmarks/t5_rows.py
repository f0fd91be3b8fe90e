"""The rows of ``t5_base``: what is trained, and on what."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from sherl_pipe.stages.measure import Clock
from sherl_pipe.stages.memory import PeakMemory, keep_freed_memory
from torch import Tensor, nn

from records import Record
from training import load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, REDUCTION, LR = 32, 8, 3e-3
# Late blocks and the start of the trained weights.
SHAPES = {"sherl": (1, "residual"), "lst": (0, "random")}
CODECS = ("float32", "bfloat16", "int8", "int4")
T5_BASE: dict[str, Any] = {
    "decoder_start_token_id": 0,
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
}
TOY: dict[str, Any] = {**T5_BASE, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}


class Bench:
    """Model, data and caches of one size.

    Args:
        toy: a small model and few rows.
        data: the folder of GLUE's tasks.
        device: where it is trained.
    """

    def __init__(self, toy: bool, data: Path, device: torch.device) -> None:
        self.toy, self.data, self.device = toy, data, device
        self.folder = REPOSITORY / "build" / ("t5_base_toy" if toy else "t5_base")
        self.rows = 64 if toy else 768
        self.long_rows = 96 if toy else 4 * self.rows
        self.steps = 2 if toy else 8

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def texts(self) -> Path:
        return self.folder / "data"

    @property
    def long_texts(self) -> Path:
        """More of them, beside which the start of an extraction takes less."""
        return self.folder / "data-long"

    def prepare(self) -> None:
        """Write the model and the data."""
        if not (self.model / "config.json").exists():
            torch.manual_seed(0)
            shape: dict[str, Any] = TOY if self.toy else T5_BASE
            config = transformers.T5Config(**shape)
            transformers.T5ForConditionalGeneration(config).save_pretrained(self.model)
            wordpiece_tokenizer().save_pretrained(self.model)
        self._write(self.texts, self.rows)
        self._write(self.long_texts, self.long_rows)

    def _write(self, folder: Path, rows: int) -> None:
        """So many training rows, and 64 others."""
        for task in ("cola", "sst2"):
            lines = (self.data / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
            half = rows // 2
            for role, part in (("train", lines[:half]), ("validation", lines[half : half + 32])):
                file = folder / "mixed" / f"{role}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                before = file.read_text(encoding="utf-8") if task == "sst2" else ""
                file.write_text(before + "\n".join(part) + "\n", encoding="utf-8")


def wordpiece_tokenizer() -> Any:
    """The wordpieces of the MiniLM encoder, closed with `</s>` as T5's sentences are."""
    from tokenizers import processors

    found = load_tokenizer()
    backend = found.backend_tokenizer
    end = found.sep_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, found.sep_token_id)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=found.pad_token, eos_token=end, unk_token="[UNK]"
    )


def batches(bench: Bench) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, mask and label tokens of training batches, for ever.

    Neighbours in length share a batch, as in the cached runs.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.model)
    lines = (bench.texts / "mixed" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: len(row["sentence"]))
    count = len(rows) // BATCH
    while True:
        for number in torch.randperm(count).tolist():
            part = rows[number * BATCH : (number + 1) * BATCH]
            texts = [f"mixed sentence: {row['sentence']}" for row in part]
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            labels = tokenizer([str(row["label"]) for row in part], return_tensors="pt")
            found = (inputs.input_ids, inputs.attention_mask, labels.input_ids)
            ids, mask, words = (each.to(bench.device) for each in found)
            yield ids, mask, words


def timed(steps: int, step: Callable[[], None], device: torch.device) -> float:
    """Median seconds of a step, after two to warm up."""
    seconds, clock = [], Clock(device)
    for _ in range(steps + 2):
        clock.lap()
        step()
        seconds.append(clock.lap())
    return statistics.median(seconds[2:])


def started(device: torch.device) -> PeakMemory:
    """A meter of what comes once the libraries that a T5 needs are loaded."""
    _ = transformers.T5ForConditionalGeneration  # imported when it is asked for
    return PeakMemory(device)


def trained(bench: Bench, prepare: Callable[[Any], nn.Module]) -> Record:
    """Steps of a live model that `prepare` makes of the backbone."""
    meter = started(bench.device)
    backbone: Any = transformers.T5ForConditionalGeneration.from_pretrained(bench.model)
    model = prepare(backbone.to(bench.device)).to(bench.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    source = batches(bench)
    model.train()

    def step() -> None:
        ids, mask, labels = next(source)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {
        "seconds": timed(bench.steps, step, bench.device),
        "peak_mib": meter.peak_mib(),
        "trainable": sum(p.numel() for p in parameters),
    }


def full(bench: Bench) -> Record:
    """Every weight is trained."""
    return trained(bench, lambda model: model)


def lora(bench: Bench) -> Record:
    """`peft`'s LoRA, rank 8, on query and value."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
    )
    return trained(bench, lambda model: get_peft_model(model, config))


def live(bench: Bench, method: str) -> Record:
    """A method's modules on the live frozen backbone."""
    from sherl_pipe.stages.adapter import TunedModel
    from sherl_pipe.stages.backbone import Backbone
    from sherl_pipe.stages.methods import METHODS
    from sherl_pipe.stages.methods.route import RouteSpec

    def prepare(model: Any) -> nn.Module:
        backbone, kind = Backbone(model), METHODS[method]
        depth = len(backbone.blocks("encoder"))
        held = {"encoder": tuple(range(depth + 1)), "decoder": tuple(range(depth))}
        late, init = SHAPES[method]
        taps, last = kind.choose_taps(backbone, late, held)
        variant = kind.variant(backbone.family)
        spec = RouteSpec(method, taps, last, late, REDUCTION, variant, init, 0, "mean")
        return TunedModel(backbone, kind.build(backbone, spec))

    return trained(bench, prepare)


class CachedSteps:
    """Steps from a cache, one after another.

    Args:
        bench: with a cache of every codec.
        codec: of the cache.
        residency: where coded features live.
        loss: of label words.
        ready: have every batch decoded beforehand.
        method: that is trained.
    """

    def __init__(
        self,
        bench: Bench,
        codec: str,
        residency: str = "host",
        loss: str = "words",
        ready: bool = False,
        method: str = "sherl",
    ) -> None:
        from sherl_pipe.cache import FeatureCache
        from sherl_pipe.stages.methods import METHODS
        from sherl_pipe.stages.part import load_part
        from sherl_pipe.stages.settings import TuneSettings
        from sherl_pipe.stages.task import Task
        from sherl_pipe.stages.tokens import load_tokenizer as own_tokenizer
        from sherl_pipe.stages.tune import Tuner
        from sherl_pipe.stages.words import tokens_of

        cache = FeatureCache.open(bench.folder / f"cache-{codec}")
        tokenizer = own_tokenizer(str(bench.model))
        words = cache.tasks["mixed"]["train"].spec.words
        tokens = tokens_of(words, tokenizer) if loss == "words" else None
        late, init = SHAPES[method]
        needed = METHODS[method].late_blocks(late)
        backbone = load_part(str(bench.model), needed, tokens=tokens, device=bench.device)
        task = Task(cache, "mixed", backbone, tokenizer)
        settings = TuneSettings(
            method=method,
            late=late,
            init=init,
            reduction=REDUCTION,
            lr=LR,
            batch_size=BATCH,
            loss=loss,
        )
        tuner = Tuner(task, settings, bench.folder / "runs", budget=1 << 40, residency=residency)
        if residency != "stream":
            tuner.train.preload()
        chosen = [batch for epoch in range(4) for batch in tuner.train.epoch(0, epoch, BATCH)]
        chosen = [batch for batch in chosen if len(batch) == BATCH][: 6 * bench.steps + 2]
        self.count = len(chosen) - 2
        self.trainable = sum(p.numel() for p in tuner.parameters.values())
        self._tuner, self._optimizer = tuner, tuner.optimizer()
        self._source = iter(list(tuner.train.read(chosen)) if ready else tuner.train.read(chosen))
        tuner.route.train()

    def __call__(self) -> None:
        self._tuner.step(next(self._source), self._optimizer, 1, 100)


def cached(bench: Bench, profile: int = 0, **how: Any) -> Record:
    """`CachedSteps`. With `profile`, a table of so many operations that take the most time is
    printed."""
    keep_freed_memory()
    meter = started(bench.device)
    step = CachedSteps(bench, **how)
    if profile:
        for _ in range(2):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(step.count):
                step()
        print(found.key_averages().table("self_cpu_time_total", row_limit=profile))
    seconds = 0.0 if profile else timed(step.count, step, bench.device)
    return {"seconds": seconds, "peak_mib": meter.peak_mib(), "trainable": step.trainable}


def feeding(bench: Bench) -> dict[str, float]:
    """Seconds of a step on ready tensors, from host memory and streamed (int8), in turns."""
    keep_freed_memory()
    feeds = {
        "ready tensors": CachedSteps(bench, "int8", ready=True),
        "host": CachedSteps(bench, "int8"),
        "stream": CachedSteps(bench, "int8", "stream"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    clock = Clock(bench.device)
    for number in range(feeds["host"].count):
        # Every kind is first, second and last as often as the others.
        order = list(feeds)[number % 3 :] + list(feeds)[: number % 3]
        for name in order:
            clock.lap()
            feeds[name]()
            seconds[name].append(clock.lap())
    return {name: statistics.median(found[3:]) for name, found in seconds.items()}


def _cached_rows(residencies: Sequence[str]) -> dict[str, Callable[[Bench], Record]]:
    rows: dict[str, Callable[[Bench], Record]] = {
        "cached sherl, ready float32 tensors": partial(cached, codec="float32", ready=True)
    }
    for codec in CODECS:
        for residency in residencies:
            rows[f"cached sherl, {codec}, {residency}"] = partial(
                cached, codec=codec, residency=residency
            )
    rows["cached sherl, int8, host, whole vocabulary"] = partial(
        cached, codec="int8", loss="vocabulary"
    )
    return rows


def rows_on(device: torch.device) -> dict[str, Callable[[Bench], Record]]:
    """All rows, by name."""
    residencies = ("device", "host", "stream") if device.type == "cuda" else ("host", "stream")
    return {
        "full fine-tuning": full,
        "lora": lora,
        "live sherl": partial(live, method="sherl"),
        "live lst": partial(live, method="lst"),
        **_cached_rows(residencies),
        "cached lst, int8, host": partial(cached, codec="int8", method="lst"),
    }
