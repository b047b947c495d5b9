//! Packets of single kernel sockets, whoever holds them.
//!
//! A socket gets a mark, which the kernel keeps beside it (BPF_MAP_TYPE_SK_STORAGE) and copies to connections that a listener
//! accepts. A program at the control group of this process, to which the sockets belong that it makes, sees each packet
//! together with the socket that it is of, and passes on those of marked sockets. Addresses decide nothing: whatever ports are
//! used again by whomever, a packet of an unmarked socket cannot be among them.
//!
//! Needs CAP_BPF and CAP_NET_ADMIN (root), and control groups of version 2 somewhere in the file system.

mod program;
mod ring;
mod sys;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

pub use ring::{Packet, Ring};

/// Of packets that wait.
const RING_BYTES: usize = 32 << 20;

/// Marks sockets. Packets stop when it is dropped.
pub struct SocketTap {
    marks: OwnedFd,
    lost: OwnedFd,
    /// The program's place at the control group, inbound and outbound.
    _links: [OwnedFd; 2],
}

impl SocketTap {
    /// Begins to look on. What sockets of this process send and receive comes by the ring, once they are marked.
    pub fn start() -> io::Result<(SocketTap, Ring)> {
        let group = File::open(own_group()?)?;
        let marks = sys::socket_storage()?;
        let packets = sys::ring_buffer(RING_BYTES)?;
        let lost = sys::counter()?;
        let program = sys::load(&program::of(marks.as_fd(), packets.as_fd(), lost.as_fd()))?;
        let link = |inbound| sys::attach(program.as_fd(), group.as_fd(), inbound);
        let links = [link(true)?, link(false)?];
        let ring = Ring::map(packets, RING_BYTES)?;
        Ok((SocketTap { marks, lost, _links: links }, ring))
    }

    /// From now on, packets of this socket, and of connections that it accepts, come by the ring with `mark`.
    pub fn mark(&self, socket: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
        sys::update(self.marks.as_fd(), &socket.as_raw_fd().to_ne_bytes(), &mark.to_ne_bytes())
    }

    /// Packets for which there was no room.
    pub fn lost(&self) -> u64 {
        sys::count(self.lost.as_fd()).unwrap_or(0)
    }
}

/// The directory of this process's control group.
fn own_group() -> io::Result<PathBuf> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "no control groups of version 2 are mounted");
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).ok_or_else(missing)?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    group_in(&mounts, own).ok_or_else(missing)
}

/// Where the group `own` is in the file system (proc_pid_mountinfo(5)).
fn group_in(mounts: &str, own: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut words = mount.split(' ').skip(3);
        let (root, point) = (words.next()?, words.next()?);
        let below = own.strip_prefix(root.trim_end_matches('/'))?;
        let whole = below.is_empty() || below.starts_with('/');
        (kind.starts_with("cgroup2 ") && whole).then(|| PathBuf::from(format!("{point}{below}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_found_where_it_is_mounted() {
        let mounts = "22 1 0:20 / /proc rw - proc proc rw\n\
                      30 22 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        let path = |own: &str| group_in(mounts, own).map(|path| path.display().to_string());
        assert_eq!(path("/a/b").as_deref(), Some("/sys/fs/cgroup/unified/a/b"));
        assert_eq!(path("/").as_deref(), Some("/sys/fs/cgroup/unified/"));
        let part = "30 22 0:26 /box /cg rw - cgroup2 none rw\n";
        assert_eq!(group_in(part, "/box/in"), Some("/cg/in".into()));
        assert_eq!(group_in(part, "/boxes"), None);
        assert_eq!(group_in("30 22 0:26 / /cg rw - tmpfs cgroup2 rw\n", "/"), None);
    }
}
