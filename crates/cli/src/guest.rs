//! What can be done with a running guest.

use anyhow::Result;

use crate::args::GuestCommand;
use crate::locate;

pub fn command(command: &GuestCommand) -> Result<()> {
    let GuestCommand::Move(args) = command;
    let moved = locate::require(args.socket.as_deref())?.move_guest(args.guest, &args.stack)?;
    match args.json {
        true => println!("{}", serde_json::to_string(&moved)?),
        false => println!(
            "guest {}: on stack {}, with the {} sockets that it has",
            args.guest, args.stack, moved.sockets
        ),
    }
    Ok(())
}
