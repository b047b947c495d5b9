use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use netkernel_service::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Peeked, Progress, Readiness, Ready, Received,
    ReceivedDatagram, Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram, TcpCounts,
};

use crate::host::{self, Namespace};
use crate::options::{Rule, rule};
use crate::{KernelConfig, Policy, recover};

/// Events of one `epoll_wait`.
const BATCH: usize = 256;
const SIOCATMARK: u64 = 0x8905;
/// Datagrams of one `sendmmsg`.
const DATAGRAMS: usize = 16;

/// Room for each datagram of one `recvmmsg`: whatever its size is. Only what datagrams touched takes memory.
const DATAGRAM_BYTES: usize = 65536;
/// Room for the control messages of each.
const CONTROL_BYTES: usize = 512;

/// The kernel stack of one switch thread and module.
pub struct KernelStack {
    epoll: OwnedFd,
    sockets: Vec<Socket>,
    free: Vec<u32>,
    namespace: Namespace,
    /// Congestion control to set on new TCP sockets: the module's, unless it is the namespace's default anyway.
    set_congestion: Option<String>,
    config: KernelConfig,
    events: Vec<libc::epoll_event>,
    /// Buffers of `recvmmsg`, made when they are needed.
    datagrams: Vec<u8>,
    /// Descriptors from this number on are not given to sockets: the engine needs some to stay able to answer.
    highest: RawFd,
    /// The table was full; no accepts before something was closed.
    full: bool,
}

#[derive(Default)]
struct Socket {
    fd: Option<OwnedFd>,
    key: u64,
    registered: bool,
    /// The peer ended its direction, or an error came: a short read does not mean that there is nothing more.
    ended: bool,
    /// SO_LINGER as the guest set it. The kernel is not told: `close` would wait in this thread. Flushing happens in the
    /// background anyway, and a time of 0 comes as [`Close::Abort`].
    linger: [i32; 2],
}

impl KernelStack {
    /// Errors are sentences for the operator.
    pub fn new(config: KernelConfig) -> Result<KernelStack, String> {
        let namespace = Namespace::open(config.netns.as_deref())?;
        let default = namespace.within(|| host::probe(config.congestion_control.as_deref()))??;
        // SAFETY: plain system call; the result is checked.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(format!("no epoll instance: {}", io::Error::last_os_error()));
        }
        Ok(KernelStack {
            // SAFETY: new and owned by nobody else.
            epoll: unsafe { OwnedFd::from_raw_fd(epoll) },
            sockets: Vec::new(),
            free: Vec::new(),
            namespace,
            set_congestion: config.congestion_control.clone().filter(|wanted| *wanted != default),
            config,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; BATCH],
            datagrams: Vec::new(),
            highest: highest_descriptor(),
            full: false,
        })
    }

    fn insert(&mut self, fd: OwnedFd, key: u64) -> Handle {
        let socket = Socket { fd: Some(fd), key, ..Socket::default() };
        match self.free.pop() {
            Some(index) => {
                self.sockets[index as usize] = socket;
                Handle(index)
            }
            None => {
                self.sockets.push(socket);
                Handle(self.sockets.len() as u32 - 1)
            }
        }
    }

    fn fd(&self, handle: Handle) -> Result<RawFd, Errno> {
        let socket = self.sockets.get(handle.0 as usize);
        socket.and_then(|s| s.fd.as_ref()).map(|fd| fd.as_raw_fd()).ok_or(Errno(libc::EBADF))
    }

    /// The number that the next descriptor would get.
    fn lowest_free(&self) -> Option<RawFd> {
        self.epoll.try_clone().ok().map(|copy| copy.as_raw_fd())
    }

    /// Puts the socket into the epoll instance. Only from here on are there reports; a TCP socket that is neither
    /// connected nor listening would report a hang-up that means nothing.
    fn register(&mut self, handle: Handle) -> Result<(), Errno> {
        let fd = self.fd(handle)?;
        let socket = &mut self.sockets[handle.0 as usize];
        if socket.registered {
            return Ok(());
        }
        let interest = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLPRI | libc::EPOLLET;
        let mut event = libc::epoll_event { events: interest as u32, u64: handle.0 as u64 };
        // SAFETY: both descriptors are open, event is valid for reads.
        check(unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) })?;
        socket.registered = true;
        Ok(())
    }
}

impl Stack for KernelStack {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        if domain != libc::AF_INET && domain != libc::AF_INET6 {
            return Err(Errno(libc::EAFNOSUPPORT));
        }
        let tcp = match kind {
            libc::SOCK_STREAM => true,
            libc::SOCK_DGRAM => false,
            _ => return Err(Errno(libc::ESOCKTNOSUPPORT)),
        };
        if protocol != 0 && protocol != if tcp { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP } {
            return Err(Errno(libc::EPROTONOSUPPORT));
        }
        let fd = self
            .namespace
            .within(|| host::socket(domain, kind, protocol))
            .map_err(|_| Errno(libc::ENETDOWN))?
            .map_err(|e| match from_io(e) {
                // The engine's limit is not the program's own.
                Errno(libc::EMFILE) => Errno(libc::ENFILE),
                other => other,
            })?;
        if fd.as_raw_fd() >= self.highest {
            return Err(Errno(libc::ENFILE));
        }
        if tcp && let Some(name) = &self.set_congestion {
            host::set_congestion(&fd, name).map_err(from_io)?;
        }
        host::mark_and_pace(&fd, &self.config).map_err(from_io)?;
        let handle = self.insert(fd, key);
        if !tcp {
            self.register(handle)?;
        }
        Ok(handle)
    }

    fn close(&mut self, handle: Handle, how: Close) {
        let Some(socket) = self.sockets.get_mut(handle.0 as usize) else { return };
        let Some(fd) = socket.fd.take() else { return };
        if how == Close::Abort {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            // SAFETY: linger is valid for reads of its size.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    (&raw const linger).cast(),
                    size_of::<libc::linger>() as libc::socklen_t,
                )
            };
        }
        self.free.push(handle.0);
    }

    fn give(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        let fd = self.fd(handle)?;
        let socket = &mut self.sockets[handle.0 as usize];
        if socket.registered {
            // SAFETY: both descriptors are open; DEL reads no event.
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
        }
        if socket.linger[0] != 0 {
            // SAFETY: the value, a struct linger, is valid for reads of its size.
            unsafe {
                libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, socket.linger.as_ptr().cast(), 8)
            };
        }
        self.free.push(handle.0);
        socket.fd.take().ok_or(Errno(libc::EBADF))
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        let bytes = address.as_bytes();
        // SAFETY: the address is valid for reads of its length.
        check(unsafe { libc::bind(self.fd(handle)?, bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) })
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        // SAFETY: plain system call.
        check(unsafe { libc::listen(self.fd(handle)?, backlog) })?;
        self.register(handle)
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        if address.family() == libc::AF_UNSPEC as u16 {
            return Err(Errno(libc::EINVAL));
        }
        let (bytes, fd) = (address.as_bytes(), self.fd(handle)?);
        // SAFETY: the address is valid for reads of its length.
        match check(unsafe { libc::connect(fd, bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) }) {
            Ok(()) => {
                self.register(handle)?;
                Ok(Connect::Done)
            }
            Err(Errno(libc::EINPROGRESS)) => {
                self.register(handle)?;
                Ok(Connect::Begun)
            }
            Err(errno) => Err(errno),
        }
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        if let Some(socket) = self.sockets.get_mut(handle.0 as usize) {
            socket.ended = false;
        }
        let unspecified = [0u8; 16];
        // SAFETY: the address is valid for reads of its length.
        check(unsafe { libc::connect(self.fd(handle)?, unspecified.as_ptr().cast(), 16) })
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let fd = self.fd(listener)?;
        if self.full && self.lowest_free().is_none_or(|fd| fd >= self.highest) {
            return Err(Errno(libc::EMFILE));
        }
        let mut address = Address::new();
        // SAFETY: the address and its length are valid for writes.
        let new = unsafe {
            libc::accept4(fd, address.pointer(), &mut address.len, libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
        };
        if new < 0 {
            return Err(last());
        }
        self.full = new >= self.highest;
        let linger = self.sockets[listener.0 as usize].linger;
        // SAFETY: new and owned by nobody else.
        let handle = self.insert(unsafe { OwnedFd::from_raw_fd(new) }, key);
        self.sockets[handle.0 as usize].linger = linger;
        if let Err(errno) = self.register(handle) {
            self.close(handle, Close::Abort);
            return Err(errno);
        }
        Ok(Accepted { handle, peer: address.get() })
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        let Ok(fd) = self.fd(listener) else { return false };
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, valid for reads and writes.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        let fd = self.fd(handle)?;
        let mut kernel_flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        if flags.more {
            kernel_flags |= libc::MSG_MORE;
        }
        if flags.urgent {
            kernel_flags |= libc::MSG_OOB;
        }
        let (iovecs, n) = data.iovecs();
        let sent = if n == 1 {
            // SAFETY: the run is valid for reads (contract of Segments).
            unsafe { libc::send(fd, iovecs[0].iov_base, iovecs[0].iov_len, kernel_flags) }
        } else {
            let message = header(&iovecs, n);
            // SAFETY: the header points to live iovecs, which describe valid runs (contract of Segments).
            unsafe { libc::sendmsg(fd, &message, kernel_flags) }
        };
        if sent < 0 { Err(last()) } else { Ok(sent as usize) }
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        let fd = self.fd(handle)?;
        let (iovecs, n) = into.iovecs();
        let received = if n == 1 {
            // SAFETY: the run is valid for writes (contract of Segments).
            unsafe { libc::recv(fd, iovecs[0].iov_base, iovecs[0].iov_len, libc::MSG_DONTWAIT) }
        } else {
            let mut message = header(&iovecs, n);
            // SAFETY: as for sendmsg, for writes.
            unsafe { libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT) }
        };
        if received < 0 {
            return Err(last());
        }
        let bytes = received as usize;
        // A short read means that the queue is empty, unless the end of the stream stands behind it.
        let more = bytes == into.len() || self.sockets[handle.0 as usize].ended;
        Ok(Received { bytes, more })
    }

    fn peek(&mut self, handle: Handle, skip: usize, into: &Segments) -> Peeked {
        let Ok(fd) = self.fd(handle) else { return Peeked::Unable };
        // What stays in the kernel must not close the window: nobody would report that it could be opened again.
        let (mut room, mut length) = (0i32, size_of::<i32>() as libc::socklen_t);
        // SAFETY: the option's value is an int, and both are valid for writes.
        unsafe {
            let room = (&raw mut room).cast();
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, room, &mut length);
        }
        if skip + into.len() > room.max(0) as usize / 4 {
            return Peeked::Unable;
        }
        let (runs, n) = into.iovecs();
        let mut skipped = vec![0u8; skip];
        let mut iovecs = [libc::iovec { iov_base: skipped.as_mut_ptr().cast(), iov_len: skip }; 3];
        iovecs[1..=n].copy_from_slice(&runs[..n]);
        // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        let first = usize::from(skip == 0);
        message.msg_iov = iovecs[first..].as_mut_ptr();
        message.msg_iovlen = (n + 1 - first) as _;
        // SAFETY: the header points to live iovecs; the runs are valid for writes (contract of Segments).
        let received = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        if received < 0 {
            let errno = last();
            return if errno.would_block() { Peeked::Nothing } else { Peeked::Failed(errno) };
        }
        if received as usize > skip {
            let bytes = received as usize - skip;
            let more = bytes == into.len() || self.sockets[handle.0 as usize].ended;
            return Peeked::Bytes(Received { bytes, more });
        }
        let mut poll = libc::pollfd { fd, events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one entry, valid for reads and writes.
        unsafe { libc::poll(&mut poll, 1, 0) };
        match poll.revents {
            seen if received == 0 || seen & libc::POLLERR != 0 => Peeked::Unable,
            seen if seen & libc::POLLRDHUP != 0 => Peeked::End,
            _ => Peeked::Nothing,
        }
    }

    fn discard(&mut self, handle: Handle, bytes: usize) -> Result<(), Errno> {
        let fd = self.fd(handle)?;
        let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
        // SAFETY: with MSG_TRUNC TCP drops bytes and writes none (tcp(7)).
        let n = unsafe { libc::recv(fd, std::ptr::null_mut(), bytes, flags) };
        if n == bytes as isize { Ok(()) } else { Err(Errno(libc::ECONNRESET)) }
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        Ok(ioctl_int(self.fd(handle)?, SIOCATMARK)? != 0)
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        let mut byte = 0u8;
        // SAFETY: one byte, valid for writes.
        let n = unsafe {
            libc::recv(self.fd(handle)?, (&raw mut byte).cast(), 1, libc::MSG_OOB | libc::MSG_DONTWAIT)
        };
        match n {
            1 => Ok(byte),
            0 => Err(Errno(libc::EINVAL)),
            _ => Err(last()),
        }
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        let fd = self.fd(handle)?;
        let n = datagrams.len().min(DATAGRAMS);
        let mut iovecs = [[libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2]; DATAGRAMS];
        // SAFETY: all-zero mmsghdrs are valid values of that plain C struct.
        let mut messages: [libc::mmsghdr; DATAGRAMS] = unsafe { std::mem::zeroed() };
        for (i, datagram) in datagrams[..n].iter().enumerate() {
            let (pair, count) = datagram.data.iovecs();
            iovecs[i] = pair;
            let message = &mut messages[i].msg_hdr;
            message.msg_iov = iovecs[i].as_mut_ptr();
            message.msg_iovlen = count as _;
            if !datagram.control.is_empty() {
                message.msg_control = datagram.control.as_ptr().cast_mut().cast();
                message.msg_controllen = datagram.control.len();
            }
            if !datagram.to.is_empty() {
                message.msg_name = datagram.to.as_bytes().as_ptr().cast_mut().cast();
                message.msg_namelen = datagram.to.as_bytes().len() as libc::socklen_t;
            }
        }
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: n headers that point to live iovecs and addresses; the runs are valid (contract of Segments).
        let sent = unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), n as u32, flags as _) };
        if sent < 0 { Err(last()) } else { Ok(sent as usize) }
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let (iovecs, n) = into.iovecs();
        receive_message(self.fd(handle)?, (&iovecs, n), control, libc::MSG_DONTWAIT)
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        let fd = self.fd(handle)?;
        let n = most.min(DATAGRAMS);
        if self.datagrams.is_empty() {
            self.datagrams = vec![0; DATAGRAMS * DATAGRAM_BYTES];
        }
        let mut addresses = [const { Address::new() }; DATAGRAMS];
        let mut controls = [[0u64; CONTROL_BYTES / 8]; DATAGRAMS];
        let mut iovecs = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; DATAGRAMS];
        // SAFETY: all-zero mmsghdrs are valid values of that plain C struct.
        let mut messages: [libc::mmsghdr; DATAGRAMS] = unsafe { std::mem::zeroed() };
        for (i, bytes) in self.datagrams.chunks_exact_mut(DATAGRAM_BYTES).take(n).enumerate() {
            iovecs[i] = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            let message = &mut messages[i].msg_hdr;
            message.msg_iov = &mut iovecs[i];
            message.msg_iovlen = 1;
            message.msg_name = addresses[i].pointer().cast();
            message.msg_namelen = addresses[i].len;
            message.msg_control = controls[i].as_mut_ptr().cast();
            message.msg_controllen = CONTROL_BYTES;
        }
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: n headers that point to live iovecs, and to payload, name and control buffers of the lengths they say.
        let got =
            unsafe { libc::recvmmsg(fd, messages.as_mut_ptr(), n as u32, flags as _, std::ptr::null_mut()) };
        if got < 0 {
            return Err(last());
        }
        for i in 0..got as usize {
            let message = &messages[i];
            addresses[i].len = message.msg_hdr.msg_namelen;
            let control = message.msg_hdr.msg_controllen.min(CONTROL_BYTES);
            // SAFETY: the kernel wrote `control` bytes, at most the buffer's length.
            let control = unsafe { std::slice::from_raw_parts(controls[i].as_ptr().cast::<u8>(), control) };
            let data =
                &self.datagrams[i * DATAGRAM_BYTES..][..(message.msg_len as usize).min(DATAGRAM_BYTES)];
            take(data, addresses[i].get(), control);
        }
        Ok(got as usize)
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let iovec = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        receive_message(self.fd(handle)?, (&[iovec, none], 1), control, flags)
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        Ok(ioctl_int(self.fd(handle)?, libc::FIONREAD)?.max(0) as usize)
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        let how = match how {
            Shutdown::Read => libc::SHUT_RD,
            Shutdown::Write => libc::SHUT_WR,
            Shutdown::Both => libc::SHUT_RDWR,
        };
        if how != libc::SHUT_WR
            && let Some(socket) = self.sockets.get_mut(handle.0 as usize)
        {
            socket.ended = true;
        }
        // SAFETY: plain system call.
        check(unsafe { libc::shutdown(self.fd(handle)?, how) })
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        let fd = self.fd(handle)?;
        match rule(level, name) {
            Rule::Pass if name == libc::SO_MAX_PACING_RATE && level == libc::SOL_SOCKET => {
                if self.config.pacing.is_some() {
                    // The module's limit is not the program's to lift.
                    return Err(Errno(libc::EPERM));
                }
            }
            Rule::Pass => {}
            Rule::Linger => {
                let Some(value) = value.get(..8) else { return Err(Errno(libc::EINVAL)) };
                let word =
                    |i: usize| i32::from_ne_bytes([value[i], value[i + 1], value[i + 2], value[i + 3]]);
                self.sockets[handle.0 as usize].linger = [i32::from(word(0) != 0), word(4)];
                return Ok(());
            }
            Rule::Priority => {
                let value: [u8; 4] =
                    value.get(..4).and_then(|v| v.try_into().ok()).ok_or(Errno(libc::EINVAL))?;
                if !(0..=6).contains(&i32::from_ne_bytes(value)) {
                    return Err(Errno(libc::EPERM));
                }
            }
            Rule::Local => return Ok(()),
            Rule::Read => return Err(Errno(libc::ENOPROTOOPT)),
            Rule::Guarded => return Err(Errno(libc::EPERM)),
            Rule::Deny(errno) => return Err(Errno(errno)),
            Rule::Congestion => {
                let wanted = host::text(value);
                let mut current = [0u8; 16];
                let n = option(fd, level, name, &mut current)?;
                let promised = self.config.congestion_control.as_deref();
                // A module that promises nothing has nothing to defend; but what needs a privilege is not the guest's.
                let same =
                    host::text(&current[..n]) == wanted && promised.is_none() || promised == Some(&wanted);
                // A name that no kernel knows is told as such.
                let known = || host::available_congestion_controls().contains(&wanted);
                match self.config.congestion_policy {
                    _ if same => return Ok(()),
                    Policy::Allow => {}
                    Policy::Ignore => return if known() { Ok(()) } else { Err(Errno(libc::ENOENT)) },
                    Policy::Refuse => return Err(Errno(if known() { libc::EPERM } else { libc::ENOENT })),
                }
            }
        }
        // SAFETY: the value is valid for reads of its length; the rule says that the kernel takes it as flat bytes.
        check(unsafe {
            libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
        })
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        let fd = self.fd(handle)?;
        match rule(level, name) {
            Rule::Deny(errno) => Err(Errno(errno)),
            Rule::Linger => {
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&self.sockets[handle.0 as usize].linger[0].to_ne_bytes());
                bytes[4..].copy_from_slice(&self.sockets[handle.0 as usize].linger[1].to_ne_bytes());
                let n = out.len().min(8);
                out[..n].copy_from_slice(&bytes[..n]);
                Ok(n)
            }
            _ => option(fd, level, name, out),
        }
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        const SIOCOUTQNSD: u64 = 0x894b;
        match request {
            r if r == libc::FIONREAD || r == libc::TIOCOUTQ || r == SIOCOUTQNSD || r == SIOCATMARK => {
                Ok(ioctl_int(self.fd(handle)?, request)? as u64)
            }
            _ => Err(Errno(libc::ENOTTY)),
        }
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        let mut address = Address::new();
        // SAFETY: the address and its length are valid for writes.
        check(unsafe { libc::getsockname(self.fd(handle)?, address.pointer(), &mut address.len) })?;
        Ok(address.get())
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        let mut address = Address::new();
        // SAFETY: the address and its length are valid for writes.
        check(unsafe { libc::getpeername(self.fd(handle)?, address.pointer(), &mut address.len) })?;
        Ok(address.get())
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        let mut value = [0u8; 4];
        option(self.fd(handle)?, libc::SOL_SOCKET, libc::SO_ERROR, &mut value)?;
        match i32::from_ne_bytes(value) {
            0 => Ok(()),
            errno => Err(Errno(errno)),
        }
    }

    fn descriptor(&self, handle: Handle) -> Option<RawFd> {
        self.fd(handle).ok()
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        let most = budget.min(self.events.len());
        // SAFETY: events is valid for `most` entries.
        let n = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), most as i32, 0) };
        for event in self.events.iter().take(n.max(0) as usize) {
            let (bits, index) = (event.events as i32, event.u64 as usize);
            let Some(socket) = self.sockets.get_mut(index) else { continue };
            let mut readiness = Readiness::default();
            for (bit, means) in [
                (libc::EPOLLIN, Readiness::READ),
                (libc::EPOLLOUT, Readiness::WRITE),
                (libc::EPOLLPRI, Readiness::URGENT),
                (libc::EPOLLRDHUP, Readiness::READ | Readiness::END),
                (libc::EPOLLERR | libc::EPOLLHUP, Readiness::READ | Readiness::ERROR),
            ] {
                if bits & bit != 0 {
                    readiness = readiness | means;
                }
            }
            if bits & (libc::EPOLLRDHUP | libc::EPOLLERR | libc::EPOLLHUP) != 0 {
                socket.ended = true;
            }
            ready.push(Ready { key: socket.key, readiness });
        }
    }

    fn tcp_counts(&mut self, handle: Handle) -> Option<TcpCounts> {
        host::tcp_counts(self.fd(handle).ok()?)
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn wakes_always(&self) -> bool {
        true
    }

    fn connected(&mut self, handle: Handle, readiness: Readiness) -> Result<bool, Errno> {
        // A socket that connects is not writable, one whose connect failed has hung up (tcp_poll).
        if readiness.has(Readiness::WRITE) && !readiness.has(Readiness::ERROR) {
            return Ok(true);
        }
        self.take_error(handle)?;
        Ok(self.peer_name(handle).is_ok())
    }

    fn lasting(&self, handle: Handle) -> Option<RawFd> {
        self.fd(handle).ok()
    }

    fn takes(&self) -> bool {
        true
    }

    fn adopt(&mut self, key: u64, fd: OwnedFd, tells: bool) -> Result<Handle, Errno> {
        let tcp = recover::is_inet(fd.as_raw_fd())?;
        if tcp && let Some(name) = &self.config.congestion_control {
            // Refused to a socket that is over; the one that it has is as good then.
            let _ = host::set_congestion(&fd, name);
        }
        let _ = host::mark_and_pace(&fd, &self.config);
        let linger = take_linger(&fd);
        let handle = self.insert(fd, key);
        self.sockets[handle.0 as usize].linger = linger;
        // What ended before is not reported again; reading on until nothing comes costs one call more.
        self.sockets[handle.0 as usize].ended = true;
        if tells {
            self.register(handle)?;
        }
        Ok(handle)
    }

    fn progress(&mut self, handle: Handle, connected: bool) -> Option<Progress> {
        recover::progress(self.fd(handle).ok()?, connected)
    }

    fn connecting(&mut self, handle: Handle) -> bool {
        let begun = self.fd(handle).is_ok_and(recover::connecting);
        begun && self.register(handle).is_ok()
    }
}

/// Whoever had it before told the kernel, see [`Socket::linger`], which is not to act by it any more.
fn take_linger(fd: &OwnedFd) -> [i32; 2] {
    let (mut told, off) = ([0; 2], [0; 2]);
    let mut length = size_of_val(&told) as libc::socklen_t;
    // SAFETY: both values are as large as a struct linger, which is two ints. Datagram sockets know the option too.
    unsafe {
        let (fd, level, name) = (fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER);
        libc::getsockopt(fd, level, name, (&raw mut told).cast(), &mut length);
        libc::setsockopt(fd, level, name, (&raw const off).cast(), length);
    }
    if told[0] != 0 { [1, told[1]] } else { [0; 2] }
}

/// Leaves a sixteenth of the table, at most 256 descriptors, for everything but sockets.
fn highest_descriptor() -> RawFd {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for writes.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    let limit = RawFd::try_from(limit.rlim_cur).unwrap_or(RawFd::MAX);
    limit - (limit / 16).min(256)
}

/// Room for a socket address that the kernel writes.
struct Address {
    storage: libc::sockaddr_in6,
    len: libc::socklen_t,
}

impl Address {
    const fn new() -> Address {
        Address {
            // SAFETY: an all-zero sockaddr_in6 is a valid value of that plain C struct.
            storage: unsafe { std::mem::zeroed() },
            len: size_of::<libc::sockaddr_in6>() as libc::socklen_t,
        }
    }

    fn pointer(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.storage).cast()
    }

    fn get(&self) -> SocketAddress {
        let len = (self.len as usize).min(size_of::<libc::sockaddr_in6>());
        // SAFETY: the storage is plain bytes without padding that matters, `len` of them inside it.
        SocketAddress::from_bytes(unsafe {
            std::slice::from_raw_parts((&raw const self.storage).cast(), len)
        })
    }
}

fn header(iovecs: &[libc::iovec; 2], n: usize) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = n as _;
    message
}

/// recvmsg(2) into the first of some iovecs, whose memory is live.
fn receive_message(
    fd: RawFd,
    (iovecs, n): (&[libc::iovec; 2], usize),
    control: &mut [u8],
    flags: i32,
) -> Result<ReceivedDatagram, Errno> {
    let mut address = Address::new();
    let mut message = header(iovecs, n);
    message.msg_name = address.pointer().cast();
    message.msg_namelen = address.len;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len();
    // SAFETY: the header points to live iovecs, as the callers see to, and to name and control buffers of the lengths it says.
    let received = unsafe { libc::recvmsg(fd, &mut message, flags) };
    if received < 0 {
        return Err(last());
    }
    address.len = message.msg_namelen;
    let control = message.msg_controllen.min(control.len());
    Ok(ReceivedDatagram { bytes: received as usize, from: address.get(), control })
}

pub(crate) fn option(fd: RawFd, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
    let mut len = out.len() as libc::socklen_t;
    // SAFETY: out is valid for writes of len bytes.
    check(unsafe { libc::getsockopt(fd, level, name, out.as_mut_ptr().cast(), &mut len) })?;
    Ok((len as usize).min(out.len()))
}

pub(crate) fn ioctl_int(fd: RawFd, request: u64) -> Result<i32, Errno> {
    let mut value = 0i32;
    // SAFETY: all requests that come here write one int.
    check(unsafe { libc::ioctl(fd, request as _, &raw mut value) })?;
    Ok(value)
}

fn check(result: i32) -> Result<(), Errno> {
    if result < 0 { Err(last()) } else { Ok(()) }
}

fn last() -> Errno {
    from_io(io::Error::last_os_error())
}

fn from_io(error: io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}
