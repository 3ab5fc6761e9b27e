/* From two handshakes to one flow: record, compare, arm or refuse. Runs for the few packets of each handshake. */
#pragma once
#include "translate.h"

#define MILLISECOND 1000000

/* ECN as a SYN-ACK answers it. */
INLINE u8 congestion_options(const struct packet *packet)
{
	u8 has = 0;

	if (packet->flags & ECE)
		has |= HAS_ECN;
	if (packet->ae || packet->flags & CWR)
		has |= HAS_AE;
	return has;
}

/* A's SYN-ACK on its way to the client. */
INLINE struct accepted *record_accepted(struct __sk_buff *skb, const struct packet *packet, const struct syn_options *options,
					const struct bpf_sock *request, u64 cookie, u32 limit, const int family)
{
	struct accepted made = {};

	made.at_ns = bpf_ktime_get_ns();
	made.wire = packet->tuple;
	if (family == IPV6) {
		for (int n = 0; n < 4; n++) {
			made.names.src[n] = request->dst_ip6[n];
			made.names.dst[n] = request->src_ip6[n];
		}
	} else {
		map_address(made.names.src, request->dst_ip4);
		map_address(made.names.dst, request->src_ip4);
	}
	made.names.sport = request->dst_port;
	made.names.dport = htons(request->src_port);
	made.isn = packet->seq;
	made.client_isn = packet->ack - 1;
	made.clock = options->clock;
	made.client_clock = options->echo;
	made.ifindex = skb->ifindex;
	made.mark = skb->mark;
	made.mss = options->mss;
	made.scale = options->scale;
	made.options = options->has | congestion_options(packet);
	made.mode = LIMITED;
	made.limit = limit;
	bpf_skb_load_bytes(skb, 0, made.link_header, sizeof(made.link_header));
	bpf_map_update_elem(&accepted, &cookie, &made, BPF_ANY);
	return bpf_map_lookup_elem(&accepted, &cookie);
}

/* B's SYN on its way to the server: from now on we wait for the answer. */
INLINE void record_syn(struct __sk_buff *skb, const struct packet *packet, const struct syn_options *options, u64 cookie,
		       struct flow *flow, const int family)
{
	struct path expected = {.flow = cookie, .state = EXPECTED};

	flow->syn_ns = bpf_ktime_get_ns();
	reverse(&flow->server, &packet->tuple);
	flow->isn = packet->seq;
	flow->clock = options->clock;
	flow->mss = options->mss;
	flow->scale = options->scale;
	flow->options = options->has;
	flow->mark = skb->mark;
	flow->ifindex = skb->ifindex;
	bpf_map_update_elem(&paths, &flow->server, &expected, BPF_ANY);
}

/* Why these two handshakes cannot be one; 0 when they can. */
INLINE u8 obstacle(const struct accepted *client, const struct flow *flow, const struct packet *packet,
		   const struct syn_options *server)
{
	u8 congestion = congestion_options(packet);

	if (!client)
		return NO_HANDSHAKE;
	if (packet->payload)
		return EARLY_DATA;
	if ((client->options ^ (flow->options & server->has)) & HAS_TIMESTAMPS)
		return TIMESTAMPS;
	if ((client->options & (HAS_ECN | HAS_AE)) != congestion || congestion & HAS_AE)
		return ECN;
	/* What A told its client it takes, the server must take; what B told the server, the client must take. */
	if (client->mss > server->mss || (flow->client_mss && flow->mss > flow->client_mss))
		return MSS;
	return 0;
}

/* User space finds out when B is connected, and relays. */
INLINE void refuse(struct flow *flow, u8 reason)
{
	flow->state = REFUSED;
	flow->reason = reason;
	bpf_map_delete_elem(&paths, &flow->server);
}

/* The two directions as map entries. `clock` is what B's timestamps are by now, `shown` what A's are. */
INLINE int make_paths(const struct accepted *client, struct flow *flow, u64 id, const struct packet *packet,
		      const struct syn_options *server)
{
	u64 now = flow->armed_ns;
	/* Up, the client's clock must not be behind what B has shown the server; down, the server's not behind A's. Linux
	 * counts milliseconds; one more for what rounding takes. */
	u32 clock = flow->clock + (u32)((now - flow->syn_ns) / MILLISECOND) + 1;
	u32 shown = client->clock + (u32)((now - client->at_ns) / MILLISECOND) + 1;
	u32 up_clock = clock - client->client_clock, down_clock = shown - server->clock;
	u8 client_scales = (client->options & HAS_SCALE) != 0, server_scales = (server->has & HAS_SCALE) != 0;
	struct path path = {.flow = id, .state = ACTIVE, .has_timestamps = client->options & HAS_TIMESTAMPS};

	reverse(&path.to, &flow->server);
	path.direction = UP;
	path.base = client->client_isn + 1;
	path.acked = client->isn + 1;
	path.seq_delta = flow->isn - client->client_isn;
	path.ack_delta = packet->seq - client->isn;
	path.clock_delta = up_clock;
	path.echo_delta = -down_clock;
	path.clock = clock;
	path.mark = flow->mark;
	path.ifindex = flow->ifindex;
	path.scale_from = client_scales ? flow->client_scale : 0;
	path.scale_to = server_scales ? flow->scale : 0;
	path.from_loopback = client->ifindex == LOOPBACK;
	if (bpf_map_update_elem(&paths, &flow->client, &path, BPF_ANY))
		return -1;

	reverse(&path.to, &flow->client);
	path.direction = DOWN;
	path.base = packet->seq + 1;
	path.acked = flow->isn + 1;
	path.seq_delta = client->isn - packet->seq;
	path.ack_delta = client->client_isn - flow->isn;
	path.clock_delta = down_clock;
	path.echo_delta = -up_clock;
	path.clock = shown;
	path.mark = client->ifindex == LOOPBACK ? 0 : client->mark;
	path.ifindex = client->ifindex;
	path.scale_from = server_scales ? server->scale : 0;
	path.scale_to = client_scales ? client->scale : 0;
	path.from_loopback = flow->ifindex == LOOPBACK;
	if (bpf_map_update_elem(&paths, &flow->server, &path, BPF_ANY)) {
		bpf_map_delete_elem(&paths, &flow->client);
		return -1;
	}
	return 0;
}

/* The server's SYN-ACK: the last of the four ISNs. B still gets it, and answers. */
INLINE void arm(struct __sk_buff *skb, const struct packet *packet, u64 id, struct flow *flow, const int family)
{
	struct accepted *client = bpf_map_lookup_elem(&accepted, &flow->client_cookie);
	struct syn_options server;
	u8 reason;

	read_syn_options(skb, packet, &server, family);
	reason = obstacle(client, flow, packet, &server);
	if (reason || !client) {
		refuse(flow, reason);
		return;
	}
	/* On lo the client's packets have been translated by conntrack when we see them, A's own are translated back: A's
	 * names are what they have. On a device conntrack's place is behind us: they are what the wire says. */
	if (client->ifindex == LOOPBACK)
		flow->client = client->names;
	else
		reverse(&flow->client, &client->wire);
	flow->armed_ns = bpf_ktime_get_ns();
	flow->server_isn = packet->seq;
	flow->server_window = packet->window;
	flow->server_scale = server.scale;
	if (make_paths(client, flow, id, packet, &server) || bpf_map_update_elem(&silent, &flow->client_cookie, &id, BPF_ANY)) {
		refuse(flow, MAP_FULL);
		return;
	}
	flow->state = ARMED;
}
