//! NSMs in processes of their own.

mod common;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use common::load::{LOAD, echo};
use common::python::{CONNECTED, Python};
use common::{Engine, Place, children, finish, until};

const PROCESS: &str = "[[nsm]]\nname = \"kernel\"\nform = \"process\"\n";

fn up(place: &Place) -> Engine {
    up_with(place, PROCESS)
}

fn up_with(place: &Place, config: &str) -> Engine {
    let config = place.file("nk.toml", config);
    place.up(&["--config", config.to_str().unwrap()])
}

/// Holder and worker of the engine's only NSM.
fn processes(engine: &Engine) -> (i32, i32) {
    let mut pair = None;
    until("holder and worker are there", || {
        pair = children(engine.pid())
            .into_iter()
            .find_map(|holder| Some((holder, children(holder).into_iter().next()?)));
        pair.is_some()
    });
    pair.unwrap()
}

fn exists(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

fn kill(pid: i32) {
    signal(pid, libc::SIGKILL);
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: plain system call; the process is a descendant of this test's engine.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// The worker after `worker`, which is about to end.
fn after(holder: i32, worker: i32) -> i32 {
    let mut next = None;
    until("there is another worker", || {
        next = children(holder).into_iter().find(|pid| *pid != worker);
        next.is_some()
    });
    next.unwrap()
}

#[test]
fn guests_of_a_process_are_served_listed_and_ended() {
    let place = Place::new("nsm-serve");
    let engine = up(&place);
    assert_eq!(children(engine.pid()), [0; 0], "no guest, no process");
    let mut guest = Python::start(&place);
    let port = guest.run("l = socket.create_server(('127.0.0.1', 0)); say(l.getsockname()[1])");
    assert_eq!(
        guest.run("c = socket.create_connection(l.getsockname()); a, _ = l.accept(); say('up')"),
        "up"
    );
    assert_eq!(guest.run("c.sendall(b'x' * 100); say(len(a.recv(1000)))"), "100");
    let (holder, worker) = processes(&engine);
    let ps = place.run(&["ps", "--json"]).json();
    let listed = &ps["engines"][0]["guests"][0];
    assert_eq!((&listed["stack"], &listed["sockets"]), (&"kernel".into(), &3.into()), "{ps}");
    let sockets = place.run(&["sockets", "--json"]).json();
    let listener = sockets["sockets"].as_array().unwrap().iter().find(|s| s["kind"] == "listener").unwrap();
    assert_eq!(listener["local"], format!("127.0.0.1:{port}"), "{sockets}");
    assert_eq!(listener["state"], "listening");
    let id = listed["id"].as_u64().unwrap().to_string();
    place.run(&["stop", "--guest", &id]).succeeds();
    assert_eq!(guest.run("say(c.recv(1))"), "ECONNRESET");
    until("it is not listed any more", || {
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
    });
    engine.end();
    until("its processes end with the engine", || !exists(holder) && !exists(worker));
}

#[test]
fn a_process_has_no_privileges_but_those_of_sockets() {
    let place = Place::new("nsm-confined");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(CONNECTED), "1");
    let (holder, worker) = processes(&engine);
    for pid in [holder, worker] {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        };
        assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));
        // DAC_READ_SEARCH 2, NET_BIND_SERVICE 10, NET_ADMIN 12, NET_RAW 13, SYS_PTRACE 19.
        let allowed = 1u64 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 19;
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let has = u64::from_str_radix(&field(set), 16).unwrap();
            assert_eq!(has & !allowed, 0, "{set} of {pid}");
        }
        if common::is_root() {
            assert_eq!(
                u64::from_str_radix(&field("CapBnd"), 16).unwrap(),
                allowed,
                "nothing can be got back"
            );
        }
    }
    guest.ends();
    engine.end();
}

#[test]
fn programs_of_other_users_are_served_by_each_attachment() {
    if !common::is_root() {
        println!("not run: only root's engine serves others");
        return;
    }
    let place = Place::new("nsm-others");
    let socket = place.socket();
    let engine = up_with(&place, &format!("[engine]\nallow_users = [65534]\n{PROCESS}"));
    if finish(place.as_nobody(&["--version"])).code != Some(0) {
        println!("not run: nobody cannot execute the command where it was built");
        return;
    }
    let program = "import socket\n\
                   l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname())\n\
                   c.sendall(b'hello'); print(l.accept()[0].recv(5))";
    for attach in ["queued", "direct", "relay"] {
        let words = ["run", "--socket", socket.to_str().unwrap(), "--attach", attach, "--"];
        let done = finish(place.as_nobody(&[&words[..], &["/usr/bin/python3", "-c", program]].concat()));
        assert_eq!(done.succeeds().out, "b'hello'\n", "{attach}");
    }
    engine.end();
}

#[test]
fn a_process_ends_with_an_engine_that_is_killed() {
    let place = Place::new("nsm-orphan");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    assert_eq!(
        guest.run("a, b = socket.socketpair(); u = socket.create_server(('127.0.0.1', 0)); say(1)"),
        "1"
    );
    let (holder, worker) = processes(&engine);
    engine.signal(libc::SIGKILL);
    engine.wait();
    until("its processes end with the engine", || !exists(holder) && !exists(worker));
    assert_eq!(guest.run("socket.socket(); say('?')"), "ENETDOWN");
    guest.ends();
}

#[test]
fn a_holder_that_dies_takes_its_guests_along_and_the_next_ones_are_served() {
    let place = Place::new("nsm-holder");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    let line =
        "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); say(1)";
    assert_eq!(guest.run(line), "1");
    let (holder, worker) = processes(&engine);
    kill(holder);
    until("the worker ends with it", || !exists(worker));
    assert_eq!(guest.run("say(c.recv(1))"), "ECONNRESET");
    assert_eq!(
        guest.run("p = select.poll(); p.register(l, 0); say(p.poll(10000)[0][1] & select.POLLHUP)"),
        libc::POLLHUP.to_string()
    );
    until("it is not listed any more", || {
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
    });
    let mut next = Python::start(&place);
    assert_eq!(next.run(line), "1");
    next.ends();
    guest.ends();
    engine.end();
}

#[test]
fn what_a_guest_has_outlives_its_process() {
    let place = Place::new("nsm-worker");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    let line = "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); a, _ = l.accept(); say(1)";
    assert_eq!(guest.run(line), "1");
    assert_eq!(guest.run("u = socket.socket(type=2); u.bind(('127.0.0.1', 0)); u.connect(u.getsockname()); say(u.send(b'1'))"), "1");
    // Unread and, beyond what the kernel takes, unsent.
    assert_eq!(
        guest.run("c.setblocking(False); n = c.send(bytes(8 << 20)); c.setblocking(True); say(n > 10000)"),
        "True"
    );
    assert_eq!(
        guest.run("p = select.epoll(); p.register(u, 1); p.register(l, 1); say(len(p.poll(10)))"),
        "1"
    );
    let (holder, worker) = processes(&engine);
    kill(worker);
    let next = after(holder, worker);
    assert_eq!(guest.run("say(u.recv(9))"), "b'1'");
    assert_eq!(guest.run("say(len(a.recv(n, socket.MSG_WAITALL)) == n)"), "True");
    assert_eq!(
        guest.run("d = socket.create_connection(l.getsockname()); say(p.poll(10)[0][0] == l.fileno())"),
        "True"
    );
    assert_eq!(guest.run("b, _ = l.accept(); d.sendall(b'xyz'); say(b.recv(9))"), "b'xyz'");
    // In order, and twice: by a name that is wrong, and by one that is not.
    place.run(&["nsm", "restart", "nonsense"]).fails(125, &["no stack named 'nonsense'", "kernel"]);
    let done = place.run(&["nsm", "restart", "kernel"]);
    assert!(done.succeeds().out.starts_with("kernel: exchanged; its guests waited "), "{}", done.out);
    assert!(!exists(next));
    assert_eq!(guest.run("d.shutdown(1); say(b.recv(9))"), "b''");
    assert_eq!(guest.run("c.close(); say(a.recv(1))"), "b''");
    let sockets = place.run(&["sockets", "--json"]).json();
    assert_eq!(sockets["sockets"].as_array().unwrap().len(), 5, "l a u d b: {sockets}");
    guest.ends();
    until("nothing of it is left", || {
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
    });
    assert!(exists(holder));
    engine.end();
}

#[test]
fn a_worker_may_die_of_any_signal() {
    let place = Place::new("nsm-signals");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(CONNECTED), "1");
    let (holder, mut worker) = processes(&engine);
    for deadly in [libc::SIGFPE, libc::SIGKILL, libc::SIGABRT] {
        signal(worker, deadly);
        worker = after(holder, worker);
        assert_eq!(guest.run("c.sendall(b'x' * 5000); say(len(a.recv(5000, socket.MSG_WAITALL)))"), "5000");
    }
    // Again and again: it may be for what the guests have, which is given up.
    for _ in 0..6 {
        signal(worker, libc::SIGABRT);
        worker = after(holder, worker);
    }
    assert_eq!(guest.run("say(c.recv(1))"), "ECONNRESET");
    let mut next = Python::start(&place);
    assert_eq!(next.run(CONNECTED), "1");
    next.ends();
    guest.ends();
    engine.end();
}

#[test]
fn a_worker_that_hangs_holds_up_neither_its_exchange_nor_the_end() {
    let place = Place::new("nsm-hangs");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(CONNECTED), "1");
    let (holder, worker) = processes(&engine);
    signal(worker, libc::SIGSTOP);
    place.run(&["nsm", "restart", "kernel"]).succeeds();
    assert!(!exists(worker));
    assert_eq!(guest.run("c.sendall(b'x' * 5000); say(len(a.recv(5000, socket.MSG_WAITALL)))"), "5000");
    let worker = after(holder, worker);
    signal(worker, libc::SIGSTOP);
    engine.end();
    assert!(!exists(holder));
    until("the worker ends with it", || !exists(worker));
    assert_eq!(guest.run("say(c.recv(1))"), "ECONNRESET");
    guest.ends();
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_netkernel"))
}

/// The congestion controls of the connection's first end and of one that is opened now.
const CONTROLS: &str = "d = socket.create_connection(l.getsockname()); l.accept()[0].close(); say(*{s.getsockopt(6, 13, 16).strip(b'\\0').decode() for s in (c, d)})";

#[test]
fn a_stack_is_swapped_under_a_stream() {
    let place = Place::new("nsm-swap");
    let engine = up(&place);
    place.run(&["nsm", "swap", "kernel", "--congestion-control", "reno"]).succeeds();
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(guest.run(CONTROLS), "reno", "also if there was no process yet");
    // Each byte tells where it belongs.
    let total = 150 << 20;
    let write = "import threading, hashlib; part = bytes(i * i % 251 for i in range(1 << 20)); \
                 t = threading.Thread(target=lambda: [c.sendall(part) for _ in range(150)]); t.start(); say(1)";
    assert_eq!(guest.run(write), "1");
    assert_eq!(guest.run("h = hashlib.sha256(); say(1)"), "1");
    let copy = place.dir.join("newer");
    std::fs::copy(program(), &copy).unwrap();
    let (first, _) = processes(&engine);
    for i in 0..10 {
        let some =
            format!("say(sum(h.update(b) or len(b) for b in (a.recv({}) for _ in range(40))))", 1 << 18);
        let got: u64 = guest.run(&some).parse().unwrap();
        assert!(got > 0);
        let mut swap = vec!["nsm", "swap", "kernel", "--congestion-control", ["cubic", "reno"][i % 2]];
        if i == 4 {
            swap.extend(["--binary", copy.to_str().unwrap()]);
        }
        let done = place.run(&swap);
        assert!(done.succeeds().out.starts_with("kernel: exchanged; its guests waited "), "{}", done.out);
    }
    let (holder, _) = processes(&engine);
    assert!(holder != first && !exists(first));
    assert_eq!(std::fs::read_link(format!("/proc/{holder}/exe")).unwrap(), copy);
    let rest = "t2 = threading.Thread(target=lambda: (t.join(), c.shutdown(1))); t2.start(); \
                [h.update(b) for b in iter(lambda: a.recv(1 << 18), b'')]; w = hashlib.sha256(); \
                [w.update(part) for _ in range(150)]; say(h.digest() == w.digest())";
    assert_eq!(guest.run(rest), "True", "of {total} bytes");
    assert_eq!(guest.run(CONTROLS), "reno");
    let stacks = place.run(&["stacks", "--json"]).json();
    assert_eq!(stacks["stacks"][0]["congestion_control"], "reno", "{stacks}");
    guest.ends();
    engine.end();
}

#[test]
fn a_swap_that_cannot_work_changes_nothing() {
    let place = Place::new("nsm-noswap");
    let config = format!("{PROCESS}congestion_control = \"cubic\"\n[[nsm]]\nname = \"inside\"\n");
    let engine = up_with(&place, &config);
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(CONNECTED), "1");
    let before = processes(&engine);
    let script = |name: &str, text: &str| {
        let path = place.file(name, text);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let other = script("other", "#!/bin/sh\nexit 0\n");
    let file = place.file("no-program", "text").to_str().unwrap().to_owned();
    let swap = |words: &[&str]| place.run(&[&["nsm", "swap", "kernel"], words].concat());
    swap(&["--congestion-control", "nonsense"]).fails(125, &["no congestion control `nonsense`", "it has"]);
    assert_eq!(swap(&["--congestion-policy", "nonsense"]).code, Some(2));
    swap(&["--pacing", "fast"]).fails(125, &["--pacing fast: is no rate"]);
    swap(&["--binary", "/nonexistent"]).fails(125, &["/nonexistent"]);
    swap(&["--binary", &file]).fails(125, &["goes on as it was", "cannot be started"]);
    swap(&["--binary", &other]).fails(125, &["goes on as it was", "is it netkernel"]);
    place.run(&["nsm", "swap", "inside"]).fails(125, &["has no process", "form = \"process\""]);
    place.run(&["nsm", "swap", "nowhere"]).fails(125, &["no stack", "nowhere", "kernel"]);
    assert_eq!(processes(&engine), before);
    // With this little: too little for the program, for what comes over, for its worker, and then enough.
    let descriptors = (12..56).step_by(2).map(|limit| format!("-n {limit}"));
    let memory = (10..28).chain([1000]).map(|mib| format!("-v {}", mib << 10));
    let (mut reasons, mut swapped) = (BTreeSet::new(), 0);
    for limit in descriptors.chain(memory) {
        let text = format!("#!/bin/sh\nulimit {limit} || exit 1\nexec '{}' \"$@\"\n", program().display());
        let poor = script("poor", &text);
        let done = swap(&["--binary", &poor, "--congestion-control", "reno"]);
        match done.code {
            Some(0) => swapped += 1,
            _ => {
                done.fails(125, &["goes on as it was"]);
                reasons.insert(done.err.clone());
            }
        }
        let control = if done.code == Some(0) { "reno" } else { "cubic" };
        assert_eq!(
            guest.run("c.sendall(b'x' * 5000); say(len(a.recv(5000, socket.MSG_WAITALL)))"),
            "5000",
            "{limit}: {}",
            done.err
        );
        assert_eq!(guest.run("say(c.getsockopt(6, 13, 16).strip(b'\\0').decode())"), control, "{limit}");
        if done.code == Some(0) {
            let own = program();
            swap(&["--binary", own.to_str().unwrap(), "--congestion-control", "cubic"]).succeeds();
        }
    }
    assert!(reasons.len() > 1 && swapped > 0, "{swapped} {reasons:#?}");
    assert!(reasons.iter().any(|reason| reason.contains("does not serve its guests")), "{reasons:#?}");
    guest.ends();
    engine.end();
}

#[test]
fn a_guest_that_spoils_its_region_while_nobody_looks_takes_nobody_along() {
    let place = Place::new("nsm-spoilt");
    let engine = up(&place);
    let (mut good, mut bad) = (Python::start(&place), Python::start(&place));
    assert_eq!(good.run(CONNECTED), "1");
    assert_eq!(bad.run(CONNECTED), "1");
    // Its mapping: the library keeps the descriptor for itself.
    let find = "at = [int(x.split('-')[0], 16) for x in open('/proc/self/maps') if 'memfd:netkernel' in x]; m = open('/proc/self/mem', 'r+b', 0); say(len(at))";
    assert_eq!(bad.run(find), "1");
    let (holder, mut worker) = processes(&engine);
    for pattern in ["b'\\xff'", "b'\\x01\\0\\0\\0'", "bytes(range(256))"] {
        signal(worker, libc::SIGSTOP);
        // Entries of sockets and all rings.
        assert_eq!(
            bad.run(&format!(
                "p = {pattern}; n = (32 << 20) // len(p); m.seek(at[0] + 4096); say(m.write(p * n) > 0)"
            )),
            "True"
        );
        kill(worker);
        worker = after(holder, worker);
        assert_eq!(good.run("c.sendall(b'x' * 5000); say(len(a.recv(5000, socket.MSG_WAITALL)))"), "5000");
    }
    drop(bad);
    good.ends();
    until("nothing is left", || {
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
    });
    engine.end();
}

#[test]
fn urgent_data_ends_with_the_process_but_not_with_its_exchange() {
    let place = Place::new("nsm-urgent");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(
        guest.run("c.send(b'ab'); c.send(b'!', socket.MSG_OOB); c.send(b'cd'); p = select.poll(); p.register(a, select.POLLPRI); say(len(p.poll(10000)))"),
        "1"
    );
    assert_eq!(guest.run("say(a.recv(1, socket.MSG_OOB))"), "b'!'");
    let (holder, worker) = processes(&engine);
    place.run(&["nsm", "restart", "kernel"]).succeeds();
    assert_eq!(guest.run("say(a.recv(2, socket.MSG_WAITALL), a.recv(2, socket.MSG_WAITALL))"), "b'ab' b'cd'");
    let worker = after(holder, worker);
    kill(worker);
    after(holder, worker);
    // What was read and what not cannot be told, and no byte may be wrong.
    assert_eq!(guest.run("say(a.recv(1))"), "ECONNRESET");
    assert_eq!(guest.run(CONNECTED), "1");
    guest.ends();
    engine.end();
}

/// A native server that answers each connection with what comes first, and closes it.
fn answers() -> u16 {
    use std::io::Read as _;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut bytes = [0; 100];
                let n = stream.read(&mut bytes).unwrap_or(0);
                let _ = stream.write_all(&bytes[..n]);
            });
        }
    });
    port
}

#[test]
fn what_the_library_does_not_see_is_served_after_it_too() {
    let place = Place::new("nsm-agent");
    let engine = up(&place);
    let mut guest = Python::start(&place);
    assert_eq!(guest.run(&format!("import ctypes, subprocess; port = '{}'; say(1)", answers())), "1");
    let bare = "fd = ctypes.CDLL(None).syscall(41, 2, 1, 0); say(fd >= 0)";
    let fixed = "r = subprocess.run(['busybox', 'nc', '127.0.0.1', port], input=b'hello', capture_output=True); say(r.stdout, r.stderr)";
    assert_eq!((guest.run(bare).as_str(), guest.run(fixed).as_str()), ("True", "b'hello' b''"));
    // A direct socket is the program's, whatever becomes of who made it.
    assert_eq!(guest.run("d = socket.socket(fileno=fd); d.connect(('127.0.0.1', int(port))); say(1)"), "1");
    let (holder, mut worker) = processes(&engine);
    for _ in 0..2 {
        kill(worker);
        worker = after(holder, worker);
        assert_eq!((guest.run(bare).as_str(), guest.run(fixed).as_str()), ("True", "b'hello' b''"));
    }
    assert_eq!(guest.run("d.sendall(b'still'); d.shutdown(1); say(d.recv(9))"), "b'still'");
    guest.ends();
    engine.end();
}

#[test]
fn sockets_of_stacks_that_live_in_the_process_end_with_it() {
    let place = Place::new("nsm-shm");
    let engine = up_with(&place, "[[nsm]]\nname = \"kernel\"\nform = \"process\"\nmemory = true\n");
    let (mut server, mut client) = (Python::start(&place), Python::start(&place));
    let port = server.run("l = socket.create_server(('127.0.0.1', 0)); say(l.getsockname()[1])");
    assert_eq!(client.run(&format!("c = socket.create_connection(('127.0.0.1', {port})); say(1)")), "1");
    assert_eq!(server.run("a, _ = l.accept(); say(1)"), "1");
    assert_eq!(client.run("u = socket.socket(type=2); u.bind(('127.0.0.1', 0)); say(1)"), "1");
    assert_eq!(server.run("a.sendall(b'hello'); say(1)"), "1");
    assert_eq!(client.run("say(c.recv(5))"), "b'hello'");
    let (holder, worker) = processes(&engine);
    kill(worker);
    after(holder, worker);
    assert_eq!(client.run("say(c.recv(1))"), "ECONNRESET");
    assert_eq!(server.run("say(a.recv(1))"), "ECONNRESET");
    // Listeners and datagram sockets do not wait for ever.
    assert_eq!(server.run("say(l.accept())"), "ENETDOWN");
    assert_eq!(client.run("say(u.recv(1))"), "ECONNRESET");
    for guest in [&mut server, &mut client] {
        assert_eq!(guest.run(CONNECTED), "1", "new ones are served");
    }
    server.ends();
    client.ends();
    engine.end();
}

/// Kills the worker again and again while a guest has connections of all kinds. `NETKERNEL_FAULTS_KILLS`: how often.
#[test]
fn streams_survive_the_death_of_their_process() {
    use std::io::Read as _;
    let kills = std::env::var("NETKERNEL_FAULTS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let place = Place::new("nsm-kill");
    let engine = up(&place);
    let mut command = place.netkernel(&["run", "--", "python3", "-c", LOAD, &echo().to_string()]);
    let mut guest = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut tell = guest.stdin.take().unwrap();
    let out = common::lines(guest.stdout.take().unwrap());
    // Ends the guest with the test.
    let guest = std::cell::RefCell::new(Engine::of(guest));
    let said = |word: &str| {
        let line = out.recv_timeout(common::WATCHDOG).unwrap_or_else(|e| panic!("no {word}: {e}"));
        line.strip_prefix(word).unwrap_or_else(|| panic!("{line}, not {word}")).trim().to_owned()
    };
    let port: u16 = said("port").parse().unwrap();
    // A connection from outside, through all of it.
    let mut outside = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    outside.set_read_timeout(Some(common::WATCHDOG)).unwrap();
    let (holder, mut worker) = processes(&engine);
    let mut seed = u64::from(std::process::id());
    for round in 0..kills {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        // At a random moment of the load.
        std::thread::sleep(std::time::Duration::from_micros(seed >> 33 & 0x7fff));
        kill(worker);
        until("the next worker is there", || {
            children(holder).into_iter().find(|pid| *pid != worker && exists(*pid)).is_some_and(|pid| {
                worker = pid;
                true
            })
        });
        let bytes: Vec<u8> = (0..4000).map(|i| (i * 7 + round) as u8).collect();
        outside.write_all(&bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        outside.read_exact(&mut back).unwrap();
        assert_eq!(back, bytes, "round {round}");
        if round % 10 == 9 {
            writeln!(tell, "?").unwrap();
            let status = said("blocks");
            assert!(status.ends_with("[]"), "round {round}: {status}");
        }
    }
    drop(tell);
    let end = said("end");
    assert!(end.ends_with("[]") && !end.starts_with("0 "), "{end}");
    eprintln!("{kills} kills; fewest blocks of a stream, short connections served and reset: {end}");
    drop(outside);
    assert_eq!(guest.into_inner().wait().code(), Some(0));
    until("nothing of the guest is left", || {
        place.run(&["ps", "--json"]).json()["engines"][0]["guests"].as_array().unwrap().is_empty()
    });
    engine.end();
}
