//! Runs scenarios: each run in a worker process of its own, which this process watches.

use std::cell::Cell;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use crate::ctx::Guests;
use crate::process::{self, Signal};
use crate::{Ctx, Engine, Mode, Scenario, net, tools};

/// Tries NetKernel with real, unmodified programs.
#[derive(Clone, Debug, Parser)]
#[command(name = "apps")]
pub struct Options {
    /// The netkernel binary; its library stands beside it
    #[arg(long, value_name = "FILE")]
    netkernel: Option<PathBuf>,
    /// Run only on the plain kernel
    #[arg(long)]
    native: bool,
    /// Only these modes: native, server, client, both
    #[arg(long = "mode", value_name = "MODE", value_delimiter = ',')]
    modes: Vec<Mode>,
    /// Only these scenarios: `nginx` or `nginx/reload`; may be given several times
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Not these scenarios
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    skip: Vec<String>,
    /// Print the scenarios and their modes
    #[arg(long)]
    list: bool,
    /// Write the results there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The stack that guests get
    #[arg(long, default_value = "cubic")]
    stack: String,
    /// How guests are attached: auto, queued, direct, relay
    #[arg(long, default_value = "auto")]
    attach: String,
    /// Programs that are not installed are no failure
    #[arg(long)]
    allow_missing: bool,
    /// How long the soak scenario goes on
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How often each scenario is run
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// How many run at the same time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// All time limits are multiplied by this
    #[arg(long, default_value_t = 1.0)]
    patience: f64,
    /// Keep the directories of failed runs
    #[arg(long)]
    keep: bool,
    /// One run, in this process (the runner's own use)
    #[arg(long, hide = true, num_args = 4, value_names = ["NAME", "MODE", "DIR", "PORT"])]
    worker: Vec<String>,
}

/// The whole program.
pub fn main(scenarios: &[Scenario]) -> ExitCode {
    let options = Options::parse();
    let result =
        if options.worker.is_empty() { supervise(&options, scenarios) } else { work(&options, scenarios) };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("apps: {e:#}");
            ExitCode::from(2)
        }
    }
}

struct Run<'a> {
    scenario: &'a Scenario,
    mode: Mode,
}

enum Outcome {
    Ok,
    Failed(String),
    Missing(String),
}

fn supervise(options: &Options, scenarios: &[Scenario]) -> Result<bool> {
    for name in options.only.iter().chain(&options.skip) {
        if !scenarios.iter().any(|s| s.matches(name)) {
            bail!("no scenario named '{name}' (--list shows them)");
        }
    }
    let chosen: Vec<&Scenario> = scenarios
        .iter()
        .filter(|s| {
            let named = options.only.iter().any(|n| s.matches(n));
            named || (options.only.is_empty() && !s.on_request)
        })
        .filter(|s| !options.skip.iter().any(|n| s.matches(n)))
        .collect();
    if options.list {
        for scenario in &chosen {
            let modes: Vec<&str> = scenario.modes.iter().map(|m| m.name()).collect();
            println!("{} [{}]", scenario.name, modes.join(" "));
        }
        return Ok(true);
    }
    let mut modes = if options.modes.is_empty() { Mode::ALL.to_vec() } else { options.modes.clone() };
    if options.native {
        modes = vec![Mode::Native];
    }
    let netkernel = match &options.netkernel {
        Some(path) => Some(fs::canonicalize(path).with_context(|| format!("no {}", path.display()))?),
        None if modes == [Mode::Native] => None,
        None => bail!("give --netkernel target/release/netkernel, or --native"),
    };

    process::become_subreaper()?;
    let runs: Vec<Run> = chosen
        .iter()
        .flat_map(|s| s.modes.iter().filter(|m| modes.contains(m)).map(|&mode| Run { scenario: s, mode }))
        .flat_map(|run| (0..options.repeat).map(move |_| Run { ..run }))
        .collect();
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Value>> = Mutex::default();
    let counts: Mutex<[usize; 3]> = Mutex::default();
    let workers: Mutex<Vec<u32>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(run) = runs.get(n) else { return };
                    let start = Instant::now();
                    let outcome = match missing(run.scenario) {
                        Some(text) => Outcome::Missing(text),
                        None => match watch(options, netkernel.as_deref(), run, n, &workers) {
                            Ok(()) => Outcome::Ok,
                            Err(e) => Outcome::Failed(format!("{e:#}")),
                        },
                    };
                    let seconds = start.elapsed().as_secs_f64();
                    let title = format!("{} [{}]", run.scenario.name, run.mode.name());
                    let (slot, word, error) = match outcome {
                        Outcome::Ok => (0, "ok", None),
                        Outcome::Failed(e) => (1, "FAILED", Some(e)),
                        Outcome::Missing(e) if options.allow_missing => (2, "skipped", Some(e)),
                        Outcome::Missing(e) => (1, "FAILED", Some(e)),
                    };
                    let mut text = format!("{title}: {word} {seconds:.1}s\n");
                    for line in error.iter().flat_map(|e| e.lines()) {
                        text.push_str(&format!("    {line}\n"));
                    }
                    print!("{text}");
                    lock(&counts)[slot] += 1;
                    lock(&results).push(json!({
                        "scenario": run.scenario.name, "mode": run.mode.name(), "result": word.to_lowercase(),
                        "seconds": (seconds * 1000.0).round() / 1000.0, "error": error,
                    }));
                }
            });
        }
    });
    let [passed, failed, skipped] = *lock(&counts);
    if let Some(path) = &options.json {
        let report = json!({
            "passed": passed, "failed": failed, "skipped": skipped, "stack": options.stack, "attach": options.attach,
            "results": *lock(&results),
        });
        fs::write(path, format!("{report:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if skipped > 0 {
        println!("{skipped} skipped");
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn missing(scenario: &Scenario) -> Option<String> {
    let missing: Vec<&str> = scenario.needs.iter().copied().filter(|p| tools::find(p).is_none()).collect();
    (!missing.is_empty()).then(|| format!("not installed: {} (scripts/deps installs it)", missing.join(", ")))
}

/// Starts the worker of one run and waits for its verdict.
fn watch(
    options: &Options,
    netkernel: Option<&Path>,
    run: &Run,
    n: usize,
    workers: &Mutex<Vec<u32>>,
) -> Result<()> {
    let mut temp = tempfile::Builder::new().prefix("nk-apps-").tempdir()?;
    // Servers that give up root must still reach their files.
    open_to_all(temp.path())?;
    fs::create_dir(temp.path().join("log"))?;
    temp.disable_cleanup(true);
    let result = watch_in(options, netkernel, run, n, workers, temp.path());
    if result.is_err() && options.keep {
        return result.with_context(|| format!("(kept {})", temp.path().display()));
    }
    fs::remove_dir_all(temp.path())?;
    result
}

fn watch_in(
    options: &Options,
    netkernel: Option<&Path>,
    run: &Run,
    n: usize,
    workers: &Mutex<Vec<u32>>,
    dir: &Path,
) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(netkernel) = netkernel {
        command.arg("--netkernel").arg(netkernel);
    }
    command
        .args([
            "--stack",
            &options.stack,
            "--attach",
            &options.attach,
            "--seconds",
            &options.seconds.to_string(),
        ])
        .args(["--patience", &options.patience.to_string()])
        .args(["--worker", run.scenario.name, run.mode.name()])
        .arg(dir)
        .arg(net::first_port(std::process::id(), n).to_string())
        // The worker reads this pipe to learn of our end.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut worker = {
        let mut workers = lock(workers);
        let worker = command.spawn()?;
        workers.push(worker.id());
        worker
    };
    let id = worker.id();
    let limit = limit_of(options, run.scenario) + Duration::from_secs(45);
    let until = Instant::now() + limit;
    let ended = loop {
        if worker.try_wait()?.is_some() {
            break true;
        }
        if Instant::now() > until {
            break false;
        }
        sleep(Duration::from_millis(5));
    };
    if !ended {
        for info in process::descendants(id, &[]) {
            process::signal(info.pid, Signal::KILL);
        }
        let _ = worker.kill();
        let _ = worker.wait();
    }
    let mut verdict = String::new();
    if let Some(stdout) = &mut worker.stdout {
        stdout.read_to_string(&mut verdict)?;
    }
    // Whatever a dead worker left became ours.
    let left = {
        let mut workers = lock(workers);
        workers.retain(|w| *w != id);
        process::sweep(&workers, Duration::ZERO)
    };
    if !ended {
        bail!("the run did not end within {} s (watchdog)", limit.as_secs());
    }
    if !left.is_empty() {
        bail!("left running:\n{}", left.join("\n"));
    }
    let verdict: Value =
        serde_json::from_str(&verdict).with_context(|| format!("the worker died, having said: {verdict}"))?;
    match verdict.get("error").and_then(Value::as_str) {
        None => Ok(()),
        Some(error) => bail!("{error}"),
    }
}

fn limit_of(options: &Options, scenario: &Scenario) -> Duration {
    let limit = scenario.limit.mul_f64(options.patience.max(0.1));
    if scenario.on_request { limit + Duration::from_secs(options.seconds) } else { limit }
}

fn open_to_all(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?)
}

/// The worker: one scenario in one mode. Says its verdict as JSON on standard output.
fn work(options: &Options, scenarios: &[Scenario]) -> Result<bool> {
    let [name, mode, dir, port] = options.worker.as_slice() else { bail!("bad --worker") };
    let scenario = scenarios.iter().find(|s| s.name == *name).context("no such scenario")?;
    let mode: Mode = mode.parse()?;
    let dir = PathBuf::from(dir);
    let first_port: u16 = port.parse()?;
    process::become_subreaper()?;
    end_with_supervisor();

    let verdict = match (mode, &options.netkernel) {
        (Mode::Native, _) => try_once(options, scenario, mode, &dir, first_port, None),
        (_, None) => bail!("--netkernel is needed for mode {}", mode.name()),
        (_, Some(netkernel)) => match Engine::start(netkernel, &dir) {
            Ok(engine) => {
                let guests = Guests {
                    engine,
                    netkernel: netkernel.clone(),
                    stack: options.stack.clone(),
                    attach: options.attach.clone(),
                };
                try_once(options, scenario, mode, &dir, first_port, Some(guests))
            }
            Err(e) => Err(e),
        },
    };
    let error = verdict.err().map(|e| format!("{e:#}"));
    println!("{}", json!({ "error": error }));
    Ok(true)
}

fn try_once(
    options: &Options,
    scenario: &Scenario,
    mode: Mode,
    dir: &Path,
    first_port: u16,
    guests: Option<Guests>,
) -> Result<()> {
    let mut ctx = Ctx {
        mode,
        seconds: options.seconds,
        dir: dir.to_owned(),
        guests,
        next_port: first_port,
        last_port: first_port + net::PORTS_PER_RUN,
        started: Cell::new(0),
        limit: Instant::now() + limit_of(options, scenario),
    };
    let result = (scenario.run)(&mut ctx);
    let engine: Vec<u32> = ctx.engine().map(Engine::pid).into_iter().collect();
    let mut result = result.map_err(|e| {
        let mut text = format!("{e:#}");
        for line in process::snapshot(&engine) {
            text.push_str(&format!("\nstill there: {line}"));
        }
        anyhow::Error::msg(text)
    });
    // What a scenario that went well has ended needs a moment to be gone.
    let grace = if result.is_ok() { Duration::from_secs(3) } else { Duration::ZERO };
    let left = process::sweep(&engine, grace);
    if result.is_ok() && !left.is_empty() {
        result = Err(anyhow::Error::msg(format!("left running:\n{}", left.join("\n"))));
    }
    if let Some(guests) = &mut ctx.guests {
        let after = guests.engine.check_empty().and_then(|()| guests.engine.stop());
        // What was the engine's own, such as its heir.
        let left = process::sweep(&[], grace);
        let after = after.and_then(|()| match left.is_empty() {
            true => Ok(()),
            false => bail!("left running by the engine:\n{}", left.join("\n")),
        });
        result = match (result, after) {
            (Ok(()), after) => after,
            (Err(e), Ok(())) => Err(e),
            (Err(e), Err(after)) => Err(anyhow::Error::msg(format!("{e:#}\nand then: {after:#}"))),
        };
        if let Err(e) = result {
            let log = guests.engine.log_tail();
            let log = if log.is_empty() { String::new() } else { format!("\nengine's log:\n{log}") };
            result = Err(anyhow::Error::msg(format!("{e:#}{log}")));
        }
    }
    result
}

/// A supervisor that is gone (an impatient user) must not leave servers behind.
fn end_with_supervisor() {
    std::thread::spawn(|| {
        let mut line = String::new();
        let _ = BufReader::new(std::io::stdin()).read_line(&mut line);
        loop {
            let left = process::descendants(std::process::id(), &[]);
            left.iter().for_each(|info| process::signal(info.pid, Signal::KILL));
            if left.is_empty() {
                std::process::exit(1);
            }
            sleep(Duration::from_millis(5));
        }
    });
}
