"""Recorded runs of the benchmarks and the markdown tables made from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glue_tasks import TASKS, Phase

MISSING = "–"

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What identifies a run; two runs equal in this are the same measurement."""

    phase: Phase
    method: str
    task: str
    seed: int
    lr: float | None
    epochs: int
    rows: int


def read_records(path: Path) -> list[Record]:
    """The runs finished so far."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def run_of(record: Record) -> Run:
    """The identity of a recorded run."""
    return Run(**{name: record[name] for name in Run.__dataclass_fields__})


def matching(records: Iterable[Record], phase: Phase, epochs: int, rows: int) -> list[Record]:
    """The records of a phase with the given training length and size."""
    wanted = (phase, epochs, rows)
    return [r for r in records if (r["phase"], r["epochs"], r["rows"]) == wanted]


def mean_sd(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation, the latter only where there are several values."""
    if not values:
        return MISSING
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its first column left-aligned and the others right-aligned."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def score_table(records: Sequence[Record], methods: Iterable[str]) -> str:
    """Methods by tasks: metrics in per cent, mean and standard deviation over the seeds."""
    columns = {
        "cola Matthews": ("cola", "score"),
        "sst2 accuracy": ("sst2", "score"),
        "stsb mean": ("stsb", "score"),
        "stsb Pearson": ("stsb", "pearson"),
        "stsb Spearman": ("stsb", "spearman"),
        "rte accuracy": ("rte", "score"),
    }
    lines: list[list[str]] = []
    for name in methods:
        own = [record for record in records if record["method"] == name]
        if not own:
            continue
        cells = [
            mean_sd([100 * r["metrics"][metric] for r in own if r["task"] == task])
            for task, metric in columns.values()
        ]
        by_seed: dict[int, list[float]] = {}
        for record in own:
            by_seed.setdefault(record["seed"], []).append(100 * record["metrics"]["score"])
        # Only seeds that went through all tasks: an average over some would mislead.
        averages = [sum(v) / len(v) for v in by_seed.values() if len(v) == len(TASKS)]
        seeds = len({record["seed"] for record in own})
        lines.append([name, *cells, mean_sd(averages), str(seeds)])
    return markdown(["method", *columns, "average", "seeds"], lines)


def cost_table(records: Sequence[Record], methods: Iterable[str]) -> str:
    """Methods and tasks: time, memory and size, means over the seeds."""
    lines: list[list[str]] = []
    for name in methods:
        for task in TASKS:
            own = [r for r in records if (r["method"], r["task"]) == (name, task)]
            if not own:
                continue
            peaks = [r["peak_rss_mib"] for r in own if r["peak_rss_mib"] is not None]
            lines.append(
                [
                    f"{name}, {task}",
                    f"{statistics.mean(r['seconds_per_epoch'] for r in own):.1f}",
                    f"{statistics.mean(peaks):.0f}" if peaks else MISSING,
                    f"{own[0]['trainable_parameters']:,}",
                ]
            )
    header = ["run", "s/epoch", "peak MiB", "trainable parameters"]
    return markdown(header, lines)
