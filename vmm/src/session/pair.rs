//! What two hosts must have in common to replay one another. A standby that differs is refused when it
//! joins, with what differs.
//!
//! Processor, behaviour of the engine, the CPUID table that guests get, versions, and which devices the
//! VM has here. The guest's kernel and memory travel with its state and need not be compared.

use ft::Fingerprint;
use hypervisor::GuestRam;
use serde::Serialize;

use super::Devices;
use crate::vm::{Host, cpuid_table};

/// Bytes of guest memory of the VM that is made to see the CPUID table.
const SMALL_RAM: u64 = 2 << 20;
/// The longest value that is told as it is.
const LONGEST: usize = 200;

/// The fingerprint of this host.
///
/// # Errors
/// KVM does not answer.
pub fn fingerprint(host: &Host, devices: &Devices) -> Result<Fingerprint, hypervisor::Error> {
    let ram = GuestRam::new(SMALL_RAM).map_err(hypervisor::Error::Ram)?;
    let table = cpuid_table(ram, host)?;
    let mut properties = vec![
        ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("log format".to_owned(), format::VERSION.to_string()),
        ("CPUID table".to_owned(), digest(&table)),
        (
            "XSAVE bytes".to_owned(),
            host.capabilities.xsave_bytes.to_string(),
        ),
        ("disk".to_owned(), present(devices.disk.is_some())),
        ("network".to_owned(), present(devices.tap.is_some())),
    ];
    properties.extend(processor(
        &std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default(),
    ));
    let quirks = serde_json::to_value(&host.quirks).expect("quirks are plain data");
    for (name, value) in quirks.as_object().into_iter().flatten() {
        let text = value.to_string();
        let value = if text.len() > LONGEST {
            digest(value)
        } else {
            text
        };
        properties.push((format!("engine: {}", name.replace('_', " ")), value));
    }
    Ok(Fingerprint::try_from(properties).expect("few and short properties, each once"))
}

fn present(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

fn digest(value: &impl Serialize) -> String {
    let bytes = serde_json::to_vec(value).expect("plain data");
    format!("{:08x}", format::crc32c(&bytes))
}

/// Maker and model of the processor, of Linux's description of the first.
fn processor(cpuinfo: &str) -> Vec<(String, String)> {
    let wanted = ["vendor_id", "cpu family", "model", "stepping"];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let fields = first.lines().filter_map(|line| line.split_once(':'));
    fields
        .map(|(name, value)| (name.trim(), value.trim()))
        .filter(|(name, _)| wanted.contains(name))
        .map(|(name, value)| (format!("processor: {name}"), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maker_and_model_are_those_of_the_first_processor() {
        let text = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n\
                    model name\t: X\nstepping\t: 1\n\nprocessor\t: 1\nvendor_id\t: Other\n";
        let found: Vec<_> = processor(text)
            .into_iter()
            .map(|(_, value)| value)
            .collect();
        assert_eq!(found, ["AuthenticAMD", "25", "17", "1"]);
        assert!(processor("").is_empty());
    }
}
