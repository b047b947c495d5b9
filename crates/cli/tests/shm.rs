//! Guests that are joined in memory, one of which is killed: the other sees what TCP would show it, what came is intact, and
//! nothing is left. `NETKERNEL_SHM_ROUNDS` makes it more than a few rounds.

mod common;

use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::{Place, WATCHDOG, lines, until};

/// A guest on the shared-memory stack; its process tree is killed with the value.
struct Peer {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Peer {
    fn start(place: &Place, args: &[&str]) -> Peer {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/shm/peer.py");
        let mut command = place.netkernel(&["run", "--stack", "shm", "--", "python3", script]);
        command.args(args).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        Peer { stdin: child.stdin.take().unwrap(), child, lines }
    }

    /// What follows `word` in the next line, which begins with it.
    #[track_caller]
    fn told(&self, word: &str) -> String {
        let line = self.lines.recv_timeout(WATCHDOG).expect("the peer says something");
        let rest = line.strip_prefix(word).unwrap_or_else(|| panic!("{line:?}, not {word}"));
        rest.trim().to_owned()
    }

    fn kill(&mut self) {
        // SAFETY: the group of a child that was not waited for.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.kill();
        }
    }
}

fn explained(place: &Place) -> String {
    let done = place.run(&["explain"]);
    done.out
}

fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn resident_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// `shm` with or without memory that both guests map.
fn pair(place: &Place, on: bool) -> String {
    let text = format!("[[nsm]]\nname = \"shm\"\nstack = \"shm\"\npair = {on}\n");
    place.file("engine.toml", &text).to_str().unwrap().to_owned()
}

#[test]
fn killed_peers_end_as_tcp_would_and_leave_nothing() {
    killed_peers("shm-killed-pair", true, "in memory that both map");
}

#[test]
fn killed_peers_of_the_engine_end_as_tcp_would_and_leave_nothing() {
    killed_peers("shm-killed", false, "which copies: pair is off");
}

fn killed_peers(name: &str, on: bool, way: &str) {
    let rounds: usize = std::env::var("NETKERNEL_SHM_ROUNDS").map_or(6, |n| n.parse().unwrap());
    let seed = std::env::var("NETKERNEL_FAULTS_SEED").ok().and_then(|text| text.parse().ok());
    let mut random = seed.unwrap_or_else(|| std::process::id() as u64 | 1);
    println!("NETKERNEL_FAULTS_SEED={random}");
    let place = Place::new(name);
    let engine = place.up(&["--config", &pair(&place, on)]);
    let (mut base, mut outcomes) = ((0, 0), std::collections::BTreeMap::new());
    for round in 0..rounds {
        let mut server = Peer::start(&place, &["server"]);
        let port = server.told("port");
        let mut client = Peer::start(&place, &["client", &port]);
        server.told("ready");
        client.told("ready");
        if round == 0 {
            assert!(explained(&place).contains(way), "{}", explained(&place));
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(random % 60_000));
        let (victim, survivor) =
            if random & 1 == 0 { (&mut server, &client) } else { (&mut client, &server) };
        victim.kill();
        let over = survivor.told("over");
        let outcome = over.split(' ').next().unwrap().to_owned();
        assert!(matches!(&*outcome, "end" | "ECONNRESET" | "EPIPE"), "round {round}: {over}");
        *outcomes.entry(outcome).or_insert(0) += 1;
        drop((server, client));
        until("both guests are over", || !explained(&place).contains("guest "));
        let port: u16 = port.parse().unwrap();
        until("the port is free", || TcpListener::bind(("127.0.0.1", port)).is_ok());
        if round == 2 {
            base = (descriptors(engine.pid()), resident_kib(engine.pid()));
        }
    }
    println!("{rounds} rounds: {outcomes:?}");
    until("no descriptors are left", || descriptors(engine.pid()) <= base.0);
    let now = resident_kib(engine.pid());
    assert!(now < base.1 + 8192, "{} KiB after three rounds, {now} KiB now", base.1);
    engine.end();
}

#[test]
fn what_was_written_before_a_kill_is_read() {
    for on in [true, false] {
        written_before_a_kill(on);
    }
}

fn written_before_a_kill(on: bool) {
    let place = Place::new(&format!("shm-written-{on}"));
    let engine = place.up(&["--config", &pair(&place, on)]);
    let mut reader = Peer::start(&place, &["reader"]);
    let port = reader.told("port");
    let mut writer = Peer::start(&place, &["writer", &port]);
    reader.told("accepted");
    writer.told("written");
    writer.kill();
    writeln!(reader.stdin).unwrap();
    reader.told("ready");
    assert_eq!(reader.told("over"), "end 20000");
    engine.end();
}

#[test]
fn guests_are_joined_only_where_the_configuration_says_so() {
    let place = Place::new("shm-policy");
    let config = place.file(
        "engine.toml",
        "[[nsm]]\nname = \"shm\"\nstack = \"kernel\"\n[[nsm]]\nname = \"memory\"\nstack = \"kernel\"\nmemory = true\n",
    );
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let server = Peer::start(&place, &["server"]);
    let client = Peer::start(&place, &["client", &server.told("port")]);
    server.told("ready");
    client.told("ready");
    let explained = explained(&place);
    assert!(explained.contains("127.0.0.1") && !explained.contains("in memory"), "{explained}");
    drop((server, client));
    engine.end();
}

/// A tenant with a rate is policed, which only the engine can do.
#[test]
fn guests_of_a_limited_tenant_share_no_memory() {
    let place = Place::new("shm-limited");
    // SAFETY: cannot fail.
    let uid = unsafe { libc::getuid() };
    let config = place.file(
        "engine.toml",
        &format!(
            "[[nsm]]\nname = \"shm\"\nstack = \"shm\"\n[[tenant]]\nname = \"slow\"\nusers = [{uid}]\nmax_send = \"1 Gbit/s\"\n"
        ),
    );
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let server = Peer::start(&place, &["server"]);
    let client = Peer::start(&place, &["client", &server.told("port")]);
    server.told("ready");
    client.told("ready");
    let explained = explained(&place);
    assert!(explained.contains("which copies: their tenant's rates are limited"), "{explained}");
    drop((server, client));
    engine.end();
}

/// What a guest writes into the memory that it shares with another harms its own connections only.
#[test]
fn a_guest_that_writes_anything_into_shared_memory_harms_nobody_else() {
    let place = Place::new("shm-hostile");
    let engine = place.up(&["--config", &pair(&place, true)]);
    let server = Peer::start(&place, &["echo"]);
    let port = server.told("port");
    let mut asker = Peer::start(&place, &["asker", &port]);
    let mut ask = |word: &str| {
        writeln!(asker.stdin, "{word}").unwrap();
        assert_eq!(asker.told("got"), word);
    };
    ask("before");
    for round in 0..3 {
        let hostile = Peer::start(&place, &["hostile", &port]);
        ask(&format!("during{round}"));
        hostile.told("done");
        ask(&format!("after{round}"));
    }
    assert!(explained(&place).contains("in memory that both map"), "{}", explained(&place));
    drop((asker, server));
    until("all guests are over", || !explained(&place).contains("guest "));
    engine.end();
}
