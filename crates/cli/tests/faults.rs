//! Faults, with real processes: guests that are killed, that destroy their region, that run out of memory and
//! descriptors, and engines that die. What must hold: the others go on, nothing is left, nobody hangs.
//!
//! The guests are the programs of `faults/guest.py`. `NETKERNEL_FAULTS_SEED` repeats a run's random choices; `NETKERNEL_FAULTS_KILLS`
//! says how often
//! engines are killed under load.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Engine, Place, WATCHDOG, lines, until, wait};

/// What a dead engine or a dead guest may take to be noticed.
const PROMPT: Duration = Duration::from_secs(3);

// ---- guests and engines

/// A guest's process tree, killed with the value.
struct Guest {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    program: String,
}

impl Guest {
    fn start(place: &Place, program: &[&str]) -> Guest {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/guest.py");
        let mut command = place.netkernel(&["run", "--name", program[0], "--", "python3", script]);
        command.args(program).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        Guest { stdin: child.stdin.take(), child, lines, program: program.join(" ") }
    }

    fn line_within(&self, limit: Duration) -> String {
        match self.lines.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("{} says nothing for {limit:?}", self.program),
            Err(RecvTimeoutError::Disconnected) => panic!("{} has ended", self.program),
        }
    }

    /// The next line, which must begin with `word`; what follows it.
    #[track_caller]
    fn told(&self, word: &str) -> String {
        let line = self.line_within(WATCHDOG);
        let rest =
            line.strip_prefix(word).unwrap_or_else(|| panic!("{}: {line:?}, not {word}", self.program));
        rest.trim_start().to_owned()
    }

    #[track_caller]
    fn port(&self) -> u16 {
        self.told("port").parse().unwrap()
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{word}").unwrap();
    }

    /// Kills the whole process tree and waits for the program.
    fn kill(&mut self) {
        // SAFETY: the group of a child that was not waited for.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        self.child.wait().unwrap();
    }

    #[track_caller]
    fn ends(mut self) {
        drop(self.stdin.take());
        let status = wait(&mut self.child, &self.program);
        assert_eq!(status.code(), Some(0), "{}: {status:?}", self.program);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

/// A guest that transfers data all the time, and notices when anything is wrong with it.
struct Bystander(Guest);

impl Bystander {
    fn start(place: &Place, echo: &Native) -> Bystander {
        let bystander = Bystander(Guest::start(place, &["bystander", &echo.port().to_string()]));
        bystander.0.told("block");
        bystander
    }

    /// It gets on from now on.
    #[track_caller]
    fn advances(&self) {
        while self.0.lines.try_recv().is_ok_and(|line| {
            assert!(line.starts_with("block"), "bystander: {line}");
            true
        }) {}
        // What it told before, and two blocks that it began later.
        for _ in 0..3 {
            self.0.told("block");
        }
    }

    #[track_caller]
    fn ends(self) {
        let Bystander(mut guest) = self;
        drop(guest.stdin.take());
        let mut last = String::new();
        while let Ok(line) = guest.lines.recv_timeout(WATCHDOG) {
            last = line;
        }
        assert!(last.starts_with("done"), "bystander: {last}");
        guest.ends();
    }
}

/// An engine whose log is kept.
struct Logged {
    engine: Engine,
    log: std::path::PathBuf,
}

impl Logged {
    fn start(place: &Place) -> Logged {
        Logged::start_with(place, &[], |_| {})
    }

    fn start_with(place: &Place, args: &[&str], change: impl FnOnce(&mut Command)) -> Logged {
        let log = place.dir.join("log");
        let mut command = place.netkernel(&["up"]);
        command.args(args).stderr(std::fs::File::create(&log).unwrap());
        change(&mut command);
        Logged { engine: place.start(command), log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Lines of the log that contain `words`.
    fn logged(&self, words: &str) -> usize {
        self.log().lines().filter(|line| line.contains(words)).count()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.engine.pid())).unwrap().count()
    }

    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.engine.pid())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

/// Guests by `ps`, and the number of sockets by `sockets`.
fn seen(place: &Place) -> (Vec<String>, usize) {
    let ps = place.run(&["ps", "--json"]).json();
    let guests = ps["engines"][0]["guests"].as_array().unwrap().iter();
    let names = guests.map(|g| g["name"].as_str().unwrap().to_owned()).collect();
    let sockets = place.run(&["sockets", "--json"]).json()["sockets"].as_array().unwrap().len();
    (names, sockets)
}

/// What must be the same before and after.
struct Baseline {
    seen: (Vec<String>, usize),
    descriptors: usize,
    resident_kib: u64,
}

impl Baseline {
    fn of(place: &Place, engine: &Logged) -> Baseline {
        let seen = seen(place);
        Baseline { seen, descriptors: engine.descriptors(), resident_kib: engine.resident_kib() }
    }

    fn returns(&self, place: &Place, engine: &Logged) {
        until("guests and sockets are those of the start", || seen(place) == self.seen);
        until("the engine's descriptors are back", || engine.descriptors() <= self.descriptors);
        let mut now = 0;
        let bound = self.resident_kib + 6 * 1024;
        let deadline = Instant::now() + WATCHDOG;
        while Instant::now() < deadline {
            now = engine.resident_kib();
            if now <= bound {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the engine's memory was {} KiB and is {now} KiB", self.resident_kib);
    }
}

// ---- native peers

/// A native server that sends back what comes, or keeps silent.
struct Native {
    listener: TcpListener,
    connections: Arc<AtomicUsize>,
    silent: Arc<Mutex<Vec<TcpStream>>>,
}

impl Native {
    fn echo() -> Native {
        Native::start(|mut stream, _| {
            let mut buffer = [0; 65536];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
        })
    }

    /// Accepts and neither reads nor writes.
    fn silent() -> Native {
        Native::start(|stream, silent| silent.lock().unwrap().push(stream))
    }

    fn start(serve: fn(TcpStream, &Mutex<Vec<TcpStream>>)) -> Native {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let native = Native { listener, connections: Arc::default(), silent: Arc::default() };
        let (listener, connections) = (native.listener.try_clone().unwrap(), native.connections.clone());
        let silent = native.silent.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (connections, silent) = (connections.clone(), silent.clone());
                connections.fetch_add(1, SeqCst);
                std::thread::spawn(move || {
                    serve(stream, &silent);
                    connections.fetch_sub(1, SeqCst);
                });
            }
        });
        native
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

/// A connection to a guest's port whose reads and writes have a watchdog.
fn dial(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    stream.set_write_timeout(Some(WATCHDOG)).unwrap();
    stream
}

fn is_over(result: &std::io::Result<usize>) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match result {
        Ok(n) => *n == 0,
        Err(e) => matches!(e.kind(), ConnectionReset | BrokenPipe),
    }
}

/// Reads to the end of the connection, whichever it is.
fn read_to_the_end(stream: &mut TcpStream) -> std::io::Result<usize> {
    let mut buffer = [0; 65536];
    loop {
        match stream.read(&mut buffer) {
            Ok(1..) => {}
            end => return end,
        }
    }
}

struct Random(u64);

impl Random {
    fn new() -> Random {
        let seed = std::env::var("NETKERNEL_FAULTS_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1);
        println!("NETKERNEL_FAULTS_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for reads and writes.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
    limit.rlim_max
}

// ---- guests that die

#[test]
fn killed_guests_disturb_nobody_and_leave_nothing() {
    const ROUNDS: usize = 50;
    let mut random = Random::new();
    let place = Place::new("killed");
    let engine = Logged::start(&place);
    let echo = Native::echo();
    let bystander = Bystander::start(&place, &echo);
    let mut baseline = Baseline::of(&place, &engine);
    for round in 0..ROUNDS {
        let fork = if round % 2 == 0 { "fork" } else { "alone" };
        let mut victim = Guest::start(&place, &["victim", &echo.port().to_string(), "4", fork]);
        // Some die before they have begun.
        if round % 10 == 9 {
            std::thread::sleep(Duration::from_micros(random.below(120_000)));
            victim.kill();
            bystander.advances();
            continue;
        }
        let port = victim.port();
        let [busy, busy2, mut deaf, mut idle] = [b'r', b'r', b'd', b'i'].map(|role| {
            let mut stream = dial(port);
            stream.write_all(&[role]).unwrap();
            stream
        });
        // Data that the victim will not read: its end is a reset then, as the kernel's would be.
        deaf.write_all(&[7; 1000]).unwrap();
        let (done, ends) = channel();
        for stream in [busy.try_clone().unwrap(), busy2.try_clone().unwrap()] {
            let (mut reader, done) = (stream.try_clone().unwrap(), done.clone());
            let mut writer = stream;
            std::thread::spawn(move || while writer.write_all(&[1; 30000]).is_ok() {});
            std::thread::spawn(move || done.send(read_to_the_end(&mut reader)));
        }
        victim.told("ready");
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        victim.kill();
        assert_eq!(idle.read(&mut [0]).unwrap(), 0, "round {round}: all was read, so FIN");
        let reset = deaf.read(&mut [0]).unwrap_err();
        assert_eq!(reset.raw_os_error(), Some(libc::ECONNRESET), "round {round}: unread data, so RST");
        for _ in 0..2 {
            let end = ends.recv_timeout(PROMPT).expect("the peers of a killed guest see its end");
            assert!(is_over(&end), "round {round}: {end:?}");
        }
        until("the server's connections are over", || echo.connections() == 1);
        until("its listener is gone", || TcpStream::connect(("127.0.0.1", port)).is_err());
        bystander.advances();
        let _ = busy.shutdown(Shutdown::Both);
        if round == 5 {
            // What the engine keeps for good it has by now.
            until("the victims are gone", || seen(&place) == baseline.seen);
            baseline.resident_kib = engine.resident_kib();
        }
    }
    baseline.returns(&place, &engine);
    bystander.advances();
    bystander.ends();
    assert_eq!(engine.logged("broke the protocol"), 0, "to be killed is no violation:\n{}", engine.log());
    // One that dies before it was made known leaves no line, as it was never a guest.
    let logged = engine.logged("(victim) is over");
    assert!((ROUNDS * 9 / 10..=ROUNDS).contains(&logged), "one line each:\n{}", engine.log());
    engine.engine.end();
}

#[test]
fn a_guest_that_fills_its_region_with_random_bytes_ends_alone() {
    let mut random = Random::new();
    let place = Place::new("vandal");
    let engine = Logged::start(&place);
    let echo = Native::echo();
    let bystander = Bystander::start(&place, &echo);
    let mut baseline = Baseline::of(&place, &engine);
    let kinds = ["everything", "sockets", "queues", "header", "payload"];
    for round in 0..10 {
        let (kind, seed) = (kinds[round % kinds.len()], random.below(1 << 32).to_string());
        let mut vandal = Guest::start(&place, &["vandal", &echo.port().to_string(), &seed, kind]);
        let mut peer = dial(vandal.port());
        vandal.told("ready");
        let lines = engine.log().lines().count();
        vandal.tell("go");
        until("the vandal was ended", || engine.log().lines().count() > lines);
        assert!(is_over(&read_to_the_end(&mut peer)), "{kind} {seed}");
        until("the server's connections are over", || echo.connections() == 1);
        bystander.advances();
        vandal.kill();
        until("it is gone", || seen(&place) == baseline.seen);
        let log = engine.log();
        let new: Vec<&str> = log.lines().skip(lines).collect();
        assert!(
            matches!(new[..], [line] if line.contains("(vandal) broke the protocol and was ended: ")),
            "one line, {kind} {seed}: {new:?}"
        );
        if round == 1 {
            baseline.resident_kib = engine.resident_kib();
        }
    }
    baseline.returns(&place, &engine);
    bystander.advances();
    bystander.ends();
    engine.engine.end();
}

// ---- engines that die

/// What blocks, and what it must end with. After an event, reading or accepting tells the error.
const BLOCKED: [(&str, &str); 12] = [
    ("recv", "ECONNRESET"),
    ("recv-timeout", "ECONNRESET"),
    ("recv-waitall", "ECONNRESET"),
    ("recvfrom", "ECONNRESET"),
    ("accept", "ENETDOWN"),
    ("send", "ECONNRESET"),
    ("connect", "ECONNRESET"),
    ("poll", "event ECONNRESET"),
    ("select", "event ECONNRESET"),
    ("epoll", "event ECONNRESET"),
    ("epoll-listener", "event ENETDOWN"),
    ("epoll", "event ECONNRESET"),
];

#[test]
fn nobody_hangs_when_the_engine_is_killed() {
    dead_engine("engine-kill", libc::SIGKILL);
}

#[test]
fn nobody_hangs_when_the_engine_ends_in_order() {
    dead_engine("engine-term", libc::SIGTERM);
}

fn dead_engine(name: &str, signal: i32) {
    let place = Place::new(name);
    let engine = place.up(&[]);
    let (echo, silent) = (Native::echo(), Native::silent());
    let (_full, full_port) = full_listener();
    let bystander = Bystander::start(&place, &echo);
    let [silent_port, full_port] = [silent.port(), full_port].map(|p| p.to_string());
    let guests: Vec<Guest> = ["processes", "threads"]
        .into_iter()
        .map(|how| {
            let mut program = vec!["blocked", how, &silent_port, &full_port];
            program.extend(BLOCKED.iter().map(|b| b.0));
            Guest::start(&place, &program)
        })
        .collect();
    for guest in &guests {
        let waiting: Vec<String> = BLOCKED.iter().map(|_| guest.told("waits")).collect();
        until("all sleep in their calls", || {
            let look = || waiting.iter().map(|w| asleep(w)).collect::<Option<Vec<_>>>();
            let before = look();
            std::thread::sleep(Duration::from_millis(40));
            before.is_some() && before == look()
        });
    }
    bystander.advances();
    engine.signal(signal);
    let died = Instant::now();
    let left = || PROMPT.saturating_sub(died.elapsed());
    for guest in guests {
        let mut wrong = Vec::new();
        let mut missing = BTreeMap::new();
        BLOCKED.iter().for_each(|&(call, _)| *missing.entry(call).or_insert(0) += 1);
        for _ in BLOCKED {
            let Ok(line) = guest.lines.recv_timeout(left()) else {
                panic!("{}: still blocked: {missing:?}", guest.program)
            };
            let known = BLOCKED.iter().find(|(call, _)| line.starts_with(&format!("result {call} ")));
            let (call, result) = known.unwrap_or_else(|| panic!("{line}"));
            *missing.get_mut(call).unwrap() -= 1;
            missing.retain(|_, n| *n > 0);
            if line != format!("result {call} {result} socket ENETDOWN") {
                wrong.push(line);
            }
        }
        assert!(wrong.is_empty(), "{}: {wrong:#?}", guest.program);
        guest.told("over");
        guest.ends();
    }
    let error = loop {
        match bystander.0.lines.recv_timeout(left()).expect("a busy connection is over, too") {
            line if line.starts_with("block") => {}
            line => break line,
        }
    };
    assert!(["error ECONNRESET", "error EPIPE"].contains(&&*error), "{error}");
    bystander.0.ends();
    engine.wait();
    // What comes next finds a new engine.
    let engine = place.up(&[]);
    let bystander = Bystander::start(&place, &echo);
    bystander.advances();
    bystander.ends();
    engine.end();
}

/// Kills the engine at random moments under load. `NETKERNEL_FAULTS_KILLS`: how often.
#[test]
fn an_engine_that_is_killed_under_load_spoils_nothing() {
    let kills = std::env::var("NETKERNEL_FAULTS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let mut random = Random::new();
    let place = Place::new("engine-load");
    let peer = Pattern::start();
    let mut outcomes = BTreeMap::new();
    for round in 0..kills {
        let engine = place.up(&[]);
        let guest = Guest::start(&place, &["loaded", &peer.port.to_string()]);
        (0..6).for_each(|_| _ = guest.told("begun"));
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        engine.signal(libc::SIGKILL);
        let died = Instant::now();
        for _ in 0..6 {
            let line = guest.line_within(PROMPT.saturating_sub(died.elapsed()));
            let end = line.rsplit(' ').next().unwrap().to_owned();
            // As a peer that is gone without a word: nothing ends in order, and what came was right.
            assert!(line.starts_with("over "), "round {round}: {line}");
            assert!(["ECONNRESET", "EPIPE", "ENETDOWN"].contains(&&*end), "round {round}: {line}");
            *outcomes.entry(end).or_insert(0) += 1;
        }
        assert_eq!(guest.told("then"), "ENETDOWN", "round {round}");
        guest.ends();
        engine.wait();
        until("the peer has seen all its connections end", || peer.open.load(SeqCst) == 0);
        assert_eq!(peer.wrong.load(SeqCst), 0, "round {round}: bytes that were never sent");
    }
    println!("{kills} kills: {outcomes:?}");
    assert!(peer.bytes.load(SeqCst) > 0);
}

/// Outside of any engine: takes, gives, or sends back what `loaded` of guest.py sends, takes, or asks.
struct Pattern {
    port: u16,
    open: Arc<AtomicUsize>,
    wrong: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
}

impl Pattern {
    fn start() -> Pattern {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let counts: [Arc<AtomicUsize>; 3] = Default::default();
        let [open, wrong, bytes] = counts.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let [open, wrong, bytes] = counts.clone();
                open.fetch_add(1, SeqCst);
                std::thread::spawn(move || {
                    let (right, count) = Pattern::serve(stream);
                    bytes.fetch_add(count, SeqCst);
                    wrong.fetch_add(usize::from(!right), SeqCst);
                    open.fetch_sub(1, SeqCst);
                });
            }
        });
        Pattern { port, open, wrong, bytes }
    }

    /// Until the connection ends, however that is: whether what came was right, and how much it was.
    fn serve(mut stream: TcpStream) -> (bool, usize) {
        let pattern: Vec<u8> = (0..1u64 << 16).map(|i| (i * i % 251) as u8).collect();
        let (mut buffer, mut count) = (vec![0; 1 << 16], 0);
        let mut what = [0];
        if stream.read_exact(&mut what).is_err() {
            return (true, 0);
        }
        match what[0] {
            b'r' => while stream.write_all(&pattern).is_ok() {},
            b's' => {
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    let at = count % pattern.len();
                    let first = n.min(pattern.len() - at);
                    if buffer[..first] != pattern[at..at + first] || buffer[first..n] != pattern[..n - first]
                    {
                        return (false, count);
                    }
                    count += n;
                }
            }
            b'e' => {
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            }
            _ => return (false, 0),
        }
        (true, count)
    }
}

/// A listener whose backlog is full: one more connection waits until somebody accepts. With what fills it.
fn full_listener() -> ((TcpListener, Vec<TcpStream>), u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: plain system call on an open descriptor.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) }, 0);
    let address = listener.local_addr().unwrap();
    let mut clients = Vec::new();
    while let Ok(client) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        clients.push(client);
        assert!(clients.len() < 10, "a backlog of 0 does not fill");
    }
    ((listener, clients), address.port())
}

/// `CALL PID TID`: the processor time of the thread, if it sleeps.
fn asleep(waiting: &str) -> Option<(u64, u64)> {
    let mut words = waiting.split(' ').skip(1);
    let (pid, tid) = (words.next().unwrap(), words.next().unwrap());
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    (fields[0] == "S").then(|| (fields[11].parse().unwrap(), fields[12].parse().unwrap()))
}

#[test]
fn a_new_engine_serves_what_comes_after_a_dead_one() {
    let place = Place::new("restart");
    let echo = Native::echo();
    let mut engine = place.up(&[]);
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let survivor = Guest::start(&place, &["hold", "0"]);
        let port = survivor.port();
        engine.signal(signal);
        engine.wait();
        until("the old listener is gone", || TcpStream::connect(("127.0.0.1", port)).is_err());
        engine = place.up(&[]);
        let bystander = Bystander::start(&place, &echo);
        bystander.advances();
        bystander.ends();
        // The port is free for a guest of the new engine while the old guest still runs.
        let next = Guest::start(&place, &["hold", &port.to_string()]);
        assert_eq!(next.port(), port);
        next.ends();
        survivor.ends();
    }
    engine.end();
}

#[test]
fn the_second_guest_on_a_port_is_told_so() {
    let place = Place::new("port");
    let engine = place.up(&[]);
    let first = Guest::start(&place, &["hold", "0"]);
    let port = first.port();
    let second = Guest::start(&place, &["hold", &port.to_string()]);
    assert_eq!(second.told("error"), "EADDRINUSE");
    second.ends();
    drop(dial(port));
    first.ends();
    let third = Guest::start(&place, &["hold", &port.to_string()]);
    assert_eq!(third.port(), port, "free again");
    third.ends();
    engine.end();
}

// ---- things that run out

#[test]
fn a_guest_without_region_memory_waits_and_works_on() {
    const SOCKETS: usize = 1500;
    raise_descriptor_limit();
    let place = Place::new("memory");
    let config = place.file("small.toml", "[engine]\nregion_bytes = \"64MiB\"\n");
    let engine = Logged::start_with(&place, &["--config", config.to_str().unwrap()], |_| {});
    let (echo, silent) = (Native::echo(), Native::silent());
    // Small buffers in the kernel, so that the region's fill.
    let small = 4096i32;
    for option in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
        // SAFETY: an int option of an open descriptor.
        unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&silent.listener),
                libc::SOL_SOCKET,
                option,
                (&raw const small).cast(),
                4,
            )
        };
    }
    let bystander = Bystander::start(&place, &echo);
    let baseline = Baseline::of(&place, &engine);
    let [port, echo_port] = [silent.port(), echo.port()].map(|p| p.to_string());
    let mut guest = Guest::start(&place, &["memory", &port, &echo_port, &SOCKETS.to_string()]);
    let told = guest.told("sent");
    let (sent, errors) = told.split_once(' ').unwrap();
    assert_eq!(errors, "EAGAIN", "a full socket says so as on Linux");
    bystander.advances();
    println!("{SOCKETS} sockets took {sent} bytes");

    let mut streams = std::mem::take(&mut *silent.silent.lock().unwrap());
    assert_eq!(streams.len(), SOCKETS);
    streams.iter().for_each(|s| s.set_nonblocking(true).unwrap());
    let sent: usize = sent.parse().unwrap();
    let mut read = 0;
    let mut buffer = vec![0; 1 << 20];
    until("all that was sent arrives", || {
        for stream in &mut streams {
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                read += n;
            }
        }
        read >= sent
    });
    assert_eq!(read, sent);
    // More than the region can hold, little enough for the kernel's own limits.
    let mut each = vec![0; SOCKETS];
    let mut quiet = 0;
    while quiet < 5 {
        quiet += 1;
        for (stream, filled) in streams.iter_mut().zip(&mut each) {
            while *filled < 64 << 10
                && let Ok(n @ 1..) = stream.write(&buffer[..16384])
            {
                *filled += n;
                quiet = 0;
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let filled: usize = each.iter().sum();
    println!("and were filled with {filled}");
    bystander.advances();
    streams.iter().for_each(|s| s.shutdown(Shutdown::Write).unwrap());
    guest.tell("drain");
    assert_eq!(guest.told("late"), "True", "a writer that blocks gets memory in the end");
    assert_eq!(guest.told("received"), filled.to_string());
    assert_eq!(guest.told("echoed"), "True");
    drop(streams);
    guest.ends();
    bystander.advances();
    baseline.returns(&place, &engine);
    bystander.ends();
    assert_eq!(engine.logged("broke the protocol"), 0, "{}", engine.log());
    engine.engine.end();
}

#[test]
fn a_guest_without_descriptors_is_told_so_and_works_on() {
    let place = Place::new("descriptors");
    let engine = Logged::start(&place);
    let echo = Native::echo();
    let bystander = Bystander::start(&place, &echo);
    let baseline = Baseline::of(&place, &engine);
    let mut guest = Guest::start(&place, &["descriptors", &echo.port().to_string(), "64"]);
    let mut early = dial(guest.port());
    early.write_all(b"early").unwrap();
    guest.tell("go");
    let told = guest.told("socket");
    let (error, made) = told.split_once(' ').unwrap();
    assert_eq!(error, "EMFILE");
    assert!((40..64).contains(&made.parse().unwrap()), "{made} sockets");
    assert_eq!(guest.told("accept"), "EMFILE");
    bystander.advances();
    assert_eq!(guest.told("accepted"), "early");
    assert_eq!(guest.told("echoed"), "True");
    guest.ends();
    baseline.returns(&place, &engine);
    bystander.ends();
    engine.engine.end();
}

#[test]
fn an_engine_without_descriptors_refuses_and_works_on() {
    let place = Place::new("engine-descriptors");
    let engine = Logged::start_with(&place, &[], |command| {
        let limit = libc::rlimit { rlim_cur: 300, rlim_max: 300 };
        // SAFETY: setrlimit is async-signal-safe; the limit is a copy of the closure's own.
        unsafe {
            command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
    });
    let (echo, silent) = (Native::echo(), Native::silent());
    let bystander = Bystander::start(&place, &echo);
    let baseline = Baseline::of(&place, &engine);
    let [port, echo_port] = [silent.port(), echo.port()].map(|p| p.to_string());
    let mut guest = Guest::start(&place, &["many", &port, &echo_port, "600"]);
    let mut waiting = dial(guest.port());
    waiting.write_all(b"later").unwrap();
    assert_eq!(guest.told("connected"), "600 ENFILE True", "and what it had goes on");
    bystander.advances();
    guest.tell("close");
    assert_eq!(guest.told("accepted"), "later");
    assert_eq!(guest.told("echoed"), "True");
    guest.ends();
    silent.silent.lock().unwrap().clear();
    bystander.advances();
    until("guests and sockets are those of the start", || seen(&place) == baseline.seen);
    bystander.ends();
    assert_eq!(engine.logged("broke the protocol"), 0, "{}", engine.log());
    engine.engine.end();
}

#[test]
fn fifteen_thousand_idle_connections_into_one_guest() {
    const COUNT: usize = 15_000;
    let hard = raise_descriptor_limit();
    if hard < COUNT as u64 + 1000 {
        eprintln!(
            "SKIPPED: {COUNT} connections need a hard RLIMIT_NOFILE of {}, here it is {hard}",
            COUNT + 1000
        );
        return;
    }
    let place = Place::new("idle");
    let engine = Logged::start(&place);
    let echo = Native::echo();
    let bystander = Bystander::start(&place, &echo);
    let guest = Guest::start(&place, &["idle", &COUNT.to_string()]);
    let port = guest.port();
    let baseline = Baseline::of(&place, &engine);
    let mut streams: Vec<TcpStream> = (0..COUNT).map(|_| dial(port)).collect();
    assert_eq!(guest.told("accepted"), COUNT.to_string());
    assert_eq!(seen(&place).1, baseline.seen.1 + COUNT);
    bystander.advances();
    // Each is alive.
    for (i, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&(i as u32).to_le_bytes()).unwrap();
    }
    for (i, stream) in streams.iter_mut().enumerate() {
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(u32::from_le_bytes(back), i as u32);
    }
    bystander.advances();
    drop(streams);
    guest.told("gone");
    guest.ends();
    until("only the bystander is left", || seen(&place).0 == ["bystander"]);
    until("the engine's descriptors are back", || engine.descriptors() <= baseline.descriptors);
    bystander.ends();
    engine.engine.end();
}
