//! redis: requests per second at three depths, the round trip of one connection, CPU time per request.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Benchmark, Live, Pair, Promise, Sample, row};
use crate::process::Process;
use crate::session::{Engine, Role, Session, Side};
use crate::{report, sys};

pub const NEEDS: &[&str] = &["redis-server", "redis-benchmark"];

pub fn benchmarks() -> Vec<Benchmark> {
    vec![
        Benchmark {
            id: "redis-p1",
            about: "redis-benchmark -c 50 -P 1 against a guest server; CPU time per request".into(),
            needs: NEEDS,
            rows: vec![
                row("redis-p1", "redis -c 50 -P 1", "requests/s", Promise::RatioAtLeast(0.85)),
                row("redis-p1-cpu", "CPU per 100 k requests, redis -P 1", "s", Promise::RatioAtMost(1.5)),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Load::start(session, 50, 1)?)),
        },
        Benchmark {
            id: "redis-p16",
            about: "redis-benchmark -c 50 -P 16 against a guest server".into(),
            needs: NEEDS,
            rows: vec![
                row("redis-p16", "redis -c 50 -P 16", "requests/s", Promise::RatioAtLeast(0.9)),
                row("redis-p16-cpu", "CPU per 100 k requests, redis -P 16", "s", Promise::None),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Load::start(session, 50, 16)?)),
        },
        Benchmark {
            id: "redis-c1",
            about: "one connection to a guest server: median round trip, redis-benchmark -c 1".into(),
            needs: NEEDS,
            rows: vec![
                row("redis-c1", "redis -c 1, median round trip", "us", Promise::RatioAtMost(1.3)),
                row("redis-c1-p99", "redis -c 1, 99th percentile", "us", Promise::None),
                row("redis-c1-rate", "redis -c 1", "requests/s", Promise::None),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(RoundTrip(Load::start(session, 1, 1)?))),
        },
    ]
}

/// The command of a redis server that keeps nothing.
pub fn server_command(
    session: &Session,
    side: Side,
    engine: Option<&Engine>,
    port: u16,
    directory: &PathBuf,
) -> std::process::Command {
    arguments(session.command(side, engine, "redis-server"), port, directory)
}

pub fn arguments(
    mut command: std::process::Command,
    port: u16,
    directory: &PathBuf,
) -> std::process::Command {
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    command.args(["--daemonize", "no", "--dir"]).arg(directory);
    command
}

fn server(session: &Session, side: Side, engine: Option<&Engine>, port: u16) -> Result<Process> {
    let directory = session.subdirectory("redis")?;
    let command = server_command(session, side, engine, port, &directory);
    match side {
        Side::Native => session.native_server("redis-server", command, port),
        Side::Netkernel => session.server("redis-server", Role::Measured, engine, command, port),
    }
}

/// Requests per second.
#[derive(Clone, Copy)]
pub struct Rates {
    pub get: f64,
    pub set: f64,
}

impl Rates {
    pub fn parse(text: &str) -> Result<Rates> {
        let rate = |name: &str| -> Option<f64> {
            let line = text.lines().find(|line| line.trim_start_matches('"').starts_with(name))?;
            line.split(',').nth(1)?.trim().trim_matches('"').parse().ok()
        };
        rate("GET")
            .zip(rate("SET"))
            .map(|(get, set)| Rates { get, set })
            .with_context(|| format!("redis-benchmark printed no rates: {}", text.trim()))
    }

    /// Of as many of the one as of the other.
    pub fn both(self) -> f64 {
        2.0 / (1.0 / self.get + 1.0 / self.set)
    }
}

struct Load {
    pair: Pair,
    clients: u32,
    depth: u32,
    /// Of each kind.
    requests: u64,
}

impl Load {
    fn start(session: &Session, clients: u32, depth: u32) -> Result<Load> {
        let pair = Pair::start(session, server)?;
        let few = if clients == 1 { 5_000 } else { 20_000 * u64::from(depth.min(10)) };
        let mut load = Load { pair, clients, depth, requests: few };
        load.run(session, Side::Netkernel)?;
        load.run(session, Side::Native)?;
        // Warm now: how many requests take the wanted time natively.
        let rate = load.run(session, Side::Native)?.both();
        load.requests = ((rate * session.settings.seconds / 2.0) as u64).max(1000);
        Ok(load)
    }

    fn run(&self, session: &Session, side: Side) -> Result<Rates> {
        load(session, self.pair.port(side), self.clients, self.depth, self.requests)
    }
}

/// Requests per second of as many GETs as SETs.
pub fn rate(session: &Session, port: u16, clients: u32, depth: u32, requests: u64) -> Result<f64> {
    load(session, port, clients, depth, requests).map(Rates::both)
}

fn load(session: &Session, port: u16, clients: u32, depth: u32, requests: u64) -> Result<Rates> {
    let mut command = session.command(Side::Native, None, "redis-benchmark");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-t", "get,set", "-q", "--csv"]);
    command.args(["-c", &clients.to_string(), "-P", &depth.to_string()]);
    command.args(["-n", &requests.to_string()]);
    let limit = Duration::from_secs_f64(30.0 + 30.0 * session.settings.seconds);
    let (text, _) = session.client("redis-benchmark", Role::Peer, command, limit)?;
    Rates::parse(&text)
}

impl Live for Load {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let before = self.pair.cpu_s(side);
        let rates = self.run(session, side)?;
        let cpu_s = self.pair.cpu_s(side) - before;
        let requests = 2 * self.requests;
        let detail = json!({ "get": rates.get, "set": rates.set, "requests": requests, "cpu_s": cpu_s });
        Ok(Sample::new(vec![rates.both(), cpu_s / requests as f64 * 1e5], detail))
    }
}

struct RoundTrip(Load);

impl Live for RoundTrip {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let seconds = Duration::from_secs_f64(session.settings.seconds);
        let mut times = round_trips(self.0.pair.port(side), seconds)?;
        times.sort_by(f64::total_cmp);
        let (p50, p99) = (report::quantile(&times, 0.5), report::quantile(&times, 0.99));
        let rates = self.0.run(session, side)?;
        let detail = json!({
            "round_trips": times.len(), "p50_us": p50, "p90_us": report::quantile(&times, 0.9), "p99_us": p99,
            "get": rates.get, "set": rates.set,
        });
        Ok(Sample::new(vec![p50, p99, rates.both()], detail))
    }
}

/// Times of GET requests, one after the other, in microseconds. redis-benchmark's own percentiles come in steps of 8 us,
/// which is too coarse to compare with.
fn round_trips(port: u16, duration: Duration) -> Result<Vec<f64>> {
    let mut client = Asker::connect(port)?;
    let start = Instant::now();
    let warm = duration / 10;
    let mut times = Vec::with_capacity(1 << 18);
    loop {
        let time = client.ask()?;
        let elapsed = start.elapsed();
        if sys::interrupted() {
            bail!("interrupted");
        } else if elapsed >= warm {
            times.push(time);
        }
        if elapsed >= duration + warm {
            return Ok(times);
        }
    }
}

/// One connection to a redis, with a key in it.
pub struct Asker(TcpStream);

impl Asker {
    pub fn connect(port: u16) -> Result<Asker> {
        const LIMIT: Duration = Duration::from_secs(20);
        let stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), LIMIT).context("redis")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut asker = Asker(stream);
        asker.exchange(b"*3\r\n$3\r\nSET\r\n$2\r\nnk\r\n$3\r\nxxx\r\n", b"+OK\r\n")?;
        Ok(asker)
    }

    /// Time of a GET in microseconds.
    pub fn ask(&mut self) -> Result<f64> {
        self.exchange(b"*2\r\n$3\r\nGET\r\n$2\r\nnk\r\n", b"$3\r\nxxx\r\n")
    }

    fn exchange(&mut self, request: &[u8], answer: &[u8]) -> Result<f64> {
        let mut buffer = [0; 64];
        let start = Instant::now();
        self.0.write_all(request)?;
        let mut length = 0;
        while length < answer.len() {
            match self.0.read(&mut buffer[length..]).context("no answer from redis")? {
                0 => bail!("redis closed the connection"),
                count => length += count,
            }
        }
        let time = start.elapsed();
        if buffer[..length] != *answer {
            bail!("redis answered {:?}", String::from_utf8_lossy(&buffer[..length]));
        }
        Ok(time.as_secs_f64() * 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_both_versions_of_the_table() {
        let new = "\"test\",\"rps\",\"avg\"\n\"SET\",\"100.00\",\"0.07\"\n\"GET\",\"300.00\",\"0.08\"\n";
        let rates = Rates::parse(new).unwrap();
        assert_eq!((rates.set, rates.get, rates.both()), (100.0, 300.0, 150.0));
        assert!(Rates::parse("\"SET\",\"100.00\"\n\"GET\",\"300.00\"\n").is_ok());
        assert!(Rates::parse("Could not connect").is_err());
    }
}
