"""Command-line options: those of every command, and those generated from FIELDS. Knows nothing of any single command.

click stops at the first bad value. Here each one is noted, and all are told together with what sources.py finds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import click

from interceptor.config import FIELDS, SWITCH, Field
from interceptor.errors import ConfigError, Problem
from interceptor.proxy_options import PROXY_GROUPS
from interceptor.sources import resolve

Function: TypeAlias = Callable[..., Any]
# (a command's own options, the good values of FIELDS) -> what is wrong with the former.
Judge: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[Problem]]
# In click's ctx.meta.
NOTED = "interceptor.problems"
JSON = "interceptor.json"  # whether errors are to be told as JSON


class NotingOption(click.Option):
    """An option whose bad value does not end the parsing; it is None then, and the problem is told later."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """The value, or None."""
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:
            ctx.meta.setdefault(NOTED, []).append(Problem(self.opts[0], str(value), error.message.rstrip(".")))
            return None


def noted() -> list[Problem]:
    """What NotingOptions of the command that runs have noted."""
    return list(click.get_current_context().meta.get(NOTED, ()))


def refuse_noted() -> None:
    """For commands without config_options. Raises ConfigError."""
    if problems := noted():
        raise ConfigError(problems)


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


def common_options(
    function: Function,
    *,
    netns: str = "Act in this network namespace, not in our own.",
    json: str = "Print JSON.",
) -> Function:
    """Give the command --netns and --json, as `netns: str | None` and `as_json: bool`; with help of their own if need be."""
    function = click.option("--json", "as_json", is_flag=True, help=json, callback=_note_json)(function)
    return click.option("--netns", metavar="NAME|PATH|PID", help=netns)(function)


def _note_json(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> bool:
    ctx.meta[JSON] = wanted
    return wanted


def nothing_to_judge(_own: Mapping[str, Any], _good: Mapping[str, Any]) -> Iterable[Problem]:
    """For commands whose own options cannot be wrong together, or with those of FIELDS."""
    return ()


def config_options(function: Function, judge: Judge = nothing_to_judge) -> Function:
    """Give the command --config and every option of FIELDS, all together as `resolved: Resolved`."""
    rows = [ConfigOption(row) for row in FIELDS]

    @functools.wraps(function)
    def with_config(*args: Any, config_files: tuple[str, ...], **values: Any) -> Any:
        flags = {option.row.name: option.texts(values.pop(option.row.name)) for option in rows}
        given = {name: texts for name, texts in flags.items() if texts}
        resolved = resolve(files=config_files, flags=given, judge=lambda good: (*noted(), *judge(values, good)))
        return function(*args, resolved=resolved, **values)

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
