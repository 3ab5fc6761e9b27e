"""Command-line options: those of every command, and those generated from FIELDS. Knows nothing of any single command."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import click

from interceptor.config import FIELDS, SWITCH, Field
from interceptor.proxy_options import PROXY_GROUPS
from interceptor.sources import resolve

Function: TypeAlias = Callable[..., Any]


class ConfigOption(click.Option):
    """One row of FIELDS as an option; its text goes to sources.py unparsed."""

    def __init__(self, row: Field) -> None:
        self.row = row
        if row.kind is SWITCH:
            # None, not False, when it is not given: then the environment or a file may say.
            negative = row.flag.replace("--", "--no-", 1)
            super().__init__([f"{row.flag}/{negative}", row.name], default=None, help=row.help)
        else:
            super().__init__(
                [row.flag, row.name],
                type=click.UNPROCESSED,
                multiple=row.kind.separator is not None,
                metavar=row.kind.metavar,
                help=f"{row.help}  [{row.kind.show(row.default) or 'none'}]",
            )

    def texts(self, value: object) -> Sequence[str]:
        """The texts of the option's occurrences; empty when it was not given."""
        if isinstance(value, bool):
            return ["true" if value else "false"]
        if isinstance(value, str):
            return [value]
        return value if isinstance(value, tuple) else []


class ConfiguredCommand(click.Command):
    """Shows the options of FIELDS in --help under their groups, after the command's own; those of the proxy elsewhere."""

    hidden_groups: tuple[str, ...] = PROXY_GROUPS

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a group."""
        parameters = self.get_params(ctx)
        own = [parameter for parameter in parameters if not isinstance(parameter, ConfigOption)]
        ours = [parameter for parameter in parameters if isinstance(parameter, ConfigOption)]
        _section(ctx, formatter, "Options", own)
        for group, options in itertools.groupby(ours, key=lambda option: option.row.group):
            if group not in self.hidden_groups:
                _section(ctx, formatter, group, options)


class ProxyCommand(ConfiguredCommand):
    """A command that has a proxy: shows its options too."""

    hidden_groups = ()


def _section(ctx: click.Context, formatter: click.HelpFormatter, title: str, parameters: Any) -> None:
    records = [record for record in (parameter.get_help_record(ctx) for parameter in parameters) if record]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)


def common_options(function: Function) -> Function:
    """Give the command --netns and --json, as `netns: str | None` and `as_json: bool`."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
    return click.option("--netns", metavar="NAME|PATH|PID", help="Act in this network namespace, not in our own.")(function)


def config_options(function: Function) -> Function:
    """Give the command --config and every option of FIELDS, all together as `resolved: Resolved`."""
    rows = [ConfigOption(row) for row in FIELDS]

    @functools.wraps(function)
    def with_config(*args: Any, config_files: tuple[str, ...], **values: Any) -> Any:
        flags = {option.row.name: option.texts(values.pop(option.row.name)) for option in rows}
        given = {name: texts for name, texts in flags.items() if texts}
        return function(*args, resolved=resolve(files=config_files, flags=given), **values)

    file_option = click.option(
        "--config",
        "config_files",
        multiple=True,
        metavar="FILE",
        help="Read options from this YAML or JSON file ('-': standard input). Repeatable; later files win.",
    )
    configured = file_option(with_config)
    # click reads the list that its own decorators fill, from its end.
    configured.__click_params__[:0] = reversed(rows)  # type: ignore[attr-defined]
    return configured
