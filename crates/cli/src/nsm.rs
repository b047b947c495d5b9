//! Processes that an engine starts: NSMs of their own, and its heir.

use anyhow::{Context as _, Result};

use crate::args::{HeirArgs, NsmCommand, NsmProcessArgs};
use crate::{locate, sys};

pub fn command(command: &NsmCommand) -> Result<()> {
    match command {
        NsmCommand::Restart(args) => {
            let restarted = locate::require(args.socket.as_deref())?.restart_stack(&args.name)?;
            match restarted.pause_us {
                _ if args.json => println!("{}", serde_json::to_string(&restarted)?),
                Some(pause) => {
                    println!("{}: exchanged; its guests waited {:.1} ms", args.name, pause as f64 / 1000.0);
                }
                None => println!("{}: has no guests, and so no process yet", args.name),
            }
            Ok(())
        }
    }
}

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
