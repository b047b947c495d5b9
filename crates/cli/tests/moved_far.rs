//! Guests that are put on an NSM in a process of its own, and back, while they run.

mod common;

use std::io::Write as _;
use std::process::Stdio;

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
