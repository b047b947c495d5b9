//! A thread's queue set: pushing jobs and sends, waiting for completions.

use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use netkernel_abi::nqe::{STAMP_EVERY, STAMP_SHIFT, flag};
use netkernel_abi::{Nqe, Op};
use netkernel_ring::spin::Spin;

use crate::guest::{self, Guest, Lock};
use crate::sys::{self, raw};

/// No queue set.
const NONE: u32 = u32::MAX;

thread_local! {
    static MINE: Cell<(u32, u32)> = const { Cell::new((0, NONE)) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
    static TID: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
    pub static SPIN: Cell<Spin> = const { Cell::new(Spin::new(0)) };
    static SPIN_READY: Cell<bool> = const { Cell::new(false) };
    static PUSHED: Cell<u32> = const { Cell::new(0) };
}

/// The queue set that threads without one of their own share: (process tag, queue set).
static SHARED: Lock<(u32, u32)> = Lock::new((0, NONE));
static EXIT_KEY: AtomicU32 = AtomicU32::new(u32::MAX);

/// This thread's id; costs a system call once per thread and process.
pub fn tid() -> u32 {
    let tag = guest::tag();
    TID.with(|t| {
        let (of, tid) = t.get();
        if of == tag && tid != 0 {
            return tid;
        }
        let tid = sys::gettid();
        t.set((tag, tid));
        tid
    })
}

/// Runs `f` with this thread's adaptive polling state.
pub fn with_spin<R>(guest: &Guest, f: impl FnOnce(&mut Spin) -> R) -> R {
    SPIN.with(|cell| {
        let mut spin = cell.get();
        if !SPIN_READY.get() {
            SPIN_READY.set(true);
            spin = Spin::new(guest.spin_ns);
        }
        let r = f(&mut spin);
        cell.set(spin);
        r
    })
}

/// Claims a free queue set for the calling process.
pub fn claim(guest: &Guest) -> Result<u32, i32> {
    let tag = guest.process()?;
    let count = guest.region.layout().limits.queue_sets;
    let start = tag % 8;
    for i in 0..count {
        let q = (start + i) % count;
        let Some(set) = guest.region.queue_set(q) else { continue };
        if set.owner.load(Ordering::Relaxed) == 0
            && set.owner.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        {
            set.process.store(tag, Ordering::Release);
            return Ok(q);
        }
    }
    Err(libc::ENOBUFS)
}

/// Gives a queue set back to the engine.
pub fn release(guest: &Guest, q: u32) {
    push(guest, q, false, Nqe::new(Op::Release, q as u16, 0));
}

/// Pushes one element into the job or send ring of `q`, waiting for room if it must, and tells the engine.
fn push(guest: &Guest, q: u32, send: bool, mut element: Nqe) {
    let pushed = PUSHED.get().wrapping_add(1);
    PUSHED.set(pushed);
    if pushed.is_multiple_of(STAMP_EVERY) {
        element.stamp = ((sys::now_ns() >> STAMP_SHIFT) as u16).max(1);
    }
    let queue = if send { guest.region.send(q) } else { guest.region.job(q) };
    let Some(queue) = queue else { return };
    let mut tail = queue.tail();
    let mut turns = 0u32;
    while queue.push(&mut tail, element.to_words()) == Ok(false) {
        turns += 1;
        guest.ring_doorbell();
        sys::yield_now();
        if turns.is_multiple_of(1024) && !guest.check_engine() {
            return;
        }
    }
    let header = guest.region.header();
    header.active[q as usize / 64].fetch_or(1 << (q % 64), Ordering::SeqCst);
    guest.ring_doorbell();
}

/// An element about a socket. It says which life of the id it means: it may be read after a close and a reuse.
fn about(guest: &Guest, op: Op, q: u32, socket: u32) -> Nqe {
    let mut element = Nqe::new(op, q as u16, socket);
    element.status = guest.region.socket(socket).map_or(0, |e| e.generation.load(Ordering::Relaxed)) as i32;
    element
}

/// Runs `f` with a queue set that nobody else pushes to meanwhile.
fn with_queue<R>(guest: &Guest, f: impl FnOnce(u32) -> R) -> Result<R, i32> {
    let tag = guest.process()?;
    if !BUSY.get() {
        let (of, q) = MINE.get();
        let q = if of == tag && q != NONE { q } else { claim_for_thread(guest, tag) };
        if q != NONE {
            // A signal handler that interrupts us uses the shared queue set.
            BUSY.set(true);
            let r = f(q);
            BUSY.set(false);
            return Ok(r);
        }
    }
    let mut shared = SHARED.lock();
    if shared.0 != tag || shared.1 == NONE {
        *shared = (tag, claim(guest)?);
    }
    Ok(f(shared.1))
}

#[cold]
fn claim_for_thread(guest: &Guest, tag: u32) -> u32 {
    // Leave some for epoll instances and other processes: with most taken, threads share one.
    let Ok(q) = claim(guest) else { return NONE };
    MINE.set((tag, q));
    let mut key = EXIT_KEY.load(Ordering::Acquire);
    if key == u32::MAX {
        let mut new = 0;
        // SAFETY: a plain function as destructor; new is valid for writes.
        if unsafe { libc::pthread_key_create(&mut new, Some(thread_exit)) } == 0 {
            key = EXIT_KEY
                .compare_exchange(u32::MAX, new, Ordering::AcqRel, Ordering::Acquire)
                .map_or_else(|k| k, |_| new);
        }
    }
    if key != u32::MAX {
        // SAFETY: key was created above and is never deleted; the value is only a non-null mark.
        unsafe { libc::pthread_setspecific(key, std::ptr::dangling::<libc::c_void>()) };
    }
    q
}

unsafe extern "C" fn thread_exit(_: *mut libc::c_void) {
    let (of, q) = MINE.replace((0, NONE));
    if let Some(guest) = guest::guest()
        && q != NONE
        && of == guest::tag()
        && !guest::engine_gone()
    {
        release(guest, q);
    }
}

/// Claims what the calling thread needs, ahead of its use.
pub fn prepare(guest: &Guest) {
    tid();
    let _ = with_queue(guest, |_| ());
}

/// Pushes a Send or Credit element. `position`: end of urgent data, where there is some.
pub fn send(guest: &Guest, op: Op, socket: u32, flags: u8, position: u32) {
    let _ = with_queue(guest, |q| {
        let mut element = about(guest, op, q, socket);
        element.flags = flags;
        element.position = position;
        push(guest, q, true, element);
    });
}

/// This process pushed a job that it did not wait for.
static POSTED: AtomicBool = AtomicBool::new(false);

/// Before this process goes: the engine takes queue sets in no order, and who is told of the end must find what was posted
/// before it done.
pub fn settle() {
    if POSTED.load(Ordering::Relaxed)
        && let Some(guest) = guest::guest()
        && !guest::engine_gone()
    {
        POSTED.store(false, Ordering::Relaxed);
        let _ = job(guest, Op::Fence, 0, 0, &[], 0, &mut []);
    }
}

/// Pushes a job that nobody waits for. False: there was no queue set to be had.
pub fn post(guest: &Guest, op: Op, socket: u32, op_data: u64) -> bool {
    POSTED.store(true, Ordering::Relaxed);
    let pushed = with_queue(guest, |q| {
        let mut element = about(guest, op, q, socket);
        element.op_data = op_data;
        push(guest, q, false, element);
    });
    pushed.is_ok()
}

/// What a sync job came back with.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// 0 or a negative errno.
    pub status: i32,
    pub op_data: u64,
    /// Bytes of the result that were copied out.
    pub size: usize,
}

/// Pushes a sync job and waits for its completion. `argument` goes to the argument area, results come back in `out`.
pub fn job(
    guest: &Guest,
    op: Op,
    socket: u32,
    op_data: u64,
    argument: &[u8],
    size: u32,
    out: &mut [u8],
) -> Result<Completion, i32> {
    if guest::engine_gone() {
        return Err(libc::ENETDOWN);
    }
    with_queue(guest, |q| {
        let region = &guest.region;
        region.write_argument(q, argument);
        let set = region.queue_set(q).ok_or(libc::ENOBUFS)?;
        let completions = region.complete(q).ok_or(libc::ENOBUFS)?;
        let mut head = completions.head();
        let mut element = about(guest, op, q, socket);
        element.flags = flag::SYNC;
        element.op_data = op_data;
        element.size = if argument.is_empty() { size } else { argument.len() as u32 };
        // A job that was given up on (a dead engine) must not be taken for this one.
        element.position = head.wrapping_add(1);
        push(guest, q, false, element);
        // All of it: the engine answers as soon as it runs.
        let mut polling = with_spin(guest, |spin| spin.begin(guest.spin_ns));
        let mut looks = polling.looks();
        let mut awake = guest.spin_ns > 0;
        loop {
            while let Ok(Some(words)) = completions.pop(&mut head) {
                let done = Nqe::from_words(words);
                if done.position != element.position {
                    continue;
                }
                let size = (done.size as usize).min(out.len());
                region.read_argument(q, &mut out[..size]);
                with_spin(guest, |spin| spin.end(&polling));
                return Ok(Completion { status: done.status, op_data: done.op_data, size });
            }
            looks = looks.saturating_sub(1);
            if looks > 0 {
                core::hint::spin_loop();
                continue;
            }
            if awake {
                let before = sys::now_ns();
                sys::yield_now();
                let took = sys::now_ns() - before;
                polling.yielded(took);
                awake = polling.looked(took);
                looks = polling.looks();
                continue;
            }
            let tail = completions.tail();
            set.complete_waiting.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if completions.is_empty() {
                let timeout = libc::timespec { tv_sec: 0, tv_nsec: 200_000_000 };
                raw!(
                    libc::SYS_futex,
                    &set.complete_tail as *const AtomicU32,
                    libc::FUTEX_WAIT,
                    tail,
                    &timeout as *const libc::timespec
                );
                if completions.is_empty() && !guest.check_engine() {
                    return Err(libc::ENETDOWN);
                }
            }
            set.complete_waiting.store(0, Ordering::Relaxed);
        }
    })?
}
