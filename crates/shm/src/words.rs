//! Numbers that threads share, of one process or of several that do not trust each other.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A fixed number of atomic words, in memory of this process or in a sealed memfd that others map too. Nobody can make that
/// shorter; any number may stand in any word at any time.
#[derive(Debug)]
pub struct Words {
    base: NonNull<AtomicU64>,
    len: usize,
    fd: Option<OwnedFd>,
}

// SAFETY: a pointer to atomics that stay where they are as long as the value lives.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

impl Words {
    /// In memory of this process only, all zero.
    pub fn private(len: usize) -> Arc<Words> {
        let words: Box<[AtomicU64]> = (0..len).map(|_| AtomicU64::new(0)).collect();
        let base = NonNull::from(Box::leak(words)).cast();
        Arc::new(Words { base, len, fd: None })
    }

    /// In a memfd, all zero. Takes memory only where it is written.
    pub fn create(len: usize) -> io::Result<Arc<Words>> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a C string and flags; the result is checked.
        let fd = unsafe { libc::memfd_create(c"netkernel-words".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system calls on an owned descriptor.
        let sealed = unsafe {
            libc::ftruncate(fd.as_raw_fd(), bytes(len) as libc::off_t) == 0
                && libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) == 0
        };
        if !sealed {
            return Err(io::Error::last_os_error());
        }
        Words::open(fd, len)
    }

    /// Those that another process made, as many. Of another size, or not sealed: an error, since a file that is made shorter
    /// ends who reads it.
    pub fn open(fd: OwnedFd, len: usize) -> io::Result<Arc<Words>> {
        // SAFETY: plain system call; what is no memfd has no seals, which is an error.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        let size = stat(fd.as_fd())?.st_size;
        if size != bytes(len) as libc::off_t || seals < 0 || seals & SEALS != SEALS {
            return Err(io::Error::other("words of another size, or not sealed"));
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh shared mapping of a file of that size; the result is checked.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes(len), access, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        match NonNull::new(base.cast()) {
            Some(base_at) if base != libc::MAP_FAILED => {
                Ok(Arc::new(Words { base: base_at, len, fd: Some(fd) }))
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// With which another process maps them; `None`: they are this one's.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Whether a descriptor is of the same memory.
    pub fn are_in(&self, fd: BorrowedFd<'_>) -> bool {
        let file = |fd| stat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino));
        self.fd().is_some_and(|own| file(own).is_some() && file(own) == file(fd))
    }

    /// # Panics
    /// If there are not so many.
    pub fn at(self: &Arc<Self>, index: usize) -> WordRef {
        assert!(index < self.len, "word {index} of {}", self.len);
        // SAFETY: inside, as just checked.
        WordRef { at: unsafe { self.base.add(index) }, _of: Arc::clone(self) }
    }
}

fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: an all-zero stat is a valid value of that plain C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: fd is open and stat is valid for writes.
    if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } == 0 {
        Ok(stat)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn bytes(len: usize) -> usize {
    len * size_of::<AtomicU64>()
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.fd.is_some() {
            // SAFETY: unmaps this value's own mapping; who refers to a word of it holds the value.
            unsafe { libc::munmap(self.base.as_ptr().cast(), bytes(self.len)) };
        } else {
            let words = std::ptr::slice_from_raw_parts_mut(self.base.as_ptr(), self.len);
            // SAFETY: made by Box::leak in `private`, with this length.
            drop(unsafe { Box::from_raw(words) });
        }
    }
}

/// One of [`Words`], which stay where they are as long as this lives.
#[derive(Clone, Debug)]
pub struct WordRef {
    at: NonNull<AtomicU64>,
    /// Keeps it where it is.
    _of: Arc<Words>,
}

// SAFETY: a pointer to an atomic that `_of` keeps.
unsafe impl Send for WordRef {}
// SAFETY: as above.
unsafe impl Sync for WordRef {}

impl WordRef {
    /// A word of its own.
    pub fn private(value: u64) -> WordRef {
        let word = Words::private(1).at(0);
        word.store(value, std::sync::atomic::Ordering::Relaxed);
        word
    }
}

impl std::ops::Deref for WordRef {
    type Target = AtomicU64;

    #[inline]
    fn deref(&self) -> &AtomicU64 {
        // SAFETY: `_of` keeps the memory, and an atomic is valid with any bytes.
        unsafe { self.at.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn they_are_seen_by_who_maps_them_and_outlive_who_made_them() {
        let ours = Words::create(1000).unwrap();
        let copy = ours.fd().unwrap().try_clone_to_owned().unwrap();
        let theirs = Words::open(copy, 1000).unwrap();
        ours.at(999).store(7, Relaxed);
        let word = theirs.at(999);
        assert!(
            ours.are_in(theirs.fd().unwrap()) && !ours.are_in(Words::create(1000).unwrap().fd().unwrap())
        );
        drop((ours, theirs));
        assert_eq!(word.load(Relaxed), 7);
        assert_eq!(Words::private(3).at(2).load(Relaxed), 0);
    }

    #[test]
    fn nobody_can_make_them_shorter_and_what_could_be_is_not_mapped() {
        let words = Words::create(1000).unwrap();
        let fd = words.fd().unwrap().as_raw_fd();
        for bytes in [0, 4096, 1 << 20] {
            // SAFETY: plain system call on an open descriptor.
            assert_eq!(unsafe { libc::ftruncate(fd, bytes) }, -1);
        }
        let copy = || words.fd().unwrap().try_clone_to_owned().unwrap();
        assert!(Words::open(copy(), 999).is_err());
        // SAFETY: a C string and flags; the result is checked by what follows.
        let bare =
            unsafe { libc::memfd_create(c"bare".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        // SAFETY: new and owned by nobody else.
        let bare = unsafe { OwnedFd::from_raw_fd(bare) };
        // SAFETY: plain system call on an open descriptor.
        assert_eq!(unsafe { libc::ftruncate(bare.as_raw_fd(), 8000) }, 0);
        assert!(Words::open(bare, 1000).is_err());
        assert!(Words::open(std::fs::File::open("/dev/null").unwrap().into(), 0).is_err());
    }

    #[test]
    #[should_panic(expected = "word 3 of 3")]
    fn there_is_none_beyond_the_last() {
        let _ = Words::private(3).at(3);
    }
}
