//! The process tree below this process, seen through /proc.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, WaitOptions};

#[derive(Clone, Debug)]
pub struct Info {
    pub pid: u32,
    pub parent: u32,
    pub state: char,
    pub name: String,
}

/// One process; `None` when there is none of that number.
pub fn info(pid: u32) -> Option<Info> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything, parentheses too.
    let (open, close) = (stat.find('(')?, stat.rfind(')')?);
    let mut rest = stat[close + 1..].split_whitespace();
    let state = rest.next()?.chars().next()?;
    let parent = rest.next()?.parse().ok()?;
    Some(Info { pid, parent, state, name: stat[open + 1..close].to_owned() })
}

/// Zombies count as gone.
pub fn alive(pid: u32) -> bool {
    info(pid).is_some_and(|i| i.state != 'Z' && i.state != 'X')
}

/// True when the process has a handler for the signal and lets it through: a signal sent now is not lost.
pub fn takes(pid: u32, signal: Signal) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let bit = 1u64 << (signal.as_raw() - 1);
    let has = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & bit != 0)
    };
    has("SigCgt:") && !has("SigBlk:")
}

pub fn exe(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

fn all() -> Vec<Info> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).filter_map(info).collect()
}

pub fn children(pid: u32) -> Vec<Info> {
    all().into_iter().filter(|i| i.parent == pid).collect()
}

/// Everything below `root`, parents before children, without the trees of `except`.
pub fn descendants(root: u32, except: &[u32]) -> Vec<Info> {
    let all = all();
    let mut found: Vec<Info> = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for info in all.iter().filter(|i| i.parent == parent && !except.contains(&i.pid)) {
            // A number used again while /proc was read could close a circle.
            if found.iter().all(|f| f.pid != info.pid) {
                parents.push(info.pid);
                found.push(info.clone());
            }
        }
    }
    found
}

/// Errors are of no interest: the process may have ended already.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = pid_of(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Orphans below this process become its children instead of init's.
pub fn become_subreaper() -> std::io::Result<()> {
    Ok(rustix::process::set_child_subreaper(pid_of(std::process::id()))?)
}

/// Ends everything below this process but `except`, and collects it. Returns what still ran, as people read it.
pub fn sweep(except: &[u32], grace: Duration) -> Vec<String> {
    let me = std::process::id();
    let until = Instant::now() + grace;
    let mut left: Vec<String> = Vec::new();
    loop {
        let found = descendants(me, except);
        for info in found.iter().filter(|i| i.parent == me && i.state == 'Z') {
            let _ = rustix::process::waitpid(pid_of(info.pid), WaitOptions::NOHANG);
        }
        let running: Vec<_> = found.into_iter().filter(|i| i.state != 'Z').collect();
        if running.is_empty() && children(me).iter().all(|i| except.contains(&i.pid)) {
            return left;
        }
        if Instant::now() >= until {
            for info in &running {
                let line = describe(info);
                if !left.contains(&line) {
                    left.push(line);
                }
                signal(info.pid, Signal::KILL);
            }
        }
        if Instant::now() >= until + Duration::from_secs(10) {
            left.push("some of them cannot be ended".into());
            return left;
        }
        sleep(Duration::from_millis(5));
    }
}

/// What the tree is doing, for the report of a failure.
pub fn snapshot(except: &[u32]) -> Vec<String> {
    descendants(std::process::id(), except).iter().map(describe).collect()
}

/// The same for a process and those below it.
pub fn tree(pid: u32) -> Vec<String> {
    info(pid).iter().chain(&descendants(pid, &[])).map(describe).collect()
}

fn describe(info: &Info) -> String {
    let read = |what: &str| fs::read_to_string(format!("/proc/{}/{what}", info.pid)).unwrap_or_default();
    let mut line = read("cmdline").replace('\0', " ").trim().to_owned();
    if line.is_empty() {
        line = format!("[{}]", info.name);
    }
    if let Some((at, _)) = line.char_indices().nth(120) {
        line.truncate(at);
    }
    let call = read("syscall");
    let call = call.split(' ').next().unwrap_or_default().trim();
    format!("{} {} {} (call {call}) {line}", info.pid, info.state, read("wchan"))
}

pub fn open_descriptors(pid: u32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// Resident memory in KiB.
pub fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A process identifier as programs write it to their pid files.
pub fn read_pid_file(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn pid_of(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}
