//! Connections in memory, when the engine's program is exchanged under them.

mod common;

use common::python::Python;
use common::streams::{Guest, RIGHT, STREAMS, guests, restarts};
use common::{Place, until};

/// Both ends in one guest, on one thread: pairs of queues, or links that the engine copies; and of relays.
#[test]
fn connections_within_a_guest_go_on_through_ten_restarts_and_each_byte_is_metered_once() {
    for (name, pair, attach, both) in
        [("pairs", true, "auto", true), ("links", false, "auto", false), ("relays", true, "relay", false)]
    {
        let place = Place::new(&format!("restart-joined-{name}"));
        let database = place.dir.join("usage.db");
        let text = format!(
            "[engine]\nusage = {database:?}\nswitch_threads = 2\n[[nsm]]\nname = \"joined\"\nstack = \"shm\"\npair = {pair}\n"
        );
        let config = place.file("nk.toml", &text);
        let engine = place.up(&["--config", config.to_str().unwrap()]);
        let arguments = ["--attach", attach, "--name", "ten"];
        let mut two: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &arguments, STREAMS)).collect();
        two.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
        let explained = place.run(&["explain"]).out;
        assert_eq!(explained.contains("in memory that both map"), both, "{explained}");
        for _ in 0..10 {
            let told = place.run(&["restart", "--json"]).json();
            assert_eq!((&told["guests"], &told["lost"]), (&2.into(), &serde_json::json!([])), "{told}");
        }
        let mut payload = 0;
        for guest in &mut two {
            guest.tell();
            let said = guest.line();
            let bytes = said.strip_prefix(RIGHT).unwrap_or_else(|| panic!("{name}: {said}"));
            payload += bytes.parse::<u64>().unwrap() + 5 + 4 + 4 + 5 + 1 + 3;
        }
        two.into_iter().for_each(Guest::ends);
        until("they are over", || guests(&place) == 0);
        let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
        let row = &usage.as_array().or_else(|| usage["rows"].as_array()).unwrap()[0];
        // Of a pair, bytes that nobody reads are not received: one of each guest.
        let received = payload - if both { 2 } else { 0 };
        assert_eq!(
            (&row["bytes_in"], &row["bytes_out"]),
            (&received.into(), &payload.into()),
            "{name} {usage}"
        );
        assert_eq!(restarts(&place), 10);
        engine.end();
    }
}

/// One of two guests that are joined; PORT is the other one's, or 0.
const ONE: &str = r#"
import hashlib, os, select, socket, sys, threading
client = PORT != 0
def listener(backlog): l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(backlog); return l
if client:
    def connect(port=PORT): return socket.create_connection(('127.0.0.1', port))
    c = connect(); full = int.from_bytes(c.recv(2), 'big')
    streams, idle, half, late, unread, quiet, gone = [connect() for _ in range(7)]
    # One that nobody has accepted, and one that waits for room.
    untaken = connect(full); untaken.sendall(b'untaken')
    pending = socket.socket(); pending.setblocking(False); pending.connect_ex(('127.0.0.1', full))
    assert not select.select([], [pending], [], 0.3)[1]
else:
    l, full = listener(20), listener(0)
    print(l.getsockname()[1], flush=True)
    c = l.accept()[0]; c.sendall(full.getsockname()[1].to_bytes(2, 'big'))
    streams, idle, half, late, unread, quiet, gone = [l.accept()[0] for _ in range(7)]
over, hashes, blocked = threading.Event(), [hashlib.sha256(), hashlib.sha256()], []
blocks = [os.urandom(n) for n in (1, 100, 4096, 5000, 70000, 300000)]
def put():
    n = 0
    while not over.is_set(): streams.sendall(blocks[n % 6]); hashes[0].update(blocks[n % 6]); n += 1
    streams.shutdown(socket.SHUT_WR)
def take():
    while data := streams.recv(1 << 17): hashes[1].update(data)
def block(): blocked.append(late.recv(10) if client else b'')
threads = [threading.Thread(target=f) for f in (put, take, block)]
for t in threads: t.start()
unread.sendall(b'before')
if client: half.shutdown(socket.SHUT_WR)
polled = select.poll(); polled.register(quiet, select.POLLIN | select.POLLRDHUP)
print('up', flush=True); sys.stdin.readline(); over.set()
wrong = [] if polled.poll(0) == [] else ['quiet']
def check(name, got, wanted):
    if got != wanted: wrong.append((name, got))
def whole(s, n):
    data = b''
    while len(data) < n and (more := s.recv(n - len(data))): data += more
    return data
idle.sendall(b'idle'); check('idle', whole(idle, 4), b'idle'); check('unread', whole(unread, 6), b'before')
if client:
    check('half', whole(half, 4), b'half')
    check('room', select.select([], [pending], [], 20)[1], [pending])
    pending.setblocking(True)
    check('error', pending.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0)
    check('pending', whole(pending, 1), b'p'); check('untaken', whole(untaken, 1), b'u')
    again = connect(); again.sendall(b'again')
else:
    check('half', half.recv(10), b''); half.sendall(b'half'); late.sendall(b'late')
    first = full.accept()[0]; check('first', whole(first, 7), b'untaken'); first.sendall(b'u')
    full.accept()[0].sendall(b'p'); check('again', whole(l.accept()[0], 5), b'again')
for t in threads: t.join(25)
if client: check('late', blocked, [b'late'])
print(wrong, *[h.hexdigest() for h in hashes], flush=True); sys.stdin.readline()
"#;

fn pair_of_guests(place: &Place, arguments: &[&str]) -> (Guest, Guest) {
    let server = Guest::start(place, arguments, &ONE.replace("PORT", "0"));
    let port = server.line();
    let client = Guest::start(place, arguments, &ONE.replace("PORT", &port));
    assert_eq!((server.line().as_str(), client.line().as_str()), ("up", "up"));
    (server, client)
}

/// What each says: nothing is wrong, and each got what the other sent.
fn both_are_right(server: &mut Guest, client: &mut Guest) {
    server.tell();
    client.tell();
    let (one, other) = (server.line(), client.line());
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let (one, other) = (words(&one), words(&other));
    assert_eq!((one[0].as_str(), other[0].as_str()), ("[]", "[]"), "{one:?} {other:?}");
    assert_eq!((&one[1], &one[2]), (&other[2], &other[1]));
}

fn joined(place: &Place, pair: bool) -> common::Engine {
    let nsm = format!("[[nsm]]\nname = \"joined\"\nstack = \"shm\"\npair = {pair}\n");
    let config = place.file("nk.toml", &format!("[engine]\nswitch_threads = 2\n{nsm}"));
    place.up(&["--config", config.to_str().unwrap()])
}

fn descriptors(engine: &common::Engine) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", engine.pid())).unwrap().count()
}

/// Guests of two switch threads, with connections in every state between them.
#[test]
fn connections_between_guests_go_on_and_nothing_is_left_of_them() {
    for (name, pair, attach) in [("pairs", true, "auto"), ("links", false, "auto"), ("relays", true, "relay")]
    {
        let place = Place::new(&format!("restart-between-{name}"));
        let engine = joined(&place, pair);
        let mut before = 0;
        for turn in 0..2 {
            let (mut server, mut client) = pair_of_guests(&place, &["--attach", attach]);
            for _ in 0..5 * turn {
                place.run(&["restart"]).succeeds();
            }
            both_are_right(&mut server, &mut client);
            server.ends();
            client.ends();
            until("they are over", || guests(&place) == 0);
            match turn {
                0 => before = descriptors(&engine),
                _ => until("nothing is left open", || descriptors(&engine) <= before),
            }
        }
        engine.end();
    }
}

/// A guest dies behind a restart: the other one learns of it, whatever its stack was told before.
#[test]
fn the_end_of_a_guest_is_seen_by_the_one_it_was_joined_with() {
    for pair in [true, false] {
        let place = Place::new(&format!("restart-end-{pair}"));
        let engine = joined(&place, pair);
        let server = Guest::start(
            &place,
            &[],
            "import socket, sys
l = socket.create_server(('127.0.0.1', 0)); print(l.getsockname()[1], flush=True)
s = l.accept()[0]; t = l.accept()[0]; t.sendall(bytes(70000)); print('up', flush=True); print(s.recv(1), flush=True)
try: print(t.recv(1))
except OSError as e: print(e.errno)
sys.stdout.flush(); sys.stdin.readline()",
        );
        let port = server.line();
        let program = format!(
            "import socket, sys
s = socket.create_connection(('127.0.0.1', {port})); t = socket.create_connection(('127.0.0.1', {port}))
t.recv(1, socket.MSG_PEEK); print('up', flush=True); sys.stdin.readline()"
        );
        let client = Guest::start(&place, &[], &program);
        assert_eq!((server.line().as_str(), client.line().as_str()), ("up", "up"));
        place.run(&["restart"]).succeeds();
        drop(client);
        assert_eq!((server.line().as_str(), server.line().as_str()), ("b''", "104"), "pair = {pair}");
        place.run(&["restart"]).succeeds();
        server.ends();
        engine.end();
    }
}

/// Datagram sockets stay joined, and what waits in memory, in the guest's ring and behind it, is there afterwards, in order.
#[test]
fn datagrams_in_memory_go_on() {
    let place = Place::new("restart-joined-datagrams");
    let config = place.file("nk.toml", "[[nsm]]\nname = \"joined\"\nstack = \"shm\"\n");
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let [mut one, mut other] = [0, 1].map(|_| Python::start(&place));
    let bind = "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0)); say(u.getsockname()[1])";
    let port = one.run(bind);
    other.run(bind);
    other.run(&format!("u.connect(('127.0.0.1', {port})); say(1)"));
    let explained = || place.run(&["explain"]).out;
    // Until there is no room any more, in the ring and behind it.
    let mut sent: u64 = 0;
    until("there is no room", || {
        let line =
            format!("[u.send(n.to_bytes(4, 'big') * 500) for n in range({sent}, {sent} + 100)]; say(1)");
        other.run(&line);
        sent += 100;
        explained().lines().any(|line| line.contains(" dropped)") && !line.contains(" 0 dropped)"))
    });
    place.run(&["restart"]).succeeds();
    // The first ones of those that were sent, and all of these.
    one.run("u.setblocking(False); got = []; say(1)");
    let take = "
while True:
 try: got.append(u.recv(4000))
 except BlockingIOError: break
say(len(got))
";
    let take = format!("exec({take:?})");
    let (mut count, mut same) = (one.run(&take), 0);
    until("all came", || {
        let now = one.run(&take);
        same = if now == count { same + 1 } else { 0 };
        count = now;
        same > 3
    });
    let whole =
        "say(all(d == n.to_bytes(4, 'big') * 500 for n, d in enumerate(got)), len(got) * 2000 > 150000)";
    assert_eq!(one.run(whole), "True True", "{count} of {sent}");
    // Both ways, by memory as before.
    other.run("u.settimeout(20); u.send(b'after'); say(1)");
    assert_eq!(
        one.run("u.settimeout(20); d, peer = u.recvfrom(9); u.sendto(d + b'!', peer); say(d)"),
        "b'after'"
    );
    assert_eq!(other.run("say(u.recv(9))"), "b'after!'");
    let explained = explained();
    assert_eq!(explained.matches("reached in memory").count(), 2, "{explained}");
    one.ends();
    other.ends();
    engine.end();
}
