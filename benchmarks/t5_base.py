"""What a training step costs: t5-base, from the cache and otherwise, side by side in one run.

T5-base has random weights, which changes no cost; texts are CoLA's and SST-2's, cut by a real
wordpiece vocabulary. Every row runs in a process of its own, one after another; a row's figure is
the median of its steps, the fastest of the rounds::

    python benchmarks/t5_base.py run
    python benchmarks/t5_base.py run --toy        # a small model, in seconds: does it still work?
    python benchmarks/t5_base.py table
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from records import Record, markdown, read_records
from training import Meter, cpu_model, load_tokenizer

LOG = logging.getLogger("t5_base")
REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "t5_base.jsonl"
BATCH, REDUCTION, LR = 32, 8, 3e-3
EPOCHS, TUNINGS = 20, 8
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
    """

    def __init__(self, toy: bool, data: Path) -> None:
        self.toy, self.data = toy, data
        self.folder = REPOSITORY / "build" / ("t5_base_toy" if toy else "t5_base")
        self.rows = 64 if toy else 768
        self.steps = 2 if toy else 8

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def texts(self) -> Path:
        return self.folder / "data"

    def prepare(self) -> None:
        """Write the model and the data."""
        if not (self.model / "config.json").exists():
            torch.manual_seed(0)
            shape: dict[str, Any] = TOY if self.toy else T5_BASE
            config = transformers.T5Config(**shape)
            transformers.T5ForConditionalGeneration(config).save_pretrained(self.model)
            wordpiece_tokenizer().save_pretrained(self.model)
        for task in ("cola", "sst2"):
            lines = (self.data / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
            half = self.rows // 2
            for role, part in (("train", lines[:half]), ("validation", lines[half : half + 32])):
                file = self.texts / "mixed" / f"{role}.jsonl"
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
            yield inputs.input_ids, inputs.attention_mask, labels.input_ids


def timed(steps: int, step: Callable[[], None]) -> float:
    """Median seconds of a step, after two to warm up."""
    seconds = []
    for number in range(steps + 2):
        begun = time.perf_counter()
        step()
        if number >= 2:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def trained(bench: Bench, prepare: Callable[[Any], nn.Module]) -> Record:
    """Steps of a live model that `prepare` makes of the backbone."""
    meter = Meter()
    backbone = transformers.T5ForConditionalGeneration.from_pretrained(bench.model)
    model = prepare(backbone)
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

    seconds = timed(bench.steps, step)
    meter.stop()
    return {
        "seconds": seconds,
        "peak_mib": meter.peak_rss_mib,
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


def live_sherl(bench: Bench) -> Record:
    """SHERL's modules on the live frozen backbone."""
    from sherl_pipe.stages.adapter import TunedModel
    from sherl_pipe.stages.backbone import Backbone
    from sherl_pipe.stages.methods import METHODS
    from sherl_pipe.stages.methods.base import RouteSpec

    def prepare(model: Any) -> nn.Module:
        backbone = Backbone(model)
        method = METHODS["sherl"]
        depth = len(backbone.blocks("encoder"))
        held = {"encoder": tuple(range(depth + 1)), "decoder": tuple(range(depth))}
        taps, last = method.choose_taps(backbone, 1, held)
        spec = RouteSpec("sherl", taps, last, 1, REDUCTION, "t5", "residual", 0, "mean")
        return TunedModel(backbone, method.build(backbone, spec))

    return trained(bench, prepare)


def cached(bench: Bench, codec: str, budget: int, ready: bool = False) -> Record:
    """SHERL from a cache: features in host memory, streamed where `budget` is 0, or (`ready`)
    decoded beforehand."""
    from sherl_pipe.cache import FeatureCache
    from sherl_pipe.stages.backbone import load_backbone
    from sherl_pipe.stages.settings import TuneSettings
    from sherl_pipe.stages.task import Task
    from sherl_pipe.stages.tokens import load_tokenizer as own_tokenizer
    from sherl_pipe.stages.tune import Tuner

    cache = FeatureCache.open(bench.folder / f"cache-{codec}")
    meter = Meter()
    backbone = load_backbone(str(bench.model))
    task = Task(cache, "mixed", backbone, own_tokenizer(str(bench.model)))
    settings = TuneSettings(reduction=REDUCTION, lr=LR, batch_size=BATCH)
    tuner = Tuner(task, settings, bench.folder / "runs", budget=budget)
    optimizer = tuner.optimizer()
    chosen = [batch for epoch in range(2) for batch in tuner.train.epoch(0, epoch, BATCH)]
    chosen = [batch for batch in chosen if len(batch) == BATCH][: bench.steps + 2]
    source = iter(list(tuner.train.read(chosen)) if ready else tuner.train.read(chosen))
    tuner.route.train()

    def step() -> None:
        tuner.step(next(source), optimizer, 1, 100)

    seconds = timed(len(chosen) - 2, step)
    meter.stop()
    return {
        "seconds": seconds,
        "peak_mib": meter.peak_rss_mib,
        "trainable": sum(p.numel() for p in tuner.parameters.values()),
    }


def _cached_rows() -> dict[str, Callable[[Bench], Record]]:
    much = 1 << 40
    rows: dict[str, Callable[[Bench], Record]] = {
        "cached sherl, ready float32 tensors": partial(
            cached, codec="float32", budget=much, ready=True
        )
    }
    for codec in CODECS:
        rows[f"cached sherl, {codec}, host"] = partial(cached, codec=codec, budget=much)
        rows[f"cached sherl, {codec}, stream"] = partial(cached, codec=codec, budget=0)
    return rows


ROWS: dict[str, Callable[[Bench], Record]] = {
    "full fine-tuning": full,
    "lora": lora,
    "live sherl": live_sherl,
    **_cached_rows(),
}


def measure(name: str, toy: bool, data: Path, threads: int) -> Record:
    """One row; called in a process of its own."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return ROWS[name](Bench(toy, data))


def extract(bench: Bench, codec: str) -> float:
    """Seconds of `sherl-pipe extract` into a new cache."""
    folder = bench.folder / f"cache-{codec}"
    shutil.rmtree(folder, ignore_errors=True)
    options = {"--model": bench.model, "--data": bench.texts, "--cache": folder, "--codec": codec}
    if bench.toy:
        options["--shard-mib"] = "1"
    command = [str(Path(sys.executable).parent / "sherl-pipe"), "extract"]
    command += [str(part) for pair in options.items() for part in pair]
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def run(arguments: argparse.Namespace) -> None:
    """Measure every row and record it."""
    bench = Bench(arguments.toy, arguments.data)
    bench.prepare()
    results: Path = bench.folder / "results.jsonl" if arguments.toy else RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    circumstances = {
        "rows": bench.rows,
        "threads": arguments.threads,
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

    def record(name: str, values: Record) -> None:
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"name": name, **values, **circumstances}) + "\n")
        LOG.info("%s: %s", name, values)

    for codec in CODECS:
        record(f"extraction, {codec}", {"seconds": extract(bench, codec)})
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.rounds):
        for name in ROWS:
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
                values = pool.submit(
                    measure, name, arguments.toy, arguments.data, arguments.threads
                ).result()
            record(name, values)
    print(report(read_records(results)))


def report(records: Sequence[Record]) -> str:
    """The tables: a step, and whole tunings computed from it."""
    best: dict[str, Record] = {}
    for record in records:
        name = record["name"]
        if name not in best or record["seconds"] < best[name]["seconds"]:
            best[name] = record
    steps = {name: best[name]["seconds"] for name in ROWS}
    peaks = {name: best[name]["peak_mib"] or float("nan") for name in ROWS}
    lines = []
    for name in ROWS:
        ratios = [steps[base] / steps[name] for base in ("full fine-tuning", "lora", "live sherl")]
        lines.append(
            [
                name,
                f"{steps[name]:.3f}",
                *(f"{ratio:.1f}x" for ratio in ratios),
                f"{peaks[name]:,.0f}",
                f"{best[name]['trainable']:,}",
            ]
        )
    header = ["row", "s/step", "vs full", "vs lora", "vs live sherl", "peak MiB", "trainable"]
    epoch = records[0]["rows"] // BATCH
    chosen, extraction = "cached sherl, int8, host", best["extraction, int8"]["seconds"]
    once = extraction + EPOCHS * epoch * steps[chosen]
    many = extraction + TUNINGS * EPOCHS * epoch * steps[chosen]
    whole = [
        [f"extraction of {records[0]['rows']} rows, int8", f"{extraction:.1f} s", ""],
        [
            f"extraction + {EPOCHS} epochs, against live sherl",
            f"{once:.1f} s",
            f"{EPOCHS * epoch * steps['live sherl'] / once:.1f}x",
        ],
        [
            f"extraction + {TUNINGS} tunings of {EPOCHS} epochs, against lora",
            f"{many:.1f} s",
            f"{TUNINGS * EPOCHS * epoch * steps['lora'] / many:.1f}x",
        ],
    ]
    kind = f"{records[0]['cpu']}, {records[0]['threads']} threads, torch {records[0]['torch']}"
    return "\n".join(
        [
            kind,
            "",
            markdown(header, lines),
            "",
            markdown(["computed from the steps", "time", "ratio"], whole),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help=run.__doc__)
    command.add_argument("--toy", action="store_true", help="a small model and few rows")
    command.add_argument("--rounds", type=int, default=1, help="how often the series is run")
    command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    command.add_argument(
        "--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "glue"
    )
    command.set_defaults(function=run)
    command = commands.add_parser("table", help="print the tables of the last run")
    command.set_defaults(function=lambda _: print(report(read_records(RESULTS))))
    arguments = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    arguments.function(arguments)


if __name__ == "__main__":
    main()
