"""What `sherl-pipe plan` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from sherl_pipe.pipeline.console import table
from sherl_pipe.pipeline.plan import in_words
from sherl_pipe.pipeline.planning import Planned


def describe(planned: Planned) -> dict[str, Any]:
    """A plan for programs; every number's unit is in its name."""
    ready, wanted, plan, found = planned.ready, planned.wanted, planned.plan, planned.found
    return {
        "model": ready.config.model,
        "data": ready.config.data_source,
        "cache": str(ready.path),
        "codec": wanted.codec,
        "device": str(ready.backbone.device),
        "tokens_counted_on": "all inputs" if planned.counted.whole else "a sample",
        "splits": {
            split.name: {
                "examples": split.inputs.rows,
                "distinct_examples": split.inputs.distinct,
                "stored_examples": len(split.ids),
                "tokens": split.rows,
                "label_word_rows": _word_rows(planned, split.name),
            }
            for split in planned.counted.splits
        },
        "values": plan.values,
        "codecs": {
            name: {
                "bytes": size,
                "bits_per_value": None if size is None else _bits(planned, size),
                "fits": wanted.fits(size),
            }
            for name, size in plan.sizes.items()
        },
        "free_bytes": wanted.free_bytes,
        "extraction_seconds": plan.extraction_seconds,
        "model_loading_seconds": ready.loading_seconds,
        "tasks": {
            each.amount.task: {
                "training_rows": each.amount.rows,
                "tokens_per_epoch": each.amount.tokens,
                "steps_per_epoch": each.amount.steps,
                "cached_seconds_per_epoch": each.cached_seconds,
                "live_seconds_per_epoch": each.live_seconds,
                "forward_seconds_per_epoch": each.forward_seconds,
                "reading_seconds": each.read_seconds,
                "starting_seconds": each.start_seconds,
                "streamed": each.streamed,
                "measured": each.measured,
            }
            for each in plan.tasks
        },
        "epochs": wanted.epochs,
        "tunings": wanted.tunings,
        "cached_seconds_per_epoch": plan.cached_seconds,
        "live_seconds_per_epoch": plan.live_seconds,
        "total_seconds_cached": plan.cached_total,
        "total_seconds_live": plan.live_total,
        "break_even_epochs": plan.break_even,
        "verdict": plan.verdict,
        "sentence": plan.sentence,
        "sample_tokens": planned.sample_tokens,
        "sampled_streams": len(found.samples),
        "measuring_seconds": planned.seconds,
    }


def tables(planned: Planned) -> list[Table | str]:
    """A plan for people."""
    ready, wanted, plan = planned.ready, planned.wanted, planned.plan
    config, backbone = ready.config, ready.backbone
    taps = "; ".join(f"{name} {list(s.taps)}" for name, s in ready.identity.streams.items())
    parts: list[Table | str] = [
        f"{config.model} ({backbone.parameters / 1e6:.1f} M parameters, {config.extract.dtype}) on "
        f"{backbone.device}; {config.data_source}; taps {taps}; measured in "
        f"{in_words(planned.seconds)} on {planned.sample_tokens:,} tokens",
        _splits(planned),
        _codecs(planned),
    ]
    if plan.tasks:
        parts.append(_tasks(planned))
    totals = (
        f"Tunings of {wanted.epochs} epochs, {wanted.tunings} of them: "
        f"{in_words(plan.cached_total)} with the extraction, {in_words(plan.live_total)} live"
        if plan.cached_total is not None and plan.live_total is not None
        else ""
    )
    parts.append(f"extraction: {in_words(plan.extraction_seconds)}. {totals}".rstrip())
    parts.append(plan.sentence)
    return parts


def _splits(planned: Planned) -> Table:
    tokens = "tokens" if planned.counted.whole else "tokens (of a sample, scaled up)"
    words = planned.ready.backbone.family.seq2seq
    rows = [
        [
            split.name,
            f"{split.inputs.rows:,}",
            f"{split.inputs.distinct:,}",
            f"{len(split.ids):,}",
            f"{split.rows:,}",
            *([f"{_word_rows(planned, split.name):,}"] if words else []),
        ]
        for split in planned.counted.splits
    ]
    columns = ("split", "examples", "distinct", "to store", tokens)
    return table("", (*columns, "label-word rows") if words else columns, rows)


def _codecs(planned: Planned) -> Table:
    free, rows = planned.wanted.free_bytes, []
    for name, size in planned.plan.sizes.items():
        chosen = f"{name} (chosen)" if name == planned.wanted.codec else name
        if size is None:
            rows.append([chosen, "-", "-", "cannot hold these values"])
            continue
        fits = "yes" if planned.wanted.fits(size) else "no"
        rows.append([chosen, f"{size / 2**20:,.1f}", f"{_bits(planned, size):.2f}", fits])
    room = "any size fits" if free is None else f"{free / 2**20:,.0f} MiB are free"
    title = f"{room} in {planned.ready.path}"
    return table(title, ("codec", "MiB", "bits a value", "fits"), rows)


def _tasks(planned: Planned) -> Table:
    rows = [
        [
            each.amount.task,
            f"{each.amount.rows:,}",
            f"{each.amount.steps:,}",
            f"{each.cached_seconds:,.2f}",
            f"{each.live_seconds:,.2f}",
            f"{each.live_seconds / max(each.cached_seconds, 1e-9):.1f}",
            "streamed" if each.streamed else "in memory",
            "steps of this task" if each.measured else "steps of other tasks",
        ]
        for each in planned.plan.tasks
    ]
    columns = (
        "task",
        "training rows",
        "steps an epoch",
        "s cached",
        "s live",
        "times",
        "features",
        "measured on",
    )
    return table("", columns, rows)


def _word_rows(planned: Planned, split: str) -> int:
    return sum(a.rows for a in planned.found.streams if a.split == split and not a.main)


def _bits(planned: Planned, size: int) -> float:
    return 8 * size / max(1, planned.plan.values)
