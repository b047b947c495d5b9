//! `netkernel up` and what asks it.

mod common;

use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Stdio;

use common::{Engine, Place, finish, is_root, until, wait};
use netkernel_control::{Client, ClientError, ErrorCode, NewGuest};

#[test]
fn up_run_ps_and_an_end_in_order() {
    let place = Place::new("up");
    let engine = place.up(&[]);
    assert!(engine.line.contains(place.socket().to_str().unwrap()), "{}", engine.line);
    let mut child = place
        .netkernel(&["run", "--stack", "cubic", "--name", "worker", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("the guest is listed", || place.run(&["ps"]).succeeds().out.contains("worker"));
    let ps = place.run(&["ps", "--json"]).json();
    let guest = &ps["engines"][0]["guests"][0];
    assert_eq!((guest["name"].as_str(), guest["stack"].as_str()), (Some("worker"), Some("cubic")), "{ps}");
    assert_eq!(guest["pid"], child.id());
    drop(child.stdin.take());
    assert_eq!(wait(&mut child, "cat").code(), Some(0));
    until("the guest is gone", || !place.run(&["ps"]).out.contains("worker"));
    engine.end();
    assert_eq!(place.engine_files(), [""; 0], "the socket and its lock are gone");
}

#[test]
fn every_read_command_prints_json() {
    let place = Place::new("json");
    let stacks = place.run(&["stacks", "--json"]).json();
    assert!(stacks["engine"].is_null(), "what a default engine would offer: {stacks}");
    assert!(stacks["stacks"].as_array().unwrap().iter().any(|s| s["name"] == "reno"), "{stacks}");
    assert_eq!(place.run(&["ps", "--json"]).json()["engines"].as_array().unwrap().len(), 0);
    let engine = place.up(&[]);
    let stacks = place.run(&["stacks", "--json"]).json();
    assert_eq!(stacks["engine"], place.socket().to_str().unwrap());
    assert!(place.run(&["sockets", "--json"]).json()["sockets"].is_array());
    let doctor = place.run(&["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&doctor.out).unwrap();
    assert!(
        doctor["host"].as_array().unwrap().iter().any(|f| f["what"] == "kernel" && f["state"] == "ok"),
        "{doctor}"
    );
    let program = place.run(&["doctor", "--json", "--", "sh"]).json();
    assert_eq!(
        (&program["program"]["served"], &program["program"]["how"]),
        (&true.into(), &"preload".into())
    );
    engine.end();
}

#[test]
fn a_stale_socket_is_replaced() {
    let place = Place::new("stale");
    let engine = place.up(&[]);
    engine.signal(libc::SIGKILL);
    engine.wait();
    assert!(place.socket().exists());
    drop(UnixListener::bind(place.dir.join("other.sock")).unwrap());
    place.up(&[]).end();
    place.up(&["--socket", place.dir.join("other.sock").to_str().unwrap()]).end();
}

#[test]
fn two_engines_on_one_socket_are_an_error_that_says_so() {
    let place = Place::new("two");
    let engine = place.up(&[]);
    place.run(&["up"]).fails(125, &["an engine already runs at", "--socket"]);
    place.run(&["ps"]).succeeds();
    engine.end();
}

#[test]
fn stop_ends_the_engine() {
    let place = Place::new("stop");
    place.run(&["stop"]).fails(125, &["no engine runs", "netkernel up"]);
    let engine = place.up(&[]);
    place.run(&["stop"]).succeeds();
    assert_eq!(engine.wait().code(), Some(0));
}

#[test]
fn an_unknown_key_is_named_with_file_line_and_what_to_do() {
    let place = Place::new("key");
    let config = place.file("nk.toml", "[engine]\nspin_us = 10\nswitch_thread = 1\n");
    let expected = ["nk.toml, line 3, key 'switch_thread'", "remove it", "switch_threads"];
    place.run(&["up", "--config", config.to_str().unwrap()]).fails(125, &expected);
    place.run(&["up", "--check", "--config", config.to_str().unwrap()]).fails(125, &expected);
    place.run(&["up", "--config", "/no/such.toml"]).fails(125, &["/no/such.toml", "--config"]);
}

#[test]
fn an_unsupported_congestion_control_is_an_error_that_names_those_there_are() {
    let place = Place::new("cc");
    let config = place.file("nk.toml", "[[nsm]]\nname = \"fast\"\ncongestion_control = \"warpdrive\"\n");
    for command in [&["up", "--check", "--config"][..], &["up", "--config"]] {
        let mut args = command.to_vec();
        args.push(config.to_str().unwrap());
        place.run(&args).fails(125, &["'fast'", "warpdrive", "reno"]);
    }
    let netns = place.file("ns.toml", "[[nsm]]\nname = \"blue\"\nnetns = \"no-such-netns\"\n");
    place
        .run(&["up", "--check", "--config", netns.to_str().unwrap()])
        .fails(125, &["no-such-netns", "ip netns add"]);
    let good = place.file("good.toml", "[[nsm]]\nname = \"only\"\ncongestion_control = \"reno\"\n");
    place.run(&["up", "--check", "--config", good.to_str().unwrap()]).succeeds();
    let engine = place.up(&["--config", good.to_str().unwrap()]);
    place.run(&["run", "--stack", "bbr", "--", "true"]).fails(125, &["no stack named 'bbr'", "only"]);
    place.run(&["run", "--", "true"]).succeeds();
    engine.end();
}

#[test]
fn readiness_is_told_by_descriptor_and_to_the_service_manager() {
    let place = Place::new("ready");
    let manager = UnixDatagram::bind(place.dir.join("notify")).unwrap();
    manager.set_read_timeout(Some(common::WATCHDOG)).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    // SAFETY: a descriptor of this process; other tests' children may inherit it, which this test does not mind.
    unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFD, 0) };
    let mut command = place.netkernel(&["up", "--ready-fd", &writer.as_raw_fd().to_string()]);
    command.env("NOTIFY_SOCKET", place.dir.join("notify")).stdout(Stdio::null());
    let engine = Engine::of(command.spawn().unwrap());
    let mut text = [0; 512];
    let n = std::io::Read::read(&mut reader, &mut text).unwrap();
    assert_eq!(String::from_utf8_lossy(&text[..n]), format!("{}\n", place.socket().display()));
    let n = manager.recv(&mut text).unwrap();
    assert_eq!(&text[..n], b"READY=1");
    engine.signal(libc::SIGINT);
    assert_eq!(engine.wait().code(), Some(0));
    let n = manager.recv(&mut text).unwrap();
    assert_eq!(&text[..n], b"STOPPING=1");
}

#[test]
fn another_user_may_do_what_the_configuration_says() {
    if !is_root() {
        eprintln!("needs root");
        return;
    }
    let place = Place::new("nobody");
    let socket = place.socket();
    let named = ["--socket", socket.to_str().unwrap()];
    let engine = place.up(&[]);
    let nobody = |args: &[&str]| finish(place.as_nobody(args));
    if nobody(&["--version"]).code != Some(0) {
        eprintln!("nobody cannot execute the command where it was built");
        return;
    }
    nobody(&["run", named[0], named[1], "--", "true"])
        .fails(125, &["uid 65534 may not create guests", "allow_users"]);
    nobody(&["stop", named[0], named[1]]).fails(125, &["only the engine's user and root may stop it"]);
    engine.end();
    let config = place.file("nk.toml", "[engine]\nallow_users = [65534]\n");
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    nobody(&["run", named[0], named[1], "--", "sh", "-c", "exit 5"]);
    until("nobody's guest is over", || !place.run(&["ps"]).out.contains("65534"));
    let mut root =
        place.netkernel(&["run", "--name", "of-root", "--", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    until("root's guest is there", || place.run(&["ps"]).out.contains("of-root"));
    let id =
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"][0]["id"].as_u64().unwrap().to_string();
    let seen = nobody(&["ps", "--json", named[0], named[1]]).json();
    assert_eq!(seen["engines"][0]["guests"].as_array().unwrap().len(), 0, "not of root's: {seen}");
    nobody(&["stop", "--guest", &id, named[0], named[1]]).fails(125, &["no guest"]);
    nobody(&["sockets", &id, named[0], named[1]]).fails(125, &["no guest"]);
    drop(root.stdin.take());
    wait(&mut root, "cat");
    engine.end();
}

#[test]
fn attaching_needs_the_token() {
    let place = Place::new("token");
    let engine = place.up(&[]);
    let mut client = Client::connect(&place.socket()).unwrap();
    let (made, fds) =
        client.create_guest(NewGuest { name: Some("twice".into()), ..NewGuest::default() }).unwrap();
    let token = netkernel_control::parse_token(&made.token).unwrap();
    let (again, more) = client.attach(&token).unwrap();
    assert_eq!(made, again);
    let inode = |fd: &std::os::fd::OwnedFd| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        (link, std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino())
    };
    assert_eq!(inode(&fds[0]), inode(&more[0]), "the same region");
    for wrong in [[0; 16], {
        let mut t = token;
        t[15] ^= 1;
        t
    }] {
        match client.attach(&wrong) {
            Err(ClientError::Refused(e)) => assert!(e.code != ErrorCode::Other, "{e:?}"),
            other => panic!("{other:?}"),
        }
    }
    drop((fds, more));
    until("the guest is over", || client.guests().unwrap().is_empty());
    engine.end();
}

#[test]
fn the_definition_makes_completions_and_a_man_page() {
    let place = Place::new("man");
    for shell in ["bash", "zsh", "fish"] {
        assert!(place.run(&["completions", shell]).succeeds().out.contains("netkernel"));
    }
    let man = place.run(&["man"]);
    assert!(man.succeeds().out.contains(".TH netkernel"), "{man:?}");
    assert!(place.run(&["--help"]).succeeds().out.contains("127"), "exit codes are documented");
}
