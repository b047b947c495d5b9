//! Memory that outlives a process: what the worker of an NSM must not forget. No guest has it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

/// A mapped memfd that is private to an NSM's processes.
pub struct Journal {
    base: NonNull<u8>,
    bytes: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping lives as long as the value; what is made of its pointers is its users' care.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

impl Journal {
    /// All zeroes. Takes memory only where it is written.
    pub fn create(name: &CStr, bytes: usize) -> io::Result<Journal> {
        // SAFETY: a C string and flags; the result is checked.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system call on an owned descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), bytes as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Journal::open(fd, bytes)
    }

    /// Maps one that was made before, of the same size.
    pub fn open(fd: OwnedFd, bytes: usize) -> io::Result<Journal> {
        // SAFETY: an all-zero stat is a valid value of that plain C struct.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: stat is valid for writes.
        if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if stat.st_size != bytes as libc::off_t {
            return Err(io::Error::other("a journal of another size"));
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh shared mapping of a file of that size; the result is checked.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        match NonNull::new(base.cast::<u8>()) {
            Some(at) if base != libc::MAP_FAILED => Ok(Journal { base: at, bytes, fd }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// One of its own with the same content, which nobody changes meanwhile.
    pub fn copy(&self, name: &CStr) -> io::Result<Journal> {
        let copy = Journal::create(name, self.bytes)?;
        // SAFETY: both mappings are that long and do not overlap; nobody has seen the new one yet.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr(), copy.base.as_ptr(), self.bytes) };
        Ok(copy)
    }

    /// One of its own with what stands in another process's, which may change or shrink that at any time. Errors: it is not of
    /// that size, or cannot be read.
    pub fn read(name: &CStr, from: &OwnedFd, bytes: usize) -> io::Result<Journal> {
        let copy = Journal::create(name, bytes)?;
        // SAFETY: plain system calls on an open descriptor, and reads into the mapping, which nobody else has yet, and not beyond
        // its end.
        unsafe {
            if libc::lseek(from.as_raw_fd(), 0, libc::SEEK_END) != bytes as libc::off_t {
                return Err(io::Error::other("a journal of another size"));
            }
            let mut at: libc::off_t = 0;
            // What was never written takes no memory, here neither.
            while at < bytes as libc::off_t {
                at = libc::lseek(from.as_raw_fd(), at, libc::SEEK_DATA);
                if at < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) {
                    break;
                }
                if at < 0 || at >= bytes as libc::off_t {
                    return Err(io::Error::other("a journal that cannot be read"));
                }
                let end = libc::lseek(from.as_raw_fd(), at, libc::SEEK_HOLE).clamp(at, bytes as libc::off_t);
                let to = copy.base.as_ptr().add(at as usize);
                let n = libc::pread(from.as_raw_fd(), to.cast(), (end - at) as usize, at);
                if n <= 0 {
                    return Err(io::Error::other("a journal that cannot be read"));
                }
                at += n as libc::off_t;
            }
        }
        Ok(copy)
    }

    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Where `len` values stand from byte `offset` on, if they lie in the journal and are aligned.
    pub fn array<T>(&self, offset: usize, len: usize) -> Option<NonNull<T>> {
        let end = len.checked_mul(size_of::<T>())?.checked_add(offset)?;
        if end > self.bytes || !offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: inside the mapping, as just checked.
        Some(unsafe { self.base.add(offset) }.cast())
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: unmaps this value's own mapping; users of its pointers hold the value.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
