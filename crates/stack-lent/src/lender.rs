use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use netkernel_service::{
    Accepted, Close, Errno, GuestBytes, Handle, Ready, Segments, SendFlags, SocketAddress, Stack, TcpSums,
};

use crate::{Call, Shared, lock};

/// Keys that the borrower chose, in the stack's keys.
const OWN: u64 = 0x7fff_ffff;

/// The half of the thread that drives the stack.
pub struct Lender {
    shared: Arc<Shared>,
    kept: Kept,
}

/// Borrowed sockets.
pub(crate) struct Kept {
    keys: u64,
    sockets: HashMap<u32, Socket>,
    /// Of connections that were given back.
    tcp: TcpSums,
    over: bool,
}

struct Socket {
    /// The borrower's own.
    key: u64,
    /// What was sent last and not taken whole: the stack may look at it until it is offered again.
    offered: Vec<u8>,
}

impl Lender {
    pub(crate) fn new(shared: Arc<Shared>, keys: u64) -> Lender {
        Lender { shared, kept: Kept { keys, sockets: HashMap::new(), tcp: TcpSums::default(), over: false } }
    }

    /// Readable while the borrower wants something; [`serve`](Lender::serve) does it.
    pub fn bell(&self) -> RawFd {
        self.shared.calls.fd.as_raw_fd()
    }

    /// Does what the borrower asks, at most so many operations. What is left rings again.
    pub fn serve(&mut self, stack: &mut dyn Stack, most: usize) {
        for call in self.shared.calls.take(most) {
            call(stack, &mut self.kept);
        }
    }

    /// Does all that was asked: the borrower stands still.
    pub fn serve_all(&mut self, stack: &mut dyn Stack) {
        self.serve(stack, usize::MAX);
    }

    /// Passes a report of the stack on.
    pub fn report(&self, report: Ready) {
        self.shared.reports.push(Ready { key: report.key & OWN, ..report });
    }

    /// What the stack counted of borrowed connections, until each was given back.
    pub fn tcp(&self) -> TcpSums {
        self.kept.tcp
    }

    /// Borrowed sockets that there are.
    pub fn sockets(&self) -> usize {
        self.kept.sockets.len()
    }

    /// Takes everything back: connections are reset.
    pub fn end(&mut self, stack: &mut dyn Stack) {
        self.refuse();
        self.kept.give_back(stack);
    }

    /// The borrower is gone, and nothing of it is left.
    pub fn is_over(&self) -> bool {
        self.kept.over
    }

    /// Whoever waits for an answer learns that none comes.
    fn refuse(&self) {
        self.shared.gone.store(true, SeqCst);
        let calls: Vec<Call> = lock(&self.shared.calls.queue).drain(..).collect();
        drop(calls);
        // What polls looks, and finds its sockets dead.
        for socket in self.kept.sockets.values() {
            let readiness = netkernel_service::Readiness::READ | netkernel_service::Readiness::ERROR;
            self.shared.reports.push(Ready { key: socket.key & OWN, readiness });
        }
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.refuse();
    }
}

impl Kept {
    fn key(&self, own: u64) -> u64 {
        self.keys | own & OWN
    }

    fn remember(&mut self, handle: Handle, key: u64) {
        self.sockets.insert(handle.0, Socket { key, offered: Vec::new() });
    }

    pub fn open(
        &mut self,
        stack: &mut dyn Stack,
        key: u64,
        [domain, kind, protocol]: [i32; 3],
    ) -> Result<Handle, Errno> {
        let handle = stack.open(self.key(key), domain, kind, protocol)?;
        self.remember(handle, key);
        Ok(handle)
    }

    pub fn resume(&mut self, stack: &mut dyn Stack, key: u64, tells: bool) -> Result<Handle, Errno> {
        let handle = stack.resume(self.key(key), tells)?;
        self.remember(handle, key);
        Ok(handle)
    }

    pub fn accept(&mut self, stack: &mut dyn Stack, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let accepted = stack.accept(listener, self.key(key))?;
        self.remember(accepted.handle, key);
        Ok(accepted)
    }

    pub fn give_back(&mut self, stack: &mut dyn Stack) {
        self.over = true;
        for (handle, socket) in std::mem::take(&mut self.sockets) {
            self.look_at_tcp(stack, Handle(handle));
            stack.close(Handle(handle), Close::Abort);
            // Not before: the stack may have looked at what it was offered.
            drop(socket);
        }
    }

    /// Asked here, and not by who closes: that would wait for the answer.
    fn look_at_tcp(&mut self, stack: &mut dyn Stack, handle: Handle) {
        // Connections only: what never was one has sent nothing.
        if let Some(now) = stack.tcp_counts(handle).filter(|now| now.segments > 0) {
            self.tcp.note(&mut None, now);
        }
    }

    pub fn close(&mut self, stack: &mut dyn Stack, handle: Handle, how: Close) {
        self.look_at_tcp(stack, handle);
        stack.close(handle, how);
        self.sockets.remove(&handle.0);
    }

    pub fn disconnect(&mut self, stack: &mut dyn Stack, handle: Handle) -> Result<(), Errno> {
        let result = stack.disconnect(handle);
        if result.is_ok()
            && let Some(socket) = self.sockets.get_mut(&handle.0)
        {
            socket.offered = Vec::new();
        }
        result
    }

    /// Returns the memory too, when the stack has no use for it any more.
    pub fn send(
        &mut self,
        stack: &mut dyn Stack,
        handle: Handle,
        mut data: Vec<u8>,
        flags: SendFlags,
    ) -> (Result<usize, Errno>, Vec<u8>) {
        let Some(socket) = self.sockets.get_mut(&handle.0) else { return (Err(Errno(libc::EBADF)), data) };
        let sent = stack.send(handle, &segments(&mut data), flags);
        let whole = match sent {
            Ok(n) => n >= data.len(),
            Err(errno) => !errno.would_block(),
        };
        // Only now may what was offered before go.
        socket.offered = Vec::new();
        if whole {
            return (sent, data);
        }
        // A vector that moves leaves its bytes where they are.
        socket.offered = data;
        (sent, Vec::new())
    }
}

/// The buffer as a stack takes it.
pub(crate) fn segments(buffer: &mut [u8]) -> Segments {
    // SAFETY: valid for reads and writes of its length while the caller holds the buffer, which is the call for which the
    // segments are made, or longer (`Socket::offered`).
    let first = unsafe { GuestBytes::new(buffer.as_mut_ptr(), buffer.len()) };
    Segments { first, second: GuestBytes::EMPTY }
}

/// A datagram with memory of its own.
pub(crate) struct OwnDatagram {
    pub data: Vec<u8>,
    pub to: SocketAddress,
    pub control: Vec<u8>,
}
