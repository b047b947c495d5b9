//! What one guest may do in one turn of its switch thread, so that the others' turns come.
//!
//! Deficit round robin (Shreedhar and Varghese, 1995). The unit is a byte; what takes longer than its bytes is charged as the
//! bytes that would take as long, at about 10 GB/s: no clock is read.

/// A call of the stack that moves bytes, beside these bytes.
pub const CALL: u32 = 8 << 10;
/// A datagram, as more of them go through one call.
pub const DATAGRAM: u32 = 8 << 10;
/// A job: an option, a name, a connection that is begun.
pub const JOB: u32 = 32 << 10;
/// An element that only says that there are bytes.
pub const ELEMENT: u32 = 512;
/// A socket that is made, accepted, or closed.
pub const SOCKET: u32 = 64 << 10;
/// What is moved by one call at least: smaller pieces cost more calls than they spare others waiting.
const LEAST: u32 = 64 << 10;
/// Debt beyond this is forgiven.
const MOST_DEBT: i64 = 4 << 20;

#[derive(Clone, Copy, Debug)]
pub struct Turn {
    left: i64,
    /// Charged all that time.
    spent: u64,
    /// What is done now cannot wait; it is charged nevertheless.
    urgent: bool,
}

impl Turn {
    pub const fn new() -> Turn {
        Turn { left: i64::MAX, spent: 0, urgent: false }
    }

    /// A new turn. What was overdrawn in the last one is missing in this one. `u32::MAX`: no end.
    #[inline]
    pub fn begin(&mut self, quantum: u32) {
        self.left = match quantum {
            u32::MAX => i64::MAX,
            _ => self.left.clamp(-MOST_DEBT, 0) + i64::from(quantum),
        };
    }

    pub fn set_urgent(&mut self, urgent: bool) {
        self.urgent = urgent;
    }

    #[inline]
    pub fn is_over(&self) -> bool {
        self.left <= 0 && !self.urgent
    }

    #[inline]
    pub fn charge(&mut self, units: u32) {
        self.left -= i64::from(units);
        self.spent += u64::from(units);
    }

    /// Of `want` bytes, those that one call may move.
    #[inline]
    pub fn most(&self, want: u32) -> u32 {
        if self.urgent {
            return want;
        }
        let left = u32::try_from(self.left.max(0)).unwrap_or(u32::MAX);
        want.min(left.max(LEAST))
    }

    pub fn spent(&self) -> u64 {
        self.spent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_overdraws_pays_with_the_next_turns() {
        let mut turn = Turn::new();
        turn.charge(1 << 30);
        assert!(!turn.is_over() && turn.most(u32::MAX) == u32::MAX);
        turn.begin(100_000);
        assert_eq!(turn.most(1 << 20), 100_000);
        turn.charge(250_000);
        assert!(turn.is_over());
        turn.begin(100_000);
        assert!(turn.is_over());
        turn.begin(100_000);
        assert_eq!((turn.is_over(), turn.most(1 << 20), turn.most(9)), (false, LEAST, 9));
        // What was not used is not kept.
        turn.begin(100_000);
        assert_eq!(turn.most(1 << 20), 100_000);
        turn.charge(u32::MAX);
        turn.begin(100_000);
        let turns = (0..1000).take_while(|_| (turn.is_over(), turn.begin(100_000)).0).count();
        assert_eq!(turns as i64, MOST_DEBT / 100_000);
        turn.begin(u32::MAX);
        assert!(!turn.is_over());
    }

    #[test]
    fn what_cannot_wait_is_charged_nevertheless() {
        let mut turn = Turn::new();
        turn.begin(10);
        turn.charge(20);
        turn.set_urgent(true);
        assert!(!turn.is_over());
        assert_eq!(turn.most(1 << 30), 1 << 30);
        turn.charge(80);
        turn.set_urgent(false);
        turn.begin(50);
        assert!(turn.is_over());
        assert_eq!(turn.spent(), 100);
    }

    /// Two guests, one with many small pieces of work, one with few large ones: over many turns both get their parts.
    #[test]
    fn shares_are_by_quantum_whatever_the_pieces() {
        let mut turns = [Turn::new(), Turn::new()];
        let (quanta, pieces) = ([256 << 10, 64 << 10], [1 << 20, 700]);
        let mut moved = [0u64; 2];
        for _ in 0..100_000 {
            for i in 0..2 {
                turns[i].begin(quanta[i]);
                while !turns[i].is_over() {
                    let n = turns[i].most(pieces[i]);
                    turns[i].charge(n);
                    moved[i] += u64::from(n);
                }
            }
        }
        let ratio = moved[0] as f64 / moved[1] as f64;
        assert!((ratio - 4.0).abs() < 0.05, "{ratio}");
    }
}
