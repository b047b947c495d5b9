//! `netkernel bench isolation`: what tenants get beside each other.
//!
//! The published isolation experiment (caps of 1 Gbit/s and 500 Mbit/s beside a guest without one), shares of a bottleneck,
//! a guarantee, a paced request beside floods, and the cost of policing. Where the plain kernel can do the same, it does.

mod load;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

pub use load::{LoadArgs, Peers, run as run_load};

use crate::bench::{Benchmark, Live, Promise, Row, Sample, redis};
use crate::process::Process;
use crate::session::{Attach, Engine, Role, Session, Settings, Side};
use load::{Kind, SAMPLE};

/// Bits per second.
const CAPS: [f64; 2] = [1e9, 500e6];
const NEAR_PERCENT: f64 = 3.0;
const FAIR_PERCENT: f64 = 5.0;
/// After such a cap: what windows allowed before is on its way.
const SETTLE_S: f64 = 1.0;
const WINDOW_S: f64 = 1.0;
/// Left out at the beginning: connections are made, and windows open.
const WARM_S: f64 = 1.0;

pub fn catalog(_: &Settings) -> Vec<Benchmark> {
    let row = |id, title: &str, unit, promise| Row { id, title: title.to_owned(), unit, promise };
    let benchmark = |id, about: &str, rows, start| Benchmark {
        id,
        about: about.to_owned(),
        needs: &[],
        rows,
        most_rounds: u32::MAX,
        start,
    };
    let caps = |words: &str, ids: [&'static str; 4]| {
        vec![
            row(
                ids[0],
                &format!("1 Gbit/s cap, {words}: worst 1 s"),
                "% off",
                Promise::AlwaysAtMost(NEAR_PERCENT),
            ),
            row(
                ids[1],
                &format!("500 Mbit/s cap, {words}: worst 1 s"),
                "% off",
                Promise::AlwaysAtMost(NEAR_PERCENT),
            ),
            row(ids[2], &format!("third guest without a cap, {words}"), "Gbit/s", Promise::None),
            row(ids[3], &format!("the third guest alone, {words}"), "Gbit/s", Promise::None),
        ]
    };
    let late = |words: &str, ids: [&'static str; 3]| {
        let held = |cap: &str| format!("{cap} cap on direct sockets that are {words} through: worst 1 s");
        vec![
            row(ids[0], &held("1 Gbit/s"), "% off", Promise::AlwaysAtMost(NEAR_PERCENT)),
            row(ids[1], &held("500 Mbit/s"), "% off", Promise::AlwaysAtMost(NEAR_PERCENT)),
            row(ids[2], &format!("third guest, direct, without a cap, {words}"), "Gbit/s", Promise::None),
        ]
    };
    let shares = |words: &str, ids: [&'static str; 2]| {
        vec![
            row(
                ids[0],
                &format!("1 against 32 connections, {words}: off equal"),
                "%",
                Promise::AlwaysAtMost(FAIR_PERCENT),
            ),
            row(ids[1], &format!("both together, {words}, of 2 Gbit/s"), "Gbit/s", Promise::None),
        ]
    };
    let beside = |words: &str, ids: [&'static str; 3]| {
        vec![
            row(ids[0], &format!("p99 of 64 B beside {words}, by its quiet p99"), "x", Promise::AtMost(3.0)),
            row(ids[1], &format!("p99 of 64 B beside {words}"), "us", Promise::None),
            row(ids[2], "p99 of 64 B, quiet", "us", Promise::None),
        ]
    };
    vec![
        benchmark(
            "caps-send",
            "guests capped at 1 Gbit/s and 500 Mbit/s send beside one without a cap",
            caps("sent", ["caps-send-1g", "caps-send-500m", "caps-send-third", "caps-send-alone"]),
            |session| Ok(Box::new(Caps::start(session, Kind::Send, false)?)),
        ),
        benchmark(
            "caps-receive",
            "the same, receiving",
            caps("received", ["caps-receive-1g", "caps-receive-500m", "caps-receive-third", "caps-receive-alone"]),
            |session| Ok(Box::new(Caps::start(session, Kind::Receive, false)?)),
        ),
        benchmark(
            "caps-send-unseen",
            "the same with programs that the library does not see: capped ones are relayed, the third has the kernel's own sockets",
            caps(
                "sent, unseen",
                [
                    "caps-send-1g-unseen",
                    "caps-send-500m-unseen",
                    "caps-send-third-unseen",
                    "caps-send-alone-unseen",
                ],
            ),
            |session| Ok(Box::new(Caps::start(session, Kind::Send, true)?)),
        ),
        benchmark(
            "caps-receive-unseen",
            "the same, receiving",
            caps(
                "received, unseen",
                [
                    "caps-receive-1g-unseen",
                    "caps-receive-500m-unseen",
                    "caps-receive-third-unseen",
                    "caps-receive-alone-unseen",
                ],
            ),
            |session| Ok(Box::new(Caps::start(session, Kind::Receive, true)?)),
        ),
        benchmark(
            "caps-send-late",
            "programs with the kernel's own sockets send; two of their tenants get caps while they do",
            late("sent", ["caps-send-1g-late", "caps-send-500m-late", "caps-send-third-late"]),
            |session| Ok(Box::new(Late::start(session, Kind::Send)?)),
        ),
        benchmark(
            "caps-receive-late",
            "the same, receiving",
            late("received", ["caps-receive-1g-late", "caps-receive-500m-late", "caps-receive-third-late"]),
            |session| Ok(Box::new(Late::start(session, Kind::Receive)?)),
        ),
        benchmark(
            "shares-send",
            "tenants of equal weight with 1 and 32 connections send through an NSM of 2 Gbit/s",
            shares("sent", ["shares-send", "shares-send-sum"]),
            |session| Ok(Box::new(Shares::start(session, Kind::Send)?)),
        ),
        benchmark(
            "shares-receive",
            "the same, receiving",
            shares("received", ["shares-receive", "shares-receive-sum"]),
            |session| Ok(Box::new(Shares::start(session, Kind::Receive)?)),
        ),
        benchmark(
            "guarantee",
            "1 Gbit/s guaranteed of an NSM of 2 Gbit/s, beside 32 connections of a tenant of ten times the weight",
            vec![row(
                "guarantee",
                "1 Gbit/s guaranteed, 32 greedy connections beside: missing",
                "% in 1 s",
                Promise::AlwaysAtMost(NEAR_PERCENT),
            )],
            |session| Ok(Box::new(Guarantee::start(session)?)),
        ),
        benchmark(
            "beside-bulk",
            "a request of 64 B each millisecond, beside a tenant with 8 bulk connections",
            beside("bulk", ["beside-bulk", "beside-bulk-p99", "beside-bulk-quiet"]),
            |session| Ok(Box::new(Beside::start(session, Kind::Send, 8)?)),
        ),
        benchmark(
            "beside-operations",
            "the same beside a tenant that floods operations",
            beside("operations", ["beside-operations", "beside-operations-p99", "beside-operations-quiet"]),
            |session| Ok(Box::new(Beside::start(session, Kind::Operations, 4)?)),
        ),
        benchmark(
            "beside-churn",
            "the same beside a tenant that opens and closes connections",
            beside("churn", ["beside-churn", "beside-churn-p99", "beside-churn-quiet"]),
            |session| Ok(Box::new(Beside::start(session, Kind::Churn, 4)?)),
        ),
        Benchmark {
            id: "cost",
            about: "redis-benchmark -c 50 -P 16 against a tenant's guest without limits, and with limits that never bind".into(),
            needs: &["redis-server", "redis-benchmark"],
            rows: vec![row("cost", "redis -P 16: left without limits, right policed", "requests/s", Promise::RatioAtLeast(0.97))],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Cost::start(session)?)),
        },
    ]
}

/// An engine with tenants that are known by their tokens, and their peers.
struct Host {
    engine: Engine,
    peers: Peers,
    tokens: Vec<PathBuf>,
    /// How each tenant's guests are attached, if not as all.
    attach: Vec<Attach>,
}

impl Host {
    /// `tenants`: the keys of each. `nsm`: more keys of the stack.
    fn start(session: &Session, nsm: &str, tenants: &[&str]) -> Result<Host> {
        let directory = session.subdirectory("tenants")?;
        let stack = &session.settings.stack;
        let mut config = format!("[[nsm]]\nname = \"{stack}\"\ncongestion_control = \"{stack}\"\n{nsm}\n");
        let mut tokens = Vec::new();
        for (i, keys) in tenants.iter().enumerate() {
            let token = directory.join(format!("token-{i}"));
            std::fs::write(&token, format!("{i:032}\n")).context("a token")?;
            config += &format!("[[tenant]]\nname = \"t{i}\"\ntoken_file = \"{}\"\n{keys}\n", token.display());
            tokens.push(token);
        }
        let file = directory.join("engine.toml");
        std::fs::write(&file, config).context("the engine's configuration")?;
        Ok(Host { engine: session.engine_with(&file)?, peers: Peers::start()?, tokens, attach: Vec::new() })
    }

    fn load(
        &self,
        session: &Session,
        side: Side,
        tenant: usize,
        kind: Kind,
        connections: usize,
        seconds: f64,
    ) -> Result<Process> {
        let own = std::env::current_exe().context("this program's own file")?;
        let mut command = match self.attach.get(tenant).filter(|_| side == Side::Netkernel) {
            Some(&attach) => session.guest_by(attach, &self.engine, &session.settings.stack, own),
            None => session.command(side, Some(&self.engine), own),
        };
        command.env("NETKERNEL_TENANT_TOKEN_FILE", &self.tokens[tenant]);
        self.arguments(session, &mut command, tenant, kind, connections, seconds);
        session.spawn("load", Role::Measured, command)
    }

    fn arguments(
        &self,
        session: &Session,
        command: &mut Command,
        tenant: usize,
        kind: Kind,
        connections: usize,
        seconds: f64,
    ) {
        use clap::ValueEnum;
        let kind = kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        command.args(&session.settings.helper).arg("isolation-load").arg(kind);
        command.args([
            self.peers.port.to_string(),
            tenant.to_string(),
            connections.to_string(),
            seconds.to_string(),
        ]);
    }

    /// Runs loads of tenants 0, 1, ... together; for each the bits per second in all windows of a second.
    fn together(
        &self,
        session: &Session,
        kind: Kind,
        connections: &[(usize, usize)],
    ) -> Result<Vec<Windows>> {
        self.together_then(session, kind, connections, WARM_S, || Ok(()))
    }

    /// The same, with something done once all have begun. Windows begin at `from_s`.
    fn together_then(
        &self,
        session: &Session,
        kind: Kind,
        connections: &[(usize, usize)],
        from_s: f64,
        mut then: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Windows>> {
        let seconds = session.settings.seconds.max(3.0) + from_s;
        let (mut is_done, mut from_s) = (false, from_s);
        let mut loads = Vec::new();
        for &(tenant, count) in connections {
            loads.push(self.load(session, Side::Netkernel, tenant, kind, count, seconds + 0.5)?);
        }
        let mut series: Vec<Vec<(f64, f64)>> = vec![Vec::new(); loads.len()];
        let begin = Instant::now();
        while begin.elapsed().as_secs_f64() < seconds {
            for (series, &(tenant, _)) in series.iter_mut().zip(connections) {
                series.push((begin.elapsed().as_secs_f64(), self.peers.received(tenant as u8) as f64 * 8.0));
            }
            for load in &mut loads {
                load.still_runs(Duration::ZERO)?;
            }
            if !is_done && begin.elapsed().as_secs_f64() >= WARM_S {
                let before = begin.elapsed();
                then()?;
                is_done = true;
                // It may have waited for a core.
                from_s += (begin.elapsed() - before).as_secs_f64();
            }
            std::thread::sleep(SAMPLE);
        }
        for (load, series) in loads.iter_mut().zip(&mut series) {
            let (text, _) = load.finish(Duration::from_secs(30))?;
            if kind == Kind::Receive {
                // Counted by the guest itself: what the peer has sent may stand in buffers.
                *series = parse(&text)?;
            }
        }
        series.iter().map(|series| Windows::of(series, from_s, seconds)).collect()
    }
}

fn parse(text: &str) -> Result<Vec<(f64, f64)>> {
    let line = |line: &str| -> Option<(f64, f64)> {
        let (time, bytes) = line.split_once(' ')?;
        Some((time.parse::<f64>().ok()? / 1e6, bytes.parse::<f64>().ok()? * 8.0))
    };
    text.lines().map(|text| line(text).with_context(|| format!("a load said {text:?}"))).collect()
}

/// Bits per second, over all windows of a second that begin at a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Windows {
    least: f64,
    most: f64,
    mean: f64,
}

impl Windows {
    fn of(series: &[(f64, f64)], from_s: f64, to_s: f64) -> Result<Windows> {
        let used: Vec<(f64, f64)> =
            series.iter().copied().filter(|(t, _)| (from_s..=to_s).contains(t)).collect();
        let (Some(first), Some(last)) = (used.first(), used.last()) else { bail!("no samples") };
        let mut rates = Vec::new();
        for (i, &(t, bits)) in used.iter().enumerate() {
            if let Some(&(end, then)) = used[i..].iter().find(|(end, _)| *end >= t + WINDOW_S) {
                rates.push((then - bits) / (end - t));
            }
        }
        if rates.is_empty() {
            bail!("no window of a second in {:.1} s", last.0 - first.0);
        }
        Ok(Windows {
            least: rates.iter().copied().fold(f64::INFINITY, f64::min),
            most: rates.iter().copied().fold(0.0, f64::max),
            mean: (last.1 - first.1) / (last.0 - first.0),
        })
    }

    /// Percent by which the worst window is off.
    fn off(&self, wanted: f64) -> f64 {
        (self.most / wanted - 1.0).abs().max((self.least / wanted - 1.0).abs()) * 100.0
    }

    fn json(&self) -> Value {
        json!({ "least": self.least, "most": self.most, "mean": self.mean })
    }
}

/// What the plain kernel has no measure for.
fn nothing(rows: usize) -> Sample {
    Sample { values: vec![f64::NAN; rows], detail: Value::Null, remarks: Vec::new() }
}

fn sample(values: Vec<f64>, windows: &[Windows]) -> Sample {
    let detail = json!(windows.iter().map(Windows::json).collect::<Vec<_>>());
    Sample { values, detail, remarks: Vec::new() }
}

struct Caps {
    host: Host,
    kind: Kind,
}

impl Caps {
    fn start(session: &Session, kind: Kind, unseen: bool) -> Result<Caps> {
        let cap = |rate: &str| format!("max_send = \"{rate}\"\nmax_receive = \"{rate}\"");
        let mut host = Host::start(session, "", &[&cap("1 Gbit/s"), &cap("500 Mbit/s"), ""])?;
        if unseen {
            host.attach = vec![Attach::Relay, Attach::Relay, Attach::Direct];
        }
        Ok(Caps { host, kind })
    }
}

impl Live for Caps {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(nothing(4));
        }
        let windows = self.host.together(session, self.kind, &[(0, 1), (1, 1), (2, 1)])?;
        let alone = self.host.together(session, self.kind, &[(2, 1)])?;
        let [one, half, third] = windows[..] else { bail!("three were started") };
        let values = vec![one.off(CAPS[0]), half.off(CAPS[1]), third.mean / 1e9, alone[0].mean / 1e9];
        Ok(sample(values, &[one, half, third, alone[0]]))
    }
}

/// Caps that come while the kernel's own sockets are open.
struct Late {
    host: Host,
    kind: Kind,
}

impl Late {
    fn start(session: &Session, kind: Kind) -> Result<Late> {
        let mut host = Host::start(session, "", &["", "", ""])?;
        host.attach = vec![Attach::Direct; 3];
        Ok(Late { host, kind })
    }

    fn cap(&self, session: &Session, rates: [&str; 2]) -> Result<()> {
        for (tenant, rate) in ["t0", "t1"].into_iter().zip(rates) {
            let mut command = Command::new(&session.settings.netkernel);
            command.args(["tenant", "set", "--socket"]).arg(self.host.engine.socket());
            command.args([tenant, "--max-send", rate, "--max-receive", rate]);
            let done = command.output().context("netkernel tenant set")?;
            if !done.status.success() {
                bail!("tenant set: {}", String::from_utf8_lossy(&done.stderr).trim());
            }
        }
        Ok(())
    }
}

impl Live for Late {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(nothing(3));
        }
        self.cap(session, ["none"; 2])?;
        let all = [(0, 1), (1, 1), (2, 1)];
        let from_s = WARM_S + SETTLE_S;
        let windows = self.host.together_then(session, self.kind, &all, from_s, || {
            self.cap(session, ["1 Gbit/s", "500 Mbit/s"])
        })?;
        let [one, half, third] = windows[..] else { bail!("three were started") };
        Ok(sample(vec![one.off(CAPS[0]), half.off(CAPS[1]), third.mean / 1e9], &windows))
    }
}

struct Shares {
    host: Host,
    kind: Kind,
}

impl Shares {
    fn start(session: &Session, kind: Kind) -> Result<Shares> {
        Ok(Shares { host: Host::start(session, "capacity = \"2 Gbit/s\"", &["", ""])?, kind })
    }
}

impl Live for Shares {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(nothing(2));
        }
        let windows = self.host.together(session, self.kind, &[(0, 1), (1, 32)])?;
        let sum: f64 = windows.iter().map(|windows| windows.mean).sum();
        let off = windows.iter().map(|windows| (windows.mean / (sum / 2.0) - 1.0).abs()).fold(0.0, f64::max);
        Ok(sample(vec![off * 100.0, sum / 1e9], &windows))
    }
}

struct Guarantee(Host);

impl Guarantee {
    fn start(session: &Session) -> Result<Guarantee> {
        let tenants = ["guaranteed_send = \"1 Gbit/s\"", "weight = 10"];
        Ok(Guarantee(Host::start(session, "capacity = \"2 Gbit/s\"", &tenants)?))
    }
}

impl Live for Guarantee {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(nothing(1));
        }
        let windows = self.0.together(session, Kind::Send, &[(0, 1), (1, 32)])?;
        let missing = (1.0 - windows[0].least / 1e9).max(0.0) * 100.0;
        Ok(sample(vec![missing], &windows))
    }
}

struct Beside {
    host: Host,
    flood: Kind,
    connections: usize,
}

impl Beside {
    fn start(session: &Session, flood: Kind, connections: usize) -> Result<Beside> {
        Ok(Beside { host: Host::start(session, "", &["", ""])?, flood, connections })
    }

    fn paced(&self, session: &Session, side: Side) -> Result<[f64; 4]> {
        let seconds = session.settings.seconds;
        let mut load = self.host.load(session, side, 0, Kind::Paced, 1, seconds)?;
        let (text, _) = load.finish(Duration::from_secs_f64(60.0 + 60.0 * seconds))?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().ok().with_context(|| format!("the paced load said {:?}", text.trim()))
    }
}

impl Live for Beside {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let quiet = self.paced(session, side)?;
        let mut flood = self.host.load(session, side, 1, self.flood, self.connections, 3600.0)?;
        flood.still_runs(Duration::from_millis(500))?;
        let flooded = self.paced(session, side)?;
        flood.still_runs(Duration::ZERO)?;
        let did = flood.output().ok().and_then(|text| parse(&text).ok()).and_then(|series| {
            let (first, last) = (*series.get(3)?, *series.last()?);
            Some((last.1 - first.1) / 8.0 / (last.0 - first.0))
        });
        flood.stop();
        let told = |[p50, p99, worst, count]: [f64; 4]| json!({ "p50_us": p50, "p99_us": p99, "worst_us": worst, "count": count });
        let detail = json!({ "quiet": told(quiet), "flooded": told(flooded), "flood_per_s": did });
        Ok(Sample { values: vec![flooded[1] / quiet[1], flooded[1], quiet[1]], detail, remarks: Vec::new() })
    }
}

/// Limits that never bind, and none.
struct Cost {
    _hosts: [Host; 2],
    _servers: [Process; 2],
    ports: [u16; 2],
    requests: u64,
}

impl Cost {
    fn start(session: &Session) -> Result<Cost> {
        const WIDE: &str = "max_send = \"800 Gbit/s\"\nmax_receive = \"800 Gbit/s\"\nmax_operations = 1000000000\nmax_connections = 1000000";
        let hosts =
            [Host::start(session, "", &[""])?, Host::start(session, "capacity = \"800 Gbit/s\"", &[WIDE])?];
        let serve = |host: &Host| -> Result<(Process, u16)> {
            let (directory, port) = (session.subdirectory("redis")?, session.port()?);
            let mut command =
                redis::server_command(session, Side::Netkernel, Some(&host.engine), port, &directory);
            command.env("NETKERNEL_TENANT_TOKEN_FILE", &host.tokens[0]);
            Ok((session.server("redis-server", Role::Measured, Some(&host.engine), command, port)?, port))
        };
        let ((one, first), (two, second)) = (serve(&hosts[0])?, serve(&hosts[1])?);
        let mut cost =
            Cost { _hosts: hosts, _servers: [one, two], ports: [first, second], requests: 200_000 };
        cost.run(session, second)?;
        let rate = cost.run(session, first)?;
        cost.requests = (rate * session.settings.seconds / 2.0) as u64;
        Ok(cost)
    }

    fn run(&self, session: &Session, port: u16) -> Result<f64> {
        redis::rate(session, port, 50, 16, self.requests)
    }
}

impl Live for Cost {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let rate = self.run(session, self.ports[usize::from(side == Side::Netkernel)])?;
        Ok(Sample { values: vec![rate], detail: Value::Null, remarks: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_window_counts() {
        // A gigabit per second, but nothing for 50 ms at 2.0 s, and that twice as fast after it.
        let series: Vec<(f64, f64)> = (0..=50)
            .map(|i| {
                let t = f64::from(i) / 10.0;
                (t, if i == 20 { 1.95e9 } else { t * 1e9 })
            })
            .collect();
        let windows = Windows::of(&series, 1.0, 5.0).unwrap();
        assert!(
            (windows.least / 1e9 - 0.95).abs() < 1e-6 && (windows.most / 1e9 - 1.05).abs() < 1e-6,
            "{windows:?}"
        );
        assert!((windows.off(1e9) - 5.0).abs() < 1e-6);
        assert!((windows.mean / 1e9 - 1.0).abs() < 1e-6);
        assert!(Windows::of(&series, 4.5, 5.0).is_err());
    }

    #[test]
    fn every_figure_has_a_name_of_its_own() {
        let settings = Settings {
            netkernel: PathBuf::new(),
            stack: String::new(),
            seconds: 1.0,
            connections: 1,
            placement: crate::session::Placement::Free,
            attach: crate::session::Attach::Queued,
            quick: true,
            helper: Vec::new(),
        };
        let mut ids: Vec<&str> =
            catalog(&settings).iter().flat_map(|benchmark| benchmark.rows.iter().map(|row| row.id)).collect();
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all);
    }
}
