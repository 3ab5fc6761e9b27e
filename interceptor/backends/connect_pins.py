"""The maps, programs and links of `--outbound connect`, pinned in a bpffs, and what they hold. Knows no plan.

Everything of a network namespace is in one directory; a symbolic link there names the object that its programs are from.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from importlib import resources

from interceptor.bpf import elf, links, places, special
from interceptor.bpf.maps import ARRAY, Map, MapDefinition, create_map
from interceptor.bpf.programs import load
from interceptor.bpf.syscall import object_info
from interceptor.errors import BackendError, Unsupported
from interceptor.render.connect_bytes import KEY_SIZE, MAX_PREFIXES, POLICY_SIZE

POLICY = MapDefinition("policy", ARRAY, 4, POLICY_SIZE, 1)
LISTS = MapDefinition("lists", special.LPM_TRIE, KEY_SIZE, 32, MAX_PREFIXES, special.F_NO_PREALLOC)
INNER = {"active": POLICY, "all_sets": LISTS}
OBJECT = "object"
PROGRAMS = ("connect4", "connect6", "tell_proxy", "getpeername4", "getpeername6")
NEXT = "-next"  # a link to the cgroup that capture moves to; bpffs allows no dot in a name
LINK_INFO = struct.Struct("=III4xQI")  # struct bpf_link_info of a cgroup's: type, id, program, cgroup, attach type
FIRST = bytes(4)


@dataclass(frozen=True, slots=True)
class Held:
    """What the active policy consists of, as the kernel has it."""

    policy: bytes
    lists: dict[bytes, bytes]


def require_bpffs() -> None:
    """Raises Unsupported where nothing can be pinned."""
    if not links.is_bpffs(places.BPFFS):
        raise Unsupported(f"--outbound connect: {places.BPFFS} is no bpffs; mount -t bpf bpf {places.BPFFS}")


class Pins:
    """What is pinned for one network namespace."""

    def __init__(self, cookie: int) -> None:
        self.cookie = cookie
        self.directory = places.connect_directory(cookie)

    @property
    def exist(self) -> bool:
        """Whether anything is there, be it left by a run that was killed."""
        return os.path.isdir(self.directory)

    def maps(self) -> dict[str, Map]:
        """All outer maps, made and pinned where they are missing."""
        require_bpffs()
        for each in (places.root(), self.directory):
            with suppress(FileExistsError):
                os.mkdir(each, 0o700)
        with ExitStack() as opened:
            made = {}
            for definition in _bundled()[0].maps.values():
                made[definition.name] = opened.enter_context(closing(self._map(definition)))
            opened.pop_all()
        return made

    def _map(self, definition: MapDefinition) -> Map:
        path = self._path(definition.name)
        if os.path.exists(path):
            pinned = links.open_pinned_map(path)
            if replace(pinned.definition, name=definition.name) == definition:
                return pinned
            pinned.close()
            raise BackendError(f"--outbound connect: {path} is of a version with another layout; run `interceptor clean` first")
        if definition.name in INNER:
            made = special.create_array_of_maps(definition, INNER[definition.name])
        elif definition.kind == special.SK_STORAGE:
            made = special.create_socket_storage(definition)
        else:
            made = create_map(definition)
        try:
            links.pin(made.descriptor, path)
        except BaseException:
            made.close()
            raise
        return made

    def attach(self, maps: dict[str, Map], cgroup: str, cgroup_id: int) -> None:
        """Every program of ours runs for the cgroup at `cgroup`; links to another one stay until `settle`."""
        source, version = _bundled()
        newest = self.version() == version
        if newest and all(self._find(name, cgroup_id) for name in PROGRAMS):
            return
        loaded = load(source, reuse=maps)
        try:
            for name in PROGRAMS:
                path = self._find(name, cgroup_id)
                if path is None:
                    link = links.attach_cgroup(loaded.programs[name], cgroup)
                    target = self._path(name)
                    with closing(link):  # attached as long as it is open: one that is not pinned must not stay
                        links.pin(link.descriptor, target + NEXT if os.path.exists(target) else target)
                else:
                    with closing(links.open_pinned_link(path)) as link:
                        link.replace(loaded.programs[name])
        finally:
            loaded.close_but(maps)
        self._set_version(version)

    def settle(self, cgroup_id: int) -> None:
        """Detach from every other cgroup than this."""
        for name in PROGRAMS:
            keep = self._find(name, cgroup_id)
            for path in (self._path(name), self._path(name) + NEXT):
                if path != keep:
                    _detach(path)
            if keep == self._path(name) + NEXT:
                os.rename(keep, self._path(name))

    def cgroup_ids(self) -> dict[str, int]:
        """The cgroup that each pinned link is attached to, by the pin's name; 0 when the cgroup is gone."""
        names = (name + end for name in PROGRAMS for end in ("", NEXT))
        return {name: _cgroup_id(self._path(name)) for name in names if os.path.exists(self._path(name))}

    def _find(self, name: str, cgroup_id: int) -> str | None:
        for path in (self._path(name), self._path(name) + NEXT):
            if os.path.exists(path) and _cgroup_id(path) == cgroup_id:
                return path
        return None

    def version(self) -> str:
        """Which object the programs are from; "" when nothing says so."""
        try:
            return os.readlink(self._path(OBJECT))
        except OSError:
            return ""

    def _set_version(self, version: str) -> None:
        fresh = self._path(OBJECT) + NEXT
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        os.symlink(version, fresh)
        os.rename(fresh, self._path(OBJECT))

    def held(self) -> Held | None:
        """The active policy; None when there is none, and nothing is captured."""
        if not os.path.exists(self._path("active")) or not os.path.exists(self._path("all_sets")):
            return None
        with (
            closing(links.open_pinned_map(self._path("active"))) as active,
            closing(links.open_pinned_map(self._path("all_sets"))) as all_sets,
        ):
            return held_in(active, all_sets)

    def remove(self) -> None:
        """Stop capturing in one step, then take everything away, be it what a run that failed has left."""
        if os.path.exists(self._path("active")):
            with closing(links.open_pinned_map(self._path("active"))) as active:
                active_delete(active)
        # Programs before maps: what is left by a kill half-way is still found by its directory.
        for name in [name + end for name in PROGRAMS for end in ("", NEXT)]:
            _detach(self._path(name))
        with suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                links.unpin(self._path(name))
            os.rmdir(self.directory)
        with suppress(OSError):
            os.rmdir(places.root())

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)


def held_in(active: Map, all_sets: Map) -> Held | None:
    """The policy that `active` holds, with its lists."""
    policy = special.inner_of(active, 0)
    if policy is None:
        return None
    with closing(policy):
        content = policy.lookup(FIRST) or b""
    lists = special.inner_of(all_sets, sets_of(content))
    if lists is None:
        return Held(content, {})
    with closing(lists):
        return Held(content, dict(lists.items()))


def sets_of(policy: bytes) -> int:
    """Which lists a policy names."""
    from interceptor.render.connect_bytes import placed_of

    return placed_of(policy).sets


def active_delete(active: Map) -> None:
    """From now on nothing is captured."""
    active.delete(FIRST)


def abandoned() -> Iterator[Pins]:
    """Pins whose cgroup is gone, and the namespace's processes with it."""
    try:
        names = os.listdir(places.root())
    except OSError:
        return
    for name in names:
        number = name.removeprefix(places.CONNECT)
        if number != name and number.isdecimal():
            pins = Pins(int(number))
            ids = pins.cgroup_ids()
            if ids and not any(ids.values()):
                yield pins


def current_version() -> str:
    """Which object this package carries."""
    return _bundled()[1]


def _bundled() -> tuple[elf.BpfObject, str]:
    content = resources.files("interceptor.bpf").joinpath("objects", "connect.bpf.o").read_bytes()
    return elf.read_object(content), hashlib.sha256(content).hexdigest()


def _detach(path: str) -> None:
    if not os.path.exists(path):
        return
    with closing(links.open_pinned_link(path)) as link:
        link.detach()
    links.unpin(path)


def _cgroup_id(path: str) -> int:
    with closing(links.open_pinned_link(path)) as link:
        return int(LINK_INFO.unpack_from(object_info(link.descriptor))[3])
