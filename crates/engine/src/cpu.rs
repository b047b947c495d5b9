//! Processor time that a switch thread spends on each guest.
//!
//! A thread's clock takes a system call, too much for each piece of work (a turn of a guest with work, a report of its stack, its
//! wake-ups, its closes). So one piece in 64 of each guest, at random distances so that no rhythm of guests agrees with them, is
//! measured on the thread's own clock (CLOCK_THREAD_CPUTIME_ID, which stands still while others run), and stands for all since the
//! last one. Beside that the first piece after 50 ms is measured for itself, so that guests that do little are seen too. What a
//! thread does for nobody (looking for work, control) is in its own sum, and in no guest's.

use netkernel_service::now_ns;

/// Mean number of pieces between two that are measured, and the most.
const EVERY: u32 = 64;
const FOR_ITSELF_NS: u64 = 50_000_000;

/// One guest's.
#[derive(Debug)]
pub(crate) struct CpuClock {
    spent_ns: u64,
    /// Until the next piece that is measured for others too; how many it stands for.
    left: u32,
    stands_for: u32,
    last_ns: u64,
    random: u32,
}

/// A piece that is being measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    at_ns: u64,
    stands_for: u32,
}

impl CpuClock {
    pub fn new(seed: u32) -> CpuClock {
        let mut clock = CpuClock {
            spent_ns: 0,
            left: 0,
            stands_for: 0,
            last_ns: 0,
            random: seed.wrapping_mul(0x9e37_79b9) | 1,
        };
        clock.next();
        clock
    }

    /// A piece begins. `now_ns`: about now.
    #[inline]
    pub fn begin(&mut self, now_ns: u64) -> Option<Begun> {
        if now_ns.saturating_sub(self.last_ns) > FOR_ITSELF_NS {
            self.last_ns = now_ns;
            return Some(Begun { at_ns: thread_cpu_ns(), stands_for: 1 });
        }
        self.left -= 1;
        if self.left > 0 {
            return None;
        }
        let stands_for = self.stands_for;
        self.next();
        Some(Begun { at_ns: thread_cpu_ns(), stands_for })
    }

    pub fn end(&mut self, begun: Begun) {
        let took = thread_cpu_ns().saturating_sub(begun.at_ns);
        self.spent_ns += took.saturating_mul(u64::from(begun.stands_for));
    }

    pub fn spent_ns(&self) -> u64 {
        self.spent_ns
    }

    /// Uniform in 1..=127 (xorshift32: Marsaglia, 2003).
    fn next(&mut self) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        self.left = 1 + self.random % (2 * EVERY - 1);
        self.stands_for = self.left;
    }
}

/// Processor time of the calling thread, in nanoseconds.
pub(crate) fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: time is valid for writes.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } != 0 {
        return now_ns();
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two guests by turns, one of which takes ten times as long: no rhythm makes one of them pay for the other.
    #[test]
    fn pieces_that_were_not_measured_are_stood_for() {
        let mut clocks = [CpuClock::new(1), CpuClock::new(2)];
        let mut measured = [(0u64, 0u64); 2];
        for _ in 0..200_000 {
            for (clock, (pieces, times)) in clocks.iter_mut().zip(&mut measured) {
                // Within the first 50 ms of the clock: none is measured for itself.
                if let Some(begun) = clock.begin(1) {
                    *pieces += u64::from(begun.stands_for);
                    *times += 1;
                }
            }
        }
        for (pieces, times) in measured {
            assert!((199_800..=200_000).contains(&pieces), "{pieces}");
            assert!((200_000 / 80..200_000 / 50).contains(&times), "one in {}", 200_000 / times);
        }
    }

    #[test]
    fn the_first_piece_after_silence_counts_for_itself() {
        let mut clock = CpuClock::new(7);
        let begun = clock.begin(10 * FOR_ITSELF_NS).unwrap();
        assert_eq!(begun.stands_for, 1);
        let until = thread_cpu_ns() + 2_000_000;
        while thread_cpu_ns() < until {}
        clock.end(begun);
        assert!(clock.spent_ns() >= 2_000_000, "{}", clock.spent_ns());
    }
}
