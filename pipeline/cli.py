"""The command line. Only click is imported until a command runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sherl_pipe.pipeline.config import RunConfig

DEBUG = "SHERL_PIPE_DEBUG"
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="sherl-pipe")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Run a frozen backbone once, tune many tasks from its cached hidden states."""
    if debug:
        os.environ[DEBUG] = "1"


def _stack(options: Iterable[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Several click options as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


_FOLDER = click.Path(file_okay=False, path_type=Path)
_CACHE = click.option("--cache", type=_FOLDER, required=True, help="Folder of the cache.")
_DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
_MOVED = click.option("--model", help="Where the backbone is, if it has moved.")
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
_TEXT_COLUMNS = click.option(
    "--text-column", "text_columns", multiple=True, help="Column with the text; twice for pairs."
)
_LABEL_COLUMN = click.option("--label-column", help="Column with the label.  [default: label]")


@cli.command()
@_stack(
    [
        click.option("--model", default="demo", help="Folder, hub id, or demo (embedded)."),
        click.option("--revision", help="Commit or tag on the hub."),
        click.option(
            "--data",
            "source",
            help="glue, glue/<task>, another hub id, a folder NAME/<task>/<split>.jsonl|csv|tsv|"
            "parquet, one such file, or demo.  [default: glue; demo for --model demo]",
        ),
        click.option(
            "--cache",
            type=_FOLDER,
            help="Folder to write.  [default: ./cache/<name of the data>]",
        ),
        click.option("--task", "tasks", multiple=True, help="Only this task (repeatable)."),
        _TEXT_COLUMNS,
        _LABEL_COLUMN,
        click.option("--limit", type=click.IntRange(1), help="First rows of every split only."),
        click.option("--codec", type=click.Choice(["float32", "bfloat16", "int8"]), default="int8"),
        click.option("--taps", default="paper", help="paper, all, or numbers: 0,4,8."),
        click.option(
            "--template",
            type=click.Choice(["task", "neutral"]),
            help="Whether inputs carry the task's name; neutral lets one text serve many tasks.  "
            "[default: task for text-to-text models, neutral for encoders]",
        ),
        click.option("--max-length", type=click.IntRange(1), default=128, help="Tokens."),
        click.option(
            "--batch-tokens", type=click.IntRange(1), default=4096, help="Padded tokens a batch."
        ),
        click.option("--shard-mib", type=click.IntRange(1), default=32, help="Size of a shard."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            help="What the backbone runs in.",
        ),
        _DEVICE,
    ]
)
def extract(**options: Any) -> None:
    """Stage one: run the frozen backbone once and cache its hidden states.

    Run again after an interruption: only what is missing is done.
    """
    from sherl_pipe.pipeline.config import make_config

    data = {
        key: options.pop(key)
        for key in ("source", "tasks", "text_columns", "label_column", "limit")
    }
    whole = {key: options.pop(key) for key in ("model", "revision", "device", "cache")}
    options["taps"] = _taps(options["taps"])
    config = make_config({**whole, "data": data, "extract": options}, "extract")
    _extract(config)


@cli.command()
@_stack(
    [
        _CACHE,
        _MOVED,
        click.option("--task", "tasks", multiple=True, help="Only this task (repeatable)."),
        click.option("--method", default="sherl"),
        click.option("--reduction", type=click.IntRange(1), help="Width over reduced width."),
        click.option("--late", type=click.IntRange(1), default=1, help="Late blocks."),
        click.option("--lr", type=float, multiple=True, help="Peak learning rate (repeatable)."),
        click.option("--epochs", type=click.IntRange(1), default=10),
        click.option("--batch-size", type=click.IntRange(1), default=32),
        click.option(
            "--seed", type=click.IntRange(0), multiple=True, help="Repeatable.  [default: 0]"
        ),
        click.option("--warmup", type=float, default=0.1, help="Share of the steps."),
        click.option("--weight-decay", type=float, default=0.0),
        click.option("--clip", type=float, default=1.0, help="Largest gradient norm."),
        click.option("--init", type=click.Choice(["residual", "paper"]), default="residual"),
        click.option(
            "--pool",
            type=click.Choice(["mean", "first"]),
            default="mean",
            help="Of an encoder's head.",
        ),
        click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32"),
        click.option(
            "--memory-budget",
            help="Host memory for features, such as 4GB.  [default: half of what is free]",
        ),
        click.option("--out", type=_FOLDER, default=Path("runs"), help="Folder for the adapters."),
        _DEVICE,
        _JSON,
    ]
)
def tune(**options: Any) -> None:
    """Stage two: tune side modules for the tasks of a cache."""
    from sherl_pipe.pipeline.config import make_config

    whole = {key: options.pop(key) for key in ("cache", "device")}
    as_json, model = options.pop("as_json"), options.pop("model")
    options["seed"] = options["seed"] or (0,)
    _tune(make_config({**whole, "tune": options}, "tune"), as_json=as_json, model=model)


@cli.command()
@click.argument(
    "config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def run(config: Path | None) -> None:
    """Both stages, as a pipeline.yaml says.

    Without CONFIG: ./pipeline.yaml if it is there, else the embedded demo.
    """
    from importlib.resources import as_file, files

    from sherl_pipe.pipeline.config import read_config

    here = Path("pipeline.yaml")
    with as_file(files("sherl_pipe.stages.demo") / "pipeline.yaml") as embedded:
        settings = read_config(config or (here if here.is_file() else embedded))
    _extract(settings)
    _tune(settings, as_json=False, model=None)


@cli.command()
@_stack(
    [
        click.option("--adapter", type=_FOLDER, required=True, help="Folder that tune wrote."),
        _MOVED,
        click.option("--text", "texts", multiple=True, help="Repeatable; pairs: two for each."),
        click.option(
            "--file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="jsonl, csv, tsv or parquet.",
        ),
        _TEXT_COLUMNS,
        _DEVICE,
        _JSON,
    ]
)
def predict(
    adapter: Path,
    model: str | None,
    texts: tuple[str, ...],
    file: Path | None,
    text_columns: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Answer with an adapter on the live backbone."""
    if bool(texts) == (file is not None):
        raise click.UsageError("give either --text or --file")
    from sherl_pipe.pipeline import console
    from sherl_pipe.pipeline.predict import Predictor

    predictor = Predictor(adapter, model=model, device=device)
    rows = (
        predictor.rows_of_texts(texts)
        if file is None
        else predictor.rows_of_file(file, text_columns)
    )
    with console.bars() as bars:
        answers = predictor.predict(rows, bars)
    if as_json:
        for answer in answers:
            _print_json(answer.__dict__, indent=None)
        return
    cells = [
        [
            answer.label if isinstance(answer.label, str) else f"{answer.label:.3f}",
            "-" if answer.probability is None else f"{answer.probability:.3f}",
            " | ".join(answer.text),
        ]
        for answer in answers
    ]
    console.results().print(
        console.table("", (predictor.config.task, "probability", "text"), cells)
    )


@cli.command()
@_CACHE
@_JSON
def inspect(cache: Path, as_json: bool) -> None:
    """Show what is in a cache."""
    from sherl_pipe.cache import FeatureCache
    from sherl_pipe.pipeline import console, report

    description = report.describe(FeatureCache.open(cache))
    if as_json:
        _print_json(description)
        return
    for part in report.inspect_tables(description):
        console.results().print(part)


@cli.command()
@_CACHE
def verify(cache: Path) -> None:
    """Check every committed byte of a cache (exit 4 if one is wrong)."""
    from sherl_pipe.cache import CorruptCacheError, FeatureCache
    from sherl_pipe.pipeline import console

    found = FeatureCache.open(cache)
    problems = found.verify()
    if problems:
        raise CorruptCacheError(
            "\n".join(problems) + "\nTo restore: delete the split's folder and extract again."
        )
    files = len(found.content())
    console.results().print(f"{cache}: {files} files of {len(found.splits)} splits are whole")
    for name, (done, total) in sorted(found.incomplete.items()):
        console.results().print(f"incomplete: {name}, {done} of {total} shards")


@cli.command()
@_stack(
    [
        _CACHE,
        _MOVED,
        click.option("--task", required=True, help="Name of the task."),
        click.option(
            "--file",
            "files",
            multiple=True,
            required=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Labels with ids or texts; train.jsonl, validation.jsonl, ... (repeatable).",
        ),
        click.option("--role", help="Split of the labels.  [default: the file's name]"),
        _TEXT_COLUMNS,
        _LABEL_COLUMN,
        click.option("--id-column", help="Column with example ids, instead of texts."),
        click.option("--partial", is_flag=True, help="Examples without a label are fine."),
        _DEVICE,
    ]
)
def label(
    cache: Path, model: str | None, task: str, files: tuple[Path, ...], device: str, **options: Any
) -> None:
    """Attach or replace a task's labels; features are not extracted again."""
    from sherl_pipe.cache import FeatureCache
    from sherl_pipe.pipeline import console
    from sherl_pipe.pipeline.label import LabelOptions, attach_labels

    found = FeatureCache.open(cache)
    scored = "decoder" in found.identity.streams
    if scored:
        from sherl_pipe.pipeline import steps

        check = steps.word_check(found, model)
        changed = attach_labels(found, task, files, LabelOptions(**options), check)
    else:
        changed = attach_labels(found, task, files, LabelOptions(**options))
    for role, count in changed.items():
        console.results().print(f"{task}/{role}: {count:,} rows new or changed")
    if scored:
        from sherl_pipe.pipeline.config import RunConfig

        with console.bars() as bars:
            steps.open_for_tuning(RunConfig(cache=cache, device=device), bars, model)


def _extract(config: RunConfig) -> None:
    from sherl_pipe.pipeline import console, report, steps

    with console.bars() as bars:
        reports = steps.run_extract(config, bars)
    console.results().print(report.extract_table(reports, f"cache {config.cache_path}"))


def _tune(config: RunConfig, *, as_json: bool, model: str | None) -> None:
    from dataclasses import asdict

    from sherl_pipe.pipeline import console, report, steps

    with console.bars() as bars:
        results = steps.run_tune(config, bars, model)
    if as_json:
        _print_json([asdict(result) for result in results])
        return
    console.results().print(report.tune_table(results))


def _taps(text: str) -> str | tuple[int, ...]:
    if text in ("paper", "all"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"expected paper, all, or numbers such as 0,4,8, found {text!r}", param_hint="--taps"
        ) from error


def _print_json(data: Any, indent: int | None = 1) -> None:
    import json

    click.echo(json.dumps(data, indent=indent, ensure_ascii=False))


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _on_sigterm(_: int, __: Any) -> None:
    raise _Terminated


def main() -> None:
    """Entry point: runs a command, turns errors into one message and the documented exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(_run())


def _run() -> int:
    try:
        code = cli.main(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:
        return _say_error("interrupted; run the same command again to go on", 130)
    except click.ClickException as error:
        return _say_usage(error)
    except KeyboardInterrupt:
        return _say_error("interrupted; run the same command again to go on", 130)
    except _Terminated:
        return _say_error("terminated; run the same command again to go on", 143)
    except Exception as error:  # noqa: BLE001 - the last line of defence: no bare traceback
        if os.environ.get(DEBUG):
            raise
        # Here and not above: the package takes longer to import than `--help` may take.
        from sherl_pipe.cache.errors import SherlPipeError

        if isinstance(error, SherlPipeError):
            return _say_error(_message(error), error.exit_code)
        text = " ".join(str(error).split())
        kind = type(error).__name__
        return _say_error(f"unexpected {kind}: {text}. Run with --debug for the traceback", 1)


def _say_usage(error: click.ClickException) -> int:
    """One line, as for all errors; `sherl-pipe` alone shows its help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        return error.exit_code
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "sherl-pipe"
    text = " ".join(error.format_message().split())
    end = "" if text.endswith((".", "?")) else "."
    return _say_error(f"{text}{end} See `{command} --help`.", error.exit_code)


def _message(error: Exception) -> str:
    # OSError's own text begins with "[Errno 28]"; the message is its second argument.
    return str(error.args[-1]) if isinstance(error, OSError) and error.args else str(error)


def _say_error(text: str, code: int) -> int:
    click.echo(f"error: {text}", err=True)
    return code


if __name__ == "__main__":
    main()
