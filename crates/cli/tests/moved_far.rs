//! Guests that are put on an NSM in a process of its own, and back, while they run.

mod common;

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use common::load::{LOAD, echo};
use common::python::{CONNECTED, Python};
use common::{Engine, Place, children, until};

const CONFIG: &str = "\
[engine]\nusage = \"USAGE\"
[[nsm]]\nname = \"reno\"\ncongestion_control = \"reno\"
[[nsm]]\nname = \"memory\"\nstack = \"shm\"
[[nsm]]\nname = \"apart\"\nform = \"process\"\ncongestion_control = \"cubic\"
[[nsm]]\nname = \"other\"\nform = \"process\"\ncongestion_control = \"reno\"
[[nsm]]\nname = \"tight\"\nform = \"process\"\ncapacity_connections = 3
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
