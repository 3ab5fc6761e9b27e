/* Packet splice: after both handshakes of a captured connection, client and server hold one TCP connection end to end.
 *
 * `from_peer` sees what arrives on a leg: on a device at its ingress, from local programs at lo's egress. `from_proxy`
 * sees what the proxy's own sockets send: at the egress of every device and of lo. flows.h has the words.
 */
#include "window.h"
#include "strange.h"
#include "icmp.h"

#define NEXT TC_ACT_UNSPEC /* let the next program at this hook decide, and then the stack */
#define DROP TC_ACT_SHOT

INLINE int from_peer(struct __sk_buff *skb, struct packet *packet, struct path *path, const int family)
{
	if (path->state == EXPECTED) {
		if ((packet->flags & (SYN | ACK | RST | FIN)) == (SYN | ACK))
			bpf_tail_call(skb, &tails, ANSWER);
		return NEXT;
	}
	/* A repeated SYN or SYN-ACK is answered by the socket it is for. A packet that claims to be of a local client and came in
	 * by a device is forged, or the other way round. */
	if (packet->flags & SYN || (skb->ifindex == LOOPBACK) != path->from_loopback)
		return NEXT;
	account(path, packet);
	if (UNLIKELY(packet->flags & (FIN | RST) || path->is_closing))
		note_ending(packet, path);
	if (UNLIKELY(has_unusual_options(skb, packet, family))) {
		bpf_tail_call(skb, &tails, UNUSUAL);
		return DROP;
	}
	if (translate(skb, packet, path, 1, family))
		return DROP;
	return leave(skb, path);
}

/* The rest of `from_peer`, for the server's SYN-ACK. */
INLINE int on_answer(struct __sk_buff *skb, const int family)
{
	struct packet packet;
	struct path *path;
	struct flow *flow;

	if (read_packet(skb, &packet, family))
		return NEXT;
	path = bpf_map_lookup_elem(&paths, &packet.tuple);
	if (!path)
		return NEXT;
	flow = bpf_map_lookup_elem(&flows, &path->flow);
	if (flow && flow->state == CONNECTING && packet.ack == flow->isn + 1)
		arm(skb, &packet, path->flow, flow, family);
	return NEXT;
}

/* The rest of `from_peer`, and of `strange` for a first fragment: options in a layout of their own. */
INLINE int on_unusual(struct __sk_buff *skb, const int family)
{
	struct packet packet;
	struct path *path;

	if (read_headers(skb, &packet, family, htons(0x1fff)))
		return DROP;
	path = bpf_map_lookup_elem(&paths, &packet.tuple);
	if (!path)
		return DROP;
	translate_options(skb, &packet, path, family);
	if (translate(skb, &packet, path, 0, family))
		return DROP;
	return leave(skb, path);
}

/* Change seq and window of A's packet, in place. */
INLINE int rewrite(struct __sk_buff *skb, const struct packet *packet, u32 seq, u16 window, const int family)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct segment was, is, *segment = start + L4(family);

	if (start + L4(family) + sizeof(struct tcphdr) > end)
		return DROP;
	was = *segment;
	segment->seq = htonl(seq);
	segment->window = htons(window);
	is = *segment;
	bpf_l4_csum_replace(skb, CHECKSUM(family), 0, bpf_csum_diff(&was, sizeof(was), &is, sizeof(is), 0), 0);
	return NEXT;
}

/* Ask for no byte behind the limit. */
INLINE int limit_window(struct __sk_buff *skb, const struct packet *packet, const struct accepted *client, const int family)
{
	u32 scale = packet->flags & SYN ? 0 : client->scale & 15;
	u32 room = client->client_isn + 1 + client->limit - packet->ack;
	u32 window = (u32)packet->window << scale;

	return rewrite(skb, packet, packet->seq, (window < room ? window : room) >> scale, family);
}

/* A, towards its client. */
INLINE int from_accepted(struct __sk_buff *skb, const struct packet *packet, struct accepted *client, const int family)
{
	if (client->mode == OPEN || packet->flags & RST)
		return NEXT;
	if (client->mode == OPENING) {
		/* Leaving TCP_REPAIR, the kernel sends a probe with an old sequence number, which a peer answers but whose
		 * window it does not believe (tcp_send_window_probe). */
		client->mode = OPEN;
		return rewrite(skb, packet, packet->seq == client->isn ? packet->seq + 1 : packet->seq, packet->window, family);
	}
	/* What came in spite of the window is never acknowledged by A: the client keeps it for the server. */
	if (is_after(packet->ack, client->client_isn + 1 + client->limit))
		return DROP;
	return limit_window(skb, packet, client, family);
}

/* A silent socket has one thing to say: that the proxy gives the flow up. Its RST gets the sequence number that the peer
 * expects now (RFC 5961 3.2), which the socket has not heard of. */
INLINE int give_up(struct __sk_buff *skb, const struct packet *packet, const struct tuple *answers, const int family)
{
	struct path *path = bpf_map_lookup_elem(&paths, answers);

	if (!path || !(packet->flags & RST))
		return DROP;
	return rewrite(skb, packet, path->acked, 0, family);
}

/* B's own packets once the flow is armed: what it forwards for the client, and the end of its handshake. */
INLINE int from_armed_upstream(struct __sk_buff *skb, const struct packet *packet, u64 id, struct flow *flow, const int family)
{
	struct path *down = bpf_map_lookup_elem(&paths, &flow->server);
	struct path *up = bpf_map_lookup_elem(&paths, &flow->client);

	if (packet->flags & RST)
		return give_up(skb, packet, &flow->server, family);
	if (!down || !up)
		return DROP;
	if (packet->payload || packet->flags & FIN) {
		if (!is_after(end_of(packet), down->acked))
			return DROP;
		if (packet->flags & FIN)
			note_fin(flow, UP, end_of(packet) - up->seq_delta);
		/* The client's own packets may have shown the server a later clock (RFC 7323 5.3, PAWS). */
		return set_clock(skb, packet, up->clock, family);
	}
	if (down->seen_ns) /* the server has spoken: its handshake is over */
		return DROP;
	if (flow->asked & HELD) {
		open_window(skb, packet, flow, family);
		flow->is_open = 1;
	}
	return NEXT;
}

INLINE int from_upstream(struct __sk_buff *skb, const struct packet *packet, u64 id, struct flow *flow, const int family)
{
	if (flow->state == ARMED || flow->state == ENDED)
		return from_armed_upstream(skb, packet, id, flow, family);
	if (flow->state != CONNECTING)
		return NEXT;
	if (packet->flags & SYN)
		bpf_tail_call(skb, &tails, OPENER);
	else if (!(packet->flags & RST))
		refuse(flow, ROUTE);
	return NEXT;
}

INLINE int from_proxy(struct __sk_buff *skb, struct packet *packet, u64 cookie, const int family)
{
	struct accepted *client;
	struct flow *flow;
	u64 *id;

	if (!cookie)
		return NEXT;
	flow = bpf_map_lookup_elem(&flows, &cookie);
	if (flow)
		return from_upstream(skb, packet, cookie, flow, family);
	id = bpf_map_lookup_elem(&silent, &cookie);
	if (id) {
		flow = bpf_map_lookup_elem(&flows, id);
		if (!flow)
			return DROP;
		return give_up(skb, packet, flow->client_cookie == cookie ? &flow->client : &flow->server, family);
	}
	if ((packet->flags & (SYN | ACK)) == (SYN | ACK))
		bpf_tail_call(skb, &tails, OPENER);
	client = bpf_map_lookup_elem(&accepted, &cookie);
	return client ? from_accepted(skb, packet, client, family) : NEXT;
}

/* What A takes until its flow is armed, by A's SYN-ACK; none of another listener's. */
INLINE u32 *limit_of(struct bpf_sock *request)
{
	struct bpf_sock *sock = request ? bpf_get_listener_sock(request) : 0;
	u32 port;

	if (!sock)
		return 0;
	port = sock->src_port;
	return bpf_map_lookup_elem(&listeners, &port);
}

/* On lo a SYN-ACK may be the answer to a B as well. */
INLINE int pass_opener(struct __sk_buff *skb, const struct packet *packet)
{
	struct path *path = skb->ifindex == LOOPBACK ? bpf_map_lookup_elem(&paths, &packet->tuple) : 0;

	if (path && path->state == EXPECTED)
		bpf_tail_call(skb, &tails, ANSWER);
	return NEXT;
}

/* The rest of `from_proxy`, for B's SYN and for SYN-ACKs: A's, or of another who listens here. */
INLINE int on_opener(struct __sk_buff *skb, const int family)
{
	u64 cookie = bpf_get_socket_cookie(skb);
	struct bpf_sock *request = skb->sk;
	struct syn_options options;
	struct accepted *client;
	struct packet packet;
	struct flow *flow;
	u32 *limit;

	if (read_packet(skb, &packet, family))
		return NEXT;
	flow = bpf_map_lookup_elem(&flows, &cookie);
	limit = flow ? 0 : limit_of(request);
	if (!flow && !limit)
		return pass_opener(skb, &packet);
	read_syn_options(skb, &packet, &options, family);
	if (flow) {
		record_syn(skb, &packet, &options, cookie, flow, family);
		return NEXT;
	}
	client = record_accepted(skb, &packet, &options, request, cookie, *limit, family);
	if (client && limit_window(skb, &packet, client, family) == DROP)
		return DROP;
	return pass_opener(skb, &packet);
}

/* Not TCP, or not as we read it. */
INLINE int on_other(struct __sk_buff *skb, const int family)
{
	u8 protocol = protocol_of(skb, family);

	if (is_strange(protocol, family))
		bpf_tail_call(skb, &tails, STRANGE);
	else if (protocol == (family == IPV6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		bpf_tail_call(skb, &tails, ERROR_MESSAGE);
	return NEXT;
}

INLINE int on_arrival(struct __sk_buff *skb, const int family)
{
	struct packet packet;
	struct path *path;

	if (read_packet(skb, &packet, family))
		return on_other(skb, family);
	path = bpf_map_lookup_elem(&paths, &packet.tuple);
	return path ? from_peer(skb, &packet, path, family) : NEXT;
}

INLINE int on_departure(struct __sk_buff *skb, const int family)
{
	struct packet packet;

	if (skb->tc_index == TRANSLATED) {
		skb->tc_index = 0;
		return NEXT;
	}
	if (read_packet(skb, &packet, family))
		return NEXT;
	return from_proxy(skb, &packet, bpf_get_socket_cookie(skb), family);
}

/* What local programs say to each other, and to us. The proxy's packets to another socket of ours are both. */
INLINE int on_loopback(struct __sk_buff *skb, const int family)
{
	u64 cookie = bpf_get_socket_cookie(skb);
	struct packet packet;
	struct path *path;
	int verdict;

	if (read_packet(skb, &packet, family))
		return on_other(skb, family);
	path = bpf_map_lookup_elem(&paths, &packet.tuple);
	/* That a path's packets are not the proxy's is found out once for each sender: three lookups. */
	if (!path || !cookie || path->sender != cookie) {
		verdict = from_proxy(skb, &packet, cookie, family);
		if (verdict != NEXT || !path)
			return verdict;
		path->sender = cookie;
	}
	return from_peer(skb, &packet, path, family);
}

#define PROGRAM(section, name, does)                                                                                    \
	SEC(section) int name(struct __sk_buff *skb)                                                                    \
	{                                                                                                               \
		int family = family_of(skb);                                                                            \
                                                                                                                        \
		if (family == IPV4)                                                                                     \
			return does(skb, IPV4);                                                                         \
		return family == IPV6 ? does(skb, IPV6) : NEXT;                                                         \
	}

PROGRAM("tcx/ingress", arrival, on_arrival)
PROGRAM("tcx/egress", departure, on_departure)
PROGRAM("tcx/egress", loopback, on_loopback)
/* By tail call, from both hooks. */
PROGRAM("tcx/ingress", unusual, on_unusual)
PROGRAM("tcx/ingress", strange, on_strange)
PROGRAM("tcx/ingress", opener, on_opener)
PROGRAM("tcx/ingress", answer, on_answer)
PROGRAM("tcx/ingress", error_message, on_error_message)

const char source_hash[] SEC("source") = SOURCE_HASH;
