//! ServiceLib over a stack in memory: what it asks of a stack, and that bytes survive whatever the stack does.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use netkernel_abi::nqe::flag;
use netkernel_abi::socket::{datagram_record, state};
use netkernel_abi::{Limits, Nqe, Op, SocketEntry};
use netkernel_ring::bytes;
use netkernel_service::*;
use netkernel_shm::{HugePages, Region};

#[derive(Default)]
struct Fake {
    sockets: HashMap<u32, Peer>,
    last: u32,
    ready: Vec<Ready>,
    /// Connections that wait to be accepted.
    backlog: usize,
    bind_errors: VecDeque<i32>,
    random: u64,
    closed: Vec<(u32, Close)>,
}

/// The other side of a fake socket.
#[derive(Default)]
struct Peer {
    key: u64,
    sent: Vec<u8>,
    to_receive: VecDeque<u8>,
    datagrams: VecDeque<Vec<u8>>,
    end: bool,
    /// Takes no more than this, then would block.
    room: usize,
    shut: bool,
    urgent_at: Vec<usize>,
}

impl Fake {
    fn random(&mut self, n: u64) -> u64 {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) % n
    }

    fn peer(&mut self, handle: Handle) -> &mut Peer {
        self.sockets.get_mut(&handle.0).expect("an operation on a closed handle")
    }

    fn insert(&mut self, key: u64) -> Handle {
        self.last += 1;
        self.sockets.insert(self.last, Peer { key, room: usize::MAX, ..Peer::default() });
        Handle(self.last)
    }
}

impl Stack for Fake {
    fn open(&mut self, key: u64, _: i32, _: i32, _: i32) -> Result<Handle, Errno> {
        Ok(self.insert(key))
    }
    fn close(&mut self, handle: Handle, how: Close) {
        self.sockets.remove(&handle.0).expect("closed twice");
        self.closed.push((handle.0, how));
    }
    fn bind(&mut self, _: Handle, _: &SocketAddress) -> Result<(), Errno> {
        match self.bind_errors.pop_front() {
            Some(errno) => Err(Errno(errno)),
            None => Ok(()),
        }
    }
    fn listen(&mut self, _: Handle, _: i32) -> Result<(), Errno> {
        Ok(())
    }
    fn connect(&mut self, handle: Handle, _: &SocketAddress) -> Result<Connect, Errno> {
        let key = self.peer(handle).key;
        self.ready.push(Ready { key, readiness: Readiness::WRITE });
        Ok(Connect::Begun)
    }
    fn disconnect(&mut self, _: Handle) -> Result<(), Errno> {
        Ok(())
    }
    fn accept(&mut self, _: Handle, key: u64) -> Result<Accepted, Errno> {
        if self.backlog == 0 {
            return Err(Errno::AGAIN);
        }
        self.backlog -= 1;
        Ok(Accepted { handle: self.insert(key), peer: SocketAddress::default() })
    }
    fn acceptable(&mut self, _: Handle) -> bool {
        self.backlog > 0
    }
    fn send(&mut self, handle: Handle, data: &Segments, flags: SendFlags) -> Result<usize, Errno> {
        let cut = 1 + self.random(data.len() as u64 * 2) as usize;
        let peer = self.peer(handle);
        let n = cut.min(peer.room).min(data.len());
        if n == 0 {
            return Err(Errno::AGAIN);
        }
        let mut bytes = vec![0; n];
        assert_eq!(data.copy_to(&mut bytes), n);
        peer.sent.extend(bytes);
        if peer.room != usize::MAX {
            peer.room -= n;
        }
        if flags.urgent && n == data.len() {
            let at = peer.sent.len() - 1;
            peer.urgent_at.push(at);
        }
        Ok(n)
    }
    fn recv(&mut self, handle: Handle, into: &Segments) -> Result<Received, Errno> {
        let cut = 1 + self.random(into.len() as u64 * 2) as usize;
        let peer = self.peer(handle);
        let n = cut.min(into.len()).min(peer.to_receive.len());
        if n == 0 {
            return if peer.end { Ok(Received { bytes: 0, more: false }) } else { Err(Errno::AGAIN) };
        }
        let bytes: Vec<u8> = peer.to_receive.drain(..n).collect();
        assert_eq!(into.copy_from(&bytes), n);
        Ok(Received { bytes: n, more: true })
    }
    fn at_mark(&mut self, _: Handle) -> Result<bool, Errno> {
        Ok(false)
    }
    fn recv_urgent(&mut self, _: Handle) -> Result<u8, Errno> {
        Err(Errno(libc::EINVAL))
    }
    fn send_datagrams(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        let n = 1 + self.random(datagrams.len() as u64) as usize;
        for datagram in &datagrams[..n] {
            let mut bytes = vec![0; datagram.data.len()];
            datagram.data.copy_to(&mut bytes);
            self.peer(handle).sent.extend(bytes);
        }
        Ok(n)
    }
    fn recv_datagram(
        &mut self,
        handle: Handle,
        into: &Segments,
        _: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let datagram = self.peer(handle).datagrams.pop_front().ok_or(Errno::AGAIN)?;
        assert_eq!(into.copy_from(&datagram), datagram.len());
        Ok(ReceivedDatagram { bytes: datagram.len(), from: SocketAddress::default(), control: 0 })
    }
    fn recv_datagrams(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        let n = most.min(self.peer(handle).datagrams.len());
        for datagram in self.peer(handle).datagrams.drain(..n) {
            take(&datagram, SocketAddress::default(), &[]);
        }
        if n == 0 { Err(Errno::AGAIN) } else { Ok(n) }
    }
    fn recv_error(&mut self, _: Handle, _: &mut [u8], _: &mut [u8]) -> Result<ReceivedDatagram, Errno> {
        Err(Errno::AGAIN)
    }
    fn next_datagram(&mut self, handle: Handle) -> Result<usize, Errno> {
        Ok(self.peer(handle).datagrams.front().map_or(0, Vec::len))
    }
    fn shutdown(&mut self, handle: Handle, _: Shutdown) -> Result<(), Errno> {
        self.peer(handle).shut = true;
        Ok(())
    }
    fn set_option(&mut self, _: Handle, _: i32, _: i32, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn option(&mut self, _: Handle, _: i32, _: i32, _: &mut [u8]) -> Result<usize, Errno> {
        Ok(0)
    }
    fn ioctl(&mut self, _: Handle, _: u64) -> Result<u64, Errno> {
        Ok(0)
    }
    fn local_name(&mut self, _: Handle) -> Result<SocketAddress, Errno> {
        Ok(SocketAddress::default())
    }
    fn peer_name(&mut self, _: Handle) -> Result<SocketAddress, Errno> {
        Ok(SocketAddress::default())
    }
    fn take_error(&mut self, _: Handle) -> Result<(), Errno> {
        Ok(())
    }
    fn poll(&mut self, ready: &mut Vec<Ready>, _: usize) {
        ready.append(&mut self.ready);
    }
    fn wake_fd(&self) -> Option<i32> {
        None
    }
}

struct NoHost;
impl Host for NoHost {
    fn wake(&mut self, _: u32, _: u32) {}
    fn ring(&mut self, _: u32) {}
}

struct Rig {
    service: Service,
    guest: Region,
    stack: Fake,
}

impl Rig {
    fn new(seed: u64) -> Rig {
        let limits = Limits { region_bytes: 16 << 20, sockets: 64, queue_sets: 2 };
        let region = Region::create(limits, 1, 0, HugePages::Off).unwrap();
        // SAFETY: the region owns its descriptor and lives during this statement.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(region.fd()) }.try_clone_to_owned().unwrap();
        let guest = Region::attach(fd).unwrap();
        Rig { service: Service::new(region, 3, true), guest, stack: Fake { random: seed, ..Fake::default() } }
    }

    fn entry(&self, id: u32) -> &SocketEntry {
        self.guest.socket(id).unwrap()
    }

    /// Everything that can be done now.
    fn turn(&mut self) -> Result<(), Violation> {
        loop {
            let mut ready = Vec::new();
            self.stack.poll(&mut ready, 100);
            for report in &ready {
                assert_eq!(report.key >> 32, 3);
                self.service.ready(&mut self.stack, report.key as u32, report.readiness)?;
            }
            let drained = self.service.drain(&mut self.stack, 100)?;
            let ran = self.service.run(&mut self.stack, 100)?;
            self.service.flush(&mut NoHost);
            if ready.is_empty() && ran == 0 && !drained.more && !drained.again && drained.elements == 0 {
                return Ok(());
            }
        }
    }

    fn push(&mut self, send: bool, mut nqe: Nqe) {
        nqe.status = self.entry(nqe.socket).generation.load(Acquire) as i32;
        let ring = if send { self.guest.send(0) } else { self.guest.job(0) }.unwrap();
        let mut tail = ring.tail();
        assert_eq!(ring.push(&mut tail, nqe.to_words()), Ok(true));
        self.guest.header().active[0].fetch_or(1, SeqCst);
    }

    fn job(&mut self, op: Op, id: u32, data: u64) -> i32 {
        let mut nqe = Nqe::new(op, 0, id);
        nqe.flags = flag::SYNC;
        nqe.op_data = data;
        self.push(false, nqe);
        self.turn().unwrap();
        let ring = self.guest.complete(0).unwrap();
        let mut head = ring.head();
        Nqe::from_words(ring.pop(&mut head).unwrap().expect("a completion")).status
    }

    fn connected(&mut self, id: u32) -> Handle {
        self.service.open(&mut self.stack, id, 2, 1, 0).unwrap();
        assert_eq!(self.job(Op::Connect, id, 0), -libc::EINPROGRESS);
        assert!(self.entry(id).state.load(Acquire) & state::CONNECTED != 0);
        Handle(self.stack.last)
    }

    fn ready(&mut self, id: u32, readiness: Readiness) {
        self.stack.ready.push(Ready { key: key(3, id), readiness });
    }

    fn ring(&self, id: u32, send: bool) -> (u64, u32, u32) {
        let e = self.entry(id);
        let (offset, size, base) = if send {
            (&e.tx_offset, &e.tx_size, &e.tx_base)
        } else {
            (&e.rx_offset, &e.rx_size, &e.rx_base)
        };
        (offset.load(Relaxed) as u64 * 64, size.load(Relaxed), base.load(Relaxed))
    }

    /// Copies between `data` and the ring at `position`.
    fn copy(&self, id: u32, send: bool, position: u32, data: &mut [u8]) {
        let (offset, size, base) = self.ring(id, send);
        let start = self.guest.payload(offset, size as u64).unwrap();
        let runs = bytes::segments(base, position, data.len() as u32, size);
        let mut done = 0;
        for (at, len) in [runs.first, runs.second] {
            // SAFETY: the run lies in the payload (checked above); data has room for both runs.
            unsafe {
                let (ring, own) = (start.add(at as usize), data.as_mut_ptr().add(done));
                let (from, to) = if send { (own, ring) } else { (ring, own) };
                std::ptr::copy_nonoverlapping(from, to, len as usize);
            }
            done += len as usize;
        }
    }

    fn write(&mut self, id: u32, data: &[u8]) -> usize {
        let (_, size, _) = self.ring(id, true);
        let e = self.entry(id);
        let (head, tail) = (e.tx_head.load(Acquire), e.tx_tail.load(Relaxed));
        if head == tail {
            e.tx_base.store(tail, Relaxed);
        }
        let n = data.len().min((size - tail.wrapping_sub(head)) as usize);
        if n > 0 {
            self.copy(id, true, tail, &mut data[..n].to_vec());
            let e = self.entry(id);
            e.tx_tail.store(tail.wrapping_add(n as u32), SeqCst);
            e.tx_pending.store(1, SeqCst);
            self.push(true, Nqe::new(Op::Send, 0, id));
        }
        n
    }

    fn read(&mut self, id: u32, most: usize) -> Vec<u8> {
        let e = self.entry(id);
        let (head, tail) = (e.rx_head.load(Relaxed), e.rx_tail.load(Acquire));
        let mut out = vec![0; (tail.wrapping_sub(head) as usize).min(most)];
        if !out.is_empty() {
            self.copy(id, false, head, &mut out);
            let e = self.entry(id);
            let head = head.wrapping_add(out.len() as u32);
            e.rx_head.store(head, SeqCst);
            let free = e.rx_size.load(Relaxed) - tail.wrapping_sub(head);
            if free >= e.rx_size.load(Relaxed) / 2 && e.rx_stalled.swap(0, SeqCst) == 1 {
                self.push(true, Nqe::new(Op::Credit, 0, id));
            }
        }
        out
    }
}

#[test]
fn streams_survive_every_way_of_cutting_them() {
    let mut largest = 0;
    for seed in 1..20u64 {
        println!("seed {seed}");
        let mut rig = Rig::new(seed);
        let handle = rig.connected(1);
        let total = 600_000;
        let data: Vec<u8> = (0..total).map(|i| (i * 7 + i / 251) as u8).collect();
        let (mut written, mut got, mut given) = (0, Vec::new(), 0);
        while written < total || got.len() < total {
            match rig.stack.random(5) {
                0 | 1 => {
                    let n = 1 + rig.stack.random(40_000) as usize;
                    written += rig.write(1, &data[written..(written + n).min(total)]);
                }
                2 => {
                    let room = rig.stack.random(50_000) as usize;
                    rig.stack.peer(handle).room = room;
                    rig.ready(1, Readiness::WRITE);
                }
                3 => {
                    let n = rig.stack.random(90_000) as usize;
                    let end = (given + n).min(total);
                    rig.stack.peer(handle).to_receive.extend(&data[given..end]);
                    given = end;
                    rig.ready(1, Readiness::READ);
                }
                _ => {
                    let n = rig.stack.random(60_000) as usize;
                    got.extend(rig.read(1, n));
                    if rig.stack.random(40) == 0 {
                        rig.service.sweep(&mut rig.stack).unwrap();
                        rig.service.sweep(&mut rig.stack).unwrap();
                    }
                    if rig.ring(1, true).1 == 0 {
                        assert_eq!(rig.job(Op::SendRing, 1, 0), 0);
                    }
                }
            }
            rig.turn().unwrap();
            largest = largest.max(rig.ring(1, false).1);
        }
        rig.stack.peer(handle).room = usize::MAX;
        rig.stack.peer(handle).end = true;
        for _ in 0..1000 {
            rig.ready(1, Readiness::WRITE | Readiness::READ);
            rig.turn().unwrap();
        }
        assert!(got == data);
        assert!(rig.stack.peer(handle).sent == data);
        assert!(rig.entry(1).state.load(Relaxed) & state::RX_END != 0);
        rig.service.close(&mut rig.stack, 1).unwrap();
        assert!(rig.stack.sockets.is_empty());
        assert_eq!(rig.service.stats().ring_bytes, 0);
        assert_eq!(rig.service.sockets(), 0);
        assert_eq!(rig.guest.header().free_head.load(Relaxed) as u32, 1);
    }
    assert!(largest > 16384, "receive rings grow");
}

#[test]
fn close_and_shutdown_come_after_what_was_written() {
    let mut rig = Rig::new(1);
    let handle = rig.connected(1);
    rig.stack.peer(handle).room = 5;
    assert_eq!(rig.write(1, b"0123456789"), 10);
    rig.push(false, Nqe { op_data: 1, ..Nqe::new(Op::Shutdown, 0, 1) });
    rig.turn().unwrap();
    assert!(!rig.stack.peer(handle).shut);
    rig.stack.peer(handle).room = 7;
    rig.ready(1, Readiness::WRITE);
    for _ in 0..20 {
        rig.turn().unwrap();
        rig.ready(1, Readiness::WRITE);
    }
    assert!(rig.stack.peer(handle).shut && rig.stack.peer(handle).sent == b"0123456789");
    let handle = rig.connected(2);
    rig.stack.peer(handle).room = 0;
    rig.write(2, b"abc");
    rig.turn().unwrap();
    rig.service.close(&mut rig.stack, 2).unwrap();
    assert!(rig.stack.closed.is_empty(), "lingers");
    rig.stack.peer(handle).room = 100;
    for _ in 0..20 {
        rig.ready(2, Readiness::WRITE);
        rig.turn().unwrap();
    }
    assert_eq!(rig.stack.closed, [(handle.0, Close::Graceful)]);
    // Unread bytes: RST.
    let handle = rig.connected(3);
    rig.stack.peer(handle).to_receive.extend(b"unread");
    rig.ready(3, Readiness::READ);
    rig.turn().unwrap();
    rig.service.close(&mut rig.stack, 3).unwrap();
    assert_eq!(rig.stack.closed[1], (handle.0, Close::Abort));
}

#[test]
fn accepts_run_ahead_by_half_of_the_backlog() {
    let mut rig = Rig::new(1);
    rig.service.open(&mut rig.stack, 1, 2, 1, 0).unwrap();
    rig.stack.backlog = 9;
    assert_eq!(rig.job(Op::Listen, 1, 8), 0);
    assert_eq!(rig.stack.backlog, 5);
    assert_eq!(rig.entry(1).rx_tail.load(Relaxed), 4 * 8);
    let mut record = [0; 8];
    rig.copy(1, false, 0, &mut record);
    let id = u32::from_le_bytes(record[..4].try_into().unwrap());
    assert_eq!(id, rig.guest.layout().guest_sockets);
    rig.entry(1).rx_head.store(8, SeqCst);
    assert_eq!(rig.entry(1).rx_stalled.swap(0, SeqCst), 1);
    rig.push(true, Nqe::new(Op::Credit, 0, 1));
    rig.turn().unwrap();
    assert_eq!(rig.stack.backlog, 4);
    assert!(rig.service.adopted(id, 0) && !rig.service.adopted(id, 0));
    // The listener goes: what nobody took is reset, what was taken stays.
    rig.service.close(&mut rig.stack, 1).unwrap();
    assert_eq!(rig.stack.closed.iter().filter(|(_, how)| *how == Close::Abort).count(), 4);
    assert_eq!(rig.service.sockets(), 1);
}

#[test]
fn a_placeholder_that_is_kept_is_the_next_socket_s() {
    let mut rig = Rig::new(11);
    let first = rig.connected(1);
    let free = rig.guest.header().free_head.load(Acquire);
    rig.write(1, b"last words");
    let generation = rig.entry(1).generation.load(Acquire);
    rig.push(false, Nqe::new(Op::Close, 0, 1));
    rig.stack.peer(first).room = 3;
    rig.turn().unwrap();
    assert_eq!(rig.entry(1).generation.load(Acquire), generation, "what was written is not out");
    rig.stack.peer(first).room = usize::MAX;
    while rig.stack.closed.is_empty() {
        rig.ready(1, Readiness::WRITE);
        rig.turn().unwrap();
    }
    assert_eq!(rig.stack.closed, [(first.0, Close::Graceful)]);
    assert_ne!(rig.entry(1).generation.load(Acquire), generation);
    assert_eq!(rig.guest.header().free_head.load(Acquire), free, "the id is not anybody's");
    assert_eq!(rig.service.sockets(), 0);

    // The next one is opened by its first element, as what stands in `kind`.
    rig.entry(1).kind.store(10 << 16 | 6, SeqCst);
    for _ in 0..2 {
        assert_eq!(rig.job(Op::Connect, 1, 0), -libc::EINPROGRESS);
        assert_ne!(rig.entry(1).state.load(Acquire) & state::CONNECTED, 0);
        let second = Handle(rig.stack.last);
        assert_ne!(second.0, first.0);
        rig.stack.peer(second).to_receive.extend(b"unread");
        rig.ready(1, Readiness::READ);
        rig.turn().unwrap();
        rig.push(false, Nqe::new(Op::Close, 0, 1));
        rig.turn().unwrap();
        assert_eq!(rig.stack.closed.last(), Some(&(second.0, Close::Abort)), "as close does on Linux");
        rig.entry(1).kind.store(2 << 16, SeqCst);
    }

    // Its placeholder is closed: the id is free, and known no more.
    rig.service.close(&mut rig.stack, 1).unwrap();
    assert_eq!(rig.guest.header().free_head.load(Acquire) as u32, 1);
    let mut late = Nqe::new(Op::Connect, 0, 1);
    late.flags = flag::SYNC;
    rig.push(false, late);
    assert!(rig.service.drain(&mut rig.stack, 100).unwrap().again);
    assert!(rig.service.awaits_socket());
    rig.turn().unwrap();
    let ring = rig.guest.complete(0).unwrap();
    let mut head = ring.head();
    assert_eq!(Nqe::from_words(ring.pop(&mut head).unwrap().unwrap()).status, -libc::EBADF);
}

/// Nobody but the guest's own streams: what else comes does nothing, and nothing twice.
#[test]
fn only_streams_of_the_guest_s_own_keep_their_placeholders() {
    let mut rig = Rig::new(12);
    rig.service.open(&mut rig.stack, 1, 2, 2, 0).unwrap();
    rig.service.open(&mut rig.stack, 2, 2, 1, 0).unwrap();
    assert_eq!(rig.job(Op::Listen, 2, 16), 0);
    rig.stack.backlog = 1;
    rig.ready(2, Readiness::READ);
    rig.turn().unwrap();
    let accepted = rig.guest.layout().guest_sockets;
    for id in [1, 2, accepted] {
        rig.push(false, Nqe::new(Op::Close, 0, id));
    }
    rig.turn().unwrap();
    assert_eq!((rig.stack.closed.len(), rig.service.sockets()), (0, 3));
    // Closed by its placeholder's end while what it wrote goes out: the id comes back after that.
    let handle = rig.connected(3);
    rig.write(3, b"going");
    rig.stack.peer(handle).room = 0;
    rig.push(false, Nqe::new(Op::Close, 0, 3));
    rig.turn().unwrap();
    rig.service.close(&mut rig.stack, 3).unwrap();
    assert_eq!(rig.stack.closed.len(), 0);
    rig.stack.peer(handle).room = usize::MAX;
    while rig.stack.closed.is_empty() {
        rig.ready(3, Readiness::WRITE);
        rig.turn().unwrap();
    }
    assert_eq!(rig.guest.header().free_head.load(Acquire) as u32, 3);
}

#[test]
fn ids_run_out_and_come_back() {
    let mut rig = Rig::new(1);
    rig.service.open(&mut rig.stack, 1, 2, 1, 0).unwrap();
    rig.stack.backlog = 100;
    assert_eq!(rig.job(Op::Listen, 1, 4096), 0);
    // 32 ids are the engine's.
    assert_eq!(rig.stack.backlog, 100 - 32);
    assert!(rig.service.is_starved());
    let first = rig.guest.layout().guest_sockets;
    rig.entry(1).rx_head.store(16, SeqCst);
    assert!(rig.service.adopted(first, 0));
    rig.service.close(&mut rig.stack, first).unwrap();
    rig.turn().unwrap();
    assert_eq!(rig.stack.backlog, 100 - 33);
}

/// Header, payload and one control message of level SOL_SOCKET; `control`: the bytes that the header tells of.
fn with_control(payload: &[u8], control: u32, kind: i32) -> Vec<u8> {
    let mut record = vec![0; 32];
    record[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    record[4..8].copy_from_slice(&(control << 16).to_le_bytes());
    record.extend(payload);
    record.resize(record.len().next_multiple_of(8), 0);
    if control > 0 {
        record.extend(20u64.to_ne_bytes());
        record.extend(libc::SOL_SOCKET.to_ne_bytes());
        record.extend(kind.to_ne_bytes());
        record.extend([0; 8]);
    }
    record
}

#[test]
fn a_control_message_that_needs_a_privilege_loses_its_datagram_only() {
    let mut rig = Rig::new(1);
    rig.service.open(&mut rig.stack, 1, 2, libc::SOCK_DGRAM as u32, 0).unwrap();
    let handle = Handle(rig.stack.last);
    assert_eq!(rig.job(Op::SendRing, 1, 0), 0);
    rig.write(1, &with_control(b"one", 0, 0));
    rig.write(1, &with_control(b"lost", 24, libc::SO_MARK));
    rig.write(1, &with_control(b"two", 0, 0));
    rig.turn().unwrap();
    rig.turn().unwrap();
    assert_eq!(rig.stack.peer(handle).sent, b"onetwo");
    assert_eq!(rig.entry(1).error.load(SeqCst), libc::EPERM as u32);
    // A length that no guest writes.
    rig.write(1, &with_control(b"bad", 20, libc::SO_MARK));
    assert!(rig.turn().is_err());
}

/// Of all sizes, small ones several at a time, through a ring that wraps, stalls and grows.
#[test]
fn datagrams_come_whole_and_in_order() {
    let mut rig = Rig::new(1);
    rig.service.open(&mut rig.stack, 1, 2, libc::SOCK_DGRAM as u32, 0).unwrap();
    let handle = Handle(rig.stack.last);
    let (mut sent, mut got, mut biggest) = (0u32, 0u32, 0);
    while got < 5000 {
        for _ in 0..rig.stack.random(200) {
            let largest = if rig.stack.random(20) == 0 { 65536 } else { 300 };
            let mut datagram = sent.to_le_bytes().to_vec();
            let len = 4 + rig.stack.random(largest - 4) as usize;
            datagram.resize(len, sent as u8);
            rig.stack.peer(handle).datagrams.push_back(datagram);
            sent += 1;
        }
        rig.ready(1, Readiness::READ);
        rig.turn().unwrap();
        biggest = biggest.max(rig.ring(1, false).1);
        for _ in 0..rig.stack.random(300) {
            let e = rig.entry(1);
            let head = e.rx_head.load(Relaxed);
            if head == e.rx_tail.load(Acquire) {
                break;
            }
            let mut header = vec![0; 32];
            rig.copy(1, false, head, &mut header);
            let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
            let mut data = vec![0; len as usize];
            rig.copy(1, false, head.wrapping_add(32), &mut data);
            assert_eq!(data[..4], got.to_le_bytes());
            assert!(data[4..].iter().all(|&b| b == got as u8));
            got += 1;
            let e = rig.entry(1);
            e.rx_head.store(head.wrapping_add(datagram_record(len)), SeqCst);
            if e.rx_stalled.swap(0, SeqCst) == 1 {
                rig.push(true, Nqe::new(Op::Credit, 0, 1));
            }
        }
    }
    assert_eq!(biggest, 1 << 20);
}

#[test]
fn an_address_in_use_gets_a_second_chance() {
    let mut rig = Rig::new(1);
    rig.service.open(&mut rig.stack, 1, 2, 1, 0).unwrap();
    rig.stack.bind_errors.push_back(libc::EADDRINUSE);
    assert_eq!(rig.job(Op::Bind, 1, 0), 0);
    rig.stack.bind_errors.extend([libc::EADDRINUSE, libc::EADDRINUSE]);
    assert_eq!(rig.job(Op::Bind, 1, 0), -libc::EADDRINUSE);
    rig.stack.bind_errors.push_back(libc::EACCES);
    assert_eq!(rig.job(Op::Bind, 1, 0), -libc::EACCES);
}

#[test]
fn urgent_data_ends_where_it_was_written() {
    let mut rig = Rig::new(1);
    let handle = rig.connected(1);
    rig.stack.peer(handle).room = 0;
    assert_eq!(rig.job(Op::Urgent, 1, 1 << 20), -libc::EINVAL);
    assert_eq!(rig.job(Op::Urgent, 1, 3), 0);
    rig.write(1, b"ab!");
    rig.turn().unwrap();
    rig.write(1, b"cdef");
    rig.turn().unwrap();
    rig.stack.peer(handle).room = 1000;
    for _ in 0..20 {
        rig.ready(1, Readiness::WRITE);
        rig.turn().unwrap();
    }
    assert_eq!(rig.stack.peer(handle).sent, b"ab!cdef");
    assert_eq!(rig.stack.peer(handle).urgent_at, [2]);
}

#[test]
fn impossible_positions_are_violations() {
    type Crime = fn(&SocketEntry);
    let crimes: [Crime; 3] = [
        |e| e.rx_head.store(1, SeqCst),
        |e| e.tx_tail.store(1 << 20, SeqCst),
        |e| e.rx_head.store(u32::MAX / 2, SeqCst),
    ];
    for crime in crimes {
        let mut rig = Rig::new(1);
        let handle = rig.connected(1);
        crime(rig.entry(1));
        rig.stack.peer(handle).to_receive.extend(b"x");
        rig.ready(1, Readiness::READ);
        rig.push(true, Nqe::new(Op::Send, 0, 1));
        assert!(rig.turn().is_err());
        rig.service.end(&mut rig.stack);
        assert!(rig.stack.sockets.is_empty());
    }
}
