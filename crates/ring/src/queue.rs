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

    fn slot(&self, position: u32) -> &'a [AtomicU64; 4] {
        &self.slots[position as usize & (self.slots.len() - 1)]
    }

    /// Appends an element. `Ok(false)`: the ring is full, nothing was written.
    ///
    /// `tail` is the producer's own copy of its position; a producer that trusts the memory may pass what it reads there.
    pub fn push(&self, tail: &mut u32, element: [u64; 4]) -> Result<bool, Corrupt> {
        // SYNC: slot-free - the consumer has read the slot before it published this head.
        let used = tail.wrapping_sub(self.head.load(Ordering::Acquire));
        if used as usize > self.slots.len() {
            return Err(Corrupt);
        }
        if used as usize == self.slots.len() {
            return Ok(false);
        }
        for (word, value) in self.slot(*tail).iter().zip(element) {
            word.store(value, Ordering::Relaxed);
        }
        *tail = tail.wrapping_add(1);
        // SYNC: slot-full - the element's words become visible with this tail.
        self.tail.store(*tail, Ordering::Release);
        Ok(true)
    }

    /// Takes the oldest element. `head` is the consumer's own copy of its position.
    pub fn pop(&self, head: &mut u32) -> Result<Option<[u64; 4]>, Corrupt> {
        // SYNC: slot-full
        let available = self.tail.load(Ordering::Acquire).wrapping_sub(*head);
        if available as usize > self.slots.len() {
            return Err(Corrupt);
        }
        if available == 0 {
            return Ok(None);
        }
        let slot = self.slot(*head);
        let element = [
            slot[0].load(Ordering::Relaxed),
            slot[1].load(Ordering::Relaxed),
            slot[2].load(Ordering::Relaxed),
            slot[3].load(Ordering::Relaxed),
        ];
        *head = head.wrapping_add(1);
        // SYNC: slot-free
        self.head.store(*head, Ordering::Release);
        Ok(Some(element))
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

    /// Empties the ring. Only while nobody pushes or pops.
    pub fn reset(&self) {
        self.head.store(0, Ordering::Relaxed);
        self.tail.store(0, Ordering::Release);
    }
}
