//! Where everything stands in a region. One function computes it; both sides check it.

use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::{ABI_VERSION, MAGIC, SocketEntry, feature};

/// First page of a region.
#[repr(C, align(4096))]
pub struct Header {
    pub magic: AtomicU64,
    pub abi_version: AtomicU32,
    /// Sockets in the table; ids run from 1.
    pub sockets: AtomicU32,
    /// Ids below this one are taken by the guest, the others by the engine (accepted sockets).
    pub guest_sockets: AtomicU32,
    pub queue_sets: AtomicU32,
    pub features: AtomicU64,
    pub region_bytes: AtomicU64,
    pub guest: AtomicU32,
    /// Spin budget that the engine advises to guests, in nanoseconds.
    pub spin_ns: AtomicU32,
    reserved0: [AtomicU64; 2],

    // Own line: doorbell suppression. 1: the engine sleeps (or does not poll this guest); write the doorbell.
    pub engine_waiting: AtomicU32,
    /// 1: the engine was ended in order; nothing will be served any more.
    pub engine_gone: AtomicU32,
    reserved1: [AtomicU32; 14],

    /// Bit q: queue set q has job or send elements that the engine may not have seen.
    pub active: [AtomicU64; ACTIVE_WORDS],

    // Own line: free list of guest-allocated sockets, tag << 32 | id, and the first id never used.
    pub free_head: AtomicU64,
    pub next_unused: AtomicU32,
    /// Sockets in use that the guest allocated.
    pub guest_used: AtomicU32,
    reserved2: [AtomicU64; 6],
    reserved3: [u64; (4096 - 64 - 64 - ACTIVE_WORDS * 8 - 64) / 8],
}

pub const ACTIVE_WORDS: usize = 16;

/// Head of a queue set; the rings follow it.
#[repr(C, align(64))]
pub struct QueueSet {
    /// 0 free, 1 owned by a thread or an epoll instance of the guest.
    pub owner: AtomicU32,
    /// Tag of the process it belongs to.
    pub process: AtomicU32,
    /// 1: write the eventfd when the receive ring has something. The engine swaps 0 in.
    pub armed: AtomicU32,
    /// 1: the receive ring was full: look at every socket of the interest list.
    pub overflow: AtomicU32,
    /// 1: the owner sleeps on `complete_tail` (futex) for a completion.
    pub complete_waiting: AtomicU32,
    reserved0: [AtomicU32; 11],
    pub job_tail: AtomicU32,
    pub send_tail: AtomicU32,
    pub complete_head: AtomicU32,
    pub receive_head: AtomicU32,
    reserved1: [AtomicU32; 12],
    pub job_head: AtomicU32,
    pub send_head: AtomicU32,
    pub complete_tail: AtomicU32,
    pub receive_tail: AtomicU32,
    reserved2: [AtomicU32; 12],
    reserved3: [AtomicU64; 40],
    /// Arguments of a sync job, and results: addresses, option values.
    pub argument: [AtomicU64; ARGUMENT_BYTES / 8],
}

/// Bytes of a queue set's argument area.
pub const ARGUMENT_BYTES: usize = 512;

/// Elements of each ring of a queue set.
pub const JOB_SLOTS: u32 = 64;
pub const SEND_SLOTS: u32 = 512;
pub const COMPLETE_SLOTS: u32 = 64;
pub const RECEIVE_SLOTS: u32 = 1024;

const SLOT: u64 = 32;
/// Offsets inside a queue set, from its head.
pub const JOB_OFFSET: u64 = 1024;
pub const COMPLETE_OFFSET: u64 = JOB_OFFSET + JOB_SLOTS as u64 * SLOT;
pub const SEND_OFFSET: u64 = 8192;
pub const RECEIVE_OFFSET: u64 = SEND_OFFSET + SEND_SLOTS as u64 * SLOT;
/// Distance of queue sets.
pub const QUEUE_SET_STRIDE: u64 = 64 * 1024;

const _: () = {
    assert!(COMPLETE_OFFSET + COMPLETE_SLOTS as u64 * SLOT <= SEND_OFFSET);
    assert!(RECEIVE_OFFSET + RECEIVE_SLOTS as u64 * SLOT <= QUEUE_SET_STRIDE);
};

/// What an operator chooses of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub region_bytes: u64,
    pub sockets: u32,
    pub queue_sets: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { region_bytes: 1 << 30, sockets: 32768, queue_sets: 512 }
    }
}

/// Offsets, in bytes, of the parts of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub limits: Limits,
    /// Ids 1..guest_sockets are the guest's to take.
    pub guest_sockets: u32,
    pub sockets_offset: u64,
    pub queue_sets_offset: u64,
    pub payload_offset: u64,
    pub payload_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// Not a region, or not initialised.
    Magic,
    /// The other side's ABI version.
    Version(u32),
    /// Feature bits that this side does not know.
    Features(u64),
    /// Sizes that do not fit into each other.
    Sizes,
}

/// The least payload of a region: one ring of the largest class each way.
pub const MIN_PAYLOAD: u64 = 4 << 20;

impl Layout {
    /// Computes the layout for `limits`; the payload is what is left after the tables.
    pub const fn new(limits: Limits) -> Result<Layout, LayoutError> {
        if limits.sockets < 16
            || limits.sockets > 1 << 20
            || limits.queue_sets < 1
            || limits.queue_sets > ACTIVE_WORDS as u32 * 64
            || limits.region_bytes > 1 << 37
            || !limits.region_bytes.is_multiple_of(4096)
        {
            return Err(LayoutError::Sizes);
        }
        let sockets_offset = size_of::<Header>() as u64;
        let queue_sets_offset =
            align(sockets_offset + limits.sockets as u64 * size_of::<SocketEntry>() as u64, 4096);
        let payload_offset = align(queue_sets_offset + limits.queue_sets as u64 * QUEUE_SET_STRIDE, 2 << 20);
        if payload_offset + MIN_PAYLOAD > limits.region_bytes {
            return Err(LayoutError::Sizes);
        }
        Ok(Layout {
            limits,
            guest_sockets: limits.sockets / 2,
            sockets_offset,
            queue_sets_offset,
            payload_offset,
            payload_bytes: limits.region_bytes - payload_offset,
        })
    }

    /// Byte offset of socket `id`, or `None` outside the table (0 is never a socket).
    pub const fn socket(&self, id: u32) -> Option<u64> {
        if id == 0 || id >= self.limits.sockets {
            return None;
        }
        Some(self.sockets_offset + id as u64 * size_of::<SocketEntry>() as u64)
    }

    /// Byte offset of queue set `q`.
    pub const fn queue_set(&self, q: u32) -> Option<u64> {
        if q >= self.limits.queue_sets {
            return None;
        }
        Some(self.queue_sets_offset + q as u64 * QUEUE_SET_STRIDE)
    }

    /// Writes the header of a fresh (zeroed) region; the magic comes last.
    pub fn initialise(&self, header: &Header, guest: u32, features: u64, spin_ns: u32) {
        use core::sync::atomic::Ordering::{Relaxed, Release};
        header.abi_version.store(ABI_VERSION, Relaxed);
        header.sockets.store(self.limits.sockets, Relaxed);
        header.guest_sockets.store(self.guest_sockets, Relaxed);
        header.queue_sets.store(self.limits.queue_sets, Relaxed);
        header.features.store(features, Relaxed);
        header.region_bytes.store(self.limits.region_bytes, Relaxed);
        header.guest.store(guest, Relaxed);
        header.spin_ns.store(spin_ns, Relaxed);
        header.next_unused.store(1, Relaxed);
        header.engine_waiting.store(1, Relaxed);
        // SYNC: region-ready - everything above is visible to who reads the magic.
        header.magic.store(MAGIC, Release);
    }

    /// Reads a header that the other side wrote and checks it against the mapped size.
    pub fn from_header(header: &Header, mapped_bytes: u64) -> Result<Layout, LayoutError> {
        use core::sync::atomic::Ordering::{Acquire, Relaxed};
        // SYNC: region-ready
        if header.magic.load(Acquire) != MAGIC {
            return Err(LayoutError::Magic);
        }
        let version = header.abi_version.load(Relaxed);
        if version != ABI_VERSION {
            return Err(LayoutError::Version(version));
        }
        let features = header.features.load(Relaxed);
        if features & !feature::ALL != 0 {
            return Err(LayoutError::Features(features & !feature::ALL));
        }
        let layout = Layout::new(Limits {
            region_bytes: header.region_bytes.load(Relaxed),
            sockets: header.sockets.load(Relaxed),
            queue_sets: header.queue_sets.load(Relaxed),
        })?;
        if layout.limits.region_bytes > mapped_bytes
            || layout.guest_sockets != header.guest_sockets.load(Relaxed)
        {
            return Err(LayoutError::Sizes);
        }
        Ok(layout)
    }
}

const fn align(value: u64, to: u64) -> u64 {
    value.div_ceil(to) * to
}

impl core::fmt::Display for LayoutError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            LayoutError::Magic => write!(f, "not a NetKernel region"),
            LayoutError::Version(v) => write!(
                f,
                "the engine speaks region ABI {v}, this library {ABI_VERSION}: restart the engine and the guest with the same release"
            ),
            LayoutError::Features(bits) => {
                write!(f, "the region needs features {bits:#x} that this release does not know")
            }
            LayoutError::Sizes => {
                write!(f, "region sizes that do not fit: raise region_bytes or lower sockets and queue_sets")
            }
        }
    }
}
