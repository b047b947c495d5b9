//! On which switch thread a guest is.
//!
//! *Spread*, by turns; or *packed*, on the first thread that has room, so that few threads work and the others sleep. Guests that
//! are packed change their thread when they grow or shrink ([`crate::seats`]).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// How guests are placed on switch threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// By turns.
    #[default]
    Spread,
    /// On the first thread that is less than half busy; spread when they grow, packed again when they shrink.
    Pack,
}

/// Thousandths of a core, beyond which a thread gets no more guests while another has room.
const FULL: u32 = 500;
/// What a guest is reckoned with of which nothing is known yet, and for how long.
const NEW: u32 = 50;
const NEW_FOR_NS: u64 = 3_000_000_000;

/// How busy a thread is.
#[derive(Debug, Default)]
pub(crate) struct Load {
    permille: AtomicU32,
    told_ns: AtomicU64,
    /// Guests that came lately, and when the first of them did.
    new: AtomicU32,
    new_ns: AtomicU64,
}

impl Load {
    /// Told by the thread about once a second while it works.
    pub fn tell(&self, permille: u32, now_ns: u64) {
        self.permille.store(permille, Relaxed);
        self.told_ns.store(now_ns, Relaxed);
    }

    fn add(&self, now_ns: u64) {
        if now_ns.saturating_sub(self.new_ns.load(Relaxed)) > NEW_FOR_NS {
            self.new_ns.store(now_ns, Relaxed);
            self.new.store(0, Relaxed);
        }
        self.new.fetch_add(1, Relaxed);
    }

    /// Thousandths of a core. A thread that says nothing sleeps.
    pub fn told(&self, now_ns: u64) -> u32 {
        let age_ns = now_ns.saturating_sub(self.told_ns.load(Relaxed));
        if age_ns > NEW_FOR_NS { 0 } else { self.permille.load(Relaxed) }
    }

    pub fn is_full(&self, now_ns: u64) -> bool {
        self.told(now_ns) >= FULL
    }

    fn now(&self, now_ns: u64) -> u32 {
        let new_for_ns = now_ns.saturating_sub(self.new_ns.load(Relaxed));
        let new = if new_for_ns > NEW_FOR_NS { 0 } else { self.new.load(Relaxed) };
        self.told(now_ns).saturating_add(new.saturating_mul(NEW))
    }
}

/// The thread of a new guest.
pub(crate) fn choose<'a>(loads: impl Iterator<Item = &'a Load>, now_ns: u64) -> usize {
    let mut least = (0, u32::MAX, None);
    for (i, load) in loads.enumerate() {
        let busy = load.now(now_ns);
        if busy < least.1 {
            least = (i, busy, Some(load));
        }
        if busy < FULL {
            least = (i, busy, Some(load));
            break;
        }
    }
    if let Some(load) = least.2 {
        load.add(now_ns);
    }
    least.0
}

/// What a thread's guests want together, in thousandths of a core, beyond which one of them goes elsewhere if that helps; and what
/// two threads' guests may want at most to be put together. Far apart, so that nothing goes to and fro.
const GROWN: u32 = 650;
const SHRUNK: u32 = 250;
/// By how much less the busiest thread must have to do after a move.
const WORTH: u32 = 100;
/// For how many looks it must be so.
const GROWN_FOR: u32 = 2;
const SHRUNK_FOR: u32 = 10;

/// Which guest should change its thread. Looks are about a second apart.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    grown: u32,
    shrunk: u32,
}

impl Wanted {
    /// `loads`: by thread, each guest with thousandths of a core since the last look. A guest, and where it should go.
    pub fn tick(&mut self, loads: &[Vec<(u32, u32)>], stays: impl Fn(u32) -> bool) -> Option<(u32, usize)> {
        let sum = |guests: &Vec<(u32, u32)>| guests.iter().map(|(_, permille)| permille).sum::<u32>();
        let sums: Vec<u32> = loads.iter().map(sum).collect();
        let most = (0..sums.len()).max_by_key(|&at| sums[at])?;
        let least = (0..sums.len()).min_by_key(|&at| (sums[at], at))?;
        let free = |at: usize| loads[at].iter().filter(|(guest, _)| !stays(*guest));
        let spread = || {
            let after = |permille: u32| (sums[most] - permille).max(sums[least] + permille);
            let best = free(most).min_by_key(|(_, permille)| after(*permille))?;
            (after(best.1) + WORTH <= sums[most]).then_some((best.0, least))
        };
        // The last thread's guests, the busiest first, to the first that has room.
        let pack = || {
            let last = (0..sums.len()).rev().find(|&at| sums[at] > 0)?;
            let to = (0..last).find(|&at| sums[at] + sums[last] <= SHRUNK)?;
            let one =
                free(last).filter(|(_, permille)| *permille > 0).max_by_key(|(_, permille)| *permille)?;
            Some((one.0, to))
        };
        let (to_spread, to_pack) = if sums[most] >= GROWN { (spread(), None) } else { (None, pack()) };
        self.grown = if to_spread.is_some() { self.grown + 1 } else { 0 };
        self.shrunk = if to_pack.is_some() { self.shrunk + 1 } else { 0 };
        if self.grown >= GROWN_FOR {
            self.grown = 0;
            return to_spread;
        }
        to_pack.filter(|_| self.shrunk >= SHRUNK_FOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn guests_are_packed_until_a_thread_is_busy() {
        let loads: [Load; 3] = Default::default();
        let at = |now: u64| choose(loads.iter(), now);
        // Nothing is known of them: ten to a thread.
        let placed: Vec<usize> = (0..25).map(|_| at(10 * SECOND)).collect();
        assert_eq!([0, 1, 2].map(|i| placed.iter().filter(|&&p| p == i).count()), [10, 10, 5]);
        // They do nothing: there is room on the first.
        assert_eq!(at(20 * SECOND), 0);
        loads[0].tell(900, 30 * SECOND);
        assert_eq!(at(30 * SECOND), 1);
        // It has not said anything for a while: it sleeps.
        assert_eq!(at(40 * SECOND), 0);
        for (load, permille) in loads.iter().zip([900, 700, 800]) {
            load.tell(permille, 50 * SECOND);
        }
        assert_eq!(at(50 * SECOND), 1, "all are busy: the least");
    }

    #[test]
    fn grown_guests_are_spread_when_it_helps_and_has_lasted() {
        let mut wanted = Wanted::default();
        let stays = |guest: u32| guest == 9;
        let grown = [vec![(1, 400), (2, 350), (3, 150)], vec![(4, 100)]];
        assert_eq!(wanted.tick(&grown, stays), None, "once is not enough");
        assert_eq!(wanted.tick(&grown, stays), Some((1, 1)), "500 and 500");
        assert_eq!(wanted.tick(&grown, stays), None, "from the beginning");
        // One guest alone that wants a whole core has it.
        let alone = [vec![(1, 1000), (2, 20)], vec![]];
        assert!((0..10).all(|_| wanted.tick(&alone, stays).is_none()));
        // Only who may not go would help.
        let kept = [vec![(9, 500), (2, 500)], vec![(3, 480)]];
        assert!((0..10).all(|_| wanted.tick(&kept, stays).is_none()));
        assert!((0..10).all(|_| wanted.tick(&[], stays).is_none()));
    }

    #[test]
    fn shrunk_guests_are_packed_again_after_a_while() {
        let mut wanted = Wanted::default();
        let shrunk = [vec![(1, 100)], vec![(2, 10), (3, 40), (4, 0)]];
        let ticks: Vec<_> = (0..10).map(|_| wanted.tick(&shrunk, |_| false)).collect();
        assert!(ticks[..9].iter().all(Option::is_none));
        assert_eq!(ticks[9], Some((3, 0)));
        assert_eq!(wanted.tick(&[vec![(1, 100), (3, 40)], vec![(2, 10)]], |_| false), Some((2, 0)));
        assert_eq!(wanted.tick(&[vec![(1, 150), (2, 10)], vec![(4, 0)]], |_| false), None, "idle ones stay");
        let busy = [vec![(1, 200)], vec![(2, 100)]];
        assert!((0..20).all(|_| wanted.tick(&busy, |_| false).is_none()));
    }
}
