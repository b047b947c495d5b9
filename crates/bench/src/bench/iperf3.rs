//! One stream of iperf3: throughput, and CPU time per gigabyte of the side that is served.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Benchmark, Live, Pair, Promise, Sample, row};
use crate::process::Process;
use crate::session::{Engine, Role, Session, Side};

pub fn benchmarks() -> Vec<Benchmark> {
    vec![
        Benchmark {
            id: "iperf3-receive",
            about: "one stream: guest server, native client; throughput and CPU time".into(),
            needs: &["iperf3"],
            rows: vec![
                row(
                    "iperf3-receive",
                    "iperf3 one stream, guest receives",
                    "Gbit/s",
                    Promise::RatioAtLeast(0.8),
                ),
                row("iperf3-receive-cpu", "CPU per GB, guest receives", "s", Promise::RatioAtMost(1.5)),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Receive::start(session)?)),
        },
        Benchmark {
            id: "iperf3-send",
            about: "one stream: guest client, native server; throughput and CPU time".into(),
            needs: &["iperf3"],
            rows: vec![
                row("iperf3-send", "iperf3 one stream, guest sends", "Gbit/s", Promise::RatioAtLeast(0.8)),
                row("iperf3-send-cpu", "CPU per GB, guest sends", "s", Promise::RatioAtMost(1.5)),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Send::start(session)?)),
        },
    ]
}

/// How much is sent: a number of bytes that takes the wanted time natively, the same on both sides.
fn calibrate(session: &Session, role: Role, port: u16) -> Result<u64> {
    let mut command = session.command(Side::Native, None, "iperf3");
    let congestion = &session.surroundings.native_congestion_control;
    command.args(["-c", "127.0.0.1", "-J", "-t", "1", "-C", congestion, "-p"]).arg(port.to_string());
    let (text, _) = session.client("iperf3", role, command, Duration::from_secs(30))?;
    let rate = Report::parse(&text)?.gbit_s * 1e9 / 8.0;
    Ok(((rate * session.settings.seconds / 1e6).ceil() * 1e6).max(1e8) as u64)
}

/// A client that sends `bytes`. A native one asks for the congestion control; a guest has that of its stack.
fn sender(
    session: &Session,
    role: Role,
    side: Side,
    engine: Option<&Engine>,
    port: u16,
    bytes: u64,
) -> Result<(Report, f64)> {
    let mut command = session.command(side, engine, "iperf3");
    command.args(["-c", "127.0.0.1", "-J", "-n", &bytes.to_string(), "-p", &port.to_string()]);
    if side == Side::Native {
        command.args(["-C", &session.surroundings.native_congestion_control]);
    }
    let limit = Duration::from_secs_f64(30.0 + 30.0 * session.settings.seconds);
    let (text, exit) = match (side, engine) {
        (Side::Netkernel, Some(engine)) => session.guest_client("iperf3", engine, command, port, limit)?,
        _ => session.client("iperf3", role, command, limit)?,
    };
    Ok((Report::parse(&text)?, exit.cpu_s))
}

pub struct Report {
    pub gbit_s: f64,
    pub gigabytes: f64,
    retransmits: Value,
    sender_congestion: String,
}

impl Report {
    pub fn parse(text: &str) -> Result<Report> {
        let start = text.find('{').context("iperf3 printed no report")?;
        let report: Value = serde_json::from_str(&text[start..]).context("iperf3's report")?;
        if let Some(error) = report["error"].as_str() {
            bail!("iperf3: {error}");
        }
        let end = &report["end"];
        let received = &end["sum_received"];
        let bytes = received["bytes"].as_f64().context("iperf3 reports no bytes")?;
        if bytes < 1.0 {
            bail!("iperf3 moved no data");
        }
        Ok(Report {
            gbit_s: received["bits_per_second"].as_f64().context("iperf3 reports no rate")? / 1e9,
            gigabytes: bytes / 1e9,
            retransmits: end["sum_sent"]["retransmits"].clone(),
            sender_congestion: end["sender_tcp_congestion"].as_str().unwrap_or("unknown").to_owned(),
        })
    }

    fn sample(self, session: &Session, side: Side, cpu_s: f64) -> Sample {
        let detail = json!({
            "gigabytes": self.gigabytes,
            "cpu_s": cpu_s,
            "retransmits": self.retransmits,
            "sender_congestion": self.sender_congestion,
        });
        let mut sample = Sample::new(vec![self.gbit_s, cpu_s / self.gigabytes], detail);
        let wanted = &session.surroundings.native_congestion_control;
        if self.sender_congestion != *wanted {
            sample.remarks.push(format!(
                "{side:?}: the sending iperf3 saw congestion control {}, not {wanted}: not one to one",
                self.sender_congestion
            ));
        }
        sample
    }
}

pub fn server(
    session: &Session,
    role: Role,
    side: Side,
    engine: Option<&Engine>,
    port: u16,
) -> Result<Process> {
    let mut command = session.command(side, engine, "iperf3");
    command.args(["-s", "-p", &port.to_string()]);
    session.server("iperf3-server", role, engine, command, port)
}

struct Receive {
    pair: Pair,
    bytes: u64,
}

impl Receive {
    fn start(session: &Session) -> Result<Receive> {
        let pair = Pair::start(session, |session, side, engine, port| {
            server(session, Role::Measured, side, engine, port)
        })?;
        let bytes = calibrate(session, Role::Peer, pair.port(Side::Native))?;
        Ok(Receive { pair, bytes })
    }
}

impl Live for Receive {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let before = self.pair.cpu_s(side);
        let (report, _) = sender(session, Role::Peer, Side::Native, None, self.pair.port(side), self.bytes)?;
        let cpu_s = self.pair.cpu_s(side) - before;
        Ok(report.sample(session, side, cpu_s))
    }
}

struct Send {
    engine: Engine,
    server: Process,
    port: u16,
    bytes: u64,
}

impl Send {
    fn start(session: &Session) -> Result<Send> {
        let engine = session.engine()?;
        let port = session.port()?;
        let server = server(session, Role::Peer, Side::Native, None, port)?;
        let bytes = calibrate(session, Role::Measured, port)?;
        Ok(Send { engine, server, port, bytes })
    }
}

impl Live for Send {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        self.server.still_runs(Duration::ZERO)?;
        let before = self.engine.process.cpu_s();
        let (report, client_s) =
            sender(session, Role::Measured, side, Some(&self.engine), self.port, self.bytes)?;
        let engine_s = self.engine.process.cpu_s() - before;
        let cpu_s = if side == Side::Netkernel { client_s + engine_s } else { client_s };
        Ok(report.sample(session, side, cpu_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_may_follow_other_text() {
        let text = r#"note
            {"end":{"sum_sent":{"retransmits":2},"sum_received":{"bytes":2e9,"bits_per_second":8e9},
                    "sender_tcp_congestion":"cubic"}}"#;
        let report = Report::parse(text).unwrap();
        assert_eq!((report.gbit_s, report.gigabytes), (8.0, 2.0));
        assert_eq!(report.sender_congestion, "cubic");
        assert!(Report::parse(r#"{"error":"unable to connect"}"#).is_err());
        assert!(Report::parse("").is_err());
    }
}
