//! socket, bind, listen, accept, connect, names, options, shutdown, send*, recv*.

use core::ffi::{c_int, c_void};

use libc::{iovec, msghdr, size_t, sockaddr, socklen_t, ssize_t};
use netkernel_abi::{Op, ancillary};

use super::{address, buffers, done, finish, finish_int, give_address, guest_socket, needed_address, one};
use crate::next::next;
use crate::socket::Told;
use crate::{guest, options, passing, socket, sys, table};

#[unsafe(no_mangle)]
unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    let inet = domain == libc::AF_INET || domain == libc::AF_INET6;
    if inet
        && guest::guest().is_none()
        && let Err(errno) = guest::may_be_unserved()
    {
        return finish_int(Err(errno));
    }
    if let Some(guest) = guest::guest()
        && inet
    {
        let served = matches!(
            (kind & 0xf, protocol),
            (libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP) | (libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP)
        ) && kind & !(0xf | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) == 0;
        if served {
            return finish_int(socket::create(guest, domain, kind, protocol));
        }
        guest::trace(
            1,
            &format!("bypass: socket({domain}, {kind}, {protocol}) is not TCP or UDP; the kernel serves it"),
        );
    }
    next!(socket(domain => c_int, kind => c_int, protocol => c_int) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bind(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
    match guest_socket(fd) {
        // SAFETY: the program's own address.
        Some(s) => done(unsafe { needed_address(addr, len) }.and_then(|a| s.bind(a))),
        None => next!(bind(fd => c_int, addr => *const sockaddr, len => socklen_t) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    match guest_socket(fd) {
        Some(s) => done(s.listen(backlog)),
        None => next!(listen(fd => c_int, backlog => c_int) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn connect(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
    match guest_socket(fd) {
        // SAFETY: the program's own address.
        Some(s) => done(unsafe { needed_address(addr, len) }.and_then(|a| s.connect(a))),
        None => next!(connect(fd => c_int, addr => *const sockaddr, len => socklen_t) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn accept(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
    // SAFETY: the same arguments, the same contract.
    unsafe { accept_common(fd, addr, len, 0) }
        .unwrap_or_else(|| next!(accept(fd => c_int, addr => *mut sockaddr, len => *mut socklen_t) -> c_int))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn accept4(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int {
    // SAFETY: the same arguments, the same contract.
    unsafe { accept_common(fd, addr, len, flags) }.unwrap_or_else(
        || next!(accept4(fd => c_int, addr => *mut sockaddr, len => *mut socklen_t, flags => c_int) -> c_int),
    )
}

unsafe fn accept_common(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> Option<c_int> {
    let s = guest_socket(fd)?;
    Some(finish_int(s.accept(flags).map(|new| {
        if !addr.is_null()
            && !len.is_null()
            && let Ok(peer) = new.name(Op::PeerName)
        {
            // SAFETY: the program's own address buffer.
            let _ = unsafe { give_address(&peer, addr, len) };
        }
        new.fd
    })))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getsockname(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
    match guest_socket(fd) {
        // SAFETY: the program's own address buffer.
        Some(s) => done(s.name(Op::LocalName).and_then(|n| unsafe { give_address(&n, addr, len) })),
        None => next!(getsockname(fd => c_int, addr => *mut sockaddr, len => *mut socklen_t) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getpeername(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
    match guest_socket(fd) {
        // SAFETY: the program's own address buffer.
        Some(s) => done(s.name(Op::PeerName).and_then(|n| unsafe { give_address(&n, addr, len) })),
        None => next!(getpeername(fd => c_int, addr => *mut sockaddr, len => *mut socklen_t) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn shutdown(fd: c_int, how: c_int) -> c_int {
    match guest_socket(fd) {
        Some(s) => done(s.shutdown(how)),
        None => next!(shutdown(fd => c_int, how => c_int) -> c_int),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    match guest_socket(fd) {
        Some(s) => done(if (len as i32) < 0 {
            Err(libc::EINVAL)
        } else if value.is_null() {
            Err(if len == 0 { libc::EINVAL } else { libc::EFAULT })
        } else {
            // SAFETY: the program's own option value; bounded so that a wrong length cannot run away.
            let value = unsafe { core::slice::from_raw_parts(value.cast::<u8>(), (len as usize).min(512)) };
            options::set(&s, level, name, value)
        }),
        None => {
            next!(setsockopt(fd => c_int, level => c_int, name => c_int, value => *const c_void, len => socklen_t) -> c_int)
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut socklen_t,
) -> c_int {
    match guest_socket(fd) {
        Some(s) => done((|| {
            if len.is_null() {
                return Err(libc::EFAULT);
            }
            // SAFETY: the program's own length.
            let wanted = unsafe { *len } as i32;
            if wanted < 0 {
                return Err(libc::EINVAL);
            }
            let got = options::get(&s, level, name, wanted as usize)?;
            if value.is_null() && !got.is_empty() {
                return Err(libc::EFAULT);
            }
            // SAFETY: the program's own buffer of at least `wanted` bytes, and got is not longer.
            unsafe {
                core::ptr::copy_nonoverlapping(got.as_ptr(), value.cast::<u8>(), got.len());
                *len = got.len() as socklen_t;
            }
            Ok(())
        })()),
        None => {
            next!(getsockopt(fd => c_int, level => c_int, name => c_int, value => *mut c_void, len => *mut socklen_t) -> c_int)
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn send(fd: c_int, buf: *const c_void, n: size_t, flags: c_int) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => finish(s.send(&one(buf, n), flags, &[])),
        None => next!(send(fd => c_int, buf => *const c_void, n => size_t, flags => c_int) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendto(
    fd: c_int,
    buf: *const c_void,
    n: size_t,
    flags: c_int,
    addr: *const sockaddr,
    len: socklen_t,
) -> ssize_t {
    match guest_socket(fd) {
        // SAFETY: the program's own address.
        Some(s) => finish(unsafe { address(addr, len) }.and_then(|a| s.send(&one(buf, n), flags, a))),
        None => {
            next!(sendto(fd => c_int, buf => *const c_void, n => size_t, flags => c_int, addr => *const sockaddr,
            len => socklen_t) -> ssize_t)
        }
    }
}

unsafe fn send_message(
    s: &socket::Sock,
    m: *const msghdr,
    flags: c_int,
    announce: bool,
) -> Result<usize, i32> {
    // SAFETY: the program's own message header.
    let m = unsafe { &*m };
    // SAFETY: the program's own vectors and address.
    let (iov, to) = unsafe { (buffers(m.msg_iov, m.msg_iovlen), address(m.msg_name.cast(), m.msg_namelen)?) };
    let control: &[u8] = if m.msg_controllen == 0 {
        &[]
    } else if m.msg_control.is_null() {
        return Err(libc::EFAULT);
    } else {
        // More than Linux takes by default is ENOBUFS there too.
        if m.msg_controllen > 131_072 {
            return Err(libc::ENOBUFS);
        }
        // SAFETY: the program's own control buffer of the length it says.
        unsafe { core::slice::from_raw_parts(m.msg_control.cast::<u8>(), m.msg_controllen) }
    };
    s.send_with(iov.ok_or(libc::EMSGSIZE)?, flags, to, control, announce)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendmsg(fd: c_int, m: *const msghdr, flags: c_int) -> ssize_t {
    match guest_socket(fd) {
        // SAFETY: the program's own message.
        Some(s) => finish(unsafe { send_message(&s, m, flags, true) }),
        // SAFETY: as above.
        None => match unsafe { passing::before_sending(fd, m) } {
            Ok(()) => next!(sendmsg(fd => c_int, m => *const msghdr, flags => c_int) -> ssize_t),
            Err(errno) => finish::<usize>(Err(errno)),
        },
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendmmsg(fd: c_int, v: *mut libc::mmsghdr, n: u32, flags: c_int) -> c_int {
    let Some(s) = guest_socket(fd) else {
        for i in 0..if v.is_null() { 0 } else { n.min(1024) as usize } {
            // SAFETY: the program's own array of n messages.
            if let Err(errno) = unsafe { passing::before_sending(fd, &raw const (*v.add(i)).msg_hdr) } {
                return finish_int(Err(errno));
            }
        }
        return next!(sendmmsg(fd => c_int, v => *mut libc::mmsghdr, n => u32, flags => c_int) -> c_int);
    };
    let (mut sent, mut failed) = (0, None);
    for i in 0..n.min(1024) as usize {
        // SAFETY: the program's own array of n messages.
        let (result, entry) = unsafe {
            let entry = v.add(i);
            (send_message(&s, &raw const (*entry).msg_hdr, flags, false), entry)
        };
        match result {
            // SAFETY: as above.
            Ok(bytes) => unsafe { (*entry).msg_len = bytes as u32 },
            Err(e) => {
                failed = Some(e);
                break;
            }
        }
        sent += 1;
    }
    // They go out together.
    s.announce();
    match failed {
        Some(e) if sent == 0 => finish_int(Err(e)),
        _ => sent,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn recv(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => finish(s.receive(&one(buf, n), flags, &mut Told::default()).map(|r| r.0)),
        None => next!(recv(fd => c_int, buf => *mut c_void, n => size_t, flags => c_int) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __recv_chk(
    fd: c_int,
    buf: *mut c_void,
    n: size_t,
    room: size_t,
    flags: c_int,
) -> ssize_t {
    check_room(n, room);
    // SAFETY: the same contract.
    unsafe { recv(fd, buf, n, flags) }
}

/// The fortified variants abort a program that would overflow its buffer.
pub fn check_room(n: size_t, room: size_t) {
    if n > room {
        // SAFETY: ends the process, as __chk_fail does.
        unsafe { libc::abort() }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn recvfrom(
    fd: c_int,
    buf: *mut c_void,
    n: size_t,
    flags: c_int,
    addr: *mut sockaddr,
    len: *mut socklen_t,
) -> ssize_t {
    let Some(s) = guest_socket(fd) else {
        return next!(recvfrom(fd => c_int, buf => *mut c_void, n => size_t, flags => c_int, addr => *mut sockaddr,
            len => *mut socklen_t) -> ssize_t);
    };
    let mut told = Told::default();
    finish(s.receive(&one(buf, n), flags, &mut told).map(|r| {
        // SAFETY: the program's own address buffer. A stream gives no address, as on Linux.
        let _ = unsafe { give_address(&told.from, addr, len) };
        r.0
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __recvfrom_chk(
    fd: c_int,
    buf: *mut c_void,
    n: size_t,
    room: size_t,
    flags: c_int,
    addr: *mut sockaddr,
    len: *mut socklen_t,
) -> ssize_t {
    check_room(n, room);
    // SAFETY: the same contract.
    unsafe { recvfrom(fd, buf, n, flags, addr, len) }
}

/// Gives control messages out as the kernel's put_cmsg does; says whether MSG_CTRUNC is to be set.
///
/// # Safety
/// The header's control buffer must be null or valid for `msg_controllen` bytes.
unsafe fn give_control(control: &[u8], m: &mut msghdr) -> c_int {
    let room = if m.msg_control.is_null() { 0 } else { m.msg_controllen };
    let mut done = 0;
    let mut flags = 0;
    for message in ancillary::messages(control).flatten() {
        let left = room - done;
        if left < ancillary::HEADER {
            flags = libc::MSG_CTRUNC;
            continue;
        }
        let whole = ancillary::HEADER + message.data.len();
        let len = whole.min(left);
        if len < whole {
            flags = libc::MSG_CTRUNC;
        }
        let mut header = [0u8; ancillary::HEADER];
        header[..8].copy_from_slice(&(len as u64).to_ne_bytes());
        header[8..12].copy_from_slice(&message.level.to_ne_bytes());
        header[12..].copy_from_slice(&message.kind.to_ne_bytes());
        // SAFETY: `done + len` is at most `room`, which the caller vouches for.
        unsafe {
            let to = m.msg_control.cast::<u8>().add(done);
            core::ptr::copy_nonoverlapping(header.as_ptr(), to, header.len());
            let data = len - header.len();
            core::ptr::copy_nonoverlapping(message.data.as_ptr(), to.add(header.len()), data);
        }
        done += whole.next_multiple_of(8).min(left);
    }
    m.msg_controllen = done;
    flags
}

unsafe fn receive_message(s: &socket::Sock, m: *mut msghdr, flags: c_int) -> Result<usize, i32> {
    // SAFETY: the program's own message header.
    let m = unsafe { &mut *m };
    // SAFETY: the program's own vectors.
    let iov: &[iovec] = unsafe { buffers(m.msg_iov, m.msg_iovlen) }.ok_or(libc::EMSGSIZE)?;
    let mut told = Told::default();
    let (n, out_flags) = s.receive(iov, flags, &mut told)?;
    // SAFETY: the program's own control buffer of the length it says.
    let truncated = unsafe { give_control(&told.control, m) };
    m.msg_flags = out_flags | truncated | flags & libc::MSG_CMSG_CLOEXEC;
    if m.msg_name.is_null() {
        m.msg_namelen = 0;
    } else {
        let mut len = m.msg_namelen;
        // SAFETY: the program's own name buffer of msg_namelen bytes.
        unsafe { give_address(&told.from, m.msg_name.cast(), &mut len) }?;
        m.msg_namelen = len;
    }
    Ok(n)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn recvmsg(fd: c_int, m: *mut msghdr, flags: c_int) -> ssize_t {
    match guest_socket(fd) {
        // SAFETY: the program's own message.
        Some(s) => finish(unsafe { receive_message(&s, m, flags) }),
        None => {
            let n = next!(recvmsg(fd => c_int, m => *mut msghdr, flags => c_int) -> ssize_t);
            if n >= 0 && guest::guest().is_some() {
                // SAFETY: the kernel has just filled the program's message.
                unsafe { adopt_received(m) };
            }
            n
        }
    }
}

/// Recognises guest sockets among descriptors that came in over a Unix socket.
unsafe fn adopt_received(m: *mut msghdr) {
    // SAFETY: the message was filled by the kernel; CMSG_* walk it within msg_controllen.
    unsafe {
        if (*m).msg_controllen == 0 {
            return;
        }
        let saved = sys::errno();
        let mut cmsg = libc::CMSG_FIRSTHDR(m);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let bytes = ((*cmsg).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                for i in 0..bytes / 4 {
                    table::adopt(libc::CMSG_DATA(cmsg).cast::<c_int>().add(i).read_unaligned());
                }
            }
            cmsg = libc::CMSG_NXTHDR(m, cmsg);
        }
        sys::set_errno(saved);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn recvmmsg(
    fd: c_int,
    v: *mut libc::mmsghdr,
    n: u32,
    flags: c_int,
    timeout: *mut libc::timespec,
) -> c_int {
    let Some(s) = guest_socket(fd) else {
        let got = next!(recvmmsg(fd => c_int, v => *mut libc::mmsghdr, n => u32, flags => c_int,
            timeout => *mut libc::timespec) -> c_int);
        for i in 0..got.max(0) as usize {
            // SAFETY: the kernel filled the first `got` messages.
            unsafe { adopt_received(&raw mut (*v.add(i)).msg_hdr) };
        }
        return got;
    };
    let begin = sys::now_ns();
    // SAFETY: the program's own time-out, or null.
    let limit = unsafe { timeout.as_ref() }.map(|t| t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64);
    let mut got = 0;
    for i in 0..n.min(1024) as usize {
        let mut f = flags & !libc::MSG_WAITFORONE;
        if got > 0 && flags & libc::MSG_WAITFORONE != 0 {
            f |= libc::MSG_DONTWAIT;
        }
        // SAFETY: the program's own array of n messages.
        let (result, entry) = unsafe {
            let entry = v.add(i);
            (receive_message(&s, &raw mut (*entry).msg_hdr, f), entry)
        };
        match result {
            // SAFETY: as above.
            Ok(bytes) => unsafe { (*entry).msg_len = bytes as u32 },
            Err(e) => return if got > 0 { got } else { finish_int(Err(e)) },
        }
        got += 1;
        if limit.is_some_and(|l| sys::now_ns() - begin >= l) {
            break;
        }
    }
    got
}
