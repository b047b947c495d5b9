//! Usage is kept and told: exact, by tenant, through restarts of the engine.

mod common;

use common::{Place, echo, until};
use serde_json::Value;

/// Sends as many bytes to the port, reads as many back.
const CLIENT: &str = "import socket, sys
port, n = int(sys.argv[1]), int(sys.argv[2])
s = socket.create_connection(('127.0.0.1', port))
s.sendall(b'x' * n)
s.shutdown(socket.SHUT_WR)
got = 0
while data := s.recv(65536):
    got += len(data)
assert got == n, got
";

fn usage(place: &Place, more: &[&str]) -> String {
    let socket = place.socket();
    let args = [&["usage", "--socket", socket.to_str().unwrap()], more].concat();
    place.run(&args).succeeds().out.clone()
}

#[test]
fn each_byte_is_counted_once_also_when_the_engine_is_started_anew() {
    let place = Place::new("usage");
    let database = place.dir.join("usage.redb");
    let text = format!(
        "[engine]\nusage = \"{}\"\n\
         [[nsm]]\nname = \"dear\"\nprice_per_gb = 1000.0\n[[nsm]]\nname = \"free\"\nprice_per_hour = 0.0\n",
        database.display()
    );
    let config = place.file("engine.toml", &text);
    let (socket, client) = (place.socket(), place.file("client.py", CLIENT));
    let (socket, port) = (socket.to_str().unwrap(), echo().to_string());
    let up = || place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    let attached = |attach: &str, stack: &str, bytes: &str| {
        let args = ["run", "--socket", socket, "--attach", attach, "--stack", stack, "--", "python3"];
        let args = [&args[..], &[client.to_str().unwrap()]].concat();
        place.run(&[&args[..], &[&port, bytes]].concat()).succeeds();
    };

    let run = |stack: &str, bytes: &str| attached("auto", stack, bytes);

    let engine = up();
    run("dear", "1000000");
    // Another way for the same bytes.
    attached("relay", "dear", "500000");
    run("free", "7");
    until("all guests are over", || {
        usage(&place, &["--by", "nsm", "--format", "json"]).contains("\"bytes_in\": 7")
    });
    let check = |dear: u64, connections: u64| {
        let rows: Vec<Value> =
            serde_json::from_str(&usage(&place, &["--by", "nsm", "--format", "json"])).unwrap();
        assert_eq!(rows.len(), 2, "{rows:?}");
        let (first, second) = (&rows[0], &rows[1]);
        assert_eq!((first["nsm"].as_str(), second["nsm"].as_str()), (Some("dear"), Some("free")));
        assert_eq!((first["bytes_in"].as_u64(), first["bytes_out"].as_u64()), (Some(dear), Some(dear)));
        assert_eq!(first["connections"].as_u64(), Some(connections));
        let cost = first["cost"].as_f64().unwrap();
        assert!((cost - 2.0 * dear as f64 / 1e9 * 1000.0).abs() < 1e-9, "{cost}");
        assert!(first["guest_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!((second["bytes_out"].as_u64(), second["cost"].as_f64()), (Some(7), Some(0.0)));
    };
    check(1_500_000, 2);
    // What was used in the last second is written when the engine ends in order.
    run("dear", "4000000");
    engine.end();
    let engine = up();
    check(5_500_000, 3);

    let csv = usage(&place, &["--by", "guest,nsm,hour", "--format", "csv", "--from", "1d"]);
    assert!(
        csv.starts_with("begin,nsm,guest,guest_seconds,connections,operations,bytes_in,bytes_out,cpu_seconds,retransmitted,rtt_ms,cost\r\n"),
        "{csv}"
    );
    assert!(csv.contains(",dear,python3"), "{csv}");
    let table = usage(&place, &[]);
    assert!(table.starts_with("TENANT"), "{table}");
    assert_eq!(usage(&place, &["--to", "2026-01-01"]), "");
    let args = ["usage", "--socket", socket, "--by", "week"];
    place.run(&args).fails(125, &["cannot be summed by 'week'"]);
    let second = place.run(&["up", "--socket", &format!("{socket}2"), "--config", config.to_str().unwrap()]);
    second.fails(125, &["usage.redb", "another engine has it"]);
    engine.end();
}

#[test]
fn an_engine_that_keeps_no_usage_says_so() {
    let place = Place::new("no-usage");
    let socket = place.socket();
    let engine = place.up(&["--socket", socket.to_str().unwrap()]);
    let done = place.run(&["usage", "--socket", socket.to_str().unwrap()]);
    done.fails(125, &["keeps no usage", "`usage` in [engine]"]);
    engine.end();
}
