//! Guests that send each other datagrams, joined in memory: which way these go, what is counted, limited and captured, and what is
//! left when one of them is killed.

mod common;

use std::io::Write as _;
use std::net::UdpSocket;
use std::time::Instant;

use common::peer::Peer;
use common::{Engine, Place, WATCHDOG, until};

/// A guest on the shared-memory stack.
fn peer(place: &Place, options: &[&str], args: &[&str]) -> Peer {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/shm/datagrams.py");
    let mut command = place.netkernel(&["run", "--stack", "shm"]);
    command.args(options).args(["--", "python3", script]).args(args);
    Peer::of(command)
}

/// An engine with the stack `shm`, and what else the configuration says.
fn up(place: &Place, more: &str) -> Engine {
    let text = format!("{more}\n[[nsm]]\nname = \"shm\"\nstack = \"shm\"\n");
    place.up(&["--config", place.file("engine.toml", &text).to_str().unwrap()])
}

fn explained(place: &Place) -> String {
    place.run(&["explain"]).out
}

fn resident_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The line of the guest's datagram socket.
#[track_caller]
fn datagram_line(place: &Place, what: &str) -> String {
    let explained = explained(place);
    let line = explained.lines().find(|line| line.contains(what));
    line.unwrap_or_else(|| panic!("no {what:?} in {explained}")).to_owned()
}

#[test]
fn datagrams_between_guests_go_by_memory() {
    for threads in ["1", "2"] {
        let place = Place::new(&format!("shm-datagrams-{threads}"));
        let engine = up(&place, &format!("[engine]\nswitch_threads = {threads}"));
        let server = peer(&place, &["--name", "server"], &["echo"]);
        let port = server.told("port");
        let mut client = peer(&place, &["--name", "client"], &["asker", &port, "200"]);
        let bytes = client.told("asked");
        datagram_line(&place, "reached in memory (200 sent, 200 received, 0 dropped)");
        // Counted once for each side.
        let ps = place.run(&["ps", "--json"]).json();
        let guests = ps["engines"][0]["guests"].as_array().unwrap();
        for name in ["server", "client"] {
            let guest = guests.iter().find(|guest| guest["name"] == name).unwrap();
            for counter in ["bytes_in", "bytes_out"] {
                assert_eq!(guest[counter].to_string(), bytes, "{counter} of {guest}");
            }
        }
        // A native is served by the same socket.
        let native = UdpSocket::bind("127.0.0.1:0").unwrap();
        native.set_read_timeout(Some(WATCHDOG)).unwrap();
        native.send_to(b"native", ("127.0.0.1", port.parse().unwrap())).unwrap();
        let mut into = [0; 9];
        assert_eq!(native.recv(&mut into).unwrap(), 6);
        datagram_line(
            &place,
            "(200 sent, 200 received, 0 dropped), all others by the fallback stack; so was the last one sent",
        );
        let listed = place.run(&["ss"]).out;
        assert!(listed.contains(&port), "{listed}");
        assert_eq!(client.ask("once more"), "once more");
        // Whoever is killed is nobody.
        drop(server);
        until("the port is free", || UdpSocket::bind(("127.0.0.1", port.parse::<u16>().unwrap())).is_ok());
        assert_eq!(client.ask("gone"), "ECONNREFUSED");
        drop(client);
        until("both guests are over", || !explained(&place).contains("guest "));
        engine.end();
    }
}

#[test]
fn a_guest_that_does_not_read_datagrams_holds_nobody_up() {
    let place = Place::new("shm-datagrams-full");
    let engine = up(&place, "");
    let mut silent = peer(&place, &[], &["silent"]);
    let port = silent.told("port");
    let before = resident_kib(engine.pid());
    let mut flood = peer(&place, &[], &["flood", &port]);
    flood.told("flooding");
    let lost = || !datagram_line(&place, "(0 sent").contains(" 0 dropped");
    until("some are lost", lost);
    let during = resident_kib(engine.pid());
    assert!(during < before + 8192, "{before} KiB before, {during} KiB while it is flooded");
    // What waits is there when its sender is not.
    flood.kill();
    until("it is over", || explained(&place).matches("guest ").count() == 1);
    writeln!(silent.stdin).unwrap();
    let came = silent.told("came");
    let (count, whole) = came.split_once(' ').unwrap();
    assert_eq!(whole, "True", "{came}");
    assert!((100..10_000).contains(&count.parse().unwrap()), "{came}");
    drop(silent);
    until("all guests are over", || !explained(&place).contains("guest "));
    engine.end();
}

#[test]
fn datagrams_of_another_tenant_go_by_the_kernel() {
    let place = Place::new("shm-datagrams-tenant");
    let token = place.file("token", "blue-token-of-thirty-two-characters\n").display().to_string();
    let engine = up(&place, &format!("[[tenant]]\nname = \"blue\"\ntoken_file = \"{token}\""));
    let server = peer(&place, &[], &["echo"]);
    let port = server.told("port");
    let blue = peer(&place, &["--tenant-token", &token], &["asker", &port, "50"]);
    blue.told("asked");
    let line =
        datagram_line(&place, "so was the last one sent: the receiver's guest belongs to another tenant");
    assert!(line.contains("(0 sent, 0 received, 0 dropped)"), "{line}");
    let own = peer(&place, &[], &["asker", &port, "50"]);
    own.told("asked");
    datagram_line(&place, "(50 sent, 50 received, 0 dropped)");
    drop((server, blue, own));
    engine.end();
}

/// The engine has every datagram in its hands, so that a capture sees those between guests, too.
#[test]
fn datagrams_in_memory_are_captured() {
    let place = Place::new("shm-datagrams-captured");
    let engine = up(&place, "");
    let server = peer(&place, &[], &["echo"]);
    let mut client = peer(&place, &[], &["asker", &server.told("port"), "10"]);
    client.told("asked");
    let file = place.dir.join("client.pcapng");
    let capture = place.netkernel(&["pcap", "2", "-w", file.to_str().unwrap()]).spawn().unwrap();
    let capture = Engine::of(capture);
    until("the capture began", || std::fs::metadata(&file).is_ok_and(|file| file.len() > 0));
    assert_eq!(client.ask("a-word-of-its-own"), "a-word-of-its-own");
    let seen = || {
        let bytes = std::fs::read(&file).unwrap();
        bytes.windows(17).filter(|window| window == b"a-word-of-its-own").count()
    };
    until("both directions are in the capture", || seen() == 2);
    capture.end();
    datagram_line(&place, "(11 sent, 11 received, 0 dropped)");
    drop((server, client));
    engine.end();
}

/// What a tenant may send is the engine's to say, whatever way it goes.
#[test]
fn datagrams_of_a_limited_tenant_are_limited_in_memory() {
    const RATE: f64 = 1e6;
    let place = Place::new("shm-datagrams-limited");
    let token = place.file("token", "slow-token-of-thirty-two-characters\n").display().to_string();
    let tenant = format!("[[tenant]]\nname = \"slow\"\ntoken_file = \"{token}\"\nmax_send = \"8 Mbit/s\"");
    let engine = up(&place, &tenant);
    let token = ["--tenant-token", &token];
    let silent = peer(&place, &token, &["silent"]);
    let mut flood = peer(&place, &token, &["flood", &silent.told("port")]);
    flood.told("flooding");
    let sent = || {
        let ps = place.run(&["ps", "--json"]).json();
        let guests = ps["engines"][0]["guests"].as_array().unwrap().clone();
        guests.iter().map(|guest| guest["bytes_out"].as_f64().unwrap()).sum::<f64>()
    };
    let (begin, before) = (Instant::now(), sent());
    until("half a megabyte is sent", || sent() > before + 5e5);
    let (bytes, seconds) = (sent() - before, begin.elapsed().as_secs_f64());
    // What the bucket holds passes at once.
    assert!(bytes < 1.2 * RATE * seconds + 1e5, "{bytes} bytes in {seconds} s");
    let way = datagram_line(&place, " 0 received, 0 dropped)");
    assert!(!way.contains("(0 sent"), "{way}");
    flood.kill();
    drop(silent);
    engine.end();
}
