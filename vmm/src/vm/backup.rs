//! A replica on a thread of its own: it takes a primary's state, then follows its log.

use std::io::{BufReader, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::Effect;
use format::{ControlOp, EntryReader, Seq};
use ft::SectorRange;
use hypervisor::kvm::{KvmVcpu, KvmVm};
use hypervisor::{Kicker, Vcpu};
use replay::{RecentOutput, ReplayError, Replayed, Replayer, SavedError, load_machine};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use thiserror::Error;
use transfer::Reader;
use vhost_ftlog::frontend::{LogConsumer, ReplayProgress};

use super::boot::create_saved;
use super::runner::VmPosition;
use super::{Host, KvmMachine};

/// How long the thread sleeps at the most when nobody wakes it.
const IDLE: Duration = Duration::from_secs(1);
/// How often the session and the primary are told how far replay is, while it moves.
const TELL_EVERY: Duration = Duration::from_millis(4);
/// How many bytes of state come between two tellings.
const TELL_BYTES: u64 = 4 << 20;
/// Bytes of confirmed network output that are kept because the primary may not have released it: more than
/// its gate holds.
const MAX_RECENT_BYTES: usize = 24 << 20;

/// The section of a state transfer with the wall clock at virtual time 0, in ns since 1970.
pub const CLOCK_TAG: &str = "clock";
/// Its schema.
pub const CLOCK_SCHEMA: u32 = 1;

/// What a replica tells its session.
#[derive(Debug)]
pub enum FromBackup {
    /// So many bytes of the state have come.
    StateReceived(u64),
    /// The state is loaded and the log replayed up to here.
    Replayed(Seq),
    /// The state could not be loaded, or the replica cannot run.
    LoadFailed(String),
    /// The replica diverged: exit, expected, found, report.
    Diverged(u64, u64, u64, String),
    /// The log's end: nothing beyond this position will come any more.
    Closed(Seq),
    /// The log has an operator's act here, with its data.
    Control(ControlOp, Vec<u8>),
    /// As `Drain` asked: the guest's outstanding writes, and whether it is off.
    Drained(Vec<SectorRange>, bool),
}

enum ToBackup {
    End,
    Drain(Seq),
    HandOver(Sender<Handover>),
}

/// What a replica leaves to the primary that it becomes.
pub struct Handover {
    /// The machine.
    pub machine: KvmMachine,
    /// Network output with the position behind its log entry: the old primary may not have sent it.
    pub recent: Vec<(Seq, Effect)>,
    /// Effects of the present point that no log entry covers.
    pub unconfirmed: Vec<Effect>,
    /// Wall clock at virtual time 0, in ns since 1970.
    pub epoch_wall_ns: u64,
}

/// A replica's thread. Dropping it stops and forgets the replica.
pub struct Backup {
    send: Sender<ToBackup>,
    stop: Arc<Stop>,
    position: Arc<VmPosition>,
    /// The primary has released the outputs of everything below.
    released: Arc<AtomicU64>,
    /// Where the state comes from; cut when nobody wants it any more.
    stream: TcpStream,
    thread: Option<JoinHandle<()>>,
}

struct Stop {
    asked: AtomicBool,
    kicker: std::sync::Mutex<Option<Kicker>>,
    /// Wakes the thread where it waits for the log.
    wake: OwnedFd,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            asked: AtomicBool::new(false),
            kicker: std::sync::Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn wake(&self) {
        // It fails only where so many wake-ups wait that one more says nothing.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn kick(&self) {
        self.wake();
        if let Some(kicker) = &*self.kicker.lock().expect("nobody panics with it") {
            kicker.kick();
        }
    }
}

impl Backup {
    /// Takes the state from `state` and the log from `log`.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        host: Host,
        state: TcpStream,
        log: LogConsumer,
        tell: impl Fn(FromBackup) + Send + 'static,
    ) -> std::io::Result<Self> {
        let stream = state.try_clone()?;
        let (send, receive) = channel();
        let stop = Arc::new(Stop::new()?);
        let position = Arc::new(VmPosition::default());
        let released = Arc::new(AtomicU64::new(0));
        let theirs = (
            Arc::clone(&stop),
            Arc::clone(&position),
            Arc::clone(&released),
        );
        let thread = std::thread::Builder::new()
            .name("replica".to_owned())
            .spawn(move || {
                let (stop, position, released) = theirs;
                let panicked = Panicked(tell);
                let replica = Replica {
                    receive,
                    stop,
                    position,
                    released,
                    tell: &panicked.0,
                };
                replica.run(&host, state, log);
            })?;
        Ok(Self {
            send,
            stream,
            stop,
            position,
            released,
            thread: Some(thread),
        })
    }

    /// How far the replica is.
    pub fn position(&self) -> &VmPosition {
        &self.position
    }

    /// The primary has released the outputs of everything below: they are kept for no takeover.
    pub fn released(&self, upto: Seq) {
        self.released.store(upto.0, Ordering::Relaxed);
    }

    /// Tells where the log ends, once the channel is closed.
    pub fn end(&self) {
        self.ask(ToBackup::End);
    }

    fn ask(&self, what: ToBackup) {
        let _ = self.send.send(what);
        self.stop.wake();
    }

    /// Replays everything below `end`, then tells.
    pub fn drain(&self, end: Seq) {
        self.ask(ToBackup::Drain(end));
    }

    /// Takes the machine out, once it is drained. None if the replica is gone.
    pub fn hand_over(mut self) -> Option<Handover> {
        let (reply, receive) = channel();
        self.ask(ToBackup::HandOver(reply));
        let handover = receive.recv().ok();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        handover
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::SeqCst);
        let _ = self.stream.shutdown(Shutdown::Both);
        self.stop.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Saved(#[from] SavedError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("the delivered log: {0}")]
    Channel(#[from] vhost_ftlog::frontend::Error),
    #[error("the delivered log: {0}")]
    Format(#[from] format::Error),
    #[error("waiting for the log: {0}")]
    Wait(std::io::Error),
    #[error("stopped")]
    Stopped,
}

/// Tells the session if the replica's thread panics: else it would wait for a replica that is not there.
struct Panicked<F: Fn(FromBackup)>(F);

impl<F: Fn(FromBackup)> Drop for Panicked<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let why = "the replica's thread panicked".to_owned();
            (self.0)(FromBackup::Diverged(0, 0, 0, why));
        }
    }
}

struct Replica<'a, F> {
    receive: Receiver<ToBackup>,
    stop: Arc<Stop>,
    position: Arc<VmPosition>,
    released: Arc<AtomicU64>,
    tell: &'a F,
}

/// Counts what passes and tells.
struct Counting<'a, R, F> {
    inner: R,
    bytes: u64,
    told: u64,
    tell: &'a F,
}

impl<R: Read, F: Fn(FromBackup)> Read for Counting<'_, R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.bytes += len as u64;
        if self.bytes - self.told >= TELL_BYTES || len == 0 {
            self.told = self.bytes;
            (self.tell)(FromBackup::StateReceived(self.bytes));
        }
        Ok(len)
    }
}

impl<F: Fn(FromBackup)> Replica<'_, F> {
    fn tell(&self, event: FromBackup) {
        (self.tell)(event);
    }

    fn run(self, host: &Host, state: impl Read, log: LogConsumer) {
        let (machine, epoch_wall_ns) = match self.load(host, state) {
            Ok(loaded) => loaded,
            Err(error) => {
                let why = error.to_string();
                tracing::error!(why, "the state could not be loaded");
                return self.tell(FromBackup::LoadFailed(why));
            }
        };
        *self.stop.kicker.lock().expect("nobody panics with it") = Some(machine.vcpu().kicker());
        let mut following = Following {
            replayer: Replayer::new(machine),
            recent: RecentOutput::new(MAX_RECENT_BYTES),
            pace: Progress {
                next: Seq(0),
                channel: log.replay_progress(),
                told: (Instant::now(), Seq(0)),
            },
            log,
        };
        following.replayer.keep_recent_output();
        match self.follow(&mut following) {
            Ok(reply) => {
                let (machine, _, unconfirmed) = following.replayer.into_live();
                let recent = following.recent.into_effects().collect();
                let _ = reply.send(Handover {
                    machine,
                    recent,
                    unconfirmed,
                    epoch_wall_ns,
                });
            }
            Err(Failure::Stopped | Failure::Replay(ReplayError::Stopped)) => {}
            Err(Failure::Replay(ReplayError::Divergence(report))) => {
                tracing::error!("{report}");
                let (expected, found) = report.mismatch.numbers();
                self.tell(FromBackup::Diverged(
                    report.exit.0,
                    expected,
                    found,
                    report.to_string(),
                ));
            }
            Err(error) => {
                tracing::error!(%error, "the replica cannot go on");
                self.tell(FromBackup::Diverged(0, 0, 0, error.to_string()));
            }
        }
    }

    fn load(&self, host: &Host, state: impl Read) -> Result<(KvmMachine, u64), Failure> {
        let counting = Counting {
            inner: state,
            bytes: 0,
            told: 0,
            tell: self.tell,
        };
        let input = BufReader::with_capacity(1 << 20, counting);
        let mut reader = Reader::new(input).map_err(SavedError::from)?;
        let mut epoch_wall_ns = 0;
        let machine = load_machine::<_, KvmVm, KvmVcpu, Failure>(
            &mut reader,
            |section| {
                if section.tag == CLOCK_TAG {
                    epoch_wall_ns = section.decode(CLOCK_SCHEMA).map_err(SavedError::from)?;
                }
                Ok(())
            },
            |config, ram| Ok(create_saved(config, ram, host)?),
        )?;
        Ok((machine, epoch_wall_ns))
    }

    /// Follows the log until the machine is wanted.
    fn follow(&self, following: &mut Following) -> Result<Sender<Handover>, Failure> {
        let stop = || self.stop.asked.load(Ordering::SeqCst);
        let mut drain: Option<Seq> = None;
        self.tell(FromBackup::Replayed(Seq(0)));
        loop {
            match self.receive.try_recv() {
                Ok(ToBackup::End) => self.tell(FromBackup::Closed(following.log.committed().1)),
                Ok(ToBackup::Drain(end)) => drain = Some(end),
                Ok(ToBackup::HandOver(reply)) => return Ok(reply),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(Failure::Stopped),
            }
            if stop() {
                return Err(Failure::Stopped);
            }
            let moved = following.frame(&stop, self.tell)?;
            let machine = following.replayer.machine();
            self.position.set(machine.exit().0, machine.board().now().0);
            let released = Seq(self.released.load(Ordering::Relaxed));
            following.recent.forget_while(|next| *next <= released);
            let tell_in = following.pace.tell(self.tell);
            if moved {
                continue;
            }
            if drain.is_some_and(|end| following.pace.next >= end) {
                drain = None;
                let writes = following.outstanding_writes();
                let off = following.replayer.machine().has_ended();
                self.tell(FromBackup::Drained(writes, off));
            }
            self.rest(&following.log, tell_in.unwrap_or(IDLE))?;
        }
    }

    /// Sleeps until there is more of the log, something is asked, or `limit` is over.
    fn rest(&self, log: &LogConsumer, limit: Duration) -> Result<(), Failure> {
        if log.arm() {
            return Ok(());
        }
        let limit = Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let wake = &self.stop.wake;
        let mut either = [
            PollFd::new(log, PollFlags::IN),
            PollFd::new(wake, PollFlags::IN),
        ];
        match poll(&mut either, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::Wait(error.into())),
        }
        if !either[0].revents().is_empty() {
            log.clear()?;
        }
        if !either[1].revents().is_empty() {
            let _ = rustix::io::read(wake, &mut [0; 8]);
        }
        Ok(())
    }
}

struct Following {
    replayer: Replayer<KvmVm, KvmVcpu>,
    recent: RecentOutput<Seq>,
    pace: Progress,
    log: LogConsumer,
}

/// How far replay is, and who knows.
struct Progress {
    /// Everything below is replayed.
    next: Seq,
    channel: ReplayProgress,
    /// When session and primary were told last, and what.
    told: (Instant, Seq),
}

impl Progress {
    fn moved(&mut self, next: Seq) {
        self.next = next;
        self.channel.report(next);
    }

    /// Tells session and primary, if that is due. How long until it is; none where they know.
    fn tell(&mut self, tell: &impl Fn(FromBackup)) -> Option<Duration> {
        let (at, what) = self.told;
        if what == self.next {
            return None;
        }
        let left = TELL_EVERY.saturating_sub(at.elapsed());
        if !left.is_zero() {
            return Some(left);
        }
        self.told = (Instant::now(), self.next);
        self.channel.announce();
        tell(FromBackup::Replayed(self.next));
        None
    }
}

impl Following {
    /// Replays the next frame and tells what operators did; false where none is there. A frame of a starved
    /// channel holds the log of a long time, and a starved replica replays it in a longer one: how far it is
    /// is told on the way, or it would be taken for one that does not move. Frames do not show where an
    /// append ends; the entries of an append are all of one exit, so there are as many appends as exits, or more.
    fn frame(
        &mut self,
        stop: &dyn Fn() -> bool,
        tell: &impl Fn(FromBackup),
    ) -> Result<bool, Failure> {
        let Some(delivered) = self.log.next_frame()? else {
            return Ok(false);
        };
        let next = delivered.header.next();
        let (mut whole, mut exit) = (delivered.header.first, None);
        for entry in EntryReader::new(delivered.body) {
            let entry = entry?;
            if exit
                .replace(entry.exit)
                .is_some_and(|last| last != entry.exit)
            {
                whole = whole.next();
                self.pace.moved(whole);
                self.pace.tell(tell);
            }
            if let Replayed::Control(op, data) = self.replayer.entry(&entry, stop)? {
                tracing::info!(?op, exit = %entry.exit, "control entry");
                tell(FromBackup::Control(op, data));
            }
            for effect in self.replayer.take_recent() {
                self.recent.push(next, effect);
            }
        }
        self.log.release();
        self.pace.moved(next);
        Ok(true)
    }

    fn outstanding_writes(&self) -> Vec<SectorRange> {
        let writes = self.replayer.machine().board().outstanding().into_iter();
        writes
            .filter_map(|effect| match effect {
                Effect::DiskWrite { sector, data, .. } => Some(SectorRange {
                    first: sector,
                    count: (data.len() / devices::SECTOR_BYTES) as u64,
                }),
                _ => None,
            })
            .collect()
    }
}
