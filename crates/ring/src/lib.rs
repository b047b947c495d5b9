//! Single-producer single-consumer rings of 32-byte elements, byte-ring arithmetic, and the waiting policy.
//!
//! Nothing here trusts the other side: a consumer copies the producer's position once, checks it against the ring's
//! size, and reads no element twice. All atomics come from [`sync`], so that loom sees them.
#![cfg_attr(not(loom), no_std)]
#![forbid(unsafe_code)]

pub mod bell;
pub mod bytes;
pub mod queue;
pub mod spin;

/// The one place where atomics come from: `core`, or loom under `--cfg loom`.
pub mod sync {
    #[cfg(not(loom))]
    pub use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}

/// The other side wrote positions that no correct peer can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt;
