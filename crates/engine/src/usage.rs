//! What guests used: cumulative counts, and nothing lost when a guest ends between two looks.

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
}

impl Usage {
    pub(crate) fn add(&mut self, other: &Usage) {
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.operations += other.operations;
        self.connections += other.connections;
        self.lived_ms += other.lived_ms;
    }

    /// Together with what direct sockets carried.
    pub(crate) fn carry(&mut self, carried: Option<&netkernel_agent::Carried>) {
        if let Some(carried) = carried {
            self.bytes_in += carried.bytes_in;
            self.bytes_out += carried.bytes_out;
        }
    }

    /// No count falls below what it was.
    pub(crate) fn raise(&mut self, new: &Usage) {
        self.bytes_in = self.bytes_in.max(new.bytes_in);
        self.bytes_out = self.bytes_out.max(new.bytes_out);
        self.operations = self.operations.max(new.operations);
        self.connections = self.connections.max(new.connections);
        self.lived_ms = self.lived_ms.max(new.lived_ms);
    }

    /// What came on top of `before`, which is an earlier value of the same counts.
    pub fn since(&self, before: &Usage) -> Usage {
        Usage {
            bytes_in: self.bytes_in.saturating_sub(before.bytes_in),
            bytes_out: self.bytes_out.saturating_sub(before.bytes_out),
            operations: self.operations.saturating_sub(before.operations),
            connections: self.connections.saturating_sub(before.connections),
            lived_ms: self.lived_ms.saturating_sub(before.lived_ms),
        }
    }
}

/// One guest's counts.
#[derive(Clone, Debug)]
pub struct GuestUsage {
    /// Never used twice in the life of an engine.
    pub guest: u32,
    pub name: String,
    pub nsm: String,
    /// `None`: the engine has no tenants configured.
    pub tenant: Option<String>,
    pub uid: u32,
    pub usage: Usage,
    /// It ended; told once, with its last counts.
    pub over: bool,
}

/// Guests that ended and were not asked for yet. Bounded: who never asks does not make the engine grow.
pub(crate) const MAX_OVER: usize = 65_536;
