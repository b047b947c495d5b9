//! What crosses the shared memory between a guest, CoreEngine and a network stack module.
//!
//! Everything here is fixed-width, has no pointer and no padding, and is sized by constant assertions, so that the same
//! bytes serve a process on the same kernel and a VM that sees the region as a PCI BAR. `docs/ABI.md` is the prose.
//! Changing a layout without changing [`ABI_VERSION`] fails the build (see the assertions at the end of this file).
#![no_std]
#![forbid(unsafe_code)]

pub mod ancillary;
pub mod control;
pub mod layout;
pub mod nqe;
pub mod pair;
pub mod socket;

pub use layout::{Header, Layout, LayoutError, Limits, QueueSet};
pub use nqe::{Nqe, Op};
pub use socket::SocketEntry;

/// Version of everything in this crate; both sides must have the same one.
pub const ABI_VERSION: u32 = 3;

/// First eight bytes of a region: "NETKRNL1", little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"NETKRNL1");

/// Feature bits of [`Header::features`]: offered by the engine; a guest that needs one that is absent must refuse to start.
pub mod feature {
    /// Doorbells may be eventfds (else: polling only, as in a VM without interrupts).
    pub const EVENTFD: u64 = 1 << 0;
    /// Placeholders are ends of Unix socket pairs whose other ends the engine holds.
    pub const PLACEHOLDER: u64 = 1 << 1;
    /// The region stands on huge pages.
    pub const HUGE_PAGES: u64 = 1 << 2;
    /// Guests that this one shares memory with are trusted as processes of one user are: large writes take one copy (`pair::offer`).
    pub const SINGLE_COPY: u64 = 1 << 3;
    /// The engine knows `Op::Close`: placeholders may be used again.
    pub const SPARES: u64 = 1 << 4;
    /// Every bit that this version knows.
    pub const ALL: u64 = EVENTFD | PLACEHOLDER | HUGE_PAGES | SINGLE_COPY | SPARES;
}

const _: () = {
    // The layout of ABI version 3. A change here needs a new ABI_VERSION and a new line in docs/ABI.md.
    assert!(ABI_VERSION == 3);
    assert!(size_of::<Nqe>() == 32);
    assert!(size_of::<SocketEntry>() == 256);
    assert!(size_of::<QueueSet>() == 1024);
    assert!(size_of::<Header>() == 4096);
    assert!(size_of::<control::Message>() == 32);
    assert!(size_of::<socket::Address>() == 28);
    assert!(size_of::<socket::DatagramHeader>() == 32);
};
