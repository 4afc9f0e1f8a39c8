//! The memory of every process of Pollux on every host, over time.
//!
//! Counted is what a process has for itself: private pages but the guest's memory, which fills as the guest
//! touches it and then stays. The areas of the logging channel are shared by two processes, fill as they are
//! walked through for the first time, and are told apart. A process grows if the line through its sizes, after
//! a first quarter in which buffers and caches fill, rises by more than [`MAY_GROW_KIB`] until the end.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use serde_json::json;

use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::{SITES, SiteId, Stage};

/// Programs whose memory is looked at.
const PROGRAMS: [&str; 3] = ["pollux", "vhost-ftlog", "ftprobe"];
/// So much more is noise: pages that an allocator took and will use again.
const MAY_GROW_KIB: f64 = 2048.0;

/// A process: its host, its program, its id.
type Name = (SiteId, String, i32);

/// What a process has, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Size {
    own: f64,
    shared: f64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Seconds and size.
    sizes: BTreeMap<Name, Vec<(f64, Size)>>,
}

impl Memory {
    /// Looks at all processes.
    pub(super) fn look(&mut self, stage: &Stage, at: Duration) -> Result<(), Failure> {
        for id in SITES {
            for pid in stage.site(id).host().processes()? {
                let pid = pid.as_raw_nonzero().get();
                // Each may end while it is looked at.
                let Ok(exe) = fs::read_link(format!("/proc/{pid}/exe")) else {
                    continue;
                };
                let program = exe.file_name().and_then(|name| name.to_str());
                let Some(program) = program.filter(|name| PROGRAMS.contains(name)) else {
                    continue;
                };
                let Ok(maps) = fs::read_to_string(format!("/proc/{pid}/smaps")) else {
                    continue;
                };
                let sizes = self.sizes.entry((id, program.to_owned(), pid));
                let at = at.as_secs_f64();
                sizes.or_default().push((at, size(&maps)));
            }
        }
        Ok(())
    }

    pub(super) fn report(&self, report: &mut Report) {
        let (mut most, mut all) = (0.0_f64, Vec::new());
        for ((id, program, pid), sizes) in &self.sizes {
            let own: Vec<(f64, f64)> = sizes.iter().map(|(at, size)| (*at, size.own)).collect();
            let growth = growth(&own);
            let last = sizes.last().map(|(_, size)| *size).unwrap_or_default();
            let largest = |of: fn(&Size) -> f64| {
                let all = sizes.iter().map(|(_, size)| of(size));
                all.fold(0.0, f64::max)
            };
            let name = format!("{program} on host {id}");
            if let Some(growth) = growth {
                most = most.max(growth);
                if growth > MAY_GROW_KIB {
                    report.fail(format!("the memory of {name} grows: by {growth:.0} KiB"));
                }
            }
            all.push(json!({
                "host": id.to_string(), "program": program, "pid": pid, "samples": sizes.len(),
                "growth_kib": growth, "own_kib": last.own, "own_most_kib": largest(|s| s.own),
                "shared_kib": last.shared, "shared_most_kib": largest(|s| s.shared),
                "own_kib_over_time": thinned(&own),
            }));
            report.push(Measure::value(
                format!("memory_{program}_{id}"),
                "KiB",
                last.own,
            ));
        }
        let note = "largest rise of a process' own memory from a quarter of the time to its end";
        report.push(Measure::value("memory_growth", "KiB", most).noted(note));
        report.detail("memory", all.into());
        if self.sizes.is_empty() {
            report.fail("no process was looked at");
        }
    }
}

/// Of the text of /proc/PID/smaps.
fn size(maps: &str) -> Size {
    let mut all = Size::default();
    let (mut rss, mut anonymous) = (0.0, 0.0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next());
        let kib = || value.and_then(|value| value.parse().ok()).unwrap_or(0.0);
        match name {
            Some("Rss:") => rss = kib(),
            Some("Anonymous:") => anonymous = kib(),
            // The last line of a mapping. Only the guest's memory is advised to be huge pages.
            Some("VmFlags:") => {
                let is_guest = line.split_whitespace().any(|flag| flag == "hg");
                all.shared += rss - anonymous;
                all.own += if is_guest { 0.0 } else { anonymous };
            }
            _ => {}
        }
    }
    all
}

/// How much the middle line through the sizes rises, from a quarter of the time to the end: by the median of
/// the slopes between all pairs (Theil and Sen), which a few outliers do not move. None of too few sizes.
fn growth(sizes: &[(f64, f64)]) -> Option<f64> {
    let settled = &sizes[sizes.len() / 4..];
    let (first, last) = (settled.first()?, settled.last()?);
    let mut slopes = Vec::new();
    for (number, (at, size)) in settled.iter().enumerate() {
        let later = settled[number + 1..].iter();
        slopes.extend(later.map(|(later, then)| (then - size) / (later - at)));
    }
    slopes.sort_by(f64::total_cmp);
    let middle = slopes.get(slopes.len() / 2)?;
    Some(middle * (last.0 - first.0))
}

/// So many sizes that a plot can be made.
fn thinned(sizes: &[(f64, f64)]) -> Vec<(f64, f64)> {
    const POINTS: usize = 120;
    let every = sizes.len().div_ceil(POINTS).max(1);
    sizes.iter().copied().step_by(every).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_not_counted_and_shared_areas_are_told_apart() {
        let maps = "7f00-7f01 rw-p 0 00:00 0 \nSize: 200000 kB\nRss: 150000 kB\nAnonymous: 150000 kB\n\
                    VmFlags: rd wr mr mw me ac hg \n\
                    7f02-7f03 rw-p 0 00:00 0 [heap]\nRss: 5000 kB\nAnonymous: 5000 kB\nVmFlags: rd wr ac\n\
                    7f04-7f05 rw-s 0 00:01 9 /memfd:arena (deleted)\nRss: 3000 kB\nAnonymous: 0 kB\n\
                    VmFlags: rd wr sh\n\
                    5500-5600 r-xp 0 fe:00 3 /usr/bin/pollux\nRss: 700 kB\nAnonymous: 100 kB\nVmFlags: rd ex\n";
        let expected = Size {
            own: 5100.0,
            shared: 3600.0,
        };
        assert_eq!(size(maps), expected);
    }

    #[test]
    fn growth_is_of_the_line_and_not_of_a_start_or_of_outliers() {
        let flat = |at: f64| match at as u32 {
            0..25 => at * 100.0,
            60 => 90_000.0,
            _ => 2_500.0,
        };
        let sizes: Vec<_> = (0..100)
            .map(|at| (f64::from(at), flat(at.into())))
            .collect();
        assert_eq!(growth(&sizes), Some(0.0));
        let rising: Vec<_> = (0..100)
            .map(|at| (f64::from(at), f64::from(at) * 10.0))
            .collect();
        assert!((growth(&rising).unwrap() - 740.0).abs() < 1e-6);
        assert_eq!(growth(&rising[..1]), None);
        assert_eq!(growth(&[]), None);
    }
}
