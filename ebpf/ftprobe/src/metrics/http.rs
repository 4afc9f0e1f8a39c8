//! The least of HTTP that a scraper needs: `GET /metrics`, one request for each connection.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a request at most.
const MAX_REQUEST: usize = 8_192;
/// How long a client may take for its request, and to read the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Who may read metrics from the Unix socket: owner and group.
const SOCKET_MODE: u32 = 0o660;
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this machine only: metrics are not for the network.
    Loopback(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Ok(address) => Err(format!(
                "{address} can be reached from the network: use a loopback address such as \
                 127.0.0.1:9464, or unix:PATH"
            )),
            Err(_) => Err("use unix:PATH or a loopback address with a port".to_owned()),
        }
    }
}

enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// A serving thread; dropping it stops and joins it, and removes the socket.
pub struct Server {
    stop: Arc<AtomicBool>,
    local: Endpoint,
    /// The listening socket once more, to wake the thread by.
    listening: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens, and answers each request with what `text` gives.
    ///
    /// # Errors
    /// Whatever the system says; a socket that somebody listens at is in use.
    pub fn start(
        endpoint: &Endpoint,
        text: impl Fn() -> String + Send + 'static,
    ) -> io::Result<Self> {
        let (listener, local) = match endpoint {
            Endpoint::Unix(path) => (bind_unix(path)?, endpoint.clone()),
            Endpoint::Loopback(address) => {
                let listener = TcpListener::bind(address)?;
                let local = Endpoint::Loopback(listener.local_addr()?);
                (Listener::Tcp(listener), local)
            }
        };
        let listening = match &listener {
            Listener::Unix(listener, _) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        };
        let listening = listening.try_clone_to_owned()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || run(&listener, &stopped, &text))?;
        Ok(Self {
            stop,
            local,
            listening,
            thread: Some(thread),
        })
    }

    /// Where it listens; the port, if 0 was asked for, is filled in.
    pub const fn local(&self) -> &Endpoint {
        &self.local
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Ends the wait for clients. A connection would not do: the socket's directory may be gone.
        let woken = rustix::net::shutdown(&self.listening, rustix::net::Shutdown::Both);
        if let Err(error) = woken {
            tracing::error!(%error, "the thread that serves metrics goes on");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that serves metrics panicked");
        }
    }
}

fn bind_unix(path: &PathBuf) -> io::Result<Listener> {
    if path.exists() {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(Listener::Unix(listener, path.clone()))
}

fn run(listener: &Listener, stop: &AtomicBool, text: &dyn Fn() -> String) {
    loop {
        let result = match listener {
            Listener::Unix(listener, _) => listener.accept().and_then(|(stream, _)| {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                if stop.load(Ordering::Acquire) {
                    return Ok(());
                }
                answer(stream, text)
            }),
            Listener::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                if stop.load(Ordering::Acquire) {
                    return Ok(());
                }
                answer(stream, text)
            }),
        };
        if stop.load(Ordering::Acquire) {
            break;
        }
        if let Err(error) = result {
            tracing::debug!(%error, "a client of the metrics");
        }
    }
    if let Listener::Unix(_, path) = listener
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::warn!(path = %path.display(), %error, "socket not removed");
    }
}

fn answer(mut stream: impl Read + Write, text: &dyn Fn() -> String) -> io::Result<()> {
    let mut request = Vec::new();
    let mut piece = [0; 1_024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < MAX_REQUEST {
        let got = stream.read(&mut piece)?;
        if got == 0 {
            return Ok(());
        }
        request.extend_from_slice(&piece[..got]);
    }
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    let (method, path) = (words.next(), words.next().unwrap_or_default());
    let path = path.split(|b| *b == b'?').next().unwrap_or_default();
    let (status, kind, body) = match (method, path) {
        (Some(b"GET"), b"/metrics" | b"/") => ("200 OK", CONTENT_TYPE, text()),
        (Some(b"GET"), _) => ("404 Not Found", "text/plain", "see /metrics\n".to_owned()),
        _ => (
            "405 Method Not Allowed",
            "text/plain",
            "GET only\n".to_owned(),
        ),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body.as_bytes())?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    fn ask(stream: &mut (impl Read + Write), request: &str) -> String {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn only_this_machine_is_served() {
        for good in ["unix:/run/x", "127.0.0.1:9464", "[::1]:1"] {
            assert!(good.parse::<Endpoint>().is_ok(), "{good}");
        }
        for bad in [
            "0.0.0.0:9464",
            "10.0.0.1:9464",
            "[::]:9464",
            "unix:",
            "9464",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_server_ends_although_the_directory_of_its_socket_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix(directory.path().join("metrics"));
        let server = Server::start(&endpoint, String::new).unwrap();
        drop(directory);
        drop(server);
    }

    #[test]
    fn requests_are_answered_over_both_and_the_socket_goes_with_the_server() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics");
        let endpoint = Endpoint::Unix(path.clone());
        let server = Server::start(&endpoint, || "a 1\n# EOF\n".to_owned()).unwrap();
        assert!(Server::start(&endpoint, String::new).is_err(), "in use");
        let mut stream = UnixStream::connect(&path).unwrap();
        let answer = ask(&mut stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\na 1\n# EOF\n"), "{answer}");
        drop(server);
        assert!(!path.exists());

        let any = "127.0.0.1:0".parse().unwrap();
        let server = Server::start(&any, String::new).unwrap();
        let Endpoint::Loopback(address) = server.local().clone() else {
            panic!("a loopback address was asked for");
        };
        for (request, status) in [
            ("GET /x HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("nonsense\r\n\r\n", "405"),
        ] {
            let mut stream = TcpStream::connect(address).unwrap();
            let answer = ask(&mut stream, request);
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{answer}"
            );
        }
    }
}
