"""The command line. Only click is imported until a command runs."""

from __future__ import annotations

import os

import click
from sherl_pipe.pipeline import cli_stages, cli_use

DEBUG = "SHERL_PIPE_DEBUG"
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
COMMANDS = [
    cli_stages.extract,
    cli_stages.plan,
    cli_stages.tune,
    cli_stages.sweep,
    cli_stages.run,
    cli_use.predict,
    cli_use.inspect,
    cli_use.verify,
    cli_use.label,
]


@click.group(context_settings=CONTEXT, commands=COMMANDS)
@click.version_option(package_name="sherl-pipe")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Run a frozen backbone once, tune many tasks from its cached hidden states."""
    if debug:
        os.environ[DEBUG] = "1"
