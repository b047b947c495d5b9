//! Messages of the guest's channel: a Unix SEQPACKET socket that all processes of a guest share and only send on.
//! Each message is one [`Message`] with exactly one descriptor attached (SCM_RIGHTS).

/// Kinds of [`Message`].
pub mod kind {
    /// A process of the guest begins. `a`: process tag (random, non-zero), `b`: pid as the guest sees it.
    /// Descriptor: one end of a Unix stream pair; the process is over when the other end is closed.
    pub const PROCESS: u32 = 1;
    /// `a`: queue set. Descriptor: the eventfd to write when its receive ring has elements and its doorbell is armed.
    pub const DOORBELL: u32 = 2;
    /// A new socket. `a`: id, `b`: domain, `c`: type (without flags), `d`: protocol.
    /// Descriptor: the engine's end of the placeholder pair.
    pub const SOCKET: u32 = 3;
    /// An accepted socket got its placeholder. `a`: id, `b`: generation. Descriptor: as above.
    pub const ACCEPTED: u32 = 4;
    /// The guest put a seccomp filter on itself. `a`: 1 if what cannot be served may use the host's stack, else 0.
    /// `b`: 1 behind a preloaded library. `c`: 1 for a relay (the filter is told of names and options too).
    /// Descriptor: the filter's listener. The guest lives as long as a process has the filter.
    pub const AGENT: u32 = 5;
    /// Asks for the stack's own socket, which is the kernel's. `a`: id, `b`: generation. Descriptor: one end of a Unix stream
    /// pair, on which the answer comes: a positive errno, or 0 with the descriptor (four bytes, little endian). EPERM: the
    /// guest has no agent that gives kernel sockets; EOPNOTSUPP: the stack has none; EBUSY: something was received and not
    /// read; EAGAIN: something is still to be sent.
    pub const HAND_OVER: u32 = 6;
    /// Asks for a memory that this guest has connections in ([`crate::pair`]). `a`: its number. Descriptor and answer as of
    /// HAND_OVER. ENOENT: there is no such memory, or it is not this guest's.
    pub const PAIR: u32 = 7;
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub kind: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    pub d: u32,
    pub reserved: [u32; 3],
}

impl Message {
    pub fn to_bytes(self) -> [u8; 32] {
        let words = [self.kind, self.a, self.b, self.c, self.d, 0, 0, 0];
        let mut out = [0; 32];
        for (chunk, word) in out.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    pub fn from_bytes(bytes: &[u8; 32]) -> Message {
        let word = |i: usize| {
            u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        };
        Message { kind: word(0), a: word(1), b: word(2), c: word(3), d: word(4), reserved: [0; 3] }
    }
}

/// Environment of a guest's processes.
pub mod env {
    /// `region,channel,doorbell`: numbers of the inherited descriptors.
    pub const FDS: &str = "NETKERNEL_FDS";
    /// Path of the engine's control socket, to attach again when the descriptors were closed.
    pub const SOCKET: &str = "NETKERNEL_SOCKET";
    /// The guest's token, 32 hex digits: the right to attach.
    pub const TOKEN: &str = "NETKERNEL_TOKEN";
    /// Path of the preloaded library, to put it back when a program changed `LD_PRELOAD`.
    pub const LIBRARY: &str = "NETKERNEL_LIBRARY";
    /// In the environment given to exec: the new program is no part of the guest (an engine that is started from inside
    /// a guest). The variable is only for the exec; it says nothing to programs that this one starts without it.
    pub const BYPASS: &str = "NETKERNEL_BYPASS";
    /// What a program does that has these variables and cannot attach (a library of another version, an engine that is gone,
    /// a sandbox): `refuse` (the default) fails its INET sockets with ENETDOWN and says why; `warn` says why, and the host
    /// serves them (fail-open); `agent` leaves them to the agent behind the library.
    pub const UNATTACHED: &str = "NETKERNEL_UNATTACHED";
    /// Trace level of GuestLib: `0` silent, `1` what is bypassed and why, `2` every call.
    pub const TRACE: &str = "NETKERNEL_TRACE";
    /// How many seccomp filters the program has of NetKernel. Missing where it has others, too, or where that is not known.
    pub const FILTERS: &str = "NETKERNEL_FILTERS";
    /// All of them, but for [`BYPASS`].
    pub const ALL: [&str; 7] = [FDS, SOCKET, TOKEN, LIBRARY, UNATTACHED, TRACE, FILTERS];
}
