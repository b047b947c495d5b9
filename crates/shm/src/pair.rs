use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use netkernel_abi::pair::{ENDS, MEMORY_BYTES, PairEnd, PairHeader, RING_BYTES, end_offset, ring_offset};

use crate::Bytes;

/// Memory for connections between two guests, as the engine makes it. What stands in it is theirs.
pub struct PairMemory {
    view: PairView<'static>,
    fd: OwnedFd,
}

/// A mapping of such a memory.
#[derive(Clone, Copy)]
pub struct PairView<'a> {
    base: *mut u8,
    _mapping: PhantomData<&'a PairMemory>,
}

// SAFETY: the mapping lives as long as the lifetime says, and what is reached through it is atomics, or raw memory that no
// reference is ever made to.
unsafe impl Send for PairView<'_> {}
// SAFETY: as above.
unsafe impl Sync for PairView<'_> {}

impl PairMemory {
    /// Makes and maps a memory, all zero. It can be neither shrunk (which would be SIGBUS for the others) nor grown.
    pub fn create() -> io::Result<PairMemory> {
        // SAFETY: a valid C string and flags; the result is checked.
        let fd = unsafe {
            libc::memfd_create(c"netkernel-pair".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain system calls on an owned descriptor.
        let sealed = unsafe {
            libc::ftruncate(fd.as_raw_fd(), MEMORY_BYTES as libc::off_t) == 0
                && libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) == 0
        };
        if !sealed {
            return Err(io::Error::last_os_error());
        }
        let view = PairView::map(&fd, None)?;
        Ok(PairMemory { view, fd })
    }

    /// One that this process made before it executed this program.
    pub fn open(fd: OwnedFd) -> io::Result<PairMemory> {
        Ok(PairMemory { view: PairView::map(&fd, None)?, fd })
    }

    pub fn view(&self) -> PairView<'_> {
        self.view
    }

    /// Makes a slot as new. Nobody uses it.
    pub fn clear(&self, slot: u32) {
        use std::sync::atomic::Ordering::{Relaxed, SeqCst};
        let mut used = 0;
        for end in (0..ENDS).filter_map(|end| self.view.end(slot, end)) {
            used = used.max(end.sent.swap(0, Relaxed));
            for word in [&end.urgent, &end.offer, &end.offer_end, &end.offer_proof_at, &end.offer_proof] {
                word.store(0, Relaxed);
            }
            for word in [&end.refuses, &end.copying, &end.offer_pid, &end.offer_pause] {
                word.store(0, Relaxed);
            }
            for word in [&end.tail, &end.base, &end.head, &end.full, &end.want_data, &end.want_space] {
                word.store(0, SeqCst);
            }
        }
        if used > 4096
            && let Some(offset) = ring_offset(slot, 0)
        {
            let bytes = ENDS * RING_BYTES as usize;
            // SAFETY: both rings of the slot lie in this value's own mapping; only their content changes.
            unsafe { libc::madvise(self.view.base.add(offset as usize).cast(), bytes, libc::MADV_REMOVE) };
        }
    }
}

impl AsFd for PairMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for PairMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps this value's own mapping; views borrow from self.
        unsafe { libc::munmap(self.view.base.cast(), MEMORY_BYTES as usize) };
    }
}

impl<'a> PairView<'a> {
    /// Maps the memory behind `fd`, in the place of another mapping if one is given; it is never unmapped.
    pub fn map(fd: &OwnedFd, instead: Option<PairView<'static>>) -> io::Result<PairView<'static>> {
        // SAFETY: an all-zero stat is a valid value of that plain C struct.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fd is open and stat is valid for writes.
        if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if stat.st_size as u64 != MEMORY_BYTES {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let (at, fixed) = instead.map_or((null_mut(), 0), |view| (view.base, libc::MAP_FIXED));
        // SAFETY: a fresh mapping of a file that is that long; with MAP_FIXED it takes the place of one of the same size
        // that nothing is read or written through any more (contract of the caller; what a late reader finds is other bytes).
        let base = unsafe {
            libc::mmap(
                at.cast(),
                MEMORY_BYTES as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE | fixed,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(PairView { base: base.cast(), _mapping: PhantomData })
    }

    #[inline]
    pub fn header(&self) -> &'a PairHeader {
        // SAFETY: the mapping is page aligned, at least a page long, and lives as long as 'a; the page is atomics.
        unsafe { &*self.base.cast::<PairHeader>() }
    }

    /// One end of a connection, if there is such a slot.
    #[inline]
    pub fn end(&self, slot: u32, end: usize) -> Option<&'a PairEnd> {
        let offset = end_offset(slot, end)?;
        // SAFETY: `end_offset` stays inside the table, which lies in the mapping; ends are 64-byte aligned and atomics.
        Some(unsafe { &*self.base.add(offset as usize).cast::<PairEnd>() })
    }

    /// The ring that an end writes, in which position `base` stands first.
    #[inline]
    pub fn ring(&self, slot: u32, end: usize, base: u32) -> Option<Bytes<'a>> {
        let offset = ring_offset(slot, end)?;
        // SAFETY: `ring_offset` keeps the whole ring inside the mapping, which lives as long as 'a.
        Some(unsafe { Bytes::new(self.base.add(offset as usize), RING_BYTES, base) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netkernel_abi::pair::SLOTS;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn two_mappings_are_one_memory_and_no_slot_leaves_it() {
        let memory = PairMemory::create().unwrap();
        let other = PairView::map(&memory.fd.try_clone().unwrap(), None).unwrap();
        memory.view().end(SLOTS - 1, 1).unwrap().tail.store(7, Relaxed);
        assert_eq!(other.end(SLOTS - 1, 1).unwrap().tail.load(Relaxed), 7);
        assert!(
            other.end(SLOTS, 0).is_none() && other.end(0, 2).is_none() && other.end(u32::MAX, 0).is_none()
        );
        assert!(other.ring(SLOTS, 0, 0).is_none() && other.ring(0, 2, 0).is_none());
        let data: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        memory.view().ring(SLOTS - 1, 1, 5).unwrap().copy_in(200_000, &data);
        let mut out = vec![0; data.len()];
        other.ring(SLOTS - 1, 1, 5).unwrap().copy_out(200_000, &mut out);
        assert!(out == data);
        memory.view().end(SLOTS - 1, 1).unwrap().sent.store(200_000, Relaxed);
        memory.clear(SLOTS - 1);
        other.ring(SLOTS - 1, 1, 5).unwrap().copy_out(200_000, &mut out);
        assert!(out.iter().all(|&byte| byte == 0), "what one connection left is not the next one's");
        assert_eq!(other.end(SLOTS - 1, 1).unwrap().tail.load(Relaxed), 0);
        // Another memory takes the place of one that nobody needs.
        let next = PairMemory::create().unwrap();
        let again = PairView::map(&next.fd.try_clone().unwrap(), Some(other)).unwrap();
        assert_eq!(again.base, other.base);
        // SAFETY: plain system call.
        assert_eq!(unsafe { libc::ftruncate(next.fd.as_raw_fd(), 4096) }, -1, "it can be shrunk");
    }
}
