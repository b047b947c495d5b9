//! What tries NetKernel with real programs: scenarios, the processes that they start, their ports, files and watchdogs.
//!
//! A [`Scenario`] is a function that gets a [`Ctx`], starts programs in a role (server, client, neither) and asserts what
//! they did. The runner runs it once for each [`Mode`]: the mode alone decides which roles become guests of an engine.
//! Each run is a process of its own with its own directory, ports and engine; when it ends, nothing of it is left.
#![forbid(unsafe_code)]

mod cmd;
mod ctx;
mod engine;
pub mod net;
pub mod process;
pub mod runner;
mod scenario;
pub mod tools;

pub use cmd::{Cmd, Output, Proc, Shell, code_of};
pub use ctx::{Ctx, same_bytes};
pub use engine::Engine;
pub use scenario::{Mode, Scenario};
