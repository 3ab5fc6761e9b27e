"""What the fast commands import: every module here costs each init its time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORBIDDEN = {"asyncio", "concurrent.futures", "difflib", "email", "http", "iptc", "json", "logging", "psutil", "pyroute2"}
FORBIDDEN |= {"rich", "sqlite3", "ssl", "tempfile", "urllib.request", "xml", "yaml", "zipfile"}
THIRD_PARTY = {"click"}


def modules_after(code: str, *options: str) -> set[str]:
    printing = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before), file=sys.stderr)"
    run = subprocess.run([sys.executable, *options, "-c", printing], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


PATHS = {
    "init": "import interceptor.__main__, interceptor.cli.init, interceptor.backends.nft",
    "clean": "import interceptor.__main__, interceptor.cli.clean, interceptor.backends.nft",
    "check": "import interceptor.__main__, interceptor.cli.check, interceptor.backends.nft",
    "plan": "from interceptor.__main__ import main; main(['plan'])",
    "explain": "from interceptor.__main__ import main; main(['explain', '--dst', '192.0.2.1'])",
}


@pytest.mark.parametrize("command", PATHS)
def test_fast_command_imports_nothing_heavy(command: str) -> None:
    assert modules_after(PATHS[command]) & FORBIDDEN == set()


@pytest.mark.parametrize("command", PATHS)
def test_fast_command_imports_no_third_party_package_but_click(command: str) -> None:
    tops = {name.partition(".")[0] for name in modules_after(PATHS[command])}

    assert {top for top in tops if top not in sys.stdlib_module_names} - {"interceptor"} <= THIRD_PARTY


def test_one_command_does_not_import_the_others() -> None:
    commands = {name for name in modules_after(PATHS["plan"]) if name.startswith("interceptor.cli.")}

    assert commands & {f"interceptor.cli.{name}" for name in ("init", "check", "proxy", "probe", "demo", "run")} == set()


@pytest.mark.parametrize(("dns", "expected"), [(None, set()), (15053, {"dns.message", "dns.update"})], ids=["off", "on"])
def test_a_proxy_loads_the_dns_library_only_when_it_answers_dns(dns: int | None, expected: set[str]) -> None:
    code = f"""
from interceptor.proxy.server import Proxy, open_listeners
from interceptor.proxy.settings import Listener, ProxySettings
settings = ProxySettings(
    listeners=(Listener("outbound", "redirect", 0, "v4"),), own_ports=frozenset(), probe_port=1, run_as=None,
    dns_port={0 if dns else None}, resolvers=("192.0.2.1",),
)
Proxy(settings, open_listeners(settings), print)
"""
    assert {name for name in modules_after(code) if name in ("dns.message", "dns.update")} == expected


def test_what_hands_a_request_to_the_agent_imports_only_what_is_built_in() -> None:
    # "-S": site imports os, and with it what counts here.
    code = f"sys.path.append({str(Path(__file__).parents[2])!r})\nfrom cni import main, shim"
    found = {name for name in modules_after(code, "-IS") if name not in sys.builtin_module_names}

    assert found == {"__future__", "cni", "cni.main", "cni.shim", "cni.wire"}
