//! Guests that are put on an NSM in a process of its own, and back, while they run.

mod common;

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use common::load::{LOAD, echo};
use common::program::static_program;
use common::python::{CONNECTED, Python};
use common::streams::{Guest, THOUSANDS, guests};
use common::{Engine, Place, children, until};

const CONFIG: &str = "\
[engine]\nusage = \"USAGE\"
[[nsm]]\nname = \"reno\"\ncongestion_control = \"reno\"
[[nsm]]\nname = \"memory\"\nstack = \"shm\"
[[nsm]]\nname = \"apart\"\nform = \"process\"\ncongestion_control = \"cubic\"
[[nsm]]\nname = \"other\"\nform = \"process\"\ncongestion_control = \"reno\"
[[nsm]]\nname = \"tight\"\nform = \"process\"\ncapacity_connections = 3
[[nsm]]\nname = \"narrow\"\ncapacity_connections = 3
[[tenant]]\nname = \"few\"\ntoken_file = \"TOKEN\"\nnsms = [\"reno\"]
";

fn up(place: &Place) -> Engine {
    let token = place.file("token", "token-of-a-tenant-that-may-use-few-stacks\n");
    let config = CONFIG.replace("USAGE", place.dir.join("usage.redb").to_str().unwrap());
    let config = config.replace("TOKEN", token.to_str().unwrap());
    let config = place.file("nk.toml", &config);
    place.up(&["--config", config.to_str().unwrap()])
}

fn control(guest: &mut Python, socket: &str) -> String {
    guest.run(&format!("say({socket}.getsockopt(6, 13, 16).strip(b'\\0').decode())"))
}

/// All places that a guest can be, each from each other one.
const WAYS: [&str; 7] = ["apart", "reno", "other", "apart", "other", "reno", "memory"];

#[test]
fn a_guest_goes_over_with_its_sockets_under_a_stream() {
    let place = Place::new("far");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    // Around: a bound datagram socket, a socket that nothing was done with, data that nobody read, one that lingers.
    let others = "u = socket.socket(type=2); u.bind(('127.0.0.1', 0)); f = socket.socket(); \
                  x = socket.create_connection(l.getsockname()); y, _ = l.accept(); x.sendall(b'unread'); \
                  x.setsockopt(1, 13, b'\\x01\\0\\0\\0\\x05\\0\\0\\0'); \
                  p = select.epoll(); p.register(l, 1); p.register(u, 1); say(1)";
    assert_eq!(guest.run(others), "1");
    let write = "import threading, hashlib; part = bytes(i * i % 251 for i in range(1 << 20)); \
                 t = threading.Thread(target=lambda: [c.sendall(part) for _ in range(150)]); t.start(); \
                 h = hashlib.sha256(); say(1)";
    assert_eq!(guest.run(write), "1");
    for i in 0..21 {
        let some = "say(sum(h.update(b) or len(b) for b in (a.recv(1 << 18) for _ in range(20))))";
        assert!(guest.run(some).parse::<u64>().unwrap() > 0);
        let to = WAYS[i % 7];
        let moved = place.run(&["guest", "move", "1", to]);
        assert!(
            moved.succeeds().out.contains(&format!("on stack {to}, with 7 sockets of it that went over")),
            "{}",
            moved.out
        );
    }
    place.run(&["guest", "move", "1", "apart"]).succeeds();
    let rest = "t2 = threading.Thread(target=lambda: (t.join(), c.shutdown(1))); t2.start(); \
                [h.update(b) for b in iter(lambda: a.recv(1 << 18), b'')]; w = hashlib.sha256(); \
                [w.update(part) for _ in range(150)]; say(h.digest() == w.digest())";
    assert_eq!(guest.run(rest), "True");
    // Old ones and new ones; what was unread; names; readiness.
    assert_eq!(control(&mut guest, "c"), "cubic");
    assert_eq!(
        guest.run("d = socket.create_connection(l.getsockname()); say(p.poll(10)[0][0] == l.fileno())"),
        "True"
    );
    assert_eq!(control(&mut guest, "d"), "cubic");
    assert_eq!(guest.run("b, _ = l.accept(); d.sendall(b'xyz'); say(b.recv(9))"), "b'xyz'");
    assert_eq!(control(&mut guest, "b"), "cubic");
    assert_eq!(guest.run("say(y.recv(9), y.getpeername() == x.getsockname())"), "b'unread' True");
    assert_eq!(guest.run("say(x.getsockopt(1, 13, 8))"), "b'\\x01\\x00\\x00\\x00\\x05\\x00\\x00\\x00'");
    assert_eq!(
        guest.run("u.sendto(b'1', u.getsockname()); say(p.poll(10)[0][0] == u.fileno(), u.recv(9))"),
        "True b'1'"
    );
    assert_eq!(guest.run("f.connect(l.getsockname()); g, _ = l.accept(); f.close(); say(g.recv(1))"), "b''");
    assert_eq!(guest.run("x.close(); say(y.recv(1))"), "b''");
    // A program that begins now.
    let child = "import subprocess; code = 'import socket; l = socket.create_server((\"127.0.0.1\", 0)); c = socket.create_connection(l.getsockname()); print(c.getsockopt(6, 13, 16)[:5])'; \
                 say(subprocess.run(['python3', '-c', code], capture_output=True).stdout)";
    assert_eq!(guest.run(child), "b\"b'cubic'\\n\"");
    // Who is asked says where it is.
    let ps = place.run(&["ps", "--json"]).json();
    assert_eq!(ps["engines"][0]["guests"][0]["stack"], "apart", "{ps}");
    let sockets = place.run(&["sockets", "--json"]).json();
    assert!(sockets["sockets"].as_array().unwrap().iter().all(|s| s["stack"] == "apart"), "{sockets}");
    guest.ends();
    until("nothing of it is left", || {
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
    });
    engine.end();
}

/// Rows of `usage --by nsm`: name and bytes sent.
fn used(place: &Place) -> Vec<(String, u64)> {
    let all = place.run(&["usage", "--by", "nsm", "--format", "json"]).json();
    let row = |row: &serde_json::Value| {
        (row["nsm"].as_str().unwrap().to_owned(), row["bytes_out"].as_u64().unwrap())
    };
    let mut rows: Vec<_> = all.as_array().unwrap().iter().map(row).collect();
    rows.retain(|(_, bytes)| *bytes > 0);
    rows.sort();
    rows
}

/// Waits until the rows say so.
#[track_caller]
fn used_will_be(place: &Place, expected: &[(&str, u64)]) {
    let expected: Vec<_> = expected.iter().map(|(nsm, bytes)| ((*nsm).to_owned(), *bytes)).collect();
    let mut seen = Vec::new();
    let deadline = std::time::Instant::now() + common::WATCHDOG;
    while seen != expected {
        assert!(std::time::Instant::now() < deadline, "{seen:?} is not {expected:?}");
        std::thread::sleep(std::time::Duration::from_millis(50));
        seen = used(place);
    }
}

#[test]
fn what_was_used_is_counted_once_and_where_it_was_used() {
    let place = Place::new("far-usage");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let send = "say(sum(1 for _ in range(TIMES) if c.sendall(b'x' * 1000) or len(a.recv(1000, socket.MSG_WAITALL)) == 1000))";
    let ways = [
        (300, "apart"),
        (50, "other"),
        (7, "reno"),
        (1000, "apart"),
        (20, "reno"),
        (3, "apart"),
        (1, "other"),
    ];
    for (times, to) in ways {
        assert_eq!(guest.run(&send.replace("TIMES", &times.to_string())), times.to_string());
        // Some of it falls between two looks of the meter, some does not.
        if times == 50 || times == 1000 {
            std::thread::sleep(std::time::Duration::from_millis(1200));
        }
        if times == 20 {
            // Workers that were exchanged tell of the same.
            place.run(&["nsm", "restart", "apart"]).succeeds();
        }
        place.run(&["guest", "move", "1", to]).succeeds();
    }
    let expected = [("apart", 71_000), ("other", 7_000), ("reno", 1_303_000)];
    used_will_be(&place, &expected);
    guest.ends();
    // As long as the meter may look once more.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    used_will_be(&place, &expected);
    engine.end();
}

/// Worker of each process of the engine, by name of its stack.
fn workers(engine: &Engine) -> Vec<(String, i32)> {
    let name = |holder: i32| {
        let line = std::fs::read(format!("/proc/{holder}/cmdline")).unwrap_or_default();
        let words: Vec<_> =
            line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        words.contains(&"nsm-process".into()).then(|| words[words.len() - 2].clone())
    };
    let holders = children(engine.pid()).into_iter().filter_map(|holder| Some((holder, name(holder)?)));
    holders.filter_map(|(holder, name)| Some((name, children(holder).into_iter().next()?))).collect()
}

fn kill(pid: i32) {
    // SAFETY: plain system call; the process is, or was a moment ago, a descendant of this test's engine.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// A guest that is moved while its connections carry what is checked, and whose stacks' processes are killed meanwhile.
struct Load {
    guest: Engine,
    tell: std::process::ChildStdin,
    out: std::sync::mpsc::Receiver<String>,
    outside: std::net::TcpStream,
}

impl Load {
    fn start(place: &Place, arguments: &[&str]) -> Load {
        let mut command = place.netkernel(&["run"]);
        command.args(arguments).args(["--", "python3", "-c", LOAD, &echo().to_string()]);
        let mut guest = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (tell, out) = (guest.stdin.take().unwrap(), common::lines(guest.stdout.take().unwrap()));
        let guest = Engine::of(guest);
        let line: String = out.recv_timeout(common::WATCHDOG).unwrap();
        let port: u16 = line.strip_prefix("port ").unwrap().parse().unwrap();
        // A connection from outside, through all of it.
        let outside = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        outside.set_read_timeout(Some(common::WATCHDOG)).unwrap();
        Load { guest, tell, out, outside }
    }

    /// Whether all went well so far.
    fn look(&mut self, round: usize) {
        let bytes: Vec<u8> = (0..4000).map(|i| (i * 7 + round) as u8).collect();
        self.outside.write_all(&bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        self.outside.read_exact(&mut back).unwrap();
        assert_eq!(back, bytes, "round {round}");
        if round % 10 == 9 {
            writeln!(self.tell, "?").unwrap();
            let status = self.said("blocks");
            assert!(status.ends_with("[]"), "round {round}: {status}");
        }
    }

    fn said(&self, word: &str) -> String {
        let line = self.out.recv_timeout(common::WATCHDOG).unwrap_or_else(|e| panic!("no {word}: {e}"));
        line.strip_prefix(word).unwrap_or_else(|| panic!("{line}, not {word}")).trim().to_owned()
    }

    fn ends(self, place: &Place, what: &str) {
        let Load { guest, tell, out, outside } = self;
        drop(tell);
        let end = out.recv_timeout(common::WATCHDOG).unwrap();
        assert!(end.ends_with("[]") && !end.starts_with("end 0 "), "{end}");
        eprintln!("{what}; fewest blocks of a stream, short connections served and reset: {end}");
        drop(outside);
        assert_eq!(guest.wait().code(), Some(0));
        until("nothing of the guest is left", || {
            place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
        });
    }
}

fn rounds(few: usize) -> usize {
    std::env::var("NETKERNEL_FAULTS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(few)
}

#[test]
fn nothing_is_lost_or_doubled_by_many_moves() {
    let place = Place::new("far-many");
    let engine = up(&place);
    let mut load = Load::start(&place, &["--stack", "reno"]);
    let rounds = rounds(28);
    for round in 0..rounds {
        place.run(&["guest", "move", "1", WAYS[round % 7]]).succeeds();
        load.look(round);
    }
    load.ends(&place, &format!("{rounds} moves"));
    engine.end();
}

/// Kills the processes of NSMs while a guest with connections of all kinds goes over, and right after.
/// `NETKERNEL_FAULTS_KILLS`: how often.
#[test]
fn streams_survive_deaths_of_processes_that_they_go_to_and_come_from() {
    let place = Place::new("far-kill");
    let engine = up(&place);
    let mut load = Load::start(&place, &["--stack", "apart"]);
    place.run(&["guest", "move", "1", "other"]).succeeds();
    let rounds = rounds(30);
    let mut seed = u64::from(std::process::id());
    let (mut moved, mut stayed) = (0, 0);
    for round in 0..rounds {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let to = ["apart", "reno", "other", "apart", "other", "reno"][round % 6];
        let all = workers(&engine);
        let done = std::thread::scope(|scope| {
            let mover = scope.spawn(|| place.run(&["guest", "move", "1", to]));
            // At a random moment of the move, or a little later. The command itself takes some milliseconds to begin.
            std::thread::sleep(std::time::Duration::from_micros(seed >> 33 & 0x3fff));
            if !all.is_empty() {
                kill(all[(seed >> 50) as usize % all.len()].1);
            }
            mover.join().unwrap()
        });
        match done.code {
            Some(0) => moved += 1,
            _ => {
                stayed += 1;
                assert!(done.err.contains("guest 1 stays"), "round {round}: {}", done.err);
            }
        }
        load.look(round);
    }
    load.ends(&place, &format!("{moved} moves, {stayed} that a death undid"));
    engine.end();
}

/// What stack each socket of a guest is of, by descriptor, as `sockets` says.
fn stacks(place: &Place) -> Vec<(u64, String)> {
    let all = place.run(&["sockets", "--json"]).json();
    let one = |socket: &serde_json::Value| {
        (socket["fd"].as_u64().unwrap_or(0), socket["stack"].as_str().unwrap().to_owned())
    };
    let mut all: Vec<_> = all["sockets"].as_array().unwrap().iter().map(one).collect();
    all.sort();
    all
}

/// How many sockets went over, and how many stayed on each stack.
fn moves(place: &Place, guest: &str, to: &str) -> (u64, Vec<(String, u64)>) {
    let moved = place.run(&["guest", "move", "--json", guest, to]).json();
    let one = |left: &serde_json::Value| {
        (left["stack"].as_str().unwrap().to_owned(), left["sockets"].as_u64().unwrap())
    };
    let mut stayed: Vec<_> = moved["stayed"].as_array().unwrap().iter().map(one).collect();
    stayed.sort();
    (moved["sockets"].as_u64().unwrap(), stayed)
}

fn stays(on: &[(&str, u64)]) -> Vec<(String, u64)> {
    on.iter().map(|(stack, count)| ((*stack).to_owned(), *count)).collect()
}

#[test]
fn a_guest_that_cannot_go_over_stays_and_is_told_why() {
    let place = Place::new("far-unmoved");
    let engine = up(&place);
    let to = |guest: &str, stack: &str| place.run(&["guest", "move", guest, stack]);
    // Joined in memory, on the stack that it is on, then on one that it was on before.
    let mut guest = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(guest.run(CONNECTED), "1");
    to("1", "apart").fails(125, &["guest 1 stays", "2 of its sockets exist in stack memory only"]);
    assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    to("1", "reno").succeeds();
    to("1", "apart").fails(125, &["guest 1 stays", "2 of its sockets stayed on stack memory"]);
    assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(guest.run("c.close(); a.close(); say(1)"), "1");
    until("they are gone", || to("1", "apart").code == Some(0));
    assert_eq!(guest.run("c = socket.create_connection(l.getsockname()); a, _ = l.accept(); say(1)"), "1");
    assert_eq!(control(&mut guest, "c"), "cubic");
    // Connections than which there is less room.
    assert_eq!(guest.run("d = socket.create_connection(l.getsockname()); b, _ = l.accept(); say(1)"), "1");
    for from in ["reno", "other", "apart"] {
        to("1", from).succeeds();
        to("1", "tight").fails(125, &["guest 1 stays", "no room for its 4 connections"]);
        to("1", "narrow").fails(125, &["guest 1 stays", "no room for its 4 connections"]);
        assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
        assert_eq!(stacks(&place).iter().filter(|(_, stack)| stack == from).count(), 5);
    }
    assert_eq!(guest.run("d.close(); b.close(); say(1)"), "1");
    until("there is room", || to("1", "tight").code == Some(0));
    // One more is all that there is room for.
    let one = "g = socket.socket(); g.connect(l.getsockname()); h = socket.socket(); h.connect(l.getsockname()); say(1)";
    assert_eq!(guest.run(one), "EADDRNOTAVAIL");
    to("1", "nowhere").fails(125, &["no stack named 'nowhere'", "apart"]);
    assert!(to("1", "tight").succeeds().out.contains("with 0 sockets"));
    // A tenant's list.
    let token = place.dir.join("token");
    let mut few = Python::start_with(&place, &["--stack", "reno", "--token-file", token.to_str().unwrap()]);
    assert_eq!(few.run(CONNECTED), "1");
    to("2", "apart").fails(125, &["guest 2 stays", "tenant few may not use stack apart"]);
    assert_eq!(few.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    few.ends();
    guest.ends();
    engine.end();
}

#[test]
fn a_guest_goes_on_through_exchanges_of_everything_after_it_was_moved() {
    let place = Place::new("far-restart");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let write = "import threading, hashlib; part = bytes(i * i % 251 for i in range(1 << 20)); \
                 t = threading.Thread(target=lambda: [c.sendall(part) for _ in range(150)]); t.start(); \
                 h = hashlib.sha256(); say(1)";
    assert_eq!(guest.run(write), "1");
    let some = |guest: &mut Python| {
        let some = "say(sum(h.update(b) or len(b) for b in (a.recv(1 << 18) for _ in range(20))))";
        assert!(guest.run(some).parse::<u64>().unwrap() > 0);
    };
    for to in ["apart", "other", "reno"] {
        place.run(&["guest", "move", "1", to]).succeeds();
        some(&mut guest);
        place.run(&["restart"]).succeeds();
        some(&mut guest);
        if to != "reno" {
            place.run(&["nsm", "restart", to]).succeeds();
            some(&mut guest);
            place.run(&["nsm", "swap", to, "--congestion-control", "cubic"]).succeeds();
            some(&mut guest);
            let all = workers(&engine);
            kill(all.iter().find(|(name, _)| name == to).unwrap().1);
            some(&mut guest);
        }
    }
    place.run(&["guest", "move", "1", "apart"]).succeeds();
    let rest = "t2 = threading.Thread(target=lambda: (t.join(), c.shutdown(1))); t2.start(); \
                [h.update(b) for b in iter(lambda: a.recv(1 << 18), b'')]; w = hashlib.sha256(); \
                [w.update(part) for _ in range(150)]; say(h.digest() == w.digest())";
    assert_eq!(guest.run(rest), "True");
    guest.ends();
    let sum = 150 << 20;
    let mut seen = 0;
    until("it is counted", || {
        seen = used(&place).iter().map(|(_, bytes)| bytes).sum::<u64>();
        seen >= sum
    });
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(used(&place).iter().map(|(_, bytes)| bytes).sum::<u64>(), sum);
    engine.end();
}

#[test]
fn a_static_program_goes_over_under_a_stream_there_and_back() {
    let place = Place::new("far-static");
    let engine = up(&place);
    let program = static_program(&place);
    let mut guest = Python::start_program(&place, &["--stack", "reno"], program.to_str().unwrap());
    assert_eq!(guest.run("pair"), "reno reno reno");
    let total: u64 = 300_000_000;
    assert_eq!(guest.run(&format!("write {total}")), "0");
    let all = place.run(&["guest", "move", "--all-or-nothing", "1", "apart"]);
    all.fails(125, &["guest 1 stays", "3 of its sockets would stay on stack reno", "attachment direct"]);
    for i in 0..14 {
        assert_eq!(guest.run("read 5000000"), (5_000_000 * (i + 1)).to_string());
        let to = WAYS[i % 7];
        // The three of the stream are reno's.
        let left = if to == "reno" { vec![] } else { stays(&[("reno", 3)]) };
        assert_eq!(moves(&place, "1", to), (0, left));
        let control = if to == "apart" { "cubic" } else { "reno" };
        let expected = if to == "memory" { guest.run("new") } else { control.into() };
        assert_eq!(guest.run("new"), expected, "on {to}");
        assert_eq!(guest.run("old"), "reno reno reno");
        let seen = stacks(&place);
        assert_eq!(seen.len(), 3, "on {to}: {seen:?}");
        assert!(seen.iter().all(|(_, stack)| stack == "reno"), "on {to}: {seen:?}");
    }
    place.run(&["guest", "move", "1", "apart"]).succeeds();
    assert_eq!(guest.run(&format!("read {total}")), total.to_string());
    assert_eq!(guest.run("pair"), "cubic cubic cubic");
    let of = |name: &str| stacks(&place).iter().filter(|(_, stack)| stack == name).count();
    assert_eq!((of("reno"), of("apart")), (3, 3), "{:?}", stacks(&place));
    let explained = place.run(&["explain"]);
    let on = |name: &str| explained.succeeds().out.matches(&format!("on stack {name}")).count();
    assert_eq!((on("reno"), on("apart")), (3, 3), "{}", explained.out);
    guest.ends();
    engine.end();
}

#[test]
fn what_direct_sockets_carry_is_counted_once_and_on_their_own_stack() {
    let place = Place::new("far-direct-usage");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno", "--attach", "direct"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let send = "say(sum(1 for _ in range(TIMES) if S.sendall(b'x' * 1000) or len(R.recv(1000, socket.MSG_WAITALL)) == 1000))";
    let send = |guest: &mut Python, times: u64, from: &str, to: &str| {
        let line = send
            .replace("TIMES", &times.to_string())
            .replace("S.", &format!("{from}."))
            .replace("R.", &format!("{to}."));
        assert_eq!(guest.run(&line), times.to_string());
    };
    let to = |to: &str| _ = place.run(&["guest", "move", "1", to]).succeeds();
    send(&mut guest, 100, "c", "a");
    to("apart");
    // Both at once: each is billed where it is from.
    let second =
        CONNECTED.replace("l ", "m ").replace("l.", "m.").replace("c ", "d ").replace("a, _", "b, _");
    assert_eq!(guest.run(&second), "1");
    assert_eq!(control(&mut guest, "d"), "cubic");
    assert_eq!(control(&mut guest, "c"), "reno");
    send(&mut guest, 30, "c", "a");
    send(&mut guest, 7, "d", "b");
    used_will_be(&place, &[("apart", 7_000), ("reno", 130_000)]);
    to("reno");
    send(&mut guest, 20, "c", "a");
    send(&mut guest, 3, "d", "b");
    used_will_be(&place, &[("apart", 10_000), ("reno", 150_000)]);
    to("apart");
    send(&mut guest, 2, "c", "a");
    send(&mut guest, 4, "d", "b");
    used_will_be(&place, &[("apart", 14_000), ("reno", 152_000)]);
    to("other");
    send(&mut guest, 6, "d", "b");
    used_will_be(&place, &[("apart", 20_000), ("reno", 152_000)]);
    // What the listener accepts is its stack's, and closed ones count on.
    assert_eq!(guest.run("c.close(); a.close(); d.close(); b.close(); say(1)"), "1");
    let again = "e = socket.socket(); e.connect(l.getsockname()); f, _ = l.accept(); say(1)";
    assert_eq!(guest.run(again), "1");
    send(&mut guest, 11, "e", "f");
    send(&mut guest, 5, "f", "e");
    used_will_be(&place, &[("apart", 20_000), ("other", 11_000), ("reno", 157_000)]);
    guest.ends();
    std::thread::sleep(std::time::Duration::from_millis(1200));
    used_will_be(&place, &[("apart", 20_000), ("other", 11_000), ("reno", 157_000)]);
    engine.end();
}

#[test]
fn relayed_sockets_go_over_under_a_stream_and_with_calls_that_wait() {
    let place = Place::new("far-relay");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno", "--attach", "relay"]);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(guest.run("u = socket.socket(type=2); u.bind(('127.0.0.1', 0)); say(1)"), "1");
    let write = "import threading, hashlib; part = bytes(i * i % 251 for i in range(1 << 20)); \
                 t = threading.Thread(target=lambda: ([c.sendall(part) for _ in range(150)], c.shutdown(1))); t.start(); \
                 h = hashlib.sha256(); say(1)";
    assert_eq!(guest.run(write), "1");
    // A call that waits for the whole time.
    let waits = "m = socket.create_server(('127.0.0.1', 0)); got = []; \
                 w = threading.Thread(target=lambda: got.append(m.accept()[0])); w.start(); say(1)";
    assert_eq!(guest.run(waits), "1");
    for i in 0..20 {
        let some = "say(sum(h.update(b) or len(b) for b in (a.recv(1 << 18) for _ in range(20))))";
        assert!(guest.run(some).parse::<u64>().unwrap() > 0);
        let to = ["apart", "reno", "other", "apart", "other", "reno"][i % 6];
        assert_eq!(moves(&place, "1", to), (5, vec![]), "to {to}");
        let seen = stacks(&place);
        assert!(seen.len() == 5 && seen.iter().all(|(_, stack)| stack == to), "on {to}: {seen:?}");
    }
    place.run(&["guest", "move", "1", "apart"]).succeeds();
    assert_eq!(control(&mut guest, "c"), "cubic");
    let rest = "[h.update(b) for b in iter(lambda: a.recv(1 << 18), b'')]; w2 = hashlib.sha256(); \
                [w2.update(part) for _ in range(150)]; say(h.digest() == w2.digest(), t.join())";
    assert_eq!(guest.run(rest), "True None");
    assert_eq!(
        guest.run(
            "n = socket.create_connection(m.getsockname()); w.join(); n.sendall(b'1'); say(got[0].recv(9))"
        ),
        "b'1'"
    );
    assert_eq!(guest.run("u.sendto(b'1', u.getsockname()); say(u.recv(9))"), "b'1'");
    let next =
        "d = socket.create_connection(l.getsockname()); b, _ = l.accept(); d.sendall(b'new'); say(b.recv(9))";
    assert_eq!(guest.run(next), "b'new'");
    assert_eq!(control(&mut guest, "b"), "cubic");
    guest.ends();
    let sum = (150 << 20) + 1 + 1 + 3;
    let total = || used(&place).iter().map(|(_, bytes)| bytes).sum::<u64>();
    until("it is counted", || total() >= sum);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(total(), sum);
    engine.end();
}

#[test]
fn thousands_of_sockets_go_over_and_come_back() {
    let place = Place::new("far-thousands");
    let engine = up(&place);
    let mut guest = Guest::start(&place, &["--stack", "reno"], THOUSANDS);
    assert_eq!(guest.line(), "up");
    let began = std::time::Instant::now();
    for to in ["apart", "other", "reno", "apart", "reno", "other"] {
        assert_eq!(moves(&place, "1", to), (6001, vec![]), "to {to}");
    }
    eprintln!("6001 sockets went over six times in {:?}", began.elapsed());
    guest.tell();
    assert_eq!(guest.line(), "[]");
    assert_eq!(moves(&place, "1", "reno").1, vec![]);
    let descriptors = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |list| list.count());
    until("nobody else has any of them", || workers(&engine).iter().all(|(_, pid)| descriptors(*pid) < 60));
    guest.ends();
    until("the guest is over", || guests(&place) == 0);
    assert!(descriptors(engine.pid()) < 100, "{}", descriptors(engine.pid()));
    engine.end();
}

/// Holder of the process of a stack.
fn holder(engine: &Engine, stack: &str) -> i32 {
    let is = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.contains(&&b"nsm-process"[..]) && words.contains(&stack.as_bytes())
    };
    children(engine.pid()).into_iter().find(is).unwrap()
}

/// No open sockets of the guest's are left open anywhere but where it is.
fn sockets_of(pid: i32) -> usize {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_socket = |path: std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|name| name.to_string_lossy().starts_with("socket:"))
    };
    all.filter(|entry| is_socket(entry.path())).count()
}

#[test]
fn a_process_without_room_for_its_descriptors_takes_no_guest_and_leaves_nothing() {
    let place = Place::new("far-room");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno", "--attach", "queued"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let many =
        "us = [socket.socket(type=2) for _ in range(200)]; [u.bind(('127.0.0.1', 0)) for u in us]; say(1)";
    assert_eq!(guest.run(many), "1");
    // So that there is a process.
    assert_eq!(moves(&place, "1", "apart"), (203, vec![]));
    assert_eq!(moves(&place, "1", "reno"), (203, vec![]));
    let holder = holder(&engine, "apart");
    let limit = |soft: u64| {
        for pid in [holder, children(holder)[0]] {
            let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: 1024 };
            // SAFETY: the value is valid for reads; the processes are descendants of this test's engine.
            let set = unsafe { libc::prlimit64(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
            assert_eq!(set, 0);
        }
    };
    let before = sockets_of(children(holder)[0]);
    limit(120);
    for _ in 0..3 {
        place
            .run(&["guest", "move", "1", "apart"])
            .fails(125, &["guest 1 stays", "no room for its descriptors"]);
        assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
        assert_eq!(guest.run("us[0].sendto(b'x', us[199].getsockname()); say(us[199].recv(9))"), "b'x'");
    }
    assert_eq!(sockets_of(children(holder)[0]), before);
    limit(1024);
    assert_eq!(moves(&place, "1", "apart"), (203, vec![]));
    assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(guest.run("us[0].sendto(b'x', us[199].getsockname()); say(us[199].recv(9))"), "b'x'");
    guest.ends();
    engine.end();
}

#[test]
fn a_process_that_hangs_or_is_gone_keeps_nobody_waiting() {
    let place = Place::new("far-hangs");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    place.run(&["guest", "move", "1", "apart"]).succeeds();
    let pair = |stack: &str| {
        let holder = holder(&engine, stack);
        (holder, children(holder)[0])
    };
    let works = |guest: &mut Python| assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    // One that is to give it does not listen: it is killed, and the next one has the guest.
    let stop = |pid: i32| {
        // SAFETY: plain system call; the process is a descendant of this test's engine.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    };
    stop(pair("apart").1);
    place.run(&["guest", "move", "1", "other"]).fails(125, &["guest 1 stays"]);
    works(&mut guest);
    place.run(&["guest", "move", "1", "other"]).succeeds();
    works(&mut guest);
    // The same of one that is to take it; it goes back to where it was.
    stop(pair("apart").1);
    place.run(&["guest", "move", "1", "apart"]).fails(125, &["guest 1 stays"]);
    assert!(stacks(&place).iter().all(|(_, stack)| stack == "other"));
    works(&mut guest);
    place.run(&["guest", "move", "1", "apart"]).succeeds();
    works(&mut guest);
    // A holder that is killed takes along whom it has, and nobody else.
    kill(pair("other").0);
    works(&mut guest);
    place.run(&["guest", "move", "1", "other"]).succeeds();
    works(&mut guest);
    kill(pair("apart").0);
    works(&mut guest);
    kill(pair("other").0);
    assert_eq!(guest.run("say(c.recv(1))"), "ECONNRESET");
    guest.ends();
    engine.end();
}

/// Kills holders in the middle of moves: the guest may be lost with one, but then it is told so, and all others go on.
#[test]
fn a_holder_that_dies_in_the_middle_leaves_the_guest_whole_or_takes_it_along() {
    let place = Place::new("far-holder");
    let engine = up(&place);
    let rounds = rounds(12);
    let mut seed = u64::from(std::process::id());
    let (mut kept, mut lost) = (0, 0);
    // There are processes for those who come.
    let come = || {
        for stack in ["apart", "other"] {
            let mut next = Python::start_with(&place, &["--stack", stack]);
            assert_eq!(next.run(CONNECTED), "1");
            next.ends();
        }
        until("nothing of them is left", || guests(&place) == 0);
    };
    come();
    for round in 0..rounds {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let from = ["apart", "reno", "other"][round % 3];
        let mut guest = Python::start_with(&place, &["--stack", from]);
        let ps = place.run(&["ps", "--json"]).json();
        let id = ps["engines"][0]["guests"][0]["id"].to_string();
        assert_eq!(guest.run(CONNECTED), "1");
        let to = ["other", "apart", "reno"][round % 3];
        // That which it comes from, or that which it goes to.
        let victim = if from == "reno" || to != "reno" && round % 2 == 0 { to } else { from };
        let victim = holder(&engine, victim);
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| place.run(&["guest", "move", &id, to]));
            std::thread::sleep(std::time::Duration::from_micros(seed >> 33 & 0x1fff));
            kill(victim);
            mover.join().unwrap()
        });
        match guest.run("c.sendall(b'abc'); say(a.recv(9))").as_str() {
            "b'abc'" => kept += 1,
            "ECONNRESET" | "EPIPE" | "b''" => lost += 1,
            other => panic!("round {round}: {other}"),
        }
        guest.ends();
        until("nothing of it is left", || guests(&place) == 0);
        come();
    }
    eprintln!("{kept} guests went on, {lost} were lost with a holder");
    engine.end();
}

#[test]
fn a_capture_goes_on_through_moves() {
    let place = Place::new("far-pcap");
    let engine = up(&place);
    let port = echo();
    let mut guest = Python::start_with(&place, &["--stack", "reno", "--attach", "queued"]);
    assert_eq!(guest.run(&format!("c = socket.create_connection(('127.0.0.1', {port})); say(1)")), "1");
    let file = place.dir.join("all.pcapng");
    let socket = place.socket();
    let args = ["pcap", "1", "-w", file.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let capture = Engine::of(place.netkernel(&args).spawn().unwrap());
    until("the capture began", || std::fs::metadata(&file).is_ok_and(|file| file.len() > 0));
    let mut said = Vec::new();
    for (i, to) in ["apart", "reno", "other", "apart", "reno"].into_iter().enumerate() {
        for moved in [false, true] {
            if moved {
                place.run(&["guest", "move", "1", to]).succeeds();
            }
            let word = format!("word-{i}-{moved}-of-this-guest");
            let line = format!("c.sendall(b'{word}'); say(c.recv(99) == b'{word}')");
            assert_eq!(guest.run(&line), "True");
            said.push(word);
        }
    }
    let count = |word: &str| {
        let bytes = std::fs::read(&file).unwrap();
        bytes.windows(word.len()).filter(|window| *window == word.as_bytes()).count()
    };
    // There and back, once each.
    until("all was written", || said.iter().all(|word| count(word) >= 2));
    capture.end();
    assert!(
        said.iter().all(|word| count(word) == 2),
        "{:?}",
        said.iter().map(|word| count(word)).collect::<Vec<_>>()
    );
    guest.ends();
    engine.end();
}
