//! The death of a VMM-side process with much memory: when does the peer know that its log has ended?

use std::convert::Infallible;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use format::{FrameFlags, Seq};
use rustix::process::Signal;
use vhost_ftlog::config_space::{Reach, Role, Tuning};
use vhost_ftlog::frontend::{Channel, ChannelConfig, Daemon, LogConsumer, SpawnConfig};

use super::Failure;
use super::series::{Series, histogram, record};
use super::world::{PATIENCE, Setup, World, params};
use crate::monotonic::Moment;

/// Kills of each size in a run.
const KILLS: u32 = 3;
/// How often the process that is to be killed adds an entry.
const ENTRY_EVERY: Duration = Duration::from_millis(1);

/// How a process that is to be killed finds its place.
#[derive(Debug, clap::Args)]
pub(crate) struct MemberOptions {
    /// The daemon's program.
    #[arg(long)]
    ftlog: PathBuf,
    /// The daemon's socket.
    #[arg(long)]
    socket: PathBuf,
    /// The daemon's key.
    #[arg(long)]
    key_file: PathBuf,
    /// The session to open.
    #[arg(long)]
    session: u64,
    /// The peer's daemon.
    #[arg(long)]
    peer: SocketAddr,
    /// Who looks for the end of a plain connection.
    #[arg(long)]
    watcher: SocketAddr,
    /// GiB to touch.
    #[arg(long)]
    gib: u64,
}

/// Kills processes of these sizes.
pub(super) fn told(world: &World, sizes: &[u64], series: &mut Series) -> Result<(), Failure> {
    for gib in sizes {
        let (mut told, mut eof) = (histogram(), histogram());
        for _ in 0..KILLS {
            let (told_ns, eof_ns) = kill_one(world, *gib)?;
            record(&mut told, told_ns);
            record(&mut eof, eof_ns);
        }
        let baseline = if *gib == 1 {
            "socket_eof_1gib"
        } else {
            "socket_eof_4gib"
        };
        series
            .times(&format!("vmm_death_told_{gib}gib"), told)
            .against(baseline)
            .noted("SIGKILL to END delivered to the backup's VMM");
        series.times(&format!("socket_eof_{gib}gib"), eof);
    }
    Ok(())
}

/// From the kill to the delivery of `END`, and to the end of a plain connection.
fn kill_one(world: &World, gib: u64) -> Result<(u64, u64), Failure> {
    let session = world.next_session();
    let mut backup = world.backup(session, Setup::default())?;
    let watcher = world.b.run(|| TcpListener::bind(world.address_b(0)))?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("channel-member")
        .arg("--ftlog")
        .arg(world.ftlog())
        .arg("--socket")
        .arg(world.path(&format!("a{session}.sock")))
        .arg("--key-file")
        .arg(world.path("key"))
        .args(["--session", &session.to_string()])
        .args(["--peer", &backup.address()?.to_string()])
        .args(["--watcher", &watcher.local_addr()?.to_string()])
        .args(["--gib", &gib.to_string()])
        // Ctrl-C ends the bench; its processes go with it.
        .process_group(0);
    let mut victim = world.a.spawn(&mut command)?;
    victim.wait_for_line("ready")?;
    backup.wait_connected()?;
    let (plain, _) = watcher.accept()?;
    let consumer = &mut backup.session.consumer;
    let (killed, told, eof) = std::thread::scope(|scope| {
        let told = scope.spawn(|| world.b.run(|| wait_end(consumer)));
        let eof = scope.spawn(|| world.b.run(|| wait_eof(plain)));
        // In the middle of its work.
        std::thread::sleep(50 * ENTRY_EVERY);
        let killed = Moment::now();
        let signalled = victim.signal(Signal::KILL);
        (signalled.map(|()| killed), told.join(), eof.join())
    });
    let killed = killed?;
    let told = told.map_err(|_| "the consumer panicked")??;
    let eof = eof.map_err(|_| "the watcher panicked")??;
    victim.wait()?;
    Ok((told.since(killed), eof.since(killed)))
}

fn wait_end(consumer: &mut LogConsumer) -> Result<Moment, Failure> {
    let start = Moment::now();
    while Moment::now().since(start) < PATIENCE.as_nanos() as u64 {
        while let Some(frame) = consumer.next_frame()? {
            if frame.header.flags.contains(FrameFlags::END) {
                return Ok(Moment::now());
            }
        }
        consumer.release();
        consumer.wait(Duration::ZERO, Some(Duration::from_millis(100)))?;
    }
    Err("the log has not ended".into())
}

fn wait_eof(mut plain: TcpStream) -> Result<Moment, Failure> {
    plain.set_read_timeout(Some(PATIENCE))?;
    // A reset says the same.
    match plain.read(&mut [0; 1]) {
        Ok(0) | Err(_) => Ok(Moment::now()),
        Ok(_) => Err("bytes from a process that sends none".into()),
    }
}

/// The body of the process.
pub(crate) fn member(options: &MemberOptions) -> Result<Infallible, Failure> {
    let memory = touch(options.gib)?;
    let config = ChannelConfig {
        daemon: Daemon::Spawn(SpawnConfig {
            program: options.ftlog.clone(),
            socket: options.socket.clone(),
            args: vec![
                "--key-file".to_owned(),
                options.key_file.display().to_string(),
            ],
        }),
        arena: ring::ArenaConfig::default(),
        tuning: Tuning::default(),
    };
    let (channel, _events) = Channel::start(config)?;
    let params = params(options.session, Role::Sender, Reach::Dial(options.peer));
    let mut session = channel.open(params, Seq(0))?;
    let _plain = TcpStream::connect(options.watcher)?;
    println!("ready");
    let entry = [7; 64];
    loop {
        let seq = session.producer.append_urgent(&entry)?;
        let upto = seq.ok_or("a log of one entry is full")?.next();
        if !session.acks.wait(upto, Duration::ZERO, Some(PATIENCE))? {
            return Err("no acknowledgement".into());
        }
        std::thread::sleep(ENTRY_EVERY);
        std::hint::black_box(&memory);
    }
}

/// Memory of ordinary pages, all touched.
#[allow(unsafe_code)] // Maps memory of a page size of its own.
fn touch(gib: u64) -> Result<*mut u8, Failure> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    let len = usize::try_from(gib << 30)?;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing, and this process keeps
    // it until it is killed.
    unsafe {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let start = mmap_anonymous(std::ptr::null_mut(), len, rights, flags)?;
        madvise(start, len, Advice::LinuxNoHugepage)?;
        for page in (0..len).step_by(4096) {
            start.cast::<u8>().add(page).write_volatile(1);
        }
        Ok(start.cast())
    }
}
