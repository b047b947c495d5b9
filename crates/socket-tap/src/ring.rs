//! The ring buffer by which packets come (Documentation/bpf/ringbuf.rst).

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::program::{HEAD, MOST};

/// Of a record's head: it is not written yet; it is to be left out.
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const RECORD_HEAD: usize = 8;

/// A packet from its IP header on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its socket's.
    pub mark: u32,
    /// What it was long; at most 256 KiB of it are here.
    pub length: usize,
    pub data: Vec<u8>,
}

/// The reader's side.
pub struct Ring {
    fd: OwnedFd,
    bytes: usize,
    page: usize,
    /// A page with how far was read.
    consumer: NonNull<u8>,
    /// A page with how far was written, and the records, twice in a row.
    producer: NonNull<u8>,
}

// SAFETY: the mappings are this value's own, and who reads has the only reference.
unsafe impl Send for Ring {}

impl Ring {
    pub(crate) fn map(fd: OwnedFd, bytes: usize) -> io::Result<Ring> {
        // SAFETY: plain call.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let map = |bytes: usize, protection: i32, offset: usize| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    bytes,
                    protection,
                    libc::MAP_SHARED,
                    fd.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            NonNull::new(at.cast::<u8>()).ok_or_else(io::Error::last_os_error)
        };
        let consumer = map(page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = match map(page + 2 * bytes, libc::PROT_READ, page) {
            Ok(producer) => producer,
            Err(error) => {
                // SAFETY: mapped above, and known to nobody else.
                unsafe { libc::munmap(consumer.as_ptr().cast(), page) };
                return Err(error);
            }
        };
        Ok(Ring { fd, bytes, page, consumer, producer })
    }

    /// Waits until there is something, or the time is over.
    pub fn wait(&self, timeout: Duration) {
        let mut one = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, valid for reads and writes.
        unsafe { libc::poll(&mut one, 1, ms) };
    }

    /// The next packet that is there.
    pub fn take(&mut self) -> Option<Packet> {
        // SAFETY: both stand at the beginning of a page that is mapped as long as self lives, aligned, and are only
        // accessed as atomics, here and by the kernel.
        let (read, written) = unsafe {
            (
                AtomicU64::from_ptr(self.consumer.as_ptr().cast()),
                AtomicU64::from_ptr(self.producer.as_ptr().cast()),
            )
        };
        loop {
            let at = read.load(Ordering::Relaxed);
            if at >= written.load(Ordering::Acquire) {
                return None;
            }
            let offset = self.page + at as usize % self.bytes;
            // SAFETY: a record begins at an aligned place inside the first of the two copies.
            let head = unsafe {
                AtomicU32::from_ptr(self.producer.as_ptr().add(offset).cast()).load(Ordering::Acquire)
            };
            if head & BUSY != 0 {
                return None;
            }
            let length = (head & !DISCARD) as usize;
            let packet = if head & DISCARD == 0 { self.packet(offset + RECORD_HEAD, length) } else { None };
            let next = (length + RECORD_HEAD).next_multiple_of(8) as u64;
            // SYNC: the kernel writes there again only after it sees this.
            read.store(at + next, Ordering::Release);
            if packet.is_some() {
                return packet;
            }
        }
    }

    fn packet(&self, offset: usize, record: usize) -> Option<Packet> {
        if record < HEAD || record > self.bytes {
            return None;
        }
        // SAFETY: the record, which is no longer than the ring, lies in the two copies of it, and the kernel does not change
        // it before it is given back.
        let record = unsafe { std::slice::from_raw_parts(self.producer.as_ptr().add(offset), record) };
        let word = |at: usize| Some(u32::from_ne_bytes(record.get(at..at + 4)?.try_into().ok()?));
        let (mark, length) = (word(0)?, word(4)? as usize);
        let data = record.get(HEAD..HEAD + length.min(MOST))?.to_vec();
        Some(Packet { mark, length, data })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with these lengths; no reference into them is left.
        unsafe {
            libc::munmap(self.consumer.as_ptr().cast(), self.page);
            libc::munmap(self.producer.as_ptr().cast(), self.page + 2 * self.bytes);
        }
    }
}
