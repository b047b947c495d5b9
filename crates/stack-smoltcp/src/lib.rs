//! A small stack in user space: smoltcp over a TAP device.
//!
//! It is here to prove the [`Stack`](netkernel_service::Stack) trait with a stack that is not the kernel's, and as the
//! example of `docs/WRITING_A_STACK.md`. smoltcp does the protocols; what stands here is what sockets are beyond them:
//! listeners with a backlog, ports, names, errors, readiness, and closes in the background.
//!
//! - `config`: what an operator says, and whether it can work
//! - `tap`: the device's descriptor; the only unsafe code
//! - `device`: frames out and in, and the way back for those to the stack's own addresses
//! - `packet`: what the stack must know of a frame before smoltcp sees it
//! - `socket`: one socket; `stack`: all of them

#![deny(unsafe_code)]

mod config;
mod device;
mod options;
mod packet;
mod socket;
mod stack;
#[allow(unsafe_code)]
mod tap;

pub use config::{Cidr, SmoltcpConfig, check};
pub use stack::SmoltcpStack;
