//! close, dup, fcntl, ioctl: what changes which descriptor is what.

use core::ffi::{c_int, c_long, c_ulong, c_void};

use netkernel_abi::socket::{gflag, state};

use super::{done, finish_int, guest_socket};
use crate::next::next;
use crate::options::{self, Ioctl};
use crate::sys::{self, raw};
use crate::table::{self, Slot};
use crate::{epoll, guest, spare};

/// Takes `fd` out of all books; the real close follows. False: it is GuestLib's own and stays open.
pub fn leave(fd: c_int) -> bool {
    match table::slot(fd) {
        Slot::None => true,
        Slot::Internal => false,
        Slot::Socket(id) => {
            table::forget(fd);
            if epoll::has_instances() {
                epoll::socket_closed(fd, id);
            }
            true
        }
        Slot::Epoll(index) => {
            table::forget(fd);
            epoll::closed(index);
            true
        }
    }
}

/// `to` is now a duplicate of what `slot` says.
fn joined(slot: Slot, to: c_int) {
    match slot {
        Slot::Socket(_) => {
            table::set(to, slot);
        }
        Slot::Epoll(index) => {
            epoll::duplicated(index);
            table::set(to, slot);
        }
        _ => {}
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    let sock = guest_socket(fd);
    let real = || next!(close(fd => c_int) -> c_int);
    if let Some(s) = &sock
        && let Some(r) = spare::close(s, || _ = leave(fd), real)
    {
        return r;
    }
    // A listener, or what else holds a port without being connected, is really closed when close returns: the next
    // bind to the port, or connect to it, must find it so.
    let holds_port = sock.filter(|s| {
        let state = s.state();
        let connected = state & state::CONNECTED != 0 && state & state::DATAGRAM == 0;
        state & (state::LISTENING | state::BOUND) != 0 && !connected && !guest::engine_gone()
    });
    if !leave(fd) {
        sys::set_errno(libc::EBADF);
        return -1;
    }
    let r = real();
    if let Some(s) = holds_port
        && table::references(s.id) == 0
    {
        crate::socket::Sock::fence(s.guest, s.id);
    }
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close_range(first: u32, last: u32, flags: c_int) -> c_int {
    if guest::guest().is_none()
        || flags & !(libc::CLOSE_RANGE_CLOEXEC | libc::CLOSE_RANGE_UNSHARE) as c_int != 0
        || first > last
    {
        return next!(close_range(first => u32, last => u32, flags => c_int) -> c_int);
    }
    let cloexec = flags & libc::CLOSE_RANGE_CLOEXEC as c_int != 0;
    // GuestLib's own descriptors stay: the range is closed around them.
    let mut own = Vec::new();
    table::for_each(
        first.min(i32::MAX as u32) as i32,
        last.min(i32::MAX as u32 - 1) as i32 + 1,
        |fd, slot| {
            if slot == Slot::Internal {
                own.push(fd as u32);
            } else if !cloexec {
                leave(fd);
            }
        },
    );
    let mut from = first as u64;
    for fd in own.into_iter().map(u64::from).chain([last as u64 + 1]) {
        if fd > from {
            let r = raw!(libc::SYS_close_range, from, fd - 1, flags);
            if r < 0 {
                return finish_int(Err(-r as i32));
            }
        }
        from = fd + 1;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: plain numbers.
    unsafe { close_range(first.max(0) as u32, u32::MAX, 0) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    let slot = table::slot(fd);
    if slot == Slot::Internal {
        return finish_int(Err(libc::EBADF));
    }
    let new = next!(dup(fd => c_int) -> c_int);
    if new >= 0 {
        joined(slot, new);
    }
    new
}

fn dup_onto(fd: c_int, to: c_int, flags: c_int, three: bool) -> c_int {
    let slot = table::slot(fd);
    if slot == Slot::Internal {
        return finish_int(Err(libc::EBADF));
    }
    if fd != to
        && table::slot(to) == Slot::Internal
        && raw!(libc::SYS_fcntl, fd, libc::F_GETFD) >= 0
        && !move_own(to)
    {
        return finish_int(Err(libc::EBUSY));
    }
    let was = table::slot(to);
    let new = if three {
        next!(dup3(fd => c_int, to => c_int, flags => c_int) -> c_int)
    } else {
        next!(dup2(fd => c_int, to => c_int) -> c_int)
    };
    if new >= 0 && fd != to {
        if was != Slot::None {
            leave(to);
        }
        joined(slot, to);
    }
    new
}

/// The program wants the number of one of GuestLib's own descriptors: that one moves.
fn move_own(fd: c_int) -> bool {
    let Some(guest) = guest::guest() else { return false };
    if spare::make_way(fd) {
        return true;
    }
    let keep = raw!(libc::SYS_fcntl, fd, libc::F_GETFD) & libc::FD_CLOEXEC as isize == 0;
    let command = if keep { libc::F_DUPFD } else { libc::F_DUPFD_CLOEXEC };
    let to = raw!(libc::SYS_fcntl, fd, command, fd + 1) as c_int;
    if to < 0 {
        return false;
    }
    table::set(to, Slot::Internal);
    table::forget(fd);
    use core::sync::atomic::Ordering::Relaxed;
    for own in [&guest.channel, &guest.doorbell, &guest::LIVENESS_MIRROR] {
        if own.load(Relaxed) == fd {
            own.store(to, Relaxed);
        }
    }
    true
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    dup_onto(fd, to, 0, false)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    dup_onto(fd, to, flags, true)
}

/// Not in the libc crate.
const F_SETOWN_EX: c_int = 15;
const F_SETSIG: c_int = 10;

// fcntl and ioctl have one optional argument, which travels in a register whether it was passed or not.
unsafe fn fcntl_common(fd: c_int, command: c_int, argument: c_long) -> c_int {
    let slot = table::slot(fd);
    if slot == Slot::Internal {
        return finish_int(Err(libc::EBADF));
    }
    if let Some(s) = guest_socket(fd) {
        match command {
            libc::F_GETFL => {
                let f = s.flags();
                let real = match f & gflag::STATUS_FLAGS {
                    0 => libc::O_RDWR as isize,
                    _ => raw!(libc::SYS_fcntl, fd, libc::F_GETFL),
                };
                if real < 0 {
                    return finish_int(Err(-real as i32));
                }
                let nonblock = if f & gflag::NONBLOCK != 0 { libc::O_NONBLOCK } else { 0 };
                let asynchronous = if f & gflag::ASYNC != 0 { libc::O_ASYNC } else { 0 };
                return real as c_int & !(libc::O_NONBLOCK | libc::O_ASYNC) | nonblock | asynchronous;
            }
            libc::F_SETFL => {
                s.set_flag(gflag::NONBLOCK, argument as c_int & libc::O_NONBLOCK != 0);
                // The placeholder itself stays blocking: sleeping on it is how this library waits. All else that F_SETFL
                // changes (man 2 fcntl) is told to it, and found there.
                let rest = argument & !(libc::O_NONBLOCK as c_long);
                const ELSE: c_int = libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;
                if s.flags() & (gflag::STATUS_FLAGS | gflag::ASYNC) != 0 || argument as c_int & ELSE != 0 {
                    s.set_flag(gflag::STATUS_FLAGS, true);
                    s.set_flag(gflag::ASYNC, argument as c_int & libc::O_ASYNC != 0);
                    raw!(libc::SYS_fcntl, fd, libc::F_SETFL, rest);
                }
                return 0;
            }
            libc::F_SETOWN => s.set_flag(gflag::OWNED, argument != 0),
            F_SETOWN_EX => s.set_flag(gflag::OWNED, true),
            F_SETSIG => s.set_flag(gflag::STATUS_FLAGS, true),
            _ => {}
        }
    }
    let r = next!(fcntl64(fd => c_int, command => c_int, argument => c_long) -> c_int);
    if r >= 0 && (command == libc::F_DUPFD || command == libc::F_DUPFD_CLOEXEC) {
        joined(slot, r);
    }
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: c_long) -> c_int {
    // SAFETY: the same contract.
    unsafe { fcntl_common(fd, command, argument) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, argument: c_long) -> c_int {
    // SAFETY: the same contract.
    unsafe { fcntl_common(fd, command, argument) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sockatmark(fd: c_int) -> c_int {
    match guest_socket(fd) {
        Some(s) => s.at_mark() as c_int,
        None => next!(sockatmark(fd => c_int) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if let Some(s) = guest_socket(fd) {
        match options::ioctl(&s, request, argument.cast()) {
            Ok(Ioctl::Int(value)) => {
                if argument.is_null() {
                    return finish_int(Err(libc::EFAULT));
                }
                // SAFETY: the request's argument is an int.
                unsafe { *argument.cast::<c_int>() = value };
                return 0;
            }
            Ok(Ioctl::Done) => return 0,
            Ok(Ioctl::Bypass) => {}
            Err(e) => return done(Err(e)),
        }
    }
    next!(ioctl(fd => c_int, request => c_ulong, argument => *mut c_void) -> c_int)
}
