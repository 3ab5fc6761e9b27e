/* ICMP errors about packets of an armed flow, for the end that sent them: too big, unreachable, time exceeded.
 *
 * The error quotes the headers of the packet as we sent it. It came for A or B, which are asleep; it is made one about
 * the packet as its sender knows it, so that path MTU discovery (RFC 1191, RFC 8201) works end to end.
 */
#pragma once
#include "translate.h"

/* The fixed part of every error (RFC 792, RFC 4443), and what is quoted of TCP at least. */
struct icmp {
	u8 type, code;
	u16 check;
	u32 rest;
};
struct quoted {
	u16 sport, dport;
	u32 seq;
};
#define QUOTED_IP(family) (L4(family) + (u32)sizeof(struct icmp))
#define QUOTED_TCP(family) (QUOTED_IP(family) + L4(family) - L3)

INLINE int is_error(u8 type, const int family)
{
	if (family == IPV6)
		return type >= 1 && type <= 4; /* unreachable, too big, time exceeded, parameter problem */
	return type == 3 || type == 11 || type == 12;
}

/* The tuple of what the quoted packet was an answer to or will be answered by: its own, reversed. */
INLINE int read_quoted(void *start, struct tuple *answer, const int family)
{
	struct icmp *icmp = start + L4(family);
	struct quoted *tcp = start + QUOTED_TCP(family);

	if (!is_error(icmp->type, family))
		return -1;
	if (family == IPV6) {
		struct ipv6hdr *outer = start + L3, *ip = start + QUOTED_IP(IPV6);

		if (outer->nexthdr != IPPROTO_ICMPV6 || ip->nexthdr != IPPROTO_TCP)
			return -1;
		copy_bytes(answer->dst, &ip->saddr, 16);
		copy_bytes(answer->src, &ip->daddr, 16);
	} else {
		struct iphdr *outer = start + L3, *ip = start + QUOTED_IP(IPV4);

		if (outer->protocol != IPPROTO_ICMP || *(u8 *)outer != 0x45 || outer->frag_off & htons(0x3fff) ||
		    ip->protocol != IPPROTO_TCP || *(u8 *)ip != 0x45)
			return -1;
		map_address(answer->dst, ip->saddr);
		map_address(answer->src, ip->daddr);
	}
	answer->dport = tcp->sport;
	answer->sport = tcp->dport;
	return 0;
}

/* The error's receiver, who is the path's, and the quoted packet's addresses, which are the path's reversed. */
INLINE void write_quoted_addresses(struct __sk_buff *skb, void *start, const struct tuple *to, s64 content, const int family)
{
	struct tuple quoted;
	struct sums inner, outer = {};

	reverse(&quoted, to);
	write_addresses(start + QUOTED_IP(family) - L3, &quoted, &inner, family);
	if (family == IPV6) {
		struct ipv6hdr *ip = start + L3;
		u32 was[4], is[4];

		copy_bytes(was, &ip->daddr, 16);
		copy_bytes(is, to->dst, 16);
		copy_bytes(&ip->daddr, is, 16);
		outer.addresses = bpf_csum_diff(was, 16, is, 16, 0);
		/* No header has a checksum of its own: ICMPv6's covers the quoted addresses too. */
		outer.content = (content & 0xffffffff) + (inner.addresses & 0xffffffff);
		outer.content = (outer.content & 0xffffffff) + (outer.content >> 32);
		write_checksums(skb, &outer, L4(IPV6) + __builtin_offsetof(struct icmp, check), IPV6);
	} else {
		struct iphdr *ip = start + L3;
		u32 was = ip->daddr, is = to->dst[3];

		ip->daddr = is;
		bpf_l3_csum_replace(skb, L3 + __builtin_offsetof(struct iphdr, check), was, is, 4);
		bpf_l3_csum_replace(skb, QUOTED_IP(IPV4) + __builtin_offsetof(struct iphdr, check), 0, inner.addresses, 0);
		bpf_l4_csum_replace(skb, L4(IPV4) + __builtin_offsetof(struct icmp, check), 0, content, 0);
	}
}

INLINE int on_error_message(struct __sk_buff *skb, const int family)
{
	const u32 size = QUOTED_TCP(family) + sizeof(struct quoted);
	struct quoted was, is, *tcp;
	struct tuple answer;
	struct path *path;
	void *start;

	pull_headers(skb, size);
	start = (void *)(long)skb->data;
	if (start + size > (void *)(long)skb->data_end || read_quoted(start, &answer, family))
		return TC_ACT_UNSPEC;
	path = bpf_map_lookup_elem(&paths, &answer);
	if (!path || path->state != ACTIVE || (skb->ifindex == LOOPBACK) != path->from_loopback)
		return TC_ACT_UNSPEC;
	if (path->ifindex == LOOPBACK)
		fill_bytes(start, 0, ETH_ALEN);
	tcp = start + QUOTED_TCP(family);
	was = *tcp;
	tcp->sport = path->to.dport;
	tcp->dport = path->to.sport;
	tcp->seq = htonl(ntohl(was.seq) + path->ack_delta);
	is = *tcp;
	write_quoted_addresses(skb, start, &path->to, bpf_csum_diff(&was, sizeof(was), &is, sizeof(is), 0), family);
	return leave(skb, path);
}
