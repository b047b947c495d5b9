//! Placeholder ends beyond the main descriptor table.
//!
//! A guest socket takes two descriptors of the engine: the stack's socket and the engine's end of the placeholder. A hard
//! limit of 20,000 would end at 10,000 sockets. So beyond a threshold the ends go to a *keeper*: a thread with a
//! descriptor table of its own (`unshare(CLONE_FILES)`), to which the limit applies anew. It polls its ends for hang-ups
//! and puts wake-up bytes into them on request. That costs a hop through another thread, which is why the first few
//! thousand ends stay where they are.
//!
//! Requests go over a SEQPACKET pair, an end attached to the message that hands it over; reports come back through a
//! queue and an eventfd.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use netkernel_service::URGENT_WAKE;
use netkernel_shm::fds;

use crate::engine::{lock, write_eventfd};

/// A kept end that hung up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hangup {
    pub slot: u32,
    pub id: u32,
    pub serial: u32,
    /// There was no room for it: nothing is known of its end.
    pub refused: bool,
}

const ADD: u32 = 1;
const WAKE: u32 = 2;
const REMOVE_SLOT: u32 = 3;
const COPY_SLOT: u32 = 4;
/// How long the keeper may take to copy a guest's ends.
const PATIENCE: Duration = Duration::from_secs(5);
/// What copies of ends may take in their socket, in bytes.
static COPIES: i32 = 32 << 20;

/// The switch thread's side.
pub struct Keeper {
    requests: OwnedFd,
    pub wake: OwnedFd,
    reports: Arc<Mutex<VecDeque<Hangup>>>,
    /// Answers to requests for copies.
    copied: mpsc::Receiver<io::Result<()>>,
    serial: u32,
}

impl Keeper {
    /// Starts a keeper thread. It ends when the value is dropped.
    pub fn start(index: usize) -> io::Result<Keeper> {
        let (requests, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)?;
        let wake = fds::eventfd()?;
        let reports = Arc::new(Mutex::new(VecDeque::new()));
        let (ready, begun) = mpsc::channel();
        let (answers, copied) = mpsc::channel();
        let numbers = (theirs.as_raw_fd(), wake.as_raw_fd());
        let queue = Arc::clone(&reports);
        std::thread::Builder::new().name(format!("nk-keeper-{index}")).spawn(
            move || match Table::separate(numbers.0, numbers.1, queue, answers) {
                Ok(table) => {
                    let _ = ready.send(Ok(()));
                    table.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            },
        )?;
        // `theirs` is dropped here only when the thread has its own copy of the table.
        begun.recv().map_err(|_| io::Error::other("the keeper thread died"))??;
        Ok(Keeper { requests, wake, reports, copied, serial: 0 })
    }

    /// Hands an end over; the serial number names it from now on.
    pub fn add(&mut self, slot: u32, id: u32, end: &OwnedFd) -> io::Result<u32> {
        self.serial = self.serial.wrapping_add(1);
        self.request([ADD, slot, id, self.serial], &[end.as_raw_fd()])?;
        Ok(self.serial)
    }

    pub fn wake(&self, serial: u32, count: u32) {
        let _ = self.request([WAKE, 0, count, serial], &[]);
    }

    /// Closes all ends of a guest.
    pub fn remove_slot(&self, slot: u32) {
        let _ = self.request([REMOVE_SLOT, slot, 0, 0], &[]);
    }

    /// Copies of all ends of a guest, under way in a socket, where they are no descriptors of anybody: [`copies`] takes them
    /// out. What hung up before was reported then.
    pub fn copy_slot(&self, slot: u32) -> io::Result<OwnedFd> {
        let (here, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)?;
        for option in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
            // SAFETY: an int, valid for reads. What is not allowed leaves it as it is.
            unsafe {
                let size = size_of::<i32>() as libc::socklen_t;
                libc::setsockopt(
                    theirs.as_raw_fd(),
                    libc::SOL_SOCKET,
                    option,
                    (&raw const COPIES).cast(),
                    size,
                );
            }
        }
        self.request([COPY_SLOT, slot, 0, 0], &[theirs.as_raw_fd()])?;
        self.copied.recv_timeout(PATIENCE).map_err(io::Error::other)??;
        Ok(here)
    }

    pub fn take(&self) -> VecDeque<Hangup> {
        std::mem::take(&mut *lock(&self.reports))
    }

    /// Blocks while the keeper is behind; it never waits for this thread.
    fn request(&self, words: [u32; 4], ends: &[RawFd]) -> io::Result<()> {
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        loop {
            match fds::send(self.requests.as_raw_fd(), &bytes, ends, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The next ends, with their sockets' numbers, of those that [`Keeper::copy_slot`] copied.
pub fn copies(from: &OwnedFd) -> io::Result<Vec<(u32, OwnedFd)>> {
    let mut ids = [0; 4 * fds::MAX_FDS];
    let (n, ends) = fds::receive(from.as_raw_fd(), &mut ids, libc::MSG_DONTWAIT)?;
    if ends.len() * 4 != n {
        return Err(io::Error::other("the limit of open files is too low for all ends of sockets"));
    }
    let ids = ids.chunks_exact(4).map(|id| u32::from_ne_bytes([id[0], id[1], id[2], id[3]]));
    Ok(ids.zip(ends).collect())
}

struct End {
    fd: OwnedFd,
    slot: u32,
    id: u32,
}

/// The keeper thread's side.
struct Table {
    requests: OwnedFd,
    wake: OwnedFd,
    epoll: OwnedFd,
    reports: Arc<Mutex<VecDeque<Hangup>>>,
    copied: mpsc::Sender<io::Result<()>>,
    ends: HashMap<u32, End>,
}

/// Epoll data of the request socket; serial numbers are 32 bits.
const REQUESTS: u64 = 1 << 40;

impl Table {
    /// Gives the calling thread a descriptor table of its own, with nothing in it but what it needs.
    fn separate(
        requests: RawFd,
        wake: RawFd,
        reports: Arc<Mutex<VecDeque<Hangup>>>,
        copied: mpsc::Sender<io::Result<()>>,
    ) -> io::Result<Table> {
        // SAFETY: from here on the descriptors of this thread are its own copies; the rest of the process keeps its own.
        if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut keep = [2, requests, wake];
        keep.sort_unstable();
        let mut from = 0;
        for fd in keep.into_iter().chain([RawFd::MAX]) {
            if fd > from {
                // SAFETY: closes copies in this thread's own table, which nothing in this thread refers to.
                unsafe { libc::syscall(libc::SYS_close_range, from as u32, fd as u32 - 1, 0) };
            }
            from = fd.saturating_add(1);
        }
        // SAFETY: plain system call; the result is checked.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all three are open in this thread's own table and owned by nobody else in it.
        let (requests, wake, epoll) = unsafe {
            (OwnedFd::from_raw_fd(requests), OwnedFd::from_raw_fd(wake), OwnedFd::from_raw_fd(epoll))
        };
        let table = Table { requests, wake, epoll, reports, copied, ends: HashMap::new() };
        table.watch(table.requests.as_raw_fd(), libc::EPOLLIN, REQUESTS)?;
        Ok(table)
    }

    fn watch(&self, fd: RawFd, interest: i32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest as u32, u64: data };
        // SAFETY: event is valid for reads; a bad descriptor is an error.
        let r = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn run(mut self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 256];
        loop {
            // SAFETY: events is valid for its length.
            let n = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, -1)
            };
            let mut hung = Vec::new();
            let mut requests = false;
            for event in &events[..n.max(0) as usize] {
                match event.u64 {
                    REQUESTS => requests = true,
                    serial => hung.push(serial as u32),
                }
            }
            if requests && !self.requests(&mut hung) {
                return;
            }
            self.report(&hung);
        }
    }

    /// Takes what was asked; `false`: the switch thread is gone.
    fn requests(&mut self, hung: &mut Vec<u32>) -> bool {
        for _ in 0..256 {
            let mut bytes = [0; 16];
            let (n, mut received) =
                match fds::receive(self.requests.as_raw_fd(), &mut bytes, libc::MSG_DONTWAIT) {
                    Ok(message) => message,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
                };
            if n == 0 {
                return false;
            }
            let word = |i: usize| {
                u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
            };
            let (slot, second, serial) = (word(1), word(2), word(3));
            match word(0) {
                ADD => {
                    let Some(fd) = received.pop() else {
                        // This table is full, too.
                        lock(&self.reports).push_back(Hangup { slot, id: second, serial, refused: true });
                        write_eventfd(self.wake.as_raw_fd());
                        continue;
                    };
                    let interest = libc::EPOLLHUP | libc::EPOLLET;
                    if self.watch(fd.as_raw_fd(), interest, serial as u64).is_err() {
                        hung.push(serial);
                    }
                    self.ends.insert(serial, End { fd, slot, id: second });
                }
                WAKE => {
                    if let Some(end) = self.ends.get(&serial) {
                        send_wakes(end.fd.as_raw_fd(), second);
                    }
                }
                COPY_SLOT => {
                    let full = || io::Error::other("its descriptor table is full");
                    let result = received.pop().ok_or_else(full).and_then(|to| self.copy(slot, &to));
                    let _ = self.copied.send(result);
                }
                REMOVE_SLOT => {
                    let epoll = self.epoll.as_raw_fd();
                    for (_, end) in self.ends.extract_if(|_, end| end.slot == slot) {
                        // It may be open elsewhere and come back: closing it alone would leave it watched.
                        // SAFETY: both are open; DEL reads no event.
                        unsafe {
                            let event = std::ptr::null_mut();
                            libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, end.fd.as_raw_fd(), event);
                        }
                    }
                }
                _ => {}
            }
        }
        true
    }

    fn copy(&self, slot: u32, to: &OwnedFd) -> io::Result<()> {
        let of_slot: Vec<&End> = self.ends.values().filter(|end| end.slot == slot).collect();
        for some in of_slot.chunks(fds::MAX_FDS) {
            let ids: Vec<u8> = some.iter().flat_map(|end| end.id.to_ne_bytes()).collect();
            let ends: Vec<RawFd> = some.iter().map(|end| end.fd.as_raw_fd()).collect();
            fds::send(to.as_raw_fd(), &ids, &ends, libc::MSG_DONTWAIT)?;
        }
        Ok(())
    }

    fn report(&mut self, hung: &[u32]) {
        if hung.is_empty() {
            return;
        }
        {
            let mut reports = lock(&self.reports);
            for &serial in hung {
                if let Some(end) = self.ends.remove(&serial) {
                    reports.push_back(Hangup { slot: end.slot, id: end.id, serial, refused: false });
                }
            }
        }
        write_eventfd(self.wake.as_raw_fd());
    }
}

/// Puts `count` wake-up bytes into a placeholder pair. A full pair means that there are enough.
pub fn send_wakes(fd: RawFd, count: u32) {
    let bytes = [0u8; 64];
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let (n, flags) = match count {
        URGENT_WAKE => (1, flags | libc::MSG_OOB),
        _ => ((count as usize).min(bytes.len()), flags),
    };
    // SAFETY: n bytes, valid for reads.
    unsafe { libc::send(fd, bytes.as_ptr().cast(), n, flags) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_ends_are_woken_and_reported_and_use_no_descriptor_here() {
        let mut keeper = Keeper::start(0).unwrap();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for id in 0..100 {
            let (our, their) = fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC).unwrap();
            assert_eq!(keeper.add(7, id, &their).unwrap(), id + 1);
            ours.push(our);
            theirs.push(std::fs::read_link(format!("/proc/self/fd/{}", their.as_raw_fd())).unwrap());
        }
        // Other tests open and close descriptors meanwhile: these are looked for by their inodes.
        let here = std::fs::read_dir("/proc/thread-self/fd").unwrap();
        let here: Vec<_> = here.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok()).collect();
        assert!(theirs.iter().all(|inode| !here.contains(inode)), "the keeper's ends stand in this table");
        keeper.wake(5, 3);
        let mut bytes = [0; 8];
        // SAFETY: eight bytes, valid for writes.
        let n = unsafe { libc::recv(ours[4].as_raw_fd(), bytes.as_mut_ptr().cast(), 8, 0) };
        assert_eq!(n, 3);
        let copied = keeper.copy_slot(7).unwrap();
        let mut again = HashMap::new();
        while again.len() < 100 {
            again.extend(copies(&copied).unwrap());
        }
        assert_eq!(copies(&copied).unwrap().len(), 0, "the end");
        let inode = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        assert!((0..100).all(|id| inode(&again[&id]) == theirs[id as usize]), "another end");
        drop(again);
        drop(ours.drain(..50));
        let mut hung = Vec::new();
        while hung.len() < 50 {
            hung.extend(keeper.take());
            std::thread::yield_now();
        }
        hung.sort_by_key(|hangup| hangup.id);
        assert_eq!(hung[9], Hangup { slot: 7, id: 9, serial: 10, refused: false });
        keeper.remove_slot(7);
        // SAFETY: as above; the end of the stream comes when the keeper has closed its end.
        let n = unsafe { libc::recv(ours[0].as_raw_fd(), bytes.as_mut_ptr().cast(), 8, 0) };
        assert_eq!(n, 0);
    }
}
