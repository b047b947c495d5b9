//! The most that a connection lets its peer send ahead (TCP_WINDOW_CLAMP).

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

/// Bytes. Errors: no socket of TCP.
pub fn window(socket: &OwnedFd) -> io::Result<u32> {
    let (mut bytes, mut length) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the value and its length are valid for writes.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_WINDOW_CLAMP,
            (&raw mut bytes).cast(),
            &mut length,
        )
    };
    if r == 0 { Ok(bytes.max(0) as u32) } else { Err(io::Error::last_os_error()) }
}

/// What the peer may send already, it may send.
pub fn set_window(socket: &OwnedFd, bytes: u32) -> io::Result<()> {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    // SAFETY: the option's value is an int, valid for reads.
    let r = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_WINDOW_CLAMP,
            (&raw const bytes).cast(),
            size_of::<i32>() as u32,
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
