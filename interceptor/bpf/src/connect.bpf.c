/* --outbound connect: decide about a TCP connection when it is connected, and give the socket another address then.
 *
 * One object for every configuration: the policy is in maps, laid out as interceptor/render/connect_bytes.py does.
 * Without a policy every program here lets everything pass as it is.
 */
#include <linux/in.h>
#include <linux/in6.h>

#include "helpers.h"

#define AF_INET 2 /* linux/socket.h; the headers here give the structs alone */
#define AF_INET6 10
#define SOCK_PROTO_TCP 6
#define LO_IFINDEX 1 /* the loopback interface, in every network namespace */
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25

#define WORDS 4		   /* of 64 facts each */
#define MAX_RULES 128
#define MAX_DEPTH 32	   /* of cgroups: a search for an ancestor gives up there */

/* What the sets of a policy hold; the first byte of their keys. */
enum { OF_V4 = 1, OF_V6, OF_PORT, OF_UID, OF_GID };
/* Facts that no set says. */
enum { FACT_V4, FACT_V6, FACT_MARK, FACT_CGROUP };
enum { DIRECT = 1, TO_PROXY, GOTO };

struct facts {
	u64 word[WORDS];
};

/* Which sets hold a value: the longest prefix knows all of them. */
struct set_key {
	u32 prefix_length; /* counted from `of` */
	u8 of;
	u8 value[19];
};

struct rule {
	struct facts needed;
	u32 verdict;
	u32 argument; /* TO_PROXY: port; GOTO: rule */
};

struct policy {
	u64 netns_cookie;
	u64 cgroup;
	u32 mark_value;
	u32 mark_mask;
	u32 sets; /* index in all_sets */
	u32 rules;
	u32 source; /* what captured IPv4 connections come from; 0 for none */
	u32 unused;
	struct rule rule[MAX_RULES];
};

/* What a captured socket is told to hide, and the proxy to find. */
struct original {
	u32 address[4]; /* network order; IPv4 in the first */
	u32 proxy[4];
	u16 port; /* network order */
	u16 proxy_port;
	u32 family;
	u32 scope;
	u32 uid;
};

/* A captured connection as the proxy sees it. Addresses of IPv4, also when v4-mapped, are in the first word. */
struct seen {
	u32 client[4];
	u32 to;	 /* of IPv4: the proxy's address */
	u32 family;
	u16 client_port; /* network order */
	u16 port;
};

/* The kernel swaps the one entry under readers: the whole policy changes at once, for both families. */
struct map_def SEC("maps") active = {BPF_MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1, 0};
struct map_def SEC("maps") all_sets = {BPF_MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 2, 0};
struct map_def SEC("maps") sockets = {BPF_MAP_TYPE_SK_STORAGE, 4, sizeof(struct original), 0, BPF_F_NO_PREALLOC};
struct map_def SEC("maps") originals = {BPF_MAP_TYPE_LRU_HASH, sizeof(struct seen), sizeof(struct original), 16384, 0};

static u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static u64 (*bpf_get_current_uid_gid)(void) = (void *)BPF_FUNC_get_current_uid_gid;
static u64 (*bpf_get_current_ancestor_cgroup_id)(int level) = (void *)BPF_FUNC_get_current_ancestor_cgroup_id;
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, u64 flags) = (void *)BPF_FUNC_sk_storage_get;
static long (*bpf_bind)(void *ctx, void *address, int size) = (void *)BPF_FUNC_bind;
static long (*bpf_setsockopt)(void *ctx, int level, int name, void *value, int size) = (void *)BPF_FUNC_setsockopt;

/* A connection that is being made. */
struct attempt {
	u32 address[4];
	u32 family;
	u16 port; /* network order */
};

INLINE struct policy *active_policy(void *ctx)
{
	u32 zero = 0;
	void *map = bpf_map_lookup_elem(&active, &zero);
	struct policy *policy = map ? bpf_map_lookup_elem(map, &zero) : 0;

	/* A cgroup may hold processes of other namespaces, the host's among them. */
	return policy && policy->netns_cookie == bpf_get_netns_cookie(ctx) ? policy : 0;
}

INLINE void add(struct facts *known, const struct facts *more)
{
	for (int i = 0; i < WORDS; i++)
		known->word[i] |= more->word[i];
}

INLINE void add_sets(void *sets, struct set_key *key, u32 bits, struct facts *known)
{
	struct facts *found;

	key->prefix_length = 8 + bits;
	found = bpf_map_lookup_elem(sets, key);
	if (found)
		add(known, found);
}

INLINE void add_sets_of_number(void *sets, u8 of, u32 number, u32 bits, struct facts *known)
{
	struct set_key key = {.of = of};
	u32 big_endian = bits == 16 ? htons(number) : htonl(number);

	copy_bytes(key.value, &big_endian, 4);
	add_sets(sets, &key, bits, known);
}

INLINE int is_in_cgroup(u64 cgroup)
{
	for (int level = 1; level < MAX_DEPTH; level++) {
		u64 ancestor = bpf_get_current_ancestor_cgroup_id(level);

		if (ancestor == cgroup)
			return 1;
		if (!ancestor)
			return 0;
	}
	return 0;
}

INLINE void learn(struct bpf_sock_addr *ctx, const struct policy *policy, void *sets, const struct attempt *attempt,
		  struct facts *known)
{
	u64 ids = bpf_get_current_uid_gid();
	struct set_key key = {};

	key.of = attempt->family == AF_INET ? OF_V4 : OF_V6;
	copy_bytes(key.value, attempt->address, 16);
	add_sets(sets, &key, attempt->family == AF_INET ? 32 : 128, known);
	add_sets_of_number(sets, OF_PORT, ntohs(attempt->port), 16, known);
	add_sets_of_number(sets, OF_UID, (u32)ids, 32, known);
	add_sets_of_number(sets, OF_GID, (u32)(ids >> 32), 32, known);
	known->word[0] |= 1 << (attempt->family == AF_INET ? FACT_V4 : FACT_V6);
	if (policy->mark_mask && ctx->sk && (ctx->sk->mark & policy->mark_mask) == policy->mark_value)
		known->word[0] |= 1 << FACT_MARK;
	if (policy->cgroup && is_in_cgroup(policy->cgroup))
		known->word[0] |= 1 << FACT_CGROUP;
}

INLINE int holds(const struct facts *needed, const struct facts *known)
{
	u64 missing = 0;

	for (int i = 0; i < WORDS; i++)
		missing |= needed->word[i] & ~known->word[i];
	return !missing;
}

/* The proxy's port, or 0 for what goes on as it is. The first rule that holds decides; GOTO leads forward only. */
INLINE u32 decide(struct bpf_sock_addr *ctx, const struct policy *policy, const struct attempt *attempt)
{
	struct facts known = {};
	u32 next = 0;
	void *sets;

	sets = bpf_map_lookup_elem(&all_sets, &policy->sets);
	if (!sets)
		return 0;
	learn(ctx, policy, sets, attempt, &known);
	for (u32 i = 0; i < MAX_RULES; i++) {
		const struct rule *rule = &policy->rule[i];

		if (i >= policy->rules)
			return 0;
		if (i < next || !holds(&rule->needed, &known))
			continue;
		if (rule->verdict != GOTO)
			return rule->verdict == TO_PROXY ? rule->argument : 0;
		next = rule->argument;
	}
	return 0;
}

/* Another address of 127.128.0.0/9 for each destination, so that each has all source ports to itself, as without a
 * proxy, and a port that is reused for another destination is not mistaken for the connection before it. */
INLINE u32 proxy_address(const struct attempt *attempt)
{
	/* Multiplicative hashing (Knuth, The Art 6.4), an odd factor for each. */
	u32 hash = attempt->address[0] * 0x9e3779b1u + attempt->port * 0x85ebca6bu;

	return htonl(0x7f800000u | hash >> 9);
}

INLINE int remember(struct bpf_sock_addr *ctx, const struct attempt *attempt, u32 port, const u32 *proxy)
{
	struct original *original;

	if (!ctx->sk)
		return 0;
	original = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!original)
		return 0;
	copy_bytes(original->address, attempt->address, 16);
	copy_bytes(original->proxy, proxy, 16);
	original->port = attempt->port;
	original->proxy_port = htons(port);
	original->family = attempt->family;
	original->scope = ctx->sk->bound_dev_if;
	original->uid = (u32)bpf_get_current_uid_gid();
	return 1;
}

/* A socket that is bound to an interface finds no way to loopback. It is given up: what it is connected to is on no other. */
INLINE int unbind_interface(struct bpf_sock_addr *ctx)
{
	char none = 0;

	return !ctx->sk->bound_dev_if || !bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, &none, 1);
}

/* As if it went where the application thinks: from the pod's address, not from 127.0.0.1, which is what the socket would
 * show and the proxy would see. An address that is gone makes no difference to where the connection goes.
 *
 * Not for IPv6: what REDIRECT captured before goes from the same address to ::1, too, and conntrack keeps two connections
 * that look alike apart by giving the second another source port, under which the proxy would not find it.
 */
INLINE void bind_source(struct bpf_sock_addr *ctx, const struct policy *policy)
{
	struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr = {policy->source}};

	if (policy->source && !ctx->sk->src_ip4)
		bpf_bind(ctx, &source, sizeof(source));
}

INLINE void bind_mapped_source(struct bpf_sock_addr *ctx, const struct policy *policy)
{
	struct sockaddr_in6 source = {.sin6_family = AF_INET6};
	u32 mapped[4] = {0, 0, htonl(0xffff), policy->source};
	struct bpf_sock *sk = ctx->sk;

	copy_bytes(&source.sin6_addr, mapped, 16);
	if (policy->source && !sk->src_ip6[0] && !sk->src_ip6[1] && !sk->src_ip6[2] && !sk->src_ip6[3])
		bpf_bind(ctx, &source, sizeof(source));
}

INLINE int is_of_interest(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == SOCK_PROTO_TCP && ctx->sk && ctx->sk->bound_dev_if != LO_IFINDEX;
}

INLINE int is_mapped(const u32 *address)
{
	return !address[0] && !address[1] && address[2] == htonl(0xffff);
}

/* What cannot be captured though it should be is refused (0: EPERM), not let through. */
SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
{
	struct attempt attempt = {.family = AF_INET, .port = ctx->user_port, .address = {ctx->user_ip4}};
	struct policy *policy;
	u32 proxy[4] = {};
	u32 port;

	if (!is_of_interest(ctx) || !(policy = active_policy(ctx)))
		return 1;
	port = decide(ctx, policy, &attempt);
	if (!port)
		return 1;
	proxy[0] = proxy_address(&attempt);
	if (!remember(ctx, &attempt, port, proxy) || !unbind_interface(ctx))
		return 0;
	bind_source(ctx, policy);
	ctx->user_ip4 = proxy[0];
	ctx->user_port = htons(port);
	return 1;
}

SEC("cgroup/connect6") int connect6(struct bpf_sock_addr *ctx)
{
	struct attempt attempt = {.family = AF_INET6, .port = ctx->user_port};
	u32 given[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
	struct policy *policy;
	u32 proxy[4] = {};
	u32 port;

	if (!is_of_interest(ctx) || !(policy = active_policy(ctx)))
		return 1;
	if (is_mapped(given)) {
		/* The kernel goes on with IPv4, and never comes to connect4. */
		attempt.family = AF_INET;
		attempt.address[0] = given[3];
	} else {
		copy_bytes(attempt.address, given, 16);
	}
	port = decide(ctx, policy, &attempt);
	if (!port)
		return 1;
	if (attempt.family == AF_INET)
		proxy[0] = proxy_address(&attempt);
	else
		proxy[3] = htonl(1);
	if (!remember(ctx, &attempt, port, proxy) || !unbind_interface(ctx))
		return 0;
	if (attempt.family == AF_INET) {
		bind_mapped_source(ctx, policy);
		ctx->user_ip6[3] = proxy[0];
	} else {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = 0;
		ctx->user_ip6[3] = proxy[3];
	}
	ctx->user_port = htons(port);
	return 1;
}

/* Right before the SYN, when the source port is known: tell the proxy. */
SEC("sockops") int tell_proxy(struct bpf_sock_ops *ctx)
{
	struct original *original;
	struct seen seen = {};

	if (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB || !ctx->sk)
		return 1;
	original = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	/* The socket may have been connected elsewhere since. bpf.h: remote_port is in network order, in the upper half. */
	if (!original || ctx->remote_port != htonl(ntohs(original->proxy_port)))
		return 1;
	seen.family = original->family;
	if (original->family == AF_INET) {
		if (ctx->remote_ip4 != original->proxy[0])
			return 1;
		seen.client[0] = ctx->local_ip4;
		seen.to = original->proxy[0];
	} else {
		if (ctx->remote_ip6[3] != original->proxy[3])
			return 1;
		seen.client[0] = ctx->local_ip6[0];
		seen.client[1] = ctx->local_ip6[1];
		seen.client[2] = ctx->local_ip6[2];
		seen.client[3] = ctx->local_ip6[3];
	}
	seen.client_port = htons(ctx->local_port);
	seen.port = original->proxy_port;
	bpf_map_update_elem(&originals, &seen, original, BPF_ANY);
	return 1;
}

INLINE struct original *hidden(struct bpf_sock_addr *ctx, u32 family, u32 last_word)
{
	struct original *original = ctx->sk ? bpf_sk_storage_get(&sockets, ctx->sk, 0, 0) : 0;

	if (!original || original->family != family || original->proxy_port != (u16)ctx->user_port)
		return 0;
	return original->proxy[family == AF_INET ? 0 : 3] == last_word ? original : 0;
}

SEC("cgroup/getpeername4") int getpeername4(struct bpf_sock_addr *ctx)
{
	struct original *original = hidden(ctx, AF_INET, ctx->user_ip4);

	if (original) {
		ctx->user_ip4 = original->address[0];
		ctx->user_port = original->port;
	}
	return 1;
}

SEC("cgroup/getpeername6") int getpeername6(struct bpf_sock_addr *ctx)
{
	u32 shown[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
	struct original *original = hidden(ctx, is_mapped(shown) ? AF_INET : AF_INET6, shown[3]);

	if (!original)
		return 1;
	if (original->family == AF_INET) {
		ctx->user_ip6[3] = original->address[0];
	} else {
		ctx->user_ip6[0] = original->address[0];
		ctx->user_ip6[1] = original->address[1];
		ctx->user_ip6[2] = original->address[2];
		ctx->user_ip6[3] = original->address[3];
	}
	ctx->user_port = original->port;
	return 1;
}

/* Tells a stale object, see tests/bpf/build.py. */
const char source_hash[] SEC("source") = SOURCE_HASH;
