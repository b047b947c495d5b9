use serde::{Deserialize, Deserializer, Serialize};

/// One of the words that [`word`] knows.
pub type Word = &'static str;

/// The engine and its guests, for `ps` and for programs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    pub uptime_seconds: u64,
    pub switch_threads: usize,
    pub guests: Vec<GuestStatus>,
    pub stacks: Vec<StackStatus>,
    pub counters: Counters,
    /// How long the stages of the engine take, by NSM.
    pub stages: std::collections::BTreeMap<String, crate::StagesStatus>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuestStatus {
    pub id: u32,
    pub name: String,
    pub tenant: String,
    pub stack: String,
    pub pid: i32,
    pub uid: u32,
    pub age_seconds: u64,
    pub processes: usize,
    pub sockets: usize,
    /// Queue sets that were used so far and not given back.
    pub queue_sets: usize,
    /// Payload bytes that the guest received and sent.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Queue elements taken from the guest.
    pub operations: u64,
    /// Connections that were accepted or made.
    pub connections: u64,
    /// All that is metered; the counts above are in it.
    #[serde(default)]
    pub usage: crate::Usage,
    /// What its direct sockets of other stacks carried, those that it was on before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<(String, crate::Usage)>,
    pub events: u64,
    pub region_bytes: u64,
    /// Payload memory in the rings of its sockets.
    pub ring_bytes: u64,
    pub switch_thread: usize,
    /// How its sockets are attached: `queued`, `direct`, or `queued, direct` (the agent behind the preloaded library).
    #[serde(deserialize_with = "word")]
    pub attachment: Word,
    /// Of direct attachment: sockets given, refused, and let through to the host's stack (--fail-open).
    pub direct_served: u64,
    pub direct_refused: u64,
    pub direct_let_through: u64,
    /// Its processes, as far as the engine knows them; without an agent only the first one.
    pub pids: Vec<u32>,
    /// On its way to the sums in [`Status`].
    #[serde(default, skip_serializing_if = "crate::StagesStatus::is_empty")]
    pub stages: crate::StagesStatus,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct StackStatus {
    pub name: String,
    pub stack: String,
    pub congestion_control: Option<String>,
    pub netns: Option<String>,
    pub form: crate::Form,
    pub attach: crate::Attach,
    pub capacity: crate::Capacity,
    pub available: bool,
    /// Why it is not available.
    pub reason: Option<String>,
    pub guests: usize,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Counters {
    pub guests_created: u64,
    pub guests_over: u64,
    /// Guests that were ended because they broke the protocol.
    pub violations: u64,
    /// Turns of the switch loops, and how often a switch thread slept.
    pub turns: u64,
    pub sleeps: u64,
    pub doorbells: u64,
    pub wakes: u64,
    /// Processor time of the switch threads, whatever they did.
    pub switch_cpu_ns: u64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SocketStatus {
    pub guest: u32,
    /// Of a queued socket its number in the region, of a direct one its inode.
    pub id: u32,
    /// `queued` or `direct`, and why.
    #[serde(deserialize_with = "word")]
    pub attachment: Word,
    pub reason: std::borrow::Cow<'static, str>,
    /// `stream`, `datagram` or `listener`.
    #[serde(deserialize_with = "word")]
    pub kind: Word,
    #[serde(deserialize_with = "word")]
    pub state: Word,
    pub local: Option<String>,
    pub peer: Option<String>,
    pub receive_ring_bytes: u32,
    pub send_ring_bytes: u32,
    /// Bytes that the program has not read, and that the stack has not taken.
    pub unread_bytes: u32,
    pub unsent_bytes: u32,
    /// Of a stream.
    pub congestion_control: Option<String>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// The first process of the guest that holds it, as which descriptor; 0: none was found.
    pub pid: u32,
    pub fd: u32,
    /// What that process calls itself.
    #[serde(default)]
    pub process: String,
    /// Of the descriptor that the program holds.
    #[serde(default)]
    pub inode: u64,
    #[serde(default)]
    pub tenant: String,
    /// Name of the NSM.
    #[serde(default)]
    pub stack: String,
    /// Bytes that the program has not read, and that the peer has not acknowledged, wherever they are. Of a listener:
    /// connections that wait to be accepted, and how many may.
    #[serde(default)]
    pub receive_queue: u32,
    #[serde(default)]
    pub send_queue: u32,
    #[serde(default)]
    pub tcp: Option<netkernel_agent::TcpInfo>,
    /// A connection in memory that the two guests move themselves.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pair: bool,
}

/// One of the few words and phrases that statuses are made of, from the process of an NSM.
fn word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<&'static str, D::Error> {
    const WORDS: [&str; 29] = [
        "queued",
        "direct",
        "queued, direct",
        "relay",
        "queued, relay",
        "the preloaded library serves it",
        "made past the preloaded library",
        "the guest has no preloaded library",
        "stream",
        "datagram",
        "listener",
        "closing",
        "accepting",
        "listening",
        "dead",
        "connecting",
        "shut",
        "peer-closed",
        "half-closed",
        "connected",
        "bound",
        "open",
        "sending ended",
        "receiving ended",
        "ending",
        "over",
        "closed",
        "handed over",
        "",
    ];
    let text = String::deserialize(deserializer)?;
    Ok(WORDS.into_iter().find(|word| *word == text).unwrap_or("other"))
}
