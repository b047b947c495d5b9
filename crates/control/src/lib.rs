//! The control protocol: what a tenant's `netkernel` command and the engine say to each other.
//!
//! One Unix stream socket; newline-delimited JSON. A request is one line, a reply is one line:
//!
//! ```text
//! > {"version":1,"request":"attach","token":"00112233445566778899aabbccddeeff"}
//! < {"version":1,"ok":{"id":7,"token":"0011…","stack":"bbr"}}          + 3 descriptors
//! > {"version":1,"request":"create_guest","stack":"bbrr"}
//! < {"version":1,"error":{"code":"unknown_stack","message":"no stack named 'bbrr'; …"}}
//! ```
//!
//! The replies to `create_guest` and `attach` carry three descriptors (SCM_RIGHTS) with their first byte: region,
//! channel, doorbell, in this order. Several requests may follow one another on a connection.
//! Who asks is told by the kernel (SO_PEERCRED), never by the request. An `attach` is allowed to whoever has the token.
#![deny(unsafe_code)]

mod client;
mod paths;
mod peer;
mod proto;
mod server;

pub use client::{Client, ClientError};
pub use paths::{
    BindError, Endpoint, RUNTIME_DIR_ENV, RuntimeDir, default_socket, fallback_dir, runtime_dir,
};
pub use peer::{Peer, peer_of};
pub use proto::{
    ApiError, Attached, ErrorCode, GuestInfo, NsmInfo, PROTOCOL_VERSION, Request, SocketInfo, Status,
    VersionInfo, parse_token, token_hex,
};
pub use server::{Access, EngineApi, Grant, Server};
