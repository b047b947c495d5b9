//! Relays on stacks that are not the kernel's, which they borrow from the switch thread: smoltcp over a TAP device, guests that
//! are joined in memory, NSMs in processes. Network: loopback, and a namespace that the test makes and removes.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::namespace::{Namespace, can_run};
use common::{Done, Engine, Place, finish, until};

const PROGRAM: &str = include_str!("relay/program.c");

const GO: &str = r#"
package main
import ("fmt"; "io"; "net/http"; "os"; "time")
func main() {
    client := http.Client{Timeout: 20 * time.Second}
    answer, err := client.Get(os.Args[1])
    if err != nil { fmt.Println(err); os.Exit(1) }
    if _, err := io.Copy(os.Stdout, answer.Body); err != nil { fmt.Println(err); os.Exit(1) }
}
"#;

fn program(place: &Place) -> PathBuf {
    place.program("program", PROGRAM, &["-O1", "-static", "-pthread"])
}

fn natively(program: &Path, case: &str) -> String {
    let mut command = Command::new(program);
    command.arg(case).stdin(Stdio::null());
    let out = finish(command).succeeds().out.clone();
    assert!(!out.is_empty());
    out
}

fn up(place: &Place, config: &str) -> Engine {
    let config = place.file("engine.toml", config);
    place.up(&["--config", config.to_str().unwrap(), "--socket", place.socket().to_str().unwrap()])
}

/// A guest of the place's engine.
fn guest(place: &Place, options: &[&str], words: &[&str]) -> Command {
    let socket = place.socket();
    place.netkernel(&[&["run", "--socket", socket.to_str().unwrap()], options, &["--"], words].concat())
}

fn explain(place: &Place) -> String {
    place.run(&["explain", "--socket", place.socket().to_str().unwrap()]).succeeds().out.clone()
}

/// Every case says in a relay on this NSM what it says natively.
fn all_the_same(name: &str, config: &str, cases: &[&str]) {
    let place = Place::new(&format!("relay-on-{name}"));
    let program = program(&place);
    let engine = up(&place, config);
    for case in cases {
        let done = finish(guest(&place, &["--attach", "relay"], &[program.to_str().unwrap(), case]));
        assert_eq!(done.succeeds().out, natively(&program, case), "{case}");
    }
    until("all guests are over", || !explain(&place).contains("guest"));
    engine.end();
}

const CASES: [&str; 6] = ["names", "refused", "reset", "signals", "datagrams", "bulk"];

#[test]
fn guests_joined_in_memory_say_what_linux_says() {
    all_the_same("shm", "[[nsm]]\nname = \"memory\"\nstack = \"shm\"\n", &CASES);
}

#[test]
fn guests_of_a_process_say_what_linux_says() {
    let config = "[[nsm]]\nname = \"apart\"\nstack = \"shm\"\nform = \"process\"\n";
    all_the_same("process", config, &CASES);
    let config = "[[nsm]]\nname = \"apart\"\nstack = \"kernel\"\nform = \"process\"\n";
    all_the_same("kernel-process", config, &["names", "datagrams", "bulk"]);
}

#[test]
fn guests_of_a_tenant_with_limits_say_what_linux_says() {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let user = unsafe { libc::geteuid() };
    let config = format!(
        "[[nsm]]\nname = \"memory\"\nstack = \"shm\"\n\
         [[tenant]]\nname = \"slow\"\nusers = [{user}]\nmax_send = \"2 Gbit/s\"\nmax_receive = \"2 Gbit/s\"\n"
    );
    all_the_same("tenant", &config, &["names", "reset", "datagrams", "bulk"]);
}

#[test]
fn a_static_program_meets_another_guest_in_memory() {
    let place = Place::new("relay-meets");
    let program = program(&place);
    let engine = up(&place, "[[nsm]]\nname = \"memory\"\nstack = \"shm\"\n");
    // A relayed server, and a client that is served by queues; then the client is relayed, too.
    for options in [&["--attach", "queued"][..], &["--attach", "relay"]] {
        let server = [program.to_str().unwrap(), "echo"];
        let mut server = Engine::of(
            guest(&place, &["--attach", "relay"], &server)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let mut lines = BufReader::new(server.child().stdout.take().unwrap()).lines();
        let port = lines.next().unwrap().unwrap().strip_prefix("listen ").unwrap().to_owned();
        let script = "import socket, sys\n\
                      s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 20)\n\
                      s.sendall(bytes(100000)); n = 0\n\
                      while n < 100000: n += len(s.recv(65536))\n\
                      print('back', flush=True); sys.stdin.readline()\n";
        let mut client = Engine::of(
            guest(&place, options, &["python3", "-c", script, &port])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let mut said = BufReader::new(client.child().stdout.take().unwrap()).lines();
        assert_eq!(said.next().unwrap().unwrap(), "back");
        let text = explain(&place);
        let line = text.lines().find(|line| line.contains("connected, relay")).unwrap_or_default();
        assert!(line.contains("in memory, accepted from a guest"), "{text}");
        // Each byte once, in the guest's totals.
        assert!(text.contains("payload by queues and relay: 100000 bytes in, 100000 bytes out"), "{text}");
        client.child().stdin.take().unwrap().write_all(b"\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "over 0 0");
        assert!(common::wait(client.child(), "the client").success());
        assert!(common::wait(server.child(), "the server").success());
    }
    engine.end();
}

#[test]
fn an_engine_that_is_killed_ends_borrowed_sockets() {
    let place = Place::new("relay-killed");
    let program = program(&place);
    let engine = up(&place, "[[nsm]]\nname = \"memory\"\nstack = \"shm\"\n");
    let mut server = Engine::of(
        guest(
            &place,
            &["--attach", "relay"],
            &[program.to_str().unwrap(), "echo", "wait", "socket", "flood"],
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap(),
    );
    let mut lines = BufReader::new(server.child().stdout.take().unwrap()).lines();
    let port = lines.next().unwrap().unwrap().strip_prefix("listen ").unwrap().parse::<u16>().unwrap();
    let mut peer = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    peer.write_all(b"hello").unwrap();
    peer.read_exact(&mut [0; 5]).unwrap();
    engine.signal(libc::SIGKILL);
    let _ = engine.wait();
    let over = lines.next().unwrap().unwrap();
    assert!(over == "over 0 0" || over == format!("over -1 {}", libc::ECONNRESET), "{over}");
    // The heir answers, as long as somebody asks.
    drop(server.child().stdin.take());
    assert_eq!(lines.next().unwrap().unwrap(), format!("socket -{}", libc::ENETDOWN));
    assert_eq!(lines.next().unwrap().unwrap(), "flood 0 0");
    assert!(common::wait(server.child(), "the server").success());
}

// ---- smoltcp

/// More than any buffer holds.
fn page(place: &Place) -> String {
    let page: String = (0..100_000).map(|n| format!("{n}\n")).collect();
    place.file("page", &page);
    page
}

#[test]
fn static_and_go_programs_fetch_a_page_by_smoltcp() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("relay-smol"), Namespace::new("fetch"));
    let engine = up(&place, &namespace.config());
    let page = page(&place);
    let mut server = namespace.command(&["python3", "-m", "http.server", "--bind", "10.9.0.1", "8080"]);
    server.current_dir(&place.dir).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Engine::of(server.spawn().unwrap());
    until("the server listens", || {
        !finish(namespace.command(&["ss", "-Hltn", "sport", "=", ":8080"])).out.is_empty()
    });
    let source = place.file("fetch.go", GO);
    let go = place.dir.join("fetch");
    let mut command = Command::new("go");
    command.args(["build", "-o"]).arg(&go).arg(&source).env("CGO_ENABLED", "0").env("GO111MODULE", "off");
    command.env("GOCACHE", std::env::temp_dir().join("netkernel-test-go")).env("HOME", &place.dir);
    finish(command).succeeds();
    let url = "http://10.9.0.1:8080/page";
    // Nobody says how they are attached; a program that is served by the queues is a guest beside them.
    let programs: [&[&str]; 3] = [
        &["busybox", "wget", "-q", "-O", "-", url],
        &[go.to_str().unwrap(), url],
        &["curl", "--silent", "--noproxy", "*", "--max-time", "20", url],
    ];
    for program in programs {
        let done: Done = finish(guest(&place, &[], program));
        assert_eq!((done.code, done.out == page), (Some(0), true), "{program:?}: {}", done.err);
    }
    let nobody = finish(guest(&place, &[], &["busybox", "wget", "-q", "-O", "-", "http://10.9.0.1:9/"]));
    assert!(nobody.err.contains("Connection refused"), "{}", nobody.err);
    engine.end();
}

#[test]
fn static_servers_share_one_smoltcp_and_explain_says_why_they_are_relayed() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("relay-serve"), Namespace::new("serve"));
    let page = page(&place);
    let engine = up(&place, &namespace.config());
    let dir = place.dir.to_str().unwrap().to_owned();
    let serve = |port: &str| {
        let words = ["busybox", "httpd", "-f", "-p", port, "-h", &dir];
        Engine::of(guest(&place, &[], &words).stderr(Stdio::null()).spawn().unwrap())
    };
    // Two guests, each with a relay, and one device between them.
    let servers = [serve("8081"), serve("8082")];
    let fetch = |port: &str| {
        let url = format!("http://10.9.0.2:{port}/page");
        finish(namespace.command(&["curl", "--silent", "--noproxy", "*", "--max-time", "20", &url]))
    };
    for port in ["8081", "8082"] {
        until("the server answers", || fetch(port).code == Some(0));
        for _ in 0..3 {
            assert!(fetch(port).out == page);
        }
    }
    let text = explain(&place);
    assert_eq!(text.matches("stack small, attachment relay").count(), 2, "{text}");
    let why =
        "listening, relay: the guest has no preloaded library, and the stack has no kernel sockets to give";
    assert_eq!(text.matches(why).count(), 2, "{text}");
    // What cannot be served is refused, not let through.
    let refused = finish(guest(&place, &["--attach", "direct"], &["busybox", "true"]));
    refused.fails(125, &["there are no kernel sockets to give away", "--attach relay"]);
    drop(servers);
    until("all guests are over", || !explain(&place).contains("guest"));
    assert!(fetch("8081").code != Some(0), "the listener is gone");
    engine.end();
}
