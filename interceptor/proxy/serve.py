"""Run the proxy as a command does: flows to a descriptor, counters at the end, in this process or in several workers."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

from interceptor.proxy.flow_log import FlowLog
from interceptor.proxy.listeners import BoundListener, open_for_workers, with_own_view
from interceptor.proxy.relay.packet_attach import Attached
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.server import Proxy
from interceptor.proxy.settings import ProxySettings
from interceptor.proxy.shared_counters import Numbers
from interceptor.proxy.workers import PUBLISH_S, Link, Supervisor

# Connections make no cycles that outlive them; what little there is elsewhere can wait. By default, the collector would look
# at every waiting connection again and again (700 objects), and stop all of them meanwhile.
GC_THRESHOLD = 50_000


def serve(
    settings: ProxySettings, workers: int, flows: int, on_ready: Callable[[], None], attached: Attached | None = None
) -> tuple[int, Numbers]:
    """Serve until told to stop; the exit code, and what was counted. `flows` is the descriptor for the records.

    attached: the packet relay's programs, when `settings.relay` is packet; attached once, before the workers are forked.
    Raises ProxyError when a port cannot be had.
    """
    listeners = open_for_workers(settings, workers)
    if workers == 1:
        return 0, _serve_here(settings, listeners[0], flows, on_ready, None, attached)

    def serve_as(link: Link) -> int:
        for theirs in (*listeners[: link.index], *listeners[link.index + 1 :]):
            for each in theirs:
                each.close()
        _serve_here(settings, with_own_view(listeners[link.index]), flows, link.say_ready, link, attached)
        return 0

    def let_go() -> None:
        for each in itertools.chain(*listeners):
            each.close()

    supervisor = Supervisor(workers, serve_as, let_go, settings.drain_deadline_s)
    code = supervisor.run(on_ready)
    return code, supervisor.counters()


def _serve_here(
    settings: ProxySettings,
    listeners: list[BoundListener],
    flows: int,
    on_ready: Callable[[], None],
    link: Link | None,
    attached: Attached | None,
) -> Numbers:
    flow_table = None if attached is None else FlowTable(attached, 0 if link is None else link.index)
    proxy = Proxy(settings, listeners, lambda flow: log.write(flow.to_json()), flow_table=flow_table)
    log = FlowLog(flows, proxy.later, alone=link is None)

    def counted() -> Numbers:
        return {**proxy.counters.as_json(), "flow_records_lost": log.lost}

    if link is not None:
        proxy.stop_at_end_of(link.lifeline)
        _publish_now_and_then(proxy, link, counted)
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    proxy.run(on_ready)
    log.close()
    if link is not None:
        link.publish(counted())
    return counted()


def _publish_now_and_then(proxy: Proxy, link: Link, counted: Callable[[], Numbers]) -> None:
    def publish() -> None:
        link.publish(counted())
        proxy.later(PUBLISH_S, publish)

    publish()
