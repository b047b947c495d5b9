//! What the tests of the command share. Every wait has a watchdog.
#![allow(dead_code)]

pub mod load;
pub mod machine;
pub mod namespace;
pub mod peer;
pub mod program;
pub mod python;
pub mod screen;
pub mod streams;
pub mod tenants;

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

pub const WATCHDOG: Duration = Duration::from_secs(30);

/// A directory of one test's own, in which its engines live.
pub struct Place {
    pub dir: PathBuf,
}

impl Place {
    pub fn new(name: &str) -> Place {
        let dir = PathBuf::from(format!("/tmp/netkernel-test-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Place { dir }
    }

    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A program in C.
    pub fn program(&self, name: &str, source: &str, flags: &[&str]) -> PathBuf {
        let source = self.file(&format!("{name}.c"), source);
        let path = self.dir.join(name);
        let mut command = Command::new("cc");
        command.arg("-w").args(flags).arg("-o").arg(&path).arg(&source);
        finish(command).succeeds();
        path
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("engine.sock")
    }

    /// The command under test; its engines are those of this place.
    pub fn netkernel(&self, args: &[&str]) -> Command {
        let binary = Path::new(env!("CARGO_BIN_EXE_netkernel"));
        let library = binary.with_file_name("libnetkernel.so");
        assert!(library.exists(), "{} is missing: build the workspace first", library.display());
        let mut command = Command::new(binary);
        command.args(args).env("NETKERNEL_RUNTIME_DIR", &self.dir).env("NETKERNEL_LIBRARY", library);
        command.env_remove("NETKERNEL_SOCKET_PATH").env_remove("LD_PRELOAD").stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Done {
        finish(self.netkernel(args))
    }

    /// The command as another user. Needs root.
    pub fn as_nobody(&self, args: &[&str]) -> Command {
        let netkernel = self.netkernel(args);
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
        command.arg(netkernel.get_program()).args(args);
        command.envs(netkernel.get_envs().filter_map(|(k, v)| Some((k, v?)))).stdin(Stdio::null());
        command
    }

    /// Starts `netkernel up` and waits until it is ready.
    pub fn up(&self, args: &[&str]) -> Engine {
        let mut command = self.netkernel(&["up"]);
        command.args(args).stderr(Stdio::inherit());
        self.start(command)
    }

    /// As [`Place::up`], for a command that was changed.
    pub fn start(&self, mut command: Command) -> Engine {
        command.stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = Vec::new();
            let mut byte = [0];
            while out.read(&mut byte).unwrap_or(0) == 1 && byte[0] != b'\n' {
                line.push(byte[0]);
            }
            let _ = sender.send(String::from_utf8(line).unwrap());
            let _ = out.read_to_end(&mut Vec::new());
        });
        let line = receiver.recv_timeout(WATCHDOG).expect("the engine says that it is ready");
        assert!(line.starts_with("netkernel: ready at "), "{line:?}");
        Engine { child: Some(child), line }
    }

    /// Files of engines in the place.
    pub fn engine_files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(&self.dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".sock"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A running `netkernel up`, ended with the value.
pub struct Engine {
    child: Option<Child>,
    pub line: String,
}

impl Engine {
    /// Takes care of a child's end.
    pub fn of(child: Child) -> Engine {
        Engine { child: Some(child), line: String::new() }
    }

    pub fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id() as i32
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: signals a child that this value has not waited for, so the pid is still its own.
        unsafe { libc::kill(self.pid(), signal) };
    }

    pub fn wait(mut self) -> ExitStatus {
        wait(self.child.as_mut().unwrap(), "netkernel up")
    }

    /// Ends in order.
    pub fn end(self) {
        self.signal(libc::SIGTERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{status:?}");
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Done {
    /// Asserts the exit code and that one sentence on stderr, from us, contains all of `words`.
    #[track_caller]
    pub fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.starts_with("netkernel: "), "{self:?}");
        assert_eq!(self.err.lines().count(), 1, "one sentence: {self:?}");
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in {self:?}");
        }
    }

    #[track_caller]
    pub fn succeeds(&self) -> &Done {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        self.succeeds();
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Runs to the end of the command *and* of its output pipes.
pub fn finish(mut command: Command) -> Done {
    let shown = format!("{command:?}");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut err = child.stderr.take().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let error = std::thread::spawn(move || {
            let mut text = String::new();
            err.read_to_string(&mut text).map(|_| text)
        });
        let mut text = String::new();
        let _ = out.read_to_string(&mut text);
        let _ = sender.send((text, error.join().unwrap().unwrap()));
    });
    let status = wait(&mut child, &shown);
    let (out, err) =
        receiver.recv_timeout(WATCHDOG).unwrap_or_else(|_| panic!("somebody holds the output of {shown}"));
    Done { code: status.code(), signal: status.signal(), out, err }
}

pub fn wait(child: &mut Child, what: &str) -> ExitStatus {
    let deadline = Instant::now() + WATCHDOG;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{what} did not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until `condition` holds.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WATCHDOG;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The lines of `out` as they come, so that waiting for one can end.
pub fn lines(out: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

/// A native server that answers each connection with all that it sent; its port on 127.0.0.1.
pub fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        }
    });
    port
}

pub fn is_root() -> bool {
    // SAFETY: cannot fail and touches no memory.
    unsafe { libc::geteuid() == 0 }
}

/// The children of a process.
pub fn children(pid: i32) -> Vec<i32> {
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
