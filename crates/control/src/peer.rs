//! Who is at the other end of a Unix socket.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

/// Who asks, as the kernel says (SO_PEERCRED). `pid` is 0 for a process of a PID namespace that is not seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// The process that connected (or that listens, seen from a client).
pub fn peer_of(stream: &UnixStream) -> io::Result<Peer> {
    let peer = netkernel_shm::fds::peer(stream.as_fd())?;
    Ok(Peer { pid: peer.pid, uid: peer.uid, gid: peer.gid })
}
