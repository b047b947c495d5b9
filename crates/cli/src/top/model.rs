//! What `netkernel top` knows: looks at an engine, and what became of the counts between two of them.

use std::collections::{BTreeMap, HashMap, VecDeque};

use netkernel_control::{GuestInfo, NsmInfo, Status, TenantInfo};
use netkernel_engine::{SocketStatus, StagesStatus, bits};
use serde::Serialize;
use serde_json::Value;

use crate::show::printable;

/// Points of a history.
pub const HISTORY: usize = 120;

/// One look.
#[derive(Clone, Debug)]
pub struct Look {
    /// Seconds since any fixed time.
    pub at: f64,
    pub status: Status,
    pub stacks: Vec<NsmInfo>,
    /// Only the provider is told.
    pub tenants: Option<Vec<TenantInfo>>,
    /// Only when somebody looks at them.
    pub sockets: Option<Vec<SocketStatus>>,
}

/// Per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    pub bytes_in: f64,
    pub bytes_out: f64,
    pub operations: f64,
}

impl Rates {
    fn add(&mut self, other: Rates) {
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.operations += other.operations;
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct GuestRow {
    pub id: u32,
    pub name: String,
    pub tenant: String,
    pub nsm: String,
    pub attachment: String,
    pub pid: i32,
    pub processes: u64,
    pub sockets: u64,
    #[serde(flatten)]
    pub rates: Rates,
}

/// A tenant or an NSM.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SumRow {
    pub name: String,
    /// Of an NSM: kind of its stack and congestion control. Of a tenant: its limits.
    pub about: String,
    pub guests: u64,
    pub sockets: u64,
    pub connections: Option<u64>,
    #[serde(flatten)]
    pub rates: Rates,
}

#[derive(Clone, Debug, Serialize)]
pub struct SocketRow {
    pub netid: &'static str,
    pub state: String,
    pub local: String,
    pub peer: String,
    pub process: String,
    pub pid: u32,
    pub tenant: String,
    pub nsm: String,
    pub attachment: String,
    pub receive_queue: u32,
    pub send_queue: u32,
    pub rtt_us: Option<u32>,
    #[serde(flatten)]
    pub rates: Rates,
}

/// Samples of one stage since the look before. Nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct StageRow {
    pub nsm: String,
    pub stage: &'static str,
    pub samples: u64,
    pub mean_ns: u64,
    pub p50_ns: u64,
    pub p90_ns: u64,
    pub p99_ns: u64,
    pub most_ns: u64,
}

/// What is shown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Shown {
    pub engine: String,
    pub uptime_seconds: u64,
    /// Between the two looks that the rates are made of.
    pub seconds: f64,
    pub guest_count: usize,
    pub socket_count: u64,
    pub total: Rates,
    pub tenants: Vec<SumRow>,
    pub nsms: Vec<SumRow>,
    pub guests: Vec<GuestRow>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sockets: Vec<SocketRow>,
    pub stages: Vec<StageRow>,
}

#[derive(Debug, Default)]
pub struct Model {
    last: Option<Look>,
    pub shown: Shown,
    /// Rates of before, the newest last: of all, and by name of what they are of.
    pub total_in: VecDeque<u64>,
    pub total_out: VecDeque<u64>,
    pub histories: HashMap<String, VecDeque<u64>>,
}

fn number(details: &serde_json::Map<String, Value>, key: &str) -> u64 {
    details.get(key).and_then(Value::as_u64).unwrap_or(0)
}

fn text(details: &serde_json::Map<String, Value>, key: &str) -> String {
    printable(details.get(key).and_then(Value::as_str).unwrap_or("-"))
}

/// What came on top in so many seconds. Counts that fell began anew.
fn rate(new: u64, old: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { new.saturating_sub(old) as f64 / seconds } else { 0.0 }
}

fn guest_rates(new: &GuestInfo, old: Option<&GuestInfo>, seconds: f64) -> Rates {
    let Some(old) = old else { return Rates::default() };
    let of = |key: &str| rate(number(&new.details, key), number(&old.details, key), seconds);
    Rates { bytes_in: of("bytes_in"), bytes_out: of("bytes_out"), operations: of("operations") }
}

impl Model {
    /// Takes a look, and makes of it and the one before what is shown.
    pub fn take(&mut self, look: Look) {
        let shown = shown(&look, self.last.as_ref());
        if self.last.is_some() {
            push(&mut self.total_in, shown.total.bytes_in);
            push(&mut self.total_out, shown.total.bytes_out);
            let mut histories = HashMap::new();
            let rows = (shown.tenants.iter().map(|t| (format!("tenant {}", t.name), t.rates)))
                .chain(shown.nsms.iter().map(|n| (format!("nsm {}", n.name), n.rates)))
                .chain(shown.guests.iter().map(|g| (format!("guest {}", g.id), g.rates)));
            for (key, rates) in rows {
                // What is gone is forgotten.
                let mut history = self.histories.remove(&key).unwrap_or_default();
                push(&mut history, rates.bytes_in + rates.bytes_out);
                histories.insert(key, history);
            }
            self.histories = histories;
        }
        self.shown = shown;
        self.last = Some(look);
    }
}

fn push(history: &mut VecDeque<u64>, value: f64) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(value as u64);
}

fn shown(look: &Look, last: Option<&Look>) -> Shown {
    let seconds = last.map_or(0.0, |last| look.at - last.at);
    let old: HashMap<u32, &GuestInfo> =
        last.into_iter().flat_map(|last| &last.status.guests).map(|g| (g.id, g)).collect();
    let guests: Vec<GuestRow> = look
        .status
        .guests
        .iter()
        .map(|guest| GuestRow {
            id: guest.id,
            name: printable(&guest.name),
            tenant: text(&guest.details, "tenant"),
            nsm: printable(&guest.stack),
            attachment: text(&guest.details, "attachment"),
            pid: guest.pid,
            processes: guest.processes,
            sockets: guest.sockets,
            rates: guest_rates(guest, old.get(&guest.id).copied(), seconds),
        })
        .collect();
    let mut total = Rates::default();
    let (mut tenants, mut nsms) = (BTreeMap::<String, SumRow>::new(), BTreeMap::<String, SumRow>::new());
    for nsm in &look.stacks {
        let about = match &nsm.congestion_control {
            Some(name) if *name != nsm.stack => format!("{}, {name}", nsm.stack),
            _ => nsm.stack.clone(),
        };
        nsms.insert(
            nsm.name.clone(),
            SumRow { name: nsm.name.clone(), about: printable(&about), ..SumRow::default() },
        );
    }
    for tenant in look.tenants.iter().flatten() {
        let row = SumRow {
            name: tenant.name.clone(),
            about: limits(tenant),
            connections: Some(tenant.connections),
            ..SumRow::default()
        };
        tenants.insert(tenant.name.clone(), row);
    }
    for guest in &guests {
        total.add(guest.rates);
        for (rows, name) in [(&mut tenants, &guest.tenant), (&mut nsms, &guest.nsm)] {
            let row = rows.entry(name.clone()).or_default();
            row.name.clone_from(name);
            row.guests += 1;
            row.sockets += guest.sockets;
            row.rates.add(guest.rates);
        }
    }
    Shown {
        engine: look.status.socket.clone(),
        uptime_seconds: look.status.uptime_seconds,
        seconds,
        guest_count: guests.len(),
        socket_count: guests.iter().map(|g| g.sockets).sum(),
        total,
        tenants: tenants.into_values().collect(),
        nsms: nsms.into_values().collect(),
        guests,
        sockets: sockets(look, last, seconds),
        stages: stages(look, last),
    }
}

fn limits(tenant: &TenantInfo) -> String {
    let most = |key: &str| tenant.details.get(key)?.get("most")?.as_u64();
    match (most("receive"), most("send")) {
        (None, None) => "no limit".into(),
        (receive, send) => {
            let rate = |rate: Option<u64>| rate.map_or_else(|| "no limit".into(), bits);
            format!("in {}, out {}", rate(receive), rate(send))
        }
    }
}

fn sockets(look: &Look, last: Option<&Look>, seconds: f64) -> Vec<SocketRow> {
    // A socket is known by its guest, number and names.
    let key = |s: &SocketStatus| (s.guest, s.id, s.local.clone(), s.peer.clone());
    let bytes = |s: &SocketStatus| match &s.tcp {
        Some(tcp) => (tcp.bytes_received, tcp.bytes_acknowledged),
        None => (s.bytes_in, s.bytes_out),
    };
    let old: HashMap<_, _> = last
        .into_iter()
        .flat_map(|last| last.sockets.iter().flatten())
        .map(|socket| (key(socket), bytes(socket)))
        .collect();
    let row = |socket: &SocketStatus| {
        let (new, old) = (bytes(socket), old.get(&key(socket)));
        let rates = old.map_or(Rates::default(), |old| Rates {
            bytes_in: rate(new.0, old.0, seconds),
            bytes_out: rate(new.1, old.1, seconds),
            operations: 0.0,
        });
        SocketRow {
            netid: if socket.kind == "datagram" { "udp" } else { "tcp" },
            state: crate::ss::state(socket),
            local: socket.local.clone().unwrap_or_else(|| "*:*".into()),
            peer: socket.peer.clone().unwrap_or_else(|| "*:*".into()),
            process: printable(&socket.process),
            pid: socket.pid,
            tenant: printable(&socket.tenant),
            nsm: printable(&socket.stack),
            attachment: socket.attachment.into(),
            receive_queue: socket.receive_queue,
            send_queue: socket.send_queue,
            rtt_us: socket.tcp.as_ref().map(|tcp| tcp.rtt_us).filter(|&us| us > 0),
            rates,
        }
    };
    look.sockets.iter().flatten().map(row).collect()
}

fn stages(look: &Look, last: Option<&Look>) -> Vec<StageRow> {
    let of = |look: &Look| -> BTreeMap<String, StagesStatus> {
        look.status
            .details
            .get("stages")
            .and_then(|v| serde_json::from_value(v.clone()).ok())
            .unwrap_or_default()
    };
    let old = last.map(of).unwrap_or_default();
    let mut rows = Vec::new();
    for (nsm, new) in of(look) {
        let before = old.get(&nsm).cloned().unwrap_or_default();
        for (stage, new, before) in [
            ("queue", &new.queue, &before.queue),
            ("service", &new.service, &before.service),
            ("stack", &new.stack, &before.stack),
        ] {
            let times = new.histogram().since(&before.histogram());
            let at = |part| times.quantile(part).unwrap_or(0);
            rows.push(StageRow {
                nsm: printable(&nsm),
                stage,
                samples: times.count(),
                mean_ns: times.sum_ns().checked_div(times.count()).unwrap_or(0),
                p50_ns: at(0.5),
                p90_ns: at(0.9),
                p99_ns: at(0.99),
                most_ns: at(1.0),
            });
        }
    }
    rows
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::json;

    /// A look at `at` seconds, at two guests that received so much.
    pub fn look(at: f64, first: u64, second: u64) -> Look {
        let guest = |id: u32, name: &str, tenant: &str, nsm: &str, bytes: u64| {
            json!({ "id": id, "name": name, "stack": nsm, "pid": 7, "uid": 0, "processes": 1, "sockets": 3,
                "tenant": tenant, "attachment": "queued", "bytes_in": bytes, "bytes_out": 10, "operations": bytes / 100 })
        };
        let status = json!({
            "engine": { "program": "0", "protocol_version": 1, "abi_version": 2, "pid": 1, "uid": 0 },
            "socket": "/run/e.sock", "private": false, "uptime_seconds": 3700,
            "guests": [guest(1, "web", "blue", "bbr", first), guest(2, "evil\u{1b}[2J", "others", "cubic", second)],
            "stages": { "bbr": {
                "queue": { "sum_ns": at as u64 * 1000, "buckets": [[1024, at as u64]] },
                "service": { "sum_ns": 0, "buckets": [] }, "stack": { "sum_ns": 300, "buckets": [[384, 1]] },
            } },
        });
        let nsm = |name: &str| json!({ "name": name, "stack": "kernel", "congestion_control": name, "netns": null, "available": true });
        let from = |value| serde_json::from_value(value).unwrap();
        Look {
            at,
            status: serde_json::from_value(status).unwrap(),
            stacks: vec![from(nsm("bbr")), from(nsm("cubic"))],
            tenants: Some(vec![
                serde_json::from_value(json!({ "name": "blue", "weight": 1, "guests": 1, "connections": 2,
                    "send": { "guaranteed": 0, "most": 125000000u64 }, "receive": { "guaranteed": 0, "most": null } }))
                .unwrap(),
            ]),
            sockets: None,
        }
    }

    #[test]
    fn rates_are_what_came_on_top_between_two_looks() {
        let mut model = Model::default();
        model.take(look(10.0, 1000, 500));
        assert_eq!((model.shown.total, model.total_in.len()), (Rates::default(), 0));
        model.take(look(12.0, 5000, 500));
        let shown = &model.shown;
        assert_eq!(shown.total, Rates { bytes_in: 2000.0, bytes_out: 0.0, operations: 20.0 });
        assert_eq!((shown.guests[0].rates.bytes_in, shown.guests[1].rates.bytes_in), (2000.0, 0.0));
        assert_eq!(shown.guests[1].name, "evil?[2J");
        let blue = shown.tenants.iter().find(|t| t.name == "blue").unwrap();
        assert_eq!((blue.rates.bytes_in, blue.guests, blue.connections), (2000.0, 1, Some(2)));
        assert_eq!(blue.about, "in no limit, out 1 Gbit/s");
        assert_eq!(shown.nsms.iter().map(|n| n.rates.bytes_in).collect::<Vec<_>>(), [2000.0, 0.0]);
        assert_eq!(model.histories["guest 1"], [2000]);
        // Two samples of about a microsecond are new; the stack's one is not.
        let stage = |name| shown.stages.iter().find(|s| s.stage == name).unwrap();
        assert_eq!((stage("queue").samples, stage("queue").p99_ns, stage("queue").mean_ns), (2, 1024, 1000));
        assert_eq!(stage("stack").samples, 0);
        // An engine that began anew has no negative rates.
        model.take(look(13.0, 10, 0));
        assert_eq!(model.shown.total.bytes_in, 0.0);
    }

    #[test]
    fn a_history_is_bounded_and_what_is_gone_is_forgotten() {
        let mut model = Model::default();
        for i in 0..HISTORY as u64 + 50 {
            model.take(look(i as f64, i * 100, 0));
        }
        assert_eq!((model.total_in.len(), model.histories["guest 1"].len()), (HISTORY, HISTORY));
        let mut empty = look(1000.0, 0, 0);
        empty.status.guests.clear();
        model.take(empty);
        assert!(!model.histories.contains_key("guest 1") && model.histories.contains_key("nsm bbr"));
    }
}
