//! Sockets that cannot go on when the engine's program is exchanged: refused by name, or given up.

mod common;

use std::io::Read as _;
use std::net::TcpListener;

use common::namespace::{Namespace, can_run};
use common::streams::{Guest, RIGHT, STREAMS, guests, restarts};
use common::{Place, WATCHDOG, finish, until};

/// What each socket of a stack in the engine's process is told when it ends.
const FLEETING: &str = r#"
import errno, select, socket, sys, threading
def listener(): l = socket.socket(); l.bind(('0.0.0.0', 0)); l.listen(); return l
c = socket.create_connection(('10.9.0.1', 8080)); d = socket.create_connection(('10.9.0.1', 8080))
d.setblocking(False); poll = select.poll(); poll.register(d, select.POLLIN)
l = listener(); said = {}
def begin(name, work):
    def run():
        try: said[name] = work()
        except OSError as e: said[name] = errno.errorcode[e.errno]
    t = threading.Thread(target=run); t.start(); return t
threads = [begin('recv', lambda: c.recv(1)), begin('accept', l.accept), begin('poll', lambda: poll.poll(25000)[0][1] & (select.POLLERR | select.POLLHUP))]
print('up', flush=True); sys.stdin.readline()
for t in threads: t.join(25)
try: said['again'] = d.recv(1)
except OSError as e: said['again'] = errno.errorcode[e.errno]
for s in c, d, l: s.close()
n = socket.create_connection(('10.9.0.1', 8080)); n.sendall(b'GET / HTTP/1.0\r\n\r\n'); new = n.recv(4)
print(said == {'recv': 'ECONNRESET', 'accept': 'ENETDOWN', 'poll': select.POLLERR | select.POLLHUP, 'again': 'ECONNRESET'} or said, new, flush=True)
sys.stdin.readline()"#;

#[test]
fn a_stack_that_cannot_go_on_is_named_and_loses_its_sockets_only_when_that_is_asked_for() {
    if !can_run() {
        return;
    }
    let (place, namespace) = (Place::new("restart-lose"), Namespace::new("lose"));
    let config = place.file("nk.toml", &format!("[[nsm]]\nname = \"kernel\"\n{}", namespace.config()));
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let mut server = namespace.command(&["python3", "-m", "http.server", "--bind", "10.9.0.1", "8080"]);
    server.current_dir(&place.dir).stderr(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let _server = common::Engine::of(server.spawn().unwrap());
    until("the server listens", || {
        !finish(namespace.command(&["ss", "-Hltn", "sport", "=", ":8080"])).out.is_empty()
    });
    let mut kernel: Vec<Guest> = ["auto", "relay"]
        .iter()
        .map(|attach| Guest::start(&place, &["--stack", "kernel", "--attach", attach], STREAMS))
        .collect();
    kernel.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    for attach in ["queued", "relay"] {
        let mut guest = Guest::start(&place, &["--stack", "small", "--attach", attach], FLEETING);
        assert_eq!(guest.line(), "up");
        let stack = "its sockets of stack small, whose state is in this process";
        place.run(&["restart"]).fails(125, &["would lose", stack, "--lose"]);
        let told = place.run(&["restart", "--lose", "--json"]).json();
        assert_eq!((&told["guests"], told["reset"].as_array().unwrap().len()), (&3.into(), 1), "{told}");
        guest.tell();
        assert_eq!(guest.line(), "True b'HTTP'", "{attach}");
        guest.ends();
        until("it is over", || guests(&place) == 2);
    }
    for guest in &mut kernel {
        guest.tell();
        let said = guest.line();
        assert!(said.starts_with(RIGHT), "{said}");
    }
    kernel.into_iter().for_each(Guest::ends);
    assert_eq!(restarts(&place), 2);
    engine.end();
}

/// A relay waits for memory that its guest does not give.
const STUCK: &str = r#"
import ctypes, errno, mmap, os, socket, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(323, 0)
if fd < 0: print('not here', flush=True); sys.exit()
import fcntl
fcntl.ioctl(fd, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))
page = mmap.mmap(-1, 4096); at = ctypes.addressof(ctypes.c_char.from_buffer(page))
fcntl.ioctl(fd, 0xc020aa00, bytearray(struct.pack('QQQQ', at, 4096, 1, 0)))
s = socket.socket(); said = []
def connect(): libc.connect(s.fileno(), ctypes.c_void_p(at), 16); said.append(errno.errorcode[ctypes.get_errno()])
t = threading.Thread(target=connect); t.start(); print('up', flush=True)
sys.stdin.readline(); t.join(25)
l = socket.create_server(('127.0.0.1', 0)); n = socket.create_connection(l.getsockname())
print(said, l.accept()[0] is not None, flush=True); sys.stdin.readline()"#;

#[test]
fn a_relay_that_its_guest_has_stopped_holds_no_restart_up_that_may_lose_it() {
    let place = Place::new("restart-stuck");
    let engine = place.up(&[]);
    let mut stuck = Guest::start(&place, &["--attach", "relay"], STUCK);
    let said = stuck.line();
    if said == "not here" {
        println!("not run: userfaultfd is not allowed here");
        return;
    }
    assert_eq!(said, "up");
    let mut other = Guest::start(&place, &["--attach", "relay"], STREAMS);
    assert_eq!(other.line(), "up");
    place.run(&["restart"]).fails(125, &["guest 1", "its relay does not answer", "--lose"]);
    assert_eq!(restarts(&place), 0);
    place.run(&["restart", "--lose"]).succeeds();
    stuck.tell();
    assert_eq!(stuck.line(), "['ENETDOWN'] True");
    other.tell();
    let said = other.line();
    assert!(said.starts_with(RIGHT), "{said}");
    stuck.ends();
    other.ends();
    engine.end();
}

#[test]
fn a_restart_that_fails_leaves_relayed_and_joined_guests_as_they_were() {
    let place = Place::new("restart-undone");
    let config =
        place.file("nk.toml", "[[nsm]]\nname = \"kernel\"\n[[nsm]]\nname = \"joined\"\nstack = \"shm\"\n");
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let ways: [&[&str]; 3] =
        [&["--attach", "relay"], &["--stack", "joined"], &["--stack", "joined", "--attach", "relay"]];
    let mut all: Vec<Guest> = ways.iter().map(|arguments| Guest::start(&place, arguments, STREAMS)).collect();
    all.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    // One that says yes twice and is gone then.
    let broken = place.dir.join("broken");
    for _ in 0..3 {
        let text = format!("#!/bin/sh\ncase \"$*\" in *--config*) rm -f '{}';; esac\n", broken.display());
        place.file("broken", &text);
        std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        place.run(&["restart", "--binary", broken.to_str().unwrap()]).fails(125, &["goes on as it was"]);
    }
    place.run(&["restart"]).succeeds();
    assert_eq!(restarts(&place), 1);
    for guest in &mut all {
        guest.tell();
        let said = guest.line();
        assert!(said.starts_with(RIGHT), "{said}");
    }
    all.into_iter().for_each(Guest::ends);
    engine.end();
}

/// Writes into the slots of the last jobs, which the engine has done and reads again only when it is another program: jobs that there
/// are none of, for which somebody waits.
const SPOILT: &str = r#"
import ctypes, errno, mmap, os, socket, struct, sys
c = socket.create_connection(('127.0.0.1', PORT))
region = int(os.environ['NETKERNEL_FDS'].split(',')[0])
libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
def mapped(size): return (ctypes.c_char * size).from_address(libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, region, 0))
sockets, _, queue_sets, _, size = struct.unpack_from('<IIIQQ', mapped(4096), 12)
memory = mapped(size); sets_at = (4096 + sockets * 256 + 4095) & ~4095; spoilt = 0
for at in range(sets_at, sets_at + min(queue_sets, 8) * 65536, 65536):
    job_head, _, completed = struct.unpack_from('<III', memory, at + 128)
    if job_head:
        struct.pack_into('<BB6xIIQIi', memory, at + 1024 + (job_head - 1) % 64 * 32, 200, 1, 0, 0, 0, completed + 1, 0); spoilt += 1
print('up', spoilt > 0, flush=True); sys.stdin.readline(); said = []
for call in lambda: c.recv(1), socket.socket:
    try: said.append(call())
    except OSError as e: said.append(errno.errorcode[e.errno])
print(*said, flush=True); sys.stdin.readline()"#;

#[test]
fn a_guest_that_cannot_be_rebuilt_is_lost_alone() {
    let place = Place::new("restart-spoilt");
    let engine = place.up(&[]);
    let native = TcpListener::bind("127.0.0.1:0").unwrap();
    let program = SPOILT.replace("PORT", &native.local_addr().unwrap().port().to_string());
    let mut others: Vec<Guest> = ["queued", "relay"]
        .iter()
        .map(|attach| Guest::start(&place, &["--attach", attach], STREAMS))
        .collect();
    others.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    for (restart, lost) in [(&["restart"][..], "[3]"), (&["restart", "--lose"], "[4]")] {
        let mut spoilt = Guest::start(&place, &["--attach", "queued"], &program);
        let mut peer = native.accept().unwrap().0;
        peer.set_read_timeout(Some(WATCHDOG)).unwrap();
        assert_eq!(spoilt.line(), "up True");
        place.run(restart).fails(125, &["guests that could not go on", lost]);
        let end = peer.read(&mut [0]).unwrap_err();
        assert_eq!(end.raw_os_error(), Some(libc::ECONNRESET), "{end}");
        spoilt.tell();
        assert_eq!(spoilt.line(), "ECONNRESET ENETDOWN");
        spoilt.ends();
        assert_eq!(guests(&place), 2);
    }
    place.run(&["restart"]).succeeds();
    for guest in &mut others {
        guest.tell();
        let said = guest.line();
        assert!(said.starts_with(RIGHT), "{said}");
    }
    others.into_iter().for_each(Guest::ends);
    assert_eq!(restarts(&place), 3);
    engine.end();
}
