//! Memory that two guests map: one for each two guests that have connections, with a slot for each of these.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::{Arc, Mutex, Weak};

use netkernel_abi::pair::{PairEnd, RING_BYTES, SLOTS};
use netkernel_service::take_descriptor;
use netkernel_shm::PairMemory;
use serde::{Deserialize, Serialize};

use crate::inbox::lock;
use crate::link::Side;

/// Memories that one guest may be part of: a bound for what it can make the engine hold, and its processes map.
const MOST: usize = 16;

/// Names a guest among all that ever were of one hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Serial(pub u64);

/// All memories of one hub.
#[derive(Default)]
pub(crate) struct Pairs {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    serials: u64,
    numbers: u32,
    /// Kept as long as both guests are there, so that the next connection finds it mapped.
    between: HashMap<(Serial, Serial), Arc<Memory>>,
    by_number: HashMap<u32, Weak<Memory>>,
    /// Of another program, until the connections that stand in them have come.
    taken_up: Vec<Arc<Memory>>,
}

/// A memory, for the program that this process executes next.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LeftMemory {
    number: u32,
    guests: (u64, u64),
    pub fd: RawFd,
    free: Vec<u32>,
    /// Both guests are there.
    kept: bool,
}

struct Memory {
    number: u32,
    guests: (Serial, Serial),
    shared: PairMemory,
    free: Mutex<Vec<u32>>,
}

/// A place for one connection. It is free again with the value.
pub(crate) struct Slot {
    memory: Arc<Memory>,
    index: u32,
}

impl Pairs {
    pub fn serial(&self) -> Serial {
        let mut state = lock(&self.state);
        state.serials += 1;
        Serial(state.serials)
    }

    /// A slot for a connection between two guests, which may be the same one. Errors are reasons for people.
    pub fn take(&self, a: Serial, b: Serial) -> Result<Slot, &'static str> {
        let guests = (a.min(b), a.max(b));
        let mut state = lock(&self.state);
        let memory = match state.between.get(&guests) {
            Some(memory) => Arc::clone(memory),
            None => {
                // Also those of guests that are over, whose peers have not closed.
                let all: Vec<_> = state.by_number.values().filter_map(Weak::upgrade).collect();
                let of = |guest| all.iter().filter(|memory| memory.is_of(guest)).count();
                if of(a) >= MOST || of(b) >= MOST {
                    return Err("one of them shares memory with many other guests already");
                }
                let Ok(shared) = PairMemory::create() else {
                    return Err("there was no memory, or no descriptor, for them to share");
                };
                state.numbers = state.numbers.wrapping_add(1).max(1);
                let number = state.numbers;
                // The lowest first: what is used stands together.
                let free = Mutex::new((0..SLOTS).rev().collect());
                let memory = Arc::new(Memory { number, guests, shared, free });
                state.by_number.insert(number, Arc::downgrade(&memory));
                state.between.insert(guests, Arc::clone(&memory));
                memory
            }
        };
        drop(state);
        let index = lock(&memory.free).pop();
        match index {
            Some(index) => Ok(Slot { memory, index }),
            None => Err("the two have as many connections as fit into the memory that they share"),
        }
    }

    /// A descriptor of memory `number` for a guest that is part of it.
    pub fn descriptor(&self, guest: Serial, number: u32) -> io::Result<Option<OwnedFd>> {
        let memory = lock(&self.state).by_number.get(&number).and_then(Weak::upgrade);
        match memory {
            Some(memory) if memory.is_of(guest) => memory.shared.as_fd().try_clone_to_owned().map(Some),
            _ => Ok(None),
        }
    }

    /// Guests so far, memories so far, and the memories that there are.
    pub fn written(&self) -> (u64, u32, Vec<LeftMemory>) {
        let state = lock(&self.state);
        let memories = state.by_number.values().filter_map(Weak::upgrade).map(|memory| LeftMemory {
            number: memory.number,
            guests: (memory.guests.0.0, memory.guests.1.0),
            fd: memory.shared.as_fd().as_raw_fd(),
            free: lock(&memory.free).clone(),
            kept: state.between.contains_key(&memory.guests),
        });
        (state.serials, state.numbers, memories.collect())
    }

    /// Those of another program, with their numbers.
    pub fn take_up(&self, serials: u64, numbers: u32, memories: Vec<LeftMemory>) {
        let mut state = lock(&self.state);
        (state.serials, state.numbers) = (serials, numbers);
        for left in memories {
            let shared = take_descriptor(left.fd + 1).map(PairMemory::open);
            let Some(Ok(shared)) = shared else { continue };
            let guests = (Serial(left.guests.0), Serial(left.guests.1));
            let free = Mutex::new(left.free);
            let memory = Arc::new(Memory { number: left.number, guests, shared, free });
            state.by_number.insert(left.number, Arc::downgrade(&memory));
            if left.kept {
                state.between.insert(guests, Arc::clone(&memory));
            }
            state.taken_up.push(memory);
        }
    }

    /// A slot that a connection has already.
    pub fn slot(&self, number: u32, index: u32) -> Option<Slot> {
        let memory = lock(&self.state).by_number.get(&number)?.upgrade()?;
        (index < SLOTS).then_some(Slot { memory, index })
    }

    /// Nobody comes any more for what was taken up.
    pub fn settle(&self) {
        let taken_up = std::mem::take(&mut lock(&self.state).taken_up);
        // Unmapped without the lock.
        drop(taken_up);
        lock(&self.state).by_number.retain(|_, memory| memory.strong_count() > 0);
    }

    /// The guest is over. What its peers have not read yet stays until they close.
    pub fn over(&self, guest: Serial) {
        let mut state = lock(&self.state);
        let mut gone = Vec::new();
        state.between.retain(|guests, memory| {
            let stays = guests.0 != guest && guests.1 != guest;
            if !stays {
                gone.push(Arc::clone(memory));
            }
            stays
        });
        state.by_number.retain(|_, memory| memory.strong_count() > 0);
        drop(state);
        // Unmapped without the lock.
        drop(gone);
    }
}

impl Memory {
    fn is_of(&self, guest: Serial) -> bool {
        self.guests.0 == guest || self.guests.1 == guest
    }
}

impl Slot {
    pub fn memory(&self) -> u32 {
        self.memory.number
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    fn end(&self, side: Side) -> Option<&PairEnd> {
        self.memory.shared.view().end(self.index, side.number())
    }

    /// Bytes that wait for this end, by the guests' own word; never more than a ring holds.
    pub fn unread(&self, side: Side) -> u32 {
        let (Some(me), Some(peer)) = (self.end(side), self.end(side.other())) else { return 0 };
        peer.tail.load(Acquire).wrapping_sub(me.head.load(Acquire)).min(RING_BYTES)
    }

    /// Bytes that this end has sent so far, by its guest's own word.
    pub fn sent(&self, side: Side) -> u64 {
        self.end(side).map_or(0, |end| end.sent.load(Relaxed))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.memory.shared.clear(self.index);
        lock(&self.memory.free).push(self.index);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Who has it mapped may forget it.
        self.shared.view().header().over.store(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_guests_share_one_memory_that_no_other_gets() {
        let pairs = Pairs::default();
        let (a, b, c) = (pairs.serial(), pairs.serial(), pairs.serial());
        let first = pairs.take(a, b).unwrap();
        let second = pairs.take(b, a).unwrap();
        assert_eq!(first.memory(), second.memory());
        assert_ne!(first.index(), second.index());
        let other = pairs.take(a, c).unwrap();
        assert_ne!(first.memory(), other.memory());
        for (guest, its) in [(a, true), (b, true), (c, false)] {
            assert_eq!(pairs.descriptor(guest, first.memory()).unwrap().is_some(), its);
        }
        assert!(pairs.descriptor(a, 99).unwrap().is_none());
    }

    #[test]
    fn slots_are_bounded_and_used_again() {
        let pairs = Pairs::default();
        let (a, b) = (pairs.serial(), pairs.serial());
        let slots: Vec<Slot> = (0..SLOTS).map(|_| pairs.take(a, b).unwrap()).collect();
        assert!(pairs.take(a, b).is_err());
        let index = slots[7].index();
        slots[7].end(Side::Client).unwrap().tail.store(5, Relaxed);
        assert_eq!(slots[7].unread(Side::Server), 5);
        slots[7].end(Side::Client).unwrap().tail.store(u32::MAX, Relaxed);
        assert_eq!(slots[7].unread(Side::Server), RING_BYTES, "a lie is cut");
        drop(slots);
        let again: Vec<Slot> = (0..SLOTS).map(|_| pairs.take(a, b).unwrap()).collect();
        let same = again.iter().find(|slot| slot.index() == index).unwrap();
        assert_eq!(same.unread(Side::Server), 0);
        let others: Vec<Serial> = (0..MOST).map(|_| pairs.serial()).collect();
        let taken = others.iter().filter(|other| pairs.take(a, **other).is_ok()).count();
        assert_eq!(taken, MOST - 1, "with the one before");
    }

    #[test]
    fn a_guest_that_is_over_leaves_its_memory_to_who_still_reads() {
        let pairs = Pairs::default();
        let (a, b) = (pairs.serial(), pairs.serial());
        let slot = pairs.take(a, b).unwrap();
        let number = slot.memory();
        pairs.over(a);
        assert!(pairs.descriptor(b, number).unwrap().is_some());
        let view =
            netkernel_shm::PairView::map(&pairs.descriptor(b, number).unwrap().unwrap(), None).unwrap();
        assert_eq!(view.header().over.load(Relaxed), 0);
        drop(slot);
        assert!(pairs.descriptor(b, number).unwrap().is_none());
        assert_eq!(view.header().over.load(Relaxed), 1);
    }
}
