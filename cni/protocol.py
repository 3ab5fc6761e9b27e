"""The CNI specification, as data in and out: requests, errors, results of versions 0.3.1 to 1.1.0. No I/O.

Section numbers are those of the specification (containernetworking/cni SPEC.md, 1.1.0); where it leaves the order of checks
open, they are made as its library's `skel` makes them, since that is what runtimes were tried with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from cni import strict_json

Command: TypeAlias = Literal["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]
JsonObject: TypeAlias = dict[str, Any]

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST = VERSIONS[-1]
# The version that brought each command (section 2), and what a command cannot do without (section 3, "Parameters").
SINCE: dict[str, str] = {"ADD": "0.3.1", "DEL": "0.3.1", "CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0", "VERSION": "0.3.1"}
REQUIRED: dict[str, tuple[str, ...]] = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
    "VERSION": (),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
IFNAME_MAX = 15  # IFNAMSIZ - 1, linux/if.h

# Section 5, "Error".
INCOMPATIBLE_VERSION = 1
INVALID_ENVIRONMENT = 4
DECODING = 6
INVALID_CONFIG = 7
INVALID_NETNS = 8  # libcni's
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
INTERNAL = 999  # libcni's
# Ours.
CAPTURE_FAILED = 100
UNSUPPORTED_HOST = 101
DRIFTED = 102


class CniError(Exception):
    """An answer that is an error: what a runtime shows, and what it does next, depends on `code`."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        self.code = code
        self.msg = msg
        self.details = details
        super().__init__(f"{msg}: {details}" if details else msg)

    def to_json(self, version: str) -> JsonObject:
        """The error object of section 5, in the version that the configuration speaks."""
        found: JsonObject = {"cniVersion": version, "code": self.code, "msg": self.msg}
        return found | ({"details": self.details} if self.details else {})


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a plugin. `netns` is "" where there is none; `args` are the pairs of CNI_ARGS; `config` is stdin, whole."""

    command: Command
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    version: str = LATEST
    may_be_own_netns: bool = False


def parse(environment: Mapping[str, str], stdin: bytes) -> Request:
    """The request in `environment` and `stdin`. Raises CniError."""
    command = command_of(environment)
    _check_environment(command, environment)
    args = _args(environment.get("CNI_ARGS", ""), lenient=command == "DEL")
    config = _config(stdin)
    version = _version(config)
    name = config.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CniError(INVALID_CONFIG, f"name {name!r} is missing or not a network's name", f"wanted: {_NAME.pattern}")
    if version not in VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion {version!r} is not supported", f"supported: {', '.join(VERSIONS)}")
    if VERSIONS.index(version) < VERSIONS.index(SINCE[command]):
        raise CniError(INCOMPATIBLE_VERSION, f"{command} needs cniVersion {SINCE[command]} or newer", f"configured: {version}")
    return Request(
        command,
        environment.get("CNI_CONTAINERID", ""),
        environment.get("CNI_NETNS", ""),
        environment.get("CNI_IFNAME", ""),
        args,
        config,
        version,
        environment.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "true"),
    )


def command_of(environment: Mapping[str, str]) -> Command:
    """CNI_COMMAND. Raises CniError when it is missing or unknown."""
    given = environment.get("CNI_COMMAND", "")
    for command in REQUIRED:
        if given == command:
            return command  # type: ignore[return-value]  # REQUIRED's keys are the Commands
    if not given:
        raise CniError(INVALID_ENVIRONMENT, "CNI_COMMAND is missing", "this program is called by a container runtime")
    raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND {given!r} is unknown", f"known: {', '.join(REQUIRED)}")


def _check_environment(command: Command, environment: Mapping[str, str]) -> None:
    missing = [name for name in REQUIRED[command] if not environment.get(name)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"required for {command} and missing: {', '.join(missing)}")
    container = environment.get("CNI_CONTAINERID", "")
    if "CNI_CONTAINERID" in REQUIRED[command] and not _NAME.fullmatch(container):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_CONTAINERID {container!r} is no container id", f"wanted: {_NAME.pattern}")
    ifname = environment.get("CNI_IFNAME", "")
    if "CNI_IFNAME" in REQUIRED[command] and not _is_ifname(ifname):
        raise CniError(
            INVALID_ENVIRONMENT,
            f"CNI_IFNAME {ifname!r} is no interface name",
            f"wanted: at most {IFNAME_MAX} bytes without '/', ':' and space, and not . or ..",
        )


def _is_ifname(name: str) -> bool:
    too_long = len(name.encode("utf-8", "surrogateescape")) > IFNAME_MAX
    return not too_long and name not in (".", "..") and not any(char in "/:" or char.isspace() for char in name)


def _args(text: str, *, lenient: bool) -> dict[str, str]:
    # K=V;K=V (section 3). A value may hold "=": only the first divides.
    found = {}
    for item in filter(None, text.split(";")):
        key, equals, value = item.partition("=")
        if equals:
            found[key] = value
        elif not lenient:
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {item!r} is no KEY=VALUE", text)
    return found


def _config(stdin: bytes) -> JsonObject:
    try:
        found = strict_json.loads(stdin.decode())
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING, "the network configuration on stdin is not JSON", str(error)) from error
    if not isinstance(found, dict):
        raise CniError(DECODING, "the network configuration on stdin is not a JSON object", type(found).__name__)
    return found


def _version(config: Mapping[str, Any]) -> str:
    version = config.get("cniVersion", "")
    if not isinstance(version, str):
        raise CniError(DECODING, f"cniVersion {version!r} is not text", f"supported: {', '.join(VERSIONS)}")
    return version


def error_version(stdin: bytes) -> str:
    """The version an error is answered in: the configuration's where it can be read (section 5)."""
    try:
        version = _version(_config(stdin))
    except CniError:
        return LATEST
    return version if version in VERSIONS else LATEST


def versions() -> JsonObject:
    """The answer to VERSION (section 3)."""
    return {"cniVersion": LATEST, "supportedVersions": list(VERSIONS)}


def passed_on(request: Request) -> JsonObject:
    """The result of the plugins before us, as our own: in the configuration's version, and nothing else changed.

    Raises CniError when there is none: a chained plugin needs a chain (section 4, "Plugin result").
    """
    previous = request.config.get("prevResult")
    if previous is None:
        raise CniError(
            INVALID_CONFIG,
            "prevResult is missing: this plugin stands behind a primary one",
            "put its entry after the primary plugin's in the conflist's `plugins`",
        )
    _check_result(previous)
    found: JsonObject = {**previous, "cniVersion": request.version}
    if "ips" in previous:
        # From 1.0.0 an address has no "version" beside it; before, it must (SPEC 0.4.0 "IPs").
        with_version = request.version < "1.0.0"
        found["ips"] = [_with_version(ip) if with_version else _without_version(ip) for ip in previous["ips"]]
    return found


def _check_result(previous: object) -> None:
    if not isinstance(previous, dict):
        raise CniError(INVALID_CONFIG, "prevResult is not a JSON object", type(previous).__name__)
    version = previous.get("cniVersion", LATEST)
    if version not in VERSIONS:
        raise CniError(INVALID_CONFIG, f"prevResult's cniVersion {version!r} is not supported", ", ".join(VERSIONS))
    ips = previous.get("ips", [])
    if not isinstance(ips, list) or not all(isinstance(ip, dict) and isinstance(ip.get("address"), str) for ip in ips):
        raise CniError(INVALID_CONFIG, "prevResult's ips are not a list of objects with an address", repr(ips)[:200])


def _with_version(ip: JsonObject) -> JsonObject:
    return {"version": "6" if ":" in ip["address"] else "4", **ip}


def _without_version(ip: JsonObject) -> JsonObject:
    return {key: value for key, value in ip.items() if key != "version"}
