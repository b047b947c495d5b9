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

mod moved;
mod recover;
pub use moved::Stays;
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
    /// SO_LINGER with time 0: close means RST.
    pub const LINGER_0: u32 = 1 << 10;
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
    /// What was counted of its connection.
    tcp: Option<TcpCounts>,
    /// The descriptor of the stack's socket + 1; [`FLEETING`]: it has none, and ends with the process.
    fd: i32,
    /// Positions at which the connection began.
    tx_start: u32,
    rx_start: u32,
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
                let abort = unread || sock.bits & (LINGER_0 | UNTAKEN) != 0;
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
                    self.finish_connect(cx, id)?;
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
            self.totals.tcp.note(&mut sock.tcp, now);
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

    // ---- streams: receiving

    fn receive(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(id) else { return Ok(()) };
        let (mut rounds, mut got) = (0, 0);
        loop {
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            if sock.bits & PAIRED != 0 {
                return self.pair_turn(cx, id);
            }
            if sock.bits & (RX_READY | RX_STALLED | CLOSING) != RX_READY
                || sock.state & (state::CONNECTED | state::DEAD) != state::CONNECTED
                || sock.state & state::RX_END != 0 && sock.bits & SHUT_RD == 0
            {
                return Ok(());
            }
            if rounds >= VISIT_ROUNDS || got >= VISIT_BYTES || self.turn.is_over() {
                self.enqueue(id);
                return Ok(());
            }
            rounds += 1;
            // SYNC: rx-head - the guest has copied the bytes before it published this head.
            let head = entry.rx_head.load(Acquire);
            let used = bytes::used(head, sock.rx_tail, sock.rx.size())
                .map_err(|_| Violation("read position of a socket"))?;
            if sock.peeked > 0
                && (used < sock.peeked || sock.bits & (URGENT | MARK) != 0)
                && !sock.take_peeked(cx.stack)
            {
                return self.fail(cx, id, libc::ECONNRESET);
            }
            if used == 0 && (sock.rx.is_none() || sock.bits & RX_FILLED != 0) {
                let class = if sock.rx.is_none() {
                    Some(Block::class_for(entry.rcv_low_water.load(Relaxed)).max(STREAM_CLASS))
                } else if (sock.rx.class() as usize) < CLASSES - 1 && self.blocks.plenty() {
                    Some(sock.rx.class() + 1)
                } else {
                    None
                };
                sock.bits &= !RX_FILLED;
                if let Some(block) = class.and_then(|class| self.blocks.take(class)) {
                    let old = std::mem::replace(&mut sock.rx, block);
                    entry.rx_offset.store((block.offset() / 64) as u32, Relaxed);
                    entry.rx_size.store(block.size(), Relaxed);
                    self.blocks.give(old);
                    self.sweep_wanted = true;
                } else if sock.rx.is_none() {
                    self.starve(id);
                    return Ok(());
                }
            }
            let size = sock.rx.size();
            if used == 0 && sock.rx_base != sock.rx_tail {
                sock.rx_base = sock.rx_tail;
                entry.rx_base.store(sock.rx_base, Relaxed);
            }
            if used == size {
                sock.bits |= RX_FILLED;
                if stall(entry, sock, size)? {
                    return Ok(());
                }
                continue;
            }
            if sock.bits & (URGENT | MARK) != 0 {
                urgent(cx.stack, entry, sock);
                let (generation, pending) = (sock.generation, sock.bits & MARK == 0);
                if pending {
                    self.events.raise(region, entry, id, generation, PRI | IN, u32::MAX)?;
                }
                let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
                sock.bits |= RX_READY;
            }
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            let mut want = self.turn.most(size - used);
            self.turn.charge(CALL);
            let mut now = 0;
            if !self.limits.receive.is_idle() {
                now = now_ns();
                match self.limits.receive.allow(want.into(), now) {
                    Ok(allowed) => want = want.min(allowed as u32),
                    // The stack's own buffer fills, and its window closes.
                    Err(again) => {
                        self.throttle(id, again);
                        return Ok(());
                    }
                }
            }
            let into = ring_segments(region, sock.rx.offset(), size, sock.rx_base, sock.rx_tail, want);
            let peeked = if self.gives && sock.peeked == sock.rx_tail && sock.bits & (URGENT | MARK) == 0 {
                cx.stack.peek(sock.handle, sock.peeked as usize, &into)
            } else {
                Peeked::Unable
            };
            let received = match peeked {
                Peeked::Bytes(received) => {
                    sock.peeked += (received.bytes as u32).min(want);
                    Ok(received)
                }
                Peeked::End => Ok(Received { bytes: 0, more: false }),
                Peeked::Nothing => Err(Errno::AGAIN),
                Peeked::Failed(errno) => Err(errno),
                Peeked::Unable if sock.take_peeked(cx.stack) => cx.stack.recv(sock.handle, &into),
                Peeked::Unable => Err(Errno(libc::ECONNRESET)),
            };
            match received {
                Ok(received) if received.bytes > 0 => {
                    let n = (received.bytes as u32).min(want);
                    sock.rx_tail = sock.rx_tail.wrapping_add(n);
                    sock.used_at = self.sweeps;
                    got += n;
                    self.totals.bytes_in += n as u64;
                    self.turn.charge(n);
                    self.limits.receive.take(n.into(), now);
                    if n == size - used {
                        sock.bits |= RX_FILLED;
                    }
                    if !received.more && sock.bits & MARK == 0 {
                        sock.bits &= !RX_READY;
                    }
                    // SYNC: rx-tail - the bytes, and base, offset and size, are visible with it.
                    entry.rx_tail.store(sock.rx_tail, Release);
                    let generation = sock.generation;
                    self.events.raise(region, entry, id, generation, IN, u32::MAX)?;
                }
                Ok(_) => {
                    sock.bits &= !RX_READY;
                    if sock.error != 0 {
                        let errno = sock.error;
                        return self.fail(cx, id, errno);
                    }
                    if sock.state & state::RX_END != 0 {
                        return Ok(());
                    }
                    sock.state |= state::RX_END;
                    entry.state.store(sock.state, Release);
                    let generation = sock.generation;
                    return self.events.raise(region, entry, id, generation, IN | RDHUP, u32::MAX);
                }
                Err(errno) if errno.would_block() => {
                    sock.bits &= !(RX_READY | URGENT);
                    return Ok(());
                }
                Err(Errno(libc::EINTR)) => {}
                Err(errno) if errno.is_shortage() => {
                    self.starve(id);
                    return Ok(());
                }
                Err(errno) => return self.fail(cx, id, errno.0),
            }
        }
    }

    /// The connection is over with an error.
    fn fail(&mut self, cx: &mut Cx, id: u32, errno: i32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        if sock.bits & CLOSING != 0 {
            self.finish_close(cx, id, Close::Graceful);
            return Ok(());
        }
        if sock.state & state::DEAD != 0 {
            return Ok(());
        }
        sock.error = 0;
        entry.error.store(errno as u32, Relaxed);
        sock.state = (sock.state & !state::CONNECTING) | state::DEAD | state::RX_END | state::TX_END;
        entry.state.store(sock.state, Release);
        let generation = sock.generation;
        self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR | HUP | RDHUP, u32::MAX)
    }

    fn refuse(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        self.look_at_tcp(cx.stack, id);
        let Some(sock) = self.socks.get_mut(id).filter(|sock| sock.kind != Kind::Free) else { return Ok(()) };
        sock.fd = 0;
        let handle = std::mem::replace(&mut sock.handle, Handle::NONE);
        if handle != Handle::NONE {
            cx.stack.close(handle, Close::Abort);
        }
        if sock.state & state::CONNECTED != 0 {
            self.fail(cx, id, libc::ECONNRESET)?;
        }
        if let Some(sock) = self.socks.get_mut(id) {
            sock.error = libc::ENFILE;
        }
        Ok(())
    }

    /// An error that does not end the socket (datagrams).
    fn soft_error(&mut self, cx: &mut Cx, id: u32, errno: Errno) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        entry.error.store(errno.0 as u32, Release);
        let generation = sock.generation;
        self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR, u32::MAX)
    }

    // ---- sending

    /// Hands what stands in the send ring to the stack.
    fn send(&mut self, cx: &mut Cx, id: u32, more: bool) -> Result<(), Violation> {
        match self.socks.get_mut(id) {
            Some(sock) if sock.kind == Kind::Stream => self.send_stream(cx, id, more)?,
            Some(sock) if sock.kind == Kind::Datagram => self.send_datagrams(cx, id)?,
            _ => return Ok(()),
        }
        self.after_send(cx, id)
    }

    fn send_stream(&mut self, cx: &mut Cx, id: u32, more: bool) -> Result<(), Violation> {
        let region = cx.region;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), region.socket(id)) else { return Ok(()) };
        if sock.tx.is_none() && sock.state & state::NO_MEMORY != 0 {
            return self.send_ring_at_last(cx, id);
        }
        if sock.tx.is_none()
            || sock.state & state::CONNECTED == 0
            || sock.state & (state::DEAD | state::TX_END) != 0
        {
            return Ok(());
        }
        if sock.peeked > 0 && entry.rx_head.load(Acquire) == sock.rx_tail {
            // All of it was read: the stack need not keep it.
            sock.take_peeked(cx.stack);
        }
        let size = sock.tx.size();
        // At most two pieces: what ends with an urgent byte, and the rest.
        for _ in 0..2 {
            // SYNC: tx-tail - the bytes before it, and the base, are visible.
            let tail = entry.tx_tail.load(Acquire);
            let mut len =
                bytes::used(sock.tx_head, tail, size).map_err(|_| Violation("write position of a socket"))?;
            if len == 0 {
                break;
            }
            sock.used_at = self.sweeps;
            if len == size {
                sock.bits |= TX_FILLED;
            }
            if sock.bits & TX_BLOCKED != 0 {
                break;
            }
            if self.turn.is_over() {
                self.enqueue(id);
                break;
            }
            let mut urgent = false;
            if sock.bits & TX_URGENT != 0 {
                let until = sock.tx_mark.wrapping_sub(sock.tx_head);
                if until as i32 <= 0 {
                    sock.bits &= !TX_URGENT;
                } else if until <= len {
                    len = until;
                    urgent = true;
                }
            }
            let (mut now, mut limited) = (0, false);
            let most = self.turn.most(len);
            let cut = most < len;
            if cut {
                (len, urgent) = (most, false);
            }
            self.turn.charge(CALL);
            if !self.limits.send.is_idle() {
                now = now_ns();
                match self.limits.send.allow(len.into(), now) {
                    Ok(allowed) if allowed < u64::from(len) => {
                        (len, limited, urgent) = (allowed as u32, true, false);
                    }
                    Ok(_) => {}
                    Err(again) => {
                        self.throttle(id, again);
                        break;
                    }
                }
            }
            let base = entry.tx_base.load(Relaxed);
            let data = ring_segments(region, sock.tx.offset(), size, base, sock.tx_head, len);
            match cx.stack.send(sock.handle, &data, SendFlags { more, urgent }) {
                Ok(n) => {
                    let n = (n as u32).min(len);
                    sock.tx_head = sock.tx_head.wrapping_add(n);
                    self.totals.bytes_out += n as u64;
                    self.turn.charge(n);
                    self.limits.send.take(n.into(), now);
                    // SYNC: tx-head - the stack has taken the bytes.
                    entry.tx_head.store(sock.tx_head, Release);
                    if n < len {
                        sock.bits |= TX_BLOCKED;
                        break;
                    }
                    if limited {
                        self.throttle(id, now);
                        break;
                    }
                    if cut {
                        self.enqueue(id);
                        break;
                    }
                    if !urgent {
                        break;
                    }
                    sock.bits &= !TX_URGENT;
                }
                Err(errno) if errno.would_block() => {
                    sock.bits |= TX_BLOCKED;
                    break;
                }
                Err(errno) if errno.is_shortage() || errno.0 == libc::EINTR => {
                    self.starve(id);
                    break;
                }
                Err(errno) => return self.send_failed(cx, id, errno),
            }
        }
        Ok(())
    }

    /// A writer waits for memory.
    fn send_ring_at_last(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        if !self.ensure_tx(cx, id, STREAM_CLASS) {
            self.starve(id);
            return Ok(());
        }
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        sock.state &= !state::NO_MEMORY;
        let generation = sock.generation;
        self.publish_state(cx, id);
        self.events.raise(cx.region, entry, id, generation, OUT, u32::MAX)
    }

    /// The stack refuses to send: the connection is over. Bytes that came before are still received.
    fn send_failed(&mut self, cx: &mut Cx, id: u32, errno: Errno) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        if sock.bits & CLOSING != 0 {
            return self.fail(cx, id, errno.0);
        }
        let errno = match cx.stack.take_error(sock.handle) {
            Err(pending) if errno.0 == libc::EPIPE => pending,
            _ => errno,
        };
        sock.tx_head = entry.tx_tail.load(Relaxed);
        entry.tx_head.store(sock.tx_head, Release);
        sock.bits &= !(SHUT_WR | TX_BLOCKED);
        if errno.0 != libc::EPIPE {
            sock.error = errno.0;
        }
        sock.state |= state::TX_END;
        if sock.state & state::RX_END != 0 {
            return if sock.error != 0 {
                let errno = sock.error;
                self.fail(cx, id, errno)
            } else {
                let generation = sock.generation;
                entry.state.store(sock.state, Release);
                self.events.raise(cx.region, entry, id, generation, OUT | HUP, u32::MAX)
            };
        }
        entry.state.store(sock.state, Release);
        sock.bits |= RX_READY;
        let generation = sock.generation;
        self.events.raise(cx.region, entry, id, generation, OUT, u32::MAX)?;
        self.receive(cx, id)
    }

    fn send_datagrams(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(id) else { return Ok(()) };
        let mut sent = 0;
        loop {
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            if sock.tx.is_none() || sock.handle == Handle::NONE {
                return Ok(());
            }
            let size = sock.tx.size();
            // SYNC: tx-tail
            let tail = entry.tx_tail.load(Acquire);
            let used =
                bytes::used(sock.tx_head, tail, size).map_err(|_| Violation("write position of a socket"))?;
            if used == 0 || sock.bits & TX_BLOCKED != 0 {
                return Ok(());
            }
            if sent >= VISIT_DATAGRAMS || self.turn.is_over() {
                self.enqueue(id);
                return Ok(());
            }
            let mut now = 0;
            if !self.limits.send.is_idle() {
                now = now_ns();
                // A datagram goes whole: the bucket may go below empty by one batch.
                if let Err(again) = self.limits.send.allow(used.into(), now) {
                    self.throttle(id, again);
                    return Ok(());
                }
            }
            sock.used_at = self.sweeps;
            let base = entry.tx_base.load(Relaxed);
            let mut batch =
                [Datagram { data: crate::Segments::EMPTY, to: SocketAddress::default(), control: &[] };
                    DATAGRAM_BATCH];
            let mut ends = [0u32; DATAGRAM_BATCH];
            let (mut controls, mut control_ends, mut refused) = (Vec::new(), [0; DATAGRAM_BATCH], None);
            let (mut n, mut position, mut payload) = (0, sock.tx_head, 0u64);
            while n < DATAGRAM_BATCH && position != tail {
                let left = tail.wrapping_sub(position);
                let mut raw = [0u8; 32];
                if left < 32 {
                    return Err(Violation("datagram without a header"));
                }
                ring_segments(region, sock.tx.offset(), size, base, position, 32).copy_to(&mut raw);
                let header = header_from(&raw);
                let control = header.control_len();
                if header.len > MAX_DATAGRAM || header.record() > left {
                    return Err(Violation("datagram longer than its ring"));
                }
                if control > MAX_CONTROL || !control.is_multiple_of(8) {
                    return Err(Violation("control messages of a datagram"));
                }
                let to = match header.address_len & 0xff {
                    0 => SocketAddress::default(),
                    len => SocketAddress::from_datagram(&header.address, len)
                        .unwrap_or(SocketAddress::from_bytes(&[0; 16])),
                };
                let data = ring_segments(
                    region,
                    sock.tx.offset(),
                    size,
                    base,
                    position.wrapping_add(32),
                    header.len,
                );
                if control != 0 {
                    let at = position.wrapping_add(datagram_record(header.len));
                    let from = controls.len();
                    controls.resize(from + control as usize, 0);
                    ring_segments(region, sock.tx.offset(), size, base, at, control)
                        .copy_to(&mut controls[from..]);
                    if let Err(errno) = sendable(&controls[from..], sock.domain) {
                        if n == 0 {
                            refused = Some(errno);
                            ends[0] = position.wrapping_add(header.record());
                        }
                        controls.truncate(from);
                        break;
                    }
                }
                position = position.wrapping_add(header.record());
                batch[n] = Datagram { data, to, control: &[] };
                ends[n] = position;
                control_ends[n] = controls.len();
                payload += header.len as u64;
                n += 1;
            }
            if !controls.is_empty() {
                let mut from = 0;
                for (datagram, &end) in batch[..n].iter_mut().zip(&control_ends) {
                    datagram.control = &controls[from..end];
                    from = end;
                }
            }
            let result = match refused {
                Some(errno) => Err(errno),
                None => cx.stack.send_datagrams(sock.handle, &batch[..n]),
            };
            match result {
                Ok(k) if k > 0 => {
                    let k = k.min(n);
                    sock.tx_head = ends[k - 1];
                    let passed =
                        if k == n { payload } else { batch[..k].iter().map(|d| d.data.len() as u64).sum() };
                    self.totals.bytes_out += passed;
                    self.limits.send.take(passed, now);
                    self.turn.charge((passed as u32).saturating_add(k as u32 * DATAGRAM));
                    sent += k as u32;
                }
                Ok(_) => sock.bits |= TX_BLOCKED,
                Err(errno) if errno.would_block() => sock.bits |= TX_BLOCKED,
                Err(errno) if errno.is_shortage() || errno.0 == libc::EINTR => {
                    self.starve(id);
                    return Ok(());
                }
                Err(errno) => {
                    // That datagram is lost, as after a failed sendto.
                    sock.tx_head = ends[0];
                    sent += 1;
                    entry.tx_head.store(sock.tx_head, Release);
                    if sock.bits & CLOSING == 0 {
                        self.soft_error(cx, id, errno)?;
                    }
                    continue;
                }
            }
            // SYNC: tx-head
            entry.tx_head.store(sock.tx_head, Release);
        }
    }

    /// Room, growth, and what waited for the send ring to become empty.
    fn after_send(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), region.socket(id)) else { return Ok(()) };
        if sock.kind == Kind::Free {
            return Ok(());
        }
        let size = sock.tx.size();
        let used = bytes::used(sock.tx_head, entry.tx_tail.load(Acquire), size)
            .map_err(|_| Violation("write position of a socket"))?;
        if used == 0 {
            if sock.bits & CLOSING != 0 {
                self.finish_close(cx, id, Close::Graceful);
                return Ok(());
            }
            if sock.bits & SHUT_WR != 0 {
                let _ = cx.stack.shutdown(sock.handle, Shutdown::Write);
                sock.state |= state::TX_END;
                sock.bits &= !SHUT_WR;
                entry.state.store(sock.state, Release);
                let generation = sock.generation;
                self.events.raise(region, entry, id, generation, OUT, u32::MAX)?;
            } else if sock.bits & TX_FILLED != 0 {
                sock.bits &= !TX_FILLED;
                if (sock.tx.class() as usize) < CLASSES - 1
                    && self.blocks.plenty()
                    && let Some(block) = self.blocks.take(sock.tx.class() + 1)
                {
                    let unused = replace_tx(entry, sock, block);
                    self.blocks.give(unused);
                    self.sweep_wanted = true;
                }
            }
        }
        let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
        let room = sock.tx.size() - used.min(sock.tx.size());
        // SYNC: tx-wanted - the head stored above is visible to a writer that set tx_wanted before we look at it.
        fence(SeqCst);
        if entry.tx_wanted.load(Relaxed) != 0
            && room >= low_water(sock.tx)
            && entry.tx_wanted.swap(0, SeqCst) != 0
        {
            let generation = sock.generation;
            self.events.raise(region, entry, id, generation, OUT, u32::MAX)?;
        }
        Ok(())
    }

    /// Gives the socket a send ring if it has none.
    fn ensure_tx(&mut self, cx: &mut Cx, id: u32, class: u8) -> bool {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return false };
        if !sock.tx.is_none() {
            return true;
        }
        let Some(block) = self.blocks.take(class) else { return false };
        self.sweep_wanted = true;
        sock.tx = block;
        sock.used_at = self.sweeps;
        publish_tx(entry, block);
        true
    }

    // ---- datagrams: receiving

    fn receive_datagrams(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(id) else { return Ok(()) };
        let (mut rounds, mut got, mut told) = (0usize, 0u32, 0u32);
        while let Some(sock) = self.socks.get_mut(id) {
            if sock.bits & (RX_READY | RX_STALLED | CLOSING) != RX_READY || sock.handle == Handle::NONE {
                break;
            }
            if rounds >= VISIT_DATAGRAMS as usize || self.turn.is_over() {
                self.enqueue(id);
                break;
            }
            if !self.limits.receive.is_idle()
                && let Err(again) = self.limits.receive.allow(MAX_DATAGRAM.into(), now_ns())
            {
                // They wait in the stack's socket.
                self.throttle(id, again);
                break;
            }
            // SYNC: rx-head
            let head = entry.rx_head.load(Acquire);
            let used = bytes::used(head, sock.rx_tail, sock.rx.size())
                .map_err(|_| Violation("read position of a socket"))?;
            let filled = used == 0
                && sock.bits & RX_FILLED != 0
                && (sock.rx.class() as usize) < CLASSES - 1
                && self.blocks.plenty();
            if sock.rx.is_none() || filled {
                sock.bits &= !RX_FILLED;
                let class = if sock.rx.is_none() { DATAGRAM_CLASS } else { sock.rx.class() + 1 };
                let Some(block) = self.blocks.take(class) else {
                    if filled {
                        continue;
                    }
                    self.starve(id);
                    break;
                };
                self.sweep_wanted = true;
                let old = std::mem::replace(&mut sock.rx, block);
                self.blocks.give(old);
                entry.rx_offset.store((block.offset() / 64) as u32, Relaxed);
                entry.rx_size.store(block.size(), Relaxed);
            }
            let size = sock.rx.size();
            if used == 0 && sock.rx_base != sock.rx_tail {
                sock.rx_base = sock.rx_tail;
                entry.rx_base.store(sock.rx_base, Relaxed);
            }
            let free = size - used;
            let needed = match free {
                free if free >= datagram_record(MAX_DATAGRAM) + MAX_CONTROL => 0,
                _ => datagram_record(
                    cx.stack.next_datagram(sock.handle).unwrap_or(0).min(MAX_DATAGRAM as usize) as u32,
                ),
            };
            if needed.max(32) + MAX_CONTROL > free {
                sock.bits |= RX_FILLED;
                if stall(entry, sock, size)? {
                    break;
                }
                continue;
            }
            let ring = (sock.rx.offset(), size, sock.rx_base);
            let several = (free / (datagram_record(MAX_DATAGRAM) + MAX_CONTROL)) as usize;
            if sock.bits & SMALL != 0 && several > 1 {
                let several = several.min(DATAGRAM_BATCH);
                let (mut tail, mut bytes, mut largest) = (sock.rx_tail, 0, 0);
                let result = cx.stack.recv_datagrams(sock.handle, several, &mut |data, from, control| {
                    let data = &data[..data.len().min(MAX_DATAGRAM as usize)];
                    ring_segments(region, ring.0, ring.1, ring.2, tail.wrapping_add(32), data.len() as u32)
                        .copy_from(data);
                    tail =
                        tail.wrapping_add(put_header(region, ring, tail, data.len() as u32, from, control));
                    bytes += data.len();
                    largest = largest.max(data.len());
                });
                match result {
                    Ok(n) => {
                        rounds += n.max(1);
                        got += n as u32;
                        if n < several {
                            sock.bits &= !RX_READY;
                        }
                        if largest > SMALL_DATAGRAM {
                            sock.bits &= !SMALL;
                        }
                        sock.rx_tail = tail;
                        sock.used_at = self.sweeps;
                        self.totals.bytes_in += bytes as u64;
                        self.limits.receive.charge(bytes as u64);
                        self.turn.charge((bytes as u32).saturating_add(n as u32 * DATAGRAM));
                        // Told together with what follows at once, so that recvmmsg finds together what was sent so.
                        if got - told >= DATAGRAM_BATCH as u32 {
                            told = got;
                            // SYNC: rx-tail
                            entry.rx_tail.store(tail, Release);
                        }
                    }
                    Err(errno) => {
                        rounds += 1;
                        if self.receive_failed(cx, id, errno)? {
                            break;
                        }
                    }
                }
                continue;
            }
            rounds += 1;
            let room = (free - 32 - MAX_CONTROL).min(MAX_DATAGRAM);
            let into = ring_segments(
                region,
                sock.rx.offset(),
                size,
                sock.rx_base,
                sock.rx_tail.wrapping_add(32),
                room,
            );
            let mut control = [0u8; MAX_CONTROL as usize];
            match cx.stack.recv_datagram(sock.handle, &into, &mut control) {
                Ok(received) => {
                    let len = (received.bytes as u32).min(room);
                    let control = &control[..received.control.min(control.len())];
                    let record = put_header(region, ring, sock.rx_tail, len, received.from, control);
                    sock.rx_tail = sock.rx_tail.wrapping_add(record);
                    let small = len as usize <= SMALL_DATAGRAM;
                    sock.bits = if small { sock.bits | SMALL } else { sock.bits & !SMALL };
                    sock.used_at = self.sweeps;
                    self.totals.bytes_in += len as u64;
                    self.limits.receive.charge(len as u64);
                    self.turn.charge(len + DATAGRAM);
                    got += 1;
                    if sock.bits & SMALL == 0 {
                        told = got;
                        // SYNC: rx-tail
                        entry.rx_tail.store(sock.rx_tail, Release);
                    }
                }
                Err(errno) => {
                    if self.receive_failed(cx, id, errno)? {
                        break;
                    }
                }
            }
        }
        if got > 0
            && let Some(sock) = self.socks.get_mut(id)
        {
            // SYNC: rx-tail
            entry.rx_tail.store(sock.rx_tail, Release);
            let generation = sock.generation;
            // One sleeper a datagram; a sender that waits for room must not be that one.
            let most = if entry.tx_wanted.load(Relaxed) != 0 { u32::MAX } else { got };
            self.events.raise(region, entry, id, generation, IN, most)?;
        }
        Ok(())
    }

    /// True: not now.
    fn receive_failed(&mut self, cx: &mut Cx, id: u32, errno: Errno) -> Result<bool, Violation> {
        match errno {
            Errno(libc::EINTR) => {}
            errno if errno.is_shortage() => {
                self.starve(id);
                return Ok(true);
            }
            errno if errno.would_block() => {
                if let Some(sock) = self.socks.get_mut(id) {
                    sock.bits &= !RX_READY;
                }
            }
            errno => self.soft_error(cx, id, errno)?,
        }
        Ok(false)
    }

    // ---- listeners

    fn take_id(&mut self) -> Option<u32> {
        if let Some(id) = self.free_ids.pop() {
            return Some(id);
        }
        if self.next_id >= self.limit {
            return None;
        }
        self.socks.make(self.next_id)?;
        self.next_id += 1;
        Some(self.next_id - 1)
    }

    fn accept(&mut self, cx: &mut Cx, listener: u32) -> Result<(), Violation> {
        match self.socks.get(listener) {
            Some(sock) if sock.state & state::ON_DEMAND != 0 => self.offer(cx, listener),
            _ => self.accept_ahead(cx, listener, Ahead::Usual),
        }
    }

    /// Says whether a listener that accepts on demand has a connection.
    fn offer(&mut self, cx: &mut Cx, listener: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(listener), cx.region.socket(listener)) else {
            return Ok(());
        };
        if sock.bits & RX_READY == 0 || sock.state & state::LISTENING == 0 {
            return Ok(());
        }
        sock.bits &= !RX_READY;
        let acceptable = cx.stack.acceptable(sock.handle);
        sock.state = (sock.state & !state::ACCEPTABLE) | if acceptable { state::ACCEPTABLE } else { 0 };
        let generation = sock.generation;
        self.publish_state(cx, listener);
        if acceptable {
            self.events.raise(cx.region, entry, listener, generation, IN, 1)?;
        }
        Ok(())
    }

    fn job_accept(&mut self, cx: &mut Cx, listener: u32) -> Result<Done, Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(listener), cx.region.socket(listener)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        if sock.state & state::LISTENING == 0 {
            return Ok(Done::Answer(-libc::EINVAL, 0, 0));
        }
        if sock.state & state::ON_DEMAND == 0 {
            return Ok(Done::Answer(0, 0, 0));
        }
        sock.bits |= RX_READY;
        if sock.link > SMALL_BACKLOG as u32 {
            // It was not to accept ahead before its guest accepts.
            sock.state &= !(state::ON_DEMAND | state::ACCEPTABLE);
            self.publish_state(cx, listener);
            self.accept_ahead(cx, listener, Ahead::Quietly)?;
            let Some(sock) = self.socks.get(listener) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
            let waiting = sock.rx_tail.wrapping_sub(entry.rx_head.load(Acquire)) / ACCEPT_RECORD;
            if waiting > 1 && entry.waiters.load(SeqCst) != 0 {
                // Others sleep: what came together was told of once.
                let generation = sock.generation;
                self.events.raise(cx.region, entry, listener, generation, IN, waiting - 1)?;
            }
            return Ok(Done::Answer(if waiting == 0 { -libc::EAGAIN } else { 0 }, 0, 0));
        }
        self.accept_ahead(cx, listener, Ahead::One)?;
        let Some(sock) = self.socks.get_mut(listener) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
        if sock.rx_tail != entry.rx_head.load(Acquire) {
            sock.bits |= RX_READY;
            self.offer(cx, listener)?;
            return Ok(Done::Answer(0, 0, 0));
        }
        // None; or the stack lacks something (RX_READY stands then), which is offered again later.
        sock.state &= !state::ACCEPTABLE;
        self.publish_state(cx, listener);
        Ok(Done::Answer(-libc::EAGAIN, 0, 0))
    }

    /// Accepts into the listener's ring, as far ahead as its backlog allows.
    fn accept_ahead(&mut self, cx: &mut Cx, listener: u32, ahead: Ahead) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(listener) else { return Ok(()) };
        let mut new = 0;
        let mut rounds = 0;
        while let Some(sock) = self.socks.get_mut(listener) {
            if sock.bits & (RX_READY | RX_STALLED) != RX_READY || sock.state & state::LISTENING == 0 {
                break;
            }
            if rounds >= VISIT_ACCEPTS || self.turn.is_over() {
                self.enqueue(listener);
                break;
            }
            rounds += 1;
            let size = sock.rx.size();
            // SYNC: rx-head
            let head = entry.rx_head.load(Acquire);
            let used = bytes::used(head, sock.rx_tail, size).map_err(|_| Violation("accept position"))?;
            let most = (sock.link / 2).clamp(1, size / ACCEPT_RECORD - 1);
            if ahead == Ahead::One && used > 0 {
                break;
            }
            if used.div_ceil(ACCEPT_RECORD) >= most {
                entry.rx_stalled.store(1, SeqCst);
                fence(SeqCst);
                if entry.rx_head.load(SeqCst) == head {
                    sock.bits |= RX_STALLED;
                    break;
                }
                entry.rx_stalled.store(0, SeqCst);
                continue;
            }
            if used == 0 && sock.rx_base != sock.rx_tail {
                sock.rx_base = sock.rx_tail;
                entry.rx_base.store(sock.rx_base, Relaxed);
            }
            let (handle, domain, inherited) = (sock.handle, sock.domain, sock.bits & LINGER_0);
            if self.limits.connections.as_ref().is_some_and(|places| !places.take()) {
                // The tenant has all that it may have: more wait in the stack's own queue.
                self.starve(listener);
                break;
            }
            let counted = self.limits.connections.is_some();
            let Some(id) = self.take_id() else {
                // No ids: connections wait in the stack's own queue.
                self.uncount(counted);
                self.starve(listener);
                break;
            };
            let accepted = match cx.stack.accept(handle, key(self.guest, id)) {
                Ok(accepted) => accepted,
                Err(errno) => {
                    self.free_ids.push(id);
                    self.uncount(counted);
                    if errno.would_block() {
                        if let Some(sock) = self.socks.get_mut(listener) {
                            sock.bits &= !RX_READY;
                        }
                        break;
                    }
                    if errno.is_shortage() || matches!(errno.0, libc::EINVAL | libc::EBADF) {
                        self.starve(listener);
                        break;
                    }
                    // The connection was over before it was accepted: the next one.
                    continue;
                }
            };
            self.turn.charge(SOCKET);
            self.begin_accepted(cx, id, domain, accepted);
            if counted && let Some(sock) = self.socks.get_mut(id) {
                sock.bits |= COUNTED;
            }
            self.receive(cx, id)?;
            let at = self.socks.get(listener).map_or(0, |sock| sock.rx_tail);
            if let Some(sock) = self.socks.get_mut(id) {
                sock.link = listener;
                sock.bits |= inherited;
                sock.record = at.wrapping_add(ACCEPT_RECORD);
            }
            let generation = {
                let generation = self.socks.get_mut(id).map_or(0, |s| s.generation);
                let Some(sock) = self.socks.get_mut(listener) else { break };
                let mut record = [0u8; ACCEPT_RECORD as usize];
                record[..4].copy_from_slice(&id.to_le_bytes());
                record[4..].copy_from_slice(&generation.to_le_bytes());
                ring_segments(region, sock.rx.offset(), size, sock.rx_base, at, ACCEPT_RECORD)
                    .copy_from(&record);
                compiler_fence(SeqCst);
                sock.rx_tail = at.wrapping_add(ACCEPT_RECORD);
                // SYNC: rx-tail - the record and the new socket's entry.
                entry.rx_tail.store(sock.rx_tail, Release);
                sock.generation
            };
            new += u32::from(ahead == Ahead::Usual);
            if new == 1 {
                self.events.raise(region, entry, listener, generation, IN, 0)?;
            }
        }
        if new > 0
            && let Some(sock) = self.socks.get_mut(listener)
        {
            let generation = sock.generation;
            self.events.raise(region, entry, listener, generation, IN, new)?;
        }
        Ok(())
    }

    fn begin_accepted(&mut self, cx: &mut Cx, id: u32, domain: u16, accepted: crate::Accepted) {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return };
        let generation = sock.generation;
        *sock = Sock {
            handle: accepted.handle,
            state: state::OPEN | state::CONNECTED | state::BOUND,
            bits: UNTAKEN | RX_READY,
            fd: lasting(cx.stack, accepted.handle),
            domain,
            generation,
            used_at: self.sweeps,
            ..Sock::default()
        };
        compiler_fence(SeqCst);
        sock.kind = Kind::Stream;
        clear_guest_lines(entry);
        entry.kind.store((domain as u32) << 16, Relaxed);
        entry.generation.store(generation, Relaxed);
        for (word, value) in entry.peer.iter().zip(accepted.peer.to_words()) {
            word.store(value, Relaxed);
        }
        entry.peer_len.store(accepted.peer.as_bytes().len() as u32, Relaxed);
        let paired = paired::begin(cx.stack, entry, sock);
        self.has_pairs |= paired;
        entry.state.store(sock.state, Release);
        self.sockets += 1;
        self.totals.connections += 1;
        if self.blocks.plenty() && !paired {
            self.ensure_tx(cx, id, STREAM_CLASS);
        }
    }

    // ---- connecting

    fn finish_connect(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        let generation = sock.generation;
        match cx.stack.take_error(sock.handle) {
            Ok(()) if cx.stack.peer_name(sock.handle).is_ok() => {
                sock.state = (sock.state & !state::CONNECTING) | state::CONNECTED | state::BOUND;
                sock.bits &= !TX_BLOCKED;
                sock.bits |= RX_READY;
                self.totals.connections += 1;
                let paired = paired::begin(cx.stack, entry, sock);
                self.has_pairs |= paired;
                if !paired {
                    self.ensure_tx(cx, id, STREAM_CLASS);
                }
                self.publish_state(cx, id);
                self.events.raise(cx.region, entry, id, generation, OUT, u32::MAX)?;
                if paired {
                    self.pair_turn(cx, id)?;
                }
            }
            // Not over yet: a report that came too early.
            Ok(()) => {}
            Err(errno) => {
                sock.state = (sock.state & !state::CONNECTING) | state::CONNECT_FAILED;
                entry.error.store(errno.0 as u32, Relaxed);
                self.publish_state(cx, id);
                self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR | HUP, u32::MAX)?;
            }
        }
        Ok(())
    }

    fn publish_state(&mut self, cx: &Cx, id: u32) {
        if let (Some(sock), Some(entry)) = (self.socks.get(id), cx.region.socket(id)) {
            // SYNC: socket-state - everything that the state implies (rings, error) is visible with it.
            entry.state.store(sock.state, Release);
        }
    }

    // ---- handing over

    fn hand_over(
        &mut self,
        cx: &mut Cx,
        id: u32,
        generation: u32,
        soft: bool,
    ) -> Result<Result<OwnedFd, Errno>, Violation> {
        let usable = |sock: &Sock| {
            sock.generation == generation
                && sock.kind != Kind::Free
                && sock.handle != Handle::NONE
                && sock.bits & (CLOSING | UNTAKEN) == 0
        };
        if !self.socks.get(id).is_some_and(usable) {
            return Ok(Err(Errno(libc::EBADF)));
        }
        self.send(cx, id, false)?;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Err(Errno(libc::EBADF)));
        };
        if !usable(sock) || sock.state & state::DEAD != 0 {
            return Ok(Err(Errno(libc::EBADF)));
        }
        let unread = match sock.kind {
            // Connections that were accepted ahead cannot go back.
            Kind::Listener if soft && entry.rx_head.load(Acquire) != sock.rx_tail => {
                return Ok(Err(Errno(libc::EBUSY)));
            }
            Kind::Listener => 0,
            _ => bytes::used(entry.rx_head.load(Acquire), sock.rx_tail, sock.rx.size())
                .map_err(|_| Violation("read position of a socket"))?,
        };
        if unread > sock.peeked {
            return Ok(Err(Errno(libc::EBUSY)));
        }
        let tx = if sock.tx.is_none() { Block::NONE } else { replace_tx(entry, sock, Block::NONE) };
        if !sock.tx.is_none() || sock.bits & SHUT_WR != 0 && sock.state & state::TX_END == 0 {
            return Ok(Err(Errno(libc::EAGAIN)));
        }
        self.give_block(tx);
        self.look_at_tcp(cx.stack, id);
        let Some(sock) = self.socks.get_mut(id) else { return Ok(Err(Errno(libc::EBADF))) };
        if sock.peeked > unread && cx.stack.discard(sock.handle, (sock.peeked - unread) as usize).is_err() {
            return Ok(Err(Errno(libc::EIO)));
        }
        sock.peeked = unread;
        let fd = match cx.stack.give(sock.handle) {
            Ok(fd) => fd,
            Err(errno) => return Ok(Err(errno)),
        };
        sock.handle = Handle::NONE;
        sock.error = libc::EBADF;
        sock.bits &= QUEUED | STARVED;
        sock.state |= state::HANDED;
        let (generation, listener) = (sock.generation, sock.kind == Kind::Listener);
        if listener {
            // Connections that the guest has not accepted cannot go back.
            self.drop_untaken(cx, id);
        }
        self.publish_state(cx, id);
        self.events.raise(cx.region, entry, id, generation, IN | OUT, u32::MAX)?;
        Ok(Ok(fd))
    }

    // ---- closing

    fn close(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        match sock.kind {
            Kind::Free => return Ok(()),
            Kind::Listener => {
                self.drop_untaken(cx, id);
                self.finish_close(cx, id, Close::Graceful);
                return Ok(());
            }
            // Handed over, or the stack had none.
            Kind::Stream | Kind::Datagram if sock.handle == Handle::NONE => {
                self.finish_close(cx, id, Close::Graceful);
                return Ok(());
            }
            Kind::Stream | Kind::Datagram => {}
        }
        if sock.bits & CLOSING != 0 {
            return Ok(());
        }
        if sock.kind == Kind::Stream && sock.state & state::CONNECTED != 0 {
            let unread = sock.rx_tail != entry.rx_head.load(Acquire);
            if unread || sock.bits & LINGER_0 != 0 {
                self.finish_close(cx, id, Close::Abort);
                return Ok(());
            }
        }
        let unsent = entry.tx_tail.load(Acquire) != sock.tx_head;
        let open = sock.kind == Kind::Datagram || sock.state & (state::DEAD | state::TX_END) == 0;
        if !unsent || !open || sock.tx.is_none() {
            self.finish_close(cx, id, Close::Graceful);
            return Ok(());
        }
        sock.bits |= CLOSING;
        sock.bits &= !SHUT_WR;
        // Nothing is received any more.
        let rx = std::mem::take(&mut sock.rx);
        self.give_block(rx);
        self.send(cx, id, false)
    }

    /// Closes (RST) the connections of a listener that nobody took.
    fn drop_untaken(&mut self, cx: &mut Cx, listener: u32) {
        let (Some(sock), Some(entry)) = (self.socks.get(listener), cx.region.socket(listener)) else {
            return;
        };
        let waiting = sock.rx_tail.wrapping_sub(entry.rx_head.load(Acquire));
        let tail = sock.rx_tail;
        let mut at = Some(self.guest_sockets);
        while let Some(id) = at {
            if let Some(child) = self.socks.get_mut(id)
                && child.bits & UNTAKEN != 0
                && child.link == listener
            {
                // Its record ends at `record`; those within `waiting` bytes of the tail are still in the ring.
                if tail.wrapping_sub(child.record) < waiting {
                    self.finish_close(cx, id, Close::Abort);
                } else {
                    child.link = 0;
                }
            }
            at = self.socks.next_id(id);
            if id >= self.next_id {
                break;
            }
        }
    }

    fn finish_close(&mut self, cx: &mut Cx, id: u32, how: Close) {
        self.look_at_tcp(cx.stack, id);
        self.end_pair(cx.stack, id);
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return };
        if sock.kind == Kind::Free {
            return;
        }
        // The number may be another descriptor's as soon as it is closed.
        sock.fd = 0;
        compiler_fence(SeqCst);
        if sock.handle != Handle::NONE {
            if how == Close::Graceful {
                // It was read: the peer is told of the end, and not of a reset.
                sock.take_peeked(cx.stack);
            }
            cx.stack.close(sock.handle, how);
        }
        let (rx, tx) = (sock.rx, sock.tx);
        let generation = sock.generation.wrapping_add(1);
        let queued = sock.bits & (QUEUED | STARVED | THROTTLED);
        let counted = sock.bits & COUNTED != 0;
        *sock = Sock { generation, bits: queued, ..Sock::default() };
        self.sockets -= 1;
        self.uncount(counted);
        clear_engine_lines(entry);
        entry.inode.store(0, Relaxed);
        // SYNC: socket-state - the cleared lines are visible to who takes the id again.
        entry.generation.store(generation, Release);
        self.give_block(rx);
        self.give_block(tx);
        if id < self.guest_sockets {
            self.return_id(cx.region, id);
        } else {
            self.free_ids.push(id);
        }
        if !self.starved.is_empty() {
            self.retry_starved();
        }
    }

    /// Puts a guest id on the guest's free list.
    fn return_id(&mut self, region: &Region, id: u32) {
        let (header, Some(entry)) = (region.header(), region.socket(id)) else { return };
        // A correct guest disturbs this once in a while; a hostile one could for ever.
        for _ in 0..256 {
            let head = header.free_head.load(Acquire);
            entry.next_free.store(head as u32, Relaxed);
            let new = ((head >> 32).wrapping_add(1) << 32) | id as u64;
            // SYNC: free-list - the link, and the cleared entry.
            if header.free_head.compare_exchange_weak(head, new, AcqRel, Relaxed).is_ok() {
                return;
            }
        }
        self.unreturned.push(id);
    }

    // ---- queue elements

    fn drain(&mut self, cx: &mut Cx, budget: usize) -> Result<Drained, Violation> {
        let region = cx.region;
        let mut drained = Drained { elements: 0, more: false, again: false };
        let mut budget = budget;
        let policed = budget > 0 && !self.limits.operations.is_idle();
        if policed {
            match self.limits.operations.allow_operations(budget as u64, now_ns()) {
                Ok(allowed) => budget = allowed as usize,
                Err(again) => {
                    self.elements_until = again;
                    self.throttled_until = self.throttled_until.min(again);
                    return Ok(drained);
                }
            }
        }
        if let Some((q, nqe)) = self.held.take() {
            self.element(cx, q, nqe, true)?;
        }
        let header = region.header();
        // Once round, from where the last turn ended: its word is looked at twice, first from there on, then up to there.
        let (first, bit) = (self.next_queue as usize / 64, self.next_queue % 64);
        for step in 0..=ACTIVE_WORDS {
            let word = (first + step) % ACTIVE_WORDS;
            if header.active[word].load(Relaxed) != 0 {
                // SYNC: active - the elements pushed before the bit was set are visible.
                self.pending[word] |= header.active[word].swap(0, SeqCst);
            }
            let mut bits = self.pending[word]
                & match step {
                    0 => !0 << bit,
                    ACTIVE_WORDS => !(!0 << bit),
                    _ => !0,
                };
            while bits != 0 {
                let q = word as u32 * 64 + bits.trailing_zeros();
                bits &= bits - 1;
                if drained.elements >= budget || self.turn.is_over() {
                    if policed && drained.elements >= budget {
                        self.limits.operations.want_more();
                    }
                    drained.more = true;
                    self.next_queue = q;
                    return Ok(drained);
                }
                let mut taken = 0;
                let empty = self.drain_queue(cx, q, &mut taken)?;
                drained.elements += taken;
                if taken > 0 {
                    self.limits.operations.charge(taken as u64);
                }
                if self.held.is_some() {
                    drained.again = true;
                    return Ok(drained);
                }
                if empty {
                    self.pending[word] &= !(1 << (q % 64));
                } else {
                    drained.more = true;
                }
            }
        }
        Ok(drained)
    }

    /// True: the rings of `q` are empty.
    fn drain_queue(&mut self, cx: &mut Cx, q: u32, taken: &mut usize) -> Result<bool, Violation> {
        let region = cx.region;
        let (Some(jobs), Some(sends)) = (region.job(q), region.send(q)) else {
            return Err(Violation("active queue set out of range"));
        };
        self.highest_queue = self.highest_queue.max(q);
        for (ring, is_job) in [(jobs, true), (sends, false)] {
            let state = &self.events.queues[q as usize];
            let head = if is_job { state.job_head } else { state.send_head };
            let Ok(mut batch) = ring.batch(head, QUEUE_BATCH) else {
                return Err(Violation(if is_job { "job ring positions" } else { "send ring positions" }));
            };
            while let Some(words) = batch.next() {
                *taken += 1;
                self.totals.operations += 1;
                self.turn.charge(if is_job { JOB } else { ELEMENT });
                let nqe = Nqe::from_words(words);
                if nqe.stamp != 0 {
                    self.waited.record(since(nqe.stamp));
                }
                // Of a job that somebody waits for, the journal says that it was taken, and its answer that it was done.
                // Others are noted when they were done: each may be done twice.
                let noted = is_job && nqe.flags & flag::SYNC != 0;
                if noted {
                    self.events.queues[q as usize].job_head = batch.position();
                    compiler_fence(SeqCst);
                }
                self.element(cx, q, nqe, false)?;
                if is_job && !noted && self.held.is_none() {
                    self.events.queues[q as usize].job_head = batch.position();
                }
                if self.held.is_some() || self.turn.is_over() {
                    break;
                }
            }
            let head = batch.finish();
            let state = &mut self.events.queues[q as usize];
            *(if is_job { &mut state.job_head } else { &mut state.send_head }) = head;
            if self.held.is_some() {
                return Ok(false);
            }
        }
        let state = self.events.queues[q as usize];
        let empty = jobs.tail() == state.job_head && sends.tail() == state.send_head;
        if empty && state.releasing {
            self.release(region, q);
        }
        Ok(empty)
    }

    fn release(&mut self, region: &Region, q: u32) {
        self.events.reset(region, q);
        self.pending[q as usize / 64] &= !(1 << (q % 64));
        self.released.push(q);
    }

    /// One element. `last`: it was held already; there is no second chance.
    fn element(&mut self, cx: &mut Cx, q: u32, nqe: Nqe, last: bool) -> Result<(), Violation> {
        let Some(op) = Op::from_u8(nqe.op) else { return Err(Violation("unknown operation")) };
        let id = nqe.socket;
        let done = match op {
            Op::Release => {
                self.events.queues[q as usize].releasing = true;
                return Ok(());
            }
            // Hang-ups and channel messages of before are seen first.
            Op::Fence => Done::Again(0),
            Op::Complete | Op::Event => return Err(Violation("not an operation of guests")),
            _ => {
                if cx.region.socket(id).is_none() {
                    return Err(Violation("element for a socket out of range"));
                }
                let sock = self.socks.make(id).ok_or(Violation("element for a socket out of range"))?;
                // Pushed before its socket was closed, by a process that has gone on since; the id is in use again.
                let stale = nqe.status as u32 != sock.generation;
                if sock.kind == Kind::Free && !last && !stale {
                    self.held = Some((q, nqe));
                    return Ok(());
                }
                if !stale {
                    sock.used_at = self.sweeps;
                }
                match op {
                    _ if stale || sock.kind == Kind::Free || sock.bits & CLOSING != 0 => {
                        Done::Answer(-libc::EBADF, 0, 0)
                    }
                    Op::Send => return self.element_send(cx, id, nqe),
                    Op::Peer => {
                        self.pair_element(cx, id, nqe.flags);
                        return Ok(());
                    }
                    Op::Credit => {
                        let Some(entry) = cx.region.socket(id) else { return Ok(()) };
                        if sock.bits & RX_STALLED != 0 {
                            sock.bits &= !RX_STALLED;
                            entry.rx_stalled.store(0, Relaxed);
                        }
                        return match sock.kind {
                            Kind::Listener => self.accept(cx, id),
                            Kind::Datagram => self.receive_datagrams(cx, id),
                            _ => self.receive(cx, id),
                        };
                    }
                    _ if sock.error != 0 && sock.handle == Handle::NONE => Done::Answer(-sock.error, 0, 0),
                    _ => self.job(cx, q, op, nqe)?,
                }
            }
        };
        match done {
            Done::Again(_) if !last => self.held = Some((q, nqe)),
            _ if nqe.flags & flag::SYNC == 0 => {}
            done => {
                let (status, size, op_data) = match done {
                    Done::Answer(status, size, value) => (status, size, value),
                    Done::Again(errno) => (-errno, 0, 0),
                };
                let answer = Nqe {
                    op: Op::Complete as u8,
                    queue_set: q as u16,
                    op_data: if op == Op::Ioctl && status == 0 { op_data } else { nqe.op_data },
                    size,
                    status,
                    ..nqe
                };
                self.events.complete(cx.region, q, answer)?;
            }
        }
        Ok(())
    }

    fn element_send(&mut self, cx: &mut Cx, id: u32, nqe: Nqe) -> Result<(), Violation> {
        let Some(entry) = cx.region.socket(id) else { return Ok(()) };
        // SYNC: tx-pending - cleared before the tail is read: a writer that finds it set knows that its bytes are seen.
        entry.tx_pending.swap(0, SeqCst);
        self.send(cx, id, nqe.flags & flag::MORE != 0)
    }

    fn job(&mut self, cx: &mut Cx, q: u32, op: Op, nqe: Nqe) -> Result<Done, Violation> {
        let id = nqe.socket;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        if sock.kind == Kind::Datagram {
            // What was sent before goes out before: it gives the socket its port, and errors their order.
            self.send(cx, id, false)?;
        }
        let Some(sock) = self.socks.get_mut(id) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
        let handle = sock.handle;
        let mut argument = [0u8; ARGUMENT_BYTES];
        let size = nqe.size as usize;
        if size > ARGUMENT_BYTES {
            return Ok(Done::Answer(-libc::EINVAL, 0, 0));
        }
        Ok(match op {
            Op::Bind => {
                cx.region.read_argument(q, &mut argument[..size]);
                let address = SocketAddress::from_bytes(&argument[..size]);
                if !self.privileged && (1..1024).contains(&address.port()) {
                    return Ok(Done::Answer(-libc::EACCES, 0, 0));
                }
                match cx.stack.bind(handle, &address) {
                    Ok(()) => {
                        sock.state |= state::BOUND;
                        self.publish_state(cx, id);
                        Done::Answer(0, 0, 0)
                    }
                    Err(Errno(libc::EADDRINUSE)) => Done::Again(libc::EADDRINUSE),
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::ErrorQueue => self.job_error_queue(cx, q, id),
            Op::Urgent => {
                let mark = nqe.op_data as u32;
                if sock.kind != Kind::Stream
                    || !(1..=sock.tx.size()).contains(&mark.wrapping_sub(sock.tx_head))
                {
                    return Ok(Done::Answer(-libc::EINVAL, 0, 0));
                }
                sock.tx_mark = mark;
                sock.bits |= TX_URGENT;
                Done::Answer(0, 0, 0)
            }
            Op::Accept => self.job_accept(cx, id)?,
            Op::Listen => self.job_listen(cx, id, nqe.op_data as u32 as i32)?,
            Op::Connect => {
                if sock.state & state::CONNECTING != 0 {
                    return Ok(Done::Answer(-libc::EALREADY, 0, 0));
                }
                if sock.kind != Kind::Datagram && sock.state & state::CONNECTED != 0 {
                    return Ok(Done::Answer(-libc::EISCONN, 0, 0));
                }
                if sock.kind == Kind::Stream
                    && sock.bits & COUNTED == 0
                    && let Some(quota) = &self.limits.connections
                {
                    if !quota.take() {
                        // As when no local port is left.
                        return Ok(Done::Answer(-libc::EADDRNOTAVAIL, 0, 0));
                    }
                    sock.bits |= COUNTED;
                }
                cx.region.read_argument(q, &mut argument[..size]);
                let address = SocketAddress::from_bytes(&argument[..size]);
                if sock.kind == Kind::Stream {
                    sock.bits |= ACTIVE;
                    (sock.tx_start, sock.rx_start) = (sock.tx_head, sock.rx_tail);
                }
                let mut result = cx.stack.connect(handle, &address);
                if sock.state & state::CONNECT_FAILED != 0 && matches!(result, Err(Errno(libc::ECONNABORTED)))
                {
                    // The kernel tells the end of the connect before (whose SO_ERROR was taken) once more; now it is told.
                    result = cx.stack.connect(handle, &address);
                }
                if result.is_ok() && sock.kind == Kind::Stream {
                    entry.error.store(0, Relaxed);
                }
                match result {
                    Ok(Connect::Done) => {
                        sock.state |= state::CONNECTED | state::BOUND;
                        sock.state &= !state::CONNECT_FAILED;
                        sock.bits |= RX_READY;
                        let class = if sock.kind == Kind::Datagram { DATAGRAM_CLASS } else { STREAM_CLASS };
                        self.ensure_tx(cx, id, class);
                        self.publish_state(cx, id);
                        Done::Answer(0, 0, 0)
                    }
                    Ok(Connect::Begun) => {
                        sock.state |= state::CONNECTING | state::BOUND;
                        sock.state &= !state::CONNECT_FAILED;
                        self.publish_state(cx, id);
                        Done::Answer(-libc::EINPROGRESS, 0, 0)
                    }
                    Err(Errno(errno @ (libc::EADDRINUSE | libc::EADDRNOTAVAIL))) => Done::Again(errno),
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::Disconnect => {
                if sock.kind == Kind::Listener {
                    return Ok(Done::Answer(-libc::EOPNOTSUPP, 0, 0));
                }
                self.look_at_tcp(cx.stack, id);
                self.end_pair(cx.stack, id);
                let Some(sock) = self.socks.get_mut(id) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
                let result = cx.stack.disconnect(handle);
                if result.is_ok() {
                    // What follows is another connection.
                    sock.tcp = None;
                }
                if result.is_ok() && sock.kind == Kind::Stream {
                    self.disconnected(cx, id)?;
                } else if result.is_ok() {
                    sock.state &= !state::CONNECTED;
                    self.publish_state(cx, id);
                }
                Done::of(result)
            }
            Op::Shutdown => self.job_shutdown(cx, id, nqe.op_data)?,
            Op::SetOption => {
                let (level, name, value) = Nqe::split_option(nqe.op_data);
                let bytes = if size == 0 {
                    argument[..4].copy_from_slice(&value.to_ne_bytes());
                    &argument[..4]
                } else {
                    cx.region.read_argument(q, &mut argument[..size]);
                    &argument[..size]
                };
                let result = cx.stack.set_option(handle, level, name, bytes);
                if (level, name) == (libc::SOL_SOCKET, libc::SO_RCVBUF) && !sock.take_peeked(cx.stack) {
                    self.fail(cx, id, libc::ECONNRESET)?;
                    return Ok(Done::of(result));
                }
                if result.is_ok() && (level, name) == (libc::SOL_SOCKET, libc::SO_LINGER) && bytes.len() >= 8
                {
                    let word =
                        |i: usize| i32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
                    let zero = word(0) != 0 && word(4) == 0;
                    sock.bits = if zero { sock.bits | LINGER_0 } else { sock.bits & !LINGER_0 };
                }
                Done::of(result)
            }
            Op::GetOption => {
                let (level, name, _) = Nqe::split_option(nqe.op_data);
                match cx.stack.option(handle, level, name, &mut argument[..size]) {
                    Ok(n) => {
                        let n = n.min(size);
                        cx.region.write_argument(q, &argument[..n]);
                        Done::Answer(0, n as u32, 0)
                    }
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::LocalName | Op::PeerName => {
                let local = op == Op::LocalName;
                let name = if local { cx.stack.local_name(handle) } else { cx.stack.peer_name(handle) };
                match name {
                    Ok(name) => {
                        cx.region.write_argument(q, name.as_bytes());
                        let len = name.as_bytes().len() as u32;
                        // A stream's names do not change any more.
                        if sock.kind == Kind::Stream && sock.state & state::CONNECTED != 0 {
                            let (words, valid) = if local {
                                (&entry.local, &entry.local_len)
                            } else {
                                (&entry.peer, &entry.peer_len)
                            };
                            for (word, value) in words.iter().zip(name.to_words()) {
                                word.store(value, Relaxed);
                            }
                            valid.store(len, Release);
                        }
                        Done::Answer(0, len, 0)
                    }
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::SendRing => {
                let class = match sock.kind {
                    Kind::Datagram => DATAGRAM_CLASS,
                    Kind::Stream if sock.state & state::CONNECTED != 0 => STREAM_CLASS,
                    _ => return Ok(Done::Answer(-libc::ENOTCONN, 0, 0)),
                };
                let status = match (self.ensure_tx(cx, id, class), class) {
                    (true, _) => 0,
                    (false, DATAGRAM_CLASS) => -libc::ENOBUFS,
                    // TCP never says ENOBUFS: it is as if the ring were full.
                    (false, _) => {
                        if let Some(sock) = self.socks.get_mut(id) {
                            sock.state |= state::NO_MEMORY;
                        }
                        self.publish_state(cx, id);
                        self.starve(id);
                        -libc::EAGAIN
                    }
                };
                Done::Answer(status, 0, 0)
            }
            Op::Ioctl => {
                let unsent = entry.tx_tail.load(Relaxed).wrapping_sub(sock.tx_head).min(sock.tx.size());
                match cx.stack.ioctl(handle, nqe.op_data) {
                    Ok(value) if nqe.op_data == libc::TIOCOUTQ => Done::Answer(0, 0, value + unsent as u64),
                    Ok(value) => Done::Answer(0, 0, value),
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::Wake => {
                self.events.wake(id, u32::MAX);
                Done::Answer(0, 0, 0)
            }
            Op::Release | Op::Fence | Op::Send | Op::Credit | Op::Peer | Op::Complete | Op::Event => {
                Done::Answer(-libc::EINVAL, 0, 0)
            }
        })
    }

    /// The stack has disconnected a stream socket: it is as new, but for the error that it may have.
    fn disconnected(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        let errno = cx.stack.take_error(sock.handle).err().map_or(0, |e| e.0);
        sock.tx_head = entry.tx_tail.load(Acquire);
        entry.tx_head.store(sock.tx_head, Release);
        sock.error = 0;
        sock.bits &= QUEUED | STARVED | THROTTLED | COUNTED | LINGER_0 | UNTAKEN | SUSPECT;
        sock.state &= state::OPEN | state::BOUND;
        for word in [&entry.oob, &entry.peer_len, &entry.local_len, &entry.rx_stalled] {
            word.store(0, Relaxed);
        }
        entry.error.store(errno as u32, Relaxed);
        let generation = sock.generation;
        self.publish_state(cx, id);
        self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR | HUP, u32::MAX)
    }

    fn job_listen(&mut self, cx: &mut Cx, id: u32, backlog: i32) -> Result<Done, Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        if sock.kind == Kind::Datagram {
            return Ok(Done::Answer(-libc::EOPNOTSUPP, 0, 0));
        }
        if sock.state & (state::CONNECTED | state::CONNECTING) != 0 {
            return Ok(Done::Answer(-libc::EINVAL, 0, 0));
        }
        match cx.stack.listen(sock.handle, backlog) {
            Ok(()) => {}
            Err(Errno(libc::EADDRINUSE)) => return Ok(Done::Again(libc::EADDRINUSE)),
            Err(errno) => return Ok(Done::of(Err(errno))),
        }
        if sock.rx.is_none() {
            let Some(block) = self.blocks.take(LISTENER_CLASS) else {
                return Ok(Done::Answer(-libc::ENOBUFS, 0, 0));
            };
            sock.rx = block;
            entry.rx_offset.store((block.offset() / 64) as u32, Relaxed);
            entry.rx_size.store(block.size(), Relaxed);
        }
        sock.kind = Kind::Listener;
        sock.link = if backlog < 0 { 4096 } else { backlog.min(4096) as u32 };
        sock.state &= !(state::RX_END | state::ON_DEMAND | state::ACCEPTABLE);
        sock.state |= state::LISTENING | state::BOUND;
        if (0..=SMALL_BACKLOG).contains(&backlog) || self.gives {
            sock.state |= state::ON_DEMAND;
        }
        sock.bits |= RX_READY;
        self.publish_state(cx, id);
        self.accept(cx, id)?;
        Ok(Done::Answer(0, 0, 0))
    }

    fn job_error_queue(&mut self, cx: &mut Cx, q: u32, id: u32) -> Done {
        let Some(sock) = self.socks.get(id) else { return Done::Answer(-libc::EBADF, 0, 0) };
        let (mut payload, mut control) = ([0u8; ERROR_PAYLOAD], [0u8; ERROR_CONTROL]);
        match cx.stack.recv_error(sock.handle, &mut payload, &mut control) {
            Ok(received) => {
                let len = received.bytes.min(ERROR_PAYLOAD);
                let control = &control[..received.control.next_multiple_of(8).min(ERROR_CONTROL)];
                let (address, address_len) = received.from.to_datagram();
                let mut header = DatagramHeader { len: len as u32, address_len, address };
                header.set_control_len(control.len() as u32);
                let mut record = header_bytes(&header).to_vec();
                record.extend(&payload[..len]);
                record.resize(datagram_record(header.len) as usize, 0);
                record.extend(control);
                cx.region.write_argument(q, &record);
                Done::Answer(0, record.len() as u32, 0)
            }
            Err(errno) => Done::of(Err(errno)),
        }
    }

    fn job_shutdown(&mut self, cx: &mut Cx, id: u32, how: u64) -> Result<Done, Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        let (read, write) = match how {
            0 => (true, false),
            1 => (false, true),
            2 => (true, true),
            _ => return Ok(Done::Answer(-libc::EINVAL, 0, 0)),
        };
        match sock.kind {
            Kind::Stream if sock.state & state::CONNECTED != 0 => {
                if read {
                    let _ = cx.stack.shutdown(sock.handle, Shutdown::Read);
                    sock.bits |= RX_READY | SHUT_RD;
                }
                if write && sock.state & state::TX_END == 0 {
                    sock.bits |= SHUT_WR;
                }
                if read {
                    self.receive(cx, id)?;
                }
                if write {
                    self.send(cx, id, false)?;
                }
                Ok(Done::Answer(0, 0, 0))
            }
            Kind::Listener if read => {
                let result = cx.stack.shutdown(sock.handle, Shutdown::Both);
                sock.state = (sock.state & !state::LISTENING) | state::RX_END;
                let generation = sock.generation;
                entry.state.store(sock.state, Release);
                self.drop_untaken(cx, id);
                self.events.raise(cx.region, entry, id, generation, IN | OUT | HUP | RDHUP, u32::MAX)?;
                Ok(Done::of(result))
            }
            _ => {
                let how = match (read, write) {
                    (true, true) => Shutdown::Both,
                    (true, false) => Shutdown::Read,
                    _ => Shutdown::Write,
                };
                if sock.kind == Kind::Datagram && write {
                    self.send(cx, id, false)?;
                }
                let Some(sock) = self.socks.get_mut(id) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
                let result = cx.stack.shutdown(sock.handle, how);
                if result.is_ok() && read && sock.state & state::CONNECTING != 0 {
                    self.disconnected(cx, id)?;
                } else if result.is_ok() && sock.kind == Kind::Datagram {
                    sock.state |=
                        if read { state::RX_END } else { 0 } | if write { state::TX_END } else { 0 };
                    let generation = sock.generation;
                    entry.state.store(sock.state, Release);
                    self.events.raise(cx.region, entry, id, generation, IN | OUT, u32::MAX)?;
                }
                Ok(Done::of(result))
            }
        }
    }

    // ---- the guest's processes, and idle memory

    fn end_process(&mut self, cx: &mut Cx, tag: u32) -> Result<(), Violation> {
        let region = cx.region;
        let mut gone = Vec::new();
        // An element of another process that waits for the channels to be read goes on waiting.
        let waiting = self.held.take();
        // Queue sets that were never heard of are not touched: that would give them memory.
        for q in 0..(self.highest_queue + 8).min(self.events.queues.len() as u32) {
            let Some(set) = region.queue_set(q) else { break };
            if set.owner.load(Acquire) == 0 {
                continue;
            }
            let process = set.process.load(Relaxed);
            if process == tag {
                // At most one ring's worth: who would push is dead.
                for _ in 0..16 {
                    if self.drain_queue(cx, q, &mut 0)? {
                        break;
                    }
                    if let Some((q, nqe)) = self.held.take() {
                        self.element(cx, q, nqe, true)?;
                    }
                }
                if set.owner.load(Relaxed) != 0 {
                    self.release(region, q);
                }
                gone.push(q);
            }
        }
        self.held = waiting;
        self.sweep_wanted = true;
        let mut at = Some(0);
        while let Some(id) = at {
            if let (Some(sock), Some(entry)) = (self.socks.get_mut(id), region.socket(id))
                && sock.kind != Kind::Free
            {
                for (i, watcher) in entry.watchers.iter().enumerate() {
                    let value = watcher.load(Relaxed) as u32;
                    if value != 0
                        && gone.contains(&(value - 1))
                        && watcher.compare_exchange(value as u16, 0, AcqRel, Relaxed).is_ok()
                    {
                        entry.event_pending.fetch_and(!(1 << i), SeqCst);
                    }
                }
                if sock.bits & UNTAKEN != 0 {
                    let listener = sock.link;
                    let record = sock.record;
                    let taken = match (self.socks.get(listener), region.socket(listener)) {
                        (Some(l), Some(e)) if l.kind == Kind::Listener => {
                            let waiting = l.rx_tail.wrapping_sub(e.rx_head.load(Acquire));
                            l.rx_tail.wrapping_sub(record) >= waiting
                        }
                        _ => true,
                    };
                    if taken && let Some(sock) = self.socks.get_mut(id) {
                        sock.bits |= SUSPECT;
                        sock.used_at = self.sweeps;
                        self.suspects = true;
                    }
                }
            }
            at = self.socks.next_id(id);
        }
        Ok(())
    }

    fn sweep(&mut self, cx: &mut Cx) -> Result<(), Violation> {
        let region = cx.region;
        self.sweeps = self.sweeps.wrapping_add(1);
        self.suspects = false;
        let mut wanted = false;
        let scarce = !self.starved.is_empty();
        let mut at = Some(0);
        while let Some(id) = at {
            at = self.socks.next_id(id);
            let Some(sock) = self.socks.get_mut(id) else { continue };
            if sock.kind == Kind::Free {
                continue;
            }
            let idle = self.sweeps.wrapping_sub(sock.used_at) > 1;
            if sock.bits & SUSPECT != 0 {
                if idle {
                    self.finish_close(cx, id, Close::Abort);
                } else {
                    self.suspects = true;
                }
                continue;
            }
            if sock.kind == Kind::Listener || sock.rx.is_none() && sock.tx.is_none() {
                continue;
            }
            let Some(entry) = region.socket(id) else { continue };
            wanted = true;
            // Who waits for memory needs it more than who will ask for an empty ring again.
            if !(idle || scarce) || sock.bits & CLOSING != 0 {
                continue;
            }
            if !sock.rx.is_none()
                && entry.rx_head.load(Acquire) == sock.rx_tail
                && sock.bits & RX_STALLED == 0
            {
                entry.rx_size.store(0, Relaxed);
                let block = std::mem::take(&mut sock.rx);
                self.blocks.give(block);
            }
            if !sock.tx.is_none() {
                let old = replace_tx(entry, sock, Block::NONE);
                self.blocks.give(old);
            }
        }
        // A thread that died between claiming a queue set and naming its process.
        for q in 0..(self.highest_queue + 1).min(self.events.queues.len() as u32) {
            let Some(set) = region.queue_set(q) else { break };
            let state = &mut self.events.queues[q as usize];
            if set.owner.load(Relaxed) != 0 && set.process.load(Relaxed) == 0 {
                state.nameless += 1;
                wanted = true;
                if state.nameless > 3 {
                    self.release(region, q);
                }
            } else {
                state.nameless = 0;
            }
        }
        wanted |= self.blocks.sweep(region, 1024);
        self.sweep_wanted = wanted;
        if !self.starved.is_empty() {
            self.retry_starved();
        }
        Ok(())
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
