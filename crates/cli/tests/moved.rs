//! Guests that are put on another stack while they run.

mod common;

use common::python::{CONNECTED, Python};
use common::{Engine, Place};

const CONFIG: &str = "\
[engine]\nusage = \"USAGE\"
[[nsm]]\nname = \"reno\"\ncongestion_control = \"reno\"
[[nsm]]\nname = \"cubic\"\ncongestion_control = \"cubic\"
[[nsm]]\nname = \"memory\"\nstack = \"shm\"
[[nsm]]\nname = \"apart\"\nform = \"process\"
[[tenant]]\nname = \"few\"\ntoken_file = \"TOKEN\"\nnsms = [\"reno\"]
";

fn up(place: &Place) -> Engine {
    let token = place.file("token", "token-of-a-tenant-that-may-use-few-stacks\n");
    let config = CONFIG.replace("USAGE", place.dir.join("usage.redb").to_str().unwrap());
    let config = config.replace("TOKEN", token.to_str().unwrap());
    let config = place.file("nk.toml", &config);
    place.up(&["--config", config.to_str().unwrap()])
}

const CONTROL: &str = "say(S.getsockopt(6, 13, 16).strip(b'\\0').decode())";

fn control(guest: &mut Python, socket: &str) -> String {
    guest.run(&CONTROL.replace('S', socket))
}

#[test]
fn a_guest_goes_over_with_its_sockets_under_a_stream() {
    let place = Place::new("moved");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(control(&mut guest, "c"), "reno");
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
    for i in 0..20 {
        let some = "say(sum(h.update(b) or len(b) for b in (a.recv(1 << 18) for _ in range(20))))";
        assert!(guest.run(some).parse::<u64>().unwrap() > 0);
        let to = ["cubic", "reno"][i % 2];
        let moved = place.run(&["guest", "move", "1", to]);
        assert!(
            moved.succeeds().out.contains(&format!("on stack {to}, with the 7 sockets")),
            "{}",
            moved.out
        );
    }
    place.run(&["guest", "move", "1", "cubic"]).succeeds();
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
    assert_eq!(guest.run("f.connect(u.getsockname()) if 0 else u.sendto(b'1', u.getsockname()); say(p.poll(10)[0][0] == u.fileno(), u.recv(9))"), "True b'1'");
    assert_eq!(guest.run("f.connect(l.getsockname()); g, _ = l.accept(); f.close(); say(g.recv(1))"), "b''");
    assert_eq!(guest.run("x.close(); say(y.recv(1))"), "b''");
    // Who is asked says where it is.
    let ps = place.run(&["ps", "--json"]).json();
    assert_eq!(ps["engines"][0]["guests"][0]["stack"], "cubic", "{ps}");
    let sockets = place.run(&["sockets", "--json"]).json();
    assert!(sockets["sockets"].as_array().unwrap().iter().all(|s| s["stack"] == "cubic"), "{sockets}");
    guest.ends();
    engine.end();
}

#[test]
fn what_was_used_is_counted_once_and_where_it_was_used() {
    let place = Place::new("moved-usage");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let send = "say(sum(1 for _ in range(N) if c.sendall(b'x' * 1000) or len(a.recv(1000, socket.MSG_WAITALL)) == 1000))";
    for (times, to) in [(300, "cubic"), (50, "reno"), (7, "cubic"), (1000, "cubic")] {
        assert_eq!(guest.run(&send.replace('N', &times.to_string())), times.to_string());
        place.run(&["guest", "move", "1", to]).succeeds();
        // Some of it falls between two looks of the meter.
        if times == 50 {
            std::thread::sleep(std::time::Duration::from_millis(1200));
        }
    }
    let rows = |all: &serde_json::Value| -> Vec<(String, u64)> {
        let row = |row: &serde_json::Value| {
            (row["nsm"].as_str().unwrap().to_owned(), row["bytes_out"].as_u64().unwrap())
        };
        let mut rows: Vec<_> = all.as_array().unwrap().iter().map(row).collect();
        rows.sort();
        rows
    };
    guest.ends();
    let expected = vec![("cubic".to_owned(), 1_050_000), ("reno".to_owned(), 307_000)];
    let mut seen = Vec::new();
    let until = std::time::Instant::now() + common::WATCHDOG;
    while seen != expected && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(100));
        seen = rows(&place.run(&["usage", "--by", "nsm", "--format", "json"]).json());
    }
    assert_eq!(seen, expected);
    engine.end();
}

#[test]
fn a_guest_that_cannot_go_over_stays_and_is_told_why() {
    let place = Place::new("unmoved");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let moves = |guest: &str, to: &str| place.run(&["guest", "move", guest, to]);
    moves("1", "nowhere").fails(125, &["no stack named 'nowhere'", "cubic"]);
    moves("9", "cubic").fails(125, &["no guest 9"]);
    assert_eq!(moves("one", "cubic").code, Some(2));
    moves("1", "apart").fails(125, &["guest 1 stays", "process of its own"]);
    assert!(moves("1", "reno").succeeds().out.contains("on stack reno"));
    // Sockets that only their stack has.
    let mut joined = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(joined.run(CONNECTED), "1");
    moves("2", "cubic").fails(125, &["guest 2 stays", "exist in their stack only"]);
    assert_eq!(joined.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(joined.run("c.close(); a.close(); l.close(); say(1)"), "1");
    moves("2", "cubic").succeeds();
    assert_eq!(joined.run(CONNECTED), "1");
    assert_eq!(control(&mut joined, "c"), "cubic");
    // A tenant's list.
    let mut few = Python::start_with(
        &place,
        &["--stack", "reno", "--token-file", place.dir.join("token").to_str().unwrap()],
    );
    assert_eq!(few.run(CONNECTED), "1");
    moves("3", "cubic").fails(125, &["guest 3 stays", "tenant few may not use stack cubic"]);
    assert_eq!(few.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    let mut direct = Python::start_with(&place, &["--stack", "reno", "--attach", "direct"]);
    assert_eq!(direct.run(CONNECTED), "1");
    moves("4", "cubic").fails(125, &["guest 4 stays", "attachment direct or relay"]);
    for guest in [guest, joined, few, direct] {
        guest.ends();
    }
    engine.end();
}
