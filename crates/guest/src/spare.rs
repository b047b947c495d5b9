//! Placeholders that are used again.
//!
//! A placeholder costs two sockets of the kernel, a message to the engine and a hang-up: more than half of what a short connection takes beside
//! the connection itself. So when the program closes a connected stream of which nobody else has a descriptor, the placeholder moves to a
//! high number and the engine is told by an element ([`Op::Close`]); the next socket of this process takes it, with its id.
//!
//! Who else has a descriptor is known by origin: the socket was made here, and since then no process was forked or spawned and the socket
//! was not passed. A fork ends with all that is kept: a child's copy would keep hang-ups from coming.

use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::collections::VecDeque;

use libc::c_int;
use netkernel_abi::socket::{gflag, state};
use netkernel_abi::{Op, SocketEntry, feature};

use crate::guest::{self, Guest, Lock};
use crate::queue;
use crate::socket::Sock;
use crate::sys::{self, raw};
use crate::table::{self, Slot};

/// Kept at most, and of the process's limit of descriptors at most one in so many: what is kept counts there.
const MOST: usize = 32;
const OF_LIMIT: usize = 32;
/// What Linux keeps with an open file, and the placeholder would keep beyond a close.
const OF_FILE: u32 = gflag::ASYNC | gflag::OWNED | gflag::STATUS_FLAGS;

/// A placeholder without a program's socket.
pub struct Spare {
    pub fd: c_int,
    pub id: u32,
    pub inode: u64,
    /// Of the socket that it was of; the engine changes it when that is closed.
    generation: u32,
}

struct Kept {
    /// By id: the [`EPOCH`] in which this process made the socket.
    origins: Vec<u32>,
    spares: VecDeque<Spare>,
}

static KEPT: Lock<Kept> = Lock::new(Kept { origins: Vec::new(), spares: VecDeque::new() });
/// Another one after each fork, spawn and the like. Sockets of earlier ones may be others' too.
static EPOCH: AtomicU32 = AtomicU32::new(1);
/// Forks and the like that are under way.
static FORKING: AtomicU32 = AtomicU32::new(0);
/// Descriptors that are on their way to or from [`KEPT`].
static MOVING: AtomicU32 = AtomicU32::new(0);
/// First number for what is kept, and the limit of descriptors; 0: not known.
static BASE: AtomicI32 = AtomicI32::new(0);
static LIMIT: AtomicU32 = AtomicU32::new(0);

/// This process has made socket `id`, and nobody else knows of it. `fd`: its number.
pub fn made(id: u32, fd: c_int) {
    if is_crowded(fd) {
        forget_all();
    }
    let mut kept = KEPT.lock();
    let index = id as usize;
    if kept.origins.len() <= index {
        kept.origins.resize((index + 1).next_power_of_two().max(64), 0);
    }
    kept.origins[index] = EPOCH.load(Ordering::SeqCst);
}

/// Socket `id` goes to somebody else.
pub fn shared(id: u32) {
    if let Some(origin) = KEPT.lock().origins.get_mut(id as usize) {
        *origin = 0;
    }
}

/// A fork waits for its end.
pub struct Moving(());

impl Moving {
    fn begin() -> Option<Moving> {
        MOVING.fetch_add(1, Ordering::SeqCst);
        let moving = Moving(());
        (FORKING.load(Ordering::SeqCst) == 0).then_some(moving)
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        MOVING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The oldest placeholder whose socket is closed by now.
pub fn take(guest: &Guest) -> Option<(Spare, &SocketEntry, Moving)> {
    let moving = Moving::begin()?;
    let mut kept = KEPT.lock();
    let (at, entry) = kept.spares.iter().enumerate().find_map(|(at, spare)| {
        let entry = guest.region.socket(spare.id)?;
        // SYNC: socket-state - the engine has cleared its lines.
        (entry.generation.load(Ordering::Acquire) != spare.generation).then_some((at, entry))
    })?;
    Some((kept.spares.remove(at)?, entry, moving))
}

/// Puts back what [`take`] gave.
pub fn put_back(mut spare: Spare, entry: &SocketEntry) {
    spare.generation = entry.generation.load(Ordering::Relaxed).wrapping_sub(1);
    KEPT.lock().spares.push_front(spare);
}

/// Closes `sock` and keeps its placeholder; `leave` takes the descriptor out of all books, `close` closes it. `None`: it is not one
/// of which that can be done, and nothing was.
pub fn close(sock: &Sock, leave: impl FnOnce(), close: impl FnOnce() -> c_int) -> Option<c_int> {
    let entry = sock.entry;
    let (s, f) = (sock.state(), sock.flags());
    const OTHER: u32 = state::DATAGRAM | state::LISTENING | state::PAIRED | state::HANDED;
    if s & (state::CONNECTED | OTHER) != state::CONNECTED
        || f & OF_FILE != 0
        || entry.waiters.load(Ordering::SeqCst) != 0
        || guest::engine_gone()
        || sys::confined()
        || is_crowded(sock.fd)
        || table::references(sock.id) != 1
        || sock.guest.region.header().features.load(Ordering::Relaxed) & feature::SPARES == 0
    {
        return None;
    }
    let _moving = Moving::begin()?;
    {
        let kept = KEPT.lock();
        let origin = kept.origins.get(sock.id as usize).copied().unwrap_or(0);
        let most = MOST.min(LIMIT.load(Ordering::Relaxed) as usize / OF_LIMIT);
        if kept.spares.len() >= most || origin != EPOCH.load(Ordering::SeqCst) {
            return None;
        }
    }
    let fd = raw!(libc::SYS_fcntl, sock.fd, libc::F_DUPFD_CLOEXEC, base()) as c_int;
    if fd < 0 {
        return None;
    }
    table::set(fd, Slot::Internal);
    let spare = Spare {
        fd,
        id: sock.id,
        inode: entry.inode.load(Ordering::Relaxed),
        generation: entry.generation.load(Ordering::Relaxed),
    };
    leave();
    let result = close();
    if queue::post(sock.guest, Op::Close, sock.id, 0) {
        KEPT.lock().spares.push_back(spare);
    } else {
        give_up(spare.fd);
    }
    Some(result)
}

fn base() -> c_int {
    match BASE.load(Ordering::Relaxed) {
        0 => {
            let (base, limit) = table::high_base();
            LIMIT.store(limit, Ordering::Relaxed);
            BASE.store(base, Ordering::Relaxed);
            base
        }
        base => base,
    }
}

/// The program has so many descriptors, by the number of one, that it may need all that its limit allows.
fn is_crowded(fd: c_int) -> bool {
    base();
    fd as u32 >= LIMIT.load(Ordering::Relaxed) / 2
}

/// The limit of descriptors changes, and with it where numbers are out of the program's way.
pub fn limit_changes() {
    BASE.store(0, Ordering::Relaxed);
    forget_all();
}

fn give_up(fd: c_int) {
    table::forget(fd);
    sys::close(fd);
}

/// Whether `fd` is kept here. The program wants its number: it is given up.
pub fn make_way(fd: c_int) -> bool {
    let mut kept = KEPT.lock();
    let Some(at) = kept.spares.iter().position(|spare| spare.fd == fd) else { return false };
    kept.spares.remove(at);
    drop(kept);
    give_up(fd);
    true
}

/// Before this process is copied, or its descriptors are.
pub fn before_fork() {
    FORKING.fetch_add(1, Ordering::SeqCst);
    // Not for ever: a signal handler that forks may have interrupted one.
    let mut turns = 0;
    while MOVING.load(Ordering::SeqCst) != 0 && turns < 1000 {
        sys::yield_now();
        turns += 1;
    }
    forget_all();
}

/// After that, in the parent.
pub fn after_fork() {
    EPOCH.fetch_add(1, Ordering::SeqCst);
    FORKING.fetch_sub(1, Ordering::SeqCst);
}

/// In a child that goes on as this program.
pub fn after_fork_in_child() {
    EPOCH.fetch_add(1, Ordering::SeqCst);
    FORKING.store(0, Ordering::SeqCst);
    MOVING.store(0, Ordering::SeqCst);
    // Of a thread that was in the middle of it.
    forget_all();
}

/// Descriptors are copied in a way whose end is not seen: nothing is kept any more in this process.
pub fn never_again() {
    before_fork();
}

fn forget_all() {
    let spares = core::mem::take(&mut KEPT.lock().spares);
    for spare in spares {
        give_up(spare.fd);
    }
}
