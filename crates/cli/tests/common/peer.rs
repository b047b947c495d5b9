//! One of several guests that a test tells what to do by lines, and that say what became of it.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;

use super::{WATCHDOG, lines};

/// A program with a process group of its own, which is killed with the value.
pub struct Peer {
    child: Child,
    pub stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Peer {
    pub fn of(mut command: Command) -> Peer {
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        Peer { stdin: child.stdin.take().unwrap(), child, lines }
    }

    #[track_caller]
    pub fn ask(&mut self, word: &str) -> String {
        writeln!(self.stdin, "{word}").unwrap();
        self.told("got")
    }

    /// What follows `word` in the next line, which begins with it.
    #[track_caller]
    pub fn told(&self, word: &str) -> String {
        let line = self.lines.recv_timeout(WATCHDOG).expect("the peer says something");
        let rest = line.strip_prefix(word).unwrap_or_else(|| panic!("{line:?}, not {word}"));
        rest.trim().to_owned()
    }

    pub fn kill(&mut self) {
        // SAFETY: the group of a child that was not waited for.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.kill();
        }
    }
}
