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
    /// The tick stops in idle: an idle guest makes the fewest exits. The timer chip cannot wait
    /// longer than 27 ms, so some 37 ticks a second remain.
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

/// `loops_per_jiffy` that belongs to the time stamp counter: its ticks in 4 ms (CONFIG_HZ=250).
const LOOPS_PER_JIFFY: u32 = ports::TSC_KHZ * 4;

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
        line.add("noapic", "the machine has two 8259 and no I/O APIC");
        line.add(
            "nolapic",
            "the machine has no local APIC: the tick comes from the 8254",
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
            "the counter counts virtual nanoseconds: exact, nothing to calibrate",
        );
        line.add(
            format!("lpj={LOOPS_PER_JIFFY}"),
            "delay loops count the same counter",
        );
        line.add(
            "no_timer_check",
            "there is no I/O APIC whose timer pin could be wrong",
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
            "nopti",
            "the #GP stub lies outside the text that page-table isolation maps",
        );
        line.add(
            "mitigations=off",
            "return thunks and retpolines are linked away at load",
        );
        line.add("nokaslr", "addresses are those of the image");
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
        self.add(
            "rodata=off",
            "code is changed in place; page permissions are not split to 4 KiB",
        );
        self.add("init_on_alloc=0", "pages are not cleared twice");
        self.add("numa=off", "one node");
        self.add("nr_cpus=1", "tables are not made for 8192 processors");
        self.add(
            "cgroup_disable=memory",
            "no accounting of each page to a group",
        );
        self.add("psi=0", "no accounting of stalls at each change of process");
        self.add("audit=0", "no audit records");
        self.add("apparmor=0", "no checks against profiles that nobody loads");
        self.add(
            "io_delay=none",
            "no exit to port 0x80 after each access to the timer",
        );
        self.add(
            "8250.nr_uarts=1",
            "the machine has one serial port: three are not looked for",
        );
        self.add(
            "rootfstype=ramfs",
            "the cheaper of the two file systems for the initial RAM disk",
        );
        self.add(
            "retain_initrd",
            "the RAM disk's memory is not given back page by page",
        );
        self.add("cryptomgr.notests", "no self-tests of ciphers")
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
    fn delay_loops_agree_with_the_counter() {
        let line = CommandLine::new(ClockTick::Periodic).to_string();
        assert!(line.contains("tsc_early_khz=1000000 lpj=4000000"), "{line}");
    }

    #[test]
    fn users_parameters_come_last() {
        let mut line = CommandLine::new(ClockTick::StopsInIdle);
        line.emulated_ring0().push("loglevel=7");
        let text = line.to_string();
        assert!(
            text.contains(" nohz=on ") && text.ends_with(" cryptomgr.notests loglevel=7"),
            "{text}"
        );
    }
}
