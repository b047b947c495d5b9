//! The engine's log.

mod common;

use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;

use common::{Engine, Place, WATCHDOG, finish, lines};
use serde_json::Value;

/// An engine whose standard error is read.
fn start(place: &Place, mut command: Command) -> (Engine, Receiver<String>) {
    command.stderr(Stdio::piped());
    let mut engine = place.start(command);
    let log = lines(engine.child().stderr.take().unwrap());
    (engine, log)
}

fn up(place: &Place, args: &[&str]) -> (Engine, Receiver<String>) {
    start(place, place.netkernel(&[&["up"], args].concat()))
}

/// A line of the log, which is an object with all that each must have.
fn record(line: &str) -> Value {
    let record: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    let text = |key: &str| record[key].as_str().unwrap_or_else(|| panic!("no {key}: {line}"));
    text("time").parse::<jiff::Timestamp>().unwrap();
    assert!(text("time").ends_with('Z') && text("time").contains('T'), "{line}");
    assert!(["error", "warn", "info", "debug", "trace"].contains(&text("level")), "{line}");
    assert!(text("target").starts_with("netkernel"), "{line}");
    assert!(!text("message").is_empty() && record["pid"].is_u64(), "{line}");
    record
}

/// The first record whose message has these words. All lines before it are records, too.
fn wait_for(log: &Receiver<String>, words: &str) -> Value {
    loop {
        let line = log.recv_timeout(WATCHDOG).unwrap_or_else(|_| panic!("never logged: {words}"));
        let record = record(&line);
        if record["message"].as_str().unwrap().contains(words) {
            return record;
        }
    }
}

#[test]
fn every_record_is_an_object_with_its_fields() {
    let place = Place::new("log-json");
    let (engine, log) = up(&place, &["--log-format", "json", "--log-level", "debug"]);
    let ready = wait_for(&log, "ready");
    assert_eq!(ready["fields"]["socket"], place.socket().to_str().unwrap(), "{ready}");
    assert_eq!(ready["pid"], engine.pid());
    place.run(&["run", "--name", "a \"b\"", "--", "true"]).succeeds();
    let over = wait_for(&log, "is over");
    assert_eq!((&over["level"], &over["fields"]["guest"]), (&"info".into(), &1.into()), "{over}");
    assert_eq!(over["fields"]["name"], "a \"b\"", "{over}");
    assert!(over["target"].as_str().unwrap().starts_with("netkernel_engine"), "{over}");
    place.run(&["tenant", "set", "others", "--max-send", "1 Gbit/s"]).succeeds();
    assert_eq!(wait_for(&log, "the limits")["fields"]["tenant"], "others");
    engine.end();
    // To the last line.
    log.iter().for_each(|line| drop(record(&line)));
}

/// The process of an NSM logs as its engine does, and so does an engine that cannot start.
#[test]
fn processes_and_failures_are_records_too() {
    let place = Place::new("log-process");
    let config = place.file("nk.toml", "[[nsm]]\nname = \"own\"\nform = \"process\"\n");
    let config = config.to_str().unwrap();
    let (engine, log) = up(&place, &["--config", config, "--log-format", "json"]);
    let ready = wait_for(&log, "ready");
    place.run(&["run", "--name", "there", "--", "true"]).succeeds();
    let over = wait_for(&log, "(there) is over");
    assert_ne!(over["pid"], ready["pid"], "the worker says so: {over}");
    let failed = place.run(&["up", "--log-format", "json"]);
    assert_eq!(failed.code, Some(125));
    let failed = record(failed.err.trim_end());
    assert!(failed["message"].as_str().unwrap().contains("already runs"), "{failed}");
    assert_eq!(failed["level"], "error");
    engine.end();
}

#[test]
fn levels_are_options_or_the_environment() {
    let place = Place::new("log-levels");
    let quiet = |mut command: Command, wanted: bool| {
        command.env("NETKERNEL_LOG", "error");
        let (engine, log) = start(&place, command);
        place.run(&["run", "--", "true"]).succeeds();
        engine.end();
        let text: Vec<String> = log.iter().collect();
        assert_eq!(text.iter().any(|line| line.starts_with("netkernel: info: guest 1 ")), wanted, "{text:?}");
    };
    quiet(place.netkernel(&["up"]), false);
    quiet(place.netkernel(&["up", "--log-level", "info"]), true);
    quiet(place.netkernel(&["up", "--log-level", "error,netkernel_engine=info"]), true);
    quiet(place.netkernel(&["up", "--log-level", "info,netkernel_engine=error"]), false);
    for (args, word) in
        [(["--log-level", "loud"], "is no level"), (["--log-format", "xml"], "possible values")]
    {
        let done = place.run(&[&["up"], &args[..]].concat());
        assert!(done.code == Some(2) && done.err.contains(word), "{done:?}");
    }
    let mut wrong = place.netkernel(&["up"]);
    wrong.env("NETKERNEL_LOG", "loud");
    let done = finish(wrong);
    assert!(done.code == Some(2) && done.err.contains("is no level"), "{done:?}");
}
