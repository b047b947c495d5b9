//! The end of a socket.

use super::*;

impl Core {
    pub(super) fn close(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        match sock.kind {
            // Whoever kept the placeholder for another socket has closed it.
            Kind::Free if sock.bits & SPARE != 0 => {
                sock.bits &= !SPARE;
                self.return_id(cx.region, id);
                return Ok(());
            }
            Kind::Free => return Ok(()),
            Kind::Listener => {
                self.drop_untaken(cx, id);
                self.finish_close(cx, id, Close::Graceful);
                return Ok(());
            }
            // Handed over, or the stack had none.
            Kind::Stream | Kind::Datagram if sock.handle == Handle::NONE => {
                self.finish_close(cx, id, Close::Graceful);
                return Ok(());
            }
            Kind::Stream | Kind::Datagram => {}
        }
        if sock.bits & CLOSING != 0 {
            sock.bits &= !SPARE;
            return Ok(());
        }
        if sock.kind == Kind::Stream && sock.state & state::CONNECTED != 0 {
            let unread = sock.rx_tail != entry.rx_head.load(Acquire);
            if unread || sock.linger.resets() {
                self.finish_close(cx, id, Close::Abort);
                return Ok(());
            }
        }
        let unsent = entry.tx_tail.load(Acquire) != sock.tx_head;
        let open = sock.kind == Kind::Datagram || sock.state & (state::DEAD | state::TX_END) == 0;
        if !unsent || !open || sock.tx.is_none() {
            self.finish_close(cx, id, Close::Graceful);
            return Ok(());
        }
        sock.bits |= CLOSING;
        sock.bits &= !SHUT_WR;
        // Nothing is received any more.
        let rx = std::mem::take(&mut sock.rx);
        self.give_block(rx);
        self.send(cx, id, false)
    }

    /// Job `Close`: the program has closed the last descriptor, and the guest kept the placeholder.
    pub(super) fn close_and_keep(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
        let own = id < self.guest_sockets && sock.kind == Kind::Stream;
        if !own || sock.state & state::HANDED != 0 || sock.bits & CLOSING != 0 {
            return Ok(());
        }
        sock.bits |= SPARE;
        self.close(cx, id)
    }

    /// The guest uses a placeholder again: the first element about the socket that it is of now.
    pub(super) fn reopen(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let kind = cx.region.socket(id).map_or(0, |entry| entry.kind.load(Relaxed));
        self.turn.charge(SOCKET);
        self.open(cx, id, kind >> 16, libc::SOCK_STREAM as u32, kind & 0xffff)
    }

    /// Closes (RST) the connections of a listener that nobody took.
    pub(super) fn drop_untaken(&mut self, cx: &mut Cx, listener: u32) {
        let (Some(sock), Some(entry)) = (self.socks.get(listener), cx.region.socket(listener)) else {
            return;
        };
        let waiting = sock.rx_tail.wrapping_sub(entry.rx_head.load(Acquire));
        let tail = sock.rx_tail;
        let mut at = Some(self.guest_sockets);
        while let Some(id) = at {
            if let Some(child) = self.socks.get_mut(id)
                && child.bits & UNTAKEN != 0
                && child.link == listener
            {
                // Its record ends at `record`; those within `waiting` bytes of the tail are still in the ring.
                if tail.wrapping_sub(child.record) < waiting {
                    self.finish_close(cx, id, Close::Abort);
                } else {
                    child.link = 0;
                }
            }
            at = self.socks.next_id(id);
            if id >= self.next_id {
                break;
            }
        }
    }

    pub(super) fn finish_close(&mut self, cx: &mut Cx, id: u32, how: Close) {
        self.look_at_tcp(cx.stack, id);
        self.end_pair(cx.stack, id);
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return };
        if sock.kind == Kind::Free {
            return;
        }
        // The number may be another descriptor's as soon as it is closed.
        sock.fd = 0;
        compiler_fence(SeqCst);
        if sock.handle != Handle::NONE {
            if how == Close::Graceful {
                // It was read: the peer is told of the end, and not of a reset.
                sock.take_peeked(cx.stack);
            }
            cx.stack.close(sock.handle, how);
        }
        let (rx, tx) = (sock.rx, sock.tx);
        let generation = sock.generation.wrapping_add(1);
        let kept = sock.bits & (QUEUED | STARVED | THROTTLED | SPARE);
        let counted = sock.bits & COUNTED != 0;
        *sock = Sock { generation, bits: kept, ..Sock::default() };
        self.sockets -= 1;
        self.ended = self.ended.wrapping_add(1);
        self.uncount(counted);
        clear_engine_lines(entry);
        entry.inode.store(0, Relaxed);
        // SYNC: socket-state - the cleared lines are visible to who takes the id again.
        entry.generation.store(generation, Release);
        self.give_block(rx);
        self.give_block(tx);
        if id >= self.guest_sockets {
            self.free_ids.push(id);
        } else if kept & SPARE == 0 {
            self.return_id(cx.region, id);
        }
        if !self.starved.is_empty() {
            self.retry_starved();
        }
    }

    /// Puts a guest id on the guest's free list.
    pub(super) fn return_id(&mut self, region: &Region, id: u32) {
        let (header, Some(entry)) = (region.header(), region.socket(id)) else { return };
        // A correct guest disturbs this once in a while; a hostile one could for ever.
        for _ in 0..256 {
            let head = header.free_head.load(Acquire);
            entry.next_free.store(head as u32, Relaxed);
            let new = ((head >> 32).wrapping_add(1) << 32) | id as u64;
            // SYNC: free-list - the link, and the cleared entry.
            if header.free_head.compare_exchange_weak(head, new, AcqRel, Relaxed).is_ok() {
                return;
            }
        }
        self.unreturned.push(id);
    }
}
