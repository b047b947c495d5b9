//! Tenants: who they are, what they may use, and what becomes of who wants more. Rates are checked from below only: what is
//! limited cannot be faster than its limit, however slow the machine is. How exact they are is measured by `netkernel bench`.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::python::{CONNECTED, Python};
use common::tenants::{Rig, Running};
use common::until;

#[test]
fn connections_that_are_guaranteed_are_kept_for_their_tenant() {
    let rig = Rig::new("tenants-places");
    let token = |name: &str, digit: char| {
        rig.place.file(name, &format!("{}\n", digit.to_string().repeat(32))).to_str().unwrap().to_owned()
    };
    let (kept, others) = (token("kept", '1'), token("others", '2'));
    let text = format!(
        "[[nsm]]\nname = \"few\"\ncapacity_connections = 5\ncapacity_operations = 1000000\n\
         [[tenant]]\nname = \"kept\"\ntoken_file = \"{kept}\"\nguaranteed_connections = 3\nguaranteed_operations = 1000\n\
         [[tenant]]\nname = \"greedy\"\ntoken_file = \"{others}\"\n"
    );
    let config = rig.place.file("engine.toml", &text);
    let engine = rig.place.up(&["--socket", &rig.socket, "--config", config.to_str().unwrap()]);
    let connects =
        |client: &mut Running, n: usize| -> Vec<String> { (0..n).map(|_| client.line()).collect() };
    let mut greedy = rig.client(&["--attach", "queued", "--tenant-token", &others], &["connect", "4"]);
    assert_eq!(connects(&mut greedy, 4), ["0", "0", "EADDRNOTAVAIL", "EADDRNOTAVAIL"]);
    let mut modest = rig.client(&["--attach", "queued", "--tenant-token", &kept], &["connect", "4"]);
    assert_eq!(connects(&mut modest, 4), ["0", "0", "0", "EADDRNOTAVAIL"]);
    let refused = rig.ask(&["tenant", "greedy", "--guaranteed-connections", "3"]);
    refused.fails(125, &["'few' can carry 5 connections", "kept 3 connections + greedy 3 connections = 6"]);
    let refused = rig.ask(&["tenant", "greedy", "--guaranteed-operations", "999001"]);
    refused.fails(125, &["kept 1000 operations/s + greedy 999001 operations/s = 1000001 operations/s"]);
    // What is given back can be had again.
    greedy.end();
    until("the places are free", || {
        let tenants = rig.ask(&["tenants", "--json"]).succeeds().json();
        let tenants = tenants["tenants"].as_array().unwrap().clone();
        tenants.iter().any(|tenant| tenant["name"] == "greedy" && tenant["connections"] == 0)
    });
    let mut greedy = rig.client(&["--attach", "queued", "--tenant-token", &others], &["connect", "3"]);
    assert_eq!(connects(&mut greedy, 3), ["0", "0", "EADDRNOTAVAIL"]);
    greedy.end();
    modest.end();
    engine.end();
}

#[test]
fn the_catalogue_and_the_tenants_are_listed_and_rights_hold() {
    let rig = Rig::new("tenants-list");
    let token = rig.place.file("token", "0123456789abcdef0123456789abcdef\n");
    let (token, wrong) =
        (token.to_str().unwrap().to_owned(), rig.place.file("wrong", "f123456789abcdef0123456789abcdef\n"));
    let engine = rig.up(&format!(
        "[[tenant]]\nname = \"shown\"\ntoken_file = \"{token}\"\nnsms = [\"second\"]\nmax_guests = 1\nguaranteed_send = \"4 Gbit/s\"\n"
    ));
    let catalog = rig.ask(&["catalog"]).succeeds().out.clone();
    assert!(
        catalog.lines().any(|line| line.starts_with("first")
            && line.contains("10 Gbit/s")
            && line.ends_with("0.5 per GB")),
        "{catalog}"
    );
    let tenants = rig.ask(&["tenants"]).succeeds().out.clone();
    assert!(
        tenants.contains("shown   1") && tenants.contains("4 Gbit/s or more") && tenants.contains("others"),
        "{tenants}"
    );

    // Known by its token: its own default stack, and no other.
    let mut one = rig.client(&["--tenant-token", &token], &["send", "5"]);
    assert_eq!(one.line(), "send");
    let ps = rig.ask(&["ps", "--json"]).out;
    assert!(ps.contains("\"tenant\": \"shown\"") && ps.contains("\"stack\": \"second\""), "{ps}");
    let run = |options: &[&str]| rig.ask(&[&["run"], options, &["--", "true"]].concat());
    run(&["--tenant-token", &token]).fails(125, &["tenant 'shown' has 1 guests already"]);
    one.end();
    until("its place is free again", || run(&["--tenant-token", &token]).code == Some(0));
    run(&["--tenant-token", &token, "--stack", "first"])
        .fails(125, &["no stack named 'first'", "offers second"]);
    // Everybody else.
    for options in [&["--stack", "first"][..], &["--tenant-token", wrong.to_str().unwrap()]] {
        run(options).succeeds();
    }
    engine.end();
    let engine = rig.up(&format!(
        "[engine]\nstrict_tenants = true\n[[tenant]]\nname = \"shown\"\ntoken_file = \"{token}\"\n"
    ));
    run(&[]).fails(125, &["belongs to no tenant", "--tenant-token"]);
    run(&["--tenant-token", &token]).succeeds();
    engine.end();
}

#[test]
fn what_cannot_be_promised_is_refused_with_the_arithmetic() {
    let rig = Rig::new("tenants-admission");
    let engine = rig.up(&format!(
        "{}[[tenant]]\nname = \"b\"\nusers = [54321]\nguaranteed_receive = \"7 Gbit/s\"\n",
        Rig::own("guaranteed_receive = \"2 Gbit/s\"")
    ));
    let sum = "receive is guaranteed own 3.5 Gbit/s + b 7 Gbit/s = 10.5 Gbit/s";
    rig.ask(&["tenant", "own", "--guaranteed-receive", "3.5 Gbit/s"])
        .fails(125, &["'first' can carry 10 Gbit/s", "10.5 Gbit/s"]);
    let tenants = rig.ask(&["tenants"]).out;
    assert!(tenants.contains("2 Gbit/s or more"), "nothing changed: {tenants}");
    rig.ask(&["tenant", "nobody", "--weight", "2"]).fails(125, &["no tenant 'nobody'", "own, b, others"]);
    rig.ask(&["tenant", "own", "--max-send", "fast"]).fails(125, &["--max-send fast: is no rate"]);
    rig.ask(&["tenant", "own"]).fails(125, &["nothing to set"]);

    // A file with an error changes nothing; one without does.
    let path = rig.place.dir.join("engine.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"2 Gbit/s\"", "\"3.5 Gbit/s\"")).unwrap();
    rig.ask(&["reload"]).fails(125, &[sum]);
    std::fs::write(&path, text.replace("\"2 Gbit/s\"", "\"2 Gbits\"")).unwrap();
    rig.ask(&["reload"]).fails(125, &["engine.toml, line ", "key 'guaranteed_receive'"]);
    assert!(rig.ask(&["tenants"]).out.contains("2 Gbit/s or more"));
    std::fs::write(&path, text.replace("\"2 Gbit/s\"", "\"3 Gbit/s\"")).unwrap();
    rig.ask(&["reload"]).succeeds();
    assert!(rig.ask(&["tenants"]).out.contains("3 Gbit/s or more"));
    engine.end();
    let config = rig.place.file("bad.toml", &text.replace("\"2 Gbit/s\"", "\"3.5 Gbit/s\""));
    rig.place.run(&["up", "--socket", &rig.socket, "--config", config.to_str().unwrap()]).fails(125, &[sum]);
}

#[test]
fn nobody_is_faster_than_its_limit_in_either_direction_until_it_is_lifted() {
    let rig = Rig::new("tenants-rates");
    // 1 MB/s.
    let engine = rig.up(&Rig::own("max_send = \"8 Mbit/s\"\nmax_receive = \"8 Mbit/s\""));
    for act in ["send", "receive"] {
        let began = Instant::now();
        let mut client = rig.client(&[], &[act, "500000"]);
        assert_eq!(client.line(), act);
        let took = began.elapsed();
        // What a bucket holds, and what stands in buffers, goes at once.
        assert!(took > Duration::from_millis(400), "{act} took {took:?} for half a second's worth");
        client.end();
    }
    // It would take half an hour.
    let mut clients: Vec<Running> = (0..3).map(|_| rig.client(&[], &["send", "600000000"])).collect();
    until("they are under way", || {
        rig.ask(&["tenants", "--json"]).json()["tenants"][0]["bytes_out"].as_u64() > Some(1_500_000)
    });
    rig.ask(&["tenant", "own", "--max-send", "none"]).succeeds();
    for mut client in clients.drain(..) {
        assert_eq!(client.line(), "send");
        client.end();
    }
    engine.end();
}

#[test]
fn operations_are_slowed_and_nothing_is_lost() {
    let rig = Rig::new("tenants-operations");
    let engine = rig.up(&Rig::own("max_operations = 2000"));
    let mut client = rig.client(&[], &["connect", "100", "send", "1000000", "receive", "1000000"]);
    for _ in 0..100 {
        assert_eq!(client.line(), "0");
    }
    assert_eq!((client.line().as_str(), client.line().as_str()), ("send", "receive"));
    client.end();
    engine.end();
}

#[test]
fn connections_are_counted_for_the_tenant_as_a_whole() {
    let rig = Rig::new("tenants-connections");
    let engine = rig.up(&Rig::own("max_connections = 3"));
    let mut one = rig.client(&[], &["connect", "2"]);
    assert_eq!((one.line(), one.line()), ("0".into(), "0".into()));
    let mut two = rig.client(&[], &["connect", "3"]);
    assert_eq!(
        (two.line().as_str(), two.line().as_str(), two.line().as_str()),
        ("0", "EADDRNOTAVAIL", "EADDRNOTAVAIL")
    );
    one.end();
    until("the places are free again", || {
        let mut three = rig.client(&[], &["connect", "2"]);
        let both = three.line() == "0" && three.line() == "0";
        three.end();
        both
    });
    two.end();
    until("none is counted any more", || {
        rig.ask(&["tenants", "--json"]).json()["tenants"][0]["connections"].as_u64() == Some(0)
    });

    // A server: the fourth connection waits until one of the three is over.
    let server = "import socket
l = socket.create_server(('127.0.0.1', 0), backlog=64)
print(l.getsockname()[1], flush=True)
kept = []
while True:
    s, _ = l.accept()
    kept.append(s)
    s.sendall(b'+')
    if len(kept) == 3:
        kept[0].recv(1)
        kept.pop(0).close()
";
    let mut command = rig.place.netkernel(&["run", "--socket", &rig.socket, "--", "python3", "-c", server]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let port: u16 = line.trim().parse().unwrap();
    let mut peers: Vec<TcpStream> =
        (0..5).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let mut byte = [0];
    for peer in &mut peers {
        peer.set_read_timeout(Some(common::WATCHDOG)).unwrap();
    }
    for peer in &mut peers[..3] {
        peer.read_exact(&mut byte).unwrap();
    }
    for next in 3..5 {
        let count = || rig.ask(&["tenants", "--json"]).json()["tenants"][0]["connections"].as_u64();
        assert_eq!(count(), Some(3));
        peers[next - 3].write_all(b"-").unwrap();
        peers[next].read_exact(&mut byte).unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    engine.end();
}

#[test]
fn a_connection_that_a_program_took_along_as_the_kernels_is_not_counted_any_more() {
    let rig = Rig::new("tenants-handed");
    let engine = rig.up(&Rig::own(""));
    let program = rig.bare();
    let count = || rig.tenant("own")["connections"].as_u64().unwrap();
    let mut guest = Python::start_with(&rig.place, &["--socket", &rig.socket]);
    assert_eq!(guest.run(CONNECTED), "1");
    assert_eq!(count(), 2);
    let took = format!(
        "import subprocess; p = subprocess.Popen(['{program}'], stdin=c); a.sendall(b'x'); say(p.poll())"
    );
    assert_eq!(guest.run(&took), "None");
    until("one is left", || count() == 1);
    assert_eq!(guest.run("c.close(); a.close(); l.close(); say(p.wait())"), "0");
    until("none is", || count() == 0);
    guest.ends();
    engine.end();
}

#[test]
fn limits_hold_for_programs_that_pass_the_library_by() {
    let rig = Rig::new("tenants-bare");
    let engine =
        rig.up(&Rig::own("max_send = \"8 Mbit/s\"\nmax_receive = \"8 Mbit/s\"\nmax_connections = 1"));
    let program = &rig.bare();
    let none_left = || {
        until("no connection is counted", || {
            rig.ask(&["tenants", "--json"]).json()["tenants"][0]["connections"].as_u64() == Some(0)
        });
    };
    for act in ["send", "receive"] {
        none_left();
        let began = Instant::now();
        let done = rig.ask(&["run", "--", program, &rig.port, act, "900000"]);
        assert_eq!(done.succeeds().out, format!("{act}\n"));
        let took = began.elapsed();
        // Unix sockets' buffers are filled at once.
        assert!(took > Duration::from_millis(400), "{act} took {took:?} for most of a second's worth");
    }
    rig.ask(&["run", "--attach", "direct", "--", program, &rig.port, "send", "1"])
        .fails(125, &["no kernel sockets to give away", "the tenant has limits"]);
    none_left();
    let mut one = rig.client(&[], &["connect", "1"]);
    assert_eq!(one.line(), "0");
    let full = rig.ask(&["run", "--", program, &rig.port, "send", "1"]);
    assert_eq!((full.code, full.err.as_str()), (Some(1), "bare: Cannot assign requested address\n"));
    one.end();
    engine.end();
}
