"""The options of the commands that run stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from sherl_pipe.pipeline.options import (
    CACHE,
    DEVICE,
    FOLDER,
    IMAGE_COLUMN,
    JSON,
    LABEL_COLUMN,
    MOVED,
    PLACE,
    TARGET_COLUMN,
    TEXT_COLUMNS,
)

METHOD = click.option(
    "--method", default="sherl", help="sherl, lst, dtl, dtl+, unipt, weighted or linear."
)
PRESET = click.option(
    "--preset",
    type=click.Choice(["paper"]),
    help="paper: --late, --init, --head and --loss as the method was published; each of them that "
    "is given too wins.  [default: what did best here]",
)
REDUCTION = click.option(
    "--reduction",
    type=click.IntRange(1),
    help="Width over reduced width, for dtl over the rank.  [default: 4 for sherl and unipt, 1 on "
    "dual encoders; 8 for lst; rank 2 for dtl; weighted and linear reduce nothing]",
)
LATE = click.option(
    "--late",
    type=click.IntRange(0),
    help="Late blocks.  [default: of sherl 1 on T5, none on dual encoders, else 2; half of all for "
    "dtl; for weighted and linear on T5 those behind the last cached tap; others have none]",
)
EPOCHS = click.option("--epochs", type=click.IntRange(1), default=10)
BATCH_SIZE = click.option("--batch-size", type=click.IntRange(1), default=32)
RESIDENCY = click.option(
    "--residency",
    type=click.Choice(["auto", "device", "host", "stream"]),
    default="auto",
    help="Where coded features live: in the training device's memory, in host memory, or streamed "
    "from the cache; auto is the first that has room.",
)
MEMORY_BUDGET = click.option(
    "--memory-budget",
    help="Host memory for features, such as 4GB.  [default: half of what is free]",
)


def _count(_: Any, __: Any, text: str | None) -> int | str | None:
    """A number of workers. Raises BadParameter."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"expected a number from 1 on, or auto, found {text!r}")
    return int(text)


_NO_WORKERS = "[default: this process alone; auto with --ray-address]"
WORKERS = click.option(
    "--workers",
    metavar="N|auto",
    callback=_count,
    help="Workers that Ray runs, each with a GPU or a share of the processors; auto: one for each "
    f"GPU, or machine without any, of the cluster.  {_NO_WORKERS}",
)
TUNE_WORKERS = click.option(
    "--workers",
    metavar="N|auto",
    callback=_count,
    help="Workers that Ray runs, as for extract. Several tunings are spread over them; one alone "
    f"is trained by all of them.  {_NO_WORKERS}",
)
RAY_ADDRESS = click.option(
    "--ray-address",
    help="Ray cluster to join: host:port, or auto for the one on this machine.  [default: where "
    "workers are asked for, one is started on this machine for the time]",
)
_FEATURES = [
    click.option("--model", default="demo", help="Folder, hub id, or demo (embedded)."),
    click.option("--revision", help="Commit or tag on the hub."),
    click.option(
        "--data",
        "source",
        help="glue, glue/<task>, another hub id, a folder NAME/<task>/<split>.jsonl|csv|tsv|"
        "parquet, one such file, or demo; for a model of images also a folder "
        "NAME/<task>/<split>/<class>/*.png|jpg|...., for a dual encoder files with images and "
        "captions.  [default: glue; demo for --model demo]",
    ),
    click.option(
        "--cache",
        type=PLACE,
        help="Folder to write, or s3://bucket/prefix (gs://, az://).  [default: ./cache/<name of "
        "the data>]",
    ),
    click.option("--task", "tasks", multiple=True, help="Only this task (repeatable)."),
    TEXT_COLUMNS,
    IMAGE_COLUMN,
    LABEL_COLUMN,
    TARGET_COLUMN,
    click.option("--limit", type=click.IntRange(1), help="First rows of every split only."),
    click.option(
        "--codec",
        type=click.Choice(["float32", "bfloat16", "int8", "int4"]),
        default="int8",
        help="How features are stored.",
    ),
    click.option(
        "--taps",
        default="paper",
        help="paper, all, or numbers: 0,4,8. Those that an existing cache lacks are added to it.",
    ),
    click.option(
        "--template",
        type=click.Choice(["task", "neutral"]),
        help="Whether inputs carry the task's name; neutral lets one text serve many tasks.  "
        "[default: task for text-to-text models, neutral for encoders]",
    ),
    click.option(
        "--max-length", type=click.IntRange(1), default=128, help="Tokens of a text at most."
    ),
    click.option(
        "--batch-tokens",
        type=click.IntRange(1),
        help="Padded tokens in a batch.  [default: 4096; on a CPU 512, more for narrow models]",
    ),
    click.option("--shard-mib", type=click.IntRange(1), default=32, help="Size of a shard."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        help="What the backbone runs in.",
    ),
    DEVICE,
]
EXTRACT = [*_FEATURES, WORKERS, RAY_ADDRESS]
TUNE = [
    CACHE,
    MOVED,
    click.option(
        "--data", "source", help="Texts that the cache was made from, as for extract; for fisher."
    ),
    TEXT_COLUMNS,
    click.option("--task", "tasks", multiple=True, help="Only this task (repeatable)."),
    METHOD,
    PRESET,
    REDUCTION,
    LATE,
    click.option("--lr", type=float, multiple=True, help="Peak learning rate (repeatable)."),
    EPOCHS,
    BATCH_SIZE,
    click.option("--seed", type=click.IntRange(0), multiple=True, help="Repeatable.  [default: 0]"),
    click.option("--warmup", type=float, default=0.1, help="Share of the steps."),
    click.option("--weight-decay", type=float, default=0.0),
    click.option("--clip", type=float, default=1.0, help="Largest gradient norm."),
    click.option(
        "--init",
        type=click.Choice(["residual", "paper", "random", "fisher"]),
        help="What training starts from: residual or paper for sherl; random for lst, or fisher, "
        "side blocks pruned from the backbone (needs --data).  [default: residual, random; the "
        "other methods have one start]",
    ),
    click.option(
        "--pool",
        type=click.Choice(["mean", "first", "last"]),
        help="What a pooled head reads of the tokens, of images the mean of the patches or, with "
        "first, the class token.  [default: mean; last for causal models]",
    ),
    click.option(
        "--head",
        type=click.Choice(["random", "probe", "words"]),
        help="What an encoder's head starts from; probe fits a linear model first. With words a "
        "causal model keeps its own head and scores the label words by their first tokens.  "
        "[default: random for lst and unipt, else probe]",
    ),
    click.option(
        "--loss",
        type=click.Choice(["words", "vocabulary"]),
        help="What label words of a text-to-text model compete with.  [default: words]",
    ),
    click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32"),
    click.option(
        "--together",
        type=click.IntRange(1),
        default=8,
        help="Tunings over the same rows that share a pass, at most.",
    ),
    RESIDENCY,
    MEMORY_BUDGET,
    click.option(
        "--readers",
        type=click.IntRange(1),
        help="Threads that read shards.  [default: one for two processors, at most 4]",
    ),
    click.option(
        "--local-copies",
        type=FOLDER,
        help="Folder for copies of shards that are streamed from an object store.  [default: "
        "~/.cache/sherl-pipe/shards]",
    ),
    click.option(
        "--local-copies-size",
        help="Bytes that they take at most, such as 50GB; 0 keeps none.  [default: half of what is "
        "free there, at most 50GB]",
    ),
    click.option("--out", type=FOLDER, default=Path("runs"), help="Folder for the adapters."),
    TUNE_WORKERS,
    click.option(
        "--retries", type=click.IntRange(0), default=3, help="Of a pass that loses its worker."
    ),
    RAY_ADDRESS,
    DEVICE,
    JSON,
]
PLAN = [
    *_FEATURES,
    METHOD,
    PRESET,
    REDUCTION,
    LATE,
    EPOCHS,
    BATCH_SIZE,
    RESIDENCY,
    MEMORY_BUDGET,
    click.option(
        "--tunings",
        type=click.IntRange(1),
        help="How many tunings will share the cache.  [default: one for each labelled task]",
    ),
    JSON,
]


def extract_values(options: dict[str, Any]) -> dict[str, Any]:
    """The values of EXTRACT's options, as `RunConfig` has them."""
    rest = dict(options)
    names = "source", "tasks", "text_columns", "image_column", "label_column", "target_column"
    data = {key: rest.pop(key) for key in (*names, "limit")}
    whole = {key: rest.pop(key) for key in ("model", "revision", "device", "cache")}
    whole["ray_address"] = rest.pop("ray_address", None)
    return {**whole, "data": data, "extract": {**rest, "taps": _taps(rest["taps"])}}


def _taps(text: str) -> str | tuple[int, ...]:
    if text in ("paper", "all"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"expected paper, all, or numbers such as 0,4,8, found {text!r}", param_hint="--taps"
        ) from error
