//! `netkernel ss`: one table of the sockets of all guests, as ss(8) prints it.

use std::collections::HashMap;
use std::io::{self, Write as _};

use anyhow::{Result, bail};
use netkernel_control::{SocketInfo, SocketQuery};
use netkernel_engine::{SocketStatus, TcpInfo, bits};
use serde::Serialize;

use crate::args::SsArgs;
use crate::show;

/// A line of the table; the same for programs.
#[derive(Debug, Serialize)]
struct Line {
    netid: &'static str,
    state: String,
    /// Bytes that the program has not read. Of a listener: connections that wait to be accepted.
    recv_q: u32,
    /// Bytes that the peer has not acknowledged. Of a listener: how many may wait.
    send_q: u32,
    local: String,
    peer: String,
    tenant: String,
    nsm: String,
    attachment: String,
    guest: u32,
    id: u32,
    processes: Vec<Holder>,
    congestion_control: Option<String>,
    tcp: Option<TcpInfo>,
}

#[derive(Debug, Serialize)]
struct Holder {
    name: String,
    pid: u32,
    fd: u32,
}

pub fn ss(args: &SsArgs) -> Result<()> {
    for state in &args.state {
        if !KNOWN_STATES.contains(&canonical(state).as_str()) {
            bail!("'{state}' is no state: use one of {}", KNOWN_STATES.join(", ").to_lowercase());
        }
    }
    let query =
        SocketQuery { guest: None, tenant: args.tenant.clone(), nsm: args.nsm.clone(), port: args.port };
    let (mut lines, mut refused, mut answered) = (Vec::new(), None, false);
    for mut client in show::engines(&args.show)? {
        match client.find_sockets(query.clone()) {
            Ok(found) => {
                answered = true;
                lines.extend(found.iter().filter_map(line).filter(|line| wanted(args, line)));
            }
            // A private engine that ended while we looked.
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) if !answered || args.show.socket.is_some() => return Err(error.into()),
        None if !answered => bail!("no engine runs: start one with `netkernel up`"),
        _ => {}
    }
    if args.show.json {
        return show::print_json(&serde_json::json!({ "sockets": lines }));
    }
    print(args, &lines)
}

fn line(socket: &SocketInfo) -> Option<Line> {
    let socket: SocketStatus = crate::catalog::convert(socket)?;
    let any = || {
        socket
            .local
            .as_deref()
            .map_or("0.0.0.0:*", |l| if l.starts_with('[') { "[::]:*" } else { "0.0.0.0:*" })
    };
    Some(Line {
        netid: if socket.kind == "datagram" { "udp" } else { "tcp" },
        state: state(&socket),
        recv_q: socket.receive_queue,
        send_q: socket.send_queue,
        peer: socket.peer.clone().unwrap_or_else(|| any().into()),
        local: socket.local.clone().unwrap_or_else(|| "*:*".into()),
        tenant: socket.tenant,
        nsm: socket.stack,
        attachment: socket.attachment.into(),
        guest: socket.guest,
        id: socket.id,
        processes: (socket.pid != 0)
            .then_some(Holder { name: socket.process, pid: socket.pid, fd: socket.fd })
            .into_iter()
            .collect(),
        congestion_control: socket.congestion_control,
        tcp: socket.tcp,
    })
}

const KNOWN_STATES: [&str; 12] = [
    "ESTAB",
    "SYN-SENT",
    "SYN-RECV",
    "FIN-WAIT-1",
    "FIN-WAIT-2",
    "TIME-WAIT",
    "UNCONN",
    "CLOSE-WAIT",
    "LAST-ACK",
    "LISTEN",
    "CLOSING",
    "CLOSED",
];

/// The state as ss(8) writes it: what TCP says, or what the engine knows where the stack does not tell.
pub(crate) fn state(socket: &SocketStatus) -> String {
    if socket.kind == "datagram" {
        return if socket.peer.is_some() { "ESTAB" } else { "UNCONN" }.into();
    }
    if let Some(tcp) = &socket.tcp
        && tcp.state != "UNCONN"
    {
        return tcp.state.clone();
    }
    match socket.state {
        "listening" => "LISTEN",
        "connecting" => "SYN-SENT",
        "connected" | "accepting" => "ESTAB",
        "peer-closed" | "receiving ended" => "CLOSE-WAIT",
        "half-closed" | "sending ended" if socket.send_queue > 0 => "FIN-WAIT-1",
        "half-closed" | "sending ended" => "FIN-WAIT-2",
        "closing" | "shut" | "ending" => "LAST-ACK",
        "dead" | "over" | "closed" => "CLOSED",
        _ => "UNCONN",
    }
    .into()
}

/// The forms of states that ss(8) takes.
fn canonical(state: &str) -> String {
    match state.to_ascii_lowercase().as_str() {
        "established" | "connected" => "ESTAB".into(),
        "listening" => "LISTEN".into(),
        "unconnected" => "UNCONN".into(),
        other => other.to_ascii_uppercase(),
    }
}

fn wanted(args: &SsArgs, line: &Line) -> bool {
    let protocol = match line.netid {
        "udp" => args.udp || !args.tcp,
        _ => args.tcp || !args.udp,
    };
    let listens = line.state == "LISTEN" || line.state == "UNCONN" && line.netid == "udp";
    let state = if args.state.is_empty() {
        match () {
            () if args.all => true,
            () if args.listening => listens,
            () => !listens && line.state != "UNCONN" && line.state != "CLOSED",
        }
    } else {
        args.state.iter().any(|state| canonical(state) == line.state)
    };
    protocol && state
}

fn print(args: &SsArgs, lines: &[Line]) -> Result<()> {
    let services = if args.numeric { HashMap::new() } else { services() };
    let head = [
        "Netid",
        "State",
        "Recv-Q",
        "Send-Q",
        "Local Address:Port",
        "Peer Address:Port",
        "Tenant",
        "NSM",
        "Attachment",
        "Process",
    ];
    let count = if args.processes { head.len() } else { head.len() - 1 };
    let mut rows: Vec<Vec<String>> = Vec::new();
    if !args.no_header {
        rows.push(head[..count].iter().map(|&text| text.into()).collect());
    }
    for line in lines {
        let mut row = vec![
            line.netid.into(),
            line.state.clone(),
            line.recv_q.to_string(),
            line.send_q.to_string(),
            named(&line.local, line.netid, &services),
            named(&line.peer, line.netid, &services),
            show::printable(&line.tenant),
            show::printable(&line.nsm),
            line.attachment.clone(),
        ];
        if args.processes {
            row.push(holders(&line.processes));
        }
        rows.push(row);
    }
    let widths: Vec<usize> =
        (0..count).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    let mut out = io::stdout().lock();
    let mut infos = lines.iter();
    for (i, row) in rows.iter().enumerate() {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:width$}  "));
        }
        writeln!(out, "{}", text.trim_end())?;
        if i == 0 && !args.no_header {
            continue;
        }
        if let Some(line) = infos.next()
            && args.info
            && let Some(text) = details(line)
        {
            writeln!(out, "\t {text}")?;
        }
    }
    Ok(())
}

/// `users:(("nginx",pid=12,fd=3))`, as ss(8) has it.
fn holders(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    let one = |holder: &Holder| {
        let name: String = show::printable(&holder.name).replace(['"', '\\'], "?");
        format!("(\"{name}\",pid={},fd={})", holder.pid, holder.fd)
    };
    format!("users:({})", holders.iter().map(one).collect::<Vec<_>>().join(","))
}

/// What `-i` adds, in ss(8)'s words. `None`: the stack tells nothing.
fn details(line: &Line) -> Option<String> {
    let tcp = line.tcp.as_ref()?;
    let mut words: Vec<String> = Vec::new();
    words.extend(line.congestion_control.as_deref().map(show::printable));
    if line.state == "LISTEN" {
        return (!words.is_empty()).then(|| words.join(" "));
    }
    let ms = |us: u32| format!("{:.3}", f64::from(us) / 1000.0);
    let rate = |bytes: u64| bits(bytes).replace(' ', "");
    words.push(format!("wscale:{},{}", tcp.window_scale.0, tcp.window_scale.1));
    words.push(format!("rto:{}", tcp.rto_us / 1000));
    if tcp.rtt_us > 0 {
        words.push(format!("rtt:{}/{}", ms(tcp.rtt_us), ms(tcp.rtt_variance_us)));
    }
    words.push(format!("mss:{}", tcp.segment_bytes));
    words.push(format!("cwnd:{}", tcp.congestion_window));
    words.extend(tcp.slow_start_threshold.map(|segments| format!("ssthresh:{segments}")));
    for (name, value) in [
        ("bytes_sent", tcp.bytes_sent),
        ("bytes_retrans", tcp.bytes_retransmitted),
        ("bytes_acked", tcp.bytes_acknowledged),
        ("bytes_received", tcp.bytes_received),
        ("segs_out", tcp.segments_out.into()),
        ("segs_in", tcp.segments_in.into()),
    ] {
        if value > 0 {
            words.push(format!("{name}:{value}"));
        }
    }
    words.extend(tcp.pacing_rate.map(|bytes| format!("pacing_rate {}", rate(bytes))));
    words.extend(tcp.most_pacing_rate.map(|bytes| format!("max_pacing_rate {}", rate(bytes))));
    if tcp.delivery_rate > 0 {
        words.push(format!("delivery_rate {}", rate(tcp.delivery_rate)));
    }
    for (name, value) in [("unacked", tcp.unacknowledged), ("lost", tcp.lost)] {
        if value > 0 {
            words.push(format!("{name}:{value}"));
        }
    }
    words.push(format!("retrans:{}/{}", tcp.retransmitting, tcp.retransmitted));
    if tcp.least_rtt_us > 0 {
        words.push(format!("minrtt:{}", ms(tcp.least_rtt_us)));
    }
    Some(words.join(" "))
}

/// Names of services by protocol and port, of this host.
fn services() -> HashMap<(String, u16), String> {
    let text = std::fs::read_to_string("/etc/services").unwrap_or_default();
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let (Some(name), Some((port, protocol))) =
            (words.next(), words.next().and_then(|word| word.split_once('/')))
        else {
            continue;
        };
        if let Ok(port) = port.parse() {
            names.entry((protocol.to_owned(), port)).or_insert_with(|| name.to_owned());
        }
    }
    names
}

fn named(address: &str, protocol: &str, services: &HashMap<(String, u16), String>) -> String {
    let name = address.rsplit_once(':').and_then(|(host, port)| {
        let name = services.get(&(protocol.to_owned(), port.parse().ok()?))?;
        Some(format!("{host}:{name}"))
    });
    show::printable(&name.unwrap_or_else(|| address.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(kind: &'static str, state: &'static str) -> SocketStatus {
        SocketStatus { kind, state, ..SocketStatus::default() }
    }

    #[test]
    fn states_are_tcps_own_where_the_stack_tells_and_the_engines_elsewhere() {
        assert_eq!(state(&socket("stream", "half-closed")), "FIN-WAIT-2");
        let told = |state: &str| Some(TcpInfo { state: state.into(), ..TcpInfo::default() });
        let mut known = socket("stream", "half-closed");
        known.tcp = told("CLOSING");
        assert_eq!(state(&known), "CLOSING");
        // The kernel's socket is closed, the program's is not.
        let mut dead = socket("stream", "dead");
        dead.tcp = told("UNCONN");
        assert_eq!(state(&dead), "CLOSED");
        let mut udp = socket("datagram", "bound");
        assert_eq!(state(&udp), "UNCONN");
        udp.peer = Some("1.2.3.4:53".into());
        assert_eq!(state(&udp), "ESTAB");
        for word in ["established", "ESTAB", "listening", "close-wait", "fin-wait-1"] {
            assert!(KNOWN_STATES.contains(&canonical(word).as_str()), "{word}");
        }
    }

    #[test]
    fn ports_have_names_and_processes_cannot_forge_lines() {
        let names = HashMap::from([(("tcp".to_owned(), 80), "http".to_owned())]);
        assert_eq!(named("[::1]:80", "tcp", &names), "[::1]:http");
        assert_eq!(named("1.2.3.4:80", "udp", &names), "1.2.3.4:80");
        assert_eq!(named("*:*", "tcp", &names), "*:*");
        let holder = Holder { name: "a\"\n\x1b[2J".into(), pid: 7, fd: 3 };
        assert_eq!(holders(&[holder]), "users:((\"a???[2J\",pid=7,fd=3))");
    }
}
