"""build_plan: from a Config and the facts about a host to the Plan. Pure; the decisions are in outbound.py and inbound.py.

This module says which of the kernel's hooks lead where, for each mechanism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from interceptor.config import Config
from interceptor.errors import Unsupported
from interceptor.plan import established
from interceptor.plan import outbound as out
from interceptor.plan.connect import connect_capture
from interceptor.plan.inbound import inbound_chain
from interceptor.plan.model import (
    Chain,
    ConnectionMarks,
    Direction,
    Drop,
    Goto,
    Hook,
    HostFacts,
    Jump,
    Log,
    Match,
    Plan,
    PolicyRoute,
    Redirect,
    Return,
    Rule,
    SetConnmark,
    SetMark,
    Table,
    Tproxy,
    Verdict,
)
from interceptor.values import Family, Mark, Network, Proto

FIRST_TCP = Match(proto=Proto.TCP, syn=True)
DNS_UDP = Match(proto=Proto.UDP, dports=out.DNS_PORTS)


def build_plan(config: Config, facts: HostFacts) -> Plan:
    """The plan for `config` on a host with these `facts`.

    Raises Unsupported when `config` asks for a family that the kernel does not have.
    """
    covered = _covered_families(config, facts)
    blocked = tuple(family for family in facts.kernel_families if family not in covered)
    builder = _Builder(config, facts, covered, blocked if config.uncovered_family == "block" else ())
    return builder.plan()


def _covered_families(config: Config, facts: HostFacts) -> tuple[Family, ...]:
    wanted = {"auto": facts.kernel_families, "dual": tuple(Family), "v4": (Family.V4,), "v6": (Family.V6,)}[config.ip_family]
    missing = [family.value for family in wanted if family not in facts.kernel_families]
    if missing:
        raise Unsupported(
            f"--ip-family {config.ip_family}: this kernel has no IP{missing[0]} here; --ip-family auto takes what there is"
        )
    return wanted


def resolvers(config: Config, facts: HostFacts) -> tuple[Network, ...] | None:
    """The DNS servers whose queries are captured; None for any."""
    return facts.resolvers if config.dns == "resolv-conf" else None


class _Builder:
    """Holds what every step needs; each method is one hook or one group of chains."""

    def __init__(self, config: Config, facts: HostFacts, covered: tuple[Family, ...], blocked: tuple[Family, ...]) -> None:
        self.config = config
        self.facts = facts
        self.covered = covered
        self.blocked = blocked
        self.marks = ConnectionMarks.of(config.tproxy_mark)
        # A resolv.conf without servers leaves nothing to capture.
        self.dns = config.dns == "all" or (config.dns == "resolv-conf" and bool(facts.resolvers))
        self.udp_out = config.udp == "tproxy" and config.outbound != "off"
        self.udp_in = config.udp == "tproxy" and config.inbound != "off"
        self.keeps_source = config.original_source and config.inbound != "off"
        self.routes = tuple(dict.fromkeys((*self._own_routes(), *established.kept(config.tproxy_mark, facts.earlier_routes))))

    def _own_routes(self) -> Iterator[PolicyRoute]:
        if self.config.uses_tproxy or self.keeps_source:
            for family in self.covered:
                yield PolicyRoute(family, self.config.tproxy_mark, self.config.tproxy_table)

    def plan(self) -> Plan:
        chains = (*self.tracking(), *self.mangle(), *self.nat())
        leg_from_v6 = Family.V6 in self.covered and self.config.inbound != "off" and not self.keeps_source
        return Plan(
            families=self.covered,
            chains=tuple(chain for chain in chains if chain.rules or chain.hook is None),
            routes=self.routes,
            inbound_source_v6=leg_from_v6 and self.facts.loopback_has_v6,
            connect=connect_capture(self.config, self.facts, self.covered) if self.config.outbound == "connect" else None,
        )

    def enter(self, match: Match, verdict: Verdict, why: str, option: str) -> Iterator[Rule]:
        """Rules of a hook's chain, for the covered families only."""
        families = self.covered if self.blocked or len(self.covered) == 1 else (None,)
        for family in families:
            yield Rule(replace(match, family=family), verdict, why, option)

    # --- connection tracking -------------------------------------------------------------------------------------

    def tracking(self) -> Iterator[Chain]:
        waits = self.config.before_proxy == "bypass" and (self.config.outbound != "off" or self.dns)
        entry = list(out.announcements(self.config, (*self.covered, *self.blocked)) if waits else ())
        if self.dns or self.udp_out:
            yield Chain(Table.RAW, "ZONE", out.zone_rules(self.config))
            entry += self.enter(Match(proto=Proto.UDP), Jump("ZONE"), "conntrack zones", "--dns")
        yield Chain(Table.RAW, "OUTPUT", tuple(entry), Hook.OUTPUT)
        # What is decided at connect() is decided by no conntrack entry.
        translates = self.config.outbound in ("redirect", "tproxy")
        if self.config.conntrack_timeouts and (translates or self.dns):
            yield from out.timeout_chains(self.config, "SHORT")
            entry = list(self.enter(Match(proto=Proto.TCP), Jump("SHORT"), "conntrack timeouts", "--outbound"))
            yield Chain(Table.TIMEOUT, "OUTPUT", tuple(entry), Hook.OUTPUT)

    # --- NAT: REDIRECT and DNS -----------------------------------------------------------------------------------

    def nat(self) -> Iterator[Chain]:
        redirects_out = self.config.outbound == "redirect"
        redirects_in = self.config.inbound == "redirect"
        capturing = out.Capturing(
            Table.NAT,
            (Proto.TCP,) if redirects_out else (),
            "TO_OUTBOUND",
            to_dns="TO_DNS" if self.dns else None,
            resolvers=resolvers(self.config, self.facts),
        )
        entries = list(self._nat_entries(redirects_out))
        if entries:
            yield from out.local_chains(self.config, capturing, "PROXY", "OUTBOUND")
            proxy = out.self_call_rules("INBOUND") if redirects_in else ()
            yield Chain(Table.NAT, "PROXY", proxy)
            if self.config.virtual_interfaces:
                yield from out.virtual_chains(self.config, capturing, "VIRTUAL")
        elif redirects_in:
            yield Chain(Table.NAT, "PROXY", out.self_call_rules("INBOUND"))
        local = self._nat_local(entries, redirects_in and not redirects_out)
        arriving = [*out.excluded_interfaces(self.config, outgoing=False), *self._nat_virtual(entries)]
        if redirects_in:
            if self.config.outbound == "tproxy":
                arriving += self._virtual_is_outbound()
            yield inbound_chain(self.config, Table.NAT, (Proto.TCP,), "TO_INBOUND", "INBOUND")
            arriving += self.enter(FIRST_TCP, Jump("INBOUND"), "inbound", "--inbound")
        yield from self._nat_sinks(redirects_out, redirects_in)
        # Capture at connect() alone needs no rule, and is to cost no connection tracking.
        nothing_else = len(arriving) == len(self.config.exclude_interfaces) and self.config.outbound != "connect"
        if not local and (self.config.uses_tproxy or nothing_else):
            # The kernel translates only while some NAT chain stands, and tracks connections only while some rule asks for
            # it, as the direction does: connections that REDIRECT rules took before need both.
            older = replace(FIRST_TCP, direction=Direction.ORIGINAL)
            local.append(Rule(older, Jump("OLDER"), "older connections keep their NAT", "built in"))
            yield Chain(Table.NAT, "OLDER", ())
        yield Chain(Table.NAT, "OUTPUT", tuple(local), Hook.OUTPUT)
        if len(arriving) > len(self.config.exclude_interfaces):
            yield Chain(Table.NAT, "PREROUTING", tuple(arriving), Hook.PREROUTING)

    def _nat_local(self, entries: Sequence[tuple[Match, str]], leads_proxy_inbound: bool) -> list[Rule]:
        rules: list[Rule] = []
        if leads_proxy_inbound:
            # Entries for DNS alone, if any, do not lead here what else the proxy sends to its own pod.
            for match, option in out.identities(self.config):
                on_lo = replace(match, proto=Proto.TCP, syn=True, out_interface="lo")
                rules += self.enter(on_lo, Jump("PROXY"), "the proxy's own", option)
        for match, option in entries:
            rules += self.enter(match, Jump("OUTBOUND"), "outbound", option)
        return rules

    def _nat_virtual(self, entries: Sequence[tuple[Match, str]]) -> Iterator[Rule]:
        for match, _ in entries:
            for interface in self.config.virtual_interfaces:
                why = f"{interface} counts as outbound"
                yield from self.enter(replace(match, in_interface=interface), Goto("VIRTUAL"), why, "--virtual-interfaces")

    def _nat_entries(self, redirects_out: bool) -> Iterator[tuple[Match, str]]:
        # Only SYNs: a connection older than the rules, or one whose entry has expired, is never torn to the proxy midway.
        if redirects_out:
            yield FIRST_TCP, "--outbound"
        elif self.dns:
            yield replace(FIRST_TCP, dports=out.DNS_PORTS), "--dns"
        if self.dns:
            yield DNS_UDP, "--dns"

    def _nat_sinks(self, redirects_out: bool, redirects_in: bool) -> Iterator[Chain]:
        config = self.config
        if redirects_out:
            yield self._sink(Table.NAT, "TO_OUTBOUND", "out", _redirect(Proto.TCP, config.outbound_port, "--outbound-port"))
        if redirects_in:
            yield self._sink(Table.NAT, "TO_INBOUND", "in", _redirect(Proto.TCP, config.inbound_port, "--inbound-port"))
        if self.dns:
            both = [_redirect(proto, config.dns_port, "--dns-port") for proto in Proto]
            yield self._sink(Table.NAT, "TO_DNS", "dns", *both)

    def _sink(self, table: Table, name: str, prefix: str, *rules: Rule) -> Chain:
        log = (Rule(Match(), Log(f"interceptor {prefix}: "), "logged", "--log-rules"),) if self.config.log_rules else ()
        return Chain(table, name, (*log, *rules))

    # --- mangle: TPROXY, original source, blocked families --------------------------------------------------------

    def mangle(self) -> Iterator[Chain]:
        config = self.config
        protos = tuple(
            proto for proto, captured in ((Proto.TCP, config.outbound == "tproxy"), (Proto.UDP, self.udp_out)) if captured
        )
        capturing = out.Capturing(
            Table.MANGLE, protos, "MARK_OUTBOUND", skip_dns=self.dns, resolvers=resolvers(config, self.facts)
        )
        if protos:
            yield from out.local_chains(config, capturing, "MARK_PROXY", "MARK")
            yield self._sink(Table.MANGLE, "MARK_OUTBOUND", "out", *self._outbound_marks(protos))
            if config.virtual_interfaces:
                yield from out.virtual_chains(config, replace(capturing, to_proxy="TPROXY_OUTBOUND"), "MARK_VIRTUAL")
                captures = [_tproxy(proto, config.outbound_port, config.tproxy_mark, "--outbound-port") for proto in protos]
                if Proto.TCP in protos:
                    captures.insert(0, _marks_connection(self.marks.outbound, "--outbound"))
                yield self._sink(Table.MANGLE, "TPROXY_OUTBOUND", "out", *captures)
        if protos or config.inbound == "tproxy" or self.keeps_source:
            yield Chain(Table.MANGLE, "MARK_PROXY", tuple(self._mark_proxy_rules()))
        arriving_protos = self._inbound_tproxy_protos()
        if arriving_protos:
            yield inbound_chain(config, Table.MANGLE, arriving_protos, "TPROXY_INBOUND", "TPROXY_IN")
            captures = [_tproxy(proto, config.inbound_port, config.tproxy_mark, "--inbound-port") for proto in arriving_protos]
            if Proto.TCP in arriving_protos:
                captures.insert(0, _marks_connection(self.marks.inbound, "--inbound"))
            yield self._sink(Table.MANGLE, "TPROXY_INBOUND", "in", *captures)
        yield from self._block_chains()
        yield Chain(Table.MANGLE, "OUTPUT", tuple(self._mangle_output(protos)), Hook.OUTPUT)
        yield Chain(Table.MANGLE, "PREROUTING", tuple(self._mangle_prerouting(protos)), Hook.PREROUTING)

    def _inbound_tproxy_protos(self) -> tuple[Proto, ...]:
        wanted = ((Proto.TCP, self.config.inbound == "tproxy"), (Proto.UDP, self.udp_in))
        return tuple(proto for proto, captured in wanted if captured)

    def _outbound_marks(self, protos: tuple[Proto, ...]) -> Iterator[Rule]:
        if Proto.TCP in protos:
            yield _marks_connection(self.marks.outbound, "--outbound")
        if Proto.UDP in protos:
            yield Rule(Match(proto=Proto.UDP), SetMark(self.config.tproxy_mark), "this packet goes to the proxy", "--udp")

    def _mark_proxy_rules(self) -> Iterator[Rule]:
        yield Rule(Match(src=out.INBOUND_SOURCE), Return(), "the proxy's inbound leg to the application", "built in")
        yield Rule(Match(dst=out.LOOPBACK), Return(), "the proxy to loopback stays direct", "built in")
        over_lo = Match(proto=Proto.TCP, syn=True, out_interface="lo")
        if self.keeps_source:
            match = replace(over_lo, src_is_local=False)
            yield Rule(match, SetConnmark(self.marks.original_source), "replies come back to the proxy", "--original-source")
        if self.config.inbound == "tproxy":
            match = replace(over_lo, src_is_local=True)
            yield Rule(match, SetConnmark(self.marks.inbound), "the proxy calls its own pod: inbound", "--inbound")

    def _mangle_output(self, protos: tuple[Proto, ...]) -> Iterator[Rule]:
        config, marks = self.config, self.marks
        if Proto.TCP in protos:
            # Decided anew at each SYN: a stale entry of another connection on the same ports does not decide for this one.
            yield from self.enter(FIRST_TCP, SetConnmark(marks.none), "decided anew", "built in")
            yield from self.enter(FIRST_TCP, Jump("MARK"), "outbound", "--outbound")
        elif config.inbound == "tproxy" or self.keeps_source:
            over_lo = replace(FIRST_TCP, out_interface="lo")
            yield from self.enter(over_lo, SetConnmark(marks.none), "decided anew", "built in")
            for match, option in out.identities(config):
                owned = replace(match, proto=Proto.TCP, syn=True, out_interface="lo")
                yield from self.enter(owned, Jump("MARK_PROXY"), "the proxy's own", option)
        if self.udp_in and self.keeps_source:
            for match, option in out.identities(config):
                leg = replace(match, proto=Proto.UDP, direction=Direction.ORIGINAL, out_interface="lo", src_is_local=False)
                yield from self.enter(leg, SetConnmark(marks.original_source), "replies come back to the proxy", option)
            yield from self.enter(*established.replies_to_proxy(config.tproxy_mark))
        if Proto.UDP in protos:
            # Without the direction an application's answer to an uncaptured datagram would be captured.
            first = Match(proto=Proto.UDP, direction=Direction.ORIGINAL)
            yield from self.enter(first, Jump("MARK"), "outbound", "--udp")
        yield from established.sent(self.routes)
        yield from self._blocked_entries("BLOCK_OUTBOUND", config.outbound != "off" or self.dns, udp=self.udp_out or self.dns)

    def _mangle_prerouting(self, protos: tuple[Proto, ...]) -> Iterator[Rule]:
        config = self.config
        if config.drop_invalid:
            yield from self.enter(Match(invalid=True), Drop(), "conntrack calls it invalid", "--drop-invalid")
        yield from self._self_calls()
        yield from established.arrived(self.routes, outbound_port=config.outbound_port, inbound_port=config.inbound_port)
        looped = [*self._looped(protos)]
        arriving = [*self._arriving(protos)]
        if looped or arriving:
            yield from looped
            # For every family: a blocked one keeps its loopback.
            yield Rule(Match(in_interface="lo"), Return(), "loopback stays direct", "built in")
        if arriving:
            yield from out.excluded_interfaces(config, outgoing=False)
            yield from arriving

    def _looped(self, protos: tuple[Proto, ...]) -> Iterator[Rule]:
        """UDP that comes back in on lo because an OUTPUT rule marked it."""
        if Proto.UDP in protos:
            if self.udp_in and self.keeps_source:
                reply = replace(established.replies_to_proxy(self.config.tproxy_mark)[0], proto=Proto.UDP, in_interface="lo")
                yield from self.enter(reply, Return(), "reply to the proxy, which has a socket for it", "--original-source")
            match = Match(proto=Proto.UDP, in_interface="lo", mark=self.config.tproxy_mark)
            capture = Tproxy(self.config.outbound_port, self.config.tproxy_mark)
            yield from self.enter(match, capture, "to the proxy's outbound port", "--outbound-port")

    def _self_calls(self) -> Iterator[Rule]:
        if self.config.inbound == "tproxy":
            call = replace(FIRST_TCP, in_interface="lo", connmark=self.marks.inbound)
            yield from self.enter(call, Jump("TPROXY_IN"), "the proxy calls its own pod: inbound", "--inbound")
            yield from self.enter(call, SetConnmark(self.marks.none), "the proxy calls its own pod: not captured", "--inbound")

    def _arriving(self, protos: tuple[Proto, ...]) -> Iterator[Rule]:
        for interface in self.config.virtual_interfaces:
            for proto in protos:
                first = FIRST_TCP if proto is Proto.TCP else Match(proto=proto, direction=Direction.ORIGINAL)
                match = replace(first, in_interface=interface)
                yield from self.enter(match, Goto("MARK_VIRTUAL"), f"{interface} counts as outbound", "--virtual-interfaces")
        if self.config.outbound != "off" and self.config.inbound == "tproxy":
            yield from self._virtual_is_outbound()
        for proto in self._inbound_tproxy_protos():
            # A SYN that is sent again to a connection that REDIRECT rules took goes on as it was. Answers to this pod's own
            # datagrams arrive here too: their direction tells them apart.
            tcp = replace(FIRST_TCP, untranslated=True)
            udp = Match(proto=proto, direction=Direction.ORIGINAL, dst_is_local=True)
            yield from self.enter(tcp if proto is Proto.TCP else udp, Jump("TPROXY_IN"), "inbound", "--inbound")
        yield from self._blocked_virtual_entries()
        yield from self._blocked_entries("BLOCK_INBOUND", self.config.inbound != "off", udp=self.udp_in, udp_dst_is_local=True)

    def _virtual_is_outbound(self) -> Iterator[Rule]:
        """Keep TCP from virtual interfaces out of this table's inbound chain: the other table decides about outbound."""
        for interface in self.config.virtual_interfaces:
            match = Match(proto=Proto.TCP, in_interface=interface)
            yield from self.enter(match, Return(), f"{interface} counts as outbound", "--virtual-interfaces")

    # --- families that are not captured --------------------------------------------------------------------------

    def _block_chains(self) -> Iterator[Chain]:
        config = self.config
        captures_nothing = config.outbound == "off" and config.inbound == "off" and not self.dns
        if not self.blocked or captures_nothing:
            return
        why = "this IP family is not captured: blocked"
        yield self._sink(Table.MANGLE, "BLOCK", "block", Rule(Match(), Drop(), why, "--uncovered-family block"))
        if config.outbound != "off" or self.dns:
            protos = ((Proto.TCP,) if config.outbound != "off" else ()) + ((Proto.UDP,) if self.udp_out else ())
            capturing = out.Capturing(
                Table.MANGLE,
                protos,
                "BLOCK",
                to_dns="BLOCK" if self.dns else None,
                resolvers=resolvers(config, self.facts),
            )
            yield from out.local_chains(config, capturing, "BLOCK_PROXY", "BLOCK_OUTBOUND")
            yield Chain(Table.MANGLE, "BLOCK_PROXY", ())
            if config.virtual_interfaces:
                yield from out.virtual_chains(config, capturing, "BLOCK_VIRTUAL")
        if config.inbound != "off":
            protos = (Proto.TCP, Proto.UDP) if self.udp_in else (Proto.TCP,)
            yield inbound_chain(config, Table.MANGLE, protos, "BLOCK", "BLOCK_INBOUND")

    def _blocked_entries(self, chain: str, wanted: bool, *, udp: bool, udp_dst_is_local: bool | None = None) -> Iterator[Rule]:
        for family in self.blocked if wanted else ():
            yield Rule(replace(FIRST_TCP, family=family), Jump(chain), f"IP{family.value} is not captured", "--ip-family")
            if udp:
                yield Rule(
                    Match(family=family, proto=Proto.UDP, direction=Direction.ORIGINAL, dst_is_local=udp_dst_is_local),
                    Jump(chain),
                    f"IP{family.value} is not captured",
                    "--ip-family",
                )

    def _blocked_virtual_entries(self) -> Iterator[Rule]:
        tcp, udp = self.config.outbound != "off", self.udp_out
        matches = [FIRST_TCP] if tcp else []
        matches += [replace(FIRST_TCP, dports=out.DNS_PORTS)] if self.dns and not tcp else []
        matches += [Match(proto=Proto.UDP, direction=Direction.ORIGINAL)] if udp else []
        matches += [replace(DNS_UDP, direction=Direction.ORIGINAL)] if self.dns and not udp else []
        for interface in self.config.virtual_interfaces:
            for family in self.blocked:
                for match in matches:
                    entering = replace(match, family=family, in_interface=interface)
                    yield Rule(entering, Goto("BLOCK_VIRTUAL"), f"IP{family.value} is not captured", "--ip-family")


def _redirect(proto: Proto, port: int, option: str) -> Rule:
    return Rule(Match(proto=proto), Redirect(port), f"to the proxy's port {port}", option)


def _tproxy(proto: Proto, port: int, mark: Mark, option: str) -> Rule:
    return Rule(Match(proto=proto), Tproxy(port, mark), f"to the proxy's port {port}", option)


def _marks_connection(mark: Mark, option: str) -> Rule:
    return Rule(Match(proto=Proto.TCP), SetConnmark(mark), "this connection goes to the proxy", option)
