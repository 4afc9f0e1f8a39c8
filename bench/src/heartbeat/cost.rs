//! What the probes cost the channel, and whether what they tell adds up.
//!
//! Rounds without probes and with all of them take turns, over the same daemons: heartbeats and traffic
//! probes on both hosts, and a recorder of the stations on each; of the throughput also rounds with one of
//! the two. From the recordings of the rounds with sleeping waits comes the histogram of stages: the sum of
//! its means stands beside the mean that the VMM's side has measured for the same appends, from before
//! the append to after the wait for its acknowledgement.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::{Host, Process};
use hdrhistogram::Histogram;
use rustix::process::Signal;
use serde_json::Value;

use super::channel::{Latency, Pair};
use super::world::World;
use crate::Failure;
use crate::report::{Measure, Report};

/// Rounds of each kind.
const ROUNDS: usize = 5;
/// Length of a load.
const LENGTH: Duration = Duration::from_secs(2);
/// Rounds and length of the loads of throughput.
const THROUGHPUT_ROUNDS: usize = 16;
const THROUGHPUT_LENGTH: Duration = Duration::from_millis(400);
/// How long a wait looks before it sleeps, in the cases that spin.
const SPIN: Duration = Duration::from_millis(5);

pub(super) fn measure(ftprobe: &Path, report: &mut Report) -> Result<(), Failure> {
    let ftlog = ftprobe.with_file_name("vhost-ftlog");
    if !ftlog.exists() {
        let build = "cargo build --release -p vhost-ftlog";
        return Err(format!("{} is missing: run {build}", ftlog.display()).into());
    }
    let world = World::new(ftprobe)?;
    let scene = Scene {
        world: &world,
        ftprobe,
    };
    let mut asleep = Pair::connect(&world, &ftlog, Duration::ZERO)?;
    let (plain, probed, stages) = scene.latencies("ack_sleep", &mut asleep)?;
    compare(report, "ack_sleep", &plain, &probed);
    add_up(report, &probed, &stages)?;
    scene.throughputs(&mut asleep, report)?;
    drop(asleep);
    let mut spinning = Pair::connect(&world, &ftlog, SPIN)?;
    let (plain, probed, _) = scene.latencies("ack_spin", &mut spinning)?;
    compare(report, "ack_spin", &plain, &probed);
    Ok(())
}

/// Which probes.
#[derive(Debug, Clone, Copy)]
struct Probing {
    /// Heartbeats and traffic.
    traffic: bool,
    stations: bool,
}

impl Probing {
    const ALL: Self = Self {
        traffic: true,
        stations: true,
    };
    const TRAFFIC: Self = Self {
        traffic: true,
        stations: false,
    };
    const STATIONS: Self = Self {
        traffic: false,
        stations: true,
    };
}

struct Scene<'a> {
    world: &'a World,
    ftprobe: &'a Path,
}

/// Rounds without probes, rounds with, and what was recorded in the latter.
type Rounds = (Vec<Latency>, Vec<Latency>, Vec<Value>);

impl Scene<'_> {
    fn latencies(&self, name: &str, pair: &mut Pair) -> Result<Rounds, Failure> {
        let (mut plain, mut probed, mut stages) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            eprintln!("{name}: round {round} of {ROUNDS}");
            plain.push(pair.latency(self.world, LENGTH)?);
            let probes = self.probes(pair, Probing::ALL)?;
            probed.push(pair.latency(self.world, LENGTH)?);
            stages.push(probes.stages(self.ftprobe)?);
        }
        Ok((plain, probed, stages))
    }

    /// With each kind of probes, and with all. A channel's throughput wanders by a factor in seconds, so each
    /// load with probes has one without before it and one behind it, and is compared with these two.
    fn throughputs(&self, pair: &mut Pair, report: &mut Report) -> Result<(), Failure> {
        let kinds = [
            ("throughput_probed", Probing::ALL),
            ("throughput_traffic", Probing::TRAFFIC),
            ("throughput_stations", Probing::STATIONS),
        ];
        let mut plain = vec![self.throughput(pair)?];
        let mut probed = [const { Vec::new() }; 3];
        let mut ratios = [const { Vec::new() }; 3];
        for round in 1..=THROUGHPUT_ROUNDS {
            eprintln!("throughput: round {round} of {THROUGHPUT_ROUNDS}");
            for (index, (_, kind)) in kinds.iter().enumerate() {
                let probes = self.probes(pair, *kind)?;
                let with = self.throughput(pair)?;
                probes.end()?;
                let (before, after) = (plain[plain.len() - 1], self.throughput(pair)?);
                plain.push(after);
                probed[index].push(with);
                ratios[index].push(with / f64::midpoint(before, after));
            }
        }
        let base = Measure::of_runs("throughput_plain", "MB/s", &plain);
        for (index, (name, _)) in kinds.iter().enumerate() {
            let paired = Measure::of_runs(format!("{name}_ratio"), "1", &ratios[index]);
            let note = format!(
                "ratio: the median of {} loads, each to those without probes before and behind it",
                ratios[index].len()
            );
            let with = Measure::of_runs(*name, "MB/s", &probed[index]).noted(note);
            let with = with.against("throughput_plain", &base);
            report.push(Measure {
                ratio: paired.value,
                ..with
            });
            report.push(paired);
        }
        report.push(base);
        Ok(())
    }

    /// MB/s.
    fn throughput(&self, pair: &mut Pair) -> Result<f64, Failure> {
        Ok(pair.throughput(self.world, THROUGHPUT_LENGTH)? / 1e6)
    }

    fn probes(&self, pair: &Pair, kind: Probing) -> Result<Probes, Failure> {
        let (a, b) = (&self.world.a, &self.world.b);
        let hosts = [
            (a, &self.world.link.a.interface, "a", pair.processes_a()),
            (b, &self.world.link.b.interface, "b", pair.processes_b()),
        ];
        let mut probes = Probes {
            recorders: Vec::new(),
            files: Vec::new(),
            _daemons: Vec::new(),
        };
        for (host, interface, name, processes) in hosts {
            let socket = self.world.socket(&format!("probe-{name}"));
            if kind.traffic {
                let daemon = self.daemon(host, interface, &socket)?;
                probes._daemons.push(daemon);
            }
            if kind.stations {
                let file = self.world.socket(&format!("{name}.stations"));
                let recorder = self.recorder(host, &socket, &file, processes)?;
                probes.recorders.push(recorder);
                probes.files.push(file);
            }
        }
        Ok(probes)
    }

    fn daemon(&self, host: &Host, interface: &str, socket: &Path) -> Result<Process, Failure> {
        let mut run = Command::new(self.ftprobe);
        run.args(["run", "--interface", interface]);
        run.args(["--log-interface", interface]);
        run.arg("--socket").arg(socket);
        // Without its programs in the kernel it would cost nothing, and be no measurement.
        let mut daemon = run.started(host, "the logging channel is watched")?;
        daemon.wait_for_line("heartbeats are answered in the kernel")?;
        daemon.wait_for_line("ready")?;
        Ok(daemon)
    }

    fn recorder(
        &self,
        host: &Host,
        socket: &Path,
        file: &Path,
        processes: Vec<u32>,
    ) -> Result<Process, Failure> {
        let mut record = Command::new(self.ftprobe);
        record.arg("record").arg("--out").arg(file);
        record.arg("--socket").arg(socket);
        for process in processes {
            record.args(["--pid", &process.to_string()]);
        }
        record.started(host, "listening")
    }
}

/// A command that becomes a process of a host.
trait Started {
    fn started(&mut self, host: &Host, line: &str) -> Result<Process, Failure>;
}

impl Started for Command {
    fn started(&mut self, host: &Host, line: &str) -> Result<Process, Failure> {
        let mut process = host.spawn(self)?;
        process.wait_for_line(line)?;
        Ok(process)
    }
}

struct Probes {
    recorders: Vec<Process>,
    files: Vec<PathBuf>,
    _daemons: Vec<Process>,
}

impl Probes {
    /// Ends the recordings.
    fn end(mut self) -> Result<Vec<PathBuf>, Failure> {
        for recorder in &mut self.recorders {
            recorder.signal(Signal::TERM)?;
            let status = recorder.wait()?;
            if !status.success() {
                return Err(format!("ftprobe record: {status}").into());
            }
        }
        Ok(std::mem::take(&mut self.files))
    }

    /// Ends the recordings and has them joined.
    fn stages(self, ftprobe: &Path) -> Result<Value, Failure> {
        let output = Command::new(ftprobe)
            .args(["latency", "--json", "--each"])
            .args(self.end()?)
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("ftprobe latency: {said}").into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

fn compare(report: &mut Report, name: &str, plain: &[Latency], probed: &[Latency]) {
    let of = |suffix: &str, rounds: &[Latency]| {
        let histograms: Vec<Histogram<u64>> = rounds.iter().map(|r| r.ns.clone()).collect();
        Measure::microseconds_of_runs(format!("{name}_{suffix}"), &histograms)
    };
    let base = of("plain", plain);
    let baseline = match name {
        "ack_sleep" => "ack_sleep_plain",
        _ => "ack_spin_plain",
    };
    report.push(of("probed", probed).against(baseline, &base));
    report.push(base);
}

/// The sum of the stages' means beside the mean that was measured from end to end, of the same appends.
fn add_up(report: &mut Report, probed: &[Latency], stages: &[Value]) -> Result<(), Failure> {
    let (mut sums, mut measured) = (Vec::new(), Vec::new());
    for (latency, stages) in probed.iter().zip(stages) {
        for way in stages["each"].as_array().ok_or("no --each")? {
            let position = way[1].as_u64().ok_or("no position")?;
            let times = way[2].as_array().ok_or("no stages")?;
            // Appends of the warm-up are not measured.
            if let Some(took) = latency.sampled_ns.get(&position) {
                let sum: u64 = times.iter().filter_map(Value::as_u64).sum();
                sums.push(sum as f64 / 1e3);
                measured.push(*took as f64 / 1e3);
            }
        }
    }
    if sums.is_empty() {
        return Err("no append was shown at all stations".into());
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let base = Measure::value("stages_end_to_end_mean", "us", mean(&measured));
    let sum = Measure::value("stages_sum_of_means", "us", mean(&sums));
    let all: Vec<f64> = probed.iter().map(|round| round.mean_ns / 1e3).collect();
    let all = Measure::value("end_to_end_mean_of_all", "us", mean(&all));
    let of = format!("{} appends that were shown at all stations", sums.len());
    report.push(sum.against("stages_end_to_end_mean", &base).noted(of));
    report.push(base.noted("the same appends, as the VMM's side has measured them"));
    report.push(all.noted("also those that are not shown, which pay for no event"));
    let table = stages.iter().cloned().map(|mut stages| {
        stages.as_object_mut().map(|said| said.remove("each"));
        stages
    });
    report.detail("stages", table.collect::<Vec<Value>>().into());
    Ok(())
}
