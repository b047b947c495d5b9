//! What a network stack must do to serve guests.

use std::os::fd::{OwnedFd, RawFd};

use crate::{Segments, SocketAddress};

/// A positive Linux errno. Guests see it unchanged, so that it must be the one that Linux would give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    pub const AGAIN: Errno = Errno(libc::EAGAIN);

    /// True when the operation would have to wait.
    pub fn would_block(self) -> bool {
        self.0 == libc::EAGAIN || self.0 == libc::EWOULDBLOCK
    }

    /// The host lacks something that may come back: descriptors or memory.
    pub fn is_shortage(self) -> bool {
        matches!(self.0, libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
    }
}

/// The stack's own name for a socket: an index that it chose, below 2^24, so that no operation needs a look-up by key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle(pub u32);

impl Handle {
    /// No socket.
    pub const NONE: Handle = Handle(u32::MAX);
}

impl Default for Handle {
    fn default() -> Self {
        Handle::NONE
    }
}

/// The key of a guest's socket: what a stack reports readiness with.
pub const fn key(guest: u32, socket: u32) -> u64 {
    (guest as u64) << 32 | socket as u64
}

/// In the lower half of a key: the socket is not ServiceLib's, but of somebody who drives the stack by its calls alone (a
/// guest's relay). Regions have fewer sockets than this.
pub const RELAYED: u32 = 1 << 31;

/// What changed. All of it is a hint: the operation that follows tells the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Readiness(pub u8);

impl Readiness {
    /// Bytes, a datagram or a connection can be had, or the end of the stream.
    pub const READ: Readiness = Readiness(1);
    /// Room to send again; or a connect that was begun has ended.
    pub const WRITE: Readiness = Readiness(2);
    /// The peer ended its direction (READ comes with it).
    pub const END: Readiness = Readiness(4);
    /// The connection is over, or a connect failed.
    pub const ERROR: Readiness = Readiness(8);
    /// Urgent data.
    pub const URGENT: Readiness = Readiness(16);

    pub fn has(self, other: Readiness) -> bool {
        self.0 & other.0 != 0
    }
}

impl std::ops::BitOr for Readiness {
    type Output = Readiness;
    fn bitor(self, other: Readiness) -> Readiness {
        Readiness(self.0 | other.0)
    }
}

/// One report of [`Stack::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    pub key: u64,
    pub readiness: Readiness,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// Connected at once (datagram sockets are).
    Done,
    /// Begun; a report of WRITE or ERROR says that it ended, [`Stack::take_error`] how.
    Begun,
}

#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    pub handle: Handle,
    pub peer: SocketAddress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// 0: the end of the stream.
    pub bytes: usize,
    /// There may be more: ask again without waiting for a report.
    pub more: bool,
}

/// What [`Stack::peek`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peeked {
    Bytes(Received),
    /// Nothing more, but the end of the stream.
    End,
    Nothing,
    /// What [`Stack::recv`] would have failed with; it is told once.
    Failed(Errno),
    /// Only [`Stack::recv`] tells: a stack without this, or one that needs its room.
    Unable,
}

#[derive(Clone, Copy, Debug)]
pub struct ReceivedDatagram {
    /// Bytes that were written; what did not fit is lost.
    pub bytes: usize,
    /// Sender, empty when not known.
    pub from: SocketAddress,
    /// Bytes of control messages that were written.
    pub control: usize,
}

/// Takes a received datagram: payload, sender, control messages.
pub type TakeDatagram<'a> = dyn FnMut(&[u8], SocketAddress, &[u8]) + 'a;

/// One datagram to send.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    pub data: Segments,
    /// Empty: to the connected peer.
    pub to: SocketAddress,
    /// Control messages, checked: none needs a privilege.
    pub control: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SendFlags {
    /// More will follow soon (MSG_MORE).
    pub more: bool,
    /// The last byte is urgent (MSG_OOB).
    pub urgent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    Read,
    Write,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// As `close` with nothing unread: what was sent is delivered in the background, then FIN.
    Graceful,
    /// RST; what was not delivered is dropped.
    Abort,
}

/// A connection whose payload the two guests move themselves, through memory that both map (`netkernel_abi::pair`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paired {
    /// Number of the memory, and where in it the connection stands.
    pub memory: u32,
    pub slot: u32,
    /// Which end this is.
    pub end: u32,
    /// Nothing follows what stands in the memory.
    pub ended: bool,
    /// Since the other end closed or shut down writing, not by an error.
    pub in_order: bool,
    /// Nobody will read what is written.
    pub peer_closed: bool,
    /// Payload so far, as the guests say.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Bytes that this end's guest has not read.
    pub unread: u32,
    /// Bytes of this end that its peer has not read.
    pub unsent: u32,
}

/// Whose a guest is, and what it may.
#[derive(Clone, Debug)]
pub struct Member {
    /// Which of the engine's tenants; `None`: of none that the configuration names.
    pub tenant: Option<u32>,
    /// Its name, whether or not the configuration names it.
    pub name: std::sync::Arc<str>,
    pub limits: crate::Limits,
    /// Captures of what it sends and receives that are under way: nothing may go past the engine meanwhile that need not.
    pub captures: std::sync::Arc<std::sync::atomic::AtomicU32>,
}

/// How far a connection came, for [`Stack::progress`]. Counts of payload bytes since it began, modulo 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Taken by [`Stack::send`]. `None`: nothing can be sent any more.
    pub sent: Option<u32>,
    /// Given by [`Stack::recv`].
    pub received: u32,
    /// `received` may be one too many.
    pub or_one_less: bool,
}

/// A network stack, as a module sees it: sockets that never block.
///
/// One value belongs to one switch thread and is only called by it. It serves the sockets of many guests.
///
/// **Readiness is edge-triggered.** A stack reports a socket once when it becomes ready, by the key that it was told in
/// [`open`](Stack::open) or [`accept`](Stack::accept), and again only after an operation said that it would block, or
/// fell short ([`Received::more`] false, [`send`](Stack::send) with less than it was given). Reports are hints: more of
/// them than needed do no harm, also reports of sockets that were closed meanwhile.
///
/// **Payload is guest memory.** [`Segments`] are runs of memory that the guest can write at any time. Hand them to the
/// system or copy them; decide nothing by what stands in them. They are valid during the call only, unless it says otherwise.
///
/// **Errors are Linux's.** What an operation returns reaches the program as errno.
///
/// Operations on a handle that the stack did not give out, or that was closed, do not happen.
///
/// (For whoever adds a method with a default: [`Observed`](crate::Observed) must pass it on.)
pub trait Stack: Send {
    /// A new socket. `domain`: AF_INET or AF_INET6; `kind`: SOCK_STREAM or SOCK_DGRAM; `protocol`: 0 or the kind's own.
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno>;

    /// Ends a socket in any state; the handle is free afterwards.
    fn close(&mut self, handle: Handle, how: Close);

    /// Gives the socket away, whatever state it is in; the handle is free afterwards. EOPNOTSUPP: the stack's sockets are not
    /// the kernel's.
    fn give(&mut self, _handle: Handle) -> Result<OwnedFd, Errno> {
        Err(Errno(libc::EOPNOTSUPP))
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno>;

    /// Also changes the backlog of a socket that listens.
    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno>;

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno>;

    /// Dissolves the association of a datagram socket (connect to AF_UNSPEC). A stream socket is reset and as new.
    /// [`shutdown`](Stack::shutdown) of reading while a connect is under way does the same, as on Linux.
    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno>;

    /// Takes the oldest complete connection of a listener; `key` is the new socket's. EAGAIN: there is none.
    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno>;

    /// True when [`accept`](Stack::accept) would find a connection.
    fn acceptable(&mut self, listener: Handle) -> bool;

    /// Sends stream bytes; says how many were taken. A stack that keeps bytes must copy them. What was not taken stays mapped
    /// until the next `send`, [`disconnect`](Stack::disconnect) or [`close`](Stack::close) of this handle, and is offered again first,
    /// though perhaps less of it, and less than was taken meanwhile.
    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno>;

    /// Receives stream bytes, at most `into.len()`, which is not 0.
    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno>;

    /// As [`recv`](Stack::recv), but the bytes stay in the stack's socket, and the first `skip` of them are left out. Only for
    /// stacks that [give](Stack::give) sockets away: what was peeked at can go with the socket.
    fn peek(&mut self, _handle: Handle, _skip: usize, _into: &Segments) -> Peeked {
        Peeked::Unable
    }

    /// Takes bytes out that were peeked at. An error: they were not there.
    fn discard(&mut self, _handle: Handle, _bytes: usize) -> Result<(), Errno> {
        Err(Errno(libc::EOPNOTSUPP))
    }

    /// True when the next byte that [`recv`](Stack::recv) would give is the one after the urgent byte.
    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno>;

    /// Takes the urgent byte. EAGAIN: it has not arrived yet; EINVAL: there is none.
    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno>;

    /// Sends datagrams in order; says how many. An error is the first datagram's (nothing was sent then).
    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno>;

    /// Receives one datagram, and into `control` the control messages that the socket's options ask for.
    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno>;

    /// Receives small datagrams, at most `most`: gives each with its sender and control messages to `take`. Less than `most`:
    /// no more wait. Datagrams of any size must be taken whole, but the service asks for this when they were small lately,
    /// because one system call for several is worth a copy then.
    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno>;

    /// Takes the oldest message of the error queue: what was sent, to whom, and as control message the error (IP_RECVERR).
    /// EAGAIN: there is none.
    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno>;

    /// Bytes of the next datagram that waits, 0 when none does.
    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno>;

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno>;

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno>;

    /// Writes the option's value to `out`; says how many bytes.
    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno>;

    /// The value of an ioctl request that has one (SIOCOUTQ, ...).
    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno>;

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno>;

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno>;

    /// Takes the pending error of a socket (SO_ERROR); `Ok` when there is none.
    fn take_error(&mut self, handle: Handle) -> Result<(), Errno>;

    /// The kernel's descriptor of a stream socket, if there is one and its bytes need not pass [`recv`](Stack::recv) and
    /// [`send`](Stack::send) now: for who moves them without a copy (splice). It never blocks, and is asked for each time.
    fn descriptor(&self, _handle: Handle) -> Option<RawFd> {
        None
    }

    /// Bytes that were received from and sent to a [`descriptor`](Stack::descriptor).
    fn moved(&mut self, _received: u64, _sent: u64) {}

    /// Appends what became ready since the last call, at most `budget` reports. Must be cheap: it is called every turn.
    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize);

    /// A descriptor that is readable while [`poll`](Stack::poll) has something to report; the engine sleeps on it.
    /// `None`: only polling tells (see [`deadline_ns`](Stack::deadline_ns)).
    fn wake_fd(&self) -> Option<RawFd>;

    /// Whether [`wake_fd`](Stack::wake_fd) tells of everything at once, also of what calls of this thread made ready: then `poll` need not be
    /// called before it does.
    fn wakes_always(&self) -> bool {
        false
    }

    /// Whether a connect that was begun is over, when `readiness` (WRITE or ERROR, or both) was reported of the socket. `Ok(false)`: not yet. An
    /// error is that of the connect, and taken.
    fn connected(&mut self, handle: Handle, _readiness: Readiness) -> Result<bool, Errno> {
        self.take_error(handle)?;
        Ok(self.peer_name(handle).is_ok())
    }

    /// A guest comes, before its first socket: the upper half of its sockets' keys, and whose it is.
    fn guest(&mut self, _guest: u32, _owner: u32) {}

    /// More of a guest that came ([`guest`](Stack::guest)). Only guests with this may have pairs.
    fn member(&mut self, _guest: u32, _member: Member) {}

    /// A guest is over, all its sockets are closed.
    fn guest_over(&mut self, _guest: u32) {}

    /// For a connection that is established: whether the guests move its payload themselves, and how it is. `recv` and `send`
    /// are not called then; reports say that the answer here may have changed, or that the other end calls (READ, WRITE, URGENT).
    fn paired(&mut self, _handle: Handle) -> Option<Paired> {
        None
    }

    /// Reports to the other end of a pair, whose guest may sleep. If that is closed: what was written to it is a reset.
    fn wake_peer(&mut self, _handle: Handle, _urgent: bool) {}

    /// A descriptor of a memory in which a guest has pairs.
    fn pair_memory(&mut self, _guest: u32, _number: u32) -> Option<OwnedFd> {
        None
    }

    /// Which way a socket's payload goes, and why; for people. `None`: this stack has one way only.
    fn way(&mut self, _handle: Handle) -> Option<String> {
        None
    }

    /// What the stack knows of a TCP connection, as far as it is counted and not made up; a call must be cheap (a microsecond).
    /// `None`: it knows nothing.
    fn tcp_counts(&mut self, _handle: Handle) -> Option<crate::TcpCounts> {
        None
    }

    /// The descriptor that a socket is. A stack that has some can live on after the death of its process, which leaves them open:
    /// a new instance gets them by [`adopt`](Stack::adopt). `None`: its sockets end with the process.
    fn lasting(&self, _handle: Handle) -> Option<RawFd> {
        None
    }

    /// Takes over a socket of an instance that is no more. `tells`: it is a datagram socket, listens, or is or becomes connected,
    /// and its readiness must be reported; all of it counts as not reported yet.
    fn adopt(&mut self, _key: u64, _fd: OwnedFd, _tells: bool) -> Result<Handle, Errno> {
        Err(Errno(libc::EOPNOTSUPP))
    }

    /// Whether [`adopt`](Stack::adopt) takes sockets.
    fn takes(&self) -> bool {
        false
    }

    /// Whether a socket is a descriptor of the kernel and nothing else, so that another stack can adopt it.
    fn movable(&self, handle: Handle) -> bool {
        self.lasting(handle).is_some()
    }

    /// As [`give`](Stack::give), for another stack to adopt. Errors: it stays, and is as it was: something of it is not in the
    /// descriptor.
    fn part(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        if self.movable(handle) { self.give(handle) } else { Err(Errno(libc::EOPNOTSUPP)) }
    }

    /// What of a guest's sockets is more than [lasting](Stack::lasting) descriptors, for the program that this process executes
    /// next. Nothing changes by it. `None`: nothing can go on.
    fn leave(&mut self, _guest: u32) -> Option<Box<dyn crate::Remains>> {
        None
    }

    /// What an instance that is no more left of a guest that has come ([`guest`](Stack::guest)), for [`resume`](Stack::resume).
    fn take_up(&mut self, _guest: u32, _left: &str) {}

    /// Goes on with a socket that was left, by its key; `tells` as for [`adopt`](Stack::adopt). An error: it is lost.
    fn resume(&mut self, _key: u64, _tells: bool) -> Result<Handle, Errno> {
        Err(Errno(libc::EOPNOTSUPP))
    }

    /// How far an adopted connection came. `connected`: it was made by `connect`. `None`: it cannot be known.
    fn progress(&mut self, _handle: Handle, _connected: bool) -> Option<Progress> {
        None
    }

    /// True when a connect was begun, or has succeeded, on an adopted stream socket. Reports of its readiness begin.
    fn connecting(&mut self, _handle: Handle) -> bool {
        false
    }

    /// When `poll` must be called at the latest, in nanoseconds of CLOCK_MONOTONIC; for stacks with timers of their own.
    fn deadline_ns(&self) -> Option<u64> {
        None
    }
}
