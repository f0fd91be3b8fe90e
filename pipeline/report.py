"""Tables of what was extracted, tuned and stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.table import Table
from sherl_pipe.cache import FeatureCache
from sherl_pipe.cache.schema import FORMAT_VERSION
from sherl_pipe.pipeline.console import table
from sherl_pipe.stages.extract import Report
from sherl_pipe.stages.settings import TuneResult, TuneSettings


def extract_table(reports: Sequence[Report], title: str) -> Table:
    """What an extraction did."""
    rows = [
        [
            report.split,
            report.stream,
            f"{report.examples:,}",
            f"{report.reused:,}",
            f"{report.truncated:,}",
            f"{report.rows:,}",
            f"{report.shards - report.done_before} of {report.shards}",
            f"{report.bytes_written / 2**20:,.1f}",
        ]
        for report in reports
    ]
    columns = (
        "split",
        "stream",
        "examples",
        "reused",
        "cut",
        "tokens",
        "shards done now",
        "MiB written",
    )
    return table(title, columns, rows)


def tune_table(results: Sequence[TuneResult]) -> Table:
    """What tunings gave."""
    rows = [
        [
            result.task,
            result.method,
            f"{result.lr:g}",
            str(result.seed),
            ", ".join(_shown(name, value) for name, value in result.metrics.items()),
            f"{result.role} {result.examples:,}",
            f"{result.trainable:,} ({100 * result.trainable / result.backbone:.2f} %)",
            f"{result.seconds:.1f}",
            f"{result.peak_mib:.0f}",
        ]
        for result in results
    ]
    columns = (
        "task",
        "method",
        "lr",
        "seed",
        "metric %",
        "measured on",
        "trainable",
        "seconds",
        "peak MiB",
    )
    return table("", columns, rows)


def rank_table(rankings: Sequence[Mapping[str, Any]]) -> Table:
    """Images that were found for texts, as `Retriever.rank` gives them."""
    rows = [
        [ranking["text"] if number == 0 else "", f"{each['score']:.3f}", each["image"]]
        for ranking in rankings
        for number, each in enumerate(ranking["images"])
    ]
    return table("", ("text", "cosine", "image"), rows)


def _shown(name: str, value: float) -> str:
    return f"{name} {value:.2f}" if name == "perplexity" else f"{name} {value:.1f}"


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The tunings of a sweep, by task, the best first; of their settings those that differ."""
    ranked = sorted(
        rows, key=lambda row: (row["task"], math.inf if row["score"] is None else -row["score"])
    )
    names = [each.name for each in fields(TuneSettings) if each.name != "seed"]
    varied = [name for name in names if len({row[name] for row in rows}) > 1]
    shown = ["method", *(name for name in varied if name != "method"), "seed"]
    cells = [
        [
            str(row["task"]),
            *(
                f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])
                for name in shown
            ),
            "-" if row["score"] is None else f"{row['score']:.1f}",
            str(row["status"]),
            "-" if row["epochs_done"] is None else str(row["epochs_done"]),
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
        ]
        for row in ranked
    ]
    columns = ("task", *shown, "score %", "status", "epochs done", "seconds")
    return table("", columns, cells)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(cache: FeatureCache) -> dict[str, Any]:
    """What is in a cache, for programs. `values` = taps x tokens x width stands per split and
    stream and nowhere else."""
    identity = cache.identity
    splits: dict[str, Any] = {}
    for split in cache.splits:
        streams: dict[str, Any] = {}
        for name, stream in sorted(cache.streams(split).items()):
            values = len(stream.spec.taps) * stream.rows * stream.spec.width
            streams[name] = {
                "examples": stream.examples,
                "tokens": stream.rows,
                "shards": stream.layout.shards,
                "taps": list(stream.spec.taps),
                **({"added": stream.parts[1:]} if stream.parts[1:] else {}),
                "width": stream.spec.width,
                "values": values,
                "bytes": stream.stored_bytes,
                "bits_per_value": 8 * stream.stored_bytes / values if values else None,
                **{k: stream.notes[k] for k in ("reused", "truncated") if k in stream.notes},
            }
        splits[split] = {"streams": streams}
    return {
        "path": str(cache.path),
        "format": FORMAT_VERSION,
        "fingerprint": identity.fingerprint(),
        "backbone": dict(identity.backbone),
        "tokenizer": identity.tokenizer,
        "template": identity.template,
        "max_length": identity.max_length,
        "codec": identity.codec.to_json(),
        "splits": splits,
        "tasks": {
            task: {
                role: {"rows": len(entry.ids), **entry.spec.to_json()}
                for role, entry in sorted(roles.items())
            }
            for task, roles in sorted(cache.tasks.items())
        },
        "incomplete": {
            name: {"committed": done, "shards": total}
            for name, (done, total) in sorted(cache.incomplete.items())
        },
    }


def example_ids(cache: FeatureCache, split: str) -> list[str]:
    """The ids of a split's inputs, in the order of the data; one that an earlier split holds
    is there. Raises InputError for a split that is not in the cache."""
    return [row.tobytes().hex() for stream in cache.input_streams(split) for row in stream.ids]


def inspect_tables(description: dict[str, Any]) -> list[Table | str]:
    """`describe`, for people."""
    backbone = description["backbone"]
    head = (
        f"{description['path']}: {backbone['name']} ({backbone['architecture']}, "
        f"{backbone['parameters'] / 1e6:.1f} M parameters, {backbone['dtype']}), codec "
        f"{description['codec']['name']}, template {description['template']}, at most "
        f"{description['max_length']} tokens\nfingerprint {description['fingerprint']}"
    )
    rows = []
    for split, entry in description["splits"].items():
        for name, stream in entry["streams"].items():
            bits = stream["bits_per_value"]
            rows.append(
                [
                    split,
                    name,
                    f"{stream['examples']:,}",
                    f"{stream['tokens']:,}",
                    f"{stream['bytes'] / 2**20:,.1f}",
                    "-" if bits is None else f"{bits:.2f}",
                    " ".join(map(str, stream["taps"])),
                ]
            )
    columns = ("split", "stream", "examples", "tokens", "MiB", "bits a value", "taps")
    parts: list[Table | str] = [head, table("", columns, rows)]
    tasks = [
        [task, role, f"{entry['rows']:,}", entry["kind"], ", ".join(entry["metrics"])]
        for task, roles in description["tasks"].items()
        for role, entry in roles.items()
    ]
    if tasks:
        parts.append(table("", ("task", "role", "rows", "kind", "metrics"), tasks))
    for name, progress in description["incomplete"].items():
        parts.append(f"incomplete: {name}, {progress['committed']} of {progress['shards']} shards")
    return parts
