//! Children with watchdogs, and what a tree of processes costs in CPU time and memory.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys;

/// How long a process that was asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// A child that leads its own process group. Dropping it ends it and everything it started.
pub struct Process {
    name: String,
    pid: i32,
    pidfd: OwnedFd,
    output: PathBuf,
    errors: PathBuf,
    pipes: Option<(ChildStdin, ChildStdout)>,
    exit: Option<sys::Exit>,
}

impl Process {
    /// Starts `command` with its output going to files in `directory`.
    pub fn start(name: &str, command: Command, directory: &Path) -> Result<Process> {
        Process::start_with(name, command, directory, false)
    }

    /// Starts `command` with pipes: [`Process::tell`] and [`Process::line`].
    pub fn start_piped(name: &str, command: Command, directory: &Path) -> Result<Process> {
        Process::start_with(name, command, directory, true)
    }

    fn start_with(name: &str, mut command: Command, directory: &Path, piped: bool) -> Result<Process> {
        sys::prepare(&mut command);
        // A program that is named by its path has its files here all the same.
        let stem = Path::new(name).file_name().map_or_else(|| name.into(), |stem| stem.to_string_lossy());
        let file = |ending: &str| -> Result<(PathBuf, File)> {
            let named = tempfile::Builder::new()
                .prefix(&format!("{stem}."))
                .suffix(ending)
                .tempfile_in(directory)
                .context("no file for a program's output")?;
            let (file, path) = named.keep().context("no file for a program's output")?;
            Ok((path, file))
        };
        let (output, output_file) = file(".out")?;
        let (errors, errors_file) = file(".err")?;
        command.stderr(errors_file);
        if piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).stdout(output_file);
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        let pid = child.id() as i32;
        let pidfd = sys::pidfd(pid).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        Ok(Process { name: name.to_owned(), pid, pidfd, output, errors, pipes, exit: None })
    }

    /// Whether a seccomp filter is on it.
    pub fn is_filtered(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/status", self.pid))
            .is_ok_and(|status| status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])))
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sleeps for `pause`; an error when the process ended meanwhile.
    pub fn still_runs(&mut self, pause: Duration) -> Result<()> {
        match self.ended_within(pause)? {
            None => Ok(()),
            Some(exit) => bail!("{} ended early: {}{}", self.name, describe(exit.status), self.last_words()),
        }
    }

    /// Waits for the end, successful or not; kills it and fails when it takes longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<sys::Exit> {
        if let Some(exit) = self.ended_within(limit)? {
            return Ok(exit);
        }
        let words = self.last_words();
        self.stop();
        bail!("{} did not end within {} s{words}", self.name, limit.as_secs())
    }

    /// Waits for the successful end and returns what it printed, with its CPU time.
    pub fn finish(&mut self, limit: Duration) -> Result<(String, sys::Exit)> {
        let exit = self.wait(limit)?;
        if exit.status != 0 {
            bail!("{} failed: {}{}", self.name, describe(exit.status), self.last_words());
        }
        Ok((fs::read_to_string(&self.output).context("a program's output")?, exit))
    }

    /// What it printed so far.
    pub fn output(&self) -> Result<String> {
        fs::read_to_string(&self.output).context("a program's output")
    }

    /// Writes a line to a process started with pipes.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let (stdin, _) = self.pipes.as_mut().context("no pipes")?;
        writeln!(stdin, "{line}").with_context(|| format!("{} listens no more", self.name))
    }

    /// The next line of a process started with pipes.
    pub fn line(&mut self, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut line = Vec::new();
        loop {
            let words = self.last_words();
            let (_, stdout) = self.pipes.as_mut().context("no pipes")?;
            if !sys::readable(stdout.as_raw_fd(), end.saturating_duration_since(Instant::now()))? {
                bail!("{} did not answer within {} s{words}", self.name, limit.as_secs());
            }
            let mut byte = [0];
            if stdout.read(&mut byte)? == 0 {
                bail!("{} ended without an answer{words}", self.name);
            }
            if byte[0] == b'\n' {
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            line.push(byte[0]);
        }
    }

    /// CPU time so far of this process, its descendants, and those of them that were reaped.
    pub fn cpu_s(&self) -> f64 {
        let ticks = sys::ticks_per_second();
        tree(self.pid)
            .iter()
            .map(|stat| {
                let own = sys::cpu_time_s(stat.pid).unwrap_or(stat.own_ticks / ticks);
                own + stat.children_ticks / ticks
            })
            .sum()
    }

    /// The process of this tree that holds the socket with this inode, and its descriptor.
    fn holder(&self, inode: u64) -> Option<(i32, i32)> {
        let wanted = format!("socket:[{inode}]");
        tree(self.pid).iter().find_map(|member| {
            let entries = fs::read_dir(format!("/proc/{}/fd", member.pid)).ok()?;
            let held =
                |path: PathBuf| fs::read_link(path).is_ok_and(|target| target.as_os_str() == wanted.as_str());
            let entry = entries.flatten().find(|entry| held(entry.path()))?;
            Some((member.pid, entry.file_name().to_str()?.parse().ok()?))
        })
    }

    /// Whether the socket with this inode is one of this process or its descendants.
    pub fn holds(&self, inode: u64) -> bool {
        self.holder(inode).is_some()
    }

    /// Makes the listener with this inode, and the connections it will accept, use a congestion control, without the
    /// server knowing.
    pub fn set_congestion(&self, inode: u64, name: &str) -> Result<()> {
        let (pid, fd) =
            self.holder(inode).with_context(|| format!("{} does not hold its listener", self.name))?;
        let socket = sys::descriptor_of(&sys::pidfd(pid)?, fd).context("the listener")?;
        sys::set_congestion(&socket, name).context("the listener's congestion control")
    }

    /// The processes that a process started that this one started.
    pub fn grandchildren(&self) -> Vec<i32> {
        let all = tree(self.pid);
        let child = |pid: i32| all.iter().any(|stat| stat.pid == pid && stat.parent == self.pid);
        all.iter().filter(|stat| !stat.zombie && child(stat.parent)).map(|stat| stat.pid).collect()
    }

    /// Memory of this process and its descendants.
    pub fn memory(&self) -> Memory {
        tree(self.pid).iter().map(|stat| Memory::of(stat.pid)).fold(Memory::default(), Memory::and)
    }

    /// The end of what it said on stderr, for error messages.
    fn last_words(&self) -> String {
        let mut text = fs::read_to_string(&self.errors).unwrap_or_default();
        if text.trim().is_empty() {
            text = fs::read_to_string(&self.output).unwrap_or_default();
        }
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(3)..].join(" | ");
        if tail.is_empty() { String::new() } else { format!(" (its last words: {tail})") }
    }

    fn ended_within(&mut self, limit: Duration) -> Result<Option<sys::Exit>> {
        if self.exit.is_none() && sys::readable(self.pidfd.as_raw_fd(), limit).map_err(interruption)? {
            self.exit = sys::reap(self.pid)?;
        }
        if sys::interrupted() {
            bail!("interrupted");
        }
        Ok(self.exit)
    }

    /// Ends the process and everything it started, and reaps what is ours to reap.
    pub fn stop(&mut self) {
        self.pipes = None;
        let family = tree(self.pid);
        if self.exit.is_none() {
            sys::signal(self.pid, libc::SIGTERM);
            let end = Instant::now() + GRACE;
            while self.exit.is_none() && Instant::now() < end {
                let _ = sys::readable(self.pidfd.as_raw_fd(), end.saturating_duration_since(Instant::now()));
                self.exit = sys::reap(self.pid).unwrap_or_default();
            }
        }
        let gone = |stat: &Stat| Stat::of(stat.pid).is_none_or(|now| now.start != stat.start || now.zombie);
        // What it started ends with it, a moment later at most.
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end && !family.iter().all(gone) {
            std::thread::sleep(Duration::from_millis(10));
        }
        for stat in family.iter().filter(|stat| !gone(stat)) {
            sys::signal(stat.pid, libc::SIGKILL);
        }
        let end = Instant::now() + GRACE;
        loop {
            if self.exit.is_none() {
                self.exit = sys::reap(self.pid).unwrap_or_default();
            }
            if Instant::now() >= end || (self.exit.is_some() && family.iter().all(gone)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for stat in &family {
            // Orphans that came to us; of others' children the kernel says ECHILD.
            let _ = sys::reap(stat.pid);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

fn interruption(error: std::io::Error) -> anyhow::Error {
    if sys::interrupted() { anyhow::anyhow!("interrupted") } else { error.into() }
}

fn describe(status: i32) -> String {
    ExitStatus::from_raw(status).to_string()
}

/// Ends all children of this process that are left: orphans of measured programs that outlived their parents.
pub fn end_orphans() {
    let own = std::process::id() as i32;
    for _ in 0..20 {
        let left: Vec<Stat> = all().into_iter().filter(|stat| stat.parent == own).collect();
        if left.is_empty() {
            return;
        }
        for stat in left {
            sys::signal(stat.pid, libc::SIGKILL);
            let _ = sys::reap(stat.pid);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What `/proc/PID/stat` says.
#[derive(Clone, Copy)]
struct Stat {
    pid: i32,
    zombie: bool,
    parent: i32,
    group: i32,
    own_ticks: f64,
    children_ticks: f64,
    start: u64,
}

impl Stat {
    fn of(pid: i32) -> Option<Stat> {
        Stat::parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(pid: i32, text: &str) -> Option<Stat> {
        // The name may hold anything, parentheses too; what follows the last one is plain.
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
        let number = |n: usize| fields.get(n)?.parse::<i64>().ok();
        Some(Stat {
            pid,
            zombie: matches!(*fields.first()?, "Z" | "X"),
            parent: number(1)? as i32,
            group: number(2)? as i32,
            own_ticks: (number(11)? + number(12)?) as f64,
            children_ticks: (number(13)? + number(14)?) as f64,
            start: number(19)? as u64,
        })
    }
}

fn all() -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| Stat::of(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// The process `root`, its group and its descendants.
fn tree(root: i32) -> Vec<Stat> {
    let all = all();
    let mut members: BTreeSet<i32> =
        all.iter().filter(|stat| stat.group == root).map(|stat| stat.pid).collect();
    members.insert(root);
    loop {
        let before = members.len();
        members.extend(
            all.iter().filter(|stat| members.contains(&stat.parent)).map(|stat| stat.pid).collect::<Vec<_>>(),
        );
        if members.len() == before {
            return all.into_iter().filter(|stat| members.contains(&stat.pid)).collect();
        }
    }
}

/// Memory of processes in bytes. Shared memory is the processes' proportional share: summed over all that map it, it
/// is counted once. Programs' and libraries' own pages are left out.
#[derive(Clone, Copy, Default, Debug, serde::Serialize)]
pub struct Memory {
    pub anonymous: f64,
    pub shared: f64,
    pub huge_private: f64,
    /// Huge pages are mapped by all or none, so that the largest mapping counts, not the sum.
    pub huge_shared: f64,
}

impl Memory {
    fn of(pid: i32) -> Memory {
        Memory::parse(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default())
    }

    fn parse(text: &str) -> Memory {
        let field = |name: &str| kib(text, name) * 1024.0;
        Memory {
            anonymous: field("Pss_Anon:"),
            shared: field("Pss_Shmem:"),
            huge_private: field("Private_Hugetlb:"),
            huge_shared: field("Shared_Hugetlb:"),
        }
    }

    pub fn and(self, other: Memory) -> Memory {
        Memory {
            anonymous: self.anonymous + other.anonymous,
            shared: self.shared + other.shared,
            huge_private: self.huge_private + other.huge_private,
            huge_shared: self.huge_shared.max(other.huge_shared),
        }
    }

    /// What is shared between processes: the guests' regions.
    pub fn regions(self) -> f64 {
        self.shared + self.huge_private + self.huge_shared
    }
}

/// The kernel's slab memory of the whole machine, in bytes.
pub fn slab() -> f64 {
    kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "Slab:") * 1024.0
}

fn kib(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_parentheses() {
        let text = "7 (a) R (b) S 1 5 7 0 -1 0 0 0 0 0 10 20 3 4 20 0 1 0 999 0 0";
        let stat = Stat::parse(7, text).unwrap();
        assert_eq!((stat.parent, stat.group, stat.start), (1, 5, 999));
        assert_eq!((stat.own_ticks, stat.children_ticks, stat.zombie), (30.0, 7.0, false));
    }

    #[test]
    fn huge_pages_that_two_map_count_once() {
        let one = Memory::parse(
            "Pss_Anon: 4 kB\nPss_Shmem: 8 kB\nShared_Hugetlb: 2048 kB\nPrivate_Hugetlb: 0 kB\n",
        );
        let both = one.and(one);
        assert_eq!(both.anonymous, 8.0 * 1024.0);
        assert_eq!(both.regions(), (16.0 + 2048.0) * 1024.0);
    }

    #[test]
    fn a_child_is_measured_and_its_tree_ends() {
        let directory = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 1000 & wait"]);
        let mut process = Process::start("shell", shell, directory.path()).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while tree(process.pid()).len() < 2 {
            assert!(Instant::now() < end, "the shell never started its child");
            process.still_runs(Duration::from_millis(5)).unwrap();
        }
        let family = tree(process.pid());
        process.stop();
        for stat in family {
            assert!(Stat::of(stat.pid).is_none_or(|now| now.zombie || now.start != stat.start));
        }
    }
}
