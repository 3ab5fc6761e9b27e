"""What the demo prints: which rules stand where, the flows, the verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from interceptor.demo.show import EXCLUDED_PORT, PORT, Demo, Verdict
from interceptor.table import Seen, lines


def print_text(demo: Demo, verdict: Verdict) -> None:
    """For people."""
    for each in demo.captured:
        pod, report = each.pod, each.report
        rules = sum(len(chain.rules) for chain in report.plan.chains)
        print(f"{pod.role} pod: netns {pod.name}, {pod.v4.ip} and {pod.v6.ip}")
        print(f"  {rules} rules by {report.backend} ({report.reason}), a proxy under uid 1337")
    print(f"HTTP server in the server pod, on ports {PORT} and {EXCLUDED_PORT}; {EXCLUDED_PORT} is excluded from capture\n")
    for line in lines(verdict.flows):
        print(line)
    print()
    for what in verdict.missing:
        print(f"missing: {what}")
    for what in verdict.unexpected:
        print(f"unexpected: {what}")
    seen = verdict.expected - len(verdict.missing)
    direct = f"; {len(demo.direct)} connection to the excluded port went past the proxies" if not verdict.unexpected else ""
    print(f"{'OK' if verdict.is_good else 'FAILED'}: {seen} of {verdict.expected} expected flows were captured{direct}")
    sys.stdout.flush()


def print_json(demo: Demo, verdict: Verdict) -> None:
    """For scripts: one document."""
    document = {
        "ok": verdict.is_good,
        "expected": verdict.expected,
        "missing": verdict.missing,
        "unexpected": verdict.unexpected,
        "pods": [
            {
                "pod": each.pod.role,
                "netns": each.pod.name,
                "addresses": [str(each.pod.v4), str(each.pod.v6)],
                "backend": each.report.backend,
                "reason": each.report.reason,
            }
            for each in demo.captured
        ],
        "flows": [seen.as_json() for seen in verdict.flows],
    }
    print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)


def json_line(seen: Seen) -> str:
    """One flow for scripts."""
    return json.dumps(seen.as_json(), ensure_ascii=False)


def table_row(seen: Seen) -> str:
    """One flow for people."""
    return lines([seen])[1]


def keep(demo: Demo, shown: Callable[[Seen], str]) -> None:
    """Say how to look around, on stderr, and print the flows that come of it, until a signal raises."""
    client, server = demo.client, demo.server
    excluded = f"--exclude-outbound-ports {EXCLUDED_PORT} --exclude-inbound-ports {EXCLUDED_PORT}"
    hints = (
        "The pods stay until Ctrl-C. Elsewhere, try:",
        f"  ip netns exec {client.name} setpriv --reuid 1000 --clear-groups curl http://{server.v4.ip}:{PORT}/",
        f"  interceptor explain --netns {client.name} {excluded} --uid 1000 --dst {server.v4.ip} --dport {PORT}",
        f"  interceptor check --netns {client.name} {excluded}",
        f"  ip netns exec {client.name} nft list ruleset",
        "Ctrl-C removes all. Should this program be killed:",
        f"  for pod in {client.name} {server.name}; do ip netns pids $pod | xargs -r kill; ip netns del $pod; done",
        "Flows:",
    )
    print("\n".join(hints), file=sys.stderr, flush=True)
    while True:
        for seen in demo.watch(3600):
            print(shown(seen), flush=True)
