"""`interceptor cni agent`: the warm process that the CNI plugin asks."""

from __future__ import annotations

import ipaddress
import json
import os
from typing import Any

import click

from interceptor.cli.options import NotingOption, noted
from interceptor.errors import ConfigError, InterceptorError, Problem
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
@click.option(
    "--repair",
    type=click.Choice(["heal", "label", "delete", "off"]),
    default="heal",
    help="What becomes of pods that lost their rules, or were there before the plugin. [heal]",
)
@click.option(
    "--entry", metavar="FILE", help="The conflist, or our entry in it, as JSON: how to capture pods that were there before."
)
@click.option(
    "--kube-api", metavar="URL|in-cluster", help="The Kubernetes API, for an entry with `kubernetes`. [none is asked]"
)
@click.option("--kube-token", metavar="FILE", help="The token for --kube-api URL; read anew for each request.")
@click.option("--kube-ca", metavar="FILE", help="The authority of --kube-api URL. [the system's]")
@click.option("--node", metavar="NAME", envvar="NODE_NAME", help="This node's name in the API; also from NODE_NAME.")
@click.option("--proc", metavar="DIR", default="/proc", help="Where the host's processes are seen. [/proc]")
@click.option("--untaint", is_flag=True, help="When ready, take the taint interceptor.io/not-ready from this node.")
def agent(socket_path: str, http: tuple[str, int] | None, **given: Any) -> int:
    """Answer the CNI plugin's requests on a unix socket; write one JSON line for each on stderr.

    Ends on SIGTERM or SIGINT once what it has accepted is answered. A second agent may be started before: it takes over.
    """
    from cni.agent.run import Settings, run
    from cni.agent.server import AgentError

    problems = noted()
    entry = _entry(given["entry"], problems) if given["entry"] else None
    kubernetes = _kubernetes(given, problems)
    if given["repair"] in ("label", "delete") and not given["kube_api"]:
        problems.append(Problem("--repair", given["repair"], "needs --kube-api: it is done there"))
    if problems:
        raise ConfigError(problems)
    try:
        return run(Settings(socket_path, http, given["repair"], entry, kubernetes))
    except AgentError as error:
        raise InterceptorError(str(error)) from error


def _kubernetes(given: dict[str, Any], problems: list[Problem]) -> Any:
    from cni.agent.run import Kubernetes
    from cni.kube.api import Api, ApiError, Server, in_cluster

    url = given["kube_api"]
    if not url:
        if given["untaint"]:
            problems.append(Problem("--untaint", "", "needs --kube-api"))
        return None
    if not given["node"]:
        problems.append(Problem("--node", "", "this node's name in the API is needed with --kube-api"))
    try:
        # What Kubernetes gives a pod to find the API by is no option of ours.
        server = in_cluster(os.environ) if url == "in-cluster" else Server(url, given["kube_token"], given["kube_ca"])
        Api(server)
    except ApiError as error:
        problems.append(Problem("--kube-api", url, str(error)))
        return None
    return Kubernetes(server, given["node"] or "", given["proc"], given["untaint"])


def _entry(path: str, problems: list[Problem]) -> Any:
    from cni.protocol import CniError
    from cni.repair import configured_entry

    try:
        with open(path, encoding="utf-8") as file:
            return configured_entry(json.load(file))
    except OSError as error:
        problems.append(Problem("--entry", path, error.strerror or str(error)))
    except (ValueError, RecursionError, CniError) as error:
        problems.append(Problem("--entry", path, str(error)))
    return None
