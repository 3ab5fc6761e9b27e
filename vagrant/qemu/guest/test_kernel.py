"""Inside a machine with everything installed: doctor says what this kernel lacks; what needs it is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.rig.kernel import NFT_ONLY
from vagrant.qemu.guest.trial import INTERCEPTOR, difference, pod, state
from vagrant.qemu.suites import LACKS

LACKING = LACKS[os.environ["KERNEL"]]
UNSUPPORTED, CANNOT_START = 6, 7  # docs/exit-codes.md


def test_doctor_says_what_this_kernel_lacks() -> None:
    done = subprocess.run([*INTERCEPTOR, "doctor", "--json"], capture_output=True, text=True, check=False, timeout=300)
    Path("/out/doctor.json").write_text(done.stdout)

    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert {each["name"] for each in findings if each["status"] == "missing"} == set(LACKING)
    assert [each for each in findings if each["status"] == "unknown" and each["area"] in ("rules", "bpf")] == []
    # Which programs are installed is not the kernel's.
    by_backend = [each for each in findings if each["by_backend"] and each["name"] != "backends"]
    assert [each["name"] for each in by_backend if any(each["by_backend"].values())] == [
        each["name"] for each in by_backend if each["name"] in LACKING
    ]
    if not NFT_ONLY:
        assert {each["status"] for each in findings if each["name"] == "backends"} == {"ok"}


@pytest.mark.parametrize("command", LACKING.values(), ids=str)
def test_what_needs_it_is_refused_and_nothing_is_changed(command: str) -> None:
    verb, *options = command.split()
    with pod() as name:
        before = state(name)
        argv = [*INTERCEPTOR, verb, "--netns", name, *options]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
        after = state(name)

    assert done.returncode == (CANNOT_START if verb == "proxy" else UNSUPPORTED), done.stderr
    assert "Linux" in done.stderr or "lacks" in done.stderr, done.stderr
    assert difference(before, after) == ""
