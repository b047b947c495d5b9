//! Connections: what the stack received goes into the guest's rings.

use super::*;

impl Core {
    pub(super) fn receive(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(id) else { return Ok(()) };
        let (mut rounds, mut got) = (0, 0);
        loop {
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            if sock.bits & PAIRED != 0 {
                return self.pair_turn(cx, id);
            }
            if sock.bits & (RX_READY | RX_STALLED | CLOSING) != RX_READY
                || sock.state & (state::CONNECTED | state::DEAD) != state::CONNECTED
                || sock.state & state::RX_END != 0 && sock.bits & SHUT_RD == 0
            {
                return Ok(());
            }
            if rounds >= VISIT_ROUNDS || got >= VISIT_BYTES || self.turn.is_over() {
                self.enqueue(id);
                return Ok(());
            }
            rounds += 1;
            // SYNC: rx-head - the guest has copied the bytes before it published this head.
            let head = entry.rx_head.load(Acquire);
            let used = bytes::used(head, sock.rx_tail, sock.rx.size())
                .map_err(|_| Violation("read position of a socket"))?;
            if sock.peeked > 0
                && (used < sock.peeked || sock.bits & (URGENT | MARK) != 0)
                && !sock.take_peeked(cx.stack)
            {
                return self.fail(cx, id, libc::ECONNRESET);
            }
            if used == 0 && (sock.rx.is_none() || sock.bits & RX_FILLED != 0) {
                let class = if sock.rx.is_none() {
                    Some(Block::class_for(entry.rcv_low_water.load(Relaxed)).max(STREAM_CLASS))
                } else if (sock.rx.class() as usize) < CLASSES - 1 && self.blocks.plenty() {
                    Some(sock.rx.class() + 1)
                } else {
                    None
                };
                sock.bits &= !RX_FILLED;
                if let Some(block) = class.and_then(|class| self.blocks.take(class)) {
                    let old = std::mem::replace(&mut sock.rx, block);
                    entry.rx_offset.store((block.offset() / 64) as u32, Relaxed);
                    entry.rx_size.store(block.size(), Relaxed);
                    self.blocks.give(old);
                    self.sweep_wanted = true;
                } else if sock.rx.is_none() {
                    self.starve(id);
                    return Ok(());
                }
            }
            let size = sock.rx.size();
            if used == 0 && sock.rx_base != sock.rx_tail {
                sock.rx_base = sock.rx_tail;
                entry.rx_base.store(sock.rx_base, Relaxed);
            }
            if used == size {
                sock.bits |= RX_FILLED;
                if stall(entry, sock, size)? {
                    return Ok(());
                }
                continue;
            }
            if sock.bits & (URGENT | MARK) != 0 {
                urgent(cx.stack, entry, sock);
                let (generation, pending) = (sock.generation, sock.bits & MARK == 0);
                if pending {
                    self.events.raise(region, entry, id, generation, PRI | IN, u32::MAX)?;
                }
                let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
                sock.bits |= RX_READY;
            }
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            let mut want = self.turn.most(size - used);
            self.turn.charge(CALL);
            let mut now = 0;
            if !self.limits.receive.is_idle() {
                now = now_ns();
                match self.limits.receive.allow(want.into(), now) {
                    Ok(allowed) => want = want.min(allowed as u32),
                    // The stack's own buffer fills, and its window closes.
                    Err(again) => {
                        self.throttle(id, again);
                        return Ok(());
                    }
                }
            }
            let into = ring_segments(region, sock.rx.offset(), size, sock.rx_base, sock.rx_tail, want);
            let peeked = if self.gives && sock.peeked == sock.rx_tail && sock.bits & (URGENT | MARK) == 0 {
                cx.stack.peek(sock.handle, sock.peeked as usize, &into)
            } else {
                Peeked::Unable
            };
            let received = match peeked {
                Peeked::Bytes(received) => {
                    sock.peeked += (received.bytes as u32).min(want);
                    Ok(received)
                }
                Peeked::End => Ok(Received { bytes: 0, more: false }),
                Peeked::Nothing => Err(Errno::AGAIN),
                Peeked::Failed(errno) => Err(errno),
                Peeked::Unable if sock.take_peeked(cx.stack) => cx.stack.recv(sock.handle, &into),
                Peeked::Unable => Err(Errno(libc::ECONNRESET)),
            };
            match received {
                Ok(received) if received.bytes > 0 => {
                    let n = (received.bytes as u32).min(want);
                    sock.rx_tail = sock.rx_tail.wrapping_add(n);
                    sock.used_at = self.sweeps;
                    got += n;
                    self.totals.bytes_in += n as u64;
                    self.turn.charge(n);
                    self.limits.receive.take(n.into(), now);
                    if n == size - used {
                        sock.bits |= RX_FILLED;
                    }
                    if !received.more && sock.bits & MARK == 0 {
                        sock.bits &= !RX_READY;
                    }
                    // SYNC: rx-tail - the bytes, and base, offset and size, are visible with it.
                    entry.rx_tail.store(sock.rx_tail, Release);
                    let generation = sock.generation;
                    self.events.raise(region, entry, id, generation, IN, u32::MAX)?;
                }
                Ok(_) => {
                    sock.bits &= !RX_READY;
                    if sock.error != 0 {
                        let errno = sock.error;
                        return self.fail(cx, id, errno);
                    }
                    if sock.state & state::RX_END != 0 {
                        return Ok(());
                    }
                    sock.state |= state::RX_END | fin(sock);
                    entry.state.store(sock.state, Release);
                    let generation = sock.generation;
                    return self.events.raise(region, entry, id, generation, IN | RDHUP, u32::MAX);
                }
                Err(errno) if errno.would_block() => {
                    sock.bits &= !(RX_READY | URGENT);
                    return Ok(());
                }
                Err(Errno(libc::EINTR)) => {}
                Err(errno) if errno.is_shortage() => {
                    self.starve(id);
                    return Ok(());
                }
                Err(errno) => return self.fail(cx, id, errno.0),
            }
        }
    }

    /// The connection is over with an error.
    pub(super) fn fail(&mut self, cx: &mut Cx, id: u32, errno: i32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        if sock.bits & CLOSING != 0 {
            self.finish_close(cx, id, Close::Graceful);
            return Ok(());
        }
        if sock.state & state::DEAD != 0 {
            return Ok(());
        }
        sock.error = 0;
        entry.error.store(errno as u32, Relaxed);
        // The kernel's word for RST after FIN, which this thread need not have seen: both may come at the same time.
        if errno == libc::EPIPE {
            sock.state |= fin(sock);
        }
        sock.state = (sock.state & !state::CONNECTING) | state::DEAD | state::RX_END | state::TX_END;
        entry.state.store(sock.state, Release);
        let generation = sock.generation;
        self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR | HUP | RDHUP, u32::MAX)
    }

    pub(super) fn refuse(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        self.look_at_tcp(cx.stack, id);
        let Some(sock) = self.socks.get_mut(id).filter(|sock| sock.kind != Kind::Free) else { return Ok(()) };
        sock.fd = 0;
        let handle = std::mem::replace(&mut sock.handle, Handle::NONE);
        if handle != Handle::NONE {
            cx.stack.close(handle, Close::Abort);
        }
        if sock.state & state::CONNECTED != 0 {
            self.fail(cx, id, libc::ECONNRESET)?;
        }
        if let Some(sock) = self.socks.get_mut(id) {
            sock.error = libc::ENFILE;
        }
        Ok(())
    }

    /// An error that does not end the socket (datagrams).
    pub(super) fn soft_error(&mut self, cx: &mut Cx, id: u32, errno: Errno) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        entry.error.store(errno.0 as u32, Release);
        let generation = sock.generation;
        self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR, u32::MAX)
    }
}

/// What there is nothing more to read for: the peer's FIN, unless the program itself shut down reading.
fn fin(sock: &Sock) -> u32 {
    if sock.bits & SHUT_RD == 0 { state::FIN } else { 0 }
}
