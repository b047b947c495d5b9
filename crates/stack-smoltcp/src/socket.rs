//! One socket, and how addresses of programs become addresses of packets.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use netkernel_service::{Errno, SocketAddress};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{IpAddress, IpEndpoint};

use crate::options::{Options, Wait};

/// What a socket waits for: set when an operation could not go on, cleared by the report.
pub const WANTS_READ: u8 = 1;
pub const WANTS_WRITE: u8 = 2;

/// Who holds the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Guest,
    /// Not accepted yet: the listener's index.
    Listener(u32),
    /// Closed by its guest; what was sent is still delivered. Nanoseconds when that ends.
    Nobody(u64),
}

#[derive(Debug)]
pub enum Body {
    /// A stream socket that is neither connected nor listening.
    Idle,
    Listener {
        backlog: usize,
        /// Complete connections, oldest first.
        queue: VecDeque<u32>,
        /// Connections that are not complete, among the sockets whose owner is this one.
        half_open: usize,
    },
    Stream(Stream),
    Datagram {
        socket: SocketHandle,
        peer: Option<IpEndpoint>,
    },
}

#[derive(Debug)]
pub struct Stream {
    pub socket: SocketHandle,
    pub local: IpEndpoint,
    pub remote: IpEndpoint,
    /// SYN was sent or received, and the handshake is not over.
    pub opening: bool,
    /// The state that was seen last.
    pub last: State,
    pub reset: bool,
    pub told_end: bool,
    pub closed_write: bool,
    pub closed_read: bool,
    /// When the connect was begun, nanoseconds.
    pub begun_ns: u64,
    /// When a segment of the peer came last, nanoseconds.
    pub heard_ns: u64,
    /// Since when something of ours is not acknowledged, nanoseconds.
    pub waits_ns: Option<u64>,
    /// The connection is over; the reason stood in `error`.
    pub over: bool,
}

impl Stream {
    /// When the peer's silence ends the connection, nanoseconds; `None`: never.
    pub fn silence_ends_ns(&self, options: &Options) -> Option<u64> {
        let (wait, since) = match self.waits_ns {
            _ if self.over => return None,
            _ if self.opening => (Wait::Connect, self.begun_ns),
            Some(waits) => (Wait::Acknowledgement, waits.max(self.heard_ns)),
            None => (Wait::Idle, self.heard_ns),
        };
        options.patience_ns(wait).map(|patience| since.saturating_add(patience))
    }
}

/// What a socket is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// `None`: any address of the families below.
    pub address: Option<IpAddress>,
    pub v4: bool,
    pub v6: bool,
    pub port: u16,
}

impl Bound {
    pub fn overlaps(&self, other: &Bound) -> bool {
        self.port == other.port
            && (self.v4 && other.v4 || self.v6 && other.v6)
            && (self.address.is_none() || other.address.is_none() || self.address == other.address)
    }

    pub fn takes(&self, to: IpEndpoint) -> bool {
        let family = match to.addr {
            IpAddress::Ipv4(_) => self.v4,
            IpAddress::Ipv6(_) => self.v6,
        };
        self.port == to.port && family && self.address.is_none_or(|address| address == to.addr)
    }
}

#[derive(Debug)]
pub struct Socket {
    pub key: u64,
    pub owner: Owner,
    pub v6: bool,
    pub body: Body,
    pub bound: Option<Bound>,
    /// The program chose the port: it outlives an association, as on Linux.
    pub chosen: bool,
    pub options: Options,
    /// Pending error, 0: none.
    pub error: i32,
    pub wants: u8,
}

impl Socket {
    pub fn stream(&mut self) -> Option<&mut Stream> {
        if let Body::Stream(stream) = &mut self.body { Some(stream) } else { None }
    }

    pub fn is_stream(&self) -> bool {
        !matches!(self.body, Body::Datagram { .. })
    }

    pub fn take_error(&mut self) -> Result<(), Errno> {
        match std::mem::take(&mut self.error) {
            0 => Ok(()),
            errno => Err(Errno(errno)),
        }
    }

    /// The address and port that a program gave; `None` for the unspecified address.
    pub fn parse(&self, address: &SocketAddress) -> Result<(Option<IpAddress>, u16), Errno> {
        let bytes = address.as_bytes();
        let (family, least) = if self.v6 { (libc::AF_INET6, 24) } else { (libc::AF_INET, 16) };
        if bytes.len() < least.min(16) {
            return Err(Errno(libc::EINVAL));
        }
        if address.family() != family as u16 {
            return Err(Errno(libc::EAFNOSUPPORT));
        }
        if bytes.len() < least {
            return Err(Errno(libc::EINVAL));
        }
        let address = address.to_std().ok_or(Errno(libc::EINVAL))?;
        // A mapped address stays one: that it is of IPv4 matters even where it is the unspecified one.
        let ip = address.ip().to_canonical();
        Ok(((!ip.is_unspecified()).then(|| ip.into()), address.port()))
    }

    /// As the program reads it: an IPv6 socket sees IPv4 addresses mapped.
    pub fn name(&self, address: Option<IpAddress>, port: u16) -> SocketAddress {
        let ip = match (address, self.v6) {
            (Some(IpAddress::Ipv4(v4)), true) => IpAddr::V6(v4.to_ipv6_mapped()),
            (Some(address), _) => address.into(),
            (None, true) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
            (None, false) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        };
        SocketAddr::new(ip, port).into()
    }

    /// What this socket would be bound to.
    pub fn binding(&self, address: Option<IpAddress>, port: u16) -> Bound {
        let (v4, v6) = match address {
            Some(IpAddress::Ipv4(_)) => (true, false),
            Some(IpAddress::Ipv6(_)) => (false, true),
            None => (!self.v6 || !self.options.v6_only, self.v6),
        };
        Bound { address, v4, v6, port }
    }
}
