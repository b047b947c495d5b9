//! Large writes to a pair, with one copy: the writer *offers* its program's own buffer, and the reader, if it is there at once, copies
//! from it straight into its program's buffer (`process_vm_readv(2)`, as MPI libraries do on one host).
//!
//! An offer is a hint, never a promise. Who reads copies first and takes the bytes afterwards, by one compare-and-exchange of the word
//! that says how much is left; who writes takes the offer back by setting a bit of that word when nobody comes within some
//! microseconds, and puts what is left into the ring. Exactly one of the two has each byte, neither waits for the other, and either
//! may be killed or stopped at any instruction. Offers are made only while the ring is empty, so that the order is that of the writes.
//!
//! The writer's process is known by a number that stands on the writing thread's stack for the time of the offer and is read in the
//! same call: in another PID namespace, or when the process is gone, another one does not have it there.

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use netkernel_abi::pair::{PairEnd, offer};

use crate::guest;
use crate::pair::Pair;
use crate::socket::{Buffers, walk};
use crate::sys::{self, raw};

/// Less is cheaper by the ring: pages are looked up one by one, and two cores copy at the same time. Measured on two cores of one
/// Sapphire Rapids with 128, 64, 32 and 16 KiB: 156, 142, 110 and 75 Gbit/s, by the ring 123 whatever the size.
const LEAST: usize = 64 << 10;
/// How long nobody may come.
const PATIENCE_NS: u64 = 15_000;
/// How long who came may take: the reader may have lost its core, and copies in vain then.
const COPYING_NS: u64 = 500_000;
/// Large writes that are not offered after one that nobody took, at most.
const LONGEST_PAUSE: u32 = 512;
/// Buffers of one read that are filled at a time.
const VECTORS: usize = 16;

/// Seccomp filters that this program has of NetKernel, where it has no others; -1: there are others, or it is not known.
static FILTERS: AtomicI32 = AtomicI32::new(-1);
/// Whether this process may read another's memory as far as its filters go: 0, not known yet; 1, yes; 2, no.
static MAY_READ: AtomicI32 = AtomicI32::new(0);

static TOLD: AtomicBool = AtomicBool::new(false);

/// Before the program runs: what `netkernel run` knows of its filters.
pub fn init() {
    let known = guest::variable(netkernel_abi::control::env::FILTERS).and_then(|n| n.parse().ok());
    FILTERS.store(known.unwrap_or(-1), Ordering::Relaxed);
}

/// Where the bytes of a write are.
pub struct Source<'a> {
    pub buffers: Buffers<'a>,
    /// What was written already.
    pub skip: usize,
}

/// What an offer came to.
pub struct Offered {
    /// Bytes that the reader has.
    pub taken: usize,
    /// It was taken back; [`ended`] when the rest stands in the ring.
    pub withdrawn: bool,
}

impl Offered {
    pub const NOTHING: Offered = Offered { taken: 0, withdrawn: false };
}

/// Offers what `buffers` have from `skip` on, as far as it is one piece. The caller holds the writers' lock. Errors: ECONNRESET, when
/// the peer took what was not there.
pub fn make(pair: &Pair, Source { buffers, skip }: Source) -> Result<Offered, i32> {
    let (mine, theirs) = (pair.mine, pair.theirs);
    let mut piece = None;
    walk(buffers, skip, usize::MAX, |at, len| _ = piece.get_or_insert((at as u64, len.min(offer::MOST))));
    let Some((at, len)) = piece.filter(|&(_, len)| len >= LEAST) else { return Ok(Offered::NOTHING) };
    if unwanted(theirs) || sys::confined() || pauses(mine) {
        return Ok(Offered::NOTHING);
    }
    if !drains(pair) {
        pause(mine, true);
        return Ok(Offered::NOTHING);
    }
    let now = sys::now_ns();
    // Never 0. That a moment stands at this address of that process is proof enough.
    let proof = AtomicU64::new(now | 1 << 63);
    let number = offer::number(mine.offer.load(Ordering::Relaxed)).wrapping_add(1);
    mine.offer_end.store(at + len as u64, Ordering::Relaxed);
    mine.offer_proof_at.store(proof.as_ptr() as u64, Ordering::Relaxed);
    mine.offer_proof.store(proof.load(Ordering::Relaxed), Ordering::Relaxed);
    mine.offer_pid.store(guest::pid(), Ordering::Relaxed);
    // SYNC: pair-offer - where it is, and the bytes in the program's buffer.
    mine.offer.store(offer::word(number, len as u32), Ordering::Release);
    let left = wait(mine, theirs, number, len as u32, now);
    // The number is nobody's any more.
    proof.store(0, Ordering::SeqCst);
    let Some(taken) = (len as u32).checked_sub(left) else { return Err(libc::ECONNRESET) };
    let taken = taken as usize;
    pause(mine, left > 0);
    mine.sent.store(mine.sent.load(Ordering::Relaxed).wrapping_add(taken as u64), Ordering::Relaxed);
    Ok(Offered { taken, withdrawn: left > 0 })
}

/// What was withdrawn stands in the ring.
pub fn ended(mine: &PairEnd) {
    let word = mine.offer.load(Ordering::Relaxed);
    mine.offer.store(offer::word(offer::number(word), 0), Ordering::Release);
}

/// Somebody sleeps (and is woken by what stands in the ring), or takes no offers.
fn unwanted(theirs: &PairEnd) -> bool {
    theirs.want_data.load(Ordering::Relaxed) != 0 || theirs.refuses.load(Ordering::Relaxed) != 0
}

/// While one end only writes and the other one only reads, the ring is never empty, and there would never be an offer. So a
/// writer whose turn it is lets a reader that is at work read all: some tens of microseconds, also of a call that does not block.
fn drains(pair: &Pair) -> bool {
    let (mut unsent, mut since) = (pair.unsent(), 0);
    while unsent > 0 {
        for _ in 0..32 {
            core::hint::spin_loop();
        }
        let (now, left) = (sys::now_ns(), pair.unsent());
        if left != unsent || since == 0 {
            (unsent, since) = (left, now);
        } else if unwanted(pair.theirs) || now - since > PATIENCE_NS {
            return false;
        }
    }
    true
}

/// After an offer, or none where there could have been one.
fn pause(mine: &PairEnd, failed: bool) {
    let before = mine.offer_pause.load(Ordering::Relaxed) >> 16;
    let pause = if failed { (2 * before).clamp(1, LONGEST_PAUSE) } else { 0 };
    mine.offer_pause.store(pause << 16 | pause, Ordering::Relaxed);
}

fn pauses(mine: &PairEnd) -> bool {
    let pause = mine.offer_pause.load(Ordering::Relaxed);
    if pause & 0xffff == 0 {
        return false;
    }
    mine.offer_pause.store(pause - 1, Ordering::Relaxed);
    true
}

/// Until all is taken, or nobody comes: then it is withdrawn. What is left.
fn wait(mine: &PairEnd, theirs: &PairEnd, number: u32, len: u32, mut since: u64) -> u32 {
    let mut left = len;
    loop {
        for _ in 0..32 {
            let now = offer::left(mine.offer.load(Ordering::Acquire));
            if now == 0 {
                return 0;
            }
            if now != left {
                (left, since) = (now, sys::now_ns());
            }
            core::hint::spin_loop();
        }
        let copying = theirs.copying.load(Ordering::Relaxed) == number;
        let patience = if copying { COPYING_NS } else { PATIENCE_NS };
        if unwanted(theirs) || sys::now_ns() - since > patience {
            return offer::left(mine.offer.fetch_or(offer::WITHDRAWN, Ordering::AcqRel));
        }
    }
}

/// Bytes that the peer offers, by its word.
#[inline]
pub fn open(pair: &Pair) -> u32 {
    match offer::open(pair.theirs.offer.load(Ordering::Acquire)) {
        0 => 0,
        _ if pair.mine.refuses.load(Ordering::Relaxed) != 0 => 0,
        open => open,
    }
}

/// The peer is putting into the ring what it had offered.
#[inline]
pub fn comes(pair: &Pair) -> bool {
    let word = pair.theirs.offer.load(Ordering::Acquire);
    word & offer::WITHDRAWN != 0 && offer::left(word) > 0
}

/// Takes of an offer what the program's buffers have room for; without `take` it stays. `over`: the connection is, and
/// so may be the writer's process. The caller holds the readers' lock, and the ring is
/// empty. 0: there is nothing to be had in this way.
pub fn take(pair: &Pair, sink: Option<(Buffers, usize)>, len: usize, take: bool, over: bool) -> usize {
    let (mine, theirs) = (pair.mine, pair.theirs);
    // SYNC: pair-offer
    let word = theirs.offer.load(Ordering::Acquire);
    let n = (offer::open(word) as usize).min(len);
    if n == 0 || mine.refuses.load(Ordering::Relaxed) != 0 {
        return 0;
    }
    let number = offer::number(word);
    mine.copying.store(number, Ordering::Relaxed);
    let copied = match sink {
        Some((buffers, skip)) if may_read() => copy(pair, offer::left(word), buffers, skip, n, over),
        _ => 0,
    };
    let still = if take {
        let rest = offer::word(number, offer::left(word) - copied as u32);
        theirs.offer.compare_exchange(word, rest, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    } else {
        theirs.offer.load(Ordering::Acquire) == word
    };
    if still && copied == 0 {
        refuse(pair);
    }
    mine.copying.store(0, Ordering::Relaxed);
    if !still {
        return 0;
    }
    if copied > 0 && !TOLD.swap(true, Ordering::Relaxed) {
        guest::trace(1, "large writes of its peers are copied from their memory (single_copy)");
    }
    copied
}

/// From now on all comes by the ring.
pub fn refuse(pair: &Pair) {
    pair.mine.refuses.store(1, Ordering::SeqCst);
}

/// Copies from the writer's memory. 0: it cannot be read, or is another process's. Who proved itself once need not do so again as long as
/// its connection lives: a second look at its memory takes as long as 8 KiB.
fn copy(pair: &Pair, left: u32, buffers: Buffers, skip: usize, len: usize, over: bool) -> usize {
    let theirs = pair.theirs;
    let mut found = 0u64;
    let proof = libc::iovec { iov_base: (&raw mut found).cast(), iov_len: size_of::<u64>() };
    let mut local = [proof; 1 + VECTORS];
    let (mut vectors, mut room) = (1, 0);
    walk(buffers, skip, len, |at, n| {
        if let Some(vector) = local.get_mut(vectors) {
            *vector = libc::iovec { iov_base: at.cast(), iov_len: n };
            vectors += 1;
            room += n;
        }
    });
    let remote = |at: u64, len: usize| libc::iovec { iov_base: at as *mut libc::c_void, iov_len: len };
    let at = theirs.offer_end.load(Ordering::Relaxed).wrapping_sub(left as u64);
    let from = [remote(theirs.offer_proof_at.load(Ordering::Relaxed), proof.iov_len), remote(at, room)];
    let pid = theirs.offer_pid.load(Ordering::Relaxed);
    let (proved, writer) = (guest::proved(pair.number), (pair.number as u64) << 32 | pid as u64);
    let known = !over && proved.is_some_and(|proved| proved.load(Ordering::Relaxed) == writer);
    // Without the proof, what is read of both sides begins behind it.
    let skipped = usize::from(known);
    let (local, from) = (&mut local[skipped..vectors], &from[skipped..]);
    let got =
        raw!(libc::SYS_process_vm_readv, pid, local.as_mut_ptr(), local.len(), from.as_ptr(), from.len(), 0);
    let Ok(got) = usize::try_from(got) else { return 0 };
    if known {
        return got.min(room);
    }
    // What did not prove itself may stand in the program's buffer, behind what it is told of.
    if got <= proof.iov_len || found == 0 || found != theirs.offer_proof.load(Ordering::Relaxed) {
        return 0;
    }
    proved.into_iter().for_each(|proved| proved.store(writer, Ordering::Relaxed));
    (got - proof.iov_len).min(room)
}

/// Sandboxes of others may end a process for this call.
fn may_read() -> bool {
    if sys::confined() {
        return false;
    }
    match MAY_READ.load(Ordering::Relaxed) {
        0 => {
            let filters = FILTERS.load(Ordering::Relaxed);
            let may = filters >= 0 && filters_now() == Some(filters);
            MAY_READ.store(if may { 1 } else { 2 }, Ordering::Relaxed);
            may
        }
        may => may == 1,
    }
}

/// Seccomp filters of this thread; `None` before Linux 5.9, or without /proc.
fn filters_now() -> Option<i32> {
    let fd = raw!(
        libc::SYS_openat,
        libc::AT_FDCWD,
        c"/proc/thread-self/status".as_ptr(),
        libc::O_RDONLY | libc::O_CLOEXEC,
        0
    );
    if fd < 0 {
        return None;
    }
    let mut text = [0u8; 4096];
    let n = raw!(libc::SYS_read, fd, text.as_mut_ptr(), text.len());
    sys::close(fd as i32);
    let text = core::str::from_utf8(text.get(..usize::try_from(n).ok()?)?).ok()?;
    let count = text.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?;
    count.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use netkernel_shm::{PairMemory, PairView};
    use std::thread;
    use std::time::{Duration, Instant};

    const WATCHDOG: Duration = Duration::from_secs(60);

    /// Writer's and reader's end of a new connection.
    fn ends() -> (Pair, Pair) {
        MAY_READ.store(1, Ordering::Relaxed);
        let memory: &'static PairMemory = Box::leak(Box::new(PairMemory::create().unwrap()));
        let view: PairView<'static> = memory.view();
        (Pair::of_view(view, 3, 0), Pair::of_view(view, 3, 1))
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    fn vector(of: &mut [u8]) -> [libc::iovec; 1] {
        [libc::iovec { iov_base: of.as_mut_ptr().cast(), iov_len: of.len() }]
    }

    fn read(pair: &Pair, into: &mut [u8], taking: bool) -> usize {
        take(pair, Some((&vector(into), 0)), into.len(), taking, false)
    }

    /// One write that is offered whatever came before, beside `reader`; what it came to.
    fn offered(writer: Pair, data: &mut [u8], reader: impl FnOnce() + Send) -> Offered {
        writer.mine.offer_pause.store(0, Ordering::Relaxed);
        thread::scope(|scope| {
            let reader = scope.spawn(reader);
            let buffers = vector(data);
            let made = make(&writer, Source { buffers: &buffers, skip: 0 }).unwrap();
            reader.join().unwrap();
            made
        })
    }

    /// Tries until the reader met the writer in time, as a busy machine may not let it.
    fn until_met(mut attempt: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !attempt() {
            assert!(begin.elapsed() < WATCHDOG, "reader and writer never met");
        }
    }

    #[test]
    fn what_is_offered_is_taken_whole_in_pieces_and_peeked_at() {
        let (writer, reader) = ends();
        let mut data = bytes(200_000);
        for piece in [200_000, 70_000, 1_000] {
            until_met(|| {
                let mut got = Vec::new();
                let expected = data.clone();
                let made = offered(writer, &mut data, || {
                    let (mut part, begin) = (vec![0; piece], Instant::now());
                    let mut peeked = None;
                    while got.len() < expected.len() && !comes(&reader) && begin.elapsed() < WATCHDOG {
                        if peeked.is_none() {
                            let n = read(&reader, &mut part, false);
                            peeked = (n > 0).then(|| (got.len(), part[..n].to_vec()));
                        }
                        let n = read(&reader, &mut part, true);
                        got.extend_from_slice(&part[..n]);
                    }
                    if let Some((at, peeked)) = peeked {
                        assert!(expected[at..].starts_with(&peeked), "peeking found what comes later");
                    }
                });
                assert_eq!(got.len(), made.taken, "a byte was lost or doubled");
                assert!(got == data[..got.len()]);
                ended(writer.mine);
                made.taken == data.len()
            });
            assert_eq!(writer.mine.offer_pause.load(Ordering::Relaxed), 0, "who is met offers again at once");
        }
        assert_eq!(reader.mine.refuses.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn nobody_comes_and_the_next_ones_are_not_offered() {
        let (writer, reader) = ends();
        let mut data = bytes(LEAST);
        let made = offered(writer, &mut data, || ());
        assert!(made.taken == 0 && made.withdrawn);
        let mut into = [0; 16];
        assert!(comes(&reader) && open(&reader) == 0 && read(&reader, &mut into, true) == 0);
        ended(writer.mine);
        assert!(!comes(&reader), "it stands in the ring");
        let buffers = vector(&mut data);
        for again in [true, false, true, true, false] {
            let made = make(&writer, Source { buffers: &buffers, skip: 0 }).unwrap();
            assert_eq!(made.withdrawn, !again, "after 1, 2, 4, .. writes there is another try");
        }
    }

    #[test]
    fn small_writes_sleepers_and_refusals_have_no_offers() {
        let (writer, reader) = ends();
        let mut data = bytes(LEAST);
        let buffers = vector(&mut data);
        let withdrawn = |skip| make(&writer, Source { buffers: &buffers, skip }).unwrap().withdrawn;
        assert!(!withdrawn(1), "less than is worth it");
        reader.mine.want_data.store(1, Ordering::Relaxed);
        assert!(!withdrawn(0), "a sleeper is to be woken");
        reader.mine.want_data.store(0, Ordering::Relaxed);
        refuse(&reader);
        assert!(!withdrawn(0));
        assert_eq!(writer.mine.offer.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn another_process_and_another_place_are_not_taken_for_the_writer() {
        // What a hostile end may say; the reader's own memory stands for that of a third process.
        for lie in ["proof", "place", "process", "none"] {
            let (writer, reader) = ends();
            let mut data = bytes(LEAST);
            let proof = AtomicU64::new(77);
            let end = writer.mine;
            end.offer_end.store(data.as_ptr() as u64 + LEAST as u64, Ordering::Relaxed);
            end.offer_proof_at.store(proof.as_ptr() as u64, Ordering::Relaxed);
            end.offer_proof.store(77, Ordering::Relaxed);
            end.offer_pid.store(std::process::id(), Ordering::Relaxed);
            match lie {
                "proof" => end.offer_proof.store(78, Ordering::Relaxed),
                "place" => end.offer_proof_at.store(8, Ordering::Relaxed),
                "process" => end.offer_pid.store(i32::MAX as u32, Ordering::Relaxed),
                _ => {}
            }
            end.offer.store(offer::word(1, LEAST as u32), Ordering::Release);
            let mut into = vec![0; LEAST];
            let n = read(&reader, &mut into, true);
            assert_eq!(n, if lie == "none" { LEAST } else { 0 }, "{lie}");
            assert_eq!(reader.mine.refuses.load(Ordering::Relaxed), u32::from(lie != "none"), "{lie}");
            assert_eq!(open(&reader), 0, "nothing more is expected of it");
            drop(std::mem::take(&mut data));
        }
        // More is left than was offered.
        let (writer, _) = ends();
        let mut data = bytes(LEAST);
        let word = &writer.mine.offer;
        let buffers = vector(&mut data);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    word.store(u64::MAX >> 1, Ordering::Relaxed);
                }
            });
            until_met(|| {
                writer.mine.offer_pause.store(0, Ordering::Relaxed);
                matches!(make(&writer, Source { buffers: &buffers, skip: 0 }), Err(libc::ECONNRESET))
            });
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_withdrawal_and_a_read_at_the_same_moment_share_nothing() {
        let (writer, reader) = ends();
        let mut data = bytes(LEAST + 4096);
        let expected = data.clone();
        let stop = AtomicBool::new(false);
        let (mut whole, mut partly, mut none) = (0, 0, 0);
        thread::scope(|scope| {
            let taker = scope.spawn(|| {
                let (mut total, mut round) = (0u64, 0u32);
                let mut part = vec![0; LEAST];
                while !stop.load(Ordering::Relaxed) {
                    // Sizes and pauses that fit the writer's patience now and then.
                    round = round.wrapping_mul(1_103_515_245).wrapping_add(12_345);
                    (0..round >> 19).for_each(|_| core::hint::spin_loop());
                    let len = 1 + (round >> 8) as usize % LEAST;
                    let left = offer::open(reader.theirs.offer.load(Ordering::Acquire)) as usize;
                    let n = read(&reader, &mut part[..len], true);
                    if n > 0 && left > 0 {
                        // The word may have been another offer's when it was looked at; the bytes are some of the data.
                        assert!(expected.windows(n.min(64)).any(|window| window == &part[..n.min(64)]));
                    }
                    total += n as u64;
                }
                total
            });
            let buffers = vector(&mut data);
            let mut taken = 0;
            for _ in 0..2_000 {
                writer.mine.offer_pause.store(0, Ordering::Relaxed);
                let made = make(&writer, Source { buffers: &buffers, skip: 0 }).unwrap();
                taken += made.taken as u64;
                match made.taken {
                    0 => none += 1,
                    n if n == LEAST + 4096 => whole += 1,
                    _ => partly += 1,
                }
                ended(writer.mine);
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(taker.join().unwrap(), taken, "a byte has been had twice, or by nobody");
        });
        println!("{whole} whole, {partly} partly, {none} not at all");
    }
}
