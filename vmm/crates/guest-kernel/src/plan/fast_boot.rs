//! Shortens the start where KVM emulates ring 0 instruction by instruction (about three million a
//! second): a start that runs 60 million instructions takes 20 s there.
//!
//! Two means: work that the kernel does at each start with a result that is known beforehand is done
//! at load ([`super::prelink`], [`super::tables`]); and what a VM does not need is left out. What is
//! left out shows in the guest, so each line says what no longer works.

use super::planner::{Planner, Reason};
use super::skips::{Skip, skip};
use super::{
    FastBoot, accounting, before_init, crypto, free_memory, gigabyte, initrd, memory_map, prelink,
    startup, tables, timer,
};
use crate::error::PlanError;

/// Functions that are left out: name, what they return instead, why that is right.
const SKIPS: &[(&str, Skip, &str)] = &[
    (
        "ftrace_init",
        Skip::Return,
        "ftrace sites are NOPs already; no function tracer in the guest",
    ),
    (
        "apply_returns",
        Skip::Return,
        "returns are linked already; modules keep the return thunk",
    ),
    (
        "apply_retpolines",
        Skip::Return,
        "indirect branches are linked already; modules keep thunks",
    ),
    (
        "alternatives_smp_module_add",
        Skip::Return,
        "LOCK prefixes are gone already; modules keep them",
    ),
    (
        "unwind_init",
        Skip::Return,
        "no lookup tables for stack traces: an oops prints guesses",
    ),
    ("clear_bss", Skip::Return, "memory of a new VM is zero"),
    (
        "trace_event_init",
        Skip::Return,
        "no trace events in the guest",
    ),
    (
        "load_system_certificate_list",
        Skip::Zero,
        "no keys for signed modules: they load, tainted",
    ),
    (
        "bpf_get_btf_vmlinux",
        Skip::Zero,
        "no type information for BPF programs in the guest",
    ),
    (
        "register_btf_kfunc_id_set",
        Skip::Zero,
        "nor for functions that they may call",
    ),
    (
        "register_btf_id_dtor_kfuncs",
        Skip::Zero,
        "nor for those that give objects back",
    ),
    (
        "init_hw_perf_events",
        Skip::Zero,
        "no performance counters in the machine",
    ),
    ("blake2s_selftest", Skip::One, "self-test"),
    (
        "free_initmem",
        Skip::Return,
        "init memory stays in use: 6 MiB",
    ),
    (
        "mem_encrypt_free_decrypted_mem",
        Skip::Return,
        "no memory encryption",
    ),
    ("slab_sysfs_init", Skip::Zero, "no /sys/kernel/slab"),
    (
        "vty_init",
        Skip::Zero,
        "no virtual terminals: the console is serial",
    ),
    (
        "ptdump_walk_pgd_level_checkwx",
        Skip::Return,
        "self-test of page permissions",
    ),
    ("dmi_setup", Skip::Return, "no DMI tables in the machine"),
    (
        "reserve_ibft_region",
        Skip::Return,
        "no iSCSI boot table in the machine",
    ),
    (
        "i8042_init",
        Skip::Zero,
        "no keyboard controller in the machine (its reset line works)",
    ),
    (
        "optimize_nops",
        Skip::Return,
        "NOPs of alternatives are joined already; modules keep short ones",
    ),
    (
        "ptp_classifier_init",
        Skip::Return,
        "no hardware time stamps: no device of the machine has them",
    ),
    (
        "pcibios_irq_init",
        Skip::Return,
        "no IRQ routing table: interrupt lines are in configuration space",
    ),
    (
        "init_cache_random_seq",
        Skip::Zero,
        "objects of a slab in order of address",
    ),
    (
        "unwind_module_init",
        Skip::Return,
        "no lookup tables for stack traces of modules either",
    ),
    (
        "check_version",
        Skip::One,
        "symbol versions of modules are not compared: they are this kernel's",
    ),
    ("init_kprobes", Skip::Zero, "no kprobes in the guest"),
    (
        "free_initrd_mem",
        Skip::Return,
        "pages of the initial RAM disk belong to its files",
    ),
    (
        "update_load_avg",
        Skip::Return,
        "no load averages of tasks: they balance load between processors, and there is one",
    ),
    (
        "early_pfn_to_nid",
        Skip::Zero,
        "one node (numa=off): it is not looked for page by page",
    ),
    (
        "init_unavailable_range",
        Skip::Return,
        "what the memory map keeps for holes in memory stays zero",
    ),
    (
        "__list_add_valid",
        Skip::One,
        "lists are not checked at each change",
    ),
    ("__list_del_entry_valid", Skip::One, "nor at each removal"),
    (
        "native_io_delay",
        Skip::Return,
        "the devices are the VMM's: they need no pause after an access",
    ),
    (
        "tracer_init_tracefs",
        Skip::Zero,
        "no /sys/kernel/tracing: there are no trace events",
    ),
    (
        "dynamic_debug_init",
        Skip::Zero,
        "debug messages cannot be switched on one by one",
    ),
    (
        "perf_event_sysfs_init",
        Skip::Zero,
        "no /sys/bus/event_source: there are no performance counters",
    ),
    ("irq_sysfs_init", Skip::Zero, "no /sys/kernel/irq"),
    (
        "clockevents_init_sysfs",
        Skip::Zero,
        "no /sys/devices/system/clockevents",
    ),
    ("init_irq_proc", Skip::Return, "no /proc/irq"),
    (
        "crash_save_vmcoreinfo_init",
        Skip::Zero,
        "no notes for a kernel that takes over after a crash",
    ),
    (
        "dpm_sysfs_add",
        Skip::Zero,
        "no power directories in /sys/devices",
    ),
    ("dpm_sysfs_remove", Skip::Return, "nor their removal"),
    ("nvme_core_init", Skip::Zero, "no NVMe in the machine"),
    (
        "powercap_init",
        Skip::Zero,
        "no power limits in the machine",
    ),
    (
        "acpi_thermal_init",
        Skip::Zero,
        "no ACPI in the machine, and no thermal zones of it",
    ),
    ("hpet_init", Skip::Zero, "no HPET in the machine"),
    (
        "pcie_portdrv_init",
        Skip::Zero,
        "no PCI Express ports in the machine",
    ),
    ("cxl_core_init", Skip::Zero, "no CXL in the machine"),
    ("cxl_port_driver_init", Skip::Zero, "nor its ports"),
    (
        "init_dax_wait_table",
        Skip::Zero,
        "no persistent memory in the machine to map directly",
    ),
    (
        "memory_tier_init",
        Skip::Zero,
        "memory of one kind: no tiers",
    ),
    ("devlink_init", Skip::Zero, "no device has a devlink"),
    ("crypto_kdf108_init", Skip::Zero, "self-test"),
    (
        "init_ima",
        Skip::Zero,
        "no measurement of files: it hangs on security modules (lsm=none)",
    ),
    ("init_evm", Skip::Zero, "nor of their attributes"),
    ("intel_pstate_init", Skip::Zero, "no frequencies to choose"),
    ("init_tis", Skip::Zero, "no TPM in the machine"),
];

pub(super) fn plan(planner: &mut Planner, options: FastBoot) -> Result<(), PlanError> {
    for (function, how, why) in SKIPS {
        skip(planner, function, *how, Reason::fast_boot(why))?;
    }
    planner.stubs_in("trace_event_init");
    if options.slow_timer {
        timer::plan(planner)?;
    }
    if options.gigabyte_pages {
        gigabyte::plan(planner)?;
    }
    let counts_are_zero = memory_map::plan(planner)?;
    free_memory::plan(planner, counts_are_zero)?;
    accounting::plan(planner)?;
    startup::plan(planner)?;
    before_init::plan(planner)?;
    crypto::plan(planner)?;
    initrd::plan(planner)?;
    tables::plan(planner)?;
    prelink::plan(planner)
}
