/* Packets of an armed flow whose headers are not where the programs look: IP options, extension headers, IPv4 fragments.
 *
 * Options and extension headers are between the IP layers of a client and of the proxy, as with every proxy: they are taken
 * out, and the packet begins anew. A first fragment is translated like a packet, and those behind it follow it.
 */
#pragma once
#include "ending.h"

enum { HOP_BY_HOP = 0, ROUTING = 43, DESTINATION = 60 }; /* RFC 8200 4 */
#define EXTENSIONS_COUNT 4
#define MORE_FRAGMENTS htons(0x2000)

/* Whether a packet that `read_packet` has refused may be mended. */
INLINE int is_strange(u8 protocol, const int family)
{
	if (family == IPV6)
		return protocol == HOP_BY_HOP || protocol == ROUTING || protocol == DESTINATION;
	return protocol == IPPROTO_TCP;
}

INLINE struct path *armed_path(struct __sk_buff *skb, const struct tuple *tuple)
{
	struct path *path = bpf_map_lookup_elem(&paths, tuple);

	if (!path || path->state != ACTIVE || (skb->ifindex == LOOPBACK) != path->from_loopback)
		return 0;
	return path;
}

/* Take `surplus` bytes out behind the IP header, which becomes `is`; -1 when the kernel will not. */
INLINE int take_out(struct __sk_buff *skb, u32 surplus, void *was, void *is, const u32 size)
{
	if (bpf_skb_adjust_room(skb, -(s32)surplus, BPF_ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return -1;
	bpf_skb_store_bytes(skb, L3, is, size, 0);
	/* Where the device summed the whole packet, the helpers took what is out off its sum, but did not see the header. */
	bpf_csum_update(skb, (u32)bpf_csum_diff(was, size, is, size, 0));
	return 0;
}

INLINE int take_options_out(struct __sk_buff *skb, struct iphdr *ip)
{
	u32 surplus = (*(u8 *)ip & 15) * 4 - sizeof(*ip), sum;
	struct iphdr was = *ip;
	struct tuple tuple;

	map_address(tuple.src, ip->saddr);
	map_address(tuple.dst, ip->daddr);
	if (bpf_skb_load_bytes(skb, L4(IPV4) + surplus, &tuple.sport, 4) || !armed_path(skb, &tuple))
		return -1;
	*(u8 *)ip = 0x45;
	if (ip->tot_len)
		ip->tot_len = htons(ntohs(ip->tot_len) - surplus);
	ip->check = 0;
	sum = bpf_csum_diff(0, 0, (void *)ip, sizeof(*ip), 0);
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~((sum & 0xffff) + (sum >> 16));
	return take_out(skb, surplus, &was, ip, sizeof(*ip));
}

INLINE int take_extensions_out(struct __sk_buff *skb)
{
	struct ipv6hdr was, ip;
	struct tuple tuple;
	u32 surplus = 0;
	u8 kind;

	if (bpf_skb_load_bytes(skb, L3, &ip, sizeof(ip)))
		return -1;
	was = ip;
	kind = ip.nexthdr;
	for (int n = 0; n < EXTENSIONS_COUNT; n++) {
		u8 head[2];

		if (kind != HOP_BY_HOP && kind != ROUTING && kind != DESTINATION)
			break;
		if (bpf_skb_load_bytes(skb, L4(IPV6) + surplus, head, sizeof(head)))
			return -1;
		kind = head[0];
		surplus += (head[1] + 1) * 8;
	}
	copy_bytes(tuple.src, &ip.saddr, 16);
	copy_bytes(tuple.dst, &ip.daddr, 16);
	if (kind != IPPROTO_TCP || bpf_skb_load_bytes(skb, L4(IPV6) + surplus, &tuple.sport, 4) || !armed_path(skb, &tuple))
		return -1;
	ip.nexthdr = IPPROTO_TCP;
	if (ip.payload_len)
		ip.payload_len = htons(ntohs(ip.payload_len) - surplus);
	return take_out(skb, surplus, &was, &ip, sizeof(ip));
}

/* The fragment with the TCP header. How long the segment is, the last fragment will tell: and only then does its FIN count. */
INLINE int on_first_fragment(struct __sk_buff *skb, const struct fragment_key *key)
{
	struct packet packet;
	struct path *path;

	if (read_headers(skb, &packet, IPV4, htons(0x1fff)))
		return TC_ACT_UNSPEC;
	path = armed_path(skb, &packet.tuple);
	if (!path || packet.flags & SYN)
		return TC_ACT_UNSPEC;
	{
		struct fragmented segment = {
			.tuple = packet.tuple,
			.seq = packet.seq,
			.ack = packet.ack,
			.header = packet.header,
			.flags = packet.flags,
		};

		bpf_map_update_elem(&fragments, key, &segment, BPF_ANY);
	}
	packet.flags &= ~FIN;
	account(path, &packet);
	if (packet.flags & RST || path->is_closing)
		note_ending(&packet, path);
	bpf_tail_call(skb, &tails, UNUSUAL);
	return TC_ACT_SHOT;
}

INLINE int on_later_fragment(struct __sk_buff *skb, const struct fragment_key *key, const struct iphdr *ip)
{
	struct fragmented *segment = bpf_map_lookup_elem(&fragments, key);
	struct path *path = segment ? armed_path(skb, &segment->tuple) : 0;
	struct sums sums = {};
	void *start;

	if (!segment || !path)
		return TC_ACT_UNSPEC; /* before its first, which comes with the next attempt */
	if (!(ip->frag_off & MORE_FRAGMENTS)) {
		struct packet whole = {.seq = segment->seq, .ack = segment->ack, .flags = segment->flags};

		whole.payload = (ntohs(ip->frag_off) & 0x1fff) * 8 + ntohs(ip->tot_len) - sizeof(*ip) - segment->header;
		account(path, &whole);
		if (whole.flags & FIN || path->is_closing)
			note_ending(&whole, path);
	}
	pull_headers(skb, L4(IPV4));
	start = (void *)(long)skb->data;
	if (start + L4(IPV4) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	if (path->ifindex == LOOPBACK)
		fill_bytes(start, 0, ETH_ALEN);
	write_addresses(start, &path->to, &sums, IPV4);
	bpf_l3_csum_replace(skb, L3 + __builtin_offsetof(struct iphdr, check), 0, sums.addresses, 0);
	return leave(skb, path);
}

/* What is not mended is the stack's: A or B takes it, and is silent. */
INLINE int on_strange(struct __sk_buff *skb, const int family)
{
	if (family == IPV6) {
		if (take_extensions_out(skb))
			return TC_ACT_UNSPEC;
	} else {
		struct iphdr ip;
		struct fragment_key key = {};

		if (bpf_skb_load_bytes(skb, L3, &ip, sizeof(ip)))
			return TC_ACT_UNSPEC;
		if (*(u8 *)&ip == 0x45 && ip.frag_off & htons(0x3fff)) {
			key.src = ip.saddr;
			key.dst = ip.daddr;
			key.id = ip.id;
			return ip.frag_off & htons(0x1fff) ? on_later_fragment(skb, &key, &ip) : on_first_fragment(skb, &key);
		}
		if (*(u8 *)&ip <= 0x45 || ip.frag_off & htons(0x3fff) || take_options_out(skb, &ip))
			return TC_ACT_UNSPEC;
	}
	bpf_tail_call(skb, &tails, skb->ifindex == LOOPBACK ? LOOPBACK_AGAIN : ARRIVAL_AGAIN);
	return TC_ACT_SHOT;
}
