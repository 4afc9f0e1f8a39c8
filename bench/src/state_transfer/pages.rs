//! What both kinds of transfer send.

use std::io::Write;

use hypervisor::{DirtyBitmap, GuestRam, PAGE_SIZE, VcpuState};
use transfer::Writer;

use crate::Failure;

/// Bytes written, and read, at a time.
pub(super) const CHUNK: usize = 1 << 20;

/// Sends these pages: how many.
pub(super) fn send<W: Write>(
    writer: &mut Writer<W>,
    memory: &GuestRam,
    pages: &DirtyBitmap,
) -> Result<u64, Failure> {
    let mut page = [0; PAGE_SIZE];
    for gfn in pages.iter() {
        memory.read_page(gfn, &mut page)?;
        writer.page(gfn.0, &page)?;
    }
    Ok(pages.count())
}

/// Sends the vCPU's state, and that this is all.
pub(super) fn finish<W: Write>(mut writer: Writer<W>, state: &VcpuState) -> Result<(), Failure> {
    writer.section("vcpu", 1, state)?;
    writer.finish()?;
    Ok(())
}
