//! Raw runs of guest memory. The guest may change these bytes at any time, so that no reference is ever made to them.

use std::sync::atomic::AtomicU32;

/// A run of guest memory: valid for reads and writes as long as the region is mapped, changing under one's feet.
#[derive(Clone, Copy, Debug)]
pub struct GuestBytes {
    pointer: *mut u8,
    len: usize,
}

impl GuestBytes {
    pub const EMPTY: GuestBytes = GuestBytes { pointer: std::ptr::null_mut(), len: 0 };

    /// # Safety
    /// `pointer` must be valid for reads and writes of `len` bytes for as long as the value or a copy of it is used.
    pub unsafe fn new(pointer: *mut u8, len: usize) -> GuestBytes {
        GuestBytes { pointer, len }
    }

    pub fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, the clock of everything in an engine.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: time is valid for writes.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// At most two runs: a piece of a byte ring that may wrap once. What a [`crate::Stack`] sends from and receives into.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    pub first: GuestBytes,
    pub second: GuestBytes,
}

impl Segments {
    pub const EMPTY: Segments = Segments { first: GuestBytes::EMPTY, second: GuestBytes::EMPTY };

    pub fn len(&self) -> usize {
        self.first.len + self.second.len
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For `sendmsg` and `recvmsg`, with the number of entries that are not empty.
    pub fn iovecs(&self) -> ([libc::iovec; 2], usize) {
        let iovec = |b: GuestBytes| libc::iovec { iov_base: b.pointer.cast(), iov_len: b.len };
        ([iovec(self.first), iovec(self.second)], 1 + usize::from(self.second.len != 0))
    }

    /// The part from byte `from` on, at most `len` bytes.
    pub fn slice(&self, from: usize, len: usize) -> Segments {
        let cut = |run: GuestBytes, from: usize, len: usize| {
            let from = from.min(run.len);
            let len = len.min(run.len - from);
            // The offset stays inside the run (or at its end).
            GuestBytes { pointer: run.pointer.wrapping_add(from), len }
        };
        let first = cut(self.first, from, len);
        let second = cut(self.second, from.saturating_sub(self.first.len), len - first.len);
        if first.len == 0 {
            Segments { first: second, second: GuestBytes::EMPTY }
        } else {
            Segments { first, second }
        }
    }

    /// Copies out as many bytes as both sides have; says how many.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for run in [self.first, self.second] {
            let n = run.len.min(out.len() - done);
            if n > 0 {
                // SAFETY: the run is valid for reads (contract of GuestBytes::new), `out` for writes, both for n bytes;
                // private memory never overlaps guest memory. A racing guest makes the bytes arbitrary, nothing else.
                unsafe { std::ptr::copy_nonoverlapping(run.pointer, out.as_mut_ptr().add(done), n) };
            }
            done += n;
        }
        done
    }

    /// Copies as many bytes of other guest memory as both sides have; says how many.
    pub fn copy_from_guest(&self, from: &Segments) -> usize {
        let most = self.len().min(from.len());
        let mut done = 0;
        while done < most {
            let (into, from) = (self.slice(done, most - done).first, from.slice(done, most - done).first);
            let n = into.len.min(from.len);
            // SAFETY: both runs are valid for n bytes (contract of GuestBytes::new); they may overlap.
            unsafe { std::ptr::copy(from.pointer, into.pointer, n) };
            done += n;
        }
        done
    }

    /// Copies in as many bytes as both sides have; says how many.
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for run in [self.first, self.second] {
            let n = run.len.min(data.len() - done);
            if n > 0 {
                // SAFETY: as in copy_to, with the directions exchanged.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(done), run.pointer, n) };
            }
            done += n;
        }
        done
    }
}

/// The runs that `len` bytes at ring position `position` occupy in the block of `size` bytes at region offset `offset`.
/// Empty when the block does not lie in the payload area (it always does: offsets come from the block allocator).
pub(crate) fn ring_segments(
    region: &netkernel_shm::Region,
    offset: u64,
    size: u32,
    base: u32,
    position: u32,
    len: u32,
) -> Segments {
    let Some(start) = region.payload(offset, size as u64) else { return Segments::EMPTY };
    let runs = netkernel_ring::bytes::segments(base, position, len, size);
    let run = |(at, len): (u32, u32)| {
        // SAFETY: `payload` checked offset..offset+size against the mapping, and `segments` never leaves 0..size. The
        // region outlives its Service, which makes and uses Segments only during calls that borrow the region.
        unsafe { GuestBytes::new(start.add(at as usize), len as usize) }
    };
    Segments { first: run(runs.first), second: run(runs.second) }
}

/// Wakes who sleeps on `word` by FUTEX_WAIT, in whatever process.
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE does not access the memory, it only names it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
