//! Processes that an engine starts: NSMs of their own, and its heir.

use anyhow::{Context as _, Result};

use crate::args::{HeirArgs, NsmProcessArgs};
use crate::sys;

/// The hidden subcommand that an engine starts them with.
pub fn process(args: &NsmProcessArgs) -> Result<i32> {
    let control = sys::adopt(args.control_fd).context("bad --control-fd")?;
    sys::raise_descriptor_limit();
    crate::logger::start_inherited(log::LevelFilter::Info);
    Ok(netkernel_engine::process::main(control))
}

/// The hidden subcommand that an engine starts its heir with.
pub fn heir(args: &HeirArgs) -> Result<i32> {
    let control = sys::adopt(args.control_fd).context("bad --control-fd")?;
    sys::raise_descriptor_limit();
    Ok(netkernel_engine::heir::main(control))
}
