use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use netkernel_service::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Readiness, Ready, Received, ReceivedDatagram,
    Segments, SendFlags, Shutdown, SocketAddress, Stack, TakeDatagram, now_ns,
};
use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::socket::tcp::{self, State};
use smoltcp::socket::udp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint, IpListenEndpoint};

use crate::config::{Cidr, SmoltcpConfig};
use crate::device::Device;
use crate::options::{Options, Value};
use crate::packet::{self, Seen};
use crate::socket::{Body, Bound, Owner, Socket, Stream, WANTS_READ, WANTS_WRITE};
use crate::tap;

/// Bytes of each socket's buffers, one each way. Only what was used takes memory.
pub const BUFFER: usize = 64 << 10;
/// Sockets at a time: of guests, not accepted yet, and closing.
const SOCKETS: usize = 1024;
/// Datagrams that wait in a socket, each way.
const DATAGRAMS: usize = 64;
/// Frames of one turn: the switch thread has others to serve.
const FRAMES: usize = 128;
const BACKLOG: i32 = 256;
const SECOND: u64 = 1_000_000_000;
/// How long a socket that was closed may take to deliver.
const LINGER_NS: u64 = 60 * SECOND;
/// How long an RST may wait to be sent.
const RESET_NS: u64 = SECOND;
/// A neighbour that does not say where it is within this time is not there.
const NEIGHBOUR_NS: u64 = 3 * SECOND;
/// A handshake that the peer does not end within this time is given up: as Linux's tcp_synack_retries.
const HALF_OPEN_NS: u64 = 63 * SECOND;
const EPHEMERAL: std::ops::Range<u16> = 32768..61000;

/// The stack of one switch thread and module.
pub struct SmoltcpStack {
    interface: Interface,
    device: Device,
    set: SocketSet<'static>,
    sockets: Vec<Option<Socket>>,
    free: Vec<u32>,
    /// Streams by their ends: local, remote.
    streams: HashMap<(IpEndpoint, IpEndpoint), u32>,
    addresses: Vec<IpCidr>,
    gateways: Vec<IpAddress>,
    mtu: usize,
    /// Neighbours that were heard of.
    neighbours: HashMap<IpAddress, u64>,
    next_port: u16,
    /// An operation left something to send, or to report.
    dirty: bool,
    deadline_ns: Option<u64>,
    ready: VecDeque<Ready>,
    /// Nanoseconds that this stack's clock is ahead of the engine's: only tests do not wait for timers.
    ahead_ns: u64,
}

pub(crate) fn cidr(cidr: &Cidr) -> IpCidr {
    IpCidr::new(cidr.address.into(), cidr.prefix)
}

impl SmoltcpStack {
    /// Errors are sentences for the operator.
    pub fn new(config: &SmoltcpConfig) -> Result<SmoltcpStack, String> {
        config.validate()?;
        let wire = config.tap.as_deref().map(|name| tap::open(name, config.netns.as_deref())).transpose()?;
        Self::over(wire, config)
    }

    /// A stack over a descriptor that gives and takes one frame at a time, and never blocks.
    fn over(wire: Option<File>, config: &SmoltcpConfig) -> Result<SmoltcpStack, String> {
        let seed = tap::random();
        let mut hardware = [0x02; 6];
        // Locally administered; the rest is by chance, so that two stacks on one bridge differ.
        hardware[1..].copy_from_slice(&seed.to_ne_bytes()[..5]);
        let own = EthernetAddress(hardware);
        let mut addresses: Vec<IpCidr> = config.addresses.iter().map(cidr).collect();
        addresses.push(IpCidr::new(IpAddress::v4(127, 0, 0, 1), 8));
        if addresses.iter().any(|cidr| matches!(cidr, IpCidr::Ipv6(_))) {
            addresses.push(IpCidr::new(IpAddress::v6(0, 0, 0, 0, 0, 0, 0, 1), 128));
        }
        let own_addresses = addresses.iter().map(IpCidr::address).collect();
        let mut device = Device::new(wire, own, own_addresses, usize::from(config.mtu));
        let mut interface_config = Config::new(own.into());
        interface_config.random_seed = seed;
        let mut interface = Interface::new(interface_config, &mut device, instant(now_ns()));
        interface.update_ip_addrs(|list| {
            for cidr in &addresses {
                // The configuration was checked: there is room.
                let _ = list.push(*cidr);
            }
        });
        let gateways: Vec<IpAddress> = config.gateways.iter().map(|&gateway| gateway.into()).collect();
        for gateway in &gateways {
            let routes = interface.routes_mut();
            let added = match *gateway {
                IpAddress::Ipv4(gateway) => routes.add_default_ipv4_route(gateway).map(drop),
                IpAddress::Ipv6(gateway) => routes.add_default_ipv6_route(gateway).map(drop),
            };
            added.map_err(|_| "the table of routes is full".to_owned())?;
        }
        Ok(SmoltcpStack {
            interface,
            device,
            set: SocketSet::new(Vec::new()),
            sockets: Vec::new(),
            free: Vec::new(),
            streams: HashMap::new(),
            addresses,
            gateways,
            mtu: usize::from(config.mtu),
            neighbours: HashMap::new(),
            next_port: EPHEMERAL.start + (seed >> 32) as u16 % EPHEMERAL.len() as u16,
            dirty: false,
            deadline_ns: None,
            ready: VecDeque::new(),
            ahead_ns: 0,
        })
    }

    fn now_ns(&self) -> u64 {
        now_ns() + self.ahead_ns
    }

    fn socket(&mut self, handle: Handle) -> Result<&mut Socket, Errno> {
        let socket = self.sockets.get_mut(handle.0 as usize).and_then(Option::as_mut);
        socket.filter(|socket| socket.owner == Owner::Guest).ok_or(Errno(libc::EBADF))
    }

    fn insert(&mut self, socket: Socket) -> Option<u32> {
        if self.free.is_empty() && self.sockets.len() >= SOCKETS {
            self.evict();
        }
        if let Some(index) = self.free.pop() {
            self.sockets[index as usize] = Some(socket);
            return Some(index);
        }
        if self.sockets.len() >= SOCKETS {
            return None;
        }
        self.sockets.push(Some(socket));
        Some(self.sockets.len() as u32 - 1)
    }

    /// The table is full: connections that nobody has any more and that only wait make room.
    fn evict(&mut self) {
        let waiting = |socket: &Option<Socket>| {
            socket.as_ref().is_some_and(|socket| {
                matches!(socket.owner, Owner::Nobody(_))
                    && matches!(&socket.body, Body::Stream(stream) if stream.last == State::TimeWait)
            })
        };
        if let Some(index) = self.sockets.iter().position(waiting) {
            self.forget(index as u32);
        }
    }

    /// Takes the socket out of all tables, without a word to the peer.
    fn forget(&mut self, index: u32) {
        let Some(socket) = self.sockets.get_mut(index as usize).and_then(Option::take) else { return };
        self.free.push(index);
        match socket.body {
            Body::Stream(stream) => {
                self.set.remove(stream.socket);
                let ends = (stream.local, stream.remote);
                if self.streams.get(&ends) == Some(&index) {
                    self.streams.remove(&ends);
                }
            }
            Body::Datagram { socket, .. } => _ = self.set.remove(socket),
            Body::Idle | Body::Listener { .. } => {}
        }
    }

    /// What is left of a stream is delivered (or reset) in the background.
    fn orphan(&mut self, index: u32, how: Close) {
        self.dirty = true;
        let now = self.now_ns();
        let Some(socket) = self.sockets.get_mut(index as usize).and_then(Option::as_mut) else { return };
        let Body::Stream(stream) = &mut socket.body else { return self.forget(index) };
        let tcp = self.set.get_mut::<tcp::Socket>(stream.socket);
        // Unread bytes: the peer must know that they were not (RFC 2525, 2.17).
        let reset = how == Close::Abort || tcp.recv_queue() > 0;
        if stream.over || tcp.state() == State::SynSent {
            return self.forget(index);
        }
        if reset {
            tcp.abort();
        } else {
            tcp.close();
        }
        socket.owner = Owner::Nobody(now + if reset { RESET_NS } else { LINGER_NS });
    }

    fn unlisten(&mut self, listener: u32) {
        for index in 0..self.sockets.len() {
            let of = self.sockets[index].as_ref().map(|socket| socket.owner);
            if of == Some(Owner::Listener(listener)) {
                self.orphan(index as u32, Close::Abort);
            }
        }
    }

    // ---- addresses and ports

    fn is_own(&self, address: IpAddress) -> bool {
        self.addresses.iter().any(|cidr| cidr.address() == address)
    }

    fn on_link(&self, address: IpAddress) -> bool {
        self.addresses.iter().any(|cidr| cidr.contains_addr(&address))
    }

    /// Who gets a packet for `to` first.
    fn next_hop(&self, to: IpAddress) -> Result<IpAddress, Errno> {
        if self.on_link(to) {
            return Ok(to);
        }
        let same = |gateway: &&IpAddress| gateway.version() == to.version();
        self.gateways.iter().find(same).copied().ok_or(Errno(libc::ENETUNREACH))
    }

    fn is_broadcast(&self, address: IpAddress) -> bool {
        let IpAddress::Ipv4(v4) = address else { return false };
        v4.is_broadcast()
            || self
                .addresses
                .iter()
                .any(|cidr| matches!(cidr, IpCidr::Ipv4(cidr) if cidr.broadcast() == Some(v4)))
    }

    /// True when a socket of this kind may not be bound there.
    fn taken(&self, own: u32, stream: bool, reuse: bool, bound: &Bound) -> bool {
        self.sockets.iter().enumerate().any(|(index, other)| {
            let Some(other) = other else { return false };
            if index as u32 == own || other.is_stream() != stream {
                return false;
            }
            // Connections share their listener's port.
            if matches!(other.owner, Owner::Listener(_)) {
                return false;
            }
            let Some(theirs) = &other.bound else { return false };
            let listens = matches!(other.body, Body::Listener { .. });
            theirs.overlaps(bound) && !(reuse && other.options.reuse_address && !listens)
        })
    }

    fn ephemeral(&mut self, own: u32, stream: bool, mut bound: Bound) -> Result<Bound, Errno> {
        for _ in EPHEMERAL {
            self.next_port += 1;
            if !EPHEMERAL.contains(&self.next_port) {
                self.next_port = EPHEMERAL.start;
            }
            bound.port = self.next_port;
            if !self.taken(own, stream, false, &bound) {
                return Ok(bound);
            }
        }
        Err(Errno(if stream { libc::EADDRNOTAVAIL } else { libc::EAGAIN }))
    }

    /// A socket that sends or listens without having been bound gets a port.
    fn autobind(&mut self, handle: Handle) -> Result<Bound, Errno> {
        let socket = self.socket(handle)?;
        if let Some(bound) = socket.bound {
            return Ok(bound);
        }
        let (stream, any) = (socket.is_stream(), socket.binding(None, 0));
        let bound = self.ephemeral(handle.0, stream, any)?;
        self.settle(handle, bound)?;
        Ok(bound)
    }

    fn settle(&mut self, handle: Handle, bound: Bound) -> Result<(), Errno> {
        let socket = self.socket(handle)?;
        socket.bound = Some(bound);
        if let Body::Datagram { socket, .. } = socket.body {
            let udp = self.set.get_mut::<udp::Socket>(socket);
            udp.close();
            udp.bind(IpListenEndpoint { addr: bound.address, port: bound.port })
                .map_err(|_| Errno(libc::EINVAL))?;
        }
        Ok(())
    }

    // ---- frames

    /// Receives, sends, and lets the protocols' timers run.
    fn pump(&mut self) {
        let now_ns = self.now_ns();
        let now = instant(now_ns);
        let mut changed = std::mem::take(&mut self.dirty);
        let mut left = FRAMES;
        self.interface.poll_maintenance(now);
        let timers = self.deadline_ns.is_some_and(|deadline| deadline <= now_ns);
        changed |= timers;
        loop {
            while left > 0
                && let Some(frame) = self.device.next_frame()
            {
                left -= 1;
                changed = true;
                let seen = packet::look(&frame.bytes, frame.wire, |address| self.is_own(address));
                if self.before(seen, now_ns) {
                    self.device.give(frame.bytes);
                    self.interface.poll_ingress_single(now, &mut self.device, &mut self.set);
                    self.after(seen, now_ns);
                }
            }
            if !changed {
                return;
            }
            while self.interface.poll_egress(now, &mut self.device, &mut self.set) != PollResult::None {}
            if left == 0 || !self.device.has_looped() {
                break;
            }
        }
        self.look(now_ns);
        // What was left over is due at once.
        let timer = self.interface.poll_at(now, &self.set).map(|at| (at.total_micros().max(0) as u64) * 1000);
        let own = self.own_deadline(now_ns);
        self.deadline_ns = match timer.into_iter().chain(own).min() {
            _ if left == 0 || self.device.has_looped() => Some(0),
            deadline => deadline,
        };
    }

    /// What must be so before smoltcp sees a frame. False: it does not see it.
    fn before(&mut self, seen: Seen, now_ns: u64) -> bool {
        match seen {
            Seen::Martian => false,
            Seen::Neighbour(address) => {
                if self.neighbours.len() >= 1024 {
                    self.neighbours.clear();
                }
                self.neighbours.insert(address, now_ns);
                true
            }
            Seen::Tcp { from, to, opens: true, .. } => {
                if let Some(&index) = self.streams.get(&(to, from)) {
                    let old = self.sockets[index as usize].as_ref().is_some_and(|socket| {
                        matches!(&socket.body, Body::Stream(stream) if stream.last == State::TimeWait)
                    });
                    if !old {
                        return true;
                    }
                    // A new connection of the same ends: the old one only waited.
                    self.forget(index);
                }
                self.half_open(from, to)
            }
            Seen::Udp { from, to } => self.wanted(from, to),
            Seen::Lost { tcp, from, to, errno } => {
                self.lost(tcp, from, to, errno);
                true
            }
            Seen::Tcp { .. } | Seen::Other => true,
        }
    }

    /// False: the datagram is for sockets only that are connected to others. With no socket at all smoltcp answers.
    fn wanted(&self, from: IpEndpoint, to: IpEndpoint) -> bool {
        let mut strangers = false;
        for socket in self.sockets.iter().flatten() {
            if let Body::Datagram { peer, .. } = socket.body
                && socket.bound.is_some_and(|bound| bound.takes(to))
            {
                if peer.is_none_or(|peer| peer == from) {
                    return true;
                }
                strangers = true;
            }
        }
        !strangers
    }

    /// A SYN: smoltcp's sockets take one connection each, so that there must be a new one for it. False: the listener has
    /// no room, and the SYN is lost, as on Linux.
    fn half_open(&mut self, from: IpEndpoint, to: IpEndpoint) -> bool {
        let listener = self.sockets.iter().enumerate().filter_map(|(index, socket)| {
            let socket = socket.as_ref()?;
            let bound = socket.bound.filter(|bound| bound.takes(to))?;
            matches!(socket.body, Body::Listener { .. }).then_some((index as u32, bound.address.is_some()))
        });
        // Who listens on the very address comes first. Nobody: smoltcp refuses.
        let Some((listener, _)) = listener.max_by_key(|(_, exact)| *exact) else { return true };
        let Some(Some(parent)) = self.sockets.get_mut(listener as usize) else { return true };
        let Body::Listener { backlog, queue, half_open } = &mut parent.body else { return true };
        // Linux takes one more than it was told.
        if queue.len() + *half_open > *backlog {
            return false;
        }
        *half_open += 1;
        let (v6, options, bound) = (parent.v6, parent.options.clone(), parent.bound);
        let mut tcp = tcp_socket();
        options.apply(&mut tcp);
        // A port is not 0 here, and the socket is new: this cannot fail.
        let listens = tcp.listen(to).is_ok();
        let socket = self.set.add(tcp);
        let stream = stream(socket, to, from, self.now_ns());
        let child = Socket {
            key: 0,
            owner: Owner::Listener(listener),
            v6,
            body: Body::Stream(stream),
            bound,
            chosen: true,
            options,
            error: 0,
            wants: WANTS_READ | WANTS_WRITE,
        };
        match self.insert(child) {
            Some(index) => {
                self.streams.insert((to, from), index);
                listens
            }
            None => {
                self.set.remove(socket);
                self.less_half_open(listener);
                false
            }
        }
    }

    fn less_half_open(&mut self, listener: u32) {
        if let Some(Some(parent)) = self.sockets.get_mut(listener as usize)
            && let Body::Listener { half_open, .. } = &mut parent.body
        {
            *half_open = half_open.saturating_sub(1);
        }
    }

    /// What smoltcp made of a frame. A connection whose handshake is over goes to its listener's queue.
    fn after(&mut self, seen: Seen, now_ns: u64) {
        let Seen::Tcp { from, to, resets, .. } = seen else { return };
        let Some(&index) = self.streams.get(&(to, from)) else { return };
        let Some(socket) = self.sockets[index as usize].as_mut() else { return };
        let Body::Stream(stream) = &mut socket.body else { return };
        stream.heard_ns = now_ns;
        // One that smoltcp did not believe has no such effect.
        stream.reset |= resets && self.set.get::<tcp::Socket>(stream.socket).state() == State::Closed;
        let Owner::Listener(listener) = socket.owner else { return };
        if !stream.opening {
            return;
        }
        match self.set.get::<tcp::Socket>(stream.socket).state() {
            State::SynReceived => {}
            // Refused by its peer, or never begun.
            State::Listen | State::Closed => {
                self.forget(index);
                self.less_half_open(listener);
            }
            state => {
                (stream.opening, stream.last) = (false, state);
                self.less_half_open(listener);
                if let Some(Some(parent)) = self.sockets.get_mut(listener as usize)
                    && let Body::Listener { queue, .. } = &mut parent.body
                {
                    queue.push_back(index);
                }
            }
        }
    }

    /// A router, or the peer's host, says that a packet of ours did not arrive.
    fn lost(&mut self, tcp: bool, from: IpEndpoint, to: IpEndpoint, errno: i32) {
        if tcp {
            // Linux, too, believes this only while a connection is being opened.
            if let Some(&index) = self.streams.get(&(from, to))
                && let Some(Some(socket)) = self.sockets.get_mut(index as usize)
                && let Body::Stream(stream) = &socket.body
                && stream.opening
                && socket.owner == Owner::Guest
            {
                socket.error = errno;
                self.set.get_mut::<tcp::Socket>(stream.socket).abort();
            }
            return;
        }
        for socket in self.sockets.iter_mut().flatten() {
            if let Body::Datagram { peer: Some(peer), .. } = socket.body
                && peer == to
                && socket.bound.is_some_and(|bound| bound.takes(from))
            {
                socket.error = errno;
                self.ready.push_back(Ready {
                    key: socket.key,
                    readiness: Readiness::ERROR | Readiness::READ | Readiness::WRITE,
                });
            }
        }
    }

    /// When the stack's own timers are due.
    fn own_deadline(&self, now_ns: u64) -> Option<u64> {
        let deadline = |socket: &Socket| match (&socket.owner, &socket.body) {
            // smoltcp ends it.
            (Owner::Nobody(_), Body::Stream(stream)) if stream.last == State::TimeWait => None,
            (Owner::Nobody(until), _) => Some(*until),
            (Owner::Listener(_), Body::Stream(stream)) if stream.opening => {
                Some(stream.begun_ns + HALF_OPEN_NS)
            }
            (_, Body::Stream(stream)) => {
                let neighbour = stream.begun_ns + NEIGHBOUR_NS;
                let neighbour = (stream.opening && neighbour > now_ns).then_some(neighbour);
                neighbour.into_iter().chain(stream.silence_ends_ns(&socket.options)).min()
            }
            _ => None,
        };
        self.sockets.iter().flatten().filter_map(deadline).min()
    }

    /// What changed, for those who wait.
    fn look(&mut self, now_ns: u64) {
        for index in 0..self.sockets.len() {
            let Some(socket) = &self.sockets[index] else { continue };
            match (socket.owner, &socket.body) {
                (Owner::Nobody(until), _) => self.look_orphan(index as u32, until, now_ns),
                (Owner::Listener(listener), Body::Stream(stream)) if stream.opening => {
                    // Nobody finishes this handshake any more.
                    let state = self.set.get::<tcp::Socket>(stream.socket).state();
                    let late = now_ns >= stream.begun_ns + HALF_OPEN_NS;
                    if late || state == State::Closed || state == State::Listen {
                        self.forget(index as u32);
                        self.less_half_open(listener);
                    }
                }
                (_, Body::Stream(_)) => self.look_stream(index, now_ns),
                (_, Body::Listener { queue, .. }) => {
                    let waits = socket.wants & WANTS_READ != 0 && !queue.is_empty();
                    if waits {
                        self.report(index, Readiness::READ, WANTS_READ);
                    }
                }
                (_, Body::Datagram { socket: udp, .. }) => {
                    let udp = self.set.get::<udp::Socket>(*udp);
                    let mut readiness = Readiness::default();
                    let mut told = 0;
                    if socket.wants & WANTS_READ != 0 && udp.can_recv() {
                        (readiness, told) = (Readiness::READ, WANTS_READ);
                    }
                    if socket.wants & WANTS_WRITE != 0 && udp.can_send() {
                        readiness = readiness | Readiness::WRITE;
                        told |= WANTS_WRITE;
                    }
                    self.report(index, readiness, told);
                }
                (_, Body::Idle) => {}
            }
        }
    }

    fn report(&mut self, index: usize, readiness: Readiness, told: u8) {
        if readiness == Readiness::default() {
            return;
        }
        if let Some(socket) = &mut self.sockets[index] {
            socket.wants &= !told;
            self.ready.push_back(Ready { key: socket.key, readiness });
        }
    }

    fn look_orphan(&mut self, index: u32, until: u64, now_ns: u64) {
        let Some(Some(socket)) = self.sockets.get_mut(index as usize) else { return };
        let Body::Stream(stream) = &mut socket.body else { return };
        let tcp = self.set.get_mut::<tcp::Socket>(stream.socket);
        stream.last = tcp.state();
        let over = tcp.state() == State::Closed && tcp.local_endpoint().is_none();
        if over || tcp.state() == State::Closed && now_ns >= until {
            self.forget(index);
        } else if tcp.state() != State::Closed
            && (tcp.recv_queue() > 0 || now_ns >= until && tcp.state() != State::TimeWait)
        {
            // Bytes for a program that is gone, or a peer that does not listen.
            tcp.abort();
            socket.owner = Owner::Nobody(now_ns + RESET_NS);
            self.dirty = true;
        }
    }

    fn look_stream(&mut self, index: usize, now_ns: u64) {
        let Some(socket) = &mut self.sockets[index] else { return };
        let Body::Stream(stream) = &mut socket.body else { return };
        if stream.over {
            return;
        }
        let tcp = self.set.get_mut::<tcp::Socket>(stream.socket);
        let mut readiness = Readiness::default();
        let mut told = 0;
        if stream.opening {
            match tcp.state() {
                State::SynSent | State::SynReceived => {
                    let age = now_ns.saturating_sub(stream.begun_ns);
                    let errno = if stream.silence_ends_ns(&socket.options).is_some_and(|end| end <= now_ns) {
                        libc::ETIMEDOUT
                    } else if age >= NEIGHBOUR_NS {
                        let remote = stream.remote.addr;
                        let hop = if self.addresses.iter().any(|cidr| cidr.contains_addr(&remote)) {
                            Some(remote)
                        } else {
                            self.gateways
                                .iter()
                                .find(|gateway| gateway.version() == remote.version())
                                .copied()
                        };
                        match hop {
                            Some(hop) if !self.neighbours.contains_key(&hop) => libc::EHOSTUNREACH,
                            _ => return,
                        }
                    } else {
                        return;
                    };
                    socket.error = errno;
                    tcp.abort();
                }
                State::Closed => {}
                _ => {
                    stream.opening = false;
                    readiness = readiness | Readiness::WRITE;
                    told |= WANTS_WRITE;
                }
            }
        }
        let state = tcp.state();
        let waits =
            tcp.send_queue() > 0 || matches!(state, State::FinWait1 | State::Closing | State::LastAck);
        stream.waits_ns = if waits { stream.waits_ns.or(Some(now_ns)) } else { None };
        if state != State::Closed && stream.silence_ends_ns(&socket.options).is_some_and(|end| end <= now_ns)
        {
            socket.error = libc::ETIMEDOUT;
            tcp.abort();
            self.dirty = true;
        }
        let state = tcp.state();
        if state == State::Closed {
            // Our FIN was acknowledged and the peer's had come: an end in order.
            let in_order =
                !stream.reset && matches!(stream.last, State::LastAck | State::TimeWait | State::Closing);
            if socket.error == 0 && !in_order {
                socket.error = match (stream.reset, stream.opening, stream.last) {
                    (false, ..) => libc::ETIMEDOUT,
                    (true, true, _) => libc::ECONNREFUSED,
                    (true, false, State::CloseWait) => libc::EPIPE,
                    (true, false, _) => libc::ECONNRESET,
                };
            }
            (stream.over, stream.opening) = (true, false);
            let ends = (stream.local, stream.remote);
            if self.streams.get(&ends) == Some(&(index as u32)) {
                self.streams.remove(&ends);
            }
            let over = if socket.error != 0 { Readiness::ERROR } else { Readiness::END };
            readiness = readiness | Readiness::READ | Readiness::WRITE | over;
            told = WANTS_READ | WANTS_WRITE;
        } else {
            stream.last = state;
            let ended = matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
            if ended && !stream.told_end {
                stream.told_end = true;
                readiness = readiness | Readiness::READ | Readiness::END;
                told |= WANTS_READ;
            }
            if socket.wants & WANTS_READ != 0 && tcp.can_recv() {
                readiness = readiness | Readiness::READ;
                told |= WANTS_READ;
            }
            if socket.wants & WANTS_WRITE != 0 && tcp.can_send() {
                readiness = readiness | Readiness::WRITE;
                told |= WANTS_WRITE;
            }
        }
        if socket.owner == Owner::Guest {
            self.report(index, readiness, told);
        }
    }

    /// Sends one datagram.
    fn send_datagram(&mut self, handle: Handle, datagram: &Datagram) -> Result<(), Errno> {
        let socket = self.socket(handle)?;
        socket.take_error()?;
        let Body::Datagram { socket: udp, peer } = socket.body else { return Err(Errno(libc::EINVAL)) };
        let to = if datagram.to.is_empty() {
            peer.ok_or(Errno(libc::EDESTADDRREQ))?
        } else {
            let (address, port) = socket.parse(&datagram.to)?;
            if port == 0 {
                return Err(Errno(libc::EINVAL));
            }
            let v6 = socket.v6;
            IpEndpoint::new(self.or_own(address, v6), port)
        };
        let socket = self.socket(handle)?;
        if socket.options.v6_only && matches!(to.addr, IpAddress::Ipv4(_)) {
            return Err(Errno(libc::ENETUNREACH));
        }
        if !datagram.control.is_empty() {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let (broadcast, hops) = (socket.options.broadcast, socket.options.hop_limit);
        if self.is_broadcast(to.addr) {
            if !broadcast {
                return Err(Errno(libc::EACCES));
            }
        } else if !to.addr.is_multicast() {
            self.next_hop(to.addr)?;
        }
        // Nothing is cut into fragments.
        let headers = 8 + if matches!(to.addr, IpAddress::Ipv4(_)) { 20 } else { 40 };
        if datagram.data.len() > self.mtu - headers {
            return Err(Errno(libc::EMSGSIZE));
        }
        self.autobind(handle)?;
        let udp = self.set.get_mut::<udp::Socket>(udp);
        udp.set_hop_limit(Some(hops));
        let result = udp.send(datagram.data.len(), to).map(|room| datagram.data.copy_to(room));
        match result {
            Ok(_) => {
                self.dirty = true;
                Ok(())
            }
            Err(udp::SendError::BufferFull) => {
                self.socket(handle)?.wants |= WANTS_WRITE;
                Err(Errno::AGAIN)
            }
            Err(udp::SendError::Unaddressable) => Err(Errno(libc::EINVAL)),
        }
    }

    /// The unspecified address as a destination means this host.
    fn or_own(&self, address: Option<IpAddress>, v6: bool) -> IpAddress {
        address.unwrap_or(if v6 {
            IpAddress::v6(0, 0, 0, 0, 0, 0, 0, 1)
        } else {
            IpAddress::v4(127, 0, 0, 1)
        })
    }

    /// Throws away what a connected socket must not see: datagrams of others, and of the wrong family.
    fn drop_strangers(&mut self, handle: Handle) -> Result<(), Errno> {
        let socket = self.socket(handle)?;
        socket.take_error()?;
        let (bound, Body::Datagram { socket: udp, peer }) = (socket.bound, &socket.body) else {
            return Err(Errno(libc::EINVAL));
        };
        let (udp, peer) = (*udp, *peer);
        let udp = self.set.get_mut::<udp::Socket>(udp);
        while let Ok((_, meta)) = udp.peek() {
            let from = meta.endpoint;
            let family = bound.is_none_or(|bound| match from.addr {
                IpAddress::Ipv4(_) => bound.v4,
                IpAddress::Ipv6(_) => bound.v6,
            });
            if family && peer.is_none_or(|peer| peer == from) {
                return Ok(());
            }
            let _ = udp.recv();
        }
        self.socket(handle)?.wants |= WANTS_READ;
        Err(Errno::AGAIN)
    }

    /// Takes one datagram: what it holds, and who sent it.
    fn take_datagram<R>(
        &mut self,
        handle: Handle,
        take: impl FnOnce(&[u8], SocketAddress) -> R,
    ) -> Result<R, Errno> {
        self.drop_strangers(handle)?;
        let (socket, set) = (self.sockets[handle.0 as usize].as_ref(), &mut self.set);
        let Some(socket) = socket else { return Err(Errno(libc::EBADF)) };
        let Body::Datagram { socket: udp, .. } = socket.body else { return Err(Errno(libc::EINVAL)) };
        let (data, meta) = set.get_mut::<udp::Socket>(udp).recv().map_err(|_| Errno::AGAIN)?;
        Ok(take(data, socket.name(Some(meta.endpoint.addr), meta.endpoint.port)))
    }
}

impl Stack for SmoltcpStack {
    fn open(&mut self, key: u64, domain: i32, kind: i32, protocol: i32) -> Result<Handle, Errno> {
        let v6 = match domain {
            libc::AF_INET => false,
            libc::AF_INET6 if self.addresses.iter().any(|cidr| matches!(cidr, IpCidr::Ipv6(_))) => true,
            _ => return Err(Errno(libc::EAFNOSUPPORT)),
        };
        let (body, own) = match kind {
            libc::SOCK_STREAM => (Body::Idle, libc::IPPROTO_TCP),
            libc::SOCK_DGRAM => {
                let buffer =
                    || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; DATAGRAMS], vec![0; BUFFER]);
                let socket = self.set.add(udp::Socket::new(buffer(), buffer()));
                (Body::Datagram { socket, peer: None }, libc::IPPROTO_UDP)
            }
            _ => return Err(Errno(libc::ESOCKTNOSUPPORT)),
        };
        let udp = if let Body::Datagram { socket, .. } = body { Some(socket) } else { None };
        let socket = Socket {
            key,
            owner: Owner::Guest,
            v6,
            body,
            bound: None,
            chosen: false,
            options: Options::default(),
            error: 0,
            wants: WANTS_READ | WANTS_WRITE,
        };
        let made = match protocol == 0 || protocol == own {
            true => self.insert(socket).ok_or(Errno(libc::ENFILE)),
            false => Err(Errno(libc::EPROTONOSUPPORT)),
        };
        self.dirty = true;
        match (made, udp) {
            (Ok(index), _) => Ok(Handle(index)),
            (Err(errno), udp) => {
                udp.map(|udp| self.set.remove(udp));
                Err(errno)
            }
        }
    }

    fn close(&mut self, handle: Handle, how: Close) {
        let Ok(socket) = self.socket(handle) else { return };
        match socket.body {
            Body::Stream(_) => self.orphan(handle.0, how),
            Body::Listener { .. } => {
                self.unlisten(handle.0);
                self.forget(handle.0);
            }
            Body::Datagram { .. } => {
                // What waits to be sent goes out first, if it can.
                self.pump();
                self.forget(handle.0);
            }
            Body::Idle => self.forget(handle.0),
        }
        self.dirty = true;
    }

    fn bind(&mut self, handle: Handle, address: &SocketAddress) -> Result<(), Errno> {
        let socket = self.socket(handle)?;
        let (address, port) = socket.parse(address)?;
        if socket.bound.is_some() || matches!(socket.body, Body::Stream(_) | Body::Listener { .. }) {
            return Err(Errno(libc::EINVAL));
        }
        let (stream, reuse) = (socket.is_stream(), socket.options.reuse_address);
        let only = socket.options.v6_only && matches!(address, Some(IpAddress::Ipv4(_)));
        let mut bound = socket.binding(address, port);
        if only || address.is_some_and(|address| !self.is_own(address)) {
            return Err(Errno(libc::EADDRNOTAVAIL));
        }
        if port == 0 {
            bound = self.ephemeral(handle.0, stream, bound)?;
        } else if self.taken(handle.0, stream, reuse, &bound) {
            return Err(Errno(libc::EADDRINUSE));
        }
        self.settle(handle, bound)?;
        self.socket(handle)?.chosen = port != 0;
        Ok(())
    }

    fn listen(&mut self, handle: Handle, backlog: i32) -> Result<(), Errno> {
        let wanted = if (0..BACKLOG).contains(&backlog) { backlog } else { BACKLOG } as usize;
        match &mut self.socket(handle)?.body {
            Body::Listener { backlog, .. } => {
                *backlog = wanted;
                return Ok(());
            }
            Body::Idle => {}
            Body::Stream(_) => return Err(Errno(libc::EINVAL)),
            Body::Datagram { .. } => return Err(Errno(libc::EOPNOTSUPP)),
        }
        let bound = self.autobind(handle)?;
        let listens = |other: &Socket| {
            matches!(other.body, Body::Listener { .. }) && other.bound.is_some_and(|b| b.overlaps(&bound))
        };
        if self.sockets.iter().flatten().any(listens) {
            return Err(Errno(libc::EADDRINUSE));
        }
        let socket = self.socket(handle)?;
        socket.body = Body::Listener { backlog: wanted, queue: VecDeque::new(), half_open: 0 };
        socket.wants |= WANTS_READ;
        Ok(())
    }

    fn connect(&mut self, handle: Handle, address: &SocketAddress) -> Result<Connect, Errno> {
        if address.family() == libc::AF_UNSPEC as u16 {
            return Err(Errno(libc::EINVAL));
        }
        if self.socket(handle)?.stream().is_some_and(|stream| stream.over) {
            // A connect that failed leaves a socket that can try again.
            self.disconnect(handle)?;
        }
        let socket = self.socket(handle)?;
        let (address, port) = socket.parse(address)?;
        let v6 = socket.v6;
        match &socket.body {
            Body::Idle | Body::Datagram { .. } => {}
            Body::Stream(stream) if stream.opening => return Err(Errno(libc::EALREADY)),
            Body::Stream(_) | Body::Listener { .. } => return Err(Errno(libc::EISCONN)),
        }
        if socket.options.v6_only && matches!(address, Some(IpAddress::Ipv4(_))) {
            return Err(Errno(libc::ENETUNREACH));
        }
        let broadcast_allowed = socket.options.broadcast;
        let to = IpEndpoint::new(self.or_own(address, v6), port);
        let stream_socket = self.socket(handle)?.is_stream();
        if !stream_socket {
            if self.is_broadcast(to.addr) {
                if !broadcast_allowed {
                    return Err(Errno(libc::EACCES));
                }
            } else if !to.addr.is_multicast() {
                self.next_hop(to.addr)?;
            }
            let mut bound = self.autobind(handle)?;
            if bound.address.is_none() {
                // As on Linux the name shows the address that packets go out with. What is bound stays as it is otherwise.
                bound.address = self.source(to.addr);
                (bound.v4, bound.v6) = match to.addr {
                    IpAddress::Ipv4(_) => (true, false),
                    IpAddress::Ipv6(_) => (false, true),
                };
                self.settle(handle, bound)?;
            }
            if let Body::Datagram { peer, .. } = &mut self.socket(handle)?.body {
                *peer = Some(to);
            }
            return Ok(Connect::Done);
        }
        if to.addr.is_multicast() || self.is_broadcast(to.addr) {
            return Err(Errno(libc::ENETUNREACH));
        }
        self.next_hop(to.addr)?;
        if port == 0 {
            return Err(Errno(libc::ECONNREFUSED));
        }
        let socket = self.socket(handle)?;
        let from = match socket.bound.and_then(|bound| bound.address) {
            Some(address) if address.version() != to.addr.version() => return Err(Errno(libc::ENETUNREACH)),
            Some(address) => address,
            None => self.source(to.addr).ok_or(Errno(libc::EADDRNOTAVAIL))?,
        };
        let socket = self.socket(handle)?;
        let any = socket.binding(Some(from), 0);
        let bound = match socket.bound {
            Some(bound) => bound,
            None => self.ephemeral(handle.0, true, any)?,
        };
        let local = IpEndpoint::new(from, bound.port);
        if self.streams.contains_key(&(local, to)) {
            return Err(Errno(libc::EADDRNOTAVAIL));
        }
        let mut tcp = tcp_socket();
        self.socket(handle)?.options.apply(&mut tcp);
        tcp.connect(self.interface.context(), to, local).map_err(|_| Errno(libc::EADDRNOTAVAIL))?;
        let tcp = self.set.add(tcp);
        self.streams.insert((local, to), handle.0);
        self.dirty = true;
        let now_ns = self.now_ns();
        let socket = self.socket(handle)?;
        socket.bound = Some(bound);
        socket.error = 0;
        socket.wants = WANTS_READ | WANTS_WRITE;
        socket.body = Body::Stream(stream(tcp, local, to, now_ns));
        Ok(Connect::Begun)
    }

    fn disconnect(&mut self, handle: Handle) -> Result<(), Errno> {
        self.dirty = true;
        let socket = self.socket(handle)?;
        let chosen = socket.chosen;
        match &mut socket.body {
            Body::Datagram { peer, .. } => {
                *peer = None;
                if !chosen {
                    // The port was the connection's.
                    socket.bound = None;
                    if let Body::Datagram { socket, .. } = socket.body {
                        self.set.get_mut::<udp::Socket>(socket).close();
                    }
                }
            }
            Body::Idle => {}
            Body::Listener { .. } => {
                socket.body = Body::Idle;
                self.unlisten(handle.0);
            }
            Body::Stream(_) => {
                // The connection ends under another index; the socket goes on as a new one.
                let (key, v6, options, bound) = (socket.key, socket.v6, socket.options.clone(), socket.bound);
                let fresh = Socket {
                    key,
                    owner: Owner::Guest,
                    v6,
                    body: Body::Idle,
                    bound: bound.filter(|_| chosen),
                    chosen,
                    options,
                    error: 0,
                    wants: WANTS_READ | WANTS_WRITE,
                };
                let slot = &mut self.sockets[handle.0 as usize];
                let Some(mut old) = slot.replace(fresh) else { return Ok(()) };
                if let Body::Stream(stream) = &mut old.body {
                    let tcp = self.set.get_mut::<tcp::Socket>(stream.socket);
                    tcp.abort();
                    // Its RST goes out now or never.
                    self.streams.remove(&(stream.local, stream.remote));
                    let now = instant(now_ns() + self.ahead_ns);
                    self.interface.poll_egress(now, &mut self.device, &mut self.set);
                    self.set.remove(stream.socket);
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: Handle, key: u64) -> Result<Accepted, Errno> {
        let parent = self.socket(listener)?;
        let Body::Listener { queue, .. } = &mut parent.body else { return Err(Errno(libc::EINVAL)) };
        let Some(index) = queue.pop_front() else {
            parent.wants |= WANTS_READ;
            return Err(Errno::AGAIN);
        };
        // The program may ask for more without waiting; who does not, is told of more.
        parent.wants |= WANTS_READ;
        self.dirty = true;
        let socket = self.sockets[index as usize].as_mut().ok_or(Errno::AGAIN)?;
        socket.key = key;
        socket.owner = Owner::Guest;
        socket.wants = WANTS_READ | WANTS_WRITE;
        // The listener's port is not taken by its connections.
        let Body::Stream(stream) = &mut socket.body else { return Err(Errno::AGAIN) };
        stream.told_end = false;
        let (remote, over) = (stream.remote, stream.over);
        let peer = socket.name(Some(remote.addr), remote.port);
        if over {
            self.ready.push_back(Ready { key, readiness: Readiness::READ | Readiness::ERROR });
        }
        Ok(Accepted { handle: Handle(index), peer })
    }

    fn acceptable(&mut self, listener: Handle) -> bool {
        self.socket(listener)
            .is_ok_and(|socket| matches!(&socket.body, Body::Listener { queue, .. } if !queue.is_empty()))
    }

    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        if flags.urgent {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let socket = self.socket(handle)?;
        socket.take_error()?;
        let Body::Stream(stream) = &socket.body else { return Err(Errno(libc::EPIPE)) };
        if stream.closed_write || stream.over {
            return Err(Errno(libc::EPIPE));
        }
        let (tcp, opening) = (stream.socket, stream.opening);
        let tcp = self.set.get_mut::<tcp::Socket>(tcp);
        let mut sent = 0;
        // The free part of the buffer may come in two pieces.
        while !opening && sent < data.len() {
            let rest = data.slice(sent, data.len() - sent);
            match tcp.send(|room| {
                let n = rest.copy_to(room);
                (n, n)
            }) {
                Ok(0) => break,
                Ok(n) => sent += n,
                Err(tcp::SendError::InvalidState) => {
                    // It has ended just now; the next look tells how.
                    self.dirty = true;
                    return Err(Errno::AGAIN);
                }
            }
        }
        self.dirty |= sent > 0;
        if sent < data.len() {
            self.socket(handle)?.wants |= WANTS_WRITE;
        }
        if sent == 0 && !data.is_empty() { Err(Errno::AGAIN) } else { Ok(sent) }
    }

    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        let socket = self.socket(handle)?;
        let Body::Stream(stream) = &socket.body else { return Err(Errno(libc::ENOTCONN)) };
        let (ended, opening) = (stream.told_end || stream.closed_read || stream.over, stream.opening);
        let tcp = stream.socket;
        let tcp = self.set.get_mut::<tcp::Socket>(tcp);
        let mut bytes = 0;
        while !opening && bytes < into.len() {
            let rest = into.slice(bytes, into.len() - bytes);
            match tcp.recv(|data| {
                let n = rest.copy_from(data);
                (n, n)
            }) {
                Ok(n) if n > 0 => bytes += n,
                _ => break,
            }
        }
        let more = bytes > 0 && (tcp.can_recv() || ended);
        self.dirty |= bytes > 0;
        let socket = self.socket(handle)?;
        if bytes == 0 {
            // A reset behind an end in order: who reads sees the end, as on Linux.
            if socket.error != libc::EPIPE {
                socket.take_error()?;
            }
            if !ended {
                socket.wants |= WANTS_READ;
                return Err(Errno::AGAIN);
            }
        } else if !more {
            socket.wants |= WANTS_READ;
        }
        Ok(Received { bytes, more })
    }

    fn at_mark(&mut self, handle: Handle) -> Result<bool, Errno> {
        self.socket(handle).map(|_| false)
    }

    fn recv_urgent(&mut self, handle: Handle) -> Result<u8, Errno> {
        self.socket(handle)?;
        Err(Errno(libc::EINVAL))
    }

    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        for (sent, datagram) in datagrams.iter().enumerate() {
            match self.send_datagram(handle, datagram) {
                Ok(()) => {}
                Err(errno) if sent == 0 => return Err(errno),
                Err(_) => return Ok(sent),
            }
        }
        Ok(datagrams.len())
    }

    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        _control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        self.take_datagram(handle, |data, from| ReceivedDatagram {
            bytes: into.copy_from(data),
            from,
            control: 0,
        })
    }

    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        for n in 0..most {
            match self.take_datagram(handle, |data, from| take(data, from, &[])) {
                Ok(()) => {}
                Err(errno) if n == 0 => return Err(errno),
                Err(_) => return Ok(n),
            }
        }
        Ok(most)
    }

    fn recv_error(&mut self, handle: Handle, _: &mut [u8], _: &mut [u8]) -> Result<ReceivedDatagram, Errno> {
        self.socket(handle)?;
        Err(Errno::AGAIN)
    }

    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        match self.drop_strangers(handle) {
            Ok(()) => {}
            Err(errno) if errno.would_block() => return Ok(0),
            Err(errno) => return Err(errno),
        }
        let Body::Datagram { socket, .. } = self.socket(handle)?.body else { return Ok(0) };
        Ok(self.set.get_mut::<udp::Socket>(socket).peek().map_or(0, |(data, _)| data.len()))
    }

    fn shutdown(&mut self, handle: Handle, how: Shutdown) -> Result<(), Errno> {
        self.dirty = true;
        let socket = self.socket(handle)?;
        match &mut socket.body {
            Body::Listener { .. } if how != Shutdown::Write => {
                socket.body = Body::Idle;
                self.unlisten(handle.0);
                Ok(())
            }
            Body::Stream(stream) if stream.opening && how != Shutdown::Write => self.disconnect(handle),
            Body::Stream(stream) if !stream.over && !stream.opening => {
                let (read, write) = (how != Shutdown::Write, how != Shutdown::Read);
                let finish = write && !stream.closed_write;
                stream.closed_read |= read;
                stream.closed_write |= write;
                let (tcp, key) = (stream.socket, socket.key);
                if read {
                    self.ready.push_back(Ready { key, readiness: Readiness::READ | Readiness::END });
                }
                if finish {
                    self.set.get_mut::<tcp::Socket>(tcp).close();
                }
                Ok(())
            }
            Body::Datagram { peer: Some(_), .. } => Ok(()),
            _ => Err(Errno(libc::ENOTCONN)),
        }
    }

    fn set_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        let socket = self.socket(handle)?;
        let (stream, v6, bound) = (socket.is_stream(), socket.v6, socket.bound.is_some());
        socket.options.set(stream, v6, bound, level, name, value)?;
        if let Body::Stream(stream) = &socket.body {
            let (options, tcp) = (socket.options.clone(), stream.socket);
            options.apply(self.set.get_mut::<tcp::Socket>(tcp));
            self.dirty = true;
        }
        Ok(())
    }

    fn option(&mut self, handle: Handle, level: i32, name: i32, out: &mut [u8]) -> Result<usize, Errno> {
        let mtu = self.mtu;
        let socket = self.socket(handle)?;
        let (stream, v6) = (socket.is_stream(), socket.v6);
        let value = match (level, name) {
            (libc::SOL_SOCKET, libc::SO_ERROR) => Value::Int(socket.take_error().err().map_or(0, |e| e.0)),
            (libc::SOL_SOCKET, libc::SO_ACCEPTCONN) => {
                Value::Int(i32::from(matches!(socket.body, Body::Listener { .. })))
            }
            (libc::IPPROTO_TCP, libc::TCP_MAXSEG) if stream => {
                Value::Int((mtu - if v6 { 60 } else { 40 }) as i32)
            }
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION) if stream => {
                let name = b"cubic\0";
                let n = out.len().min(name.len());
                out[..n].copy_from_slice(&name[..n]);
                return Ok(n);
            }
            _ => socket.options.value(stream, v6, level, name)?,
        };
        Ok(value.write(out))
    }

    fn ioctl(&mut self, handle: Handle, request: u64) -> Result<u64, Errno> {
        const SIOCATMARK: u64 = 0x8905;
        let stream = match &self.socket(handle)?.body {
            Body::Stream(stream) => Some(stream.socket),
            Body::Datagram { .. } if request == libc::FIONREAD => {
                return Ok(self.next_datagram(handle)? as u64);
            }
            Body::Datagram { .. } | Body::Idle | Body::Listener { .. } => None,
        };
        let tcp = stream.map(|socket| self.set.get::<tcp::Socket>(socket));
        match request {
            r if r == libc::FIONREAD => Ok(tcp.map_or(0, |tcp| tcp.recv_queue()) as u64),
            r if r == libc::TIOCOUTQ => Ok(tcp.map_or(0, |tcp| tcp.send_queue()) as u64),
            SIOCATMARK => Ok(0),
            _ => Err(Errno(libc::ENOTTY)),
        }
    }

    fn local_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        let socket = self.socket(handle)?;
        Ok(match (&socket.body, socket.bound) {
            (Body::Stream(stream), _) => socket.name(Some(stream.local.addr), stream.local.port),
            (_, Some(bound)) => socket.name(bound.address, bound.port),
            (_, None) => socket.name(None, 0),
        })
    }

    fn peer_name(&mut self, handle: Handle) -> Result<SocketAddress, Errno> {
        let socket = self.socket(handle)?;
        match &socket.body {
            Body::Stream(stream) if !stream.opening && !stream.over => {
                Ok(socket.name(Some(stream.remote.addr), stream.remote.port))
            }
            Body::Datagram { peer: Some(peer), .. } => Ok(socket.name(Some(peer.addr), peer.port)),
            _ => Err(Errno(libc::ENOTCONN)),
        }
    }

    fn take_error(&mut self, handle: Handle) -> Result<(), Errno> {
        self.socket(handle)?.take_error()
    }

    fn poll(&mut self, ready: &mut Vec<Ready>, budget: usize) {
        self.pump();
        let n = budget.min(self.ready.len());
        ready.extend(self.ready.drain(..n));
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.device.tap().map(AsRawFd::as_raw_fd)
    }

    fn deadline_ns(&self) -> Option<u64> {
        if self.dirty || !self.ready.is_empty() { Some(0) } else { self.deadline_ns }
    }
}

impl SmoltcpStack {
    /// The address that packets to `to` go out with.
    fn source(&self, to: IpAddress) -> Option<IpAddress> {
        if self.is_own(to) { Some(to) } else { self.interface.get_source_address(&to) }
    }
}

fn instant(ns: u64) -> Instant {
    Instant::from_micros((ns / 1000) as i64)
}

fn tcp_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_congestion_control(tcp::CongestionControl::Cubic);
    socket
}

fn stream(
    socket: smoltcp::iface::SocketHandle,
    local: IpEndpoint,
    remote: IpEndpoint,
    now_ns: u64,
) -> Stream {
    Stream {
        socket,
        local,
        remote,
        opening: true,
        last: State::SynSent,
        reset: false,
        told_end: false,
        closed_write: false,
        closed_read: false,
        begun_ns: now_ns,
        heard_ns: now_ns,
        waits_ns: None,
        over: false,
    }
}

#[cfg(test)]
mod tests;
