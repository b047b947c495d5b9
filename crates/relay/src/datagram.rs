//! Datagrams, and who sent them.
//!
//! A received datagram goes into the program's Unix socket, so that poll and recv see it. Its sender cannot stand there: a
//! Unix socket would name a Unix socket. So the relay attaches a descriptor to it, of a small sealed file that holds the
//! sender's address and the control messages. A call that asks for neither drops it unseen; one that does is notified, and
//! the relay reads datagram and file by its duplicate of the program's socket.

use std::os::fd::{AsRawFd, OwnedFd};

use netkernel_abi::ancillary::{self, Fate};
use netkernel_agent::notify::Notification;
use netkernel_service::{Close, Datagram, Errno, SocketAddress, Stack};
use netkernel_shm::fds;

use crate::caller::{self, MAX_PAYLOAD, MessageHeader};
use crate::relay::{Answer, Answered, CHUNK, Relay};
use crate::socket::{Held, State};
use crate::sys;

/// Datagrams of one socket in one turn.
const BATCH: usize = 64;
/// Bytes of control messages of one datagram.
const MAX_CONTROL: usize = ancillary::MAX_CONTROL as usize;
/// Files that are kept for senders who send again.
const MAX_NOTES: usize = 256;
/// Bytes of a struct mmsghdr, and where its length stands.
const MANY: u64 = 64;
const MANY_LENGTH: u64 = 56;
/// UIO_MAXIOV.
const MAX_MANY: u64 = 1024;
const MSG_WAITFORONE: i32 = 0x10000;

/// In place of a sender.
const ERROR_MARK: &[u8] = &[u8::MAX];

const AGAIN: Errno = Errno::AGAIN;

impl Relay {
    pub(crate) fn pump_datagrams(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get(id as usize) else { return };
        if socket.end_hung_up && !socket.end_readable {
            return self.remove(id, Close::Graceful);
        }
        let up = self.up_datagrams(id);
        let down = self.down_datagrams(id);
        let Some(Some(socket)) = self.sockets.get(id as usize) else { return };
        if socket.end_hung_up && socket.up_ended {
            self.remove(id, Close::Graceful);
        } else if up || down {
            self.queue(id);
        }
    }

    /// What the program wrote to its connected socket. True: there may be more.
    fn up_datagrams(&mut self, id: u32) -> bool {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return false };
        for _ in 0..BATCH {
            let Some(end) = &socket.end else { return false };
            if !socket.stack_writable {
                return false;
            }
            let mut bytes = match socket.up_datagram.take() {
                Some(bytes) => bytes,
                None => {
                    if !socket.end_readable {
                        return false;
                    }
                    match sys::receive(end, &mut self.scratch[..CHUNK], 0) {
                        Ok(0) if socket.end_ended => {
                            (socket.end_readable, socket.up_ended) = (false, true);
                            return false;
                        }
                        Ok(n) => self.scratch[..n.min(CHUNK)].to_vec(),
                        Err(errno) => {
                            socket.end_readable = false;
                            socket.up_ended |= !errno.would_block();
                            return false;
                        }
                    }
                }
            };
            // Linux: EDESTADDRREQ, which nobody waits for here.
            if !socket.is_connected() {
                continue;
            }
            let n = bytes.len() as u64;
            let data = sys::segments(&mut bytes);
            let datagram = Datagram { data, to: SocketAddress::default(), control: &[] };
            match self.stack.send_datagrams(socket.handle, &[datagram]) {
                Ok(_) => socket.bytes_out += n,
                Err(errno) if errno.would_block() => {
                    socket.stack_writable = false;
                    socket.up_datagram = Some(bytes);
                    return false;
                }
                // Lost, as the datagram that learns of an error is on Linux; the errno is for the next who asks.
                Err(errno) => socket.error = Some(errno),
            }
        }
        true
    }

    /// What came for the program. True: there may be more.
    fn down_datagrams(&mut self, id: u32) -> bool {
        for _ in 0..BATCH {
            let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return false };
            if !socket.end_writable || socket.end_hung_up {
                return false;
            }
            let held = match socket.down_datagram.take() {
                Some(held) => held,
                None => {
                    if !socket.stack_readable {
                        return false;
                    }
                    let mut control = [0u8; MAX_CONTROL];
                    let into = sys::segments(&mut self.scratch[..MAX_PAYLOAD]);
                    match self.stack.recv_datagram(socket.handle, &into, &mut control) {
                        Ok(received) => {
                            let n = received.bytes.min(MAX_PAYLOAD);
                            socket.bytes_in += n as u64;
                            let bytes = self.scratch[..n].to_vec();
                            let control = &control[..received.control.min(MAX_CONTROL)];
                            let note = self.note(&received.from, control);
                            Held { bytes, note }
                        }
                        Err(errno) => {
                            socket.stack_readable = false;
                            if errno.would_block() {
                                return false;
                            }
                            // Who waits must wake: an empty datagram, marked, since no error can stand in this socket.
                            socket.error = Some(errno);
                            // There may be a datagram behind the error.
                            socket.stack_readable = true;
                            Held { bytes: Vec::new(), note: self.error_mark() }
                        }
                    }
                }
            };
            let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return false };
            let Some(end) = &socket.end else { return false };
            let note: Vec<i32> = held.note.iter().map(AsRawFd::as_raw_fd).collect();
            match fds::send(end.as_raw_fd(), &held.bytes, &note, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if sys::of(&error).would_block() => {
                    socket.end_writable = false;
                    socket.down_datagram = Some(held);
                    return false;
                }
                // Closed, or shut down; or too many descriptors are on their way to programs that do not look.
                Err(_) => {}
            }
        }
        true
    }

    /// The file that says who sent a datagram.
    fn note(&mut self, from: &SocketAddress, control: &[u8]) -> Option<OwnedFd> {
        let name = from.as_bytes();
        let mut text = vec![name.len() as u8];
        text.extend(name);
        text.extend(control);
        if !control.is_empty() {
            return sys::note(&text).ok();
        }
        if let Some(note) = self.notes.get(&text) {
            return note.try_clone().ok();
        }
        if self.notes.len() >= MAX_NOTES {
            self.notes.clear();
        }
        let note = sys::note(&text).ok()?;
        let copy = note.try_clone().ok();
        self.notes.insert(text, note);
        copy
    }

    /// What is attached to the empty datagram that stands for an error.
    fn error_mark(&mut self) -> Option<OwnedFd> {
        if let Some(mark) = self.notes.get(ERROR_MARK) {
            return mark.try_clone().ok();
        }
        let mark = sys::note(ERROR_MARK).ok()?;
        let copy = mark.try_clone().ok();
        self.notes.insert(ERROR_MARK.to_vec(), mark);
        copy
    }

    pub(crate) fn connect_datagrams(
        &mut self,
        id: u32,
        address: &SocketAddress,
        unspecified: bool,
    ) -> Answered {
        let handle = self.handle(id)?;
        // What was written before goes to whom it was written for.
        self.up_datagrams(id);
        let state = if unspecified {
            self.stack.disconnect(handle)?;
            State::Fresh
        } else {
            self.stack.connect(handle, address)?;
            State::Connected
        };
        if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
            socket.state = state;
        }
        Ok(Answer::Value(0))
    }

    pub(crate) fn datagram_call(&mut self, call: &Notification, id: u32, own: &OwnedFd) -> Answered {
        let [_, a, b, c, d, e] = call.arguments;
        match i64::from(call.nr) {
            libc::SYS_sendto => {
                let mut message = MessageHeader::of_one(a, b);
                (message.name, message.name_length) = (d, e as u32);
                self.send_datagram(call, id, own, &message, c as i32)
            }
            libc::SYS_sendmsg => {
                let message = MessageHeader::read(call, a)?;
                self.send_datagram(call, id, own, &message, b as i32)
            }
            libc::SYS_sendmmsg => {
                let mut sent = 0;
                for i in 0..b.min(MAX_MANY) {
                    let at = a + i * MANY;
                    let result = MessageHeader::read(call, at)
                        .and_then(|message| self.send_datagram(call, id, own, &message, c as i32));
                    let n = match result {
                        Ok(Answer::Value(n)) => n,
                        _ if sent > 0 => break,
                        other => return other,
                    };
                    caller::write(call, at + MANY_LENGTH, &(n as u32).to_ne_bytes())?;
                    sent += 1;
                }
                Ok(Answer::Value(sent))
            }
            libc::SYS_recvfrom => {
                let message = MessageHeader::of_one(a, b);
                let flags = c as i32;
                let Some((n, from, _, _)) = self.receive_datagram(call, id, own, &message, flags)? else {
                    return self.none_yet(own, flags);
                };
                caller::write_address(call, d, e, &from)?;
                Ok(Answer::Value(n))
            }
            libc::SYS_recvmsg => {
                let message = MessageHeader::read(call, a)?;
                match self.receive_datagram(call, id, own, &message, b as i32)? {
                    Some((n, from, control, flags)) => {
                        message.finish(call, &from, &control, flags)?;
                        Ok(Answer::Value(n))
                    }
                    None => self.none_yet(own, b as i32),
                }
            }
            libc::SYS_recvmmsg => {
                let mut got = 0;
                for i in 0..b.min(MAX_MANY) {
                    let at = a + i * MANY;
                    let message = MessageHeader::read(call, at)?;
                    match self.receive_datagram(call, id, own, &message, c as i32) {
                        Ok(Some((n, from, control, flags))) => {
                            message.finish(call, &from, &control, flags)?;
                            caller::write(call, at + MANY_LENGTH, &(n as u32).to_ne_bytes())?;
                        }
                        Ok(None) if got == 0 => return self.none_yet(own, c as i32 & !MSG_WAITFORONE),
                        Err(errno) if got == 0 => return Err(errno),
                        // What came is given at once, as with MSG_WAITFORONE.
                        _ => break,
                    }
                    got += 1;
                }
                Ok(Answer::Value(got))
            }
            _ => Ok(Answer::Through),
        }
    }

    fn send_datagram(
        &mut self,
        call: &Notification,
        id: u32,
        own: &OwnedFd,
        message: &MessageHeader,
        flags: i32,
    ) -> Answered {
        if flags & libc::MSG_OOB != 0 {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let to = if message.name == 0 {
            SocketAddress::default()
        } else {
            caller::read_address(call, message.name, message.name_length.into())?
        };
        let control = self.control_of(call, id, message)?;
        let mut payload = message.gather(call)?;
        // What was written before comes first.
        self.up_datagrams(id);
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(Errno(libc::EBADF)) };
        if to.is_empty() && !socket.is_connected() {
            return Err(Errno(libc::EDESTADDRREQ));
        }
        let n = payload.len();
        let data = sys::segments(&mut payload);
        match self.stack.send_datagrams(socket.handle, &[Datagram { data, to, control: &control }]) {
            Ok(_) => {
                socket.bytes_out += n as u64;
                Ok(Answer::Value(n as i64))
            }
            Err(errno) if errno.would_block() => {
                socket.stack_writable = false;
                if flags & libc::MSG_DONTWAIT != 0 || sys::is_nonblocking(own) {
                    return Err(AGAIN);
                }
                Ok(self.later(own, libc::SO_SNDTIMEO, libc::EAGAIN))
            }
            Err(errno) => Err(errno),
        }
    }

    /// The control messages that may be sent.
    fn control_of(&self, call: &Notification, id: u32, message: &MessageHeader) -> Result<Vec<u8>, Errno> {
        if message.control_length == 0 {
            return Ok(Vec::new());
        }
        if message.control_length > MAX_CONTROL {
            return Err(Errno(libc::ENOBUFS));
        }
        let v6 = matches!(self.sockets.get(id as usize), Some(Some(s)) if s.domain == libc::AF_INET6);
        let bytes = caller::read(call, message.control, message.control_length)?;
        let mut passed = Vec::new();
        for one in ancillary::messages(&bytes) {
            let one = one.map_err(|_| Errno(libc::EINVAL))?;
            match one.fate(v6) {
                Fate::Pass => {
                    passed.extend(((ancillary::HEADER + one.data.len()) as u64).to_ne_bytes());
                    passed.extend(one.level.to_ne_bytes());
                    passed.extend(one.kind.to_ne_bytes());
                    passed.extend(one.data);
                    passed.resize(passed.len().next_multiple_of(8), 0);
                }
                Fate::Ignore => {}
                Fate::Refuse(errno) => return Err(Errno(errno)),
            }
        }
        Ok(passed)
    }

    /// One datagram, given to the caller's memory: return value, sender, control messages, flags. `None`: there is none.
    #[allow(clippy::type_complexity)]
    fn receive_datagram(
        &mut self,
        call: &Notification,
        id: u32,
        own: &OwnedFd,
        message: &MessageHeader,
        flags: i32,
    ) -> Result<Option<(i64, SocketAddress, Vec<u8>, i32)>, Errno> {
        if flags & libc::MSG_OOB != 0 {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let handle = self.handle(id)?;
        if flags & libc::MSG_ERRQUEUE != 0 {
            let (mut bytes, mut control) = (vec![0; 2048], [0; MAX_CONTROL]);
            let received = self.stack.recv_error(handle, &mut bytes, &mut control)?;
            let n = received.bytes.min(bytes.len());
            message.scatter(call, &bytes[..n])?;
            let control = control[..received.control.min(MAX_CONTROL)].to_vec();
            return Ok(Some((n.min(message.length()) as i64, received.from, control, libc::MSG_ERRQUEUE)));
        }
        // What is in the stack comes into the program's socket first.
        self.down_datagrams(id);
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(Errno(libc::EBADF)) };
        let peek = flags & libc::MSG_PEEK;
        let received =
            fds::receive(own.as_raw_fd(), &mut self.scratch[..MAX_PAYLOAD], peek | libc::MSG_DONTWAIT);
        let (n, notes) = match received {
            // A Unix socket of this kind ends with the relay's end.
            Ok((0, notes)) if notes.is_empty() && socket.end.is_none() => {
                return Err(Errno(libc::ECONNRESET));
            }
            Ok(received) => received,
            Err(error) if sys::of(&error).would_block() => {
                return match socket.error.take() {
                    Some(errno) => Err(errno),
                    None => Ok(None),
                };
            }
            Err(error) => return Err(sys::of(&error)),
        };
        let note = notes.first().map(sys::read_note).unwrap_or_default();
        if note == ERROR_MARK {
            let error = socket.error.take();
            if peek != 0 {
                let _ = sys::receive(own, &mut [], 0);
            }
            return match error {
                Some(errno) => Err(errno),
                // Told by SO_ERROR meanwhile. No more than one mark stands for an error, so that this ends.
                None => self.receive_datagram(call, id, own, message, flags),
            };
        }
        let (from, control) = match note.split_first() {
            Some((&length, rest)) if rest.len() >= length.into() => {
                let (name, control) = rest.split_at(length.into());
                (SocketAddress::from_bytes(name), control.to_vec())
            }
            _ => (self.stack.peer_name(handle).unwrap_or_default(), Vec::new()),
        };
        let room = message.length();
        message.scatter(call, &self.scratch[..n])?;
        let cut = n > room;
        let value = if flags & libc::MSG_TRUNC != 0 { n } else { n.min(room) };
        Ok(Some((value as i64, from, control, if cut { libc::MSG_TRUNC } else { 0 })))
    }

    fn none_yet(&self, own: &OwnedFd, flags: i32) -> Answered {
        if flags & libc::MSG_DONTWAIT != 0 || sys::is_nonblocking(own) {
            return Err(AGAIN);
        }
        Ok(self.later(own, libc::SO_RCVTIMEO, libc::EAGAIN))
    }
}
