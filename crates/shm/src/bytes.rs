//! Byte rings in the payload of a region: checked once, then copied to and from.

use netkernel_ring::bytes;

use crate::Region;

/// One byte ring: a run of payload that was checked against the mapping. Its bytes may change at any time; they are only
/// copied, and no reference to them is ever made.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    start: *mut u8,
    size: u32,
    base: u32,
    _region: std::marker::PhantomData<&'a Region>,
}

impl Region {
    /// The ring of `size` bytes (a power of two) at byte `offset` of the region, in which position `base` stands first.
    /// `None` when it does not lie wholly in the payload area.
    #[inline]
    pub fn bytes_at(&self, offset: u64, size: u32, base: u32) -> Option<Bytes<'_>> {
        if !size.is_power_of_two() {
            return None;
        }
        let start = self.payload(offset, size as u64)?;
        Some(Bytes { start, size, base, _region: std::marker::PhantomData })
    }
}

impl Bytes<'_> {
    /// # Safety
    /// `start` must be valid for reads and writes of `size` bytes, a power of two, as long as the lifetime says.
    #[inline]
    pub(crate) unsafe fn new(start: *mut u8, size: u32, base: u32) -> Self {
        Bytes { start, size, base, _region: std::marker::PhantomData }
    }

    #[inline]
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The runs that `len` bytes at `position` occupy, at most two: `f(pointer, offset of the run in the data, length)`.
    /// Pointers are valid for reads and writes of the length during the call.
    #[inline]
    pub fn runs(&self, position: u32, len: u32, mut f: impl FnMut(*mut u8, usize, usize)) {
        let s = bytes::segments(self.base, position, len, self.size);
        if s.first.1 > 0 {
            // SAFETY: segments never leave 0..size, which `bytes_at` checked.
            f(unsafe { self.start.add(s.first.0 as usize) }, 0, s.first.1 as usize);
        }
        if s.second.1 > 0 {
            f(self.start, s.first.1 as usize, s.second.1 as usize);
        }
    }

    /// `len` bytes at `position`, if they do not go around the end. Of small copies far apart the processor has several under way, and
    /// more of them the fewer instructions are between.
    #[inline]
    fn whole(&self, position: u32, len: usize) -> Option<*mut u8> {
        let offset = bytes::offset(self.base, position, self.size) as usize;
        if offset + len > self.size as usize {
            return None;
        }
        // SAFETY: offset + len was just checked against the size, which `bytes_at` checked.
        Some(unsafe { self.start.add(offset) })
    }

    /// Copies `data` to `position`; what is longer than the ring is left out.
    #[inline]
    pub fn copy_in(&self, position: u32, data: &[u8]) {
        if let Some(to) = self.whole(position, data.len()) {
            // SAFETY: `whole` says that so many bytes of the ring are there; private memory never overlaps a region's.
            return unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        }
        self.runs(position, data.len().min(self.size as usize) as u32, |to, at, n| {
            // SAFETY: `to` has n bytes of the ring, `data` n more from `at`; private memory never overlaps a region's.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(at), to, n) }
        });
    }

    /// Copies the bytes at `position` to `out`, at most a ring full.
    #[inline]
    pub fn copy_out(&self, position: u32, out: &mut [u8]) {
        if let Some(from) = self.whole(position, out.len()) {
            // SAFETY: as in copy_in, with the directions exchanged. A racing peer makes the bytes arbitrary, nothing else.
            return unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        }
        self.runs(position, out.len().min(self.size as usize) as u32, |from, at, n| {
            // SAFETY: as above, for the run's part of `out`.
            unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr().add(at), n) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HugePages;
    use netkernel_abi::Limits;

    #[test]
    fn what_is_copied_in_comes_out_also_around_the_end() {
        let limits = Limits { region_bytes: 8 << 20, sockets: 16, queue_sets: 1 };
        let region = Region::create(limits, 1, 0, HugePages::Off).unwrap();
        let payload = region.layout().payload_offset;
        let ring = region.bytes_at(payload, 4096, 100).unwrap();
        let data: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        for position in [100, 4000, 100u32.wrapping_sub(500), u32::MAX - 3] {
            ring.copy_in(position, &data);
            let mut out = vec![0; 1000];
            ring.copy_out(position, &mut out);
            assert_eq!(out, data, "at {position}");
        }
        let mut first = [0; 1];
        ring.copy_in(100, &[42]);
        // SAFETY: the first byte of the payload, which the ring begins with.
        first[0] = unsafe { region.payload(payload, 1).unwrap().read() };
        assert_eq!(first, [42]);
    }

    #[test]
    fn no_ring_leaves_the_payload() {
        let limits = Limits { region_bytes: 8 << 20, sockets: 16, queue_sets: 1 };
        let region = Region::create(limits, 1, 0, HugePages::Off).unwrap();
        let (payload, bytes) = (region.layout().payload_offset, region.layout().payload_bytes);
        assert!(region.bytes_at(payload - 64, 4096, 0).is_none());
        assert!(region.bytes_at(payload + bytes - 4095, 4096, 0).is_none());
        assert!(region.bytes_at(payload + bytes - 4096, 4096, 0).is_some());
        assert!(region.bytes_at(u64::MAX - 64, 4096, 0).is_none());
        assert!(region.bytes_at(payload, 4095, 0).is_none());
        assert!(region.bytes_at(payload, 0, 0).is_none());
    }
}
