//! Cases whose producer goes as fast as it can: one entry at a time, or as much as the channel takes.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use format::Seq;
use hdrhistogram::Histogram;
use vhost_ftlog::config_space::Tuning;
use vhost_ftlog::daemon::life;
use vhost_ftlog::daemon::options::Priority;
use vhost_ftlog::frontend::{LogProducer, ProducerStats, Session};

use super::bare::{self, Stream, Waiting};
use super::series::{Series, histogram, record};
use super::world::{PATIENCE, Pair, Setup, World, consume};
use super::{Failure, Times, cpu};
use crate::heartbeat::hogs::Hogs;
use crate::monotonic::Moment;

/// Bytes of an entry whose acknowledgement is timed.
const ENTRY: usize = 64;
/// The longest spin of one wait where everything spins.
const SPIN: Duration = Duration::from_millis(1);

/// What a producer saw, one entry at a time.
struct Seen {
    /// Append to acknowledgement.
    round_trips: Histogram<u64>,
    cpu_ns: u64,
}

/// Sleeping and spinning chains beside bare ping-pong, and where the time goes.
pub(super) fn latency(world: &World, times: Times, series: &mut Series) -> Result<(), Failure> {
    let bare = bare::ping_pong(world, times, Waiting::Blocking, Priority::Fifo)?;
    series.times("tcp_pingpong_blocking", bare);
    acks(
        world,
        times,
        Setup::default(),
        Duration::ZERO,
        "ack_sleep",
        series,
    )?;
    let bare = bare::ping_pong(world, times, Waiting::Spinning, Priority::Fifo)?;
    series.times("tcp_pingpong_spinning", bare);
    let spinning = Setup {
        tuning: Tuning {
            spin_us: SPIN.as_micros() as u32,
            spin_permille: 1000,
            ..Tuning::default()
        },
        ..Setup::default()
    };
    acks(world, times, spinning, SPIN, "ack_spin", series)
}

/// Sleeping chains with a busy thread on each CPU, and bare ping-pong under the same policy.
pub(super) fn beside_busy_threads(
    world: &World,
    times: Times,
    series: &mut Series,
) -> Result<(), Failure> {
    let _hogs = Hogs::start(1, &[0, 1]).map_err(|failure| failure.to_string())?;
    for (priority, bare, name) in [
        ("fifo", "tcp_pingpong_busy_cpu", "ack_busy_cpu"),
        ("nice", "tcp_pingpong_busy_cpu_nice", "ack_busy_cpu_nice"),
    ] {
        let setup = Setup {
            priority,
            ..Setup::default()
        };
        let pinged = bare::ping_pong(world, times, Waiting::Blocking, policy(setup))?;
        series.times(bare, pinged);
        acks(world, times, setup, Duration::ZERO, name, series)?;
    }
    Ok(())
}

fn policy(setup: Setup) -> Priority {
    if setup.priority == "fifo" {
        Priority::Fifo
    } else {
        Priority::Nice
    }
}

const fn baseline(name: &str) -> &'static str {
    match name.as_bytes() {
        b"ack_sleep" => "tcp_pingpong_blocking",
        b"ack_spin" => "tcp_pingpong_spinning",
        b"ack_busy_cpu" => "tcp_pingpong_busy_cpu",
        _ => "tcp_pingpong_busy_cpu_nice",
    }
}

/// The daemon's options of io_uring beside the default, asleep and with large entries.
pub(super) fn options(world: &World, times: Times, series: &mut Series) -> Result<(), Failure> {
    for (option, ack, throughput) in [
        (None, "ack_default", "throughput_default"),
        (Some("--send-zc"), "ack_send_zc", "throughput_send_zc"),
        (Some("--sqpoll"), "ack_sqpoll", "throughput_sqpoll"),
    ] {
        let setup = Setup {
            option,
            ..Setup::default()
        };
        let times_of = ack_times(world, times, setup)?;
        let (flood, ..) = flood(world, times, setup, 65536)?;
        let rate = flood.rate() * 65536.0 / 1e6;
        let acks = series.times(ack, times_of);
        if option.is_some() {
            acks.against("ack_default");
        }
        let rate = series.value(throughput, "MB/s", rate);
        if option.is_some() {
            rate.against("throughput_default");
        }
    }
    Ok(())
}

/// Append to acknowledgement, asleep.
fn ack_times(world: &World, times: Times, setup: Setup) -> Result<Histogram<u64>, Failure> {
    let Pair {
        mut primary,
        backup,
    } = world.pair(setup)?;
    let session = &mut primary.session;
    let (seen, ..) = with_consumer(world, backup, policy(setup), || {
        world.a.run(|| {
            life::schedule(policy(setup));
            one_at_a_time(session, times, Duration::ZERO)
        })
    })?;
    Ok(seen.round_trips)
}

/// One case of latency: the distribution, the stages, and the CPU time of an acknowledgement.
fn acks(
    world: &World,
    times: Times,
    setup: Setup,
    spin: Duration,
    name: &str,
    series: &mut Series,
) -> Result<(), Failure> {
    let Pair {
        mut primary,
        backup,
    } = world.pair(setup)?;
    let before = (primary.daemon_cpu()?, backup.daemon_cpu()?);
    let session = &mut primary.session;
    let (seen, consumer_ns, backup) = with_consumer(world, backup, policy(setup), || {
        world.a.run(|| {
            life::schedule(policy(setup));
            one_at_a_time(session, times, spin)
        })
    })?;
    let count = seen.round_trips.len() as f64 * (times.warm_up + times.case).as_secs_f64()
        / times.case.as_secs_f64();
    series.times(name, seen.round_trips).against(baseline(name));
    let stages = primary.metrics()?["stages_ns"].clone();
    for stage in ["queued", "sent", "acknowledged", "seen"] {
        for (quantile, suffix) in [("p50", ""), ("p99", "_p99")] {
            let ns = stages[stage][quantile].as_f64().unwrap_or(0.0);
            series.value(&format!("{name}_stage_{stage}{suffix}"), "us", ns / 1e3);
        }
    }
    let per_ack = |ns: u64| ns as f64 / count / 1e3;
    let sender = primary.daemon_cpu()? - before.0;
    let receiver = backup.daemon_cpu()? - before.1;
    for (who, ns) in [
        ("producer", seen.cpu_ns),
        ("sender", sender),
        ("receiver", receiver),
        ("consumer", consumer_ns),
    ] {
        series.value(&format!("{name}_cpu_{who}"), "us", per_ack(ns));
    }
    Ok(())
}

fn one_at_a_time(session: &mut Session, times: Times, spin: Duration) -> Result<Seen, Failure> {
    let mut seen = Seen {
        round_trips: histogram(),
        cpu_ns: cpu::of_this_thread(),
    };
    let entry = [7; ENTRY];
    let start = Instant::now();
    loop {
        let passed = start.elapsed();
        if passed >= times.warm_up + times.case {
            seen.cpu_ns = cpu::of_this_thread() - seen.cpu_ns;
            return Ok(seen);
        }
        let appended = Moment::now();
        let seq = session.producer.append_urgent(&entry)?;
        let upto = seq.ok_or("a log of one entry is full")?.next();
        if !session.acks.wait(upto, spin, None)? {
            return Err("no acknowledgement".into());
        }
        if passed >= times.warm_up {
            record(&mut seen.round_trips, Moment::now().since(appended));
        }
    }
}

/// Runs something on host A while a consumer on host B takes what is delivered. Also the consumer's CPU
/// time.
pub(super) fn with_consumer<T: Send>(
    world: &World,
    mut backup: super::world::Side,
    priority: Priority,
    job: impl FnOnce() -> Result<T, Failure> + Send,
) -> Result<(T, u64, super::world::Side), Failure> {
    // Closing the one end makes the other readable.
    let (stop, stopped) = UnixStream::pair()?;
    let (done, consumed) = std::thread::scope(|scope| {
        let consumer = &mut backup.session.consumer;
        let consuming = scope.spawn(move || {
            world.b.run(|| {
                life::schedule(priority);
                consume(consumer, stopped.as_fd())
            })
        });
        let done = job();
        drop(stop);
        (done, consuming.join())
    });
    let consumed = consumed.map_err(|_| "the consumer panicked")??;
    Ok((done?, consumed, backup))
}

/// What a producer did as fast as it went.
struct Flood {
    /// Entries that were acknowledged while it was timed, and the seconds of that.
    entries: u64,
    seconds: f64,
    /// All of them, and the CPU time of the producer's thread, warm-up included.
    all: u64,
    cpu_ns: u64,
    stats: ProducerStats,
}

impl Flood {
    fn rate(&self) -> f64 {
        self.entries as f64 / self.seconds
    }
}

/// Throughput of entries of three sizes beside bare loops of write().
pub(super) fn throughput(world: &World, times: Times, series: &mut Series) -> Result<(), Failure> {
    let setup = Setup::default();
    for (entry, hot, same, gathered, name) in [
        (
            1500,
            "write_hot_1500",
            "write_1500",
            "write_1500_gathered",
            "throughput_1500",
        ),
        (
            65536,
            "write_hot_65536",
            "write_65536",
            "write_65536_gathered",
            "throughput_65536",
        ),
    ] {
        let one = Stream::hot(entry).run(world, times)?;
        series
            .value(hot, "MB/s", one)
            .noted("one hot buffer, no checksum");
        let walks = (HOT_BYTES, setup.arena.delivery_bytes as usize);
        for (of, write) in [(same, entry), (gathered, GATHERED / entry * entry)] {
            let stream = Stream {
                entry,
                write,
                walks,
                works: true,
            };
            series.value(of, "MB/s", stream.run(world, times)?);
        }
        let (flood, ..) = flood(world, times, setup, entry)?;
        let rate = flood.rate() * entry as f64 / 1e6;
        series.value(name, "MB/s", rate).against(same);
        series
            .value(&format!("{name}_of_hot"), "MB/s", rate)
            .against(hot);
        series
            .value(&format!("{name}_of_gathered"), "MB/s", rate)
            .against(gathered);
    }
    small_entries(world, times, setup, series)
}

/// What the channel keeps hot of the log data area while acknowledgements keep up.
const HOT_BYTES: usize = 512 << 10;
/// What a sender that gathers small entries writes at once.
const GATHERED: usize = 64 << 10;

fn small_entries(
    world: &World,
    times: Times,
    setup: Setup,
    series: &mut Series,
) -> Result<(), Failure> {
    let (flood, sides, consumer_ns) = flood(world, times, setup, 16)?;
    series.value("entries_16", "1/s", flood.rate());
    let per_entry = |ns: u64| ns as f64 / flood.all as f64;
    let (sender, receiver) = sides;
    series.value("entries_16_cpu_producer", "ns", per_entry(flood.cpu_ns));
    series.value("entries_16_cpu_sender", "ns", per_entry(sender));
    series.value("entries_16_cpu_receiver", "ns", per_entry(receiver));
    series.value("entries_16_cpu_consumer", "ns", per_entry(consumer_ns));
    let per_1000 = |calls: u64| calls as f64 * 1000.0 / flood.all as f64;
    series
        .value("entries_16_kicks", "/1000", per_1000(flood.stats.kicks))
        .noted("system calls of the producer to wake the daemon, for 1000 entries");
    Ok(())
}

type FloodResult = (Flood, (u64, u64), u64);

/// A producer that never waits but for space. Also the CPU time of both daemons and of the consumer.
fn flood(world: &World, times: Times, setup: Setup, entry: usize) -> Result<FloodResult, Failure> {
    let Pair {
        mut primary,
        backup,
    } = world.pair(setup)?;
    let before = (primary.daemon_cpu()?, backup.daemon_cpu()?);
    let session = &mut primary.session;
    let (flood, consumer_ns, backup) = with_consumer(world, backup, Priority::None, || {
        world.a.run(|| pour(session, times, entry))
    })?;
    let sides = (
        primary.daemon_cpu()? - before.0,
        backup.daemon_cpu()? - before.1,
    );
    Ok((flood, sides, consumer_ns))
}

fn pour(session: &mut Session, times: Times, entry: usize) -> Result<Flood, Failure> {
    let producer = &mut session.producer;
    let cpu_before = cpu::of_this_thread();
    let start = Instant::now();
    let mut counted_from: Option<(Instant, Seq)> = None;
    loop {
        for _ in 0..64 {
            append(producer, entry)?;
        }
        let passed = start.elapsed();
        if counted_from.is_none() && passed >= times.warm_up {
            counted_from = Some((Instant::now(), session.acks.acked()?));
        }
        if passed >= times.warm_up + times.case {
            break;
        }
    }
    let (since, from) = counted_from.ok_or("the case is shorter than its warm-up")?;
    let acked = session.acks.acked()?;
    let seconds = since.elapsed().as_secs_f64();
    let all = producer.next_seq();
    producer.flush(all);
    if !session.acks.wait(all, Duration::ZERO, Some(PATIENCE))? {
        return Err("not all was acknowledged".into());
    }
    Ok(Flood {
        entries: acked.0 - from.0,
        seconds,
        all: all.0,
        cpu_ns: cpu::of_this_thread() - cpu_before,
        stats: producer.stats(),
    })
}

fn append(producer: &mut LogProducer, entry: usize) -> Result<(), Failure> {
    let mark = producer.next_seq().0 as u8;
    while producer.append_with(entry, |to| to.fill(mark))?.is_none() {
        if !producer.wait_space(entry, PATIENCE)? {
            return Err("the log stays full".into());
        }
    }
    Ok(())
}
