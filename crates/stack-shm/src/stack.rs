mod datagram;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use netkernel_service::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Member, Paired, Peeked, RELAYED, Readiness, Ready,
    Received, ReceivedDatagram, Remains, Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram,
};

use crate::allowed::Allowed;
use crate::hub::{Hub, Listener, NOBODY, Network, Person, Waiting, canonical, destination, of_domain};
use crate::inbox::Inbox;
use crate::left::LeftSockets;
use crate::link::{Link, Side};
use datagram::Mail;

/// With reports of the hub there, the fallback is asked every so many turns only: that is a system call.
const FALLBACK_EVERY: u32 = 8;
/// What the kernel says of connections within the host.
const LOOPBACK_MTU: i32 = 65536;
const SIOCATMARK: u64 = 0x8905;
/// Tells of a connection only when its first bytes are there: the fallback does that.
const DEFER_ACCEPT: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT);
/// What a guest can never be told of.
const NO_KEY: u64 = u64::MAX;

/// How guests of this stack are joined with others.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub network: Network,
    /// Whose guests may reach this stack's in memory.
    pub allowed: Arc<Allowed>,
    /// Guests of one tenant get memory that both map.
    pub pair: bool,
}

/// Joins guests in memory; everything else is the fallback's.
pub struct ShmStack {
    pub(crate) fallback: Box<dyn Stack>,
    pub(crate) hub: Arc<Hub>,
    settings: Settings,
    pub(crate) inbox: Arc<Inbox>,
    /// Readable when the fallback or the inbox is.
    wake: Option<OwnedFd>,
    pub(crate) sockets: Vec<Option<Socket>>,
    free: Vec<u32>,
    /// By the upper half of the keys.
    pub(crate) people: Vec<Person>,
    /// Datagram sockets by their keys.
    pub(crate) by_key: HashMap<u64, u32>,
    /// Until when it is known of an address where a datagram to it comes from (`None`: it is not the host's).
    addresses: HashMap<IpAddr, (u64, Option<IpAddr>)>,
    most_addresses: usize,
    /// How many addresses guests had asked for, until when.
    asked: HashMap<u32, (u64, u32)>,
    pub(crate) left: LeftSockets,
    turns: u32,
    /// Accept from the fallback first, the next time.
    fallback_first: bool,
}

pub(crate) struct Socket {
    pub key: u64,
    pub domain: i32,
    pub kind: i32,
    pub protocol: i32,
    /// The fallback's socket; accepted ones get it when it is needed.
    pub shadow: Option<Handle>,
    /// Set so far: for shadows that are made later, and inherited by accepted sockets.
    pub options: Vec<(i32, i32, Vec<u8>)>,
    pub joined: Option<Joined>,
    pub listener: Option<Arc<Listener>>,
    /// It came from another stack: what was set so far is not known, and it is never joined.
    pub adopted: bool,
    /// Of a link that was dissolved.
    pub error: Option<Errno>,
    pub way: Option<String>,
    /// Of a datagram socket.
    pub mail: Option<Box<Mail>>,
}

pub(crate) struct Joined {
    pub link: Arc<Link>,
    pub side: Side,
    pub local: SocketAddress,
    pub peer: SocketAddress,
    /// The shadow was bound for this connection.
    pub bound_here: bool,
    /// Nobody was told so far that the connect has ended.
    pub connecting: bool,
}

impl ShmStack {
    /// To be used by the calling thread. Errors are sentences for the operator.
    pub fn new(fallback: Box<dyn Stack>, hub: Arc<Hub>, settings: Settings) -> Result<ShmStack, String> {
        let no = |e: io::Error| format!("no descriptors for the shared-memory stack: {e}");
        let inbox = Inbox::new().map_err(no)?;
        let wake = match fallback.wake_fd() {
            Some(fd) => Some(either(fd, inbox.bell()).map_err(no)?),
            None => None,
        };
        Ok(ShmStack {
            fallback,
            hub,
            settings,
            inbox: Arc::new(inbox),
            wake,
            sockets: Vec::new(),
            free: Vec::new(),
            people: Vec::new(),
            by_key: HashMap::new(),
            addresses: HashMap::new(),
            most_addresses: 0,
            asked: HashMap::new(),
            left: LeftSockets::default(),
            turns: 0,
            fallback_first: false,
        })
    }

    fn socket(&mut self, handle: Handle) -> Result<&mut Socket, Errno> {
        find(&mut self.sockets, handle)
    }

    fn joined(&self, handle: Handle) -> Option<&Joined> {
        self.sockets.get(handle.0 as usize)?.as_ref()?.joined.as_ref()
    }

    pub(crate) fn insert(&mut self, socket: Socket) -> Handle {
        match self.free.pop() {
            Some(index) => {
                self.sockets[index as usize] = Some(socket);
                Handle(index)
            }
            None => {
                self.sockets.push(Some(socket));
                Handle(self.sockets.len() as u32 - 1)
            }
        }
    }

    /// The fallback's socket, made if there is none.
    fn shadow(&mut self, handle: Handle) -> Result<Handle, Errno> {
        let socket = find(&mut self.sockets, handle)?;
        if let Some(shadow) = socket.shadow {
            return Ok(shadow);
        }
        let shadow = self.fallback.open(socket.key, socket.domain, socket.kind, socket.protocol)?;
        for (level, name, value) in &socket.options {
            // The fallback took it once.
            let _ = self.fallback.set_option(shadow, *level, *name, value);
        }
        socket.shadow = Some(shadow);
        Ok(shadow)
    }

    fn person(&self, key: u64) -> Person {
        let mut person = self.people.get((key >> 32) as usize).cloned().unwrap_or_else(Person::unknown);
        if key as u32 & RELAYED != 0 {
            // Whoever reads and writes there maps no memory.
            person.limits = None;
        }
        person
    }

    /// Connects in memory. `Ok(None)`: the fallback's affair, and why stands in `way`.
    fn join(&mut self, handle: Handle, address: &SocketAddress) -> Result<Option<Connect>, Errno> {
        let socket = self.socket(handle)?;
        if socket.adopted || socket.kind != libc::SOCK_STREAM || i32::from(address.family()) != socket.domain
        {
            return Ok(None);
        }
        let (key, domain, inline) = (socket.key, socket.domain, inline(&socket.options));
        if let Some(joined) = &socket.joined {
            return Err(Errno(if joined.link.is_established() { libc::EISCONN } else { libc::EALREADY }));
        }
        if socket.listener.is_some() {
            return Ok(None);
        }
        let only_v6 = is_set(&socket.options, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
        let Some((ip, port)) = canonical(address) else { return Ok(None) };
        let ip = destination(ip);
        if domain == libc::AF_INET6 && ip.is_ipv4() && only_v6 {
            return Ok(None);
        }
        let Some(listener) = self.hub.find(self.settings.network, ip, port) else {
            self.because(handle, "by the fallback stack: no guest of this engine listens there");
            return Ok(None);
        };
        let person = self.person(key);
        if let Err(reason) = listener.admits(&person) {
            self.because(handle, &format!("by the fallback stack: {reason}"));
            return Ok(None);
        }
        let Some(source) = self.source(ip) else {
            self.because(handle, "by the fallback stack: the address is not one of this host");
            return Ok(None);
        };
        // The shadow's port tells what TCP would, and is taken for as long as the connection lives.
        let shadow = self.shadow(handle)?;
        let mut local = canonical(&self.fallback.local_name(shadow)?).unwrap_or((source, 0));
        let bound_here = local.1 == 0;
        if bound_here {
            let any = of_domain(domain, (if local.0.is_unspecified() { source } else { local.0 }, 0));
            self.fallback.bind(shadow, &any).map_err(|errno| match errno {
                Errno(libc::EADDRINUSE) => Errno(libc::EADDRNOTAVAIL),
                other => other,
            })?;
            local = canonical(&self.fallback.local_name(shadow)?).unwrap_or(local);
        }
        if local.0.is_unspecified() {
            local.0 = source;
        }
        let pair = if self.settings.pair && listener.pair {
            listener.pairs_with(&person, &self.hub.pairs)
        } else {
            Err("pair is off for the stack of one of them")
        };
        let way = match &pair {
            Ok(_) => format!("in memory that both map, with guest slot {} on this engine", listener.guest),
            Err(reason) => {
                format!(
                    "in memory, with guest slot {} on this engine, which copies: {reason}",
                    listener.guest
                )
            }
        };
        let link = Arc::new(Link::new(Arc::clone(&self.inbox), key, inline, pair.ok()));
        let waiting = Waiting { link: Arc::clone(&link), client: local, server: (ip, port) };
        if !listener.enter(waiting) {
            self.because(handle, "by the fallback stack: the listener was being closed");
            return Ok(None);
        }
        let (local, peer) = (of_domain(domain, local), of_domain(domain, (ip, port)));
        self.because(handle, &way);
        self.socket(handle)?.joined =
            Some(Joined { link, side: Side::Client, local, peer, bound_here, connecting: true });
        // As TCP has it: a connect that does not wait is under way first.
        Ok(Some(Connect::Begun))
    }

    fn because(&mut self, handle: Handle, way: &str) {
        if let Ok(socket) = self.socket(handle) {
            socket.way = Some(way.into());
        }
    }

    /// The address that a connection to `ip` comes from. `None`: `ip` is not an address of this host.
    fn source(&mut self, ip: IpAddr) -> Option<IpAddr> {
        if ip.is_loopback() {
            return Some(if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { ip });
        }
        self.probe(ip)
    }

    /// As [`ShmStack::source`], asked of the fallback.
    fn probe(&mut self, ip: IpAddr) -> Option<IpAddr> {
        let domain = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        // Only addresses of the host can be bound to; where a datagram would come from is what its route says.
        let bound = self.fallback.open(NO_KEY, domain, libc::SOCK_DGRAM, 0).ok()?;
        let is_local = self.fallback.bind(bound, &of_domain(domain, (ip, 0))).is_ok();
        self.fallback.close(bound, Close::Graceful);
        if !is_local || ip.is_multicast() {
            return None;
        }
        let probe = self.fallback.open(NO_KEY, domain, libc::SOCK_DGRAM, 0).ok()?;
        let connected = self.fallback.connect(probe, &of_domain(domain, (ip, 9)));
        let name = self.fallback.local_name(probe);
        self.fallback.close(probe, Close::Graceful);
        connected.ok()?;
        Some(canonical(&name.ok()?)?.0)
    }

    fn stop_listening(&mut self, handle: Handle) {
        if let Ok(socket) = self.socket(handle)
            && let Some(listener) = socket.listener.take()
        {
            self.hub.remove(&listener);
            listener.close();
        }
    }

    /// Dissolves a link; the socket is as new.
    fn unjoin(&mut self, handle: Handle) -> bool {
        let Ok(socket) = self.socket(handle) else { return false };
        let Some(joined) = socket.joined.take() else { return false };
        socket.way = None;
        if joined.connecting || joined.link.is_connected(joined.side) {
            socket.error = Some(Errno(libc::ECONNRESET));
        }
        let shadow = if joined.bound_here { socket.shadow.take() } else { None };
        joined.link.close(joined.side, Close::Abort);
        if let Some(shadow) = shadow {
            self.fallback.close(shadow, Close::Graceful);
        }
        true
    }

    /// What the hub is to know of a socket that listens. `None`: nothing.
    pub(crate) fn make_listener(&mut self, handle: Handle) -> Result<Option<Arc<Listener>>, Errno> {
        let shadow = self.shadow(handle)?;
        let socket = self.socket(handle)?;
        let (key, domain) = (socket.key, socket.domain);
        let person = self.person(key);
        if person.owner == NOBODY {
            return Ok(None);
        }
        let Some((address, port)) = canonical(&self.fallback.local_name(shadow)?) else { return Ok(None) };
        let mut only = [0; 4];
        let v6only = domain == libc::AF_INET6
            && self.fallback.option(shadow, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &mut only).is_ok()
            && only != [0; 4];
        let listener = Arc::new(Listener {
            network: self.settings.network,
            address,
            port,
            both_families: domain == libc::AF_INET6 && address.is_unspecified() && !v6only,
            person,
            allowed: Arc::clone(&self.settings.allowed),
            pair: self.settings.pair,
            guest: (key >> 32) as u32,
            inbox: Arc::clone(&self.inbox),
            key,
            queue: Default::default(),
        });
        Ok(Some(listener))
    }

    /// Others find the listener from now on.
    pub(crate) fn publish(&mut self, handle: Handle, listener: Arc<Listener>) {
        self.hub.add(Arc::clone(&listener));
        if let Ok(socket) = self.socket(handle) {
            socket.listener = Some(listener);
            socket.way =
                Some("guests that may are joined with in memory, all others by the fallback stack".into());
        }
    }

    fn accept_in_memory(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let socket = self.socket(listener)?;
        let waiting = socket.listener.as_ref().and_then(|listener| listener.take()).ok_or(Errno::AGAIN)?;
        let (domain, protocol, options) = (socket.domain, socket.protocol, socket.options.clone());
        let inline = inline(&options);
        let peer = of_domain(domain, waiting.client);
        let way = if waiting.link.is_pair() {
            "in memory that both map, accepted from a guest of this engine"
        } else {
            "in memory, accepted from a guest of this engine, which copies"
        };
        waiting.link.accepted(Arc::clone(&self.inbox), key, inline);
        let joined = Joined {
            link: waiting.link,
            side: Side::Server,
            local: of_domain(domain, waiting.server),
            peer,
            bound_here: false,
            connecting: false,
        };
        let handle = self.insert(Socket {
            key,
            domain,
            kind: libc::SOCK_STREAM,
            protocol,
            shadow: None,
            options,
            joined: Some(joined),
            listener: None,
            adopted: false,
            error: None,
            way: Some(way.into()),
            mail: None,
        });
        Ok(Accepted { handle, peer })
    }

    fn accept_from_fallback(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let shadow = self.shadow(listener)?;
        let accepted = self.fallback.accept(shadow, key)?;
        let socket = self.socket(listener)?;
        let (domain, protocol) = (socket.domain, socket.protocol);
        let handle = self.insert(Socket {
            key,
            domain,
            kind: libc::SOCK_STREAM,
            protocol,
            shadow: Some(accepted.handle),
            options: Vec::new(),
            joined: None,
            listener: None,
            adopted: false,
            error: None,
            way: Some(
                "by the fallback stack: the peer is no guest of this engine, or was not to be joined".into(),
            ),
            mail: None,
        });
        Ok(Accepted { handle, peer: accepted.peer })
    }
}

impl Stack for ShmStack {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        let shadow = self.fallback.open(key, domain, kind, protocol)?;
        let mail = (kind == libc::SOCK_DGRAM).then(|| self.new_mail(key));
        let is_datagram = mail.is_some();
        let handle = self.insert(Socket {
            key,
            domain,
            kind,
            protocol,
            shadow: Some(shadow),
            options: Vec::new(),
            joined: None,
            listener: None,
            adopted: false,
            error: None,
            way: None,
            mail,
        });
        if is_datagram {
            self.by_key.insert(key, handle.0);
        }
        Ok(handle)
    }

    fn close(&mut self, handle: Handle, how: Close) {
        self.stop_listening(handle);
        let Some(socket) = self.sockets.get_mut(handle.0 as usize).and_then(Option::take) else { return };
        self.free.push(handle.0);
        if self.by_key.get(&socket.key) == Some(&handle.0) {
            self.by_key.remove(&socket.key);
        }
        if let Some(joined) = &socket.joined {
            joined.link.close(joined.side, how);
        }
        if let Some(shadow) = socket.shadow {
            self.fallback.close(shadow, how);
        }
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        if self.joined(handle).is_some() {
            return Err(Errno(libc::EINVAL));
        }
        let shadow = self.shadow(handle)?;
        let bound = self.fallback.bind(shadow, address);
        self.mail_named(handle);
        bound
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        if self.joined(handle).is_some() {
            return Err(Errno(libc::EINVAL));
        }
        let shadow = self.shadow(handle)?;
        self.fallback.listen(shadow, backlog)?;
        let socket = self.socket(handle)?;
        if let Some(listener) = &socket.listener {
            listener.set_backlog(backlog);
            return Ok(());
        }
        if socket.adopted {
            return Ok(());
        }
        if is_set(&socket.options, DEFER_ACCEPT.0, DEFER_ACCEPT.1) {
            socket.way = Some("by the fallback stack: TCP_DEFER_ACCEPT".into());
            return Ok(());
        }
        if let Some(listener) = self.make_listener(handle)? {
            listener.set_backlog(backlog);
            self.publish(handle, listener);
        }
        Ok(())
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        let connect = match self.join(handle, address)? {
            Some(connect) => connect,
            None => {
                let shadow = self.shadow(handle)?;
                let connect = self.fallback.connect(shadow, address);
                self.mail_connected(handle, connect.is_ok());
                connect?
            }
        };
        // What became of an earlier connection is no longer of interest, as on Linux.
        self.socket(handle)?.error = None;
        Ok(connect)
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        if self.unjoin(handle) {
            return Ok(());
        }
        self.stop_listening(handle);
        let shadow = self.shadow(handle)?;
        let disconnected = self.fallback.disconnect(shadow);
        self.mail_named(handle);
        disconnected
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        self.fallback_first = !self.fallback_first;
        if self.fallback_first {
            match self.accept_from_fallback(listener, key) {
                Err(errno) if errno.would_block() => self.accept_in_memory(listener, key),
                other => other,
            }
        } else {
            match self.accept_in_memory(listener, key) {
                Err(errno) if errno.would_block() => self.accept_from_fallback(listener, key),
                other => other,
            }
        }
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        if self.socket(listener).is_ok_and(|s| s.listener.as_ref().is_some_and(|l| l.acceptable())) {
            return true;
        }
        match self.shadow(listener) {
            Ok(shadow) => self.fallback.acceptable(shadow),
            Err(_) => false,
        }
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        if let Some(joined) = self.joined(handle) {
            return joined.link.send(joined.side, data, flags.urgent);
        }
        let shadow = self.shadow(handle)?;
        self.fallback.send(shadow, data, flags)
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        if let Some(joined) = self.joined(handle) {
            return joined.link.recv(joined.side, into);
        }
        let shadow = self.shadow(handle)?;
        self.fallback.recv(shadow, into)
    }

    fn peek(&mut self, handle: Handle, skip: usize, into: &Segments) -> Peeked {
        if self.joined(handle).is_some() {
            return Peeked::Unable;
        }
        self.shadow(handle).map_or(Peeked::Unable, |shadow| self.fallback.peek(shadow, skip, into))
    }

    fn discard(&mut self, handle: Handle, bytes: usize) -> Result<(), Errno> {
        let shadow = self.shadow(handle)?;
        self.fallback.discard(shadow, bytes)
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        if let Some(joined) = self.joined(handle) {
            return Ok(joined.link.at_mark(joined.side));
        }
        let shadow = self.shadow(handle)?;
        self.fallback.at_mark(shadow)
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        if let Some(joined) = self.joined(handle) {
            return joined.link.recv_urgent(joined.side);
        }
        let shadow = self.shadow(handle)?;
        self.fallback.recv_urgent(shadow)
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        self.send_mail(handle, datagrams)
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.recv_letter(handle, into, control)
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        self.recv_letters(handle, most, take)
    }

    fn recv_error(
        &mut self,
        handle: Handle,
        into: &mut [u8],
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let shadow = self.shadow(handle)?;
        self.fallback.recv_error(shadow, into, control)
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        self.next_letter(handle)
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        if let Some(joined) = self.joined(handle) {
            if !joined.connecting {
                return joined.link.shutdown(joined.side, how);
            }
            if how != Shutdown::Write {
                self.unjoin(handle);
            }
            return Ok(());
        }
        if how != Shutdown::Write {
            self.stop_listening(handle);
        }
        let shadow = self.shadow(handle)?;
        self.mail_shut(handle, how);
        self.fallback.shutdown(shadow, how)
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        let shadow = self.shadow(handle)?;
        self.fallback.set_option(shadow, level, name, value)?;
        if (level, name) == DEFER_ACCEPT {
            self.stop_listening(handle);
        }
        let socket = self.socket(handle)?;
        if socket.kind != libc::SOCK_STREAM {
            self.mail_option(handle, level, name, value);
            return Ok(());
        }
        socket.options.retain(|(l, n, _)| (*l, *n) != (level, name));
        socket.options.push((level, name, value.to_vec()));
        if (level, name) == (libc::SOL_SOCKET, libc::SO_OOBINLINE)
            && let Some(joined) = &socket.joined
        {
            joined.link.set_inline(joined.side, inline(&socket.options));
        }
        Ok(())
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        if (level, name) == (libc::SOL_SOCKET, libc::SO_ERROR)
            && let Some(joined) = self.joined(handle)
        {
            let errno = joined.link.take_error(joined.side).err().map_or(0, |errno| errno.0).to_ne_bytes();
            let n = out.len().min(4);
            out[..n].copy_from_slice(&errno[..n]);
            return Ok(n);
        }
        if matches!((level, name), (libc::IPPROTO_IP, libc::IP_MTU) | (libc::IPPROTO_IPV6, libc::IPV6_MTU))
            && self.joined(handle).is_some_and(|joined| joined.link.is_connected(joined.side))
        {
            let n = out.len().min(4);
            out[..n].copy_from_slice(&LOOPBACK_MTU.to_ne_bytes()[..n]);
            return Ok(n);
        }
        let shadow = self.shadow(handle)?;
        let n = self.fallback.option(shadow, level, name, out)?;
        if (level, name) == (libc::IPPROTO_TCP, libc::TCP_INFO)
            && let Some(joined) = self.joined(handle)
            && let Some(state) = out.first_mut()
        {
            *state = joined.link.tcp_state(joined.side);
        }
        Ok(n)
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        if let Some(joined) = self.joined(handle) {
            const SIOCOUTQNSD: u64 = 0x894b;
            return match request {
                r if r == libc::FIONREAD => Ok(joined.link.waiting(joined.side) as u64),
                r if r == libc::TIOCOUTQ || r == SIOCOUTQNSD => Ok(joined.link.unsent(joined.side) as u64),
                SIOCATMARK => Ok(u64::from(joined.link.at_mark(joined.side))),
                _ => Err(Errno(libc::ENOTTY)),
            };
        }
        if request == libc::FIONREAD && self.socket(handle)?.mail.is_some() {
            return Ok(self.next_letter(handle)? as u64);
        }
        let shadow = self.shadow(handle)?;
        self.fallback.ioctl(shadow, request)
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        if let Some(joined) = self.joined(handle) {
            return Ok(joined.local);
        }
        let shadow = self.shadow(handle)?;
        self.fallback.local_name(shadow)
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        if let Some(joined) = self.joined(handle) {
            if joined.link.is_connected(joined.side) {
                return Ok(joined.peer);
            }
            return Err(Errno(libc::ENOTCONN));
        }
        let shadow = self.shadow(handle)?;
        self.fallback.peer_name(shadow)
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        let socket = without_error(&mut self.sockets, handle)?;
        if let Some(joined) = &mut socket.joined {
            joined.connecting &= !joined.link.is_established();
            return joined.link.take_error(joined.side);
        }
        let shadow = self.shadow(handle)?;
        self.fallback.take_error(shadow)
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        let before = ready.len();
        self.inbox.take(ready, budget);
        let got = ready.len() - before;
        self.turns = self.turns.wrapping_add(1);
        if got == 0 || self.turns.is_multiple_of(FALLBACK_EVERY) {
            self.fallback.poll(ready, budget - got);
            self.mail_reported(&ready[before + got..]);
        }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.wake.as_ref().map(|fd| fd.as_raw_fd())
    }

    fn give(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        if self.joined(handle).is_some() {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let shadow = self.shadow(handle)?;
        self.may_give_mail(handle)?;
        let fd = match self.fallback.give(shadow) {
            Ok(fd) => fd,
            Err(errno) => {
                self.mail_named(handle);
                return Err(errno);
            }
        };
        self.stop_listening(handle);
        if let Some(socket) = self.sockets[handle.0 as usize].take() {
            self.by_key.remove(&socket.key);
        }
        self.free.push(handle.0);
        Ok(fd)
    }

    fn takes(&self) -> bool {
        self.fallback.takes()
    }

    fn movable(&self, handle: Handle) -> bool {
        let Some(Some(socket)) = self.sockets.get(handle.0 as usize) else { return false };
        let shadow = socket.shadow.filter(|_| socket.joined.is_none());
        shadow.is_some_and(|shadow| self.fallback.movable(shadow))
            && socket.listener.as_ref().is_none_or(|listener| listener.is_idle())
    }

    fn part(&mut self, handle: Handle) -> Result<OwnedFd, Errno> {
        if !self.movable(handle) {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        // Who comes from now on finds the descriptor's own queue.
        if let Some(listener) = &self.socket(handle)?.listener
            && !listener.close_if_idle()
        {
            return Err(Errno(libc::EBUSY));
        }
        self.give(handle)
    }

    fn adopt(&mut self, key: u64, fd: OwnedFd, tells: bool) -> Result<Handle, Errno> {
        let shadow = self.fallback.adopt(key, fd, tells)?;
        Ok(self.insert(Socket {
            key,
            domain: 0,
            kind: 0,
            protocol: 0,
            shadow: Some(shadow),
            options: Vec::new(),
            joined: None,
            listener: None,
            adopted: true,
            error: None,
            // What options it was given is not known: its datagrams are the fallback's.
            mail: None,
            way: Some("by the fallback stack: it was opened on another stack".into()),
        }))
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.fallback.deadline_ns()
    }

    fn guest(&mut self, guest: u32, owner: u32) {
        let index = guest as usize;
        if self.people.len() <= index {
            self.people.resize_with(index + 1, Person::unknown);
        }
        self.people[index] = Person { owner, serial: self.hub.pairs.serial(), ..Person::unknown() };
        self.fallback.guest(guest, owner);
    }

    fn member(&mut self, guest: u32, member: Member) {
        if let Some(person) = self.people.get_mut(guest as usize) {
            person.tenant = member.tenant;
            person.name = Arc::clone(&member.name);
            person.limits = Some(member.limits.clone());
            person.captures = Arc::clone(&member.captures);
        }
        self.fallback.member(guest, member);
    }

    fn guest_over(&mut self, guest: u32) {
        self.drop_left(guest);
        if let Some(person) = self.people.get_mut(guest as usize) {
            let person = std::mem::replace(person, Person::unknown());
            self.hub.pairs.over(person.serial);
        }
        self.asked.remove(&guest);
        self.fallback.guest_over(guest);
    }

    fn paired(&mut self, handle: Handle) -> Option<Paired> {
        let joined = self.joined(handle)?;
        joined.link.paired(joined.side)
    }

    fn wake_peer(&mut self, handle: Handle, urgent: bool) {
        if let Some(joined) = self.joined(handle) {
            joined.link.wake_peer(joined.side, urgent);
        }
    }

    fn leave(&mut self, guest: u32) -> Option<Box<dyn Remains>> {
        self.remains(guest)
    }

    fn take_up(&mut self, guest: u32, left: &str) {
        self.take_up_guest(guest, left);
    }

    fn resume(&mut self, key: u64, tells: bool) -> Result<Handle, Errno> {
        self.resume_socket(key, tells)
    }

    fn pair_memory(&mut self, guest: u32, number: u32) -> Option<OwnedFd> {
        let person = self.people.get(guest as usize)?;
        self.hub.pairs.descriptor(person.serial, number).ok()?
    }

    /// Of a connection in memory there is nothing to count.
    fn tcp_counts(&mut self, handle: Handle) -> Option<netkernel_service::TcpCounts> {
        let socket = self.socket(handle).ok()?;
        let shadow = socket.shadow.filter(|_| socket.joined.is_none())?;
        self.fallback.tcp_counts(shadow)
    }

    fn way(&mut self, handle: Handle) -> Option<String> {
        match self.mail_way(handle) {
            Some(way) => Some(way),
            None => self.socket(handle).ok()?.way.clone(),
        }
    }
}

fn find(sockets: &mut [Option<Socket>], handle: Handle) -> Result<&mut Socket, Errno> {
    sockets.get_mut(handle.0 as usize).and_then(Option::as_mut).ok_or(Errno(libc::EBADF))
}

/// As [`find`], once the error that the socket may have is told.
fn without_error(sockets: &mut [Option<Socket>], handle: Handle) -> Result<&mut Socket, Errno> {
    let socket = find(sockets, handle)?;
    socket.error.take().map_or(Ok(socket), Err)
}

fn is_set(options: &[(i32, i32, Vec<u8>)], level: i32, name: i32) -> bool {
    options.iter().any(|(l, n, value)| (*l, *n) == (level, name) && value.iter().any(|&byte| byte != 0))
}

fn inline(options: &[(i32, i32, Vec<u8>)]) -> bool {
    is_set(options, libc::SOL_SOCKET, libc::SO_OOBINLINE)
}

/// An epoll instance that is readable while one of the two is.
fn either(a: RawFd, b: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
    for fd in [a, b] {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        // SAFETY: both descriptors are open, event is valid for reads.
        if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(epoll)
}
