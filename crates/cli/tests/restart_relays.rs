//! Relayed sockets, when the engine's program is exchanged under them.

mod common;

use common::Place;
use common::streams::{Guest, RIGHT, STREAMS, guests, restarts};
use common::until;

/// What descriptors of a process are, without their numbers.
fn descriptors(pid: i32) -> Vec<String> {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let link = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
    let mut all: Vec<String> = all.filter_map(link).map(|link| link.display().to_string()).collect();
    all.iter_mut().for_each(|link| link.truncate(link.find(['[', '/']).map_or(link.len(), |at| at.max(24))));
    all.sort();
    all
}

/// One stack, and a tenant of everybody here, whose limits follow.
fn capped() -> String {
    // SAFETY: cannot fail and touches no memory.
    let uid = unsafe { libc::geteuid() };
    format!("[[nsm]]\nname = \"kernel\"\n[[tenant]]\nname = \"capped\"\nusers = [{uid}]\n")
}

#[test]
fn relayed_sockets_go_on_through_ten_restarts_and_each_byte_is_metered_once() {
    let place = Place::new("restart-relay");
    let database = place.dir.join("usage.db");
    let config = place.file("nk.toml", &format!("[engine]\nusage = {database:?}\nswitch_threads = 2\n"));
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let arguments = ["--attach", "relay", "--name", "ten"];
    // Each switch thread has made its stack.
    let mut two: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &arguments, STREAMS)).collect();
    two.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    two.iter_mut().for_each(Guest::tell);
    let bytes = |said: String| {
        let bytes = said.strip_prefix(RIGHT).unwrap_or_else(|| panic!("{said}")).parse::<u64>().unwrap();
        // Beside the streams: still, half, late, dgram, x, new.
        bytes + 5 + 4 + 4 + 5 + 1 + 3
    };
    let mut payload: u64 = two.iter().map(|guest| bytes(guest.line())).sum();
    two.into_iter().for_each(Guest::ends);
    until("they are over", || guests(&place) == 0);
    let before = descriptors(engine.pid());
    let mut two: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &arguments, STREAMS)).collect();
    two.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    for _ in 0..10 {
        let told = place.run(&["restart", "--json"]).json();
        assert_eq!((&told["guests"], &told["lost"]), (&2.into(), &serde_json::json!([])), "{told}");
    }
    two.iter_mut().for_each(Guest::tell);
    payload += two.iter().map(|guest| bytes(guest.line())).sum::<u64>();
    two.into_iter().for_each(Guest::ends);
    until("they are over", || guests(&place) == 0);
    let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
    let row = &usage.as_array().or_else(|| usage["rows"].as_array()).unwrap()[0];
    assert_eq!((&row["bytes_in"], &row["bytes_out"]), (&payload.into(), &payload.into()), "{usage}");
    assert_eq!(restarts(&place), 10);
    until("nothing is left open", || descriptors(engine.pid()).len() <= before.len());
    engine.end();
}

/// Calls that wait, and what polls tell, before a restart, and after it.
const WAITS: &str = r#"
import errno, select, socket, struct, sys, threading, time
def listener(backlog=10):
    l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(backlog); return l
l = listener()
def pair(): c = socket.create_connection(l.getsockname()); return c, l.accept()[0]
said, threads = {}, []
def begin(name, work):
    def run():
        try: said[name] = work()
        except OSError as e: said[name] = errno.errorcode[e.errno]
    threads.append(threading.Thread(target=run)); threads[-1].start()
# Its queue is full: who connects waits.
full = listener(0); fillers = []
while True:
    s = socket.socket(); s.setblocking(False); s.connect_ex(full.getsockname())
    if not select.select([], [s], [], 0.5)[1]: pending = s; break
    fillers.append(s)
blocking = socket.socket()
def connect(): blocking.connect(full.getsockname()); return 'connected'
begin('connect', connect)
other = listener(); begin('accept', lambda: other.accept()[0].recv(9))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))
def receive(): data, (ip, port) = u.recvfrom(100); return data, ip
begin('recvfrom', receive)
late = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); late.bind(('127.0.0.1', 0))
late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack('ll', 4, 0))
def time_out():
    began = time.monotonic()
    try: late.recvfrom(100)
    except BlockingIOError: return 3.5 < time.monotonic() - began < 15
begin('time out', time_out)
quiet, quiet_peer = pair(); reset, reset_peer = pair(); ended, ended_peer = pair(); unread, unread_peer = pair()
ended_peer.sendall(b'before'); ended_peer.close(); unread_peer.sendall(b'unread')
reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
waiting = listener(); early = socket.create_connection(waiting.getsockname()); early.sendall(b'early')
marked, marked_peer = pair(); marked_peer.send(b'ab'); marked_peer.send(b'!', socket.MSG_OOB); marked_peer.send(b'cd')
poll = select.poll()
for s in quiet, pending, l, full: poll.register(s, select.POLLIN | select.POLLRDHUP | select.POLLPRI)
edges = select.epoll(); edges.register(quiet_peer, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
poll.unregister(full)
sent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); v = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
v.bind(('127.0.0.1', 0)); sent.connect(v.getsockname()); sent.send(b'on its way')
begin('poll', lambda: [(fd == quiet.fileno(), e) for fd, e in poll.poll(25000)])
print('up', flush=True); sys.stdin.readline()
linger = struct.unpack('ii', reset.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
right = [
    said == {}, linger == (1, 0), edges.poll(0) == [],
    select.select([waiting], [], [], 0)[0] == [waiting], waiting.accept()[0].recv(9) == b'early',
    (ended.recv(9), ended.recv(9)) == (b'before', b''), unread.recv(9) == b'unread',
    v.recvfrom(100) == (b'on its way', sent.getsockname()),
    marked.recv(9) == b'ab' and marked.recv(1, socket.MSG_OOB) == b'!' and marked.recv(9) == b'cd',
]
reset.close()
try: reset_peer.recv(1); right.append(False)
except ConnectionResetError: right.append(True)
quiet_peer.sendall(b'x'); quiet.sendall(b'y'); right.append(len(edges.poll(20)) == 1)
again = socket.create_connection(other.getsockname()); again.sendall(b'taken')
sent.sendto(b'hello', u.getsockname())
for _ in range(len(fillers) + 2): full.accept()
right.append(select.select([], [pending], [], 20)[1] == [pending] and pending.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0)
for t in threads: t.join(25)
expected = {'connect': 'connected', 'accept': b'taken', 'recvfrom': (b'hello', '127.0.0.1'), 'time out': True, 'poll': [(True, select.POLLIN)]}
print(right.count(True), right if False in right else '', said if said != expected else '', flush=True); sys.stdin.readline()
"#;

#[test]
fn calls_that_wait_are_answered_and_polls_see_no_end_that_is_none() {
    let place = Place::new("restart-relay-waits");
    let engine = place.up(&[]);
    let mut guest = Guest::start(&place, &["--attach", "relay"], WAITS);
    assert_eq!(guest.line(), "up");
    for _ in 0..3 {
        place.run(&["restart"]).succeeds();
    }
    guest.tell();
    assert_eq!(guest.line(), "12  ");
    guest.ends();
    engine.end();
}

/// Connections that come and go all the time, and large streams, of a tenant that has limits.
const CHURN: &str = r#"
import hashlib, os, socket, sys, threading
l = socket.create_server(('127.0.0.1', 0), backlog=100)
def pair(): c = socket.create_connection(l.getsockname()); return c, l.accept()[0]
over, made, wrong = threading.Event(), [0], []
big, its = pair(); back, its_back = pair()
hashes = [[hashlib.sha256() for _ in 'ab'] for _ in 'ab']
block = os.urandom(1 << 20)
def put(s, n):
    while not over.is_set(): s.sendall(block); hashes[n][0].update(block)
    s.close()
def take(s, n):
    while data := s.recv(1 << 20): hashes[n][1].update(data)
m = socket.create_server(('127.0.0.1', 0), backlog=100)
def serve():
    while True:
        s, _ = m.accept()
        data = s.recv(100)
        if data == b'over': return
        s.sendall(data[::-1]); s.close()
def churn():
    n = 0
    while not over.is_set():
        try:
            s = socket.create_connection(m.getsockname()); text = b'%d' % n; s.sendall(text)
            if s.recv(100) != text[::-1] or s.recv(1) != b'': wrong.append(n)
            s.close(); made[0] += 1
        except OSError as e: wrong.append((n, e.errno))
        n += 1
    s = socket.create_connection(m.getsockname()); s.sendall(b'over'); s.close()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))
def echo():
    while True:
        data, who = u.recvfrom(2000)
        if data == b'over': return
        u.sendto(data, who)
def ask():
    v = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); n = 0; v.settimeout(20)
    while not over.is_set():
        text = b'%d' % n; v.sendto(text, u.getsockname()); n += 1
        if v.recvfrom(2000) != (text, u.getsockname()): wrong.append('datagram')
    v.sendto(b'over', u.getsockname()); made[0] += n
threads = [threading.Thread(target=f, args=a) for f, a in
           ((put, (big, 0)), (take, (its, 0)), (put, (its_back, 1)), (take, (back, 1)), (serve, ()), (churn, ()), (echo, ()), (ask, ()))]
for t in threads: t.start()
print('up', flush=True); sys.stdin.readline(); over.set()
for t in threads: t.join(25)
equal = [a.digest() == b.digest() for a, b in hashes]
print(equal, wrong[:3], made[0] > 20, flush=True); sys.stdin.readline()
"#;

#[test]
fn connections_that_come_and_go_and_bulk_go_on_with_and_without_limits() {
    let place = Place::new("restart-relay-churn");
    let text = capped();
    let caps = "max_send = \"400 Mbit/s\"\nmax_receive = \"400 Mbit/s\"\nmax_connections = 100\n";
    for (attach, caps) in [("relay", ""), ("relay", caps), ("auto", caps)] {
        let config = place.file("nk.toml", &format!("{text}{caps}"));
        let engine = place.up(&["--config", config.to_str().unwrap()]);
        let mut guest = Guest::start(&place, &["--attach", attach], CHURN);
        assert_eq!(guest.line(), "up");
        for _ in 0..10 {
            place.run(&["restart"]).succeeds();
        }
        guest.tell();
        assert_eq!(guest.line(), "[True, True] [] True", "{attach} {caps}");
        let explained = place.run(&["explain", "--json"]).out;
        assert!(attach == "auto" || explained.contains("relay"), "{explained}");
        guest.ends();
        until("the guest is over", || guests(&place) == 0);
        assert_eq!(restarts(&place), 10);
        engine.end();
    }
}

/// A program that ended has sent more than its peer took: the relay goes on sending.
#[test]
fn what_a_dead_program_sent_arrives_behind_a_restart() {
    let place = Place::new("restart-relay-linger");
    let engine = place.up(&[]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let program = format!(
        "import socket
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192); s.connect(('127.0.0.1', {}))
s.settimeout(1); n = 0
try:
    while True: n += s.send(bytes([n // 1000 % 251]) * 1000 if n % 1000 == 0 else bytes([n // 1000 % 251]) * (1000 - n % 1000))
except TimeoutError: print(n, flush=True)",
        listener.local_addr().unwrap().port()
    );
    let guest = Guest::start(&place, &["--attach", "relay"], &program);
    let (mut peer, _) = listener.accept().unwrap();
    let sent: usize = guest.line().parse().unwrap();
    until("the program has ended", || {
        std::fs::read_to_string(format!("/proc/{}/stat", guest.0.id()))
            .is_ok_and(|stat| stat.contains(") Z "))
    });
    for _ in 0..3 {
        place.run(&["restart"]).succeeds();
    }
    assert_eq!(guests(&place), 1, "its relay is there");
    let mut got = Vec::new();
    std::io::Read::read_to_end(&mut peer, &mut got).unwrap();
    assert_eq!(got.len(), sent);
    assert!(got.iter().enumerate().all(|(n, byte)| usize::from(*byte) == n / 1000 % 251));
    until("the guest is over", || guests(&place) == 0);
    engine.end();
}

/// Connections of before a restart count against what the tenant may have.
#[test]
fn connections_are_counted_again() {
    let place = Place::new("restart-relay-counted");
    let text = capped() + "max_connections = 6\n";
    let config = place.file("nk.toml", &text);
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let program = format!(
        "import socket, sys
def connect(): return socket.create_connection(('127.0.0.1', {}))
def more():
    new = []
    try:
        while len(new) < 20: new.append(connect())
    except OSError: return len(new)
all = [connect() for _ in range(4)]; print('up', flush=True); sys.stdin.readline()
first = more(); all.clear(); print(first, more(), flush=True); sys.stdin.readline()",
        listener.local_addr().unwrap().port()
    );
    for attach in ["relay", "queued"] {
        let mut guest = Guest::start(&place, &["--attach", attach], &program);
        assert_eq!(guest.line(), "up");
        place.run(&["restart"]).succeeds();
        place.run(&["restart"]).succeeds();
        guest.tell();
        assert_eq!(guest.line(), "2 6", "{attach}");
        guest.ends();
        until("the guest is over", || guests(&place) == 0);
    }
    engine.end();
}
