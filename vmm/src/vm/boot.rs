//! Makes a VM from its options: memory, kernel, board, vCPU.

use std::fs;
use std::path::{Path, PathBuf};

use devices::{Board, BoardConfig, DiskCache, DiskConfig, NetConfig};
use guest_kernel::boot::{BootConfig, EntryRegisters, SegmentRegister, write_boot};
use guest_kernel::{
    ClockTick, CommandLine, FastBoot, KernelImage, PatchPlan, PlanId, PlanOptions, QuirkSet,
    initramfs, ports,
};
use hypervisor::kvm::{KvmVcpu, KvmVm};
use hypervisor::probe::{Instruction, WindowPrecision};
use hypervisor::{CpuidTable, GuestRam, Vcpu, kvm_regs, kvm_segment};
use replay::{Machine, MachineConfig, Patches, SavedError, TrapPorts};
use thiserror::Error;

use super::{KvmMachine, wall_clock_s};
use crate::config::{ConfigError, VmOptions};
use crate::io::{Disk, DiskMode};

/// Where the kernel's return to user mode reads the time-stamp counter: the one place in ring 0 where
/// every host opens an interrupt window exactly.
const WINDOW_FUNCTION: &str = "exit_to_user_mode_prepare";

/// Why no VM could be made.
#[derive(Debug, Error)]
pub enum BootError {
    /// The options.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file.
    #[error("{path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel is none, or not one that is known.
    #[error("{path}: {source}")]
    Image {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: guest_kernel::ImageError,
    },
    /// The kernel cannot be patched.
    #[error("{path}: {source}")]
    Plan {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: guest_kernel::PlanError,
    },
    /// The initial RAM disk cannot be rewritten, and this host needs it.
    #[error("{path}: {source}")]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: initramfs::Error,
    },
    /// The kernel does not fit into the VM.
    #[error(transparent)]
    Layout(#[from] guest_kernel::BootError),
    /// A symbol is missing.
    #[error("{path}: the kernel has no single symbol {name}: this series is not known")]
    Symbol {
        /// The file.
        path: PathBuf,
        /// Which symbol.
        name: &'static str,
    },
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The board.
    #[error("the VM's devices: {0}")]
    Board(#[from] devices::ConfigError),
    /// Saved state.
    #[error(transparent)]
    Saved(#[from] SavedError),
}

/// What the start-up probes found out about this host.
pub use hypervisor::probe::HostProfile as Host;

/// Runs the start-up probes.
///
/// # Errors
/// There is no KVM, or it refuses.
pub fn probe_host() -> Result<Host, hypervisor::Error> {
    let host = hypervisor::probe::run()?;
    for obstacle in host.quirks.obstacles() {
        tracing::warn!("this host cannot replay exactly: {obstacle}");
    }
    Ok(host)
}

/// Makes the VM that `options` describe, ready for its first instruction.
///
/// # Errors
/// Whatever is missing, does not fit or is refused.
pub fn boot(
    options: &VmOptions,
    host: &Host,
    disk: Option<&Disk>,
) -> Result<KvmMachine, BootError> {
    let kernel_path = options
        .kernel
        .as_deref()
        .ok_or(ConfigError::Missing("kernel"))?;
    let initramfs_path = options
        .initramfs
        .as_deref()
        .ok_or(ConfigError::Missing("initramfs"))?;
    let memory_bytes = options.memory_bytes()?;
    let image = read_kernel(kernel_path)?;
    let plan = plan(options, host, &image).map_err(|source| BootError::Plan {
        path: kernel_path.to_owned(),
        source,
    })?;
    let (initramfs, programs) =
        initramfs::prepare(read(initramfs_path)?, &quirks(host)).map_err(|source| {
            BootError::Initramfs {
                path: initramfs_path.to_owned(),
                source,
            }
        })?;
    for obstacle in programs.obstacles() {
        tracing::warn!("the guest may not be deterministic here: {obstacle}");
    }
    let ram = GuestRam::new(memory_bytes).map_err(hypervisor::Error::Ram)?;
    let loaded = image.load(&plan).map_err(|source| BootError::Plan {
        path: kernel_path.to_owned(),
        source,
    })?;
    let config = BootConfig {
        memory_bytes,
        command_line: &command_line(options, host),
        initrd: &initramfs,
        rng_seed: seed(),
    };
    let entry = write_boot(&loaded, &config, &mut |gpa, bytes| {
        Ok(ram.write(gpa, bytes)?)
    })?;
    let id = plan.id().with_initramfs(&programs.id);
    tracing::info!(
        kernel = image.release(),
        patches = plan.patches().len(),
        plan = ?id,
        programs = %programs,
        "kernel loaded"
    );
    let (vm, mut vcpu) = create(ram, host)?;
    set_entry(&mut vcpu, &entry)?;
    let board = Board::new(&board_config(options, disk)?)?;
    let window_at = if needs_window_place(host) {
        Some(window_range(&image, kernel_path)?)
    } else {
        None
    };
    let quirks = quirks(host).names().map(str::to_owned).collect();
    let config = MachineConfig {
        ports: TRAP_PORTS,
        window_at,
        patches: Patches { id: id.0, quirks },
    };
    Ok(Machine::new(vm, vcpu, board, config))
}

const TRAP_PORTS: TrapPorts = TrapPorts {
    tsc: ports::RDTSC,
    cpuid: ports::CPUID,
};

/// The CPUID table that guests get on this host.
///
/// # Errors
/// The hypervisor refuses.
pub fn cpuid_table(ram: GuestRam, host: &Host) -> Result<CpuidTable, hypervisor::Error> {
    let supported = KvmVm::new(ram)?.supported_cpuid()?;
    Ok(CpuidTable::restricted(&supported, host.cpuid_policy()))
}

/// A VM and its vCPU over `ram`, as this host's quirks want them.
///
/// # Errors
/// The hypervisor refuses.
pub fn create(ram: GuestRam, host: &Host) -> Result<(KvmVm, KvmVcpu), hypervisor::Error> {
    let vm = KvmVm::new(ram)?;
    let table = CpuidTable::restricted(&vm.supported_cpuid()?, host.cpuid_policy());
    let mut vcpu = vm.create_vcpu(0, table)?;
    vcpu.set_trap_tsc(host.quirks.needs_host_tsc_trap());
    if host.quirks.needs_cpuid_fault() {
        vcpu.set_cpuid_fault(true)?;
    }
    Ok((vm, vcpu))
}

/// The same for a saved machine, whose guest was patched for the host on which it was started.
///
/// # Errors
/// This host has a defect that the guest does not go round, or the hypervisor refuses.
pub fn create_saved(
    config: &MachineConfig,
    ram: GuestRam,
    host: &Host,
) -> Result<(KvmVm, KvmVcpu), SavedError> {
    let id = PlanId(config.patches.id);
    tracing::info!(plan = ?id, quirks = ?config.patches.quirks, "saved guest");
    let missing = missing_patches(config, quirks(host), needs_window_place(host));
    if !missing.is_empty() {
        return Err(SavedError::Host { missing });
    }
    Ok(create(ram, host)?)
}

/// The names of the host's defects that a guest with this configuration does not go round.
fn missing_patches(
    config: &MachineConfig,
    quirks: QuirkSet,
    needs_window_place: bool,
) -> Vec<String> {
    let unpatched = |name: &&str| !config.patches.quirks.iter().any(|quirk| quirk == name);
    let window =
        (needs_window_place && config.window_at.is_none()).then_some("window_in_ring0_not_exact");
    let missing = quirks.names().filter(unpatched).chain(window);
    missing.map(str::to_owned).collect()
}

/// Whether an interrupt window in ring 0 opens exactly at known places of the guest's kernel only.
fn needs_window_place(host: &Host) -> bool {
    host.quirks.window_in_ring0 != WindowPrecision::Exact
}

fn read(path: &Path) -> Result<Vec<u8>, BootError> {
    fs::read(path).map_err(|source| BootError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_kernel(path: &Path) -> Result<KernelImage, BootError> {
    KernelImage::parse(&read(path)?).map_err(|source| BootError::Image {
        path: path.to_owned(),
        source,
    })
}

fn plan(
    options: &VmOptions,
    host: &Host,
    image: &KernelImage,
) -> Result<PatchPlan, guest_kernel::PlanError> {
    let fast_boot = host.is_ring0_emulated().then_some(FastBoot {
        slow_timer: true,
        gigabyte_pages: host.cpuid_policy().gigabyte_pages,
    });
    let options = PlanOptions {
        quirks: quirks(host),
        fast_boot,
        allow_unknown_series: options.allow_unknown_kernel,
    };
    guest_kernel::plan(image, &options)
}

/// The host's quirks that need a change in the guest.
fn quirks(host: &Host) -> QuirkSet {
    QuirkSet {
        syscall_keeps_cpl3: host.quirks.needs_syscall_stub(),
        int3_not_emulated: !host.quirks.runs_in_ring0(Instruction::Int3),
        x87_not_emulated: !host.quirks.runs_in_ring0(Instruction::Fwait),
        cpuid_visible_in_ring3: host.quirks.shows_real_cpuid(),
    }
}

fn command_line(options: &VmOptions, host: &Host) -> String {
    let mut line = CommandLine::new(ClockTick::StopsInIdle);
    if host.is_ring0_emulated() {
        line.emulated_ring0();
    }
    if let Some(ip) = &options.guest_ip {
        let gateway = options
            .guest_gateway
            .map_or(String::new(), |gateway| format!(",{gateway}"));
        line.push(&format!("pollux.ip={ip}{gateway}"));
    }
    if let Some(words) = &options.append {
        line.push(words);
    }
    line.to_string()
}

fn board_config(options: &VmOptions, disk: Option<&Disk>) -> Result<BoardConfig, BootError> {
    let net = match options.tap {
        Some(_) => Some(NetConfig {
            mac: options.mac_address()?.0,
            offloads: true,
        }),
        None => None,
    };
    let disk = disk.map(|disk| DiskConfig {
        sectors: disk.sectors(),
        identity: "pollux".to_owned(),
        cache: match disk.mode() {
            DiskMode::Cached => DiskCache::WriteBack,
            DiskMode::Shared => DiskCache::WriteThrough,
        },
    });
    Ok(BoardConfig {
        wall_clock_base_s: wall_clock_s(),
        net,
        disk,
        entropy: true,
    })
}

fn window_range(image: &KernelImage, path: &Path) -> Result<std::ops::Range<u64>, BootError> {
    let symbols = image.symbols();
    let start = symbols
        .unique(WINDOW_FUNCTION)
        .ok_or_else(|| BootError::Symbol {
            path: path.to_owned(),
            name: WINDOW_FUNCTION,
        })?;
    let len = symbols.room_at(start).unwrap_or(0);
    Ok(start..start + len)
}

fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    let got = rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty());
    assert_eq!(
        got,
        Ok(32),
        "the kernel gives up to 256 random bytes at once"
    );
    seed
}

fn set_entry(vcpu: &mut KvmVcpu, entry: &EntryRegisters) -> Result<(), hypervisor::Error> {
    let mut sregs = *vcpu.sregs();
    sregs.cr0 = entry.cr0;
    sregs.cr3 = entry.cr3;
    sregs.cr4 = entry.cr4;
    sregs.efer = entry.efer;
    sregs.cs = segment(&entry.code);
    let data = segment(&entry.data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = entry.gdt_base;
    sregs.gdt.limit = entry.gdt_limit;
    sregs.idt.base = entry.idt_base;
    sregs.idt.limit = entry.idt_limit;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rsp: entry.rsp,
        rflags: entry.rflags,
        ..kvm_regs::default()
    });
    Ok(())
}

fn segment(register: &SegmentRegister) -> kvm_segment {
    kvm_segment {
        base: register.base,
        limit: register.limit,
        selector: register.selector,
        type_: register.kind,
        present: register.present.into(),
        dpl: register.dpl,
        db: register.default_big.into(),
        s: register.code_or_data.into(),
        l: register.long.into(),
        g: register.granularity.into(),
        ..kvm_segment::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_guest_runs_only_where_it_goes_round_all_defects() {
        let config = |quirks: &[&str], window_at| MachineConfig {
            ports: TRAP_PORTS,
            window_at,
            patches: Patches {
                id: [0; 32],
                quirks: quirks.iter().map(|&name| name.to_owned()).collect(),
            },
        };
        let plain = config(&[], None);
        assert!(missing_patches(&plain, QuirkSet::default(), false).is_empty());
        let host = QuirkSet {
            syscall_keeps_cpl3: true,
            x87_not_emulated: true,
            ..QuirkSet::default()
        };
        let missing = missing_patches(&plain, host, true);
        let all = ["syscall_keeps_cpl3", "x87_not_emulated"];
        assert_eq!(missing[..2], all);
        assert_eq!(missing[2], "window_in_ring0_not_exact");
        let error = SavedError::Host { missing }.to_string();
        assert!(all.iter().all(|name| error.contains(name)), "{error}");
        let patched = config(&["int3_not_emulated", all[1], all[0]], Some(0..1));
        assert!(missing_patches(&patched, host, true).is_empty());
        // What the guest goes round and the host has not, does no harm.
        assert!(missing_patches(&patched, QuirkSet::default(), false).is_empty());
    }
}
