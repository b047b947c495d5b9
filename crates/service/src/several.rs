//! Several stacks as one: for a guest that was put on another stack and has sockets that could not go along.

use std::cell::Cell;
use std::os::fd::{OwnedFd, RawFd};

use crate::observed::Held;
use crate::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Member, Paired, Peeked, Progress, Ready, Received,
    ReceivedDatagram, Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram,
};

/// Bits of a handle that are the stack's own.
const OWN_BITS: u32 = 24;
const OWN: u32 = (1 << OWN_BITS) - 1;
/// No more stacks than this: the last number would make [`Handle::NONE`].
pub const MOST_STACKS: usize = 255;

impl Handle {
    /// Which of [`Several`] stacks has the socket: 0 is the one that new sockets are opened in.
    pub fn place(self) -> usize {
        if self == Handle::NONE { 0 } else { (self.0 >> OWN_BITS) as usize }
    }

    /// The same socket, of the stack at this place. `None`: such a handle cannot be.
    pub fn at(self, place: usize) -> Option<Handle> {
        let own = self.own();
        (place < MOST_STACKS && own != Handle::NONE).then_some(Handle((place as u32) << OWN_BITS | own.0))
    }

    /// As the stack itself calls it.
    pub fn own(self) -> Handle {
        if self == Handle::NONE { self } else { Handle(self.0 & OWN) }
    }
}

/// Stacks by their places in handles. New sockets are opened in the first one; what a listener accepts is of its stack.
pub struct Several<S> {
    pub stacks: Vec<Option<S>>,
    /// Whose descriptor was asked for last.
    asked: Cell<usize>,
}

impl<S: Held> Several<S> {
    pub fn new(stacks: Vec<Option<S>>) -> Several<S> {
        Several { stacks, asked: Cell::new(0) }
    }

    fn first(&mut self) -> Result<&mut dyn Stack, Errno> {
        self.stacks.first_mut().and_then(Option::as_mut).map(Held::get).ok_or(Errno(libc::ENETDOWN))
    }

    fn of(&mut self, handle: Handle) -> Result<(&mut dyn Stack, Handle), Errno> {
        let stack = self.stacks.get_mut(handle.place()).and_then(Option::as_mut);
        stack.map(|stack| (stack.get(), handle.own())).ok_or(Errno(libc::EBADF))
    }

    fn see(&self, handle: Handle) -> Option<(&dyn Stack, Handle)> {
        let stack = self.stacks.get(handle.place())?.as_ref()?;
        Some((stack.see(), handle.own()))
    }

    fn all(&mut self) -> impl Iterator<Item = &mut dyn Stack> {
        self.stacks.iter_mut().flatten().map(Held::get)
    }
}

/// Calls the socket's stack.
macro_rules! pass {
    ($self:ident, $handle:ident, $call:ident ( $($argument:expr),* )) => {{
        let (stack, own) = $self.of($handle)?;
        stack.$call(own $(, $argument)*)
    }};
}

impl<S: Held> Stack for Several<S> {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        let stack = self.first()?;
        let handle = stack.open(key, domain, kind, protocol)?;
        if handle.place() != 0 {
            // More sockets than can be told apart.
            stack.close(handle, Close::Abort);
            return Err(Errno(libc::ENFILE));
        }
        Ok(handle)
    }

    fn close(&mut self, handle: Handle, how: Close) {
        if let Ok((stack, own)) = self.of(handle) {
            stack.close(own, how);
        }
    }

    fn give(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        pass!(self, handle, give())
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        pass!(self, handle, bind(address))
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        pass!(self, handle, listen(backlog))
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        pass!(self, handle, connect(address))
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        pass!(self, handle, disconnect())
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let (stack, own) = self.of(listener)?;
        let accepted = stack.accept(own, key)?;
        let placed = (accepted.handle.place() == 0).then(|| accepted.handle.at(listener.place())).flatten();
        let Some(handle) = placed else {
            stack.close(accepted.handle, Close::Abort);
            return Err(Errno(libc::ECONNABORTED));
        };
        Ok(Accepted { handle, ..accepted })
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        self.of(listener).is_ok_and(|(stack, own)| stack.acceptable(own))
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        pass!(self, handle, send(data, flags))
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        pass!(self, handle, recv(into))
    }

    fn peek(&mut self, handle: Handle, skip: usize, into: &Segments) -> Peeked {
        self.of(handle).map_or(Peeked::Unable, |(stack, own)| stack.peek(own, skip, into))
    }

    fn discard(&mut self, handle: Handle, bytes: usize) -> Result<(), Errno> {
        pass!(self, handle, discard(bytes))
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        pass!(self, handle, at_mark())
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        pass!(self, handle, recv_urgent())
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        pass!(self, handle, send_datagrams(datagrams))
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        pass!(self, handle, recv_datagram(into, control))
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        pass!(self, handle, recv_datagrams(most, take))
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        pass!(self, handle, recv_error(into, control))
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        pass!(self, handle, next_datagram())
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        pass!(self, handle, shutdown(how))
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        pass!(self, handle, set_option(level, name, value))
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        pass!(self, handle, option(level, name, out))
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        pass!(self, handle, ioctl(request))
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        pass!(self, handle, local_name())
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        pass!(self, handle, peer_name())
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        pass!(self, handle, take_error())
    }

    fn descriptor(&self, handle: Handle) -> Option<RawFd> {
        self.asked.set(handle.place());
        let (stack, own) = self.see(handle)?;
        stack.descriptor(own)
    }

    /// Follows [`Stack::descriptor`].
    fn moved(&mut self, received: u64, sent: u64) {
        let asked = self.asked.get();
        if let Some(stack) = self.stacks.get_mut(asked).and_then(Option::as_mut) {
            stack.get().moved(received, sent);
        }
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        let most = ready.len() + budget;
        for stack in self.all() {
            stack.poll(ready, most.saturating_sub(ready.len()));
        }
    }

    /// There is none for all of them: who drives this asks each.
    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn guest(&mut self, guest: u32, owner: u32) {
        self.all().for_each(|stack| stack.guest(guest, owner));
    }

    fn member(&mut self, guest: u32, member: Member) {
        self.all().for_each(|stack| stack.member(guest, member.clone()));
    }

    fn guest_over(&mut self, guest: u32) {
        self.all().for_each(|stack| stack.guest_over(guest));
    }

    fn paired(&mut self, handle: Handle) -> Option<Paired> {
        let (stack, own) = self.of(handle).ok()?;
        stack.paired(own)
    }

    fn wake_peer(&mut self, handle: Handle, urgent: bool) {
        if let Ok((stack, own)) = self.of(handle) {
            stack.wake_peer(own, urgent);
        }
    }

    fn pair_memory(&mut self, guest: u32, number: u32) -> Option<OwnedFd> {
        self.all().find_map(|stack| stack.pair_memory(guest, number))
    }

    fn way(&mut self, handle: Handle) -> Option<String> {
        let (stack, own) = self.of(handle).ok()?;
        stack.way(own)
    }

    fn tcp_counts(&mut self, handle: Handle) -> Option<crate::TcpCounts> {
        let (stack, own) = self.of(handle).ok()?;
        stack.tcp_counts(own)
    }

    fn lasting(&self, handle: Handle) -> Option<RawFd> {
        let (stack, own) = self.see(handle)?;
        stack.lasting(own)
    }

    fn movable(&self, handle: Handle) -> bool {
        self.see(handle).is_some_and(|(stack, own)| stack.movable(own))
    }

    fn part(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        pass!(self, handle, part())
    }

    fn takes(&self) -> bool {
        self.see(Handle(0)).is_some_and(|(stack, _)| stack.takes())
    }

    /// Of the only one: what stayed on others cannot go on.
    fn leave(&mut self, guest: u32) -> Option<Box<dyn crate::Remains>> {
        if self.all().count() > 1 {
            return None;
        }
        self.first().ok()?.leave(guest)
    }

    fn take_up(&mut self, guest: u32, left: &str) {
        if let Ok(stack) = self.first() {
            stack.take_up(guest, left);
        }
    }

    fn resume(&mut self, key: u64, tells: bool) -> Result<Handle, Errno> {
        let stack = self.first()?;
        let handle = stack.resume(key, tells)?;
        if handle.place() != 0 {
            stack.close(handle, Close::Abort);
            return Err(Errno(libc::ENFILE));
        }
        Ok(handle)
    }

    fn adopt(&mut self, key: u64, fd: OwnedFd, tells: bool) -> Result<Handle, Errno> {
        let stack = self.first()?;
        let handle = stack.adopt(key, fd, tells)?;
        if handle.place() != 0 {
            stack.close(handle, Close::Graceful);
            return Err(Errno(libc::ENFILE));
        }
        Ok(handle)
    }

    fn progress(&mut self, handle: Handle, connected: bool) -> Option<Progress> {
        let (stack, own) = self.of(handle).ok()?;
        stack.progress(own, connected)
    }

    fn connecting(&mut self, handle: Handle) -> bool {
        self.of(handle).is_ok_and(|(stack, own)| stack.connecting(own))
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.stacks.iter().flatten().filter_map(|stack| stack.see().deadline_ns()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_says_which_stack_has_the_socket() {
        for (own, place) in [(0, 0), (5, 0), (0, 1), (OWN, 3), (OWN - 1, MOST_STACKS - 1)] {
            let handle = Handle(own).at(place).unwrap();
            assert_eq!((handle.own(), handle.place()), (Handle(own), place));
            assert_ne!(handle, Handle::NONE);
            assert_eq!(handle.at(0), Some(Handle(own)));
        }
        assert_eq!((Handle::NONE.place(), Handle::NONE.own(), Handle::NONE.at(1)), (0, Handle::NONE, None));
        assert_eq!(Handle(1).at(MOST_STACKS), None);
    }
}
