"""Run the proxy as a command does: flows to a descriptor, an admin port, in this process or in several workers."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping
from select import EPOLLIN
from typing import Any, NamedTuple

from interceptor.proxy.admin import open_admin
from interceptor.proxy.admin_http import AdminHttp
from interceptor.proxy.dns.names import Names
from interceptor.proxy.dns.upstreams import parse_resolvers
from interceptor.proxy.flow_log import FlowLog
from interceptor.proxy.listeners import BoundListener, open_for_workers, with_own_view
from interceptor.proxy.loop import Loop
from interceptor.proxy.metrics import Region, summary
from interceptor.proxy.readiness import Readiness
from interceptor.proxy.relay.packet_attach import Attached
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.server import Proxy
from interceptor.proxy.settings import ListenFamily, ProxySettings
from interceptor.proxy.shown import Shown
from interceptor.proxy.workers import Link, Supervisor

# Connections make no cycles that outlive them; what little there is elsewhere can wait. By default, the collector would look
# at every waiting connection again and again (700 objects), and stop all of them meanwhile.
GC_THRESHOLD = 50_000

Summary = dict[str, int | dict[str, int]]


class Shared(NamedTuple):
    """What all workers write in or show, made before they are.

    attached: the packet relay's programs, when `settings.relay` is packet; attached once.
    """

    region: Region
    names: Names | None
    options: Mapping[str, Any]
    attached: Attached | None = None


def serve(
    settings: ProxySettings,
    workers: int,
    flows: int,
    on_ready: Callable[[], None],
    options: Mapping[str, Any],
    attached: Attached | None = None,
) -> tuple[int, Summary]:
    """Serve until told to stop; the exit code, and what was counted.

    `flows` is the descriptor for the records; `options` is what the admin port shows as the configuration;
    `attached` are the packet relay's programs, when `settings.relay` is packet.
    Raises ProxyError when a port cannot be had.
    """
    shared = Shared(Region(workers), Names() if settings.dns_port is not None else None, options, attached)
    if settings.dns_port is not None:
        # Before workers are forked, so that they share its 5 MB; and before the proxy becomes a user who may not read it.
        from interceptor.proxy.dns import datagrams, streams  # noqa: F401
    listeners = open_for_workers(settings, workers)
    # Here already: a worker could only die of it, again and again.
    parse_resolvers(settings.resolvers, settings.own_ports, listeners[0][0].view.netlink.is_local)
    run = _run_alone if workers == 1 else _run_workers
    code = run(settings, listeners, flows, on_ready, shared)
    return code, summary(shared.region.totals())


def _run_alone(
    settings: ProxySettings,
    listeners: list[list[BoundListener]],
    flows: int,
    on_ready: Callable[[], None],
    shared: Shared,
) -> int:
    region, names, options, attached = shared
    counts = region.worker(0)
    log = FlowLog(flows, counts)
    proxy = Proxy(settings, listeners[0], log.write, counts=counts, names=names, flow_table=_flow_table(attached, 0))
    admin = _admin(settings, Shown(proxy, region, options))

    def ready() -> None:
        if admin is not None:
            admin.start()  # not before the proxy has become its own user
        _announce(proxy, settings)
        on_ready()

    try:
        _run(proxy, ready)
    finally:
        if admin is not None:
            admin.close()
        log.close()
    return 0


def _run_workers(
    settings: ProxySettings,
    listeners: list[list[BoundListener]],
    flows: int,
    on_ready: Callable[[], None],
    shared: Shared,
) -> int:
    region, names, options, attached = shared
    admin: AdminHttp | None = None

    def serve_as(link: Link) -> int:
        if admin is not None:
            admin.abandon()
        for theirs in (*listeners[: link.index], *listeners[link.index + 1 :]):
            for each in theirs:
                each.close()
        counts = region.worker(link.index)
        bound = with_own_view(listeners[link.index])
        table = _flow_table(attached, link.index)
        log = FlowLog(flows, counts)
        proxy = Proxy(settings, bound, log.write, counts=counts, names=names, flow_table=table)
        proxy.stop_at_end_of(link.lifeline)
        proxy.answer(link.asked)

        def ready() -> None:
            # Every worker: the supervisor is not the proxy's user. What waits in the others' queues is served in a moment.
            _announce(proxy, settings)
            link.say_ready()

        _run(proxy, ready)
        log.close()
        return 0

    def let_go() -> None:
        for each in itertools.chain(*listeners):
            each.close()

    supervisor = Supervisor(len(listeners), serve_as, let_go, settings.drain_deadline_s, region)
    admin = _admin(settings, Shown(supervisor, region, options))
    if admin is not None:
        _answer_on(supervisor.loop, admin)
    try:
        return supervisor.run(on_ready)
    finally:
        if admin is not None:
            admin.close()


def _flow_table(attached: Attached | None, worker: int) -> FlowTable | None:
    return None if attached is None else FlowTable(attached, worker)


def _run(proxy: Proxy, on_ready: Callable[[], None]) -> None:
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    proxy.run(on_ready)


def _announce(proxy: Proxy, settings: ProxySettings) -> None:
    if settings.announce_to:
        Readiness(proxy.later, settings.announce_to, settings.probe_port, settings.upstream_mark).begin()


def _admin(settings: ProxySettings, shown: Shown) -> AdminHttp | None:
    if settings.admin_port is None:
        return None
    # A proxy that captures nothing still answers whoever asks for its health.
    families: tuple[ListenFamily, ...] = tuple(dict.fromkeys(listener.family for listener in settings.listeners)) or ("v4",)
    return open_admin(settings.admin_port, families, shown)


def _answer_on(loop: Loop, admin: AdminHttp) -> None:
    # No thread: the supervisor forks. Its loop has nothing else to do.
    def turn(_events: int = 0) -> None:
        again_s = admin.turn()
        if again_s is not None:
            loop.later(again_s, turn)

    loop.watch(admin.fileno(), EPOLLIN, turn)
