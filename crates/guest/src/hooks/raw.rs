//! libc's `syscall()`: some programs reach the kernel through it for what has a hook of its own.
//!
//! Called from inside malloc before any constructor ran (redis's jemalloc), so it must not look symbols up: everything that
//! is not about a guest socket is the bare system call.

use core::ffi::{c_int, c_long};

use super::guest_socket;
use crate::socket::Told;
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
            libc::SYS_close if ours => {
                // SAFETY: a plain number.
                return unsafe { super::fd::close(fd) } as c_long;
            }
            libc::SYS_read if ours => return next_here(0, fd, b, c),
            libc::SYS_write if ours => return next_here(1, fd, b, c),
            libc::SYS_socket if a as c_int == libc::AF_INET || a as c_int == libc::AF_INET6 => {
                // SAFETY: plain numbers; the symbol is this library's own or an outer one's.
                return unsafe { libc::socket(a as c_int, b as c_int, c as c_int) } as c_long;
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
