//! Relay attachment: the same program, natively and in a relay, must say the same. Network: loopback.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::{Done, Engine, Place, WATCHDOG, finish, lines, until};

const PROGRAM: &str = include_str!("relay/program.c");

struct Program {
    place: Place,
    path: PathBuf,
}

fn program(name: &str) -> Program {
    let place = Place::new(&format!("relay-{name}"));
    let path = place.program("program", PROGRAM, &["-O1", "-static", "-pthread"]);
    Program { place, path }
}

impl Program {
    fn natively(&self, arguments: &[&str]) -> Done {
        let mut command = Command::new(&self.path);
        command.args(arguments).stdin(Stdio::null());
        finish(command)
    }

    fn relayed(&self, options: &[&str], arguments: &[&str]) -> Done {
        let path = self.path.to_str().unwrap();
        self.place.run(&[&["run", "--attach", "relay"], options, &["--", path], arguments].concat())
    }

    /// Started with its standard input held; the first lines that it prints can be read.
    fn start(&self, options: &[&str], arguments: &[&str]) -> Child {
        let mut command = self.place.netkernel(&[&["run", "--attach", "relay"], options, &["--"]].concat());
        command.arg(&self.path).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    }
}

fn same(case: &str) {
    let p = program(case);
    let native = p.natively(&[case]);
    assert!(!native.succeeds().out.is_empty());
    assert_eq!(p.relayed(&[], &[case]).succeeds().out, native.out);
}

#[test]
fn names_options_and_half_closes_are_those_of_inet_sockets() {
    same("names");
}

#[test]
fn a_refused_connect_is_seen_by_who_polls_and_who_waits() {
    same("refused");
}

#[test]
fn a_reset_is_seen_behind_the_data_and_made_by_what_is_unread() {
    same("reset");
}

#[test]
fn signals_interrupt_calls_that_wait_for_the_relay() {
    same("signals");
}

#[test]
fn datagrams_keep_their_bounds_and_their_senders() {
    same("datagrams");
}

#[test]
fn bytes_are_kept_in_both_directions_at_once() {
    same("bulk");
}

#[test]
fn what_a_relay_does_not_serve_is_refused_and_a_flood_meets_the_programs_own_limit() {
    let p = program("flood");
    let done = p.relayed(&["--stack", "reno"], &["raw", "cc", "flood", "names"]);
    let native = p.natively(&["names"]);
    assert_eq!(done.succeeds().out, format!("raw {}\ncc reno\nflood 1 1\n{}", libc::EPERM, native.out));
}

#[test]
fn descriptors_that_change_under_a_call_hurt_nobody() {
    let p = program("race");
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let engine = p.place.up(&["--socket", socket]);
    let mut child = p.start(&["--socket", socket], &["race", "wait", "names"]);
    // Another guest, meanwhile.
    let done = p.relayed(&["--socket", socket], &["names", "datagrams"]);
    assert_eq!(done.succeeds().out, p.natively(&["names", "datagrams"]).out);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "raced");
    drop(child.stdin.take());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(rest.join("\n") + "\n", p.natively(&["names"]).out);
    assert!(child.wait().unwrap().success());
    let explain = || p.place.run(&["explain", "--socket", socket]).out;
    until("all guests are over", || !explain().contains("guest"));
    engine.end();
}

#[test]
fn explain_names_each_relayed_socket_and_a_dead_program_leaves_nothing() {
    let p = program("explain");
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let engine = p.place.up(&["--socket", socket]);
    let mut child = p.start(&["--socket", socket, "--stack", "reno"], &["echo"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let port: u16 = lines.next().unwrap().unwrap().strip_prefix("listen ").unwrap().parse().unwrap();
    let mut peer = TcpStream::connect(("127.0.0.1", port)).unwrap();
    peer.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    peer.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    peer.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    let pid = child.id().to_string();
    let explain = |more: &[&str]| p.place.run(&[&["explain", "--socket", socket], more].concat()).out;
    let text = explain(&[&pid]);
    assert!(text.contains("stack reno, attachment relay"), "{text}");
    assert!(text.contains("given by relay 2, refused 0"), "{text}");
    let local = peer.local_addr().unwrap();
    assert!(text.contains(&format!("-> {local}: connected, relay: the guest has no preloaded")), "{text}");
    assert!(text.contains(&format!("reno, 5 bytes in, 5 bytes out, held by pid {pid}")), "{text}");
    assert!(text.contains("listening, relay"), "{text}");

    // Something unread, and the program is killed: the peer sees a reset, as on Linux.
    child.kill().unwrap();
    child.wait().unwrap();
    let mut rest = Vec::new();
    let _ = peer.read_to_end(&mut rest);
    assert!(rest.is_empty());
    until("the guest is over", || !explain(&[]).contains("guest"));
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "the listener is gone");
    engine.end();
}

#[test]
fn an_engine_that_dies_ends_relayed_sockets_and_no_call_waits() {
    let p = program("dies");
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let engine = p.place.up(&["--socket", socket]);
    let mut child = p.start(&["--socket", socket], &["echo", "wait", "socket"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let port: u16 = lines.next().unwrap().unwrap().strip_prefix("listen ").unwrap().parse().unwrap();
    let mut peer = TcpStream::connect(("127.0.0.1", port)).unwrap();
    peer.write_all(b"hello").unwrap();
    peer.read_exact(&mut [0; 5]).unwrap();
    engine.signal(libc::SIGKILL);
    let _ = engine.wait();
    let over = lines.next().unwrap().unwrap();
    assert!(over == "over 0 0" || over == format!("over -1 {}", libc::ECONNRESET), "{over}");
    drop(child.stdin.take());
    assert_eq!(lines.next().unwrap().unwrap(), format!("socket -{}", libc::ENETDOWN));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_guest_that_never_reads_takes_bounded_memory_and_disturbs_nobody() {
    let p = program("greedy");
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let engine = p.place.up(&["--socket", socket]);
    // `wait` is no reader: the connection is accepted by the stack and never by the program.
    let mut child = p.start(&["--socket", socket], &["echo"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let port: u16 = lines.next().unwrap().unwrap().strip_prefix("listen ").unwrap().parse().unwrap();
    let mut peer = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // The echo is not taken: program, relay and stack fill up, and the writer is stopped.
    peer.set_write_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
    let mut written = 0;
    while let Ok(n) = peer.write(&[7; 65536]) {
        written += n;
        assert!(written < 1 << 30, "nobody stops the writer");
    }
    // Another guest is served meanwhile.
    let path = p.path.to_str().unwrap();
    let other =
        p.place.run(&["run", "--attach", "relay", "--socket", socket, "--", path, "names", "datagrams"]);
    assert_eq!(other.succeeds().out, p.natively(&["names", "datagrams"]).out);
    // All of it comes back once it is read.
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    peer.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let (mut read, mut buffer) = (0, vec![0; 1 << 16]);
    while read < written {
        let n = peer.read(&mut buffer).unwrap();
        assert!(n > 0 && buffer[..n].iter().all(|&b| b == 7), "after {read} of {written}");
        read += n;
    }
    assert_eq!(peer.read(&mut buffer).unwrap(), 0);
    assert!(child.wait().unwrap().success());
    engine.end();
}

/// Says when it is about to wait, and how that ended.
const WAITS: &str = "
import socket, sys
print('go', flush=True)
try:
    socket.socket().connect(('127.0.0.1', int(sys.argv[1])))
    print('connected')
except OSError as error:
    print(error.errno, flush=True)
";

#[test]
fn a_call_that_waits_ends_with_the_engine() {
    let place = Place::new("relay-waits");
    // Nobody accepts, and there is room for one.
    let full = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: plain system call on an open descriptor.
    assert_eq!(unsafe { libc::listen(full.as_raw_fd(), 0) }, 0);
    let address = full.local_addr().unwrap();
    let _first = TcpStream::connect(address).unwrap();
    let socket = place.socket();
    let socket = socket.to_str().unwrap();
    let engine = place.up(&["--socket", socket]);
    let port = address.port().to_string();
    let mut child = Engine::of(
        place
            .netkernel(&["run", "--socket", socket, "--attach", "relay", "--", "python3", "-c", WAITS, &port])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let lines = lines(child.child().stdout.take().unwrap());
    assert_eq!(lines.recv_timeout(WATCHDOG).unwrap(), "go");
    let notified = format!("/proc/{}/wchan", child.pid());
    until("it waits for the agent", || std::fs::read_to_string(&notified).unwrap().contains("notification"));
    // Not only until the call was received.
    std::thread::sleep(std::time::Duration::from_millis(50));
    engine.signal(libc::SIGKILL);
    let _ = engine.wait();
    assert_eq!(lines.recv_timeout(WATCHDOG).unwrap(), libc::ENETDOWN.to_string());
}
