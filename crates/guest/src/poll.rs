//! `poll` and `select` over sets in which guest sockets, epoll instances and the kernel's descriptors mix.

use core::sync::atomic::{Ordering, fence};

use libc::{POLLERR, POLLHUP, POLLIN, POLLNVAL, pollfd};

use crate::guest::{self, Guest};
use crate::next::next;
use crate::socket::{self, Sock};
use crate::sys::{self, raw};
use crate::table::{self, Slot};
use crate::wait::{self, Share};
use crate::{epoll, handover, queue};

/// Does any descriptor of the set need us?
pub fn concerns(set: &[pollfd]) -> bool {
    guest::guest().is_some() && set.iter().any(|p| p.fd >= 0 && !matches!(table::slot(p.fd), Slot::None))
}

/// One pass over what is ours; returns how many entries have something to report.
fn look(set: &mut [pollfd]) -> i32 {
    let mut count = 0;
    for p in set.iter_mut() {
        if p.fd < 0 {
            continue;
        }
        let mask = match table::slot(p.fd) {
            Slot::None => continue,
            Slot::Internal => POLLNVAL,
            Slot::Socket(_) => match socket::find(p.fd) {
                Some(sock) => {
                    let mut m = (sock.readiness() as i16) & (p.events | POLLERR | POLLHUP);
                    if p.events & libc::POLLOUT != 0 && m & libc::POLLOUT == 0 {
                        sock.want_space();
                        fence(Ordering::SeqCst);
                        m = (sock.readiness() as i16) & (p.events | POLLERR | POLLHUP);
                    }
                    // It left the queues after it was found: it is not ready because of that.
                    if handover::is_over(sock.state()) && socket::find(p.fd).is_none() {
                        continue;
                    }
                    m
                }
                // It has left the queues: the kernel's pass says.
                None if matches!(table::slot(p.fd), Slot::None) => continue,
                None => POLLNVAL,
            },
            Slot::Epoll(_) => match epoll::find(p.fd) {
                Some(e) => epoll::poll_mask(e, p.fd) & p.events,
                None => continue,
            },
        };
        p.revents = mask;
        count += (mask != 0) as i32;
    }
    count
}

/// `ppoll(2)`; `timeout_ns` negative: for ever. Errors: EINTR, EINVAL...
pub fn poll(set: &mut [pollfd], timeout_ns: i64, mask: *const libc::sigset_t) -> Result<i32, i32> {
    let Some(guest) = guest::guest() else { return Err(libc::EINVAL) };
    for p in set.iter_mut() {
        p.revents = 0;
    }
    let are_ours = |set: &[pollfd]| set.iter().all(|p| p.fd < 0 || is_ours(p.fd));
    let nothing_to_ask = are_ours(set);
    let mut ours = look(set);
    // The most frequent cases: there is something, or nobody waits, and nothing to ask the kernel for. What left the queues meanwhile is the
    // kernel's.
    if nothing_to_ask && (ours > 0 || timeout_ns == 0 && are_ours(set)) {
        return Ok(ours);
    }
    let begin = sys::now_ns();
    // The kernel's view: guest sockets are left out (or, when sleeping, stand for their wake-up bytes).
    let mut real: Vec<pollfd> = set.to_vec();
    let mut first = true;
    let mut shares = Vec::new();
    loop {
        for (r, p) in real.iter_mut().zip(set.iter()) {
            *r = pollfd { fd: if is_ours(p.fd) { -1 } else { p.fd }, events: p.events, revents: 0 };
        }
        let has_real = real.iter().any(|r| r.fd >= 0);
        if ours > 0 || timeout_ns == 0 {
            return Ok(ours
                + if has_real { real_poll(&mut real, 0, core::ptr::null())?.merge(set, &real) } else { 0 });
        }
        if first {
            first = false;
            if has_real {
                let n = real_poll(&mut real, 0, core::ptr::null())?;
                if n.0 > 0 {
                    return Ok(n.merge(set, &real));
                }
            }
            let mut seen = || {
                ours = look(set);
                ours > 0
            };
            if mask.is_null() && wait::spin(guest, &mut seen) {
                // What came after the first entries were looked at, and before the last ones were, is all of theirs: a look that goes on
                // all the time often meets that moment.
                ours = look(set);
                if ours > 0 {
                    continue;
                }
            }
        }
        match sleep(guest, set, &mut real, &mut shares, begin, timeout_ns, mask)? {
            Sleep::Again => {}
            Sleep::Over => {
                let ours = look(set);
                queue::with_spin(guest, |s| s.waited(sys::now_ns() - begin));
                return Ok(ours);
            }
            Sleep::Kernel(n) => {
                queue::with_spin(guest, |s| s.waited(sys::now_ns() - begin));
                return Ok(look(set) + n.merge(set, &real));
            }
        }
        queue::with_spin(guest, |s| s.waited(sys::now_ns() - begin));
        ours = look(set);
    }
}

fn is_ours(fd: i32) -> bool {
    fd >= 0 && !matches!(table::slot(fd), Slot::None)
}

enum Sleep {
    Again,
    Over,
    Kernel(Real),
}

struct Real(i32);

impl Real {
    /// Copies the kernel's results over; entries that are ours keep theirs.
    fn merge(self, set: &mut [pollfd], real: &[pollfd]) -> i32 {
        let mut n = 0;
        for (p, r) in set.iter_mut().zip(real) {
            if !is_ours(p.fd) {
                p.revents = r.revents;
                n += (r.revents != 0) as i32;
            }
        }
        n
    }
}

fn real_poll(real: &mut [pollfd], timeout_ns: i64, mask: *const libc::sigset_t) -> Result<Real, i32> {
    let mut t = libc::timespec {
        tv_sec: timeout_ns.max(0) / 1_000_000_000,
        tv_nsec: timeout_ns.max(0) % 1_000_000_000,
    };
    let timeout = if timeout_ns < 0 { core::ptr::null_mut() } else { &mut t as *mut libc::timespec };
    let n = next!(ppoll(real.as_mut_ptr() => *mut pollfd, real.len() => usize, timeout => *mut libc::timespec,
        mask => *const libc::sigset_t) -> i32);
    if n < 0 { Err(sys::errno()) } else { Ok(Real(n)) }
}

fn sleep(
    guest: &Guest,
    set: &mut [pollfd],
    real: &mut [pollfd],
    shares: &mut Vec<(u32, Share)>,
    begin: u64,
    timeout_ns: i64,
    mask: *const libc::sigset_t,
) -> Result<Sleep, i32> {
    let left = if timeout_ns < 0 { -1 } else { (timeout_ns - (sys::now_ns() - begin) as i64).max(0) };
    if left == 0 {
        return Ok(Sleep::Over);
    }
    let mut socks: Vec<Sock> = Vec::new();
    let mut ready = false;
    for (p, r) in set.iter().zip(real.iter_mut()) {
        match table::slot(p.fd) {
            Slot::Socket(_) if p.fd >= 0 => {
                if let Some(sock) = socket::find(p.fd) {
                    sock.arm(p.events as u32);
                    if socks.iter().any(|s| s.id == sock.id) {
                        // A socket that stands in the set twice has one sleeper all the same.
                        r.fd = -1;
                        continue;
                    }
                    sock.entry.waiters.fetch_add(1, Ordering::SeqCst);
                    if !shares.iter().any(|s| s.0 == sock.id) {
                        shares.push((sock.id, Share::new(sock.entry)));
                    }
                    socks.push(sock);
                    *r = pollfd { fd: p.fd, events: POLLIN, revents: 0 };
                }
            }
            Slot::Epoll(_) if p.fd >= 0 => {
                if let Some(e) = epoll::find(p.fd) {
                    ready |= !e.prepare_poll(p.fd);
                    *r = pollfd { fd: p.fd, events: POLLIN, revents: 0 };
                }
            }
            _ => {}
        }
    }
    fence(Ordering::SeqCst);
    let left_queues = || socks.iter().any(|sock| table::socket(sock.fd) != Some(sock.id));
    let result =
        if ready || look(set) > 0 || left_queues() { Ok(Real(0)) } else { real_poll(real, left, mask) };
    let mut theirs = 0;
    let woken = if result.is_ok() { &mut real[..] } else { &mut [] };
    for r in woken.iter_mut().filter(|r| r.fd >= 0 && r.revents != 0) {
        match table::slot(r.fd) {
            Slot::Socket(id) => {
                let mut byte = 0u8;
                let got = if sys::confined() {
                    raw!(libc::SYS_read, r.fd, &mut byte as *mut u8, 1)
                } else {
                    raw!(libc::SYS_recvfrom, r.fd, &mut byte as *mut u8, 1, libc::MSG_DONTWAIT, 0, 0)
                };
                if got == 0 {
                    guest.placeholder_hung_up();
                }
                if got == 1
                    && let Some((_, share)) = shares.iter_mut().find(|s| s.0 == id)
                    && let Some(sock) = socket::by_id(id, r.fd)
                {
                    share.took(guest, sock.entry, id);
                }
                // What was seen of the placeholder says nothing of the socket, should it leave the queues now.
                r.revents = 0;
            }
            Slot::None => theirs += 1,
            _ => {}
        }
    }
    for sock in &socks {
        sock.entry.waiters.fetch_sub(1, Ordering::SeqCst);
    }
    result?;
    if theirs > 0 { Ok(Sleep::Kernel(Real(theirs))) } else { Ok(Sleep::Again) }
}

/// `pselect(2)` for sets that contain something of ours.
///
/// # Safety
/// The sets must be null or valid for `nfds` bits.
pub unsafe fn select(
    nfds: i32,
    sets: [*mut u64; 3],
    timeout_ns: i64,
    mask: *const libc::sigset_t,
) -> Result<i32, i32> {
    const IN: i16 = libc::POLLRDNORM | libc::POLLRDBAND | POLLIN | POLLHUP | POLLERR;
    const OUT: i16 = libc::POLLWRBAND | libc::POLLWRNORM | libc::POLLOUT | POLLERR;
    const WANT: [i16; 3] = [POLLIN | libc::POLLRDNORM, libc::POLLOUT | libc::POLLWRNORM, libc::POLLPRI];
    let bit = |set: *mut u64, fd: i32| -> bool {
        // SAFETY: the caller vouches for nfds bits; fd < nfds.
        !set.is_null() && unsafe { *set.add(fd as usize / 64) } & (1 << (fd % 64)) != 0
    };
    let events = |fd: i32| {
        sets.iter().zip(WANT).fold(0, |events, (set, want)| match bit(*set, fd) {
            true => events | want,
            false => events,
        })
    };
    let named = (0..nfds).map(|fd| pollfd { fd, events: events(fd), revents: 0 }).filter(|p| p.events != 0);
    // Nothing is allocated for a few: a program that selects before each write does so as often as it writes.
    let mut few = [pollfd { fd: -1, events: 0, revents: 0 }; 16];
    let mut many = Vec::new();
    let mut count = 0;
    for p in named {
        match few.get_mut(count) {
            Some(place) => *place = p,
            None if many.is_empty() => many = few.iter().copied().chain([p]).collect(),
            None => many.push(p),
        }
        count += 1;
    }
    let list = if many.is_empty() { &mut few[..count] } else { &mut many[..] };
    poll(list, timeout_ns, mask)?;
    if list.iter().any(|p| p.revents & POLLNVAL != 0) {
        return Err(libc::EBADF);
    }
    for set in sets.iter().filter(|s| !s.is_null()) {
        for word in 0..(nfds as usize).div_ceil(64) {
            // SAFETY: as above.
            unsafe { *set.add(word) = 0 };
        }
    }
    let mut count = 0;
    for p in list.iter() {
        let hits = [IN, OUT, libc::POLLPRI];
        for ((set, hit), want) in sets.iter().zip(hits).zip(WANT) {
            if !set.is_null() && p.events & want == want && p.revents & hit != 0 {
                // SAFETY: as above.
                unsafe { *set.add(p.fd as usize / 64) |= 1 << (p.fd % 64) };
                count += 1;
            }
        }
    }
    Ok(count)
}

/// Does a select set name something of ours?
///
/// # Safety
/// As for [`select`].
pub unsafe fn select_concerns(nfds: i32, sets: [*mut u64; 3]) -> bool {
    if guest::guest().is_none() {
        return false;
    }
    for set in sets.iter().filter(|s| !s.is_null()) {
        for word in 0..(nfds.max(0) as usize).div_ceil(64) {
            // SAFETY: the caller vouches for nfds bits.
            let mut bits = unsafe { *set.add(word) };
            while bits != 0 {
                let fd = (word * 64) as i32 + bits.trailing_zeros() as i32;
                if fd < nfds && table::slot(fd) != Slot::None {
                    return true;
                }
                bits &= bits - 1;
            }
        }
    }
    false
}
