//! `netkernel bench multiplex`: how many cores many bursty tenants need, each with an engine of its own or all on one.
//!
//! A trace says for each tenant how many requests it sends in each 100 ms: bursts with long pauses, as gateways see them (on and
//! off by turns, times and rates with heavy tails, seeded). The same trace is replayed twice in each round: *dedicated*, an engine with a
//! switch thread for each tenant, and *shared*, one engine whose guests are packed onto as few switch threads as are not busy. Every
//! 100 ms the processor time of each engine is read. A core must be kept for what is busy at its peak: the sum of the engines' own peaks is
//! what dedicated ones need, the peak of the one is what it needs.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::isolation::Peers;
use crate::machine::Machine;
use crate::micro::Random;
use crate::output::{self, Output};
use crate::process::Process;
use crate::progress::Progress;
use crate::report::{Summary, figure, quantile};
use crate::session::{Attach, Engine, Placement, Role, Session, Settings, Side};
use crate::sys;

const SLOT: Duration = Duration::from_millis(100);
/// A request, and its answer.
const REQUEST: usize = 1024;
/// Requests a second of a tenant that is quiet, and the median of one in a burst.
const QUIET: f64 = 20.0;
const BURST: f64 = 3000.0;
/// No burst is beyond this.
const MOST: f64 = 8000.0;
/// Mean of a pause and least length of a burst, in slots.
const PAUSE: f64 = 20.0;
const LEAST_BURST: f64 = 2.0;
/// A peak is what is not passed in 99 of 100 looks.
const PEAK: f64 = 0.99;

/// Replay bursty traces of many tenants, on an engine for each and on one for all, and tell how many cores each way needs.
#[derive(Args, Debug)]
pub struct MultiplexArgs {
    /// Tenants
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(2..=64))]
    pub tenants: u8,

    /// What the traces are made from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Seconds of the traces [default: 30, with --quick 5]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: Option<u32>,

    /// How often they are replayed, each way [default: 3, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,

    /// The netkernel to measure [default: this program]
    #[arg(long, value_name = "PATH")]
    pub netkernel: Option<PathBuf>,

    /// The guests' stack; a congestion control of the kernel
    #[arg(long, value_name = "NAME", default_value = "cubic")]
    pub stack: String,

    #[command(flatten)]
    pub output: Output,
}

/// What one tenant does: a hidden part of this program.
#[derive(Args, Debug)]
pub struct LoadArgs {
    pub port: u16,
    pub seed: u64,
    pub tenant: u8,
    pub slots: usize,
}

/// Requests of one tenant in each slot.
fn trace(seed: u64, tenant: u8, slots: usize) -> Vec<u32> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(tenant) + 1) << 32);
    for _ in 0..4 {
        random.next();
    }
    let mut uniform = move || (f64::from(random.next()) + 1.0) / 4_294_967_297.0;
    let per_slot = SLOT.as_secs_f64();
    let mut requests = Vec::with_capacity(slots);
    // All begin quietly, each at another place of its pause.
    let mut left = -uniform().ln() * PAUSE;
    let mut rate = QUIET;
    while requests.len() < slots {
        if left < 1.0 {
            let quiet = rate > QUIET;
            if quiet {
                (rate, left) = (QUIET, 1.0 - uniform().ln() * PAUSE);
            } else {
                // Length: Pareto with index 1.5. Rate: log-normal (Box and Muller, 1958), a quarter of a decade wide.
                let normal = (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
                rate = (BURST * 10f64.powf(normal / 4.0)).clamp(QUIET + 1.0, MOST);
                left = (LEAST_BURST * uniform().powf(-1.0 / 1.5)).min(10.0 * PAUSE);
            }
        }
        left -= 1.0;
        // What is less than one comes now and then.
        requests.push((rate * per_slot + uniform()) as u32);
    }
    requests
}

/// Replays a tenant's trace and prints how many requests were answered, and median and 99th percentile of the microseconds from when
/// each was due.
pub fn run_load(args: &LoadArgs) -> Result<()> {
    let trace = trace(args.seed, args.tenant, args.slots);
    let mut stream = TcpStream::connect(("127.0.0.1", args.port)).context("connect")?;
    stream.set_nodelay(true)?;
    stream.write_all(&[b'e', args.tenant]).context("greeting")?;
    let mut bytes = [7; REQUEST];
    let mut times = Vec::new();
    let begin = Instant::now();
    for (slot, &requests) in trace.iter().enumerate() {
        let start = SLOT * slot as u32;
        for i in 0..requests {
            let due = start + SLOT * i / requests.max(1);
            std::thread::sleep(due.saturating_sub(begin.elapsed()));
            stream.write_all(&bytes).context("request")?;
            stream.read_exact(&mut bytes).context("answer")?;
            times.push((begin.elapsed().saturating_sub(due)).as_secs_f64() * 1e6);
        }
    }
    let end = SLOT * trace.len() as u32;
    std::thread::sleep(end.saturating_sub(begin.elapsed()));
    times.sort_by(f64::total_cmp);
    println!("{} {} {}", times.len(), quantile(&times, 0.5), quantile(&times, 0.99));
    Ok(())
}

/// One replay.
#[derive(Clone, Debug, Default)]
struct Replay {
    /// Of each engine: parts of a core, in each look.
    busy: Vec<Vec<f64>>,
    /// Switch threads that did something.
    threads: usize,
    requests: f64,
    median_us: f64,
    /// Of the tenant that waited longest.
    p99_us: f64,
}

impl Replay {
    /// Cores at the engines' own peaks.
    fn peak(&self) -> f64 {
        self.busy.iter().map(|busy| sorted_quantile(busy, PEAK)).sum()
    }

    fn mean(&self) -> f64 {
        self.busy.iter().map(|busy| busy.iter().sum::<f64>() / busy.len().max(1) as f64).sum()
    }

    fn json(&self) -> Value {
        json!({
            "busy": self.busy, "switch_threads": self.threads, "cores_at_peak": self.peak(), "cores_in_the_mean": self.mean(),
            "requests": self.requests, "median_us": self.median_us, "p99_us": self.p99_us,
        })
    }
}

fn sorted_quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() { 0.0 } else { quantile(&sorted, q) }
}

/// Processor time of each switch thread of an engine, in seconds.
fn switch_threads(engine: &Engine) -> Vec<f64> {
    let pid = engine.process.pid();
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let times = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        if name.starts_with("nk-switch")
            && let Some(ns) = times.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok())
        {
            all.push(ns / 1e9);
        }
    }
    all
}

fn engine(session: &Session, threads: usize) -> Result<Engine> {
    let directory = session.subdirectory("multiplex")?;
    let file = directory.join("engine.toml");
    let stack = &session.settings.stack;
    let text = format!(
        "[engine]\nswitch_threads = {threads}\nplacement = \"pack\"\n[[nsm]]\nname = \"{stack}\"\ncongestion_control = \"{stack}\"\n"
    );
    std::fs::write(&file, text).context("the engine's configuration")?;
    session.engine_with(&file)
}

/// Replays the traces of all tenants on these engines, tenant `i` on engine `i % n`.
fn replay(session: &Session, args: &MultiplexArgs, engines: &mut [Engine], slots: usize) -> Result<Replay> {
    let peers = Peers::start()?;
    let own = std::env::current_exe().context("this program's own file")?;
    let mut loads: Vec<Process> = Vec::new();
    let count = engines.len();
    for tenant in 0..args.tenants {
        let engine = &engines[usize::from(tenant) % count];
        let mut command = session.command(Side::Netkernel, Some(engine), &own);
        command.args(&session.settings.helper).arg("multiplex-load");
        command.args([peers.port.to_string(), args.seed.to_string(), tenant.to_string(), slots.to_string()]);
        loads.push(session.spawn("load", Role::Measured, command)?);
    }
    let begun: Vec<Vec<f64>> = engines.iter().map(switch_threads).collect();
    let mut before: Vec<(f64, Instant)> =
        engines.iter().map(|engine| (total(engine), Instant::now())).collect();
    let mut busy = vec![Vec::new(); count];
    let begin = Instant::now();
    while begin.elapsed() < SLOT * slots as u32 {
        std::thread::sleep(SLOT);
        for ((engine, before), busy) in engines.iter().zip(&mut before).zip(&mut busy) {
            let now = (total(engine), Instant::now());
            busy.push((now.0 - before.0) / (now.1 - before.1).as_secs_f64());
            *before = now;
        }
        for load in &mut loads {
            if sys::interrupted() {
                bail!("interrupted");
            }
            let _ = load.output();
        }
    }
    let mut replay = Replay { busy, ..Replay::default() };
    for (engine, begun) in engines.iter().zip(begun) {
        // A thousandth of the time is less than any guest needs.
        let least = begin.elapsed().as_secs_f64() / 1000.0;
        replay.threads +=
            switch_threads(engine).iter().zip(begun).filter(|(now, before)| *now - before > least).count();
    }
    let mut medians = Vec::new();
    for load in &mut loads {
        let (text, _) = load.finish(Duration::from_secs(60))?;
        let told: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [requests, median, p99] = told[..] else { bail!("a load said {text:?}") };
        replay.requests += requests;
        replay.p99_us = replay.p99_us.max(p99);
        medians.push(median);
    }
    replay.median_us = sorted_quantile(&medians, 0.5);
    Ok(replay)
}

fn total(engine: &Engine) -> f64 {
    switch_threads(engine).iter().sum()
}

pub fn run(args: MultiplexArgs, prefix: &[&str]) -> Result<()> {
    args.output.try_files()?;
    let seconds = args.seconds.unwrap_or(if args.output.quick { 5 } else { 30 });
    let rounds = args.rounds.unwrap_or(if args.output.quick { 1 } else { 3 });
    let slots = (f64::from(seconds) / SLOT.as_secs_f64()) as usize;
    let netkernel = match &args.netkernel {
        Some(path) => {
            std::fs::canonicalize(path).with_context(|| format!("no netkernel at {}", path.display()))?
        }
        None => std::env::current_exe().context("this program's own file")?,
    };
    let session = Session::begin(Settings {
        netkernel,
        stack: args.stack.clone(),
        seconds: f64::from(seconds),
        connections: 0,
        placement: Placement::Free,
        attach: Attach::Queued,
        quick: args.output.quick,
        helper: prefix.iter().map(|&word| word.to_owned()).collect(),
    })?;
    let progress = Progress::new(u64::from(rounds) * 2, args.output.quiet);
    let (mut dedicated, mut shared) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        for way in [round % 2, (round + 1) % 2] {
            let one = way == 1;
            progress.start(if one { "shared" } else { "dedicated" });
            let mut engines: Vec<Engine> = if one {
                vec![engine(&session, usize::from(args.tenants))?]
            } else {
                (0..args.tenants).map(|_| engine(&session, 1)).collect::<Result<_>>()?
            };
            let replay = replay(&session, &args, &mut engines, slots)?;
            if one {
                shared.push(replay)
            } else {
                dedicated.push(replay)
            }
            progress.step(1);
        }
    }
    drop(progress);
    let traces: Vec<Vec<u32>> = (0..args.tenants).map(|tenant| trace(args.seed, tenant, slots)).collect();
    let results = Results {
        machine: Machine::look(&session.settings.netkernel),
        tenants: args.tenants,
        seed: args.seed,
        seconds,
        requests: traces.iter().flatten().map(|&n| f64::from(n)).sum(),
        dedicated,
        shared,
    };
    drop(session);
    args.output.deliver(&results)
}

struct Results {
    machine: Machine,
    tenants: u8,
    seed: u64,
    seconds: u32,
    /// Of the traces.
    requests: f64,
    dedicated: Vec<Replay>,
    shared: Vec<Replay>,
}

/// A line of the table.
struct Line {
    title: &'static str,
    unit: &'static str,
    of: fn(&Replay) -> f64,
}

const LINES: [Line; 6] = [
    Line { title: "cores at the engines' peaks (p99 of 100 ms)", unit: "cores", of: Replay::peak },
    Line { title: "cores in the mean", unit: "cores", of: Replay::mean },
    Line { title: "switch threads that worked", unit: "threads", of: |replay| replay.threads as f64 },
    Line { title: "requests answered", unit: "requests", of: |replay| replay.requests },
    Line {
        title: "median time of a request from when it was due",
        unit: "us",
        of: |replay| replay.median_us,
    },
    Line { title: "p99, of the tenant that waited longest", unit: "us", of: |replay| replay.p99_us },
];

impl Results {
    fn median(replays: &[Replay], line: &Line) -> f64 {
        let values: Vec<f64> = replays.iter().map(line.of).collect();
        Summary::of(&values).map_or(f64::NAN, |summary| summary.median)
    }

    /// Percent of the dedicated cores at their peaks that sharing spares.
    fn saved(&self) -> f64 {
        let [dedicated, shared] =
            [&self.dedicated, &self.shared].map(|replays| Self::median(replays, &LINES[0]));
        (1.0 - shared / dedicated) * 100.0
    }
}

impl output::Results for Results {
    fn table(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{} tenants, traces of {} s from seed {}, {} requests; medians of {} replays each way\n",
            self.tenants,
            self.seconds,
            self.seed,
            self.requests,
            self.shared.len()
        );
        let _ = writeln!(out, "{:<48} {:>12} {:>12}  unit", "", "dedicated", "shared");
        for line in &LINES {
            let [dedicated, shared] =
                [&self.dedicated, &self.shared].map(|replays| figure(Self::median(replays, line)));
            let _ = writeln!(out, "{:<48} {dedicated:>12} {shared:>12}  {}", line.title, line.unit);
        }
        let _ =
            writeln!(out, "\nsharing spares {:.0} % of the cores that must be kept for peaks", self.saved());
        out
    }

    fn json(&self) -> Value {
        let each = |replays: &[Replay]| replays.iter().map(Replay::json).collect::<Vec<_>>();
        json!({
            "machine": self.machine, "tenants": self.tenants, "seed": self.seed, "seconds": self.seconds,
            "requests_of_the_traces": self.requests, "dedicated": each(&self.dedicated), "shared": each(&self.shared),
            "saved_percent": self.saved(),
        })
    }

    fn svg(&self) -> String {
        let mut out = String::from(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 760 150\" width=\"760\" height=\"150\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        );
        let values = [&self.dedicated, &self.shared].map(|replays| Self::median(replays, &LINES[0]));
        let most = values[0].max(values[1]).max(f64::MIN_POSITIVE);
        let _ = writeln!(out, "<text x=\"20\" y=\"28\" font-size=\"16\">{}</text>", LINES[0].title);
        for (i, (name, value)) in ["dedicated", "shared"].into_iter().zip(values).enumerate() {
            let y = 50 + 45 * i;
            let _ = writeln!(
                out,
                "<text x=\"20\" y=\"{}\">{name}</text><rect x=\"110\" y=\"{y}\" width=\"{:.1}\" height=\"28\" fill=\"#0072b2\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text>",
                y + 19,
                500.0 * value / most,
                120.0 + 500.0 * value / most,
                y + 19,
                figure(value)
            );
        }
        out + "</svg>\n"
    }

    /// Nothing is promised.
    fn all_kept(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_bursty_and_repeatable() {
        let slots = 20_000;
        let one = trace(1, 0, slots);
        assert_eq!(one, trace(1, 0, slots));
        assert!(one != trace(2, 0, slots) && one != trace(1, 1, slots));
        let mean = one.iter().sum::<u32>() as f64 / slots as f64;
        let peak = sorted_quantile(&one.iter().map(|&n| f64::from(n)).collect::<Vec<_>>(), PEAK);
        // Quiet most of the time, and far above the mean at times.
        assert!(peak > 4.0 * mean, "peak {peak}, mean {mean}");
        let quiet = one.iter().filter(|&&n| f64::from(n) <= 2.0 * QUIET / 10.0).count();
        assert!(quiet * 2 > slots, "{quiet} of {slots}");
        assert!(f64::from(*one.iter().max().unwrap()) <= MOST / 10.0 + 1.0);
    }

    #[test]
    fn what_sharing_spares_is_reckoned_from_peaks() {
        // Each quarter is a hundred looks.
        let long = |busy: &&[f64]| busy.iter().flat_map(|&busy| [busy; 100]).collect();
        let replay = |busy: &[&[f64]]| Replay { busy: busy.iter().map(long).collect(), ..Replay::default() };
        // Two that are busy at different times.
        let dedicated = replay(&[&[1.0, 0.0, 0.0, 0.0], &[0.0, 0.0, 1.0, 0.0]]);
        let shared = replay(&[&[1.0, 0.0, 1.0, 0.0]]);
        assert_eq!((dedicated.peak(), shared.peak()), (2.0, 1.0));
        assert_eq!((dedicated.mean(), shared.mean()), (0.5, 0.5));
    }
}
