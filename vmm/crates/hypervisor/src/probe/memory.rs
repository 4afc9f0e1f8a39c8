//! The dirty log, and huge pages behind guest RAM.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use super::lab::Lab;
use crate::bare::{DATA, Ring};
use crate::{CpuidPolicy, CpuidTable, Error, Gfn, Vm, guest_code};

guest_code! {
    fn write_two_pages() {
        "2: inc qword ptr [rbx]", "inc qword ptr [rbx + 0x3000]", "out 0x10, al", "jmp 2b",
    }
}

/// Both rings write two pages twice; each time exactly those must be in the log.
pub(super) fn probe_dirty_log(lab: &mut Lab) -> Result<bool, Error> {
    let mut exact = true;
    for ring in [Ring::Kernel, Ring::User] {
        lab.load(write_two_pages(), ring, 0)?;
        lab.guest.update_regs(|regs| regs.rbx = DATA);
        exact &= lab.run().wrote_to(0x10);
        lab.guest.vm.set_dirty_log(true)?;
        for _ in 0..2 {
            exact &= lab.run().wrote_to(0x10);
            let log = lab.guest.vm.dirty_log()?;
            let written = [Gfn::of(DATA), Gfn::of(DATA + 0x3000)];
            exact &= log
                .iter()
                .filter(|gfn| gfn.addr() >= Some(DATA))
                .eq(written);
        }
        lab.guest.vm.set_dirty_log(false)?;
    }
    Ok(exact)
}

guest_code! { fn write_and_tell() { "inc qword ptr [rbx]", "out 0x10, al" } }

/// Maps the first gigabyte by one page and has both rings run and write there, under a table that offers it.
pub(super) fn probe_gigabyte_pages() -> Result<bool, Error> {
    let policy = CpuidPolicy {
        gigabyte_pages: true,
        ..CpuidPolicy::default()
    };
    let mut lab = Lab::over(|supported| CpuidTable::restricted(&supported, policy))?;
    let mut work = true;
    for ring in [Ring::Kernel, Ring::User] {
        lab.load(write_and_tell(), ring, 0)?;
        lab.guest.map_gigabyte(ring)?;
        lab.guest.update_regs(|regs| regs.rbx = DATA);
        work &= lab.run().wrote_to(0x10);
    }
    Ok(work)
}

/// Whether the memory that the guest has touched lies in huge pages.
pub(super) fn probe_huge_pages(lab: &mut Lab) -> Result<bool, Error> {
    lab.load(write_two_pages(), Ring::User, 0)?;
    let fresh = DATA + (4 << 20);
    lab.guest.update_regs(|regs| regs.rbx = fresh);
    let ran = lab.run().wrote_to(0x10);
    let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(|source| Error::Os {
        call: "reading /proc/self/smaps",
        source,
    })?;
    let host = lab
        .guest
        .vm
        .memory()
        .regions()
        .next()
        .map_or(0, |region| region.host as u64);
    Ok(ran && anon_huge_kib(&smaps, host).is_some_and(|kib| kib > 0))
}

/// KiB of anonymous huge pages in the mapping that holds `addr`.
fn anon_huge_kib(smaps: &str, addr: u64) -> Option<u64> {
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((start, end)) = mapping_range(line) {
            inside = (start..end).contains(&addr);
        } else if let Some(rest) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            return rest.trim().strip_suffix(" kB")?.parse().ok();
        }
    }
    None
}

/// The range of a line that begins a mapping, as `7f00-7f01 rw-p ...`.
fn mapping_range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0a000-55d0b000 r--p 00000000 fe:00 12   /bin/x
AnonHugePages:         0 kB
7f00000000-7f00800000 rw-p 00000000 00:00 0
Rss:                8192 kB
AnonHugePages:      6144 kB
7f00800000-7f00801000 rw-p 00000000 00:00 0
AnonHugePages:        12 kB
";

    #[test]
    fn huge_pages_are_read_from_the_right_mapping() {
        assert_eq!(anon_huge_kib(SMAPS, 0x007f_0040_0000), Some(6144));
        assert_eq!(anon_huge_kib(SMAPS, 0x55d0_a000), Some(0));
        assert_eq!(anon_huge_kib(SMAPS, 0x007f_0080_0000), Some(12));
        assert_eq!(anon_huge_kib(SMAPS, 0x1000), None);
    }
}
