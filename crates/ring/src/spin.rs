//! How long to poll before sleeping. The one place of the waiting policy (DESIGN: who spins, for how long).
//!
//! A wake-up costs the waker about as much as the sleeper gains by polling a few tens of microseconds. [`Spin`] keeps a
//! running estimate of how long waits take, and polls only when the last waits were short enough for polling to pay.

/// An adaptive polling budget. Times are nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    max_ns: u64,
    /// Running mean of wait durations, capped at 8 x `max_ns`.
    mean_ns: u64,
    probes: u32,
}

impl Spin {
    pub const fn new(max_ns: u64) -> Spin {
        Spin { max_ns, mean_ns: max_ns, probes: 0 }
    }

    /// Nanoseconds to poll before the next sleep; 0: sleep at once. One wait in 16 is polled all the same, so that a
    /// change of the load is noticed.
    pub fn budget_ns(&mut self) -> u64 {
        if self.max_ns == 0 {
            return 0;
        }
        if self.mean_ns <= self.max_ns {
            return self.max_ns;
        }
        self.probes = (self.probes + 1) & 15;
        if self.probes == 0 { self.max_ns / 2 } else { 0 }
    }

    /// Tells how long the wait took in the end, sleep included.
    pub fn waited(&mut self, ns: u64) {
        let ns = ns.min(self.max_ns.saturating_mul(8));
        self.mean_ns = (self.mean_ns * 7 + ns) / 8;
    }
}
