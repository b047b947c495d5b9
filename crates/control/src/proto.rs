//! Requests and replies as they stand on the wire.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of this protocol; both sides must have the same one.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest request, with its newline.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Longest reply that a client takes: the socket list of an engine with a million sockets stays below.
pub const MAX_REPLY_BYTES: usize = 512 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    Version,
    /// A new guest. Without `stack` the engine's first one.
    CreateGuest {
        #[serde(default)]
        name: Option<String>,
        #[serde(default)]
        stack: Option<String>,
    },
    /// The descriptors of a guest again, for a process that lost them. `token`: 32 hex digits.
    Attach {
        token: String,
    },
    /// The engine and the guests that the caller may see.
    Status,
    Stacks,
    /// Sockets of one guest, or of all that the caller may see.
    Sockets {
        #[serde(default)]
        guest: Option<u32>,
    },
    EndGuest {
        guest: u32,
    },
    /// Ends the engine.
    Stop,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Envelope {
    pub version: u32,
    #[serde(flatten)]
    pub request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    BadRequest,
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

/// What went wrong: a code for programs and one sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    pub program: String,
    pub protocol_version: u32,
    pub abi_version: u32,
    pub pid: u32,
    pub uid: u32,
}

/// Reply to `create_guest` and `attach`; three descriptors come with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    pub id: u32,
    pub token: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
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

#[derive(Clone, Debug, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

#[derive(Clone, Debug, Serialize, Deserialize)]
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
    fn the_documented_lines_are_what_is_spoken() {
        let envelope: Envelope = serde_json::from_str(
            r#"{"version":1,"request":"attach","token":"00112233445566778899aabbccddeeff"}"#,
        )
        .unwrap();
        assert_eq!(envelope.version, 1);
        assert_eq!(envelope.request, Request::Attach { token: "00112233445566778899aabbccddeeff".into() });
        let text = serde_json::to_string(&Envelope { version: 1, request: Request::Status }).unwrap();
        assert_eq!(text, r#"{"version":1,"request":"status"}"#);
        let reply = Reply { version: 1, ok: None, error: Some(ApiError::new(ErrorCode::UnknownStack, "x")) };
        assert_eq!(
            serde_json::to_string(&reply).unwrap(),
            r#"{"version":1,"error":{"code":"unknown_stack","message":"x"}}"#
        );
    }

    #[test]
    fn a_code_of_a_newer_engine_is_taken() {
        let error: ApiError = serde_json::from_str(r#"{"code":"quota","message":"m"}"#).unwrap();
        assert_eq!(error.code, ErrorCode::Other);
    }
}
