"""What the documents show is what the program prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A fenced block whose first line is a command, and its whole output.
BLOCK = re.compile(r"```console\n\$ (interceptor [^\n]+)\n(.*?)```", re.DOTALL)
SHOWN = [
    pytest.param(path, command, output, id=f"{path.name}: {command}")
    for path in sorted((ROOT / "docs").rglob("*.md"))
    for command, output in BLOCK.findall(path.read_text())
]


def printed(command: str) -> str:
    """What `command` prints on stdout."""
    argv = [sys.executable, "-m", "interceptor", *shlex.split(command)[1:]]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("path", "command", "output"), SHOWN)
def test_document_shows_what_the_program_prints(path: Path, command: str, output: str) -> None:
    assert printed(command) == output, f"{path}: run `make docs`"


def test_rules_document_shows_the_default_ruleset() -> None:
    assert any(path.name == "rules.md" and "plan" in command for path, command, _ in (param.values for param in SHOWN))


def test_connect_document_shows_a_policy_as_it_is_printed() -> None:
    # Not a command of the document: it would print the addresses of the machine that runs the test.
    assert f"```text\n{plan_of_connect()}```" in (ROOT / "docs" / "connect.md").read_text()


def plan_of_connect() -> str:
    """What the golden case prints."""
    return (ROOT / "tests" / "golden" / "connect.connect").read_text()


def test_every_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"^ {4}interceptor (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    listed = printed("interceptor --help")

    assert commands
    assert {command for command in commands if not re.search(rf"^\s+{command}\s", listed, re.MULTILINE)} == set()
