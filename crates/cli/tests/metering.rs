//! What is metered beside bytes: retransmissions, round trips and processor time, and that what no stack knows is not 0.

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::namespace::{can_run, ip};
use common::{Place, lines, until};
use serde_json::Value;

/// Two namespaces and a cable between them: `near` has 10.8.0.1, `far` 10.8.0.2. They end with the value.
struct Cable {
    near: String,
    far: String,
}

impl Cable {
    fn new(name: &str) -> Cable {
        let own = |end: &str| format!("nkt-{}-{name}-{end}", std::process::id());
        let cable = Cable { near: own("near"), far: own("far") };
        for namespace in [&cable.near, &cable.far] {
            ip(&["netns", "add", namespace]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        let far = cable.far.as_str();
        ip(&["-n", &cable.near, "link", "add", "nk0", "type", "veth", "peer", "name", "nk0", "netns", far]);
        for (namespace, address) in [(&cable.near, "10.8.0.1/24"), (&cable.far, "10.8.0.2/24")] {
            ip(&["-n", namespace, "address", "add", address, "dev", "nk0"]);
            ip(&["-n", namespace, "link", "set", "nk0", "up"]);
        }
        cable
    }

    /// From now on what `near` sends reaches nobody: it goes to a station that there is not.
    fn cut(&self) {
        let nobody = ["lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "nk0"];
        ip(&[&["-n", &self.near, "neigh", "replace", "10.8.0.2"][..], &nobody].concat());
    }

    fn mend(&self) {
        ip(&["-n", &self.near, "neigh", "del", "10.8.0.2", "dev", "nk0"]);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for namespace in [&self.near, &self.far] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

/// Sends a byte and waits for it, as often as it is told to by a line.
const CLIENT: &str = "import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
for line in sys.stdin:
    s.sendall(b'x')
    assert s.recv(1) == b'x'
    print('back', flush=True)
";

/// Echoes; says its port first.
const SERVER: &str = "import socket, threading
s = socket.create_server(('0.0.0.0', 0))
print(s.getsockname()[1], flush=True)
def serve(c):
    while data := c.recv(65536):
        c.sendall(data)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";

struct Client {
    child: Child,
    lines: Receiver<String>,
}

impl Client {
    fn start(mut command: Command) -> Client {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        Client { child, lines }
    }

    fn send(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    fn back(&mut self) {
        assert_eq!(line(&self.lines), "back");
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(common::wait(&mut self.child, "the client ends").success());
    }
}

fn line(lines: &Receiver<String>) -> String {
    lines.recv_timeout(Duration::from_secs(60)).expect("a line")
}

/// Starts what says its port first.
fn serve(mut command: Command) -> (Child, String) {
    let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let port = line(&lines(child.stdout.take().unwrap()));
    (child, port)
}

/// What Prometheus reads.
fn metrics(place: &Place) -> String {
    let mut stream = UnixStream::connect(place.socket()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: netkernel\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The row of an NSM.
fn row(place: &Place, nsm: &str) -> Option<Value> {
    let socket = place.socket();
    let args = ["usage", "--socket", socket.to_str().unwrap(), "--by", "nsm", "--format", "json"];
    let done = place.run(&args);
    let rows: Vec<Value> = serde_json::from_str(&done.succeeds().out).unwrap();
    rows.into_iter().find(|row| row["nsm"] == nsm)
}

#[test]
fn retransmissions_round_trips_and_processor_time_are_metered_on_every_way() {
    if !can_run() {
        return;
    }
    let place = Place::new("metering");
    let cable = Cable::new("metering");
    let ways = ["queued", "direct", "relay"];
    let nsm = |way: &&str| format!("[[nsm]]\nname = \"{way}\"\nnetns = \"{}\"\n", cable.near);
    let nsms: String = ways.iter().map(nsm).collect();
    let database = place.dir.join("usage.redb");
    let config = place.file("engine.toml", &format!("[engine]\nusage = \"{}\"\n{nsms}", database.display()));
    let (client, server) = (place.file("client.py", CLIENT), place.file("server.py", SERVER));
    let (client, socket) = (client.to_str().unwrap(), place.socket());
    let socket = socket.to_str().unwrap();
    let mut served = Command::new("ip");
    served.args(["netns", "exec", &cable.far, "python3", server.to_str().unwrap()]);
    let (mut served, port) = serve(served);
    let port = port.as_str();

    let engine = place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    for way in ways {
        let mut client = Client::start(place.netkernel(&[
            "run", "--socket", socket, "--stack", way, "--attach", way, "--", "python3", client, "10.8.0.2",
            port,
        ]));
        client.send();
        client.back();
        let told = |what: &str| row(&place, way).and_then(|row| row[what].as_f64()).unwrap_or(0.0);
        // A connection that stays open is seen, too. (The relay's only while it carries something.)
        if way != "relay" {
            until("the open connection is metered", || told("rtt_ms") > 0.0);
        }
        let before = told("retransmitted");
        cable.cut();
        client.send();
        if way == "relay" {
            until("the kernel sends again", || {
                let sockets = place.run(&["ss", "--socket", socket, "--json"]).succeeds().json();
                let sockets = sockets["sockets"].as_array().cloned().unwrap_or_default();
                sockets.iter().any(|one| one["tcp"]["retransmitted"].as_u64().unwrap_or(0) > 0)
            });
        } else {
            until("it is metered that the kernel sends again", || told("retransmitted") > before);
        }
        cable.mend();
        client.back();
        client.end();
        until("the end is metered", || told("retransmitted") > before && told("tcp_connections") >= 1.0);
        let row = row(&place, way).unwrap();
        assert_eq!(row["tcp_connections"], 1, "{row}");
        let segments = row["segments"].as_u64().unwrap();
        assert!(segments >= 4 && row["retransmitted"].as_u64().unwrap() < segments, "{row}");
        // Of loopback and veth; a connection was idle for most of it.
        let rtt = row["rtt_ms"].as_f64().unwrap();
        assert!(rtt > 0.0 && rtt < 60_000.0, "{row}");
        assert!(row["rtt_samples"].as_u64().unwrap() >= 1, "{row}");
        // By the engine; of a direct guest it is the agent alone.
        assert!(row["cpu_seconds"].as_f64().unwrap() > 0.0, "{row}");
    }
    let text = metrics(&place);
    for name in
        ["segments_total", "retransmitted_segments_total", "cpu_seconds_total", "tcp_connections_total"]
    {
        let line = format!("netkernel_{name}{{tenant=\"others\",nsm=\"queued\"}} ");
        let value =
            text.lines().find_map(|l| l.strip_prefix(&line)).unwrap_or_else(|| panic!("{line}:\n{text}"));
        assert!(value.parse::<f64>().unwrap() > 0.0, "{line}{value}");
    }
    engine.end();
    served.kill().unwrap();
    served.wait().unwrap();
}

/// What a tenant with a guarantee gets of an NSM: it sends for as long as it is asked to.
fn attainment(name: &str, form: &str, guaranteed: &str) -> (u64, u64) {
    const SENDER: &str = "import socket, sys, threading
l = socket.create_server(('127.0.0.1', 0))
def take():
    c = l.accept()[0]
    while c.recv(1 << 20):
        pass
s = socket.socket()
if len(sys.argv) > 1:
    s.connect(('127.0.0.1', int(sys.argv[1])))
    data = bytes(1 << 20)
    while True:
        s.sendall(data)
print(l.getsockname()[1], flush=True)
take()
";
    let place = Place::new(name);
    // SAFETY: cannot fail and touches no memory.
    let uid = unsafe { libc::geteuid() };
    let text = format!(
        "[engine]\nusage = \"{}\"\n[[nsm]]\nname = \"wide\"\ncapacity = \"4000 Gbit/s\"\nform = \"{form}\"\n\
         [[tenant]]\nname = \"own\"\nusers = [{uid}]\nguaranteed_send = \"{guaranteed}\"\n",
        place.dir.join("usage.redb").display()
    );
    let config = place.file("engine.toml", &text);
    let (sender, socket) = (place.file("sender.py", SENDER), place.socket());
    let socket = socket.to_str().unwrap();
    let engine = place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    let mut native = Command::new("python3");
    native.arg(&sender);
    let (mut native, port) = serve(native);
    let args =
        ["run", "--socket", socket, "--attach", "queued", "--", "python3", sender.to_str().unwrap(), &port];
    let mut guest = place.netkernel(&args).stdin(Stdio::null()).spawn().unwrap();
    let told = || {
        let row = row(&place, "wide")?;
        let number = |key: &str| row.get(key).and_then(Value::as_u64);
        Some((number("sla_seconds")?, number("sla_met_seconds")?))
    };
    until("three seconds are metered", || told().is_some_and(|(seconds, _)| seconds >= 3));
    guest.kill().unwrap();
    guest.wait().unwrap();
    native.kill().unwrap();
    native.wait().unwrap();
    let told = told().unwrap();
    let text = metrics(&place);
    assert!(text.contains("netkernel_sla_met_seconds_total{tenant=\"own\",nsm=\"wide\"} "), "{text}");
    engine.end();
    told
}

#[test]
fn a_guarantee_that_is_kept_and_one_that_is_not_are_told_apart() {
    for form in ["engine", "process"] {
        // A byte a second is had; 3000 Gbit/s nobody can give here.
        let (seconds, met) = attainment(&format!("sla-kept-{form}"), form, "8 bit/s");
        assert_eq!(seconds, met);
        let (seconds, met) = attainment(&format!("sla-missed-{form}"), form, "3000 Gbit/s");
        assert!(met < seconds, "{form}: {met} of {seconds}");
    }
}

#[test]
fn what_no_stack_knows_is_told_as_not_known() {
    let place = Place::new("metering-unknown");
    let database = place.dir.join("usage.redb");
    let text = format!(
        "[engine]\nusage = \"{}\"\n[[nsm]]\nname = \"plain\"\n[[nsm]]\nname = \"joined\"\nstack = \"shm\"\n",
        database.display()
    );
    let config = place.file("engine.toml", &text);
    let (client, server) = (place.file("client.py", CLIENT), place.file("server.py", SERVER));
    let (client, socket) = (client.to_str().unwrap(), place.socket());
    let socket = socket.to_str().unwrap();
    let engine = place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    let guest = |stack: &str, more: &[&str]| {
        let args = ["run", "--socket", socket, "--attach", "queued", "--stack", stack, "--", "python3"];
        place.netkernel(&[&args[..], more].concat())
    };
    let exchange = |stack: &str, port: &str| {
        let mut client = Client::start(guest(stack, &[client, "127.0.0.1", port]));
        client.send();
        client.back();
        client.end();
    };
    // Joined in memory: no segment is sent.
    let (mut served, port) = serve(guest("joined", &[server.to_str().unwrap()]));
    exchange("joined", &port);
    let mut native = Command::new("python3");
    native.arg(&server);
    let (mut native, port) = serve(native);
    exchange("plain", &port);
    native.kill().unwrap();
    native.wait().unwrap();
    until("both are metered", || {
        let bytes = |nsm| row(&place, nsm).map_or(0, |row| row["bytes_in"].as_u64().unwrap());
        bytes("joined") >= 2 && bytes("plain") >= 1 && row(&place, "plain").unwrap()["tcp_connections"] == 1
    });
    let joined = row(&place, "joined").unwrap();
    assert_eq!(joined["tcp_connections"], 0, "{joined}");
    for what in ["segments", "retransmitted", "rtt_ms", "rtt_samples"] {
        assert!(joined.get(what).is_none(), "{joined}");
    }
    let plain = row(&place, "plain").unwrap();
    assert!(plain["rtt_ms"].as_f64().unwrap() > 0.0 && plain["retransmitted"] == 0, "{plain}");
    let usage = |format: &str| {
        let args = ["usage", "--socket", socket, "--by", "nsm", "--format", format];
        place.run(&args).succeeds().out.clone()
    };
    let table = usage("table");
    assert_eq!(table.matches("not known").count(), 2, "{table}");
    // Two cells that are empty.
    assert!(usage("csv").lines().any(|line| line.starts_with("joined,") && line.contains(",,")), "{table}");
    served.kill().unwrap();
    served.wait().unwrap();
    engine.end();
}
