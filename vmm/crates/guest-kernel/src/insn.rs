//! Finds instructions whose result depends on the processor or the moment.
//!
//! Machine code is decoded from a known start (a symbol, or a table entry), never searched for byte
//! patterns: most pairs `0F 31` in a kernel are parts of other instructions. The byte search comes
//! first only to leave out code that cannot hold one.

use std::fmt;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

/// An instruction that is not a function of the guest's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SensitiveInsn {
    /// Reads the time stamp counter.
    Rdtsc,
    /// Reads the time stamp counter and the processor number.
    Rdtscp,
    /// Describes the processor.
    Cpuid,
    /// Reads a hardware random number.
    Rdrand,
    /// Reads a hardware seed.
    Rdseed,
    /// Reads the processor number.
    Rdpid,
    /// Reads a performance counter.
    Rdpmc,
    /// Waits for an address or a time.
    Tpause,
    /// Waits for an address or a time.
    Umwait,
    /// Starts a hardware transaction, which may abort at any time.
    Xbegin,
    /// Reads which registers are switched.
    Xgetbv,
}

impl fmt::Display for SensitiveInsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            SensitiveInsn::Rdtsc => "RDTSC",
            SensitiveInsn::Rdtscp => "RDTSCP",
            SensitiveInsn::Cpuid => "CPUID",
            SensitiveInsn::Rdrand => "RDRAND",
            SensitiveInsn::Rdseed => "RDSEED",
            SensitiveInsn::Rdpid => "RDPID",
            SensitiveInsn::Rdpmc => "RDPMC",
            SensitiveInsn::Tpause => "TPAUSE",
            SensitiveInsn::Umwait => "UMWAIT",
            SensitiveInsn::Xbegin => "XBEGIN",
            SensitiveInsn::Xgetbv => "XGETBV",
        };
        f.write_str(name)
    }
}

/// One such instruction in a kernel or module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occurrence {
    /// Its address: virtual in a kernel, offset in the section for a module.
    pub addr: u64,
    /// Which it is.
    pub insn: SensitiveInsn,
    /// Function and offset.
    pub symbol: String,
}

/// Decodes `code`, which starts with an instruction at address `base`, and returns what it found.
pub(crate) fn scan(code: &[u8], base: u64) -> Vec<(u64, SensitiveInsn)> {
    if !code.windows(2).any(may_start_one) {
        return Vec::new();
    }
    let decoder = Decoder::with_ip(64, code, base, DecoderOptions::NONE);
    decoder
        .into_iter()
        .filter_map(|insn| Some((insn.ip(), classify(insn.mnemonic())?)))
        .collect()
}

/// Whether the opcode of a sensitive instruction may be here: `0F 31`, `0F A2`, `0F 33`, `0F 01 F9`,
/// `0F 01 D0`, `0F C7 /6../7`, `0F AE /6` or `C7 F8`.
pub(crate) fn may_start_one(pair: &[u8]) -> bool {
    matches!(
        pair,
        [0x0f, 0x31 | 0xa2 | 0x33 | 0x01 | 0xc7 | 0xae] | [0xc7, 0xf8]
    )
}

pub(crate) fn classify(mnemonic: Mnemonic) -> Option<SensitiveInsn> {
    Some(match mnemonic {
        Mnemonic::Rdtsc => SensitiveInsn::Rdtsc,
        Mnemonic::Rdtscp => SensitiveInsn::Rdtscp,
        Mnemonic::Cpuid => SensitiveInsn::Cpuid,
        Mnemonic::Rdrand => SensitiveInsn::Rdrand,
        Mnemonic::Rdseed => SensitiveInsn::Rdseed,
        Mnemonic::Rdpid => SensitiveInsn::Rdpid,
        Mnemonic::Rdpmc => SensitiveInsn::Rdpmc,
        Mnemonic::Tpause => SensitiveInsn::Tpause,
        Mnemonic::Umwait => SensitiveInsn::Umwait,
        Mnemonic::Xbegin => SensitiveInsn::Xbegin,
        Mnemonic::Xgetbv => SensitiveInsn::Xgetbv,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_within_another_instruction_are_not_reported() {
        // mov eax, 0xa2310f90; rdtsc; ret
        let code = [0xb8, 0x90, 0x0f, 0x31, 0xa2, 0x0f, 0x31, 0xc3];
        assert_eq!(scan(&code, 0x1000), [(0x1005, SensitiveInsn::Rdtsc)]);
    }

    #[test]
    fn every_kind_is_recognised() {
        let cases: [(&[u8], SensitiveInsn); 11] = [
            (&[0x0f, 0x31], SensitiveInsn::Rdtsc),
            (&[0x0f, 0x01, 0xf9], SensitiveInsn::Rdtscp),
            (&[0x0f, 0xa2], SensitiveInsn::Cpuid),
            (&[0x48, 0x0f, 0xc7, 0xf0], SensitiveInsn::Rdrand),
            (&[0x48, 0x0f, 0xc7, 0xf8], SensitiveInsn::Rdseed),
            (&[0xf3, 0x0f, 0xc7, 0xf8], SensitiveInsn::Rdpid),
            (&[0x0f, 0x33], SensitiveInsn::Rdpmc),
            (&[0x66, 0x0f, 0xae, 0xf0], SensitiveInsn::Tpause),
            (&[0xf2, 0x0f, 0xae, 0xf0], SensitiveInsn::Umwait),
            (&[0xc7, 0xf8, 0, 0, 0, 0], SensitiveInsn::Xbegin),
            (&[0x0f, 0x01, 0xd0], SensitiveInsn::Xgetbv),
        ];
        for (code, insn) in cases {
            assert_eq!(scan(code, 0), [(0, insn)], "{code:02x?}");
        }
    }
}
