//! read, write and what moves bytes between a socket and a file or pipe.

use core::ffi::{c_int, c_void};

use libc::{iovec, off_t, size_t, ssize_t};

use super::net::check_room;
use super::{buffers, finish, guest_socket, one};
use crate::next::next;
use crate::socket::{Sock, Told};
use crate::sys::{self, raw};

#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: c_int, buf: *mut c_void, n: size_t) -> ssize_t {
    match guest_socket(fd) {
        Some(_) if n == 0 => 0,
        Some(s) => finish(s.receive(&one(buf, n), 0, &mut Told::default()).map(|r| r.0)),
        None => next!(read(fd => c_int, buf => *mut c_void, n => size_t) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __read_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t) -> ssize_t {
    check_room(n, room);
    // SAFETY: the same contract.
    unsafe { read(fd, buf, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => finish(s.send(&one(buf, n), 0, &[])),
        None => next!(write(fd => c_int, buf => *const c_void, n => size_t) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn readv(fd: c_int, iov: *const iovec, n: c_int) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => {
            // SAFETY: the program's own vectors.
            let iov = if n < 0 { None } else { unsafe { buffers(iov, n as usize) } };
            finish(
                iov.ok_or(libc::EINVAL).and_then(|iov| s.receive(iov, 0, &mut Told::default()).map(|r| r.0)),
            )
        }
        None => next!(readv(fd => c_int, iov => *const iovec, n => c_int) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn writev(fd: c_int, iov: *const iovec, n: c_int) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => {
            // SAFETY: the program's own vectors.
            let iov = if n < 0 { None } else { unsafe { buffers(iov, n as usize) } };
            finish(iov.ok_or(libc::EINVAL).and_then(|iov| s.send(iov, 0, &[])))
        }
        None => next!(writev(fd => c_int, iov => *const iovec, n => c_int) -> ssize_t),
    }
}

/// File or pipe to guest socket: the kernel reads straight into the send ring.
fn feed(s: &Sock, from: c_int, mut offset: Option<&mut i64>, len: usize, flags: c_int) -> Result<usize, i32> {
    let mut end = false;
    s.stream_send(len.min(0x7fff_f000), flags, None, |p, _, n| {
        if end {
            return Ok(0);
        }
        let r = match offset.as_deref_mut() {
            Some(at) => raw!(libc::SYS_pread64, from, p, n, *at),
            None => raw!(libc::SYS_read, from, p, n),
        };
        if r < 0 {
            return Err(-r as i32);
        }
        if let Some(at) = offset.as_deref_mut() {
            *at += r as i64;
        }
        end = (r as usize) < n;
        Ok(r as usize)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendfile(out: c_int, from: c_int, offset: *mut off_t, n: size_t) -> ssize_t {
    if let Some(s) = guest_socket(out) {
        if guest_socket(from).is_some() {
            return finish::<usize>(Err(libc::EINVAL));
        }
        // SAFETY: the program's own offset, or null.
        let offset = unsafe { offset.as_mut() };
        return finish(feed(&s, from, offset, n, 0));
    }
    if guest_socket(from).is_some() {
        return finish::<usize>(Err(libc::EINVAL));
    }
    next!(sendfile(out => c_int, from => c_int, offset => *mut off_t, n => size_t) -> ssize_t)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendfile64(out: c_int, from: c_int, offset: *mut off_t, n: size_t) -> ssize_t {
    // SAFETY: off_t is 64 bits wide here.
    unsafe { sendfile(out, from, offset, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn splice(
    from: c_int,
    from_offset: *mut i64,
    to: c_int,
    to_offset: *mut i64,
    n: size_t,
    flags: u32,
) -> ssize_t {
    let (source, sink) = (guest_socket(from), guest_socket(to));
    if source.is_none() && sink.is_none() {
        return next!(splice(from => c_int, from_offset => *mut i64, to => c_int, to_offset => *mut i64, n => size_t,
            flags => u32) -> ssize_t);
    }
    let pipe = if source.is_some() { to } else { from };
    if (source.is_some() && sink.is_some()) || !is_pipe(pipe) {
        return finish::<usize>(Err(libc::EINVAL));
    }
    let (socket_offset, pipe_offset) =
        if source.is_some() { (from_offset, to_offset) } else { (to_offset, from_offset) };
    if !pipe_offset.is_null() {
        return finish::<usize>(Err(libc::ESPIPE));
    }
    if !socket_offset.is_null() {
        return finish::<usize>(Err(libc::EINVAL));
    }
    if let Some(s) = sink {
        // A pipe gives what it has: one read, never waiting for more than there is.
        let mut available = 0i32;
        raw!(libc::SYS_ioctl, from, libc::FIONREAD, &mut available as *mut i32);
        let want = if available > 0 { n.min(available as usize) } else { n.min(65536) };
        let nonblock = flags & libc::SPLICE_F_NONBLOCK != 0;
        if available == 0 && nonblock {
            let mut p = libc::pollfd { fd: from, events: libc::POLLIN, revents: 0 };
            raw!(libc::SYS_poll, &mut p as *mut libc::pollfd, 1, 0);
            if p.revents == 0 {
                return finish::<usize>(Err(libc::EAGAIN));
            }
        }
        return finish(feed(&s, from, None, want, 0));
    }
    let Some(s) = source else { return -1 };
    finish(s.stream_receive(n.min(0x7fff_f000), 0, None, |p, _, n| {
        let nonblock = flags & libc::SPLICE_F_NONBLOCK != 0;
        if nonblock || n > 4096 {
            let mut poll = libc::pollfd { fd: to, events: libc::POLLOUT, revents: 0 };
            raw!(libc::SYS_poll, &mut poll as *mut libc::pollfd, 1, if nonblock { 0 } else { -1i32 });
            if poll.revents & libc::POLLOUT == 0 && nonblock {
                return Err(libc::EAGAIN);
            }
        }
        // Never more than fits: what a pipe takes must not block with the ring's lock held.
        let size = raw!(libc::SYS_fcntl, to, libc::F_GETPIPE_SZ).max(4096) as usize;
        let mut used = 0i32;
        raw!(libc::SYS_ioctl, to, libc::FIONREAD, &mut used as *mut i32);
        let room = size.saturating_sub((used as usize).div_ceil(4096) * 4096);
        let r = raw!(libc::SYS_write, to, p, n.min(room.max(1)));
        if r < 0 { Err(-r as i32) } else { Ok(r as usize) }
    }))
}

fn is_pipe(fd: c_int) -> bool {
    raw!(libc::SYS_fcntl, fd, libc::F_GETPIPE_SZ) > 0
}

/// Positions mean nothing on a socket.
macro_rules! no_position {
    ($($name:ident($($arg:ident: $ty:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, $($arg: $ty),*) -> ssize_t {
            if guest_socket(fd).is_some() {
                sys::set_errno(libc::ESPIPE);
                return -1;
            }
            next!($name(fd => c_int, $($arg => $ty),*) -> ssize_t)
        }
    )*};
}

no_position! {
    pread(buf: *mut c_void, n: size_t, at: off_t);
    pread64(buf: *mut c_void, n: size_t, at: off_t);
    pwrite(buf: *const c_void, n: size_t, at: off_t);
    pwrite64(buf: *const c_void, n: size_t, at: off_t);
}

type Vectors = *const iovec;

/// The flags of preadv2 and pwritev2 that a socket takes: HIPRI, DSYNC, SYNC, NOWAIT, APPEND, NOAPPEND.
const SOCKET_RWF: c_int = 0x3f;
const RWF_NOWAIT: c_int = 8;

/// A vector call with flags at offset -1, "the current position", which a socket has.
///
/// # Safety
/// `iov` must be valid for `n` vectors.
unsafe fn vector_call(s: &Sock, iov: Vectors, n: c_int, flags: c_int, write: bool) -> ssize_t {
    if flags & !SOCKET_RWF != 0 {
        return finish::<usize>(Err(libc::EOPNOTSUPP));
    }
    let flags = if flags & RWF_NOWAIT != 0 { libc::MSG_DONTWAIT } else { 0 };
    // SAFETY: the same contract.
    let iov = if n < 0 { None } else { unsafe { buffers(iov, n as usize) } };
    finish(iov.ok_or(libc::EINVAL).and_then(|iov| {
        if write { s.send(iov, flags, &[]) } else { s.receive(iov, flags, &mut Told::default()).map(|r| r.0) }
    }))
}

macro_rules! vector_calls {
    ($($name:ident writes $write:literal;)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, iov: Vectors, n: c_int, at: off_t, flags: c_int) -> ssize_t {
            if at == -1 && let Some(s) = guest_socket(fd) {
                // SAFETY: the program's own vectors.
                return unsafe { vector_call(&s, iov, n, flags, $write) };
            }
            next!($name(fd => c_int, iov => Vectors, n => c_int, at => off_t, flags => c_int) -> ssize_t)
        }
    )*};
}

vector_calls! {
    preadv2 writes false;
    preadv64v2 writes false;
    pwritev2 writes true;
    pwritev64v2 writes true;
}
