//! The descriptors of an NSM, from one holder to the next, which gets them at the same numbers: journals name them by these.
//!
//! The worker gives, since it knows of each; between two turns, so that nothing changes meanwhile. Its holder keeps its own
//! until the next one's worker serves, and goes on if that does not come about.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd};

use netkernel_abi::Limits;
use netkernel_service::Service;
use netkernel_shm::fds;
use serde::{Deserialize, Serialize};

use super::journal::Root;
use super::wire::{Reader, send};

/// What is said first.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    /// The list of guests.
    root: RawFd,
    highest: RawFd,
    count: usize,
}

/// Says which memory a program understands. Two that say the same can follow each other.
pub fn format() -> String {
    let journal = Service::journal_bytes(Limits::default());
    let layout = netkernel_service::journal_format();
    format!("{}/{layout:x}/{}/{journal}", netkernel_abi::ABI_VERSION, Root::slot_bytes())
}

/// Gives everything that `root` names. Errors: the other side is gone, or took too little.
pub fn give(socket: &OwnedFd, root: &Root) -> io::Result<()> {
    let mut numbers = root.descriptors();
    numbers.sort_unstable();
    numbers.dedup();
    // SAFETY: plain system call. A number that was noted and is not open would spoil the rest.
    numbers.retain(|&fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
    let about =
        About { root: root.fd(), highest: numbers.last().copied().unwrap_or_default(), count: numbers.len() };
    send(socket.as_raw_fd(), &about, &[])?;
    // What the next one strikes off the list stays in this one, which may have to go on.
    let copy = root.copy()?;
    for some in numbers.chunks(fds::MAX_FDS) {
        let given: Vec<RawFd> = some.iter().map(|&fd| if fd == root.fd() { copy.fd() } else { fd }).collect();
        send(socket.as_raw_fd(), &some, &given)?;
    }
    // The last word is the other side's: all of it is there.
    match Reader::default().receive::<bool>(socket)? {
        Some((true, _)) => Ok(()),
        _ => Err(io::Error::other("the next process did not take the descriptors")),
    }
}

/// Takes what another holder's worker gives. `control` is this process's only other descriptor, besides the first three; its
/// number may change. `None`: nothing was given, because nothing is to be taken over.
pub fn take(mut socket: OwnedFd, control: &mut OwnedFd, max_guests: usize) -> io::Result<Option<Root>> {
    let mut reader = Reader::default();
    let Some((about, _)) = reader.receive::<About>(&socket)? else { return Ok(None) };
    // Out of the way, and every lower number in use: what comes in then lands above.
    socket = above(&socket, about.highest)?;
    *control = above(control, about.highest)?;
    let null = above(&OwnedFd::from(std::fs::File::open("/dev/null")?), about.highest)?;
    loop {
        let filler = null.try_clone()?;
        if filler.as_raw_fd() > about.highest {
            break;
        }
        // Replaced below, or closed by the worker, who knows what is needed.
        let _ = filler.into_raw_fd();
    }
    let mut left = about.count;
    while left > 0 {
        let Some((numbers, given)) = reader.receive::<Vec<RawFd>>(&socket)? else {
            return Err(io::Error::other("the process before ended while it gave its descriptors"));
        };
        if numbers.len() != given.len() || numbers.len() > left {
            return Err(io::Error::other("descriptors are missing: the limit of open files is too low"));
        }
        left -= numbers.len();
        for (number, fd) in numbers.into_iter().zip(given) {
            if !(3..=about.highest).contains(&number) {
                return Err(io::Error::other("a descriptor's number that cannot be"));
            }
            // SAFETY: plain system call. The number is below those of the descriptors that this process uses itself.
            if unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    // SAFETY: given just now; the number is nobody's in this process.
    let root = Root::open(unsafe { OwnedFd::from_raw_fd(about.root) }, max_guests)?;
    send(socket.as_raw_fd(), &true, &[])?;
    Ok(Some(root))
}

/// The same open file at a number above another.
fn above(fd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked, new, and owned by nobody else.
    unsafe {
        let copy = libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number + 1);
        if copy < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(copy)) }
    }
}
