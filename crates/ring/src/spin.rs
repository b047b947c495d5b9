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
    /// Of the last polls, so many in a row found nobody else on this core.
    alone: u32,
    /// The last one did.
    shared: bool,
}

/// Polls without somebody else on the core, after which a poller keeps it for a moment.
const ALONE: u32 = 4;
/// Looks before the first yield of a poller that has its core to itself, of one that does not know, and between any two yields.
const FIRST_LOOKS: u32 = 96;
const LOOKS: u32 = 16;
/// The same of a poller that shares its core, as it saw the last time: nobody else runs there while it looks.
const SHARED_LOOKS: u32 = 2;

impl Spin {
    pub const fn new(max_ns: u64) -> Spin {
        Spin { max_ns, mean_ns: max_ns, probes: 0, alone: 0, shared: false }
    }

    /// Begins to poll with a budget of [`Spin::budget_ns`].
    pub fn begin(&self, budget_ns: u64) -> Polling {
        let looks = match self.alone {
            _ if self.shared => SHARED_LOOKS,
            ALONE.. => FIRST_LOOKS,
            _ => LOOKS,
        };
        Polling { looks, ..Polling::new(budget_ns) }
    }

    /// Ends a poll that [`Spin::begin`] began.
    pub fn end(&mut self, polling: &Polling) {
        if polling.shared {
            (self.alone, self.shared) = (0, true);
        } else if polling.yielded {
            (self.alone, self.shared) = (self.alone.saturating_add(1), false);
        }
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

/// One look that took longer than this gave the core to another thread.
const SHARED_NS: u64 = 4_000;
/// A yield that took longer than this gave the core to another thread, if only for a moment.
const OTHER_NS: u64 = 1_000;
/// What such a look is charged: the switch to the other thread and back.
const SWITCH_NS: u64 = 2_000;
/// A look that took longer than this met a thread that does not wait for us: better to be woken than to queue behind it.
const HOG_NS: u64 = 250_000;

/// What is left of one budget of [`Spin::budget_ns`]. A poller gives its core away (`sched_yield`) after every look,
/// because the thread that it waits for may need this very core; the time in which that thread ran is not the poller's
/// expense and must not use up its budget, or two threads that serve each other on one core would sleep and wake each
/// other all the time.
#[derive(Clone, Copy, Debug)]
pub struct Polling {
    budget_ns: u64,
    spent_ns: u64,
    looks: u32,
    yielded: bool,
    shared: bool,
}

impl Polling {
    pub const fn new(budget_ns: u64) -> Polling {
        Polling { budget_ns, spent_ns: 0, looks: LOOKS, yielded: false, shared: false }
    }

    /// How often to look before the next yield. A yield is a system call: who waits for a thread on another core meets it
    /// sooner without; who waits for one on this core waits for nothing meanwhile. So the first yield comes late only
    /// when the last ones found nobody who wanted the core.
    pub fn looks(&mut self) -> u32 {
        core::mem::replace(&mut self.looks, LOOKS)
    }

    /// Accounts one look and the yield after it. False: sleep now.
    pub fn looked(&mut self, took_ns: u64) -> bool {
        self.spent_ns += if took_ns > SHARED_NS { SWITCH_NS } else { took_ns };
        took_ns <= HOG_NS && self.spent_ns < self.budget_ns
    }

    /// Tells how long a yield took.
    pub fn yielded(&mut self, took_ns: u64) {
        self.yielded = true;
        self.shared |= took_ns > OTHER_NS;
    }

    /// Nanoseconds that polling cost so far: what [`Spin::waited`] wants to know after a successful poll.
    pub fn spent_ns(&self) -> u64 {
        self.spent_ns
    }
}
