//! A guest on its way from one process to another: a journal, and all descriptors that it names.
//!
//! Who gives keeps its own until the other side has all of them and says so. Numbers are the giver's; who takes gets others, and writes
//! the journal anew by these, in memory that the giver does not have.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, IntoRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use netkernel_abi::Limits;
use netkernel_agent::ledger::Moved;
use netkernel_relay::{left_descriptors, renumber_left};
use netkernel_service::take_descriptor;
use netkernel_shm::fds;
use serde::{Deserialize, Serialize};

use super::journal::{GuestJournal, Left};
use super::wire::{Reader, send};
use crate::usage::Usage;
use crate::worker::{is_eventfd, is_unix};

/// How long either side waits for the next word of the other.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A guest that no thread serves. Its descriptors are closed with this.
pub(crate) struct Packed(Option<Box<Left>>);

impl Packed {
    pub fn new(left: Box<Left>) -> Packed {
        Packed(Some(left))
    }

    pub fn unpack(mut self) -> Option<Box<Left>> {
        self.0.take()
    }

    /// `None`: never.
    pub fn left(&mut self) -> Option<&mut Left> {
        self.0.as_deref_mut()
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        if let Some(left) = self.0.take() {
            close_all(&left.journal, left.guest.sizes());
        }
    }
}

/// What is said first, with the journal attached.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    used: Used,
    count: usize,
}

/// What a guest used in the process that gives it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Used {
    /// All of it, direct sockets included.
    pub all: Usage,
    /// Without these: this is what the next process goes on from.
    pub goes_on: Usage,
    /// What is known of its direct sockets, if anything.
    pub direct: Moved,
}

/// Two ends of what a guest goes through. Nobody waits for the other side longer than a few seconds.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)?;
    let patience = libc::timeval { tv_sec: PATIENCE.as_secs() as libc::time_t, tv_usec: 0 };
    for end in [&ours, &theirs] {
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let size = size_of::<libc::timeval>() as libc::socklen_t;
            // SAFETY: a struct timeval, valid for reads of its size.
            unsafe {
                let value = (&raw const patience).cast();
                libc::setsockopt(end.as_raw_fd(), libc::SOL_SOCKET, option, value, size);
            }
        }
    }
    Ok((ours, theirs))
}

/// Gives copies of all that a guest has. Errors: the other side is gone, or stands still.
pub(crate) fn give(socket: &OwnedFd, left: &Left, used: Used) -> io::Result<()> {
    let mut numbers: Vec<RawFd> = descriptors(&left.journal, left.guest.sizes());
    numbers.sort_unstable();
    numbers.dedup();
    let about = About { used, count: numbers.len() };
    send(socket.as_raw_fd(), &about, &[left.journal.memory.fd()])?;
    for some in numbers.chunks(fds::MAX_FDS) {
        send(socket.as_raw_fd(), &some, some)?;
    }
    Ok(())
}

/// Takes what another process gives, in a journal of this process's. Errors: it gave nothing, what it
/// gave is no journal of such a guest, or there is no room for its descriptors.
pub(crate) fn take(socket: &OwnedFd, limits: Limits) -> io::Result<(Used, GuestJournal)> {
    let mut reader = Reader::default();
    let ended = || io::Error::other("the other process gave nothing");
    let (about, mut memory) = reader.receive::<About>(socket)?.ok_or_else(ended)?;
    let memory = memory.pop().ok_or_else(no_room)?;
    let mut journal = GuestJournal::read(&memory, limits)?;
    let mut given: HashMap<RawFd, OwnedFd> = HashMap::new();
    while given.len() < about.count {
        let (numbers, descriptors) = reader.receive::<Vec<RawFd>>(socket)?.ok_or_else(ended)?;
        if numbers.len() != descriptors.len() || numbers.is_empty() {
            return Err(no_room());
        }
        given.extend(numbers.into_iter().zip(descriptors));
    }
    let other = |number: RawFd| given.get(&number).map(AsRawFd::as_raw_fd);
    let relay = journal.agent[0].relay;
    if !journal.renumber(limits, &other) {
        return Err(io::Error::other("a descriptor that the journal names was not given"));
    }
    if let Some(left) = given.remove(&(relay - 1)) {
        let left = renumber_left(left, &|number| given.get(&number).map(AsRawFd::as_raw_fd))?;
        journal.agent[0].relay = left.as_raw_fd() + 1;
        given.insert(relay - 1, left);
    }
    let mut named = descriptors(&journal, limits);
    named.sort_unstable();
    if named.windows(2).any(|two| two[0] == two[1]) || !are_of_their_kinds(&journal) {
        return Err(io::Error::other("its journal names descriptors that cannot be what it says"));
    }
    // From now on they are the journal's. What it does not name is nobody's.
    for fd in given.into_values().filter(|fd| named.contains(&fd.as_raw_fd())) {
        let _ = fd.into_raw_fd();
    }
    Ok((about.used, journal))
}

/// The word for: all of it came.
pub(crate) const ALL: u32 = 1;

/// Says one word; errors as for [`give`].
pub(crate) fn say(socket: &OwnedFd, word: u32) -> io::Result<()> {
    send(socket.as_raw_fd(), &word, &[])
}

/// The other side's word; `None`: it has none to say.
pub(crate) fn hear(socket: &OwnedFd) -> Option<u32> {
    Some(Reader::default().receive::<u32>(socket).ok()??.0)
}

/// A relay that stands still, with descriptors of its own instead of those of the thread that goes on to close them.
pub(crate) fn copy_of_relay(memory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut copies = HashMap::new();
    for number in left_descriptors(memory) {
        // SAFETY: the relay that stands still has it open.
        let copy = unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()?;
        copies.insert(number, copy);
    }
    let own = renumber_left(memory.try_clone_to_owned()?, &|fd| copies.get(&fd).map(AsRawFd::as_raw_fd))?;
    // Named by it.
    copies.into_values().for_each(|copy| _ = copy.into_raw_fd());
    Ok(own)
}

/// All that a journal names, what its relay left included.
fn descriptors(journal: &GuestJournal, limits: Limits) -> Vec<RawFd> {
    let mut all = journal.descriptors(limits);
    let relay = journal.agent[0].relay - 1;
    if relay >= 0 {
        // SAFETY: the journal's own; the borrow ends with this statement.
        all.extend(left_descriptors(unsafe { BorrowedFd::borrow_raw(relay) }.as_fd()));
    }
    all.retain(|fd| *fd >= 0);
    all
}

/// What this process's thread will wait at, or write to. (Stacks look at what they adopt.)
fn are_of_their_kinds(journal: &GuestJournal) -> bool {
    let all = |list: &[i32], is: &dyn Fn(BorrowedFd<'_>) -> bool| {
        list.iter().filter(|fd| **fd > 0).all(|fd| {
            // SAFETY: given just now, and open; the borrow ends with this statement.
            is(unsafe { BorrowedFd::borrow_raw(fd - 1) })
        })
    };
    let processes: Vec<i32> = journal.processes.iter().map(|process| process[1] as i32).collect();
    all(&journal.channels, &|fd| is_unix(fd, libc::SOCK_SEQPACKET))
        && all(&processes, &|fd| is_unix(fd, libc::SOCK_STREAM))
        && all(&journal.ends, &|fd| is_unix(fd, libc::SOCK_STREAM))
        && all(&journal.bells, &is_eventfd)
}

fn close_all(journal: &GuestJournal, limits: Limits) {
    let mut all = descriptors(journal, limits);
    all.sort_unstable();
    all.dedup();
    all.into_iter().for_each(|fd| drop(take_descriptor(fd + 1)));
}

fn no_room() -> io::Error {
    io::Error::other("there is no room for its descriptors: the limit of open files is too low")
}
