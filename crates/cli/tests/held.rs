//! Direct sockets of a tenant that gets a cap while they are open: they are held to it, in both directions, without losing a byte, and
//! so is what their programs open from then on. How exactly, `netkernel bench isolation` measures: here nobody may be much faster, and
//! all go on.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::tenants::Rig;
use common::{until, wait};

/// Does what it is told on standard input: `s` opens a connection to the port and sends for ever, `r` opens one and receives, `x` opens
/// and closes connections for ever, each of 200,000 bytes, `u` sends datagrams to the port, `l` listens, says where, and receives what
/// comes there; `c` says what was received. A byte that is not what it should be ends it.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#define PERIOD 65521
static unsigned char pattern[2 * PERIOD];
static unsigned long received;
static struct sockaddr_in to = {.sin_family = AF_INET};
static void fail(const char *what) { perror(what); exit(1); }
static int begin(char how) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (void *)&to, sizeof to) || write(fd, &how, 1) != 1) fail("connect");
    return fd;
}
static void send_bytes(int fd, long most) {
    for (long at = 0, r; at < most; at += r)
        if ((r = write(fd, pattern + at % PERIOD, most - at < PERIOD ? most - at : PERIOD)) <= 0) fail("write");
}
static void receive(int fd) {
    unsigned char bytes[PERIOD];
    for (long at = 0, r; ; at += r) {
        if ((r = read(fd, bytes, sizeof bytes)) <= 0) { if (r < 0) fail("read"); close(fd); return; }
        if (memcmp(bytes, pattern + at % PERIOD, r)) { fprintf(stderr, "wrong bytes\n"); exit(1); }
        __sync_fetch_and_add(&received, r);
    }
}
static void *accepted(void *fd) { receive((long)fd); return 0; }
static void *act(void *how) {
    switch ((long)how) {
    case 's': send_bytes(begin('s'), 1l << 60); break;
    case 'r': receive(begin('r')); fail("end");
    case 'x': for (;;) { int fd = begin('s'); send_bytes(fd, 200000); shutdown(fd, SHUT_WR); char b; read(fd, &b, 1); close(fd); }
    case 'u': { int fd = socket(AF_INET, SOCK_DGRAM, 0); for (;;) sendto(fd, pattern, 1000, 0, (void *)&to, sizeof to); }
    case 'l': {
        struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t length = sizeof any;
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (bind(fd, (void *)&any, sizeof any) || listen(fd, 9) || getsockname(fd, (void *)&any, &length)) fail("listen");
        printf("%d\n", ntohs(any.sin_port));
        for (;;) { long one = accept(fd, 0, 0); pthread_t thread; pthread_create(&thread, 0, accepted, (void *)one); }
    } }
    return 0;
}
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOLBF, 0);
    for (long i = 0; i < 2 * PERIOD; i++) pattern[i] = i % PERIOD * 7 + i % PERIOD / 251;
    to.sin_port = htons(atoi(argv[1]));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int how; (how = getchar()) != EOF; ) {
        pthread_t thread;
        if (how == 'c') printf("%lu\n", received);
        else pthread_create(&thread, 0, act, (void *)(long)how);
    }
    printf("right\n");
    return 0;
}
"#;

const PERIOD: usize = 65_521;

fn pattern() -> Vec<u8> {
    (0..2 * PERIOD).map(|i| (i % PERIOD * 7 + i % PERIOD / 251) as u8).collect()
}

/// What the programs are connected to.
struct Peer {
    port: u16,
    received: Arc<AtomicU64>,
    wrong: Arc<AtomicBool>,
}

impl Peer {
    fn new() -> Peer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let peer = Peer { port, received: Arc::default(), wrong: Arc::default() };
        let (received, wrong) = (Arc::clone(&peer.received), Arc::clone(&peer.wrong));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (received, wrong) = (Arc::clone(&received), Arc::clone(&wrong));
                std::thread::spawn(move || serve(stream.unwrap(), &received, &wrong));
            }
        });
        peer
    }

    fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

fn serve(mut stream: TcpStream, received: &AtomicU64, wrong: &AtomicBool) {
    let (pattern, mut first) = (pattern(), [0]);
    if stream.read_exact(&mut first).is_err() {
        return;
    }
    if first[0] == b'r' {
        while stream.write_all(&pattern[..PERIOD]).is_ok() {}
        return;
    }
    let (mut at, mut bytes) = (0, vec![0; PERIOD]);
    while let Ok(n @ 1..) = stream.read(&mut bytes) {
        if bytes[..n] != pattern[at % PERIOD..][..n] {
            wrong.store(true, Relaxed);
        }
        at += n;
        received.fetch_add(n as u64, Relaxed);
    }
}

/// The program as a guest.
struct Guest {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Guest {
    fn start(rig: &Rig, options: &[&str], port: u16) -> Guest {
        let mut command = rig.place.netkernel(&["run", "--socket", &rig.socket]);
        command.args(options).arg("--").arg(rig.place.dir.join("load")).arg(port.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Guest { child, lines }
    }

    fn tell(&mut self, what: &str) {
        self.child.stdin.as_mut().unwrap().write_all(what.as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn received(&mut self) -> u64 {
        self.tell("c");
        self.line().parse().unwrap()
    }

    fn ends_right(mut self) {
        drop(self.child.stdin.take());
        assert_eq!(self.line(), "right");
        assert!(wait(&mut self.child, "the program ends").success());
    }
}

fn build(rig: &Rig) {
    rig.place.program("load", PROGRAM, &["-O2", "-static", "-pthread"]);
}

/// 5 MB/s.
const CAP: u64 = 5_000_000;
const CAPPED: [&str; 5] = ["own", "--max-send", "40 Mbit/s", "--max-receive", "40 Mbit/s"];
/// A connection that nobody holds makes this in the time that is measured, also on a busy machine.
const FREE: u64 = 60_000_000;

/// Bytes by the second, over three of them.
fn rate(mut count: impl FnMut() -> u64) -> f64 {
    let (began, before) = (Instant::now(), count());
    std::thread::sleep(Duration::from_secs(3));
    let after = count();
    (after - before) as f64 / began.elapsed().as_secs_f64()
}

fn is_held(rate: f64) -> bool {
    let of_cap = rate / CAP as f64;
    // The machine may be too busy for more; never for less.
    (0.4..1.1).contains(&of_cap)
}

fn explained(rig: &Rig) -> String {
    rig.ask(&["explain"]).succeeds().out.clone()
}

const HELD: &str = "direct: the guest has no preloaded library; held to the tenant's rates";

#[test]
fn sockets_that_are_open_are_held_to_a_cap_and_so_are_new_ones_until_it_is_lifted() {
    let rig = Rig::new("held-open");
    build(&rig);
    let token = rig.place.file("token", "0123456789abcdef0123456789abcdef\n");
    let token = token.to_str().unwrap();
    let engine =
        rig.up(&format!("{}[[tenant]]\nname = \"second\"\ntoken_file = \"{token}\"\n", Rig::own("")));
    let (peer, others) = (Peer::new(), Peer::new());
    let mut guest = Guest::start(&rig, &[], peer.port);
    let mut second = Guest::start(&rig, &["--tenant-token", token], others.port);
    guest.tell("sr");
    second.tell("s");
    until("all are fast", || peer.received() > FREE && guest.received() > FREE && others.received() > FREE);
    assert!(!explained(&rig).contains("held to"), "{}", explained(&rig));

    rig.ask(&[&["tenant"], &CAPPED[..]].concat()).succeeds();
    until("it is said", || explained(&rig).matches(HELD).count() == 2);
    // What was on the way when it was said, and what windows allowed before.
    std::thread::sleep(Duration::from_secs(1));
    let before = others.received();
    let sent = rate(|| peer.received());
    let free = others.received() - before;
    assert!(is_held(sent), "sent {sent}");
    assert!(free > FREE, "the other tenant's: {free}");
    let received = rate(|| guest.received());
    assert!(is_held(received), "received {received}");

    // More connections share the same rate, short ones too: their first packets are seen.
    guest.tell("ssxx");
    let sent = rate(|| peer.received());
    assert!(is_held(sent), "sent {sent} by five");
    guest.tell("rr");
    std::thread::sleep(Duration::from_secs(1));
    let received = rate(|| guest.received());
    assert!(is_held(received), "received {received} by three");

    rig.ask(&["tenant", "own", "--max-send", "none", "--max-receive", "none"]).succeeds();
    let (sent, received) = (peer.received(), guest.received());
    until("it is lifted", || peer.received() > sent + FREE && guest.received() > received + FREE);
    until("that is said", || !explained(&rig).contains("held to"));
    guest.ends_right();
    second.ends_right();
    assert!(!peer.wrong.load(Relaxed) && !others.wrong.load(Relaxed));
    engine.end();
}

#[test]
fn what_a_listener_accepts_and_datagrams_are_held_too() {
    let rig = Rig::new("held-listener");
    build(&rig);
    let engine = rig.up(&Rig::own(""));
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::start(&rig, &[], datagrams.local_addr().unwrap().port());
    guest.tell("l");
    let port: u16 = guest.line().parse().unwrap();
    let connect = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let pattern = pattern();
        std::thread::spawn(move || while stream.write_all(&pattern[..PERIOD]).is_ok() {});
    };
    connect();
    until("it is fast", || guest.received() > FREE);
    rig.ask(&[&["tenant"], &CAPPED[..]].concat()).succeeds();
    // One that there was, and one that comes later.
    connect();
    std::thread::sleep(Duration::from_secs(1));
    let received = rate(|| guest.received());
    assert!(is_held(received), "received {received}");

    let got = Arc::new(AtomicU64::new(0));
    let own = Arc::clone(&got);
    std::thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok(n) = datagrams.recv(&mut bytes) {
            own.fetch_add(n as u64, Relaxed);
        }
    });
    guest.tell("u");
    until("datagrams are seen", || explained(&rig).contains("what it sends is held to the tenant's rates"));
    // A datagram socket is seen when it is looked for.
    std::thread::sleep(Duration::from_secs(1));
    let sent = rate(|| got.load(Relaxed));
    assert!(is_held(sent), "sent {sent} in datagrams");
    guest.ends_right();
    engine.end();
}

#[test]
fn a_restart_keeps_the_cap_and_the_engines_death_ends_it_and_no_connection() {
    let rig = Rig::new("held-restart");
    build(&rig);
    let nsm = "[[nsm]]\nname = \"first\"\n";
    let mut engine = rig.up_with(&format!("{nsm}{}", Rig::own("")));
    let peer = Peer::new();
    let mut guest = Guest::start(&rig, &[], peer.port);
    guest.tell("sr");
    until("it is fast", || peer.received() > FREE && guest.received() > FREE);
    let capped = Rig::own("max_send = \"40 Mbit/s\"\nmax_receive = \"40 Mbit/s\"");
    rig.place.file("engine.toml", &format!("{nsm}{capped}"));
    rig.ask(&["reload"]).succeeds();
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..3 {
        rig.ask(&["restart"]).succeeds();
    }
    until("it is held again", || explained(&rig).matches(HELD).count() == 2);
    std::thread::sleep(Duration::from_secs(1));
    let (sent, received) = (rate(|| peer.received()), rate(|| guest.received()));
    assert!(is_held(sent) && is_held(received), "sent {sent}, received {received}");

    engine.child().kill().unwrap();
    engine.wait();
    let (sent, received) = (peer.received(), guest.received());
    until("nobody holds it", || peer.received() > sent + FREE && guest.received() > received + FREE / 10);
    guest.ends_right();
    assert!(!peer.wrong.load(Relaxed));
}

#[test]
fn the_process_of_an_nsm_holds_its_own() {
    let rig = Rig::new("held-process");
    build(&rig);
    let engine = rig.up_with(&format!("[[nsm]]\nname = \"apart\"\nform = \"process\"\n{}", Rig::own("")));
    let peer = Peer::new();
    let mut guest = Guest::start(&rig, &[], peer.port);
    guest.tell("sr");
    until("it is fast", || peer.received() > FREE && guest.received() > FREE);
    rig.ask(&[&["tenant"], &CAPPED[..]].concat()).succeeds();
    until("it is said", || explained(&rig).matches(HELD).count() == 2);
    std::thread::sleep(Duration::from_secs(1));
    let (sent, received) = (rate(|| peer.received()), rate(|| guest.received()));
    assert!(is_held(sent) && is_held(received), "sent {sent}, received {received}");
    // Its next process goes on.
    rig.ask(&["nsm", "restart", "apart"]).succeeds();
    until("it is said again", || explained(&rig).matches(HELD).count() == 2);
    std::thread::sleep(Duration::from_secs(2));
    let (sent, received) = (rate(|| peer.received()), rate(|| guest.received()));
    assert!(is_held(sent) && is_held(received), "sent {sent}, received {received} after its restart");
    rig.ask(&["tenant", "own", "--max-send", "none", "--max-receive", "none"]).succeeds();
    let (sent, received) = (peer.received(), guest.received());
    until("it is lifted", || peer.received() > sent + FREE && guest.received() > received + FREE);
    guest.ends_right();
    assert!(!peer.wrong.load(Relaxed));
    engine.end();
}
