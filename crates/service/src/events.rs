//! Completions, events and wake-ups of one guest, collected during a batch.

use std::sync::atomic::{
    Ordering::{Acquire, Relaxed, SeqCst},
    fence,
};

use netkernel_abi::socket::{WATCHERS, gflag};
use netkernel_abi::{Nqe, Op, SocketEntry};
use netkernel_shm::Region;

use crate::journal::{Fixed, Plain};
use crate::memory::futex_wake;
use crate::service::{Host, Violation};

/// Most wake-up bytes for one socket and batch.
pub const MAX_WAKE: u32 = 64;
/// Instead of a number of wake-up bytes: one byte of urgent data.
pub const URGENT_WAKE: u32 = u32::MAX;

/// The engine's own positions in the rings of a queue set.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct QueueState {
    pub job_head: u32,
    pub send_head: u32,
    complete_tail: u32,
    receive_tail: u32,
    /// Got an event, or a completion, in this batch.
    rang: bool,
    completed: bool,
    pub doorbell: bool,
    /// The owner gave it back; taken when its rings are empty.
    pub releasing: bool,
    /// Sweeps during which it had an owner but no process.
    pub nameless: u8,
}

// SAFETY: numbers and flags that only this code writes.
#[allow(unsafe_code)]
unsafe impl Plain for QueueState {}

impl QueueState {
    /// Where its flags stand.
    pub const RANG: usize = std::mem::offset_of!(QueueState, rang);
    pub const COMPLETED: usize = std::mem::offset_of!(QueueState, completed);
    pub const DOORBELL: usize = std::mem::offset_of!(QueueState, doorbell);
    pub const RELEASING: usize = std::mem::offset_of!(QueueState, releasing);

    pub fn used(&self) -> bool {
        self.doorbell || self.job_head | self.send_head | self.receive_tail != 0
    }
}

#[derive(Debug)]
pub struct Events {
    pub queues: Fixed<QueueState>,
    rang: Vec<u32>,
    completed: Vec<u32>,
    /// Sockets whose sleepers may have to wake, with the most that it helps to wake.
    woken: Vec<(u32, u32)>,
    /// Sockets with new urgent data.
    urgent: Vec<u32>,
    pub raised: u64,
    /// There was an event for all doorbells.
    pub broadcast: bool,
}

impl Events {
    pub fn new(queue_sets: u32) -> Events {
        Events::with(Fixed::new(queue_sets as usize))
    }

    pub fn with(queues: Fixed<QueueState>) -> Events {
        Events {
            queues,
            rang: Vec::new(),
            completed: Vec::new(),
            woken: Vec::new(),
            urgent: Vec::new(),
            raised: 0,
            broadcast: false,
        }
    }

    /// After a restart: positions are as they were left, but who was owed a wake-up is not known, so that all get one; those
    /// who wait for events look at all their sockets.
    pub fn resume(&mut self, region: &Region) {
        self.broadcast = true;
        for q in 0..self.queues.len() as u32 {
            let state = &mut self.queues[q as usize];
            (state.rang, state.completed) = (false, false);
            if !state.used() && state.complete_tail == 0 {
                continue;
            }
            let (Some(set), Some(complete), Some(receive)) =
                (region.queue_set(q), region.complete(q), region.receive(q))
            else {
                continue;
            };
            for (ring, tail) in [(complete, &mut state.complete_tail), (receive, &mut state.receive_tail)] {
                // The position is noted first, then published: what is noted holds, but for the slot's content, which may
                // be old. An event too many is none; a completion is told apart by its position.
                ring.publish(*tail);
            }
            set.overflow.store(1, SeqCst);
            state.rang = true;
            self.rang.push(q);
            state.completed = true;
            self.completed.push(q);
        }
    }

    /// Position behind the last completion.
    pub fn completed(&self, q: u32) -> u32 {
        self.queues.get(q as usize).map_or(0, |state| state.complete_tail)
    }

    /// Tells everybody who cares that the readiness of `id` changed. `most`: how many sleepers it helps to wake.
    pub fn raise(
        &mut self,
        region: &Region,
        entry: &SocketEntry,
        id: u32,
        generation: u32,
        hints: u32,
        most: u32,
    ) -> Result<(), Violation> {
        self.raised += 1;
        // SYNC: event - the state that was stored before is visible to who takes the event or finds its bit clear.
        fence(SeqCst);
        let mut element = Nqe::new(Op::Event, 0, id);
        element.op_data = hints as u64;
        element.status = generation as i32;
        if entry.broadcast.load(Relaxed) != 0 {
            self.broadcast = true;
            for q in 0..self.queues.len() as u32 {
                if self.queues[q as usize].doorbell {
                    self.push(region, q, element)?;
                }
            }
        } else {
            for i in 0..WATCHERS {
                let watcher = entry.watchers[i].load(Relaxed) as u32;
                if watcher == 0 || watcher > self.queues.len() as u32 {
                    continue;
                }
                let bit = 1 << i;
                if entry.event_pending.fetch_or(bit, SeqCst) & bit == 0 {
                    self.push(region, watcher - 1, element)?;
                }
            }
        }
        self.wake(id, most);
        Ok(())
    }

    /// Wakes those who sleep on the socket's placeholder when the batch ends, `most` of them.
    pub fn wake(&mut self, id: u32, most: u32) {
        match self.woken.last_mut() {
            Some((last, count)) if *last == id => *count = count.saturating_add(most),
            _ => self.woken.push((id, most)),
        }
    }

    /// There is new urgent data: who owns the socket is told when the batch ends.
    pub fn urgent(&mut self, id: u32) {
        self.urgent.push(id);
    }

    fn push(&mut self, region: &Region, q: u32, mut element: Nqe) -> Result<(), Violation> {
        let (Some(ring), Some(set)) = (region.receive(q), region.queue_set(q)) else { return Ok(()) };
        let state = &mut self.queues[q as usize];
        element.queue_set = q as u16;
        match ring.push(&mut state.receive_tail, element.to_words()) {
            Ok(true) => {}
            Ok(false) => set.overflow.store(1, SeqCst),
            Err(_) => return Err(Violation("receive ring positions")),
        }
        if !state.rang {
            state.rang = true;
            self.rang.push(q);
        }
        Ok(())
    }

    /// Answers a sync job.
    pub fn complete(&mut self, region: &Region, q: u32, element: Nqe) -> Result<(), Violation> {
        let Some(ring) = region.complete(q) else { return Ok(()) };
        let state = &mut self.queues[q as usize];
        match ring.push(&mut state.complete_tail, element.to_words()) {
            Ok(true) => {}
            Ok(false) => return Err(Violation("completion ring full")),
            Err(_) => return Err(Violation("completion ring positions")),
        }
        if !state.completed {
            state.completed = true;
            self.completed.push(q);
        }
        Ok(())
    }

    pub fn has_pending(&self) -> bool {
        !(self.rang.is_empty()
            && self.completed.is_empty()
            && self.woken.is_empty()
            && self.urgent.is_empty())
    }

    /// The end of a batch: doorbells, futexes and wake-up bytes for those who sleep.
    pub fn flush(&mut self, region: &Region, host: &mut dyn Host) {
        if !self.has_pending() {
            return;
        }
        // SYNC: doorbell - elements pushed before are visible to who arms its doorbell (or counts itself as a waiter)
        // and then looks at its ring; or we see here that it did.
        fence(SeqCst);
        for q in self.completed.drain(..) {
            self.queues[q as usize].completed = false;
            let Some(set) = region.queue_set(q) else { continue };
            if set.complete_waiting.load(Relaxed) != 0 && set.complete_waiting.swap(0, SeqCst) == 1 {
                futex_wake(&set.complete_tail);
            }
        }
        for q in self.rang.drain(..) {
            self.queues[q as usize].rang = false;
            let Some(set) = region.queue_set(q) else { continue };
            if set.armed.load(Relaxed) != 0 && set.armed.swap(0, SeqCst) == 1 {
                host.ring(q);
            }
        }
        for (id, most) in self.woken.drain(..) {
            let Some(entry) = region.socket(id) else { continue };
            let mut waiters = entry.waiters.load(Acquire);
            if waiters == 0 && entry.flags.load(Relaxed) & gflag::ASYNC != 0 {
                waiters = 1;
            }
            if waiters != 0 {
                // SYNC: wakes - changes before its bytes can be read.
                entry.wakes.fetch_add(1, SeqCst);
                host.wake(id, waiters.min(most).min(MAX_WAKE));
            }
        }
        for id in self.urgent.drain(..) {
            if region.socket(id).is_some_and(|entry| entry.flags.load(Relaxed) & gflag::OWNED != 0) {
                host.wake(id, URGENT_WAKE);
            }
        }
    }

    /// Makes the rings of `q` as new; nobody uses them.
    pub fn reset(&mut self, region: &Region, q: u32) {
        let (Some(job), Some(send), Some(complete), Some(receive), Some(set)) =
            (region.job(q), region.send(q), region.complete(q), region.receive(q), region.queue_set(q))
        else {
            return;
        };
        for ring in [job, send, complete, receive] {
            ring.reset();
        }
        let old = self.queues[q as usize];
        self.queues[q as usize] =
            QueueState { rang: old.rang, completed: old.completed, ..QueueState::default() };
        for word in [&set.armed, &set.overflow, &set.complete_waiting, &set.process] {
            word.store(0, Relaxed);
        }
        // SYNC: queue-set-free - the reset rings are visible to who claims it.
        set.owner.store(0, std::sync::atomic::Ordering::Release);
    }
}
