//! CoreEngine: registers guests and network stack modules (NSMs) and switches queue elements between them.
//!
//! An [`Engine`] runs `switch_threads` threads; each guest belongs to one of them, and each thread has its own instance
//! of the stacks that its guests use, so that the data path takes no lock. The control calls ([`Engine::create_guest`],
//! [`Engine::status`], ...) may be made from any thread.
//!
//! The engine knows no concrete stack: [`StackKinds`] says how a stack of each kind is made.

mod bury;
mod capture;
mod config;
mod cpu;
mod direct;
mod direct_capture;
mod engine;
mod far;
mod handed;
pub mod handover;
pub mod heir;
mod held;
mod keeper;
mod kinds;
mod moves;
mod placement;
mod poller;
pub mod process;
mod relay;
mod sample;
mod seats;
mod shares;
mod sockets;
mod status;
mod tenants;
mod totals;
mod usage;
mod watch;
mod worker;

pub use capture::Unseen;
pub use config::{Attach, EngineConfig, EngineError, GuestFds, GuestSpec, NsmChange, NsmConfig};
pub use engine::Engine;
pub use kinds::StackKinds;
pub use moves::{MovedGuest, StayedSockets};
pub use netkernel_abi::Limits;
pub use netkernel_agent::{Policy, TcpInfo};
pub use netkernel_capture::Target;
pub use netkernel_shm::HugePages;
pub use netkernel_stack_smoltcp::{Cidr, SmoltcpConfig};
pub use placement::Placement;
pub use process::Form;
pub use shares::Attained;
pub use status::{Counters, GuestStatus, SocketStatus, StackStatus, Status};
pub use tenants::{
    Capacity, OTHERS, Rates, Recognise, TenantConfig, TenantStatus, Unkept, admit, bits, same,
};
pub use totals::{StageTimes, StagesStatus, Total};
pub use usage::{GuestUsage, Usage};
