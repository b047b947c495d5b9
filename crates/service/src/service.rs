use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{
    Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
    compiler_fence, fence,
};

use netkernel_abi::ancillary::{self, Fate, MAX_CONTROL};
use netkernel_abi::layout::{ACTIVE_WORDS, ARGUMENT_BYTES};
use netkernel_abi::nqe::{STAMP_SHIFT, flag};
use netkernel_abi::socket::{ACCEPT_RECORD, DatagramHeader, ENGINE_LOCK, datagram_record, state};
use netkernel_abi::{Nqe, Op, SocketEntry};
use netkernel_ring::bytes;
use netkernel_shm::Region;

mod close;
mod connect;
mod datagrams;
mod elements;
mod hand_over;
mod idle;
mod listen;
mod moved;
mod receive;
mod recover;
mod send;
pub use moved::{Stays, Went};
pub use recover::journal_format;

use crate::blocks::{Block, Blocks, CLASSES};
use crate::events::Events;
use crate::journal::{One, Plain};
use crate::memory::now_ns;
use crate::memory::ring_segments;
use crate::police::Limits;
use crate::stack::{
    Close, Connect, Datagram, Errno, Handle, Peeked, Readiness, Received, SendFlags, Shutdown, Stack, key,
};
use crate::stages::Histogram;
use crate::turn::{CALL, DATAGRAM, ELEMENT, JOB, SOCKET, Turn};
use crate::{SocketAddress, Table, TcpCounts, TcpSums};

mod paired;

/// The guest did what no correct guest does; it loses its sockets. The text says what, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

/// What a [`Service`] needs of its engine: to wake sleepers by descriptors that the engine holds.
pub trait Host {
    /// Puts `count` bytes into the placeholder pair of a socket; [`crate::URGENT_WAKE`]: one byte, as urgent data.
    fn wake(&mut self, socket: u32, count: u32);
    /// Writes the eventfd of a queue set.
    fn ring(&mut self, queue_set: u32);
}

/// How far [`Service::drain`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Elements taken.
    pub elements: usize,
    /// There are more.
    pub more: bool,
    /// An element waits for what stands in the guest's channels, or for hang-ups of placeholders: process these and
    /// drain again.
    pub again: bool,
}

/// Totals of one guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub operations: u64,
    /// Connections that were accepted or made.
    pub connections: u64,
    pub events: u64,
    pub sockets: u32,
    pub ring_bytes: u64,
    /// As far as the stack knows it, and it was looked at: see [`Service::look_at_tcp`].
    pub tcp: TcpSums,
}

/// One socket, for people.
#[derive(Clone, Debug)]
pub struct SocketInfo {
    pub id: u32,
    pub kind: &'static str,
    pub state: &'static str,
    pub local: Option<SocketAddress>,
    pub peer: Option<SocketAddress>,
    pub receive_ring_bytes: u32,
    pub send_ring_bytes: u32,
    pub unread_bytes: u32,
    pub unsent_bytes: u32,
    /// What the stack says of its way ([`Stack::way`]).
    pub way: Option<String>,
    /// The stack's own name for it; [`Handle::NONE`]: the stack has none.
    pub handle: Handle,
    /// Inode of its placeholder, as the guest says.
    pub inode: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    #[default]
    Free,
    Stream,
    Datagram,
    Listener,
}

impl Kind {
    /// None is higher.
    const LAST: u8 = Kind::Listener as u8;
}

/// Bits of [`Sock::bits`].
mod bit {
    /// The stack may have something to receive (or to accept).
    pub const RX_READY: u32 = 1 << 0;
    /// The receive ring is full; a Credit is awaited.
    pub const RX_STALLED: u32 = 1 << 1;
    /// The receive ring was filled completely: a larger one would help.
    pub const RX_FILLED: u32 = 1 << 2;
    pub const TX_FILLED: u32 = 1 << 3;
    /// The stack takes nothing until it reports WRITE.
    pub const TX_BLOCKED: u32 = 1 << 4;
    /// Shut down the sending direction when the send ring is empty.
    pub const SHUT_WR: u32 = 1 << 5;
    /// All descriptors are closed; the send ring is being flushed.
    pub const CLOSING: u32 = 1 << 6;
    /// In the run queue.
    pub const QUEUED: u32 = 1 << 7;
    /// Accepted, without a placeholder so far.
    pub const UNTAKEN: u32 = 1 << 8;
    /// As UNTAKEN, and the process that took it may be dead.
    pub const SUSPECT: u32 = 1 << 9;
    /// An urgent byte is to be fetched; its mark is to be found.
    pub const URGENT: u32 = 1 << 11;
    pub const MARK: u32 = 1 << 12;
    /// `tx_mark` is the end of urgent data to send.
    pub const TX_URGENT: u32 = 1 << 13;
    /// In the list of the starved.
    pub const STARVED: u32 = 1 << 14;
    /// The guest shut down reading: what comes in nevertheless is received all the same.
    pub const SHUT_RD: u32 = 1 << 15;
    /// The last datagram was small.
    pub const SMALL: u32 = 1 << 16;
    /// In the list of those that wait for the tenant's rate.
    pub const THROTTLED: u32 = 1 << 17;
    /// One of the tenant's connections.
    pub const COUNTED: u32 = 1 << 18;
    /// The guests move its payload themselves.
    pub const PAIRED: u32 = 1 << 19;
    /// The connection was made by `connect`.
    pub const ACTIVE: u32 = 1 << 20;
    /// There was urgent data.
    pub const URGENT_SEEN: u32 = 1 << 21;
    /// Its placeholder stays when it is closed, for the next socket with this id.
    pub const SPARE: u32 = 1 << 22;
}
use bit::*;

/// What the engine knows of a socket; nothing of it stands in guest memory.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Sock {
    handle: Handle,
    /// As published.
    state: u32,
    bits: u32,
    kind: Kind,
    domain: u16,
    /// Error of `open`, told by the first job; or of the stream, told when its bytes were received.
    error: i32,
    generation: u32,
    rx: Block,
    tx: Block,
    rx_base: u32,
    rx_tail: u32,
    tx_head: u32,
    tx_mark: u32,
    /// Listener: its backlog. Untaken: its listener.
    link: u32,
    /// Untaken: the position behind its record in the listener's ring.
    record: u32,
    /// Sweep in which it was last used.
    used_at: u32,
    /// The first bytes of the connection that stand in the receive ring and in the stack's socket too: a socket that is handed
    /// over takes along what nobody read. They are taken out of the stack's once the guest has read something.
    peeked: u32,
    /// What was counted of its connection, if anything was.
    tcp: LastCounts,
    /// The descriptor of the stack's socket + 1; [`FLEETING`]: it has none, and ends with the process.
    fd: i32,
    /// Positions at which the connection began.
    tx_start: u32,
    rx_start: u32,
    linger: Linger,
}

/// SO_LINGER, which a stack keeps for itself: the kernel's socket is not told.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Linger {
    /// 0 or 1.
    on: i32,
    seconds: i32,
}

impl Linger {
    /// Of the value of setsockopt(2); `None`: it is too short.
    fn of(bytes: &[u8]) -> Option<Linger> {
        let (words, _) = bytes.as_chunks::<4>();
        let [on, seconds, ..] = words else { return None };
        Some(Linger { on: (*on != [0; 4]).into(), seconds: i32::from_ne_bytes(*seconds) })
    }

    /// Close means RST.
    fn resets(self) -> bool {
        self.on != 0 && self.seconds == 0
    }

    /// Tells a stack that has the socket from somebody else.
    fn tell(self, stack: &mut dyn Stack, handle: Handle) {
        if self.on != 0 {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&self.on.to_ne_bytes());
            bytes[4..].copy_from_slice(&self.seconds.to_ne_bytes());
            // It took the value before.
            let _ = stack.set_option(handle, libc::SOL_SOCKET, libc::SO_LINGER, &bytes);
        }
    }
}

/// What was counted last of a connection, as it can stand in a journal.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct LastCounts {
    known: u32,
    counts: TcpCounts,
}

impl LastCounts {
    fn seen(self) -> Option<TcpCounts> {
        (self.known != 0).then_some(self.counts)
    }
}

impl From<Option<TcpCounts>> for LastCounts {
    fn from(counts: Option<TcpCounts>) -> LastCounts {
        LastCounts { known: u32::from(counts.is_some()), counts: counts.unwrap_or_default() }
    }
}

/// In [`Sock::fd`]: a socket that no other process can take over.
const FLEETING: i32 = -1;

/// What [`Sock::fd`] is.
fn lasting(stack: &dyn Stack, handle: Handle) -> i32 {
    stack.lasting(handle).map_or(FLEETING, |fd| fd + 1)
}

impl Sock {
    /// Takes the bytes that were only peeked at out of the stack's socket. False: they are not there.
    fn take_peeked(&mut self, stack: &mut dyn Stack) -> bool {
        let bytes = self.peeked;
        let taken = bytes == 0 || stack.discard(self.handle, bytes as usize).is_ok();
        // After it: who finds the journal knows by this that the stack may still have the bytes.
        compiler_fence(SeqCst);
        self.peeked = 0;
        taken
    }
}

// SAFETY: numbers, and a kind that only this code writes.
#[allow(unsafe_code)]
unsafe impl Plain for Sock {}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Totals {
    bytes_in: u64,
    bytes_out: u64,
    operations: u64,
    connections: u64,
    tcp: TcpSums,
}

// SAFETY: plain numbers.
#[allow(unsafe_code)]
unsafe impl Plain for Totals {}

/// First sizes of rings: class of 16 KiB for streams, of 4 KiB for listeners, of 256 KiB for datagrams.
const STREAM_CLASS: u8 = 1;
const LISTENER_CLASS: u8 = 0;
const DATAGRAM_CLASS: u8 = 3;
const MAX_DATAGRAM: u32 = 65536;
/// What fits into an argument area of a message of an error queue.
const ERROR_PAYLOAD: usize = 256;
const ERROR_CONTROL: usize = 192;
const _: () = assert!(32 + ERROR_PAYLOAD + ERROR_CONTROL <= ARGUMENT_BYTES);
/// Datagrams up to this size are received several at a time.
const SMALL_DATAGRAM: usize = 4096;
/// Stream bytes that one socket may move before the others get their turn.
const VISIT_BYTES: u32 = 1 << 20;
const VISIT_ROUNDS: u32 = 4;
const VISIT_DATAGRAMS: u32 = 64;
const VISIT_ACCEPTS: u32 = 64;
/// Listeners up to this backlog accept on demand: one connection more than the program asked for would be many.
const SMALL_BACKLOG: i32 = 1;
/// Elements of one queue set in one turn.
const QUEUE_BATCH: u32 = 64;
const DATAGRAM_BATCH: usize = 16;

const IN: u32 = libc::EPOLLIN as u32;
const OUT: u32 = libc::EPOLLOUT as u32;
const ERR: u32 = libc::EPOLLERR as u32;
const HUP: u32 = libc::EPOLLHUP as u32;
const RDHUP: u32 = libc::EPOLLRDHUP as u32;
const PRI: u32 = libc::EPOLLPRI as u32;

/// The sockets of one guest.
pub struct Service {
    region: Region,
    core: Core,
}

struct Core {
    /// Guest part of the keys.
    guest: u32,
    privileged: bool,
    /// Sockets may be handed over.
    gives: bool,
    guest_sockets: u32,
    /// End of the socket table.
    limit: u32,
    socks: Table<Sock>,
    sockets: u32,
    /// How many have ended, modulo 2^32.
    ended: u32,
    events: Events,
    blocks: Blocks,
    run: VecDeque<u32>,
    /// Sockets that wait for memory or descriptors; tried again when something is given back, and every tick.
    starved: Vec<u32>,
    limits: Limits,
    turn: Turn,
    /// Where draining goes on: not always with the first queue set.
    next_queue: u32,
    /// Sockets that wait until more may be sent or received, in the order in which they go on.
    throttled: Vec<u32>,
    /// When the first of them may, and the guest's elements may be looked at again.
    throttled_until: u64,
    elements_until: u64,
    /// Queue sets with elements that were not looked at.
    pending: [u64; ACTIVE_WORDS],
    /// An element that waits for the channels or hang-ups.
    held: Option<(u32, Nqe)>,
    free_ids: Vec<u32>,
    next_id: u32,
    /// Guest ids that could not be put on the free list because the guest kept changing it.
    unreturned: Vec<u32>,
    released: Vec<u32>,
    highest_queue: u32,
    sweeps: u32,
    sweep_wanted: bool,
    suspects: bool,
    totals: One<Totals>,
    counted: paired::Counted,
    /// There were pairs.
    has_pairs: bool,
    /// Where the next look at open connections begins.
    tcp_next: u32,
    /// How long the elements with a stamp stood in the guest's rings.
    waited: Histogram,
}

struct Cx<'a> {
    region: &'a Region,
    stack: &'a mut dyn Stack,
}

impl Service {
    /// Serves `region`; `guest` is the upper half of the keys that the stack is told. `privileged`: may bind to ports
    /// below 1024 (if the stack may).
    pub fn new(region: Region, guest: u32, privileged: bool) -> Service {
        let layout = *region.layout();
        Service {
            region,
            core: Core {
                guest,
                privileged,
                gives: false,
                guest_sockets: layout.guest_sockets,
                limit: layout.limits.sockets,
                socks: Table::new(layout.limits.sockets),
                sockets: 0,
                ended: 0,
                events: Events::new(layout.limits.queue_sets),
                blocks: Blocks::new(layout.payload_offset, layout.payload_bytes),
                run: VecDeque::new(),
                starved: Vec::new(),
                limits: Limits::default(),
                turn: Turn::new(),
                next_queue: 0,
                throttled: Vec::new(),
                throttled_until: u64::MAX,
                elements_until: 0,
                pending: [0; ACTIVE_WORDS],
                held: None,
                free_ids: Vec::new(),
                next_id: layout.guest_sockets,
                unreturned: Vec::new(),
                released: Vec::new(),
                highest_queue: 0,
                sweeps: 1,
                sweep_wanted: false,
                suspects: false,
                totals: One::new(),
                counted: paired::Counted::default(),
                has_pairs: false,
                tcp_next: 0,
                waited: Histogram::default(),
            },
        }
    }

    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Message SOCKET: the guest made a socket.
    pub fn open(
        &mut self,
        stack: &mut dyn Stack,
        id: u32,
        domain: u32,
        kind: u32,
        protocol: u32,
    ) -> Result<(), Violation> {
        self.core.turn.charge(SOCKET);
        self.core.open(&mut Cx { region: &self.region, stack }, id, domain, kind, protocol)
    }

    /// Message ACCEPTED: an accepted socket got its placeholder. `false`: there is no such socket (any more).
    pub fn adopted(&mut self, id: u32, generation: u32) -> bool {
        match self.core.socks.get_mut(id) {
            Some(sock) if sock.bits & UNTAKEN != 0 && sock.generation == generation => {
                sock.bits &= !(UNTAKEN | SUSPECT);
                true
            }
            _ => false,
        }
    }

    /// The engine has no descriptor for the socket's placeholder: nothing will work on it but closing. As its end will not
    /// be seen either, the entry stays in use until the guest is over; a later socket must not find itself in its place.
    pub fn refuse(&mut self, stack: &mut dyn Stack, id: u32) -> Result<(), Violation> {
        self.core.refuse(&mut Cx { region: &self.region, stack }, id)
    }

    /// The last descriptor for the socket was closed.
    pub fn close(&mut self, stack: &mut dyn Stack, id: u32) -> Result<(), Violation> {
        self.core.turn.charge(SOCKET);
        self.core.close(&mut Cx { region: &self.region, stack }, id)
    }

    /// From now on sockets may be handed over ([`Service::hand_over`]), and nothing is done ahead that would be in the way:
    /// a listener accepts ahead only once its guest accepted.
    pub fn prepare_hand_over(&mut self) {
        self.core.gives = true;
    }

    /// Message HAND_OVER: gives the stack's own socket away. Nothing is lost by it: EBUSY when the guest has something unread
    /// that the stack's socket has no longer (what came before the first read goes along), EAGAIN when something is still to be sent. The entry stays until its placeholder is closed.
    pub fn hand_over(
        &mut self,
        stack: &mut dyn Stack,
        id: u32,
        generation: u32,
        soft: bool,
    ) -> Result<Result<OwnedFd, Errno>, Violation> {
        self.core.hand_over(&mut Cx { region: &self.region, stack }, id, generation, soft)
    }

    /// Takes elements from the guest's rings, at most about `budget`.
    pub fn drain(&mut self, stack: &mut dyn Stack, budget: usize) -> Result<Drained, Violation> {
        self.core.drain(&mut Cx { region: &self.region, stack }, budget)
    }

    /// True when the guest pushed something that was not looked at; a few loads.
    #[inline]
    pub fn has_elements(&self) -> bool {
        let header = self.region.header();
        if self.core.elements_until != 0 {
            return false;
        }
        self.core.held.is_some()
            || header
                .active
                .iter()
                .zip(&self.core.pending)
                .any(|(word, p)| word.load(Relaxed) != 0 || *p != 0)
    }

    /// The element that waits names a socket whose message was not read.
    pub fn awaits_socket(&self) -> bool {
        let core = &self.core;
        core.held.as_ref().is_some_and(|(_, nqe)| {
            nqe.op != Op::Fence as u8 && core.socks.get(nqe.socket).is_some_and(|s| s.kind == Kind::Free)
        })
    }

    /// What the guest may use, from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.core.limits = limits;
    }

    /// A new turn, in which about as much as moving `quantum` bytes may be done; `u32::MAX`: no limit. What is beyond it waits, and
    /// [`Service::has_work`] or [`Service::has_elements`] says so.
    #[inline]
    pub fn begin_turn(&mut self, quantum: u32) {
        self.core.turn.begin(quantum);
    }

    /// While `urgent`, what is done is charged to the turn, but does not wait for the next one.
    pub fn set_urgent(&mut self, urgent: bool) {
        self.core.turn.set_urgent(urgent);
    }

    /// True when more has to wait for the next turn.
    #[inline]
    pub fn is_turn_over(&self) -> bool {
        self.core.turn.is_over()
    }

    /// What was done so far, in bytes.
    #[inline]
    pub fn spent(&self) -> u64 {
        self.core.turn.spent()
    }

    /// What had to wait because the turn was over: bytes to send, something to receive, elements. A look at some sockets.
    pub fn left_over(&self) -> [bool; 3] {
        if !self.core.turn.is_over() {
            return [false; 3];
        }
        let [mut send, mut receive] = [false; 2];
        for &id in self.core.run.iter().take(4) {
            let (Some(sock), Some(entry)) = (self.core.socks.get(id), self.region.socket(id)) else {
                continue;
            };
            receive |= sock.bits & (RX_READY | RX_STALLED | THROTTLED) == RX_READY;
            send |= sock.bits & (TX_BLOCKED | THROTTLED) == 0
                && !sock.tx.is_none()
                && entry.tx_tail.load(Relaxed) != sock.tx_head;
        }
        [send, receive, self.has_elements()]
    }

    /// When [`Service::resume`] is to be called: sockets, or the guest's elements, wait for the tenant's rate. `u64::MAX`: none do.
    #[inline]
    pub fn throttled_until(&self) -> u64 {
        self.core.throttled_until
    }

    /// The guest pushed more than its tenant's rate of operations allows: its elements are left where they are for now.
    #[inline]
    pub fn elements_wait(&self) -> bool {
        self.core.elements_until != 0
    }

    /// Goes on with what had to wait.
    pub fn resume(&mut self) {
        self.core.throttled_until = u64::MAX;
        self.core.elements_until = 0;
        for id in std::mem::take(&mut self.core.throttled) {
            if let Some(sock) = self.core.socks.get_mut(id) {
                sock.bits &= !THROTTLED;
                self.core.enqueue(id);
            }
        }
    }

    /// True when [`Service::run`] has something to do.
    pub fn has_work(&self) -> bool {
        !self.core.run.is_empty()
    }

    /// Goes on with sockets that used up their turn.
    pub fn run(&mut self, stack: &mut dyn Stack, budget: usize) -> Result<usize, Violation> {
        self.core.run(&mut Cx { region: &self.region, stack }, budget)
    }

    /// A report of the stack.
    pub fn ready(&mut self, stack: &mut dyn Stack, id: u32, readiness: Readiness) -> Result<(), Violation> {
        self.core.ready(&mut Cx { region: &self.region, stack }, id, readiness)
    }

    /// True when [`Service::flush`] has somebody to wake.
    pub fn owes_wake_ups(&self) -> bool {
        self.core.events.has_pending()
    }

    /// The end of a batch: wakes who must be woken.
    #[inline]
    pub fn flush(&mut self, host: &mut dyn Host) {
        self.core.events.flush(&self.region, host);
    }

    /// Message DOORBELL: queue set `q` has an eventfd.
    pub fn doorbell(&mut self, q: u32) -> Result<(), Violation> {
        self.core.highest_queue = self.core.highest_queue.max(q);
        match self.core.events.queues.get_mut(q as usize) {
            Some(state) => {
                state.doorbell = true;
                // It uses the queue set since before this message, so that it may have been left out.
                if self.core.events.broadcast
                    && let Some(set) = self.region.queue_set(q)
                {
                    set.overflow.store(1, SeqCst);
                }
            }
            None => return Err(Violation("doorbell of a queue set out of range")),
        }
        Ok(())
    }

    /// A process of the guest is over: its queue sets are drained and taken back.
    pub fn end_process(&mut self, stack: &mut dyn Stack, tag: u32) -> Result<(), Violation> {
        self.core.turn.set_urgent(true);
        let result = self.core.end_process(&mut Cx { region: &self.region, stack }, tag);
        self.core.turn.set_urgent(false);
        result
    }

    /// Queue sets that were given back since the last call.
    pub fn take_released(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.core.released)
    }

    pub fn has_released(&self) -> bool {
        !self.core.released.is_empty()
    }

    /// True when [`Service::sweep`] should be called about a second later.
    pub fn wants_sweep(&self) -> bool {
        self.core.sweep_wanted || self.core.suspects
    }

    /// Gives memory back that was not used for a second. Call about every second while [`Service::wants_sweep`].
    pub fn sweep(&mut self, stack: &mut dyn Stack) -> Result<(), Violation> {
        self.core.sweep(&mut Cx { region: &self.region, stack })
    }

    /// True when sockets wait for memory or descriptors: call [`Service::retry`] some milliseconds later.
    pub fn is_starved(&self) -> bool {
        !self.core.starved.is_empty() || !self.core.unreturned.is_empty()
    }

    pub fn retry(&mut self) {
        self.core.retry_starved();
        for id in std::mem::take(&mut self.core.unreturned) {
            self.core.return_id(&self.region, id);
        }
    }

    /// All processes of the guest are gone: closes every socket as the kernel would. Those with unsent bytes go on until
    /// these are sent; the guest is over when [`Service::sockets`] is 0.
    pub fn close_all(&mut self, stack: &mut dyn Stack) -> Result<(), Violation> {
        let mut at = Some(0);
        while let Some(id) = at {
            self.close(stack, id)?;
            at = self.core.socks.next_id(id);
        }
        Ok(())
    }

    /// The engine ends in order: hands what the send rings hold to the stack, as far as that takes it at once.
    pub fn flush_all(&mut self, stack: &mut dyn Stack) {
        self.core.limits = Limits::default();
        self.core.turn = Turn::new();
        let mut cx = Cx { region: &self.region, stack };
        let mut at = Some(0);
        while let Some(id) = at {
            let _ = self.core.send(&mut cx, id, false);
            at = self.core.socks.next_id(id);
        }
    }

    /// Tells the guest that nothing will be served any more, and wakes everybody who waits for completions or events.
    /// (Those who sleep on placeholders wake when the engine closes these.)
    pub fn say_gone(&mut self, host: &mut dyn Host) {
        self.region.header().engine_gone.store(1, SeqCst);
        for q in 0..(self.core.highest_queue + 1).min(self.core.events.queues.len() as u32) {
            if let Some(set) = self.region.queue_set(q) {
                crate::memory::futex_wake(&set.complete_tail);
                host.ring(q);
            }
        }
    }

    /// Ends everything at once: the guest is over. Nothing is flushed.
    pub fn end(&mut self, stack: &mut dyn Stack) {
        let mut at = Some(0);
        while let Some(id) = at {
            self.core.end_pair(stack, id);
            if let Some(sock) = self.core.socks.get_mut(id)
                && sock.handle != Handle::NONE
            {
                let unread = sock.kind == Kind::Stream
                    && sock.rx_tail != self.region.socket(id).map_or(0, |entry| entry.rx_head.load(Relaxed));
                let abort = unread || sock.bits & UNTAKEN != 0 || sock.linger.resets();
                self.core.look_at_tcp(stack, id);
                let Some(sock) = self.core.socks.get_mut(id) else { break };
                stack.close(sock.handle, if abort { Close::Abort } else { Close::Graceful });
                sock.handle = Handle::NONE;
                let counted = std::mem::take(&mut sock.bits) & COUNTED != 0;
                self.core.uncount(counted);
            }
            at = self.core.socks.next_id(id);
        }
    }

    /// Sockets that are not over, those that only flush included.
    pub fn sockets(&self) -> u32 {
        self.core.sockets
    }

    /// How many sockets have ended, modulo 2^32.
    pub fn ended(&self) -> u32 {
        self.core.ended
    }

    /// Queue sets that the guest used so far and did not give back.
    pub fn queue_sets(&self) -> usize {
        self.core.events.queues.iter().filter(|q| q.used()).count()
    }

    /// Brings [`Service::stats`] up to date.
    pub fn count(&mut self, stack: &mut dyn Stack) {
        self.core.count_pairs(&mut Cx { region: &self.region, stack });
    }

    pub fn stats(&self) -> Stats {
        Stats {
            bytes_in: self.core.totals.bytes_in,
            bytes_out: self.core.totals.bytes_out,
            operations: self.core.totals.operations,
            connections: self.core.totals.connections,
            events: self.core.events.raised,
            sockets: self.core.sockets,
            ring_bytes: self.core.blocks.used_bytes(),
            tcp: self.core.totals.tcp,
        }
    }

    /// Asks the stack what it counted of open connections, of at most `most`, and says of how many; the next call goes on behind
    /// them. (Connections that end are asked of anyway.)
    pub fn look_at_tcp(&mut self, stack: &mut dyn Stack, most: usize) -> usize {
        let core = &mut self.core;
        let mut looked = 0;
        let mut at = core.tcp_next;
        while looked < most {
            let Some(id) = core.socks.get(at).map(|_| at).or_else(|| core.socks.next_id(at)) else {
                core.tcp_next = 0;
                return looked;
            };
            looked += usize::from(core.look_at_tcp(stack, id));
            at = id + 1;
        }
        core.tcp_next = at;
        looked
    }

    /// How long elements stood in the guest's rings, as it says: of 1 in 64.
    pub fn waited(&self) -> &Histogram {
        &self.core.waited
    }

    /// The sockets from `first` on, at most `most`; and where to go on, if there are more.
    pub fn list(&self, stack: &mut dyn Stack, first: u32, most: usize) -> (Vec<SocketInfo>, Option<u32>) {
        let mut out = Vec::new();
        let mut at = self.core.socks.get(first).map(|_| first).or_else(|| self.core.socks.next_id(first));
        while let Some(id) = at {
            if out.len() >= most {
                return (out, at);
            }
            at = self.core.socks.next_id(id);
            let (Some(entry), Some(sock)) = (self.region.socket(id), self.core.socks.get(id)) else {
                continue;
            };
            if sock.kind == Kind::Free {
                continue;
            }
            let name = |name: Result<SocketAddress, Errno>| name.ok();
            let has = |bits| sock.state & bits != 0;
            let pair = stack.paired(sock.handle).unwrap_or_default();
            out.push(SocketInfo {
                id,
                kind: match sock.kind {
                    Kind::Datagram => "datagram",
                    Kind::Listener => "listener",
                    _ => "stream",
                },
                state: match () {
                    () if has(state::HANDED) => "handed over",
                    () if sock.bits & CLOSING != 0 => "closing",
                    () if sock.bits & UNTAKEN != 0 => "accepting",
                    () if has(state::LISTENING) => "listening",
                    () if has(state::DEAD) => "dead",
                    () if has(state::CONNECTING) => "connecting",
                    () if has(state::RX_END) && has(state::TX_END) => "shut",
                    () if has(state::RX_END) => "peer-closed",
                    () if has(state::TX_END) => "half-closed",
                    () if has(state::CONNECTED) => "connected",
                    () if has(state::BOUND) => "bound",
                    () => "open",
                },
                local: name(stack.local_name(sock.handle)),
                peer: name(stack.peer_name(sock.handle)),
                receive_ring_bytes: sock.rx.size(),
                send_ring_bytes: sock.tx.size(),
                unread_bytes: pair.unread
                    + sock.rx_tail.wrapping_sub(entry.rx_head.load(Relaxed)).min(sock.rx.size()),
                way: stack.way(sock.handle),
                unsent_bytes: pair.unsent
                    + entry.tx_tail.load(Relaxed).wrapping_sub(sock.tx_head).min(sock.tx.size()),
                handle: sock.handle,
                inode: entry.inode.load(Relaxed),
            });
        }
        (out, None)
    }
}

/// How a listener accepts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ahead {
    Usual,
    /// What was told of when the stack had it.
    Quietly,
    /// One connection, if there is none, and quietly.
    One,
}

/// What became of a job.
enum Done {
    /// Status, bytes in the argument area, value.
    Answer(i32, u32, u64),
    /// Try once more when hang-ups were processed; the errno if that does not help.
    Again(i32),
}

impl Done {
    fn of(result: Result<(), Errno>) -> Done {
        Done::Answer(result.err().map_or(0, |e| -e.0), 0, 0)
    }
}

impl Core {
    fn open(&mut self, cx: &mut Cx, id: u32, domain: u32, kind: u32, protocol: u32) -> Result<(), Violation> {
        if id == 0 || id >= self.guest_sockets {
            return Err(Violation("new socket with an id that is not the guest's to take"));
        }
        let (Some(sock), Some(entry)) = (self.socks.make(id), cx.region.socket(id)) else {
            return Err(Violation("socket id out of range"));
        };
        if sock.kind != Kind::Free {
            return Err(Violation("new socket with an id in use"));
        }
        let generation = sock.generation;
        let kind = kind as i32 & 0xf;
        *sock = Sock { generation, domain: domain as u16, used_at: self.sweeps, ..Sock::default() };
        // What stands in the journal is a socket only when it is complete.
        compiler_fence(SeqCst);
        sock.kind = if kind == libc::SOCK_DGRAM { Kind::Datagram } else { Kind::Stream };
        match cx.stack.open(key(self.guest, id), domain as i32, kind, protocol as i32) {
            Ok(handle) => {
                sock.handle = handle;
                sock.fd = lasting(cx.stack, handle);
            }
            Err(errno) => sock.error = errno.0,
        }
        sock.state = state::OPEN | if sock.kind == Kind::Datagram { state::DATAGRAM } else { 0 };
        entry.kind.store((domain & 0xffff) << 16 | (protocol & 0xffff), Relaxed);
        entry.generation.store(generation, Relaxed);
        // SYNC: socket-state
        entry.state.store(sock.state, Release);
        self.sockets += 1;
        Ok(())
    }

    fn ready(&mut self, cx: &mut Cx, id: u32, readiness: Readiness) -> Result<(), Violation> {
        let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
        sock.used_at = self.sweeps;
        if sock.handle == Handle::NONE {
            // A late report of the socket that had this id before; the stack refused this one.
            return Ok(());
        }
        match sock.kind {
            Kind::Free => Ok(()),
            Kind::Listener => {
                sock.bits |= RX_READY;
                self.accept(cx, id)
            }
            Kind::Datagram => {
                if readiness.has(Readiness::READ | Readiness::ERROR) && sock.bits & CLOSING == 0 {
                    if readiness.has(Readiness::ERROR)
                        && let Err(errno) = cx.stack.take_error(sock.handle)
                    {
                        self.soft_error(cx, id, errno)?;
                    }
                    if let Some(sock) = self.socks.get_mut(id) {
                        sock.bits |= RX_READY;
                    }
                    self.receive_datagrams(cx, id)?;
                }
                if readiness.has(Readiness::WRITE | Readiness::ERROR) {
                    self.unblock(cx, id)?;
                }
                Ok(())
            }
            Kind::Stream => {
                if sock.state & state::CONNECTING != 0 {
                    if !readiness.has(Readiness::WRITE | Readiness::ERROR) {
                        return Ok(());
                    }
                    self.finish_connect(cx, id, readiness)?;
                }
                let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
                if sock.state & state::CONNECTED == 0 {
                    return Ok(());
                }
                if sock.bits & PAIRED != 0 {
                    return self.pair_ready(cx, id, readiness);
                }
                if readiness.has(Readiness::URGENT) {
                    sock.bits |= URGENT | MARK | URGENT_SEEN;
                    self.events.urgent(id);
                }
                if readiness.has(Readiness::ERROR)
                    && sock.state & (state::RX_END | state::DEAD) == state::RX_END
                    && let Err(errno) = cx.stack.take_error(sock.handle)
                {
                    // RST after FIN: there is nothing to receive that would tell of it.
                    return self.fail(cx, id, errno.0);
                }
                if readiness.has(Readiness::READ | Readiness::END | Readiness::ERROR | Readiness::URGENT) {
                    sock.bits |= RX_READY;
                    self.receive(cx, id)?;
                }
                if readiness.has(Readiness::WRITE | Readiness::ERROR) {
                    self.unblock(cx, id)?;
                }
                Ok(())
            }
        }
    }

    /// The stack has room again.
    fn unblock(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        match self.socks.get_mut(id) {
            Some(sock) if sock.bits & TX_BLOCKED != 0 => {
                sock.bits &= !TX_BLOCKED;
                self.send(cx, id, false)
            }
            _ => Ok(()),
        }
    }

    fn enqueue(&mut self, id: u32) {
        if let Some(sock) = self.socks.get_mut(id)
            && sock.bits & QUEUED == 0
        {
            sock.bits |= QUEUED;
            self.run.push_back(id);
        }
    }

    fn run(&mut self, cx: &mut Cx, budget: usize) -> Result<usize, Violation> {
        let turns = self.run.len().min(budget);
        for _ in 0..turns {
            if self.turn.is_over() {
                break;
            }
            let Some(id) = self.run.pop_front() else { break };
            let Some(sock) = self.socks.get_mut(id) else { continue };
            sock.bits &= !QUEUED;
            match sock.kind {
                Kind::Free => {}
                Kind::Listener => self.accept(cx, id)?,
                Kind::Datagram => {
                    self.receive_datagrams(cx, id)?;
                    self.send(cx, id, false)?;
                }
                Kind::Stream => {
                    self.receive(cx, id)?;
                    self.send(cx, id, false)?;
                }
            }
        }
        Ok(turns)
    }

    fn starve(&mut self, id: u32) {
        if let Some(sock) = self.socks.get_mut(id)
            && sock.bits & STARVED == 0
        {
            sock.bits |= STARVED;
            self.starved.push(id);
        }
    }

    /// It goes on at `again` (nanoseconds) or a little later.
    fn throttle(&mut self, id: u32, again: u64) {
        self.throttled_until = self.throttled_until.min(again);
        if let Some(sock) = self.socks.get_mut(id)
            && sock.bits & THROTTLED == 0
        {
            sock.bits |= THROTTLED;
            self.throttled.push(id);
        }
    }

    /// Counts what the stack knows of a connection. True: it was asked.
    fn look_at_tcp(&mut self, stack: &mut dyn Stack, id: u32) -> bool {
        let Some(sock) = self.socks.get_mut(id) else { return false };
        if sock.kind != Kind::Stream || sock.handle == Handle::NONE || sock.state & state::CONNECTED == 0 {
            return false;
        }
        if let Some(now) = stack.tcp_counts(sock.handle) {
            let mut last = sock.tcp.seen();
            self.totals.tcp.note(&mut last, now);
            sock.tcp = last.into();
        }
        true
    }

    fn uncount(&self, counted: bool) {
        if let Some(quota) = &self.limits.connections
            && counted
        {
            quota.give_back();
        }
    }

    fn retry_starved(&mut self) {
        for id in std::mem::take(&mut self.starved) {
            if let Some(sock) = self.socks.get_mut(id) {
                sock.bits &= !STARVED;
                self.enqueue(id);
            }
        }
    }

    fn give_block(&mut self, block: Block) {
        if !block.is_none() {
            self.blocks.give(block);
            self.sweep_wanted = true;
        }
    }
}

/// Nanoseconds since an element was pushed, by its [`Nqe::stamp`].
fn since(stamp: u16) -> u64 {
    let now = (now_ns() >> STAMP_SHIFT) as u16;
    u64::from(now.wrapping_sub(stamp)) << STAMP_SHIFT
}

fn low_water(block: Block) -> u32 {
    block.size() / 2
}

fn publish_tx(entry: &SocketEntry, block: Block) {
    entry.tx_offset.store((block.offset() / 64) as u32, Relaxed);
    entry.tx_low_water.store(low_water(block), Relaxed);
    // SYNC: tx-ring - offset and low water are visible with the size.
    entry.tx_size.store(block.size(), Release);
}

/// Exchanges the send ring if it is empty and nobody writes; returns the block that is free now.
fn replace_tx(entry: &SocketEntry, sock: &mut Sock, block: Block) -> Block {
    if entry.tx_lock.compare_exchange(0, ENGINE_LOCK, AcqRel, Relaxed).is_err() {
        return block;
    }
    let mut free = block;
    if entry.tx_tail.load(Acquire) == sock.tx_head {
        free = std::mem::replace(&mut sock.tx, block);
        publish_tx(entry, block);
    }
    let _ = entry.tx_lock.compare_exchange(ENGINE_LOCK, 0, AcqRel, Relaxed);
    free
}

/// The receive ring has too little room. True: the guest will send a Credit.
fn stall(entry: &SocketEntry, sock: &mut Sock, size: u32) -> Result<bool, Violation> {
    entry.rx_stalled.store(1, SeqCst);
    // SYNC: rx-stalled - a reader that moved the head before it could see the mark is seen here.
    fence(SeqCst);
    let used = bytes::used(entry.rx_head.load(SeqCst), sock.rx_tail, size)
        .map_err(|_| Violation("read position of a socket"))?;
    if used > size / 2 {
        sock.bits |= RX_STALLED;
        return Ok(true);
    }
    entry.rx_stalled.store(0, SeqCst);
    Ok(false)
}

/// Fetches an urgent byte and looks for its mark.
fn urgent(stack: &mut dyn Stack, entry: &SocketEntry, sock: &mut Sock) {
    if sock.bits & URGENT != 0 {
        match stack.recv_urgent(sock.handle) {
            Ok(byte) => {
                sock.state = (sock.state | state::OOB) & !state::OOB_MARK;
                entry.state.store(sock.state, Release);
                // SYNC: oob - who sees the byte sees that the mark before is no longer the one.
                entry.oob.store(256 | byte as u32, Release);
                sock.bits &= !URGENT;
            }
            Err(errno) if errno.would_block() => {}
            Err(_) => sock.bits &= !URGENT,
        }
    }
    if sock.bits & MARK != 0 {
        match stack.at_mark(sock.handle) {
            Ok(true) => {
                entry.oob_position.store(sock.rx_tail, Relaxed);
                sock.state |= state::OOB_MARK;
                sock.bits &= !MARK;
            }
            Ok(false) => {}
            Err(_) => sock.bits &= !MARK,
        }
    }
    entry.state.store(sock.state, Release);
}

/// Checks the control messages of a datagram: the stack's privileges are not the guest's.
fn sendable(bytes: &[u8], domain: u16) -> Result<(), Errno> {
    for message in ancillary::messages(bytes) {
        match message.map(|m| m.fate(domain == libc::AF_INET6 as u16)) {
            Ok(Fate::Pass) => {}
            Ok(Fate::Refuse(errno)) => return Err(Errno(errno)),
            // A correct guest drops what Linux does not look at.
            Ok(Fate::Ignore) | Err(ancillary::Malformed) => return Err(Errno(libc::EINVAL)),
        }
    }
    Ok(())
}

/// Writes header and control messages of the datagram whose payload stands, or will stand, behind `at`; says how long the
/// record is. `ring`: offset, size and base.
fn put_header(
    region: &Region,
    ring: (u64, u32, u32),
    at: u32,
    len: u32,
    from: SocketAddress,
    control: &[u8],
) -> u32 {
    let (address, address_len) = from.to_datagram();
    let mut header = DatagramHeader { len, address_len, address };
    let segments = |at, len| ring_segments(region, ring.0, ring.1, ring.2, at, len);
    if !control.is_empty() {
        // The kernel pads each message; what is missing of the last one's padding is of no matter.
        let padded = control.len().next_multiple_of(8).min(MAX_CONTROL as usize);
        header.set_control_len(padded as u32);
        segments(at.wrapping_add(datagram_record(len)), padded as u32).copy_from(control);
    }
    segments(at, 32).copy_from(&header_bytes(&header));
    header.record()
}

fn header_from(raw: &[u8; 32]) -> DatagramHeader {
    let word = |i: usize| u32::from_le_bytes([raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]]);
    DatagramHeader {
        len: word(0),
        address_len: word(1),
        address: [word(2), word(3), word(4), word(5), word(6), word(7)],
    }
}

fn header_bytes(header: &DatagramHeader) -> [u8; 32] {
    let mut out = [0; 32];
    out[..4].copy_from_slice(&header.len.to_le_bytes());
    out[4..8].copy_from_slice(&header.address_len.to_le_bytes());
    for (chunk, word) in out[8..].chunks_exact_mut(4).zip(header.address) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// Zeroes lines 0 and 1, all but the generation.
fn clear_engine_lines(entry: &SocketEntry) {
    for word in [
        &entry.state,
        &entry.error,
        &entry.rx_tail,
        &entry.rx_offset,
        &entry.rx_size,
        &entry.rx_base,
        &entry.rx_stalled,
        &entry.tx_head,
        &entry.tx_offset,
        &entry.tx_size,
        &entry.oob,
        &entry.oob_position,
        &entry.kind,
        &entry.tx_low_water,
        &entry.peer_len,
        &entry.local_len,
    ] {
        word.store(0, Relaxed);
    }
    for word in entry.peer.iter().chain(&entry.local) {
        word.store(0, Relaxed);
    }
}

/// Zeroes lines 2 and 3, for a socket that the engine makes.
fn clear_guest_lines(entry: &SocketEntry) {
    for word in [
        &entry.rx_head,
        &entry.tx_tail,
        &entry.tx_base,
        &entry.flags,
        &entry.rx_lock,
        &entry.tx_lock,
        &entry.tx_pending,
        &entry.waiters,
        &entry.tx_wanted,
        &entry.rcv_low_water,
        &entry.broadcast,
        &entry.event_pending,
        &entry.next_free,
        &entry.target_len,
    ] {
        word.store(0, Relaxed);
    }
    for word in [&entry.inode, &entry.rcv_timeout_us, &entry.snd_timeout_us] {
        word.store(0, Relaxed);
    }
    for watcher in &entry.watchers {
        watcher.store(0, Relaxed);
    }
    for word in &entry.target {
        word.store(0, Relaxed);
    }
}
