//! The test hosts themselves.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use harness::{Host, Link, Process, Stream, privileges, wait_until};
use rustix::process::Signal;

fn exchange(address: SocketAddr, a: &Host, b: &Host) -> std::io::Result<Vec<u8>> {
    let listener = b.run(|| TcpListener::bind(address))?;
    let mut client = a.run(|| TcpStream::connect(address))?;
    client.write_all(b"over the wire")?;
    drop(client);
    let mut got = Vec::new();
    listener.accept()?.0.read_to_end(&mut got)?;
    Ok(got)
}

#[test]
fn linked_hosts_reach_each_other_and_nothing_else() {
    if !privileges::root("linked_hosts_reach_each_other_and_nothing_else") {
        return;
    }
    let (a, b) = (Host::new().unwrap(), Host::new().unwrap());
    let link = Link::between(&a, &b).unwrap();
    link.b.enable_gro().unwrap();
    for address in [
        SocketAddr::new(link.b.v4.into(), 7000),
        SocketAddr::new(link.b.v6.into(), 7000),
    ] {
        assert_eq!(exchange(address, &a, &b).unwrap(), b"over the wire");
        link.cut().unwrap();
        wait_until("the far end to notice", || !link.b.is_up()).unwrap();
        link.mend().unwrap();
    }
    let routes = a.command("ip", &["route"]).unwrap();
    assert!(!routes.contains("default"), "{routes}");
    assert!(a.command("ip", &["link", "show", "nowhere"]).is_err());
}

#[test]
fn processes_keep_to_their_cpu_and_end_with_their_guard() {
    if !privileges::root("processes_keep_to_their_cpu_and_end_with_their_guard") {
        return;
    }
    let host = Host::new().unwrap().on_cpu(1);
    let mut show = host
        .spawn(Command::new("grep").args(["Cpus_allowed_list", "/proc/self/status"]))
        .unwrap();
    assert!(show.wait().unwrap().success());
    show.wait_for_line("Cpus_allowed_list:\t1").unwrap();
    assert_eq!(show.printed(Stream::Error), "");

    let sleeper = host.spawn(Command::new("sleep").arg("1000")).unwrap();
    let proc = format!("/proc/{}", sleeper.pid());
    assert!(std::path::Path::new(&proc).exists());
    drop(sleeper);
    assert!(!std::path::Path::new(&proc).exists(), "killed and reaped");
}

#[test]
fn a_signal_reaches_its_process() {
    let mut sleeper = Process::spawn(Command::new("sleep").arg("1000")).unwrap();
    sleeper.signal(Signal::TERM).unwrap();
    assert!(!sleeper.wait().unwrap().success());
    assert!(sleeper.signal(Signal::TERM).is_err());
}
