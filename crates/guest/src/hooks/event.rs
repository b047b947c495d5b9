//! poll, select, epoll in all their variants.

use core::ffi::c_int;

use libc::{epoll_event, fd_set, nfds_t, pollfd, sigset_t, timespec, timeval};

use super::finish_int;
use crate::next::next;
use crate::{epoll, guest, poll};

/// A program's poll set.
///
/// # Safety
/// `set` must be valid for `n` entries.
unsafe fn pollfds<'a>(set: *mut pollfd, n: nfds_t) -> &'a mut [pollfd] {
    if set.is_null() || n == 0 || n > 1 << 20 {
        return &mut [];
    }
    // SAFETY: the caller vouches for the array.
    unsafe { core::slice::from_raw_parts_mut(set, n as usize) }
}

fn milliseconds(ms: c_int) -> i64 {
    if ms < 0 { -1 } else { ms as i64 * 1_000_000 }
}

/// Nanoseconds of a timespec; -1 for null.
///
/// # Safety
/// `t` must be null or valid.
unsafe fn nanoseconds(t: *const timespec) -> Result<i64, i32> {
    // SAFETY: the caller vouches for it.
    match unsafe { t.as_ref() } {
        None => Ok(-1),
        Some(t) if t.tv_sec < 0 || !(0..1_000_000_000).contains(&t.tv_nsec) => Err(libc::EINVAL),
        Some(t) => Ok(t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec)),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn poll(set: *mut pollfd, n: nfds_t, ms: c_int) -> c_int {
    // SAFETY: the program's own set.
    let fds = unsafe { pollfds(set, n) };
    if poll::concerns(fds) {
        return finish_int(poll::poll(fds, milliseconds(ms), core::ptr::null()));
    }
    next!(poll(set => *mut pollfd, n => nfds_t, ms => c_int) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __poll_chk(set: *mut pollfd, n: nfds_t, ms: c_int, room: usize) -> c_int {
    super::net::check_room(n as usize * size_of::<pollfd>(), room);
    // SAFETY: the same contract.
    unsafe { poll(set, n, ms) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ppoll(set: *mut pollfd, n: nfds_t, t: *const timespec, mask: *const sigset_t) -> c_int {
    // SAFETY: the program's own set.
    let fds = unsafe { pollfds(set, n) };
    if poll::concerns(fds) {
        // SAFETY: the program's own time-out.
        return finish_int(unsafe { nanoseconds(t) }.and_then(|t| poll::poll(fds, t, mask)));
    }
    next!(ppoll(set => *mut pollfd, n => nfds_t, t => *const timespec, mask => *const sigset_t) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __ppoll_chk(
    set: *mut pollfd,
    n: nfds_t,
    t: *const timespec,
    mask: *const sigset_t,
    room: usize,
) -> c_int {
    super::net::check_room(n as usize * size_of::<pollfd>(), room);
    // SAFETY: the same contract.
    unsafe { ppoll(set, n, t, mask) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn select(
    n: c_int,
    r: *mut fd_set,
    w: *mut fd_set,
    e: *mut fd_set,
    t: *mut timeval,
) -> c_int {
    let sets = [r.cast::<u64>(), w.cast(), e.cast()];
    // SAFETY: the program's own sets.
    if unsafe { poll::select_concerns(n, sets) } {
        // SAFETY: the program's own time-out.
        let timeout = match unsafe { t.as_ref() } {
            None => -1,
            Some(t) if t.tv_sec < 0 || t.tv_usec < 0 => return finish_int(Err(libc::EINVAL)),
            Some(t) => t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_usec.saturating_mul(1000)),
        };
        let begin = crate::sys::now_ns();
        // SAFETY: as above.
        let result = unsafe { poll::select(n, sets, timeout, core::ptr::null()) };
        if timeout >= 0 {
            // Linux updates the time left.
            let left = (timeout - (crate::sys::now_ns() - begin) as i64).max(0);
            // SAFETY: not null, since there was a time-out.
            unsafe { *t = timeval { tv_sec: left / 1_000_000_000, tv_usec: left % 1_000_000_000 / 1000 } };
        }
        return finish_int(result);
    }
    next!(select(n => c_int, r => *mut fd_set, w => *mut fd_set, e => *mut fd_set, t => *mut timeval) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pselect(
    n: c_int,
    r: *mut fd_set,
    w: *mut fd_set,
    e: *mut fd_set,
    t: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    let sets = [r.cast::<u64>(), w.cast(), e.cast()];
    // SAFETY: the program's own sets and time-out.
    unsafe {
        if poll::select_concerns(n, sets) {
            return finish_int(nanoseconds(t).and_then(|t| poll::select(n, sets, t, mask)));
        }
    }
    next!(pselect(n => c_int, r => *mut fd_set, w => *mut fd_set, e => *mut fd_set, t => *const timespec,
        mask => *const sigset_t) -> c_int)
}

/// Enters a new epoll descriptor in the books.
fn created(epfd: c_int) -> c_int {
    if epfd >= 0 && guest::guest().is_some() {
        epoll::instance_for(epfd);
    }
    epfd
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_create(size: c_int) -> c_int {
    created(next!(epoll_create(size => c_int) -> c_int))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_create1(flags: c_int) -> c_int {
    created(next!(epoll_create1(flags => c_int) -> c_int))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, event: *mut epoll_event) -> c_int {
    match epoll::ctl(epfd, op, fd, event) {
        Some(result) => super::done(result),
        None => next!(epoll_ctl(epfd => c_int, op => c_int, fd => c_int, event => *mut epoll_event) -> c_int),
    }
}

/// Serves a wait on an instance with guest sockets; `None`: the kernel's.
unsafe fn wait(
    epfd: c_int,
    events: *mut epoll_event,
    max: c_int,
    timeout_ns: i64,
    mask: *const sigset_t,
) -> Option<c_int> {
    let e = epoll::find(epfd)?;
    if max <= 0 {
        return Some(finish_int(Err(libc::EINVAL)));
    }
    if events.is_null() {
        return Some(finish_int(Err(libc::EFAULT)));
    }
    // SAFETY: the program's own array of `max` events.
    let out = unsafe { core::slice::from_raw_parts_mut(events, max as usize) };
    Some(finish_int(e.wait(epfd, out, timeout_ns, mask).map(|n| n as i32)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_wait(epfd: c_int, events: *mut epoll_event, max: c_int, ms: c_int) -> c_int {
    // SAFETY: the program's own array.
    unsafe { wait(epfd, events, max, milliseconds(ms), core::ptr::null()) }.unwrap_or_else(
        || next!(epoll_wait(epfd => c_int, events => *mut epoll_event, max => c_int, ms => c_int) -> c_int),
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_pwait(
    epfd: c_int,
    events: *mut epoll_event,
    max: c_int,
    ms: c_int,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: the program's own array.
    unsafe { wait(epfd, events, max, milliseconds(ms), mask) }.unwrap_or_else(|| {
        next!(epoll_pwait(epfd => c_int, events => *mut epoll_event, max => c_int, ms => c_int,
            mask => *const sigset_t) -> c_int)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_pwait2(
    epfd: c_int,
    events: *mut epoll_event,
    max: c_int,
    t: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: the program's own time-out.
    let timeout = match unsafe { nanoseconds(t) } {
        Ok(t) => t,
        Err(e) => return finish_int(Err(e)),
    };
    // SAFETY: the program's own array.
    unsafe { wait(epfd, events, max, timeout, mask) }.unwrap_or_else(|| {
        next!(epoll_pwait2(epfd => c_int, events => *mut epoll_event, max => c_int, t => *const timespec,
            mask => *const sigset_t) -> c_int)
    })
}
