//! What stacks know of TCP connections, summed up for metering.

/// One connection so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TcpCounts {
    /// Segments that were sent, and those of them that were sent again. Both wrap.
    pub segments: u32,
    pub retransmitted: u32,
    /// Smoothed round trip time in microseconds; 0: none was measured yet.
    pub rtt_us: u32,
}

/// Sums of many connections. Nothing in it: nothing is known, which is not the same as nothing lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpSums {
    /// Connections of which something is known.
    pub connections: u64,
    pub segments: u64,
    pub retransmitted: u64,
    /// Sum of the smoothed round trip times that were seen, in microseconds, and how many: one at the end of each connection, and
    /// one each time that it was looked at while open.
    pub rtt_us: u64,
    pub rtt_samples: u64,
}

impl TcpSums {
    /// A look at a connection. `before`: what the last look at it saw.
    pub fn note(&mut self, before: &mut Option<TcpCounts>, now: TcpCounts) {
        let last = before.unwrap_or_default();
        self.connections += u64::from(before.is_none());
        self.segments += u64::from(now.segments.wrapping_sub(last.segments));
        self.retransmitted += u64::from(now.retransmitted.wrapping_sub(last.retransmitted));
        if now.rtt_us > 0 {
            self.rtt_us += u64::from(now.rtt_us);
            self.rtt_samples += 1;
        }
        *before = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_segment_counts_once_however_often_it_is_looked_at() {
        let mut sums = TcpSums::default();
        let mut first = None;
        let look = |segments, retransmitted, rtt_us| TcpCounts { segments, retransmitted, rtt_us };
        sums.note(&mut first, look(u32::MAX - 1, 3, 0));
        sums.note(&mut first, look(8, 3, 50));
        sums.note(&mut first, look(8, 5, 70));
        let mut second = None;
        sums.note(&mut second, look(1, 0, 30));
        let segments = u64::from(u32::MAX) + 8 + 1 + 1;
        let expected = TcpSums { connections: 2, segments, retransmitted: 5, rtt_us: 150, rtt_samples: 3 };
        assert_eq!(sums, expected);
    }
}
