//! After the death of a process: the service as its journal says, brought up to what the kernel says.
//!
//! The journal is exact but for the one operation that was under way: bytes may have moved between a ring and the stack without
//! their position being noted. A stack that can tell how many bytes it has taken and given ([`Stack::progress`]) settles that;
//! where it cannot, or says what cannot be, the connection is reset. Everything else that was under way is done again (jobs
//! of sleeping threads, hints, wake-ups) or undone (sockets that nobody can reach).

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use netkernel_abi::layout::ACTIVE_WORDS;
use netkernel_abi::nqe::flag;
use netkernel_abi::socket::state;
use netkernel_abi::{Limits, Nqe, Op};
use netkernel_ring::bytes;
use netkernel_shm::{Journal, Region};

use super::bit::*;
use super::{Core, Cx, Kind, Service, Sock, Totals, Violation, publish_tx};
use crate::blocks::{Block, Blocks};
use crate::events::{Events, QueueState};
use crate::journal::{Fixed, One, take_descriptor};
use crate::stack::{Close, Handle, Stack, key};
use crate::{SocketAddress, Table};

/// Where the parts of a service stand in a journal.
struct Parts {
    queues: usize,
    socks: usize,
    end: usize,
}

impl Parts {
    /// Totals stand first.
    fn of(limits: Limits) -> Parts {
        let queues = size_of::<Totals>().next_multiple_of(64);
        let socks = (queues + limits.queue_sets as usize * size_of::<QueueState>()).next_multiple_of(64);
        let end = (socks + Table::<Sock>::kept_bytes(limits.sockets)).next_multiple_of(64);
        Parts { queues, socks, end }
    }
}

/// What must be the same in the program that wrote a journal and the one that reads it, and in those that share what a tenant uses.
pub fn journal_format() -> u64 {
    let sizes = [size_of::<Sock>(), size_of::<QueueState>(), size_of::<Totals>(), crate::shared::FORMAT];
    sizes.into_iter().fold(FORMAT, |hash, size| hash.wrapping_mul(1009).wrapping_add(size as u64))
}

/// Changes with what the fields mean.
const FORMAT: u64 = 3;

impl Service {
    /// Bytes of a journal that a service takes, from offset 0.
    pub fn journal_bytes(limits: Limits) -> usize {
        Parts::of(limits).end
    }

    /// Keeps from now on, in an empty journal, what [`Service::recover`] needs. For a service without sockets.
    pub fn keep_in(&mut self, journal: &Arc<Journal>) -> Option<()> {
        let limits = self.region.layout().limits;
        let parts = Parts::of(limits);
        self.core.totals = One(Fixed::kept(journal, 0, 1, true)?);
        self.core.events =
            Events::with(Fixed::kept(journal, parts.queues, limits.queue_sets as usize, true)?);
        self.core.socks = Table::kept(limits.sockets, journal, parts.socks)?;
        Some(())
    }

    /// Writes into an empty journal what [`Service::recover`] needs, as it is now: between two turns.
    pub fn write_out(&self, journal: &Arc<Journal>) -> Option<()> {
        let limits = self.region.layout().limits;
        let parts = Parts::of(limits);
        Fixed::kept(journal, 0, 1, true)?.copy_from_slice(&self.core.totals.0);
        let queues = &self.core.events.queues;
        Fixed::kept(journal, parts.queues, queues.len(), true)?.copy_from_slice(queues);
        self.core.socks.write_out(limits.sockets, journal, parts.socks)
    }

    /// Descriptors of stacks' sockets in a journal.
    pub fn journal_descriptors(journal: &Arc<Journal>, limits: Limits) -> Vec<i32> {
        let parts = Parts::of(limits);
        let Some(socks) = Table::<Sock>::kept(limits.sockets, journal, parts.socks) else {
            return Vec::new();
        };
        socks.iter().filter(|(_, sock)| sock.fd > 0).map(|(_, sock)| sock.fd - 1).collect()
    }

    /// What a journal names, by other numbers: `other` says for each which. False: it does not know one, or the journal is damaged;
    /// then some may have changed.
    pub fn renumber_journal(
        journal: &Arc<Journal>,
        limits: Limits,
        other: &dyn Fn(i32) -> Option<i32>,
    ) -> bool {
        let Some(mut socks) = Table::<Sock>::kept(limits.sockets, journal, Parts::of(limits).socks) else {
            return false;
        };
        let mut at = Some(0);
        while let Some(id) = at {
            at = socks.next_id(id);
            let Some(sock) = socks.get_mut(id).filter(|sock| sock.fd > 0) else { continue };
            let Some(number) = other(sock.fd - 1) else { return false };
            sock.fd = number + 1;
        }
        true
    }

    /// Open sockets in a journal, and those of them that count as connections.
    pub fn journal_sockets(journal: &Arc<Journal>, limits: Limits) -> (usize, usize) {
        let Some(socks) = Table::<Sock>::kept(limits.sockets, journal, Parts::of(limits).socks) else {
            return (0, 0);
        };
        let used = || socks.iter().map(|(_, sock)| sock).filter(|sock| sock.kind != Kind::Free);
        (used().filter(|sock| sock.fd != 0).count(), used().filter(|sock| sock.bits & COUNTED != 0).count())
    }

    /// Whether values in a journal that somebody else wrote are ones of their types. What they say is checked by who recovers it,
    /// as everything that can be wrong there. To be called before anything else is read of it.
    pub fn journal_is_sound(journal: &Arc<Journal>, limits: Limits) -> bool {
        let parts = Parts::of(limits);
        let is = |offset: usize, most: u8, bytes: usize| {
            let value = Fixed::<u8>::kept(journal, offset, bytes, false);
            value.is_some_and(|value| value[0] <= most && value[1..].iter().all(|byte| *byte == 0))
        };
        let flags = [QueueState::RANG, QueueState::COMPLETED, QueueState::DOORBELL, QueueState::RELEASING];
        let queue = |q: usize| {
            let at = parts.queues + q * size_of::<QueueState>();
            flags.iter().all(|flag| is(at + flag, 1, 1))
        };
        let sock = |at: usize| is(at + std::mem::offset_of!(Sock, kind), Kind::LAST, size_of::<Kind>());
        (0..limits.queue_sets as usize).all(queue)
            && Table::<Sock>::places(limits.sockets, journal, parts.socks)
                .is_some_and(|mut places| places.all(sock))
    }

    /// The service that an earlier process left. Its stack's sockets are taken over: nothing else in this process may own
    /// their descriptors. `held`: sockets whose placeholder is there. `exact`: the process ended between two turns, so that nothing was under way.
    /// `may_use`: its connections are counted, also beyond what that allows: nobody takes them back.
    #[allow(clippy::too_many_arguments)]
    pub fn recover(
        region: Region,
        guest: u32,
        privileged: bool,
        journal: &Arc<Journal>,
        stack: &mut dyn Stack,
        held: &dyn Fn(u32) -> bool,
        exact: bool,
        may_use: crate::Limits,
    ) -> Result<Service, Violation> {
        const BAD: Violation = Violation("its journal is damaged");
        let limits = region.layout().limits;
        let parts = Parts::of(limits);
        let mut service = Service::new(region, guest, privileged);
        service.set_limits(may_use);
        let core = &mut service.core;
        core.totals = One(Fixed::kept(journal, 0, 1, false).ok_or(BAD)?);
        let queues = Fixed::kept(journal, parts.queues, limits.queue_sets as usize, false).ok_or(BAD)?;
        core.events = Events::with(queues);
        core.socks = Table::kept(limits.sockets, journal, parts.socks).ok_or(BAD)?;
        let blocks = core.socks.iter().filter(|(_, sock)| sock.kind != Kind::Free);
        let used: Vec<Block> = blocks.flat_map(|(_, sock)| [sock.rx, sock.tx]).collect();
        let layout = *service.region.layout();
        core.blocks = Blocks::resume(layout.payload_offset, layout.payload_bytes, used).ok_or(BAD)?;
        let cx = &mut Cx { region: &service.region, stack };
        let resumed = core.resume(cx, held, exact);
        if resumed.is_err() {
            // Nobody else will.
            core.socks.iter().for_each(|(_, sock)| core.uncount(sock.bits & COUNTED != 0));
        }
        resumed.map(|()| service)
    }
}

impl Core {
    fn resume(&mut self, cx: &mut Cx, held: &dyn Fn(u32) -> bool, exact: bool) -> Result<(), Violation> {
        self.clear_free();
        self.claim_places();
        self.resume_sockets(cx, exact)?;
        self.resume_ids(cx, held)?;
        self.events.resume(cx.region);
        self.resume_queues(cx)?;
        self.sweep_wanted = true;
        Ok(())
    }

    /// What is none (yet) has nothing of a stack's: a process can end before it says that a socket is one.
    fn clear_free(&mut self) {
        let mut at = Some(0);
        while let Some(id) = at {
            at = self.socks.next_id(id);
            if let Some(sock) = self.socks.get_mut(id).filter(|sock| sock.kind == Kind::Free) {
                sock.handle = Handle::NONE;
                drop(take_descriptor(std::mem::take(&mut sock.fd)));
            }
        }
    }

    /// Connections that were counted are.
    fn claim_places(&mut self) {
        let counted = |(id, sock): (u32, &Sock)| (sock.bits & COUNTED != 0).then_some(id);
        let counted: Vec<u32> = self.socks.iter().filter_map(counted).collect();
        for id in counted {
            match (&self.limits.connections, self.socks.get_mut(id)) {
                (Some(places), Some(sock)) if sock.kind != Kind::Free => places.claim(),
                (_, Some(sock)) => sock.bits &= !COUNTED,
                (_, None) => {}
            }
        }
    }

    fn resume_sockets(&mut self, cx: &mut Cx, exact: bool) -> Result<(), Violation> {
        let ids: Vec<u32> =
            self.socks.iter().filter(|(_, s)| s.kind != Kind::Free).map(|(id, _)| id).collect();
        for id in ids {
            let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { continue };
            self.sockets += 1;
            let mut paired = sock.bits & PAIRED != 0;
            sock.bits &= !(QUEUED | STARVED | THROTTLED | PAIRED | TX_BLOCKED | RX_STALLED);
            sock.bits |= RX_READY;
            sock.used_at = self.sweeps;
            sock.handle = Handle::NONE;
            let fd = sock.fd;
            let tells = sock.kind != Kind::Stream || sock.state & (state::CONNECTED | state::CONNECTING) != 0;
            let handed = sock.state & state::HANDED != 0;
            if handed {
                // Programs have it; this process does not touch it any more.
                sock.fd = 0;
                drop(take_descriptor(fd));
            } else if fd == super::FLEETING
                && let Ok(handle) = cx.stack.resume(key(self.guest, id), tells)
            {
                sock.handle = handle;
            } else if let Some(fd) = take_descriptor(fd)
                && let Ok(handle) = cx.stack.adopt(key(self.guest, id), fd, tells)
            {
                sock.handle = handle;
            }
            if sock.handle != Handle::NONE {
                sock.linger.tell(cx.stack, sock.handle);
            }
            paired = paired && super::paired::begin(cx.stack, entry, sock);
            self.has_pairs |= paired;
            // A guest that wrote here only hurt itself; one that did not finds what was not published yet.
            entry.generation.store(sock.generation, Relaxed);
            if !paired {
                entry.rx_offset.store((sock.rx.offset() / 64) as u32, Relaxed);
                entry.rx_base.store(sock.rx_base, Relaxed);
                entry.rx_size.store(sock.rx.size(), Relaxed);
                publish_tx(entry, sock.tx);
            }
            entry.rx_stalled.store(0, Relaxed);
            // An element that said so may have been taken.
            entry.tx_pending.store(0, SeqCst);
            entry.tx_head.store(sock.tx_head, Release);
            entry.rx_tail.store(sock.rx_tail, Release);
            entry.state.store(sock.state, Release);
            if handed {
                continue;
            }
            let gone = fd != 0 && sock.handle == Handle::NONE;
            if gone || !exact && sock.kind == Kind::Stream && !self.settle(cx, id) {
                let mut errno = libc::ECONNRESET;
                if let Some(sock) = self.socks.get_mut(id) {
                    sock.fd = 0;
                    let handle = std::mem::replace(&mut sock.handle, Handle::NONE);
                    if handle != Handle::NONE {
                        cx.stack.close(handle, Close::Abort);
                    }
                    errno = if sock.kind == Kind::Listener { libc::ENETDOWN } else { errno };
                    sock.error = errno;
                }
                self.fail(cx, id, errno)?;
            }
            self.events.wake(id, u32::MAX);
            self.enqueue(id);
        }
        Ok(())
    }

    /// Brings the positions of a connection up to what the stack says. False: they cannot be known.
    fn settle(&mut self, cx: &mut Cx, id: u32) -> bool {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return true };
        if sock.state & (state::CONNECTED | state::DEAD) != state::CONNECTED {
            return true;
        }
        let Some(progress) = cx.stack.progress(sock.handle, sock.bits & ACTIVE != 0) else { return false };
        if let Some(sent) = progress.sent
            && sock.state & state::TX_END == 0
        {
            let more = sent.wrapping_sub(sock.tx_head.wrapping_sub(sock.tx_start));
            let Ok(unsent) = bytes::used(sock.tx_head, entry.tx_tail.load(Acquire), sock.tx.size()) else {
                return false;
            };
            if more > unsent {
                return false;
            }
            sock.tx_head = sock.tx_head.wrapping_add(more);
            self.totals.bytes_out += more as u64;
            entry.tx_head.store(sock.tx_head, Release);
        }
        if sock.bits & CLOSING != 0 {
            return sock.peeked == 0;
        }
        // Urgent bytes are counted and not in the ring.
        if sock.bits & URGENT_SEEN != 0 {
            return false;
        }
        let published = sock.rx_tail.wrapping_sub(sock.rx_start);
        let both = published.wrapping_sub(progress.received);
        if sock.peeked > 0
            && (progress.or_one_less || both != 0 && (progress.received != 0 || both > sock.peeked))
        {
            return false;
        }
        if sock.peeked > 0 && both != 0 {
            // Only the first bytes of a connection are peeked at: either none of them was taken out of the stack, or all.
            // The last peek may not have been published.
            sock.peeked = both;
        } else {
            sock.peeked = 0;
            let received = progress.received.wrapping_sub(sock.rx_tail.wrapping_sub(sock.rx_start));
            // One less after an end. After a reset it is one byte too few, which resets may cost.
            let more = if progress.or_one_less { received.saturating_sub(1) } else { received };
            let Ok(unread) = bytes::used(entry.rx_head.load(Acquire), sock.rx_tail, sock.rx.size()) else {
                return false;
            };
            if more > sock.rx.size() - unread {
                return false;
            }
            sock.rx_tail = sock.rx_tail.wrapping_add(more);
            self.totals.bytes_in += more as u64;
            entry.rx_tail.store(sock.rx_tail, Release);
        }
        true
    }

    /// Ids that are free, and sockets that nobody can reach.
    fn resume_ids(&mut self, cx: &mut Cx, held: &dyn Fn(u32) -> bool) -> Result<(), Violation> {
        let used: Vec<(u32, Sock)> = self.socks.iter().map(|(id, sock)| (id, *sock)).collect();
        for &(id, sock) in &used {
            if id >= self.guest_sockets && (sock.kind != Kind::Free || sock.generation != 0) {
                self.next_id = self.next_id.max(id + 1);
            }
        }
        for &(id, sock) in &used {
            // A placeholder without a socket is kept, whatever was under way.
            let kept = sock.kind == Kind::Free && id < self.guest_sockets && held(id);
            if kept || sock.bits & SPARE != 0 {
                self.resume_spare(cx, id, held(id));
            }
            if sock.kind == Kind::Free {
                if id >= self.guest_sockets && id < self.next_id {
                    self.free_ids.push(id);
                }
            } else if sock.bits & UNTAKEN != 0 {
                let listener = self.socks.get(sock.link).filter(|l| l.kind == Kind::Listener);
                // Accepted, but not put into its listener's ring.
                let untold = listener.is_some_and(|l| l.rx_tail.wrapping_sub(sock.record) as i32 <= -1);
                if untold || sock.record == 0 {
                    self.finish_close(cx, id, Close::Abort);
                } else {
                    self.suspects |= sock.bits & SUSPECT != 0;
                }
            } else if sock.bits & CLOSING == 0 && !held(id) && sock.error != libc::ENFILE {
                self.close(cx, id)?;
            }
        }
        Ok(())
    }

    /// A socket whose placeholder the guest keeps, or has closed meanwhile (`held` false).
    fn resume_spare(&mut self, cx: &mut Cx, id: u32, held: bool) {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return };
        if sock.kind == Kind::Free && entry.generation.load(Relaxed) != sock.generation {
            // That it was closed was not published.
            super::clear_engine_lines(entry);
            entry.inode.store(0, Relaxed);
            entry.generation.store(sock.generation, Release);
        }
        if held {
            sock.bits |= SPARE;
        } else {
            sock.bits &= !SPARE;
            if sock.kind == Kind::Free && id < self.guest_sockets {
                self.return_id(cx.region, id);
            }
        }
    }

    /// Elements that were taken and not done.
    fn resume_queues(&mut self, cx: &mut Cx) -> Result<(), Violation> {
        for q in 0..self.events.queues.len() as u32 {
            let queue = self.events.queues[q as usize];
            if !queue.used() {
                continue;
            }
            self.highest_queue = self.highest_queue.max(q);
            if (q as usize / 64) < ACTIVE_WORDS {
                self.pending[q as usize / 64] |= 1 << (q % 64);
            }
            let (Some(jobs), Some(sends)) = (cx.region.job(q), cx.region.send(q)) else { continue };
            jobs.resume_head(queue.job_head);
            sends.resume_head(queue.send_head);
            if queue.job_head == 0 {
                continue;
            }
            // Still in its slot: a guest that waits does not push. Of a guest that does, nothing is to be taken on trust:
            // the element is checked as any.
            let last = Nqe::from_words(jobs.at(queue.job_head.wrapping_sub(1)));
            if last.op == Op::Release as u8 {
                self.events.queues[q as usize].releasing = true;
            } else if last.flags & flag::SYNC != 0
                && last.position == self.events.completed(q).wrapping_add(1)
            {
                self.again(cx, q, last)?;
            }
        }
        Ok(())
    }

    /// A job that somebody waits for, which may have been done already.
    fn again(&mut self, cx: &mut Cx, q: u32, nqe: Nqe) -> Result<(), Violation> {
        let id = nqe.socket;
        let mut status = None;
        if let Some(sock) = self.socks.get_mut(id)
            && sock.kind != Kind::Free
            && nqe.status as u32 == sock.generation
        {
            let bound = |name: SocketAddress| name.port() != 0;
            match Op::from_u8(nqe.op) {
                Some(Op::Bind) if cx.stack.local_name(sock.handle).is_ok_and(bound) => {
                    sock.state |= state::BOUND;
                    status = Some(0);
                }
                Some(Op::Connect) if sock.kind == Kind::Stream => {
                    if sock.state & state::CONNECTED != 0 {
                        status = Some(0);
                    } else if sock.state & state::CONNECTING != 0 || cx.stack.connecting(sock.handle) {
                        sock.state |= state::CONNECTING | state::BOUND;
                        sock.state &= !state::CONNECT_FAILED;
                        status = Some(-libc::EINPROGRESS);
                    }
                }
                _ => {}
            }
            self.publish_state(cx, id);
        }
        match status {
            None => self.element(cx, q, nqe, true),
            Some(status) => {
                let answer = Nqe { op: Op::Complete as u8, queue_set: q as u16, size: 0, status, ..nqe };
                self.events.complete(cx.region, q, answer)
            }
        }
    }
}
