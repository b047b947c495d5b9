//! The main epoll instance of a switch thread, and what its entries mean.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// What an event is about. Packed into the 64 bits that epoll keeps: kind, guest slot, number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The thread's own wake-up eventfd: commands.
    Control,
    /// A stack's descriptor; index of the NSM.
    Stack(u32),
    /// A guest's doorbell.
    Doorbell(u32),
    /// Guest slot, index of the channel.
    Channel(u32, u32),
    /// Guest slot, index of the process.
    Process(u32, u32),
    /// Guest slot, socket id.
    Placeholder(u32, u32),
    /// The keeper thread has something to tell.
    Keeper,
    /// A guest's relay wants something of the stack.
    Relay(u32),
}

impl Source {
    fn pack(self) -> u64 {
        let (kind, slot, number) = match self {
            Source::Control => (0, 0, 0),
            Source::Stack(nsm) => (1, 0, nsm),
            Source::Doorbell(slot) => (2, slot, 0),
            Source::Channel(slot, number) => (3, slot, number),
            Source::Process(slot, number) => (4, slot, number),
            Source::Placeholder(slot, number) => (5, slot, number),
            Source::Keeper => (6, 0, 0),
            Source::Relay(slot) => (7, slot, 0),
        };
        kind << 56 | (slot as u64 & 0xff_ffff) << 32 | number as u64
    }

    pub fn unpack(data: u64) -> Source {
        let (slot, number) = ((data >> 32) as u32 & 0xff_ffff, data as u32);
        match data >> 56 {
            0 => Source::Control,
            1 => Source::Stack(number),
            2 => Source::Doorbell(slot),
            3 => Source::Channel(slot, number),
            4 => Source::Process(slot, number),
            5 => Source::Placeholder(slot, number),
            6 => Source::Keeper,
            _ => Source::Relay(slot),
        }
    }
}

const BATCH: usize = 256;

pub struct Poller {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Poller {
    pub fn new() -> io::Result<Poller> {
        // SAFETY: plain system call; the result is checked.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: new and owned by nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Poller { epoll, events: vec![libc::epoll_event { events: 0, u64: 0 }; BATCH] })
    }

    /// Readable, level-triggered: what is not read at once is reported again.
    pub fn add_readable(&self, fd: RawFd, source: Source) -> io::Result<()> {
        self.add(fd, libc::EPOLLIN, source)
    }

    /// An eventfd that is reported at each write and need not be read.
    pub fn add_doorbell(&self, fd: RawFd, source: Source) -> io::Result<()> {
        self.add(fd, libc::EPOLLIN | libc::EPOLLET, source)
    }

    /// The other end was closed; reported once.
    pub fn add_hangup(&self, fd: RawFd, source: Source) -> io::Result<()> {
        self.add(fd, libc::EPOLLHUP | libc::EPOLLET, source)
    }

    /// Of a descriptor that others have, too, so that closing it would not do.
    pub fn remove(&self, fd: RawFd) {
        // SAFETY: takes integers and no event.
        unsafe {
            libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut());
        }
    }

    fn add(&self, fd: RawFd, interest: i32, source: Source) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest as u32, u64: source.pack() };
        // SAFETY: event is valid for reads; a bad descriptor is an error.
        let r = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Appends what happened to `out`. True: there may be more. `timeout_ms` -1: for ever.
    pub fn wait(&mut self, timeout_ms: i32, out: &mut Vec<Source>) -> bool {
        // SAFETY: events is valid for BATCH entries.
        let n = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), BATCH as i32, timeout_ms)
        };
        let n = n.max(0) as usize;
        out.extend(self.events[..n].iter().map(|event| Source::unpack(event.u64)));
        n == BATCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_packing() {
        for source in [
            Source::Control,
            Source::Stack(7),
            Source::Doorbell(0xff_ffff),
            Source::Channel(3, 9),
            Source::Process(4, u32::MAX),
            Source::Placeholder(5, 32767),
            Source::Keeper,
            Source::Relay(0xff_ffff),
        ] {
            assert_eq!(Source::unpack(source.pack()), source);
        }
    }
}
