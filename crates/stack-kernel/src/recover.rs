//! What the kernel knows of sockets that another process left.

use std::os::fd::RawFd;

use netkernel_service::{Errno, Progress};

use crate::stack::{ioctl_int, option};

/// TCP states of `linux/tcp.h`.
mod tcp {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const TIME_WAIT: u8 = 6;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const CLOSING: u8 = 11;
}

/// True: TCP; false: UDP. An error: something else, which no stack of ours made.
pub fn is_inet(fd: RawFd) -> Result<bool, Errno> {
    let value = |name: i32| {
        let mut out = [0; 4];
        option(fd, libc::SOL_SOCKET, name, &mut out).map(|_| i32::from_ne_bytes(out))
    };
    match (value(libc::SO_DOMAIN)?, value(libc::SO_PROTOCOL)?) {
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_TCP) => Ok(true),
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_UDP) => Ok(false),
        _ => Err(Errno(libc::EBADF)),
    }
}

pub fn connecting(fd: RawFd) -> bool {
    Info::of(fd).is_some_and(|info| matches!(info.state, tcp::SYN_SENT | tcp::SYN_RECV | tcp::ESTABLISHED))
}

/// The fields of `struct tcp_info` that matter here.
#[derive(PartialEq, Eq)]
struct Info {
    state: u8,
    bytes_acked: u64,
    bytes_received: u64,
}

impl Info {
    fn of(fd: RawFd) -> Option<Info> {
        let mut raw = [0u8; 136];
        if option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut raw).ok()? < raw.len() {
            return None;
        }
        let word = |at: usize| raw[at..at + 8].try_into().map(u64::from_ne_bytes).ok();
        Some(Info { state: raw[0], bytes_acked: word(120)?, bytes_received: word(128)? })
    }
}

/// Bytes taken: acknowledged ones and those in the queue. The acknowledged ones include the SYN of a connection that was made
/// by `connect`, both include a FIN. Bytes given: received ones, a FIN included, without those in the queue.
pub fn progress(fd: RawFd, connected: bool) -> Option<Progress> {
    if has_urgent(fd) {
        // FIONREAD stops at the mark.
        return None;
    }
    // Acknowledgements move bytes from one count to the other between two looks.
    for _ in 0..16 {
        let before = Info::of(fd)?;
        let unsent = ioctl_int(fd, libc::TIOCOUTQ).ok()? as u32;
        let unread = ioctl_int(fd, libc::FIONREAD).ok()? as u32;
        let info = Info::of(fd)?;
        if info != before {
            continue;
        }
        let fin_sent = matches!(
            info.state,
            tcp::FIN_WAIT1 | tcp::FIN_WAIT2 | tcp::CLOSING | tcp::LAST_ACK | tcp::TIME_WAIT
        );
        let fin_received =
            matches!(info.state, tcp::CLOSE_WAIT | tcp::LAST_ACK | tcp::CLOSING | tcp::TIME_WAIT);
        let sent = (info.bytes_acked as u32)
            .wrapping_add(unsent)
            .wrapping_sub(u32::from(connected))
            .wrapping_sub(u32::from(fin_sent));
        let received =
            (info.bytes_received as u32).wrapping_sub(u32::from(fin_received)).wrapping_sub(unread);
        return Some(Progress {
            sent: (info.state != tcp::CLOSE).then_some(sent),
            received,
            or_one_less: info.state == tcp::CLOSE,
        });
    }
    None
}

/// Whether urgent data waits that nobody has asked for yet.
fn has_urgent(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLPRI, revents: 0 };
    // SAFETY: one entry, valid for reads and writes.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 && poll.revents & libc::POLLPRI != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsRawFd as _;

    #[test]
    fn counts_are_exact_on_both_sides_and_through_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let counts = |stream: &TcpStream, connected| {
            let p = progress(stream.as_raw_fd(), connected).unwrap();
            (p.sent, p.received)
        };
        assert_eq!(counts(&client, true), (Some(0), 0));
        assert_eq!(counts(&server, false), (Some(0), 0));
        client.write_all(&[1; 5000]).unwrap();
        server.write_all(&[2; 300]).unwrap();
        assert_eq!(counts(&client, true).0, Some(5000));
        server.read_exact(&mut [0; 1200]).unwrap();
        client.read_exact(&mut [0; 299]).unwrap();
        assert_eq!(counts(&server, false), (Some(300), 1200));
        assert_eq!(counts(&client, true), (Some(5000), 299));
        client.shutdown(Shutdown::Write).unwrap();
        server.read_exact(&mut [0; 3800]).unwrap();
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
        assert_eq!(counts(&client, true), (Some(5000), 299));
        assert_eq!(counts(&server, false), (Some(300), 5000));
        server.shutdown(Shutdown::Write).unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        // The socket is no more, and with it the knowledge whether a FIN is counted.
        let over = progress(client.as_raw_fd(), true).unwrap();
        assert_eq!((over.sent, over.received, over.or_one_less), (None, 301, true));
    }

    #[test]
    fn nothing_is_known_while_urgent_data_waits() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        // SAFETY: three bytes, valid for reads.
        assert_eq!(unsafe { libc::send(client.as_raw_fd(), c"abc".as_ptr().cast(), 3, libc::MSG_OOB) }, 3);
        assert_eq!(progress(server.as_raw_fd(), false), None);
        assert_eq!(progress(client.as_raw_fd(), true).unwrap().sent, Some(3));
    }
}
