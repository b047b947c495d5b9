//! What each system call comes to.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;

use netkernel_agent::Policy;
use netkernel_agent::notify::Notification;
use netkernel_service::{Close, Connect, Errno, Handle, Shutdown, SocketAddress, Stack, now_ns};

use crate::caller::{self, MessageHeader};
use crate::relay::{Answer, Answered, CHUNK, PROGRAM_BUFFER, Relay};
use crate::socket::State;
use crate::sys;

const I386: u32 = 0x4000_0003;
/// The type proper, without SOCK_NONBLOCK and SOCK_CLOEXEC.
const TYPE_MASK: i32 = 0xf;
/// SOCK_PACKET.
const MAX_KIND: i32 = 10;
const SOCKET_FLAGS: i32 = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
/// Longest option value.
const MAX_OPTION: usize = 4096;
/// More than a quarter of what the kernel makes of [`PROGRAM_BUFFER`], above which a Unix socket is not writable.
const FILLER: usize = 112 << 10;
const _: () = assert!(FILLER > PROGRAM_BUFFER as usize / 2 && FILLER <= CHUNK);
/// Fills the smallest send buffer.
const FULL: usize = 2048;
/// Bytes that make a listener readable, at most; each is an edge for those who count edges.
const MAX_TOKENS: usize = 64;

/// Levels that an INET socket knows.
const LEVELS: [i32; 5] =
    [libc::SOL_SOCKET, libc::IPPROTO_IP, libc::IPPROTO_IPV6, libc::IPPROTO_TCP, libc::IPPROTO_UDP];
/// One more than the largest protocol (MPTCP).
const PROTOCOLS: i32 = 263;

const INVALID: Errno = Errno(libc::EINVAL);

impl Relay {
    /// A call that was made just now.
    pub(crate) fn dispatch(&mut self, call: &Notification) -> Answered {
        if call.arch == I386 {
            // The agent is asked for socket() and TCP_CONGESTION only, and 32-bit structures are not known here.
            return if call.nr == 366 {
                Ok(Answer::Through)
            } else {
                self.refuse(call, Errno(libc::EAFNOSUPPORT))
            };
        }
        if i64::from(call.nr) == libc::SYS_socket {
            return match self.socket(call) {
                Ok(answer) => Ok(answer),
                Err(errno) => self.refuse(call, errno),
            };
        }
        let number = call.arguments[0] as u32;
        let Some(inode) = sys::socket_of(call.pid, number) else { return Ok(Answer::Through) };
        let Some(&id) = self.ids.get(&inode) else { return Ok(Answer::Through) };
        let own = match self.threads.descriptor(call.pid, number, inode) {
            Ok(own) => own,
            // Closed or exchanged meanwhile: whatever is there now is no socket of the stack.
            Err(Errno(libc::EBADF)) => return Ok(Answer::Through),
            Err(errno) => return Err(errno),
        };
        if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
            socket.holder = (call.pid, number);
        }
        let answered = self.perform(call, id, &own, true);
        self.ask_for_room(id);
        match answered? {
            Answer::Later(deadline_ns, late) => {
                self.wait_for(call, id, deadline_ns, late);
                Ok(Answer::Done)
            }
            answer => Ok(answer),
        }
    }

    /// A call that waited.
    pub(crate) fn again(&mut self, call: &Notification, id: u32) -> Answered {
        let Some(Some(socket)) = self.sockets.get(id as usize) else { return Err(Errno(libc::EBADF)) };
        let own = self.threads.descriptor(call.pid, call.arguments[0] as u32, socket.inode)?;
        let answered = self.perform(call, id, &own, false);
        self.ask_for_room(id);
        answered
    }

    fn perform(&mut self, call: &Notification, id: u32, own: &OwnedFd, first: bool) -> Answered {
        let [_, a, b, c, ..] = call.arguments;
        match i64::from(call.nr) {
            libc::SYS_connect => self.connect(call, id, own, first),
            libc::SYS_bind => {
                let address = caller::read_address(call, a, b)?;
                let handle = self.handle(id)?;
                if !self.start.privileged && (1..1024).contains(&address.port()) {
                    return Err(Errno(libc::EACCES));
                }
                // What was closed before has its address no longer.
                self.settle();
                self.stack.bind(handle, &address).map(|()| Answer::Value(0))
            }
            libc::SYS_listen => self.listen(id, own, a as i32),
            libc::SYS_accept => self.accept(call, id, own, 0),
            libc::SYS_accept4 => self.accept(call, id, own, c as i32),
            libc::SYS_getsockname | libc::SYS_getpeername => {
                let handle = self.handle(id)?;
                let name = if i64::from(call.nr) == libc::SYS_getsockname {
                    self.stack.local_name(handle)?
                } else {
                    self.stack.peer_name(handle)?
                };
                caller::write_address(call, a, b, &name)?;
                Ok(Answer::Value(0))
            }
            libc::SYS_shutdown => self.shutdown(id, a as i32),
            libc::SYS_setsockopt => self.set_option(call, id),
            libc::SYS_getsockopt => self.option(call, id, own),
            libc::SYS_sendto
            | libc::SYS_recvfrom
            | libc::SYS_sendmsg
            | libc::SYS_recvmsg
            | libc::SYS_sendmmsg
            | libc::SYS_recvmmsg => {
                if self.is_stream(id) {
                    self.stream_message(call, id, own)
                } else {
                    self.datagram_call(call, id, own)
                }
            }
            _ => Ok(Answer::Through),
        }
    }

    pub(crate) fn handle(&self, id: u32) -> Result<Handle, Errno> {
        let socket = self.sockets.get(id as usize).and_then(Option::as_ref);
        socket.map(|socket| socket.handle).ok_or(Errno(libc::EBADF))
    }

    fn state(&self, id: u32) -> State {
        let socket = self.sockets.get(id as usize).and_then(Option::as_ref);
        socket.map_or(State::Over, |socket| socket.state)
    }

    fn set_state(&mut self, id: u32, state: State) {
        if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
            socket.state = state;
        }
    }

    fn is_stream(&self, id: u32) -> bool {
        self.sockets.get(id as usize).and_then(Option::as_ref).is_some_and(|socket| socket.is_stream())
    }

    // ---- socket()

    fn socket(&mut self, call: &Notification) -> Answered {
        let [domain, kind, protocol] = [0, 1, 2].map(|i| call.arguments[i] as i32);
        if kind & !(TYPE_MASK | SOCKET_FLAGS) != 0 {
            return Err(INVALID);
        }
        let (flags, kind) = (kind & SOCKET_FLAGS, kind & TYPE_MASK);
        if kind > MAX_KIND || !(0..PROTOCOLS).contains(&protocol) {
            return Err(INVALID);
        }
        match kind {
            libc::SOCK_STREAM | libc::SOCK_DGRAM => {}
            libc::SOCK_RAW | MAX_KIND => return Err(Errno(libc::EPERM)),
            _ => return Err(Errno(libc::ESOCKTNOSUPPORT)),
        }
        let id = self.open(domain, kind, protocol)?;
        let given = self.pair(id, flags & libc::SOCK_NONBLOCK != 0).and_then(|theirs| {
            let close_on_exec = flags & libc::SOCK_CLOEXEC != 0;
            self.start
                .listener
                .give_at_once(call, &theirs, close_on_exec, None)
                .map_err(|error| sys::of(&error))
        });
        match given {
            Ok(number) => {
                if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
                    socket.holder = (call.pid, number as u32);
                }
                self.served();
                Ok(Answer::Done)
            }
            Err(errno) => {
                self.remove(id, Close::Graceful);
                Err(errno)
            }
        }
    }

    /// A socket that is not served.
    fn refuse(&mut self, call: &Notification, errno: Errno) -> Answered {
        let start = &self.start;
        // The engine's shortage, not the program's fault, is what fail-open is for.
        let shortage = matches!(errno.0, libc::ENETDOWN | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM);
        if start.settings.fail_open && (shortage || call.arch == I386) {
            if start.counters.let_through.fetch_add(1, Relaxed) == 0 {
                log::warn!(
                    guest = start.guest, errno = errno.0;
                    "guest {}: a socket could not be served (errno {}) and is the host's own now (--fail-open)",
                    start.guest,
                    errno.0
                );
            }
            return Ok(Answer::Through);
        }
        if start.counters.refused.fetch_add(1, Relaxed) == 0 && call.arch == I386 {
            log::warn!(
                guest = start.guest;
                "guest {}: 32-bit programs are not served by a relay: their sockets are refused",
                start.guest
            );
        }
        Err(errno)
    }

    // ---- connect()

    fn connect(&mut self, call: &Notification, id: u32, own: &OwnedFd, first: bool) -> Answered {
        let address = caller::read_address(call, call.arguments[1], call.arguments[2])?;
        let unspecified = address.as_bytes().len() >= 2 && address.family() == libc::AF_UNSPEC as u16;
        if !self.is_stream(id) {
            return self.connect_datagrams(id, &address, unspecified);
        }
        match self.state(id) {
            // Linux's words for a listener.
            State::Connected | State::Listening if !unspecified => {
                let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(INVALID) };
                if std::mem::take(&mut socket.unreported) || !first {
                    return Ok(Answer::Value(0));
                }
                Err(Errno(libc::EISCONN))
            }
            State::Connecting { .. } => {
                if sys::is_nonblocking(own) {
                    return Err(Errno(libc::EALREADY));
                }
                Ok(self.later(own, libc::SO_SNDTIMEO, libc::EALREADY))
            }
            // What became of a connect that did not wait is told once.
            State::Over if first && !unspecified && self.was_unreported(id) => {
                Err(self.take_error(id).unwrap_or(Errno(libc::ECONNABORTED)))
            }
            // It waited, and the connect failed.
            State::Fresh | State::Over if !first => {
                Err(self.take_error(id).unwrap_or(Errno(libc::ECONNABORTED)))
            }
            State::Over if unspecified => Ok(Answer::Value(0)),
            State::Over => {
                let (fresh, own) = self.renew(call, id, own)?;
                match self.begin_connect(fresh, &own, &address)? {
                    Answer::Later(deadline_ns, late) => {
                        self.wait_for(call, fresh, deadline_ns, late);
                        Ok(Answer::Done)
                    }
                    answer => Ok(answer),
                }
            }
            _ if unspecified => {
                let handle = self.handle(id)?;
                self.stack.disconnect(handle)?;
                self.fail_waiting(id, INVALID);
                match self.state(id) {
                    // Who reads must not wait for ever.
                    State::Connected => self.hang_up(id),
                    _ => self.set_state(id, State::Fresh),
                }
                Ok(Answer::Value(0))
            }
            State::Fresh => self.begin_connect(id, own, &address),
            State::Connected | State::Listening => Err(Errno(libc::EISCONN)),
        }
    }

    fn begin_connect(&mut self, id: u32, own: &OwnedFd, address: &SocketAddress) -> Answered {
        let handle = self.handle(id)?;
        let nonblocking = sys::is_nonblocking(own);
        // Listeners that were closed must not be found any more.
        self.settle();
        let mut begun = self.stack.connect(handle, address);
        if self.was_unreported(id) && matches!(begun, Err(Errno(libc::ECONNABORTED))) {
            // The kernel's word for the failure before, which was told already.
            begun = self.stack.connect(handle, address);
        }
        let begun = begun?;
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(INVALID) };
        // What was written before: Linux would not have taken it.
        if let Some(end) = &socket.end {
            while sys::receive(end, &mut self.scratch, 0).is_ok_and(|n| n > 0) {}
        }
        if begun == Connect::Done {
            self.connected(id);
            return Ok(Answer::Value(0));
        }
        let mut filler = 0;
        if nonblocking {
            self.scratch[..FILLER].fill(0);
            filler = sys::send(own, &self.scratch[..FILLER]).unwrap_or(0);
        }
        socket.state = State::Connecting { filler };
        socket.unreported = true;
        if nonblocking {
            return Err(Errno(libc::EINPROGRESS));
        }
        Ok(self.later(own, libc::SO_SNDTIMEO, libc::EINPROGRESS))
    }

    /// The stack reported something of a socket that connects.
    pub(crate) fn check_connect(&mut self, id: u32) {
        let Ok(handle) = self.handle(id) else { return };
        if let Err(errno) = self.stack.take_error(handle) {
            return self.connect_failed(id, errno);
        }
        if self.stack.peer_name(handle).is_ok() {
            self.connected(id);
        }
    }

    fn connected(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if let (State::Connecting { filler }, Some(end)) = (socket.state, &socket.end) {
            let mut left = filler;
            while left > 0 {
                let room = left.min(self.scratch.len());
                match sys::receive(end, &mut self.scratch[..room], 0) {
                    Ok(n) if n > 0 => left -= n,
                    _ => break,
                }
            }
        }
        socket.state = State::Connected;
        self.start.counters.connections.fetch_add(1, Relaxed);
        socket.end_readable = true;
        socket.stack_readable = true;
        socket.stack_writable = true;
        self.queue(id);
    }

    fn connect_failed(&mut self, id: u32, errno: Errno) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        let filler = matches!(socket.state, State::Connecting { filler } if filler > 0);
        socket.error = Some(errno);
        if filler {
            // Whoever polls must see it.
            return self.break_off(id, errno);
        }
        // Blocking: the errno is the call's, and the socket can be used again.
        socket.unreported = true;
        socket.state = State::Fresh;
        self.queue(id);
    }

    /// The descriptor's socket is dead and the program wants to connect again: it gets a new one in its place.
    fn renew(&mut self, call: &Notification, id: u32, own: &OwnedFd) -> Result<(u32, OwnedFd), Errno> {
        let Some(Some(socket)) = self.sockets.get(id as usize) else { return Err(INVALID) };
        let number = call.arguments[0] as u32;
        let (domain, kind) = (socket.domain, socket.kind);
        let fresh = self.open(domain, kind, 0)?;
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", call.pid)).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok()).unwrap_or(0);
        let theirs = self.pair(fresh, sys::is_nonblocking(own)).and_then(|theirs| {
            let close_on_exec = flags & libc::O_CLOEXEC != 0;
            let given = self.start.listener.give_at_once(call, &theirs, close_on_exec, Some(number));
            given.map(|_| theirs).map_err(|error| sys::of(&error))
        });
        match theirs {
            Ok(theirs) => {
                if let Some(Some(socket)) = self.sockets.get_mut(fresh as usize) {
                    socket.holder = (call.pid, number);
                }
                self.remove(id, Close::Graceful);
                Ok((fresh, theirs))
            }
            Err(errno) => {
                self.remove(fresh, Close::Graceful);
                Err(errno)
            }
        }
    }

    /// Waits, at most for as long as the socket's time-out says.
    pub(crate) fn later(&self, own: &OwnedFd, option: i32, late: i32) -> Answer {
        Answer::Later(sys::time_option(own, option).map(|ns| now_ns() + ns), Errno(late))
    }

    // ---- listeners

    fn listen(&mut self, id: u32, own: &OwnedFd, backlog: i32) -> Answered {
        let handle = self.handle(id)?;
        if !self.is_stream(id) {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        match self.state(id) {
            State::Fresh | State::Listening => {}
            _ => return Err(INVALID),
        }
        self.settle();
        self.stack.listen(handle, backlog)?;
        if self.state(id) != State::Listening {
            // A listener is not writable.
            sys::set_int_option(own, libc::SO_SNDBUF, 1);
            while sys::send(own, &self.scratch[..FULL]).is_ok() {}
        }
        self.set_state(id, State::Listening);
        Ok(Answer::Value(0))
    }

    /// A connection may wait, or the listener was closed.
    pub(crate) fn listener_event(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if socket.end_hung_up {
            return self.remove(id, Close::Graceful);
        }
        if !std::mem::take(&mut socket.stack_readable) {
            return;
        }
        let generation = socket.generation;
        self.retry(id, generation);
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        let waits = !socket.returned.is_empty() || self.stack.acceptable(socket.handle);
        if waits
            && socket.tokens < MAX_TOKENS
            && let Some(end) = &socket.end
            && sys::send(end, &[0]).is_ok()
        {
            socket.tokens += 1;
        }
    }

    fn accept(&mut self, call: &Notification, id: u32, own: &OwnedFd, flags: i32) -> Answered {
        if flags & !SOCKET_FLAGS != 0 {
            return Err(INVALID);
        }
        if !self.is_stream(id) {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        if self.state(id) != State::Listening {
            // Of a listener that was lost.
            let over = self.state(id) == State::Over;
            return Err(over.then(|| self.take_error(id)).flatten().unwrap_or(INVALID));
        }
        let accepted = self.take_connection(id);
        // Before the answer: who polls after it must see what is true then.
        if !matches!(accepted, Err(Errno::AGAIN)) || sys::is_nonblocking(own) {
            self.count_tokens(id, own);
        }
        match accepted {
            Ok((new, peer)) => self.give_connection(call, id, new, peer, flags),
            Err(errno) if errno.would_block() => {
                if sys::is_nonblocking(own) {
                    Err(errno)
                } else {
                    Ok(self.later(own, libc::SO_RCVTIMEO, libc::EAGAIN))
                }
            }
            Err(errno) => Err(errno),
        }
    }

    /// The oldest connection of a listener, with a number for it.
    fn take_connection(&mut self, id: u32) -> Result<(u32, SocketAddress), Errno> {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(INVALID) };
        let (handle, domain, kind) = (socket.handle, socket.domain, socket.kind);
        let abort = socket.abort;
        if let Some((id, peer)) = socket.returned.pop_front() {
            return Ok((id, peer));
        }
        let new = self.vacancy()?;
        match self.stack.accept(handle, Relay::key(new)) {
            Ok(accepted) => {
                self.insert(new, accepted.handle, domain, kind);
                self.start.counters.connections.fetch_add(1, Relaxed);
                if let Some(Some(socket)) = self.sockets.get_mut(new as usize) {
                    socket.state = State::Connected;
                    socket.abort = abort;
                }
                Ok((new, accepted.peer))
            }
            Err(errno) => {
                self.no_vacancy(new);
                Err(errno)
            }
        }
    }

    /// Gives an accepted connection to the program. If it does not wait any more, or has no room, the connection is lost
    /// to this call only when Linux would lose it.
    fn give_connection(
        &mut self,
        call: &Notification,
        listener: u32,
        new: u32,
        peer: SocketAddress,
        flags: i32,
    ) -> Answered {
        let [_, name_at, length_at, ..] = call.arguments;
        if name_at != 0
            && let Err(errno) = caller::write_address(call, name_at, length_at, &peer)
        {
            self.remove(new, Close::Graceful);
            return Err(errno);
        }
        let close_on_exec = flags & libc::SOCK_CLOEXEC != 0;
        let given = self.pair(new, flags & libc::SOCK_NONBLOCK != 0).and_then(|theirs| {
            let given = self.start.listener.give_at_once(call, &theirs, close_on_exec, None);
            given.map_err(|error| sys::of(&error))
        });
        match given {
            Ok(number) => {
                if let Some(Some(socket)) = self.sockets.get_mut(new as usize) {
                    socket.holder = (call.pid, number as u32);
                    socket.stack_readable = true;
                }
                self.served();
                self.queue(new);
                Ok(Answer::Done)
            }
            Err(errno) => {
                self.give_back(listener, new, peer);
                Err(errno)
            }
        }
    }

    /// The connection waits for the next accept. It keeps its number, by which the stack reports it.
    fn give_back(&mut self, listener: u32, new: u32, peer: SocketAddress) {
        if let Some(Some(socket)) = self.sockets.get_mut(new as usize) {
            socket.end = None;
            let inode = std::mem::take(&mut socket.inode);
            self.ids.remove(&inode);
        }
        match self.sockets.get_mut(listener as usize) {
            Some(Some(listening)) => {
                listening.returned.push_back((new, peer));
                listening.stack_readable = true;
                self.queue(listener);
            }
            _ => self.remove(new, Close::Abort),
        }
    }

    /// The listener is readable as long as a connection waits.
    fn count_tokens(&mut self, id: u32, own: &OwnedFd) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if socket.state != State::Listening {
            return;
        }
        let waits = !socket.returned.is_empty() || self.stack.acceptable(socket.handle);
        if waits && socket.tokens == 0 {
            if let Some(end) = &socket.end
                && sys::send(end, &[0]).is_ok()
            {
                socket.tokens = 1;
            }
        } else if !waits && socket.tokens > 0 {
            let mut tokens = [0; MAX_TOKENS];
            let _ = sys::receive(own, &mut tokens, 0);
            socket.tokens = 0;
        }
    }

    // ---- shutdown()

    fn shutdown(&mut self, id: u32, how: i32) -> Answered {
        let how = match how {
            libc::SHUT_RD => Shutdown::Read,
            libc::SHUT_WR => Shutdown::Write,
            libc::SHUT_RDWR => Shutdown::Both,
            _ => return Err(INVALID),
        };
        let handle = self.handle(id)?;
        match self.state(id) {
            State::Fresh | State::Over => Err(Errno(libc::ENOTCONN)),
            State::Listening => {
                self.stack.shutdown(handle, how)?;
                if how != Shutdown::Write {
                    self.set_state(id, State::Fresh);
                    self.fail_waiting(id, INVALID);
                }
                Ok(Answer::Value(0))
            }
            State::Connecting { .. } => {
                self.stack.shutdown(handle, how)?;
                self.set_state(id, State::Fresh);
                self.fail_waiting(id, Errno(libc::ECONNRESET));
                Ok(Answer::Value(0))
            }
            State::Connected => {
                // What came before can be read still.
                self.pump(id);
                if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
                    socket.shut_read |= how != Shutdown::Write;
                    socket.shut_write |= how != Shutdown::Read;
                    socket.down_closed |= how != Shutdown::Write;
                }
                // The program's own socket is shut by the kernel, which tells the relay in order.
                Ok(Answer::Through)
            }
        }
    }

    // ---- options

    fn set_option(&mut self, call: &Notification, id: u32) -> Answered {
        let [_, level, name, value_at, length, _] = call.arguments;
        let (level, name, length) = (level as i32, name as i32, length as i32);
        let handle = self.handle(id)?;
        let length = usize::try_from(length).map_err(|_| INVALID)?;
        if length > MAX_OPTION {
            return Err(INVALID);
        }
        let value = caller::read(call, value_at, length)?;
        let congestion = (level, name) == (libc::IPPROTO_TCP, libc::TCP_CONGESTION);
        if congestion && length == 0 {
            return Err(INVALID);
        }
        if congestion && self.rules.get(handle.place()).is_some_and(|rules| rules.policy == Policy::Ignore) {
            return Ok(Answer::Value(0));
        }
        self.stack.set_option(handle, level, name, &value)?;
        if (level, name) == (libc::SOL_SOCKET, libc::SO_LINGER)
            && let Some(Some(socket)) = self.sockets.get_mut(id as usize)
        {
            let word = |at: usize| value.get(at..at + 4).map(|b| b.iter().any(|&b| b != 0));
            socket.abort = word(0) == Some(true) && word(4) == Some(false);
        }
        Ok(Answer::Value(0))
    }

    fn option(&mut self, call: &Notification, id: u32, own: &OwnedFd) -> Answered {
        let [_, level, name, value_at, length_at, _] = call.arguments;
        let (level, name) = (level as i32, name as i32);
        let room = usize::try_from(caller::read_int(call, length_at)?).map_err(|_| INVALID)?;
        let mut value = [0u8; MAX_OPTION];
        let room = room.min(MAX_OPTION);
        let own_int = match (level, name) {
            (libc::SOL_SOCKET, libc::SO_ERROR) => Some(self.socket_error(id, own)),
            (libc::SOL_SOCKET, own_name) => self.int_of(id, own_name),
            _ => None,
        };
        let n = match own_int {
            Some(int) => {
                let n = room.min(4);
                value[..n].copy_from_slice(&int.to_ne_bytes()[..n]);
                n
            }
            None if !LEVELS.contains(&level) => return Err(Errno(libc::EOPNOTSUPP)),
            None => {
                let handle = self.handle(id)?;
                self.stack.option(handle, level, name, &mut value[..room])?
            }
        };
        caller::write(call, value_at, &value[..n])?;
        caller::write(call, length_at, &(n as u32).to_ne_bytes())?;
        Ok(Answer::Value(0))
    }

    /// What the relay itself knows.
    fn int_of(&self, id: u32, name: i32) -> Option<i32> {
        let socket = self.sockets.get(id as usize)?.as_ref()?;
        let tcp = socket.is_stream();
        match name {
            libc::SO_TYPE => Some(socket.kind),
            libc::SO_DOMAIN => Some(socket.domain),
            libc::SO_PROTOCOL => Some(if tcp { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP }),
            libc::SO_ACCEPTCONN => Some(i32::from(socket.state == State::Listening)),
            _ => None,
        }
    }

    fn was_unreported(&mut self, id: u32) -> bool {
        let socket = self.sockets.get_mut(id as usize).and_then(Option::as_mut);
        socket.is_some_and(|socket| std::mem::take(&mut socket.unreported))
    }

    fn take_error(&mut self, id: u32) -> Option<Errno> {
        self.sockets.get_mut(id as usize)?.as_mut()?.error.take()
    }

    /// SO_ERROR: once.
    fn socket_error(&mut self, id: u32, own: &OwnedFd) -> i32 {
        if let State::Connecting { .. } = self.state(id) {
            // It may have ended just now.
            self.check_connect(id);
        }
        if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
            let over = socket.state == State::Over;
            if over {
                socket.broken = None;
            }
            // Of a broken connection, the kernel's own mark is taken with it; gone already: a read told it.
            let marked = sys::int_option(own, libc::SO_ERROR) > 0;
            if let Some(errno) = socket.error.take() {
                return if over && !marked { 0 } else { errno.0 };
            }
            if let Some(errno) = socket.broken {
                return errno.0;
            }
            if over {
                return 0;
            }
            return self.stack.take_error(socket.handle).err().map_or(0, |errno| errno.0);
        }
        0
    }

    // ---- streams with an address, or a message

    fn stream_message(&mut self, call: &Notification, id: u32, own: &OwnedFd) -> Answered {
        let nr = i64::from(call.nr);
        let reads = matches!(nr, libc::SYS_recvfrom | libc::SYS_recvmsg | libc::SYS_recvmmsg);
        let flags_at = match nr {
            libc::SYS_recvmsg => 2,
            _ => 3,
        };
        if reads && call.arguments[flags_at] as i32 & libc::MSG_ERRQUEUE != 0 {
            return Err(Errno::AGAIN);
        }
        match self.state(id) {
            State::Connected | State::Over => {}
            _ if reads => return Err(Errno(libc::ENOTCONN)),
            State::Fresh | State::Listening => return Err(Errno(libc::EPIPE)),
            State::Connecting { .. } => {}
        }
        // The kernel reads no address into what reads; and a message that is sent has an address only by mistake.
        if nr != libc::SYS_sendto || self.state(id) == State::Over {
            return Ok(Answer::Through);
        }
        let [_, data, length, flags, ..] = call.arguments;
        if flags as i32 & libc::MSG_FASTOPEN != 0 {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        // TCP does not look at the address of a connected socket; a Unix socket would refuse it.
        let payload = MessageHeader::of_one(data, length.min(caller::MAX_PAYLOAD as u64)).gather(call)?;
        match sys::send(own, &payload) {
            Ok(n) => Ok(Answer::Value(n as i64)),
            Err(errno)
                if errno.would_block()
                    && !sys::is_nonblocking(own)
                    && flags as i32 & libc::MSG_DONTWAIT == 0 =>
            {
                Ok(self.later(own, libc::SO_SNDTIMEO, libc::EAGAIN))
            }
            Err(errno) => Err(errno),
        }
    }
}
