"""`interceptor cni agent`: the warm process that the CNI plugin asks."""

from __future__ import annotations

import ipaddress

import click

from interceptor.cli.options import NotingOption, refuse_noted
from interceptor.values import parse_port


class AddressPort(click.ParamType[tuple[str, int] | None]):
    """ADDRESS:PORT, with an IPv6 address in brackets; `off` for none."""

    name = "ADDRESS:PORT"

    def convert(
        self, value: str | tuple[str, int] | None, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int] | None:
        """(address, port), or None for off."""
        if not isinstance(value, str) or value == "off":
            return None if value == "off" or isinstance(value, str) else value
        host, _, port = value.rpartition(":")
        try:
            return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))), parse_port(port)
        except ValueError:
            self.fail("an address and a port, like 127.0.0.1:15014 or [::]:15014, or off", param, ctx)


class AbsolutePath(click.ParamType[str]):
    """An absolute path."""

    name = "PATH"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path."""
        if not value.startswith("/"):
            self.fail("an absolute path", param, ctx)
        return value


@click.command()
@click.option(
    "--socket",
    "socket_path",
    cls=NotingOption,
    type=AbsolutePath(),
    default="/run/interceptor/cni.sock",
    metavar="PATH",
    help="The conflist's agentSocket. [/run/interceptor/cni.sock]",
)
@click.option(
    "--http",
    cls=NotingOption,
    type=AddressPort(),
    default="127.0.0.1:15014",
    metavar="ADDRESS:PORT",
    help="Where /healthz, /readyz and /metrics are served; off for nowhere. [127.0.0.1:15014]",
)
def agent(socket_path: str, http: tuple[str, int] | None) -> int:
    """Answer the CNI plugin's requests on a unix socket; write one JSON line for each on stderr.

    Ends on SIGTERM or SIGINT once what it has accepted is answered. A second agent may be started before: it takes over.
    """
    refuse_noted()
    from cni.agent.run import Settings, run

    return run(Settings(socket_path, http))
