//! Listeners, what they accept, and what a listener's guest has not taken yet.

use super::*;

impl Core {
    pub(super) fn take_id(&mut self) -> Option<u32> {
        if let Some(id) = self.free_ids.pop() {
            return Some(id);
        }
        if self.next_id >= self.limit {
            return None;
        }
        self.socks.make(self.next_id)?;
        self.next_id += 1;
        Some(self.next_id - 1)
    }

    pub(super) fn accept(&mut self, cx: &mut Cx, listener: u32) -> Result<(), Violation> {
        match self.socks.get(listener) {
            Some(sock) if sock.state & state::ON_DEMAND != 0 => self.offer(cx, listener),
            _ => self.accept_ahead(cx, listener, Ahead::Usual),
        }
    }

    /// Says whether a listener that accepts on demand has a connection.
    pub(super) fn offer(&mut self, cx: &mut Cx, listener: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(listener), cx.region.socket(listener)) else {
            return Ok(());
        };
        if sock.bits & RX_READY == 0 || sock.state & state::LISTENING == 0 {
            return Ok(());
        }
        sock.bits &= !RX_READY;
        let acceptable = cx.stack.acceptable(sock.handle);
        sock.state = (sock.state & !state::ACCEPTABLE) | if acceptable { state::ACCEPTABLE } else { 0 };
        let generation = sock.generation;
        self.publish_state(cx, listener);
        if acceptable {
            self.events.raise(cx.region, entry, listener, generation, IN, 1)?;
        }
        Ok(())
    }

    pub(super) fn job_accept(&mut self, cx: &mut Cx, listener: u32) -> Result<Done, Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(listener), cx.region.socket(listener)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        if sock.state & state::LISTENING == 0 {
            return Ok(Done::Answer(-libc::EINVAL, 0, 0));
        }
        if sock.state & state::ON_DEMAND == 0 {
            return Ok(Done::Answer(0, 0, 0));
        }
        sock.bits |= RX_READY;
        if sock.link > SMALL_BACKLOG as u32 {
            // It was not to accept ahead before its guest accepts.
            sock.state &= !(state::ON_DEMAND | state::ACCEPTABLE);
            self.publish_state(cx, listener);
            self.accept_ahead(cx, listener, Ahead::Quietly)?;
            let Some(sock) = self.socks.get(listener) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
            let waiting = sock.rx_tail.wrapping_sub(entry.rx_head.load(Acquire)) / ACCEPT_RECORD;
            if waiting > 1 && entry.waiters.load(SeqCst) != 0 {
                // Others sleep: what came together was told of once.
                let generation = sock.generation;
                self.events.raise(cx.region, entry, listener, generation, IN, waiting - 1)?;
            }
            return Ok(Done::Answer(if waiting == 0 { -libc::EAGAIN } else { 0 }, 0, 0));
        }
        self.accept_ahead(cx, listener, Ahead::One)?;
        let Some(sock) = self.socks.get_mut(listener) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
        if sock.rx_tail != entry.rx_head.load(Acquire) {
            sock.bits |= RX_READY;
            self.offer(cx, listener)?;
            return Ok(Done::Answer(0, 0, 0));
        }
        // None; or the stack lacks something (RX_READY stands then), which is offered again later.
        sock.state &= !state::ACCEPTABLE;
        self.publish_state(cx, listener);
        Ok(Done::Answer(-libc::EAGAIN, 0, 0))
    }

    /// Accepts into the listener's ring, as far ahead as its backlog allows.
    pub(super) fn accept_ahead(&mut self, cx: &mut Cx, listener: u32, ahead: Ahead) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(listener) else { return Ok(()) };
        let mut new = 0;
        let mut rounds = 0;
        while let Some(sock) = self.socks.get_mut(listener) {
            if sock.bits & (RX_READY | RX_STALLED) != RX_READY || sock.state & state::LISTENING == 0 {
                break;
            }
            if rounds >= VISIT_ACCEPTS || self.turn.is_over() {
                self.enqueue(listener);
                break;
            }
            rounds += 1;
            let size = sock.rx.size();
            // SYNC: rx-head
            let head = entry.rx_head.load(Acquire);
            let used = bytes::used(head, sock.rx_tail, size).map_err(|_| Violation("accept position"))?;
            let most = (sock.link / 2).clamp(1, size / ACCEPT_RECORD - 1);
            if ahead == Ahead::One && used > 0 {
                break;
            }
            if used.div_ceil(ACCEPT_RECORD) >= most {
                entry.rx_stalled.store(1, SeqCst);
                fence(SeqCst);
                if entry.rx_head.load(SeqCst) == head {
                    sock.bits |= RX_STALLED;
                    break;
                }
                entry.rx_stalled.store(0, SeqCst);
                continue;
            }
            if used == 0 && sock.rx_base != sock.rx_tail {
                sock.rx_base = sock.rx_tail;
                entry.rx_base.store(sock.rx_base, Relaxed);
            }
            let (handle, domain, inherited) = (sock.handle, sock.domain, sock.linger);
            if self.limits.connections.as_ref().is_some_and(|places| !places.take()) {
                // The tenant has all that it may have: more wait in the stack's own queue.
                self.starve(listener);
                break;
            }
            let counted = self.limits.connections.is_some();
            let Some(id) = self.take_id() else {
                // No ids: connections wait in the stack's own queue.
                self.uncount(counted);
                self.starve(listener);
                break;
            };
            let accepted = match cx.stack.accept(handle, key(self.guest, id)) {
                Ok(accepted) => accepted,
                Err(errno) => {
                    self.free_ids.push(id);
                    self.uncount(counted);
                    if errno.would_block() {
                        if let Some(sock) = self.socks.get_mut(listener) {
                            sock.bits &= !RX_READY;
                        }
                        break;
                    }
                    if errno.is_shortage() || matches!(errno.0, libc::EINVAL | libc::EBADF) {
                        self.starve(listener);
                        break;
                    }
                    // The connection was over before it was accepted: the next one.
                    continue;
                }
            };
            self.turn.charge(SOCKET);
            self.begin_accepted(cx, id, domain, accepted);
            if counted && let Some(sock) = self.socks.get_mut(id) {
                sock.bits |= COUNTED;
            }
            self.receive(cx, id)?;
            let at = self.socks.get(listener).map_or(0, |sock| sock.rx_tail);
            if let Some(sock) = self.socks.get_mut(id) {
                sock.link = listener;
                sock.linger = inherited;
                sock.record = at.wrapping_add(ACCEPT_RECORD);
            }
            let generation = {
                let generation = self.socks.get_mut(id).map_or(0, |s| s.generation);
                let Some(sock) = self.socks.get_mut(listener) else { break };
                let mut record = [0u8; ACCEPT_RECORD as usize];
                record[..4].copy_from_slice(&id.to_le_bytes());
                record[4..].copy_from_slice(&generation.to_le_bytes());
                ring_segments(region, sock.rx.offset(), size, sock.rx_base, at, ACCEPT_RECORD)
                    .copy_from(&record);
                compiler_fence(SeqCst);
                sock.rx_tail = at.wrapping_add(ACCEPT_RECORD);
                // SYNC: rx-tail - the record and the new socket's entry.
                entry.rx_tail.store(sock.rx_tail, Release);
                sock.generation
            };
            new += u32::from(ahead == Ahead::Usual);
            if new == 1 {
                self.events.raise(region, entry, listener, generation, IN, 0)?;
            }
        }
        if new > 0
            && let Some(sock) = self.socks.get_mut(listener)
        {
            let generation = sock.generation;
            self.events.raise(region, entry, listener, generation, IN, new)?;
        }
        Ok(())
    }

    pub(super) fn begin_accepted(&mut self, cx: &mut Cx, id: u32, domain: u16, accepted: crate::Accepted) {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return };
        let generation = sock.generation;
        *sock = Sock {
            handle: accepted.handle,
            state: state::OPEN | state::CONNECTED | state::BOUND,
            bits: UNTAKEN | RX_READY,
            fd: lasting(cx.stack, accepted.handle),
            domain,
            generation,
            used_at: self.sweeps,
            ..Sock::default()
        };
        compiler_fence(SeqCst);
        sock.kind = Kind::Stream;
        clear_guest_lines(entry);
        entry.kind.store((domain as u32) << 16, Relaxed);
        entry.generation.store(generation, Relaxed);
        for (word, value) in entry.peer.iter().zip(accepted.peer.to_words()) {
            word.store(value, Relaxed);
        }
        entry.peer_len.store(accepted.peer.as_bytes().len() as u32, Relaxed);
        let paired = paired::begin(cx.stack, entry, sock);
        self.has_pairs |= paired;
        entry.state.store(sock.state, Release);
        self.sockets += 1;
        self.totals.connections += 1;
        if self.blocks.plenty() && !paired {
            self.ensure_tx(cx, id, STREAM_CLASS);
        }
    }
}
