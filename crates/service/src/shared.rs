//! What processes share of one tenant: where its buckets and counts stand in memory that the engine and the processes of NSMs
//! map.
//!
//! The engine says what the tenant may use and goes by its own copy of that ([`Terms::Own`]); processes go by what they are told
//! ([`Terms::Told`]). What is used, all write. Whoever maps the memory may write anything anywhere: values decide about this
//! tenant's traffic only, and every use of one puts up with any number.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use netkernel_shm::{WordRef, Words};

use crate::police::{Bucket, Quota, Seats};

/// NSMs in processes that one engine can have: each has a place in the memory.
pub const MAX_PLACES: usize = 63;

/// Bytes sent, bytes received, operations.
const BUCKETS: usize = 3;
const OPERATIONS: usize = 2;
/// Those of a bucket, a cache line.
const BUCKET_WORDS: usize = 8;
/// Of the tenant as a whole: its buckets, then these.
const MOST_CONNECTIONS: usize = BUCKETS * BUCKET_WORDS;
const PARTS_IN_USE: usize = MOST_CONNECTIONS + 1;
const WEIGHT: usize = MOST_CONNECTIONS + 2;
const PROMISED: usize = MOST_CONNECTIONS + 3;
const QUEUED_ONLY: usize = MOST_CONNECTIONS + 4;
/// Connections that each counts: the engine, then NSMs by their places.
const PARTS: usize = 64;
/// Of each NSM: its buckets, then these.
const NSMS: usize = PARTS + 1 + MAX_PLACES;
const NSM_WORDS: usize = 32;
const GUARANTEED: usize = BUCKETS * BUCKET_WORDS;
const BEYOND: usize = GUARANTEED + 1;
const WORDS: usize = NSMS + MAX_PLACES * NSM_WORDS;

/// Changes with where the words are and what they mean.
pub(crate) const FORMAT: usize = 1 << 16 | WORDS;

const _: () = assert!(QUEUED_ONLY < PARTS && BEYOND < NSM_WORDS);

/// Whose word counts for what may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terms {
    /// This process's, which others are told.
    Own,
    /// That of who made the memory.
    Told,
}

/// A number of the terms.
#[derive(Debug)]
pub(crate) struct Term {
    here: WordRef,
    told: Option<WordRef>,
}

impl Term {
    pub fn private(value: u64) -> Term {
        Term { here: WordRef::private(value), told: None }
    }

    /// `value`: what it is if it is this process's. Others are told when it is set: they may go by what one before this said.
    fn of(word: WordRef, terms: Terms, value: u64) -> Term {
        match terms {
            Terms::Told => Term { here: word, told: None },
            Terms::Own => Term { here: WordRef::private(value), told: Some(word) },
        }
    }

    #[inline]
    pub fn load(&self) -> u64 {
        self.here.load(Relaxed)
    }

    pub fn store(&self, value: u64) {
        self.here.store(value, Relaxed);
        self.told.iter().for_each(|told| told.store(value, Relaxed));
    }
}

/// The memory of one tenant.
#[derive(Clone, Debug)]
pub struct TenantMemory(Arc<Words>);

impl TenantMemory {
    /// Of this process only: there are no others.
    pub fn private() -> TenantMemory {
        TenantMemory(Words::private(NSMS))
    }

    pub fn create() -> io::Result<TenantMemory> {
        Words::create(WORDS).map(TenantMemory)
    }

    /// That of another process, or of another program of this one.
    pub fn open(fd: OwnedFd) -> io::Result<TenantMemory> {
        Words::open(fd, WORDS).map(TenantMemory)
    }

    /// With which another process opens it; `None`: it is this one's only.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.fd()
    }

    /// Whether a descriptor is of the same memory.
    pub fn is_in(&self, fd: BorrowedFd<'_>) -> bool {
        self.0.are_in(fd)
    }

    /// The tenant's own buckets: of sending, of receiving, and of operations.
    pub fn buckets(&self, terms: Terms) -> [Bucket; BUCKETS] {
        self.buckets_at(0, terms)
    }

    /// Its shares of an NSM in a process.
    pub fn shares(&self, place: usize, terms: Terms) -> [Bucket; BUCKETS] {
        self.buckets_at(nsm(place), terms)
    }

    fn buckets_at(&self, at: usize, terms: Terms) -> [Bucket; BUCKETS] {
        std::array::from_fn(|i| {
            let word = |number| self.0.at(at + i * BUCKET_WORDS + number);
            let rate = Term::of(word(0), terms, crate::UNLIMITED);
            Bucket::of(rate, [word(1), word(2), word(3), word(4)], i == OPERATIONS)
        })
    }

    /// Its connections. `place`: of the NSM that counts; `None`: the engine does. `inherits`: the ones that it counted before are
    /// still there, and each is claimed ([`Quota::claim`]).
    pub fn connections(&self, place: Option<usize>, terms: Terms, inherits: bool) -> Quota {
        let most = Term::of(self.0.at(MOST_CONNECTIONS), terms, u64::MAX);
        let parts = Term::of(self.0.at(PARTS_IN_USE), terms, 1);
        let all = (0..=MAX_PLACES).map(|part| self.0.at(PARTS + part)).collect();
        Quota::of_parts(most, parts, all, part(place), inherits)
    }

    /// What an NSM's process counted is nobody's any more.
    pub fn forget_connections(&self, place: usize) {
        self.0.at(PARTS + part(Some(place))).store(0, Relaxed);
    }

    /// For an NSM in a process: which of its connections are guaranteed, and how many it has beyond all guarantees.
    pub fn say_seats(&self, place: usize, guaranteed: u64, beyond: u64) {
        self.0.at(nsm(place) + GUARANTEED).store(guaranteed, Relaxed);
        self.0.at(nsm(place) + BEYOND).store(beyond, Relaxed);
    }

    /// The same as they hold in that process. `shared`: those beyond all guarantees, of all its tenants.
    pub fn seats(&self, place: usize, shared: Arc<Quota>) -> Seats {
        Seats::told(self.0.at(nsm(place) + GUARANTEED), self.0.at(nsm(place) + BEYOND), shared)
    }

    /// Besides the rates: its weight, whether a rate is guaranteed to it, and whether kernel sockets would pass its limits by.
    pub fn say(&self, weight: u32, promised: bool, queued_only: bool) {
        self.0.at(WEIGHT).store(weight.into(), Relaxed);
        self.0.at(PROMISED).store(promised.into(), Relaxed);
        self.0.at(QUEUED_ONLY).store(queued_only.into(), Relaxed);
    }

    pub fn told(&self) -> Told {
        let [weight, promised, queued_only] = [WEIGHT, PROMISED, QUEUED_ONLY].map(|at| self.0.at(at));
        Told { weight, promised, queued_only }
    }
}

fn nsm(place: usize) -> usize {
    assert!(place < MAX_PLACES, "place {place} of {MAX_PLACES}");
    NSMS + place * NSM_WORDS
}

fn part(place: Option<usize>) -> usize {
    place.map_or(0, |place| place + 1)
}

/// What a process is told of a tenant besides its rates.
#[derive(Debug)]
pub struct Told {
    weight: WordRef,
    promised: WordRef,
    queued_only: WordRef,
}

impl Told {
    pub fn weight(&self) -> u32 {
        self.weight.load(Relaxed).clamp(1, u32::MAX.into()) as u32
    }

    pub fn is_promised(&self) -> bool {
        self.promised.load(Relaxed) != 0
    }

    pub fn needs_queues(&self) -> bool {
        self.queued_only.load(Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Places, Police};

    const SECOND: u64 = 1_000_000_000;

    /// The same memory as another process has it.
    fn other(memory: &TenantMemory) -> TenantMemory {
        TenantMemory::open(memory.fd().unwrap().try_clone_to_owned().unwrap()).unwrap()
    }

    /// What two of them may do together, one after the other, in a second.
    fn passed(polices: [&Police; 2], from_ns: u64) -> u64 {
        let mut passed = 0;
        for ms in 0..1000 {
            for police in polices {
                let now = from_ns + ms * 1_000_000;
                while let Ok(allowed) = police.allow(10_000, now) {
                    police.take(allowed, now);
                    passed += allowed;
                }
            }
        }
        passed
    }

    #[test]
    fn processes_share_a_rate_and_a_new_one_holds_for_both() {
        let memory = TenantMemory::create().unwrap();
        let [own, ..] = memory.buckets(Terms::Own).map(Arc::new);
        let [theirs, ..] = other(&memory).buckets(Terms::Told).map(Arc::new);
        own.set_rate(crate::UNLIMITED);
        let (here, there) = (Police::new(vec![Arc::clone(&own)]), Police::new(vec![Arc::clone(&theirs)]));
        assert!(here.is_idle() && there.is_idle());
        own.set_rate(1_000_000);
        assert!(!there.is_idle());
        let sum = passed([&here, &there], SECOND);
        assert!((990_000..1_030_000).contains(&sum), "{sum}");
        assert_eq!((own.used(), theirs.used()), (sum, sum));
        assert!(own.take_wanting() && !theirs.take_wanting(), "told once, to whoever asks");
        own.set_rate(10_000_000);
        let sum = passed([&there, &here], 3 * SECOND);
        assert!((9_800_000..10_100_000).contains(&sum), "{sum}");
        theirs.fell_behind();
        assert!(own.take_behind() && !own.take_behind());
        // A share of an NSM is another bucket.
        let ([share, ..], [shown, ..]) =
            (memory.shares(5, Terms::Own), other(&memory).shares(5, Terms::Told));
        share.set_rate(7);
        assert_eq!((shown.rate(), memory.shares(6, Terms::Told)[0].used()), (7, 0));
        shown.take(9, SECOND);
        assert_eq!((share.used(), own.used()), (9, own.used()));
    }

    #[test]
    fn processes_share_a_number_of_connections() {
        let memory = TenantMemory::create().unwrap();
        let engine = memory.connections(None, Terms::Own, false);
        engine.set_parts(3);
        let first = other(&memory).connections(Some(0), Terms::Told, false);
        let second = other(&memory).connections(Some(1), Terms::Told, false);
        engine.set_most(5);
        assert!(engine.take() && first.take() && first.take() && second.take() && second.take());
        assert!(!engine.take() && !first.take() && !second.take());
        assert_eq!((engine.now(), first.now(), second.now()), (5, 5, 5));
        first.give_back();
        assert!(second.take() && !engine.take());
        // More than was taken is not given back.
        (0..9).for_each(|_| first.give_back());
        assert_eq!(engine.now(), 4);
        memory.forget_connections(1);
        assert_eq!(engine.now(), 1);
    }

    #[test]
    fn what_the_one_before_counted_is_claimed_or_given_back() {
        let memory = TenantMemory::create().unwrap();
        let engine = memory.connections(None, Terms::Own, false);
        engine.set_parts(2);
        engine.set_most(4);
        let killed = memory.connections(Some(0), Terms::Told, false);
        assert!((0..3).all(|_| killed.take()) && engine.take());
        let next = memory.connections(Some(0), Terms::Told, true);
        // Nobody can have the places meanwhile.
        assert!(!engine.take() && !next.take());
        next.claim();
        next.claim();
        assert_eq!(engine.now(), 4);
        // One connection was counted when it died, and is not there.
        next.settle();
        assert_eq!(engine.now(), 3);
        assert!(engine.take() && !engine.take());
        // One that was not counted yet is there: it is one too many, and counted.
        let next = memory.connections(Some(0), Terms::Told, true);
        (0..3).for_each(|_| next.claim());
        next.settle();
        assert_eq!(engine.now(), 5);
        next.give_back();
        assert!(!engine.take());
        next.give_back();
        assert!(engine.take());
    }

    #[test]
    fn threads_and_processes_never_take_more_than_there_are() {
        let memory = TenantMemory::create().unwrap();
        let engine = memory.connections(None, Terms::Own, false);
        engine.set_parts(3);
        engine.set_most(100);
        let (first, second) = (
            other(&memory).connections(Some(0), Terms::Told, false),
            other(&memory).connections(Some(1), Terms::Told, false),
        );
        let taken = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for quota in [&engine, &engine, &first, &second] {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        if quota.take() {
                            let now = taken.fetch_add(1, Relaxed) + 1;
                            assert!(now <= 100, "{now} are taken");
                            taken.fetch_sub(1, Relaxed);
                            quota.give_back();
                        }
                    }
                });
            }
        });
        assert_eq!(engine.now(), 0);
        assert_eq!((0..200).filter(|_| first.take()).count(), 100);
    }

    #[test]
    fn guaranteed_connections_hold_in_a_process_as_they_are_told() {
        let memory = TenantMemory::create().unwrap();
        let places = |shared: &Arc<Quota>| Places {
            tenant: Arc::new(memory.connections(Some(2), Terms::Told, false)),
            nsm: Some(Arc::new(memory.seats(2, Arc::clone(shared)))),
        };
        let engine = memory.connections(None, Terms::Own, false);
        engine.set_parts(4);
        engine.set_most(u64::MAX);
        memory.say_seats(2, 2, 1);
        let shared = Arc::new(Quota::new(0));
        let places = places(&shared);
        assert_eq!((0..9).filter(|_| places.take()).count(), 3);
        memory.say_seats(2, 2, 3);
        assert_eq!((0..9).filter(|_| places.take()).count(), 2);
        places.give_back();
        assert_eq!((shared.now(), places.tenant.now()), (2, 4));
        // What was there before the process was started again is there, whatever may be now.
        memory.say_seats(2, 1, 0);
        let shared = Arc::new(Quota::new(0));
        let next = Places {
            tenant: Arc::new(memory.connections(Some(2), Terms::Told, true)),
            nsm: Some(Arc::new(memory.seats(2, Arc::clone(&shared)))),
        };
        (0..4).for_each(|_| next.claim());
        next.tenant.settle();
        assert_eq!((shared.now(), next.tenant.now()), (3, 4));
        assert!(!next.take());
        (0..4).for_each(|_| next.give_back());
        assert_eq!((shared.now(), next.tenant.now()), (0, 0));
        assert!(next.take() && !next.take());
    }

    /// Whatever stands there: no panic, nothing endless, and the engine's own terms are what it set.
    #[test]
    fn any_number_may_stand_anywhere() {
        let memory = TenantMemory::create().unwrap();
        let engine = memory.buckets(Terms::Own).map(Arc::new);
        let share = memory.shares(0, Terms::Own).map(Arc::new);
        let quota = memory.connections(None, Terms::Own, false);
        engine[0].set_rate(1_000_000);
        quota.set_parts(2);
        quota.set_most(3);
        let theirs = other(&memory);
        let values = [0, 1, 255, 1 << 20, 1 << 32, u64::MAX / 2, u64::MAX - 1, u64::MAX];
        for (round, value) in values.into_iter().enumerate() {
            for word in 0..WORDS {
                memory.0.at(word).store(value.wrapping_mul((word % 7 + 1) as u64), Relaxed);
                if word % 3 == round % 3 {
                    memory.0.at(word).store(value, Relaxed);
                }
            }
            let told = theirs.buckets(Terms::Told).map(Arc::new);
            for bucket in engine.iter().chain(&share).chain(&told) {
                for now in [0, SECOND, u64::MAX / 300] {
                    let police = Police::new(vec![Arc::clone(bucket), Arc::clone(&share[0])]);
                    for want in [1, 1448, 1 << 20, u64::MAX] {
                        if let Err(again) = police.allow(want, now) {
                            assert!(again > now);
                        }
                        let _ = police.allow_operations(want, now);
                        police.take(want, now);
                    }
                    police.want_more();
                    let _ = (bucket.take_wanting(), bucket.take_behind(), bucket.used(), bucket.is_limited());
                }
            }
            assert_eq!(engine[0].rate(), 1_000_000);
            assert_eq!(quota.most(), 3);
            for inherits in [false, true] {
                let shared = Arc::new(Quota::new(value));
                let places = Places {
                    tenant: Arc::new(theirs.connections(Some(MAX_PLACES - 1), Terms::Told, inherits)),
                    nsm: Some(Arc::new(theirs.seats(MAX_PLACES - 1, shared))),
                };
                places.claim();
                let _ = (places.take(), places.tenant.now(), places.tenant.most());
                places.tenant.settle();
                (0..3).for_each(|_| places.give_back());
            }
            let _ = (quota.take(), quota.now());
            quota.give_back();
            let told = theirs.told();
            let _ = (told.is_promised(), told.needs_queues());
            assert!(told.weight() > 0);
        }
        // What was spoilt heals: whatever stands there, a bucket says when there is more, and then there is.
        let police = Police::new(vec![Arc::clone(&engine[0])]);
        for value in values.into_iter().chain((30..64).map(|bit| 1 << bit)) {
            memory.0.at(1).store(value, Relaxed);
            let now = 100 * SECOND;
            let Err(again) = police.allow(1000, now) else { continue };
            assert!(again <= now + 100 * SECOND, "{value}: {again}");
            assert!(police.allow(1000, again + 1000).is_ok(), "{value}");
        }
    }
}
