//! The kernel's command line, parameter by parameter, each with its reason.
//!
//! What the machine is (no APIC, no ACPI, PCI by configuration ports, a time stamp counter in
//! nanoseconds) the kernel is told here. Each parameter costs time on a host that emulates ring 0,
//! where the kernel walks the line once for every level of its initialisation: the list is short.

use std::fmt;

use crate::ports;

/// Whether the guest's timer ticks while it idles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ClockTick {
    /// The tick stops in idle: an idle guest makes the fewest exits. The kernel has the timer chip wait
    /// 27 ms at most (55 ms with FastBoot), so some ticks remain.
    #[default]
    StopsInIdle,
    /// 250 ticks a second, always.
    Periodic,
}

/// One parameter and why it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Parameter {
    text: String,
    why: &'static str,
}

/// Builds the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    parameters: Vec<Parameter>,
}

/// Parameters for a host that emulates ring 0.
const EMULATED_RING0: &[(&str, &str)] = &[
    (
        "rodata=off",
        "code is changed in place; page permissions are not split to 4 KiB",
    ),
    (
        "lsm=none",
        "no security modules: they are asked at every access",
    ),
    (
        "cgroup_disable=memory",
        "no accounting of each page to a group",
    ),
    ("psi=0", "no accounting of stalls at each change of process"),
    ("init_on_alloc=0", "pages are not cleared twice"),
    ("nr_cpus=1", "tables are not made for 8192 processors"),
    ("numa=off", "one node"),
    (
        "percpu_alloc=page",
        "per-CPU memory without clearing 2 MiB for one processor",
    ),
    (
        "8250.nr_uarts=1",
        "the machine has one serial port: three are not looked for",
    ),
    (
        "rootfstype=ramfs",
        "the cheaper of the two file systems for the initial RAM disk",
    ),
    ("cryptomgr.notests", "no self-tests of ciphers"),
    (
        "debugfs=off",
        "no directories and files in debugfs, hundreds of them",
    ),
];

impl CommandLine {
    /// The parameters that every guest needs.
    pub fn new(tick: ClockTick) -> Self {
        let mut line = CommandLine {
            parameters: Vec::new(),
        };
        line.add("console=ttyS0", "the console is the serial port");
        line.add(
            "loglevel=4",
            "each character of a message is an exit: warnings and errors only",
        );
        line.add(
            "nolapic",
            "the machine has no APIC: two 8259, and the tick comes from the 8254",
        );
        line.add("acpi=off", "the machine has no ACPI tables");
        line.add(
            "pci=conf1",
            "without ACPI or BIOS: PCI is found at ports 0xCF8 and 0xCFC",
        );
        line.add(
            "tsc=reliable",
            "the counter is the VMM's: no watchdog, trusted from the start",
        );
        line.add(
            "tsc=noirqtime",
            "no counter reads, which are exits, at each interrupt",
        );
        line.add(
            format!("tsc_early_khz={}", ports::TSC_KHZ),
            "the counter counts virtual nanoseconds: exact, nothing to calibrate, and delay loops \
             (lpj) follow from it",
        );
        line.add(
            "highres=off",
            "high-resolution timers would program the 8254 for each event",
        );
        match tick {
            ClockTick::StopsInIdle => line.add("nohz=on", "few exits while the guest idles"),
            ClockTick::Periodic => line.add("nohz=off", "the same tick at all times"),
        };
        line.add(
            "mitigations=off",
            "return thunks and retpolines are linked away at load, and the #GP stub lies outside the \
             text that page-table isolation maps",
        );
        line.add("panic=-1", "a panic resets the machine at once");
        line.add(
            "reboot=k",
            "reset by the keyboard controller's port, which the VMM emulates",
        );
        line
    }

    /// Adds what suits a host that emulates ring 0: needed by the patches for such hosts
    /// (`rodata=off`), or shorter.
    pub fn emulated_ring0(&mut self) -> &mut Self {
        for (text, why) in EMULATED_RING0 {
            self.add(*text, why);
        }
        self
    }

    /// Adds a parameter of the caller (address, options of a user).
    pub fn push(&mut self, text: &str) -> &mut Self {
        self.add(text, "asked for")
    }

    /// Each parameter with its reason.
    pub fn explain(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.parameters
            .iter()
            .map(|parameter| (parameter.text.as_str(), parameter.why))
    }

    fn add(&mut self, text: impl Into<String>, why: &'static str) -> &mut Self {
        self.parameters.push(Parameter {
            text: text.into(),
            why,
        });
        self
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, parameter) in self.parameters.iter().enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            f.write_str(&parameter.text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_runs_at_one_gigahertz() {
        let line = CommandLine::new(ClockTick::Periodic).to_string();
        assert!(line.contains(" tsc_early_khz=1000000 "), "{line}");
        assert!(line.contains(" nohz=off "), "{line}");
    }

    #[test]
    fn every_parameter_has_its_reason_and_comes_once() {
        let mut line = CommandLine::new(ClockTick::StopsInIdle);
        line.emulated_ring0();
        let mut seen = Vec::new();
        for (text, why) in line.explain() {
            assert!(!why.is_empty() && !text.contains(' '), "{text}");
            assert!(!seen.contains(&text), "{text} comes twice");
            seen.push(text);
        }
    }

    #[test]
    fn users_parameters_come_last() {
        let mut line = CommandLine::new(ClockTick::StopsInIdle);
        line.emulated_ring0().push("loglevel=7");
        let text = line.to_string();
        assert!(
            text.contains(" nohz=on ") && text.ends_with(" debugfs=off loglevel=7"),
            "{text}"
        );
    }
}
