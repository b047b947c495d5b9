//! A stack that answers as the input says. It touches all the memory that it is given, so that a sanitizer sees what is not
//! the region's, and it panics when ServiceLib uses a handle that it does not have.

use std::collections::{HashMap, VecDeque};

use netkernel_service::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Readiness, Ready, Received, ReceivedDatagram,
    Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram,
};

const ERRORS: [i32; 8] = [
    libc::EAGAIN,
    libc::ECONNRESET,
    libc::ENOBUFS,
    libc::EADDRINUSE,
    libc::EPIPE,
    libc::EINVAL,
    libc::ENOMEM,
    libc::ECONNREFUSED,
];

pub(crate) struct Scripted {
    /// Decides every answer; goes round.
    script: Vec<u8>,
    at: usize,
    sockets: HashMap<u32, u64>,
    last: u32,
    /// Its service goes on from what somebody else wrote: it may take a socket for one that it is not.
    spoiled: bool,
    pub ready: VecDeque<Ready>,
}

impl Scripted {
    pub fn new(script: &[u8]) -> Scripted {
        let script = if script.is_empty() { vec![0] } else { script.to_vec() };
        Scripted { script, at: 0, sockets: HashMap::new(), last: 0, spoiled: false, ready: VecDeque::new() }
    }

    /// One that says EBADF of [`Handle::NONE`], as stacks do.
    pub fn after_spoiling(script: &[u8]) -> Scripted {
        Scripted { spoiled: true, ..Scripted::new(script) }
    }

    fn next(&mut self) -> u8 {
        self.at = (self.at + 1) % self.script.len();
        self.script[self.at]
    }

    /// One answer in eight is an error.
    fn outcome(&mut self) -> Result<(), Errno> {
        let byte = self.next();
        if byte & 7 == 7 { Err(Errno(ERRORS[usize::from(byte >> 3) % ERRORS.len()])) } else { Ok(()) }
    }

    fn known(&self, handle: Handle) -> u64 {
        if self.spoiled && handle == Handle::NONE {
            return 0;
        }
        *self.sockets.get(&handle.0).expect("an operation on a handle that was closed or never given")
    }

    fn insert(&mut self, key: u64) -> Handle {
        self.last += 1;
        self.sockets.insert(self.last, key);
        Handle(self.last)
    }

    pub fn open_sockets(&self) -> usize {
        self.sockets.len()
    }

    fn amount(&mut self, most: usize) -> usize {
        match self.next() % 4 {
            0 => most,
            1 => most.min(1),
            2 => most / 2 + 1,
            _ => most.min(usize::from(self.next()) * 17 + 1),
        }
        .min(most)
    }

    fn address(&mut self) -> SocketAddress {
        SocketAddress::from_bytes(&[2, 0, self.next(), self.next(), 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    }
}

impl Stack for Scripted {
    fn open(&mut self, key: u64, _: i32, _: i32, _: i32) -> Result<Handle, Errno> {
        self.outcome()?;
        Ok(self.insert(key))
    }

    fn close(&mut self, handle: Handle, _: Close) {
        if self.spoiled && handle == Handle::NONE {
            return;
        }
        self.sockets.remove(&handle.0).expect("closed a handle twice");
    }

    fn bind(&mut self, handle: Handle, _: &SocketAddress) -> Result<(), Errno> {
        self.known(handle);
        self.outcome()
    }

    fn listen(&mut self, handle: Handle, _: i32) -> Result<(), Errno> {
        self.known(handle);
        self.outcome()
    }

    fn connect(&mut self, handle: Handle, _: &SocketAddress) -> Result<Connect, Errno> {
        let key = self.known(handle);
        self.outcome()?;
        if handle == Handle::NONE {
            return Err(Errno(libc::EBADF));
        }
        if self.next() & 1 == 0 {
            return Ok(Connect::Done);
        }
        self.ready.push_back(Ready { key, readiness: Readiness::WRITE });
        Ok(Connect::Begun)
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        self.known(handle);
        self.outcome()
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        self.known(listener);
        if self.next() & 1 == 0 {
            return Err(Errno::AGAIN);
        }
        self.outcome()?;
        let handle = self.insert(key);
        Ok(Accepted { handle, peer: self.address() })
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        self.known(listener);
        self.next() & 1 == 1
    }

    fn send(&mut self, handle: Handle, data: &Segments, _: SendFlags) -> Result<usize, Errno> {
        self.known(handle);
        self.outcome()?;
        let mut bytes = vec![0; data.len()];
        assert_eq!(data.copy_to(&mut bytes), data.len());
        Ok(self.amount(data.len()))
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        self.known(handle);
        self.outcome()?;
        assert!(!into.is_empty(), "a receive into nothing");
        let n = if self.next() & 15 == 0 { 0 } else { self.amount(into.len().min(1 << 16)) };
        into.copy_from(&vec![self.next(); n]);
        Ok(Received { bytes: n, more: n != 0 && self.next() & 3 == 0 })
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(self.next() & 1 == 1)
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(self.next())
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        self.known(handle);
        self.outcome()?;
        for datagram in datagrams {
            let mut bytes = vec![0; datagram.data.len()];
            assert_eq!(datagram.data.copy_to(&mut bytes), bytes.len());
        }
        Ok(self.amount(datagrams.len()).max(1))
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.known(handle);
        self.outcome()?;
        let n = self.amount(into.len());
        into.copy_from(&vec![1; n]);
        let control = self.amount(control.len()) & !7;
        Ok(ReceivedDatagram { bytes: n, from: self.address(), control })
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        self.known(handle);
        self.outcome()?;
        let n = self.amount(most).max(1);
        for _ in 0..n {
            let (size, from) = (usize::from(self.next()) * usize::from(self.next()), self.address());
            take(&vec![2; size], from, &[0; 16][..usize::from(self.next() & 2) * 8]);
        }
        Ok(n)
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.known(handle);
        self.outcome()?;
        let bytes = self.amount(into.len());
        Ok(ReceivedDatagram { bytes, from: self.address(), control: self.amount(control.len()) & !7 })
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(usize::from(self.next()) * 300)
    }

    fn shutdown(&mut self, handle: Handle, _: Shutdown) -> Result<(), Errno> {
        self.known(handle);
        self.outcome()
    }

    fn set_option(&mut self, handle: Handle, _: i32, _: i32, _: &[u8]) -> Result<(), Errno> {
        self.known(handle);
        self.outcome()
    }

    fn option(&mut self, handle: Handle, _: i32, _: i32, out: &mut [u8]) -> Result<usize, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(self.amount(out.len()))
    }

    fn ioctl(&mut self, handle: Handle, _: u64) -> Result<u64, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(u64::from(self.next()))
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(self.address())
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.known(handle);
        self.outcome()?;
        Ok(self.address())
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        self.known(handle);
        self.outcome()
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        let n = budget.min(self.ready.len());
        ready.extend(self.ready.drain(..n));
    }

    fn wake_fd(&self) -> Option<i32> {
        None
    }
}
