//! NSMs in processes of their own.

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Stdio};

use common::{Engine, Place, until, wait};

const PROCESS: &str = "[[nsm]]\nname = \"kernel\"\nform = \"process\"\n";

fn up(place: &Place) -> Engine {
    let config = place.file("nk.toml", PROCESS);
    place.up(&["--config", config.to_str().unwrap()])
}

/// The children of a process.
fn children(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        // Behind the name, which may hold anything: state, parent.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        if parent == Some(pid) {
            found.push(child);
        }
    }
    found
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
    // SAFETY: plain system call; the process is a descendant of this test's engine.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}

/// A guest that runs a line of Python for each line it is told, and answers with what `say` was given.
struct Python {
    child: Child,
    out: std::sync::mpsc::Receiver<String>,
}

impl Python {
    fn start(place: &Place) -> Python {
        let loop_ = "import sys, socket, errno, select\n\
                     def say(*words): print(*words, flush=True)\n\
                     for line in sys.stdin:\n\
                     \x20   try: exec(line)\n\
                     \x20   except OSError as e: say(errno.errorcode.get(e.errno, e))\n";
        let mut child = place
            .netkernel(&["run", "--", "python3", "-c", loop_])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, out) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Python { child, out }
    }

    /// Runs a line that says one thing.
    #[track_caller]
    fn run(&mut self, line: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.out.recv_timeout(common::WATCHDOG).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    fn ends(mut self) {
        drop(self.child.stdin.take());
        assert_eq!(wait(&mut self.child, "python").code(), Some(0));
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
fn a_worker_that_dies_is_back_at_once() {
    let place = Place::new("nsm-worker");
    let engine = up(&place);
    let line =
        "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); say(1)";
    let mut before = Python::start(&place);
    assert_eq!(before.run(line), "1");
    let (holder, worker) = processes(&engine);
    kill(worker);
    until("there is another", || children(holder).iter().any(|pid| *pid != worker));
    let mut after = Python::start(&place);
    assert_eq!(after.run(line), "1");
    after.ends();
    drop(before);
    assert!(exists(holder));
    engine.end();
}
