//! `netkernel ss`: sockets of every attachment in one table, with their processes, queues and TCP_INFO; filters; who sees what.

mod common;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};

use common::{Place, until};
use serde_json::Value;

/// Listens, connects to itself, sends 1000 bytes that nobody reads; has a UDP socket; tells its port, and waits for the end of stdin.
const PROGRAM: &str = "import socket, sys
s = socket.socket()
s.bind(('127.0.0.1', 0))
s.listen(7)
c = socket.create_connection(s.getsockname())
a, _ = s.accept()
c.sendall(b'x' * 1000)
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
u.bind(('::1', 0))
print(s.getsockname()[1], c.getsockname()[1], flush=True)
sys.stdin.read()
";

/// A guest that waits; ended with the value.
struct Guest {
    child: Child,
    listens: u64,
    connects: u64,
}

impl Guest {
    fn start(place: &Place, args: &[&str]) -> Guest {
        let program = place.file("program.py", PROGRAM);
        let socket = place.socket();
        let mut command = place.netkernel(&["run", "--socket", socket.to_str().unwrap()]);
        command.args(args).args(["--", "python3", program.to_str().unwrap()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mut ports = line.split_whitespace().map(|port| port.parse().unwrap());
        let (listens, connects) = (ports.next().unwrap(), ports.next().unwrap());
        Guest { child, listens, connects }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CONFIG: &str = "[[nsm]]\nname = \"one\"\ncongestion_control = \"cubic\"\n[[nsm]]\nname = \"two\"\n\
    [[tenant]]\nname = \"blue\"\ntoken_file = \"TOKEN\"\n";

#[test]
fn all_attachments_stand_in_one_table_with_processes_queues_and_what_tcp_knows() {
    let place = Place::new("ss");
    let token = place.file("token", "blue-token-of-thirty-two-characters\n");
    let text = CONFIG.replace("TOKEN", token.to_str().unwrap());
    let (socket, config) = (place.socket(), place.file("engine.toml", &text));
    let socket = socket.to_str().unwrap();
    let engine = place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    let blue = ["--tenant-token", token.to_str().unwrap()];
    let queued = Guest::start(&place, &[&["--stack", "one", "--attach", "queued"], &blue[..]].concat());
    let direct = Guest::start(&place, &["--stack", "two", "--attach", "direct"]);
    let relay = Guest::start(&place, &["--stack", "two", "--attach", "relay"]);
    let list = |args: &[&str]| -> Vec<Value> {
        let args = [&["ss", "--json", "--socket", socket], args].concat();
        serde_json::from_value(place.run(&args).json()["sockets"].clone()).unwrap()
    };
    let find = |list: &[Value], local: u64, peer: Option<u64>| -> Value {
        let end = |value: &Value, port: u64| value.as_str().unwrap().ends_with(&format!(":{port}"));
        let mut found = list.iter().filter(|s| s["netid"] == "tcp" && end(&s["local"], local));
        let one = match peer {
            Some(peer) => found.find(|s| end(&s["peer"], peer)),
            None => found.find(|s| s["state"] == "LISTEN"),
        };
        one.unwrap_or_else(|| panic!("no socket {local} {peer:?} in {list:?}")).clone()
    };

    for (guest, attachment, nsm, tenant) in [
        (&queued, "queued", "one", "blue"),
        (&direct, "direct", "two", "others"),
        (&relay, "relay", "two", "others"),
    ] {
        let all = list(&["-a"]);
        let listener = find(&all, guest.listens, None);
        let accepted = find(&all, guest.listens, Some(guest.connects));
        let client = find(&all, guest.connects, Some(guest.listens));
        for socket in [&listener, &accepted, &client] {
            assert_eq!(socket["attachment"], attachment);
            assert_eq!((&socket["nsm"], &socket["tenant"]), (&nsm.into(), &tenant.into()));
            let holder = &socket["processes"][0];
            assert_eq!(holder["name"], "python3", "{socket}");
            assert_eq!(holder["pid"], guest.child.id(), "{socket}");
            assert!(holder["fd"].as_u64().unwrap() > 2, "{socket}");
        }
        // What the kernel says of a backlog of 7 is 7.
        assert_eq!((&listener["recv_q"], &listener["send_q"]), (&0.into(), &7.into()), "{listener}");
        assert_eq!(accepted["state"], "ESTAB");
        if attachment != "relay" {
            // A relay's bytes are on their way in the program's own end.
            assert_eq!(accepted["recv_q"], 1000, "{accepted}");
        }
        until("all is acknowledged", || {
            find(&list(&["-t"]), guest.connects, Some(guest.listens))["send_q"] == 0
        });
        let tcp = &find(&list(&["-t"]), guest.connects, Some(guest.listens))["tcp"];
        assert_eq!(tcp["bytes_sent"], 1000, "{tcp}");
        assert!(tcp["rtt_us"].as_u64().unwrap() > 0, "{tcp}");
        assert!(tcp["congestion_window"].as_u64().unwrap() > 0, "{tcp}");
        let udp = all.iter().filter(|s| s["netid"] == "udp" && s["attachment"] == attachment);
        assert_eq!(udp.map(|s| &s["state"]).collect::<Vec<_>>(), ["UNCONN"]);
    }

    // Filters.
    let tenants = |list: &[Value]| list.iter().all(|s| s["tenant"] == "blue") && list.len() == 4;
    assert!(tenants(&list(&["-a", "--tenant", "blue"])), "{:?}", list(&["-a", "--tenant", "blue"]));
    assert!(tenants(&list(&["-a", "--nsm", "one"])));
    assert!(list(&["-a", "--nsm", "one", "--tenant", "others"]).is_empty());
    let port = direct.connects.to_string();
    assert_eq!(list(&["-a", "--port", &port]).len(), 2);
    assert!(list(&["-u", "--port", &port]).is_empty());
    assert!(list(&["-l"]).iter().all(|s| s["state"] == "LISTEN" || s["state"] == "UNCONN"));
    assert_eq!(list(&["-lt"]).len(), 3);
    assert_eq!(list(&["-t"]).len(), 6);
    assert_eq!(list(&["--state", "listening"]).len(), 3);
    place.run(&["ss", "--socket", socket, "--state", "sleeping"]).fails(125, &["'sleeping' is no state"]);

    // For people.
    let text = place.run(&["ss", "--socket", socket, "-tanpi", "--nsm", "one"]).succeeds().out.clone();
    let mut lines = text.lines();
    assert!(lines.next().unwrap().starts_with("Netid  State   Recv-Q  Send-Q  Local Address:Port"), "{text}");
    let pid = queued.child.id();
    assert!(text.contains(&format!("queued      users:((\"python3\",pid={pid},fd=")), "{text}");
    assert!(text.contains("\t cubic wscale:") && text.contains(" cwnd:10 "), "{text}");
    let bare = place.run(&["ss", "--socket", socket, "-tH"]).succeeds().out.clone();
    assert_eq!(bare.lines().count(), 6, "{bare}");

    drop((queued, direct, relay));
    until("nothing is left", || list(&["-a"]).is_empty());
    engine.end();
}
