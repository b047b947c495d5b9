//! Socket calls on guest sockets. Every function returns what Linux would, as `Err(errno)` where it fails.

use core::sync::atomic::{AtomicU32, Ordering, fence};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use netkernel_abi::ancillary::{self, Fate, MAX_CONTROL};
use netkernel_abi::control::{Message, kind};
use netkernel_abi::nqe::flag;
use netkernel_abi::socket::{ACCEPT_RECORD, DatagramHeader, datagram_record, gflag, state};
use netkernel_abi::{Op, SocketEntry};
use netkernel_shm::Bytes;

use crate::guest::{self, Guest};
use crate::offer::{self, Source};
use crate::sys::{self, raw};
use crate::table::{self, Slot};
use crate::{handover, pair, queue, spare, wait};

/// A guest socket under one descriptor of this process.
#[derive(Clone, Copy)]
pub struct Sock {
    pub guest: &'static Guest,
    pub entry: &'static SocketEntry,
    pub id: u32,
    pub fd: i32,
}

/// What a receive tells beside the bytes.
#[derive(Default)]
pub struct Told {
    /// Sender of a datagram.
    pub from: Vec<u8>,
    /// Control messages of a datagram.
    pub control: Vec<u8>,
}

pub type Result<T> = core::result::Result<T, i32>;

/// The guest socket under `fd`, if there is one.
#[inline]
pub fn find(fd: i32) -> Option<Sock> {
    let sock = by_id(table::socket(fd)?, fd)?;
    if handover::is_over(sock.state()) && handover::settle(&sock).is_ok() {
        return None;
    }
    Some(sock)
}

pub fn by_id(id: u32, fd: i32) -> Option<Sock> {
    let guest = guest::guest()?;
    Some(Sock { guest, entry: guest.region.socket(id)?, id, fd })
}

/// A writer that is this far ahead of the engine lets it run, should it want this very core. Otherwise the engine would not
/// send before the ring is full, and the peer fall asleep meanwhile: waking it costs more than the switch. Measured with
/// bulk sends, guest and engine on one core, a ring of 1 MiB: 0.77 of the kernel's throughput without, 0.86-0.88 with
/// 300 to 650 KB, 0.7 with 100 KB (a switch for each write).
const GIVE_WAY: u32 = 384 << 10;

pub const SIOCATMARK: u64 = 0x8905;

/// A set of program buffers, as in `struct iovec`; addresses are the program's own.
/// Looks at what an offer became, before it counts as nothing.
const MOST_LOOKS: u32 = 64;

pub type Buffers<'a> = &'a [libc::iovec];

pub fn total(buffers: Buffers) -> usize {
    buffers.iter().fold(0usize, |sum, b| sum.saturating_add(b.iov_len))
}

/// Calls `copy(buffer pointer, length)` for the next `len` bytes of `buffers` from `skip` on.
pub fn walk(buffers: Buffers, mut skip: usize, mut len: usize, mut copy: impl FnMut(*mut u8, usize)) {
    for b in buffers {
        if len == 0 {
            break;
        }
        if skip >= b.iov_len {
            skip -= b.iov_len;
            continue;
        }
        let n = (b.iov_len - skip).min(len);
        // SAFETY: within the program's buffer by the check above.
        copy(unsafe { b.iov_base.cast::<u8>().add(skip) }, n);
        skip = 0;
        len -= n;
    }
}

/// `socket(2)` for INET stream and datagram sockets.
pub fn create(guest: &'static Guest, domain: i32, kind_flags: i32, protocol: i32) -> Result<i32> {
    let kind_only = kind_flags & 0xf;
    let datagram = kind_only == libc::SOCK_DGRAM;
    if guest::engine_gone() {
        return Err(libc::ENETDOWN);
    }
    guest.process()?;
    if !datagram && let Some(made) = reuse(guest, domain, kind_flags, protocol) {
        return made;
    }
    let pair = make_pair(kind_flags & libc::SOCK_CLOEXEC != 0)?;
    let id = take_id(guest)?;
    let entry = guest.region.socket(id).ok_or(libc::ENFILE)?;
    reset_guest_lines(entry);
    let v6 = if domain == libc::AF_INET6 { gflag::V6 } else { 0 };
    let nonblock = if kind_flags & libc::SOCK_NONBLOCK != 0 { gflag::NONBLOCK } else { 0 };
    entry.flags.store(v6 | nonblock, Ordering::Relaxed);
    entry.kind.store((domain as u32) << 16 | protocol as u32 & 0xffff, Ordering::Relaxed);
    if datagram {
        entry.state.store(state::DATAGRAM, Ordering::Relaxed);
    }
    let message = Message {
        kind: kind::SOCKET,
        a: id,
        b: domain as u32,
        c: kind_only as u32,
        d: protocol as u32,
        ..Message::default()
    };
    match place(guest, entry, id, pair, message) {
        Ok(fd) => {
            spare::made(id, fd);
            Ok(fd)
        }
        Err(e) => {
            give_id_back(guest, id, entry);
            Err(e)
        }
    }
}

/// A stream socket with a placeholder that was kept. `None`: there is none.
fn reuse(guest: &Guest, domain: i32, kind_flags: i32, protocol: i32) -> Option<Result<i32>> {
    let (kept, entry, _moving) = spare::take(guest)?;
    let command = match kind_flags & libc::SOCK_CLOEXEC {
        0 => libc::F_DUPFD,
        _ => libc::F_DUPFD_CLOEXEC,
    };
    let fd = raw!(libc::SYS_fcntl, kept.fd, command, 0) as i32;
    if fd < 0 {
        spare::put_back(kept, entry);
        // At the limit: as if there were none, so that the errno is the kernel's own.
        return None;
    }
    table::forget(kept.fd);
    sys::close(kept.fd);
    reset_guest_lines(entry);
    let v6 = if domain == libc::AF_INET6 { gflag::V6 } else { 0 };
    let nonblock = if kind_flags & libc::SOCK_NONBLOCK != 0 { gflag::NONBLOCK } else { 0 };
    entry.flags.store(v6 | nonblock, Ordering::Relaxed);
    // What the engine opens with the first element.
    entry.kind.store((domain as u32) << 16 | protocol as u32 & 0xffff, Ordering::Relaxed);
    entry.inode.store(kept.inode, Ordering::Relaxed);
    if !table::set(fd, Slot::Socket(kept.id)) {
        sys::close(fd);
        return Some(Err(libc::EMFILE));
    }
    spare::made(kept.id, fd);
    Some(Ok(fd))
}

/// A placeholder pair: the program's end, which has the lowest free number, and the engine's.
fn make_pair(cloexec: bool) -> Result<(OwnedFd, OwnedFd)> {
    let mut pair = [0i32; 2];
    let kind = libc::SOCK_STREAM | if cloexec { libc::SOCK_CLOEXEC } else { 0 };
    let r = raw!(libc::SYS_socketpair, libc::AF_UNIX, kind, 0, pair.as_mut_ptr());
    if r == -(libc::EMFILE as isize) {
        pair = pair_at_the_limit(kind)?;
    } else if r < 0 {
        return Err(-r as i32);
    }
    // SAFETY: just made, ours alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// A pair of which only the program's end needs a number below the soft limit.
#[cold]
fn pair_at_the_limit(kind: i32) -> Result<[i32; 2]> {
    let soft = limit_of_descriptors(None).rlim_cur;
    let mut pair = [-1i32; 2];
    let r = above_the_limit(|| match raw!(libc::SYS_socketpair, libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) {
        r if r < 0 => Err(-r as i32),
        _ => Ok(()),
    });
    r?;
    if pair[0] as u64 >= soft {
        pair.into_iter().for_each(sys::close);
        return Err(libc::EMFILE);
    }
    Ok(pair)
}

fn limit_of_descriptors(new: Option<libc::rlimit>) -> libc::rlimit {
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let new = new.as_ref().map_or(core::ptr::null(), |new| new as *const libc::rlimit);
    raw!(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, new, &mut old as *mut libc::rlimit);
    old
}

/// Makes descriptors, and once more with the soft limit raised for a moment, if it fails with EMFILE and the hard limit
/// allows it.
pub fn above_the_limit<T>(mut make: impl FnMut() -> Result<T>) -> Result<T> {
    /// Process tag of who changes the limit.
    static CHANGING: AtomicU32 = AtomicU32::new(0);
    match make() {
        Err(libc::EMFILE) => {}
        other => return other,
    }
    // A sandbox may kill who asks for this.
    if sys::confined() {
        return Err(libc::EMFILE);
    }
    let me = guest::tag();
    for turn in 0.. {
        match CHANGING.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => break,
            // A thread of the process that this one was forked from.
            Err(other) if other != me => CHANGING.store(0, Ordering::Relaxed),
            Err(_) if turn > 1000 => return Err(libc::EMFILE),
            Err(_) => sys::yield_now(),
        }
    }
    let before = limit_of_descriptors(None);
    let raised = libc::rlimit { rlim_cur: before.rlim_max.min(before.rlim_cur + 1024), ..before };
    let mut result = Err(libc::EMFILE);
    if raised.rlim_cur > before.rlim_cur {
        limit_of_descriptors(Some(raised));
        result = make();
        limit_of_descriptors(Some(before));
    }
    CHANGING.store(0, Ordering::Release);
    result
}

/// Tells the engine of a socket's placeholder and enters its descriptor in the table.
fn place(
    guest: &Guest,
    entry: &SocketEntry,
    id: u32,
    pair: (OwnedFd, OwnedFd),
    message: Message,
) -> Result<i32> {
    let (ours, theirs) = pair;
    entry.inode.store(sys::socket_inode(ours.as_raw_fd()).unwrap_or(0), Ordering::Relaxed);
    guest.channel_send(message, &theirs)?;
    drop(theirs);
    let fd = ours.into_raw_fd();
    if !table::set(fd, Slot::Socket(id)) {
        sys::close(fd);
        return Err(libc::EMFILE);
    }
    Ok(fd)
}

fn reset_guest_lines(e: &SocketEntry) {
    for word in
        [&e.rx_head, &e.tx_tail, &e.tx_base, &e.flags, &e.rx_lock, &e.tx_lock, &e.tx_pending, &e.waiters]
    {
        word.store(0, Ordering::Relaxed);
    }
    for word in [&e.tx_wanted, &e.rcv_low_water, &e.broadcast, &e.event_pending, &e.target_len] {
        word.store(0, Ordering::Relaxed);
    }
    for word in [&e.inode, &e.rcv_timeout_us, &e.snd_timeout_us] {
        word.store(0, Ordering::Relaxed);
    }
    for watcher in &e.watchers {
        watcher.store(0, Ordering::Relaxed);
    }
}

/// Takes a socket id: from the free list, else one never used.
fn take_id(guest: &Guest) -> Result<u32> {
    let header = guest.region.header();
    let limit = guest.region.layout().guest_sockets;
    let mut turns = 0;
    loop {
        let head = header.free_head.load(Ordering::Acquire);
        let id = head as u32;
        if id != 0 {
            let Some(entry) = guest.region.socket(id) else { return Err(libc::ENFILE) };
            let next = entry.next_free.load(Ordering::Relaxed) as u64;
            let new = ((head >> 32).wrapping_add(1) << 32) | next;
            if header.free_head.compare_exchange(head, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Ok(id);
            }
            continue;
        }
        let unused = header.next_unused.load(Ordering::Relaxed);
        if unused >= limit {
            // The engine may be about to give some back.
            turns += 1;
            if turns > 2000 {
                return Err(libc::ENFILE);
            }
            guest.ring_doorbell();
            sys::yield_now();
            continue;
        }
        if header
            .next_unused
            .compare_exchange(unused, unused + 1, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
        {
            return Ok(unused);
        }
    }
}

/// Undoes [`take_id`] for an id that the engine never heard of.
fn give_id_back(guest: &Guest, id: u32, entry: &SocketEntry) {
    let header = guest.region.header();
    loop {
        let head = header.free_head.load(Ordering::Acquire);
        entry.next_free.store(head as u32, Ordering::Relaxed);
        let new = ((head >> 32).wrapping_add(1) << 32) | id as u64;
        if header.free_head.compare_exchange(head, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return;
        }
    }
}

/// A lock in the region, held by a thread id. A holder that is gone (killed in the middle) is found out.
struct RegionLock<'a>(&'a AtomicU32);

impl<'a> RegionLock<'a> {
    /// EAGAIN: the calling thread holds it itself (a signal handler interrupted the same call).
    fn take(word: &'a AtomicU32) -> Result<RegionLock<'a>> {
        let me = queue::tid();
        let mut turns = 0u32;
        loop {
            match word.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Ok(RegionLock(word)),
                Err(holder) if holder == me => return Err(libc::EAGAIN),
                Err(holder) => {
                    turns += 1;
                    if turns.is_multiple_of(64) {
                        sys::yield_now();
                    } else {
                        core::hint::spin_loop();
                    }
                    if turns.is_multiple_of(65536)
                        && holder != netkernel_abi::socket::ENGINE_LOCK
                        && raw!(libc::SYS_tkill, holder, 0) == -(libc::ESRCH as isize)
                    {
                        let _ = word.compare_exchange(holder, 0, Ordering::AcqRel, Ordering::Relaxed);
                    }
                    if turns.is_multiple_of(65536) && guest::engine_gone() {
                        return Err(libc::ECONNRESET);
                    }
                }
            }
        }
    }
}

impl Drop for RegionLock<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Sock {
    #[inline]
    pub fn state(&self) -> u32 {
        self.entry.state.load(Ordering::Acquire)
    }

    #[inline]
    pub fn flags(&self) -> u32 {
        self.entry.flags.load(Ordering::Relaxed)
    }

    pub fn is_datagram(&self) -> bool {
        self.state() & state::DATAGRAM != 0
    }

    pub fn nonblock(&self, message_flags: i32) -> bool {
        self.flags() & gflag::NONBLOCK != 0 || message_flags & libc::MSG_DONTWAIT != 0
    }

    pub fn set_flag(&self, bit: u32, on: bool) {
        if on {
            self.entry.flags.fetch_or(bit, Ordering::SeqCst);
            if bit & gflag::ASYNC != 0 {
                self.arm(libc::EPOLLIN as u32);
            }
        } else {
            self.entry.flags.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// Takes the pending error, as SO_ERROR does.
    pub fn take_error(&self) -> i32 {
        if self.entry.error.load(Ordering::Relaxed) == 0 {
            return if guest::engine_gone() { libc::ECONNRESET } else { 0 };
        }
        self.entry.error.swap(0, Ordering::AcqRel) as i32
    }

    fn rx_ring(&self) -> Option<Bytes<'static>> {
        let e = self.entry;
        let size = e.rx_size.load(Ordering::Relaxed);
        self.ring(e.rx_offset.load(Ordering::Relaxed), size, e.rx_base.load(Ordering::Relaxed))
    }

    fn tx_ring(&self) -> Option<Bytes<'static>> {
        let e = self.entry;
        let size = e.tx_size.load(Ordering::Acquire);
        self.ring(e.tx_offset.load(Ordering::Relaxed), size, e.tx_base.load(Ordering::Relaxed))
    }

    fn ring(&self, offset: u32, size: u32, base: u32) -> Option<Bytes<'static>> {
        self.guest.region.bytes_at(offset as u64 * 64, size, base)
    }

    /// Unread bytes (a listener: bytes of accept records; datagrams: bytes of records).
    #[inline]
    pub fn rx_used(&self) -> u32 {
        if let Some(pair) = self.pair() {
            return self.pair_unread(&pair);
        }
        let tail = self.entry.rx_tail.load(Ordering::Acquire);
        tail.wrapping_sub(self.entry.rx_head.load(Ordering::Acquire))
    }

    /// Bytes written that the stack has not taken.
    #[inline]
    pub fn tx_used(&self) -> u32 {
        if let Some(pair) = self.pair() {
            return pair.unsent();
        }
        let head = self.entry.tx_head.load(Ordering::Acquire);
        self.entry.tx_tail.load(Ordering::Relaxed).wrapping_sub(head)
    }

    fn tx_free(&self) -> u32 {
        if let Some(pair) = self.pair() {
            return pair.room();
        }
        self.entry.tx_size.load(Ordering::Acquire).saturating_sub(self.tx_used())
    }

    pub fn writable(&self) -> bool {
        if let Some(pair) = self.pair() {
            return pair.writable();
        }
        let size = self.entry.tx_size.load(Ordering::Acquire);
        match size {
            0 => self.state() & state::NO_MEMORY == 0,
            _ => self.tx_free() >= size / 4,
        }
    }

    /// The poll mask that Linux would show (tcp_poll, udp: datagram_poll).
    pub fn readiness(&self) -> u32 {
        use libc::{EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLLRDNORM, EPOLLWRNORM};
        let (input, output) = (EPOLLIN | EPOLLRDNORM, EPOLLOUT | EPOLLWRNORM);
        if guest::engine_gone() {
            return (input | output | EPOLLERR | EPOLLHUP | EPOLLRDHUP) as u32;
        }
        let s = self.state();
        if s & state::HANDED != 0 {
            // The next call finds out.
            return (input | output) as u32;
        }
        let f = self.flags();
        let mut mask = 0;
        if self.entry.error.load(Ordering::Relaxed) != 0 {
            mask |= EPOLLERR;
        }
        let rx_end = s & state::RX_END != 0 || f & gflag::SHUT_RD != 0;
        let tx_end = s & state::TX_END != 0 || f & gflag::SHUT_WR != 0;
        if s & state::LISTENING != 0 {
            if self.rx_used() > 0 || s & state::ACCEPTABLE != 0 {
                mask |= input;
            }
            return mask as u32;
        }
        if s & state::DATAGRAM != 0 {
            if self.rx_used() > 0 || rx_end {
                mask |= input;
            }
            if rx_end {
                mask |= EPOLLRDHUP;
            }
            if rx_end && tx_end {
                mask |= EPOLLHUP;
            }
            if self.writable() {
                mask |= output;
            }
            return mask as u32;
        }
        if s & (state::DEAD | state::CONNECT_FAILED) != 0 {
            return (mask | input | output | EPOLLHUP | EPOLLRDHUP) as u32;
        }
        if s & state::CONNECTING != 0 {
            return mask as u32;
        }
        if s & state::CONNECTED == 0 {
            return (mask | output | EPOLLHUP) as u32;
        }
        if s & state::PAIRED != 0 && pair::of(self.guest, self.entry).is_err() {
            // Its memory is not to be had, which the next call says.
            return (mask | input | output | EPOLLERR) as u32;
        }
        let low_water = self.entry.rcv_low_water.load(Ordering::Relaxed).max(1);
        if self.rx_used() >= low_water || rx_end {
            mask |= input;
        }
        if rx_end {
            mask |= EPOLLRDHUP;
            if tx_end {
                mask |= EPOLLHUP;
            }
        }
        if tx_end || self.writable() {
            mask |= output;
        }
        let inline = f & gflag::OOB_INLINE != 0;
        let to_mark = match self.pair() {
            Some(pair) => self
                .note_mark(&pair)
                .map(|mark| mark.position.wrapping_sub(pair.mine.head.load(Ordering::Relaxed))),
            None if s & state::OOB_MARK != 0 => {
                let head = self.entry.rx_head.load(Ordering::Relaxed);
                Some(self.entry.oob_position.load(Ordering::Relaxed).wrapping_sub(head))
            }
            None => None,
        };
        let mark_ahead = to_mark.is_some_and(|ahead| ahead as i32 >= 0);
        if self.entry.oob.load(Ordering::Acquire) & 0x100 != 0 && !inline || inline && mark_ahead {
            mask |= EPOLLPRI;
        }
        mask as u32
    }

    /// Tells the engine that the poller wants to hear of send-ring space, if there is none now.
    pub fn want_space(&self) {
        if self.state() & state::PAIRED == 0 && !self.writable() {
            self.entry.tx_wanted.store(1, Ordering::SeqCst);
        }
    }

    pub fn wait_for(&self, timeout_us: u64, ready: impl FnMut() -> bool) -> Result<()> {
        wait::wait(self, timeout_us, || {}, ready)
    }

    /// Tells the other end of a pair, if this is one, that somebody sleeps until one of these poll events.
    pub fn arm(&self, events: u32) {
        let Some(pair) = self.pair() else { return };
        if events & !(libc::EPOLLOUT | libc::EPOLLWRNORM) as u32 != 0 {
            pair.want_data(self.flags() & gflag::ASYNC != 0);
        }
        if events & (libc::EPOLLOUT | libc::EPOLLWRNORM) as u32 != 0 && !pair.writable() {
            pair.want_space();
        }
    }

    fn job(
        &self,
        op: Op,
        op_data: u64,
        argument: &[u8],
        size: u32,
        out: &mut [u8],
    ) -> Result<queue::Completion> {
        let done = queue::job(self.guest, op, self.id, op_data, argument, size, out)?;
        if done.status < 0 { Err(-done.status) } else { Ok(done) }
    }

    // ---- connection set-up -------------------------------------------------------------------------------------

    pub fn bind(&self, address: &[u8]) -> Result<()> {
        self.job(Op::Bind, 0, address, 0, &mut []).map(|_| ())
    }

    pub fn listen(&self, backlog: i32) -> Result<()> {
        if self.is_datagram() {
            return Err(libc::EOPNOTSUPP);
        }
        self.job(Op::Listen, backlog as u32 as u64, &[], 0, &mut []).map(|_| ())
    }

    pub fn connect(&self, address: &[u8]) -> Result<()> {
        if address.len() >= 2 && u16::from_ne_bytes([address[0], address[1]]) == libc::AF_UNSPEC as u16 {
            return self.disconnect();
        }
        let s = self.state();
        if s & state::DATAGRAM == 0 {
            // A connect that was begun without blocking is told of once more, by the next call.
            let begun = self.flags() & gflag::CONNECT_BEGUN != 0;
            if s & state::CONNECTED != 0 {
                self.set_flag(gflag::CONNECT_BEGUN, false);
                return if begun { Ok(()) } else { Err(libc::EISCONN) };
            }
            if s & state::CONNECTING != 0 {
                if self.nonblock(0) {
                    return Err(libc::EALREADY);
                }
                return self.finish_connect(libc::EALREADY);
            }
            if s & state::CONNECT_FAILED != 0 && begun {
                self.set_flag(gflag::CONNECT_BEGUN, false);
                let error = self.take_error();
                return Err(if error != 0 { error } else { libc::ECONNABORTED });
            }
        }
        match self.job(Op::Connect, 0, address, 0, &mut []) {
            Ok(_) => Ok(()),
            Err(libc::EINPROGRESS) => {
                self.set_flag(gflag::CONNECT_BEGUN, true);
                if self.nonblock(0) { Err(libc::EINPROGRESS) } else { self.finish_connect(libc::EINPROGRESS) }
            }
            Err(e) => Err(e),
        }
    }

    /// `connect` to AF_UNSPEC. A stream is as new afterwards: what was unread or unsent is gone, the peer sees a reset.
    fn disconnect(&self) -> Result<()> {
        if self.is_datagram() {
            return self.job(Op::Disconnect, 0, &[], 0, &mut []).map(|_| ());
        }
        let e = self.entry;
        let _reader = RegionLock::take(&e.rx_lock)?;
        let _writer = RegionLock::take(&e.tx_lock)?;
        self.job(Op::Disconnect, 0, &[], 0, &mut [])?;
        e.rx_head.store(e.rx_tail.load(Ordering::Acquire), Ordering::SeqCst);
        self.set_flag(gflag::CONNECT_BEGUN | gflag::SHUT_RD | gflag::SHUT_WR, false);
        Ok(())
    }

    /// `late`: the errno when SO_SNDTIMEO is over first.
    fn finish_connect(&self, late: i32) -> Result<()> {
        let over = state::CONNECTED | state::CONNECT_FAILED | state::DEAD;
        let timeout = self.entry.snd_timeout_us.load(Ordering::Relaxed);
        match self.wait_for(timeout, || self.state() & over != 0) {
            Err(libc::EAGAIN) => return Err(late),
            other => other?,
        }
        self.set_flag(gflag::CONNECT_BEGUN, false);
        if self.state() & (state::CONNECT_FAILED | state::DEAD) != 0 || guest::engine_gone() {
            let error = self.take_error();
            return Err(if error != 0 { error } else { libc::ECONNABORTED });
        }
        if self.pair().is_some() && self.flags() & gflag::ASYNC != 0 {
            self.arm(libc::EPOLLIN as u32);
        }
        Ok(())
    }

    /// `accept4(2)`: the new descriptor and socket.
    pub fn accept(&self, flags: i32) -> Result<Sock> {
        if flags & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) != 0 {
            return Err(libc::EINVAL);
        }
        if self.is_datagram() {
            return Err(libc::EOPNOTSUPP);
        }
        self.make_room_for_signals();
        loop {
            if guest::engine_gone() {
                // Not ECONNABORTED, at which servers try again at once, for ever.
                return Err(libc::ENETDOWN);
            }
            let s = self.state();
            if s & state::DEAD != 0 {
                // With the process of its stack.
                return Err(libc::ENETDOWN);
            }
            if s & state::LISTENING == 0 {
                return Err(libc::EINVAL);
            }
            if s & state::ON_DEMAND != 0
                && self.rx_used() == 0
                && (s & state::ACCEPTABLE != 0 || self.nonblock(0))
            {
                match self.job(Op::Accept, 0, &[], 0, &mut []) {
                    Ok(_) => continue,
                    Err(libc::EAGAIN) => {}
                    Err(e) => return Err(e),
                }
            }
            if self.rx_used() > 0 {
                // The descriptors come first: a process at its limit leaves the connection queued, as on Linux.
                let pair = make_pair(flags & libc::SOCK_CLOEXEC != 0)?;
                let Some((id, generation)) = self.take_accepted() else { continue };
                let Some(entry) = self.guest.region.socket(id) else { continue };
                let nonblock = if flags & libc::SOCK_NONBLOCK != 0 { gflag::NONBLOCK } else { 0 };
                let inherited = self.flags() & (gflag::V6 | gflag::OOB_INLINE);
                entry.flags.store(nonblock | inherited, Ordering::Relaxed);
                let timeout = self.entry.rcv_timeout_us.load(Ordering::Relaxed);
                entry.rcv_timeout_us.store(timeout, Ordering::Relaxed);
                entry
                    .snd_timeout_us
                    .store(self.entry.snd_timeout_us.load(Ordering::Relaxed), Ordering::Relaxed);
                let message = Message { kind: kind::ACCEPTED, a: id, b: generation, ..Message::default() };
                let fd = place(self.guest, entry, id, pair, message)?;
                let new = Sock { guest: self.guest, entry, id, fd };
                // Its memory is mapped now, rather than by the first byte.
                new.pair();
                return Ok(new);
            }
            if self.nonblock(0) {
                return Err(libc::EAGAIN);
            }
            let timeout = self.entry.rcv_timeout_us.load(Ordering::Relaxed);
            self.wait_for(timeout, || {
                self.rx_used() > 0
                    || self.state() & (state::LISTENING | state::ACCEPTABLE | state::DEAD) != state::LISTENING
            })?;
        }
    }

    fn take_accepted(&self) -> Option<(u32, u32)> {
        let e = self.entry;
        loop {
            let tail = e.rx_tail.load(Ordering::Acquire);
            let head = e.rx_head.load(Ordering::Acquire);
            if tail.wrapping_sub(head) < ACCEPT_RECORD || tail.wrapping_sub(head) > 1 << 30 {
                return None;
            }
            let ring = self.rx_ring()?;
            let mut record = [0u8; 8];
            ring.runs(head, ACCEPT_RECORD, |p, at, n| {
                // SAFETY: p is valid for n bytes of the ring; record has 8 and at + n <= 8.
                unsafe { core::ptr::copy_nonoverlapping(p, record.as_mut_ptr().add(at), n) }
            });
            if e.rx_head
                .compare_exchange(head, head.wrapping_add(ACCEPT_RECORD), Ordering::SeqCst, Ordering::Relaxed)
                .is_ok()
            {
                if e.rx_stalled.load(Ordering::SeqCst) == 1 && e.rx_stalled.swap(0, Ordering::SeqCst) == 1 {
                    queue::send(self.guest, Op::Credit, self.id, 0, 0);
                }
                let word =
                    |i: usize| u32::from_le_bytes([record[i], record[i + 1], record[i + 2], record[i + 3]]);
                return Some((word(0), word(4)));
            }
        }
    }

    pub fn name(&self, op: Op) -> Result<Vec<u8>> {
        let e = self.entry;
        let (words, len) = if op == Op::PeerName { (&e.peer, &e.peer_len) } else { (&e.local, &e.local_len) };
        let known = len.load(Ordering::Acquire) as usize;
        let s = self.state();
        let cached = if op == Op::PeerName {
            s & state::CONNECTED != 0 && s & state::DEAD == 0
        } else {
            s & state::CONNECTED != 0
        };
        if known > 0 && known <= 28 && cached {
            let mut out = Vec::with_capacity(28);
            for word in words {
                out.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
            out.truncate(known);
            return Ok(out);
        }
        let mut out = [0u8; 128];
        let done = self.job(op, 0, &[], 128, &mut out)?;
        Ok(out[..done.size].to_vec())
    }

    pub fn shutdown(&self, how: i32) -> Result<()> {
        if !(0..=2).contains(&how) {
            return Err(libc::EINVAL);
        }
        let s = self.state();
        if s & state::LISTENING != 0 {
            return queue::job(self.guest, Op::Shutdown, self.id, how as u64, &[], 0, &mut []).map(|_| ());
        }
        if s & state::CONNECTED == 0 || s & state::DEAD != 0 || guest::engine_gone() {
            if s & state::CONNECTING != 0 {
                self.job(Op::Shutdown, how as u64, &[], 0, &mut [])?;
                // Nothing connects any more.
                self.set_flag(gflag::CONNECT_BEGUN, self.state() & state::CONNECTING != 0);
                return Ok(());
            }
            return Err(libc::ENOTCONN);
        }
        if s & state::RX_END != 0 && s & state::TX_END != 0 && s & state::DATAGRAM == 0 {
            return Err(libc::ENOTCONN);
        }
        if how != libc::SHUT_RD {
            self.set_flag(gflag::SHUT_WR, true);
        }
        if how != libc::SHUT_WR {
            self.set_flag(gflag::SHUT_RD, true);
        }
        queue::post(self.guest, Op::Shutdown, self.id, how as u64);
        Ok(())
    }

    // ---- streams -----------------------------------------------------------------------------------------------

    /// Writes to a stream. `fill(ring pointer, offset in the message, length)` brings the bytes; `len` in all. `source`: the program's
    /// buffers, if that is where they come from.
    pub fn stream_send(
        &self,
        len: usize,
        flags: i32,
        source: Option<Buffers>,
        mut fill: impl FnMut(*mut u8, usize, usize) -> Result<usize>,
    ) -> Result<usize> {
        let nonblock = self.nonblock(flags);
        let timeout = self.entry.snd_timeout_us.load(Ordering::Relaxed);
        let mut done = 0usize;
        let outcome = loop {
            if let Err(e) = self.may_send() {
                break Err(e);
            }
            if len == 0 {
                return Ok(0);
            }
            let from = source.map(|buffers| Source { buffers, skip: done });
            match self.put(len - done, flags, from, |p, at, n| fill(p, done + at, n)) {
                Ok((n, short)) => {
                    done += n;
                    if done == len || short {
                        return Ok(done);
                    }
                    if n > 0 {
                        continue;
                    }
                }
                Err(e) => break Err(e),
            }
            if self.state() & state::CONNECTING != 0 && nonblock {
                break Err(libc::EAGAIN);
            }
            if nonblock {
                self.entry.tx_wanted.store(1, Ordering::SeqCst);
                if let Some(pair) = self.pair() {
                    pair.mine.full.fetch_add(1, Ordering::Relaxed);
                }
                fence(Ordering::SeqCst);
                if self.tx_free() > 0 && self.writable() && self.state() & state::CONNECTED != 0 {
                    continue;
                }
                break Err(libc::EAGAIN);
            }
            let arm = || self.arm(libc::EPOLLOUT as u32);
            let waited = wait::wait(self, timeout, arm, || {
                if self.state() & state::CONNECTING != 0 {
                    return false;
                }
                if self.writable() || self.may_send().is_err() {
                    return true;
                }
                self.entry.tx_wanted.store(1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                self.writable()
            });
            if let Err(e) = waited {
                break Err(e);
            }
        };
        match outcome {
            Err(_) if done > 0 => Ok(done),
            other => other,
        }
    }

    fn may_send(&self) -> Result<()> {
        if guest::engine_gone() {
            // As after an RST; EPIPE would bring SIGPIPE with it.
            return Err(libc::ECONNRESET);
        }
        let s = self.state();
        if s & (state::DEAD | state::CONNECT_FAILED) != 0 || self.entry.error.load(Ordering::Relaxed) != 0 {
            let error = self.take_error();
            return Err(if error != 0 { error } else { libc::EPIPE });
        }
        if s & state::TX_END != 0 || self.flags() & gflag::SHUT_WR != 0 {
            return Err(libc::EPIPE);
        }
        if s & (state::CONNECTED | state::CONNECTING) == 0 {
            return Err(libc::EPIPE);
        }
        Ok(())
    }

    /// Puts what fits into the send ring. Returns the bytes put, and whether the source ran dry.
    fn put(
        &self,
        len: usize,
        flags: i32,
        source: Option<Source>,
        mut fill: impl FnMut(*mut u8, usize, usize) -> Result<usize>,
    ) -> Result<(usize, bool)> {
        let e = self.entry;
        let s = self.state();
        if s & state::CONNECTED == 0 {
            return Ok((0, false));
        }
        if s & state::PAIRED != 0 {
            let pair = pair::of(self.guest, e)?;
            let lock = RegionLock::take(&e.tx_lock)?;
            let put = self.pair_put(&pair, len, flags & libc::MSG_OOB != 0, source, fill)?;
            drop(lock);
            if put.0 > 0 && pair.unsent() >= netkernel_abi::pair::RING_BYTES / 2 {
                sys::yield_now();
            }
            return Ok(put);
        }
        if e.tx_size.load(Ordering::Acquire) == 0 {
            match self.job(Op::SendRing, 0, &[], 0, &mut []) {
                // No memory is left: as with a full ring.
                Err(libc::EAGAIN) => return Ok((0, false)),
                other => other?,
            };
        }
        let lock = RegionLock::take(&e.tx_lock)?;
        let head = e.tx_head.load(Ordering::Acquire);
        let tail = e.tx_tail.load(Ordering::Relaxed);
        if head == tail {
            e.tx_base.store(tail, Ordering::Relaxed);
        }
        let Some(ring) = self.tx_ring() else { return Ok((0, false)) };
        let free = ring.size().saturating_sub(tail.wrapping_sub(head));
        let n = (free as usize).min(len);
        let mut put = 0usize;
        let mut failed = None;
        let mut short = false;
        ring.runs(tail, n as u32, |p, at, run| {
            if failed.is_some() || short {
                return;
            }
            match fill(p, at, run) {
                Ok(got) => {
                    put += got;
                    short = got < run;
                }
                Err(error) => failed = Some(error),
            }
        });
        if put > 0 {
            let end = tail.wrapping_add(put as u32);
            if flags & libc::MSG_OOB != 0 {
                // The engine must know before it can see the byte.
                self.job(Op::Urgent, end as u64, &[], 0, &mut [])?;
            }
            e.tx_tail.store(end, Ordering::Release);
        }
        drop(lock);
        if put > 0 {
            self.announce_send(flags);
            if self.tx_used() >= GIVE_WAY {
                sys::yield_now();
            }
            // A blocked writer is woken by room, not by luck.
            return Ok((put, short));
        }
        match failed {
            Some(error) => Err(error),
            None => Ok((0, short)),
        }
    }

    fn announce_send(&self, flags: i32) {
        let nqe_flags = if flags & libc::MSG_MORE != 0 { flag::MORE } else { 0 };
        if self.entry.tx_pending.swap(1, Ordering::SeqCst) == 0 {
            queue::send(self.guest, Op::Send, self.id, nqe_flags, self.entry.tx_tail.load(Ordering::Relaxed));
        }
    }

    /// Takes bytes of a stream's ring. `drain(ring pointer, offset, length)` says how many it took.
    fn take(
        &self,
        len: usize,
        peek_from: Option<u32>,
        sink: Option<(Buffers, usize)>,
        mut drain: impl FnMut(*mut u8, usize, usize) -> Result<usize>,
    ) -> Result<usize> {
        let e = self.entry;
        if self.state() & state::PAIRED != 0 {
            let pair = pair::of(self.guest, e)?;
            let _lock = RegionLock::take(&e.rx_lock)?;
            return self.pair_take(&pair, len, peek_from.is_some(), sink, drain);
        }
        let _lock = RegionLock::take(&e.rx_lock)?;
        let head = e.rx_head.load(Ordering::Relaxed);
        let tail = e.rx_tail.load(Ordering::Acquire);
        let used = tail.wrapping_sub(head);
        if used == 0 || used > 1 << 30 {
            return Ok(0);
        }
        let Some(ring) = self.rx_ring() else { return Ok(0) };
        let mut n = (used as usize).min(len);
        let s = self.state();
        if s & state::OOB_MARK != 0 && peek_from.is_none() {
            // A read stops at the urgent mark, as tcp_recvmsg does.
            let mark = e.oob_position.load(Ordering::Relaxed).wrapping_sub(head);
            if mark > 0 && (mark as usize) < n {
                n = mark as usize;
            }
        }
        let mut taken = 0usize;
        let mut stop = false;
        let mut failed = None;
        ring.runs(head, n as u32, |p, at, run| {
            if stop {
                return;
            }
            match drain(p, at, run) {
                Ok(got) => {
                    taken += got;
                    stop = got < run;
                }
                Err(error) => {
                    failed = Some(error);
                    stop = true;
                }
            }
        });
        if peek_from.is_none() && taken > 0 {
            let head = head.wrapping_add(taken as u32);
            e.rx_head.store(head, Ordering::SeqCst);
            self.credit(head, ring.size());
        }
        match failed {
            Some(error) if taken == 0 => Err(error),
            _ => Ok(taken),
        }
    }

    fn credit(&self, head: u32, size: u32) {
        let e = self.entry;
        if e.rx_stalled.load(Ordering::SeqCst) == 0 {
            return;
        }
        let used = e.rx_tail.load(Ordering::Acquire).wrapping_sub(head);
        if used <= size / 2 && e.rx_stalled.swap(0, Ordering::SeqCst) == 1 {
            queue::send(self.guest, Op::Credit, self.id, 0, 0);
        }
    }

    /// Reads from a stream through `drain`. `sink`: the program's buffers, if that is where it puts the bytes.
    pub fn stream_receive(
        &self,
        len: usize,
        flags: i32,
        sink: Option<Buffers>,
        mut drain: impl FnMut(*mut u8, usize, usize) -> Result<usize>,
    ) -> Result<usize> {
        let timeout = self.entry.rcv_timeout_us.load(Ordering::Relaxed);
        let all = flags & libc::MSG_WAITALL != 0 && flags & libc::MSG_PEEK == 0 && !self.nonblock(flags);
        let peek = flags & libc::MSG_PEEK != 0;
        let (mut done, mut fruitless) = (0usize, 0u32);
        loop {
            let s = self.state();
            if s & state::LISTENING != 0
                || (s & (state::CONNECTED | state::DEAD | state::CONNECT_FAILED | state::CONNECTING) == 0)
            {
                // One that was disconnected may have an error to tell.
                let error = self.take_error();
                return Err(if error != 0 { error } else { libc::ENOTCONN });
            }
            let begin = done;
            if len == 0 && self.rx_used() > 0 {
                return Ok(0);
            }
            let to = sink.map(|buffers| (buffers, begin));
            let got = match self.take(len - done, peek.then_some(0), to, |p, at, n| drain(p, begin + at, n)) {
                Ok(n) => n,
                Err(e) if done == 0 => return Err(e),
                Err(_) => return Ok(done),
            };
            done += got;
            fruitless = if got > 0 { 0 } else { fruitless };
            if done > 0 && (!all || done == len) {
                return Ok(done);
            }
            // Nothing (more) there.
            if self.offer_comes(&mut fruitless) {
                continue;
            }
            if self.rx_used() == 0 {
                let s = self.state();
                let ended = s & (state::RX_END | state::DEAD | state::CONNECT_FAILED) != 0
                    || self.flags() & gflag::SHUT_RD != 0
                    || guest::engine_gone()
                    || self.entry.error.load(Ordering::Relaxed) != 0;
                if ended {
                    // Bytes that came in before the end was published.
                    if self.rx_used() > 0 {
                        continue;
                    }
                    if done > 0 || s & state::FIN != 0 {
                        return Ok(done);
                    }
                    let error = self.take_error();
                    return if error != 0 { Err(error) } else { Ok(0) };
                }
                if self.nonblock(flags) {
                    return Err(libc::EAGAIN);
                }
                let arm = || self.arm(libc::EPOLLIN as u32);
                let waited = wait::wait(self, timeout, arm, || {
                    self.rx_used() > 0
                        || self.state() & (state::RX_END | state::DEAD | state::CONNECT_FAILED) != 0
                        || self.flags() & gflag::SHUT_RD != 0
                        || self.entry.error.load(Ordering::Relaxed) != 0
                });
                if let Err(e) = waited {
                    return if done > 0 { Ok(done) } else { Err(e) };
                }
            }
        }
    }

    /// What a pair's other end had offered will stand in the ring in a moment: a look more, if there were not too many.
    fn offer_comes(&self, looks: &mut u32) -> bool {
        let Some(pair) = self.pair() else { return false };
        if self.rx_used() == 0 && !offer::comes(&pair) {
            return false;
        }
        *looks += 1;
        if *looks > MOST_LOOKS {
            offer::refuse(&pair);
            return false;
        }
        sys::yield_now();
        true
    }

    /// `recv(MSG_OOB)`.
    fn receive_oob(&self, buffers: Buffers, flags: i32) -> Result<usize> {
        let pair = self.pair();
        if let Some(pair) = &pair {
            self.note_mark(pair);
        }
        let oob = self.entry.oob.load(Ordering::Acquire);
        if self.flags() & gflag::OOB_INLINE != 0 || oob & 0x100 == 0 {
            return Err(libc::EINVAL);
        }
        let byte = oob as u8;
        walk(buffers, 0, 1, |p, _| {
            // SAFETY: the program's buffer has at least one byte here.
            unsafe { *p = byte };
        });
        if flags & libc::MSG_PEEK == 0 {
            // What is known of a pair's last mark stays.
            self.entry.oob.store(if pair.is_some() { oob & !0x1ff } else { 0 }, Ordering::Release);
        }
        Ok(1)
    }

    /// With O_ASYNC every event leaves a byte in the placeholder, for SIGIO. They are taken out here, before that is full.
    #[inline]
    fn make_room_for_signals(&self) {
        if self.flags() & gflag::ASYNC != 0 && self.entry.waiters.load(Ordering::SeqCst) == 0 {
            let mut bytes = [0u8; 256];
            raw!(libc::SYS_recvfrom, self.fd, bytes.as_mut_ptr(), bytes.len(), libc::MSG_DONTWAIT, 0, 0);
        }
    }

    // ---- what both kinds share ---------------------------------------------------------------------------------

    /// `send`, `sendto`, `sendmsg`, `write`, `writev`.
    pub fn send(&self, buffers: Buffers, flags: i32, address: &[u8]) -> Result<usize> {
        self.send_with(buffers, flags, address, &[], true)
    }

    /// `sendmsg` with control messages. `announce` false: more datagrams come at once, and [`Sock::announce`] after them.
    pub fn send_with(
        &self,
        buffers: Buffers,
        flags: i32,
        address: &[u8],
        control: &[u8],
        announce: bool,
    ) -> Result<usize> {
        let result = if self.is_datagram() {
            self.datagram_send(buffers, flags, address, control, announce)
        } else {
            self.stream_send(total(buffers), flags, Some(buffers), |p, at, n| {
                let mut to = p;
                walk(buffers, at, n, |from, n| {
                    // SAFETY: `to` has n bytes of the ring left, `from` n bytes of the program's buffer.
                    unsafe {
                        core::ptr::copy_nonoverlapping(from, to, n);
                        to = to.add(n);
                    }
                });
                Ok(n)
            })
        };
        if result == Err(libc::EPIPE) && flags & libc::MSG_NOSIGNAL == 0 && !self.is_datagram() {
            let me = raw!(libc::SYS_gettid);
            raw!(libc::SYS_tkill, me, libc::SIGPIPE);
        }
        result
    }

    /// `recv`, `recvfrom`, `recvmsg`, `read`, `readv`. The second value is what `msg_flags` gets.
    pub fn receive(&self, buffers: Buffers, flags: i32, told: &mut Told) -> Result<(usize, i32)> {
        if flags & libc::MSG_ERRQUEUE != 0 {
            return self.receive_error(buffers, told);
        }
        self.make_room_for_signals();
        if self.is_datagram() {
            return self.datagram_receive(buffers, flags, told);
        }
        if flags & libc::MSG_OOB != 0 {
            return self.receive_oob(buffers, flags).map(|n| (n, libc::MSG_OOB));
        }
        let trunc = flags & libc::MSG_TRUNC != 0;
        self.stream_receive(total(buffers), flags, (!trunc).then_some(buffers), |p, at, n| {
            if trunc {
                return Ok(n);
            }
            let mut from = p;
            walk(buffers, at, n, |to, n| {
                // SAFETY: `from` has n bytes of the ring left, `to` n bytes of the program's buffer.
                unsafe {
                    core::ptr::copy_nonoverlapping(from, to, n);
                    from = from.add(n);
                }
            });
            Ok(n)
        })
        .map(|n| (n, 0))
    }

    // ---- datagrams ---------------------------------------------------------------------------------------------

    /// Tells the engine of datagrams that were sent without announcing them.
    pub fn announce(&self) {
        if self.is_datagram() {
            self.announce_send(0);
        }
    }

    fn datagram_send(
        &self,
        buffers: Buffers,
        flags: i32,
        address: &[u8],
        control: &[u8],
        announce: bool,
    ) -> Result<usize> {
        let len = total(buffers);
        let e = self.entry;
        if guest::engine_gone() {
            return Err(libc::ENETDOWN);
        }
        if flags & libc::MSG_OOB != 0 {
            return Err(libc::EOPNOTSUPP);
        }
        if len > 65507 + if self.flags() & gflag::V6 != 0 { 20 } else { 0 } {
            return Err(libc::EMSGSIZE);
        }
        let s = self.state();
        let error = self.take_error();
        if error != 0 {
            return Err(error);
        }
        if s & state::TX_END != 0 || self.flags() & gflag::SHUT_WR != 0 {
            return Err(libc::EPIPE);
        }
        if address.is_empty() && s & state::CONNECTED == 0 {
            return Err(libc::EDESTADDRREQ);
        }
        let mut header = encode_address(address, len as u32, self.flags() & gflag::V6 != 0)?;
        if header.address_len != 0 && header.address[0] >> 16 == 0 {
            return Err(libc::EINVAL);
        }
        if header.address_len == 16 && header.address[1] == u32::MAX && self.flags() & gflag::BROADCAST == 0 {
            return Err(libc::EACCES);
        }
        let control = if control.is_empty() { Vec::new() } else { self.outgoing_control(control)? };
        header.set_control_len(control.len() as u32);
        let record = header.record();
        if e.tx_size.load(Ordering::Acquire) == 0 {
            self.job(Op::SendRing, 0, &[], 0, &mut [])?;
        }
        let timeout = e.snd_timeout_us.load(Ordering::Relaxed);
        loop {
            {
                let _lock = RegionLock::take(&e.tx_lock)?;
                let head = e.tx_head.load(Ordering::Acquire);
                let tail = e.tx_tail.load(Ordering::Relaxed);
                if head == tail {
                    e.tx_base.store(tail, Ordering::Relaxed);
                }
                let ring = self.tx_ring().ok_or(libc::ENOBUFS)?;
                if record > ring.size() {
                    return Err(libc::ENOBUFS);
                }
                if ring.size() - tail.wrapping_sub(head).min(ring.size()) >= record {
                    // SAFETY: DatagramHeader is plain words without padding.
                    let header_bytes =
                        unsafe { core::slice::from_raw_parts((&raw const header).cast::<u8>(), 32) };
                    ring.runs(tail, 32, |p, at, n| {
                        // SAFETY: p has n bytes of the ring, header_bytes n more from `at`.
                        unsafe { core::ptr::copy_nonoverlapping(header_bytes.as_ptr().add(at), p, n) }
                    });
                    ring.runs(tail.wrapping_add(32), len as u32, |p, at, n| {
                        let mut to = p;
                        walk(buffers, at, n, |from, n| {
                            // SAFETY: as for streams.
                            unsafe {
                                core::ptr::copy_nonoverlapping(from, to, n);
                                to = to.add(n);
                            }
                        });
                    });
                    if !control.is_empty() {
                        let at = tail.wrapping_add(datagram_record(len as u32));
                        ring.runs(at, control.len() as u32, |p, at, n| {
                            // SAFETY: p has n bytes of the ring, control n more from `at`.
                            unsafe { core::ptr::copy_nonoverlapping(control.as_ptr().add(at), p, n) }
                        });
                    }
                    e.tx_tail.store(tail.wrapping_add(record), Ordering::Release);
                    break;
                }
            }
            if !announce {
                self.announce_send(0);
            }
            if self.nonblock(flags) {
                e.tx_wanted.store(1, Ordering::SeqCst);
                return Err(libc::EAGAIN);
            }
            self.wait_for(timeout, || {
                e.tx_wanted.store(1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                self.tx_free() >= record || guest::engine_gone()
            })?;
        }
        if announce {
            self.announce_send(0);
        }
        if header.address_len & 0xff == 16 && self.flags() & gflag::BROADCAST == 0 {
            self.check_broadcast(header.address[1])?;
        }
        Ok(len)
    }

    /// Only the stack knows which addresses are a subnet's broadcast address, which needs SO_BROADCAST. The first datagram
    /// to an address that could be one (a subnet has at least four addresses) waits for what the stack says.
    fn check_broadcast(&self, address: u32) -> Result<()> {
        static KNOWN: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
        let host = u32::from_be(address);
        if host & 3 != 3 {
            return Ok(());
        }
        let known = &KNOWN[(host >> 2) as usize % KNOWN.len()];
        if known.load(Ordering::Relaxed) == address {
            return Ok(());
        }
        let mut name = [0u8; 28];
        self.job(Op::LocalName, 0, &[], 28, &mut name)?;
        let denied = libc::EACCES as u32;
        if self.entry.error.compare_exchange(denied, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return Err(libc::EACCES);
        }
        if self.tx_used() == 0 {
            known.store(address, Ordering::Relaxed);
        }
        Ok(())
    }

    /// `recvmsg(MSG_ERRQUEUE)`, which never waits.
    #[cold]
    fn receive_error(&self, buffers: Buffers, told: &mut Told) -> Result<(usize, i32)> {
        let mut record = [0u8; netkernel_abi::layout::ARGUMENT_BYTES];
        let size = self.job(Op::ErrorQueue, 0, &[], record.len() as u32, &mut record)?.size;
        let word = |i: usize| {
            u32::from_le_bytes([record[4 * i], record[4 * i + 1], record[4 * i + 2], record[4 * i + 3]])
        };
        let header = DatagramHeader {
            len: word(0),
            address_len: word(1),
            address: core::array::from_fn(|i| word(2 + i)),
        };
        let len = header.len as usize;
        let control = header.control_len() as usize;
        if len > record.len() || header.record() as usize > size.min(record.len()) {
            return Err(libc::EIO);
        }
        told.from = decode_address(&header);
        told.control = record[datagram_record(header.len) as usize..][..control].to_vec();
        // Linux forgets the pending error that came with it.
        self.entry.error.store(0, Ordering::Release);
        let n = len.min(total(buffers));
        let mut from = record[32..].as_ptr();
        walk(buffers, 0, n, |to, n| {
            // SAFETY: the record has len >= n bytes from 32 on, `to` n bytes of the program's buffer.
            unsafe {
                core::ptr::copy_nonoverlapping(from, to, n);
                from = from.add(n);
            }
        });
        Ok((n, libc::MSG_ERRQUEUE | if n < len { libc::MSG_TRUNC } else { 0 }))
    }

    /// Checks control messages as Linux does, and drops those that it does not look at.
    fn outgoing_control(&self, control: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for message in ancillary::messages(control) {
            let message = message.map_err(|ancillary::Malformed| libc::EINVAL)?;
            match message.fate(self.flags() & gflag::V6 != 0) {
                Fate::Refuse(errno) => return Err(errno),
                Fate::Ignore => {}
                Fate::Pass => {
                    out.extend_from_slice(
                        &(ancillary::HEADER as u64 + message.data.len() as u64).to_ne_bytes(),
                    );
                    out.extend_from_slice(&message.level.to_ne_bytes());
                    out.extend_from_slice(&message.kind.to_ne_bytes());
                    out.extend_from_slice(message.data);
                    out.resize(out.len().next_multiple_of(8), 0);
                }
            }
        }
        if out.len() > MAX_CONTROL as usize { Err(libc::ENOBUFS) } else { Ok(out) }
    }

    fn datagram_receive(&self, buffers: Buffers, flags: i32, told: &mut Told) -> Result<(usize, i32)> {
        let e = self.entry;
        let timeout = e.rcv_timeout_us.load(Ordering::Relaxed);
        loop {
            if let Some(got) = self.take_datagram(buffers, flags, told)? {
                return Ok(got);
            }
            let error = self.take_error();
            if error != 0 {
                return Err(error);
            }
            if self.state() & state::RX_END != 0 || self.flags() & gflag::SHUT_RD != 0 {
                return Ok((0, 0));
            }
            if self.nonblock(flags) {
                return Err(libc::EAGAIN);
            }
            self.wait_for(timeout, || {
                self.rx_used() > 0
                    || e.error.load(Ordering::Relaxed) != 0
                    || self.state() & state::RX_END != 0
                    || self.flags() & gflag::SHUT_RD != 0
            })?;
        }
    }

    fn take_datagram(&self, buffers: Buffers, flags: i32, told: &mut Told) -> Result<Option<(usize, i32)>> {
        let e = self.entry;
        let _lock = RegionLock::take(&e.rx_lock)?;
        let head = e.rx_head.load(Ordering::Relaxed);
        let used = e.rx_tail.load(Ordering::Acquire).wrapping_sub(head);
        if !(32..=1 << 30).contains(&used) {
            return Ok(None);
        }
        let Some(ring) = self.rx_ring() else { return Ok(None) };
        let header = read_header(&ring, head);
        let len = header.len.min(used - 32);
        let room = total(buffers);
        let n = (len as usize).min(room);
        ring.runs(head.wrapping_add(32), n as u32, |p, at, n| {
            let mut source = p;
            walk(buffers, at, n, |to, n| {
                // SAFETY: as for streams.
                unsafe {
                    core::ptr::copy_nonoverlapping(source, to, n);
                    source = source.add(n);
                }
            });
        });
        told.from = decode_address(&header);
        // What the engine wrote is what it says; a wrong length must still not leave the ring.
        let rest = used.saturating_sub(datagram_record(len));
        let control = header.control_len().min(MAX_CONTROL).min(rest);
        if control != 0 {
            told.control.resize(control as usize, 0);
            ring.runs(head.wrapping_add(datagram_record(len)), control, |p, at, n| {
                // SAFETY: p has n bytes of the ring, the vector n more from `at`.
                unsafe { core::ptr::copy_nonoverlapping(p, told.control.as_mut_ptr().add(at), n) }
            });
        }
        if flags & libc::MSG_PEEK == 0 {
            let head = head.wrapping_add(datagram_record(len)).wrapping_add(control);
            e.rx_head.store(head, Ordering::SeqCst);
            self.credit(head, ring.size());
        }
        let truncated = len as usize > room;
        let result = if truncated && flags & libc::MSG_TRUNC != 0 { len as usize } else { n };
        Ok(Some((result, if truncated { libc::MSG_TRUNC } else { 0 })))
    }

    /// Bytes of the next datagram, for FIONREAD.
    pub fn next_datagram(&self) -> i32 {
        let Ok(_lock) = RegionLock::take(&self.entry.rx_lock) else { return 0 };
        if self.rx_used() < 32 {
            return 0;
        }
        let Some(ring) = self.rx_ring() else { return 0 };
        read_header(&ring, self.entry.rx_head.load(Ordering::Relaxed)).len as i32
    }

    /// `ioctl(SIOCATMARK)`.
    pub fn at_mark(&self) -> bool {
        if let Some(pair) = self.pair() {
            return self.pair_at_mark(&pair);
        }
        if self.state() & (state::OOB | state::OOB_MARK) == state::OOB {
            // The engine has the byte and goes on to its mark: what was begun before the answer is done then.
            let _ = self.ioctl_job(SIOCATMARK);
        }
        self.state() & state::OOB_MARK != 0
            && self.entry.oob_position.load(Ordering::Relaxed) == self.entry.rx_head.load(Ordering::Relaxed)
    }

    /// Waits until the engine has seen everything that happened before, hang-ups included.
    pub fn fence(guest: &Guest, id: u32) {
        let _ = queue::job(guest, Op::Fence, id, 0, &[], 0, &mut []);
    }

    pub fn ioctl_job(&self, request: u64) -> Result<i32> {
        self.job(Op::Ioctl, request, &[], 0, &mut []).map(|done| done.op_data as i32)
    }

    pub fn option_job(&self, op: Op, data: u64, argument: &[u8], size: u32, out: &mut [u8]) -> Result<usize> {
        self.job(op, data, argument, size, out).map(|done| done.size)
    }
}

fn read_header(ring: &Bytes<'_>, position: u32) -> DatagramHeader {
    let mut header = DatagramHeader::default();
    ring.runs(position, 32, |p, at, n| {
        // SAFETY: DatagramHeader is 32 bytes of plain words; at + n <= 32.
        unsafe { core::ptr::copy_nonoverlapping(p, (&raw mut header).cast::<u8>().add(at), n) }
    });
    header
}

/// A sockaddr as the words of a datagram header. EAFNOSUPPORT and EINVAL as Linux gives them.
fn encode_address(address: &[u8], len: u32, v6: bool) -> Result<DatagramHeader> {
    let mut header = DatagramHeader { len, ..DatagramHeader::default() };
    if address.is_empty() {
        return Ok(header);
    }
    if address.len() < 16 {
        return Err(libc::EINVAL);
    }
    let family = u16::from_ne_bytes([address[0], address[1]]) as i32;
    let port = u16::from_ne_bytes([address[2], address[3]]) as u32;
    let word = |i: usize| u32::from_ne_bytes([address[i], address[i + 1], address[i + 2], address[i + 3]]);
    match family {
        libc::AF_INET => {
            header.address_len = 16;
            header.address = [family as u32 | port << 16, word(4), 0, 0, 0, 0];
        }
        libc::AF_INET6 if v6 => {
            if address.len() < 24 {
                return Err(libc::EINVAL);
            }
            header.address_len = 28;
            let scope = if address.len() >= 28 { word(24) } else { 0 };
            header.address = [family as u32 | port << 16, word(8), word(12), word(16), word(20), scope];
        }
        libc::AF_UNSPEC if !v6 => {
            header.address_len = 16;
            header.address = [libc::AF_INET as u32 | port << 16, word(4), 0, 0, 0, 0];
        }
        _ => return Err(libc::EAFNOSUPPORT),
    }
    Ok(header)
}

fn decode_address(header: &DatagramHeader) -> Vec<u8> {
    let a = header.address;
    let mut out = Vec::with_capacity(28);
    match header.address_len & 0xff {
        16 => {
            out.extend_from_slice(&a[0].to_ne_bytes());
            out.extend_from_slice(&a[1].to_ne_bytes());
            out.extend_from_slice(&[0; 8]);
        }
        28 => {
            out.extend_from_slice(&a[0].to_ne_bytes());
            out.extend_from_slice(&[0; 4]);
            for word in &a[1..5] {
                out.extend_from_slice(&word.to_ne_bytes());
            }
            out.extend_from_slice(&a[5].to_ne_bytes());
        }
        _ => {}
    }
    out
}
