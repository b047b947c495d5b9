//! What guests used: cumulative counts, and nothing lost when a guest ends between two looks.

use netkernel_service::TcpSums;

/// Counts of one guest since it was made. Payload bytes, as the program sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Queue elements taken from the guest.
    pub operations: u64,
    /// Connections that were accepted or made.
    pub connections: u64,
    /// Milliseconds since it was made.
    pub lived_ms: u64,
    /// Processor time that the engine spent on it: see `cpu`.
    #[serde(default)]
    pub cpu_ns: u64,
    /// TCP connections of which the stack knows what follows; 0: nothing of it is known.
    #[serde(default)]
    pub tcp_connections: u64,
    /// Segments sent, and those of them that were sent again.
    #[serde(default)]
    pub segments: u64,
    #[serde(default)]
    pub retransmitted: u64,
    /// Sum of smoothed round trip times that were seen, in microseconds, and how many: one at the end of each connection, and one
    /// each time that it was looked at while open.
    #[serde(default)]
    pub rtt_us: u64,
    #[serde(default)]
    pub rtt_samples: u64,
}

impl Usage {
    fn fields(&mut self) -> [&mut u64; 11] {
        let Usage { bytes_in, bytes_out, operations, connections, lived_ms, cpu_ns, .. } = self;
        let Usage { tcp_connections, segments, retransmitted, rtt_us, rtt_samples, .. } = self;
        [
            bytes_in,
            bytes_out,
            operations,
            connections,
            lived_ms,
            cpu_ns,
            tcp_connections,
            segments,
            retransmitted,
            rtt_us,
            rtt_samples,
        ]
    }

    fn each(&mut self, mut other: Usage, with: impl Fn(u64, u64) -> u64) {
        for (own, other) in self.fields().into_iter().zip(other.fields()) {
            *own = with(*own, *other);
        }
    }

    pub(crate) fn add(&mut self, other: &Usage) {
        self.each(*other, |own, more| own + more);
    }

    /// Together with what direct sockets carried.
    pub(crate) fn carry(&mut self, carried: Option<&netkernel_agent::Carried>) {
        if let Some(carried) = carried {
            self.bytes_in += carried.bytes_in;
            self.bytes_out += carried.bytes_out;
            self.tcp_connections += carried.connections;
            self.segments += carried.segments;
            self.retransmitted += carried.retransmitted;
            self.rtt_us += carried.rtt_us;
            self.rtt_samples += carried.rtt_samples;
        }
    }

    /// What direct sockets carried.
    pub(crate) fn of_carried(carried: &netkernel_agent::Carried) -> Usage {
        let mut usage = Usage::default();
        usage.carry(Some(carried));
        usage
    }

    /// Together with what a stack counted of connections.
    pub(crate) fn with_tcp(mut self, sums: &TcpSums) -> Usage {
        self.tcp_connections += sums.connections;
        self.segments += sums.segments;
        self.retransmitted += sums.retransmitted;
        self.rtt_us += sums.rtt_us;
        self.rtt_samples += sums.rtt_samples;
        self
    }

    /// No count falls below what it was.
    pub(crate) fn raise(&mut self, new: &Usage) {
        self.each(*new, u64::max);
    }

    /// What came on top of `before`, which is an earlier value of the same counts.
    pub fn since(&self, before: &Usage) -> Usage {
        let mut since = *self;
        since.each(*before, u64::saturating_sub);
        since
    }
}

/// One guest's counts.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct GuestUsage {
    /// Never used twice in the life of an engine.
    pub guest: u32,
    pub name: String,
    pub nsm: String,
    /// Which of its stays on that NSM: each begins with counts of 0, and is over when the guest is put on another one.
    #[serde(default)]
    pub stay: u32,
    /// `None`: the engine has no tenants configured.
    pub tenant: Option<String>,
    pub uid: u32,
    pub usage: Usage,
    /// It, or its stay, ended; told once, with the last counts.
    pub over: bool,
}

/// Guests that ended and were not asked for yet. Bounded: who never asks does not make the engine grow.
pub(crate) const MAX_OVER: usize = 65_536;
