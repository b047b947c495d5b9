//! Sleeping until a socket changes: poll the region for a short adaptive time, then sleep on the placeholder.

use core::sync::atomic::{Ordering, fence};

use netkernel_abi::socket::state;
use netkernel_abi::{Op, SocketEntry};
use netkernel_ring::spin::Polling;

use crate::guest::{self, Guest};
use crate::next::next;
use crate::queue;
use crate::socket::Sock;
use crate::sys::{self, raw};

/// Polls `ready` for the thread's adaptive budget. True: it came true.
pub fn spin(guest: &Guest, mut ready: impl FnMut() -> bool) -> bool {
    let budget = queue::with_spin(guest, |s| s.budget_ns());
    if budget == 0 {
        return ready();
    }
    let mut polling = queue::with_spin(guest, |s| s.begin(budget));
    let met = poll(&mut polling, &mut ready);
    queue::with_spin(guest, |s| s.end(&polling));
    met || ready()
}

fn poll(polling: &mut Polling, ready: &mut impl FnMut() -> bool) -> bool {
    let mut before = None;
    loop {
        for _ in 0..polling.looks() {
            if ready() {
                return true;
            }
            core::hint::spin_loop();
        }
        let yields = sys::now_ns();
        // The thread that we wait for may need this core.
        sys::yield_now();
        let now = sys::now_ns();
        polling.yielded(now - yields);
        if !polling.looked(now - before.unwrap_or(yields)) {
            return false;
        }
        before = Some(now);
    }
}

/// Waits until `ready` or the timeout. `arm` is called before each sleep: whoever makes it ready is to wake us. Errors: EINTR, EAGAIN (timeout). With no timeout the wait is a blocking `recv` of
/// the placeholder, so that SA_RESTART means what it means on Linux; with one it is interruptible always, also as on Linux.
pub fn wait(
    sock: &Sock,
    timeout_us: u64,
    arm: impl Fn(),
    mut ready: impl FnMut() -> bool,
) -> Result<(), i32> {
    let &Sock { guest, entry, id, fd } = sock;
    let left = || entry.state.load(Ordering::Acquire) & state::HANDED != 0;
    if ready() || guest::engine_gone() {
        return Ok(());
    }
    let begin = sys::now_ns();
    let mut result = Ok(());
    if !spin(guest, &mut ready) {
        entry.waiters.fetch_add(1, Ordering::SeqCst);
        let mut share = Share::new(entry);
        let mut took = false;
        loop {
            if took {
                share.took(guest, entry, id);
            }
            arm();
            fence(Ordering::SeqCst);
            if ready() || guest::engine_gone() {
                break;
            }
            if left() {
                // It is the kernel's now, which the call finds when it is made again.
                result = Err(libc::EINTR);
                break;
            }
            match sleep(guest, fd, begin, timeout_us) {
                Ok(byte) => took = byte,
                Err(errno) => {
                    result = Err(errno);
                    break;
                }
            }
        }
        entry.waiters.fetch_sub(1, Ordering::SeqCst);
        if result.is_err() && ready() {
            result = Ok(());
        }
    }
    queue::with_spin(guest, |s| s.waited(sys::now_ns() - begin));
    result
}

/// A sleeper's share of the wake-up bytes of one socket. The engine sends one per sleeper; who wakes for nothing (a writer,
/// when there is something to read) and lies down again at once may take the byte of another, who then sleeps on. So one
/// byte a wake-up is a sleeper's own, and for any other that it took it has all woken again.
#[derive(Clone, Copy)]
pub struct Share {
    last: u32,
    excess: u32,
}

impl Share {
    /// To be called after `waiters` was incremented.
    pub fn new(entry: &SocketEntry) -> Share {
        Share { last: entry.wakes.load(Ordering::SeqCst), excess: 0 }
    }

    /// A byte was taken; the caller still counts among the waiters.
    pub fn took(&mut self, guest: &Guest, entry: &SocketEntry, id: u32) {
        let wakes = entry.wakes.load(Ordering::SeqCst);
        // All who sleep on a listener wait for the same.
        let others = entry.waiters.load(Ordering::SeqCst) > 1
            && entry.state.load(Ordering::Relaxed) & state::LISTENING == 0;
        if !others || self.last != wakes {
            self.excess = 0;
        } else {
            queue::post(guest, Op::Wake, id, 0);
            // The others come first now; ever longer, should one of them be stopped.
            let pause = libc::timespec { tv_sec: 0, tv_nsec: 50_000 << self.excess.min(10) };
            raw!(libc::SYS_nanosleep, &pause as *const libc::timespec, 0);
            self.excess += 1;
        }
        self.last = wakes;
    }
}

/// True: a wake-up byte was taken.
fn sleep(guest: &Guest, fd: i32, begin: u64, timeout_us: u64) -> Result<bool, i32> {
    let mut byte = 0u8;
    if timeout_us != 0 {
        let left = (timeout_us * 1000).saturating_sub(sys::now_ns() - begin);
        if left == 0 {
            return Err(libc::EAGAIN);
        }
        let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut t =
            libc::timespec { tv_sec: (left / 1_000_000_000) as i64, tv_nsec: (left % 1_000_000_000) as i64 };
        let n = raw!(libc::SYS_ppoll, &mut p as *mut libc::pollfd, 1, &mut t as *mut libc::timespec, 0, 8);
        if n < 0 {
            return Err(-n as i32);
        }
        if n == 0 {
            return Ok(false);
        }
    }
    // libc's own functions, not the bare system calls: a blocked thread can be cancelled here.
    let n = if timeout_us == 0 || sys::confined() {
        next!(read(fd => i32, &mut byte as *mut u8 => *mut u8, 1usize => usize) -> isize)
    } else {
        let flags = libc::MSG_DONTWAIT;
        next!(recv(fd => i32, &mut byte as *mut u8 => *mut u8, 1usize => usize, flags => i32) -> isize)
    };
    let n = if n < 0 { -(sys::errno() as isize) } else { n };
    match n {
        0 => {
            guest.placeholder_hung_up();
            if guest::engine_gone() { Ok(false) } else { Err(libc::ECONNRESET) }
        }
        1 => Ok(true),
        e if e == -(libc::EAGAIN as isize) => Ok(false),
        e if e == -(libc::EINTR as isize) => Err(libc::EINTR),
        // The descriptor was closed by another thread.
        e => Err(-e as i32),
    }
}
