//! Connections whose payload the two guests move themselves, through memory that both map.
//!
//! The stack says which these are ([`Stack::paired`]). Their sockets have no rings in the region. What is left to do here: to
//! tell the guest how the other end is, to wake who sleeps, and to count.

use std::collections::HashMap;
use std::sync::atomic::{
    Ordering::{Relaxed, Release, SeqCst},
    fence,
};

use netkernel_abi::SocketEntry;
use netkernel_abi::nqe::flag;
use netkernel_abi::socket::state;

use super::{Core, Cx, IN, OUT, PRI, RDHUP, Service, Sock, Violation, bit::PAIRED};
use crate::stack::{Handle, Readiness, Stack};

/// A guest can say what it likes, of its own tenant; sums must not run over.
const MOST_AT_ONCE: u64 = 1 << 42;

/// Bytes of pairs, by socket, as far as they were counted.
#[derive(Default)]
pub(super) struct Counted(HashMap<u32, (u64, u64)>);

/// A connection begins: if it is one of a pair, the guest is told with its next state where its rings are. True: it is.
pub(super) fn begin(stack: &mut dyn Stack, entry: &SocketEntry, sock: &mut Sock) -> bool {
    let Some(paired) = stack.paired(sock.handle) else { return false };
    sock.bits |= PAIRED;
    sock.state |= state::PAIRED;
    entry.rx_size.store(0, Relaxed);
    entry.tx_size.store(0, Relaxed);
    entry.rx_offset.store(paired.memory, Relaxed);
    entry.tx_offset.store(paired.slot << 1 | paired.end & 1, Relaxed);
    true
}

impl Service {
    /// What of each pair's payload stands in the totals, by socket: the guests go on while the engine's program is exchanged.
    pub fn counted_pairs(&self) -> Vec<(u32, u64, u64)> {
        self.core.counted.0.iter().map(|(id, (bytes_in, bytes_out))| (*id, *bytes_in, *bytes_out)).collect()
    }

    pub fn resume_counts(&mut self, counted: &[(u32, u64, u64)]) {
        self.core
            .counted
            .0
            .extend(counted.iter().map(|&(id, bytes_in, bytes_out)| (id, (bytes_in, bytes_out))));
    }
}

impl Core {
    /// A report of the stack about a connection of a pair.
    pub(super) fn pair_ready(&mut self, cx: &mut Cx, id: u32, readiness: Readiness) -> Result<(), Violation> {
        if readiness.has(Readiness::URGENT) {
            self.events.urgent(id);
        }
        self.pair_turn(cx, id)?;
        let (Some(sock), Some(entry)) = (self.socks.get(id), cx.region.socket(id)) else { return Ok(()) };
        if sock.bits & PAIRED == 0 || sock.state & state::DEAD != 0 {
            return Ok(());
        }
        let urgent = if readiness.has(Readiness::URGENT) { PRI } else { 0 };
        self.events.raise(cx.region, entry, id, sock.generation, IN | OUT | urgent, u32::MAX)
    }

    /// Tells the guest what became of the other end.
    pub(super) fn pair_turn(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let Some(entry) = cx.region.socket(id) else { return Ok(()) };
        loop {
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            if sock.bits & PAIRED == 0 || sock.state & state::DEAD != 0 {
                return Ok(());
            }
            let Some(now) = cx.stack.paired(sock.handle) else { return Ok(()) };
            if now.in_order {
                sock.state |= state::FIN;
            }
            if let Err(errno) = cx.stack.take_error(sock.handle) {
                return self.fail(cx, id, errno.0);
            }
            let ended = if now.ended { state::RX_END } else { 0 };
            let closed = if now.peer_closed { state::PEER_CLOSED } else { 0 };
            let new = sock.state | ended | closed;
            if new == sock.state {
                return Ok(());
            }
            sock.state = new;
            // SYNC: socket-state
            entry.state.store(new, Release);
            // SYNC: peer-closed - a writer that did not see it is seen by the next look: what it wrote nobody reads.
            fence(SeqCst);
            let generation = sock.generation;
            self.events.raise(cx.region, entry, id, generation, IN | OUT | RDHUP, u32::MAX)?;
        }
    }

    /// The guest changed something that the other end waits for.
    pub(super) fn pair_element(&mut self, cx: &mut Cx, id: u32, flags: u8) {
        if let Some(sock) = self.socks.get(id)
            && sock.bits & PAIRED != 0
        {
            cx.stack.wake_peer(sock.handle, flags & flag::URGENT != 0);
        }
    }

    /// Counts what went through pairs, by the guests' own word.
    pub(super) fn count_pairs(&mut self, cx: &mut Cx) {
        if !self.has_pairs {
            return;
        }
        let mut at = Some(0);
        while let Some(id) = at {
            if self.socks.get(id).is_some_and(|sock| sock.bits & PAIRED != 0) {
                self.count_pair(cx.stack, id);
            }
            at = self.socks.next_id(id);
        }
    }

    fn count_pair(&mut self, stack: &mut dyn Stack, id: u32) {
        let Some(handle) = self.socks.get(id).map(|sock| sock.handle) else { return };
        if handle == Handle::NONE {
            return;
        }
        let Some(now) = stack.paired(handle) else { return };
        let known = self.counted.0.entry(id).or_default();
        let (new_in, new_out) = (now.bytes_in.saturating_sub(known.0), now.bytes_out.saturating_sub(known.1));
        *known = (known.0.max(now.bytes_in), known.1.max(now.bytes_out));
        let (new_in, new_out) = (new_in.min(MOST_AT_ONCE), new_out.min(MOST_AT_ONCE));
        self.totals.bytes_in = self.totals.bytes_in.saturating_add(new_in);
        self.totals.bytes_out = self.totals.bytes_out.saturating_add(new_out);
        self.limits.receive.charge(new_in);
        self.limits.send.charge(new_out);
    }

    /// Counts for the last time.
    pub(super) fn end_pair(&mut self, stack: &mut dyn Stack, id: u32) {
        if self.socks.get(id).is_some_and(|sock| sock.bits & PAIRED != 0) {
            self.count_pair(stack, id);
            self.counted.0.remove(&id);
        }
    }
}
