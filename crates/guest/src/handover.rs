//! Sockets that leave the queues: a program without this library (static, Go, musl) is about to inherit them.
//!
//! The engine gives the stack's own socket, which is the kernel's, and takes its hands off it. It is put in the place of the
//! socket's placeholder under every number, and from then on is what it looks like. Other processes that still have the
//! placeholder find the state HANDED and do the same when they come to use it. Whatever cannot be handed over is said.

use core::ffi::CStr;
use core::sync::atomic::Ordering;
use std::os::fd::{AsRawFd as _, OwnedFd};

use netkernel_abi::control::{Message, kind};
use netkernel_abi::socket::{gflag, state};
use netkernel_shm::fds;

use crate::epoll;
use crate::guest::{self, Guest, Lock};
use crate::socket::{self, Sock};
use crate::sys::{self, raw};
use crate::table::{self, Slot};

/// How long a send ring may take to become empty.
const FLUSH_NS: u64 = 5_000_000_000;
/// The same, when it does not have to be.
const FLUSH_SOON_NS: u64 = 50_000_000;

/// One thread at a time exchanges descriptors.
static EXCHANGING: Lock<()> = Lock::new(());

/// The process is about to become a program without the library, which inherits what is not close-on-exec.
pub fn before_exec(program: &CStr) {
    exchange(program, |fd| raw!(libc::SYS_fcntl, fd, libc::F_GETFD) & libc::FD_CLOEXEC as isize == 0, true);
}

/// A child is about to become such a program; `also`: a descriptor that is given to it by another number.
pub fn before_spawn(program: &CStr, also: impl Fn(i32) -> bool) {
    let inherited = |fd| raw!(libc::SYS_fcntl, fd, libc::F_GETFD) & libc::FD_CLOEXEC as isize == 0;
    exchange(program, |fd| inherited(fd) || also(fd), false);
}

fn exchange(program: &CStr, wanted: impl Fn(i32) -> bool, last: bool) {
    let mut found = Vec::new();
    table::for_each(0, i32::MAX, |fd, slot| {
        if let Slot::Socket(id) = slot
            && wanted(fd)
        {
            found.push((fd, id));
        }
    });
    for (fd, id) in found {
        // Exchanged with another number of the same socket.
        if table::socket(fd) != Some(id) {
            continue;
        }
        let Some(sock) = socket::by_id(id, fd) else { continue };
        if let Err(errno) = settle(&sock) {
            say(program, fd, errno);
            if last {
                bury(fd);
            }
        }
    }
}

/// Puts the kernel's socket in the place of the placeholder, under all numbers that it has in this process.
pub fn settle(sock: &Sock) -> Result<(), i32> {
    settle_if(sock, false)
}

/// As [`settle`]; `unharmed`: not if connections that were accepted ahead would be lost by it (EBUSY).
#[cold]
pub fn settle_if(sock: &Sock, unharmed: bool) -> Result<(), i32> {
    let _one = EXCHANGING.lock();
    if table::socket(sock.fd) != Some(sock.id) {
        // Another thread was faster.
        return Ok(());
    }
    Sock::fence(sock.guest, sock.id);
    let begin = sys::now_ns();
    let patience = if unharmed { FLUSH_SOON_NS } else { FLUSH_NS };
    let fd = loop {
        let generation = sock.entry.generation.load(Ordering::Relaxed);
        match ask(sock.guest, kind::HAND_OVER, sock.id, generation, unharmed.into()) {
            Err(libc::EAGAIN) if sys::now_ns() - begin < patience => {
                let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                raw!(libc::SYS_nanosleep, &pause as *const libc::timespec, 0);
            }
            other => break other?,
        }
    };
    prepare(sock, &fd);
    let mut numbers = Vec::new();
    table::for_each(0, i32::MAX, |number, slot| {
        if slot == Slot::Socket(sock.id) {
            numbers.push(number);
        }
    });
    let watched = if epoll::has_instances() { epoll::leave(sock.id) } else { Vec::new() };
    for number in numbers {
        let cloexec = raw!(libc::SYS_fcntl, number, libc::F_GETFD) & libc::FD_CLOEXEC as isize != 0;
        table::forget(number);
        raw!(libc::SYS_dup3, fd.as_raw_fd(), number, if cloexec { libc::O_CLOEXEC } else { 0 });
    }
    epoll::rejoin(watched);
    Ok(())
}

/// Asks the engine for a descriptor.
pub fn ask(guest: &Guest, kind: u32, a: u32, b: u32, c: u32) -> Result<OwnedFd, i32> {
    let errno = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::EIO);
    let (ours, theirs) = fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC).map_err(errno)?;
    guest.channel_send(Message { kind, a, b, c, ..Message::default() }, &theirs)?;
    drop(theirs);
    let mut poll = libc::pollfd { fd: ours.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    for _ in 0..50 {
        let n = raw!(libc::SYS_poll, &mut poll as *mut libc::pollfd, 1, 200);
        if n > 0 {
            let mut answer = [0u8; 4];
            let (n, received) =
                fds::receive(ours.as_raw_fd(), &mut answer, libc::MSG_DONTWAIT).map_err(errno)?;
            let code = i32::from_le_bytes(answer);
            return match (n, code, received.into_iter().next()) {
                (4, 0, Some(fd)) => Ok(fd),
                // A process without room for one more descriptor.
                (4, 0, None) => Err(libc::EMFILE),
                (4, code, _) => Err(code),
                _ => Err(libc::ECONNRESET),
            };
        }
        if !guest.check_engine() {
            return Err(libc::ENETDOWN);
        }
    }
    Err(libc::ETIMEDOUT)
}

/// What this library did for the socket the kernel does from now on.
fn prepare(sock: &Sock, fd: &OwnedFd) {
    let flags = raw!(libc::SYS_fcntl, fd.as_raw_fd(), libc::F_GETFL) as i32;
    let nonblock = if sock.flags() & gflag::NONBLOCK != 0 { libc::O_NONBLOCK } else { 0 };
    raw!(libc::SYS_fcntl, fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK | nonblock);
    for (option, word) in
        [(libc::SO_RCVTIMEO, &sock.entry.rcv_timeout_us), (libc::SO_SNDTIMEO, &sock.entry.snd_timeout_us)]
    {
        let us = word.load(Ordering::Relaxed) as i64;
        if us != 0 {
            let time = libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
            let size = size_of::<libc::timeval>();
            raw!(
                libc::SYS_setsockopt,
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                &time as *const libc::timeval,
                size
            );
        }
    }
    let low_water = sock.entry.rcv_low_water.load(Ordering::Relaxed) as i32;
    if low_water > 1 {
        raw!(
            libc::SYS_setsockopt,
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            &low_water as *const i32,
            4
        );
    }
}

/// Never silently. Whoever reads standard error reads this; the program itself cannot be told.
fn say(program: &CStr, fd: i32, errno: i32) {
    let text = format!(
        "netkernel: {} cannot use the preloaded library, and socket {fd} cannot be handed over to it: {}\n",
        program.to_string_lossy(),
        why(errno)
    );
    raw!(libc::SYS_write, 2, text.as_ptr(), text.len());
}

/// The same of a socket in a message, which is not sent.
pub fn say_passed(fd: i32, errno: i32) {
    let text = format!(
        "netkernel: who receives socket {fd} does not have the preloaded library, and it cannot be handed over: {}\n",
        why(errno)
    );
    raw!(libc::SYS_write, 2, text.as_ptr(), text.len());
}

fn why(errno: i32) -> &'static str {
    match errno {
        libc::EPERM => {
            "its guest has no agent (--attach queued, or no filter could be put on): run it with --attach auto"
        }
        libc::EOPNOTSUPP => "its stack has no kernel sockets to give: run it with --attach direct or relay",
        libc::EBUSY => "it has received what was not read yet",
        libc::EAGAIN => "its peer does not take what is still to be sent",
        libc::ENETDOWN => "the engine is gone",
        _ => "it is not to be had",
    }
}

/// A placeholder means nothing to a program without the library; it would wait for ever. This one is closed already.
fn bury(fd: i32) {
    let Ok((dead, other)) = fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC) else { return };
    drop(other);
    table::forget(fd);
    raw!(libc::SYS_dup3, dead.as_raw_fd(), fd, 0);
}

/// Whether the socket left the queues while somebody slept on it.
#[inline]
pub fn is_over(state: u32) -> bool {
    state & state::HANDED != 0 && !guest::engine_gone()
}

/// Descriptors that the actions of a `posix_spawn` give to the child by another number.
///
/// # Safety
/// `actions` must be null or initialised by libc.
pub unsafe fn duplicated_by(actions: *const libc::posix_spawn_file_actions_t) -> Vec<i32> {
    /// glibc's `struct __spawn_action`: a tag and the largest of its variants (posix/spawn_int.h).
    #[repr(C)]
    struct Action {
        tag: i32,
        words: [u64; 3],
    }
    /// glibc's `posix_spawn_file_actions_t`.
    #[repr(C)]
    struct Actions {
        allocated: i32,
        used: i32,
        list: *const Action,
    }
    const DUP2: i32 = 1;
    // SAFETY: the caller vouches for the object; its layout is glibc's, unchanged since 2.2.
    let list = unsafe {
        let Some(actions) = actions.cast::<Actions>().as_ref() else { return Vec::new() };
        if actions.list.is_null() || actions.used <= 0 || actions.used > actions.allocated {
            return Vec::new();
        }
        core::slice::from_raw_parts(actions.list, actions.used as usize)
    };
    list.iter().filter(|action| action.tag == DUP2).map(|action| action.words[0] as i32).collect()
}
