/* Read the headers of a packet. Fixed offsets: a packet with IP options, extension headers or in fragments is for `strange`. */
#pragma once
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include "flows.h"

enum { IPV4, IPV6 };
enum { IPPROTO_RESERVED = 255 };
#define L3 ((u32)sizeof(struct ethhdr))
#define L4(family) (L3 + ((family) == IPV6 ? (u32)sizeof(struct ipv6hdr) : (u32)sizeof(struct iphdr)))
#define CHECKSUM(family) (L4(family) + (u32)__builtin_offsetof(struct tcphdr, check))

/* TCP's flag byte and the one before it. */
enum { FIN = 1, SYN = 2, RST = 4, ACK = 16, ECE = 64, CWR = 128 };

/* A TCP header as the wire has it, so that four words are the fixed part without the checksum. */
struct segment {
	u16 sport, dport;
	u32 seq, ack;
	u8 offset, flags; /* offset: header length in words in the upper half, AE in the lowest bit */
	u16 window;
};

struct packet {
	struct tuple tuple;
	u32 seq, ack;
	u32 payload;	/* bytes behind the TCP header; padding of the frame not counted */
	u32 header;	/* bytes of the TCP header */
	u16 window;	/* as in the header */
	u8 flags, ae;
};

INLINE int is_after(u32 left, u32 right)
{
	return (s32)(left - right) > 0;
}

INLINE void map_address(u32 to[4], u32 v4)
{
	to[0] = to[1] = 0;
	to[2] = htonl(0xffff);
	to[3] = v4;
}

INLINE void reverse(struct tuple *to, const struct tuple *from)
{
	copy_bytes(to->src, from->dst, sizeof(to->src));
	copy_bytes(to->dst, from->src, sizeof(to->dst));
	to->sport = from->dport;
	to->dport = from->sport;
}

/* Have the first `size` bytes of the packet in one piece. The caller compares with data_end all the same: the verifier wants
 * to see it. */
INLINE void pull_headers(struct __sk_buff *skb, u32 size)
{
	if ((void *)(long)skb->data + size > (void *)(long)skb->data_end)
		bpf_skb_pull_data(skb, size);
}

/* Which of the two families, or -1. */
INLINE int family_of(struct __sk_buff *skb)
{
	if (skb->protocol == htons(ETH_P_IP))
		return IPV4;
	return skb->protocol == htons(ETH_P_IPV6) ? IPV6 : -1;
}

/* What the IP header says comes next; an invalid number where there is none. */
INLINE u8 protocol_of(struct __sk_buff *skb, const int family)
{
	void *start = (void *)(long)skb->data;

	if (start + L4(family) > (void *)(long)skb->data_end)
		return IPPROTO_RESERVED;
	return family == IPV6 ? ((struct ipv6hdr *)(start + L3))->nexthdr : ((struct iphdr *)(start + L3))->protocol;
}

/* Fill `packet`; 0 when it is a TCP packet without anything in `fragment` set in IPv4's field of flags and offset. */
INLINE int read_headers(struct __sk_buff *skb, struct packet *packet, const int family, const u16 fragment)
{
	void *start, *end;
	struct segment *segment;
	u32 length;

	pull_headers(skb, L4(family) + sizeof(struct tcphdr));
	start = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (start + L4(family) + sizeof(struct tcphdr) > end)
		return -1;
	if (family == IPV6) {
		struct ipv6hdr *ip = start + L3;

		if (ip->nexthdr != IPPROTO_TCP)
			return -1;
		copy_bytes(packet->tuple.src, &ip->saddr, 16);
		copy_bytes(packet->tuple.dst, &ip->daddr, 16);
		length = ntohs(ip->payload_len);
	} else {
		struct iphdr *ip = start + L3;

		if (ip->protocol != IPPROTO_TCP || *(u8 *)ip != 0x45 || ip->frag_off & fragment)
			return -1;
		map_address(packet->tuple.src, ip->saddr);
		map_address(packet->tuple.dst, ip->daddr);
		length = ntohs(ip->tot_len);
		if (length)
			length -= sizeof(*ip);
	}
	if (!length) /* larger than 64 KB (BIG TCP): never padded */
		length = skb->len - L4(family);
	segment = start + L4(family);
	packet->tuple.sport = segment->sport;
	packet->tuple.dport = segment->dport;
	packet->seq = ntohl(segment->seq);
	packet->ack = ntohl(segment->ack);
	packet->window = ntohs(segment->window);
	packet->flags = segment->flags;
	packet->ae = segment->offset & 1;
	packet->header = (segment->offset >> 4) * 4;
	if (packet->header < sizeof(struct tcphdr) || length < packet->header)
		return -1;
	packet->payload = length - packet->header;
	return 0;
}

/* Fill `packet`; 0 when it is a TCP packet that can be translated. */
INLINE int read_packet(struct __sk_buff *skb, struct packet *packet, const int family)
{
	return read_headers(skb, packet, family, htons(0x3fff)); /* more fragments, or an offset */
}

/* The sequence number behind the packet. */
INLINE u32 end_of(const struct packet *packet)
{
	return packet->seq + packet->payload + !!(packet->flags & FIN) + !!(packet->flags & SYN);
}
