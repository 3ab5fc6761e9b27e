"""Hypothesis profiles: "fast" for every run; by HYPOTHESIS_PROFILE "ci" for CI and "deep" for long ones."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings

# Thousands of processes, of pytest and of what is tested, would each compile what they import.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# nohup, and a shell that starts us in the background, have these ignored: whatever the tests start would ignore them as well.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# No deadline: timings are never asserted in tests. Building a Config and a Plan is slow beside what hypothesis expects.
# The explain phase traces every line: minutes.
_COMMON = settings(
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fast", _COMMON, max_examples=15)
settings.register_profile("ci", _COMMON, max_examples=100)
settings.register_profile("deep", _COMMON, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skip is no pass: there everything can run, so a skipped test is one that stopped testing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("skipped tests fail in CI", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
