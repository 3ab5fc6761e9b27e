"""Programs that are asked line by line: what comes of one that fails, stalls or ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from interceptor.backends.process import Child
from interceptor.errors import BackendError


@contextmanager
def running(code: str) -> Iterator[Child]:
    with closing(Child([sys.executable, "-c", f"import sys, os\n{code}"], {"GIVEN": "yes"})) as child:
        yield child


def test_a_child_answers_line_by_line() -> None:
    with running("for line in sys.stdin: print(os.environ['GIVEN'], line.strip() * 20000, flush=True)") as child:
        for text in ("a", "b"):
            assert child.ask(text, doing="asking") == f"yes {text * 20000}\n"


def test_a_child_that_ends_is_told_with_what_it_said() -> None:
    with running("sys.stdin.readline(); sys.exit('no such luck')") as child:
        with pytest.raises(BackendError, match=r"(?s)asking: .* exit 1: no such luck"):
            child.ask("?", doing="asking")
        with pytest.raises(BackendError, match="no such luck"):
            child.ask("?", doing="asking")


@pytest.mark.parametrize("code", ["sys.stdin.read()", "print('half', end='', flush=True); sys.stdin.read()"])
def test_a_child_that_does_not_answer_is_not_waited_for(code: str) -> None:
    with running(code) as child, pytest.raises(BackendError, match="no answer for 0.1 s"):
        child.ask("?", doing="asking", timeout_s=0.1)
