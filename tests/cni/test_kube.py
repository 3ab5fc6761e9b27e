"""Our API client against a server that lists, watches, expires and refuses; and that server against the official client."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import kubernetes
import pytest

from cni.annotations.view import view
from cni.kube import actions
from cni.kube.api import Api, ApiError, Server
from cni.kube.pods import Pods, known_pod
from cni.protocol import CniError
from interceptor.netns import entered
from tests.cni.agents import wait_until
from tests.rig.kube_api import Api as FakeApi
from tests.rig.kube_api import kube_api
from tests.rig.net import Pod

_Found = TypeVar("_Found")


@pytest.fixture
def fake(runtime: Pod, tmp_path: Path) -> Iterator[FakeApi]:
    with kube_api(runtime, tmp_path) as api:
        yield api


@pytest.fixture
def api(fake: FakeApi) -> Api:
    return Api(Server(fake.url, fake.token_file, fake.ca_file))


@pytest.fixture
def following(api: Api, runtime: Pod) -> Iterator[Pods]:
    """Pods of node-1, followed from within the namespace where the server is."""
    pods = Pods(api, "node-1")
    with entered(runtime.path):
        pods.start()
    wait_until(lambda: pods.is_synced)
    yield pods
    pods.stop()


def inside(runtime: Pod, work: Callable[[], _Found]) -> _Found:
    with entered(runtime.path):
        return work()


def names(pods: Pods) -> list[str]:
    return sorted(pod.view.name for pod in pods.all())


def test_the_official_client_works_against_the_server(fake: FakeApi, runtime: Pod) -> None:
    configuration = kubernetes.client.Configuration(host=fake.url, api_key={"authorization": "Bearer good"})
    configuration.ssl_ca_cert = fake.ca_file
    fake.pod("web")
    fake.pod("other", node="node-2")
    with entered(runtime.path), kubernetes.client.ApiClient(configuration) as client:
        core = kubernetes.client.CoreV1Api(client)
        listed = core.list_pod_for_all_namespaces(field_selector="spec.nodeName=node-1", limit=1)
        assert [pod.metadata.name for pod in listed.items] == ["web"]
        core.patch_namespaced_pod("web", "shop", {"metadata": {"labels": {"a": "b"}}})
        version = listed.metadata.resource_version
        events = kubernetes.watch.Watch().stream(
            core.list_pod_for_all_namespaces, resource_version=version, timeout_seconds=1, field_selector="spec.nodeName=node-1"
        )
        assert [(event["type"], event["object"].metadata.labels) for event in events] == [("MODIFIED", {"a": "b"})]
        with pytest.raises(kubernetes.client.ApiException, match="409"):
            core.delete_namespaced_pod("web", "shop", body=kubernetes.client.V1DeleteOptions(preconditions={"uid": "another"}))
        fake.compact()
        with pytest.raises(kubernetes.client.ApiException, match="410"):
            list(kubernetes.watch.Watch().stream(core.list_pod_for_all_namespaces, resource_version=version, timeout_seconds=1))


def test_kubectl_works_against_the_server(fake: FakeApi, runtime: Pod, tmp_path: Path) -> None:
    def kubectl(*words: str) -> str:
        login = ("--kubeconfig=/dev/null", f"--server={fake.url}", f"--certificate-authority={fake.ca_file}", "--token=good")
        with entered(runtime.path):
            done = subprocess.run(
                ["kubectl", *login, f"--cache-dir={tmp_path}/cache", *words],
                capture_output=True,
                text=True,
                check=False,
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                timeout=60,
            )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fake.pod("web")
    fake.pod("other", node="node-2")
    assert kubectl("get", "pods", "-A", "-o", "name").split() == ["pod/other", "pod/web"]
    assert kubectl("get", "pods", "-n", "shop", "--field-selector", "spec.nodeName=node-1", "-o", "name").split() == ["pod/web"]
    kubectl("-n", "shop", "annotate", "pod", "web", "interceptor.io/dns=all")
    kubectl("-n", "shop", "label", "pod", "web", "interceptor.io/uncaptured=true")
    found = (fake.get("pods", "shop", "web") or {})["metadata"]
    assert (found["annotations"], found["labels"]) == ({"interceptor.io/dns": "all"}, {"interceptor.io/uncaptured": "true"})
    kubectl("taint", "node", "node-1", "interceptor.io/not-ready:NoSchedule")
    assert [taint["key"] for taint in (fake.get("nodes", "", "node-1") or {})["spec"]["taints"]] == ["interceptor.io/not-ready"]
    # delete, then a watch until it is gone: list, watch and the deleted object's event.
    assert "deleted" in kubectl("-n", "shop", "delete", "pod", "other", "--wait=true", "--timeout=30s")
    assert kubectl("get", "pods", "-A", "-o", "name").split() == ["pod/web"]


def test_pods_of_this_node_are_followed(fake: FakeApi, following: Pods) -> None:
    fake.pod("web")
    fake.pod("other", node="node-2")
    wait_until(lambda: names(following) == ["web"])
    fake.pod("web", metadata={"annotations": {"interceptor.io/dns": "all"}})
    wait_until(lambda: following.all()[0].view.annotations == {"interceptor.io/dns": "all"})
    fake.remove("pods", "shop", "web")
    wait_until(lambda: names(following) == [])


def test_a_long_list_comes_in_pages(fake: FakeApi, api: Api, runtime: Pod) -> None:
    for number in range(250):
        fake.pod(f"web-{number:03}")
    pods = Pods(api, "node-1")
    with entered(runtime.path):
        pods.start()
    wait_until(lambda: pods.is_synced)
    pods.stop()
    assert len(pods.all()) == 250
    assert sum("limit=100" in path for _, path in fake.requests) == 3


def test_a_watch_that_ends_goes_on_where_it_was(fake: FakeApi, following: Pods) -> None:
    fake.pod("web")
    wait_until(lambda: names(following) == ["web"])
    lists = sum("watch" not in path for _, path in fake.requests)
    fake.end_watches()
    fake.pod("web-2")
    wait_until(lambda: names(following) == ["web", "web-2"])
    assert sum("watch" not in path for _, path in fake.requests) == lists


def test_what_was_missed_is_in_a_new_list(fake: FakeApi, following: Pods) -> None:
    fake.pod("web")
    wait_until(lambda: names(following) == ["web"])
    fake.is_down = True
    fake.end_watches()
    fake.remove("pods", "shop", "web")
    fake.pod("web-2")
    fake.compact()
    fake.is_down = False
    wait_until(lambda: names(following) == ["web-2"])


def test_bookmarks_carry_a_quiet_watch_over_a_compaction(fake: FakeApi, following: Pods) -> None:
    fake.bookmark_s = 0.005
    watching = wait_until(lambda: next((path for _, path in fake.requests if "watch=true" in path), None))
    assert "allowWatchBookmarks=true" in watching
    fake.put("namespaces", {"metadata": {"name": "elsewhere"}})  # moves the version on, and is no pod of ours
    version = int(fake.put("namespaces", {"metadata": {"name": "elsewhere-2"}})["metadata"]["resourceVersion"])

    def resumed_from() -> int:
        fake.end_watches()
        watches = [path for _, path in fake.requests if "watch=true" in path]
        return int(watches[-1].split("resourceVersion=")[1].split("&")[0])

    wait_until(lambda: resumed_from() >= version)


@pytest.mark.parametrize("trouble", ["gone", "ended"])
def test_a_server_that_ends_each_watch_is_not_asked_without_pause(
    fake: FakeApi, api: Api, runtime: Pod, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.watch_s = 0 if trouble == "ended" else 60
    if trouble == "gone":
        monkeypatch.setattr(fake, "_oldest", 1 << 30)
    pauses: list[float] = []
    pods = Pods(api, "node-1")
    wait = pods._stopping.wait

    def noted(timeout: float) -> bool:
        pauses.append(timeout)
        return wait(timeout)

    monkeypatch.setattr(pods._stopping, "wait", noted)
    with entered(runtime.path):
        pods.start()
    wait_until(lambda: len(pauses) > 2)
    pods.stop()
    watches = sum("watch=true" in path for _, path in fake.requests)
    assert watches <= len(pauses) + 1
    assert min(pauses) > 0


def test_an_event_that_is_not_understood_ends_nothing(fake: FakeApi, following: Pods) -> None:
    fake.pod("web", status={"phase": "Running", "podIPs": 5})
    fake.remove("pods", "shop", "web")
    fake.pod("web-2")
    wait_until(lambda: names(following) == ["web-2"])


@pytest.mark.parametrize("url", ["http://[x", "http://x:99999", "http://x:0", "https://", "ftp://x", "x"])
def test_what_is_no_servers_url_is_told(url: str) -> None:
    with pytest.raises(ApiError, match="URL"):
        Api(Server(url))


def test_a_token_that_was_replaced_is_read_again(fake: FakeApi, following: Pods) -> None:
    fake.tokens = {"newer"}
    fake.end_watches()
    wait_until(lambda: len(fake.requests) > 5)
    Path(fake.token_file).write_text("newer")
    fake.pod("web")
    wait_until(lambda: names(following) == ["web"])


def test_a_pod_is_looked_up_with_its_namespaces_annotations(fake: FakeApi, api: Api, runtime: Pod) -> None:
    fake.put("namespaces", {"metadata": {"name": "shop", "annotations": {"interceptor.io/dns": "all"}}})
    uid = fake.pod("web")["metadata"]["uid"]
    found = inside(runtime, lambda: Pods(api, "node-1").lookup("shop", "web", uid))
    assert (found.uid, found.namespace_annotations) == (uid, {"interceptor.io/dns": "all"})


def test_a_pod_of_the_same_name_is_not_taken_for_it(fake: FakeApi, api: Api, following: Pods, runtime: Pod) -> None:
    fake.pod("web")
    wait_until(lambda: names(following) == ["web"])
    with pytest.raises(CniError, match="does not tell") as refused:
        inside(runtime, lambda: following.lookup("shop", "web", "another-uid", patience_s=0.1))
    assert refused.value.code == 11


@pytest.mark.parametrize("trouble", ["down", "unauthorized", "missing", "no-token", "no-tokens-text"])
def test_what_the_api_does_not_tell_is_to_be_tried_again(fake: FakeApi, api: Api, runtime: Pod, trouble: str) -> None:
    match trouble:
        case "down":
            fake.is_down = True
        case "unauthorized":
            fake.tokens = set()
        case "no-token":
            Path(fake.token_file).unlink()
        case "no-tokens-text":
            Path(fake.token_file).write_text("two\nlines")
    with pytest.raises(CniError) as refused:
        inside(runtime, lambda: Pods(api, "node-1").lookup("shop", "web", "", patience_s=0.1))
    assert refused.value.code == 11
    assert refused.value.details


def test_another_authoritys_server_is_not_trusted(fake: FakeApi, runtime: Pod) -> None:
    with pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED"):
        inside(runtime, lambda: Api(Server(fake.url, fake.token_file)).get("/api/v1/pods"))


def test_a_pod_is_labelled_and_told_of(fake: FakeApi, api: Api, runtime: Pod) -> None:
    found = view(fake.pod("web", metadata={"labels": {"app": "web"}}), {})
    inside(runtime, lambda: actions.label(api, found))
    labelled = fake.get("pods", "shop", "web")
    assert labelled is not None
    assert labelled["metadata"]["labels"] == {"app": "web", "interceptor.io/uncaptured": "true"}
    inside(runtime, lambda: actions.event(api, found, "node-1", "Healed", "its rules were written again", "Normal"))
    inside(runtime, lambda: actions.event(api, found, "node-1", "Healed", "again", "Normal"))
    assert [(each["reason"], each["involvedObject"]["uid"]) for each in fake.all("events")] == [("Healed", found.uid)] * 2


def test_only_the_pod_that_was_seen_is_deleted(fake: FakeApi, api: Api, runtime: Pod) -> None:
    seen = known_pod(fake.pod("web"))
    fake.pod("web", metadata={"annotations": {"changed": "since"}})
    inside(runtime, lambda: actions.delete(api, seen))
    assert fake.get("pods", "shop", "web") is not None
    inside(runtime, lambda: actions.delete(api, known_pod(fake.get("pods", "shop", "web") or {})))
    assert fake.get("pods", "shop", "web") is None


def test_our_taint_alone_is_taken_away(fake: FakeApi, api: Api, runtime: Pod) -> None:
    ours: dict[str, Any] = {"key": "interceptor.io/not-ready", "effect": "NoSchedule"}
    other = {"key": "example.com/x", "effect": "NoExecute"}
    fake.put("nodes", {"metadata": {"name": "node-1"}, "spec": {"taints": [other, ours]}})
    assert inside(runtime, lambda: actions.remove_taint(api, "node-1"))
    node = fake.get("nodes", "", "node-1")
    assert node is not None
    assert node["spec"]["taints"] == [other]
    assert not inside(runtime, lambda: actions.remove_taint(api, "node-1"))
