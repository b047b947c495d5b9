//! What each descriptor number is: the only socket state that is a process's own.
//!
//! A descriptor of the program that GuestLib serves has a real descriptor under the same number, so numbers, limits,
//! close-on-exec and inheritance are the kernel's. This table only says which numbers are guest sockets.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::os::fd::{IntoRawFd, OwnedFd};

use crate::guest::{self, Lock};
use crate::hooks::stdio;
use crate::spare;
use crate::sys::{self, raw};

/// Descriptors at and above this number are never guest sockets.
const MAX_FDS: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// Not ours.
    None,
    /// Guest socket with this id.
    Socket(u32),
    /// Epoll instance with guest sockets, by index in the epoll table.
    Epoll(u32),
    /// GuestLib's own; the program must not close or overwrite it.
    Internal,
}

const EPOLL: u32 = 1 << 31;
const INTERNAL: u32 = 1 << 30;

static TABLE: AtomicUsize = AtomicUsize::new(0);
/// Descriptors of this process per socket id, to know a process's last close of a socket.
static COUNTS: Lock<Vec<u16>> = Lock::new(Vec::new());

#[cold]
fn make_table() -> Option<&'static [AtomicU32]> {
    let bytes = MAX_FDS * 4;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let at = raw!(libc::SYS_mmap, 0, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1i64, 0);
    if at < 0 {
        return None;
    }
    if TABLE.compare_exchange(0, at as usize, Ordering::AcqRel, Ordering::Acquire).is_err() {
        raw!(libc::SYS_munmap, at, bytes);
    }
    slots()
}

#[inline]
fn slots() -> Option<&'static [AtomicU32]> {
    let at = TABLE.load(Ordering::Acquire);
    if at == 0 {
        return None;
    }
    // SAFETY: set once to a zeroed mapping of this size that is never unmapped; AtomicU32 has no invalid values.
    Some(unsafe { core::slice::from_raw_parts(at as *const AtomicU32, MAX_FDS) })
}

/// What `fd` is. One load for descriptors that are not ours.
#[inline]
pub fn slot(fd: i32) -> Slot {
    let Some(slots) = slots() else { return Slot::None };
    let Some(entry) = slots.get(fd as u32 as usize) else { return Slot::None };
    match entry.load(Ordering::Acquire) {
        0 => Slot::None,
        INTERNAL => Slot::Internal,
        v if v & EPOLL != 0 => Slot::Epoll(v & !EPOLL),
        v => Slot::Socket(v),
    }
}

/// The id of guest socket `fd`.
#[inline]
pub fn socket(fd: i32) -> Option<u32> {
    match slot(fd) {
        Slot::Socket(id) => Some(id),
        _ => None,
    }
}

/// Records what `fd` is now. `false`: the number is too high for the table.
pub fn set(fd: i32, slot: Slot) -> bool {
    let Some(slots) = slots().or_else(make_table) else { return false };
    let Some(entry) = slots.get(fd as u32 as usize) else { return false };
    let value = match slot {
        Slot::None => 0,
        Slot::Socket(id) => {
            count(id, 1);
            id
        }
        Slot::Epoll(index) => index | EPOLL,
        Slot::Internal => INTERNAL,
    };
    entry.store(value, Ordering::Release);
    if fd <= 2 && matches!(slot, Slot::Socket(_)) {
        stdio::standard_stream(fd, true);
    }
    true
}

/// Takes `fd` out of the table and says what it was.
pub fn forget(fd: i32) -> Slot {
    let was = slot(fd);
    if was != Slot::None
        && let Some(entry) = slots().and_then(|s| s.get(fd as u32 as usize))
    {
        entry.store(0, Ordering::Release);
        if let Slot::Socket(id) = was {
            count(id, -1);
            if fd <= 2 {
                stdio::standard_stream(fd, false);
            }
        }
    }
    was
}

fn count(id: u32, by: i32) {
    let mut counts = COUNTS.lock();
    let index = id as usize;
    if counts.len() <= index {
        let len = (index + 1).next_power_of_two().max(1024);
        counts.resize(len, 0);
    }
    counts[index] = counts[index].saturating_add_signed(by as i16);
}

/// Whether this process has guest sockets.
pub fn any_sockets() -> bool {
    COUNTS.lock().iter().any(|&count| count > 0)
}

/// Descriptors of this process for socket `id`.
pub fn references(id: u32) -> u16 {
    COUNTS.lock().get(id as usize).copied().unwrap_or(0)
}

/// Moves a descriptor of GuestLib's own out of the way of the program's numbers; close-on-exec.
pub fn move_high(fd: OwnedFd) -> i32 {
    let fd = fd.into_raw_fd();
    let high = raw!(libc::SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, high_base().0) as i32;
    let fd = if high >= 0 {
        sys::close(fd);
        high
    } else {
        fd
    };
    set(fd, Slot::Internal);
    fd
}

/// First number for GuestLib's own descriptors, the upper part of what the soft limit allows; and that limit.
pub fn high_base() -> (i32, u32) {
    let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
    raw!(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, 0, &mut limit as *mut libc::rlimit);
    let soft = limit.rlim_cur.min(MAX_FDS as u64) as i32;
    ((soft - soft / 4).min(soft - 32).max(3), soft as u32)
}

/// Calls `f` for each number below `end` (at most the table's size) that has an entry, from `start`.
pub fn for_each(start: i32, end: i32, mut f: impl FnMut(i32, Slot)) {
    let end = (end as u32 as usize).min(highest() + 1);
    for fd in start.max(0) as usize..end {
        match slot(fd as i32) {
            Slot::None => {}
            slot => f(fd as i32, slot),
        }
    }
}

/// Highest number that may have an entry.
fn highest() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
    raw!(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, 0, &mut limit as *mut libc::rlimit);
    (limit.rlim_max as usize).min(MAX_FDS - 1)
}

/// Recognises `fd` by its inode if it is a placeholder that came from elsewhere (exec, SCM_RIGHTS).
pub fn adopt(fd: i32) -> bool {
    let Some(guest) = guest::guest() else { return false };
    if slot(fd) != Slot::None {
        return matches!(slot(fd), Slot::Socket(_));
    }
    let Some(inode) = sys::socket_inode(fd) else { return false };
    let layout = guest.region.layout();
    let unused = guest.region.header().next_unused.load(Ordering::Relaxed).min(layout.guest_sockets);
    for id in (1..unused).chain(layout.guest_sockets..layout.limits.sockets) {
        let Some(entry) = guest.region.socket(id) else { break };
        if entry.inode.load(Ordering::Relaxed) == inode {
            spare::shared(id);
            return set(fd, Slot::Socket(id));
        }
        // The engine hands its ids out from the lowest; a run of untouched entries is the end.
        if id >= layout.guest_sockets
            && entry.generation.load(Ordering::Relaxed) == 0
            && entry.state.load(Ordering::Relaxed) == 0
        {
            break;
        }
    }
    false
}

/// After exec: finds the guest sockets among the inherited descriptors.
pub fn adopt_inherited() {
    let dir =
        raw!(libc::SYS_open, c"/proc/self/fd".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC)
            as i32;
    if dir < 0 {
        return;
    }
    let mut buffer = [0u64; 512];
    let mut found = Vec::new();
    loop {
        let n = raw!(libc::SYS_getdents64, dir, buffer.as_mut_ptr(), size_of_val(&buffer));
        if n <= 0 {
            break;
        }
        let mut at = 0usize;
        while at < n as usize {
            // SAFETY: the kernel wrote records of linux_dirent64: d_reclen at 16, the name at 19, NUL-terminated.
            let (length, name) = unsafe {
                let record = buffer.as_ptr().cast::<u8>().add(at);
                (
                    record.add(16).cast::<u16>().read_unaligned(),
                    core::ffi::CStr::from_ptr(record.add(19).cast()),
                )
            };
            if let Some(fd) = name.to_str().ok().and_then(|n| n.parse::<i32>().ok()) {
                found.push(fd);
            }
            at += length as usize;
        }
    }
    sys::close(dir);
    for fd in found {
        if fd != dir {
            adopt(fd);
        }
    }
}
