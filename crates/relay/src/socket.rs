//! What is known of one relayed socket.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use netkernel_service::{Errno, Handle, SocketAddress, TcpCounts};

use crate::bulk::{Piped, Pipes};

/// Where a socket is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum State {
    /// Neither connected nor listening.
    Fresh,
    Listening,
    /// `filler`: bytes that stand in the program's way, so that its socket is not writable.
    Connecting {
        filler: usize,
    },
    Connected,
    /// The connection is over, and the program's socket is dead; what is asked about it is still answered.
    Over,
}

/// Bytes on their way that the other side did not take yet.
#[derive(Debug, Default)]
pub struct Buffer {
    /// Of large ones; `bytes` is empty then.
    pub piped: Option<Piped>,
    bytes: Vec<u8>,
    from: usize,
}

impl Buffer {
    pub fn of(bytes: Vec<u8>) -> Buffer {
        Buffer { bytes, ..Buffer::default() }
    }

    pub fn through(piped: Piped) -> Buffer {
        Buffer { piped: Some(piped), ..Buffer::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.piped.is_none()
    }

    pub fn pending(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..]
    }

    pub fn len(&self) -> usize {
        self.bytes.len() - self.from + self.piped.as_ref().map_or(0, Piped::len)
    }

    /// The bytes themselves from now on.
    pub fn unpipe(&mut self) {
        if let Some(piped) = self.piped.take() {
            (self.bytes, self.from) = (piped.read(), 0);
        }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The first `n` bytes were taken, which a pipe knows by itself. An empty buffer holds no memory and no pipe.
    pub fn given(&mut self, n: usize, pipes: &mut Pipes) {
        if self.piped.is_none() {
            self.from += n;
            if self.from >= self.bytes.len() {
                self.clear();
            }
        } else if let Some(piped) = self.piped.take_if(|piped| piped.is_empty()) {
            pipes.take_back(piped);
        }
    }

    pub fn clear(&mut self) {
        *self = Buffer::default();
    }
}

/// One datagram on its way to the program.
#[derive(Debug)]
pub struct Held {
    pub bytes: Vec<u8>,
    /// Who sent it; `None`: the peer.
    pub note: Option<OwnedFd>,
}

#[derive(Debug)]
pub struct Socket {
    /// Tells this socket from an earlier one with the same number.
    pub generation: u32,
    pub handle: Handle,
    /// The engine's end of the pair; the program has the other.
    pub end: Option<OwnedFd>,
    /// Of the program's end.
    pub inode: u64,
    pub domain: i32,
    /// SOCK_STREAM or SOCK_DGRAM.
    pub kind: i32,
    /// Thread and number that were given the descriptor, or used it last.
    pub holder: (u32, u32),
    pub state: State,
    /// What was counted of its connection.
    pub tcp: Option<TcpCounts>,
    /// When it was looked at, in nanoseconds.
    pub tcp_at: u64,
    /// What SO_ERROR says next.
    pub error: Option<Errno>,
    /// The stack's connection broke; what it still holds for the program comes first.
    pub broken: Option<Errno>,
    /// From the program to the stack, and back.
    pub up: Buffer,
    pub down: Buffer,
    pub up_datagram: Option<Vec<u8>>,
    pub down_datagram: Option<Held>,
    /// What the last look said; the next operation tells the truth.
    pub end_readable: bool,
    pub end_writable: bool,
    /// Its end is asked for room.
    pub wants_room: bool,
    pub stack_readable: bool,
    pub stack_writable: bool,
    pub stack_error: bool,
    /// Urgent data comes from the program, and from the stack.
    pub end_urgent: bool,
    pub stack_urgent: bool,
    /// The only byte of `up` is urgent; an urgent byte for the program.
    pub up_urgent: bool,
    pub down_urgent: Option<u8>,
    /// The last read was a large one.
    pub up_bulk: bool,
    pub down_bulk: bool,
    /// Its program's end has the room of one that sends much.
    pub tuned: bool,
    /// The program ended its direction, or closed.
    pub end_ended: bool,
    pub end_hung_up: bool,
    pub up_ended: bool,
    pub up_shut: bool,
    pub down_ended: bool,
    /// Nobody reads any more.
    pub down_closed: bool,
    /// What the program ended by shutdown(). A pair that is shut in both directions looks like one that is closed.
    pub shut_read: bool,
    pub shut_write: bool,
    /// SO_LINGER with time 0.
    pub abort: bool,
    /// A connect that ended well was not told by connect() yet.
    pub unreported: bool,
    /// In the list of sockets to go on with.
    pub queued: bool,
    /// Of a listener: bytes that make it readable, and connections that a caller did not wait for.
    pub tokens: usize,
    pub returned: VecDeque<(u32, SocketAddress)>,
    /// Threads that wait in a call on this socket, the longest first.
    pub waiters: Vec<u32>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// So much of it stands in the guest's totals.
    pub counted: (u64, u64),
}

impl Socket {
    pub fn new(generation: u32, handle: Handle, domain: i32, kind: i32) -> Socket {
        Socket {
            generation,
            handle,
            end: None,
            inode: 0,
            domain,
            kind,
            holder: (0, 0),
            state: State::Fresh,
            tcp: None,
            tcp_at: 0,
            error: None,
            broken: None,
            up: Buffer::default(),
            down: Buffer::default(),
            up_datagram: None,
            down_datagram: None,
            end_readable: false,
            end_writable: true,
            wants_room: false,
            stack_readable: false,
            stack_writable: true,
            stack_error: false,
            end_urgent: false,
            stack_urgent: false,
            up_urgent: false,
            down_urgent: None,
            up_bulk: false,
            down_bulk: false,
            tuned: false,
            end_ended: false,
            end_hung_up: false,
            up_ended: false,
            up_shut: false,
            down_ended: false,
            down_closed: false,
            shut_read: false,
            shut_write: false,
            abort: false,
            unreported: false,
            queued: false,
            tokens: 0,
            returned: VecDeque::new(),
            waiters: Vec::new(),
            bytes_in: 0,
            bytes_out: 0,
            counted: (0, 0),
        }
    }

    pub fn is_stream(&self) -> bool {
        self.kind == libc::SOCK_STREAM
    }

    /// The program may have the descriptor still, although its end hung up.
    pub fn may_be_held(&self) -> bool {
        self.shut_write && (self.shut_read || self.down_ended)
    }

    pub fn is_connected(&self) -> bool {
        matches!(self.state, State::Connected)
    }
}

/// One socket, for `netkernel explain`.
#[derive(Clone, Debug, Default)]
pub struct RelaySocket {
    /// Name of the stack that it is of.
    pub stack: String,
    pub inode: u64,
    pub pid: u32,
    pub fd: u32,
    pub kind: &'static str,
    pub state: &'static str,
    pub local: Option<SocketAddress>,
    pub peer: Option<SocketAddress>,
    pub congestion_control: Option<String>,
    /// Which way the stack serves it, if it has several.
    pub way: Option<String>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub unread_bytes: u32,
    pub unsent_bytes: u32,
    /// Bytes that the program has not read, and that the peer has not acknowledged, wherever they are. Of a listener:
    /// connections that wait, and how many may.
    pub receive_queue: u32,
    pub send_queue: u32,
    pub tcp: Option<netkernel_agent::TcpInfo>,
}
