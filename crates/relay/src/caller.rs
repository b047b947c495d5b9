//! Memory and descriptors of the threads that ask.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use netkernel_abi::ancillary;
use netkernel_agent::memory;
use netkernel_agent::notify::Notification;
use netkernel_service::{Errno, SocketAddress};

use crate::sys;

/// Threads whose processes are held open; more are forgotten and opened again.
const MAX_THREADS: usize = 64;
/// The kernel's struct sockaddr_storage.
const MAX_ADDRESS: i32 = 128;
/// UIO_MAXIOV.
const MAX_RUNS: u64 = 1024;
/// As much as one datagram can hold.
pub const MAX_PAYLOAD: usize = 65536;

/// The ways to the descriptors of threads.
#[derive(Default)]
pub struct Threads {
    open: HashMap<u32, OwnedFd>,
}

impl Threads {
    /// A duplicate of a descriptor, if it is the socket that it was when it was looked up.
    pub fn descriptor(&mut self, pid: u32, number: u32, inode: u64) -> Result<OwnedFd, Errno> {
        let fd = self.duplicate(pid, number).map_err(|error| sys::of(&error))?;
        if sys::inode(&fd) == Some(inode) { Ok(fd) } else { Err(Errno(libc::EBADF)) }
    }

    fn duplicate(&mut self, pid: u32, number: u32) -> std::io::Result<OwnedFd> {
        if let Some(thread) = self.open.get(&pid)
            && let Ok(fd) = sys::duplicate_of(thread, number)
        {
            return Ok(fd);
        }
        // Not known, or a dead thread's number that is in use again.
        if self.open.len() >= MAX_THREADS {
            self.open.clear();
        }
        let thread = sys::open_thread(pid)?;
        let fd = sys::duplicate_of(&thread, number)?;
        self.open.insert(pid, thread);
        Ok(fd)
    }
}

pub const FAULT: Errno = Errno(libc::EFAULT);
const INVALID: Errno = Errno(libc::EINVAL);

/// `length` bytes at an address.
pub fn read(call: &Notification, address: u64, length: usize) -> Result<Vec<u8>, Errno> {
    memory::read(call.pid, address, length).ok_or(FAULT)
}

pub fn write(call: &Notification, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    if bytes.is_empty() || memory::write(call.pid, address, bytes) { Ok(()) } else { Err(FAULT) }
}

pub fn read_int(call: &Notification, address: u64) -> Result<i32, Errno> {
    let mut bytes = [0; 4];
    if memory::read_into(call.pid, address, &mut bytes) { Ok(i32::from_ne_bytes(bytes)) } else { Err(FAULT) }
}

/// A socket address that a program passed, as move_addr_to_kernel() takes it.
pub fn read_address(call: &Notification, address: u64, length: u64) -> Result<SocketAddress, Errno> {
    let length = length as i32;
    if !(0..=MAX_ADDRESS).contains(&length) {
        return Err(INVALID);
    }
    Ok(SocketAddress::from_bytes(&read(call, address, length as usize)?))
}

/// A socket address for the program, as move_addr_to_user() gives it: cut to its room, with the true length.
pub fn write_address(
    call: &Notification,
    address: u64,
    length_at: u64,
    name: &SocketAddress,
) -> Result<(), Errno> {
    let room = read_int(call, length_at)?;
    let room = usize::try_from(room).map_err(|_| INVALID)?;
    let bytes = name.as_bytes();
    write(call, address, &bytes[..bytes.len().min(room)])?;
    write(call, length_at, &(bytes.len() as u32).to_ne_bytes())
}

/// A struct msghdr of a 64-bit program.
#[derive(Clone, Debug, Default)]
pub struct MessageHeader {
    /// Where it stands.
    pub at: u64,
    pub name: u64,
    pub name_length: u32,
    /// Address and length of each.
    pub runs: Vec<(u64, usize)>,
    pub control: u64,
    pub control_length: usize,
}

/// Bytes of struct msghdr, and offsets of what is written back.
const HEADER: usize = 56;
const NAME_LENGTH: u64 = 8;
const CONTROL_LENGTH: u64 = 40;
const FLAGS: u64 = 48;

impl MessageHeader {
    pub fn read(call: &Notification, at: u64) -> Result<MessageHeader, Errno> {
        let bytes = read(call, at, HEADER)?;
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let (runs_at, count) = (word(16), word(24));
        if count > MAX_RUNS {
            return Err(Errno(libc::EMSGSIZE));
        }
        let table = read(call, runs_at, 16 * count as usize)?;
        let runs = table.chunks_exact(16).map(|run| {
            let half = |at: usize| u64::from_ne_bytes(run[at..at + 8].try_into().unwrap_or_default());
            (half(0), half(8) as usize)
        });
        Ok(MessageHeader {
            at,
            name: word(0),
            name_length: word(8) as u32,
            runs: runs.collect(),
            control: word(32),
            control_length: word(40) as usize,
        })
    }

    /// One run of memory, as sendto() and recvfrom() have it.
    pub fn of_one(address: u64, length: u64) -> MessageHeader {
        MessageHeader { runs: vec![(address, length as usize)], ..MessageHeader::default() }
    }

    pub fn length(&self) -> usize {
        self.runs.iter().fold(0usize, |sum, run| sum.saturating_add(run.1))
    }

    /// The payload. EMSGSIZE: longer than any datagram.
    pub fn gather(&self, call: &Notification) -> Result<Vec<u8>, Errno> {
        if self.length() > MAX_PAYLOAD {
            return Err(Errno(libc::EMSGSIZE));
        }
        let mut payload = Vec::with_capacity(self.length());
        for &(address, length) in &self.runs {
            payload.extend(read(call, address, length)?);
        }
        Ok(payload)
    }

    /// Gives the payload out; what does not fit is lost.
    pub fn scatter(&self, call: &Notification, mut payload: &[u8]) -> Result<(), Errno> {
        for &(address, length) in &self.runs {
            let (now, rest) = payload.split_at(payload.len().min(length));
            write(call, address, now)?;
            payload = rest;
        }
        Ok(())
    }

    /// Writes what recvmsg() returns besides its value.
    pub fn finish(
        &self,
        call: &Notification,
        from: &SocketAddress,
        control: &[u8],
        flags: i32,
    ) -> Result<(), Errno> {
        let name = from.as_bytes();
        if self.name != 0 {
            write(call, self.name, &name[..name.len().min(self.name_length as usize)])?;
            write(call, self.at + NAME_LENGTH, &(name.len() as u32).to_ne_bytes())?;
        }
        let room = if self.control == 0 { 0 } else { self.control_length };
        let (fits, whole) = fit_control(control, room);
        write(call, self.control, &fits)?;
        write(call, self.at + CONTROL_LENGTH, &(fits.len() as u64).to_ne_bytes())?;
        let cut = if whole { 0 } else { libc::MSG_CTRUNC };
        write(call, self.at + FLAGS, &(flags | cut).to_ne_bytes())
    }
}

/// Control messages as put_cmsg() gives them out: the one that does not fit is cut, with its length; none follows. False:
/// something was cut.
fn fit_control(control: &[u8], room: usize) -> (Vec<u8>, bool) {
    let mut fits = Vec::new();
    for message in ancillary::messages(control).flatten() {
        let left = room - fits.len();
        if left < ancillary::HEADER {
            return (fits, false);
        }
        let length = ancillary::HEADER + message.data.len();
        let cut = length.min(left);
        fits.extend((cut as u64).to_ne_bytes());
        fits.extend(message.level.to_ne_bytes());
        fits.extend(message.kind.to_ne_bytes());
        fits.extend(&message.data[..cut - ancillary::HEADER]);
        if cut < length {
            return (fits, false);
        }
        let padded = fits.len().next_multiple_of(8).min(room);
        fits.resize(padded, 0);
    }
    (fits, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_are_cut_as_the_kernel_cuts_them() {
        let mut control = Vec::new();
        for (kind, data) in [(1i32, [1u8; 4]), (2, [2; 4])] {
            control.extend(20u64.to_ne_bytes());
            control.extend(0i32.to_ne_bytes());
            control.extend(kind.to_ne_bytes());
            control.extend(data);
            control.extend([0; 4]);
        }
        assert_eq!(fit_control(&control, 48), (control.clone(), true));
        assert_eq!(fit_control(&control, 44).0.len(), 44);
        let (cut, whole) = fit_control(&control, 42);
        assert_eq!((cut.len(), whole, cut[24]), (42, false, 18));
        assert_eq!(fit_control(&control, 30), (control[..24].to_vec(), false));
        assert_eq!(fit_control(&control, 0), (Vec::new(), false));
    }
}
