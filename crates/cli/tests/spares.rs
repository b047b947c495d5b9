//! Placeholders that a guest uses again: a connection ends when its last descriptor is closed, whoever has that one.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use common::peer::Peer;
use common::streams::guests;
use common::{Place, WATCHDOG, until};

/// Does what it is told, a word a line: connects to the port that it was given.
const PROGRAM: &str = r#"
import os, socket, subprocess, sys
port = int(sys.argv[1])
def connect(): return socket.create_connection(('127.0.0.1', port))
def inode(s): return os.fstat(s.fileno()).st_ino
def got(*what): print('got', *what, flush=True)
def close_and_connect():
    # As often as it takes until the engine has seen the end of one.
    seen = set()
    for n in range(200):
        s = connect()
        seen.add(inode(s))
        s.close()
    return len(seen)
kept = []
got('ready')
for line in sys.stdin:
    word = line.strip()
    if word == 'again':
        got(close_and_connect())
    elif word == 'fork':
        s = connect()
        if os.fork() == 0:
            sys.stdin.readline()
            s.sendall(b'child')
            os._exit(0)
        s.close()
        got(close_and_connect() < 200)
    elif word == 'spawn':
        s = connect()
        s.set_inheritable(True)
        arguments = ['/bin/sh', '-c', 'read go <&9; printf spawned >&%d' % s.fileno()]
        r, w = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, r, 9), (os.POSIX_SPAWN_CLOSE, w)]
        pid = os.posix_spawn('/bin/sh', arguments, os.environ, file_actions=actions)
        os.close(r)
        s.close()
        got(close_and_connect() < 200)
        sys.stdin.readline()
        os.write(w, b'go\n')
        os.waitpid(pid, 0)
    elif word == 'system':
        s = connect()
        s.set_inheritable(True)
        os.system('(sleep 0.3; printf system >&%d) &' % s.fileno())
        s.close()
        got(close_and_connect() < 200)
    elif word == 'pass':
        s = connect()
        a, b = socket.socketpair()
        socket.send_fds(a, [b'x'], [s.fileno()])
        s.close()
        got(close_and_connect() < 200)
        sys.stdin.readline()
        fds = socket.recv_fds(b, 1, 1)[1]
        t = socket.socket(fileno=fds[0])
        t.sendall(b'passed')
        t.close()
    elif word == 'dup':
        s = connect()
        t = s.dup()
        s.close()
        got(close_and_connect() < 200)
        sys.stdin.readline()
        t.sendall(b'duplicate')
        t.close()
    elif word == 'keep':
        for s in kept: s.close()
        kept = [connect() for _ in range(20)]
        for s in kept: s.close()
        kept = [connect() for _ in range(20)]
        got(all(s.send(b'kept') == 4 for s in kept))
    elif word == 'flags':
        import fcntl
        s = connect()
        fcntl.fcntl(s, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)
        flags = fcntl.fcntl(s, fcntl.F_GETFL)
        s.close()
        wrong = 0
        for n in range(200):
            s = socket.socket()
            wrong += fcntl.fcntl(s, fcntl.F_GETFL) != os.O_RDWR
            s.close()
            connect().close()
        got(flags & (os.O_APPEND | os.O_NONBLOCK) == os.O_APPEND | os.O_NONBLOCK, wrong)
"#;

fn guest(place: &Place, port: u16) -> Peer {
    let script = place.file("guest.py", PROGRAM);
    let mut command = place.netkernel(&["run", "--name", "spares", "--", "python3"]);
    command.arg(script).arg(port.to_string());
    let peer = Peer::of(command);
    assert_eq!(peer.told("got"), "ready");
    peer
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    stream
}

/// Everything until the end of the stream.
fn all(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_connection_after_another_takes_its_placeholder() {
    let place = Place::new("spares-again");
    let engine = place.up(&[]);
    let (listener, port) = listener();
    let mut guest = guest(&place, port);
    let server = std::thread::spawn(move || {
        let ends = (0..200).map(|_| all(accept(&listener)));
        ends.filter(String::is_empty).count()
    });
    let placeholders: usize = guest.ask("again").parse().unwrap();
    assert!(placeholders < 100, "{placeholders} placeholders for 200 connections");
    assert_eq!(server.join().unwrap(), 200, "each was told of its end");
    // One that is killed leaves nothing, neither do those that it kept.
    guest.kill();
    until("the guest is over", || guests(&place) == 0);
    engine.end();
}

/// A descriptor that somebody else has keeps the connection open, however often the guest connects meanwhile.
#[test]
fn whoever_has_a_descriptor_has_the_connection() {
    let place = Place::new("spares-shared");
    let engine = place.up(&[]);
    let (listener, port) = listener();
    let mut guest = guest(&place, port);
    for (word, said) in [
        ("fork", "child"),
        ("spawn", "spawned"),
        ("system", "system"),
        ("pass", "passed"),
        ("dup", "duplicate"),
    ] {
        writeln!(guest.stdin, "{word}").unwrap();
        let mut theirs = accept(&listener);
        let others = (0..200).map(|_| all(accept(&listener))).filter(String::is_empty).count();
        assert_eq!(others, 200, "{word}");
        assert_eq!(guest.told("got"), "True", "{word}: placeholders are used again all the same");
        if word != "system" {
            theirs.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let read = theirs.read(&mut [0]).map_err(|error| error.kind());
            assert_eq!(read, Err(std::io::ErrorKind::WouldBlock), "{word}: it ended");
            theirs.set_read_timeout(Some(WATCHDOG)).unwrap();
            writeln!(guest.stdin).unwrap();
        }
        assert_eq!(all(theirs), said);
    }
    guest.kill();
    engine.end();
}

/// What F_SETFL gave a descriptor does not come with its placeholder.
#[test]
fn flags_are_a_socket_s_own() {
    let place = Place::new("spares-flags");
    let engine = place.up(&[]);
    let (listener, port) = listener();
    let mut guest = guest(&place, port);
    let server = std::thread::spawn(move || (0..201).for_each(|_| drop(all(accept(&listener)))));
    assert_eq!(guest.ask("flags"), "True 0");
    server.join().unwrap();
    guest.kill();
    engine.end();
}

/// The engine's next program, and an NSM's next process, know what guests keep.
#[test]
fn they_go_on_through_restarts() {
    for (form, restart) in [("engine", &["restart"][..]), ("process", &["nsm", "restart", "kernel"][..])] {
        let place = Place::new(&format!("spares-restart-{form}"));
        let config = format!("[[nsm]]\nname = \"kernel\"\nstack = \"kernel\"\nform = \"{form}\"\n");
        let config = place.file("nk.toml", &config);
        let engine = place.up(&["--config", config.to_str().unwrap()]);
        let (listener, port) = listener();
        let mut guest = guest(&place, port);
        let mut open: Vec<TcpStream> = Vec::new();
        for round in 0..4 {
            writeln!(guest.stdin, "keep").unwrap();
            for stream in open.drain(..) {
                assert_eq!(all(stream), "", "{form}, round {round}");
            }
            let closed: Vec<TcpStream> = (0..20).map(|_| accept(&listener)).collect();
            for stream in closed {
                assert_eq!(all(stream), "", "{form}, round {round}");
            }
            open.extend((0..20).map(|_| accept(&listener)));
            for stream in &mut open {
                let mut text = [0; 4];
                stream.read_exact(&mut text).unwrap();
                assert_eq!(&text, b"kept", "{form}, round {round}");
            }
            assert_eq!(guest.told("got"), "True", "{form}, round {round}");
            place.run(restart).succeeds();
        }
        guest.kill();
        until("the guest is over", || guests(&place) == 0);
        engine.end();
    }
}
