//! Streams (FILE) over guest sockets.

use core::ffi::{c_char, c_int, c_void};

use libc::{FILE, size_t, ssize_t};

use super::{finish, guest_socket, one};
use crate::next::next;

unsafe extern "C" {
    fn nk_c_fdopen(fd: c_int, mode: *const c_char) -> *mut FILE;
    fn nk_c_standard_stream(fd: c_int, guest: c_int);
}

/// A guest socket stands at descriptor 0, 1 or 2, or does no longer: stdin, stdout or stderr follow.
pub fn standard_stream(fd: c_int, guest: bool) {
    if (0..3).contains(&fd) {
        // SAFETY: fd names one of three streams; the old stream's lock is tried.
        unsafe { nk_c_standard_stream(fd, guest as c_int) }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdopen(fd: c_int, mode: *const c_char) -> *mut FILE {
    if guest_socket(fd).is_some() {
        // SAFETY: the program's own mode string.
        return unsafe { nk_c_fdopen(fd, mode) };
    }
    next!(fdopen(fd => c_int, mode => *const c_char) -> *mut FILE)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_stdio_read(fd: c_int, buf: *mut c_void, n: size_t) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => finish(s.receive(&one(buf, n), 0, &mut crate::socket::Told::default()).map(|r| r.0)),
        None => next!(read(fd => c_int, buf => *mut c_void, n => size_t) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_stdio_write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t {
    match guest_socket(fd) {
        Some(s) => finish(s.send(&one(buf, n), 0, &[])),
        None => next!(write(fd => c_int, buf => *const c_void, n => size_t) -> ssize_t),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_stdio_close(fd: c_int) -> c_int {
    // SAFETY: a plain number.
    unsafe { super::fd::close(fd) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_is_guest(fd: c_int) -> c_int {
    guest_socket(fd).is_some() as c_int
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_next_vdprintf(fd: c_int, format: *const c_char, list: *mut c_void) -> c_int {
    next!(vdprintf(fd => c_int, format => *const c_char, list => *mut c_void) -> c_int)
}
