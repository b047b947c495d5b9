//! The exported symbols. Each has one shape: find out whether the descriptor is a guest socket, serve it or pass it on.

mod alias;
mod event;
mod fd;
mod io;
mod net;
mod process;
mod raw;
pub mod stdio;
mod variadic;

use crate::socket::{self, Sock};
use crate::sys;

/// The libc convention: the value, or -1 with errno.
fn finish<T: TryInto<isize>>(result: Result<T, i32>) -> isize {
    match result {
        Ok(value) => value.try_into().unwrap_or(0),
        Err(errno) => {
            sys::set_errno(errno);
            -1
        }
    }
}

fn finish_int(result: Result<i32, i32>) -> i32 {
    finish(result) as i32
}

fn done(result: Result<(), i32>) -> i32 {
    finish_int(result.map(|()| 0))
}

#[inline]
fn guest_socket(fd: i32) -> Option<Sock> {
    socket::find(fd)
}

/// A slice over the program's `iovec`s; `None` for a count that Linux refuses.
///
/// # Safety
/// `iov` must be valid for `count` entries.
unsafe fn buffers<'a>(iov: *const libc::iovec, count: usize) -> Option<&'a [libc::iovec]> {
    if count > 1024 {
        return None;
    }
    if count == 0 {
        return Some(&[]);
    }
    // SAFETY: the caller vouches for the array.
    Some(unsafe { core::slice::from_raw_parts(iov, count) })
}

fn one(buffer: *const libc::c_void, len: usize) -> [libc::iovec; 1] {
    [libc::iovec { iov_base: buffer.cast_mut(), iov_len: len.min(0x7fff_f000) }]
}

/// A program's sockaddr as bytes.
///
/// # Safety
/// `address` must be null or valid for `len` bytes.
unsafe fn address<'a>(address: *const libc::sockaddr, len: libc::socklen_t) -> Result<&'a [u8], i32> {
    if address.is_null() || len == 0 {
        return Ok(&[]);
    }
    if len > 128 {
        return Err(libc::EINVAL);
    }
    // SAFETY: the caller vouches for the bytes.
    Ok(unsafe { core::slice::from_raw_parts(address.cast(), len as usize) })
}

/// The address that bind and connect demand.
///
/// # Safety
/// As for [`address`].
unsafe fn needed_address<'a>(from: *const libc::sockaddr, len: libc::socklen_t) -> Result<&'a [u8], i32> {
    match len {
        129.. => Err(libc::EINVAL),
        1.. if from.is_null() => Err(libc::EFAULT),
        // SAFETY: the same contract.
        _ => unsafe { address(from, len) },
    }
}

/// Gives an address out as accept, getsockname and recvfrom do: truncated, with the true length.
///
/// # Safety
/// Both must be null or valid; `to` for `*len` bytes.
unsafe fn give_address(from: &[u8], to: *mut libc::sockaddr, len: *mut libc::socklen_t) -> Result<(), i32> {
    if to.is_null() || len.is_null() {
        return Ok(());
    }
    // SAFETY: the caller vouches for both.
    unsafe {
        if (*len as i32) < 0 {
            return Err(libc::EINVAL);
        }
        let n = from.len().min(*len as usize);
        core::ptr::copy_nonoverlapping(from.as_ptr(), to.cast::<u8>(), n);
        *len = from.len() as libc::socklen_t;
    }
    Ok(())
}
