//! What a guest may use: rates as token buckets, counts as quotas. Shared by all guests of a tenant, on all switch threads.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// No limit.
pub const UNLIMITED: u64 = u64::MAX;
/// Times in a bucket are in this part of a nanosecond, so that single bytes at high rates count.
const FINE: u128 = 256;
const SECOND: u128 = 1_000_000_000 * FINE;
/// What a bucket holds: the time for which it lets pass at once what came together. A switch thread that sleeps is woken to
/// the millisecond, and must find what it missed.
const DEPTH_NS: u64 = 10_000_000;
/// At least this many bytes, or operations, pass at once, also at low rates.
const LEAST_DEPTH: u64 = 16 * 1024;
const LEAST_OPERATIONS: u64 = 256;
/// It is not worth a system call to move less, when more waits.
const LEAST_MOVE: u64 = 4 * 1024;

/// A token bucket, kept as the time at which it is full again (GCRA, ATM Forum TM 4.0, 4.4.2): one word, so that threads
/// share it without a lock. Units are bytes or operations.
#[derive(Debug)]
pub struct Bucket {
    /// Units per second.
    rate: AtomicU64,
    /// In 1/256 ns of the clock that callers pass.
    full_at: AtomicU64,
    used: AtomicU64,
    /// Units that pass at once at least, also at low rates.
    least_depth: u64,
    /// Somebody had to wait since the last look.
    wanting: AtomicU64,
}

impl Bucket {
    pub const fn new(rate: u64) -> Bucket {
        Bucket {
            rate: AtomicU64::new(rate),
            full_at: AtomicU64::new(0),
            used: AtomicU64::new(0),
            least_depth: LEAST_DEPTH,
            wanting: AtomicU64::new(0),
        }
    }

    /// Without a limit so far. A batch of operations passes at once, and not more of them than of bytes.
    pub const fn of_operations() -> Bucket {
        Bucket { least_depth: LEAST_OPERATIONS, ..Bucket::new(UNLIMITED) }
    }

    pub fn rate(&self) -> u64 {
        self.rate.load(Relaxed)
    }

    /// From now on; what was used before stays used.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate.max(1), Relaxed);
    }

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

    /// Time that the bucket's depth stands for.
    fn depth(&self, rate: u64) -> u128 {
        (self.least_depth as u128 * SECOND / rate as u128).max(DEPTH_NS as u128 * FINE)
    }

    /// Units that may pass now.
    pub fn available(&self, now_ns: u64) -> u64 {
        let rate = self.rate();
        if rate == UNLIMITED {
            return UNLIMITED;
        }
        let (now, full_at) = (now_ns as u128 * FINE, self.full_at.load(Relaxed) as u128);
        let level = (now + self.depth(rate)).saturating_sub(full_at.max(now));
        (level * rate as u128 / SECOND) as u64
    }

    /// When `units` will be there, in nanoseconds.
    fn when(&self, units: u64) -> u64 {
        let rate = self.rate();
        let time = self.full_at.load(Relaxed) as u128 + units as u128 * SECOND / rate as u128;
        (time.saturating_sub(self.depth(rate)) / FINE) as u64
    }

    /// Counts what passed; it may be more than was there.
    pub fn take(&self, units: u64, now_ns: u64) {
        self.used.fetch_add(units, Relaxed);
        let rate = self.rate();
        if rate == UNLIMITED || units == 0 {
            return;
        }
        let cost = units as u128 * SECOND / rate as u128;
        let now = now_ns as u128 * FINE;
        let _ = self
            .full_at
            .fetch_update(Relaxed, Relaxed, |full_at| u64::try_from((full_at as u128).max(now) + cost).ok());
    }
}

/// How many there may be at a time.
#[derive(Debug)]
pub struct Quota {
    most: AtomicU64,
    now: AtomicU64,
}

impl Quota {
    pub const fn new(most: u64) -> Quota {
        Quota { most: AtomicU64::new(most), now: AtomicU64::new(0) }
    }

    pub fn set_most(&self, most: u64) {
        self.most.store(most, Relaxed);
    }

    pub fn most(&self) -> u64 {
        self.most.load(Relaxed)
    }

    pub fn now(&self) -> u64 {
        self.now.load(Relaxed)
    }

    /// One more, if it may be.
    pub fn take(&self) -> bool {
        let more = |now: u64| (now < self.most.load(Relaxed)).then_some(now + 1);
        self.now.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    pub fn give_back(&self) {
        let _ = self.now.fetch_update(Relaxed, Relaxed, |now| now.checked_sub(1));
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
}

impl Seats {
    pub fn new(guaranteed: u64, shared: Arc<Quota>) -> Seats {
        Seats { own: Quota::new(guaranteed), shared, borrowed: AtomicU64::new(0) }
    }

    /// From now on; what there is stays.
    pub fn set_guaranteed(&self, guaranteed: u64) {
        self.own.set_most(guaranteed);
    }

    pub fn take(&self) -> bool {
        if self.own.take() {
            return true;
        }
        let borrowed = self.shared.take();
        if borrowed {
            self.borrowed.fetch_add(1, Relaxed);
        }
        borrowed
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
                again = again.max(bucket.when(least));
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
