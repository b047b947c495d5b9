//! `netkernel bench`: NetKernel beside the plain kernel, measured on this machine, in one run.
//!
//! Each benchmark runs natively (A) and as a guest (B) by turns, each round starting with the other one; what is quoted is the
//! ratio of the medians. The raw series go to a JSON file.

mod bench;
mod isolation;
mod machine;
mod micro;
mod multiplex;
mod output;
mod plot;
mod process;
mod progress;
mod report;
mod session;
mod sys;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use bench::Benchmark;
pub use output::Output;
use progress::Progress;
use report::{Outcome, Record, Results};
use session::{Attach, Placement, Session, Settings, Side, find_program};

/// What every comparison takes.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// The netkernel to measure [default: this program]
    #[arg(long, value_name = "PATH")]
    pub netkernel: Option<PathBuf>,

    /// Only these benchmarks (see --list); redis, for example, stands for all of redis-*
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub only: Vec<String>,

    /// How often each is measured, on each side [default: 5, with --quick 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,

    /// Seconds of one measurement [default: 3, with --quick 1]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    pub seconds: Option<f64>,

    /// List the benchmarks, and measure nothing
    #[arg(long)]
    pub list: bool,

    #[command(flatten)]
    pub output: Output,
}

/// Measure NetKernel beside the plain kernel: a table with a verdict for each promise.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(flatten)]
    pub common: Common,

    /// Idle connections whose memory is measured [default: 15000, with --quick 2000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub connections: Option<u32>,

    /// The guests' stack; a congestion control of the kernel, which the native side then uses too
    #[arg(long, value_name = "NAME", default_value = "cubic")]
    pub stack: String,

    /// The cores: one for what is measured and its engine and one for its peer, or what the scheduler likes
    #[arg(long, value_enum, value_name = "WHICH", default_value = "split")]
    pub placement: Placement,

    /// How guests are attached to the stack
    #[arg(long, value_enum, value_name = "HOW", default_value = "queued")]
    pub attach: Attach,

    #[command(subcommand)]
    pub part: Option<Part>,
}

/// Benchmarks of another kind, and what the benchmarks need of this program in processes of their own.
#[derive(Subcommand, Debug)]
pub enum Part {
    Micro(micro::MicroArgs),
    Isolation(IsolationArgs),
    Memory(MemoryArgs),
    Forms(FormsArgs),
    Multiplex(multiplex::MultiplexArgs),
    /// Send back what comes.
    #[command(hide = true)]
    PingServer {
        port: u16,
        /// Datagrams, too.
        #[arg(long)]
        udp: bool,
    },
    /// Measure round trips.
    #[command(hide = true)]
    PingClient {
        port: u16,
        seconds: f64,
        #[arg(long)]
        udp: bool,
    },
    /// What a tenant does in `isolation`.
    #[command(hide = true)]
    IsolationLoad(isolation::LoadArgs),
    /// What a tenant does in `multiplex`.
    #[command(hide = true)]
    MultiplexLoad(multiplex::LoadArgs),
    /// Have many idle guests.
    #[command(hide = true)]
    Crowd(bench::CrowdArgs),
    /// Accept connections, and send back what comes.
    #[command(hide = true)]
    IdleServer {
        port: u16,
    },
    /// Hold connections open.
    #[command(hide = true)]
    IdleClient {
        port: u16,
        count: usize,
    },
}

/// Measure what tenants get beside each other: caps, shares, guarantees, a paced request beside floods, the cost of policing.
#[derive(Args, Debug)]
pub struct IsolationArgs {
    #[command(flatten)]
    pub common: Common,

    /// The guests' stack; a congestion control of the kernel
    #[arg(long, value_name = "NAME", default_value = "cubic")]
    pub stack: String,

    /// The cores: the guests and the engine on one, or what the scheduler likes
    #[arg(long, value_enum, value_name = "WHICH", default_value = "free")]
    pub placement: Placement,
}

/// Measure guests that are joined in memory, both ends of each connection, beside loopback TCP and a Unix socket.
#[derive(Args, Debug)]
pub struct MemoryArgs {
    #[command(flatten)]
    pub common: Common,

    /// The cores: one for the server and the engine and one for its client, or what the scheduler likes
    #[arg(long, value_enum, value_name = "WHICH", default_value = "split")]
    pub placement: Placement,
}

/// Measure an NSM in a process of its own beside the same one in the engine, and its exchange and death under guests.
#[derive(Args, Debug)]
pub struct FormsArgs {
    #[command(flatten)]
    pub common: Common,

    /// The NSMs' congestion control
    #[arg(long, value_name = "NAME", default_value = "cubic")]
    pub stack: String,

    /// The cores: one for the server and its NSM and one for its client, or what the scheduler likes
    #[arg(long, value_enum, value_name = "WHICH", default_value = "split")]
    pub placement: Placement,
}

impl From<FormsArgs> for BenchArgs {
    fn from(args: FormsArgs) -> BenchArgs {
        BenchArgs::of(args.common, args.stack, args.placement)
    }
}

impl BenchArgs {
    /// Those of a comparison with a catalog of its own.
    fn of(common: Common, stack: String, placement: Placement) -> BenchArgs {
        BenchArgs { common, connections: None, stack, placement, attach: Attach::Queued, part: None }
    }
}

impl From<MemoryArgs> for BenchArgs {
    fn from(args: MemoryArgs) -> BenchArgs {
        BenchArgs::of(args.common, "shm".into(), args.placement)
    }
}

impl From<IsolationArgs> for BenchArgs {
    fn from(args: IsolationArgs) -> BenchArgs {
        // Tenants with limits get no direct sockets.
        BenchArgs::of(args.common, args.stack, args.placement)
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 0.1 to 3600 is needed".into()),
    }
}

/// Runs the benchmarks as the subcommand `bench` of the current executable.
pub fn run(args: BenchArgs) -> Result<()> {
    run_as(args, &["bench"])
}

/// The same for an executable that takes [`BenchArgs`] after the arguments `prefix`.
pub fn run_as(args: BenchArgs, prefix: &[&str]) -> Result<()> {
    match args.part {
        Some(Part::Micro(args)) => return micro::run(args),
        Some(Part::Isolation(args)) => return compare(args.into(), prefix, USUAL, isolation::catalog),
        Some(Part::Memory(args)) => return compare(args.into(), prefix, USUAL, bench::memory::catalog),
        Some(Part::Forms(args)) => {
            return compare(args.into(), prefix, bench::forms::SIDES, bench::forms::catalog);
        }
        Some(Part::Multiplex(args)) => return multiplex::run(args, prefix),
        Some(Part::MultiplexLoad(args)) => return multiplex::run_load(&args),
        Some(Part::Crowd(args)) => return bench::crowd(&args, prefix),
        Some(Part::PingServer { port, udp }) => return bench::memory::ping_server(port, udp),
        Some(Part::PingClient { port, seconds, udp }) => {
            return bench::memory::ping_client(port, seconds, udp);
        }
        Some(Part::IsolationLoad(args)) => return isolation::run_load(&args),
        Some(Part::IdleServer { port }) => return bench::idle_server(port),
        Some(Part::IdleClient { port, count }) => return bench::idle_client(port, count),
        None => {}
    }
    compare(args, prefix, USUAL, bench::catalog)
}

/// What is compared.
const USUAL: [&str; 2] = ["plain kernel", "NetKernel"];

/// Measures what `catalog` has by turns, and tells.
fn compare(
    args: BenchArgs,
    prefix: &[&str],
    sides: [&'static str; 2],
    catalog: fn(&Settings) -> Vec<Benchmark>,
) -> Result<()> {
    let mut settings = settings(&args, prefix)?;
    let most = (sys::descriptor_limit().saturating_sub(1000)).max(1) as usize;
    let fewer = (settings.connections > most).then(|| {
        format!(
            "{} idle connections instead of {}: the limit of descriptors allows no more",
            most, settings.connections
        )
    });
    settings.connections = settings.connections.min(most);

    let chosen = choose(catalog(&settings), &args.common.only)?;
    if args.common.list {
        return list(&chosen, args.common.output.prints_json());
    }
    args.common.output.try_files()?;

    let rounds = args.common.rounds.unwrap_or(if args.common.output.quick { 2 } else { 5 });
    let mut session = Session::begin(settings)?;
    session.surroundings.warnings.extend(fewer);
    for warning in &session.surroundings.warnings {
        eprintln!("warning: {warning}");
    }
    let steps = chosen.iter().map(|benchmark| 2 * u64::from(rounds.min(benchmark.most_rounds))).sum();
    let progress = Progress::new(steps, args.common.output.quiet);
    let mut records = Vec::new();
    for benchmark in &chosen {
        records.extend(measure(&session, benchmark, rounds, &progress)?);
    }
    drop(progress);
    session.surroundings.warnings.extend(session.warnings.take());
    let results = Results {
        machine: machine::Machine::look(&session.settings.netkernel),
        surroundings: session.surroundings.clone(),
        sides,
        stack: session.settings.stack.clone(),
        attachment: session.settings.attach.name(),
        rounds,
        seconds: session.settings.seconds,
        records,
    };
    drop(session);

    args.common.output.deliver(&results)
}

/// What there is to measure.
fn list(benchmarks: &[Benchmark], as_json: bool) -> Result<()> {
    if as_json {
        let one = |benchmark: &Benchmark| serde_json::json!({ "id": benchmark.id, "about": benchmark.about });
        let all: Vec<_> = benchmarks.iter().map(one).collect();
        return output::print_json(&serde_json::json!({ "benchmarks": all }));
    }
    for benchmark in benchmarks {
        println!("{:17} {}", benchmark.id, benchmark.about);
    }
    Ok(())
}

fn settings(args: &BenchArgs, prefix: &[&str]) -> Result<Settings> {
    let netkernel = match &args.common.netkernel {
        Some(path) => {
            std::fs::canonicalize(path).with_context(|| format!("no netkernel at {}", path.display()))?
        }
        None => std::env::current_exe().context("this program's own file")?,
    };
    Ok(Settings {
        netkernel,
        stack: args.stack.clone(),
        seconds: args.common.seconds.unwrap_or(if args.common.output.quick { 1.0 } else { 3.0 }),
        connections: args.connections.unwrap_or(if args.common.output.quick { 2_000 } else { 15_000 })
            as usize,
        placement: args.placement,
        attach: args.attach,
        quick: args.common.output.quick,
        helper: prefix.iter().map(|&word| word.to_owned()).collect(),
    })
}

fn choose(all: Vec<Benchmark>, only: &[String]) -> Result<Vec<Benchmark>> {
    let stands_for = |name: &str, benchmark: &Benchmark| {
        benchmark.id.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    if let Some(unknown) = only.iter().find(|name| !all.iter().any(|benchmark| stands_for(name, benchmark))) {
        let names: Vec<&str> = all.iter().map(|benchmark| benchmark.id).collect();
        bail!("there is no benchmark {unknown:?}; there are {}", names.join(", "));
    }
    let wanted =
        |benchmark: &Benchmark| only.is_empty() || only.iter().any(|name| stands_for(name, benchmark));
    Ok(all.into_iter().filter(wanted).collect())
}

/// All rounds of one benchmark. What goes wrong is its result; only an interruption is an error.
fn measure(
    session: &Session,
    benchmark: &Benchmark,
    rounds: u32,
    progress: &Progress,
) -> Result<Vec<Record>> {
    let rounds = rounds.min(benchmark.most_rounds);
    let mut records: Vec<Record> = benchmark.rows.iter().cloned().map(Record::new).collect();
    let outcome = match benchmark.needs.iter().find(|name| find_program(name).is_none()) {
        Some(missing) => {
            let reason = format!("not run: {missing} is not installed (run scripts/deps)");
            progress.say(&format!("{}: {}", benchmark.id, reason.to_uppercase()));
            progress.step(u64::from(rounds) * 2);
            Outcome::NotRun(reason)
        }
        None => match turns(session, benchmark, rounds, progress, &mut records) {
            Ok(()) => match session.unserved.take() {
                None => Outcome::Measured,
                Some(reason) => {
                    progress.say(&format!("{}: {}", benchmark.id, reason.to_uppercase()));
                    Outcome::Failed(reason)
                }
            },
            Err(_) if sys::interrupted() => bail!("interrupted"),
            Err(error) => {
                session.unserved.take();
                progress.say(&format!("{}: FAILED: {error:#}", benchmark.id));
                Outcome::Failed(format!("failed: {error:#}"))
            }
        },
    };
    for record in &mut records {
        record.outcome = outcome.clone();
    }
    Ok(records)
}

fn turns(
    session: &Session,
    benchmark: &Benchmark,
    rounds: u32,
    progress: &Progress,
    records: &mut [Record],
) -> Result<()> {
    progress.start(benchmark.id);
    let mut live = (benchmark.start)(session)?;
    for round in 0..rounds {
        // Whoever comes second finds a warmer or a more tired machine: each is second as often.
        let order = match round % 2 {
            0 => [Side::Native, Side::Netkernel],
            _ => [Side::Netkernel, Side::Native],
        };
        for side in order {
            let sample =
                live.measure(session, side).with_context(|| format!("{side:?}, round {}", round + 1))?;
            for (record, &value) in records.iter_mut().zip(&sample.values) {
                record.add(side, value);
            }
            if let Some(first) = records.first_mut() {
                first.details.push(report::Detail { round, side, detail: sample.detail });
                for remark in sample
                    .remarks
                    .into_iter()
                    .filter(|remark| !first.remarks.contains(remark))
                    .collect::<Vec<_>>()
                {
                    first.remarks.push(remark);
                }
            }
            progress.step(1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(words: &[&str]) -> BenchArgs {
        Cli::try_parse_from([&["bench"], words].concat()).unwrap().bench
    }

    #[test]
    fn a_name_stands_for_itself_or_a_family() {
        let args = parse(&["--only", "redis,nginx-close"]);
        let settings = settings(&parse(&["--quick"]), &[]).unwrap();
        let chosen = choose(bench::catalog(&settings), &args.common.only).unwrap();
        let names: Vec<&str> = chosen.iter().map(|benchmark| benchmark.id).collect();
        assert_eq!(names, ["redis-p1", "redis-p16", "redis-c1", "nginx-close"]);
        assert_eq!(choose(bench::catalog(&settings), &["redis-p1".into()]).unwrap().len(), 1);
        assert!(choose(bench::catalog(&settings), &["nothing".into()]).is_err());
    }

    #[test]
    fn parts_are_subcommands() {
        assert!(matches!(
            parse(&["idle-client", "5200", "7"]).part,
            Some(Part::IdleClient { port: 5200, count: 7 })
        ));
        assert!(Cli::try_parse_from(["bench", "--seconds", "0"]).is_err());
        assert!(matches!(parse(&["micro", "--rounds", "3"]).part, Some(Part::Micro(_))));
    }
}
