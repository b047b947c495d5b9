//! ServiceLib: the side of a network stack module that faces the guests.
//!
//! [`Service`] holds the sockets of one guest: it takes the guest's queue elements, drives a [`Stack`], and answers with
//! completions and events. A stack author implements [`Stack`] and nothing else; the queues, the byte rings, memory,
//! wake-ups and the validation of everything that a guest can write stand here.
//!
//! The guest is hostile. What decides anything is kept in private memory; a value that the guest can write is read once,
//! checked, and not read again. Payload is never looked at: a stack gets raw runs of guest memory ([`Segments`]) to hand
//! to system calls or to copy.
#![deny(unsafe_code)]

mod address;
mod blocks;
mod events;
#[allow(unsafe_code)]
mod journal;
mod left;
#[allow(unsafe_code)]
mod memory;
mod namespace;
mod observed;
mod police;
mod policed;
mod service;
mod several;
mod shared;
mod stack;
mod stages;
mod table;
mod tcp;
mod turn;

pub use address::SocketAddress;
pub use events::{MAX_WAKE, URGENT_WAKE};
pub use journal::{Fixed, Plain, take_descriptor};
pub use left::Remains;
pub use memory::{GuestBytes, Segments, now_ns};
pub use namespace::namespace_path;
pub use observed::{Event, Held, Observed, Observer, Payload, Timer};
pub use police::{Bucket, Limits, Places, Police, Quota, Seats, UNLIMITED};
pub use policed::Policed;
pub use service::{Drained, Host, Service, SocketInfo, Stats, Stays, Violation, Went, journal_format};
pub use several::{MOST_STACKS, Several};
pub use shared::{MAX_PLACES, TenantMemory, Terms, Told};
pub use stack::{
    Accepted, Close, Connect, Datagram, Errno, Handle, Member, Paired, Peeked, Progress, RELAYED, Readiness,
    Ready, Received, ReceivedDatagram, SendFlags, Shutdown, Stack, TakeDatagram, key,
};
pub use stages::{Histogram, Stages};
pub use table::Table;
pub use tcp::{TcpCounts, TcpSums};
