use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;

use netkernel_abi::layout::{
    COMPLETE_OFFSET, COMPLETE_SLOTS, JOB_OFFSET, JOB_SLOTS, RECEIVE_OFFSET, RECEIVE_SLOTS, SEND_OFFSET,
    SEND_SLOTS,
};
use netkernel_abi::{Header, Layout, LayoutError, Limits, QueueSet, SocketEntry, feature};
use netkernel_ring::queue::Queue;

/// When to take huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    Off,
    /// When the host has enough of them free, else ordinary pages.
    Auto,
    /// Fail when there are not enough.
    On,
}

#[derive(Debug)]
pub enum RegionError {
    Layout(LayoutError),
    Memory(io::Error),
    /// Fewer huge pages free than the region needs: needed, with the system's error.
    HugePages(u64, io::Error),
}

impl std::fmt::Display for RegionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RegionError::Layout(e) => e.fmt(f),
            RegionError::Memory(e) => write!(f, "no memory for the region: {e}"),
            RegionError::HugePages(n, e) => write!(
                f,
                "the region needs {n} free huge pages of 2 MiB ({e}): raise vm.nr_hugepages, or set huge_pages = \"auto\""
            ),
        }
    }
}

impl std::error::Error for RegionError {}

/// A mapped region. Both sides use this type; the guest's side gets it from a descriptor.
pub struct Region {
    base: *mut u8,
    bytes: u64,
    layout: Layout,
    fd: OwnedFd,
}

// SAFETY: the mapping lives as long as the value and everything reached through it is atomics, or raw memory that no
// reference is ever made to; moving the value between threads moves no memory.
unsafe impl Send for Region {}
// SAFETY: as above; shared use is what the atomics are for.
unsafe impl Sync for Region {}

impl Region {
    /// Makes, seals, maps and initialises a region.
    pub fn create(limits: Limits, guest: u32, spin_ns: u32, huge: HugePages) -> Result<Region, RegionError> {
        let layout = Layout::new(limits).map_err(RegionError::Layout)?;
        if huge != HugePages::Off {
            match Self::try_create(
                layout,
                guest,
                spin_ns,
                libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
                feature::HUGE_PAGES,
            ) {
                Ok(region) => return Ok(region),
                Err(error) if huge == HugePages::On => {
                    return Err(RegionError::HugePages(limits.region_bytes.div_ceil(2 << 20), error));
                }
                Err(_) => {}
            }
        }
        Self::try_create(layout, guest, spin_ns, 0, 0).map_err(RegionError::Memory)
    }

    fn try_create(layout: Layout, guest: u32, spin_ns: u32, flags: u32, features: u64) -> io::Result<Region> {
        // SAFETY: a valid C string and flags; the result is checked.
        let fd = unsafe {
            libc::memfd_create(
                c"netkernel-region".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd was just created and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let bytes = layout.limits.region_bytes;
        // SAFETY: plain system call on an owned descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), bytes as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // A guest must not be able to shrink the file under the engine (SIGBUS) or to grow it.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain system call on an owned descriptor.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let base = map(fd.as_raw_fd(), bytes)?;
        let region = Region { base, bytes, layout, fd };
        layout.initialise(
            region.header(),
            guest,
            feature::EVENTFD | feature::PLACEHOLDER | features,
            spin_ns,
        );
        Ok(region)
    }

    /// Says of a region that nobody else has yet that it has `features` more.
    pub fn add_features(&self, features: u64) {
        self.header().features.fetch_or(features, std::sync::atomic::Ordering::Relaxed);
    }

    /// Maps the region behind `fd` and checks its header.
    pub fn attach(fd: OwnedFd) -> Result<Region, RegionError> {
        // SAFETY: an all-zero stat is a valid value of that plain C struct.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fd is open and stat is valid for writes.
        if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
            return Err(RegionError::Memory(io::Error::last_os_error()));
        }
        let bytes = stat.st_size as u64;
        if bytes < size_of::<Header>() as u64 {
            return Err(RegionError::Layout(LayoutError::Sizes));
        }
        let base = map(fd.as_raw_fd(), bytes).map_err(RegionError::Memory)?;
        // SAFETY: the mapping is page aligned and at least a header long; Header consists of atomics and plain reserve.
        let layout = Layout::from_header(unsafe { &*base.cast::<Header>() }, bytes);
        match layout {
            Ok(layout) => Ok(Region { base, bytes, layout, fd }),
            Err(error) => {
                // SAFETY: this is the mapping made above, not used any more.
                unsafe { libc::munmap(base.cast(), bytes as usize) };
                Err(RegionError::Layout(error))
            }
        }
    }

    /// Maps the region behind `fd`, whose limits are known: what stands in its header, which a guest can write, is not asked.
    pub fn open(fd: OwnedFd, limits: Limits) -> Result<Region, RegionError> {
        let layout = Layout::new(limits).map_err(RegionError::Layout)?;
        let bytes = limits.region_bytes;
        // SAFETY: an all-zero stat is a valid value of that plain C struct.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fd is open and stat is valid for writes.
        if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
            return Err(RegionError::Memory(io::Error::last_os_error()));
        }
        if (stat.st_size as u64) < bytes {
            return Err(RegionError::Layout(LayoutError::Sizes));
        }
        let base = map(fd.as_raw_fd(), bytes).map_err(RegionError::Memory)?;
        Ok(Region { base, bytes, layout, fd })
    }

    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    #[inline]
    pub fn header(&self) -> &Header {
        // SAFETY: the mapping is page aligned, at least a header long and lives as long as self; Header is atomics and
        // reserve that nobody reads.
        unsafe { &*self.base.cast::<Header>() }
    }

    /// The entry of socket `id`, or `None` when there is no such id.
    #[inline]
    pub fn socket(&self, id: u32) -> Option<&SocketEntry> {
        let offset = self.layout.socket(id)?;
        // SAFETY: the layout keeps the table inside the mapping, entries are 64-byte aligned, and consist of atomics.
        Some(unsafe { &*self.base.add(offset as usize).cast::<SocketEntry>() })
    }

    #[inline]
    pub fn queue_set(&self, q: u32) -> Option<&QueueSet> {
        let offset = self.layout.queue_set(q)?;
        // SAFETY: as for sockets.
        Some(unsafe { &*self.base.add(offset as usize).cast::<QueueSet>() })
    }

    fn queue(&self, q: u32, offset: u64, slots: u32) -> Option<&[[AtomicU64; 4]]> {
        let at = self.layout.queue_set(q)? + offset;
        // SAFETY: constant assertions in the ABI keep each ring inside its queue set, the layout keeps queue sets inside
        // the mapping; slots are atomics, 8-byte aligned.
        Some(unsafe { std::slice::from_raw_parts(self.base.add(at as usize).cast(), slots as usize) })
    }

    /// Job ring of queue set `q` (guest to engine).
    pub fn job(&self, q: u32) -> Option<Queue<'_>> {
        let set = self.queue_set(q)?;
        Some(Queue::new(&set.job_head, &set.job_tail, self.queue(q, JOB_OFFSET, JOB_SLOTS)?))
    }

    /// Send ring of queue set `q` (guest to engine).
    pub fn send(&self, q: u32) -> Option<Queue<'_>> {
        let set = self.queue_set(q)?;
        Some(Queue::new(&set.send_head, &set.send_tail, self.queue(q, SEND_OFFSET, SEND_SLOTS)?))
    }

    /// Completion ring of queue set `q` (engine to guest).
    pub fn complete(&self, q: u32) -> Option<Queue<'_>> {
        let set = self.queue_set(q)?;
        Some(Queue::new(
            &set.complete_head,
            &set.complete_tail,
            self.queue(q, COMPLETE_OFFSET, COMPLETE_SLOTS)?,
        ))
    }

    /// Receive ring of queue set `q` (engine to guest).
    pub fn receive(&self, q: u32) -> Option<Queue<'_>> {
        let set = self.queue_set(q)?;
        Some(Queue::new(&set.receive_head, &set.receive_tail, self.queue(q, RECEIVE_OFFSET, RECEIVE_SLOTS)?))
    }

    /// Pointer to `len` bytes at `offset`, if they lie wholly in the payload area. Never make a reference of it.
    #[inline]
    pub fn payload(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        if offset < self.layout.payload_offset || end > self.layout.payload_offset + self.layout.payload_bytes
        {
            return None;
        }
        // SAFETY: the range was just checked against the mapping.
        Some(unsafe { self.base.add(offset as usize) })
    }

    /// Copies the argument area of queue set `q` out; at most `out.len()` and the area's size.
    pub fn read_argument(&self, q: u32, out: &mut [u8]) -> Option<()> {
        let set = self.queue_set(q)?;
        for (chunk, word) in out.chunks_mut(8).zip(&set.argument) {
            let bytes = word.load(std::sync::atomic::Ordering::Relaxed).to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        Some(())
    }

    /// Copies `data` into the argument area of queue set `q`; what does not fit is left out.
    pub fn write_argument(&self, q: u32, data: &[u8]) -> Option<()> {
        let set = self.queue_set(q)?;
        for (chunk, word) in data.chunks(8).zip(&set.argument) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_le_bytes(bytes), std::sync::atomic::Ordering::Relaxed);
        }
        Some(())
    }

    /// Gives the memory of a payload range back to the system (it reads as zeroes afterwards). Whole pages only.
    pub fn discard(&self, offset: u64, len: u64) {
        if let Some(pointer) = self.payload(offset, len) {
            // SAFETY: the range lies in this value's own mapping; MADV_REMOVE only changes its content.
            unsafe { libc::madvise(pointer.cast(), len as usize, libc::MADV_REMOVE) };
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unmaps this value's own mapping; nothing borrowed from self can be alive.
        unsafe { libc::munmap(self.base.cast(), self.bytes as usize) };
    }
}

fn map(fd: RawFd, bytes: u64) -> io::Result<*mut u8> {
    // SAFETY: a fresh shared mapping of a file that is `bytes` long; the result is checked.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            // No MAP_NORESERVE: huge pages that are not there must fail here, not by SIGBUS at the first touch. A
            // shared mapping of an ordinary memfd reserves nothing either way.
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base.cast()) }
}
