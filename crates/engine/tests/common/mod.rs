//! A guest played by hand: what GuestLib does, as plainly as it can be done.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

use netkernel_abi::control::{Message, kind};
use netkernel_abi::nqe::flag;
use netkernel_abi::socket::{DatagramHeader, datagram_record, state};
use netkernel_abi::{Nqe, Op, SocketEntry};
use netkernel_engine::{Engine, EngineConfig, GuestFds, GuestSpec, Limits};
use netkernel_ring::bytes;
use netkernel_service::SocketAddress;
use netkernel_shm::{Region, fds};

pub const WATCHDOG: Duration = Duration::from_secs(30);

pub fn engine() -> Arc<Engine> {
    Engine::start(config()).unwrap()
}

pub fn config() -> EngineConfig {
    let limits = Limits { region_bytes: 64 << 20, sockets: 1024, queue_sets: 32 };
    EngineConfig { limits, ..EngineConfig::default() }
}

/// Polls until `ready`; panics with `what` when the watchdog barks.
#[track_caller]
pub fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !ready() {
        assert!(begin.elapsed() < WATCHDOG, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub struct Guest {
    pub id: u32,
    pub token: [u8; 16],
    pub region: Arc<Region>,
    pub channel: OwnedFd,
    pub doorbell: OwnedFd,
    pub q: u32,
    tag: u32,
    process: Option<OwnedFd>,
}

#[derive(Debug)]
pub struct Socket {
    pub id: u32,
    /// The guest's end.
    pub placeholder: OwnedFd,
}

impl Guest {
    pub fn new(engine: &Engine, stack: &str) -> Guest {
        let spec = GuestSpec { name: "test".into(), stack: stack.into(), ..GuestSpec::default() };
        Guest::from_fds(engine.create_guest(spec).unwrap(), 0)
    }

    pub fn from_fds(fds: GuestFds, q: u32) -> Guest {
        let region = Arc::new(Region::attach(fds.region).unwrap());
        let mut guest = Guest {
            id: fds.id,
            token: fds.token,
            region,
            channel: fds.channel,
            doorbell: fds.doorbell,
            q,
            tag: 77 + q,
            process: None,
        };
        let (ours, theirs) = pair();
        guest.tell(Message { kind: kind::PROCESS, a: guest.tag, b: 1, ..Message::default() }, &theirs);
        guest.process = Some(ours);
        let set = guest.region.queue_set(q).unwrap();
        assert_eq!(set.owner.compare_exchange(0, 1, SeqCst, SeqCst), Ok(0));
        set.process.store(guest.tag, Release);
        guest
    }

    pub fn tell(&self, message: Message, fd: &OwnedFd) {
        fds::send(self.channel.as_raw_fd(), &message.to_bytes(), &[fd.as_raw_fd()], 0).unwrap();
    }

    /// The process dies (its sockets are dropped by the caller).
    pub fn end_process(&mut self) {
        self.process = None;
    }

    pub fn entry(&self, id: u32) -> &SocketEntry {
        self.region.socket(id).unwrap()
    }

    pub fn state(&self, id: u32) -> u32 {
        self.entry(id).state.load(Acquire)
    }

    pub fn ring_doorbell(&self) {
        let header = self.region.header();
        std::sync::atomic::fence(SeqCst);
        if header.engine_waiting.load(SeqCst) == 1 && header.engine_waiting.swap(0, SeqCst) == 1 {
            let one = 1u64;
            // SAFETY: eight bytes, valid for reads.
            unsafe { libc::write(self.doorbell.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    pub fn push(&self, send: bool, mut nqe: Nqe) {
        if let Some(entry) = self.region.socket(nqe.socket) {
            nqe.status = entry.generation.load(Acquire) as i32;
        }
        let ring = if send { self.region.send(self.q) } else { self.region.job(self.q) }.unwrap();
        until("room in a guest's ring", || {
            let mut tail = ring.tail();
            let pushed = ring.push(&mut tail, nqe.to_words()).unwrap();
            if !pushed {
                self.ring_doorbell();
            }
            pushed
        });
        self.region.header().active[self.q as usize / 64].fetch_or(1 << (self.q % 64), SeqCst);
        self.ring_doorbell();
    }

    /// A sync job: status and what stands in the argument area.
    pub fn job(&self, op: Op, id: u32, op_data: u64, argument: &[u8], size: u32) -> (i32, u64, Vec<u8>) {
        self.region.write_argument(self.q, argument);
        let mut nqe = Nqe::new(op, self.q as u16, id);
        nqe.flags = flag::SYNC;
        nqe.op_data = op_data;
        nqe.size = if argument.is_empty() { size } else { argument.len() as u32 };
        nqe.position = 4711;
        self.push(false, nqe);
        let ring = self.region.complete(self.q).unwrap();
        let mut done = None;
        until("a completion", || {
            let mut head = ring.head();
            done = ring.pop(&mut head).unwrap();
            done.is_some()
        });
        let done = Nqe::from_words(done.unwrap());
        assert_eq!((done.op, done.socket, done.position), (Op::Complete as u8, id, 4711));
        let mut out = vec![0; done.size as usize];
        self.region.read_argument(self.q, &mut out);
        (done.status, done.op_data, out)
    }

    pub fn socket(&self, kind: i32) -> Socket {
        self.socket_of(libc::AF_INET, kind)
    }

    pub fn socket_of(&self, domain: i32, kind: i32) -> Socket {
        let id = self.take_id();
        let e = self.entry(id);
        for word in [&e.rx_head, &e.tx_tail, &e.tx_base, &e.flags, &e.tx_pending, &e.tx_wanted, &e.waiters] {
            word.store(0, Relaxed);
        }
        e.event_pending.store(0, Relaxed);
        e.watchers.iter().for_each(|w| w.store(0, Relaxed));
        let (ours, theirs) = pair();
        let message = Message {
            kind: self::kind::SOCKET,
            a: id,
            b: domain as u32,
            c: kind as u32,
            ..Message::default()
        };
        self.tell(message, &theirs);
        Socket { id, placeholder: ours }
    }

    fn take_id(&self) -> u32 {
        let header = self.region.header();
        loop {
            let head = header.free_head.load(Acquire);
            if head as u32 == 0 {
                return header.next_unused.fetch_add(1, SeqCst);
            }
            let next = self.entry(head as u32).next_free.load(Acquire);
            let new = ((head >> 32).wrapping_add(1) << 32) | next as u64;
            if header.free_head.compare_exchange(head, new, SeqCst, SeqCst).is_ok() {
                return head as u32;
            }
        }
    }

    pub fn connect(&self, to: SocketAddr) -> Socket {
        let socket =
            self.socket_of(if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }, libc::SOCK_STREAM);
        let (status, ..) = self.job(Op::Connect, socket.id, 0, SocketAddress::from(to).as_bytes(), 0);
        assert!(status == 0 || status == -libc::EINPROGRESS, "{status}");
        until("connected", || self.state(socket.id) & state::CONNECTED != 0);
        socket
    }

    pub fn listen(&self, address: &str, backlog: u64) -> (Socket, SocketAddr) {
        let address: SocketAddr = address.parse().unwrap();
        let domain = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = self.socket_of(domain, libc::SOCK_STREAM);
        assert_eq!(self.job(Op::Bind, socket.id, 0, SocketAddress::from(address).as_bytes(), 0).0, 0);
        assert_eq!(self.job(Op::Listen, socket.id, backlog, &[], 0).0, 0);
        let local = self.local(socket.id);
        (socket, local)
    }

    pub fn local(&self, id: u32) -> SocketAddr {
        let (status, _, name) = self.job(Op::LocalName, id, 0, &[], 0);
        assert_eq!(status, 0);
        SocketAddress::from_bytes(&name).to_std().unwrap()
    }

    /// Takes the next record of a listener: id and generation.
    pub fn take_accepted(&self, listener: u32) -> (u32, u32) {
        let e = self.entry(listener);
        until("a connection", || e.rx_tail.load(Acquire) != e.rx_head.load(Acquire));
        let head = e.rx_head.load(Acquire);
        let mut record = [0; 8];
        self.copy_out(e, head, &mut record);
        e.rx_head.store(head.wrapping_add(8), SeqCst);
        if e.rx_stalled.swap(0, SeqCst) == 1 {
            self.push(true, Nqe::new(Op::Credit, self.q as u16, listener));
        }
        let word = |i: usize| u32::from_le_bytes(record[i..i + 4].try_into().unwrap());
        (word(0), word(4))
    }

    pub fn accept(&self, listener: u32) -> Socket {
        let (id, generation) = self.take_accepted(listener);
        let (ours, theirs) = pair();
        self.tell(Message { kind: kind::ACCEPTED, a: id, b: generation, ..Message::default() }, &theirs);
        Socket { id, placeholder: ours }
    }

    fn copy_out(&self, e: &SocketEntry, position: u32, out: &mut [u8]) {
        let size = e.rx_size.load(Acquire);
        let at = e.rx_offset.load(Relaxed) as u64 * 64;
        let from = self.region.payload(at, size as u64).unwrap();
        let runs = bytes::segments(e.rx_base.load(Relaxed), position, out.len() as u32, size);
        let mut done = 0;
        for (at, len) in [runs.first, runs.second] {
            // SAFETY: the run lies in the ring, which lies in the payload; out has room for both runs.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(at as usize), out[done..].as_mut_ptr(), len as usize)
            };
            done += len as usize;
        }
    }

    fn copy_in(&self, e: &SocketEntry, position: u32, data: &[u8]) {
        let size = e.tx_size.load(Acquire);
        let at = e.tx_offset.load(Relaxed) as u64 * 64;
        let to = self.region.payload(at, size as u64).unwrap();
        let runs = bytes::segments(e.tx_base.load(Relaxed), position, data.len() as u32, size);
        let mut done = 0;
        for (at, len) in [runs.first, runs.second] {
            // SAFETY: as above, in the other direction.
            unsafe {
                std::ptr::copy_nonoverlapping(data[done..].as_ptr(), to.add(at as usize), len as usize)
            };
            done += len as usize;
        }
    }

    /// Writes as much as there is room for; 0: none. Under the writer's lock.
    pub fn try_send(&self, id: u32, data: &[u8]) -> usize {
        let e = self.entry(id);
        if e.tx_lock.compare_exchange(0, 1, SeqCst, SeqCst).is_err() {
            return 0;
        }
        if e.tx_size.load(Acquire) == 0 {
            assert_eq!(self.job(Op::SendRing, id, 0, &[], 0).0, 0);
        }
        let (tail, size) = (e.tx_tail.load(Relaxed), e.tx_size.load(Acquire));
        let used = tail.wrapping_sub(e.tx_head.load(Acquire));
        if used == 0 {
            e.tx_base.store(tail, Relaxed);
        }
        let n = data.len().min((size - used) as usize);
        if n > 0 {
            self.copy_in(e, tail, &data[..n]);
            e.tx_tail.store(tail.wrapping_add(n as u32), Release);
        }
        e.tx_lock.store(0, SeqCst);
        if n > 0 && e.tx_pending.swap(1, SeqCst) == 0 {
            self.push(true, Nqe::new(Op::Send, self.q as u16, id));
        }
        if n < data.len() {
            e.tx_wanted.store(1, SeqCst);
        }
        n
    }

    pub fn send_all(&self, id: u32, mut data: &[u8]) {
        until("all bytes sent", || {
            let n = self.try_send(id, data);
            data = &data[n..];
            data.is_empty()
        });
    }

    /// What can be read now.
    pub fn try_recv(&self, id: u32, out: &mut [u8]) -> usize {
        let e = self.entry(id);
        let (tail, head) = (e.rx_tail.load(Acquire), e.rx_head.load(Relaxed));
        let n = (tail.wrapping_sub(head) as usize).min(out.len());
        if n == 0 {
            return 0;
        }
        self.copy_out(e, head, &mut out[..n]);
        self.advance(id, head.wrapping_add(n as u32));
        n
    }

    fn advance(&self, id: u32, head: u32) {
        let e = self.entry(id);
        e.rx_head.store(head, SeqCst);
        if e.rx_stalled.load(SeqCst) == 1 {
            let used = e.rx_tail.load(Acquire).wrapping_sub(head);
            if used <= e.rx_size.load(Relaxed) / 2 && e.rx_stalled.swap(0, SeqCst) == 1 {
                self.push(true, Nqe::new(Op::Credit, self.q as u16, id));
            }
        }
    }

    pub fn recv_exact(&self, id: u32, out: &mut [u8]) {
        let mut done = 0;
        until("bytes received", || {
            done += self.try_recv(id, &mut out[done..]);
            done == out.len()
        });
    }

    /// Waits for the end of the stream; returns what came before it.
    pub fn recv_to_end(&self, id: u32) -> Vec<u8> {
        let mut out = Vec::new();
        until("the end of the stream", || {
            let ended = self.state(id) & state::RX_END != 0;
            let mut chunk = [0; 4096];
            let n = self.try_recv(id, &mut chunk);
            out.extend_from_slice(&chunk[..n]);
            n == 0 && ended
        });
        out
    }

    pub fn send_to(&self, id: u32, to: Option<SocketAddr>, data: &[u8]) {
        let e = self.entry(id);
        if e.tx_size.load(Acquire) == 0 {
            assert_eq!(self.job(Op::SendRing, id, 0, &[], 0).0, 0);
        }
        let (address, address_len) = to.map(|to| SocketAddress::from(to).to_datagram()).unwrap_or_default();
        let header = DatagramHeader { len: data.len() as u32, address_len, address };
        let mut record = Vec::new();
        record.extend_from_slice(&header.len.to_le_bytes());
        record.extend_from_slice(&header.address_len.to_le_bytes());
        header.address.iter().for_each(|w| record.extend_from_slice(&w.to_le_bytes()));
        record.extend_from_slice(data);
        record.resize(datagram_record(header.len) as usize, 0);
        until("room for a datagram", || {
            e.tx_size.load(Acquire) - e.tx_tail.load(Relaxed).wrapping_sub(e.tx_head.load(Acquire))
                >= record.len() as u32
        });
        let tail = e.tx_tail.load(Relaxed);
        self.copy_in(e, tail, &record);
        e.tx_tail.store(tail.wrapping_add(record.len() as u32), Release);
        if e.tx_pending.swap(1, SeqCst) == 0 {
            self.push(true, Nqe::new(Op::Send, self.q as u16, id));
        }
    }

    pub fn recv_from(&self, id: u32) -> (Vec<u8>, SocketAddr) {
        let e = self.entry(id);
        until("a datagram", || e.rx_tail.load(Acquire) != e.rx_head.load(Relaxed));
        let head = e.rx_head.load(Relaxed);
        let mut header = [0; 32];
        self.copy_out(e, head, &mut header);
        let word = |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
        let address = [word(2), word(3), word(4), word(5), word(6), word(7)];
        let mut data = vec![0; word(0) as usize];
        self.copy_out(e, head.wrapping_add(32), &mut data);
        self.advance(id, head.wrapping_add(datagram_record(word(0))));
        (data, SocketAddress::from_datagram(&address, word(1)).unwrap().to_std().unwrap())
    }
}

pub fn pair() -> (OwnedFd, OwnedFd) {
    fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC).unwrap()
}

/// Bytes that differ everywhere.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    (0..len).map(|_| random.next() as u8).collect()
}

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
