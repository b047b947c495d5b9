//! What can be done with a running guest.

use anyhow::Result;

use crate::args::GuestCommand;
use crate::{locate, show};

pub fn command(command: &GuestCommand) -> Result<()> {
    let GuestCommand::Move(args) = command;
    let mut client = locate::require(args.socket.as_deref())?;
    let moved = client.move_guest(args.guest, &args.stack, args.all_or_nothing)?;
    if args.json {
        println!("{}", serde_json::to_string(&moved)?);
        return Ok(());
    }
    let sockets = |count: usize| if count == 1 { "1 socket".into() } else { format!("{count} sockets") };
    println!(
        "guest {}: on stack {}, with {} of it that went over",
        args.guest,
        args.stack,
        sockets(moved.sockets)
    );
    for left in &moved.stayed {
        println!(
            "  on stack {} until the end of each: {}, {}",
            show::printable(&left.stack),
            sockets(left.sockets),
            show::printable(&left.reason)
        );
    }
    Ok(())
}
