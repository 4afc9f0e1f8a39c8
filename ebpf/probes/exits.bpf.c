// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * Exits of virtual machines to their VMM, by reason, and accesses to ports, by port: from the tracepoints
 * of KVM that fire whatever the hardware underneath. Counted for each process.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

/* The PID namespace that process ids are told in. Set by the loader. */
const volatile __u64 pid_namespace_device = 0;
const volatile __u64 pid_namespace_inode = 0;

#define MAX_EXITS 1024
#define MAX_PORTS 1024

/* A reason of kvm_run.exit_reason; KVM_RUN that ended with an error has the error, negative. */
struct exit_key {
	__u32 process;
	__s32 reason;
};

struct port_key {
	__u32 process;
	__u16 port;
	__u16 out; /* 1: the guest wrote */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__uint(max_entries, MAX_EXITS);
	__type(key, struct exit_key);
	__type(value, __u64);
} exits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__uint(max_entries, MAX_PORTS);
	__type(key, struct port_key);
	__type(value, __u64);
} ports SEC(".maps");

static __always_inline void count(void *map, const void *key)
{
	__u64 one = 1;
	__u64 *count = bpf_map_lookup_elem(map, key);

	if (count)
		*count += 1;
	else
		bpf_map_update_elem(map, key, &one, BPF_NOEXIST);
}

static __always_inline __u32 process(void)
{
	struct bpf_pidns_info who = {};

	bpf_get_ns_current_pid_tgid(pid_namespace_device, pid_namespace_inode, &who, sizeof(who));
	return who.tgid;
}

SEC("tp_btf/kvm_userspace_exit")
int BPF_PROG(userspace_exit, __u32 reason, int error)
{
	struct exit_key key = {};

	key.process = process();
	key.reason = error < 0 ? error : (int)reason;
	count(&exits, &key);
	return 0;
}

SEC("tp_btf/kvm_pio")
int BPF_PROG(port_access, unsigned int out, unsigned int port)
{
	struct port_key key = {};

	key.process = process();
	key.port = port;
	key.out = !!out;
	count(&ports, &key);
	return 0;
}
