//! libc's `syscall()`: some programs reach the kernel through it for what has a hook of its own.
//!
//! Called from inside malloc before any constructor ran (redis's jemalloc), so it must not look symbols up: everything that
//! is not about a guest socket is the bare system call.

use core::ffi::{c_int, c_long, c_void};

use super::guest_socket;
use crate::socket::Told;
use crate::spare;
use crate::sys;
use crate::table::{self, Slot};
use crate::{guest, next::next};

#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    n: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    if guest::guest().is_some() {
        let fd = a as c_int;
        let ours = table::slot(fd) != Slot::None;
        match n {
            // Rings would carry socket calls past every hook; programs fall back to plain calls.
            libc::SYS_io_uring_setup => {
                sys::set_errno(libc::ENOSYS);
                return -1;
            }
            libc::SYS_seccomp => guest::before_confinement(true),
            libc::SYS_clone if a as c_int & libc::CLONE_FILES != 0 => {}
            libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => spare::never_again(),
            libc::SYS_close if ours => {
                // SAFETY: a plain number.
                return unsafe { super::fd::close(fd) } as c_long;
            }
            libc::SYS_close_range => {
                // SAFETY: plain numbers.
                return unsafe { libc::close_range(a as u32, b as u32, c as c_int) } as c_long;
            }
            libc::SYS_read if ours => return next_here(0, fd, b, c),
            libc::SYS_write if ours => return next_here(1, fd, b, c),
            libc::SYS_socket if a as c_int == libc::AF_INET || a as c_int == libc::AF_INET6 => {
                // SAFETY: plain numbers; the symbol is this library's own or an outer one's.
                return unsafe { libc::socket(a as c_int, b as c_int, c as c_int) } as c_long;
            }
            // The instance becomes GuestLib's when the first guest socket is added to it.
            libc::SYS_epoll_ctl if ours || table::slot(c as c_int) != Slot::None => {
                // SAFETY: the caller's own arguments.
                return unsafe { libc::epoll_ctl(fd, b as c_int, c as c_int, d as *mut _) } as c_long;
            }
            _ if ours => {
                // SAFETY: the caller's own arguments.
                if let Some(r) = unsafe { own_call(n, fd, b, c, d, e) } {
                    return r;
                }
            }
            _ => {}
        }
    }
    // SAFETY: the caller's own system call.
    let r = unsafe { sys::call(n, [a, b, c, d, e, f]) };
    if (-4095..0).contains(&r) {
        sys::set_errno(-r as i32);
        return -1;
    }
    r as c_long
}

/// A call on one of GuestLib's descriptors that has a hook; the symbols are this library's own or an outer one's. libuv and
/// others call some of them this way. `None`: it has none.
///
/// # Safety
/// As for the system call.
unsafe fn own_call(n: c_long, fd: c_int, b: usize, c: usize, d: usize, e: usize) -> Option<c_long> {
    // SAFETY: the caller's own arguments, as the kernel would take them.
    unsafe {
        let r = match n {
            libc::SYS_accept => libc::accept(fd, b as *mut _, c as *mut _) as c_long,
            libc::SYS_accept4 => libc::accept4(fd, b as *mut _, c as *mut _, d as c_int) as c_long,
            libc::SYS_bind => libc::bind(fd, b as *const _, c as u32) as c_long,
            libc::SYS_connect => libc::connect(fd, b as *const _, c as u32) as c_long,
            libc::SYS_listen => libc::listen(fd, b as c_int) as c_long,
            libc::SYS_shutdown => libc::shutdown(fd, b as c_int) as c_long,
            libc::SYS_getsockname => libc::getsockname(fd, b as *mut _, c as *mut _) as c_long,
            libc::SYS_getpeername => libc::getpeername(fd, b as *mut _, c as *mut _) as c_long,
            libc::SYS_setsockopt => {
                libc::setsockopt(fd, b as c_int, c as c_int, d as *const c_void, e as u32) as c_long
            }
            libc::SYS_getsockopt => {
                libc::getsockopt(fd, b as c_int, c as c_int, d as *mut c_void, e as *mut _) as c_long
            }
            libc::SYS_sendmsg => libc::sendmsg(fd, b as *const _, c as c_int) as c_long,
            libc::SYS_recvmsg => libc::recvmsg(fd, b as *mut _, c as c_int) as c_long,
            libc::SYS_sendmmsg => libc::sendmmsg(fd, b as *mut _, c as u32, d as _) as c_long,
            libc::SYS_recvmmsg => libc::recvmmsg(fd, b as *mut _, c as u32, d as _, e as *mut _) as c_long,
            libc::SYS_readv => libc::readv(fd, b as *const _, c as c_int) as c_long,
            libc::SYS_writev => libc::writev(fd, b as *const _, c as c_int) as c_long,
            libc::SYS_dup => libc::dup(fd) as c_long,
            libc::SYS_dup2 => libc::dup2(fd, b as c_int) as c_long,
            libc::SYS_dup3 => libc::dup3(fd, b as c_int, c as c_int) as c_long,
            libc::SYS_fcntl => libc::fcntl(fd, b as c_int, c) as c_long,
            libc::SYS_ioctl => libc::ioctl(fd, b as _, c) as c_long,
            libc::SYS_epoll_wait => libc::epoll_wait(fd, b as *mut _, c as c_int, d as c_int) as c_long,
            libc::SYS_epoll_pwait => {
                libc::epoll_pwait(fd, b as *mut _, c as c_int, d as c_int, e as *const _) as c_long
            }
            _ => return None,
        };
        Some(r)
    }
}

fn next_here(write: usize, fd: c_int, buffer: usize, n: usize) -> c_long {
    match guest_socket(fd) {
        Some(s) => {
            let iov = super::one(buffer as *const _, n);
            super::finish(if write == 1 {
                s.send(&iov, 0, &[])
            } else {
                s.receive(&iov, 0, &mut Told::default()).map(|r| r.0)
            }) as c_long
        }
        None if write == 1 => next!(write(fd => c_int, buffer => usize, n => usize) -> isize) as c_long,
        None => next!(read(fd => c_int, buffer => usize, n => usize) -> isize) as c_long,
    }
}
