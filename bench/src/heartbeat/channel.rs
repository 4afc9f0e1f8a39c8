//! A logging channel between the two hosts of a [`World`], for loads that are measured with probes and
//! without.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use format::{Epoch, Seq, SessionId};
use hdrhistogram::Histogram;
use heartbeat::clock::monotonic_ns;
use ring::ArenaConfig;
use vhost_ftlog::config_space::{Reach, Role, SessionParams, Tuning};
use vhost_ftlog::daemon::life;
use vhost_ftlog::daemon::options::Priority;
use vhost_ftlog::frontend::{
    Channel, ChannelConfig, ChannelEvent, Daemon, Events, LogConsumer, Session, SpawnConfig,
};
use vhost_ftlog::notice::Notice;

use super::world::World;
use crate::Failure;

/// How long anything that must come is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// A load begins to count after this.
const WARM_UP: Duration = Duration::from_millis(200);
/// Bytes of an append that waits for its acknowledgement.
const SMALL: usize = 100;
/// Bytes of an append that does not.
const LARGE: usize = 1_500;

static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// One side.
struct Side {
    channel: Channel,
    session: Session,
    events: Events,
}

/// A connected channel: the sender on host A, the receiver on host B.
pub(super) struct Pair {
    primary: Side,
    backup: Side,
    spin: Duration,
}

/// What a load of single appends gave.
pub(super) struct Latency {
    pub(super) ns: Histogram<u64>,
    pub(super) mean_ns: f64,
    /// Of each append that may be sampled, by its position.
    pub(super) sampled_ns: HashMap<u64, u64>,
}

impl Pair {
    /// `spin` is how long either side looks before it sleeps.
    pub(super) fn connect(world: &World, ftlog: &Path, spin: Duration) -> Result<Self, Failure> {
        let key = world.socket("key");
        std::fs::write(&key, [7; 32])?;
        let number = SESSIONS.fetch_add(1, Ordering::Relaxed);
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        let tuning = Tuning {
            spin_us: u32::try_from(spin.as_micros())?,
            spin_permille: 1_000,
            ..Tuning::default()
        };
        let config = |name: &str, listen: Option<SocketAddr>| {
            let text = |path: PathBuf| path.display().to_string();
            let mut args = vec!["--key-file".to_owned(), text(key.clone())];
            if let Some(address) = listen {
                args.extend(["--listen".to_owned(), address.to_string()]);
            }
            ChannelConfig {
                daemon: Daemon::Spawn(SpawnConfig {
                    program: ftlog.to_owned(),
                    socket: world.socket(&format!("{name}-{number}.sock")),
                    args,
                }),
                arena: ArenaConfig::default(),
                tuning,
            }
        };
        let params = |role, reach| SessionParams {
            session: SessionId(id),
            epoch: Epoch(1),
            role,
            reach,
        };
        let open = |config, params| -> Result<Side, String> {
            let (channel, events) = Channel::start(config).map_err(|e| e.to_string())?;
            let session = channel.open(params, Seq(0)).map_err(|e| e.to_string())?;
            Ok(Side {
                channel,
                session,
                events,
            })
        };
        let anywhere = SocketAddr::new(world.link.b.v4.into(), 0);
        let backup = world.b.run(|| {
            let config = config("backup", Some(anywhere));
            open(config, params(Role::Receiver, Reach::Listen))
        })?;
        let listen = backup.channel.listen_address();
        let listen = listen.ok_or("the daemon of host B listens nowhere")?;
        let mut primary = world.a.run(|| {
            let config = config("primary", None);
            open(config, params(Role::Sender, Reach::Dial(listen)))
        })?;
        wait_connected(&mut primary)?;
        Ok(Self {
            primary,
            backup,
            spin,
        })
    }

    /// The processes of host A that log entries pass: this one and the daemon.
    pub(super) fn processes_a(&self) -> Vec<u32> {
        let own = std::process::id();
        self.primary
            .channel
            .daemon_pid()
            .into_iter()
            .chain([own])
            .collect()
    }

    /// The same of host B.
    pub(super) fn processes_b(&self) -> Vec<u32> {
        self.backup.channel.daemon_pid().into_iter().collect()
    }

    /// Appends one by one, each after the acknowledgement of the last.
    pub(super) fn latency(&mut self, world: &World, length: Duration) -> Result<Latency, Failure> {
        let spin = self.spin;
        self.load(world, |session| {
            let bytes = [0x5a; SMALL];
            let mut latency = Latency {
                ns: Histogram::new(3).map_err(text)?,
                mean_ns: 0.0,
                sampled_ns: HashMap::new(),
            };
            let mut sum = 0;
            let started = Instant::now();
            while started.elapsed() < WARM_UP + length {
                let before = monotonic_ns();
                let appended = session.producer.append_urgent(&bytes).map_err(text)?;
                let upto = appended.ok_or("no room for one append")?.next();
                let came = session
                    .acks
                    .wait(upto, spin, Some(PATIENCE))
                    .map_err(text)?;
                if !came {
                    return Err("an acknowledgement never came".to_owned());
                }
                let took = monotonic_ns() - before;
                if started.elapsed() > WARM_UP {
                    latency.ns.record(took).map_err(text)?;
                    sum += took;
                    if (upto.0 - 1).is_multiple_of(usdt::DEFAULT_DISTANCE) {
                        latency.sampled_ns.insert(upto.0 - 1, took);
                    }
                }
            }
            latency.mean_ns = sum as f64 / latency.ns.len().max(1) as f64;
            Ok(latency)
        })
    }

    /// Appends as fast as the channel takes them: bytes a second that were acknowledged.
    pub(super) fn throughput(&mut self, world: &World, length: Duration) -> Result<f64, Failure> {
        self.load(world, |session| {
            let bytes = [0x5a; LARGE];
            let started = Instant::now();
            let mut counted: Option<(Instant, Seq)> = None;
            loop {
                let elapsed = started.elapsed();
                if elapsed > WARM_UP && counted.is_none() {
                    let acked = session.acks.acked().map_err(text)?;
                    counted = Some((Instant::now(), acked));
                }
                if elapsed > WARM_UP + length {
                    break;
                }
                for _ in 0..64 {
                    if session.producer.append(&bytes).map_err(text)?.is_none() {
                        let room = Duration::from_millis(100);
                        session.producer.wait_space(LARGE, room).map_err(text)?;
                    }
                }
            }
            let (since, from) = counted.ok_or("no time to count in")?;
            let acked = session.acks.acked().map_err(text)?;
            let bytes = (acked.0 - from.0) as f64 * LARGE as f64;
            Ok(bytes / since.elapsed().as_secs_f64())
        })
    }

    /// Runs `job` as host A's VMM while host B's reads what comes.
    fn load<T: Send>(
        &mut self,
        world: &World,
        job: impl FnOnce(&mut Session) -> Result<T, String> + Send,
    ) -> Result<T, Failure> {
        let stop = AtomicBool::new(false);
        let spin = self.spin;
        let (primary, consumer) = (&mut self.primary.session, &mut self.backup.session.consumer);
        let result = std::thread::scope(|scope| {
            let stop = &stop;
            let reader = scope.spawn(move || {
                world.b.run(|| {
                    as_the_daemon(spin);
                    read(consumer, spin, stop)
                })
            });
            let result = scope.spawn(move || {
                world.a.run(|| {
                    as_the_daemon(spin);
                    job(primary)
                })
            });
            let result = result.join();
            stop.store(true, Ordering::Release);
            match (reader.join(), result) {
                (Ok(Ok(())), Ok(result)) => result,
                (Ok(Err(error)), _) => Err(error),
                _ => Err("the reader or the load panicked".to_owned()),
            }
        });
        Ok(result?)
    }
}

/// The scheduling of the daemon's data thread, where both spin on one CPU: else the one of lesser priority
/// would not run before the other sleeps.
fn as_the_daemon(spin: Duration) {
    if !spin.is_zero() {
        life::schedule(Priority::Fifo);
    }
}

fn wait_connected(side: &mut Side) -> Result<(), Failure> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        let event = side.events.wait(Duration::from_millis(100));
        if let Some(ChannelEvent::Notice(Notice::Connected { .. })) = event {
            return Ok(());
        }
    }
    Err("the channel does not connect".into())
}

fn read(consumer: &mut LogConsumer, spin: Duration, stop: &AtomicBool) -> Result<(), String> {
    while !stop.load(Ordering::Acquire) {
        while consumer.next_frame().map_err(text)?.is_some() {}
        consumer.release();
        let limit = Some(Duration::from_millis(50));
        consumer.wait(spin, limit).map_err(text)?;
    }
    Ok(())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
