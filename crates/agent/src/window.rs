//! How much a connection lets its peer send ahead.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

/// Linux 5.15 (include/uapi/asm-generic/socket.h).
const SO_BUF_LOCK: i32 = 72;
/// SOCK_RCVBUF_LOCK: the receive buffer, and the window with it, does not grow by itself.
const RECEIVE_BUFFER: i32 = 2;

/// What bounds the window of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Bytes (TCP_WINDOW_CLAMP).
    pub window: u32,
    /// Which buffers do not grow by themselves (SO_BUF_LOCK).
    locks: i32,
}

impl Ahead {
    /// Errors: no socket of TCP.
    pub fn of(socket: &OwnedFd) -> io::Result<Ahead> {
        let window = option(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP)?.max(0) as u32;
        // An older kernel has no such option; nothing is restored there.
        let locks = option(socket, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
        Ok(Ahead { window, locks })
    }

    /// As of a new socket.
    pub fn open() -> Ahead {
        Ahead { window: 1 << 30, locks: 0 }
    }

    /// No more than this, which stays so.
    pub fn bounded(self, window: u32) -> Ahead {
        Ahead { window, locks: self.locks | RECEIVE_BUFFER }
    }

    /// From now on: what the peer may send already, it may send.
    pub fn apply(self, socket: &OwnedFd) -> io::Result<()> {
        let _ = set(socket, libc::SOL_SOCKET, SO_BUF_LOCK, self.locks);
        let window = i32::try_from(self.window).unwrap_or(i32::MAX);
        set(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, window)
    }
}

fn option(socket: &OwnedFd, level: i32, name: i32) -> io::Result<i32> {
    let (mut value, mut length) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the value and its length are valid for writes.
    let r =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &mut length) };
    if r == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

fn set(socket: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option's value is an int, valid for reads.
    let r = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size_of::<i32>() as u32)
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_bound_holds_and_is_lifted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = OwnedFd::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let before = Ahead::of(&socket).unwrap();
        before.bounded(100_000).apply(&socket).unwrap();
        assert_eq!(Ahead::of(&socket).unwrap(), Ahead { window: 100_000, locks: RECEIVE_BUFFER });
        before.apply(&socket).unwrap();
        assert_eq!(Ahead::of(&socket).unwrap(), before);
    }
}
