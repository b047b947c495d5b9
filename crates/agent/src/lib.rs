//! The seccomp agent: what serves the programs that a preloaded library cannot reach.
//!
//! `netkernel run` puts a [`filter`] on itself before it becomes the program. From then on each creation of an INET socket,
//! in whatever way (static binary, Go, a bare system call), stops in the kernel until the agent answers with a descriptor
//! that it injects (seccomp_unotify(2)). One notification for each socket, none for its data: the socket is the kernel's
//! own, made in the module's network namespace with its congestion control. This is *direct attachment*.
//!
//! | module | holds |
//! |---|---|
//! | [`filter`] | the BPF program, and putting it on |
//! | [`notify`] | the kernel's notification calls |
//! | [`agent`] | the thread that answers |
//! | [`memory`] | the memory of who asked |
//! | [`census`] | the processes of a guest and their INET sockets, by /proc and sock_diag |
//! | [`ledger`] | what connections carried, closed ones included |

pub mod agent;
pub mod census;
mod clock;
pub mod filter;
pub mod gate;
pub mod ledger;
pub mod memory;
pub mod notify;
mod tcp_info;
mod window;

pub use agent::{Agent, Counters, Exchange, Offer, Policy, Settings, SocketRequest, Sockets, TcpCounters};
pub use census::{Census, DirectSocket, Processes, process_name};
pub use clock::ThreadClock;
pub use ledger::{ByGuest, Carried, Known, Ledger};
pub use tcp_info::{TCP_INFO_BYTES, TcpInfo, tcp_state};
pub use window::Ahead;
