//! What `netkernel pcap` cannot see, it says; what need not go past it does not.

mod common;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::Receiver;

use common::{Engine, Place, WATCHDOG, echo, is_root, lines, until};

/// A guest that runs the lines of Python that it is told, and says what they are worth.
struct Guest {
    child: Child,
    stdin: ChildStdin,
    said: Receiver<String>,
}

impl Guest {
    fn start(place: &Place, how: &[&str]) -> Guest {
        let program = "import sys, socket\n\
                       for line in sys.stdin:\n\
                       \x20   try: print(eval(line), flush=True)\n\
                       \x20   except SyntaxError: exec(line); print('done', flush=True)\n";
        let mut command = place.netkernel(&[&["run"], how, &["--", "python3", "-c", program]].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = lines(child.stdout.take().unwrap());
        Guest { stdin: child.stdin.take().unwrap(), said, child }
    }

    fn does(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").unwrap();
        self.said.recv_timeout(WATCHDOG).unwrap_or_else(|_| panic!("no answer to {line}"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A capture, the first line that it says on standard error if it says any, and its file.
struct Capture {
    process: Engine,
    said: Receiver<String>,
    file: PathBuf,
}

impl Capture {
    fn of(place: &Place, target: &str, file: &str) -> Capture {
        let file = place.dir.join(file);
        let mut command = place.netkernel(&["pcap", target, "-w", file.to_str().unwrap()]);
        let mut process = Engine::of(command.stderr(Stdio::piped()).spawn().unwrap());
        let said = lines(process.child().stderr.take().unwrap());
        until("the capture began", || std::fs::metadata(&file).is_ok_and(|file| file.len() > 0));
        Capture { process, said, file }
    }

    fn has(&self, word: &str) -> bool {
        let bytes = std::fs::read(&self.file).unwrap();
        bytes.windows(word.len()).any(|window| window == word.as_bytes())
    }

    fn says(&self) -> String {
        let said = self.said.recv_timeout(WATCHDOG).expect("it says what it does not see");
        assert!(self.has(&said.replace("netkernel: ", "")), "the file says so, too: {said}");
        said
    }
}

#[test]
fn guests_that_are_captured_get_no_new_memory_of_their_own() {
    let place = Place::new("pcap-pairs");
    let config = place.file("nk.toml", "[[nsm]]\nname = \"shm\"\nstack = \"shm\"\n");
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let how = ["--attach", "queued"];
    let (mut server, mut client) = (Guest::start(&place, &how), Guest::start(&place, &how));
    server.does("l = socket.create_server(('127.0.0.1', 0))");
    let port = server.does("l.getsockname()[1]");
    // Makes a connection, and sends a word over it.
    let mut talk = |name: &str, word: &str| {
        client.does(&format!(
            "{name} = globals().get('{name}') or socket.create_connection(('127.0.0.1', {port}))"
        ));
        server.does(&format!("{name} = globals().get('{name}') or l.accept()[0]"));
        client.does(&format!("{name}.send(b'{word}')"));
        assert_eq!(server.does(&format!("{name}.recv(100)")), format!("b'{word}'"));
    };
    let pairs = || {
        let json = place.run(&["sockets", "--json"]).json();
        json["sockets"].as_array().unwrap().iter().filter(|socket| socket["pair"] == true).count()
    };
    talk("a", "before");
    assert_eq!(pairs(), 2);

    let capture = Capture::of(&place, "others", "pairs.pcapng");
    let said = capture.says();
    assert!(said.contains("Not seen: 2 sockets of connections that two guests move in memory"), "{said}");
    talk("a", "word-that-nobody-sees");
    talk("b", "word-of-a-new-connection");
    until("the new connection is captured", || capture.has("word-of-a-new-connection"));
    assert!(!capture.has("word-that-nobody-sees"));
    let explained = place.run(&["explain"]).out;
    assert!(explained.contains("which copies: one of them is captured"), "{explained}");
    assert_eq!(pairs(), 2, "{explained}");
    // A guest, and another one at the same time, which ends first.
    let second = Capture::of(&place, "2", "second.pcapng");
    assert!(
        second.says().contains("Not seen: 1 socket of connections"),
        "one of the pair's ends is guest 2's"
    );
    second.process.end();
    talk("c", "still-captured");
    until("it is captured", || capture.has("still-captured"));
    capture.process.end();

    // The engine notices that nobody reads any more.
    let mut tries = 0;
    until("connections are pairs again", || {
        tries += 1;
        talk(&format!("d{tries}"), "x");
        pairs() > 2
    });
    engine.end();
}

/// By the engine's eBPF, which only root may have; else they are counted. The agent in the process of an NSM may not use it.
#[test]
fn direct_sockets_are_captured_or_counted() {
    for (form, also) in [("engine", ""), ("process", "-process")] {
        let place = Place::new(&format!("pcap-direct{also}"));
        let config = place.file("nk.toml", &format!("[[nsm]]\nname = \"kernel\"\nform = \"{form}\"\n"));
        let engine = place.up(&["--config", config.to_str().unwrap()]);
        let port = echo();
        let connect = |name: &str| format!("{name} = socket.create_connection(('127.0.0.1', {port}))");
        let start = || {
            let mut guest = Guest::start(&place, &["--attach", "direct"]);
            guest.does(&connect("s"));
            guest.does("s.send(b'before')");
            guest.does("l = socket.create_server(('127.0.0.1', 0))");
            guest
        };
        let (mut guest, mut other) = (start(), start());
        let capture = Capture::of(&place, "1", "direct.pcapng");
        if !is_root() {
            let said = capture.says();
            assert!(
                said.contains("Not seen: 1 direct socket; direct sockets that 1 guest may make"),
                "{said}"
            );
            continue;
        }
        guest.does("s.send(b'of-a-socket-that-was-there')");
        other.does("s.send(b'foreign-of-old')");
        // What a listener accepts, and new ones.
        let listener = guest.does("l.getsockname()[1]");
        other.does(&format!("c = socket.create_connection(('127.0.0.1', {listener}))"));
        other.does("c.send(b'to-what-was-accepted')");
        other.does(&connect("n"));
        other.does("n.send(b'foreign-of-new')");
        assert_eq!(guest.does("l.accept()[0].recv(100)"), "b'to-what-was-accepted'");
        let mut words = vec!["of-a-socket-that-was-there", "to-what-was-accepted"];
        if form == "engine" {
            guest.does(&connect("n"));
            guest.does("n.send(b'of-a-new-socket')");
            guest.does("u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)");
            guest.does("u.sendto(b'datagram-of-it', ('127.0.0.1', 9))");
            words.extend(["of-a-new-socket", "datagram-of-it"]);
        } else {
            let said = capture.says();
            let unseen = "Not seen: direct sockets that 1 guest may make from now on (NSMs in processes may use no eBPF).";
            assert!(said.contains(unseen), "{said}");
        }
        for word in words {
            until(word, || capture.has(word));
        }
        let file = capture.file.clone();
        capture.process.end();
        let bytes = std::fs::read(file).unwrap();
        let has = |word: &str| bytes.windows(word.len()).any(|window| window == word.as_bytes());
        assert!(!has("before") && !has("foreign") && has("Not seen") == (form == "process"));
        // Nothing is left of it when the last capture is over, and the next one begins anew.
        let next = Capture::of(&place, "others", "next.pcapng");
        guest.does("s.send(b'once-more')");
        other.does("s.send(b'of-both')");
        until("both are captured", || next.has("once-more") && next.has("of-both"));
        next.process.end();
        drop((guest, other));
        engine.end();
    }
}

/// Whom the engine sees whole.
#[test]
fn nothing_is_said_where_all_is_seen() {
    let place = Place::new("pcap-whole");
    let engine = place.up(&[]);
    let mut guest = Guest::start(&place, &["--attach", "queued"]);
    guest.does(&format!("s = socket.create_connection(('127.0.0.1', {}))", echo()));
    let capture = Capture::of(&place, "1", "queued.pcapng");
    guest.does("s.send(b'seen')");
    until("it is captured", || capture.has("seen"));
    assert!(!capture.has("Not seen"));
    capture.process.end();
    engine.end();
}

/// Guests of an NSM that is a process: those that are there, those that come, and those of its next worker.
#[test]
fn processes_of_stacks_are_captured() {
    let place = Place::new("pcap-process");
    let config = place.file("nk.toml", "[[nsm]]\nname = \"own\"\nform = \"process\"\n");
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    // Before there is a process.
    let early = Capture::of(&place, "others", "early.pcapng");
    let port = echo();
    let connect = format!("s = socket.create_connection(('127.0.0.1', {port}))");
    let how = ["--attach", "queued"];
    let mut guest = Guest::start(&place, &how);
    guest.does(&connect);
    let capture = Capture::of(&place, "1", "guest.pcapng");
    guest.does("s.send(b'from-the-middle')");
    let mut other = Guest::start(&place, &how);
    other.does(&connect);
    other.does("s.send(b'of-another-guest')");
    until("all of it is in the first", || early.has("from-the-middle") && early.has("of-another-guest"));
    until("the guest's is in its own", || capture.has("from-the-middle"));
    drop(guest);
    drop(other);
    capture.process.end();
    assert!(
        !std::fs::read(place.dir.join("guest.pcapng")).unwrap().windows(16).any(|w| w == b"of-another-guest")
    );
    // The worker: what the holder, a child of the engine, started.
    let child = |pid: u32| {
        let children =
            std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        children.split_whitespace().find_map(|pid| pid.parse::<u32>().ok())
    };
    let holder =
        std::fs::read_dir(format!("/proc/{}/task", engine.pid())).unwrap().flatten().find_map(|task| {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|&pid| child(pid).is_some())
        });
    let worker = child(holder.unwrap()).unwrap();
    // SAFETY: plain system call; a process of this test's engine.
    assert_eq!(unsafe { libc::kill(worker as i32, libc::SIGKILL) }, 0);
    until("another worker is there", || child(holder.unwrap()).is_some_and(|pid| pid != worker));
    let mut next = Guest::start(&place, &how);
    next.does(&connect);
    next.does("s.send(b'of-the-next-worker')");
    until("it is captured", || early.has("of-the-next-worker"));
    early.process.end();
    drop(next);
    engine.end();
}
