//! What it costs when nothing happens: memory of idle connections, CPU time of an engine whose guests are idle.

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{collections::HashMap, io};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Benchmark, Live, Promise, Row, Sample, nginx, redis, row};
use crate::process::{self, Memory, Process};
use crate::session::{Engine, Role, Session, Settings, Side, find_program};
use crate::sys;

pub fn benchmarks(settings: &Settings) -> Vec<Benchmark> {
    let count = settings.connections;
    let memory = |id, title: &str, promise| -> Row {
        row(id, format!("{count} idle connections: {title}"), "B each", promise)
    };
    vec![
        Benchmark {
            id: "idle-connections",
            about: format!("memory of {count} idle connections into one guest server"),
            needs: &[],
            rows: vec![
                memory("idle-connections", "region + engine", Promise::AtMost(2048.0)),
                memory("idle-connections-used", "region + engine, each used once", Promise::None),
                memory("idle-connections-server", "the server's own memory", Promise::None),
                memory("idle-connections-slab", "kernel slab, both ends", Promise::None),
            ],
            most_rounds: 3,
            start: |_| Ok(Box::new(Connections)),
        },
        Benchmark {
            id: "idle-engine",
            about: "CPU time of the engine with three idle guests: redis, python3 http.server, nginx".into(),
            needs: &["redis-server", "python3", "nginx"],
            rows: vec![
                row("idle-engine", "engine with idle guests", "% of a core", Promise::AtMost(1.0)),
                row("idle-guests", "the idle servers themselves", "% of a core", Promise::None),
            ],
            most_rounds: 3,
            start: |session| Ok(Box::new(Idlers::start(session)?)),
        },
    ]
}

/// Everything is fresh in each round: memory that is reused would not show.
struct Connections;

impl Live for Connections {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        const SETTLE: Duration = Duration::from_millis(500);
        let limit = Duration::from_secs(120);
        let count = session.settings.connections;
        let own = std::env::current_exe().context("this program's own file")?;
        let helper = |side, engine: Option<&Engine>| {
            let mut command = session.command(side, engine, &own);
            command.args(&session.settings.helper);
            command
        };

        let mut engine = (side == Side::Netkernel).then(|| session.engine()).transpose()?;
        let port = session.port()?;
        let mut command = helper(side, engine.as_ref());
        command.args(["idle-server", &port.to_string()]);
        let mut server = session.server("idle-server", Role::Measured, engine.as_ref(), command, port)?;

        let mut look = |pause: Duration| -> Result<(Memory, Memory, f64)> {
            server.still_runs(pause)?;
            let of_engine = match &mut engine {
                Some(engine) => {
                    engine.process.still_runs(Duration::ZERO)?;
                    engine.process.memory()
                }
                None => Memory::default(),
            };
            Ok((of_engine, server.memory(), process::slab()))
        };
        let before = look(SETTLE)?;
        let mut command = helper(Side::Native, None);
        command.args(["idle-client", &port.to_string(), &count.to_string()]);
        let mut client = Process::start_piped("idle-client", command, session.directory())?;
        expect(&client.line(limit)?, "connected")?;
        let connected = look(SETTLE)?;
        client.tell("use")?;
        expect(&client.line(limit)?, "used")?;
        let used = look(SETTLE)?;

        let each = |bytes: f64| bytes / count as f64;
        // The server's share of the region is a part of the region, and is counted there.
        let beyond = |after: &(Memory, Memory, f64)| {
            let regions = after.0.and(after.1).regions() - before.0.and(before.1).regions();
            regions + after.0.anonymous - before.0.anonymous
        };
        let (region_engine, region_engine_used) = match side {
            Side::Native => (f64::NAN, f64::NAN),
            Side::Netkernel => (each(beyond(&connected)), each(beyond(&used))),
        };
        let values = vec![
            region_engine,
            region_engine_used,
            each(connected.1.anonymous - before.1.anonymous),
            each(connected.2 - before.2),
        ];
        let record = |(engine, server, slab): (Memory, Memory, f64)| json!({ "engine": engine, "server": server, "slab": slab });
        let detail = json!({
            "connections": count, "before": record(before), "connected": record(connected), "used": record(used),
        });
        Ok(Sample::new(values, detail))
    }
}

fn expect(line: &str, word: &str) -> Result<()> {
    if line == word { Ok(()) } else { bail!("the client says: {line}") }
}

/// Accepts connections on `port`, and sends back what comes. Never ends by itself.
pub fn idle_server(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).context("cannot listen")?;
    listener.set_nonblocking(true)?;
    let epoll = sys::Epoll::new()?;
    epoll.add(listener.as_raw_fd())?;
    let mut streams = HashMap::new();
    loop {
        let ready = match epoll.wait() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            ready => ready?,
        };
        for fd in ready {
            if fd == listener.as_raw_fd() {
                match listener.accept() {
                    Ok((stream, _)) => {
                        epoll.add(stream.as_raw_fd())?;
                        streams.insert(stream.as_raw_fd(), stream);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).context("cannot accept"),
                }
                continue;
            }
            let Some(stream) = streams.get_mut(&fd) else { continue };
            let mut buffer = [0; 64];
            let echoed = match stream.read(&mut buffer) {
                Ok(0) | Err(_) => false,
                Ok(length) => stream.write_all(&buffer[..length]).is_ok(),
            };
            if !echoed {
                streams.remove(&fd);
            }
        }
    }
}

/// Opens `count` connections to `port` and holds them until stdin ends; a line on stdin makes each carry one byte both
/// ways.
pub fn idle_client(port: u16, count: usize) -> Result<()> {
    let limit = Some(Duration::from_secs(20));
    let mut streams = Vec::with_capacity(count);
    for n in 0..count {
        let stream = TcpStream::connect(("127.0.0.1", port)).with_context(|| format!("connection {n}"))?;
        sys::reset_on_close(stream.as_raw_fd())?;
        stream.set_read_timeout(limit)?;
        streams.push(stream);
    }
    // The last one is accepted after all others; it tells that the server has them all.
    let last = streams.last_mut().context("no connections")?;
    last.write_all(b"x")?;
    last.read_exact(&mut [0]).context("the last connection was not served")?;
    println!("connected");
    for line in io::stdin().lock().lines() {
        line?;
        for (n, stream) in streams.iter_mut().enumerate() {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0]).with_context(|| format!("connection {n} was not served"))?;
        }
        println!("used");
    }
    Ok(())
}

/// Three servers that nobody asks anything, on each side.
struct Idlers {
    engine: Engine,
    native: Vec<Process>,
    guests: Vec<Process>,
}

impl Idlers {
    fn start(session: &Session) -> Result<Idlers> {
        let mut engine = session.engine()?;
        let native = Idlers::servers(session, Side::Native, None)?;
        let guests = Idlers::servers(session, Side::Netkernel, Some(&engine))?;
        engine.process.still_runs(Duration::from_secs(if session.settings.quick { 1 } else { 2 }))?;
        Ok(Idlers { engine, native, guests })
    }

    fn servers(session: &Session, side: Side, engine: Option<&Engine>) -> Result<Vec<Process>> {
        let mut servers = Vec::new();
        let mut start = |name, make: &dyn Fn(u16, &std::path::PathBuf) -> Result<Command>| -> Result<()> {
            let port = session.port()?;
            let command = make(port, &session.subdirectory(name)?)?;
            servers.push(session.server(name, Role::Measured, engine, command, port)?);
            Ok(())
        };
        start("redis-server", &|port, directory| {
            Ok(redis::server_command(session, side, engine, port, directory))
        })?;
        start("python3", &|port, directory| {
            let program = find_program("python3").context("python3 is not installed")?;
            let mut command = session.command(side, engine, program);
            command.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(directory);
            command.arg(port.to_string());
            Ok(command)
        })?;
        start("nginx", &|port, directory| nginx::server_command(session, side, engine, port, directory))?;
        Ok(servers)
    }
}

impl Live for Idlers {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let window = Duration::from_secs_f64(if session.settings.quick { 2.0 } else { 5.0 });
        let servers = if side == Side::Native { &self.native } else { &self.guests };
        let look = |engine: &Engine| {
            let engine_s = engine.process.cpu_s();
            (engine_s, servers.iter().map(Process::cpu_s).sum::<f64>(), Instant::now())
        };
        let before = look(&self.engine);
        self.engine.process.still_runs(window)?;
        let after = look(&self.engine);
        let elapsed = (after.2 - before.2).as_secs_f64();
        let percent = |seconds: f64| seconds / elapsed * 100.0;
        let (engine, own) = (percent(after.0 - before.0), percent(after.1 - before.1));
        let detail = json!({ "engine_percent": engine, "servers_percent": own, "window_s": elapsed });
        Ok(Sample::new(vec![if side == Side::Native { f64::NAN } else { engine }, own], detail))
    }
}
