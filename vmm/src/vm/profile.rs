//! Where a guest spends its time: the vCPU is kicked every millisecond, and where it stands is noted, with
//! what its stack says of who called.
//!
//! One owner: the vCPU's thread adds samples, whoever asked for the profile reads them at the end. A
//! kick between exits costs the guest some 60 us, so a profile is for looking, not for measuring. The
//! kernel keeps no frame pointers: a caller is any word on the stack that points behind a call. What is left
//! of calls that have returned may be among them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use guest_kernel::KernelImage;
use hypervisor::{GuestRam, Kicker, Vcpu};

/// Time between two samples.
const EVERY: Duration = Duration::from_millis(1);
/// Functions that a report shows.
const SHOWN: usize = 400;
/// Bytes of a kernel stack, which begins at a multiple of it.
const STACK_BYTES: u64 = 16 << 10;
const PAGE_BYTES: u64 = 4096;
/// Where the kernel's own code lies.
const KERNEL_TEXT: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_a000_0000;

/// Where the guest stood at one moment.
#[derive(Debug)]
enum Sample {
    Program,
    /// The instruction pointer first, then what may be return addresses.
    Kernel(Vec<u64>),
}

/// Samples of one guest. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    taken: Arc<Mutex<Vec<Sample>>>,
}

impl Samples {
    /// The guest was stopped here.
    pub fn note(&self, vcpu: &mut impl Vcpu, ram: &GuestRam) {
        let sample = if vcpu.sregs().cs.dpl == 0 {
            let mut trace = vec![vcpu.regs().rip];
            read_stack(vcpu, ram, &mut trace);
            Sample::Kernel(trace)
        } else {
            Sample::Program
        };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.push(sample);
    }

    /// The functions of the kernel: the time spent in each and what it called, and in itself; most first.
    /// Programs are one line.
    #[must_use]
    pub fn report(&self, image: &KernelImage) -> String {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut functions: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for sample in taken.iter() {
            let names = match sample {
                Sample::Program => vec!["(programs)".to_owned()],
                Sample::Kernel(trace) => called(trace, image),
            };
            let mut counted = BTreeSet::new();
            for (depth, name) in names.into_iter().enumerate() {
                if counted.insert(name.clone()) {
                    let (all, own) = functions.entry(name).or_default();
                    *all += 1;
                    *own += u64::from(depth == 0);
                }
            }
        }
        let total = taken.len().max(1) as f64;
        let mut sorted: Vec<(String, (u64, u64))> = functions.into_iter().collect();
        sorted.sort_by_key(|(_, (all, _))| std::cmp::Reverse(*all));
        let mut text = format!(
            "{} samples, one a millisecond of execution: with all that it called, in itself\n",
            taken.len()
        );
        for (name, (all, own)) in sorted.iter().take(SHOWN) {
            let share = |count: u64| count as f64 * 100.0 / total;
            let _ = writeln!(text, "{:6.1}% {:6.1}% {name}", share(*all), share(*own));
        }
        text
    }
}

/// Adds the words of the kernel's stack that point into its code.
fn read_stack(vcpu: &mut impl Vcpu, ram: &GuestRam, trace: &mut Vec<u64>) {
    let mut at = vcpu.regs().rsp & !7;
    let end = (at & !(STACK_BYTES - 1)) + STACK_BYTES;
    while at < end {
        let len = (PAGE_BYTES - at % PAGE_BYTES).min(end - at);
        let mut bytes = vec![0; len as usize];
        let Ok(Some(gpa)) = vcpu.translate(at) else {
            return;
        };
        if ram.read(gpa, &mut bytes).is_err() {
            return;
        }
        let words = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight bytes")));
        trace.extend(words.filter(|word| KERNEL_TEXT.contains(word)));
        at += len;
    }
}

/// The names of the functions of a trace, the innermost first.
fn called(trace: &[u64], image: &KernelImage) -> Vec<String> {
    let name = |addr: u64| {
        let mut name = image.symbols().describe(addr);
        name.truncate(name.find('+').unwrap_or(name.len()));
        name
    };
    let (rip, callers) = trace.split_first().expect("a trace begins with RIP");
    let callers = callers.iter().filter(|addr| follows_call(**addr, image));
    std::iter::once(name(*rip))
        .chain(callers.map(|addr| name(addr - 1)))
        .collect()
}

/// Whether an address is that behind a near call: `E8` and a distance, or `FF` with the register field 2.
fn follows_call(addr: u64, image: &KernelImage) -> bool {
    let byte = |back: u64| image.read(addr - back, 1).map(|bytes| bytes[0]);
    let indirect = |back: u64| {
        byte(back) == Some(0xff) && byte(back - 1).is_some_and(|modrm| modrm >> 3 & 7 == 2)
    };
    byte(5) == Some(0xe8)
        || [2, 3, 4, 6, 7].into_iter().any(indirect)
        || follows_linked_thunk(addr, image)
}

/// Whether the image calls a thunk of an indirect branch two bytes before an address: FastBoot makes that
/// the branch itself, `FF` and one byte, with NOPs behind it.
fn follows_linked_thunk(addr: u64, image: &KernelImage) -> bool {
    let Some([0xe8, distance @ ..]) = image.read(addr - 2, 5) else {
        return false;
    };
    let distance = i32::from_le_bytes(distance.try_into().expect("four bytes"));
    let target = (addr + 3).wrapping_add_signed(i64::from(distance));
    image
        .symbols()
        .describe(target)
        .starts_with("__x86_indirect_thunk")
}

/// Kicks a vCPU until it is dropped.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Starts to kick.
    ///
    /// # Errors
    /// No thread.
    pub fn start(kicker: Kicker) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(move || {
                while !theirs.load(Ordering::Relaxed) {
                    std::thread::sleep(EVERY);
                    kicker.kick();
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
