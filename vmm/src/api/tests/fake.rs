//! A session that does what a test says, and remembers what it was asked.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};

use super::super::{
    Control, EventLog, Refused, Reply, Request, Server, StatusReport, Subscription,
};

/// The session.
#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) log: EventLog,
    pub(crate) report: Mutex<StatusReport>,
    pub(crate) asked: Mutex<Vec<Request>>,
    /// The next answers, the last first; a plain one where there are none.
    pub(crate) answers: Mutex<Vec<Result<Reply, Refused>>>,
    gate: Mutex<Gate>,
    moved: Condvar,
}

#[derive(Default)]
struct Gate {
    shut: bool,
    waiting: usize,
}

impl Fake {
    /// From now on commands wait, or no longer.
    pub(crate) fn shut(&self, shut: bool) {
        self.gate.lock().unwrap().shut = shut;
        self.moved.notify_all();
    }

    /// Waits until so many commands wait.
    pub(crate) fn wait_for(&self, waiting: usize) {
        let gate = self.gate.lock().unwrap();
        let gate = self.moved.wait_while(gate, |gate| gate.waiting < waiting);
        drop(gate.unwrap());
    }
}

impl Control for Fake {
    fn status(&self) -> StatusReport {
        self.report.lock().unwrap().clone()
    }

    fn command(&self, request: Request) -> Result<Reply, Refused> {
        assert_ne!(
            request,
            Request::HostGone("panic".parse().unwrap()),
            "as told"
        );
        self.asked.lock().unwrap().push(request.clone());
        let mut gate = self.gate.lock().unwrap();
        gate.waiting += 1;
        self.moved.notify_all();
        gate = self.moved.wait_while(gate, |gate| gate.shut).unwrap();
        gate.waiting -= 1;
        drop(gate);
        let answer = self.answers.lock().unwrap().pop();
        answer.unwrap_or_else(|| Ok(Reply::new(format!("{request:?}"))))
    }

    fn subscribe(&self) -> Subscription {
        self.log.subscribe()
    }

    fn metrics(&self) -> String {
        "# TYPE pollux_epoch gauge\npollux_epoch 7\n".to_owned()
    }
}

/// A served fake.
pub(crate) struct Served {
    pub(crate) fake: Arc<Fake>,
    pub(crate) path: PathBuf,
    pub(crate) server: Server,
    _dir: tempfile::TempDir,
}

pub(crate) fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let fake = Arc::new(Fake::default());
    let control: Arc<dyn Control> = Arc::clone(&fake) as _;
    Served {
        server: Server::start(&path, control).unwrap(),
        fake,
        path,
        _dir: dir,
    }
}
