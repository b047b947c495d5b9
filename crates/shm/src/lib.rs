//! Regions: the memory that one guest shares with the engine, and how descriptors travel.
//!
//! The memory's other side is hostile. What is reached by reference here is atomics only (they may change at any time by
//! their nature); payload is reached by raw pointers that are bounds-checked against the mapping and go to system calls
//! or to `copy_in`/`copy_out` of [`Bytes`].

mod bytes;
pub mod fds;
mod journal;
mod pair;
mod region;
mod word;
mod words;

pub use bytes::Bytes;
pub use journal::Journal;
pub use pair::{PairMemory, PairView};
pub use region::{HugePages, Region, RegionError};
pub use word::Word;
pub use words::{WordRef, Words};
