//! A stack with a tenant's limits, for what drives a stack without ServiceLib's rings (the relay).

use std::collections::HashMap;
use std::os::fd::{OwnedFd, RawFd};

use crate::memory::now_ns;
use crate::police::Limits;
use crate::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Readiness, Ready, Received, ReceivedDatagram,
    Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram,
};

/// Most that waits in a socket of the stack for one look.
const LOOK: u64 = 64 * 1024;

/// What the tenant may not have yet would block; a report follows when it may.
pub struct Policed {
    inner: Box<dyn Stack>,
    limits: Limits,
    sockets: HashMap<u32, Socket>,
    /// Sockets to report, and when.
    waiting: Vec<(u64, u32, Readiness)>,
    /// The first of these times.
    next: u64,
}

struct Socket {
    key: u64,
    counted: bool,
}

impl Policed {
    pub fn new(inner: Box<dyn Stack>, limits: Limits) -> Policed {
        Policed { inner, limits, sockets: HashMap::new(), waiting: Vec::new(), next: u64::MAX }
    }

    fn wait(&mut self, handle: Handle, until: u64, readiness: Readiness) -> Errno {
        self.next = self.next.min(until);
        if !self.waiting.iter().any(|&(_, other, what)| other == handle.0 && what == readiness) {
            self.waiting.push((until, handle.0, readiness));
        }
        Errno::AGAIN
    }

    /// Of another program's connections, as many are counted as the tenant may have.
    fn count_again(&mut self, handle: Handle, key: u64, tells: bool) {
        let counts = self.inner.peer_name(handle).is_ok() || tells && self.inner.connecting(handle);
        let counted = counts && self.take_connection();
        self.sockets.insert(handle.0, Socket { key, counted });
    }

    fn take_connection(&self) -> bool {
        self.limits.connections.as_ref().is_none_or(|quota| quota.take())
    }

    fn give_connection_back(&self) {
        if let Some(quota) = &self.limits.connections {
            quota.give_back();
        }
    }

    /// How much may be received now.
    fn allow_receive(&mut self, handle: Handle, want: u64) -> Result<usize, Errno> {
        if self.limits.receive.is_idle() {
            return Ok(want as usize);
        }
        match self.limits.receive.allow(want, now_ns()) {
            Ok(allowed) => Ok(allowed as usize),
            Err(again) => Err(self.wait(handle, again, Readiness::READ)),
        }
    }
}

impl Drop for Policed {
    fn drop(&mut self) {
        for _ in self.sockets.values().filter(|socket| socket.counted) {
            self.give_connection_back();
        }
    }
}

impl Stack for Policed {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        let handle = self.inner.open(key, domain, kind, protocol)?;
        self.sockets.insert(handle.0, Socket { key, counted: false });
        Ok(handle)
    }

    fn close(&mut self, handle: Handle, how: Close) {
        self.inner.close(handle, how);
        self.waiting.retain(|&(_, other, _)| other != handle.0);
        if self.sockets.remove(&handle.0).is_some_and(|socket| socket.counted) {
            self.give_connection_back();
        }
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        self.inner.bind(handle, address)
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        self.inner.listen(handle, backlog)
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        let uncounted = self.sockets.get(&handle.0).is_some_and(|socket| !socket.counted);
        if uncounted {
            if !self.take_connection() {
                return Err(Errno(libc::EADDRNOTAVAIL));
            }
            if let Some(socket) = self.sockets.get_mut(&handle.0) {
                socket.counted = true;
            }
        }
        self.inner.connect(handle, address)
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        self.inner.disconnect(handle)
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        if !self.take_connection() {
            // Looked at again soon: nobody tells when another connection is over.
            return Err(self.wait(listener, now_ns() + 20_000_000, Readiness::READ));
        }
        match self.inner.accept(listener, key) {
            Ok(accepted) => {
                self.sockets.insert(accepted.handle.0, Socket { key, counted: true });
                Ok(accepted)
            }
            Err(errno) => {
                self.give_connection_back();
                Err(errno)
            }
        }
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        self.inner.acceptable(listener)
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        if self.limits.send.is_idle() {
            let sent = self.inner.send(handle, data, flags)?;
            self.limits.send.charge(sent as u64);
            return Ok(sent);
        }
        let now = now_ns();
        let allowed = match self.limits.send.allow(data.len() as u64, now) {
            Ok(allowed) => allowed as usize,
            Err(again) => return Err(self.wait(handle, again, Readiness::WRITE)),
        };
        let cut = allowed < data.len();
        let flags = SendFlags { urgent: flags.urgent && !cut, ..flags };
        let sent = self.inner.send(handle, &data.slice(0, allowed), flags)?;
        self.limits.send.take(sent as u64, now);
        if cut && sent == allowed {
            // The stack had room: it will not report.
            self.wait(handle, now, Readiness::WRITE);
        }
        Ok(sent)
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        let allowed = self.allow_receive(handle, into.len() as u64)?;
        let received = self.inner.recv(handle, &into.slice(0, allowed))?;
        self.limits.receive.charge(received.bytes as u64);
        // What was cut short may have more.
        let more = received.more || received.bytes > 0 && received.bytes == allowed;
        Ok(Received { more, ..received })
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        self.inner.at_mark(handle)
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        self.inner.recv_urgent(handle)
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        let bytes = |list: &[Datagram]| list.iter().map(|d| d.data.len() as u64).sum::<u64>();
        if !self.limits.send.is_idle()
            && let Err(again) = self.limits.send.allow(bytes(datagrams), now_ns())
        {
            return Err(self.wait(handle, again, Readiness::WRITE));
        }
        let sent = self.inner.send_datagrams(handle, datagrams)?;
        self.limits.send.charge(bytes(&datagrams[..sent.min(datagrams.len())]));
        Ok(sent)
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.allow_receive(handle, LOOK)?;
        let received = self.inner.recv_datagram(handle, into, control)?;
        self.limits.receive.charge(received.bytes as u64);
        Ok(received)
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        self.allow_receive(handle, LOOK)?;
        let mut bytes = 0;
        let n = self.inner.recv_datagrams(handle, most, &mut |data, from, control| {
            bytes += data.len() as u64;
            take(data, from, control);
        })?;
        self.limits.receive.charge(bytes);
        Ok(n)
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.inner.recv_error(handle, into, control)
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        self.inner.next_datagram(handle)
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        self.inner.shutdown(handle, how)
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        self.inner.set_option(handle, level, name, value)
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        self.inner.option(handle, level, name, out)
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        self.inner.ioctl(handle, request)
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.inner.local_name(handle)
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.inner.peer_name(handle)
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        self.inner.take_error(handle)
    }

    fn lasting(&self, handle: Handle) -> Option<RawFd> {
        self.inner.lasting(handle)
    }

    fn adopt(&mut self, key: u64, fd: OwnedFd, tells: bool) -> Result<Handle, Errno> {
        let handle = self.inner.adopt(key, fd, tells)?;
        self.count_again(handle, key, tells);
        Ok(handle)
    }

    fn resume(&mut self, key: u64, tells: bool) -> Result<Handle, Errno> {
        let handle = self.inner.resume(key, tells)?;
        self.count_again(handle, key, tells);
        Ok(handle)
    }

    fn descriptor(&self, handle: Handle) -> Option<RawFd> {
        let free = self.limits.send.is_idle() && self.limits.receive.is_idle();
        free.then(|| self.inner.descriptor(handle)).flatten()
    }

    fn moved(&mut self, received: u64, sent: u64) {
        self.limits.receive.charge(received);
        self.limits.send.charge(sent);
        self.inner.moved(received, sent);
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        if !self.waiting.is_empty() {
            let now = now_ns();
            if self.next <= now {
                let sockets = &self.sockets;
                self.waiting.retain(|&(until, handle, readiness)| {
                    if until > now {
                        return true;
                    }
                    if let Some(socket) = sockets.get(&handle) {
                        ready.push(Ready { key: socket.key, readiness });
                    }
                    false
                });
                self.next = self.waiting.iter().map(|w| w.0).min().unwrap_or(u64::MAX);
            }
        }
        self.inner.poll(ready, budget);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.inner.wake_fd()
    }

    fn way(&mut self, handle: Handle) -> Option<String> {
        self.inner.way(handle)
    }

    fn tcp_counts(&mut self, handle: Handle) -> Option<crate::TcpCounts> {
        self.inner.tcp_counts(handle)
    }

    fn deadline_ns(&self) -> Option<u64> {
        let own = (!self.waiting.is_empty()).then_some(self.next);
        [own, self.inner.deadline_ns()].into_iter().flatten().min()
    }
}
