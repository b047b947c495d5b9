//! Memory that two guests map: the connections between them, each with two byte rings. No engine stands between the two.
//!
//! There is one such memory for two guests of one tenant, whatever number of connections they have. Both can write all of it
//! at any time, so that each believes nothing that stands there: positions are checked at each use, and offsets are masked.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// First page.
#[repr(C, align(4096))]
pub struct PairHeader {
    /// 1: no connection is left, and there will be none: who maps it may forget it.
    pub over: AtomicU32,
    reserved: [AtomicU32; 1023],
}

/// One end of one connection. Positions are byte counts modulo 2^32, as in a [`SocketEntry`](crate::SocketEntry).
#[repr(C, align(64))]
pub struct PairEnd {
    // Line 0: written by this end's guest.
    /// End of what this end has written.
    pub tail: AtomicU32,
    /// The position that stands first in the ring that this end writes; changes only while that is empty.
    pub base: AtomicU32,
    /// What this end has read of the other's ring.
    pub head: AtomicU32,
    /// How often a write found no room and did not wait.
    pub full: AtomicU32,
    /// Bytes ever written. The engine counts by it.
    pub sent: AtomicU64,
    /// The last urgent byte: its position, the byte in bits 32 to 39, and from bit 40 on which one it is (0: there was none).
    pub urgent: AtomicU64,
    reserved0: [AtomicU64; 4],
    // Line 1: flags that this end's guest sets and the other's clears, and offers.
    /// Somebody sleeps until there is something to read: 1, once; 2, for each change.
    pub want_data: AtomicU32,
    /// Somebody sleeps until there is room to write: 1.
    pub want_space: AtomicU32,
    /// This end's reader takes nothing that is offered: its kernel, its sandbox or its way of reading forbids it.
    pub refuses: AtomicU32,
    /// The offer that this end's reader copies now, by its number: a hint to be patient.
    pub copying: AtomicU32,
    // An offer of this end's writer, which the other's reader takes from the program's own memory (process_vm_readv).
    /// See [`offer`]. Both ends change it, the reader only by compare-and-exchange.
    pub offer: AtomicU64,
    /// Address of the first byte behind what is offered, in the writer's process.
    pub offer_end: AtomicU64,
    /// Where in that process [`PairEnd::offer_proof`] stands, for as long as the offer does: so that no other process is taken for it.
    pub offer_proof_at: AtomicU64,
    pub offer_proof: AtomicU64,
    /// The process, as it knows itself.
    pub offer_pid: AtomicU32,
    /// Of the writer alone: large writes that are not offered before the next one is (bits 0 to 15), and how many it will be after a
    /// failure (from bit 16 on).
    pub offer_pause: AtomicU32,
    reserved1: [AtomicU32; 2],
}

/// The word [`PairEnd::offer`]: what is left of an offer, its number, and whether it was withdrawn. 0: there is none.
pub mod offer {
    /// The writer took it back, and what is left comes by the ring: at once, unless it was ended meanwhile.
    pub const WITHDRAWN: u64 = 1 << 63;
    /// Bytes that one offer has at most.
    pub const MOST: usize = 1 << 30;

    /// Offer number `number` (31 bits count), of which `left` bytes were not taken.
    pub const fn word(number: u32, left: u32) -> u64 {
        ((number & 0x7fff_ffff) as u64) << 32 | left as u64
    }

    pub const fn number(word: u64) -> u32 {
        (word >> 32) as u32 & 0x7fff_ffff
    }

    pub const fn left(word: u64) -> u32 {
        word as u32
    }

    /// Bytes that a reader may still take.
    pub const fn open(word: u64) -> u32 {
        if word & WITHDRAWN != 0 { 0 } else { left(word) }
    }
}

/// Which end: the one that connected is 0, the one that accepted is 1.
pub const ENDS: usize = 2;
/// Connections of one memory.
pub const SLOTS: u32 = 256;
/// Bytes of each ring, a power of two. Measured with iperf3 and writes of 128 KiB: 256 KiB carry a seventh less.
pub const RING_BYTES: u32 = 1 << 20;
/// Offset of the table of ends: two for each connection.
pub const TABLE_OFFSET: u64 = size_of::<PairHeader>() as u64;
/// Offset of the rings: the first end's and the second end's of each connection.
pub const RINGS_OFFSET: u64 = TABLE_OFFSET + (SLOTS as usize * ENDS * size_of::<PairEnd>()) as u64;
/// Bytes of the whole.
pub const MEMORY_BYTES: u64 = RINGS_OFFSET + SLOTS as u64 * ENDS as u64 * RING_BYTES as u64;

/// Offset of one end, if there is such a slot.
pub const fn end_offset(slot: u32, end: usize) -> Option<u64> {
    if slot >= SLOTS || end >= ENDS {
        return None;
    }
    Some(TABLE_OFFSET + ((slot as usize * ENDS + end) * size_of::<PairEnd>()) as u64)
}

/// Offset of the ring that an end writes.
pub const fn ring_offset(slot: u32, end: usize) -> Option<u64> {
    if slot >= SLOTS || end >= ENDS {
        return None;
    }
    Some(RINGS_OFFSET + (slot as u64 * ENDS as u64 + end as u64) * RING_BYTES as u64)
}

const _: () = {
    assert!(size_of::<PairHeader>() == 4096);
    assert!(size_of::<PairEnd>() == 128);
    assert!(RING_BYTES.is_power_of_two());
    assert!(RINGS_OFFSET.is_multiple_of(4096));
};
