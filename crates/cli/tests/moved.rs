//! Guests that are put on another stack while they run.

mod common;

use common::program::static_program;
use common::python::{CONNECTED, Python};
use common::{Engine, Place};

const CONFIG: &str = "\
[engine]\nusage = \"USAGE\"
[[nsm]]\nname = \"reno\"\ncongestion_control = \"reno\"
[[nsm]]\nname = \"cubic\"\ncongestion_control = \"cubic\"
[[nsm]]\nname = \"memory\"\nstack = \"shm\"
[[nsm]]\nname = \"apart\"\nform = \"process\"
[[nsm]]\nname = \"tight\"\ncapacity_connections = 3
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
            moved.succeeds().out.contains(&format!("on stack {to}, with 7 sockets of it that went over")),
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
    let send = "say(sum(1 for _ in range(TIMES) if c.sendall(b'x' * 1000) or len(a.recv(1000, socket.MSG_WAITALL)) == 1000))";
    for (times, to) in [(300, "cubic"), (50, "reno"), (7, "cubic"), (1000, "cubic")] {
        assert_eq!(guest.run(&send.replace("TIMES", &times.to_string())), times.to_string());
        place.run(&["guest", "move", "1", to]).succeeds();
        // Some of it falls between two looks of the meter.
        if times == 50 {
            std::thread::sleep(std::time::Duration::from_millis(1200));
        }
    }
    guest.ends();
    used_will_be(&place, &[("cubic", 1_050_000), ("reno", 307_000)]);
    engine.end();
}

/// Rows of `usage --by nsm`: name and bytes sent.
fn used(place: &Place) -> Vec<(String, u64)> {
    let all = place.run(&["usage", "--by", "nsm", "--format", "json"]).json();
    let row = |row: &serde_json::Value| {
        (row["nsm"].as_str().unwrap().to_owned(), row["bytes_out"].as_u64().unwrap())
    };
    let mut rows: Vec<_> = all.as_array().unwrap().iter().map(row).collect();
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

/// What stack each socket of a guest is of, by descriptor, as `sockets` says.
fn stacks(place: &Place) -> Vec<(u64, String)> {
    let all = place.run(&["sockets", "--json"]).json();
    let one = |socket: &serde_json::Value| {
        (socket["fd"].as_u64().unwrap(), socket["stack"].as_str().unwrap().to_owned())
    };
    let mut all: Vec<_> = all["sockets"].as_array().unwrap().iter().map(one).collect();
    all.sort();
    all
}

#[test]
fn a_static_program_goes_over_under_a_stream_there_and_back() {
    let place = Place::new("moved-static");
    let engine = up(&place);
    let program = static_program(&place);
    let mut guest = Python::start_program(&place, &["--stack", "reno"], program.to_str().unwrap());
    assert_eq!(guest.run("pair"), "reno reno reno");
    let total: u64 = 300_000_000;
    assert_eq!(guest.run(&format!("write {total}")), "0");
    for i in 0..20 {
        assert_eq!(guest.run("read 5000000"), (5_000_000 * (i + 1)).to_string());
        let to = ["cubic", "reno"][i % 2];
        let moved = place.run(&["guest", "move", "--json", "1", to]).json();
        // The three of the stream are reno's.
        let left = if to == "reno" { 0 } else { 3 };
        let stayed = moved["stayed"].as_array().unwrap();
        assert_eq!(stayed.iter().map(|left| left["sockets"].as_u64().unwrap()).sum::<u64>(), left, "{moved}");
        assert!(stayed.iter().all(|left| left["stack"] == "reno"), "{moved}");
        assert_eq!(guest.run("new"), to);
        assert_eq!(guest.run("old"), "reno reno reno");
    }
    place.run(&["guest", "move", "1", "cubic"]).succeeds();
    // Each socket by the rules of its own stack, which refuse.
    assert_eq!(guest.run("set cubic"), format!("{} reno", libc::EPERM));
    assert_eq!(guest.run("set reno"), "0 reno");
    let seen = stacks(&place);
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert!(seen.iter().all(|(_, stack)| stack == "reno"), "{seen:?}");
    assert_eq!(guest.run(&format!("read {total}")), total.to_string());
    // A second stream, of the new stack.
    assert_eq!(guest.run("pair"), "cubic cubic cubic");
    let seen = stacks(&place);
    let of = |name: &str| seen.iter().filter(|(_, stack)| stack == name).count();
    assert_eq!((of("reno"), of("cubic")), (3, 3), "{seen:?}");
    assert_eq!(guest.run("set reno"), format!("{} cubic", libc::EPERM));
    let explained = place.run(&["explain"]);
    let on = |name: &str| explained.succeeds().out.matches(&format!("on stack {name}")).count();
    assert_eq!((on("reno"), on("cubic")), (3, 3), "{}", explained.out);
    guest.ends();
    engine.end();
}

#[test]
fn what_direct_sockets_carry_is_counted_once_and_on_their_own_stack() {
    let place = Place::new("moved-direct-usage");
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
    let moves = |to: &str| _ = place.run(&["guest", "move", "1", to]).succeeds();
    send(&mut guest, 100, "c", "a");
    moves("cubic");
    // Both at once: each is billed where it is from.
    let second =
        CONNECTED.replace("l ", "m ").replace("l.", "m.").replace("c ", "d ").replace("a, _", "b, _");
    assert_eq!(guest.run(&second), "1");
    assert_eq!(control(&mut guest, "d"), "cubic");
    assert_eq!(control(&mut guest, "c"), "reno");
    send(&mut guest, 30, "c", "a");
    send(&mut guest, 7, "d", "b");
    used_will_be(&place, &[("cubic", 7_000), ("reno", 130_000)]);
    moves("reno");
    send(&mut guest, 20, "c", "a");
    send(&mut guest, 3, "d", "b");
    used_will_be(&place, &[("cubic", 10_000), ("reno", 150_000)]);
    // What the listener accepts is its stack's, and closed ones count on.
    moves("cubic");
    assert_eq!(guest.run("c.close(); a.close(); d.close(); b.close(); say(1)"), "1");
    let again = "e = socket.socket(); e.connect(l.getsockname()); f, _ = l.accept(); say(1)";
    assert_eq!(guest.run(again), "1");
    assert_eq!(control(&mut guest, "e"), "cubic");
    assert_eq!(control(&mut guest, "f"), "reno");
    send(&mut guest, 11, "e", "f");
    send(&mut guest, 5, "f", "e");
    used_will_be(&place, &[("cubic", 21_000), ("reno", 155_000)]);
    guest.ends();
    engine.end();
}

/// A thread writes into `c`, and shuts it down in the end; what `a` gets goes into a hash.
const WRITE: &str = "import threading, hashlib; part = bytes(i * i % 251 for i in range(1 << 20)); \
    t = threading.Thread(target=lambda: ([c.sendall(part) for _ in range(200)], c.shutdown(1))); t.start(); \
    h = hashlib.sha256(); say(1)";
const SOME: &str = "say(sum(h.update(b) or len(b) for b in (a.recv(1 << 18) for _ in range(20))))";
const REST: &str = "[h.update(b) for b in iter(lambda: a.recv(1 << 18), b'')]; w = hashlib.sha256(); \
    [w.update(part) for _ in range(200)]; say(h.digest() == w.digest(), t.join())";

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
    on.iter().map(|(stack, sockets)| ((*stack).to_owned(), *sockets)).collect()
}

#[test]
fn joined_connections_stay_in_memory_under_a_stream_and_the_rest_goes_over() {
    let place = Place::new("moved-joined");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(guest.run("u = socket.socket(type=2); u.bind(('127.0.0.1', 0)); say(1)"), "1");
    assert_eq!(guest.run(WRITE), "1");
    for i in 0..20 {
        assert!(guest.run(SOME).parse::<u64>().unwrap() > 0);
        // The two ends of the stream; at home everything is where it was.
        match ["cubic", "memory"][i % 2] {
            "memory" => assert_eq!(moves(&place, "1", "memory"), (4, vec![])),
            to => assert_eq!(moves(&place, "1", to), (2, stays(&[("memory", 2)]))),
        }
    }
    assert_eq!(moves(&place, "1", "cubic"), (2, stays(&[("memory", 2)])));
    // From one to the next while some stay: they stay on.
    assert_eq!(moves(&place, "1", "reno"), (2, stays(&[("memory", 2)])));
    let next =
        "d = socket.create_connection(l.getsockname()); b, _ = l.accept(); d.sendall(b'new'); say(b.recv(9))";
    assert_eq!(guest.run(next), "b'new'");
    assert_eq!(control(&mut guest, "d"), "reno");
    assert_eq!(control(&mut guest, "b"), "reno");
    let seen = stacks(&place);
    let of = |name: &str| seen.iter().filter(|(_, stack)| stack == name).count();
    assert_eq!((of("memory"), of("reno")), (2, 4), "{seen:?}");
    let explained = place.run(&["explain"]);
    let on = |name: &str| explained.succeeds().out.matches(&format!("on stack {name}")).count();
    assert_eq!((on("memory"), on("reno")), (2, 4), "{}", explained.out);
    assert_eq!(guest.run(REST), "True None");
    assert_eq!(guest.run("u.sendto(b'1', u.getsockname()); say(u.recv(9))"), "b'1'");
    // The other end's end is seen, too.
    assert_eq!(guest.run("a.sendall(b'back'); a.close(); say(c.recv(9), c.recv(9))"), "b'back' b''");
    assert_eq!(guest.run("c.close(); say(1)"), "1");
    assert_eq!(moves(&place, "1", "cubic"), (4, vec![]));
    assert_eq!(control(&mut guest, "b"), "cubic");
    assert_eq!(guest.run("b.sendall(b'old'); say(d.recv(9))"), "b'old'");
    guest.ends();
    engine.end();
}

#[test]
fn guests_that_share_memory_are_moved_apart_from_each_other() {
    let place = Place::new("moved-pair");
    let engine = up(&place);
    let mut server = Python::start_with(&place, &["--stack", "memory"]);
    let port = server.run("l = socket.create_server(('127.0.0.1', 0)); say(l.getsockname()[1])");
    let mut client = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(client.run(&format!("c = socket.create_connection(('127.0.0.1', {port})); say(1)")), "1");
    assert_eq!(server.run("a, _ = l.accept(); say(1)"), "1");
    assert!(place.run(&["explain"]).succeeds().out.contains("in memory that both map"));
    assert_eq!(client.run(WRITE), "1");
    let hash =
        "import hashlib; part = bytes(i * i % 251 for i in range(1 << 20)); h = hashlib.sha256(); say(1)";
    assert_eq!(server.run(hash), "1");
    for i in 0..20 {
        assert!(server.run(SOME).parse::<u64>().unwrap() > 0);
        let (guest, to) = [("2", "cubic"), ("1", "reno"), ("2", "memory"), ("1", "memory")][i % 4];
        let left = if to == "memory" { vec![] } else { stays(&[("memory", 1)]) };
        assert_eq!(moves(&place, guest, to).1, left);
    }
    assert_eq!(moves(&place, "1", "cubic"), (1, stays(&[("memory", 1)])));
    assert_eq!(server.run(&REST.replace(", t.join()", "")), "True");
    // A process that comes later maps the memory, too.
    let other = "import subprocess; subprocess.run([sys.executable, '-c', f'import socket; socket.socket(fileno={a.fileno()}).sendall(b\"other\")'], pass_fds=[a.fileno()]); say(1)";
    assert_eq!(server.run(other), "1");
    assert_eq!(client.run("say(c.recv(9))"), "b'other'");
    // One end is over while its guest is elsewhere.
    assert_eq!(moves(&place, "2", "reno"), (0, stays(&[("memory", 1)])));
    client.ends();
    assert_eq!(server.run("say(a.recv(9))"), "b''");
    server.ends();
    engine.end();
}

#[test]
fn connections_that_wait_in_memory_are_not_lost() {
    let place = Place::new("moved-waiting");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "memory"]);
    let connect = "l = socket.create_server(('127.0.0.1', 0), backlog=200); \
                   x = [socket.create_connection(l.getsockname()) for _ in range(150)]; \
                   [s.sendall(b'%d' % i) for i, s in enumerate(x)]; say(1)";
    assert_eq!(guest.run(connect), "1");
    let (went, stayed) = moves(&place, "1", "cubic");
    assert_eq!((went, stayed.len(), stayed[0].0.as_str()), (0, 1, "memory"), "{stayed:?}");
    assert!(stayed[0].1 > 150, "{stayed:?}");
    assert_eq!(
        guest.run(
            "y = [l.accept()[0] for _ in x]; say(sorted(int(s.recv(9)) for s in y) == list(range(150)))"
        ),
        "True"
    );
    // Nobody waits any more: the listener goes over, and accepts from the kernel.
    assert_eq!(guest.run("[s.close() for s in x + y]; say(1)"), "1");
    assert_eq!(moves(&place, "1", "reno"), (1, vec![]));
    let next =
        "d = socket.create_connection(l.getsockname()); b, _ = l.accept(); d.sendall(b'new'); say(b.recv(9))";
    assert_eq!(guest.run(next), "b'new'");
    assert_eq!(control(&mut guest, "b"), "reno");
    guest.ends();
    engine.end();
}

#[test]
fn kernel_sockets_go_to_a_stack_that_joins_under_a_stream() {
    let place = Place::new("moved-to-memory");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno"]);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(guest.run(WRITE), "1");
    for i in 0..6 {
        assert!(guest.run(SOME).parse::<u64>().unwrap() > 0);
        assert_eq!(moves(&place, "1", ["memory", "cubic"][i % 2]), (3, vec![]));
    }
    assert_eq!(moves(&place, "1", "memory"), (3, vec![]));
    // A listener of its own is joined with, one from another stack is not.
    let next =
        "d = socket.create_connection(l.getsockname()); b, _ = l.accept(); d.sendall(b'new'); say(b.recv(9))";
    assert_eq!(guest.run(next), "b'new'");
    let own = "m = socket.create_server(('127.0.0.1', 0)); e = socket.create_connection(m.getsockname()); f, _ = m.accept(); e.sendall(b'own'); say(f.recv(9))";
    assert_eq!(guest.run(own), "b'own'");
    let explained = place.run(&["explain"]);
    let of = |words: &str| explained.succeeds().out.matches(words).count();
    assert_eq!(of("in memory that both map"), 2, "{}", explained.out);
    assert_eq!(of("it was opened on another stack"), 3, "{}", explained.out);
    assert_eq!(guest.run(REST), "True None");
    guest.ends();
    // All of it once: what stayed where it was too is billed to the stack that the guest is on.
    let mut sums = 0;
    common::until("it is counted", || {
        sums = used(&place).iter().map(|(_, bytes)| bytes).sum::<u64>();
        sums >= (200 << 20) + 6
    });
    assert_eq!(sums, (200 << 20) + 6);
    engine.end();
}

#[test]
fn sockets_of_a_user_space_stack_stay_there_and_new_ones_are_the_kernels() {
    if !common::namespace::can_run() {
        return;
    }
    let place = Place::new("moved-smoltcp");
    let namespace = common::namespace::Namespace::new("moved");
    let config = place.file(
        "nk.toml",
        &format!("{}[[nsm]]\nname = \"reno\"\ncongestion_control = \"reno\"\n", namespace.config()),
    );
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let echo = "import socket; l = socket.create_server(('10.9.0.1', 9000)); print(1, flush=True)\n\
                while 1:\n  s, _ = l.accept()\n  for b in iter(lambda: s.recv(65536), b''): s.sendall(b)\n  s.close()";
    let mut peer = namespace.command(&["python3", "-c", echo]);
    let mut peer = peer.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lines = common::lines(peer.stdout.take().unwrap());
    assert_eq!(lines.recv_timeout(common::WATCHDOG).unwrap(), "1");
    let mut guest = Python::start_with(&place, &["--stack", "small", "--attach", "queued"]);
    assert_eq!(guest.run("c = socket.create_connection(('10.9.0.1', 9000)); say(1)"), "1");
    let exchange = "import threading; part = bytes(i * i % 251 for i in range(1 << 16)); \
        t = threading.Thread(target=lambda: ([c.sendall(part) for _ in range(64)], c.shutdown(1))); t.start(); got = b''; say(1)";
    assert_eq!(guest.run(exchange), "1");
    let some = "got += c.recv(1 << 16); say(len(got) > 0)";
    for i in 0..10 {
        assert_eq!(guest.run(some), "True");
        match i % 2 {
            0 => assert_eq!(moves(&place, "1", "reno"), (0, stays(&[("small", 1)]))),
            _ => assert_eq!(moves(&place, "1", "small"), (1, vec![])),
        }
    }
    assert_eq!(moves(&place, "1", "reno"), (0, stays(&[("small", 1)])));
    assert_eq!(guest.run("d = socket.socket(); say(1)"), "1");
    assert_eq!(control(&mut guest, "d"), "reno");
    assert_eq!(guest.run(CONNECTED.replace("c,", "k,").replace("c =", "k =").as_str()), "1");
    // Back: the kernel's stay, which the other stack cannot take, and work on.
    assert_eq!(moves(&place, "1", "small"), (1, stays(&[("reno", 4)])));
    assert_eq!(guest.run("k.sendall(b'kernel'); say(a.recv(9))"), "b'kernel'");
    assert_eq!(
        guest.run("got += b''.join(iter(lambda: c.recv(1 << 16), b'')); say(got == part * 64, t.join())"),
        "True None"
    );
    let all = place.run(&["guest", "move", "--all-or-nothing", "1", "reno"]);
    all.fails(125, &["guest 1 stays", "a socket of it cannot go over"]);
    // Behind the preloaded library is a relay, which borrows the stack.
    let mut second = Python::start_with(&place, &["--stack", "small"]);
    assert_eq!(second.run("c = socket.create_connection(('10.9.0.1', 9000)); say(1)"), "1");
    assert_eq!(moves(&place, "2", "reno"), (0, stays(&[("small", 1)])));
    assert_eq!(second.run("c.sendall(b'abc'); say(c.recv(9))"), "b'abc'");
    assert_eq!(second.run("d = socket.socket(); c.close(); say(1)"), "1");
    assert_eq!(control(&mut second, "d"), "reno");
    assert_eq!(second.run("d.close(); say(1)"), "1");
    assert_eq!(moves(&place, "2", "small"), (0, vec![]));
    assert_eq!(
        second.run("c = socket.create_connection(('10.9.0.1', 9000)); c.sendall(b'abc'); say(c.recv(9))"),
        "b'abc'"
    );
    // A relay must be told of more than the filter of direct sockets tells of.
    let mut direct = Python::start_with(&place, &["--stack", "reno", "--attach", "direct"]);
    assert_eq!(direct.run(CONNECTED), "1");
    let words = ["guest 3 stays", "no sockets of the kernel", "--attach relay"];
    place.run(&["guest", "move", "3", "small"]).fails(125, &words);
    assert_eq!(direct.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    [guest, second, direct].into_iter().for_each(Python::ends);
    let _ = peer.kill();
    let _ = peer.wait();
    engine.end();
}

#[test]
fn relayed_sockets_stay_and_new_ones_are_of_the_new_stack_under_a_stream() {
    let place = Place::new("moved-relay");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "reno", "--attach", "relay"]);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(guest.run("u = socket.socket(type=2); u.bind(('127.0.0.1', 0)); say(1)"), "1");
    assert_eq!(control(&mut guest, "c"), "reno");
    let all = place.run(&["guest", "move", "--all-or-nothing", "1", "cubic"]);
    all.fails(125, &["guest 1 stays", "4 of its sockets would stay on stack reno", "attachment relay"]);
    assert_eq!(guest.run(WRITE), "1");
    for i in 0..20 {
        assert!(guest.run(SOME).parse::<u64>().unwrap() > 0);
        // The relay borrows the last one of the switch thread, and has one of its own of the others.
        let to = ["cubic", "memory", "reno"][i % 3];
        let left = if to == "reno" { vec![] } else { stays(&[("reno", 4)]) };
        assert_eq!(moves(&place, "1", to), (0, left));
    }
    // On stack memory now.
    let next =
        "d = socket.create_connection(l.getsockname()); b, _ = l.accept(); d.sendall(b'new'); say(b.recv(9))";
    assert_eq!(guest.run(next), "b'new'");
    // What is accepted is its listener's.
    assert_eq!(control(&mut guest, "b"), "reno");
    let own = "m = socket.create_server(('127.0.0.1', 0)); e = socket.create_connection(m.getsockname()); f, _ = m.accept(); e.sendall(b'own'); say(f.recv(9))";
    assert_eq!(guest.run(own), "b'own'");
    let explained = place.run(&["explain"]);
    assert_eq!(explained.succeeds().out.matches("which copies").count(), 2, "{}", explained.out);
    assert_eq!(moves(&place, "1", "cubic"), (0, stays(&[("memory", 4), ("reno", 5)])));
    assert_eq!(
        guest.run(
            &own.replace("m.", "n.")
                .replace("m =", "n =")
                .replace("e.", "g.")
                .replace("e =", "g =")
                .replace("f,", "k,")
                .replace("f.", "k.")
        ),
        "b'own'"
    );
    assert_eq!(control(&mut guest, "g"), "cubic");
    assert_eq!(control(&mut guest, "c"), "reno");
    assert_eq!(guest.run("f.sendall(b'back'); say(e.recv(9))"), "b'back'");
    assert_eq!(guest.run(REST), "True None");
    assert_eq!(guest.run("u.sendto(b'1', u.getsockname()); say(u.recv(9))"), "b'1'");
    assert_eq!(guest.run("[s.close() for s in (a, b, c, d, e, f, l, m, u)]; say(1)"), "1");
    let only =
        |stacks: Vec<(u64, String)>| stacks.iter().all(|(_, stack)| stack == "cubic") && stacks.len() == 3;
    common::until("the others are gone", || only(stacks(&place)));
    place.run(&["guest", "move", "--all-or-nothing", "1", "cubic"]).succeeds();
    assert_eq!(guest.run("g.sendall(b'last'); say(k.recv(9))"), "b'last'");
    guest.ends();
    let sum = (200 << 20) + 3 + 3 + 3 + 4 + 1 + 4;
    let mut seen = 0;
    common::until("it is counted", || {
        seen = used(&place).iter().map(|(_, bytes)| bytes).sum::<u64>();
        seen >= sum
    });
    assert_eq!(seen, sum);
    engine.end();
}

#[test]
fn moved_guests_outlive_an_exchange_of_the_engines_program() {
    let place = Place::new("moved-restart");
    let engine = up(&place);
    let program = static_program(&place);
    let mut guest = Python::start_program(&place, &["--stack", "reno"], program.to_str().unwrap());
    assert_eq!(guest.run("pair"), "reno reno reno");
    let total: u64 = 50_000_000;
    assert_eq!(guest.run(&format!("write {total}")), "0");
    assert_eq!(guest.run("read 1000000"), "1000000");
    assert_eq!(moves(&place, "1", "cubic"), (0, stays(&[("reno", 3)])));
    // What stayed on a stack that only this process has holds the program up until it has ended.
    let mut joined = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(joined.run(CONNECTED), "1");
    assert_eq!(moves(&place, "2", "cubic"), (1, stays(&[("memory", 2)])));
    place.run(&["restart"]).fails(125, &["guest 2", "sockets that stayed on a stack that it was on before"]);
    assert_eq!(joined.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(joined.run("c.close(); a.close(); say(1)"), "1");
    common::until("the stack of before is left", || place.run(&["restart"]).code == Some(0));
    assert_eq!(joined.run("d = socket.create_connection(l.getsockname()); say(1)"), "1");
    assert_eq!(control(&mut joined, "d"), "cubic");
    // The agent of the new program knows whose sockets are whose.
    assert_eq!(guest.run("new"), "cubic");
    assert_eq!(guest.run("set cubic"), format!("{} reno", libc::EPERM));
    let of = |place: &Place, name: &str| stacks(place).iter().filter(|(_, stack)| stack == name).count();
    assert_eq!(of(&place, "reno"), 3);
    assert_eq!(guest.run(&format!("read {total}")), total.to_string());
    joined.ends();
    used_will_be(&place, &[("cubic", 3), ("memory", 0), ("reno", total)]);
    guest.ends();
    used_will_be(&place, &[("cubic", 3), ("memory", 0), ("reno", total)]);
    engine.end();
}

#[test]
fn no_room_for_connections_changes_nothing() {
    let place = Place::new("moved-tight");
    let engine = up(&place);
    let mut guest = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(guest.run(CONNECTED), "1");
    let more = "d = socket.create_connection(l.getsockname()); b, _ = l.accept(); say(1)";
    assert_eq!(guest.run(more), "1");
    let refused = place.run(&["guest", "move", "1", "tight"]);
    refused.fails(125, &["guest 1 stays", "no room for its 4 connections"]);
    // New ones are joined as before.
    assert_eq!(guest.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(guest.run(&more.replace("d =", "e =").replace("b,", "f,")), "1");
    let explained = place.run(&["explain"]);
    assert_eq!(explained.succeeds().out.matches("in memory that both map").count(), 6, "{}", explained.out);
    assert!(stacks(&place).iter().all(|(_, stack)| stack == "memory"));
    assert_eq!(guest.run("[s.close() for s in (b, d, e, f)]; say(1)"), "1");
    assert_eq!(moves(&place, "1", "tight"), (1, stays(&[("memory", 2)])));
    // One more is all that there is room for.
    let one = "g = socket.socket(); g.connect(l.getsockname()); h = socket.socket(); h.connect(l.getsockname()); say(1)";
    assert_eq!(guest.run(one), "EADDRNOTAVAIL");
    guest.ends();
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
    assert!(moves("1", "reno").succeeds().out.contains("on stack reno"));
    // Sockets that only their stack has, when all are to go over.
    let mut joined = Python::start_with(&place, &["--stack", "memory"]);
    assert_eq!(joined.run(CONNECTED), "1");
    let all = place.run(&["guest", "move", "--all-or-nothing", "2", "cubic"]);
    all.fails(125, &["guest 2 stays", "2 of its sockets cannot go over", "exist in that stack only"]);
    assert_eq!(joined.run("c.sendall(b'abc'); say(a.recv(9))"), "b'abc'");
    assert_eq!(joined.run("c.close(); a.close(); l.close(); say(1)"), "1");
    place.run(&["guest", "move", "--all-or-nothing", "2", "cubic"]).succeeds();
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
    // The kernel's own sockets, when all are to go over.
    let mut direct = Python::start_with(&place, &["--stack", "reno", "--attach", "direct"]);
    assert_eq!(direct.run(CONNECTED), "1");
    let all = place.run(&["guest", "move", "--all-or-nothing", "4", "cubic"]);
    all.fails(125, &["guest 4 stays", "3 of its sockets would stay on stack reno", "attachment direct"]);
    assert_eq!(control(&mut direct, "socket.socket()"), "reno");
    for guest in [guest, joined, few, direct] {
        guest.ends();
    }
    engine.end();
}
