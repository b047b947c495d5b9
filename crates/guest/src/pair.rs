//! Connections of a pair: their rings stand in memory that this guest and its peer's both map, and the engine is not between.
//!
//! What the peer's guest writes there is believed in no way: a position that cannot be is as a reset, an offset never leaves
//! the ring. Positions are published, then the other end's flags are looked at; who is about to sleep sets its flag, then
//! looks at the positions. The engine only wakes sleepers, by the means that it has for all sockets.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

use netkernel_abi::control::kind;
use netkernel_abi::nqe::flag;
use netkernel_abi::pair::{ENDS, PairEnd, RING_BYTES};
use netkernel_abi::socket::{gflag, state};
use netkernel_abi::{Op, SocketEntry};
use netkernel_shm::{Bytes, PairView};

use crate::guest::{Guest, Lock};
use crate::offer::{self, Source};
use crate::socket::{self, Buffers, Sock};
use crate::sys;
use crate::table::{self, Slot};
use crate::{handover, queue};

/// Bytes that are made visible at a time, so that the other end copies while this one does.
const PIECE: u32 = 32 << 10;

/// Memories that this process has mapped; places are found by number.
static MAPPED: [Mapped; 64] =
    [const { Mapped { number: AtomicU32::new(0), address: AtomicUsize::new(0) } }; 64];
static MAPPING: Lock<()> = Lock::new(());

struct Mapped {
    number: AtomicU32,
    /// Of a leaked [`PairView`].
    address: AtomicUsize,
}

impl Mapped {
    fn view(&self) -> Option<PairView<'static>> {
        let address = self.address.load(Ordering::Acquire) as *const PairView<'static>;
        // SAFETY: null, or a leaked box that is never freed.
        unsafe { address.as_ref() }.copied()
    }
}

/// One connection, from this end.
#[derive(Clone, Copy)]
pub struct Pair {
    pub mine: &'static PairEnd,
    pub theirs: &'static PairEnd,
    view: PairView<'static>,
    /// Of the memory.
    pub number: u32,
    slot: u32,
    end: usize,
}

/// The connection behind a socket in state PAIRED. Errors: ECONNRESET, when its memory is not to be had.
#[inline]
pub fn of(guest: &Guest, entry: &SocketEntry) -> Result<Pair, i32> {
    let number = entry.rx_offset.load(Ordering::Relaxed);
    let place = entry.tx_offset.load(Ordering::Relaxed);
    let view = match find(number) {
        Some(view) => view,
        None => map(guest, number)?,
    };
    let (slot, end) = (place / ENDS as u32, place as usize % ENDS);
    match (view.end(slot, end), view.end(slot, 1 - end)) {
        (Some(mine), Some(theirs)) => Ok(Pair { mine, theirs, view, number, slot, end }),
        _ => Err(libc::ECONNRESET),
    }
}

#[inline]
fn find(number: u32) -> Option<PairView<'static>> {
    let count = MAPPED.len() as u32;
    for i in 0..count {
        let place = &MAPPED[(number.wrapping_add(i) % count) as usize];
        match place.number.load(Ordering::Acquire) {
            n if n == number && n != 0 => return place.view(),
            0 => return None,
            _ => {}
        }
    }
    None
}

/// Asks the engine for a memory.
#[cold]
fn map(guest: &Guest, number: u32) -> Result<PairView<'static>, i32> {
    if sys::confined() || number == 0 {
        return Err(libc::ECONNRESET);
    }
    // A signal handler that uses such a socket must not find the lock held by who it interrupted.
    let signals = sys::block_signals();
    let result = map_locked(guest, number);
    sys::restore_signals(signals);
    result
}

fn map_locked(guest: &Guest, number: u32) -> Result<PairView<'static>, i32> {
    let _one = MAPPING.lock();
    if let Some(view) = find(number) {
        return Ok(view);
    }
    // A process at its limit is to notice nothing.
    let fd = socket::above_the_limit(|| handover::ask(guest, kind::PAIR, number, 0, 0))?;
    let count = MAPPED.len() as u32;
    let errno = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::ENOMEM);
    for i in 0..count {
        let place = &MAPPED[(number.wrapping_add(i) % count) as usize];
        if place.number.load(Ordering::Relaxed) == 0 {
            let view = PairView::map(&fd, None).map_err(errno)?;
            place.address.store(Box::into_raw(Box::new(view)) as usize, Ordering::Release);
            place.number.store(number, Ordering::Release);
            return Ok(view);
        }
        // One that no connection of this guest uses any more.
        if let Some(old) = place.view()
            && old.header().over.load(Ordering::Relaxed) != 0
        {
            place.number.store(u32::MAX, Ordering::SeqCst);
            let view = PairView::map(&fd, Some(old)).map_err(errno)?;
            place.number.store(number, Ordering::Release);
            return Ok(view);
        }
    }
    Err(libc::ENOBUFS)
}

/// Maps what the process's connections stand in, while it still may.
pub fn before_confinement(guest: &Guest) {
    table::for_each(0, i32::MAX, |_, slot| {
        if let Slot::Socket(id) = slot
            && let Some(entry) = guest.region.socket(id)
            && entry.state.load(Ordering::Acquire) & state::PAIRED != 0
        {
            let _ = of(guest, entry);
        }
    });
}

#[cfg(test)]
impl Pair {
    /// One end of a connection of a memory that lives as long as the process.
    pub fn of_view(view: PairView<'static>, slot: u32, end: usize) -> Pair {
        let [mine, theirs] = [end, 1 - end].map(|end| view.end(slot, end).unwrap());
        Pair { mine, theirs, view, number: 0, slot, end }
    }
}

impl Pair {
    /// The ring that this end writes; `None` never is.
    fn out_ring(&self) -> Option<Bytes<'static>> {
        self.view.ring(self.slot, self.end, self.mine.base.load(Ordering::Relaxed))
    }

    fn in_ring(&self) -> Option<Bytes<'static>> {
        self.view.ring(self.slot, 1 - self.end, self.theirs.base.load(Ordering::Relaxed))
    }

    /// Bytes to read, by the peer's word; 0 when that cannot be.
    #[inline]
    pub fn waiting(&self) -> u32 {
        let head = self.mine.head.load(Ordering::Relaxed);
        let used = self.theirs.tail.load(Ordering::Acquire).wrapping_sub(head);
        if used > RING_BYTES { 0 } else { used }
    }

    /// Bytes that the peer has not read.
    #[inline]
    pub fn unsent(&self) -> u32 {
        let tail = self.mine.tail.load(Ordering::Relaxed);
        tail.wrapping_sub(self.theirs.head.load(Ordering::Acquire)).min(RING_BYTES)
    }

    #[inline]
    pub fn room(&self) -> u32 {
        RING_BYTES - self.unsent()
    }

    /// Enough room to call it writable.
    #[inline]
    pub fn writable(&self) -> bool {
        self.room() >= RING_BYTES / 4
    }

    /// Before somebody sleeps until there is something to read; what is there is to be looked at once more afterwards.
    pub fn want_data(&self, each: bool) {
        let wanted = if each { 2 } else { 1 };
        if self.mine.want_data.load(Ordering::Relaxed) < wanted {
            self.mine.want_data.store(wanted, Ordering::SeqCst);
        }
    }

    /// As above, for room.
    pub fn want_space(&self) {
        self.mine.want_space.store(1, Ordering::SeqCst);
    }
}

/// What became of one urgent byte.
#[derive(Clone, Copy)]
pub struct Mark {
    pub position: u32,
    pub byte: u8,
    /// Which one it is, from 1 on.
    pub number: u32,
}

const NUMBER_SHIFT: u32 = 40;
/// Of [`SocketEntry::oob`]: numbers stand from here on.
const SEEN_SHIFT: u32 = 16;

impl Pair {
    /// The last urgent byte of the peer.
    #[inline]
    pub fn mark(&self) -> Option<Mark> {
        let word = self.theirs.urgent.load(Ordering::Acquire);
        let number = (word >> NUMBER_SHIFT) as u32 & 0xffff;
        (number != 0).then_some(Mark { position: word as u32, byte: (word >> 32) as u8, number })
    }
}

impl Sock {
    /// The connection, if it is one of a pair and its memory is there.
    #[inline]
    pub fn pair(&self) -> Option<Pair> {
        if self.state() & state::PAIRED == 0 {
            return None;
        }
        of(self.guest, self.entry).ok()
    }

    fn inline(&self) -> bool {
        self.flags() & gflag::OOB_INLINE != 0
    }

    /// Takes note of an urgent byte that came.
    pub fn note_mark(&self, pair: &Pair) -> Option<Mark> {
        let mark = pair.mark()?;
        let seen = self.entry.oob.load(Ordering::Acquire);
        if seen >> SEEN_SHIFT != mark.number {
            let new = 0x100 | mark.byte as u32 | mark.number << SEEN_SHIFT;
            let _ = self.entry.oob.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Relaxed);
        }
        Some(mark)
    }

    /// Bytes that a read would find.
    #[inline]
    pub fn pair_unread(&self, pair: &Pair) -> u32 {
        let waiting = pair.waiting();
        if waiting == 0 {
            return offer::open(pair);
        }
        if pair.theirs.urgent.load(Ordering::Relaxed) == 0 {
            return waiting;
        }
        match self.note_mark(pair) {
            // The urgent byte is not in the stream.
            Some(mark) if !self.inline() => {
                let ahead = mark.position.wrapping_sub(pair.mine.head.load(Ordering::Relaxed));
                waiting - u32::from(ahead < waiting)
            }
            _ => waiting,
        }
    }

    /// Tells the other end's guest, if it asked for that.
    #[inline]
    fn tell(&self, flags: &AtomicU32, urgent: bool) {
        let wanted = match flags.load(Ordering::Relaxed) {
            0 => false,
            1 => flags.swap(0, Ordering::SeqCst) == 1,
            _ => true,
        };
        if wanted || urgent {
            queue::send(self.guest, Op::Peer, self.id, if urgent { flag::URGENT } else { 0 }, 0);
        }
    }

    /// Puts what fits into the ring; the caller holds the writers' lock. Says how much, and whether the source ran dry. `source`:
    /// where `fill` copies from, if that is the program's own memory.
    pub fn pair_put(
        &self,
        pair: &Pair,
        len: usize,
        urgent: bool,
        source: Option<Source>,
        mut fill: impl FnMut(*mut u8, usize, usize) -> Result<usize, i32>,
    ) -> Result<(usize, bool), i32> {
        let mine = pair.mine;
        let offered = match source {
            Some(source) if !urgent && self.guest.single_copy => offer::make(pair, source)?,
            _ => offer::Offered::NOTHING,
        };
        let begin = offered.taken;
        if begin == len {
            return Ok((len, false));
        }
        let mut tail = mine.tail.load(Ordering::Relaxed);
        // SYNC: pair-head - the peer has read the bytes before it.
        let used = tail.wrapping_sub(pair.theirs.head.load(Ordering::Acquire));
        if used > RING_BYTES {
            return Err(libc::ECONNRESET);
        }
        if used == 0 {
            mine.base.store(tail, Ordering::Relaxed);
        }
        let Some(ring) = pair.out_ring() else { return Err(libc::ECONNRESET) };
        let n = ((RING_BYTES - used) as usize).min(len - begin);
        let (mut put, mut short, mut failed) = (0, false, None);
        while put < n && !short && failed.is_none() {
            let piece = (n - put).min(PIECE as usize);
            let mut got = 0;
            ring.runs(tail, piece as u32, |p, at, run| {
                if failed.is_some() || short {
                    return;
                }
                match fill(p, begin + put + at, run) {
                    Ok(filled) => {
                        got += filled.min(run);
                        short = filled < run;
                    }
                    Err(errno) => failed = Some(errno),
                }
            });
            if got == 0 {
                break;
            }
            put += got;
            tail = tail.wrapping_add(got as u32);
            if urgent && put == len {
                let mut byte = [0];
                ring.copy_out(tail.wrapping_sub(1), &mut byte);
                let number = (mine.urgent.load(Ordering::Relaxed) >> NUMBER_SHIFT) as u16;
                let number = number.wrapping_add(1).max(1) as u64;
                let position = tail.wrapping_sub(1) as u64;
                mine.urgent
                    .store(position | (byte[0] as u64) << 32 | number << NUMBER_SHIFT, Ordering::Release);
            }
            // SYNC: pair-tail - the bytes, the base and the urgent mark are visible with it.
            mine.tail.store(tail, Ordering::Release);
        }
        if offered.withdrawn {
            offer::ended(mine);
        }
        if put > 0 {
            mine.sent.store(mine.sent.load(Ordering::Relaxed).wrapping_add(put as u64), Ordering::Relaxed);
            // SYNC: pair-sleep - a sleeper that set its flag before it could see this tail is seen here. The same for an
            // engine that says in our state that nobody reads any more.
            fence(Ordering::SeqCst);
            let closed = self.state() & state::PEER_CLOSED != 0;
            if closed {
                queue::send(self.guest, Op::Peer, self.id, 0, 0);
            } else {
                self.tell(&pair.theirs.want_data, urgent && put == len);
            }
            return Ok((begin + put, short));
        }
        match failed {
            Some(errno) if begin == 0 => Err(errno),
            _ => Ok((begin, short)),
        }
    }

    /// Takes bytes of the ring; the caller holds the readers' lock. `sink`: the program's
    /// buffers and where in them to begin, if that is where `drain` copies to.
    pub fn pair_take(
        &self,
        pair: &Pair,
        len: usize,
        peek: bool,
        sink: Option<(Buffers, usize)>,
        mut drain: impl FnMut(*mut u8, usize, usize) -> Result<usize, i32>,
    ) -> Result<usize, i32> {
        let mine = pair.mine;
        let mut head = mine.head.load(Ordering::Relaxed);
        // SYNC: pair-tail
        let mut used = pair.theirs.tail.load(Ordering::Acquire).wrapping_sub(head);
        if used == 0 {
            let sink = sink.filter(|_| self.guest.single_copy);
            let over = self.state() & (state::RX_END | state::DEAD) != 0;
            return Ok(offer::take(pair, sink, len, !peek, over));
        }
        if used > RING_BYTES {
            return Err(libc::ECONNRESET);
        }
        let mut most = used;
        if let Some(mark) = self.note_mark(pair) {
            let mut ahead = mark.position.wrapping_sub(head);
            if ahead == 0 && !self.inline() {
                // The urgent byte is not in the stream.
                head = head.wrapping_add(1);
                used -= 1;
                most = used;
                ahead = u32::MAX;
                if !peek {
                    mine.head.store(head, Ordering::SeqCst);
                }
            }
            // A read stops at the mark, as tcp_recvmsg does.
            if ahead > 0 && ahead < most {
                most = ahead;
            }
        }
        let Some(ring) = pair.in_ring() else { return Err(libc::ECONNRESET) };
        let n = (most as usize).min(len);
        let (mut taken, mut stop, mut failed) = (0, false, None);
        while taken < n && !stop {
            let piece = (n - taken).min(PIECE as usize);
            let mut got = 0;
            ring.runs(head.wrapping_add(taken as u32), piece as u32, |p, at, run| {
                if stop {
                    return;
                }
                match drain(p, taken + at, run) {
                    Ok(drained) => {
                        got += drained.min(run);
                        stop = drained < run;
                    }
                    Err(errno) => {
                        failed = Some(errno);
                        stop = true;
                    }
                }
            });
            taken += got;
            if !peek && got > 0 {
                // SYNC: pair-head
                mine.head.store(head.wrapping_add(taken as u32), Ordering::Release);
            }
        }
        if !peek && taken > 0 && used - taken as u32 <= RING_BYTES / 2 {
            // SYNC: pair-sleep
            fence(Ordering::SeqCst);
            self.tell(&pair.theirs.want_space, false);
        }
        match failed {
            Some(errno) if taken == 0 => Err(errno),
            _ => Ok(taken),
        }
    }

    /// `ioctl(SIOCATMARK)` of a pair.
    pub fn pair_at_mark(&self, pair: &Pair) -> bool {
        let head = pair.mine.head.load(Ordering::Relaxed);
        self.note_mark(pair).is_some_and(|mark| mark.position == head)
    }
}
