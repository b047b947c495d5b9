//! Datagram sockets: what the stack received goes into the guest's rings.

use super::*;

impl Core {
    pub(super) fn receive_datagrams(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let region = cx.region;
        let Some(entry) = region.socket(id) else { return Ok(()) };
        let (mut rounds, mut got, mut told) = (0usize, 0u32, 0u32);
        while let Some(sock) = self.socks.get_mut(id) {
            if sock.bits & (RX_READY | RX_STALLED | CLOSING) != RX_READY || sock.handle == Handle::NONE {
                break;
            }
            if rounds >= VISIT_DATAGRAMS as usize || self.turn.is_over() {
                self.enqueue(id);
                break;
            }
            if !self.limits.receive.is_idle()
                && let Err(again) = self.limits.receive.allow(MAX_DATAGRAM.into(), now_ns())
            {
                // They wait in the stack's socket.
                self.throttle(id, again);
                break;
            }
            // SYNC: rx-head
            let head = entry.rx_head.load(Acquire);
            let used = bytes::used(head, sock.rx_tail, sock.rx.size())
                .map_err(|_| Violation("read position of a socket"))?;
            let filled = used == 0
                && sock.bits & RX_FILLED != 0
                && (sock.rx.class() as usize) < CLASSES - 1
                && self.blocks.plenty();
            if sock.rx.is_none() || filled {
                sock.bits &= !RX_FILLED;
                let class = if sock.rx.is_none() { DATAGRAM_CLASS } else { sock.rx.class() + 1 };
                let Some(block) = self.blocks.take(class) else {
                    if filled {
                        continue;
                    }
                    self.starve(id);
                    break;
                };
                self.sweep_wanted = true;
                let old = std::mem::replace(&mut sock.rx, block);
                self.blocks.give(old);
                entry.rx_offset.store((block.offset() / 64) as u32, Relaxed);
                entry.rx_size.store(block.size(), Relaxed);
            }
            let size = sock.rx.size();
            if used == 0 && sock.rx_base != sock.rx_tail {
                sock.rx_base = sock.rx_tail;
                entry.rx_base.store(sock.rx_base, Relaxed);
            }
            let free = size - used;
            let needed = match free {
                free if free >= datagram_record(MAX_DATAGRAM) + MAX_CONTROL => 0,
                _ => datagram_record(
                    cx.stack.next_datagram(sock.handle).unwrap_or(0).min(MAX_DATAGRAM as usize) as u32,
                ),
            };
            if needed.max(32) + MAX_CONTROL > free {
                sock.bits |= RX_FILLED;
                if stall(entry, sock, size)? {
                    break;
                }
                continue;
            }
            let ring = (sock.rx.offset(), size, sock.rx_base);
            let several = (free / (datagram_record(MAX_DATAGRAM) + MAX_CONTROL)) as usize;
            if sock.bits & SMALL != 0 && several > 1 {
                let several = several.min(DATAGRAM_BATCH);
                let (mut tail, mut bytes, mut largest) = (sock.rx_tail, 0, 0);
                let result = cx.stack.recv_datagrams(sock.handle, several, &mut |data, from, control| {
                    let data = &data[..data.len().min(MAX_DATAGRAM as usize)];
                    ring_segments(region, ring.0, ring.1, ring.2, tail.wrapping_add(32), data.len() as u32)
                        .copy_from(data);
                    tail =
                        tail.wrapping_add(put_header(region, ring, tail, data.len() as u32, from, control));
                    bytes += data.len();
                    largest = largest.max(data.len());
                });
                match result {
                    Ok(n) => {
                        rounds += n.max(1);
                        got += n as u32;
                        if n < several {
                            sock.bits &= !RX_READY;
                        }
                        if largest > SMALL_DATAGRAM {
                            sock.bits &= !SMALL;
                        }
                        sock.rx_tail = tail;
                        sock.used_at = self.sweeps;
                        self.totals.bytes_in += bytes as u64;
                        self.limits.receive.charge(bytes as u64);
                        self.turn.charge((bytes as u32).saturating_add(n as u32 * DATAGRAM));
                        // Told together with what follows at once, so that recvmmsg finds together what was sent so.
                        if got - told >= DATAGRAM_BATCH as u32 {
                            told = got;
                            // SYNC: rx-tail
                            entry.rx_tail.store(tail, Release);
                        }
                    }
                    Err(errno) => {
                        rounds += 1;
                        if self.receive_failed(cx, id, errno)? {
                            break;
                        }
                    }
                }
                continue;
            }
            rounds += 1;
            let room = (free - 32 - MAX_CONTROL).min(MAX_DATAGRAM);
            let into = ring_segments(
                region,
                sock.rx.offset(),
                size,
                sock.rx_base,
                sock.rx_tail.wrapping_add(32),
                room,
            );
            let mut control = [0u8; MAX_CONTROL as usize];
            match cx.stack.recv_datagram(sock.handle, &into, &mut control) {
                Ok(received) => {
                    let len = (received.bytes as u32).min(room);
                    let control = &control[..received.control.min(control.len())];
                    let record = put_header(region, ring, sock.rx_tail, len, received.from, control);
                    sock.rx_tail = sock.rx_tail.wrapping_add(record);
                    let small = len as usize <= SMALL_DATAGRAM;
                    sock.bits = if small { sock.bits | SMALL } else { sock.bits & !SMALL };
                    sock.used_at = self.sweeps;
                    self.totals.bytes_in += len as u64;
                    self.limits.receive.charge(len as u64);
                    self.turn.charge(len + DATAGRAM);
                    got += 1;
                    if sock.bits & SMALL == 0 {
                        told = got;
                        // SYNC: rx-tail
                        entry.rx_tail.store(sock.rx_tail, Release);
                    }
                }
                Err(errno) => {
                    if self.receive_failed(cx, id, errno)? {
                        break;
                    }
                }
            }
        }
        if got > 0
            && let Some(sock) = self.socks.get_mut(id)
        {
            // SYNC: rx-tail
            entry.rx_tail.store(sock.rx_tail, Release);
            let generation = sock.generation;
            // One sleeper a datagram; a sender that waits for room must not be that one.
            let most = if entry.tx_wanted.load(Relaxed) != 0 { u32::MAX } else { got };
            self.events.raise(region, entry, id, generation, IN, most)?;
        }
        Ok(())
    }

    /// True: not now.
    pub(super) fn receive_failed(&mut self, cx: &mut Cx, id: u32, errno: Errno) -> Result<bool, Violation> {
        match errno {
            Errno(libc::EINTR) => {}
            errno if errno.is_shortage() => {
                self.starve(id);
                return Ok(true);
            }
            errno if errno.would_block() => {
                if let Some(sock) = self.socks.get_mut(id) {
                    sock.bits &= !RX_READY;
                }
            }
            errno => self.soft_error(cx, id, errno)?,
        }
        Ok(false)
    }
}
