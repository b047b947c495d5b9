//! A stack that is not the kernel's: smoltcp over a TAP device into a network namespace, which each test makes and removes.
//! Needs root, as network namespaces do; without it these tests say so and do nothing.

mod common;

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use common::namespace::{Namespace, can_run, ip};
use common::{Done, Engine, Place, finish, until};

/// A native server in the namespace, ended with the value.
fn server(namespace: &Namespace, place: &Place, words: &[&str]) -> Engine {
    let mut command = namespace.command(words);
    command.current_dir(&place.dir).stdout(Stdio::null()).stderr(Stdio::null());
    Engine::of(command.spawn().unwrap())
}

fn up(namespace: &Namespace, place: &Place) -> Engine {
    let config = place.file("engine.toml", &namespace.config());
    place.up(&["--config", config.to_str().unwrap(), "--socket", place.socket().to_str().unwrap()])
}

fn guest(place: &Place, words: &[&str]) -> Command {
    let socket = place.socket();
    let mut all = vec!["run", "--attach", "queued", "--socket", socket.to_str().unwrap(), "--"];
    all.extend(words);
    place.netkernel(&all)
}

fn python(script: &str) -> [&str; 3] {
    ["python3", "-c", script]
}

fn curl(url: &str) -> Vec<&str> {
    vec!["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "20", url]
}

/// The same bytes on both sides, more than any buffer holds.
fn page(place: &Place) -> String {
    let page: String = (0..200_000).map(|n| format!("{n}\n")).collect();
    place.file("page", &page);
    page
}

fn listens(namespace: &Namespace, port: &str) {
    until("the server listens", || {
        let done = finish(namespace.command(&["ss", "-Hltn", "sport", "=", port]));
        !done.out.is_empty()
    });
}

#[test]
fn a_guest_fetches_a_page_from_the_namespace() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("smol-client"), Namespace::new("client"));
    let page = page(&place);
    let _server = server(&namespace, &place, &["python3", "-m", "http.server", "--bind", "::", "8080"]);
    listens(&namespace, ":8080");
    let engine = up(&namespace, &place);
    for url in ["http://10.9.0.1:8080/page", "http://[fd00:9::1]:8080/page"] {
        let done: Done = finish(guest(&place, &curl(url)));
        assert_eq!((done.code, done.out == page), (Some(0), true), "{url}: {}", done.err);
    }
    engine.end();
}

#[test]
fn a_guest_serves_the_namespace() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("smol-server"), Namespace::new("server"));
    let page = page(&place);
    let engine = up(&namespace, &place);
    let mut server = guest(&place, &["python3", "-m", "http.server", "--bind", "0.0.0.0", "8081"]);
    server.current_dir(&place.dir).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Engine::of(server.spawn().unwrap());
    until("the guest's server answers", || {
        finish(namespace.command(&curl("http://10.9.0.2:8081/page"))).code == Some(0)
    });
    for _ in 0..5 {
        let done = finish(namespace.command(&curl("http://10.9.0.2:8081/page")));
        assert_eq!((done.code, done.out == page), (Some(0), true), "{}", done.err);
    }
    drop(_server);
    engine.end();
}

#[test]
fn who_is_not_there_is_told_as_by_linux() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("smol-errors"), Namespace::new("errors"));
    let engine = up(&namespace, &place);
    let script = r#"
import errno, socket
def attempt(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(20)
        try:
            s.connect(address)
            print("connected")
        except OSError as e:
            print(errno.errorcode.get(e.errno, e))
attempt(socket.AF_INET, ("10.9.0.1", 9))
attempt(socket.AF_INET6, ("fd00:9::1", 9))
attempt(socket.AF_INET, ("10.9.0.77", 80))
attempt(socket.AF_INET6, ("fd00:8::1", 80))
attempt(socket.AF_INET, ("10.8.0.1", 80))
"#;
    // Nobody listens; nobody has the address; no gateway for IPv6; and the gateway says that it goes no further.
    ip(&["-n", &namespace.0, "route", "add", "unreachable", "10.8.0.0/16"]);
    finish(namespace.command(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])).succeeds();
    let done = finish(guest(&place, &python(script)));
    let lines: Vec<&str> = done.succeeds().out.lines().collect();
    assert_eq!(lines, ["ECONNREFUSED", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "EHOSTUNREACH"]);
    engine.end();
}

#[test]
fn a_peer_that_is_lost_ends_the_connection() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("smol-lost"), Namespace::new("lost"));
    let engine = up(&namespace, &place);
    let server =
        "import socket; s = socket.create_server(('10.9.0.1', 8082)); c, _ = s.accept(); c.recv(1); input()";
    let mut server = namespace.command(&python(server));
    let _server = Engine::of(server.stdin(Stdio::piped()).spawn().unwrap());
    listens(&namespace, ":8082");
    let script = r#"
import errno, socket, sys
s = socket.create_connection(("10.9.0.1", 8082))
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000)
s.send(b"x")
print("connected", flush=True)
sys.stdin.readline()
try:
    s.send(b"y")
    s.recv(1)
    print("more")
except OSError as e:
    print(errno.errorcode[e.errno])
"#;
    let mut command = guest(&place, &python(script));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut line = [0; 10];
    from.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"connected\n");
    ip(&["-n", &namespace.0, "link", "set", "nk0", "down"]);
    to.write_all(b"\n").unwrap();
    let _child = Engine::of(child);
    let mut rest = String::new();
    from.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "ETIMEDOUT\n");
    engine.end();
}

#[test]
fn a_device_that_cannot_be_had_is_told() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("smol-busy"), Namespace::new("busy"));
    let engine = up(&namespace, &place);
    // The first guest makes the engine open the device.
    let mut command = guest(&place, &["sh", "-c", "echo up; cat"]);
    let mut first = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    first.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    let other = Place::new("smol-busy2");
    let second = up(&namespace, &other);
    finish(guest(&other, &["true"])).fails(125, &["`nk0` is busy"]);
    drop(first.stdin.take());
    assert!(common::wait(&mut first, "the first guest").success());
    second.end();
    engine.end();
}
