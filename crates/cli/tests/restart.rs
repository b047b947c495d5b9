//! The engine's program, exchanged under its guests.

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use common::streams::{Guest, RIGHT, STREAMS, THOUSANDS, guests, restarts};
use common::{Engine, Place, children, finish, until};
use netkernel_control::Client;

/// Processes of NSMs.
fn holders(engine: &Engine) -> Vec<i32> {
    let mut all = children(engine.pid());
    let command = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    all.retain(|pid| command(pid).contains("nsm-process"));
    all
}

#[test]
fn guests_go_on_through_ten_restarts_and_each_byte_is_metered_once() {
    let place = Place::new("restart-ten");
    let database = place.dir.join("usage.db");
    let config = place.file("nk.toml", &format!("[engine]\nusage = {database:?}\nswitch_threads = 2\n"));
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let mut guests: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &["--name", "ten"], STREAMS)).collect();
    for guest in &guests {
        assert_eq!(guest.line(), "up");
    }
    let pid = engine.pid();
    for _ in 0..10 {
        let told = place.run(&["restart", "--json"]).json();
        assert_eq!((&told["guests"], &told["lost"]), (&2.into(), &serde_json::json!([])), "{told}");
        assert!(told["pause_us"].as_u64().unwrap() > 0, "{told}");
    }
    assert_eq!(place.run(&["ps", "--json"]).json()["engines"][0]["engine"]["pid"], pid);
    let mut payload = 0;
    for guest in &mut guests {
        guest.tell();
        let said = guest.line();
        let bytes = said.strip_prefix(RIGHT).unwrap_or_else(|| panic!("{said}"));
        // Beside the streams: still, half, late, dgram, x, new.
        payload += bytes.parse::<u64>().unwrap() + 5 + 4 + 4 + 5 + 1 + 3;
    }
    let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
    let row = &usage.as_array().or_else(|| usage["rows"].as_array()).unwrap()[0];
    assert_eq!((&row["bytes_in"], &row["bytes_out"]), (&payload.into(), &payload.into()), "{usage}");
    guests.into_iter().for_each(Guest::ends);
    engine.end();
    assert_eq!(place.engine_files(), [""; 0], "socket and lock are gone");
}

/// Sockets whose placeholders are not in the process's own table are handed over, too, and over and over.
#[test]
fn thousands_of_sockets_go_on() {
    let place = Place::new("restart-many");
    let engine = place.up(&[]);
    let mut guest = Guest::start(&place, &[], THOUSANDS);
    assert_eq!(guest.line(), "up");
    for _ in 0..3 {
        place.run(&["restart"]).succeeds();
    }
    guest.tell();
    assert_eq!(guest.line(), "[]");
    place.run(&["restart"]).succeeds();
    guest.ends();
    assert_eq!(restarts(&place), 4);
    until("the guest is over", || guests(&place) == 0);
    engine.end();
}

#[test]
fn a_restart_that_cannot_be_changes_nothing() {
    let place = Place::new("restart-refused");
    let config = place.file("nk.toml", "[[nsm]]\nname = \"kernel\"\n");
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let mut guest = Guest::start(&place, &[], STREAMS);
    assert_eq!(guest.line(), "up");
    place.file("nk.toml", "[[nsm]]\nname = \"kernel\"\nstack = 7\n");
    place.run(&["restart"]).fails(125, &["nk.toml", "stack"]);
    place.file("nk.toml", "[[nsm]]\nname = \"other\"\n");
    place.run(&["restart"]).fails(125, &["nk.toml", "stack 'kernel'", "guest 1"]);
    place.file("nk.toml", "[[nsm]]\nname = \"kernel\"\nmemory = true\n");
    place
        .run(&["restart"])
        .fails(125, &["nk.toml", "stack 'kernel' is of another kind", "--lose", "guest 1"]);
    place.file("nk.toml", "[[nsm]]\nname = \"kernel\"\n");
    place.run(&["restart", "--binary", "/bin/false"]).fails(125, &["/bin/false"]);
    place.run(&["restart", "--binary", "/nowhere"]).fails(125, &["/nowhere"]);
    // One that says yes twice and is gone then.
    let broken = place.file("broken", "#!/nowhere/at/all\n");
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).unwrap();
    place.run(&["restart", "--binary", broken.to_str().unwrap()]).fails(125, &["broken"]);
    let gone = format!("#!/bin/sh\ncase \"$*\" in *--config*) rm -f '{}';; esac\n", broken.display());
    place.file("broken", &gone);
    place
        .run(&["restart", "--binary", broken.to_str().unwrap()])
        .fails(125, &["goes on as it was", "broken"]);
    assert_eq!(restarts(&place), 0);
    guest.tell();
    let said = guest.line();
    assert!(said.starts_with(RIGHT), "{said}");
    guest.ends();
    engine.end();
}

#[test]
fn guests_of_processes_do_not_notice_and_their_processes_stay() {
    let place = Place::new("restart-apart");
    let database = place.dir.join("usage.db");
    let text = format!(
        "[engine]\nusage = {database:?}\n[[nsm]]\nname = \"kernel\"\n\
         [[nsm]]\nname = \"apart\"\nform = \"process\"\n[[nsm]]\nname = \"unused\"\nform = \"process\"\n"
    );
    let config = place.file("nk.toml", &text);
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    // In the other order, by which they have other numbers afterwards; one has no process yet, and is gone.
    let other = text.replace("name = \"kernel\"", "name = \"first\"\n[[nsm]]\nname = \"kernel\"");
    let other = other.split("[[nsm]]\nname = \"unused\"").next().unwrap().to_owned();
    let arguments = ["--stack", "apart", "--name", "apart"];
    let mut guests_of: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &arguments, STREAMS)).collect();
    let mut queued = Guest::start(&place, &[], STREAMS);
    guests_of.iter().chain([&queued]).for_each(|guest| assert_eq!(guest.line(), "up"));
    let before = holders(&engine);
    place.run(&["nsm", "swap", "apart", "--congestion-control", "reno"]).succeeds();
    until("another process", || holders(&engine).len() == 1 && holders(&engine) != before);
    let swapped = holders(&engine);
    for turn in 0..6 {
        if turn == 3 {
            place.file("nk.toml", &other);
        }
        place.run(&["restart"]).succeeds();
        assert_eq!(holders(&engine), swapped, "the process that was");
    }
    // All that can be done with it: a worker that dies, one that is restarted, another process, a new guest.
    place.run(&["nsm", "restart", "apart"]).succeeds();
    place.run(&["nsm", "swap", "apart", "--congestion-control", "cubic"]).succeeds();
    place.run(&["restart"]).succeeds();
    let late = Guest::start(&place, &arguments, STREAMS);
    assert_eq!(late.line(), "up");
    guests_of.push(late);
    let mut payload = 0;
    for guest in &mut guests_of {
        guest.tell();
        let said = guest.line();
        let bytes = said.strip_prefix(RIGHT).unwrap_or_else(|| panic!("{said}"));
        payload += bytes.parse::<u64>().unwrap() + 5 + 4 + 4 + 5 + 1 + 3;
    }
    queued.tell();
    let said = queued.line();
    assert!(said.starts_with(RIGHT), "{said}");
    guests_of.into_iter().for_each(Guest::ends);
    until("they are over", || guests(&place) == 1);
    queued.ends();
    let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
    let rows = usage.as_array().or_else(|| usage["rows"].as_array()).unwrap();
    let row = rows.iter().find(|row| row["guest"] == "apart").unwrap_or_else(|| panic!("{usage}"));
    assert_eq!((&row["bytes_in"], &row["bytes_out"]), (&payload.into(), &payload.into()), "{usage}");
    assert_eq!(restarts(&place), 7);
    engine.end();
}

#[test]
fn sockets_of_agents_and_what_asks_for_them_go_on() {
    let place = Place::new("restart-direct");
    let engine = place.up(&[]);
    // Without the library every socket() is the agent's; one thread asks all the time.
    let program = "
import socket, sys, threading
l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); a, _ = l.accept()
over, made, failed = threading.Event(), [0], []
def ask():
    while not over.is_set():
        try: socket.socket().close(); made[0] += 1
        except OSError as e: failed.append(e.errno)
t = threading.Thread(target=ask); t.start()
print('up', flush=True)
sys.stdin.readline(); before = made[0]
while made[0] < before + 100 and not failed: pass
over.set(); t.join()
c.sendall(b'x'); print(a.recv(1), failed[:3], flush=True); sys.stdin.readline()";
    let mut guest = Guest::start(&place, &["--attach", "direct"], program);
    assert_eq!(guest.line(), "up");
    for _ in 0..5 {
        place.run(&["restart"]).succeeds();
    }
    guest.tell();
    assert_eq!(guest.line(), "b'x' []");
    guest.ends();
    engine.end();
}

/// Each byte of a direct connection is metered once, whether the connection is open at a restart, or ends right behind it.
#[test]
fn what_direct_sockets_carry_is_metered_through_restarts() {
    let place = Place::new("restart-metered");
    let database = place.dir.join("usage.db");
    let config = place.file("nk.toml", &format!("[engine]\nusage = {database:?}\n"));
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let program = "
import socket, sys
l = socket.create_server(('127.0.0.1', 0))
def pair(): c = socket.create_connection(l.getsockname()); return c, l.accept()[0]
def carry(c, a):
    c.sendall(bytes(100000)); n = 0
    while n < 100000: n += len(a.recv(1 << 16))
c, a = pair()
for _ in range(4):
    short, its = pair(); carry(short, its)
    carry(c, a); print('up', flush=True); sys.stdin.readline()
    short.close(); its.close()
print('over', flush=True); sys.stdin.readline()";
    let mut guest = Guest::start(&place, &["--attach", "direct", "--name", "direct"], program);
    for _ in 0..4 {
        assert_eq!(guest.line(), "up");
        place.run(&["restart"]).succeeds();
        guest.tell();
    }
    assert_eq!(guest.line(), "over");
    guest.ends();
    until("the guest is over", || guests(&place) == 0);
    let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
    let row = &usage.as_array().or_else(|| usage["rows"].as_array()).unwrap()[0];
    let carried = ["bytes_in", "bytes_out"].map(|way| row[way].as_u64().unwrap());
    // One byte more for each end of a stream that was received.
    assert!(carried.iter().all(|bytes| (800_000..=800_010).contains(bytes)), "{usage}");
    assert_eq!(row["tcp_connections"], 10, "{usage}");
    engine.end();
}

#[test]
fn a_token_is_good_after_a_restart_and_new_guests_are_others() {
    let place = Place::new("restart-token");
    let engine = place.up(&[]);
    let mut first = Guest::start(&place, &[], STREAMS);
    assert_eq!(first.line(), "up");
    place.run(&["restart"]).succeeds();
    let program = "import socket; l = socket.create_server(('127.0.0.1', 0)); print(l.getsockname()[0])";
    let mut command = place.netkernel(&["run", "--", "python3", "-c", program]);
    command.stdin(Stdio::null());
    let done = finish(command);
    assert_eq!((done.code, done.out.as_str()), (Some(0), "127.0.0.1\n"), "{done:?}");
    let status = place.run(&["ps", "--json"]).json();
    assert_eq!(status["engines"][0]["counters"]["guests_created"], 2, "{status}");
    first.tell();
    let said = first.line();
    assert!(said.starts_with(RIGHT), "{said}");
    first.ends();
    engine.end();
}

/// What SO_LINGER says goes on, and what it means: also of a listener, which those inherit that it accepts.
#[test]
fn sockets_linger_as_before() {
    let place = Place::new("restart-linger");
    let text = "[[nsm]]\nname = \"kernel\"\n[[nsm]]\nname = \"apart\"\nform = \"process\"\n[[nsm]]\nname = \"joined\"\nstack = \"shm\"\n";
    let config = place.file("nk.toml", text);
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let program = "
import socket, struct, sys
def set(s, on, seconds): s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', on, seconds))
def linger(s): return struct.unpack('ii', s.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
l = socket.create_server(('127.0.0.1', 0)); u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def pair(): c = socket.create_connection(l.getsockname()); return c, l.accept()[0]
(zero, zero_peer), (some, some_peer), (none, none_peer) = pair(), pair(), pair()
set(zero, 1, 0); set(some, 1, 7); set(none, 0, 0); set(u, 1, 5)
set(l, 1, 0); early, early_peer = pair(); late = socket.create_connection(l.getsockname())
print('up', flush=True); sys.stdin.readline()
late_peer = l.accept()[0]; new, new_peer = pair()
print([linger(s) for s in (zero, some, none, u, l, early, early_peer, late_peer, new_peer)])
def end(s, peer):
    s.close()
    try: return peer.recv(1)
    except ConnectionResetError: return 'reset'
print([end(*p) for p in ((zero, zero_peer), (some, some_peer), (none, none_peer), (early_peer, early), (late_peer, late), (new_peer, new))], flush=True)
sys.stdin.readline()";
    let guests: Vec<Guest> = ["kernel", "apart", "joined"]
        .iter()
        .map(|stack| Guest::start(&place, &["--stack", stack, "--attach", "queued"], program))
        .collect();
    guests.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    place.run(&["restart"]).succeeds();
    place.run(&["nsm", "restart", "apart"]).succeeds();
    for mut guest in guests {
        guest.tell();
        let values = "(1, 0), (1, 7), (0, 0), (1, 5), (1, 0), (0, 0), (1, 0), (1, 0), (1, 0)";
        assert_eq!(guest.line(), format!("[{values}]"));
        assert_eq!(guest.line(), "['reset', b'', b'', 'reset', 'reset', 'reset']");
        guest.ends();
    }
    engine.end();
}

/// Who connects while the program is exchanged waits for the next one, and who was let in before is answered.
#[test]
fn nobody_who_asks_meanwhile_is_turned_away() {
    let place = Place::new("restart-asked");
    let log = place.dir.join("log");
    let mut command = place.netkernel(&["up"]);
    command.stderr(std::fs::File::create(&log).unwrap());
    let engine = place.start(command);
    let (socket, over) = (place.socket(), AtomicBool::new(false));
    let (answered, refused) = std::thread::scope(|scope| {
        let ask = || {
            let (mut answered, mut refused) = (0, Vec::new());
            while !over.load(Relaxed) {
                match Client::connect(&socket).and_then(|mut client| client.version()) {
                    Ok(_) => answered += 1,
                    Err(error) => refused.push(error.to_string()),
                }
            }
            (answered, refused)
        };
        let asking: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let restarted: Vec<_> = (0..20).map(|_| place.run(&["restart"])).collect();
        over.store(true, Relaxed);
        restarted.iter().for_each(|done| assert_eq!(done.code, Some(0), "{done:?}"));
        let told: Vec<(u64, Vec<String>)> = asking.into_iter().map(|thread| thread.join().unwrap()).collect();
        (
            told.iter().map(|told| told.0).sum::<u64>(),
            told.into_iter().flat_map(|told| told.1).collect::<Vec<_>>(),
        )
    });
    assert_eq!(refused, [""; 0], "of {answered}");
    assert!(answered > 20, "{answered}");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(!log.contains("error"), "{log}");
    engine.end();
}
