"""The console script: a command, one message for an error, the documented exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click
from sherl_pipe.pipeline.cli import DEBUG, cli

# PyTorch's words where a processor's memory is at its end; on CUDA it raises OutOfMemoryError.
_NO_MEMORY = "DefaultCPUAllocator: "
_LESS_MEMORY = (
    "Lower --batch-tokens of extract, --batch-size or --together of tune, or --memory-budget, or "
    "use --residency stream. Finished shards and tunings are kept."
)


class Terminated(BaseException):
    """SIGTERM arrived."""


def _on_sigterm(_: int, __: Any) -> None:
    raise Terminated


def main() -> None:
    """Entry point: runs a command, turns errors into one message and the documented exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(run())


def run() -> int:
    """The exit code of the command in `sys.argv`, its error said."""
    try:
        code = cli.main(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt, Terminated) as error:
        return _say_stopped(error)
    except click.ClickException as error:
        return _say_usage(error)
    except Exception as error:  # noqa: BLE001 - the last line of defence: no bare traceback
        # A handler that raised within compiled code of Ray may come out as a SystemError.
        if isinstance(error.__cause__, (KeyboardInterrupt, Terminated)):
            return _say_stopped(error.__cause__)
        if os.environ.get(DEBUG):
            raise
        # Here and not above: the package takes longer to import than `--help` may take.
        from sherl_pipe.cache.errors import SherlPipeError

        if isinstance(error, SherlPipeError):
            return _say_error(_message(error), error.exit_code)
        text = " ".join(str(error).split())
        kind = type(error).__name__
        if "MemoryError" in kind or _NO_MEMORY in text:
            # What follows are addresses, or PyTorch's own advice.
            found = ". ".join(text.rpartition(_NO_MEMORY)[2].split(". ")[:2]).rstrip(".")
            return _say_error(f"out of memory ({found}). {_LESS_MEMORY}", 1)
        return _say_error(f"unexpected {kind}: {text}. Run with --debug for the traceback", 1)


def _say_stopped(error: BaseException) -> int:
    word, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
    return _say_error(f"{word}; run the same command again to go on", code)


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
