/* What libbpf's headers would give: types, sections, the kernel helpers we call. Only linux-libc-dev is needed to build. */
#pragma once
#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;

/* Read by interceptor/bpf/elf.py. */
struct map_def {
	u32 type, key_size, value_size, max_entries, flags;
};
#define MAP(name, kind, key, value, entries)                                                                            \
	struct map_def SEC("maps") name = {BPF_MAP_TYPE_##kind, key, value, entries, 0}

/* A constant that user space sets before loading: volatile keeps clang from folding it. */
#define CONFIG(type, name) const volatile type name SEC(".rodata")

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define htons(x) ((u16)__builtin_bswap16(x))
#define htonl(x) ((u32)__builtin_bswap32(x))
#else
#define htons(x) ((u16)(x))
#define htonl(x) ((u32)(x))
#endif
#define ntohs htons
#define ntohl htonl

#define copy_bytes __builtin_memcpy
#define fill_bytes __builtin_memset

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static u64 (*bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static u64 (*bpf_ktime_get_coarse_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static s64 (*bpf_csum_diff)(const void *from, u32 from_size, const void *to, u32 to_size, u32 seed) = (void *)BPF_FUNC_csum_diff;
static long (*bpf_skb_load_bytes)(const void *skb, u32 offset, void *to, u32 size) = (void *)BPF_FUNC_skb_load_bytes;
static long (*bpf_skb_store_bytes)(void *skb, u32 offset, const void *from, u32 size, u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*bpf_skb_pull_data)(void *skb, u32 size) = (void *)BPF_FUNC_skb_pull_data;
static long (*bpf_l3_csum_replace)(void *skb, u32 offset, u64 from, u64 to, u64 flags) = (void *)BPF_FUNC_l3_csum_replace;
static long (*bpf_l4_csum_replace)(void *skb, u32 offset, u64 from, u64 to, u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
static long (*bpf_clone_redirect)(void *skb, u32 ifindex, u64 flags) = (void *)BPF_FUNC_clone_redirect;
static long (*bpf_redirect)(u32 ifindex, u64 flags) = (void *)BPF_FUNC_redirect;
static long (*bpf_redirect_neigh)(u32 ifindex, const void *next_hop, int size, u64 flags) = (void *)BPF_FUNC_redirect_neigh;
static long (*bpf_ringbuf_output)(void *ring, const void *record, u64 size, u64 flags) = (void *)BPF_FUNC_ringbuf_output;
static struct bpf_sock *(*bpf_get_listener_sock)(struct bpf_sock *sock) = (void *)BPF_FUNC_get_listener_sock;
static u64 (*bpf_get_socket_cookie)(void *skb) = (void *)BPF_FUNC_get_socket_cookie;
static long (*bpf_csum_update)(void *skb, u32 difference) = (void *)BPF_FUNC_csum_update;
static long (*bpf_skb_adjust_room)(void *skb, s32 difference, u32 mode, u64 flags) = (void *)BPF_FUNC_skb_adjust_room;
static long (*bpf_tail_call)(void *skb, void *programs, u32 index) = (void *)BPF_FUNC_tail_call;
