//! When to ring for the other side.
//!
//! Who is about to sleep stores 1 in its word and then looks once more at what it waits for; who has published something
//! asks [`must_ring`]. One of the two sees the other: see `no_wake_up_is_lost` in the loom tests.

use crate::sync::{AtomicU32, Ordering, fence};

/// True when the other side sleeps and nobody else rings for it: the caller must. What the caller published before is
/// then visible to the other side, or was seen by its last look. Suppressed (the usual case) this is a fence and a load.
#[inline]
pub fn must_ring(waiting: &AtomicU32) -> bool {
    // SYNC: doorbell - what was published before is visible to a sleeper that stored 1 after we looked.
    fence(Ordering::SeqCst);
    waiting.load(Ordering::SeqCst) == 1 && waiting.swap(0, Ordering::SeqCst) == 1
}
