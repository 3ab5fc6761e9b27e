"""Run a proxy with settings given as JSON: flows on stdout as they come, counters at the end. For tests only."""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
from typing import Any

from interceptor.errors import InterceptorError
from interceptor.proxy.metrics import Region, summary
from interceptor.proxy.relay.choice import choose
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.serve import serve
from interceptor.proxy.server import Proxy, open_listeners
from interceptor.proxy.settings import HeaderFor, Listener, ProxySettings
from interceptor.values import parse_cidrs, parse_ports


def main(text: str) -> None:
    """Serve until SIGTERM."""
    given: dict[str, Any] = json.loads(text)
    spare = given.pop("spare_descriptors", None)
    for key in ("listeners", "udp_listeners"):
        given[key] = tuple(Listener(*each) for each in given.get(key, ()))
    given["own_ports"] = frozenset(given.get("own_ports", (15001, 15006, 15008, 15053)))
    given.setdefault("probe_port", 15002)
    given["resolvers"] = tuple(given.get("resolvers", ()))
    run_as = given.get("run_as", (1337, 1337))
    given["run_as"] = run_as and tuple(run_as)
    given["peek"] = frozenset(given.get("peek", ()))
    if "header" in given:
        version, ports, cidrs = given["header"]
        given["header"] = HeaderFor(version, ports and parse_ports(ports), cidrs and parse_cidrs(cidrs))
    workers = given.pop("workers", None)
    settings = ProxySettings(**given)
    if workers is not None:
        attached = choose("packet", workers, settings.packet_pins).attached if settings.relay == "packet" else None
        code, counted = serve(settings, workers, sys.stdout.fileno(), lambda: print("ready", flush=True), {}, attached)
        print(json.dumps({"counters": counted}), flush=True)
        sys.exit(code)
    region = Region()
    listeners = open_listeners(settings)
    attached = choose("packet", 1, settings.packet_pins).attached if settings.relay == "packet" else None
    table = FlowTable(attached, 0) if attached is not None else None
    proxy = Proxy(
        settings, listeners, lambda flow: print(flow.to_json(), flush=True), counts=region.worker(0), flow_table=table
    )

    def ready() -> None:
        if spare is not None:
            leave_descriptors(spare)
        print("ready", flush=True)

    proxy.run(ready)
    print(json.dumps({"counters": summary(region.totals())}), flush=True)


def leave_descriptors(spare: int) -> None:
    """Let this process open `spare` more: the kernel hands out the lowest number that is free."""
    # Without the one that listed them.
    used = {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}
    unused = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(unused, spare, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except InterceptorError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
