"""What is read of a host: where a pod's processes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from interceptor import facts
from interceptor.backends import cgroups
from interceptor.errors import ConfigError, Unsupported

POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1b2c3d4e_0f1a_4b2c_8d3e_9f0a1b2c3d4e.slice"
POD_BY_CGROUPFS = "kubepods/besteffort/pod1b2c3d4e-0f1a-4b2c-8d3e-9f0a1b2c3d4e"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("0::/\n", "/"),
        ("0::/user.slice/session.scope\n", "user.slice/session.scope"),
        (f"0::/{POD}/cri-containerd-0123.scope\n", POD),
        (f"0::/{POD}/cri-containerd-0123.scope/deeper\n", POD),
        (f"12:pids:/elsewhere\n0::/{POD_BY_CGROUPFS}/0123abcd\n", POD_BY_CGROUPFS),
        ("0::/podman/libpod-0123.scope\n", "podman/libpod-0123.scope"),
        ("12:pids:/elsewhere\n", None),
    ],
    ids=["root", "session", "systemd driver", "deeper", "cgroupfs driver, hybrid", "no Kubernetes", "no cgroup v2"],
)
def test_pod_cgroup_of_a_pid(lines: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "4711").mkdir()
    (tmp_path / "4711" / "cgroup").write_text(lines)

    assert facts.pod_cgroup("4711", str(tmp_path)) == expected


@pytest.mark.parametrize("namespace", [None, "my-pod", "/run/netns/my-pod", "4711"])
def test_no_pod_cgroup_without_a_process(namespace: str | None, tmp_path: Path) -> None:
    assert facts.pod_cgroup(namespace, str(tmp_path)) is None


MOUNTS = {
    "unified": ("30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"),
    "hybrid": (
        "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n31 30 0:27 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
        "32 30 0:28 / /sys/fs/cgroup/unified rw shared:9 master:1 - cgroup2 cgroup2 rw\n",
        "/sys/fs/cgroup/unified",
    ),
    "blank": ("30 23 0:26 / /sys/fs/c\\040group rw - cgroup2 cgroup2 rw\n", "/sys/fs/c group"),
}


@pytest.mark.parametrize("name", MOUNTS)
def test_where_cgroup_v2_is_mounted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, expected = MOUNTS[name]
    (tmp_path / "mountinfo").write_text(lines)
    monkeypatch.setattr(cgroups, "MOUNTS", str(tmp_path / "mountinfo"))

    assert cgroups.mount_point() == expected


def test_without_cgroup_v2_it_says_what_to_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text("31 30 0:27 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n")
    monkeypatch.setattr(cgroups, "MOUNTS", str(tmp_path / "mountinfo"))

    with pytest.raises(Unsupported, match="mount -t cgroup2"):
        cgroups.mount_point()


def test_cgroup_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(cgroups, "MOUNTS", str(tmp_path / "mountinfo"))

    assert cgroups.directory("/", "--capture-cgroup") == f"{tmp_path}/"
    with pytest.raises(ConfigError, match="--capture-cgroup: .no/such"):
        cgroups.directory("no/such", "--capture-cgroup")
