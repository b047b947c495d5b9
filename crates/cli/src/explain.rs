//! `netkernel explain`: which stack serves each socket, by which way, and why.

use std::io::{self, Write as _};

use anyhow::{Result, bail};
use netkernel_control::{GuestInfo, SocketInfo};
use serde_json::{Value, json};

use crate::args::{ExplainArgs, ShowArgs};
use crate::{locate, show};

pub fn explain(args: &ExplainArgs) -> Result<()> {
    let show = ShowArgs { socket: args.socket.clone(), json: args.json };
    let mut guests: Vec<(GuestInfo, Vec<SocketInfo>)> = Vec::new();
    for mut client in show::engines(&show)? {
        let status = match client.status() {
            Ok(status) => status,
            // A private engine that ended while we looked.
            Err(error) if args.socket.is_some() || locate::is_remote() => return Err(error.into()),
            Err(_) => continue,
        };
        for guest in status.guests {
            let holds = |pid: u32| {
                numbers(&guest, "pids").any(|own| own == u64::from(pid)) || guest.pid == pid as i32
            };
            if args.pid.is_none_or(holds) {
                let sockets = client.sockets(Some(guest.id)).unwrap_or_default();
                guests.push((guest, sockets));
            }
        }
    }
    if let (Some(pid), true) = (args.pid, guests.is_empty()) {
        bail!("process {pid} belongs to no guest that an engine here knows: its sockets are the host's own");
    }
    if args.json {
        let list: Vec<Value> =
            guests.iter().map(|(guest, sockets)| json!({ "guest": guest, "sockets": sockets })).collect();
        return show::print_json(&json!({ "guests": list }));
    }
    let mut out = io::stdout().lock();
    for (guest, sockets) in &guests {
        writeln!(
            out,
            "guest {} ({}, pid {}): stack {}, attachment {}",
            guest.id,
            show::printable(&guest.name),
            guest.pid,
            guest.stack,
            text(guest.details.get("attachment")),
        )?;
        let count = |key: &str| guest.details.get(key).and_then(Value::as_u64).unwrap_or(0);
        let attachment = text(guest.details.get("attachment"));
        if attachment != "queued" {
            writeln!(
                out,
                "  given {} {}, refused {}, let through to the host's stack {}",
                if attachment.contains("relay") { "by relay" } else { "directly" },
                count("direct_served"),
                count("direct_refused"),
                count("direct_let_through")
            )?;
        } else {
            writeln!(
                out,
                "  no seccomp filter: sockets that the preloaded library does not see are the host's own"
            )?;
        }
        writeln!(
            out,
            "  payload by queues and relay: {} bytes in, {} bytes out",
            count("bytes_in"),
            count("bytes_out")
        )?;
        for socket in sockets {
            let field = |key: &str| text(socket.details.get(key));
            write!(
                out,
                "  {} {} on stack {}, {} -> {}: {}, {}: {}",
                field("kind"),
                socket.id,
                field("stack"),
                field("local"),
                field("peer"),
                field("state"),
                field("attachment"),
                field("reason"),
            )?;
            if field("attachment") != "queued" {
                write!(
                    out,
                    "; {}, {} bytes in, {} bytes out, held by pid {} as {}",
                    field("congestion_control"),
                    field("bytes_in"),
                    field("bytes_out"),
                    field("pid"),
                    field("fd")
                )?;
            }
            writeln!(out)?;
        }
    }
    Ok(())
}

fn numbers<'a>(guest: &'a GuestInfo, key: &str) -> impl Iterator<Item = u64> + use<'a> {
    guest.details.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64)
}

fn text(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => show::printable(text),
        Some(other) => other.to_string(),
    }
}
