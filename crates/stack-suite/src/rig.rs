//! A stack on the bench, and what was reported by it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netkernel_service::{
    Connect, Datagram, Errno, GuestBytes, Handle, Readiness, Received, ReceivedDatagram, Segments, SendFlags,
    SocketAddress, Stack, now_ns,
};

use crate::Subject;

const WATCHDOG: Duration = Duration::from_secs(30);

/// A stack with its sockets' keys and reports.
pub struct Rig {
    pub stack: Box<dyn Stack>,
    pub v4: SocketAddr,
    pub v6: Option<SocketAddr>,
    keys: u64,
    key_of: HashMap<u32, u64>,
    reports: HashMap<u64, Readiness>,
    /// What was offered last by each socket: it stays where it is until the next `send`, as in a guest's ring. Dropped
    /// after the stack.
    offers: HashMap<u32, Vec<u8>>,
}

impl Rig {
    pub fn new(subject: Subject) -> Rig {
        Rig {
            stack: subject.stack,
            v4: (subject.v4, 0).into(),
            v6: subject.v6.map(|address| (address, 0).into()),
            keys: 100,
            key_of: HashMap::new(),
            reports: HashMap::new(),
            offers: HashMap::new(),
        }
    }

    fn key(&mut self) -> u64 {
        self.keys += 1;
        self.keys
    }

    pub fn open(&mut self, domain: i32, kind: i32) -> Handle {
        let key = self.key();
        let handle = self.stack.open(key, domain, kind, 0).expect("open");
        self.key_of.insert(handle.0, key);
        handle
    }

    pub fn stream(&mut self) -> Handle {
        self.open(libc::AF_INET, libc::SOCK_STREAM)
    }

    pub fn datagram(&mut self) -> Handle {
        self.open(libc::AF_INET, libc::SOCK_DGRAM)
    }

    /// One turn of a switch thread: takes the reports.
    pub fn turn(&mut self) {
        self.reports_of_a_turn();
    }

    /// How many there were.
    fn reports_of_a_turn(&mut self) -> usize {
        let mut ready = Vec::new();
        self.stack.poll(&mut ready, 256);
        for report in &ready {
            let seen = self.reports.entry(report.key).or_default();
            *seen = *seen | report.readiness;
        }
        ready.len()
    }

    /// Sleeps as the engine does: until the stack's descriptor is readable, or its deadline has come, and `most` at the
    /// longest. False: neither would ever wake it.
    pub fn sleep(&mut self, most: Duration) -> bool {
        let until_due = self.stack.deadline_ns().map(|due| due.saturating_sub(now_ns()));
        let fd = self.stack.wake_fd();
        if fd.is_none() && until_due.is_none() {
            return false;
        }
        let most_ns = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        let ns = until_due.unwrap_or(u64::MAX).min(most_ns);
        let mut entry = libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 };
        let time =
            libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
        // SAFETY: one entry and the time, valid during the call; no signal mask.
        unsafe { libc::ppoll(&mut entry, 1, &time, std::ptr::null()) };
        true
    }

    /// Turns until nothing is reported any more, and nothing is due at once.
    #[track_caller]
    pub fn settle(&mut self) {
        let patience = Instant::now() + WATCHDOG;
        let mut quiet = 0;
        while quiet < 10 {
            let reports = self.reports_of_a_turn();
            let due = self.stack.deadline_ns().is_some_and(|due| due <= now_ns());
            quiet = if reports > 0 || due { 0 } else { quiet + 1 };
            assert!(Instant::now() < patience, "the stack always has something to do: the engine spins");
            if !due {
                self.sleep(Duration::from_millis(5));
            }
        }
    }

    /// Whether any of these was reported; forgets it.
    pub fn was_told(&mut self, handle: Handle, what: Readiness) -> bool {
        let key = self.key_of[&handle.0];
        let told = self.reports.get(&key).is_some_and(|seen| seen.has(what));
        if told {
            self.reports.remove(&key);
        }
        told
    }

    /// Turns until `condition` gives something.
    #[track_caller]
    pub fn until<R>(&mut self, what: &str, mut condition: impl FnMut(&mut Rig) -> Option<R>) -> R {
        let deadline = Instant::now() + WATCHDOG;
        loop {
            self.turn();
            if let Some(result) = condition(self) {
                return result;
            }
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::yield_now();
        }
    }

    /// Waits for a report of any of these, and forgets it. Sleeps meanwhile as the engine does: what does not wake it is
    /// never seen.
    #[track_caller]
    pub fn told(&mut self, handle: Handle, what: Readiness) -> Readiness {
        let key = self.key_of[&handle.0];
        let patience = Instant::now() + WATCHDOG;
        loop {
            let reports = self.reports_of_a_turn();
            if let Some(seen) = self.reports.get(&key).copied().filter(|seen| seen.has(what)) {
                self.reports.remove(&key);
                return seen;
            }
            // With reports there is another turn before the engine sleeps.
            let left = patience.saturating_duration_since(Instant::now());
            if reports == 0 {
                assert!(self.sleep(left), "nothing would wake the engine for {what:?}");
            }
            assert!(!left.is_zero(), "never reported: {what:?}");
        }
    }

    /// Forgets what was reported of a socket so far.
    pub fn forget(&mut self, handle: Handle) {
        self.turn();
        self.reports.remove(&self.key_of[&handle.0]);
    }

    pub fn bind(&mut self, handle: Handle, address: SocketAddr) -> Result<(), Errno> {
        self.stack.bind(handle, &address.into())
    }

    /// A listener on a port of the stack's choice, and its address.
    pub fn listener(&mut self, backlog: i32) -> (Handle, SocketAddr) {
        let handle = self.stream();
        self.bind(handle, self.v4).expect("bind");
        self.stack.listen(handle, backlog).expect("listen");
        (handle, self.local(handle))
    }

    pub fn local(&mut self, handle: Handle) -> SocketAddr {
        let name = self.stack.local_name(handle).expect("a local name");
        name.to_std().expect("an address")
    }

    pub fn peer(&mut self, handle: Handle) -> SocketAddr {
        let name = self.stack.peer_name(handle).expect("a peer's name");
        name.to_std().expect("an address")
    }

    /// Connects and waits for the end of it.
    #[track_caller]
    pub fn connect(&mut self, handle: Handle, to: SocketAddr) -> Result<(), Errno> {
        match self.stack.connect(handle, &to.into())? {
            Connect::Done => Ok(()),
            Connect::Begun => {
                self.told(handle, Readiness::WRITE | Readiness::ERROR);
                self.stack.take_error(handle)
            }
        }
    }

    #[track_caller]
    pub fn accept(&mut self, listener: Handle) -> (Handle, SocketAddr) {
        let key = self.key();
        let accepted = self.until("a connection to accept", |rig| match rig.stack.accept(listener, key) {
            Ok(accepted) => Some(accepted),
            Err(errno) => {
                assert!(errno.would_block(), "accept: {errno:?}");
                None
            }
        });
        self.key_of.insert(accepted.handle.0, key);
        (accepted.handle, accepted.peer.to_std().expect("the peer's address"))
    }

    /// Two connected ends: who connected, and who accepted.
    #[track_caller]
    pub fn pair(&mut self) -> (Handle, Handle) {
        let (listener, address) = self.listener(8);
        let client = self.stream();
        self.connect(client, address).expect("connect");
        let (server, _) = self.accept(listener);
        self.stack.close(listener, netkernel_service::Close::Graceful);
        (client, server)
    }

    pub fn send(&mut self, handle: Handle, data: &[u8]) -> Result<usize, Errno> {
        let mut copy = data.to_vec();
        let result = self.stack.send(handle, &segments(&mut copy), SendFlags::default());
        self.offers.insert(handle.0, copy);
        result
    }

    /// All of it, however many turns it takes. What was not taken is offered again, as ServiceLib does.
    #[track_caller]
    pub fn send_all(&mut self, handle: Handle, data: &[u8]) {
        let mut sent = 0;
        while sent < data.len() {
            match self.send(handle, &data[sent..]) {
                Ok(n) => sent += n,
                Err(errno) => {
                    assert!(errno.would_block(), "send: {errno:?}");
                    self.told(handle, Readiness::WRITE);
                }
            }
        }
    }

    pub fn recv(&mut self, handle: Handle, into: &mut [u8]) -> Result<Received, Errno> {
        self.stack.recv(handle, &segments(into))
    }

    /// Waits for bytes, the end, or an error.
    #[track_caller]
    pub fn wait_recv(&mut self, handle: Handle, into: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match self.recv(handle, into) {
                Ok(received) => return Ok(received.bytes),
                Err(errno) if errno.would_block() => {
                    self.told(handle, Readiness::READ);
                }
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Everything up to the end of the stream.
    #[track_caller]
    pub fn recv_all(&mut self, handle: Handle) -> Vec<u8> {
        let (mut all, mut some) = (Vec::new(), vec![0; 20_000]);
        loop {
            match self.wait_recv(handle, &mut some).expect("recv") {
                0 => return all,
                n => all.extend_from_slice(&some[..n]),
            }
        }
    }

    pub fn send_to(&mut self, handle: Handle, data: &[u8], to: Option<SocketAddr>) -> Result<(), Errno> {
        let mut copy = data.to_vec();
        let to = to.map_or_else(SocketAddress::default, SocketAddress::from);
        let datagram = Datagram { data: segments(&mut copy), to, control: &[] };
        self.stack.send_datagrams(handle, &[datagram]).map(|sent| assert_eq!(sent, 1))
    }

    #[track_caller]
    pub fn recv_from(&mut self, handle: Handle) -> Result<(Vec<u8>, SocketAddr), Errno> {
        let mut into = vec![0; 65536];
        let mut control = [0; 512];
        loop {
            match self.stack.recv_datagram(handle, &segments(&mut into), &mut control) {
                Ok(ReceivedDatagram { bytes, from, .. }) => {
                    return Ok((into[..bytes].to_vec(), from.to_std().expect("a sender")));
                }
                Err(errno) if errno.would_block() => {
                    self.told(handle, Readiness::READ | Readiness::ERROR);
                }
                Err(errno) => return Err(errno),
            }
        }
    }

    pub fn option(&mut self, handle: Handle, level: i32, name: i32) -> Result<i32, Errno> {
        let mut out = [0; 4];
        let n = self.stack.option(handle, level, name, &mut out)?;
        assert_eq!(n, 4, "an int option");
        Ok(i32::from_ne_bytes(out))
    }

    pub fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: i32) -> Result<(), Errno> {
        self.stack.set_option(handle, level, name, &value.to_ne_bytes())
    }
}

/// Two runs of guest memory, with bytes around each that nobody may touch.
pub(crate) struct Guest {
    /// A margin, the first run, a margin, the second run, a margin.
    memory: Arc<[AtomicU8]>,
    first: usize,
    second: usize,
}

const MARGIN: usize = 64;
const CANARY: u8 = 0x5c;

impl Guest {
    pub fn new(first: usize, second: usize, byte: u8) -> Guest {
        let bytes = std::iter::repeat_with(|| AtomicU8::new(CANARY));
        let memory = bytes.take(first + second + 3 * MARGIN).collect();
        let guest = Guest { memory, first, second };
        guest.fill(&vec![byte; first + second]);
        guest
    }

    /// The bytes of both runs.
    fn cells(&self) -> impl Iterator<Item = &AtomicU8> {
        let second = self.first + 2 * MARGIN;
        self.memory[MARGIN..MARGIN + self.first].iter().chain(&self.memory[second..second + self.second])
    }

    pub fn fill(&self, data: &[u8]) {
        for (cell, &byte) in self.cells().zip(data) {
            cell.store(byte, Relaxed);
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.cells().map(|cell| cell.load(Relaxed)).collect()
    }

    /// Lives as long as the value: for calls that it outlives.
    pub fn segments(&self) -> Segments {
        let run = |at: usize, len: usize| {
            // SAFETY: inside the memory, whose cells may be written through a shared reference; callers keep the value for
            // longer than they use the runs.
            unsafe { GuestBytes::new(self.memory[at..].as_ptr().cast_mut().cast(), len) }
        };
        Segments { first: run(MARGIN, self.first), second: run(self.first + 2 * MARGIN, self.second) }
    }

    pub fn is_unharmed(&self) -> bool {
        let second = self.first + 2 * MARGIN;
        let margins = [0..MARGIN, MARGIN + self.first..second, second + self.second..self.memory.len()];
        margins.into_iter().all(|margin| self.memory[margin].iter().all(|cell| cell.load(Relaxed) == CANARY))
    }

    /// A thread that writes into the runs of both, as a hostile guest.
    pub fn scribble(&self, other: &Guest) -> Scribbler {
        let stop = Arc::new(AtomicBool::new(false));
        let own = |guest: &Guest| Guest { memory: guest.memory.clone(), ..*guest };
        let (guests, told) = ([own(self), own(other)], stop.clone());
        let thread = std::thread::spawn(move || {
            let mut byte = 0u8;
            while !told.load(Relaxed) {
                for guest in &guests {
                    byte = byte.wrapping_add(1);
                    guest.fill(&vec![byte; guest.first + guest.second]);
                }
                std::thread::yield_now();
            }
        });
        Scribbler { stop, thread: Some(thread) }
    }
}

/// Ends with the value.
pub(crate) struct Scribbler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Scribbler {
    pub fn end(self) {}
}

impl Drop for Scribbler {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The bytes as guest memory, in two runs, as a ring that wraps has them.
pub(crate) fn segments(bytes: &mut [u8]) -> Segments {
    let (first, second) = bytes.split_at_mut(bytes.len() / 3);
    // SAFETY: a stack uses the runs during the call only, for which the caller's borrow lasts.
    let run = |bytes: &mut [u8]| unsafe { GuestBytes::new(bytes.as_mut_ptr(), bytes.len()) };
    if first.is_empty() {
        return Segments { first: run(second), second: GuestBytes::EMPTY };
    }
    Segments { first: run(first), second: run(second) }
}
