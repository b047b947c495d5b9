//! The units of `contrib/systemd` under a real systemd, which starts, reloads, stops and repairs the engine. Each test has a machine
//! of its own (`common/machine.rs`).

mod common;

use common::machine::{Machine, can_run};
use common::streams::{Guest, RIGHT, STREAMS};
use common::until;

/// Stacks of each form, for everybody.
const CONFIG: &str = r#"
[engine]
usage = "/var/lib/netkernel/usage.db"
allow_users = ["*"]
[[nsm]]
name = "kernel"
[[nsm]]
name = "apart"
form = "process"
[[nsm]]
name = "joined"
stack = "shm"
"#;

const TENANT: &str = "[[tenant]]\nname = \"a\"\nusers = [1000]\nmax_connections = ";
const BAD: &str = "[[tenant]]\nname = \"a\"\nmax_send = \"lots\"\n";

fn guest(machine: &Machine, user: &str, arguments: &[&str], program: &str) -> Guest {
    let words = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "netkernel", "run"];
    let program = ["--", "/usr/bin/python3", "-c", program];
    Guest::of(machine.command(&[&words, arguments, &program].concat()))
}

/// By each stack and attachment, when it is up.
fn each<'a>(machine: &Machine, user: &'a str, stacks: &[&'a str], mut then: impl FnMut([&'a str; 3], Guest)) {
    for &stack in stacks {
        for attach in ["queued", "direct", "relay"] {
            let guest = guest(machine, user, &["--stack", stack, "--attach", attach], STREAMS);
            assert_eq!(guest.line(), "up", "{user} {stack} {attach}");
            then([user, stack, attach], guest);
        }
    }
}

#[track_caller]
fn goes_on(who: [&str; 3], mut guest: Guest) {
    guest.tell();
    let said = guest.line();
    assert!(said.starts_with(RIGHT), "{who:?}: {said}");
    guest.ends();
}

#[test]
fn the_first_client_starts_the_engine_which_can_do_in_its_sandbox_all_that_it_can_without() {
    if !can_run() {
        return;
    }
    let networks = "[[nsm]]\nname = \"blue\"\nnetns = \"blue\"\n\
                    [[nsm]]\nname = \"blue-apart\"\nnetns = \"blue\"\nform = \"process\"\n\
                    [[nsm]]\nname = \"small\"\nstack = \"smoltcp\"\ntap = \"nk0\"\naddresses = [\"10.9.0.2/24\"]\n";
    let machine = Machine::new("systemd-start", &format!("{CONFIG}{networks}"));
    let units = ["netkernel.service", "netkernel.socket"];
    let verified = machine.run(&[&["systemd-analyze", "verify", "--man=no"], &units[..]].concat());
    assert_eq!((verified.succeeds().out.as_str(), verified.err.as_str()), ("", ""));
    machine.run(&["systemd-analyze", "security", "--threshold=50", "netkernel.service"]).succeeds();
    let namespace = |name: &str| {
        machine.run(&["ip", "netns", "add", name]).succeeds();
        machine.run(&["ip", "-n", name, "link", "set", "lo", "up"]).succeeds();
    };
    namespace("blue");
    machine.run(&["ip", "tuntap", "add", "nk0", "mode", "tap"]).succeeds();
    machine.run(&["ip", "address", "add", "10.9.0.1/24", "dev", "nk0"]).succeeds();
    machine.run(&["ip", "link", "set", "nk0", "up"]).succeeds();

    machine.run(&["systemctl", "start", "netkernel.socket"]).succeeds();
    assert_eq!(machine.property("ActiveState"), "inactive");
    let first =
        machine.run(&["netkernel", "run", "--stack", "kernel", "--", "sh", "-c", "echo $LISTEN_FDS-"]);
    assert_eq!((first.succeeds().out.as_str(), first.err.as_str()), ("-\n", ""));
    assert_eq!(
        (machine.property("ActiveState"), machine.property("StatusErrno")),
        ("active".into(), "0".into())
    );

    for user in ["0", "65534"] {
        each(&machine, user, &["kernel", "apart", "joined", "blue", "blue-apart"], goes_on);
    }
    let program = "
import socket
l = socket.create_server(('10.9.0.2', 0)); print(l.getsockname()[1], flush=True)
a, _ = l.accept(); print(a.recv(5), flush=True)";
    let small = guest(&machine, "0", &["--stack", "small"], program);
    let native =
        format!("import socket; socket.create_connection(('10.9.0.2', {})).send(b'hello')", small.line());
    machine.run(&["/usr/bin/python3", "-c", &native]).succeeds();
    assert_eq!(small.line(), "b'hello'");
    drop(small);

    // What is mounted later, the engine sees too.
    namespace("green");
    machine.configure(&format!("{CONFIG}{networks}[[nsm]]\nname = \"green\"\nnetns = \"green\"\n"));
    machine.run(&["netkernel", "restart"]).succeeds();
    each(&machine, "0", &["green"], goes_on);
    machine.run(&["systemctl", "stop", "netkernel.service"]).succeeds();
    assert_eq!(
        (machine.property("Result"), machine.property("ExecMainStatus")),
        ("success".into(), "0".into())
    );
    assert_eq!(machine.journal("warning"), "");
}

#[test]
fn a_reload_changes_limits_or_nothing_and_a_restart_leaves_guests_alone() {
    if !can_run() {
        return;
    }
    let machine = Machine::new("systemd-reload", &format!("{CONFIG}{TENANT}2000\n"));
    machine.run(&["systemctl", "enable", "--now", "netkernel.socket", "netkernel.service"]).succeeds();
    let engine = machine.property("MainPID");
    let mut all = Vec::new();
    each(&machine, "65534", &["kernel", "apart", "joined"], |who, guest| all.push((who, guest)));

    machine.configure(&format!("{CONFIG}{BAD}"));
    let refused = machine.run(&["systemctl", "reload", "netkernel.service"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let told = machine.journal("err");
    assert!(told.contains("netkernel: /etc/netkernel/engine.toml, line"), "{told}");
    assert!(told.contains("max_send"), "{told}");
    assert_eq!(told.lines().count(), 1, "nothing else is an error: {told}");
    machine.run(&["netkernel", "restart"]).fails(125, &["max_send"]);
    machine.configure(&format!("{CONFIG}{TENANT}3000\n"));
    machine.run(&["systemctl", "reload", "netkernel.service"]).succeeds();
    let tenants = machine.run(&["netkernel", "tenants", "--json"]);
    assert!(tenants.succeeds().out.contains("\"most_connections\": 3000"), "{tenants:?}");

    // As a package's upgrade does.
    machine
        .run(&["sh", "-c", "cp /usr/bin/netkernel /usr/bin/new && mv /usr/bin/new /usr/bin/netkernel"])
        .succeeds();
    for _ in 0..2 {
        machine.run(&["netkernel", "restart"]).succeeds();
    }
    assert_eq!((machine.property("ActiveState"), machine.property("MainPID")), ("active".into(), engine));
    assert_eq!(machine.property("NRestarts"), "0");
    all.into_iter().for_each(|(who, guest)| goes_on(who, guest));
    assert!(machine.journal("info").contains("goes on with 9 guests"), "{}", machine.journal("info"));

    // With guests, whose sockets end.
    let mut guest = guest(&machine, "0", &[], END);
    assert_eq!(guest.line(), "up");
    machine.run(&["systemctl", "restart", "netkernel.service"]).succeeds();
    assert_eq!(
        (guest.line(), machine.property("ActiveState")),
        ("ECONNRESET ENETDOWN".into(), "active".into())
    );
    guest.tell();
    let usage = machine.run(&["netkernel", "usage", "--by", "nsm"]);
    assert!(usage.succeeds().out.contains("joined"), "it was kept: {usage:?}");
    machine.run(&["systemctl", "stop", "netkernel.service"]).succeeds();
    assert_eq!(
        (machine.property("ActiveState"), machine.property("Result")),
        ("inactive".into(), "success".into())
    );
}

/// Waits for the end of its connection.
const END: &str = "
import errno, socket, sys
l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); a, _ = l.accept()
print('up', flush=True); said = []
for call in lambda: c.recv(1), socket.socket:
    try: said.append(str(call()))
    except OSError as e: said.append(errno.errorcode[e.errno])
print(*said, flush=True); sys.stdin.readline()";

#[test]
fn an_engine_that_dies_is_started_again_and_no_client_is_turned_away() {
    if !can_run() {
        return;
    }
    let machine = Machine::new("systemd-crash", CONFIG);
    machine.run(&["systemctl", "start", "netkernel.socket", "netkernel.service"]).succeeds();
    let asks = "
import errno, socket, sys
s = socket.socket(); print('up', flush=True); sys.stdin.readline()
try: print(socket.socket())
except OSError as e: print(errno.errorcode[e.errno], socket.socket(socket.AF_UNIX).fileno(), flush=True)
sys.stdin.readline()";
    let mut direct = guest(&machine, "65534", &["--attach", "direct"], asks);
    let mut queued = guest(&machine, "0", &["--stack", "apart"], END);
    assert_eq!((direct.line(), queued.line()), ("up".into(), "up".into()));
    let engine = machine.property("MainPID");
    machine.run(&["kill", "-9", &engine]).succeeds();
    assert_eq!(queued.line(), "ECONNRESET ENETDOWN");
    queued.tell();
    // By the engine's heir, which lives on.
    direct.tell();
    assert_eq!(direct.line(), "ENETDOWN 4");
    // Whoever comes now waits, whether there is an engine yet or not.
    let echo = ["netkernel", "run", "--stack", "joined", "--", "echo", "served"];
    assert_eq!(machine.run(&echo).succeeds().out, "served\n");
    until("it runs again", || machine.property("ActiveState") == "active");
    assert_eq!(machine.property("NRestarts"), "1");
    assert_ne!(machine.property("MainPID"), engine);
    direct.ends();

    // For longer than systemd tries by default.
    machine.run(&["systemctl", "stop", "netkernel.service"]).succeeds();
    machine.configure(&format!("{CONFIG}{BAD}"));
    let waits = Guest::of(machine.command(&echo));
    until("it was tried often", || machine.property("NRestarts").parse::<u32>().unwrap() > 6);
    assert_eq!(machine.run(&["systemctl", "is-active", "netkernel.socket"]).out, "active\n");
    assert!(machine.journal("err").contains("max_send"));
    machine.configure(CONFIG);
    assert_eq!(waits.line(), "served");
    until("it runs again", || machine.property("ActiveState") == "active");
}
