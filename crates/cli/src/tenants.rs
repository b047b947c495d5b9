//! `netkernel catalog`, `tenants`, `tenant set`, `reload`.

use anyhow::{Result, anyhow};
use netkernel_control::{NsmInfo, TenantChange, TenantInfo};
use netkernel_engine::bits;
use serde_json::{Map, Value};

use crate::args::{ReloadArgs, ShowArgs, TenantArgs, TenantCommand, TenantSetArgs};
use crate::units::Rate;
use crate::{locate, show};

/// The table of NSM, capacity, price that the published system's SLAs are made of.
pub fn catalog(args: &ShowArgs) -> Result<()> {
    let stacks = locate::require(args.socket.as_deref())?.stacks()?;
    if args.json {
        return show::print_json(&serde_json::json!({ "catalog": stacks }));
    }
    let rows = stacks.iter().map(catalog_row).collect();
    show::print_table(&["NSM", "STACK", "CONGESTION CONTROL", "CAPACITY", "CORES", "PRICE"], rows)
}

fn catalog_row(nsm: &NsmInfo) -> Vec<String> {
    let capacity = nsm.details.get("capacity").and_then(Value::as_object);
    let number = |map: Option<&Map<String, Value>>, key: &str| map?.get(key)?.as_u64();
    let parts: Vec<String> = [
        number(capacity, "rate").map(bits),
        number(capacity, "operations").map(|n| format!("{n} operations/s")),
        number(capacity, "connections").map(|n| format!("{n} connections")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let price = |key: &str| nsm.details.get(key).and_then(Value::as_f64);
    let prices: Vec<String> = [
        price("price_per_hour").map(|p| format!("{p} per hour")),
        price("price_per_gb").map(|p| format!("{p} per GB")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let or_dash = |parts: Vec<String>, between: &str| {
        if parts.is_empty() { "-".to_owned() } else { parts.join(between) }
    };
    vec![
        nsm.name.clone(),
        nsm.stack.clone(),
        nsm.congestion_control.clone().unwrap_or_else(|| "host default".into()),
        or_dash(parts, ", "),
        nsm.details.get("cores").and_then(Value::as_f64).map_or_else(|| "-".into(), |n| n.to_string()),
        or_dash(prices, " + "),
    ]
}

pub fn list(args: &ShowArgs) -> Result<()> {
    let tenants = locate::require(args.socket.as_deref())?.tenants()?;
    if args.json {
        return show::print_json(&serde_json::json!({ "tenants": tenants }));
    }
    let rows = tenants.iter().map(tenant_row).collect();
    let header = [
        "TENANT",
        "WEIGHT",
        "GUESTS",
        "CONNECTIONS",
        "SEND",
        "RECEIVE",
        "OPERATIONS/S",
        "BYTES OUT",
        "BYTES IN",
    ];
    show::print_table(&header, rows)
}

fn tenant_row(tenant: &TenantInfo) -> Vec<String> {
    let number = |key: &str| tenant.details.get(key).and_then(Value::as_u64);
    // Guaranteed to most.
    let rates = |key: &str| {
        let rate = |which: &str| tenant.details.get(key)?.get(which)?.as_u64();
        match (rate("guaranteed").filter(|&rate| rate > 0), rate("most")) {
            (None, None) => "no limit".into(),
            (Some(least), None) => format!("{} or more", bits(least)),
            (None, Some(most)) => format!("up to {}", bits(most)),
            (Some(least), Some(most)) => format!("{} to {}", bits(least), bits(most)),
        }
    };
    let at_least = |key: &str| number(key).filter(|&n| n > 0);
    let most = number("most_connections").map(|most| format!(" of {most}")).unwrap_or_default();
    let kept = at_least("guaranteed_connections").map(|n| format!(", {n} kept")).unwrap_or_default();
    let operations = match (at_least("guaranteed_operations"), number("operations_per_second")) {
        (None, None) => "no limit".into(),
        (Some(least), None) => format!("{least} or more"),
        (None, Some(most)) => most.to_string(),
        (Some(least), Some(most)) => format!("{least} to {most}"),
    };
    vec![
        tenant.name.clone(),
        tenant.weight.to_string(),
        tenant.guests.to_string(),
        format!("{}{most}{kept}", tenant.connections),
        rates("send"),
        rates("receive"),
        operations,
        number("bytes_out").unwrap_or(0).to_string(),
        number("bytes_in").unwrap_or(0).to_string(),
    ]
}

pub fn change(args: &TenantArgs) -> Result<()> {
    let TenantCommand::Set(args) = &args.command;
    let change = wanted(args)?;
    if change == TenantChange::default() {
        return Err(anyhow!("nothing to set: name a limit, such as --max-send \"500 Mbit/s\""));
    }
    let mut client = locate::require(args.socket.as_deref())?;
    client.change_tenant(&args.name, change)?;
    if args.json {
        let tenant = client.tenants()?.into_iter().find(|tenant| tenant.name == args.name);
        show::print_json(&serde_json::json!({ "tenant": tenant }))?;
    }
    Ok(())
}

fn wanted(args: &TenantSetArgs) -> Result<TenantChange> {
    let rate = |text: &Option<String>, option: &str| -> Result<Option<u64>> {
        match text.as_deref() {
            None => Ok(None),
            Some("none" | "0") => Ok(Some(0)),
            Some(text) => Rate::parse(text).map(|rate| Some(rate.0)).ok_or_else(|| {
                anyhow!("{option} {text}: is no rate; use one such as \"500 Mbit/s\", or \"none\"")
            }),
        }
    };
    Ok(TenantChange {
        guaranteed_send: rate(&args.guaranteed_send, "--guaranteed-send")?,
        max_send: rate(&args.max_send, "--max-send")?,
        guaranteed_receive: rate(&args.guaranteed_receive, "--guaranteed-receive")?,
        max_receive: rate(&args.max_receive, "--max-receive")?,
        guaranteed_operations: args.guaranteed_operations,
        max_operations: args.max_operations,
        guaranteed_connections: args.guaranteed_connections,
        max_connections: args.max_connections,
        max_guests: args.max_guests,
        weight: args.weight,
    })
}

pub fn reload(args: &ReloadArgs) -> Result<()> {
    let mut client = locate::require(args.socket.as_deref())?;
    client.reload()?;
    if args.json {
        show::print_json(
            &serde_json::json!({ "reloaded": true, "engine": client.path().display().to_string() }),
        )?;
    }
    Ok(())
}
