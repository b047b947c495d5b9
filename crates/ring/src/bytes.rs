//! Arithmetic of byte rings: positions modulo 2^32, sizes that are powers of two, data that may wrap once.

use crate::Corrupt;

/// Where a run of bytes stands: offset from the ring's start and length, twice (the second is empty unless it wraps).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    pub first: (u32, u32),
    pub second: (u32, u32),
}

/// Bytes between `head` and `tail`, or [`Corrupt`] when that is more than `size`.
#[inline]
pub fn used(head: u32, tail: u32, size: u32) -> Result<u32, Corrupt> {
    let used = tail.wrapping_sub(head);
    if used > size { Err(Corrupt) } else { Ok(used) }
}

/// Where `position` stands in a ring of `size` bytes, a power of two: below `size`, or 0.
#[inline]
pub fn offset(base: u32, position: u32, size: u32) -> u32 {
    position.wrapping_sub(base) & size.wrapping_sub(1)
}

/// The two runs that `len` bytes at `position` occupy in a ring of `size` bytes whose position `base` stands at offset 0.
/// `len` must be at most `size`; `size` a power of two. The result never leaves 0..size, whatever the arguments.
#[inline]
pub fn segments(base: u32, position: u32, len: u32, size: u32) -> Segments {
    let len = len.min(size);
    if size == 0 {
        return Segments { first: (0, 0), second: (0, 0) };
    }
    let offset = offset(base, position, size);
    let first = len.min(size - offset);
    Segments { first: (offset, first), second: (0, len - first) }
}
