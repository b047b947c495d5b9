//! Descriptors that guests sent and that the engine does not want.
//!
//! The last close of a TCP socket waits for its unsent bytes when SO_LINGER says so, for as long as its owner wished. So a
//! switch thread never closes what could be one, nor a Unix socket in whose queue one could be on its way.

use std::os::fd::{AsRawFd as _, OwnedFd};

/// Has a thread of its own drop it.
pub(crate) fn bury<T: Send + 'static>(what: T) {
    // Without a thread nothing is left but to close it here: the closure is dropped with the error.
    let _ = std::thread::Builder::new().name("nk-bury".into()).stack_size(64 << 10).spawn(move || drop(what));
}

/// Nobody can send into this end of a pair any more (EPIPE), and nothing waits in it. Sending out of it goes on.
pub(crate) fn stays_empty(end: &OwnedFd) -> bool {
    let mut waiting = 0i32;
    // SAFETY: plain system calls on an open descriptor; the value is valid for writes.
    let (shut, asked) = unsafe {
        (
            libc::shutdown(end.as_raw_fd(), libc::SHUT_RD),
            libc::ioctl(end.as_raw_fd(), libc::FIONREAD, &raw mut waiting),
        )
    };
    // ENOTCONN: the other end is closed already; what it had sent waits here still.
    (shut == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOTCONN))
        && asked == 0
        && waiting == 0
}
