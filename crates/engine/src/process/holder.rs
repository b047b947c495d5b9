//! The process that owns an NSM's descriptor table.
//!
//! It has one thread, touches no guest's memory, parses only what the engine says, and waits for its worker. A worker that
//! died is started again at once, by a clone of this small process: well under a millisecond.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::confine::confine;
use super::journal::Root;
use super::wire::{Call, Reader, Report, Request, Start, send};
use super::{succession, worker};

/// Exit codes of a worker: the engine is gone or said stop; another one is to go on; one of another holder is to.
pub const ENDED: i32 = 40;
pub const AGAIN: i32 = 42;
pub const STAND_BY: i32 = 43;

/// So many deaths within [`WINDOW`] are a loop: from then on each start is delayed.
const MANY: usize = 8;
const WINDOW: Duration = Duration::from_secs(10);
const DELAY: Duration = Duration::from_millis(500);
/// The same of deaths by SIGKILL, which are no fault of the worker's or its guests'.
const MANY_KILLS: usize = 50;
const DELAY_OF_KILLED: Duration = Duration::from_millis(20);

/// Runs an NSM whose engine holds the other end of `control`; returns the exit code of the process. The caller is the only
/// thread.
pub fn main(control: OwnedFd) -> i32 {
    match hold(control) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("the process of an NSM ends: {error}");
            1
        }
    }
}

fn hold(mut control: OwnedFd) -> io::Result<()> {
    let Some((start, fds)) = Reader::default().receive::<Start>(&control)? else { return Ok(()) };
    confine(&start.nsm)?;
    let root = match fds.into_iter().next() {
        Some(before) if start.successor => {
            send(control.as_raw_fd(), &Report::Waiting(succession::format()), &[])?;
            // Or nobody says anything any more: this one is not wanted after all.
            let Some(root) = succession::take(before, &mut control, start.max_guests)? else { return Ok(()) };
            root
        }
        _ => Root::create(start.max_guests)?,
    };
    let (root, control) = (Arc::new(root), &control);
    let (mut deaths, mut kills): (Vec<Instant>, Vec<Instant>) = Default::default();
    loop {
        let pid = clone_worker()?;
        if pid == 0 {
            let code = worker::run(control, &start, &root);
            // SAFETY: ends the process at once; nothing of the holder's, whose memory this is a copy of, is to be run.
            unsafe { libc::_exit(code) }
        }
        let status = wait(pid)?;
        if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == ENDED {
            return Ok(());
        }
        if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == AGAIN {
            continue;
        }
        if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == STAND_BY {
            match Reader::default().receive::<Call>(control)? {
                Some((Call { request: Request::Restart, .. }, _)) => {
                    // How far the other one came is not known: as after a crash.
                    let _ = root.was_stopped();
                    continue;
                }
                _ => return Ok(()),
            }
        }
        let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
        let how = if libc::WIFSIGNALED(status) {
            format!("signal {}", libc::WTERMSIG(status))
        } else {
            format!("exit code {}", libc::WEXITSTATUS(status))
        };
        if send(control.as_raw_fd(), &Report::Died(how), &[]).is_err() {
            return Ok(());
        }
        let now = Instant::now();
        let list = if killed { &mut kills } else { &mut deaths };
        list.push(now);
        list.retain(|death| now.duration_since(*death) < WINDOW);
        if !killed && list.len() >= MANY {
            log::error!("stack {}: its process dies again and again; its guests are reset", start.nsm.name);
            root.doom_all();
            std::thread::sleep(DELAY);
        } else if killed && list.len() >= MANY_KILLS {
            // Who kills it has reasons that are not its guests', but it may be for want of memory.
            std::thread::sleep(DELAY_OF_KILLED);
        }
    }
}

/// As `fork`, but parent and child share the descriptor table. 0: in the child.
fn clone_worker() -> io::Result<i32> {
    // SAFETY: without CLONE_VM the child has a copy of this single-threaded process, stack included, as after fork; nobody
    // holds a lock. The C library caches the main thread's id, which is the parent's then; it is used for mutexes of kinds
    // that nothing here has, and for raise(), which abort() survives.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid as i32) }
}

fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: status is valid for writes; the child is ours and was not waited for.
        if unsafe { libc::waitpid(pid, &mut status, 0) } == pid {
            return Ok(status);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
