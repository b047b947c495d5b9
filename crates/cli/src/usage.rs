//! `netkernel usage`: what was used, and the bill.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, anyhow};
use jiff::{Span, Timestamp, Zoned, civil, tz::TimeZone};
use netkernel_control::UsageQuery;
use netkernel_meter::Row;

use crate::args::{UsageArgs, UsageFormat};
use crate::{locate, show};

pub fn usage(args: &UsageArgs) -> Result<()> {
    let now = Zoned::now();
    let seconds = |text: &Option<String>, option: &str| -> Result<Option<u64>> {
        let Some(text) = text else { return Ok(None) };
        let time = time(text, &now).with_context(|| format!("{option} {text}"))?;
        Ok(Some(u64::try_from(time.as_second()).unwrap_or(0)))
    };
    let query = UsageQuery {
        from: seconds(&args.from, "--from")?,
        to: seconds(&args.to, "--to")?,
        by: Some(args.by.clone()),
    };
    let rows = locate::require(args.socket.as_deref())?.usage(query)?;
    match if args.json { UsageFormat::Json } else { args.format } {
        UsageFormat::Json => show::print_json(&rows),
        UsageFormat::Csv => csv(&rows),
        UsageFormat::Table => table(&rows),
    }
}

/// A point in time: a timestamp, a date or time of this host's time zone, or an age.
fn time(text: &str, now: &Zoned) -> Result<Timestamp> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(date) = text.parse::<civil::DateTime>() {
        return Ok(date.to_zoned(TimeZone::system())?.timestamp());
    }
    let age: Span = text
        .parse()
        .map_err(|_| anyhow!("is no time: use 2026-11-01, 2026-11-01T12:00Z, or an age such as 2h or 30d"))?;
    Ok(now.checked_sub(age.abs())?.timestamp())
}

/// The columns that there are, with their cells. `unknown`: what is said of what no stack knows.
fn columns(rows: &[Row], unknown: &str) -> Vec<(&'static str, Vec<String>)> {
    let mut columns: Vec<(&'static str, Vec<String>)> = Vec::new();
    let mut add = |name, cell: &dyn Fn(&Row) -> Option<String>| {
        if rows.iter().any(|row| cell(row).is_some()) {
            columns.push((name, rows.iter().map(|row| cell(row).unwrap_or_default()).collect()));
        }
    };
    let unknown = || unknown.to_owned();
    let begin = |row: &Row| Timestamp::from_second(i64::try_from(row.begin?).ok()?).ok();
    add("begin", &|row| Some(begin(row)?.strftime("%Y-%m-%dT%H:%MZ").to_string()));
    add("tenant", &|row| row.tenant.clone());
    add("nsm", &|row| row.nsm.clone());
    add("guest", &|row| row.guest.clone());
    add("guest_seconds", &|row| Some(format!("{:.1}", row.guest_seconds)));
    add("connections", &|row| Some(row.connections.to_string()));
    add("operations", &|row| Some(row.operations.to_string()));
    add("bytes_in", &|row| Some(row.bytes_in.to_string()));
    add("bytes_out", &|row| Some(row.bytes_out.to_string()));
    add("cpu_seconds", &|row| Some(format!("{:.3}", row.cpu_seconds)));
    add("retransmitted", &|row| Some(row.retransmitted.map_or_else(unknown, |n| n.to_string())));
    add("rtt_ms", &|row| Some(row.rtt_ms.map_or_else(unknown, |ms| format!("{ms:.3}"))));
    add("sla_seconds", &|row| Some(row.sla_seconds?.to_string()));
    add("sla_met_seconds", &|row| Some(row.sla_met_seconds?.to_string()));
    add("cost", &|row| Some(format!("{:.6}", row.cost?)));
    columns
}

fn table(rows: &[Row]) -> Result<()> {
    if rows.is_empty() {
        eprintln!("netkernel: nothing was used in this time");
        return Ok(());
    }
    let columns = columns(rows, "not known");
    let header: Vec<String> = columns.iter().map(|(name, _)| name.replace('_', " ").to_uppercase()).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let lines = (0..rows.len()).map(|i| columns.iter().map(|(_, cells)| cells[i].clone()).collect());
    show::print_table(&header, lines.collect())
}

/// RFC 4180.
fn csv(rows: &[Row]) -> Result<()> {
    let columns = columns(rows, "");
    let mut out = io::stdout().lock();
    let quoted = |cell: &str| {
        if cell.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", cell.replace('"', "\"\""))
        } else {
            cell.to_owned()
        }
    };
    let header: Vec<String> = columns.iter().map(|(name, _)| (*name).to_owned()).collect();
    write!(out, "{}\r\n", header.join(","))?;
    for i in 0..rows.len() {
        let cells: Vec<String> = columns.iter().map(|(_, cells)| quoted(&cells[i])).collect();
        write!(out, "{}\r\n", cells.join(","))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let now: Zoned = "2026-11-23T12:00:00+00:00[UTC]".parse().unwrap();
        let of = |text: &str| time(text, &now).unwrap().to_string();
        assert_eq!(of("2026-11-01T12:00Z"), "2026-11-01T12:00:00Z");
        assert_eq!(of("2h"), "2026-11-23T10:00:00Z");
        assert_eq!(of("1d"), "2026-11-22T12:00:00Z");
        assert!(of("2026-11-01").starts_with("2026-1"));
        assert!(time("yesterday", &now).unwrap_err().to_string().contains("is no time"));
    }
}
