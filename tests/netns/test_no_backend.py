"""A machine with nothing that writes rules: no nft, no iptables, no python-iptables, or one without its libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from interceptor.backends.process import SEARCH_PATH
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods

pytestmark = [pytest.mark.netns, pytest.mark.slow]

WITHOUT_PACKAGE = "import sys; sys.modules['iptc'] = None; from interceptor.__main__ import main; sys.exit(main())"
PACKAGE = ("-c", WITHOUT_PACKAGE)
INSTALLED = ("-m", "interceptor")
# In a mount namespace of its own: nothing under these names can be started, or loaded, any more.
HIDE = 'for file in $HIDDEN; do mount --bind /dev/null "$file" || exit 99; done; exec "$@"'


def programs() -> list[str]:
    found = {
        path.resolve() for folder in SEARCH_PATH.split(":") for name in ("nft", "*tables*") for path in Path(folder).glob(name)
    }
    return [str(path) for path in found if path.is_file()]


def libraries() -> list[str]:
    folders = (Path("/usr/lib"), *Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64"))
    names = ("libxtables.so*", "libip4tc.so*", "libip6tc.so*")
    return sorted({str(path.resolve()) for folder in folders for name in names for path in folder.glob(name)})


def interceptor(hidden: list[str], start: tuple[str, ...], *args: str) -> subprocess.CompletedProcess[str]:
    argv = ["unshare", "--mount", "env", f"HIDDEN={' '.join(hidden)}", "sh", "-c", HIDE, "sh", sys.executable, *start, *args]
    return subprocess.run(argv, text=True, capture_output=True, timeout=60, check=False)


def without_anything(*args: str) -> subprocess.CompletedProcess[str]:
    return interceptor(programs(), PACKAGE, *args)


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods(1) as (made,):
        yield made


@pytest.mark.parametrize("command", ["init", "check"])
def test_all_that_is_missing_is_named_and_what_to_install(pod: Pod, command: str) -> None:
    done = without_anything(command, "--netns", pod.name)

    assert (done.returncode, done.stdout) == (6, "")
    for missing in ("nft is not installed", "iptables-nft-restore", "iptables-legacy-restore", "python-iptables"):
        assert missing in done.stderr
    assert "Install the package nftables" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_it_is_json_when_asked(pod: Pod) -> None:
    done = without_anything("init", "--json", "--netns", pod.name)

    assert (done.returncode, done.stderr) == (6, "")
    assert json.loads(done.stdout)["error"]["kind"] == "Unsupported"


@pytest.mark.parametrize("args", [["demo"], ["run", "--", "true"]], ids=["demo", "run"])
def test_the_main_jobs_say_so_too(args: list[str]) -> None:
    done = without_anything(*args)

    assert (done.returncode, done.stdout) == (6, "")
    assert "nothing here can write rules" in done.stderr


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy", "libiptc"])
def test_a_backend_that_is_asked_for_is_a_bad_option(pod: Pod, backend: str) -> None:
    done = without_anything("init", "--netns", pod.name, "--backend", backend)

    assert done.returncode == 2
    assert f"--backend: '{backend}': " in done.stderr
    assert "usable here: none" in done.stderr


def test_a_cgroup_names_the_one_backend_that_could(pod: Pod) -> None:
    done = without_anything("init", "--netns", pod.name, "--proxy-cgroup", "a")

    assert done.returncode == 6
    assert "only nft matches --proxy-cgroup: nft is not installed" in done.stderr


def test_what_this_process_is_short_of_is_not_what_the_kernel_lacks(pod: Pod) -> None:
    before = snapshot(pod)
    for limit in range(6, 20):  # with fewer Python itself does not start
        argv = ["sh", "-c", 'ulimit -n "$0"; exec "$@"', str(limit), sys.executable, *INSTALLED, "init", "--netns", pod.name]
        done = subprocess.run(argv, text=True, capture_output=True, timeout=60, check=False)
        if done.returncode == 0:
            assert limit > 6
            return
        assert "Too many open files" in done.stderr.splitlines()[-1]
        assert snapshot(pod) == before, f"with {limit}: {done.stderr}"
    raise AssertionError(done.stderr)


def test_plan_needs_none(pod: Pod) -> None:
    done = without_anything("plan", "--netns", pod.name)

    assert (done.returncode, done.stderr) == (0, "")
    assert "table inet interceptor {" in done.stdout


def test_clean_of_nothing_succeeds(pod: Pod) -> None:
    done = without_anything("clean", "--netns", pod.name)

    assert (done.returncode, done.stdout) == (0, "nothing to remove\n")


@pytest.mark.iptables
def test_clean_does_not_hide_that_it_cannot_look_into_legacy_tables(pod: Pod) -> None:
    assert interceptor([], INSTALLED, "init", "--netns", pod.name, "--backend", "iptables-legacy").returncode == 0

    done = without_anything("clean", "--netns", pod.name)

    assert "rules of ours that may be there stay" in done.stderr
    assert "Install iptables (iptables-legacy) or python-iptables" in done.stderr


def test_probe_tells_what_the_packets_showed(pod: Pod) -> None:
    done = without_anything("probe", "--json", "--netns", pod.name)

    results = json.loads(done.stdout)
    failed = [result for result in results if result["status"] == "failed"]
    assert done.returncode == 126
    assert failed
    assert all("the rules cannot be compared: nothing here can write rules" in result["detail"] for result in failed)


def test_python_iptables_without_its_libraries_says_what_to_install(pod: Pod) -> None:
    done = interceptor(programs() + libraries(), INSTALLED, "init", "--netns", pod.name)

    assert done.returncode == 5
    assert "libxtables, libip4tc and libip6tc: install the package iptables" in done.stderr
    assert len(done.stderr.splitlines()) == 1
