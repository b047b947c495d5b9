//! A stack that another thread drives, as a stack of this thread.
//!
//! Some stacks exist once: one smoltcp has the TAP device, one hub-joined stack has a guest's identity. A guest's relay has a
//! thread of its own and needs sockets of such a stack. [`lend`] makes the two halves: a [`Lender`], which the thread that
//! drives the stack keeps, and a [`Lent`], which is a [`Stack`](netkernel_service::Stack) on any other thread.
//!
//! Each operation of a `Lent` is carried out by the lender's thread, between two of its own turns, and waited for. Payload is
//! copied once more than with a stack of one's own: no memory of the borrower is ever seen by the other thread, and what a
//! stack may look at after a `send` stays where it is until the next one. When the lender is gone, every operation fails
//! with ENETDOWN; nothing waits for it.

mod lender;
mod lent;

pub use lender::Lender;
pub use lent::Lent;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netkernel_service::{Ready, Stack};
use netkernel_shm::fds;

use lender::Kept;

/// What the lender's thread is asked to do.
type Call = Box<dyn FnOnce(&mut dyn Stack, &mut Kept) + Send>;

/// Makes the two halves. `keys`: the stack knows the borrowed sockets by keys of this value with bits of the lower 31 set, so
/// that it must have none there itself.
pub fn lend(keys: u64) -> io::Result<(Lender, Lent)> {
    let shared =
        Arc::new(Shared { calls: Bell::new()?, reports: Bell::new()?, gone: AtomicBool::new(false) });
    Ok((Lender::new(Arc::clone(&shared), keys), Lent::new(shared)))
}

struct Shared {
    /// From the borrower to the lender.
    calls: Bell<Call>,
    /// And back.
    reports: Bell<Ready>,
    /// The lender answers no more.
    gone: AtomicBool,
}

/// A queue, and a descriptor that is readable while something may stand in it.
struct Bell<T> {
    queue: Mutex<VecDeque<T>>,
    rung: AtomicBool,
    fd: OwnedFd,
}

impl<T> Bell<T> {
    fn new() -> io::Result<Bell<T>> {
        Ok(Bell { queue: Mutex::default(), rung: AtomicBool::new(false), fd: fds::eventfd()? })
    }

    fn push(&self, item: T) {
        lock(&self.queue).push_back(item);
        // SYNC: lent - the item is in the queue before the bell is rung; who clears `rung` takes the queue afterwards.
        if !self.rung.swap(true, SeqCst) {
            let one = 1u64;
            // SAFETY: eight bytes, valid for reads. The eventfd is non-blocking.
            unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// The oldest items, at most so many; those that are left have rung again.
    fn take(&self, most: usize) -> VecDeque<T> {
        // SYNC: lent
        if !self.rung.load(SeqCst) {
            return VecDeque::new();
        }
        let mut count = 0u64;
        // SAFETY: eight bytes, valid for writes. The eventfd is non-blocking.
        unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) };
        self.rung.store(false, SeqCst);
        let mut queue = lock(&self.queue);
        if queue.len() <= most {
            return std::mem::take(&mut *queue);
        }
        let taken = queue.drain(..most).collect();
        drop(queue);
        if !self.rung.swap(true, SeqCst) {
            let one = 1u64;
            // SAFETY: as in push.
            unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
        taken
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process; what stands under these locks is consistent between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
