//! Elements of the guest's queues: which are taken, and what they ask for.

use super::*;

impl Core {
    pub(super) fn drain(&mut self, cx: &mut Cx, budget: usize) -> Result<Drained, Violation> {
        let region = cx.region;
        let mut drained = Drained { elements: 0, more: false, again: false };
        let mut budget = budget;
        let policed = budget > 0 && !self.limits.operations.is_idle();
        if policed {
            match self.limits.operations.allow_operations(budget as u64, now_ns()) {
                Ok(allowed) => budget = allowed as usize,
                Err(again) => {
                    self.elements_until = again;
                    self.throttled_until = self.throttled_until.min(again);
                    return Ok(drained);
                }
            }
        }
        if let Some((q, nqe)) = self.held.take() {
            self.element(cx, q, nqe, true)?;
        }
        let header = region.header();
        // Once round, from where the last turn ended: its word is looked at twice, first from there on, then up to there.
        let (first, bit) = (self.next_queue as usize / 64, self.next_queue % 64);
        for step in 0..=ACTIVE_WORDS {
            let word = (first + step) % ACTIVE_WORDS;
            if header.active[word].load(Relaxed) != 0 {
                // SYNC: active - the elements pushed before the bit was set are visible.
                self.pending[word] |= header.active[word].swap(0, SeqCst);
            }
            let mut bits = self.pending[word]
                & match step {
                    0 => !0 << bit,
                    ACTIVE_WORDS => !(!0 << bit),
                    _ => !0,
                };
            while bits != 0 {
                let q = word as u32 * 64 + bits.trailing_zeros();
                bits &= bits - 1;
                if drained.elements >= budget || self.turn.is_over() {
                    if policed && drained.elements >= budget {
                        self.limits.operations.want_more();
                    }
                    drained.more = true;
                    self.next_queue = q;
                    return Ok(drained);
                }
                let mut taken = 0;
                let empty = self.drain_queue(cx, q, &mut taken)?;
                drained.elements += taken;
                if taken > 0 {
                    self.limits.operations.charge(taken as u64);
                }
                if self.held.is_some() {
                    drained.again = true;
                    return Ok(drained);
                }
                if empty {
                    self.pending[word] &= !(1 << (q % 64));
                } else {
                    drained.more = true;
                }
            }
        }
        Ok(drained)
    }

    /// True: the rings of `q` are empty.
    pub(super) fn drain_queue(&mut self, cx: &mut Cx, q: u32, taken: &mut usize) -> Result<bool, Violation> {
        let region = cx.region;
        let (Some(jobs), Some(sends)) = (region.job(q), region.send(q)) else {
            return Err(Violation("active queue set out of range"));
        };
        self.highest_queue = self.highest_queue.max(q);
        for (ring, is_job) in [(jobs, true), (sends, false)] {
            let state = &self.events.queues[q as usize];
            let head = if is_job { state.job_head } else { state.send_head };
            let Ok(mut batch) = ring.batch(head, QUEUE_BATCH) else {
                return Err(Violation(if is_job { "job ring positions" } else { "send ring positions" }));
            };
            while let Some(words) = batch.next() {
                *taken += 1;
                self.totals.operations += 1;
                self.turn.charge(if is_job { JOB } else { ELEMENT });
                let nqe = Nqe::from_words(words);
                if nqe.stamp != 0 {
                    self.waited.record(since(nqe.stamp));
                }
                // Of a job that somebody waits for, the journal says that it was taken, and its answer that it was done.
                // Others are noted when they were done: each may be done twice.
                let noted = is_job && nqe.flags & flag::SYNC != 0;
                if noted {
                    self.events.queues[q as usize].job_head = batch.position();
                    compiler_fence(SeqCst);
                }
                self.element(cx, q, nqe, false)?;
                if is_job && !noted && self.held.is_none() {
                    self.events.queues[q as usize].job_head = batch.position();
                }
                if self.held.is_some() || self.turn.is_over() {
                    break;
                }
            }
            let head = batch.finish();
            let state = &mut self.events.queues[q as usize];
            *(if is_job { &mut state.job_head } else { &mut state.send_head }) = head;
            if self.held.is_some() {
                return Ok(false);
            }
        }
        let state = self.events.queues[q as usize];
        let empty = jobs.tail() == state.job_head && sends.tail() == state.send_head;
        if empty && state.releasing {
            self.release(region, q);
        }
        Ok(empty)
    }

    pub(super) fn release(&mut self, region: &Region, q: u32) {
        self.events.reset(region, q);
        self.pending[q as usize / 64] &= !(1 << (q % 64));
        self.released.push(q);
    }

    /// One element. `last`: it was held already; there is no second chance.
    pub(super) fn element(&mut self, cx: &mut Cx, q: u32, nqe: Nqe, last: bool) -> Result<(), Violation> {
        let Some(op) = Op::from_u8(nqe.op) else { return Err(Violation("unknown operation")) };
        let id = nqe.socket;
        let done = match op {
            Op::Release => {
                self.events.queues[q as usize].releasing = true;
                return Ok(());
            }
            // Hang-ups and channel messages of before are seen first.
            Op::Fence => Done::Again(0),
            Op::Complete | Op::Event => return Err(Violation("not an operation of guests")),
            _ => {
                if cx.region.socket(id).is_none() {
                    return Err(Violation("element for a socket out of range"));
                }
                let sock = self.socks.make(id).ok_or(Violation("element for a socket out of range"))?;
                // Pushed before its socket was closed, by a process that has gone on since; the id is in use again.
                let stale = nqe.status as u32 != sock.generation;
                if sock.kind == Kind::Free && !stale && sock.bits & SPARE != 0 {
                    self.reopen(cx, id)?;
                }
                let Some(sock) = self.socks.get_mut(id) else { return Ok(()) };
                if sock.kind == Kind::Free && !last && !stale {
                    self.held = Some((q, nqe));
                    return Ok(());
                }
                if !stale {
                    sock.used_at = self.sweeps;
                }
                match op {
                    _ if stale || sock.kind == Kind::Free || sock.bits & CLOSING != 0 => {
                        Done::Answer(-libc::EBADF, 0, 0)
                    }
                    Op::Send => return self.element_send(cx, id, nqe),
                    Op::Close => {
                        self.close_and_keep(cx, id)?;
                        Done::Answer(0, 0, 0)
                    }
                    Op::Peer => {
                        self.pair_element(cx, id, nqe.flags);
                        return Ok(());
                    }
                    Op::Credit => {
                        let Some(entry) = cx.region.socket(id) else { return Ok(()) };
                        if sock.bits & RX_STALLED != 0 {
                            sock.bits &= !RX_STALLED;
                            entry.rx_stalled.store(0, Relaxed);
                        }
                        return match sock.kind {
                            Kind::Listener => self.accept(cx, id),
                            Kind::Datagram => self.receive_datagrams(cx, id),
                            _ => self.receive(cx, id),
                        };
                    }
                    _ if sock.error != 0 && sock.handle == Handle::NONE => Done::Answer(-sock.error, 0, 0),
                    _ => self.job(cx, q, op, nqe)?,
                }
            }
        };
        match done {
            Done::Again(_) if !last => self.held = Some((q, nqe)),
            _ if nqe.flags & flag::SYNC == 0 => {}
            done => {
                let (status, size, op_data) = match done {
                    Done::Answer(status, size, value) => (status, size, value),
                    Done::Again(errno) => (-errno, 0, 0),
                };
                let answer = Nqe {
                    op: Op::Complete as u8,
                    queue_set: q as u16,
                    op_data: if op == Op::Ioctl && status == 0 { op_data } else { nqe.op_data },
                    size,
                    status,
                    ..nqe
                };
                self.events.complete(cx.region, q, answer)?;
            }
        }
        Ok(())
    }

    pub(super) fn element_send(&mut self, cx: &mut Cx, id: u32, nqe: Nqe) -> Result<(), Violation> {
        let Some(entry) = cx.region.socket(id) else { return Ok(()) };
        // SYNC: tx-pending - cleared before the tail is read: a writer that finds it set knows that its bytes are seen.
        entry.tx_pending.swap(0, SeqCst);
        self.send(cx, id, nqe.flags & flag::MORE != 0)
    }

    pub(super) fn job(&mut self, cx: &mut Cx, q: u32, op: Op, nqe: Nqe) -> Result<Done, Violation> {
        let id = nqe.socket;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        if sock.kind == Kind::Datagram {
            // What was sent before goes out before: it gives the socket its port, and errors their order.
            self.send(cx, id, false)?;
        }
        let Some(sock) = self.socks.get_mut(id) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
        let handle = sock.handle;
        let mut argument = [0u8; ARGUMENT_BYTES];
        let size = nqe.size as usize;
        if size > ARGUMENT_BYTES {
            return Ok(Done::Answer(-libc::EINVAL, 0, 0));
        }
        Ok(match op {
            Op::Bind => {
                cx.region.read_argument(q, &mut argument[..size]);
                let address = SocketAddress::from_bytes(&argument[..size]);
                if !self.privileged && (1..1024).contains(&address.port()) {
                    return Ok(Done::Answer(-libc::EACCES, 0, 0));
                }
                match cx.stack.bind(handle, &address) {
                    Ok(()) => {
                        sock.state |= state::BOUND;
                        self.publish_state(cx, id);
                        Done::Answer(0, 0, 0)
                    }
                    Err(Errno(libc::EADDRINUSE)) => Done::Again(libc::EADDRINUSE),
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::ErrorQueue => self.job_error_queue(cx, q, id),
            Op::Urgent => {
                let mark = nqe.op_data as u32;
                if sock.kind != Kind::Stream
                    || !(1..=sock.tx.size()).contains(&mark.wrapping_sub(sock.tx_head))
                {
                    return Ok(Done::Answer(-libc::EINVAL, 0, 0));
                }
                sock.tx_mark = mark;
                sock.bits |= TX_URGENT;
                Done::Answer(0, 0, 0)
            }
            Op::Accept => self.job_accept(cx, id)?,
            Op::Listen => self.job_listen(cx, id, nqe.op_data as u32 as i32)?,
            Op::Connect => {
                if sock.state & state::CONNECTING != 0 {
                    return Ok(Done::Answer(-libc::EALREADY, 0, 0));
                }
                if sock.kind != Kind::Datagram && sock.state & state::CONNECTED != 0 {
                    return Ok(Done::Answer(-libc::EISCONN, 0, 0));
                }
                if sock.kind == Kind::Stream
                    && sock.bits & COUNTED == 0
                    && let Some(quota) = &self.limits.connections
                {
                    if !quota.take() {
                        // As when no local port is left. The guest may have closed one that the engine did not look at.
                        return Ok(Done::Again(libc::EADDRNOTAVAIL));
                    }
                    sock.bits |= COUNTED;
                }
                cx.region.read_argument(q, &mut argument[..size]);
                let address = SocketAddress::from_bytes(&argument[..size]);
                if sock.kind == Kind::Stream {
                    sock.bits |= ACTIVE;
                    (sock.tx_start, sock.rx_start) = (sock.tx_head, sock.rx_tail);
                }
                let mut result = cx.stack.connect(handle, &address);
                if sock.state & state::CONNECT_FAILED != 0 && matches!(result, Err(Errno(libc::ECONNABORTED)))
                {
                    // The kernel tells the end of the connect before (whose SO_ERROR was taken) once more; now it is told.
                    result = cx.stack.connect(handle, &address);
                }
                if result.is_ok() && sock.kind == Kind::Stream {
                    entry.error.store(0, Relaxed);
                }
                match result {
                    Ok(Connect::Done) => {
                        sock.state |= state::CONNECTED | state::BOUND;
                        sock.state &= !state::CONNECT_FAILED;
                        sock.bits |= RX_READY;
                        let class = if sock.kind == Kind::Datagram { DATAGRAM_CLASS } else { STREAM_CLASS };
                        self.ensure_tx(cx, id, class);
                        self.publish_state(cx, id);
                        Done::Answer(0, 0, 0)
                    }
                    Ok(Connect::Begun) => {
                        sock.state |= state::CONNECTING | state::BOUND;
                        sock.state &= !state::CONNECT_FAILED;
                        self.publish_state(cx, id);
                        Done::Answer(-libc::EINPROGRESS, 0, 0)
                    }
                    Err(Errno(errno @ (libc::EADDRINUSE | libc::EADDRNOTAVAIL))) => Done::Again(errno),
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::Disconnect => {
                if sock.kind == Kind::Listener {
                    return Ok(Done::Answer(-libc::EOPNOTSUPP, 0, 0));
                }
                self.look_at_tcp(cx.stack, id);
                self.end_pair(cx.stack, id);
                let Some(sock) = self.socks.get_mut(id) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
                let result = cx.stack.disconnect(handle);
                if result.is_ok() {
                    // What follows is another connection.
                    sock.tcp = None.into();
                }
                if result.is_ok() && sock.kind == Kind::Stream {
                    self.disconnected(cx, id)?;
                } else if result.is_ok() {
                    sock.state &= !state::CONNECTED;
                    self.publish_state(cx, id);
                }
                Done::of(result)
            }
            Op::Shutdown => self.job_shutdown(cx, id, nqe.op_data)?,
            Op::SetOption => {
                let (level, name, value) = Nqe::split_option(nqe.op_data);
                let bytes = if size == 0 {
                    argument[..4].copy_from_slice(&value.to_ne_bytes());
                    &argument[..4]
                } else {
                    cx.region.read_argument(q, &mut argument[..size]);
                    &argument[..size]
                };
                let result = cx.stack.set_option(handle, level, name, bytes);
                if (level, name) == (libc::SOL_SOCKET, libc::SO_RCVBUF) && !sock.take_peeked(cx.stack) {
                    self.fail(cx, id, libc::ECONNRESET)?;
                    return Ok(Done::of(result));
                }
                if result.is_ok() && (level, name) == (libc::SOL_SOCKET, libc::SO_LINGER) {
                    sock.linger = Linger::of(bytes).unwrap_or(sock.linger);
                }
                Done::of(result)
            }
            Op::GetOption => {
                let (level, name, _) = Nqe::split_option(nqe.op_data);
                match cx.stack.option(handle, level, name, &mut argument[..size]) {
                    Ok(n) => {
                        let n = n.min(size);
                        cx.region.write_argument(q, &argument[..n]);
                        Done::Answer(0, n as u32, 0)
                    }
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::LocalName | Op::PeerName => {
                let local = op == Op::LocalName;
                let name = if local { cx.stack.local_name(handle) } else { cx.stack.peer_name(handle) };
                match name {
                    Ok(name) => {
                        cx.region.write_argument(q, name.as_bytes());
                        let len = name.as_bytes().len() as u32;
                        // A stream's names do not change any more.
                        if sock.kind == Kind::Stream && sock.state & state::CONNECTED != 0 {
                            let (words, valid) = if local {
                                (&entry.local, &entry.local_len)
                            } else {
                                (&entry.peer, &entry.peer_len)
                            };
                            for (word, value) in words.iter().zip(name.to_words()) {
                                word.store(value, Relaxed);
                            }
                            valid.store(len, Release);
                        }
                        Done::Answer(0, len, 0)
                    }
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::SendRing => {
                let class = match sock.kind {
                    Kind::Datagram => DATAGRAM_CLASS,
                    Kind::Stream if sock.state & state::CONNECTED != 0 => STREAM_CLASS,
                    _ => return Ok(Done::Answer(-libc::ENOTCONN, 0, 0)),
                };
                let status = match (self.ensure_tx(cx, id, class), class) {
                    (true, _) => 0,
                    (false, DATAGRAM_CLASS) => -libc::ENOBUFS,
                    // TCP never says ENOBUFS: it is as if the ring were full.
                    (false, _) => {
                        if let Some(sock) = self.socks.get_mut(id) {
                            sock.state |= state::NO_MEMORY;
                        }
                        self.publish_state(cx, id);
                        self.starve(id);
                        -libc::EAGAIN
                    }
                };
                Done::Answer(status, 0, 0)
            }
            Op::Ioctl => {
                let unsent = entry.tx_tail.load(Relaxed).wrapping_sub(sock.tx_head).min(sock.tx.size());
                match cx.stack.ioctl(handle, nqe.op_data) {
                    Ok(value) if nqe.op_data == libc::TIOCOUTQ => Done::Answer(0, 0, value + unsent as u64),
                    Ok(value) => Done::Answer(0, 0, value),
                    Err(errno) => Done::of(Err(errno)),
                }
            }
            Op::Wake => {
                self.events.wake(id, u32::MAX);
                Done::Answer(0, 0, 0)
            }
            Op::Release
            | Op::Fence
            | Op::Close
            | Op::Send
            | Op::Credit
            | Op::Peer
            | Op::Complete
            | Op::Event => Done::Answer(-libc::EINVAL, 0, 0),
        })
    }

    /// The stack has disconnected a stream socket: it is as new, but for the error that it may have.
    pub(super) fn disconnected(&mut self, cx: &mut Cx, id: u32) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        let errno = cx.stack.take_error(sock.handle).err().map_or(0, |e| e.0);
        sock.tx_head = entry.tx_tail.load(Acquire);
        entry.tx_head.store(sock.tx_head, Release);
        sock.error = 0;
        sock.bits &= QUEUED | STARVED | THROTTLED | COUNTED | UNTAKEN | SUSPECT;
        sock.state &= state::OPEN | state::BOUND;
        for word in [&entry.oob, &entry.peer_len, &entry.local_len, &entry.rx_stalled] {
            word.store(0, Relaxed);
        }
        entry.error.store(errno as u32, Relaxed);
        let generation = sock.generation;
        self.publish_state(cx, id);
        self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR | HUP, u32::MAX)
    }

    pub(super) fn job_listen(&mut self, cx: &mut Cx, id: u32, backlog: i32) -> Result<Done, Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        if sock.kind == Kind::Datagram {
            return Ok(Done::Answer(-libc::EOPNOTSUPP, 0, 0));
        }
        if sock.state & (state::CONNECTED | state::CONNECTING) != 0 {
            return Ok(Done::Answer(-libc::EINVAL, 0, 0));
        }
        match cx.stack.listen(sock.handle, backlog) {
            Ok(()) => {}
            Err(Errno(libc::EADDRINUSE)) => return Ok(Done::Again(libc::EADDRINUSE)),
            Err(errno) => return Ok(Done::of(Err(errno))),
        }
        if sock.rx.is_none() {
            let Some(block) = self.blocks.take(LISTENER_CLASS) else {
                return Ok(Done::Answer(-libc::ENOBUFS, 0, 0));
            };
            sock.rx = block;
            entry.rx_offset.store((block.offset() / 64) as u32, Relaxed);
            entry.rx_size.store(block.size(), Relaxed);
        }
        sock.kind = Kind::Listener;
        sock.link = if backlog < 0 { 4096 } else { backlog.min(4096) as u32 };
        sock.state &= !(state::RX_END | state::ON_DEMAND | state::ACCEPTABLE);
        sock.state |= state::LISTENING | state::BOUND;
        if (0..=SMALL_BACKLOG).contains(&backlog) || self.gives {
            sock.state |= state::ON_DEMAND;
        }
        sock.bits |= RX_READY;
        self.publish_state(cx, id);
        self.accept(cx, id)?;
        Ok(Done::Answer(0, 0, 0))
    }

    pub(super) fn job_error_queue(&mut self, cx: &mut Cx, q: u32, id: u32) -> Done {
        let Some(sock) = self.socks.get(id) else { return Done::Answer(-libc::EBADF, 0, 0) };
        let (mut payload, mut control) = ([0u8; ERROR_PAYLOAD], [0u8; ERROR_CONTROL]);
        match cx.stack.recv_error(sock.handle, &mut payload, &mut control) {
            Ok(received) => {
                let len = received.bytes.min(ERROR_PAYLOAD);
                let control = &control[..received.control.next_multiple_of(8).min(ERROR_CONTROL)];
                let (address, address_len) = received.from.to_datagram();
                let mut header = DatagramHeader { len: len as u32, address_len, address };
                header.set_control_len(control.len() as u32);
                let mut record = header_bytes(&header).to_vec();
                record.extend(&payload[..len]);
                record.resize(datagram_record(header.len) as usize, 0);
                record.extend(control);
                cx.region.write_argument(q, &record);
                Done::Answer(0, record.len() as u32, 0)
            }
            Err(errno) => Done::of(Err(errno)),
        }
    }

    pub(super) fn job_shutdown(&mut self, cx: &mut Cx, id: u32, how: u64) -> Result<Done, Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Done::Answer(-libc::EBADF, 0, 0));
        };
        let (read, write) = match how {
            0 => (true, false),
            1 => (false, true),
            2 => (true, true),
            _ => return Ok(Done::Answer(-libc::EINVAL, 0, 0)),
        };
        match sock.kind {
            Kind::Stream if sock.state & state::CONNECTED != 0 => {
                if read {
                    let _ = cx.stack.shutdown(sock.handle, Shutdown::Read);
                    sock.bits |= RX_READY | SHUT_RD;
                }
                if write && sock.state & state::TX_END == 0 {
                    sock.bits |= SHUT_WR;
                }
                if read {
                    self.receive(cx, id)?;
                }
                if write {
                    self.send(cx, id, false)?;
                }
                Ok(Done::Answer(0, 0, 0))
            }
            Kind::Listener if read => {
                let result = cx.stack.shutdown(sock.handle, Shutdown::Both);
                sock.state = (sock.state & !state::LISTENING) | state::RX_END;
                let generation = sock.generation;
                entry.state.store(sock.state, Release);
                self.drop_untaken(cx, id);
                self.events.raise(cx.region, entry, id, generation, IN | OUT | HUP | RDHUP, u32::MAX)?;
                Ok(Done::of(result))
            }
            _ => {
                let how = match (read, write) {
                    (true, true) => Shutdown::Both,
                    (true, false) => Shutdown::Read,
                    _ => Shutdown::Write,
                };
                if sock.kind == Kind::Datagram && write {
                    self.send(cx, id, false)?;
                }
                let Some(sock) = self.socks.get_mut(id) else { return Ok(Done::Answer(-libc::EBADF, 0, 0)) };
                let result = cx.stack.shutdown(sock.handle, how);
                if result.is_ok() && read && sock.state & state::CONNECTING != 0 {
                    self.disconnected(cx, id)?;
                } else if result.is_ok() && sock.kind == Kind::Datagram {
                    sock.state |=
                        if read { state::RX_END } else { 0 } | if write { state::TX_END } else { 0 };
                    let generation = sock.generation;
                    entry.state.store(sock.state, Release);
                    self.events.raise(cx.region, entry, id, generation, IN | OUT, u32::MAX)?;
                }
                Ok(Done::of(result))
            }
        }
    }
}
