//! nginx with one worker and a file of 438 bytes: connections that are kept, and connections that are not.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Benchmark, Live, Pair, Promise, Sample, row};
use crate::process::Process;
use crate::session::{Engine, Role, Session, Side, find_program};
use crate::sys;

pub const NEEDS: &[&str] = &["nginx", "wrk"];

pub fn benchmarks() -> Vec<Benchmark> {
    vec![
        Benchmark {
            id: "nginx-keepalive",
            about: "wrk -c 50 -t 1, file of 438 B, kept connections, guest server; CPU time per request"
                .into(),
            needs: NEEDS,
            rows: vec![
                row(
                    "nginx-keepalive",
                    "nginx keep-alive, wrk -c 50",
                    "requests/s",
                    Promise::RatioAtLeast(0.85),
                ),
                row(
                    "nginx-keepalive-cpu",
                    "CPU per 100 k requests, nginx keep-alive",
                    "s",
                    Promise::RatioAtMost(1.5),
                ),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Web::start(session, false)?)),
        },
        Benchmark {
            id: "nginx-close",
            about: "wrk -c 50 -t 1, file of 438 B, a connection per request, guest server".into(),
            needs: NEEDS,
            rows: vec![
                row(
                    "nginx-close",
                    "nginx Connection: close, wrk -c 50",
                    "requests/s",
                    Promise::RatioAtLeast(0.6),
                ),
                row("nginx-close-cpu", "CPU per 100 k requests, nginx Connection: close", "s", Promise::None),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Web::start(session, true)?)),
        },
        Benchmark {
            id: "ab-client",
            about: "ab -c 20, a connection per request, guest client, native nginx".into(),
            needs: &["nginx", "ab"],
            rows: vec![row(
                "ab-client",
                "ab, a guest that opens connections",
                "requests/s",
                Promise::RatioAtLeast(0.65),
            )],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Opener::start(session)?)),
        },
    ]
}

/// Writes configuration and file for a server on `port` into `directory`, and returns the command that runs it.
pub fn server_command(
    session: &Session,
    side: Side,
    engine: Option<&Engine>,
    port: u16,
    directory: &Path,
) -> Result<Command> {
    // Root's workers would become another user, who may not read what is in a temporary directory.
    let user = if sys::is_root() { "user root;" } else { "" };
    let configuration = format!(
        "{user}\ndaemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log stderr error;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log off;\n  sendfile on;\n  tcp_nopush on;\n  keepalive_requests 1000000000;\n\
         \x20 client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp;\n\
         \x20 scgi_temp_path temp;\n  server {{ listen 127.0.0.1:{port}; root .; }}\n}}\n"
    );
    fs::write(directory.join("nginx.conf"), configuration)?;
    fs::write(directory.join("file"), [b'n'; 438])?;
    let program = find_program("nginx").context("nginx is not installed")?;
    let mut command = session.command(side, engine, program);
    command.arg("-p").arg(directory).args(["-c", "nginx.conf", "-e", "stderr"]);
    Ok(command)
}

pub fn server(session: &Session, side: Side, engine: Option<&Engine>, port: u16) -> Result<Process> {
    let directory = session.subdirectory("nginx")?;
    let command = server_command(session, side, engine, port, &directory)?;
    match side {
        Side::Native => session.native_server("nginx", command, port),
        Side::Netkernel => session.server("nginx", Role::Measured, engine, command, port),
    }
}

struct Web {
    pair: Pair,
    close: bool,
}

impl Web {
    fn start(session: &Session, close: bool) -> Result<Web> {
        let web = Web { pair: Pair::start(session, server)?, close };
        for side in [Side::Netkernel, Side::Native] {
            web.run(session, side, 1)?;
        }
        Ok(web)
    }

    fn run(&self, session: &Session, side: Side, seconds: u64) -> Result<Report> {
        let mut command = session.command(Side::Native, None, "wrk");
        command.args(["-c", "50", "-t", "1", "-d", &format!("{seconds}s")]);
        if self.close {
            command.args(["-H", "Connection: close"]);
        }
        command.arg(format!("http://127.0.0.1:{}/file", self.pair.port(side)));
        let (text, _) = session.client("wrk", Role::Peer, command, Duration::from_secs(30 + 3 * seconds))?;
        Report::parse(&text)
    }
}

/// A client whose every request is a new socket.
struct Opener {
    engine: Engine,
    _server: Process,
    port: u16,
    requests: u64,
}

impl Opener {
    fn start(session: &Session) -> Result<Opener> {
        let engine = session.engine()?;
        let port = session.port()?;
        let directory = session.subdirectory("nginx")?;
        let command = server_command(session, Side::Native, None, port, &directory)?;
        let server = session.server("nginx", Role::Peer, None, command, port)?;
        let mut opener = Opener { engine, _server: server, port, requests: 2_000 };
        let rate = opener.run(session, Side::Native)?;
        opener.requests = ((rate * session.settings.seconds) as u64).max(1_000);
        Ok(opener)
    }

    fn run(&self, session: &Session, side: Side) -> Result<f64> {
        let mut command = session.command(side, Some(&self.engine), "ab");
        command.args(["-q", "-c", "20", "-n", &self.requests.to_string()]);
        command.arg(format!("http://127.0.0.1:{}/file", self.port));
        let limit = Duration::from_secs_f64(30.0 + 30.0 * session.settings.seconds);
        // Connections are too short to be looked at; `run` refuses what it cannot serve.
        let (text, _) = session.client("ab", Role::Measured, command, limit)?;
        let field = |name: &str| -> Option<f64> {
            text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
        };
        if field("Failed requests:") != Some(0.0) {
            bail!("ab had failed requests: {}", text.trim());
        }
        field("Requests per second:").with_context(|| format!("ab printed no rate: {}", text.trim()))
    }
}

impl Live for Opener {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        Ok(Sample::new(vec![self.run(session, side)?], json!({ "requests": self.requests })))
    }
}

impl Live for Web {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let before = self.pair.cpu_s(side);
        let report = self.run(session, side, session.settings.seconds.ceil().max(1.0) as u64)?;
        let cpu_s = self.pair.cpu_s(side) - before;
        let detail = json!({
            "requests": report.requests, "failed": report.failed, "refused": report.refused, "cpu_s": cpu_s,
        });
        let mut sample = Sample::new(vec![report.rate, cpu_s / report.requests * 1e5], detail);
        if report.failed + report.refused > 0.0 {
            sample.remarks.push(format!(
                "{side:?}: of {} requests, {} met socket errors and {} another status than success",
                report.requests, report.failed, report.refused
            ));
        }
        Ok(sample)
    }
}

#[derive(Debug, PartialEq)]
pub struct Report {
    pub requests: f64,
    pub rate: f64,
    /// Errors of connections.
    pub failed: f64,
    /// Answers that are not success.
    pub refused: f64,
}

impl Report {
    pub fn parse(text: &str) -> Result<Report> {
        let after = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name));
        let rate = after("Requests/sec:").and_then(|rest| rest.trim().parse().ok());
        let requests = text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
        let (Some(rate), Some(requests)) = (rate, requests) else {
            bail!("wrk printed no figures: {}", text.trim());
        };
        if requests < 1.0 {
            bail!("wrk had no answers");
        }
        let numbers =
            |text: &str| -> f64 { text.split([' ', ',']).filter_map(|word| word.parse::<f64>().ok()).sum() };
        Ok(Report {
            requests,
            rate,
            failed: after("Socket errors:").map_or(0.0, numbers),
            refused: after("Non-2xx or 3xx responses:").map_or(0.0, numbers),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_seen() {
        let text = "Running 1s test\n  1200 requests in 1.00s, 1MB read\n  Socket errors: connect 1, read 2, write 0, \
                    timeout 3\n  Non-2xx or 3xx responses: 7\nRequests/sec:  1199.50\nTransfer/sec: 1MB\n";
        let report = Report::parse(text).unwrap();
        assert_eq!(report, Report { requests: 1200.0, rate: 1199.5, failed: 6.0, refused: 7.0 });
        assert!(Report::parse("unable to connect").is_err());
        assert!(Report::parse("  0 requests in 1.00s, 0B read\nRequests/sec:  0.00\n").is_err());
    }
}
