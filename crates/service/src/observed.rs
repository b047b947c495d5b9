//! A stack with somebody who looks on: for samples of how long its calls take, and for captures.

use std::os::fd::{OwnedFd, RawFd};

use crate::stages::Histogram;
use crate::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Member, Paired, Peeked, Progress, Readiness, Ready,
    Received, ReceivedDatagram, Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram, now_ns,
};

/// What was done. Payload is told as it went: guest memory, to be copied or not looked at.
#[derive(Debug)]
pub enum Event<'a> {
    Opened(u64),
    /// By the key of the new socket.
    Accepted(u64, &'a Accepted),
    /// Before a connect, and after one that did not fail.
    Connecting(&'a SocketAddress),
    Connected(&'a SocketAddress),
    Bound,
    Listening,
    /// Before it.
    Closing(Close),
    /// Bytes of the stream that the stack took, or gave.
    Sent(&'a Segments),
    Received(&'a Segments),
    /// The peer will send no more.
    Ended,
    /// The connection broke.
    Broke,
    SentDatagrams(&'a [Datagram<'a>]),
    ReceivedDatagram(Payload<'a>, SocketAddress),
    ShutDown(Shutdown),
    /// Before the socket is given away.
    Giving,
}

#[derive(Debug)]
pub enum Payload<'a> {
    Guest(Segments),
    Bytes(&'a [u8]),
}

/// Who looks on.
pub trait Observer: Send {
    /// A call begins, and ends.
    fn begin(&mut self) {}
    fn end(&mut self) {}
    /// It must see all payload: datagrams that are received several at a time are copied for it, and nothing is moved past it.
    fn wants_payload(&self) -> bool {
        false
    }
    /// Something was done with this socket.
    fn saw(&mut self, _stack: &mut dyn Stack, _handle: Handle, _event: Event<'_>) {}
}

/// Passes everything on.
pub struct Observed<S, O> {
    pub stack: S,
    pub observer: O,
}

/// The stack behind it, however it is held.
pub trait Held: Send {
    fn get(&mut self) -> &mut dyn Stack;
    fn see(&self) -> &dyn Stack;
}

impl Held for Box<dyn Stack> {
    fn get(&mut self) -> &mut dyn Stack {
        &mut **self
    }
    fn see(&self) -> &dyn Stack {
        &**self
    }
}

impl<'b> Held for &mut (dyn Stack + 'b) {
    fn get(&mut self) -> &mut dyn Stack {
        &mut **self
    }
    fn see(&self) -> &dyn Stack {
        &**self
    }
}

/// Records how long calls take.
pub struct Timer<'a> {
    pub histogram: &'a mut Histogram,
    /// Of all calls together, nanoseconds.
    pub spent_ns: &'a mut u64,
    pub begun_ns: u64,
}

impl Observer for Timer<'_> {
    fn begin(&mut self) {
        self.begun_ns = now_ns();
    }

    fn end(&mut self) {
        let took = now_ns().saturating_sub(self.begun_ns);
        self.histogram.record(took);
        *self.spent_ns += took;
    }
}

impl<S: Held, O: Observer> Observed<S, O> {
    fn timed<R>(&mut self, call: impl FnOnce(&mut dyn Stack) -> R) -> R {
        self.observer.begin();
        let result = call(self.stack.get());
        self.observer.end();
        result
    }

    fn tell(&mut self, handle: Handle, event: Event<'_>) {
        self.observer.saw(self.stack.get(), handle, event);
    }
}

impl<S: Held, O: Observer> Stack for Observed<S, O> {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        let handle = self.timed(|stack| stack.open(key, domain, kind, protocol))?;
        self.tell(handle, Event::Opened(key));
        Ok(handle)
    }

    fn close(&mut self, handle: Handle, how: Close) {
        self.tell(handle, Event::Closing(how));
        self.timed(|stack| stack.close(handle, how));
    }

    fn give(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        self.tell(handle, Event::Giving);
        self.timed(|stack| stack.give(handle))
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        self.timed(|stack| stack.bind(handle, address))?;
        self.tell(handle, Event::Bound);
        Ok(())
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        self.timed(|stack| stack.listen(handle, backlog))?;
        self.tell(handle, Event::Listening);
        Ok(())
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        self.tell(handle, Event::Connecting(address));
        let connect = self.timed(|stack| stack.connect(handle, address))?;
        self.tell(handle, Event::Connected(address));
        Ok(connect)
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        self.tell(handle, Event::Closing(Close::Abort));
        self.timed(|stack| stack.disconnect(handle))
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let accepted = self.timed(|stack| stack.accept(listener, key))?;
        self.tell(accepted.handle, Event::Accepted(key, &accepted));
        Ok(accepted)
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        self.stack.get().acceptable(listener)
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        let sent = self.timed(|stack| stack.send(handle, data, flags));
        match sent {
            Ok(n) => self.tell(handle, Event::Sent(&data.slice(0, n.min(data.len())))),
            Err(errno) if !errno.would_block() => self.tell(handle, Event::Broke),
            Err(_) => {}
        }
        sent
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        let received = self.timed(|stack| stack.recv(handle, into));
        match received {
            Ok(Received { bytes: 0, .. }) => self.tell(handle, Event::Ended),
            Ok(Received { bytes, .. }) => {
                self.tell(handle, Event::Received(&into.slice(0, bytes.min(into.len()))));
            }
            Err(errno) if !errno.would_block() => self.tell(handle, Event::Broke),
            Err(_) => {}
        }
        received
    }

    fn peek(&mut self, handle: Handle, skip: usize, into: &Segments) -> Peeked {
        let peeked = self.timed(|stack| stack.peek(handle, skip, into));
        match peeked {
            Peeked::Bytes(Received { bytes, .. }) => {
                self.tell(handle, Event::Received(&into.slice(0, bytes.min(into.len()))));
            }
            Peeked::End => self.tell(handle, Event::Ended),
            Peeked::Failed(errno) if !errno.would_block() => self.tell(handle, Event::Broke),
            Peeked::Nothing | Peeked::Failed(_) | Peeked::Unable => {}
        }
        peeked
    }

    fn discard(&mut self, handle: Handle, bytes: usize) -> Result<(), Errno> {
        self.timed(|stack| stack.discard(handle, bytes))
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        self.stack.get().at_mark(handle)
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        self.timed(|stack| stack.recv_urgent(handle))
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        let sent = self.timed(|stack| stack.send_datagrams(handle, datagrams))?;
        self.tell(handle, Event::SentDatagrams(&datagrams[..sent.min(datagrams.len())]));
        Ok(sent)
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let received = self.timed(|stack| stack.recv_datagram(handle, into, control))?;
        let payload = Payload::Guest(into.slice(0, received.bytes.min(into.len())));
        self.tell(handle, Event::ReceivedDatagram(payload, received.from));
        Ok(received)
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        let mut copies: Vec<(Vec<u8>, SocketAddress)> = Vec::new();
        let copying = self.observer.wants_payload();
        let n = self.timed(|stack| {
            stack.recv_datagrams(handle, most, &mut |data, from, control| {
                if copying {
                    copies.push((data.to_vec(), from));
                }
                take(data, from, control);
            })
        })?;
        for (data, from) in &copies {
            self.tell(handle, Event::ReceivedDatagram(Payload::Bytes(data), *from));
        }
        Ok(n)
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.timed(|stack| stack.recv_error(handle, into, control))
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        self.stack.get().next_datagram(handle)
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        self.timed(|stack| stack.shutdown(handle, how))?;
        self.tell(handle, Event::ShutDown(how));
        Ok(())
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        self.timed(|stack| stack.set_option(handle, level, name, value))
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        self.timed(|stack| stack.option(handle, level, name, out))
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        self.timed(|stack| stack.ioctl(handle, request))
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.stack.get().local_name(handle)
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.stack.get().peer_name(handle)
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        self.stack.get().take_error(handle)
    }

    fn descriptor(&self, handle: Handle) -> Option<RawFd> {
        if self.observer.wants_payload() { None } else { self.stack.see().descriptor(handle) }
    }

    fn moved(&mut self, received: u64, sent: u64) {
        self.stack.get().moved(received, sent);
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        self.stack.get().poll(ready, budget);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.stack.see().wake_fd()
    }

    fn wakes_always(&self) -> bool {
        self.stack.see().wakes_always()
    }

    fn connected(&mut self, handle: Handle, readiness: Readiness) -> Result<bool, Errno> {
        self.stack.get().connected(handle, readiness)
    }

    fn guest(&mut self, guest: u32, owner: u32) {
        self.stack.get().guest(guest, owner);
    }

    fn member(&mut self, guest: u32, member: Member) {
        self.stack.get().member(guest, member);
    }

    fn guest_over(&mut self, guest: u32) {
        self.stack.get().guest_over(guest);
    }

    fn paired(&mut self, handle: Handle) -> Option<Paired> {
        self.stack.get().paired(handle)
    }

    fn wake_peer(&mut self, handle: Handle, urgent: bool) {
        self.stack.get().wake_peer(handle, urgent);
    }

    fn pair_memory(&mut self, guest: u32, number: u32) -> Option<OwnedFd> {
        self.stack.get().pair_memory(guest, number)
    }

    fn way(&mut self, handle: Handle) -> Option<String> {
        self.stack.get().way(handle)
    }

    fn tcp_counts(&mut self, handle: Handle) -> Option<crate::TcpCounts> {
        self.stack.get().tcp_counts(handle)
    }

    fn lasting(&self, handle: Handle) -> Option<RawFd> {
        self.stack.see().lasting(handle)
    }

    fn takes(&self) -> bool {
        self.stack.see().takes()
    }

    fn movable(&self, handle: Handle) -> bool {
        self.stack.see().movable(handle)
    }

    fn part(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        let fd = self.stack.get().part(handle)?;
        self.tell(handle, Event::Giving);
        Ok(fd)
    }

    fn adopt(&mut self, key: u64, fd: OwnedFd, tells: bool) -> Result<Handle, Errno> {
        let handle = self.stack.get().adopt(key, fd, tells)?;
        self.tell(handle, Event::Opened(key));
        Ok(handle)
    }

    fn leave(&mut self, guest: u32) -> Option<Box<dyn crate::Remains>> {
        self.stack.get().leave(guest)
    }

    fn take_up(&mut self, guest: u32, left: &str) {
        self.stack.get().take_up(guest, left);
    }

    fn resume(&mut self, key: u64, tells: bool) -> Result<Handle, Errno> {
        let handle = self.stack.get().resume(key, tells)?;
        self.tell(handle, Event::Opened(key));
        Ok(handle)
    }

    fn progress(&mut self, handle: Handle, connected: bool) -> Option<Progress> {
        self.stack.get().progress(handle, connected)
    }

    fn connecting(&mut self, handle: Handle) -> bool {
        self.stack.get().connecting(handle)
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.stack.see().deadline_ns()
    }
}
