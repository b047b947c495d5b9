//! Relay attachment: Unix sockets that behave as the INET sockets of any stack.
//!
//! A program gets one end of a Unix socket pair for each INET socket that it asks for, and the relay holds the other end.
//! Reading, writing, polling, passing, inheriting and closing are the kernel's: no call for bytes is notified. Names,
//! options and what carries an address come to the relay by the seccomp filter ([`netkernel_agent::filter::Watch::Relay`]),
//! and are answered by the [`netkernel_service::Stack`]. One thread for each guest does all of it, with a stack of its own
//! module; it sleeps in one epoll instance and never waits for one call.
//!
//! | module | holds |
//! |---|---|
//! | `relay` | the loop, the table of sockets, the calls that wait |
//! | `calls` | what each system call comes to |
//! | `stream` | bytes between the two ends |
//! | `bulk` | large ones, by splice |
//! | `datagram` | datagrams, and who sent them |
//! | `asked` | what a stack says of a socket |
//! | `left` | a relay that stands still, for the next program of this process |
//! | `lost` | answers of calls that a signal interrupted |
//! | `succession` | another stack for new sockets |
//! | `caller` | memory and descriptors of the thread that asks |
//!
//! Everything here is driven by what a guest does: numbers, addresses and lengths are read once and checked, descriptors
//! are told by the inode of a duplicate, and what may block at a guest's will (its memory, its descriptors) blocks the
//! thread of that guest alone.

mod asked;
mod bulk;
mod caller;
mod calls;
mod datagram;
mod left;
mod lost;
mod relay;
mod socket;
mod stream;
mod succession;
mod sys;
mod tune;

pub use asked::{Asked, ask};
pub use left::{FORMAT, Left, Still, Stopping, left_descriptors, left_sockets, renumber_left, reset_left};
pub use relay::{Link, Relay, Start};
pub use socket::RelaySocket;
pub use succession::Successor;
pub use sys::{duplicate_of, open_thread};
