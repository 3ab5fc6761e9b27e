/* TCP options: read those of a SYN; find and change timestamps and SACK blocks of any other packet. */
#pragma once
#include "packet.h"

enum { OPTION_END = 0, OPTION_NOP = 1, OPTION_MSS = 2, OPTION_SCALE = 3, OPTION_SACK = 5, OPTION_TIMESTAMPS = 8 };
#define OPTIONS_COUNT 20 /* followed at most, NOPs included; there is room for 40 bytes */
/* As Linux and most others lay timestamps out (RFC 7323 appendix A), SACK blocks behind or alone. */
#define ALIGNED_TIMESTAMPS htonl(0x0101080a)
#define ALIGNED_SACK htonl(0x01010500)

struct syn_options {
	u32 clock, echo;
	u16 mss;
	u8 scale, has; /* HAS_TIMESTAMPS, HAS_SCALE */
};

/* `value`, of which the verifier knows nothing any more: else it follows a loop once for every range it can prove. */
INLINE u32 forget(struct __sk_buff *skb, u32 value)
{
	skb->cb[0] = value;
	return *(volatile u32 *)&skb->cb[0];
}

/* One option at `at`; its length, 0 where the options end. Read through the helper, which checks bounds: the verifier then
 * need not follow every possible offset. */
INLINE u32 next_option(struct __sk_buff *skb, u32 at, u32 past, u8 *kind)
{
	u8 head[2];

	if (at >= past || bpf_skb_load_bytes(skb, at, head, 1))
		return 0;
	*kind = head[0];
	if (head[0] == OPTION_NOP)
		return 1;
	if (head[0] == OPTION_END || bpf_skb_load_bytes(skb, at, head, 2) || head[1] < 2)
		return 0;
	return head[1];
}

INLINE void read_syn_options(struct __sk_buff *skb, const struct packet *packet, struct syn_options *to, const int family)
{
	u32 at = L4(family) + sizeof(struct tcphdr), past = L4(family) + packet->header;

	fill_bytes(to, 0, sizeof(*to));
	to->mss = 536; /* RFC 9293 3.7.1, where there is none */
#pragma clang loop unroll(disable)
	for (int n = 0; n < OPTIONS_COUNT; n++) {
		u8 kind = 0, scale;
		u16 mss;
		u32 clocks[2];
		u32 length = next_option(skb, at, past, &kind);

		if (!length)
			break;
		if (kind == OPTION_MSS && !bpf_skb_load_bytes(skb, at + 2, &mss, sizeof(mss)))
			to->mss = ntohs(mss);
		if (kind == OPTION_SCALE && !bpf_skb_load_bytes(skb, at + 2, &scale, sizeof(scale))) {
			to->has |= HAS_SCALE;
			to->scale = scale > 14 ? 14 : scale; /* RFC 7323 2.3 */
		}
		if (kind == OPTION_TIMESTAMPS && !bpf_skb_load_bytes(skb, at + 2, clocks, sizeof(clocks))) {
			to->has |= HAS_TIMESTAMPS;
			to->clock = ntohl(clocks[0]);
			to->echo = ntohl(clocks[1]);
		}
		at = forget(skb, at + length);
	}
	to->has = forget(skb, to->has); /* nor all that comes behind the loop once for every combination */
}

/* How many words of options in the usual layout there are at `option`; another layout ends early, or not at all. */
INLINE u32 aligned_words(const u32 *option, u32 words, const void *end)
{
	u32 found = 0;

	if (words >= 3 && (void *)(option + 3) <= end && option[0] == ALIGNED_TIMESTAMPS) {
		found = 3;
		option += 3;
	}
	if (words >= found + 3 && (void *)(option + 1) <= end && (option[0] & htonl(0xffffff00)) == ALIGNED_SACK)
		found += 1 + ((ntohl(option[0]) & 0xff) - 2) / 4;
	return found;
}

/* Translate options in the usual layout, in place; the change of the checksum is added to `sum`. */
INLINE void translate_aligned(u32 *option, u32 words, const void *end, struct path *path, s64 *sum)
{
	u32 was[2], is[2];

	if (words >= 3 && (void *)(option + 3) <= end && option[0] == ALIGNED_TIMESTAMPS) {
		u32 clock = ntohl(option[1]) + path->clock_delta;

		was[0] = option[1];
		was[1] = option[2];
		option[1] = is[0] = htonl(clock);
		option[2] = is[1] = htonl(ntohl(option[2]) + path->echo_delta);
		*sum = bpf_csum_diff(was, 8, is, 8, *sum);
		path->clock = clock;
		option += 3;
		words -= 3;
	}
	if (words < 3)
		return;
	option++;
	words--;
#pragma clang loop unroll(disable)
	for (u32 n = 0; n < 4; n++) {
		if (words < 2 || (void *)(option + 2) > end)
			break;
		was[0] = option[0];
		was[1] = option[1];
		option[0] = is[0] = htonl(ntohl(option[0]) + path->ack_delta);
		option[1] = is[1] = htonl(ntohl(option[1]) + path->ack_delta);
		*sum = bpf_csum_diff(was, 8, is, 8, *sum);
		option += 2;
		words -= 2;
	}
}

/* Add to the two big-endian words at `at`. */
INLINE void add_words(struct __sk_buff *skb, u32 at, u32 first, u32 second, const int family)
{
	u32 was[2], is[2];
	u32 change, swap;

	if (bpf_skb_load_bytes(skb, at, was, sizeof(was)))
		return;
	is[0] = htonl(ntohl(was[0]) + first);
	is[1] = htonl(ntohl(was[1]) + second);
	change = (u32)bpf_csum_diff(was, sizeof(was), is, sizeof(is), 0);
	swap = (at & 1) * 8; /* the checksum is of 16-bit words (RFC 1071): at an odd place the halves change roles */
	change = change >> swap | change << ((32 - swap) & 31);
	bpf_skb_store_bytes(skb, at, is, sizeof(is), 0);
	bpf_l4_csum_replace(skb, CHECKSUM(family), 0, change, 0);
}

/* The same for any layout; slower, and rare. Ends the validity of packet pointers.
 *
 * One loop for options and the blocks inside of SACK: nested ones are more than the verifier follows.
 */
INLINE void translate_options(struct __sk_buff *skb, const struct packet *packet, struct path *path, const int family)
{
	u32 at = L4(family) + sizeof(struct tcphdr), past = L4(family) + packet->header;
	u32 blocks = 0;

#pragma clang loop unroll(disable)
	for (int n = 0; n < OPTIONS_COUNT; n++) {
		u32 first = path->ack_delta, second = path->ack_delta;
		u32 words_at = at, length = 8;

		if (blocks) {
			blocks--;
		} else {
			u8 kind = 0;

			length = next_option(skb, at, past, &kind);
			if (!length)
				return;
			words_at = 0;
			if (kind == OPTION_SACK) {
				blocks = length >> 3;
				length = 2;
			} else if (kind == OPTION_TIMESTAMPS) {
				words_at = at + 2;
				first = path->clock_delta;
				second = path->echo_delta;
			}
		}
		if (words_at)
			add_words(skb, words_at, first, second, family);
		at = forget(skb, at + length);
	}
}
