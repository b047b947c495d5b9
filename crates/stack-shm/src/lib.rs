//! The shared-memory stack: connections between guests of one engine, with no TCP underneath.
//!
//! [`ShmStack`] stands in front of another stack, the *fallback*. Each socket has one of the fallback's as its shadow, which
//! holds its options and its port. `listen` opens the shadow's port to the world and tells the [`Hub`]; a `connect` that
//! leads to a listener of the hub, and that the policy allows, becomes a link in memory, and any other one the fallback's.
//!
//! Two guests of one tenant get memory that both map, and move their payload themselves ([`Settings::pair`]). For others the
//! engine does it. Payload moves once: from the sender's ring into the receiver's. Small pieces go by way of a bounded queue, so that a sender
//! need not be asked again when its peer has received them.

mod allowed;
mod hub;
mod inbox;
mod left;
mod link;
mod pairs;
mod post;
mod stack;

pub use allowed::Allowed;
pub use hub::{Hub, Network};
pub use left::FORMAT;
pub use stack::{Settings, ShmStack};
