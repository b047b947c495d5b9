//! Processes that an engine starts: NSMs of their own, and its heir.

use anyhow::{Context as _, Result, anyhow};
use netkernel_control::{Restarted, StackChange};

use crate::args::{HeirArgs, NsmCommand, NsmProcessArgs, NsmSwapArgs};
use crate::units::Rate;
use crate::{locate, sys};

pub fn command(command: &NsmCommand) -> Result<()> {
    match command {
        NsmCommand::Restart(args) => {
            let restarted = locate::require(args.socket.as_deref())?.restart_stack(&args.name)?;
            tell(&args.name, &restarted, args.json)
        }
        NsmCommand::Swap(args) => {
            let change = change(args)?;
            let swapped = locate::require(args.socket.as_deref())?.swap_stack(&args.name, change)?;
            tell(&args.name, &swapped, args.json)
        }
    }
}

fn tell(name: &str, restarted: &Restarted, json: bool) -> Result<()> {
    match restarted.pause_us {
        _ if json => println!("{}", serde_json::to_string(restarted)?),
        Some(pause) => println!("{name}: exchanged; its guests waited {:.1} ms", pause as f64 / 1000.0),
        None => println!("{name}: has no guests, and so no process yet"),
    }
    Ok(())
}

fn change(args: &NsmSwapArgs) -> Result<StackChange> {
    let binary = match &args.binary {
        None => None,
        Some(path) => {
            // The engine may be somewhere else.
            let path = path.canonicalize().with_context(|| format!("--binary {}", path.display()))?;
            Some(
                path.into_os_string()
                    .into_string()
                    .map_err(|path| anyhow!("--binary {}: is no text", path.display()))?,
            )
        }
    };
    let pacing = match args.pacing.as_deref() {
        None => None,
        Some("none" | "0") => Some(0),
        Some(text) => Some(Rate::parse(text).map(|rate| rate.0).ok_or_else(|| {
            anyhow!("--pacing {text}: is no rate; use one such as \"500 Mbit/s\", or \"none\"")
        })?),
    };
    Ok(StackChange {
        binary,
        congestion_control: args.congestion_control.clone(),
        congestion_policy: args.congestion_policy.clone(),
        pacing,
        mark: args.mark,
    })
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
