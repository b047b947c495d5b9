//! What replies are made of.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    BadRequest,
    /// There is no such path.
    NotFound,
    /// The path is for other methods.
    Method,
    Version,
    Permission,
    UnknownStack,
    UnknownGuest,
    BadToken,
    Limit,
    /// The engine could not do it: the host lacks something.
    Engine,
    /// A code of a newer engine.
    #[serde(other)]
    Other,
}

impl ErrorCode {
    /// Status of the HTTP reply.
    pub fn http_status(self) -> u16 {
        match self {
            ErrorCode::BadRequest => 400,
            ErrorCode::BadToken => 401,
            ErrorCode::Permission => 403,
            ErrorCode::NotFound | ErrorCode::Version | ErrorCode::UnknownGuest => 404,
            ErrorCode::Method => 405,
            ErrorCode::UnknownStack => 422,
            ErrorCode::Limit => 429,
            ErrorCode::Engine | ErrorCode::Other => 503,
        }
    }
}

/// What went wrong: a code for programs and one sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApiError {
    pub code: ErrorCode,
    pub message: String,
}

impl ApiError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> ApiError {
        ApiError { code, message: message.into() }
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionInfo {
    pub program: String,
    pub protocol_version: u32,
    pub abi_version: u32,
    pub pid: u32,
    pub uid: u32,
}

/// A guest that was moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Moved {
    /// Open sockets that went over with it.
    pub sockets: usize,
    /// Open sockets that stay where they are until they end.
    #[serde(default)]
    pub stayed: Vec<Stayed>,
}

/// Sockets that did not go over with their guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stayed {
    pub sockets: usize,
    /// The stack that serves them.
    pub stack: String,
    pub reason: String,
}

/// An exchanged process of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Restarted {
    /// For how long nobody served its guests, in microseconds; none: there was no process.
    pub pause_us: Option<u64>,
}

/// A guest; three descriptors come with it: region, channel, doorbell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Attached {
    pub id: u32,
    pub token: String,
    /// How the stack wants programs to be attached: `auto`, `queued`, `direct`, `relay`.
    #[serde(default)]
    pub attach: String,
    /// The stack has sockets of the kernel to give to programs; else they are relayed.
    #[serde(default)]
    pub direct: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    pub engine: VersionInfo,
    pub socket: String,
    /// Ends by itself after its last guest.
    pub private: bool,
    pub uptime_seconds: u64,
    pub guests: Vec<GuestInfo>,
    /// Everything else that the engine counts.
    #[serde(flatten)]
    pub details: serde_json::Map<String, Value>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GuestInfo {
    pub id: u32,
    pub name: String,
    pub stack: String,
    /// Process that made the guest, as the engine sees it.
    pub pid: i32,
    pub uid: u32,
    pub processes: u64,
    pub sockets: u64,
    /// Everything else that the engine knows of the guest.
    #[serde(flatten)]
    pub details: serde_json::Map<String, Value>,
}

/// A network stack module that the engine offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NsmInfo {
    pub name: String,
    /// Which stack the module runs: `kernel`.
    pub stack: String,
    pub congestion_control: Option<String>,
    pub netns: Option<String>,
    pub available: bool,
    /// Why it is not available.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default)]
    pub guests: u64,
    #[serde(flatten)]
    pub details: serde_json::Map<String, Value>,
}

/// A tenant, its limits, and what it uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TenantInfo {
    pub name: String,
    pub weight: u32,
    pub guests: u64,
    pub connections: u64,
    /// Limits and counters.
    #[serde(flatten)]
    pub details: serde_json::Map<String, Value>,
}

/// A capture that began. The descriptor of a pipe comes with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CaptureInfo {
    /// What of the guests' sockets it does not see, as a sentence; nothing: it sees all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen: Option<String>,
    /// Sockets at the beginning that are the kernel's own, guests that may make more of them, and sockets of connections that
    /// two guests move in memory.
    #[serde(default)]
    pub direct_sockets: u64,
    #[serde(default)]
    pub direct_guests: u64,
    #[serde(default)]
    pub paired_sockets: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SocketInfo {
    pub guest: u32,
    pub id: u32,
    #[serde(flatten)]
    pub details: serde_json::Map<String, Value>,
}

/// A token as it stands in the environment and on the wire.
pub fn token_hex(token: &[u8; 16]) -> String {
    let mut out = String::with_capacity(32);
    for byte in token {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// The inverse of [`token_hex`].
pub fn parse_token(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut token = [0; 16];
    for (i, byte) in token.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_round_trip_and_nonsense_is_refused() {
        let token = [0, 1, 2, 3, 250, 251, 252, 253, 4, 5, 6, 7, 8, 9, 10, 255];
        assert_eq!(parse_token(&token_hex(&token)), Some(token));
        for bad in [
            "",
            "00",
            "zz112233445566778899aabbccddeeff",
            "00112233445566778899aabbccddeeff0",
            "ä0112233445566778899aabbccddeef",
        ] {
            assert_eq!(parse_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_code_of_a_newer_engine_is_taken() {
        let error: ApiError = serde_json::from_str(r#"{"code":"quota","message":"m"}"#).unwrap();
        assert_eq!(error.code, ErrorCode::Other);
    }
}
