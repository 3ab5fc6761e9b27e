/* How a flow ends: each FIN acknowledged, or a RST. User space takes the entries away a while later. */
#pragma once
#include "translate.h"

INLINE void mark_closing(struct flow *flow)
{
	struct path *up = bpf_map_lookup_elem(&paths, &flow->client);
	struct path *down = bpf_map_lookup_elem(&paths, &flow->server);

	if (up)
		up->is_closing = 1;
	if (down)
		down->is_closing = 1;
}

/* What is known of the ends, these bits included. */
INLINE u32 add_ends(struct flow *flow, u32 bits)
{
	return __sync_fetch_and_or(&flow->ends, bits) | bits;
}

INLINE void note_fin(struct flow *flow, u32 direction, u32 behind)
{
	flow->fin[direction & 1] = behind;
	add_ends(flow, FIN_SEEN << direction);
	mark_closing(flow);
}

INLINE u64 content_bytes(const struct path *path, const struct flow *flow, u32 direction)
{
	return path ? path->bytes - !!(flow->ends & FIN_SEEN << direction) : 0;
}

INLINE void end_flow(struct flow *flow, u64 id)
{
	const struct path *up, *down;

	if (__sync_fetch_and_or(&flow->ends, REPORTED) & REPORTED)
		return;
	/* What user space need not do: A has nothing to say any more (TCP_REPAIR), unless a forged RST ends nothing. */
	bpf_map_delete_elem(&accepted, &flow->client_cookie);
	if (!(flow->ends & (RST_SEEN << UP | RST_SEEN << DOWN)))
		bpf_map_delete_elem(&silent, &flow->client_cookie);
	flow->state = ENDED;
	flow->ended_ns = bpf_ktime_get_ns();
	up = bpf_map_lookup_elem(&paths, &flow->client);
	down = bpf_map_lookup_elem(&paths, &flow->server);
	report(flow, id, content_bytes(up, flow, UP), content_bytes(down, flow, DOWN), down ? down->ifindex : LOOPBACK);
}

/* A packet of a path with FIN or RST, or after the first of these. */
INLINE void note_ending(const struct packet *packet, struct path *path)
{
	const u32 both_acked = FIN_ACKED << UP | FIN_ACKED << DOWN;
	struct flow *flow = bpf_map_lookup_elem(&flows, &path->flow);
	u32 direction = path->direction & 1, other = !direction;
	u32 ends, more = 0;

	if (!flow)
		return;
	if (packet->flags & FIN)
		note_fin(flow, direction, end_of(packet));
	/* As the other direction's sender counts. */
	if (flow->ends & FIN_SEEN << other && packet->flags & ACK &&
	    !is_after(flow->fin[other & 1], packet->ack + path->ack_delta))
		more |= FIN_ACKED << other;
	/* Behind its end a flow is not broken: a dead proxy's socket may ask a port that is nobody's any more. */
	if (packet->flags & RST && !(flow->ends & REPORTED))
		more |= RST_SEEN << direction;
	ends = add_ends(flow, more);
	if (packet->flags & RST || (ends & both_acked) == both_acked)
		end_flow(flow, path->flow);
}
