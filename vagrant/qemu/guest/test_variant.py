"""Inside a machine that lacks something: `init` takes the right path, or says plainly why it can't and changes nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vagrant.qemu.guest.trial import INTERCEPTOR, Step, Trial, trial
from vagrant.qemu.variants import OK, VARIANTS, Case

NAME = os.environ["VARIANT"]


@pytest.mark.parametrize("case", VARIANTS[NAME].cases, ids=str)
def test_variant(case: Case) -> None:
    done = trial(case.options.split())

    assert done.init.status == case.status, done.init.said
    assert [text for text in case.says if text not in done.init.said] == [], done.init.said
    if case.status == OK:
        assert (done.backend, done.check, done.probe) == (case.backend, *_both_fine(done))
    assert done.left_by_init == ""
    assert done.clean.status == OK, done.clean.said
    assert done.left == ""


def test_doctor_agrees() -> None:
    case = VARIANTS[NAME].cases[0]
    argv = [*INTERCEPTOR, "doctor", "--json", *case.options.split()]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600)
    Path("/out/doctor.json").write_text(done.stdout)

    assert done.returncode == case.status, done.stderr


def _both_fine(done: Trial) -> tuple[Step, Step]:
    """What check and probe said, and that they exited 0."""
    assert done.check is not None
    assert done.probe is not None
    return Step(OK, done.check.said), Step(OK, done.probe.said)
