//! Listening at the stations for some time: into memory for a table, into a file for later.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use heartbeat::Client;
use heartbeat::clock::{monotonic_ns, timespec};
use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;

use crate::stations::{
    ClockSample, Clocks, Header, Recording, RecordingError, Stages, Watch, WatchError, Writer,
    chrome, join, programs,
};

/// How often the events are taken.
const TAKE_EVERY: Duration = Duration::from_millis(100);
/// How often the clocks are compared.
const CLOCK_EVERY_NS: u64 = 100_000_000;

/// Why there is no recording, table or trace.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The stations cannot be listened at.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// A recording cannot be read.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// A file cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Waiting failed.
    #[error("waiting: {0}")]
    Wait(#[source] io::Error),
}

/// What to listen to.
#[derive(Debug, Clone, clap::Args)]
pub struct Listen {
    /// Process to listen to; may be given again. Without it, all programs of Pollux on this machine.
    #[arg(long = "pid", value_name = "PID")]
    processes: Vec<u32>,
    /// How long to listen; until SIGINT if not given.
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Socket of the running ftprobe, whose heartbeats compare the hosts' clocks.
    #[arg(long, default_value = heartbeat::protocol::DEFAULT_SOCKET)]
    socket: PathBuf,
}

impl Listen {
    /// Writes what is heard until the time is up or `stop` is readable.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn record(&self, out: &Path, stop: &UnixStream) -> Result<(), ListenError> {
        let failed = |source| ListenError::Write {
            path: out.to_owned(),
            source,
        };
        let mut watch = self.start()?;
        let header = Header::here(distance());
        let mut writer = Writer::create(out, &header).map_err(failed)?;
        self.run(
            stop,
            |clock| {
                let mut result = Ok(());
                watch.take(|event| {
                    let written = writer.event(&event);
                    result = std::mem::replace(&mut result, Ok(())).and(written);
                });
                result?;
                clock.iter().try_for_each(|sample| writer.clock(sample))
            },
            failed,
        )?;
        writer.finish(watch.lost(), monotonic_ns()).map_err(failed)
    }

    /// Keeps what is heard in memory.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn hear(&self, stop: &UnixStream) -> Result<Recording, ListenError> {
        let mut watch = self.start()?;
        let mut recording = Recording::new(Header::here(distance()));
        self.run(
            stop,
            |clock| {
                watch.take(|event| recording.events.push(event));
                recording.clock.extend_from_slice(clock);
                Ok(())
            },
            ListenError::Wait,
        )?;
        recording.end = Some((watch.lost(), monotonic_ns()));
        Ok(recording)
    }

    fn start(&self) -> Result<Watch, ListenError> {
        let watch = Watch::start(&programs(&self.processes)?)?;
        tracing::info!(stations = watch.stations(), "listening");
        Ok(watch)
    }

    fn run(
        &self,
        stop: &UnixStream,
        mut take: impl FnMut(&[ClockSample]) -> io::Result<()>,
        failed: impl Fn(io::Error) -> ListenError,
    ) -> Result<(), ListenError> {
        let end = self.seconds.map_or(u64::MAX, |seconds| {
            monotonic_ns().saturating_add((seconds.max(0.0) * 1e9) as u64)
        });
        let mut clocks = ClockReader::new(&self.socket);
        loop {
            take(&clocks.read()).map_err(&failed)?;
            let left = end.saturating_sub(monotonic_ns());
            if left == 0 {
                return Ok(());
            }
            let wait = left.min(TAKE_EVERY.as_nanos() as u64);
            let mut waiting = [PollFd::new(stop, PollFlags::IN)];
            match poll(&mut waiting, Some(&timespec(wait))) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return take(&[]).map_err(&failed),
                Err(error) => return Err(ListenError::Wait(error.into())),
            }
        }
    }
}

/// Reads the recordings of one or two hosts, the first with the clock that counts.
///
/// # Errors
/// [`ListenError::Recording`].
pub fn read(files: &[PathBuf]) -> Result<Vec<Recording>, ListenError> {
    let read = files.iter().map(|file| Ok(Recording::read(file)?));
    read.collect()
}

/// The histograms of what was recorded.
pub fn stages(recordings: &[Recording], measured_clocks: bool) -> Stages {
    Stages::of(&join(recordings, &Clocks::of(recordings, measured_clocks)))
}

/// Writes the trace of what was recorded.
///
/// # Errors
/// [`ListenError::Write`].
pub fn trace(
    recordings: &[Recording],
    measured_clocks: bool,
    out: &Path,
) -> Result<(), ListenError> {
    let joined = join(recordings, &Clocks::of(recordings, measured_clocks));
    let write = || {
        let mut to = io::BufWriter::new(std::fs::File::create(out)?);
        chrome(&mut to, recordings, &joined)?;
        io::Write::flush(&mut to)
    };
    write().map_err(|source| ListenError::Write {
        path: out.to_owned(),
        source,
    })
}

/// As the programs that are listened to have it.
fn distance() -> u64 {
    usdt::distance_of_environment()
        .unwrap_or(usdt::DEFAULT_DISTANCE)
        .max(1)
        .next_power_of_two()
}

/// Takes each new comparison of the clocks once, where a running ftprobe has any.
struct ClockReader<'a> {
    socket: &'a Path,
    client: Option<Client>,
    due_ns: u64,
    taken: Vec<(u64, u64)>,
}

impl<'a> ClockReader<'a> {
    fn new(socket: &'a Path) -> Self {
        Self {
            socket,
            client: None,
            due_ns: 0,
            taken: Vec::new(),
        }
    }

    fn read(&mut self) -> Vec<ClockSample> {
        let now = monotonic_ns();
        if now < self.due_ns {
            return Vec::new();
        }
        self.due_ns = now + CLOCK_EVERY_NS;
        if self.client.is_none() {
            self.client = Client::connect(self.socket).ok();
        }
        let status = match self.client.as_mut().map(Client::status) {
            Some(Ok(status)) => status,
            Some(Err(error)) => {
                tracing::debug!(%error, "the clocks are not compared");
                self.client = None;
                return Vec::new();
            }
            None => return Vec::new(),
        };
        let samples = status.sessions.iter().filter_map(|session| {
            session.clock.map(|clock| ClockSample {
                session: session.session,
                at_ns: clock.at_ns,
                offset_ns: clock.offset_ns,
                error_ns: clock.error_ns,
            })
        });
        let fresh: Vec<ClockSample> = samples
            .filter(|sample| !self.taken.contains(&(sample.session, sample.at_ns)))
            .collect();
        self.taken
            .retain(|(session, _)| !fresh.iter().any(|s| s.session == *session));
        self.taken
            .extend(fresh.iter().map(|s| (s.session, s.at_ns)));
        fresh
    }
}
