"""python-iptables is loaded without the programs, and without setuptools, that it would use by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.netns
LOAD = """
import sys
started = []
sys.addaudithook(lambda event, given: started.append(given[0]) if event == "subprocess.Popen" else None)
from interceptor.backends import libiptc_import
libiptc_import.load()
print(started, "setuptools" in sys.modules, "distutils" in sys.modules)
"""


def test_nothing_is_started_to_find_the_libraries() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", LOAD], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False", "False"]
