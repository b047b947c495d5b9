//! Which processes belong to a guest, and the INET sockets that they hold.
//!
//! The agent keeps no duplicate of a socket that it injects: the last close must be the program's. So sockets are found
//! by looking: descriptors under /proc/PID/fd give inodes, and the kernel's sock_diag (sock_diag(7), in the module's
//! namespace) gives for each inode its addresses, state and TCP_INFO counters. It costs about 10 us for each process and
//! nothing at all while nobody asks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::{Carried, TcpInfo};

/// One INET socket of a guest that is the kernel's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DirectSocket {
    pub pid: u32,
    pub fd: u32,
    pub inode: u64,
    /// The kernel's own name for it (SO_COOKIE).
    pub cookie: u64,
    /// `stream`, `datagram`, `listener`.
    pub kind: &'static str,
    pub state: &'static str,
    pub local: Option<String>,
    pub peer: Option<String>,
    pub congestion_control: Option<String>,
    /// TCP_INFO's tcpi_bytes_received and tcpi_bytes_acked.
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub unread_bytes: u32,
    pub unsent_bytes: u32,
    /// Of a listener: connections that wait to be accepted, and how many may.
    pub waiting: u32,
    pub backlog: u32,
    pub tcp: Option<TcpInfo>,
}

/// The processes of this host at one time, and who descends from whom.
#[derive(Debug, Default)]
pub struct Processes {
    children: HashMap<u32, Vec<u32>>,
    alive: BTreeSet<u32>,
}

impl Processes {
    pub fn look() -> Processes {
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        let mut alive = BTreeSet::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            alive.insert(pid);
            if let Some(parent) = parent(pid) {
                children.entry(parent).or_default().push(pid);
            }
        }
        Processes { children, alive }
    }

    /// `known` and all that descend from them.
    pub fn of(&self, known: impl IntoIterator<Item = u32>) -> Census {
        let mut processes = BTreeSet::new();
        // A thread that asked may be any thread of its process.
        let leader = |pid| leader(pid).filter(|pid| self.alive.contains(pid));
        let mut open: Vec<u32> = known.into_iter().filter_map(leader).collect();
        while let Some(pid) = open.pop() {
            if processes.insert(pid) {
                open.extend(self.children.get(&pid).into_iter().flatten());
            }
        }
        Census { processes }
    }
}

/// The processes of a guest.
#[derive(Debug, Default)]
pub struct Census {
    pub processes: BTreeSet<u32>,
}

impl Census {
    /// `known` and all that descend from them.
    pub fn of(known: impl IntoIterator<Item = u32>) -> Census {
        Processes::look().of(known)
    }

    /// Inodes of the sockets that the processes hold, each with its first holder's pid and descriptor.
    pub fn inodes(&self) -> BTreeMap<u64, (u32, u32)> {
        let mut found = BTreeMap::new();
        for &pid in &self.processes {
            for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                let Ok(target) = std::fs::read_link(entry.path()) else { continue };
                let inode =
                    target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
                let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
                if let (Some(inode), Some(number)) = (inode, number) {
                    found.entry(inode).or_insert((pid, number));
                }
            }
        }
        found
    }

    /// The INET sockets of the processes, as far as they are in the calling thread's network namespace.
    pub fn sockets(&self) -> io::Result<Vec<DirectSocket>> {
        let inodes = self.inodes();
        let mut sockets = Vec::new();
        for (protocol, kind) in [(libc::IPPROTO_TCP, "stream"), (libc::IPPROTO_UDP, "datagram")] {
            for family in [libc::AF_INET, libc::AF_INET6] {
                dump(family as u8, protocol as u8, |inode, mut socket| {
                    if let Some(&(pid, fd)) = inodes.get(&inode) {
                        (socket.pid, socket.fd) = (pid, fd);
                        socket.kind = if socket.state == "listening" { "listener" } else { kind };
                        sockets.push(socket);
                    }
                })?;
            }
        }
        sockets.sort_by_key(|socket| (socket.pid, socket.fd));
        Ok(sockets)
    }
}

/// What a process calls itself; it may be anything.
pub fn process_name(pid: u32) -> Option<String> {
    let name = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end().into())
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state and parent.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

pub(crate) fn leader(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

// ---- sock_diag (kernel: include/uapi/linux/inet_diag.h)

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_CONG: u16 = 4;
const HEADER: usize = 16;
/// struct inet_diag_req_v2 and struct inet_diag_msg.
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// idiag_cookie in struct inet_diag_msg.
const COOKIE: usize = 44;
/// idiag_inode.
const INODE: usize = 68;
/// tcpi_rcv_mss in struct tcp_info.
const RECEIVED_SEGMENT: usize = 20;
/// tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info.
const BYTES_ACKED: usize = 120;
const BYTES_RECEIVED: usize = 128;

/// States of TCP as bits.
const LISTEN: u32 = 1 << 10;

/// A TCP socket as the ledger sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub cookie: u64,
    pub inode: u64,
    pub local: SocketAddr,
    /// `None`: a listener, or not connected.
    pub peer: Option<SocketAddr>,
    /// Of the segments that it gets.
    pub segment_bytes: u32,
    pub carried: Carried,
}

/// All TCP sockets with a name in the calling thread's network namespace.
pub(crate) fn connections() -> io::Result<Vec<Seen>> {
    seen(libc::IPPROTO_TCP, u32::MAX)
}

pub(crate) fn listeners() -> io::Result<Vec<Seen>> {
    seen(libc::IPPROTO_TCP, LISTEN)
}

/// All UDP sockets with a name in the calling thread's network namespace.
pub(crate) fn datagrams() -> io::Result<Vec<Seen>> {
    seen(libc::IPPROTO_UDP, u32::MAX)
}

/// The cookie of a TCP connection of the calling thread's network namespace. Errors: ENOENT, there is none.
pub(crate) fn find(local: SocketAddr, peer: SocketAddr) -> io::Result<u64> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut found = 0;
    ask(family as u8, libc::IPPROTO_TCP as u8, u32::MAX, Some((local, peer)), |message| {
        found = u64_at(message, COOKIE);
    })?;
    Ok(found)
}

fn seen(protocol: i32, states: u32) -> io::Result<Vec<Seen>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        request(family as u8, protocol as u8, states, |message| all.extend(see(message)))?;
    }
    Ok(all)
}

/// What stands in messages that came without being asked for.
pub(crate) fn messages(mut rest: &[u8], mut each: impl FnMut(Seen)) {
    while rest.len() >= HEADER {
        let length = (u32_at(rest, 0) as usize).clamp(HEADER, rest.len());
        if u16_at(rest, 4) == SOCK_DIAG_BY_FAMILY && length >= HEADER + MESSAGE {
            see(&rest[HEADER..length]).map(&mut each);
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
}

fn see(message: &[u8]) -> Option<Seen> {
    let (local, peer) = names(message);
    let mut seen = Seen {
        cookie: u64_at(message, COOKIE),
        inode: u64::from(u32_at(message, INODE)),
        local,
        peer: (peer.port() != 0).then_some(peer),
        segment_bytes: 0,
        carried: Carried::default(),
    };
    attributes(message, |kind, value| {
        if kind == INET_DIAG_INFO
            && let Some(tcp) = TcpInfo::parse(value)
        {
            seen.segment_bytes = u32_at(value, RECEIVED_SEGMENT);
            seen.carried = Carried {
                bytes_in: tcp.bytes_received,
                bytes_out: tcp.bytes_sent.saturating_sub(tcp.bytes_retransmitted),
                connections: u64::from(seen.peer.is_some()),
                segments: u64::from(tcp.segments_out),
                retransmitted: u64::from(tcp.retransmitted),
                rtt_us: u64::from(tcp.rtt_us),
                rtt_samples: u64::from(tcp.rtt_us > 0),
            };
        }
    });
    // The kernel's own, or a time wait: no socket of a program.
    (seen.cookie != 0).then_some(seen)
}

/// Behind struct inet_diag_msg.
fn attributes(message: &[u8], mut each: impl FnMut(u16, &[u8])) {
    let mut rest = &message[MESSAGE..];
    while rest.len() >= 4 {
        let length = usize::from(u16_at(rest, 0)).clamp(4, rest.len());
        each(u16_at(rest, 2), &rest[4..length]);
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
}

/// Local and peer; port 0: none.
fn names(message: &[u8]) -> (SocketAddr, SocketAddr) {
    let port = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let name = |port: u16, at: usize| {
        if i32::from(message[0]) == libc::AF_INET {
            let bytes: [u8; 4] = message[at..at + 4].try_into().unwrap_or_default();
            SocketAddr::new(Ipv4Addr::from(bytes).into(), port)
        } else {
            let bytes: [u8; 16] = message[at..at + 16].try_into().unwrap_or_default();
            SocketAddr::new(Ipv6Addr::from(bytes).into(), port)
        }
    };
    (name(port(4), 8), name(port(6), 24))
}

fn dump(family: u8, protocol: u8, mut each: impl FnMut(u64, DirectSocket)) -> io::Result<()> {
    request(family, protocol, u32::MAX, |message| {
        let (inode, socket) = parse(message, protocol);
        each(inode, socket);
    })
}

/// Asks for all sockets in these states, and gives each message.
fn request(family: u8, protocol: u8, states: u32, each: impl FnMut(&[u8])) -> io::Result<()> {
    ask(family, protocol, states, None, each)
}

/// Of all sockets, or of the connection of two names.
fn ask(
    family: u8,
    protocol: u8,
    states: u32,
    one: Option<(SocketAddr, SocketAddr)>,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    // SAFETY: takes integers; the result is checked.
    let fd = unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut request = Vec::with_capacity(HEADER + REQUEST);
    request.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    // One is answered by one message, and then acknowledged.
    let how = if one.is_some() { libc::NLM_F_ACK } else { libc::NLM_F_DUMP };
    request.extend(((libc::NLM_F_REQUEST | how) as u16).to_ne_bytes());
    request.extend([0; 8]);
    let wanted = 1 << (INET_DIAG_INFO - 1) | 1 << (INET_DIAG_CONG - 1);
    request.extend([family, protocol, wanted, 0]);
    request.extend(states.to_ne_bytes());
    if let Some((local, peer)) = one {
        request.extend([local.port(), peer.port()].map(u16::to_be_bytes).concat());
        for address in [local.ip(), peer.ip()] {
            let mut bytes = [0; 16];
            match address {
                IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => bytes = address.octets(),
            }
            request.extend(bytes);
        }
        // Any interface; whatever its cookie is.
        request.extend([0; 4]);
        request.extend([0xff; 8]);
    }
    request.resize(HEADER + REQUEST, 0);
    // SAFETY: the bytes are valid for reads of their length.
    let sent = unsafe { libc::send(fd.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        // SAFETY: the buffer is valid for writes of its length.
        let n = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if n < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        let mut rest = &buffer[..n as usize];
        if rest.is_empty() {
            return Ok(());
        }
        while rest.len() >= HEADER {
            let length = (u32_at(rest, 0) as usize).clamp(HEADER, rest.len());
            match u16_at(rest, 4) {
                3 => return Ok(()),
                2 => {
                    let errno = -(u32_at(rest, HEADER) as i32);
                    return if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) };
                }
                SOCK_DIAG_BY_FAMILY if length >= HEADER + MESSAGE => {
                    each(&rest[HEADER..length]);
                }
                _ => {}
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}

fn parse(message: &[u8], protocol: u8) -> (u64, DirectSocket) {
    let state = message[1];
    let (local, peer) = names(message);
    let inode = u64::from(u32_at(message, INODE));
    let listening = state == 10;
    let mut socket = DirectSocket {
        inode,
        cookie: u64_at(message, COOKIE),
        state: match state {
            1 if protocol == libc::IPPROTO_UDP as u8 => "connected",
            7 if protocol == libc::IPPROTO_UDP as u8 => "open",
            1 => "connected",
            2 | 3 => "connecting",
            4 | 5 => "sending ended",
            8 => "receiving ended",
            9 | 11 | 6 => "ending",
            10 => "listening",
            _ => "closed",
        },
        local: (local.port() != 0).then(|| local.to_string()),
        peer: (peer.port() != 0).then(|| peer.to_string()),
        waiting: if listening { u32_at(message, 56) } else { 0 },
        backlog: if listening { u32_at(message, 60) } else { 0 },
        unread_bytes: if listening { 0 } else { u32_at(message, 56) },
        unsent_bytes: if listening { 0 } else { u32_at(message, 60) },
        ..DirectSocket::default()
    };
    let mut rest = &message[MESSAGE..];
    while rest.len() >= 4 {
        let length = usize::from(u16_at(rest, 0)).clamp(4, rest.len());
        let value = &rest[4..length];
        match u16_at(rest, 2) {
            INET_DIAG_INFO => {
                socket.bytes_out = u64_at(value, BYTES_ACKED);
                socket.bytes_in = u64_at(value, BYTES_RECEIVED);
                if protocol == libc::IPPROTO_TCP as u8 {
                    socket.tcp = TcpInfo::parse(value);
                }
            }
            INET_DIAG_CONG => {
                let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
                socket.congestion_control = Some(String::from_utf8_lossy(&value[..end]).into_owned());
            }
            _ => {}
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    (inode, socket)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn the_sockets_of_this_process_are_found_with_what_they_carried() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let udp = std::net::UdpSocket::bind("[::1]:0").unwrap();
        client.write_all(&[7; 1000]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();

        let census = Census::of([std::process::id()]);
        assert!(census.processes.contains(&std::process::id()));
        let sockets = census.sockets().unwrap();
        let of = |fd: i32| sockets.iter().find(|s| s.fd == fd as u32).unwrap();
        let found = of(server.as_raw_fd());
        assert_eq!((found.kind, found.state, found.bytes_in), ("stream", "connected", 1000));
        assert_eq!(found.peer, Some(client.local_addr().unwrap().to_string()));
        assert!(found.congestion_control.is_some());
        let found = of(listener.as_raw_fd());
        assert_eq!((found.kind, found.peer.as_deref()), ("listener", None));
        let found = of(udp.as_raw_fd());
        assert_eq!((found.kind, &found.local), ("datagram", &Some(udp.local_addr().unwrap().to_string())));
    }
}
