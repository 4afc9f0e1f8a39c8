//! The trace point itself: a gate, a no-op to hook, and a note that says where they are.
//!
//! The gate is a 16-bit counter that the kernel raises while somebody listens (the semaphore of
//! sys/sdt.h, given to perf_event_open as `ref_ctr_offset`). The note has the address of the no-op, of
//! the gate, and the registers in which the arguments are then.
#![allow(unsafe_code)] // inline assembly, and a static in a section that the kernel writes to

#[cfg(target_arch = "x86_64")]
use core::sync::atomic::{AtomicU16, Ordering};

/// Raised by the kernel while a probe is attached to the trace point; this process only reads it.
#[cfg(target_arch = "x86_64")]
#[repr(transparent)]
pub(crate) struct Gate(AtomicU16);

#[cfg(target_arch = "x86_64")]
impl Gate {
    pub(crate) const fn new() -> Self {
        Self(AtomicU16::new(0))
    }

    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }
}

/// One trace point with the name `$name` and four arguments of 64 bits; the last is the time.
#[cfg(target_arch = "x86_64")]
macro_rules! station {
    ($name:literal, $session:expr, $from:expr, $upto:expr) => {{
        // Two zero bytes of data, wherever the linker puts the section.
        #[allow(unsafe_code)]
        #[unsafe(link_section = ".probes")]
        static GATE: $crate::note::Gate = $crate::note::Gate::new();

        #[cold]
        #[inline(never)]
        fn show(session: u64, from: u64, upto: u64, time_ns: u64) {
            // SAFETY: a no-op. What the kernel puts in its place keeps all registers and the stack.
            // The rest goes to a section that is not loaded.
            #[allow(unsafe_code)]
            unsafe {
                core::arch::asm!(
                    "990: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00",
                    ".pushsection .note.stapsdt, \"\", \"note\"",
                    ".balign 4",
                    ".4byte 992f - 991f, 994f - 993f, 3",
                    "991: .asciz \"stapsdt\"",
                    "992: .balign 4",
                    "993: .8byte 990b",
                    // No base: the addresses are as the linker left them (readers adjust by the
                    // base only for files that were moved afterwards).
                    ".8byte 0",
                    ".8byte {gate}",
                    ".asciz \"pollux\"",
                    concat!(".asciz \"", $name, "\""),
                    ".asciz \"8@%rdi 8@%rsi 8@%rdx 8@%r8\"",
                    "994: .balign 4",
                    ".popsection",
                    gate = sym GATE,
                    in("rdi") session,
                    in("rsi") from,
                    in("rdx") upto,
                    // Not the fourth register: the system call by which a kernel may come here takes it.
                    in("r8") time_ns,
                    options(nostack, preserves_flags, att_syntax),
                );
            }
        }

        if GATE.is_open() && $crate::sampling::sampled($from, $upto) {
            let time_ns = $crate::sampling::shows();
            show($session, $from, $upto, time_ns);
        }
    }};
}

/// No trace points on this machine.
#[cfg(not(target_arch = "x86_64"))]
macro_rules! station {
    ($name:literal, $session:expr, $from:expr, $upto:expr) => {
        let _ = ($session, $from, $upto);
    };
}

pub(crate) use station;
