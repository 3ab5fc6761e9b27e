"""What any caller may rely on, before anything is done: the specification's environment, versions and errors."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from interceptor.netns import entered
from tests.cni.calling import Binary, variables
from tests.rig.net import Pod

SUPPORTED = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
REQUIRED = {"ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"), "DEL": ("CNI_CONTAINERID", "CNI_IFNAME")}
REQUIRED["CHECK"] = REQUIRED["ADD"]


def test_version_needs_nothing_and_waits_for_nothing(binary: Binary) -> None:
    with entered(binary.runtime.path):
        # stdin stays open and silent: a plugin that reads it would not end.
        running = subprocess.Popen(
            binary.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"CNI_COMMAND": "VERSION"}, text=True
        )
    assert running.stdin is not None
    assert running.stdout is not None
    with running.stdin, running.stdout:
        assert running.wait(timeout=20) == 0
        answered = json.loads(running.stdout.read())
    assert answered["supportedVersions"] == SUPPORTED
    assert answered["cniVersion"] in SUPPORTED


@pytest.mark.parametrize("command", ["", "add", "NONSENSE", None])
def test_an_unknown_command_is_refused(binary: Binary, command: str | None) -> None:
    assert binary.call(command).code == 4


@pytest.mark.parametrize(("command", "name"), [(command, name) for command in REQUIRED for name in REQUIRED[command]])
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_a_missing_variable_is_named(binary: Binary, pod: Pod, command: str, name: str, value: str | None) -> None:
    done = binary.call(command, pod.path, **{name: value})
    assert done.code == 4
    assert name in done.object["msg"]


@pytest.mark.parametrize("identifier", ["-a", ".a", "a/b", "a b", "ä", "a\n"])
def test_a_bad_container_id_is_refused(binary: Binary, pod: Pod, identifier: str) -> None:
    assert binary.call("ADD", pod.path, CNI_CONTAINERID=identifier).code == 4


@pytest.mark.parametrize("ifname", [".", "..", "a/b", "a:b", "a b", "sixteen-letters-"])
def test_a_bad_interface_name_is_refused(binary: Binary, pod: Pod, ifname: str) -> None:
    assert binary.call("ADD", pod.path, CNI_IFNAME=ifname).code == 4


@pytest.mark.parametrize(
    "stdin",
    [b"", b"{", b"nonsense", b'{"a": "\xff"}', b'{"a": NaN}', b"[" * 100_000, b"null", b"[]", b'"x"', b"1"],
    ids=lambda text: repr(text[:9]),
)
def test_stdin_that_is_no_json_object_is_refused(binary: Binary, pod: Pod, stdin: bytes) -> None:
    assert binary.call("ADD", pod.path, stdin).code == 6


def test_a_configuration_that_is_cut_off_is_refused(binary: Binary, pod: Pod) -> None:
    whole = json.dumps(binary.config()).encode()
    # In the middle of the last string: the agent's socket, where there is one.
    assert [binary.call("ADD", pod.path, whole[:-cut], timeout_s=10).code for cut in (1, 3, 20)] == [6, 6, 6]


@pytest.mark.parametrize("name", [None, "", 3, "a/b", "-x"])
def test_a_bad_network_name_is_refused(binary: Binary, pod: Pod, name: Any) -> None:
    assert binary.call("ADD", pod.path, binary.config(name=name)).code == 7


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("version", ["0.2.0", "0.3.0", "2.0.0", "nonsense", ""])
def test_an_unsupported_version_is_refused(binary: Binary, pod: Pod, command: str, version: str) -> None:
    assert binary.call(command, pod.path, binary.config(cniVersion=version)).code == 1


@pytest.mark.parametrize("version", [1, 1.0, [], {}])
def test_a_version_that_is_no_text_is_refused(binary: Binary, pod: Pod, version: Any) -> None:
    assert binary.call("ADD", pod.path, binary.config(cniVersion=version)).code == 6


@pytest.mark.parametrize(
    ("command", "version"), [("CHECK", "0.3.1"), ("GC", "0.4.0"), ("GC", "1.0.0"), ("STATUS", "0.3.1"), ("STATUS", "1.0.0")]
)
def test_a_command_younger_than_the_version_is_refused(binary: Binary, pod: Pod, command: str, version: str) -> None:
    assert binary.call(command, pod.path, binary.config(version)).code == 1


@pytest.mark.parametrize("version", SUPPORTED)
def test_an_error_speaks_the_configurations_version(binary: Binary, pod: Pod, version: str) -> None:
    assert binary.call("ADD", pod.path, binary.config(version, prevResult=None)).object["cniVersion"] == version


def test_success_is_silent_on_stderr(binary: Binary, pod: Pod) -> None:
    assert [binary.call(command, pod.path).stderr for command in ("ADD", "CHECK", "DEL")] == ["", "", ""]


def test_stdout_ends_with_the_program(binary: Binary, pod: Pod) -> None:
    # A child that inherits stdout keeps the runtime waiting for its end.
    stdin = json.dumps(binary.config()).encode()
    with entered(binary.runtime.path):
        running = subprocess.Popen(
            binary.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables("ADD", pod.path, {})
        )
    output, _ = running.communicate(stdin, timeout=20)
    assert json.loads(output)["cniVersion"] == "1.0.0"
