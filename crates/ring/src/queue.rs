//! A ring of queue elements.
//!
//! The slots and both positions stand in shared memory; a [`Queue`] is a view of them. Positions count elements modulo
//! 2^32. The producer alone writes `tail`, the consumer alone writes `head`.
//!
//! If a peer dies: a dead producer leaves complete elements up to `tail` and nothing beyond is looked at; a dead
//! consumer leaves a ring that stays full. Both are taken back by resetting the positions when nobody uses the ring.

use crate::Corrupt;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// A view of one ring. Copy it freely, but let only one thread push and only one thread pop at a time.
#[derive(Clone, Copy)]
pub struct Queue<'a> {
    head: &'a AtomicU32,
    tail: &'a AtomicU32,
    slots: &'a [[AtomicU64; 4]],
}

impl<'a> Queue<'a> {
    /// `slots.len()` must be a power of two (checked).
    pub fn new(head: &'a AtomicU32, tail: &'a AtomicU32, slots: &'a [[AtomicU64; 4]]) -> Queue<'a> {
        assert!(slots.len().is_power_of_two());
        Queue { head, tail, slots }
    }

    #[inline]
    fn slot(&self, position: u32) -> &'a [AtomicU64; 4] {
        &self.slots[position as usize & (self.slots.len() - 1)]
    }

    /// Appends an element. `Ok(false)`: the ring is full, nothing was written.
    ///
    /// `tail` is the producer's own copy of its position; a producer that trusts the memory may pass what it reads there.
    #[inline]
    pub fn push(&self, tail: &mut u32, element: [u64; 4]) -> Result<bool, Corrupt> {
        // SYNC: slot-free - the consumer has read the slot before it published this head.
        let used = tail.wrapping_sub(self.head.load(Ordering::Acquire));
        if used as usize > self.slots.len() {
            return Err(Corrupt);
        }
        if used as usize == self.slots.len() {
            return Ok(false);
        }
        write(self.slot(*tail), element);
        *tail = tail.wrapping_add(1);
        // SYNC: slot-full - the element's words become visible with this tail.
        self.tail.store(*tail, Ordering::Release);
        Ok(true)
    }

    /// Takes the oldest element. `head` is the consumer's own copy of its position.
    #[inline]
    pub fn pop(&self, head: &mut u32) -> Result<Option<[u64; 4]>, Corrupt> {
        // SYNC: slot-full
        let available = self.tail.load(Ordering::Acquire).wrapping_sub(*head);
        if available as usize > self.slots.len() {
            return Err(Corrupt);
        }
        if available == 0 {
            return Ok(None);
        }
        let element = read(self.slot(*head));
        *head = head.wrapping_add(1);
        // SYNC: slot-free
        self.head.store(*head, Ordering::Release);
        Ok(Some(element))
    }

    /// Appends elements until the ring is full or there are no more; says how many. They become visible together, by one
    /// store of the position; no element is taken from `elements` that does not fit.
    #[inline]
    pub fn push_all(
        &self,
        tail: &mut u32,
        elements: &mut impl Iterator<Item = [u64; 4]>,
    ) -> Result<u32, Corrupt> {
        // SYNC: slot-free - the consumer has read the slots before it published this head.
        let used = tail.wrapping_sub(self.head.load(Ordering::Acquire));
        if used as usize > self.slots.len() {
            return Err(Corrupt);
        }
        let room = self.slots.len() as u32 - used;
        let mut pushed = 0;
        while pushed < room {
            let Some(element) = elements.next() else { break };
            write(self.slot(tail.wrapping_add(pushed)), element);
            pushed += 1;
        }
        if pushed > 0 {
            *tail = tail.wrapping_add(pushed);
            // SYNC: slot-full - the words of all of them become visible with this tail.
            self.tail.store(*tail, Ordering::Release);
        }
        Ok(pushed)
    }

    /// The oldest elements, at most `most`, with one look at the producer's position. `head` is the consumer's own copy of
    /// its position. The producer gets the slots back, all together, by [`Batch::finish`].
    #[inline]
    pub fn batch(&self, head: u32, most: u32) -> Result<Batch<'a>, Corrupt> {
        // SYNC: slot-full
        let available = self.tail.load(Ordering::Acquire).wrapping_sub(head);
        if available as usize > self.slots.len() {
            return Err(Corrupt);
        }
        Ok(Batch { queue: *self, from: head, at: head, left: available.min(most) })
    }

    /// Moves the oldest elements to the ring `to`, at most `most` and as many as fit: what `route` makes of each, or nothing
    /// where it gives `None`. One look at each side's positions, one store to each. `head` is the consumer's own copy of
    /// its position here, `tail` the producer's own there. Says how many were taken from here.
    #[inline]
    pub fn transfer(
        &self,
        head: &mut u32,
        to: &Queue,
        tail: &mut u32,
        most: u32,
        mut route: impl FnMut([u64; 4]) -> Option<[u64; 4]>,
    ) -> Result<u32, Corrupt> {
        // SYNC: slot-full, slot-free
        let available = self.tail.load(Ordering::Acquire).wrapping_sub(*head);
        let used = tail.wrapping_sub(to.head.load(Ordering::Acquire));
        if available as usize > self.slots.len() || used as usize > to.slots.len() {
            return Err(Corrupt);
        }
        let most = available.min(most).min(to.slots.len() as u32 - used);
        let (mut taken, mut given) = (0, 0);
        while taken < most {
            // Neither ring ends within a run.
            let from = self.run(head.wrapping_add(taken), most - taken);
            let into = to.run(tail.wrapping_add(given), most - taken);
            let n = from.len().min(into.len());
            let mut slots = into[..n].iter();
            for slot in &from[..n] {
                if let Some(element) = route(read(slot))
                    && let Some(slot) = slots.next()
                {
                    write(slot, element);
                }
            }
            taken += n as u32;
            given += (n - slots.len()) as u32;
        }
        if taken > 0 {
            *head = head.wrapping_add(taken);
            // SYNC: slot-free - all elements before this head were read.
            self.head.store(*head, Ordering::Release);
        }
        if given > 0 {
            *tail = tail.wrapping_add(given);
            // SYNC: slot-full - the words of all of them become visible with this tail.
            to.tail.store(*tail, Ordering::Release);
        }
        Ok(taken)
    }

    /// At most `most` slots from `position` on, and not beyond the ring's end.
    #[inline]
    fn run(&self, position: u32, most: u32) -> &'a [[AtomicU64; 4]] {
        let slots = &self.slots[position as usize & (self.slots.len() - 1)..];
        &slots[..slots.len().min(most as usize)]
    }

    /// Elements that can be popped now, by the shared positions.
    pub fn len(&self) -> usize {
        let tail = self.tail.load(Ordering::Acquire);
        tail.wrapping_sub(self.head.load(Ordering::Acquire)) as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The producer's position as it stands in memory (a producer that owns the memory may resume from it).
    pub fn tail(&self) -> u32 {
        self.tail.load(Ordering::Relaxed)
    }

    /// The consumer's position as it stands in memory.
    pub fn head(&self) -> u32 {
        self.head.load(Ordering::Relaxed)
    }

    /// The element at a position, whoever may be writing it.
    pub fn at(&self, position: u32) -> [u64; 4] {
        read(self.slot(position))
    }

    /// A producer that died is back, with its own copy of its position.
    pub fn publish(&self, tail: u32) {
        // SYNC: slot-full
        self.tail.store(tail, Ordering::Release);
    }

    /// A consumer that died is back, with its own copy of its position.
    pub fn resume_head(&self, head: u32) {
        // SYNC: slot-free
        self.head.store(head, Ordering::Release);
    }

    /// Empties the ring. Only while nobody pushes or pops.
    pub fn reset(&self) {
        self.head.store(0, Ordering::Relaxed);
        self.tail.store(0, Ordering::Release);
    }
}

/// Elements that are being popped, oldest first. What was not taken when it [finishes](Batch::finish) stays in the ring.
#[must_use = "the producer gets no slot back before `finish`"]
pub struct Batch<'a> {
    queue: Queue<'a>,
    from: u32,
    at: u32,
    left: u32,
}

impl Batch<'_> {
    /// Behind the element that was taken last.
    #[inline]
    pub fn position(&self) -> u32 {
        self.at
    }

    /// Gives the slots of what was taken back to the producer; the consumer's new position.
    #[inline]
    pub fn finish(self) -> u32 {
        // Nothing taken, nothing stored: the producer keeps the line in its cache.
        if self.at != self.from {
            // SYNC: slot-free - all elements before this head were read.
            self.queue.head.store(self.at, Ordering::Release);
        }
        self.at
    }
}

impl Iterator for Batch<'_> {
    type Item = [u64; 4];

    #[inline]
    fn next(&mut self) -> Option<[u64; 4]> {
        // Not the shared position: what was checked once is not read again.
        self.left = self.left.checked_sub(1)?;
        let element = read(self.queue.slot(self.at));
        self.at = self.at.wrapping_add(1);
        Some(element)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

#[inline]
fn read(slot: &[AtomicU64; 4]) -> [u64; 4] {
    [
        slot[0].load(Ordering::Relaxed),
        slot[1].load(Ordering::Relaxed),
        slot[2].load(Ordering::Relaxed),
        slot[3].load(Ordering::Relaxed),
    ]
}

#[inline]
fn write(slot: &[AtomicU64; 4], element: [u64; 4]) {
    for (word, value) in slot.iter().zip(element) {
        word.store(value, Ordering::Relaxed);
    }
}
