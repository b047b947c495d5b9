//! On which switch thread a new guest comes.
//!
//! A guest stays on its thread: its sockets are that thread's stack's. So what is chosen is where it begins: *spread*, by turns, or
//! *packed*, on the first thread that has room, so that few threads work and the others sleep; when guests grow, those that come
//! later begin elsewhere.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// How guests are placed on switch threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// By turns.
    #[default]
    Spread,
    /// On the first thread that is less than half busy.
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

    fn now(&self, now_ns: u64) -> u32 {
        let age = |at: &AtomicU64| now_ns.saturating_sub(at.load(Relaxed));
        // A thread that says nothing sleeps.
        let told = if age(&self.told_ns) > NEW_FOR_NS { 0 } else { self.permille.load(Relaxed) };
        let new = if age(&self.new_ns) > NEW_FOR_NS { 0 } else { self.new.load(Relaxed) };
        told.saturating_add(new.saturating_mul(NEW))
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
}
