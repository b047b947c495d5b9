//! NetKernel queue elements: the fixed-size messages of the queues.

/// A queue element. 32 bytes, as in the published system. All fields are little endian on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nqe {
    /// One of [`Op`].
    pub op: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Guest id. The engine ignores what a guest writes here: a queue belongs to one guest.
    pub guest: u16,
    /// Queue set that sent, or will receive, this element.
    pub queue_set: u16,
    /// When it was pushed: CLOCK_MONOTONIC in units of 2^[`STAMP_SHIFT`] ns, modulo 2^16; 0: not said. For statistics only.
    pub stamp: u16,
    /// Index in the region's socket table.
    pub socket: u32,
    /// Bytes of the argument in the queue set's argument area, or of payload.
    pub size: u32,
    /// Operation data; see each [`Op`].
    pub op_data: u64,
    /// Payload position: byte position in the socket's ring, or 0.
    pub position: u32,
    /// Completion: 0 or a negative errno. Otherwise: generation of the socket that is meant.
    pub status: i32,
}

/// A stamp's unit is 1024 ns, so that it tells up to 67 ms.
pub const STAMP_SHIFT: u32 = 10;
/// Guests stamp one of so many elements of a thread.
pub const STAMP_EVERY: u32 = 64;

pub mod flag {
    /// The sender waits: answer with a completion that carries the same `op_data`... `position` pair.
    pub const SYNC: u8 = 1 << 0;
    /// More data will follow (MSG_MORE).
    pub const MORE: u8 = 1 << 1;
    /// What was written ends with an urgent byte.
    pub const URGENT: u8 = 1 << 2;
}

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// Operations and events.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Op { $($(#[$doc])* $name = $value,)* }
        impl Op {
            /// The operation with this number, if there is one.
            pub const fn from_u8(value: u8) -> Option<Op> {
                match value { $($value => Some(Op::$name),)* _ => None }
            }
        }
    };
}

ops! {
    /// Job, sync. Argument: sockaddr bytes (Linux `sockaddr_in`/`sockaddr_in6`), `size` long.
    Bind = 1,
    /// Job, sync. `op_data`: backlog.
    Listen = 2,
    /// Job, sync. Argument: sockaddr bytes. Completion: 0 when connected at once (datagram), -EINPROGRESS when begun,
    /// another negative errno when refused at once. The end of a begun connect is in the socket's state.
    Connect = 3,
    /// Job. `op_data`: how (SHUT_RD 0, SHUT_WR 1, SHUT_RDWR 2). What stands in the send ring goes out first.
    Shutdown = 4,
    /// Job. `op_data`: level << 48 | name << 32 | value (as u32) when `size` is 0, an int option; else the option's bytes
    /// are the argument and `op_data` is level << 48 | name << 32.
    SetOption = 5,
    /// Job, sync. `op_data` as above, `size`: bytes wanted; completion: `size` bytes in the argument area.
    GetOption = 6,
    /// Job, sync. Completion: sockaddr bytes in the argument area.
    LocalName = 7,
    /// Job, sync. As above, the peer's.
    PeerName = 8,
    /// Job, sync. Asks for a send ring for a socket whose ring was taken back while it was idle.
    SendRing = 9,
    /// Job, sync. `op_data`: ioctl request (FIONREAD of a datagram socket, SIOCOUTQ, ...). Completion: value in `op_data`.
    Ioctl = 10,
    /// Job. The thread of this queue set is gone; the engine takes the queue set back when the rings are empty.
    Release = 11,
    /// Job, sync. Does nothing: everything pushed before was seen. Completion: 0.
    Fence = 12,
    /// Job, sync: disconnects (connect to AF_UNSPEC). For a stream the guest holds both locks and empties the receive ring
    /// afterwards; the engine empties the send ring.
    Disconnect = 13,
    /// Job. Wakes all who sleep on the socket's placeholder once more: a sleeper has taken another's wake-up byte.
    Wake = 14,
    /// Job, sync. A listener that is ON_DEMAND: puts a connection into its ring if the ring is empty. -EAGAIN: there is none.
    Accept = 15,
    /// Job, sync. `op_data`: position behind a byte that is urgent (MSG_OOB) and that the guest publishes when it has the answer.
    Urgent = 16,
    /// Job, sync. Takes the oldest message of the socket's error queue (MSG_ERRQUEUE). Completion: a record in the argument area,
    /// as it stands in a datagram ring (payload cut at 256 bytes), or -EAGAIN.
    ErrorQueue = 17,
    /// Job (feature SPARES). The program has closed this stream; its placeholder stays, for the guest's next socket under the same id,
    /// once `generation` has changed. `kind` says then what that is, and the first element about it opens it.
    Close = 18,
    /// Send. New bytes (or datagrams) stand in the socket's send ring. One is pending per socket at most.
    Send = 32,
    /// Send. The guest read from a receive ring that had been full: the stack may go on receiving.
    Credit = 33,
    /// Send. A connection of a pair: the other end said that it sleeps, and something changed; or it is closed, and was written to.
    Peer = 34,
    /// Completion of a sync job: `status`, `size`, `op_data`.
    Complete = 64,
    /// Receive. The readiness of `socket` may have changed; `op_data`: event hint bits (EPOLLIN ...). Hints only.
    Event = 65,
}

impl Nqe {
    pub const ZERO: Nqe = Nqe {
        op: 0,
        flags: 0,
        guest: 0,
        queue_set: 0,
        stamp: 0,
        socket: 0,
        size: 0,
        op_data: 0,
        position: 0,
        status: 0,
    };

    pub const fn new(op: Op, queue_set: u16, socket: u32) -> Nqe {
        Nqe { op: op as u8, queue_set, socket, ..Nqe::ZERO }
    }

    /// The element as the four words that a ring slot holds.
    pub const fn to_words(self) -> [u64; 4] {
        [
            self.op as u64
                | (self.flags as u64) << 8
                | (self.guest as u64) << 16
                | (self.queue_set as u64) << 32
                | (self.stamp as u64) << 48,
            self.socket as u64 | (self.size as u64) << 32,
            self.op_data,
            self.position as u64 | (self.status as u32 as u64) << 32,
        ]
    }

    pub const fn from_words(w: [u64; 4]) -> Nqe {
        Nqe {
            op: w[0] as u8,
            flags: (w[0] >> 8) as u8,
            guest: (w[0] >> 16) as u16,
            queue_set: (w[0] >> 32) as u16,
            stamp: (w[0] >> 48) as u16,
            socket: w[1] as u32,
            size: (w[1] >> 32) as u32,
            op_data: w[2],
            position: w[3] as u32,
            status: (w[3] >> 32) as i32,
        }
    }

    /// Packs `level`, `name` and an int value for [`Op::SetOption`] and [`Op::GetOption`].
    pub const fn option_data(level: i32, name: i32, value: i32) -> u64 {
        ((level as u16 as u64) << 48) | ((name as u16 as u64) << 32) | value as u32 as u64
    }

    /// Inverse of [`Nqe::option_data`]: level, name, value.
    pub const fn split_option(data: u64) -> (i32, i32, i32) {
        ((data >> 48) as i32, (data >> 32) as u16 as i32, data as u32 as i32)
    }
}
