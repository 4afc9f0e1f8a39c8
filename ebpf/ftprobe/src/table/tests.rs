//! Who may join, what an exit means, which session gives way; with the userspace backend.

use std::process::{Child, Command};

use heartbeat::Responder;
use heartbeat::protocol::{ExitWatch, ResponderKind, VERSION};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::*;
use crate::userspace::Userspace;

fn table() -> Table {
    let responder = Responder::userspace("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let abilities = Abilities {
        version: VERSION,
        responder: ResponderKind::Userspace,
        responder_reason: String::new(),
        exit_watch: ExitWatch::Pidfd,
        departures: false,
        port: responder.local_addr().port(),
        interface: "lo".to_owned(),
    };
    Table::new(Box::new(Userspace::new(responder, abilities)))
}

/// A process that joins; killed and reaped at the end of the test.
struct Joiner(Child);

impl Joiner {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn join(&self, table: &mut Table, session: u64, role: Role) -> Result<usize, RefusalCode> {
        let pidfd = pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty()).unwrap();
        let joined = table.join(session, 1, role, self.0.id(), pidfd);
        joined
            .map(|pages| pages.len())
            .map_err(|refusal| refusal.code)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Joiner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn local(table: &Table, session: u64) -> (bool, bool) {
    let status = table.status();
    let of = status
        .sessions
        .iter()
        .find(|s| s.session == session)
        .unwrap();
    (of.vmm_dead, of.daemon_dead)
}

#[test]
fn a_role_belongs_to_one_living_process() {
    let mut table = table();
    let (a, b) = (Joiner::start(), Joiner::start());
    assert_eq!(a.join(&mut table, 1, Role::Vmm), Ok(2));
    assert_eq!(
        a.join(&mut table, 1, Role::Vmm),
        Ok(2),
        "the same process may ask again"
    );
    assert_eq!(
        b.join(&mut table, 1, Role::Vmm),
        Err(RefusalCode::RoleTaken)
    );
    assert_eq!(b.join(&mut table, 1, Role::Daemon), Ok(1));
    assert_eq!(
        b.join(&mut table, 2, Role::Daemon),
        Ok(1),
        "a daemon may serve several sessions"
    );
}

#[test]
fn an_exit_ends_a_vmm_for_good_and_a_daemon_until_the_next() {
    let mut table = table();
    let (mut vmm, mut daemon) = (Joiner::start(), Joiner::start());
    vmm.join(&mut table, 1, Role::Vmm).unwrap();
    daemon.join(&mut table, 1, Role::Daemon).unwrap();
    assert_eq!(local(&table, 1), (false, false));
    vmm.kill();
    daemon.kill();
    table.reap();
    assert_eq!(local(&table, 1), (true, true));
    assert_eq!(table.pidfds().count(), 0, "nobody is left to wait for");

    let next = Joiner::start();
    assert_eq!(
        next.join(&mut table, 1, Role::Vmm),
        Err(RefusalCode::RoleTaken)
    );
    assert_eq!(next.join(&mut table, 1, Role::Daemon), Ok(1));
    assert_eq!(local(&table, 1), (true, false));
}

#[test]
fn a_process_that_exits_before_it_has_joined_is_dead_at_once() {
    let mut table = table();
    let mut joiner = Joiner::start();
    let pidfd = pidfd_open(Pid::from_child(&joiner.0), PidfdFlags::empty()).unwrap();
    let pid = joiner.0.id();
    joiner.kill();
    table.join(1, 1, Role::Vmm, pid, pidfd).unwrap();
    assert_eq!(local(&table, 1), (true, false));
}

#[test]
fn the_oldest_session_without_a_living_process_gives_way_then_the_oldest_without_a_vmm() {
    let mut table = table();
    let living = Joiner::start();
    let mut dying = Joiner::start();
    for session in 0..MAX_SESSIONS as u64 {
        let (joiner, role) = match session {
            3 | 5 => (&dying, Role::Vmm),
            1 => (&living, Role::Daemon),
            _ => (&living, Role::Vmm),
        };
        joiner.join(&mut table, session, role).unwrap();
    }
    let open = |table: &Table| -> Vec<u64> {
        let sessions = table.status().sessions;
        sessions.iter().map(|s| s.session).collect()
    };
    dying.kill();
    for (new, gone) in [(100, 3), (101, 5), (102, 1)] {
        assert!(open(&table).contains(&gone));
        assert_eq!(living.join(&mut table, new, Role::Vmm), Ok(2));
        assert!(!open(&table).contains(&gone), "{:?}", open(&table));
    }
    assert_eq!(
        living.join(&mut table, 103, Role::Vmm),
        Err(RefusalCode::Full)
    );
}

#[test]
fn epochs_only_grow_and_keys_need_a_session() {
    let mut table = table();
    let joiner = Joiner::start();
    joiner.join(&mut table, 1, Role::Vmm).unwrap();
    table.set_epoch(1, 7).unwrap();
    table.set_epoch(1, 6).unwrap();
    assert_eq!(table.status().sessions[0].epoch, 7);
    let keys = SessionKeys::derive(b"x", 1, KeyGeneration(1), ebpf_events::Side::Listener);
    table.set_keys(1, KeyGeneration(1), keys.clone()).unwrap();
    assert_eq!(table.status().sessions[0].generations, [1]);
    let unknown = table.set_keys(2, KeyGeneration(1), keys).unwrap_err();
    assert_eq!(unknown.code, RefusalCode::UnknownSession);
    table.close(1).unwrap();
    assert_eq!(
        table.close(1).unwrap_err().code,
        RefusalCode::UnknownSession
    );
    assert!(table.status().sessions.is_empty());
}
