//! Every source of nondeterminism that is known, and what is done about it.
//!
//! docs/determinism.md shows this table to people; a test holds the two together.

use format::EntryKind;

/// What is done about a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The guest cannot get at it.
    Eliminated,
    /// The guest gets a value that is the same everywhere.
    Normalised,
    /// What came is in the log.
    Recorded,
    /// Its consequences travel in a delta.
    Delta,
    /// A guest that uses it diverges; the divergence is found and reported.
    Unsupported,
}

/// A source of nondeterminism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// What is done about it.
    pub class: Class,
    /// The entry that carries it, where it is recorded.
    pub entry: Option<EntryKind>,
    /// How.
    pub how: &'static str,
}

const fn source(
    name: &'static str,
    class: Class,
    entry: Option<EntryKind>,
    how: &'static str,
) -> Source {
    Source {
        name,
        class,
        entry,
        how,
    }
}

/// All of them.
pub const SOURCES: &[Source] = {
    use Class::{Delta, Eliminated, Normalised, Recorded, Unsupported};
    &[
        source(
            "RDTSC in the kernel",
            Recorded,
            Some(EntryKind::Time),
            "rewritten to a port read; the answer is virtual time",
        ),
        source(
            "RDTSC in programs",
            Recorded,
            Some(EntryKind::Time),
            "faults (CR4.TSD, and the host's own trap where needed); a stub turns it into the port read",
        ),
        source(
            "timer, clock and counter reads",
            Recorded,
            Some(EntryKind::Time),
            "8254 and CMOS see virtual time only",
        ),
        source(
            "moment of a timer interrupt",
            Recorded,
            Some(EntryKind::Time),
            "raised where a logged time reaches the timer, delivered at the same exit on both sides",
        ),
        source(
            "random numbers",
            Recorded,
            Some(EntryKind::Entropy),
            "virtio-rng is answered from the log",
        ),
        source(
            "network input",
            Recorded,
            Some(EntryKind::NetRx),
            "frames enter at an execution point",
        ),
        source(
            "console input",
            Recorded,
            Some(EntryKind::ConsoleRx),
            "bytes enter at an execution point",
        ),
        source(
            "disk completion and data read",
            Recorded,
            Some(EntryKind::DiskDone),
            "completions enter at an execution point, with what was read",
        ),
        source(
            "acts of the operator",
            Recorded,
            Some(EntryKind::Control),
            "power off, reset, switch-over and changed limits stand in the log",
        ),
        source(
            "an input that is due while no exit comes",
            Delta,
            Some(EntryKind::Delta),
            "registers and written pages travel; the input follows",
        ),
        source(
            "CPUID in the kernel",
            Normalised,
            None,
            "rewritten to a port read, answered from the VM's table",
        ),
        source(
            "CPUID in programs",
            Normalised,
            None,
            "faults, or is rewritten in the programs of the initial RAM disk where the CPU cannot fault it",
        ),
        source(
            "kernel address layout and boot seed",
            Normalised,
            None,
            "nokaslr; the seed is part of the first state",
        ),
        source("other CPUs", Eliminated, None, "one vCPU"),
        source(
            "in-kernel interrupt controller and timer",
            Eliminated,
            None,
            "not used: 8259 and 8254 are devices of the board",
        ),
        source(
            "time of host I/O on guest memory",
            Eliminated,
            None,
            "all host I/O goes through buffers; memory changes at execution points only",
        ),
        source(
            "kvmclock and other paravirtual clocks",
            Eliminated,
            None,
            "not offered; their MSRs fault",
        ),
        source("performance counters", Eliminated, None, "not offered"),
        source(
            "late interrupt window in emulated ring 0",
            Eliminated,
            None,
            "asked for only where every host opens it exactly",
        ),
        source(
            "RDTSCP, RDRAND, RDSEED, RDPID, RDPMC, XGETBV, XBEGIN, TPAUSE, UMWAIT in programs",
            Unsupported,
            None,
            "hidden by CPUID, cannot be trapped on every host",
        ),
        source(
            "AVX and later vector state in programs",
            Unsupported,
            None,
            "hidden by CPUID; the guest's kernel does not save it",
        ),
        source(
            "CPUID in programs that come later than the initial RAM disk",
            Unsupported,
            None,
            "on CPUs that cannot fault CPUID",
        ),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    const DOC: &str = include_str!("../../../../docs/determinism.md");

    fn row(source: &Source) -> String {
        let entry = source.entry.map_or("", EntryKind::name);
        let class = format!("{:?}", source.class).to_lowercase();
        format!("| {} | {class} | {entry} | {} |", source.name, source.how)
    }

    #[test]
    fn the_document_has_exactly_the_sources_of_the_code() {
        let documented: Vec<&str> = DOC
            .lines()
            .filter(|line| line.starts_with("| "))
            .skip(1)
            .collect();
        let known: Vec<String> = SOURCES.iter().map(row).collect();
        assert_eq!(documented, known);
    }

    #[test]
    fn every_kind_of_input_in_the_log_carries_a_source() {
        let about_the_log_itself = [EntryKind::Output, EntryKind::Reached, EntryKind::Part];
        for kind in EntryKind::ALL {
            let carries = SOURCES.iter().any(|source| source.entry == Some(kind));
            assert_eq!(
                carries,
                !about_the_log_itself.contains(&kind),
                "{}",
                kind.name()
            );
        }
    }
}
