//! `netkernel bench memory`: both ends are guests of one engine, joined in memory, beside the same programs over loopback TCP.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Benchmark, Live, Pair, Promise, Sample, iperf3, nginx, redis, row, two_copies};
use crate::process::Process;
use crate::report;
use crate::session::{Engine, Role, Session, Settings, Side};

/// Bytes of a request and of its answer.
const PING: usize = 64;

pub fn catalog(_: &Settings) -> Vec<Benchmark> {
    vec![
        Benchmark {
            id: "ping",
            about: "64 B there and back, both guests; blocking calls, one connection".into(),
            needs: &[],
            rows: vec![
                row("ping", "64 B round trip, median", "us", Promise::RatioAtMost(1.0 / 20.0)),
                row("ping-p99", "64 B round trip, 99th percentile", "us", Promise::None),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Ping::start(session, false)?)),
        },
        Benchmark {
            id: "ping-udp",
            about: "64 B there and back in datagrams, both guests; blocking calls".into(),
            needs: &[],
            rows: vec![
                row("ping-udp", "64 B round trip by UDP, median", "us", Promise::None),
                row("ping-udp-p99", "64 B round trip by UDP, 99th percentile", "us", Promise::None),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Ping::start(session, true)?)),
        },
        Benchmark {
            id: "iperf3",
            about: "iperf3, one stream, writes of 128 KiB, both guests".into(),
            needs: &["iperf3"],
            rows: vec![
                row("iperf3", "iperf3 one stream, 128 KiB writes", "Gbit/s", Promise::RatioAtLeast(2.5)),
                row("iperf3-limit", "the most that two copies allow here", "Gbit/s", Promise::None),
            ],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Stream::start(session, false)?)),
        },
        Benchmark {
            id: "iperf3-single",
            about: "the same, guests that trust each other (single_copy)".into(),
            needs: &["iperf3"],
            rows: vec![row(
                "iperf3-single",
                "iperf3 one stream, 128 KiB writes, single_copy",
                "Gbit/s",
                Promise::RatioAtLeast(2.5),
            )],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Stream::start(session, true)?)),
        },
        Benchmark {
            id: "redis-p1",
            about: "redis -c 50 -P 1, both guests".into(),
            needs: redis::NEEDS,
            rows: vec![row("redis-p1", "redis -c 50 -P 1", "requests/s", Promise::RatioAtLeast(2.0))],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Requests::start(session, 1, false)?)),
        },
        Benchmark {
            id: "redis-p1-unix",
            about: "redis -c 50 -P 1, both guests, beside a Unix socket".into(),
            needs: redis::NEEDS,
            rows: vec![row(
                "redis-p1-unix",
                "redis -c 50 -P 1, Unix socket",
                "requests/s",
                Promise::RatioAtLeast(1.0),
            )],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Requests::start(session, 1, true)?)),
        },
        Benchmark {
            id: "redis-p16",
            about: "redis -c 50 -P 16, both guests".into(),
            needs: redis::NEEDS,
            rows: vec![row("redis-p16", "redis -c 50 -P 16", "requests/s", Promise::None)],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Requests::start(session, 16, false)?)),
        },
        Benchmark {
            id: "redis-p16-unix",
            about: "redis -c 50 -P 16, both guests, beside a Unix socket".into(),
            needs: redis::NEEDS,
            rows: vec![row("redis-p16-unix", "redis -c 50 -P 16, Unix socket", "requests/s", Promise::None)],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Requests::start(session, 16, true)?)),
        },
        Benchmark {
            id: "nginx-keepalive",
            about: "wrk -c 50 -t 1, kept connections, file of 438 B, both guests".into(),
            needs: nginx::NEEDS,
            rows: vec![row(
                "nginx-keepalive",
                "nginx keep-alive, wrk -c 50",
                "requests/s",
                Promise::RatioAtLeast(1.5),
            )],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Web::start(session, false)?)),
        },
        Benchmark {
            id: "nginx-close",
            about: "the same, a connection per request".into(),
            needs: nginx::NEEDS,
            rows: vec![row("nginx-close", "nginx Connection: close, wrk -c 50", "requests/s", Promise::None)],
            most_rounds: u32::MAX,
            start: |session| Ok(Box::new(Web::start(session, true)?)),
        },
    ]
}

/// A client of one side, on the peer's core.
fn client(session: &Session, side: Side, engine: &Engine, program: &str, args: &[String]) -> Result<String> {
    let mut command = session.command(side, Some(engine), program);
    command.args(args);
    let limit = Duration::from_secs_f64(30.0 + 30.0 * session.settings.seconds);
    Ok(session.client(program, Role::Peer, command, limit)?.0)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

struct Ping {
    pair: Pair,
    udp: bool,
}

/// What chooses datagrams.
fn by_udp(udp: bool) -> &'static [&'static str] {
    if udp { &["--udp"] } else { &[] }
}

impl Ping {
    fn start(session: &Session, udp: bool) -> Result<Ping> {
        let pair = Pair::start(session, |session, side, engine, port| {
            let own = std::env::current_exe().context("this program's own file")?;
            let mut command = session.command(side, engine, &own);
            command.args(&session.settings.helper).args(["ping-server", &port.to_string()]);
            command.args(by_udp(udp));
            session.server("ping-server", Role::Measured, engine, command, port)
        })?;
        Ok(Ping { pair, udp })
    }
}

impl Live for Ping {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let own = std::env::current_exe().context("this program's own file")?;
        let own = own.to_str().context("a path that is no text")?;
        let mut args = session.settings.helper.clone();
        args.extend(words(&["ping-client", &self.pair.port(side).to_string()]));
        args.push(session.settings.seconds.to_string());
        args.extend(words(by_udp(self.udp)));
        let text = client(session, side, &self.pair.engine, own, &args)?;
        let start = text.find('{').context("the client printed nothing")?;
        let detail: Value = serde_json::from_str(&text[start..]).context("the client's report")?;
        let of = |name: &str| detail[name].as_f64().with_context(|| format!("no {name}"));
        Ok(Sample::new(vec![of("p50_us")?, of("p99_us")?], detail))
    }
}

/// Sends back what comes, for whoever connects, one after the other; with `udp` datagrams, too.
pub fn ping_server(port: u16, udp: bool) -> Result<()> {
    if udp {
        let socket = UdpSocket::bind(("127.0.0.1", port)).context("ping-server")?;
        std::thread::spawn(move || {
            let mut buffer = [0; PING];
            while let Ok((bytes, peer)) = socket.recv_from(&mut buffer)
                && socket.send_to(&buffer[..bytes], peer).is_ok()
            {}
        });
    }
    let listener = TcpListener::bind(("127.0.0.1", port)).context("ping-server")?;
    loop {
        let (mut stream, _) = listener.accept().context("ping-server")?;
        stream.set_nodelay(true)?;
        let mut buffer = [0; PING];
        while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
    }
}

/// Prints the quantiles of round trips as JSON.
pub fn ping_client(port: u16, seconds: f64, udp: bool) -> Result<()> {
    let mut buffer = [b'p'; PING];
    if udp {
        let socket = UdpSocket::bind("127.0.0.1:0").context("ping-client")?;
        socket.connect(("127.0.0.1", port)).context("ping-client")?;
        return round_trips(seconds, || {
            socket.send(&buffer)?;
            socket.recv(&mut buffer)?;
            Ok(())
        });
    }
    let mut stream = TcpStream::connect(("127.0.0.1", port)).context("ping-client")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(None)?;
    round_trips(seconds, || {
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        Ok(())
    })
}

fn round_trips(seconds: f64, mut ping: impl FnMut() -> Result<()>) -> Result<()> {
    let mut times = Vec::with_capacity(1 << 22);
    let begin = Instant::now();
    let (warm, end) = (Duration::from_secs_f64(seconds / 10.0), Duration::from_secs_f64(seconds * 1.1));
    loop {
        let start = Instant::now();
        ping()?;
        let time = start.elapsed();
        let since = begin.elapsed();
        if since > warm {
            times.push(time.as_secs_f64() * 1e6);
        }
        if since > end {
            break;
        }
    }
    if times.is_empty() {
        bail!("no round trip in {seconds} s");
    }
    times.sort_by(f64::total_cmp);
    let of = |q| report::quantile(&times, q);
    let report = json!({
        "round_trips": times.len(), "least_us": of(0.0), "p50_us": of(0.5), "p90_us": of(0.9), "p99_us": of(0.99),
        "p999_us": of(0.999),
    });
    println!("{report}");
    Ok(())
}

struct Stream {
    pair: Pair,
    /// Large writes take one copy; else the most that two copies allow is measured, too.
    single: bool,
}

impl Stream {
    fn start(session: &Session, single: bool) -> Result<Stream> {
        let directory = session.subdirectory("stream")?;
        let config = directory.join("engine.toml");
        let stack = &session.settings.stack;
        let text = format!("[[nsm]]\nname = \"{stack}\"\nstack = \"shm\"\nsingle_copy = {single}\n");
        std::fs::write(&config, text).context("the engine's configuration")?;
        let pair = Pair::start_on(session, session.engine_with(&config)?, |session, side, engine, port| {
            iperf3::server(session, Role::Measured, side, engine, port)
        })?;
        Ok(Stream { pair, single })
    }
}

impl Live for Stream {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let (port, seconds) = (self.pair.port(side).to_string(), session.settings.seconds.ceil().to_string());
        let mut args = words(&["-c", "127.0.0.1", "-J", "-l", "128K", "-t", &seconds, "-p", &port]);
        if side == Side::Native {
            args.extend(words(&["-C", &session.surroundings.native_congestion_control]));
        }
        let report = iperf3::Report::parse(&client(session, side, &self.pair.engine, "iperf3", &args)?)?;
        let detail = json!({ "gigabytes": report.gigabytes });
        if self.single {
            return Ok(Sample::new(vec![report.gbit_s], detail));
        }
        let limit = match side {
            Side::Native => report.gbit_s,
            // The machine's, in the same minute as the program's.
            Side::Netkernel => {
                two_copies::gbit_s(session.cores(), Duration::from_secs_f64(session.settings.seconds / 2.0))?
            }
        };
        Ok(Sample::new(vec![report.gbit_s, limit], detail))
    }
}

struct Requests {
    pair: Pair,
    depth: u32,
    /// Where the native server listens, too.
    unix: Option<PathBuf>,
    requests: u64,
}

impl Requests {
    fn start(session: &Session, depth: u32, unix: bool) -> Result<Requests> {
        let directory = session.subdirectory("redis")?;
        let path = directory.join("redis.sock");
        let pair = Pair::start(session, |session, side, engine, port| -> Result<Process> {
            let mut command = redis::server_command(session, side, engine, port, &directory);
            if side == Side::Native {
                command.arg("--unixsocket").arg(&path);
                return session.native_server("redis-server", command, port);
            }
            session.server("redis-server", Role::Measured, engine, command, port)
        })?;
        let few = 20_000 * u64::from(depth.min(10));
        let mut load = Requests { pair, depth, unix: unix.then_some(path), requests: few };
        load.run(session, Side::Native)?;
        let rate = load.run(session, Side::Netkernel)?.both();
        load.requests = ((rate * session.settings.seconds / 2.0) as u64).max(1000);
        Ok(load)
    }

    fn run(&self, session: &Session, side: Side) -> Result<redis::Rates> {
        let mut args = match (&self.unix, side) {
            (Some(path), Side::Native) => vec!["-s".into(), path.display().to_string()],
            _ => words(&["-h", "127.0.0.1", "-p", &self.pair.port(side).to_string()]),
        };
        args.extend(words(&["-t", "get,set", "-q", "--csv", "-c", "50", "-P", &self.depth.to_string()]));
        args.extend(words(&["-n", &self.requests.to_string()]));
        redis::Rates::parse(&client(session, side, &self.pair.engine, "redis-benchmark", &args)?)
    }
}

impl Live for Requests {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let rates = self.run(session, side)?;
        let detail = json!({ "get": rates.get, "set": rates.set, "requests": 2 * self.requests });
        Ok(Sample::new(vec![rates.both()], detail))
    }
}

struct Web {
    pair: Pair,
    close: bool,
}

impl Web {
    fn start(session: &Session, close: bool) -> Result<Web> {
        let mut web = Web { pair: Pair::start(session, nginx::server)?, close };
        for side in [Side::Netkernel, Side::Native] {
            web.measure(session, side)?;
        }
        Ok(web)
    }
}

impl Live for Web {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        let seconds = session.settings.seconds.ceil().max(1.0);
        let mut args = words(&["-c", "50", "-t", "1", "-d", &format!("{seconds}s")]);
        if self.close {
            args.extend(words(&["-H", "Connection: close"]));
        }
        args.push(format!("http://127.0.0.1:{}/file", self.pair.port(side)));
        let report = nginx::Report::parse(&client(session, side, &self.pair.engine, "wrk", &args)?)?;
        let detail = json!({
            "requests": report.requests, "failed": report.failed, "refused": report.refused,
        });
        Ok(Sample::new(vec![report.rate], detail))
    }
}
