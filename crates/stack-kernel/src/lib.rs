//! The kernel stack: sockets of the host's own kernel.
//!
//! A socket of a guest is a non-blocking kernel socket of the engine, made in the module's network namespace and, for TCP,
//! with the module's congestion control. Payload moves between the guest's rings and the kernel by `sendmsg` and
//! `recvmsg` on the rings' own memory. Readiness comes from one edge-triggered epoll instance.

mod direct;
mod host;
mod options;
mod recover;
mod stack;

pub use direct::DirectSockets;
pub use host::{available_congestion_controls, check};
pub use netkernel_agent::Policy;
pub use stack::KernelStack;

/// How the module is set up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelConfig {
    /// Congestion control of every TCP socket; `None`: the namespace's default.
    pub congestion_control: Option<String>,
    /// Network namespace: a name in `/run/netns`, or a path. `None`: the engine's own.
    pub netns: Option<String>,
    /// What becomes of a program's own choice of a congestion control.
    pub congestion_policy: Policy,
    /// Most bytes per second that each TCP socket sends (SO_MAX_PACING_RATE).
    pub pacing: Option<u64>,
    /// SO_MARK of each socket, for the host's routing and packet filters.
    pub mark: Option<u32>,
}
