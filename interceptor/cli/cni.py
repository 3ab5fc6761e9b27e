"""`interceptor cni …`: what a node needs around the plugin. Each command is imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

COMMANDS = ("agent",)


class LazyCniGroup(click.Group):
    """Imports interceptor.cli.cni_NAME for the command NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command, or None for one we don't have."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"interceptor.cli.cni_{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.command(cls=LazyCniGroup, name="cni")
def command() -> None:
    """The CNI plugin's surroundings on a node."""
