//! What tenants get of an NSM's capacity, computed anew every 10 ms, and whether what they were promised was kept.
//!
//! Only tenants with guests on an NSM are looked at (one counter and one flag each), and only those that did something are reckoned
//! with: a thousand idle tenants cost a thousand loads.

use std::collections::BTreeMap;
use std::sync::Arc;

use netkernel_service::UNLIMITED;

use crate::tenants::{Capacity, Tenant};

/// What is shared: bytes sent, bytes received, operations.
pub(crate) const RESOURCES: usize = 3;
pub(crate) const OPERATIONS: usize = 2;
const SECOND_NS: u64 = 1_000_000_000;
/// What of a guarantee must be had: a thread that is woken to the millisecond finds 99 % of a rate.
const KEPT: (u64, u64) = (95, 100);

impl Capacity {
    pub(crate) fn of(&self, resource: usize) -> Option<u64> {
        if resource == OPERATIONS { self.operations } else { self.rate }
    }
}

/// In how many seconds a tenant's guarantees on an NSM were watched, and in how many of them they were met.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Attained {
    pub tenant: String,
    pub nsm: String,
    pub seconds: u64,
    pub met: u64,
}

/// A tenant that did nothing for so many rounds is looked at in one of [`SELDOM`] only: a thousand of them would cost a core some
/// percent. It begins with what its guarantee and weight give it, and waits that long for what others leave.
const QUIET: u8 = 20;
const SELDOM: usize = 8;

/// The thread's memory.
#[derive(Default)]
pub(crate) struct Rounds {
    begun_ns: u64,
    /// How many there were.
    count: usize,
    /// All are looked at in this one.
    rested: bool,
    second_ns: u64,
    nsms: Vec<[Vec<Slot>; RESOURCES]>,
    /// By NSM: who did something lately.
    awake: Vec<Awake>,
    /// By tenant and NSM: seconds, and those of them that were met; all that time, and what of it was told.
    attained: BTreeMap<(usize, usize), (u64, u64)>,
    told: BTreeMap<(usize, usize), (u64, u64)>,
    /// Of the round: who is looked at, who is reckoned with, and what it wants.
    looked: Vec<usize>,
    active: Vec<usize>,
    demands: Vec<Demand>,
}

/// Of one tenant.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    used: u64,
    active: bool,
    /// When it was looked at last; 0: never.
    seen_ns: u64,
    watch: Watch,
}

/// Tenants of one NSM that are looked at in every round.
#[derive(Default)]
struct Awake {
    list: Vec<usize>,
    /// By tenant: for how many more rounds.
    rounds: Vec<u8>,
}

impl Awake {
    /// Who is looked at in this round: besides these, every so often each that is there; or `all`.
    fn round(&mut self, present: &[usize], count: usize, all: bool, tenants: usize, into: &mut Vec<usize>) {
        self.rounds.resize(tenants, 0);
        self.list.retain(|&index| {
            self.rounds[index] -= 1;
            self.rounds[index] > 0
        });
        into.clear();
        into.extend(&self.list);
        let (first, step) = if all { (0, 1) } else { (count % SELDOM, SELDOM) };
        let some = present.iter().skip(first).step_by(step);
        into.extend(some.filter(|&&index| self.rounds[index] == 0));
    }

    fn stays(&mut self, index: usize) {
        if std::mem::replace(&mut self.rounds[index], QUIET) == 0 {
            self.list.push(index);
        }
    }
}

/// Whether a guarantee is kept. The engine can tell that a tenant wants more than it gets when it holds it back: by its share, or
/// because a turn was over. Time counts from a slice in which it was held back to the next one in which it is: in between
/// it wanted all it could get. What the network or the peer holds back is not counted.
#[derive(Clone, Copy, Debug, Default)]
struct Watch {
    /// What it got in the last slice, in which it was held back, and how long that was.
    held_back: Option<(u64, u64)>,
    due: u64,
    got: u64,
}

impl Watch {
    fn slice(&mut self, guaranteed: u64, moved: u64, elapsed_ns: u64, held_back: bool) {
        if let Some((before, time_ns)) = self.held_back.take()
            && held_back
        {
            // What moved, an NSM's process may have made up.
            self.due = self.due.saturating_add(units(guaranteed, time_ns));
            self.got = self.got.saturating_add(before);
        }
        self.held_back = held_back.then_some((moved, elapsed_ns));
    }

    /// A second is over: whether it was kept.
    fn take(&mut self) -> bool {
        let (due, got) = (std::mem::take(&mut self.due), std::mem::take(&mut self.got));
        u128::from(got) * u128::from(KEPT.1) >= u128::from(due) * u128::from(KEPT.0)
    }
}

fn units(rate: u64, time_ns: u64) -> u64 {
    (u128::from(rate) * u128::from(time_ns) / u128::from(SECOND_NS)) as u64
}

impl Rounds {
    /// A round of one NSM with a capacity or promises. `present`: tenants that have guests there. `weights`: of all tenants together.
    pub fn share(
        &mut self,
        nsm: usize,
        capacity: &Capacity,
        tenants: &[Arc<Tenant>],
        present: &[usize],
        weights: u64,
        elapsed_ns: u64,
    ) {
        if self.nsms.len() <= nsm {
            self.nsms.resize_with(nsm + 1, Default::default);
            self.awake.resize_with(nsm + 1, Default::default);
        }
        self.awake[nsm].round(present, self.count, self.rested, tenants.len(), &mut self.looked);
        for resource in 0..RESOURCES {
            let slots = &mut self.nsms[nsm][resource];
            slots.resize(tenants.len(), Slot::default());
            self.active.clear();
            self.demands.clear();
            let capacity = capacity.of(resource);
            for &index in &self.looked {
                let (tenant, slot) = (&tenants[index], &mut slots[index]);
                let elapsed_ns = match std::mem::replace(&mut slot.seen_ns, self.begun_ns) {
                    0 => elapsed_ns,
                    seen_ns => self.begun_ns.saturating_sub(seen_ns),
                };
                let Some(share) = tenant.share(nsm, resource) else { continue };
                let used = share.used();
                let moved = used.saturating_sub(std::mem::replace(&mut slot.used, used));
                let wanting = share.take_wanting();
                let held_back = share.take_behind() || wanting;
                if moved > 0 || held_back {
                    self.awake[nsm].stays(index);
                }
                if held_back || slot.watch.held_back.is_some() {
                    let guaranteed = tenant.terms(nsm, resource).guaranteed;
                    slot.watch.slice(guaranteed, moved, elapsed_ns, held_back);
                }
                let Some(capacity) = capacity else { continue };
                if moved > 0 || wanting {
                    slot.active = true;
                    let rate =
                        (u128::from(moved) * u128::from(SECOND_NS) / u128::from(elapsed_ns.max(1))) as u64;
                    // One that did not have to wait may want a bit more next time.
                    let wanted = if wanting { UNLIMITED } else { rate.saturating_add(rate / 2) };
                    self.active.push(index);
                    self.demands.push(Demand { wanted, ..tenant.terms(nsm, resource) });
                } else if std::mem::take(&mut slot.active) {
                    share.set_rate(start(capacity, weights, &tenant.terms(nsm, resource)));
                }
            }
            if let Some(capacity) = capacity
                && !self.active.is_empty()
            {
                for (&index, rate) in self.active.iter().zip(divide(capacity, weights, &self.demands)) {
                    tenants[index].share(nsm, resource).inspect(|share| share.set_rate(rate));
                }
            }
        }
    }

    /// Time since the last round, in nanoseconds.
    pub fn begin(&mut self, now_ns: u64) -> u64 {
        self.count = self.count.wrapping_add(1);
        let before = std::mem::replace(&mut self.begun_ns, now_ns);
        if before == 0 {
            self.second_ns = now_ns;
            return SECOND_NS / 100;
        }
        now_ns.saturating_sub(before)
    }

    /// How many rounds there is nothing to do for: while nobody does anything, one round that looks at all stands for as many as
    /// it takes to look at each once.
    pub fn rest(&mut self) -> u32 {
        self.rested = self.awake.iter().all(|awake| awake.list.is_empty());
        if self.rested { SELDOM as u32 } else { 1 }
    }

    /// True once a second.
    pub fn is_second_over(&mut self, now_ns: u64) -> bool {
        let over = now_ns.saturating_sub(self.second_ns) >= SECOND_NS;
        if over {
            self.second_ns = now_ns;
        }
        over
    }

    /// Counts a second of one NSM.
    pub fn second(&mut self, nsm: usize, tenants: &[Arc<Tenant>], present: &[usize]) {
        let Some(resources) = self.nsms.get_mut(nsm) else { return };
        for &index in present.iter().filter(|&&index| tenants[index].is_promised()) {
            let promised = |resource| tenants[index].terms(nsm, resource).guaranteed > 0;
            if !(0..RESOURCES).any(promised) {
                continue;
            }
            let mut met = true;
            for slots in resources.iter_mut() {
                met &= slots.get_mut(index).is_none_or(|slot| slot.watch.take());
            }
            let sum = self.attained.entry((index, nsm)).or_default();
            sum.0 += 1;
            sum.1 += u64::from(met);
        }
    }

    /// By tenant and NSM, since the engine began.
    pub fn attained(&self) -> impl Iterator<Item = ((usize, usize), (u64, u64))> {
        self.attained.iter().map(|(key, sum)| (*key, *sum))
    }

    /// What came on top since the last call.
    pub fn take_attained(&mut self) -> Vec<((usize, usize), (u64, u64))> {
        let mut new = Vec::new();
        for (key, sum) in &self.attained {
            let told = self.told.entry(*key).or_default();
            if told.0 < sum.0 {
                new.push((*key, (sum.0 - told.0, sum.1 - told.1)));
                *told = *sum;
            }
        }
        new
    }
}

/// What a tenant wants of a module's rate, and what it may have. Units per second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    pub guaranteed: u64,
    pub most: u64,
    pub weight: u32,
    /// More than it had when it had to wait.
    pub wanted: u64,
}

/// What a tenant that wants nothing may begin with, until the next division: what its guarantee and weight would give it.
pub(crate) fn start(capacity: u64, weights: u64, d: &Demand) -> u64 {
    let part = (u128::from(capacity) * u128::from(d.weight) / u128::from(weights.max(1))) as u64;
    d.guaranteed.max(part).min(d.most).max(1)
}

/// Divides a capacity: guarantees first, as far as they are wanted, then by weight what is left, nobody more than it wants
/// (max-min fairness). Nobody has less than it may begin with. `weights`: of all, also those that want nothing.
fn divide(capacity: u64, weights: u64, demands: &[Demand]) -> Vec<u64> {
    let limit = |d: &Demand| d.wanted.min(d.most);
    let mut given: Vec<u64> = demands.iter().map(|d| d.guaranteed.min(limit(d))).collect();
    let mut left = capacity.saturating_sub(given.iter().sum());
    let mut open: Vec<usize> = (0..demands.len()).collect();
    loop {
        open.retain(|&i| given[i] < limit(&demands[i]));
        let weights: u64 = open.iter().map(|&i| u64::from(demands[i].weight)).sum();
        if open.is_empty() || left < weights || weights == 0 {
            break;
        }
        let before = left;
        for &i in &open {
            let part = (before as u128 * u128::from(demands[i].weight) / u128::from(weights)) as u64;
            let part = part.min(limit(&demands[i]) - given[i]).min(left);
            given[i] += part;
            left -= part;
        }
        if before == left {
            break;
        }
    }
    let least = |d: &Demand| if d.wanted == UNLIMITED { 1 } else { start(capacity, weights, d) };
    given.into_iter().zip(demands).map(|(given, d)| given.max(least(d)).min(d.most).max(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(guaranteed: u64, weight: u32, wanted: u64) -> Demand {
        Demand { guaranteed, most: UNLIMITED, weight, wanted }
    }

    #[test]
    fn a_capacity_is_divided_by_guarantee_weight_and_want() {
        let all = UNLIMITED;
        let divide = |capacity, demands: &[Demand]| {
            super::divide(capacity, demands.iter().map(|d| u64::from(d.weight)).sum(), demands)
        };
        assert_eq!(divide(900, &[demand(0, 1, all), demand(0, 1, all)]), [450, 450]);
        assert_eq!(divide(900, &[demand(0, 1, all), demand(0, 2, all)]), [300, 600]);
        assert_eq!(divide(1000, &[demand(600, 1, all), demand(0, 1, all)]), [800, 200]);
        // What one does not want is the others'; it may begin with its part nevertheless.
        assert_eq!(divide(900, &[demand(0, 1, all), demand(0, 2, 30)])[0], 870);
        let idle = divide(1000, &[demand(0, 1, all), demand(400, 1, 0)]);
        assert_eq!((idle[0], idle[1]), (1000, 500));
        let capped = divide(1000, &[Demand { most: 100, ..demand(0, 1, all) }, demand(0, 1, all)]);
        assert_eq!(capped, [100, 900]);
        assert!(divide(1, &[demand(0, 1, all), demand(0, 1, all)]).iter().all(|&rate| rate > 0));
        // Those who are not reckoned with change nothing but what one may begin with.
        assert_eq!(super::divide(900, 1000, &[demand(0, 1, all)]), [900]);
        assert_eq!(start(1000, 1000, &demand(0, 1, 0)), 1);
        assert_eq!(start(1000, 1000, &demand(300, 1, 0)), 300);
    }

    /// Slices of 10 ms: what it got of a guarantee of 1,000 a slice, and whether it was held back.
    fn second(slices: &[(u64, bool)]) -> bool {
        let mut watch = Watch::default();
        for &(moved, held_back) in slices {
            watch.slice(100_000, moved, SECOND_NS / 100, held_back);
        }
        watch.take()
    }

    #[test]
    fn a_second_is_not_met_only_if_more_was_wanted_and_less_was_had() {
        assert!(second(&[(0, false); 100]), "nothing was wanted");
        assert!(second(&[(10, false); 100]), "little was wanted");
        assert!(second(&[(1000, true); 100]));
        assert!(second(&[(960, true); 100]), "within 5 %");
        assert!(!second(&[(900, true); 100]));
        // A burst whose last slice is not full.
        assert!(second(&[(0, false), (1000, true), (1000, true), (10, true), (0, false)]));
        // Held back for a tenth of the second.
        let mut short = vec![(0, false); 90];
        short.extend([(500, true); 10]);
        assert!(!second(&short));
        // What was missed in a part of the second may be made up in another.
        let mut made_up = vec![(500, true); 50];
        made_up.extend([(1500, true); 50]);
        assert!(second(&made_up));
    }

    #[test]
    fn a_slice_between_two_seconds_counts_in_the_second_one() {
        let mut watch = Watch::default();
        watch.slice(100_000, 0, SECOND_NS / 100, true);
        assert!(watch.take());
        watch.slice(100_000, 0, SECOND_NS / 100, true);
        assert!(!watch.take());
        assert!(watch.take());
    }
}
