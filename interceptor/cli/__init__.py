"""The command line: a lazy click group, one file a command, imported when it is called. Parsing and printing, nothing else."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from interceptor import __version__

# In the order of use.
COMMANDS = ("demo", "run", "config", "plan", "init", "check", "explain", "probe", "clean", "proxy", "announce", "doctor", "cni")


class LazyGroup(click.Group):
    """Imports interceptor.cli.NAME for the command NAME, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command, or None for one we don't have."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"interceptor.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        print(f"interceptor {__version__} (Python {sys.version.split()[0]})")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version and exit."
)
def cli() -> None:
    """Bring the traffic of a pod, or of one process, to a proxy; the application needn't know."""
