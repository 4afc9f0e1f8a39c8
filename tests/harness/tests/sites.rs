//! Switches, and hosts as homes of processes.
#![allow(clippy::unwrap_used)] // all of it is tests

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use harness::{Host, Port, Switch, privileges, wait_until};
use rustix::process::Signal;

fn plugged(switch: &Switch, last: u8) -> (Host, Port, Ipv4Addr) {
    let host = Host::new().unwrap();
    let port = switch.plug(&host, "lan0").unwrap();
    let address = Ipv4Addr::new(10, 79, 0, last);
    port.assign(address).unwrap();
    (host, port, address)
}

fn reaches(from: &Host, to: &Host, address: Ipv4Addr) -> bool {
    let address = SocketAddr::from((address, 7000));
    let listener = to.run(|| TcpListener::bind(address)).unwrap();
    let Ok(mut client) =
        from.run(|| TcpStream::connect_timeout(&address, Duration::from_millis(200)))
    else {
        return false;
    };
    client.write_all(b"over the switch").unwrap();
    drop(client);
    let mut got = String::new();
    listener
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut got)
        .unwrap();
    got == "over the switch"
}

#[test]
fn a_switch_joins_its_hosts_until_a_cable_is_pulled() {
    if !privileges::root("a_switch_joins_its_hosts_until_a_cable_is_pulled") {
        return;
    }
    let switch = Switch::new().unwrap();
    let (a, port_a, _) = plugged(&switch, 1);
    let (b, _port_b, address_b) = plugged(&switch, 2);
    let (c, _port_c, _) = plugged(&switch, 3);
    port_a.enable_gro().unwrap();
    wait_until("both to reach b", || {
        reaches(&a, &b, address_b) && reaches(&c, &b, address_b)
    })
    .unwrap();
    port_a.cut().unwrap();
    assert!(!reaches(&a, &b, address_b));
    wait_until("c to reach b still", || reaches(&c, &b, address_b)).unwrap();
    port_a.mend().unwrap();
    wait_until("a to reach b again", || reaches(&a, &b, address_b)).unwrap();
}

#[test]
fn a_tap_stays_a_port_of_its_bridge_without_a_process() {
    if !privileges::root("a_tap_stays_a_port_of_its_bridge_without_a_process") {
        return;
    }
    let host = Host::new().unwrap();
    host.disable_ipv6().unwrap();
    host.add_bridge("br0").unwrap();
    host.add_tap("tap0", "br0").unwrap();
    let show = host.command("ip", &["-d", "link", "show", "tap0"]).unwrap();
    assert!(
        show.contains("master br0") && show.contains("vnet_hdr on"),
        "{show}"
    );
    assert!(host.add_tap("tap0", "br0").is_err());
}

#[test]
fn all_processes_of_a_host_are_killed_and_no_others() {
    if !privileges::root("all_processes_of_a_host_are_killed_and_no_others") {
        return;
    }
    let (host, other) = (Host::new().unwrap(), Host::new().unwrap());
    // A daemon of its own session, that this test did not start itself.
    let script = "setsid sleep 1000 & exec sleep 1000";
    let mut shell = host.spawn(Command::new("sh").args(["-c", script])).unwrap();
    let bystander = other.spawn(Command::new("sleep").arg("1000")).unwrap();
    wait_until("both to be there", || host.processes().unwrap().len() == 2).unwrap();
    assert_eq!(other.processes().unwrap(), [bystander.pid()]);
    wait_until("both to run sleep", || {
        host.signal_program("sleep", Signal::CONT).unwrap() == 2
    })
    .unwrap();
    assert_eq!(host.signal_program("slee", Signal::KILL).unwrap(), 0);
    host.kill_all().unwrap();
    assert!(!shell.wait().unwrap().success());
    assert!(host.processes().unwrap().is_empty());
    assert_eq!(other.processes().unwrap(), [bystander.pid()]);
}
