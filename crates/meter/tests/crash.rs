//! What was added is there after a crash at any moment, once.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use netkernel_meter::{Amount, Attained, Entry, Promise, Store};

const WRITER: &str = "NETKERNEL_METER_TEST_WRITER";

fn entry(amount: u64) -> Entry {
    let amount = Amount { bytes_in: amount, bytes_out: 2 * amount, ..Amount::default() };
    Entry { minute: 7, tenant: "t".into(), nsm: "n".into(), guest: "g".into(), amount }
}

fn promise() -> Promise {
    let attained = Attained { seconds: 1, met: 1 };
    Promise { minute: 7, tenant: "t".into(), nsm: "n".into(), attained }
}

/// Of promises.
fn seconds(store: &Store) -> u64 {
    let mut sum = 0;
    store.read_promises(0, u64::MAX, |promise| sum += promise.attained.seconds).unwrap();
    sum
}

fn sum(store: &Store) -> u64 {
    let mut sum = 0;
    store
        .read(0, u64::MAX, |entry| {
            assert_eq!(entry.amount.bytes_out, 2 * entry.amount.bytes_in, "half of a transaction");
            sum += entry.amount.bytes_in;
        })
        .unwrap();
    sum
}

/// Not a test of its own: the child process of the next one, which adds 1 again and again and says so after each.
#[test]
fn writer() {
    let Some(path) = std::env::var_os(WRITER) else { return };
    let store = Store::open(&PathBuf::from(path)).unwrap();
    let mut out = std::io::stdout();
    loop {
        store.add(&[entry(1)], &[promise()]).unwrap();
        if out.write_all(b"added\n").and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

#[test]
fn a_killed_writer_loses_and_doubles_nothing() {
    let path = PathBuf::from(format!("/tmp/netkernel-meter-{}.redb", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let mut told = 0;
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture"])
            .env(WRITER, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..=round {
            loop {
                match lines.next() {
                    Some(line) if line.as_ref().unwrap().ends_with("added") => break,
                    Some(_) => {}
                    None => panic!("the writer ended"),
                }
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        told += round + 1;
        // What it said after we stopped listening.
        told += lines.map_while(Result::ok).filter(|line| line.ends_with("added")).count() as u64;
        let store = Store::open(&path).unwrap();
        let found = sum(&store);
        assert_eq!(seconds(&store), found, "half of a transaction");
        drop(store);
        // The last one may have been added without having been told.
        assert!(found == told || found == told + 1, "round {round}: {found} of {told}");
        told = found;
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_database_has_one_engine() {
    let path = PathBuf::from(format!("/tmp/netkernel-meter-{}-two.redb", std::process::id()));
    let first = Store::open(&path).unwrap();
    let error = Store::open(&path).unwrap_err().to_string();
    assert!(error.contains("another engine has it"), "{error}");
    first.add(&[entry(3), entry(4)], &[]).unwrap();
    assert_eq!(sum(&first), 7);
    drop(first);
    std::fs::remove_file(&path).unwrap();
    let error = Store::open(&PathBuf::from("/proc/no/such/place")).unwrap_err().to_string();
    assert!(error.starts_with("the usage database /proc/no/such/place: "), "{error}");
}
