/* Make a packet of one leg a packet of the other, in place, and send it there. */
#pragma once
#include <linux/pkt_cls.h>
#include "options.h"

/* The sums that checksums change by: of what lies behind the pseudo header, and of the pseudo header itself. */
struct sums {
	s64 content, addresses;
};

/* Write addresses into the IP header; no checksum yet. The caller has bounds-checked up to the TCP header. */
INLINE void write_addresses(void *start, const struct tuple *to, struct sums *sums, const int family)
{
	if (family == IPV6) {
		struct ipv6hdr *ip = start + L3;
		u32 was[8], is[8];

		copy_bytes(was, &ip->saddr, 32);
		copy_bytes(is, to->src, 32);
		copy_bytes(&ip->saddr, is, 32);
		sums->addresses = bpf_csum_diff(was, 32, is, 32, 0);
	} else {
		struct iphdr *ip = start + L3;
		u32 was[2] = {ip->saddr, ip->daddr};
		u32 is[2] = {to->src[3], to->dst[3]};

		ip->saddr = is[0];
		ip->daddr = is[1];
		sums->addresses = bpf_csum_diff(was, 8, is, 8, 0);
	}
}

/* Bring the checksum field at `field` (and IPv4's own) up to date. Ends the validity of all packet pointers. */
INLINE void write_checksums(struct __sk_buff *skb, const struct sums *sums, u32 field, const int family)
{
	bpf_l4_csum_replace(skb, field, 0, sums->content, 0);
	bpf_l4_csum_replace(skb, field, 0, sums->addresses, BPF_F_PSEUDO_HDR);
	if (family == IPV4)
		bpf_l3_csum_replace(skb, L3 + __builtin_offsetof(struct iphdr, check), 0, sums->addresses, 0);
	else
		/* Where the device summed the whole packet (CHECKSUM_COMPLETE), the line with BPF_F_PSEUDO_HDR has taken the
		 * addresses out of skb->csum, as is right for IPv4, whose header sums up to a constant. IPv6 has no such
		 * checksum: the address and the TCP checksum cancel each other. Newer kernels have BPF_F_IPV6 for this. */
		bpf_csum_update(skb, sums->addresses);
}

INLINE u16 translate_window(const struct path *path, u16 window)
{
	u32 wide = (u32)window << (path->scale_from & 15) >> (path->scale_to & 15);

	return wide > 0xffff ? 0xffff : wide;
}

/* Keep the path's count of bytes and acknowledgements up to date. */
INLINE void account(struct path *path, const struct packet *packet)
{
	s32 more = (s32)(end_of(packet) - path->base - (u32)path->bytes);

	/* No window is larger than 2^30 (RFC 7323 2.3): more is not from our peer. */
	if (more > 0 && more < 1 << 30)
		path->bytes += more;
	if (packet->flags & ACK && is_after(packet->ack, path->acked))
		path->acked = packet->ack;
	/* A RST is no sign of life: a kernel answers with it what comes for a socket that is gone. */
	if (!(packet->flags & RST))
		path->seen_ns = bpf_ktime_get_coarse_ns();
}

/* Whether the packet's options need `unusual`, which costs more. */
INLINE int has_unusual_options(struct __sk_buff *skb, const struct packet *packet, const int family)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u32 words = (packet->header - sizeof(struct tcphdr)) / 4;

	if (!words)
		return 0;
	if (start + L4(family) + sizeof(struct tcphdr) > end)
		return 1;
	return aligned_words(start + L4(family) + sizeof(struct tcphdr), words, end) != words;
}

/* Translate the packet, but for unusual options; 0 when it is ready to `leave`. */
INLINE int translate(struct __sk_buff *skb, const struct packet *packet, struct path *path, const int is_usual,
		     const int family)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct sums sums = {};
	struct segment was, is, *segment;
	u32 words = (packet->header - sizeof(struct tcphdr)) / 4;

	if (start + L4(family) + sizeof(struct tcphdr) > end)
		return -1;
	if (path->ifindex == LOOPBACK)
		fill_bytes(start, 0, ETH_ALEN); /* lo's own address, or the packet is for another host */
	write_addresses(start, &path->to, &sums, family);
	segment = start + L4(family);
	was = *segment;
	segment->sport = path->to.sport;
	segment->dport = path->to.dport;
	segment->seq = htonl(packet->seq + path->seq_delta);
	if (packet->flags & ACK)
		segment->ack = htonl(packet->ack + path->ack_delta);
	segment->window = htons(translate_window(path, packet->window));
	is = *segment;
	sums.content = bpf_csum_diff(&was, sizeof(was), &is, sizeof(is), sums.content);
	if (is_usual && words)
		translate_aligned(start + L4(family) + sizeof(struct tcphdr), words, end, path, &sums.content);
	write_checksums(skb, &sums, CHECKSUM(family), family);
	return 0;
}

/* In skb->tc_index, which nobody else looks at on the way: `departure` need not find out that a packet is not the proxy's. */
#define TRANSLATED 0x49c7

/* Send a translated packet out on the path's other leg: the program's verdict. */
INLINE int leave(struct __sk_buff *skb, const struct path *path)
{
	skb->mark = path->mark;
	if (path->ifindex == LOOPBACK)
		return bpf_redirect(LOOPBACK, BPF_F_INGRESS);
	skb->tc_index = TRANSLATED;
	return bpf_redirect_neigh(path->ifindex, 0, 0, 0);
}

/* Overwrite the timestamp of B's packet; the program's verdict. Without timestamps in the usual place nothing changes. */
INLINE int set_clock(struct __sk_buff *skb, const struct packet *packet, u32 clock, const int family)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u32 *option = start + L4(family) + sizeof(struct tcphdr);
	u32 was, is = htonl(clock);

	if (packet->header < sizeof(struct tcphdr) + 12 || (void *)(option + 3) > end || option[0] != ALIGNED_TIMESTAMPS)
		return TC_ACT_UNSPEC;
	was = option[1];
	option[1] = is;
	bpf_l4_csum_replace(skb, CHECKSUM(family), was, is, sizeof(is));
	return TC_ACT_UNSPEC;
}
