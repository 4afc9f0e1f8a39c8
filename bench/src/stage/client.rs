//! The client: checks every answer of the guest's Redis server, from a host that knows nothing of the VMMs.

use std::net::TcpStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use harness::Host;

use super::{GUEST_REDIS, Patience};
use crate::Failure;
use crate::kv_check::{KvError, Live, Options, Outcome, check_server};

/// How long a try to connect may take.
const TRY: Duration = Duration::from_millis(500);

/// See the module. Ended when it goes out of scope.
pub(crate) struct Client {
    live: Arc<Live>,
    thread: Option<JoinHandle<Result<Outcome, KvError>>>,
}

impl Client {
    /// Waits until the guest's server takes connections.
    pub(crate) fn wait_for_server(
        host: &Host,
        patience: &Patience,
        limit: Duration,
    ) -> Result<(), Failure> {
        patience.wait_until("the guest's Redis server", limit, || {
            Ok(host
                .run(|| TcpStream::connect_timeout(&GUEST_REDIS, TRY))
                .is_ok())
        })
    }

    /// Begins to check the server, until it is told to stop.
    pub(crate) fn start(host: &Host, options: Options) -> Self {
        let live = Arc::new(Live::new(options.connections));
        let (host, seen) = (host.clone(), Arc::clone(&live));
        let thread = std::thread::spawn(move || {
            host.enter()
                .map_err(|error| KvError::Host(error.to_string()))?;
            // Whoever waits for it may see only that it has ended.
            check_server(&options, &seen).inspect_err(|error| eprintln!("the client: {error}"))
        });
        Self {
            live,
            thread: Some(thread),
        }
    }

    /// How it stands.
    pub(crate) fn live(&self) -> &Live {
        &self.live
    }

    /// Fails if it has ended by itself.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match &self.thread {
            Some(thread) if thread.is_finished() => Err("the client has ended".into()),
            _ => Ok(()),
        }
    }

    /// Waits for this many more answers.
    pub(crate) fn wait_for_answers(
        &self,
        count: u64,
        patience: &Patience,
        limit: Duration,
    ) -> Result<(), Failure> {
        let wanted = self.live.answers() + count;
        patience.wait_until("answers", limit, || {
            self.check()?;
            Ok(self.live.answers() >= wanted)
        })
    }

    /// Waits until it has asked for as long as it was to.
    pub(crate) fn wait(mut self) -> Result<Outcome, Failure> {
        let thread = self.thread.take().ok_or("the client has ended")?;
        let outcome = thread.join().map_err(|_| "the client has panicked")?;
        Ok(outcome?)
    }

    /// Asks nothing more, waits for the last answers and checks them all.
    pub(crate) fn finish(self) -> Result<Outcome, Failure> {
        self.live.stop();
        self.wait()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.live.abort();
        if let Some(thread) = self.thread.take() {
            // What it found is of no interest any more.
            let _ = thread.join();
        }
    }
}
