//! `netkernel bench forms`: an NSM in a process of its own beside the same one in the engine, and what guests notice when that
//! process is exchanged or dies.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::{Benchmark, Live, Promise, Sample, redis, row};
use crate::process::Process;
use crate::session::{Engine, Role, Session, Settings, Side};

/// The NSMs by form, as they are called here.
pub const SIDES: [&str; 2] = ["engine", "process"];

pub fn catalog(_: &Settings) -> Vec<Benchmark> {
    vec![
        Benchmark {
            id: "redis-p1",
            about: "redis-benchmark -c 50 -P 1 against a guest server".into(),
            needs: redis::NEEDS,
            rows: vec![row("redis-p1", "redis -c 50 -P 1", "requests/s", Promise::None)],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Requests::start(session, 1)?)),
        },
        Benchmark {
            id: "redis-p16",
            about: "redis-benchmark -c 50 -P 16 against a guest server".into(),
            needs: redis::NEEDS,
            rows: vec![row("redis-p16", "redis -c 50 -P 16", "requests/s", Promise::RatioAtLeast(0.8))],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Requests::start(session, 16)?)),
        },
        Benchmark {
            id: "pause",
            about: "what a client of a guest waits when the process is killed, or exchanged (`nsm restart`)"
                .into(),
            needs: redis::NEEDS,
            rows: vec![
                row("pause-killed", "answer to a request after kill -9", "ms", Promise::AlwaysAtMost(100.0)),
                row("pause-exchanged", "`nsm restart`: nobody serves", "ms", Promise::AlwaysAtMost(100.0)),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Pause(Servers::start(session)?))),
        },
        Benchmark {
            id: "engine",
            about: "the engine itself, exchanged (`netkernel restart`) under redis-benchmark -c 50 -P 16"
                .into(),
            needs: redis::NEEDS,
            rows: vec![
                row(
                    "engine-exchanged",
                    "engine form, `netkernel restart`: nobody serves",
                    "ms",
                    Promise::AlwaysAtMost(300.0),
                ),
                row(
                    "engine-answer",
                    "engine form, the longest answer meanwhile",
                    "ms",
                    Promise::AlwaysAtMost(300.0),
                ),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Exchanged::start(session)?)),
        },
    ]
}

/// One engine with an NSM of each form, and a redis on each.
struct Servers {
    engine: Engine,
    ports: [u16; 2],
    _programs: [Process; 2],
}

fn of(side: Side) -> usize {
    usize::from(side == Side::Netkernel)
}

impl Servers {
    fn start(session: &Session) -> Result<Servers> {
        let config = session.subdirectory("forms")?.join("netkernel.toml");
        let nsm = |name: &str| {
            let congestion = &session.settings.stack;
            format!("[[nsm]]\nname = \"{name}\"\nform = \"{name}\"\ncongestion_control = \"{congestion}\"\n")
        };
        fs::write(&config, SIDES.map(nsm).concat())?;
        let engine = session.engine_with(&config)?;
        let ports = [session.port()?, session.port()?];
        let server = |side: usize| {
            let directory = session.subdirectory("redis")?;
            let command = session.guest(&engine, SIDES[side], "redis-server");
            let command = redis::arguments(command, ports[side], &directory);
            session.server("redis-server", Role::Measured, Some(&engine), command, ports[side])
        };
        let programs = [server(0)?, server(1)?];
        let servers = Servers { engine, ports, _programs: programs };
        // The guest is the process's, or there is none.
        servers.worker()?;
        Ok(servers)
    }

    /// The process that serves: the engine's child only holds its descriptors.
    fn worker(&self) -> Result<i32> {
        self.engine.process.grandchildren().into_iter().next().context("the NSM has no process")
    }
}

struct Requests {
    servers: Servers,
    depth: u32,
    /// Of each kind.
    requests: u64,
}

impl Requests {
    fn start(session: &Session, depth: u32) -> Result<Requests> {
        let servers = Servers::start(session)?;
        let few = 20_000 * u64::from(depth.min(10));
        let mut requests = Requests { servers, depth, requests: few };
        requests.run(session, Side::Netkernel)?;
        let rate = requests.run(session, Side::Native)?;
        requests.requests = ((rate * session.settings.seconds / 2.0) as u64).max(1000);
        Ok(requests)
    }

    fn run(&self, session: &Session, side: Side) -> Result<f64> {
        redis::rate(session, self.servers.ports[of(side)], 50, self.depth, self.requests)
    }
}

impl Live for Requests {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let rate = self.run(session, side)?;
        Ok(Sample::new(vec![rate], json!({ "requests": 2 * self.requests })))
    }
}

/// The engine form has neither.
struct Pause(Servers);

impl Live for Pause {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(Sample::new(vec![f64::NAN; 2], Value::Null));
        }
        let mut client = redis::Asker::connect(self.0.ports[of(side)])?;
        client.ask()?;
        let worker = self.0.worker()?;
        // SAFETY: the process is a descendant of this benchmark's engine.
        if unsafe { libc::kill(worker, libc::SIGKILL) } != 0 {
            bail!("the NSM's process cannot be killed: {}", std::io::Error::last_os_error());
        }
        let killed = client.ask()? / 1e3;
        let exchanged = self.exchange(session)?;
        client.ask()?;
        Ok(Sample::new(vec![killed, exchanged], json!({ "killed_ms": killed, "exchanged_ms": exchanged })))
    }
}

impl Pause {
    fn exchange(&self, session: &Session) -> Result<f64> {
        pause(&session.settings.netkernel, &self.0.engine.socket, &["nsm", "restart", SIDES[1]])
    }
}

/// What a command that exchanges something tells of the time in which nobody served, in milliseconds.
fn pause(netkernel: &Path, socket: &Path, arguments: &[&str]) -> Result<f64> {
    let mut command = Command::new(netkernel);
    command.args(arguments).args(["--json", "--socket"]).arg(socket);
    let begin = Instant::now();
    let name = arguments.join(" ");
    // It waits for a minute at most.
    let output = command.output().with_context(|| format!("`{name}` cannot be run"))?;
    let reply: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("`{name}`: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
    let pause = reply["pause_us"].as_f64().with_context(|| format!("`{name}` tells no pause"))? / 1e3;
    if pause > begin.elapsed().as_secs_f64() * 1e3 {
        bail!("the pause of {pause} ms is longer than the command took");
    }
    Ok(pause)
}

/// How often in a round.
const EXCHANGES: u32 = 3;

/// The engine's form only: what guests of a process would wait is nothing.
struct Exchanged {
    servers: Servers,
    /// As many as take a round's time.
    requests: u64,
}

impl Exchanged {
    fn start(session: &Session) -> Result<Exchanged> {
        let servers = Servers::start(session)?;
        let rate = redis::rate(session, servers.ports[0], 50, 16, 200_000)?;
        let requests = (rate * (session.settings.seconds / 2.0).max(1.0)) as u64;
        Ok(Exchanged { servers, requests })
    }
}

impl Live for Exchanged {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(Sample::new(vec![f64::NAN; 2], Value::Null));
        }
        let port = self.servers.ports[0];
        let over = AtomicBool::new(false);
        let mut client = redis::Asker::connect(port)?;
        let (netkernel, socket) = (&session.settings.netkernel, &self.servers.engine.socket);
        let between = Duration::from_secs_f64(session.settings.seconds / f64::from(EXCHANGES + 1));
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| {
                let mut longest = 0f64;
                while !over.load(Relaxed) {
                    longest = longest.max(client.ask()? / 1e3);
                }
                Ok::<f64, anyhow::Error>(longest)
            });
            let pauses = scope.spawn(|| {
                let one = |_| {
                    std::thread::sleep(between);
                    pause(netkernel, socket, &["restart"])
                };
                (0..EXCHANGES).map(one).collect::<Result<Vec<f64>>>()
            });
            // Fails if a single one of its connections is lost.
            let load = redis::rate(session, port, 50, 16, self.requests);
            let pauses = pauses.join();
            over.store(true, Relaxed);
            let longest = asker.join();
            let dead = |_| anyhow!("a client's thread died");
            load.context("redis-benchmark lost a connection")?;
            let longest = longest.map_err(dead)?.context("a client lost its connection")?;
            let pauses = pauses.map_err(dead)??;
            let most = pauses.iter().copied().fold(0.0, f64::max);
            Ok(Sample::new(vec![most, longest], json!({ "pauses_ms": pauses, "longest_ms": longest })))
        })
    }
}
