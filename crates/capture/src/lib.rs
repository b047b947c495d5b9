//! Captures what the guests of a tenant send and receive.
//!
//! A [`Tap`] looks on at a stack ([`netkernel_service::Observed`]) and makes packets of what it sees of captured guests: what
//! stands in a capture is known by the socket's owner, never by addresses, so that nobody else's bytes can be in it. The
//! headers are synthetic; payload, order and times are those at the border between the engine and the stack. A [`Session`]
//! takes the packets, and a thread writes them as pcapng ([`pcapng`]). A stack never waits for who reads: what does not fit is
//! counted and told.
#![forbid(unsafe_code)]

mod packet;
pub mod pcapng;
mod session;
mod tap;

pub use packet::{Header, Way, packet};
pub use session::{QUEUED_BYTES, Session, Target, Written, write};
pub use tap::{Known, Tap, Taps};
