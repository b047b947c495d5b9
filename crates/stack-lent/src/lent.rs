use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::sync_channel;

use netkernel_service::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Ready, Received, ReceivedDatagram, Segments,
    SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram,
};

use crate::Shared;
use crate::lender::{Kept, OwnDatagram, segments};

/// Bytes that one operation carries at most.
const MOST: usize = 256 << 10;
/// Longest datagram, and its control messages.
const DATAGRAM: usize = 65536;
const GONE: Errno = Errno(libc::ENETDOWN);

/// A borrowed stack.
pub struct Lent {
    shared: Arc<Shared>,
    /// The upper half of the keys that the borrower uses.
    upper: u64,
    /// Memory that payload travels in.
    spare: RefCell<Vec<u8>>,
}

impl Lent {
    pub(crate) fn new(shared: Arc<Shared>) -> Lent {
        Lent { shared, upper: 0, spare: RefCell::default() }
    }

    /// Has it done by the thread of the stack. `None`: it does nothing any more.
    fn ask<R: Send + 'static>(
        &self,
        what: impl FnOnce(&mut dyn Stack, &mut Kept) -> R + Send + 'static,
    ) -> Option<R> {
        let (answer, answered) = sync_channel(1);
        self.tell(move |stack, kept| _ = answer.send(what(stack, kept)));
        // A call that is dropped undone ends this, too.
        answered.recv().ok()
    }

    fn tell(&self, what: impl FnOnce(&mut dyn Stack, &mut Kept) + Send + 'static) {
        if self.shared.gone.load(SeqCst) {
            return;
        }
        self.shared.calls.push(Box::new(what));
        // The lender may have gone between the look and the push, and emptied the queue before.
        if self.shared.gone.load(SeqCst) {
            crate::lock(&self.shared.calls.queue).clear();
        }
    }

    fn try_ask<R: Send + 'static>(
        &self,
        what: impl FnOnce(&mut dyn Stack, &mut Kept) -> Result<R, Errno> + Send + 'static,
    ) -> Result<R, Errno> {
        self.ask(what).unwrap_or(Err(GONE))
    }

    fn memory(&self, bytes: usize) -> Vec<u8> {
        let mut memory = self.spare.take();
        if memory.len() < bytes {
            memory.resize(bytes, 0);
        } else {
            memory.truncate(bytes.max(DATAGRAM));
        }
        memory
    }

    fn take_back(&self, memory: Vec<u8>) {
        self.spare.replace(memory);
    }
}

impl Drop for Lent {
    /// Nobody would close what is left.
    fn drop(&mut self) {
        self.tell(|stack, kept| kept.give_back(stack));
    }
}

impl Stack for Lent {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        self.upper = key >> 32 << 32;
        self.try_ask(move |stack, kept| kept.open(stack, key, [domain, kind, protocol]))
    }

    fn resume(&mut self, key: u64, tells: bool) -> Result<Handle, Errno> {
        self.upper = key >> 32 << 32;
        self.try_ask(move |stack, kept| kept.resume(stack, key, tells))
    }

    fn close(&mut self, handle: Handle, how: Close) {
        self.tell(move |stack, kept| kept.close(stack, handle, how));
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        let address = *address;
        self.try_ask(move |stack, _| stack.bind(handle, &address))
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        self.try_ask(move |stack, _| stack.listen(handle, backlog))
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        let address = *address;
        self.try_ask(move |stack, _| stack.connect(handle, &address))
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        self.try_ask(move |stack, kept| kept.disconnect(stack, handle))
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        self.try_ask(move |stack, kept| kept.accept(stack, listener, key))
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        self.ask(move |stack, _| stack.acceptable(listener)).unwrap_or(false)
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        let bytes = data.len().min(MOST);
        let flags = SendFlags { urgent: flags.urgent && bytes == data.len(), ..flags };
        let mut copy = self.memory(bytes);
        copy.truncate(bytes);
        data.copy_to(&mut copy);
        let answer = self.ask(move |stack, kept| kept.send(stack, handle, copy, flags));
        let (sent, memory) = answer.ok_or(GONE)?;
        self.take_back(memory);
        sent
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        let bytes = into.len().min(MOST);
        let mut memory = self.memory(bytes);
        let answer = self.ask(move |stack, _| {
            let received = stack.recv(handle, &segments(&mut memory[..bytes]));
            (received, memory)
        });
        let (received, memory) = answer.ok_or(GONE)?;
        if let Ok(received) = &received {
            into.copy_from(&memory[..received.bytes.min(bytes)]);
        }
        self.take_back(memory);
        received
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        self.try_ask(move |stack, _| stack.at_mark(handle))
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        self.try_ask(move |stack, _| stack.recv_urgent(handle))
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        let own = |datagram: &Datagram| {
            // One that is too long stays so, and is refused by the stack.
            let mut data = vec![0; datagram.data.len().min(DATAGRAM + 1)];
            datagram.data.copy_to(&mut data);
            OwnDatagram { data, to: datagram.to, control: datagram.control.to_vec() }
        };
        let mut list: Vec<OwnDatagram> = datagrams.iter().map(own).collect();
        self.try_ask(move |stack, _| {
            let list: Vec<Datagram> = list
                .iter_mut()
                .map(|own| Datagram { data: segments(&mut own.data), to: own.to, control: &own.control })
                .collect();
            stack.send_datagrams(handle, &list)
        })
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let bytes = into.len().min(DATAGRAM);
        let mut memory = self.memory(bytes);
        let mut messages = vec![0; control.len()];
        let answer = self.ask(move |stack, _| {
            let received = stack.recv_datagram(handle, &segments(&mut memory[..bytes]), &mut messages);
            (received, memory, messages)
        });
        let (received, memory, messages) = answer.ok_or(GONE)?;
        if let Ok(received) = &received {
            into.copy_from(&memory[..received.bytes.min(bytes)]);
            control.copy_from_slice(&messages);
        }
        self.take_back(memory);
        received
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        let (received, list) = self
            .ask(move |stack, _| {
                let mut list = Vec::new();
                let received = stack.recv_datagrams(handle, most, &mut |data, from, control| {
                    list.push((data.to_vec(), from, control.to_vec()));
                });
                (received, list)
            })
            .ok_or(GONE)?;
        for (data, from, control) in &list {
            take(data, *from, control);
        }
        received
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let (mut data, mut messages) = (vec![0; into.len()], vec![0; control.len()]);
        let answer = self.ask(move |stack, _| {
            let received = stack.recv_error(handle, &mut data, &mut messages);
            (received, data, messages)
        });
        let (received, data, messages) = answer.ok_or(GONE)?;
        into.copy_from_slice(&data);
        control.copy_from_slice(&messages);
        received
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        self.try_ask(move |stack, _| stack.next_datagram(handle))
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        self.try_ask(move |stack, _| stack.shutdown(handle, how))
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        let value = value.to_vec();
        self.try_ask(move |stack, _| stack.set_option(handle, level, name, &value))
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        // What stands there is a part of the question, for some options.
        let mut value = out.to_vec();
        let answer = self.ask(move |stack, _| (stack.option(handle, level, name, &mut value), value));
        let (n, value) = answer.ok_or(GONE)?;
        out.copy_from_slice(&value);
        n.map(|n| n.min(out.len()))
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        self.try_ask(move |stack, _| stack.ioctl(handle, request))
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.try_ask(move |stack, _| stack.local_name(handle))
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        self.try_ask(move |stack, _| stack.peer_name(handle))
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        self.try_ask(move |stack, _| stack.take_error(handle))
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        let reports = self.shared.reports.take(budget);
        ready.extend(reports.into_iter().map(|report| Ready { key: self.upper | report.key, ..report }));
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.shared.reports.fd.as_raw_fd())
    }

    fn way(&mut self, handle: Handle) -> Option<String> {
        self.ask(move |stack, _| stack.way(handle)).flatten()
    }
}
