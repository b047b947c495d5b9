//! What a guest may use: rates as token buckets, counts as quotas. Shared by all guests of a tenant, on all switch threads and in the processes of NSMs.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use netkernel_shm::{WordRef, Words};

use crate::shared::Term;

/// No limit.
pub const UNLIMITED: u64 = u64::MAX;
/// Times in a bucket are in this part of a nanosecond, so that single bytes at high rates count, and 64 bits last for nine years of uptime.
const FINE: u128 = 64;
const SECOND: u128 = 1_000_000_000 * FINE;
/// What a bucket holds: the time for which it lets pass at once what came together. A switch thread that sleeps is woken to
/// the millisecond, and must find what it missed.
const DEPTH_NS: u64 = 10_000_000;
/// At least this many bytes, or operations, pass at once, also at low rates.
const LEAST_DEPTH: u64 = 16 * 1024;
const LEAST_OPERATIONS: u64 = 256;
/// It is not worth a system call to move less, when more waits.
const LEAST_MOVE: u64 = 4 * 1024;

/// Nobody takes as much more than there is, all threads together. A larger debt is none: it stands in memory that others write, who
/// may have written anything.
const MOST_DEBT: u64 = 64 << 20;

/// A token bucket, kept as the time at which it is full again (GCRA, ATM Forum TM 4.0, 4.4.2): one word, so that threads, and
/// processes, share it without a lock. Units are bytes or operations.
#[derive(Debug)]
pub struct Bucket {
    /// Units per second.
    rate: Term,
    /// In 1/64 ns of the clock that callers pass.
    full_at: WordRef,
    used: WordRef,
    /// Somebody had to wait since the last look.
    wanting: WordRef,
    /// A turn of a switch thread ended before it was done, since the last look.
    behind: WordRef,
    /// Units that pass at once at least, also at low rates.
    least_depth: u64,
}

impl Bucket {
    pub fn new(rate: u64) -> Bucket {
        let words = Words::private(4);
        Bucket::of(Term::private(rate), std::array::from_fn(|i| words.at(i)), false)
    }

    /// Without a limit so far. A batch of operations passes at once, and not more of them than of bytes.
    pub fn of_operations() -> Bucket {
        Bucket { least_depth: LEAST_OPERATIONS, ..Bucket::new(UNLIMITED) }
    }

    pub(crate) fn of(rate: Term, words: [WordRef; 4], operations: bool) -> Bucket {
        let [full_at, used, wanting, behind] = words;
        let least_depth = if operations { LEAST_OPERATIONS } else { LEAST_DEPTH };
        Bucket { rate, full_at, used, wanting, behind, least_depth }
    }

    #[inline]
    pub fn rate(&self) -> u64 {
        self.rate.load().max(1)
    }

    /// From now on; what was used before stays used.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate.max(1));
    }

    #[inline]
    pub fn is_limited(&self) -> bool {
        self.rate() != UNLIMITED
    }

    /// Units that passed so far.
    #[inline]
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Whether somebody had to wait since this was asked last.
    #[inline]
    pub fn take_wanting(&self) -> bool {
        self.wanting.load(Relaxed) != 0 && self.wanting.swap(0, Relaxed) != 0
    }

    /// A turn of a switch thread was over before all that it had was done.
    pub fn fell_behind(&self) {
        self.behind.store(1, Relaxed);
    }

    /// Whether one was since this was asked last.
    #[inline]
    pub fn take_behind(&self) -> bool {
        self.behind.load(Relaxed) != 0 && self.behind.swap(0, Relaxed) != 0
    }

    /// Time that the bucket's depth stands for.
    fn depth(&self, rate: u64) -> u128 {
        (self.least_depth as u128 * SECOND / rate as u128).max(DEPTH_NS as u128 * FINE)
    }

    /// When it is full again, by what stands there.
    fn believed(&self, full_at: u64, rate: u64, now: u128) -> u128 {
        let longest = self.depth(rate) + MOST_DEBT as u128 * SECOND / rate as u128;
        Some(full_at as u128).filter(|&full_at| full_at <= now + longest).unwrap_or(now)
    }

    /// Units that may pass now.
    pub fn available(&self, now_ns: u64) -> u64 {
        let rate = self.rate();
        if rate == UNLIMITED {
            return UNLIMITED;
        }
        let now = now_ns as u128 * FINE;
        let full_at = self.believed(self.full_at.load(Relaxed), rate, now);
        let level = (now + self.depth(rate)).saturating_sub(full_at.max(now));
        (level * rate as u128 / SECOND) as u64
    }

    /// When `units` will be there, in nanoseconds.
    fn when(&self, units: u64, now_ns: u64) -> u64 {
        let rate = self.rate();
        let full_at = self.believed(self.full_at.load(Relaxed), rate, now_ns as u128 * FINE);
        let time = full_at + units as u128 * SECOND / rate as u128;
        (time.saturating_sub(self.depth(rate)) / FINE) as u64
    }

    /// Counts what passed; it may be more than was there.
    pub fn take(&self, units: u64, now_ns: u64) {
        self.used.fetch_add(units, Relaxed);
        self.pay(units, now_ns);
    }

    /// As [`Bucket::take`], of what is counted elsewhere.
    pub fn pay(&self, units: u64, now_ns: u64) {
        let rate = self.rate();
        if rate == UNLIMITED || units == 0 {
            return;
        }
        let cost = units as u128 * SECOND / rate as u128;
        let now = now_ns as u128 * FINE;
        let paid = |full_at: u64| u64::try_from(self.believed(full_at, rate, now).max(now) + cost).ok();
        let _ = self.full_at.fetch_update(Relaxed, Relaxed, paid);
    }
}

/// How many there may be at a time. Each process that counts has a part of its own, which its next one sets right when it was
/// killed ([`Quota::claim`]); nobody else writes that.
#[derive(Debug)]
pub struct Quota {
    most: Term,
    /// Of all who count, those in use first.
    parts: Vec<WordRef>,
    in_use: Term,
    mine: WordRef,
    /// Of mine: what the process before counted, and nobody has claimed yet.
    inherited: AtomicU64,
}

/// How often one looks again after another one took a place, too, and both were refused.
const TRIES: usize = 16;

impl Quota {
    pub fn new(most: u64) -> Quota {
        Quota::of_parts(Term::private(most), Term::private(1), vec![WordRef::private(0)], 0, false)
    }

    /// `mine`: this process's.
    pub(crate) fn of_parts(
        most: Term,
        in_use: Term,
        parts: Vec<WordRef>,
        mine: usize,
        inherits: bool,
    ) -> Quota {
        let mine = parts[mine].clone();
        let inherited = AtomicU64::new(if inherits { mine.load(Relaxed) } else { 0 });
        Quota { most, parts, in_use, mine, inherited }
    }

    pub fn set_most(&self, most: u64) {
        self.most.store(most);
    }

    /// How many count, besides the first one.
    pub fn set_parts(&self, count: usize) {
        self.in_use.store(count as u64);
    }

    pub fn most(&self) -> u64 {
        self.most.load()
    }

    fn parts(&self) -> &[WordRef] {
        let in_use = usize::try_from(self.in_use.load()).unwrap_or(usize::MAX);
        &self.parts[..in_use.clamp(1, self.parts.len())]
    }

    pub fn now(&self) -> u64 {
        self.parts().iter().fold(0, |sum, part| sum.saturating_add(part.load(SeqCst)))
    }

    /// One more, if it may be.
    pub fn take(&self) -> bool {
        if self.parts().len() == 1 {
            let more = |now: u64| (now < self.most()).then_some(now + 1);
            return self.mine.fetch_update(Relaxed, Relaxed, more).is_ok();
        }
        if self.most() == u64::MAX {
            self.add();
            return true;
        }
        // Said first, looked at then: of two who take the last one at the same time at least one sees the other. What each said is
        // its own part, and right even if it is killed in between.
        for _ in 0..TRIES {
            if self.now() >= self.most() {
                return false;
            }
            self.add();
            if self.now() <= self.most() {
                return true;
            }
            self.give_back();
            std::hint::spin_loop();
        }
        false
    }

    fn add(&self) {
        let _ = self.mine.fetch_update(SeqCst, Relaxed, |now| now.checked_add(1));
    }

    pub fn give_back(&self) {
        let _ = self.mine.fetch_update(SeqCst, Relaxed, |now| now.checked_sub(1));
    }

    /// One that there was before this process: it is counted already, or is now. More than there may be, if need be.
    pub fn claim(&self) {
        if self.inherited.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_err() {
            self.add();
        }
    }

    /// All that there were are claimed: the others are not there any more.
    pub fn settle(&self) {
        let gone = self.inherited.swap(0, Relaxed);
        let _ = self.mine.fetch_update(SeqCst, Relaxed, |now| Some(now.saturating_sub(gone)));
    }
}

/// The connections of one tenant on one NSM: as many as it is guaranteed are its own, more come out of what the NSM has beyond all
/// guarantees, which its tenants share.
#[derive(Debug)]
pub struct Seats {
    own: Quota,
    shared: Arc<Quota>,
    /// How many of the shared ones it has.
    borrowed: AtomicU64,
    /// Where another process says how many there are of both.
    told: Option<[WordRef; 2]>,
}

impl Seats {
    pub fn new(guaranteed: u64, shared: Arc<Quota>) -> Seats {
        Seats { own: Quota::new(guaranteed), shared, borrowed: AtomicU64::new(0), told: None }
    }

    pub(crate) fn told(guaranteed: WordRef, beyond: WordRef, shared: Arc<Quota>) -> Seats {
        Seats { told: Some([guaranteed, beyond]), ..Seats::new(0, shared) }
    }

    /// From now on; what there is stays.
    pub fn set_guaranteed(&self, guaranteed: u64) {
        self.own.set_most(guaranteed);
    }

    fn ask(&self) {
        if let Some([guaranteed, beyond]) = &self.told {
            self.own.set_most(guaranteed.load(Relaxed));
            self.shared.set_most(beyond.load(Relaxed));
        }
    }

    pub fn take(&self) -> bool {
        self.ask();
        if self.own.take() {
            return true;
        }
        let borrowed = self.shared.take();
        if borrowed {
            self.borrowed.fetch_add(1, Relaxed);
        }
        borrowed
    }

    /// As [`Quota::claim`].
    pub fn claim(&self) {
        if !self.take() {
            self.shared.claim();
            self.borrowed.fetch_add(1, Relaxed);
        }
    }

    /// What was borrowed goes first.
    pub fn give_back(&self) {
        if self.borrowed.fetch_update(Relaxed, Relaxed, |borrowed| borrowed.checked_sub(1)).is_ok() {
            self.shared.give_back();
        } else {
            self.own.give_back();
        }
    }
}

/// What a connection takes: one of the tenant's, and one of the NSM's if these are counted.
#[derive(Clone, Debug)]
pub struct Places {
    pub tenant: Arc<Quota>,
    pub nsm: Option<Arc<Seats>>,
}

impl Places {
    pub fn take(&self) -> bool {
        if !self.tenant.take() {
            return false;
        }
        let taken = self.nsm.as_ref().is_none_or(|nsm| nsm.take());
        if !taken {
            self.tenant.give_back();
        }
        taken
    }

    pub fn give_back(&self) {
        self.nsm.iter().for_each(|nsm| nsm.give_back());
        self.tenant.give_back();
    }

    /// For a connection that there was before ([`Quota::claim`]).
    pub fn claim(&self) {
        self.tenant.claim();
        self.nsm.iter().for_each(|nsm| nsm.claim());
    }
}

/// Buckets that all must have what passes: the tenant's own, and its share of a module.
#[derive(Clone, Debug, Default)]
pub struct Police(Vec<Arc<Bucket>>);

impl Police {
    pub fn new(buckets: Vec<Arc<Bucket>>) -> Police {
        Police(buckets)
    }

    /// True when nothing is limited now: then there is no need to look at the clock.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.0.iter().all(|bucket| !bucket.is_limited())
    }

    /// How many of `want` units may pass now; `Err`: none, and when to ask again.
    pub fn allow(&self, want: u64, now_ns: u64) -> Result<u64, u64> {
        self.allow_by(want, now_ns, |_| LEAST_MOVE, true)
    }

    /// As [`Police::allow`], of operations: those of about a millisecond are worth going on for. `want` are as many as there could be;
    /// whether there are more than were allowed, [`Police::want_more`] says.
    pub fn allow_operations(&self, want: u64, now_ns: u64) -> Result<u64, u64> {
        self.allow_by(want, now_ns, |rate| (rate / 1000).min(LEAST_OPERATIONS / 4), false)
    }

    /// Somebody had to wait.
    pub fn want_more(&self) {
        self.0.iter().for_each(|bucket| bucket.wanting.store(1, Relaxed));
    }

    /// `least`: what is worth it, of a rate. It must be well below a bucket's depth. `all`: all of `want` is there.
    fn allow_by(&self, want: u64, now_ns: u64, least: impl Fn(u64) -> u64, all: bool) -> Result<u64, u64> {
        let mut allowed = want;
        let mut again = 0;
        for bucket in &self.0 {
            let available = bucket.available(now_ns);
            let least = want.min(least(bucket.rate())).max(1);
            if available < if all { want } else { least } {
                bucket.wanting.store(1, Relaxed);
            }
            if available < least {
                again = again.max(bucket.when(least, now_ns));
            }
            allowed = allowed.min(available);
        }
        if again != 0 { Err(again.max(now_ns + 1)) } else { Ok(allowed) }
    }

    pub fn take(&self, units: u64, now_ns: u64) {
        for bucket in &self.0 {
            bucket.take(units, now_ns);
        }
    }

    /// As [`Bucket::pay`].
    pub fn pay(&self, units: u64, now_ns: u64) {
        self.0.iter().for_each(|bucket| bucket.pay(units, now_ns));
    }

    /// As [`Police::take`], now.
    pub fn charge(&self, units: u64) {
        if !self.0.is_empty() {
            self.take(units, if self.is_idle() { 0 } else { crate::memory::now_ns() });
        }
    }
}

/// What the sockets of one guest may use.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub send: Police,
    pub receive: Police,
    pub operations: Police,
    /// Connections at a time.
    pub connections: Option<Places>,
}

impl Limits {
    /// True when no rate is limited now.
    pub fn are_idle(&self) -> bool {
        [&self.send, &self.receive, &self.operations].into_iter().all(Police::is_idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Takes all that is allowed, as a thread that looks every so often does; says how much passed.
    fn run(police: &Police, from_ns: u64, for_ns: u64, every_ns: u64, want: u64) -> u64 {
        let mut passed = 0;
        let mut now = from_ns;
        while now < from_ns + for_ns {
            while let Ok(allowed) = police.allow(want, now) {
                police.take(allowed, now);
                passed += allowed;
            }
            now += every_ns;
        }
        passed
    }

    #[test]
    fn the_rate_is_kept_whatever_the_pieces() {
        for rate in [10_000, 62_500_000, 125_000_000, 12_500_000_000] {
            for want in [1, 1448, 65536, 1 << 20] {
                if rate / want > 50_000_000 {
                    continue;
                }
                let police = Police::new(vec![Arc::new(Bucket::new(rate))]);
                let depth = run(&police, 1_000_000 * MS, 1, 1, want);
                let passed = run(&police, 1_000_000 * MS, 1000 * MS, MS, want);
                let error = (passed as f64 / rate as f64 - 1.0).abs();
                let slack = (LEAST_MOVE.max(depth) as f64 / rate as f64).max(0.002);
                assert!(error < 0.012 || error < slack, "rate {rate}, pieces {want}: {passed}");
            }
        }
    }

    #[test]
    fn silence_earns_no_more_than_the_depth() {
        let police = Police::new(vec![Arc::new(Bucket::new(125_000_000))]);
        run(&police, 0, 100 * MS, MS, 65536);
        let burst = run(&police, 3_600_000 * MS, 1, 1, 65536);
        assert!(burst <= 125_000_000 * DEPTH_NS / 1_000_000_000 + 65536, "{burst}");
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let bucket = Arc::new(Bucket::new(UNLIMITED));
        let police = Police::new(vec![Arc::clone(&bucket)]);
        assert!(police.is_idle());
        assert_eq!(police.allow(1 << 40, 5), Ok(1 << 40));
        bucket.set_rate(1_000_000);
        assert!(!police.is_idle());
        let passed = run(&police, 10_000 * MS, 1000 * MS, MS, 1000);
        assert!((990_000..1_030_000).contains(&passed), "{passed}");
        assert!(bucket.take_wanting() && !bucket.take_wanting());
        bucket.set_rate(10_000_000);
        let passed = run(&police, 11_000 * MS, 1000 * MS, MS, 1000);
        assert!((9_800_000..10_100_000).contains(&passed), "{passed}");
    }

    #[test]
    fn the_tighter_of_two_buckets_counts_and_says_when_to_come_again() {
        let (wide, tight) = (Arc::new(Bucket::new(1_000_000_000)), Arc::new(Bucket::new(1_000_000)));
        let police = Police::new(vec![Arc::clone(&wide), Arc::clone(&tight)]);
        let passed = run(&police, 10_000 * MS, 1000 * MS, MS, 5000);
        assert!((990_000..1_030_000).contains(&passed), "{passed}");
        assert_eq!(wide.used(), passed);
        let now = 11_000 * MS;
        let again = police.allow(5000, now).unwrap_err();
        assert!(again > now && again <= now + 10 * MS, "{}", again - now);
        assert!(police.allow(5000, again).is_ok());
    }

    #[test]
    fn a_debt_is_paid_and_one_that_cannot_be_is_none() {
        for rate in [1, 1000, 1_000_000, 50_000_000] {
            let bucket = Arc::new(Bucket::new(rate));
            let police = Police::new(vec![Arc::clone(&bucket)]);
            let now = 1_000_000 * MS;
            // Datagrams may be more than there is.
            bucket.take(1 << 20, now);
            let again = police.allow(1000, now).unwrap_err();
            let seconds = ((1 << 20) - LEAST_DEPTH.max(rate / 100)) / rate;
            assert!(again >= now + seconds * 1000 * MS, "rate {rate}: {}", again - now);
            bucket.full_at.store(u64::MAX, Relaxed);
            assert_eq!(police.allow(1000, now), Ok(1000), "rate {rate}");
            bucket.take(1000, now);
            assert!(bucket.available(now) < LEAST_DEPTH.max(rate / 100), "what is used counts again");
        }
    }

    #[test]
    fn threads_share_a_bucket_exactly() {
        let bucket = Arc::new(Bucket::new(1_000_000_000));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| bucket.take(100, 1)));
            }
        });
        assert_eq!(bucket.used(), 4_000_000);
        // Four million at a billion a second: full again 4 ms after the first.
        assert_eq!(bucket.full_at.load(Relaxed) as u128, FINE + 4 * MS as u128 * FINE);
    }

    #[test]
    fn guaranteed_connections_are_kept_for_their_tenant() {
        // An NSM of ten: four are one tenant's, two are the other's, and four are for whoever comes first.
        let shared = Arc::new(Quota::new(4));
        let tenant = |guaranteed, most| Places {
            tenant: Arc::new(Quota::new(most)),
            nsm: Some(Arc::new(Seats::new(guaranteed, Arc::clone(&shared)))),
        };
        let (greedy, modest) = (tenant(2, u64::MAX), tenant(4, u64::MAX));
        assert_eq!((0..100).filter(|_| greedy.take()).count(), 6);
        assert_eq!((0..100).filter(|_| modest.take()).count(), 4);
        assert_eq!((greedy.tenant.now(), modest.tenant.now()), (6, 4), "who is refused has taken nothing");
        // What was borrowed is given back first, to both.
        greedy.give_back();
        assert!(modest.take() && !modest.take() && !greedy.take());
        (0..100).for_each(|_| greedy.give_back());
        assert_eq!((0..100).filter(|_| modest.take()).count(), 3);
        assert_eq!((0..100).filter(|_| greedy.take()).count(), 2);
        // Its own limit counts too.
        let small = tenant(4, 1);
        assert!(small.take() && !small.take());
    }

    #[test]
    fn few_operations_pass_at_once() {
        let bucket = Arc::new(Bucket::of_operations());
        bucket.set_rate(1000);
        let police = Police::new(vec![bucket]);
        let mut passed = 0;
        let mut now = 10_000 * MS;
        while now < 11_000 * MS {
            while let Ok(allowed) = police.allow_operations(256, now) {
                police.take(allowed, now);
                passed += allowed;
            }
            // When it says, more passes: it does not say so for ever.
            let again = police.allow_operations(256, now).unwrap_err();
            assert!(again > now && again < now + 5 * MS, "{}", again - now);
            assert!(police.allow_operations(256, again + 1000).is_ok());
            now += MS;
        }
        assert!((1000..=1300).contains(&passed), "{passed}");
    }

    #[test]
    fn a_quota_is_never_passed() {
        let quota = Quota::new(3);
        assert_eq!((0..5).filter(|_| quota.take()).count(), 3);
        quota.give_back();
        assert!(quota.take() && !quota.take());
        quota.set_most(1);
        quota.give_back();
        assert!(!quota.take(), "two are left of one that may be");
        for _ in 0..5 {
            quota.give_back();
        }
        assert_eq!(quota.now(), 0);
    }
}
