//! The control protocol: what a tenant's `netkernel` command and the engine say to each other.
//!
//! HTTP/1.1 with JSON on a Unix stream socket; `docs/openapi.json` describes it, and the engine serves that document:
//!
//! ```text
//! $ curl --unix-socket engine.sock http://netkernel/v1/stacks
//! > POST /v1/attach HTTP/1.1        {"token":"00112233445566778899aabbccddeeff"}
//! < HTTP/1.1 200 OK                 {"id":7,"token":"0011…"}          + 3 descriptors
//! > POST /v1/guests HTTP/1.1        {"stack":"bbrr"}
//! < HTTP/1.1 422 …                  {"error":{"code":"unknown_stack","message":"no stack named 'bbrr'; …"}}
//! ```
//!
//! The replies that give a guest carry three descriptors (SCM_RIGHTS) with their first byte: region, channel, doorbell, in
//! this order. Several requests may follow one another on a connection.
//! Who asks is told by the kernel (SO_PEERCRED, control group, network namespace) or by a token that the request shows
//! (`Authorization: Bearer`): [`Caller`]. An `attach` is allowed to whoever has the token.
#![deny(unsafe_code)]

mod api;
mod caller;
mod client;
mod door;
mod http;
mod openapi;
mod paths;
mod peer;
mod places;
mod proto;
mod server;
mod tls;
mod wire;

pub use api::{
    Destination, EngineChange, NewCapture, NewGuest, PROTOCOL_VERSION, Request, SocketQuery, StackChange,
    TenantChange, Token, UsageQuery, examine,
};
pub use caller::{Access, Caller};
pub use client::{Client, ClientError};
pub use openapi::openapi;
pub use paths::{
    BindError, Endpoint, RUNTIME_DIR_ENV, RuntimeDir, default_socket, fallback_dir, runtime_dir,
};
pub use peer::{Peer, peer_of};
pub use proto::{
    ApiError, Attached, CaptureInfo, ErrorCode, GuestInfo, Moved, NsmInfo, Restarted, SocketInfo, Status,
    Stayed, TenantInfo, VersionInfo, parse_token, token_hex,
};
pub use server::{EngineApi, Grant, Server};
pub use tls::{TlsError, TlsListener};
