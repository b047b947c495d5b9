//! The state of one guest socket. It stands in the region, not in a process: after `fork` both processes see the same
//! socket. The first two cache lines are written by the engine, the others by the guest, so that neither side's
//! progress bounces the other's line more than it must.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

/// Bits of [`SocketEntry::state`], written by the engine.
pub mod state {
    /// The entry belongs to a socket.
    pub const OPEN: u32 = 1 << 0;
    pub const CONNECTING: u32 = 1 << 1;
    /// Connected (also a datagram socket with a peer).
    pub const CONNECTED: u32 = 1 << 2;
    pub const LISTENING: u32 = 1 << 3;
    /// The peer sent FIN (or this side shut down reading): after the ring is empty, reads return 0.
    pub const RX_END: u32 = 1 << 4;
    /// This side shut down writing: writes give EPIPE.
    pub const TX_END: u32 = 1 << 5;
    /// The connection is over by RST, timeout or failure: `error` says why, once; poll reports EPOLLHUP.
    pub const DEAD: u32 = 1 << 6;
    /// Urgent data: a byte at `oob` has not been read.
    pub const OOB: u32 = 1 << 7;
    /// Datagram socket.
    pub const DATAGRAM: u32 = 1 << 8;
    /// The stack's socket has an address (was bound).
    pub const BOUND: u32 = 1 << 9;
    /// `connect` failed; the socket may be connected again.
    pub const CONNECT_FAILED: u32 = 1 << 10;
    /// `oob_position` is valid: the mark has not been passed.
    pub const OOB_MARK: u32 = 1 << 11;
    /// A listener with a backlog so small that accepting ahead would show: [`crate::Op::Accept`] takes a connection.
    pub const ON_DEMAND: u32 = 1 << 12;
    /// Such a listener's queue, which is the stack's, has a connection.
    pub const ACCEPTABLE: u32 = 1 << 13;
    /// There is no memory for a send ring: the socket is not writable. An event tells when there is one.
    pub const NO_MEMORY: u32 = 1 << 14;
    /// The stack's own socket was handed over to a process: nothing is served any more, and who still has the placeholder asks
    /// for the socket too ([`crate::control::kind::HAND_OVER`]).
    pub const HANDED: u32 = 1 << 15;
    /// A connection of a pair: its rings stand in memory number `rx_offset`, in slot `tx_offset / 2`, and this is end
    /// `tx_offset % 2` ([`crate::pair`]).
    pub const PAIRED: u32 = 1 << 16;
    /// Nobody will read what this end of a pair writes: [`crate::Op::Peer`] after each write.
    pub const PEER_CLOSED: u32 = 1 << 17;
    /// The peer's FIN came, before any error: reads go on returning 0, and leave `error` to writes and SO_ERROR (as Linux does
    /// once SOCK_DONE is set, tcp_recvmsg_locked in net/ipv4/tcp.c).
    pub const FIN: u32 = 1 << 18;
}

/// Bits of [`SocketEntry::flags`], written by the guest.
pub mod gflag {
    pub const NONBLOCK: u32 = 1 << 0;
    /// O_ASYNC, on the placeholder too: every event comes with a wake-up byte, so that the kernel sends SIGIO.
    pub const ASYNC: u32 = 1 << 1;
    pub const OOB_INLINE: u32 = 1 << 2;
    /// shutdown(SHUT_RD) or (SHUT_WR) was called (the engine will confirm in `state`).
    pub const SHUT_RD: u32 = 1 << 3;
    pub const SHUT_WR: u32 = 1 << 4;
    /// IPV6 socket.
    pub const V6: u32 = 1 << 5;
    /// A connect was begun that no call has told the end of.
    pub const CONNECT_BEGUN: u32 = 1 << 6;
    /// SO_BROADCAST is set.
    pub const BROADCAST: u32 = 1 << 7;
    /// The placeholder has an owner (F_SETOWN): urgent data comes with a byte sent by MSG_OOB, so that the kernel sends SIGURG.
    pub const OWNED: u32 = 1 << 8;
    /// F_SETFL gave the placeholder flags that stand nowhere else (O_APPEND and the like, O_ASYNC once).
    pub const STATUS_FLAGS: u32 = 1 << 9;
}

/// How many epoll instances a socket can name; with more, [`SocketEntry::broadcast`] makes every event go to all
/// receive rings of the guest (events are hints, so that is only slower).
pub const WATCHERS: usize = 6;

/// 256 bytes. All positions are byte counts modulo 2^32; the byte at position p stands at `offset + ((p - base) & (size - 1))`.
#[repr(C, align(64))]
pub struct SocketEntry {
    // Line 0: written by the engine.
    /// Bits of [`state`].
    pub state: AtomicU32,
    /// Pending SO_ERROR (positive errno); the guest takes it by swapping 0 in.
    pub error: AtomicU32,
    /// Incremented each time the entry is given back.
    pub generation: AtomicU32,
    /// Receive ring: end of the received bytes. A listener's: of its accept queue of [`AcceptRecord`]s.
    pub rx_tail: AtomicU32,
    /// Receive ring: offset in the region, in units of 64 bytes.
    pub rx_offset: AtomicU32,
    /// Receive ring: bytes, a power of two, or 0 when there is none.
    pub rx_size: AtomicU32,
    /// Receive ring: position that stands at `rx_offset`.
    pub rx_base: AtomicU32,
    /// 1: the engine stopped receiving because the ring was full, and wants a [`crate::Op::Credit`].
    pub rx_stalled: AtomicU32,
    /// Send ring: what the stack has taken.
    pub tx_head: AtomicU32,
    pub tx_offset: AtomicU32,
    pub tx_size: AtomicU32,
    /// Urgent data: low byte the byte; bit 8 set.
    pub oob: AtomicU32,
    /// Receive position of the urgent mark.
    pub oob_position: AtomicU32,
    /// `domain << 16 | protocol`.
    pub kind: AtomicU32,
    /// Bytes that a full send ring must have free again before the socket is writable.
    pub tx_low_water: AtomicU32,
    /// How often the engine has sent wake-up bytes.
    pub wakes: AtomicU32,

    // Line 1: names, written by the engine when it knows them; valid when `*_valid` is 1.
    /// Peer address of an accepted socket, as sockaddr_in or sockaddr_in6 bytes in 7 words.
    pub peer: [AtomicU32; 7],
    /// Length of `peer` in bytes, 0 when not known.
    pub peer_len: AtomicU32,
    pub local: [AtomicU32; 7],
    pub local_len: AtomicU32,

    // Line 2: written by the guest.
    /// Receive ring: what the program has read.
    pub rx_head: AtomicU32,
    /// Send ring: end of what the program has written.
    pub tx_tail: AtomicU32,
    pub tx_base: AtomicU32,
    /// Bits of [`gflag`].
    pub flags: AtomicU32,
    /// Lock of readers, and of writers: 0 or the holder's thread id. The engine only ever tries `tx_lock`, with [`ENGINE_LOCK`].
    pub rx_lock: AtomicU32,
    pub tx_lock: AtomicU32,
    /// 1 while a [`crate::Op::Send`] element is on its way. The engine swaps 0 in before it looks at `tx_tail`.
    pub tx_pending: AtomicU32,
    /// Threads that sleep on the placeholder; the engine sends that many wake-up bytes on a change.
    pub waiters: AtomicU32,
    /// Inode of the placeholder: finds the socket after exec and when it was passed.
    pub inode: AtomicU64,
    /// SO_RCVTIMEO and SO_SNDTIMEO in microseconds, 0: none.
    pub rcv_timeout_us: AtomicU64,
    pub snd_timeout_us: AtomicU64,
    /// 1: a writer wants to hear of space in the send ring.
    pub tx_wanted: AtomicU32,
    pub rcv_low_water: AtomicU32,

    // Line 3: written by both, rarely.
    /// Queue sets whose receive rings want events, 0: free slot, else queue set + 1.
    pub watchers: [AtomicU16; WATCHERS],
    /// 1: there are more watchers than slots.
    pub broadcast: AtomicU32,
    /// Bit i: an event for watcher i is in its ring and was not consumed.
    pub event_pending: AtomicU32,
    /// Free list of guest-allocated entries.
    pub next_free: AtomicU32,
    /// Peer of a datagram socket that was connected, or target of a connect, in 7 words; guest-written.
    pub target: [AtomicU32; 7],
    pub target_len: AtomicU32,
    pub reserved3: AtomicU32,
}

/// What the engine writes in `tx_lock` while it changes a send ring.
pub const ENGINE_LOCK: u32 = u32::MAX;

/// Bytes of one record of a listener's accept queue: id and generation of the new socket, little endian.
pub const ACCEPT_RECORD: u32 = 8;

/// A socket address of fixed size: the bytes of `sockaddr_in` (16) or `sockaddr_in6` (28).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub bytes: [u8; 28],
}

/// Precedes each datagram in a ring: header, payload, padding to a multiple of 8 bytes, control messages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatagramHeader {
    /// Payload bytes that follow.
    pub len: u32,
    /// Bytes of `address` in the low 8 bits, 0: none (connected socket). Bytes of control messages (see
    /// [`ancillary`](crate::ancillary)), a multiple of 8, in the upper 16 bits.
    pub address_len: u32,
    /// Address in 6 words: family | port << 16 (network order), then 16 bytes of IPv4 (4 used) or IPv6 address, then scope.
    pub address: [u32; 6],
}

impl DatagramHeader {
    /// Bytes of control messages behind the payload and its padding.
    pub const fn control_len(&self) -> u32 {
        self.address_len >> 16
    }

    pub const fn set_control_len(&mut self, bytes: u32) {
        self.address_len = self.address_len & 0xff | bytes << 16;
    }

    /// Ring bytes of the whole record; `len` must be checked before.
    pub const fn record(&self) -> u32 {
        datagram_record(self.len) + self.control_len()
    }
}

/// Ring bytes that a datagram of `len` payload bytes takes, without control messages.
pub const fn datagram_record(len: u32) -> u32 {
    32 + ((len + 7) & !7)
}
