//! What stands in the guest's send rings goes to the stack.

use super::*;

impl Core {
    /// Hands what stands in the send ring to the stack.
    pub(super) fn send(&mut self, cx: &mut Cx, id: u32, more: bool) -> Result<(), Violation> {
        match self.socks.get_mut(id) {
            Some(sock) if sock.kind == Kind::Stream => self.send_stream(cx, id, more)?,
            Some(sock) if sock.kind == Kind::Datagram => self.send_datagrams(cx, id)?,
            _ => return Ok(()),
        }
        self.after_send(cx, id)
    }

    pub(super) fn send_stream(&mut self, cx: &mut Cx, id: u32, more: bool) -> Result<(), Violation> {
        let region = cx.region;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), region.socket(id)) else { return Ok(()) };
        if sock.tx.is_none() && sock.state & state::NO_MEMORY != 0 {
            return self.send_ring_at_last(cx, id);
        }
        if sock.tx.is_none()
            || sock.state & state::CONNECTED == 0
            || sock.state & (state::DEAD | state::TX_END) != 0
        {
            return Ok(());
        }
        if sock.peeked > 0 && entry.rx_head.load(Acquire) == sock.rx_tail {
            // All of it was read: the stack need not keep it.
            sock.take_peeked(cx.stack);
        }
        let size = sock.tx.size();
        // At most two pieces: what ends with an urgent byte, and the rest.
        for _ in 0..2 {
            // SYNC: tx-tail - the bytes before it, and the base, are visible.
            let tail = entry.tx_tail.load(Acquire);
            let mut len =
                bytes::used(sock.tx_head, tail, size).map_err(|_| Violation("write position of a socket"))?;
            if len == 0 {
                break;
            }
            sock.used_at = self.sweeps;
            if len == size {
                sock.bits |= TX_FILLED;
            }
            if sock.bits & TX_BLOCKED != 0 {
                break;
            }
            if self.turn.is_over() {
                self.enqueue(id);
                break;
            }
            let mut urgent = false;
            if sock.bits & TX_URGENT != 0 {
                let until = sock.tx_mark.wrapping_sub(sock.tx_head);
                if until as i32 <= 0 {
                    sock.bits &= !TX_URGENT;
                } else if until <= len {
                    len = until;
                    urgent = true;
                }
            }
            let (mut now, mut limited) = (0, false);
            let most = self.turn.most(len);
            let cut = most < len;
            if cut {
                (len, urgent) = (most, false);
            }
            self.turn.charge(CALL);
            if !self.limits.send.is_idle() {
                now = now_ns();
                match self.limits.send.allow(len.into(), now) {
                    Ok(allowed) if allowed < u64::from(len) => {
                        (len, limited, urgent) = (allowed as u32, true, false);
                    }
                    Ok(_) => {}
                    Err(again) => {
                        self.throttle(id, again);
                        break;
                    }
                }
            }
            let base = entry.tx_base.load(Relaxed);
            let data = ring_segments(region, sock.tx.offset(), size, base, sock.tx_head, len);
            match cx.stack.send(sock.handle, &data, SendFlags { more, urgent }) {
                Ok(n) => {
                    let n = (n as u32).min(len);
                    sock.tx_head = sock.tx_head.wrapping_add(n);
                    self.totals.bytes_out += n as u64;
                    self.turn.charge(n);
                    self.limits.send.take(n.into(), now);
                    // SYNC: tx-head - the stack has taken the bytes.
                    entry.tx_head.store(sock.tx_head, Release);
                    if n < len {
                        sock.bits |= TX_BLOCKED;
                        break;
                    }
                    if limited {
                        self.throttle(id, now);
                        break;
                    }
                    if cut {
                        self.enqueue(id);
                        break;
                    }
                    if !urgent {
                        break;
                    }
                    sock.bits &= !TX_URGENT;
                }
                Err(errno) if errno.would_block() => {
                    sock.bits |= TX_BLOCKED;
                    break;
                }
                Err(errno) if errno.is_shortage() || errno.0 == libc::EINTR => {
                    self.starve(id);
                    break;
                }
                Err(errno) => return self.send_failed(cx, id, errno),
            }
        }
        Ok(())
    }

    /// A writer waits for memory.
    pub(super) fn send_ring_at_last(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        if !self.ensure_tx(cx, id, STREAM_CLASS) {
            self.starve(id);
            return Ok(());
        }
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        sock.state &= !state::NO_MEMORY;
        let generation = sock.generation;
        self.publish_state(cx, id);
        self.events.raise(cx.region, entry, id, generation, OUT, u32::MAX)
    }

    /// The stack refuses to send: the connection is over. Bytes that came before are still received.
    pub(super) fn send_failed(&mut self, cx: &mut Cx, id: u32, errno: Errno) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        if sock.bits & CLOSING != 0 {
            return self.fail(cx, id, errno.0);
        }
        let errno = match cx.stack.take_error(sock.handle) {
            Err(pending) if errno.0 == libc::EPIPE => pending,
            _ => errno,
        };
        sock.tx_head = entry.tx_tail.load(Relaxed);
        entry.tx_head.store(sock.tx_head, Release);
        sock.bits &= !(SHUT_WR | TX_BLOCKED);
        if errno.0 != libc::EPIPE {
            sock.error = errno.0;
        }
        sock.state |= state::TX_END;
        if sock.state & state::RX_END != 0 {
            return if sock.error != 0 {
                let errno = sock.error;
                self.fail(cx, id, errno)
            } else {
                let generation = sock.generation;
                entry.state.store(sock.state, Release);
                self.events.raise(cx.region, entry, id, generation, OUT | HUP, u32::MAX)
            };
        }
        entry.state.store(sock.state, Release);
        sock.bits |= RX_READY;
        let generation = sock.generation;
        self.events.raise(cx.region, entry, id, generation, OUT, u32::MAX)?;
        self.receive(cx, id)
    }

    pub(super) fn send_datagrams(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(id) else { return Ok(()) };
        let mut sent = 0;
        loop {
            let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
            if sock.tx.is_none() || sock.handle == Handle::NONE {
                return Ok(());
            }
            let size = sock.tx.size();
            // SYNC: tx-tail
            let tail = entry.tx_tail.load(Acquire);
            let used =
                bytes::used(sock.tx_head, tail, size).map_err(|_| Violation("write position of a socket"))?;
            if used == 0 || sock.bits & TX_BLOCKED != 0 {
                return Ok(());
            }
            if sent >= VISIT_DATAGRAMS || self.turn.is_over() {
                self.enqueue(id);
                return Ok(());
            }
            let mut now = 0;
            if !self.limits.send.is_idle() {
                now = now_ns();
                // A datagram goes whole: the bucket may go below empty by one batch.
                if let Err(again) = self.limits.send.allow(used.into(), now) {
                    self.throttle(id, again);
                    return Ok(());
                }
            }
            sock.used_at = self.sweeps;
            let base = entry.tx_base.load(Relaxed);
            let mut batch =
                [Datagram { data: crate::Segments::EMPTY, to: SocketAddress::default(), control: &[] };
                    DATAGRAM_BATCH];
            let mut ends = [0u32; DATAGRAM_BATCH];
            let (mut controls, mut control_ends, mut refused) = (Vec::new(), [0; DATAGRAM_BATCH], None);
            let (mut n, mut position, mut payload) = (0, sock.tx_head, 0u64);
            while n < DATAGRAM_BATCH && position != tail {
                let left = tail.wrapping_sub(position);
                let mut raw = [0u8; 32];
                if left < 32 {
                    return Err(Violation("datagram without a header"));
                }
                ring_segments(region, sock.tx.offset(), size, base, position, 32).copy_to(&mut raw);
                let header = header_from(&raw);
                let control = header.control_len();
                if header.len > MAX_DATAGRAM || header.record() > left {
                    return Err(Violation("datagram longer than its ring"));
                }
                if control > MAX_CONTROL || !control.is_multiple_of(8) {
                    return Err(Violation("control messages of a datagram"));
                }
                let to = match header.address_len & 0xff {
                    0 => SocketAddress::default(),
                    len => SocketAddress::from_datagram(&header.address, len)
                        .unwrap_or(SocketAddress::from_bytes(&[0; 16])),
                };
                let data = ring_segments(
                    region,
                    sock.tx.offset(),
                    size,
                    base,
                    position.wrapping_add(32),
                    header.len,
                );
                if control != 0 {
                    let at = position.wrapping_add(datagram_record(header.len));
                    let from = controls.len();
                    controls.resize(from + control as usize, 0);
                    ring_segments(region, sock.tx.offset(), size, base, at, control)
                        .copy_to(&mut controls[from..]);
                    if let Err(errno) = sendable(&controls[from..], sock.domain) {
                        if n == 0 {
                            refused = Some(errno);
                            ends[0] = position.wrapping_add(header.record());
                        }
                        controls.truncate(from);
                        break;
                    }
                }
                position = position.wrapping_add(header.record());
                batch[n] = Datagram { data, to, control: &[] };
                ends[n] = position;
                control_ends[n] = controls.len();
                payload += header.len as u64;
                n += 1;
            }
            if !controls.is_empty() {
                let mut from = 0;
                for (datagram, &end) in batch[..n].iter_mut().zip(&control_ends) {
                    datagram.control = &controls[from..end];
                    from = end;
                }
            }
            let result = match refused {
                Some(errno) => Err(errno),
                None => cx.stack.send_datagrams(sock.handle, &batch[..n]),
            };
            match result {
                Ok(k) if k > 0 => {
                    let k = k.min(n);
                    sock.tx_head = ends[k - 1];
                    let passed =
                        if k == n { payload } else { batch[..k].iter().map(|d| d.data.len() as u64).sum() };
                    self.totals.bytes_out += passed;
                    self.limits.send.take(passed, now);
                    self.turn.charge((passed as u32).saturating_add(k as u32 * DATAGRAM));
                    sent += k as u32;
                }
                Ok(_) => sock.bits |= TX_BLOCKED,
                Err(errno) if errno.would_block() => sock.bits |= TX_BLOCKED,
                Err(errno) if errno.is_shortage() || errno.0 == libc::EINTR => {
                    self.starve(id);
                    return Ok(());
                }
                Err(errno) => {
                    // That datagram is lost, as after a failed sendto.
                    sock.tx_head = ends[0];
                    sent += 1;
                    entry.tx_head.store(sock.tx_head, Release);
                    if sock.bits & CLOSING == 0 {
                        self.soft_error(cx, id, errno)?;
                    }
                    continue;
                }
            }
            // SYNC: tx-head
            entry.tx_head.store(sock.tx_head, Release);
        }
    }

    /// Room, growth, and what waited for the send ring to become empty.
    pub(super) fn after_send(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), region.socket(id)) else { return Ok(()) };
        if sock.kind == Kind::Free {
            return Ok(());
        }
        let size = sock.tx.size();
        let used = bytes::used(sock.tx_head, entry.tx_tail.load(Acquire), size)
            .map_err(|_| Violation("write position of a socket"))?;
        if used == 0 {
            if sock.bits & CLOSING != 0 {
                self.finish_close(cx, id, Close::Graceful);
                return Ok(());
            }
            if sock.bits & SHUT_WR != 0 {
                let _ = cx.stack.shutdown(sock.handle, Shutdown::Write);
                sock.state |= state::TX_END;
                sock.bits &= !SHUT_WR;
                entry.state.store(sock.state, Release);
                let generation = sock.generation;
                self.events.raise(region, entry, id, generation, OUT, u32::MAX)?;
            } else if sock.bits & TX_FILLED != 0 {
                sock.bits &= !TX_FILLED;
                if (sock.tx.class() as usize) < CLASSES - 1
                    && self.blocks.plenty()
                    && let Some(block) = self.blocks.take(sock.tx.class() + 1)
                {
                    let unused = replace_tx(entry, sock, block);
                    self.blocks.give(unused);
                    self.sweep_wanted = true;
                }
            }
        }
        let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
        let room = sock.tx.size() - used.min(sock.tx.size());
        // SYNC: tx-wanted - the head stored above is visible to a writer that set tx_wanted before we look at it.
        fence(SeqCst);
        if entry.tx_wanted.load(Relaxed) != 0
            && room >= low_water(sock.tx)
            && entry.tx_wanted.swap(0, SeqCst) != 0
        {
            let generation = sock.generation;
            self.events.raise(region, entry, id, generation, OUT, u32::MAX)?;
        }
        Ok(())
    }

    /// Gives the socket a send ring if it has none.
    pub(super) fn ensure_tx(&mut self, cx: &mut Cx, id: u32, class: u8) -> bool {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return false };
        if !sock.tx.is_none() {
            return true;
        }
        let Some(block) = self.blocks.take(class) else { return false };
        self.sweep_wanted = true;
        sock.tx = block;
        sock.used_at = self.sweeps;
        publish_tx(entry, block);
        true
    }
}
