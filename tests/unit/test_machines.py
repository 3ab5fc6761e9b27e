"""Which tests machines of other kernels run: "short" and "full" mean the same to `make kernels` and to Vagrant."""

from __future__ import annotations

import subprocess
import sys

from vagrant.qemu.suites import FULL, KERNELS, arguments, kernel_tests, short


def test_names_of_lists_stand_for_them() -> None:
    for release in KERNELS:
        assert tuple(arguments(release, "short")) == short(release)
        assert tuple(arguments(release, "full -x")) == (*kernel_tests(release), *FULL, "-x")


def test_all_else_is_pytests_as_a_shell_would_split_it() -> None:
    assert list(arguments("6.1", "tests/netns -k 'not iptables'")) == ["tests/netns", "-k", "not iptables"]


def test_a_kernel_that_nothing_is_known_of_is_not_held_to_what_it_lacks() -> None:
    """Ubuntu's or Rocky's: all else of the short list is run."""
    assert set(arguments("6.8", "short")) == set(short("6.1")) - set(kernel_tests("6.1"))


def test_printed_an_argument_a_line() -> None:
    """As pytest reads them from a file, with @; some ids have spaces."""
    argv = [sys.executable, "-m", "vagrant.qemu.suites", "6.1", "short -x"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout

    assert printed.splitlines() == [*short("6.1"), "-x"]
