//! Writes to descriptors that came from a guest must not stop a switch thread.
//!
//! A guest hands in the eventfds of its doorbells. It shares the open file, so it can make the file blocking and fill the
//! counter, and a write would wait for ever. The switch thread marks each such write; a watchdog thread that finds the
//! same write going on for half a second interrupts it by a signal, and the guest is ended.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(500);
/// Ignored by default, so that a late one does no harm.
const SIGNAL: i32 = libc::SIGURG;

/// One switch thread's mark.
#[derive(Default)]
pub struct Watch {
    thread: AtomicI32,
    /// Number of the write that goes on, odd; or of the last one that ended, even.
    write: AtomicU64,
}

impl Watch {
    /// Called once by the switch thread.
    pub fn begin(&self) {
        // SAFETY: plain system call.
        self.thread.store(unsafe { libc::gettid() }, Relaxed);
    }

    /// Adds 1 to an eventfd that a guest shares. False: it blocked and was interrupted.
    pub fn write(&self, fd: RawFd) -> bool {
        let one = 1u64;
        self.write.fetch_add(1, Relaxed);
        // SAFETY: eight bytes, valid for reads.
        let n = unsafe { libc::write(fd, (&raw const one).cast(), 8) };
        let interrupted = n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        self.write.fetch_add(1, Relaxed);
        !interrupted
    }
}

/// Starts the watchdog; it ends when all switch threads and their engine are gone.
pub fn start(watches: &[Arc<Watch>]) -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: an all-zero sigaction is valid; the handler does nothing. No SA_RESTART: the write must return.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        if libc::sigaction(SIGNAL, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let mut watched: Vec<(Weak<Watch>, u64)> = watches.iter().map(|w| (Arc::downgrade(w), 0)).collect();
    std::thread::Builder::new().name("nk-watchdog".into()).spawn(move || {
        loop {
            std::thread::sleep(INTERVAL);
            let mut alive = false;
            for (watch, seen) in &mut watched {
                let Some(watch) = watch.upgrade() else { continue };
                alive = true;
                let write = watch.write.load(Relaxed);
                if write % 2 == 1 && write == *seen {
                    let thread = watch.thread.load(Relaxed);
                    // SAFETY: plain system call; a thread that is gone is an error that does not matter.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
                }
                *seen = write;
            }
            if !alive {
                return;
            }
        }
    })?;
    Ok(())
}
