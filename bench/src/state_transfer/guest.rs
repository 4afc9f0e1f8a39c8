//! A guest that writes to one page after another, with a pause between two.

use std::time::{Duration, Instant};

use hypervisor::bare::{BareGuest, DATA, Ring};
use hypervisor::kvm::KvmVm;
use hypervisor::{DirtyBitmap, Exit, GuestRam, PAGE_SIZE, Stop, Vcpu, VcpuState, Vm, guest_code};

use crate::Failure;

/// The port that the guest writes to now and then.
const PORT: u16 = 0x10;
/// Exits in a second.
const EXITS_PER_S: u32 = 1000;
/// Turns of the pause that its length is measured with.
const TRIAL_TURNS: u64 = 50_000_000;

guest_code! {
    // RBX: turns of the pause, at least 1. RSI: pages. R8: pages from one exit to the next.
    fn write_pages() {
        "mov r9, r8",
        "2: mov rdi, 0x200000", "mov rcx, rsi",
        "3: inc qword ptr [rdi]", "add rdi, 4096",
        "mov rax, rbx", "4: dec rax", "jnz 4b",
        "dec r9", "jnz 5f", "mov r9, r8", "out 0x10, al",
        "5: dec rcx", "jnz 3b", "jmp 2b",
    }
}

/// See the module.
pub(super) struct Guest {
    bare: BareGuest,
    pages_per_exit: u32,
    /// Pages written to so far.
    written: u64,
    last_exit: Instant,
    longest_gap: Duration,
}

impl Guest {
    /// A guest with `memory` MiB of RAM, all of it in use, of which it writes to `set` MiB: so many pages in a
    /// second where it has a CPU alone.
    pub(super) fn new(memory: u16, set: u16, pages_per_s: u32) -> Result<Self, Failure> {
        const MIB: u64 = 1 << 20;
        let bare = BareGuest::new(u64::from(memory) * MIB, write_pages(), Ring::User)?;
        let ram = bare.vm.memory();
        let page = [0x5a; PAGE_SIZE];
        for gfn in ram.pages().skip((DATA / PAGE_SIZE as u64) as usize) {
            ram.write_page(gfn, &page)?;
        }
        let mut guest = Self {
            bare,
            pages_per_exit: 1,
            written: 0,
            last_exit: Instant::now(),
            longest_gap: Duration::ZERO,
        };
        let pages = u64::from(set) * MIB / PAGE_SIZE as u64;
        guest.bare.update_regs(|regs| {
            (regs.rbx, regs.rsi, regs.r8) = (TRIAL_TURNS, pages, 1);
        });
        guest.run()?;
        let start = Instant::now();
        guest.run()?;
        let turns_per_s = TRIAL_TURNS as f64 / start.elapsed().as_secs_f64();
        guest.pages_per_exit = (pages_per_s / EXITS_PER_S).max(1);
        let (turns, per_exit) = (turns_per_s / f64::from(pages_per_s), guest.pages_per_exit);
        guest.bare.update_regs(|regs| {
            (regs.rbx, regs.r8) = ((turns as u64).max(1), per_exit.into());
            regs.r9 = regs.r8;
        });
        Ok(guest)
    }

    pub(super) fn memory(&self) -> &GuestRam {
        self.bare.vm.memory()
    }

    /// The machine, for another thread.
    pub(super) fn machine(&self) -> KvmVm {
        self.bare.vm.clone()
    }

    /// A transfer begins: pages written to so far.
    pub(super) fn begin(&mut self) -> u64 {
        self.last_exit = Instant::now();
        self.longest_gap = Duration::ZERO;
        self.written
    }

    /// The longest time since then between two exits.
    pub(super) fn longest_gap(&self) -> Duration {
        self.longest_gap
    }

    /// Pages written to so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Runs to the next exit.
    pub(super) fn run(&mut self) -> Result<(), Failure> {
        loop {
            match self.bare.vcpu.run()? {
                Stop::Exit(Exit::PortOut { port: PORT, .. }) => {
                    self.written += u64::from(self.pages_per_exit);
                    self.longest_gap = self.longest_gap.max(self.last_exit.elapsed());
                    self.last_exit = Instant::now();
                    return Ok(());
                }
                Stop::Kicked => {}
                Stop::Exit(other) => return Err(format!("the guest stopped at {other:?}").into()),
            }
        }
    }

    /// Runs for so long: pages written to in a second.
    pub(super) fn rate(&mut self, time: Duration) -> Result<f64, Failure> {
        let (start, before) = (Instant::now(), self.written);
        while start.elapsed() < time {
            self.run()?;
        }
        Ok((self.written - before) as f64 / start.elapsed().as_secs_f64())
    }

    /// The state of its vCPU, with the last access complete.
    pub(super) fn save(&mut self) -> Result<VcpuState, Failure> {
        while self.bare.vcpu.settle()? != Stop::Kicked {}
        Ok(self.bare.vcpu.save()?)
    }

    /// Switches KVM's dirty log.
    pub(super) fn set_dirty_log(&mut self, on: bool) -> Result<(), Failure> {
        Ok(self.bare.vm.set_dirty_log(on)?)
    }

    /// What was written to since the last call.
    pub(super) fn dirty_log(&mut self) -> Result<DirtyBitmap, Failure> {
        Ok(self.bare.vm.dirty_log()?)
    }
}
