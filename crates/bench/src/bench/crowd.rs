//! A thousand tenants with a guest each, nearly all of them idle: memory and processor time of the engine.

use std::io::{BufRead as _, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Benchmark, Live, Promise, Row, Sample, row};
use crate::process::Process;
use crate::session::{Engine, Role, Session, Settings, Side};

const MIB: f64 = 1_048_576.0;
/// How long all of them may take to be ready.
const START: Duration = Duration::from_secs(120);

fn count(settings: &Settings) -> usize {
    if settings.quick { 100 } else { 1000 }
}

pub fn benchmarks(settings: &Settings) -> Vec<Benchmark> {
    let count = count(settings);
    let title = |what: &str| format!("{count} tenants, {count} idle guests with a connection: {what}");
    let rows: Vec<Row> = vec![
        row("crowd-memory", title("the engine's memory beyond the regions"), "B each", Promise::AtMost(MIB)),
        row("crowd-region", title("memory of the regions"), "B each", Promise::None),
        row(
            "crowd-cpu",
            title("the engine, which shares capacities and meters"),
            "% of a core",
            Promise::AtMost(2.0),
        ),
    ];
    vec![Benchmark {
        id: "crowd",
        about: format!("memory and CPU time of an engine with {count} tenants and {count} idle guests"),
        needs: &[],
        rows,
        most_rounds: 2,
        start: |_| Ok(Box::new(Crowd)),
    }]
}

/// Everything is fresh in each round.
struct Crowd;

impl Live for Crowd {
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample> {
        if side == Side::Native {
            return Ok(Sample::new(vec![f64::NAN; 3], json!(null)));
        }
        let count = count(&session.settings);
        let directory = session.subdirectory("crowd")?;
        let mut config = format!(
            "[engine]\nusage = \"{}\"\nmax_guests = {}\n[[nsm]]\nname = \"{}\"\ncapacity = \"10 Gbit/s\"\n\
             capacity_operations = 1000000\ncapacity_connections = 100000\n",
            directory.join("usage.redb").display(),
            count + 10,
            session.settings.stack
        );
        for i in 0..count {
            let token = token(&directory, i);
            std::fs::write(&token, format!("{i:032}\n")).context("a token")?;
            config += &format!(
                "[[tenant]]\nname = \"t{i}\"\ntoken_file = \"{}\"\nguaranteed_send = \"1 Mbit/s\"\nmax_send = \"1 Gbit/s\"\n",
                token.display()
            );
        }
        let file = directory.join("engine.toml");
        std::fs::write(&file, config).context("the engine's configuration")?;
        let mut engine = session.engine_with(&file)?;
        engine.process.still_runs(Duration::from_millis(500))?;
        let before = engine.process.memory();
        let mut crowd = start(session, &engine, &directory, count)?;
        let window = Duration::from_secs_f64(if session.settings.quick { 2.0 } else { 10.0 });
        // What the start left to do is done.
        engine.process.still_runs(Duration::from_secs(2))?;
        let (cpu_s, begin) = (engine.process.cpu_s(), Instant::now());
        engine.process.still_runs(window)?;
        let percent = (engine.process.cpu_s() - cpu_s) / begin.elapsed().as_secs_f64() * 100.0;
        let after = engine.process.memory();
        crowd.still_runs(Duration::ZERO)?;
        let each = |bytes: f64| bytes / count as f64;
        let values =
            vec![each(after.anonymous - before.anonymous), each(after.regions() - before.regions()), percent];
        let detail = json!({ "guests": count, "before": before, "after": after, "cpu_percent": percent });
        crowd.tell("end")?;
        crowd.wait(START)?;
        Ok(Sample::new(values, detail))
    }
}

fn token(directory: &std::path::Path, i: usize) -> PathBuf {
    directory.join(format!("token-{i}"))
}

/// One child that has all the guests, so that they end together.
fn start(session: &Session, engine: &Engine, directory: &std::path::Path, count: usize) -> Result<Process> {
    let own = std::env::current_exe().context("this program's own file")?;
    let mut command = Command::new(own);
    command.args(&session.settings.helper).arg("crowd").arg(&session.settings.netkernel);
    command.arg(engine.socket()).arg(&session.settings.stack).arg(directory).arg(count.to_string());
    let mut crowd = session.spawn_piped("crowd", Role::Peer, command)?;
    let line = crowd.line(START)?;
    if line == "ready" { Ok(crowd) } else { bail!("the guests' parent says: {line}") }
}

/// Starts guests that listen, connects to each, and says so; ends with its standard input.
pub fn crowd(args: &CrowdArgs, helper: &[&str]) -> Result<()> {
    let own = std::env::current_exe().context("this program's own file")?;
    // Below all ports of clients.
    let port = |i: usize| 6000 + i as u16;
    let mut guests = Guests(Vec::new());
    for i in 0..args.count {
        let mut command = Command::new(&args.netkernel);
        command.args(["run", "--attach", "queued", "--stack", &args.stack, "--socket"]).arg(&args.socket);
        command.arg("--tenant-token").arg(token(&args.directory, i)).arg("--").arg(&own);
        command.args(helper).args(["idle-server", &port(i).to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        guests.0.push(child.with_context(|| format!("guest {i}"))?);
    }
    let end = Instant::now() + START;
    let mut streams = Vec::new();
    for i in 0..args.count {
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port(i))) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => bail!("guest {i} does not listen: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(START))?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0]).with_context(|| format!("guest {i} was not served"))?;
        streams.push(stream);
    }
    println!("ready");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(())
}

#[derive(clap::Args, Debug)]
pub struct CrowdArgs {
    netkernel: PathBuf,
    socket: PathBuf,
    stack: String,
    directory: PathBuf,
    count: usize,
}

struct Guests(Vec<Child>);

impl Drop for Guests {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
        }
        for child in &mut self.0 {
            let _ = child.wait();
        }
    }
}
