//! `netkernel stacks`, `ps`, `sockets`, `stop`.

use std::io::{self, Write as _};

use anyhow::{Result, bail};
use netkernel_control::{Client, GuestInfo, NsmInfo, SocketInfo, Status};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::args::{ShowArgs, SocketsArgs, StopArgs};
use crate::config::Config;
use crate::{catalog, locate};

pub fn stacks(args: &ShowArgs) -> Result<()> {
    let client = locate::find(args.socket.as_deref())?.into_iter().next();
    let (engine, stacks) = match client {
        Some(mut client) => (Some(client.path().display().to_string()), client.stacks()?),
        None => (None, catalog::offered(catalog::of(&Config::default())?)?),
    };
    if args.json {
        return print_json(&serde_json::json!({ "engine": engine, "stacks": stacks }));
    }
    if engine.is_none() {
        eprintln!("netkernel: no engine runs; this is what `netkernel up` and private engines would offer");
    }
    let rows = stacks.iter().map(stack_row).collect();
    print_table(&["NAME", "STACK", "CONGESTION CONTROL", "NETNS", "STATE"], rows)
}

fn stack_row(nsm: &NsmInfo) -> Vec<String> {
    let state = match (&nsm.reason, nsm.available) {
        (_, true) => "available".into(),
        (Some(reason), false) => format!("missing: {reason}"),
        (None, false) => "missing".into(),
    };
    vec![
        nsm.name.clone(),
        nsm.stack.clone(),
        nsm.congestion_control.clone().unwrap_or_else(|| "host default".into()),
        nsm.netns.clone().unwrap_or_else(|| "-".into()),
        state,
    ]
}

/// The engines to show: the named one, or all of this user's, private ones too.
pub(crate) fn engines(args: &ShowArgs) -> Result<Vec<Client>> {
    let mut list = locate::find(args.socket.as_deref())?;
    if args.socket.is_none() {
        list.extend(locate::private_engines());
    }
    Ok(list)
}

pub fn ps(args: &ShowArgs) -> Result<()> {
    let mut found: Vec<Status> = Vec::new();
    for mut client in engines(args)? {
        match client.status() {
            Ok(status) => found.push(status),
            // A private engine that ended while we looked.
            Err(e) if args.socket.is_some() || locate::is_remote() => return Err(e.into()),
            Err(_) => {}
        }
    }
    if args.json {
        return print_json(&serde_json::json!({ "engines": found }));
    }
    if found.is_empty() {
        eprintln!(
            "netkernel: no engine runs: start one with `netkernel up`, or a program with `netkernel run`"
        );
        return Ok(());
    }
    let rows = found
        .iter()
        .flat_map(|status| status.guests.iter().map(move |guest| guest_row(status, guest)))
        .collect();
    print_table(&["GUEST", "NAME", "STACK", "PID", "UID", "PROCESSES", "SOCKETS", "ENGINE"], rows)
}

fn guest_row(status: &Status, guest: &GuestInfo) -> Vec<String> {
    vec![
        guest.id.to_string(),
        guest.name.clone(),
        guest.stack.clone(),
        guest.pid.to_string(),
        guest.uid.to_string(),
        guest.processes.to_string(),
        guest.sockets.to_string(),
        if status.private { format!("private, pid {}", status.engine.pid) } else { status.socket.clone() },
    ]
}

pub fn sockets(args: &SocketsArgs) -> Result<()> {
    let mut found: Vec<SocketInfo> = Vec::new();
    let mut missing = None;
    let mut answered = args.guest.is_none();
    for mut client in engines(&args.show)? {
        match client.sockets(args.guest) {
            Ok(list) => {
                answered = true;
                found.extend(list);
            }
            Err(e) => missing = Some(e),
        }
    }
    match missing {
        Some(error) if !answered || args.show.socket.is_some() => return Err(error.into()),
        None if !answered => bail!("no engine runs: start one with `netkernel up`"),
        _ => {}
    }
    if args.show.json {
        return print_json(&serde_json::json!({ "sockets": found }));
    }
    let columns = columns(&found);
    let rows = found
        .iter()
        .map(|socket| {
            let mut row = vec![socket.guest.to_string(), socket.id.to_string()];
            row.extend(columns.iter().map(|c| cell(socket.details.get(c))));
            row
        })
        .collect();
    let heads: Vec<String> = columns.iter().map(|c| c.replace('_', " ").to_uppercase()).collect();
    let mut header = vec!["GUEST", "ID"];
    header.extend(heads.iter().map(String::as_str));
    print_table(&header, rows)
}

/// What everybody looks for first.
const FIRST: [&str; 9] = ["kind", "state", "local", "peer", "stack", "attachment", "process", "pid", "fd"];

/// What the engine tells of sockets.
fn columns(sockets: &[SocketInfo]) -> Vec<String> {
    let mut columns: Vec<String> = Vec::new();
    for (key, value) in sockets.iter().flat_map(|s: &SocketInfo| Map::iter(&s.details)) {
        // `explain` has the long story, `ss -i` and `--json` what TCP knows; what is empty for all is left out.
        let told = key != "reason" && !value.is_object() && !value.is_null() && *value != 0;
        if told && !columns.contains(key) {
            columns.push(key.clone());
        }
    }
    columns.sort_by_key(|key| FIRST.iter().position(|first| first == key).unwrap_or(FIRST.len()));
    columns
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

pub fn stop(args: &StopArgs) -> Result<()> {
    let mut client = locate::require(args.socket.as_deref())?;
    match args.guest {
        Some(guest) => client.end_guest(guest)?,
        None => client.stop()?,
    }
    if args.json {
        let what = if args.guest.is_some() { "guest" } else { "engine" };
        let path = client.path().display().to_string();
        print_json(&serde_json::json!({ "ended": what, "engine": path, "guest": args.guest }))?;
    }
    Ok(())
}

pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

pub(crate) fn print_table(header: &[&str], rows: Vec<Vec<String>>) -> Result<()> {
    let mut widths: Vec<usize> = header.iter().map(|h| h.len()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = io::stdout().lock();
    let header = header.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&printable(cell));
            line.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count()) + 2));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Names come from guests: nothing that a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_sockets_has_what_fits_a_line() {
        let socket = |details| SocketInfo { guest: 1, id: 2, details };
        let Value::Object(listener) = serde_json::json!({
            "congestion_control": "bbr", "kind": "listener", "local": "127.0.0.1:80", "peer": null, "send_queue": 0,
            "reason": "the program is dynamic", "tcp": { "rtt_us": 3 }, "pid": 7,
        }) else {
            unreachable!()
        };
        assert_eq!(columns(&[socket(listener)]), ["kind", "local", "pid", "congestion_control"]);
        assert!(columns(&[]).is_empty());
    }
}
