use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use netkernel_service::{Readiness, Ready};
use netkernel_shm::fds;

static THREADS: AtomicU64 = AtomicU64::new(0);
thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, SeqCst);
}

/// Reports for one stack, from the stacks that its sockets are joined with.
pub(crate) struct Inbox {
    ready: Mutex<Vec<Ready>>,
    /// The stack's own thread, which looks here before it sleeps: it needs no bell.
    thread: u64,
    bell: OwnedFd,
    rung: AtomicBool,
}

impl Inbox {
    /// Of a stack of the calling thread.
    pub fn new() -> io::Result<Inbox> {
        Ok(Inbox {
            ready: Mutex::new(Vec::new()),
            thread: THREAD.with(|id| *id),
            bell: fds::eventfd()?,
            rung: AtomicBool::new(false),
        })
    }

    pub fn report(&self, key: u64, readiness: Readiness) {
        lock(&self.ready).push(Ready { key, readiness });
        // SYNC: inbox - the report is in the list before the bell is rung; who clears `rung` takes the list afterwards.
        if THREAD.with(|id| *id) != self.thread && !self.rung.swap(true, SeqCst) {
            let one = 1u64;
            // SAFETY: eight bytes, valid for reads. The eventfd is non-blocking.
            unsafe { libc::write(self.bell.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Appends at most `budget` reports to `out`.
    pub fn take(&self, out: &mut Vec<Ready>, budget: usize) {
        // SYNC: inbox
        if self.rung.load(SeqCst) {
            let mut count = 0u64;
            // SAFETY: eight bytes, valid for writes. The eventfd is non-blocking.
            unsafe { libc::read(self.bell.as_raw_fd(), (&raw mut count).cast(), 8) };
            self.rung.store(false, SeqCst);
        }
        let mut ready = lock(&self.ready);
        let n = ready.len().min(budget);
        out.extend(ready.drain(..n));
    }

    pub fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

/// What a panic left behind is consistent: all changes under these locks are single assignments.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
