//! What a service must not forget when its process dies, kept where the next process finds it.
//!
//! Values are written in place, in the order of the program: the kernel ends a killed process between two of its
//! instructions, and what was stored before is in the journal. Nobody but this service writes it.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use netkernel_shm::Journal;

/// A type whose values may be left in memory by one process and be read by another one of the same program: plain data, no
/// pointers, nothing to drop.
///
/// # Safety
/// Just that.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for i32 {}
// SAFETY: plain numbers.
unsafe impl Plain for [u32; 2] {}

/// Memory of a fixed number of values: of this process, or in a journal.
#[derive(Debug)]
pub struct Fixed<T> {
    at: NonNull<T>,
    len: usize,
    journal: Option<Kept>,
    owns: PhantomData<T>,
}

/// Keeps a journal mapped.
struct Kept(#[allow(dead_code)] Arc<Journal>);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("journal")
    }
}

// SAFETY: it is the only way to its values, as a Box is.
unsafe impl<T: Send> Send for Fixed<T> {}

impl<T: Default> Fixed<T> {
    pub fn new(len: usize) -> Fixed<T> {
        let values: Box<[T]> = (0..len).map(|_| T::default()).collect();
        let at = NonNull::from(Box::leak(values)).cast();
        Fixed { at, len, journal: None, owns: PhantomData }
    }
}

impl<T: Plain> Fixed<T> {
    /// Those at `offset` in the journal; `fresh`: made as new, else as they were left. `None`: the journal ends before.
    pub fn kept(journal: &Arc<Journal>, offset: usize, len: usize, fresh: bool) -> Option<Fixed<T>> {
        let at = journal.array::<T>(offset, len)?;
        if fresh {
            for i in 0..len {
                // SAFETY: inside the journal, as `array` checked.
                unsafe { at.add(i).write(T::default()) };
            }
        }
        Some(Fixed { at, len, journal: Some(Kept(Arc::clone(journal))), owns: PhantomData })
    }
}

impl<T> Deref for Fixed<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` valid values, which live as long as self does; in a journal they are plain data that was
        // initialised, by this process or an earlier one of the same program.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Fixed<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and self is borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl<T> Drop for Fixed<T> {
    fn drop(&mut self) {
        if self.journal.is_none() {
            // SAFETY: made by Box::leak in `new`, with this length.
            drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.at.as_ptr(), self.len)) });
        }
    }
}

/// A single value.
#[derive(Debug)]
pub struct One<T>(pub Fixed<T>);

impl<T: Default> One<T> {
    pub fn new() -> One<T> {
        One(Fixed::new(1))
    }
}

impl<T> Deref for One<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.0[0]
    }
}

impl<T> DerefMut for One<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0[0]
    }
}

/// Takes over a descriptor that an earlier process left, by its number + 1. `None`: it is not open.
pub fn take_descriptor(number: i32) -> Option<OwnedFd> {
    let fd = number - 1;
    // SAFETY: plain system call; what is not open is an error.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: open; who calls this took the number out of a journal, where each stands once, and nothing else in this process
    // knows it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
