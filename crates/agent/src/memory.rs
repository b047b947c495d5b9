//! The memory of a thread that waits for an answer. Whatever is read is a copy: what is decided by it must not be read again
//! by the kernel. Both directions may block as long as the thread's own memory makes them (userfaultfd, FUSE).

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::census;

/// A duplicate of a descriptor of the thread.
pub fn duplicate(pid: u32, number: i32) -> Option<OwnedFd> {
    let take = |fd: libc::c_long| {
        // SAFETY: new and owned by nobody else.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    // SAFETY: takes integers; the result is checked.
    let process = take(unsafe { libc::syscall(libc::SYS_pidfd_open, census::leader(pid)?, 0) })?;
    // SAFETY: takes integers; the result is checked.
    take(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// The bytes, or `None` when not all of them can be read.
pub fn read(pid: u32, address: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; length];
    (length == 0 || read_into(pid, address, &mut bytes)).then_some(bytes)
}

/// False: not all of them can be read.
pub fn read_into(pid: u32, address: u64, bytes: &mut [u8]) -> bool {
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: `local` is valid for writes of its length; the other address is only looked at in the other process.
    let n = unsafe { libc::process_vm_readv(pid as i32, &local, 1, &remote, 1, 0) };
    n == bytes.len() as isize
}

/// False: not all of them can be written.
pub fn write(pid: u32, address: u64, bytes: &[u8]) -> bool {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: `local` is valid for reads of its length; the other address is only written in the other process.
    let n = unsafe { libc::process_vm_writev(pid as i32, &local, 1, &remote, 1, 0) };
    n == bytes.len() as isize
}
