//! A guest that does what a test tells it, line by line.

use std::io::Write as _;
use std::process::{Child, Stdio};

use super::{Place, wait};

/// A guest that runs a line of Python for each line it is told, and answers with what `say` was given.
pub struct Python {
    child: Child,
    out: std::sync::mpsc::Receiver<String>,
}

impl Python {
    pub fn start(place: &Place) -> Python {
        Python::start_with(place, &[])
    }

    pub fn start_with(place: &Place, arguments: &[&str]) -> Python {
        let loop_ = "import sys, socket, errno, select\n\
                     def say(*words): print(*words, flush=True)\n\
                     for line in sys.stdin:\n\
                     \x20   try: exec(line)\n\
                     \x20   except OSError as e: say(errno.errorcode.get(e.errno, e))\n";
        let mut child = place
            .netkernel(&["run"])
            .args(arguments)
            .args(["--", "python3", "-c", loop_])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = super::lines(child.stdout.take().unwrap());
        Python { child, out }
    }

    /// Another program that answers each line with one.
    pub fn start_program(place: &Place, arguments: &[&str], program: &str) -> Python {
        let mut command = place.netkernel(&["run"]);
        command.args(arguments).args(["--", program]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = super::lines(child.stdout.take().unwrap());
        Python { child, out }
    }

    /// Runs a line that says one thing.
    #[track_caller]
    pub fn run(&mut self, line: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.out.recv_timeout(super::WATCHDOG).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    pub fn ends(mut self) {
        drop(self.child.stdin.take());
        assert_eq!(wait(&mut self.child, "the guest").code(), Some(0));
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection `c` to itself, `a` at the other end, and the listener `l`.
pub const CONNECTED: &str = "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); a, _ = l.accept(); say(1)";
