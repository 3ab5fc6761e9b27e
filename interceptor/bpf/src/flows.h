/* What the programs keep, and share with interceptor/proxy/relay/packet_layout.py: change both or neither.
 *
 * A flow has two legs. The client's leg ends in socket A of the proxy (accepted), the server's in socket B (connected).
 * Sequence numbers come in four bases: of the client and of A on one leg, of B and of the server on the other. Once the
 * flow is armed, A and B are silent and every packet that arrives on one leg leaves on the other, with the four bases,
 * the two clocks and the two window scales translated. Addresses and ports are in network order, all else in the
 * machine's. An IPv4 address is held v4-mapped (RFC 4291 2.5.5.2).
 */
#pragma once
#include "helpers.h"

#define LOOPBACK 1 /* LOOPBACK_IFINDEX, include/net/net_namespace.h: every namespace's first interface */

/* One direction's addresses and ports. Padded to four bytes, so that there is nothing unset in a key. */
struct tuple {
	u32 src[4], dst[4];
	u16 sport, dport;
};

/* enum of struct accepted.mode: what A's own packets may do before the flow is armed. */
enum {
	OPEN = 0,	/* pass: A talks to its client, as ever */
	LIMITED = 1,	/* neither ask for nor acknowledge more than the first `limit` bytes: the rest waits for the server */
	OPENING = 2,	/* leave LIMITED: A's next window probe becomes the window update that the client waits for */
};

/* Options of a handshake as both ends agreed on them: struct accepted.options, struct flow.options. */
enum {
	HAS_TIMESTAMPS = 1,
	HAS_SCALE = 2,
	HAS_ECN = 4,	/* ECE in a SYN-ACK, RFC 3168 6.1.1 */
	HAS_AE = 8,	/* more than that: Accurate ECN */
};

/* A, from its SYN-ACK on; by A's cookie. */
struct accepted {
	u64 at_ns;
	struct tuple wire;	/* of the SYN-ACK as it left: proxy to client */
	struct tuple names;	/* of the client's packets as A has them */
	u32 isn, client_isn;
	u32 clock, client_clock;	/* timestamps, RFC 7323 */
	u32 ifindex, mark, limit;
	u16 mss;
	u8 scale, options, mode;
	u8 link_header[14];
	u8 pad;
};

/* enum of struct flow.state */
enum {
	CONNECTING = 0,	/* made by user space before B's connect() */
	ARMED = 1,
	REFUSED = 2,	/* reason says why; user space relays */
	ENDED = 3,
};

/* Why a flow is not armed: struct flow.reason. Names in packet_layout.py. */
enum {
	NO_HANDSHAKE = 1,	/* A's SYN-ACK was not seen: a SYN cookie, or older than the programs */
	TIMESTAMPS = 2,		/* one leg has timestamps, the other has not */
	ECN = 3,		/* the legs disagree about congestion notification */
	MSS = 4,		/* one end may send larger segments than the other takes */
	EARLY_DATA = 5,		/* the server's SYN-ACK carries data */
	ROUTE = 6,		/* B is connected, but its SYN-ACK came by another way, or translated */
	MAP_FULL = 7,
};

/* struct flow.ends: how each direction ended. Shifted by the direction, but for the last. */
enum {
	FIN_SEEN = 1,
	FIN_ACKED = 4,
	RST_SEEN = 16,
	REPORTED = 64,
};
enum { UP = 0, DOWN = 1 }; /* from client to server; from server to client */

/* struct flow.asked: what user space asks of a flow. */
enum {
	FORWARDS = 1,	/* B sends first what A received before the flow was armed */
	HELD = 2,	/* the client could say nothing yet, and waits for a window */
};

/* By B's cookie, as long as the flow lives. */
struct flow {
	u64 client_cookie;	/* A's */
	u64 syn_ns, armed_ns, ended_ns;
	struct tuple client;	/* the client's packets as we see them: on lo, A's names; on a device, A's wire, reversed */
	struct tuple server;	/* the server's packets as we see them */
	u32 isn, clock, mark, ifindex;	/* of B's SYN, and where it left */
	u32 server_isn;
	u32 fin[2];		/* the sequence number behind each direction's FIN, as its sender counts */
	u32 ends;		/* changed by atomic operations alone: the directions may be on two CPUs */
	u16 mss;		/* of B's SYN */
	u16 server_window;	/* of the SYN-ACK: not scaled */
	u16 client_mss;		/* what A may send its client, from user space */
	u16 client_window;	/* scaled by client_scale, from user space */
	u8 client_scale;
	u8 scale, options;	/* of B's SYN */
	u8 asked, state, reason;
	u8 is_open;		/* the client has its window */
	u8 server_scale;
	u8 worker;		/* whose ring hears of the end; from user space */
	u8 pad[7];
};

/* enum of struct path.state */
enum { EXPECTED = 0, ACTIVE = 1 };

/* What becomes of a packet of one direction; by its tuple. */
struct path {
	u64 flow;	/* B's cookie */
	u64 seen_ns;
	u64 bytes;	/* sent so far, each counted once; a FIN counts as one */
	u64 sender;	/* on lo: the cookie that its packets come from, which is none of the proxy's */
	struct tuple to;
	u32 base;	/* the sender's first sequence number: ISN + 1 */
	u32 acked;	/* the highest acknowledgement so far, as this direction's sender counts it */
	u32 seq_delta, ack_delta, clock_delta, echo_delta;
	u32 clock;	/* the latest timestamp given out */
	u32 mark, ifindex;
	u8 scale_from, scale_to, direction, state;
	u8 has_timestamps, is_closing, from_loopback, pad;
};

/* A fragmented segment, by what its fragments have in common (RFC 791); what of it the fragments behind the first lack. */
struct fragment_key {
	u32 src, dst;
	u16 id, pad;
};
struct fragmented {
	struct tuple tuple;
	u32 seq, ack;
	u16 header;
	u8 flags, pad;
};

/* To user space: a flow has ended. */
struct event {
	u64 flow;
	u64 bytes[2];
	u64 ended_ns, client_cookie;
	struct tuple client, server;
	u32 ends, client_ifindex, server_ifindex, pad;
};

MAP(listeners, HASH, 4, 4, 64);	/* port -> limit of what is accepted there */
MAP(accepted, LRU_HASH, 8, sizeof(struct accepted), 65536);
MAP(flows, HASH, 8, sizeof(struct flow), 65536);
MAP(paths, HASH, sizeof(struct tuple), sizeof(struct path), 131072);
MAP(silent, HASH, 8, 8, 65536);	/* cookie of A, or of who keeps B's port -> flow, once armed */
MAP(fragments, LRU_HASH, sizeof(struct fragment_key), sizeof(struct fragmented), 4096);
/* Programs on their own, so that the verifier follows what few packets need once, and not within each program that any packet
 * passes: user space puts them here. */
enum { UNUSUAL = 0, STRANGE = 1, ARRIVAL_AGAIN = 2, LOOPBACK_AGAIN = 3, OPENER = 4, ANSWER = 5, ERROR_MESSAGE = 6 };
MAP(tails, PROG_ARRAY, 4, 4, 7);
MAP(rings, ARRAY_OF_MAPS, 4, 4, 64); /* worker -> its ring buffer */

INLINE void report(const struct flow *flow, u64 id, u64 up, u64 down, u32 client_ifindex)
{
	u32 worker = flow->worker;
	void *ring = bpf_map_lookup_elem(&rings, &worker);
	struct event event = {
		.flow = id,
		.bytes = {up, down},
		.ended_ns = flow->ended_ns,
		.client_cookie = flow->client_cookie,
		.client = flow->client,
		.server = flow->server,
		.ends = flow->ends,
		.client_ifindex = client_ifindex,
		.server_ifindex = flow->ifindex,
	};

	/* Wakes the reader for the first of those that it has not read yet: ends in a row cost one wake-up. */
	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}
