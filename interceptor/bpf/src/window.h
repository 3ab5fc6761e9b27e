/* Tell a client that was held that it may speak: B's acknowledgement of the SYN-ACK, made A's window update, as a copy. */
#pragma once
#include "arm.h"

/* The largest packet that B's bare acknowledgement is: IPv6, timestamps. */
#define BARE_MAX (sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + sizeof(struct tcphdr) + 12)

/* B's packets are summed by the device (CHECKSUM_PARTIAL, as all of Linux TCP's): so restoring the bytes restores all. */
INLINE void open_window(struct __sk_buff *skb, const struct packet *packet, struct flow *flow, const int family)
{
	struct accepted *client = bpf_map_lookup_elem(&accepted, &flow->client_cookie);
	struct path *down = bpf_map_lookup_elem(&paths, &flow->server);
	const u32 bare = L4(family) + sizeof(struct tcphdr);
	u8 saved[BARE_MAX + 2] = {};
	struct sums sums = {};
	struct segment was, *segment;
	void *start, *end;
	u32 *option;

	if (!client || !down || packet->payload)
		return;
	if (packet->header != sizeof(struct tcphdr) && packet->header != sizeof(struct tcphdr) + 12)
		return;
	if (bpf_skb_load_bytes(skb, 0, saved, bare))
		return;
	if (packet->header > sizeof(struct tcphdr) && bpf_skb_load_bytes(skb, bare, saved + bare, 12))
		return;
	start = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (start + bare > end)
		return;
	if (client->ifindex == LOOPBACK)
		fill_bytes(start, 0, ETH_ALEN);
	else
		copy_bytes(start, client->link_header, sizeof(client->link_header));
	write_addresses(start, &down->to, &sums, family);
	segment = start + L4(family);
	was = *segment;
	segment->sport = down->to.sport;
	segment->dport = down->to.dport;
	segment->seq = htonl(client->isn + 1);
	segment->ack = htonl(client->client_isn + 1);
	segment->window = htons(flow->server_window >> (down->scale_to & 15));
	{
		struct segment is = *segment;

		sums.content = bpf_csum_diff(&was, sizeof(was), &is, sizeof(is), 0);
	}
	option = start + bare;
	if (packet->header > sizeof(struct tcphdr) && (void *)(option + 3) <= end) {
		u32 before[2] = {option[1], option[2]};
		u32 after[2] = {htonl(down->clock), htonl(client->client_clock)};

		option[1] = after[0];
		option[2] = after[1];
		sums.content = bpf_csum_diff(before, 8, after, 8, sums.content);
	}
	write_checksums(skb, &sums, CHECKSUM(family), family);
	bpf_clone_redirect(skb, client->ifindex, client->ifindex == LOOPBACK ? BPF_F_INGRESS : 0);
	bpf_skb_store_bytes(skb, 0, saved, bare, 0);
	if (packet->header > sizeof(struct tcphdr))
		bpf_skb_store_bytes(skb, bare, saved + bare, 12, 0);
}
