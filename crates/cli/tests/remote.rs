//! The control API for tenants and over TLS: what the command tells whom, and when the engine refuses to start.

mod common;

use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;

use common::{Place, until};

struct Rig {
    place: Place,
    socket: String,
}

const BLUE: &str = "blue-0123456789abcdef";
const RED: &str = "red-00123456789abcdef";
const PROVIDER: &str = "provider-0123456789abcdef";

impl Rig {
    fn new(name: &str) -> Rig {
        let place = Place::new(name);
        for (file, text) in
            [("blue", BLUE), ("red", RED), ("provider", PROVIDER), ("nobody", "nobody-0123456789abcdef")]
        {
            place.file(file, text);
        }
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        place.file("cert.pem", &made.cert.pem());
        place.file("key.pem", &made.signing_key.serialize_pem());
        let socket = place.socket().to_str().unwrap().to_owned();
        Rig { place, socket }
    }

    fn path(&self, name: &str) -> String {
        self.place.dir.join(name).to_str().unwrap().to_owned()
    }

    fn config(&self, engine: &str) -> String {
        let tenant = |name: &str| {
            format!(
                "[[tenant]]\nname = \"{name}\"\ntoken_file = \"{}\"\nnsms = [\"of-{name}\"]\n",
                self.path(name)
            )
        };
        let text = format!(
            "[engine]\n{engine}\nusage = \"{}\"\n[[nsm]]\nname = \"of-blue\"\n[[nsm]]\nname = \"of-red\"\n{}{}",
            self.path("usage.redb"),
            tenant("blue"),
            tenant("red")
        );
        self.place.file("engine.toml", &text).to_str().unwrap().to_owned()
    }

    fn tls(&self) -> String {
        format!(
            "listen = \"127.0.0.1:0\"\ntls_certificate = \"{}\"\ntls_key = \"{}\"\nprovider_token_file = \"{}\"",
            self.path("cert.pem"),
            self.path("key.pem"),
            self.path("provider")
        )
    }
}

#[test]
fn tenants_see_themselves_over_the_socket_and_over_tls() {
    let rig = Rig::new("remote-roles");
    let config = rig.config(&rig.tls());
    let engine = rig.place.up(&["--socket", &rig.socket, "--config", &config]);
    let url = engine
        .line
        .split_whitespace()
        .find(|word| word.starts_with("https://"))
        .expect("an address")
        .to_owned();
    // A guest of each.
    let mut guests: Vec<_> = ["blue", "red"]
        .map(|tenant| {
            let token = rig.path(tenant);
            let mut command =
                rig.place.netkernel(&["run", "--socket", &rig.socket, "--tenant-token", &token]);
            command.args(["--name", &format!("guest-of-{tenant}"), "--", "cat"]).stdin(Stdio::piped());
            command.spawn().unwrap()
        })
        .into();
    until("both are there", || {
        let ps = rig.place.run(&["ps", "--socket", &rig.socket]).out;
        ps.contains("guest-of-blue") && ps.contains("guest-of-red")
    });
    let ca = rig.path("cert.pem");
    for access in [vec!["--socket", &rig.socket], vec!["--host", &url, "--ca-file", &ca]] {
        let ask = |who: &str, command: &[&str]| {
            let token = rig.path(who);
            rig.place.run(&[command, &access, &["--token-file", &token]].concat())
        };
        for (own, other) in [("blue", "red"), ("red", "blue")] {
            for command in [
                &["ps"][..],
                &["ps", "--json"],
                &["stacks"],
                &["tenants"],
                &["catalog"],
                &["sockets"],
                &["usage"],
            ] {
                let done = ask(own, command);
                let text = done.succeeds().out.clone();
                assert!(!text.contains(other), "{command:?} tells {own} of {other}: {text}");
                if !["sockets", "usage"].contains(&command[0]) {
                    assert!(text.contains(own), "{command:?} tells {own} of itself: {text}");
                }
            }
            ask(own, &["stop"]).fails(125, &["only the engine's user and root"]);
            ask(own, &["tenant", "set", own, "--max-send", "none"])
                .fails(125, &["for the engine's user and root only"]);
        }
        let all = ask("provider", &["ps"]).succeeds().out.clone();
        assert!(all.contains("guest-of-blue") && all.contains("guest-of-red"), "{all}");
        ask("nobody", &["ps"]).fails(125, &["nobody's on this engine"]);
    }
    rig.place.run(&["ps", "--host", &url, "--ca-file", &ca]).fails(125, &["--token-file"]);
    let token = rig.path("blue");
    rig.place
        .run(&["run", "--host", &url, "--ca-file", &ca, "--token-file", &token, "--", "true"])
        .fails(125, &["--host is for asking others"]);
    rig.place
        .run(&["stop", "--host", &url, "--ca-file", &ca, "--token-file", &rig.path("provider")])
        .succeeds();
    for guest in &mut guests {
        drop(guest.stdin.take());
        common::wait(guest, "a guest ends");
    }
    assert!(engine.wait().success());
}

#[test]
fn nothing_is_served_over_tcp_without_tls_and_tokens() {
    let rig = Rig::new("remote-refused");
    let refused = |engine: &str, words: &[&str]| {
        let config = rig.config(engine);
        rig.place.run(&["up", "--socket", &rig.socket, "--config", &config]).fails(125, words);
    };
    refused("listen = \"127.0.0.1:0\"", &["engine.toml, line 2", "with TLS only", "tls_certificate"]);
    let missing = rig.tls().replace("key.pem", "missing.pem");
    refused(&missing, &["private key", "missing.pem"]);
    refused(&rig.tls().replace("127.0.0.1:0", "localhost"), &["engine.toml, line 2", "listen"]);
    let same = rig.tls().replace("provider\"", "blue\"");
    refused(&same, &["the provider and tenant 'blue' have the same token"]);
    let text = format!("[engine]\n{}", rig.tls().lines().take(3).collect::<Vec<_>>().join("\n"));
    let config = rig.place.file("bare.toml", &text);
    rig.place
        .run(&["up", "--socket", &rig.socket, "--config", config.to_str().unwrap()])
        .fails(125, &["bare.toml, line 2", "provider_token_file"]);
}

/// What systemd does with a socket unit: the listening socket is descriptor 3, and the environment says so.
#[test]
fn a_socket_of_the_service_manager_is_served_and_left_there() {
    let rig = Rig::new("remote-activated");
    let listener = std::os::unix::net::UnixListener::bind(&rig.socket).unwrap();
    let start = |pid_is_right: bool| {
        let command = rig.place.netkernel(&["up", "--socket", &rig.path("other.sock")]);
        let fd = listener.as_raw_fd();
        let set = move || {
            // SAFETY: fcntl and dup2 touch descriptors only, and may be called after fork.
            unsafe {
                if fd == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0);
                } else {
                    libc::dup2(fd, 3);
                }
            }
            Ok(())
        };
        // The pid is known to the child only: a shell becomes the engine and keeps it.
        let mut shell = std::process::Command::new("sh");
        let pid = if pid_is_right { "$$" } else { "1" };
        shell.args(["-c", &format!("LISTEN_FDS=1 LISTEN_PID={pid} exec \"$@\""), "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(key, value),
                None => shell.env_remove(key),
            };
        }
        // SAFETY: it calls only what may be called after fork.
        unsafe { shell.pre_exec(set) };
        rig.place.start(shell)
    };
    // A client may come before the engine.
    let engine = start(true);
    assert!(engine.line.contains(&format!("ready at {} ", rig.socket)), "{}", engine.line);
    let ran = rig.place.run(&["run", "--socket", &rig.socket, "--", "sh", "-c", "echo ${LISTEN_FDS-none}"]);
    assert_eq!(ran.succeeds().out, "none\n");
    engine.end();
    assert!(std::path::Path::new(&rig.socket).exists(), "the socket is the service manager's");
    // What was meant for another process is not taken.
    let engine = start(false);
    assert!(engine.line.contains("other.sock"), "{}", engine.line);
    engine.end();
    // Something else than a listener.
    let mut command = std::process::Command::new("sh");
    let up = rig.place.netkernel(&["up"]);
    command.args(["-c", "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" up 3</dev/null"]).arg(up.get_program());
    command.env("NETKERNEL_RUNTIME_DIR", &rig.place.dir);
    common::finish(command).fails(125, &["no Unix stream socket that listens"]);
}
