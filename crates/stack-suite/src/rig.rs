//! A stack on the bench, and what was reported by it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use netkernel_service::{
    Connect, Datagram, Errno, GuestBytes, Handle, Readiness, Received, ReceivedDatagram, Segments, SendFlags,
    SocketAddress, Stack,
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
        let mut ready = Vec::new();
        self.stack.poll(&mut ready, 256);
        for report in ready {
            let seen = self.reports.entry(report.key).or_default();
            *seen = *seen | report.readiness;
        }
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

    /// Waits for a report of any of these, and forgets it.
    #[track_caller]
    pub fn told(&mut self, handle: Handle, what: Readiness) -> Readiness {
        let key = self.key_of[&handle.0];
        self.until(&format!("a report of {what:?}"), |rig| {
            let seen = rig.reports.get(&key).copied().filter(|seen| seen.has(what));
            seen.inspect(|_| _ = rig.reports.remove(&key))
        })
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
        self.stack.send(handle, &segments(&mut copy), SendFlags::default())
    }

    /// All of it, however many turns it takes.
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

/// The bytes as guest memory, in two runs, as a ring that wraps has them.
fn segments(bytes: &mut [u8]) -> Segments {
    let (first, second) = bytes.split_at_mut(bytes.len() / 3);
    // SAFETY: a stack uses the runs during the call only, for which the caller's borrow lasts.
    let run = |bytes: &mut [u8]| unsafe { GuestBytes::new(bytes.as_mut_ptr(), bytes.len()) };
    if first.is_empty() {
        return Segments { first: run(second), second: GuestBytes::EMPTY };
    }
    Segments { first: run(first), second: run(second) }
}
