//! Guests whose sockets carry numbered blocks while something happens to their engine.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;

use super::{Place, WATCHDOG, lines, wait};

/// Two streams of numbered blocks between two sockets, both ways, until a line comes in; then what was sent and received.
/// Beside them: an idle connection, a half-closed one, a UDP socket, an epoll set, and a call that blocks all the time.
pub const STREAMS: &str = r#"
import socket, select, sys, threading
BLOCK = 4096
def pair():
    c = socket.create_connection(l.getsockname())
    return c, l.accept()[0]
l = socket.create_server(('127.0.0.1', 0))
c, a = pair()
idle, idle_peer = pair()
half, half_peer = pair()
half.shutdown(socket.SHUT_WR)
late, late_peer = pair()
watched, watched_peer = pair()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))
ep = select.epoll(); ep.register(watched, select.EPOLLIN)
over = threading.Event()
sent, got, wrong = [0, 0], [0, 0], []
def put(s, way):
    while not over.is_set():
        s.sendall(sent[way].to_bytes(8, 'big') * (BLOCK // 8))
        sent[way] += 1
    s.shutdown(socket.SHUT_WR)
def take(s, way):
    rest = b''
    while True:
        data = s.recv(1 << 16)
        if not data: break
        rest += data
        while len(rest) >= BLOCK:
            if rest[:BLOCK] != got[way].to_bytes(8, 'big') * (BLOCK // 8): wrong.append((way, got[way])); return
            got[way] += 1; rest = rest[BLOCK:]
    if rest: wrong.append((way, 'a part of a block'))
blocked = []
def block(): blocked.append(late.recv(10))
threads = [threading.Thread(target=f, args=args) for f, args in
           ((put, (c, 0)), (take, (a, 0)), (put, (a, 1)), (take, (c, 1)), (block, ()))]
for t in threads: t.start()
print('up', flush=True)
sys.stdin.readline()
over.set()
idle.sendall(b'still'); still = idle_peer.recv(10)
half_peer.sendall(b'half'); ends = (half.recv(10), half_peer.recv(10))
late_peer.sendall(b'late')
v = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); v.sendto(b'dgram', u.getsockname())
u.settimeout(20); dgram = u.recv(10)
nothing = ep.poll(0); watched_peer.sendall(b'x'); event = ep.poll(20)
n, m = pair(); n.sendall(b'new'); new = m.recv(10)
for t in threads: t.join(20)
print(sent == got, min(sent) > 0, wrong, still, ends, blocked, dgram, nothing, len(event), new, sum(sent) * BLOCK, flush=True)
sys.stdin.readline()
"#;

pub const RIGHT: &str = "True True [] b'still' (b'half', b'') [b'late'] b'dgram' [] 1 b'new' ";

/// Holds 3000 pairs of sockets, says "up", and after a line on its standard input which of them do not carry bytes and ends any
/// more, then that it made as many again.
pub const THOUSANDS: &str = "
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
l = socket.create_server(('127.0.0.1', 0), backlog=100)
def pair(): c = socket.create_connection(l.getsockname()); return c, l.accept()[0]
pairs = [pair() for _ in range(3000)]
print('up', flush=True); sys.stdin.readline()
for n, (c, a) in enumerate(pairs): c.sendall(b'%d' % n)
wrong = [n for n, (c, a) in enumerate(pairs) if a.recv(10) != b'%d' % n]
for c, a in pairs: c.close()
wrong += [n for n, (c, a) in enumerate(pairs) if a.recv(10) != b'']
pairs = [pair() for _ in range(3000)]
print(wrong, flush=True); sys.stdin.readline()";

pub struct Guest(pub Child, pub Receiver<String>);

impl Guest {
    pub fn start(place: &Place, arguments: &[&str], program: &str) -> Guest {
        let mut command = place.netkernel(&["run"]);
        command.args(arguments).args(["--", "python3", "-c", program]);
        Guest::of(command)
    }

    pub fn of(mut command: Command) -> Guest {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = lines(child.stdout.take().unwrap());
        Guest(child, out)
    }

    #[track_caller]
    pub fn line(&self) -> String {
        self.1.recv_timeout(WATCHDOG).expect("the guest says something")
    }

    pub fn tell(&mut self) {
        writeln!(self.0.stdin.as_mut().unwrap()).unwrap();
    }

    pub fn ends(mut self) {
        self.tell();
        assert_eq!(wait(&mut self.0, "the guest").code(), Some(0));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Guests that there are.
pub fn guests(place: &Place) -> usize {
    place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().len()
}

/// Restarts that came about.
pub fn restarts(place: &Place) -> u64 {
    let ps = place.run(&["ps", "--json"]).json();
    ps["engines"][0]["restart"]["count"].as_u64().unwrap_or(0)
}
