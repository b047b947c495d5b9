//! One number that two processes share.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

/// A number in a page of its own, which outlives the process that made it.
#[derive(Debug)]
pub struct Word(*mut AtomicU64);

// SAFETY: a pointer to an atomic that stays mapped as long as the value lives.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

impl Word {
    /// A new one, 0, and the descriptor with which another process maps it.
    pub fn create() -> io::Result<(Word, OwnedFd)> {
        // SAFETY: the name is a C string; the result is checked.
        let fd = unsafe { libc::memfd_create(c"netkernel-word".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system call; the result is checked.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size_of::<AtomicU64>() as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((Word::open(&fd)?, fd))
    }

    /// The one behind `fd`, which must be [`Word::create`]'s: nobody can then have made it shorter.
    pub fn open(fd: &OwnedFd) -> io::Result<Word> {
        // SAFETY: a fresh shared mapping; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<AtomicU64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Word(base.cast())) }
    }
}

impl std::ops::Deref for Word {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        // SAFETY: mapped, page aligned, and an atomic is valid with any bytes.
        unsafe { &*self.0 }
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        // SAFETY: the mapping of `open`, which nobody can refer to any more.
        unsafe { libc::munmap(self.0.cast(), size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn it_is_seen_by_who_opens_it() {
        let (ours, fd) = Word::create().unwrap();
        let theirs = Word::open(&fd).unwrap();
        assert_eq!(theirs.load(Relaxed), 0);
        ours.store(7, Relaxed);
        drop((ours, fd));
        assert_eq!(theirs.load(Relaxed), 7);
    }
}
