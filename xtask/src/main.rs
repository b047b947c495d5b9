//! The project's own commands. `cargo xtask ci` is what CI runs and what you run: every step with a time limit, and in the
//! end one line that counts what passed and what failed.
#![forbid(unsafe_code)]

mod conformance;
mod fuzz;
mod step;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use step::{Tally, run, run_counted};

const USAGE: &str = "usage: cargo xtask COMMAND
  ci [--skip-deps]     everything below but bench, in order
  deps                 install what building and testing need (Debian, as root)
  lint                 cargo fmt --check, cargo clippy -D warnings
  build                everything, in the profile that tests use
  test                 cargo test --workspace
  loom                 all interleavings of the rings' two sides
  conformance [CASE..] the socket test program, natively and under NetKernel, compared line by line
  apps [ARGS..]        unmodified programs
  fuzz [TARGET..] [--seconds N]
                       the fuzz targets under libFuzzer (a nightly compiler is needed; not part of ci)
  bench [ARGS..]       netkernel bench";

/// Profile of all that the tests run: as release, without link-time optimisation, which every test program would pay for.
const PROFILE: &str = "fast";

const MINUTE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match command(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one command; whether all went well.
fn command(arguments: &[String]) -> Result<bool> {
    let Some((name, rest)) = arguments.split_first() else { bail!("{USAGE}") };
    std::env::set_current_dir(root()).context("cannot enter the repository")?;
    let tally = match name.as_str() {
        "ci" => return ci(rest),
        "deps" => deps()?,
        "lint" => lint()?,
        "build" => build()?,
        "test" => build()?.and(test()?),
        "loom" => loom()?,
        "conformance" => build()?.and(conformance::compare(rest)?),
        "apps" => build()?.and(apps(rest)?),
        "fuzz" => fuzz::fuzz(rest)?,
        "bench" => release()?.and(bench(rest)?),
        _ => bail!("there is no command '{name}'\n{USAGE}"),
    };
    println!("{tally}");
    Ok(tally.failed == 0)
}

type Step = (&'static str, Box<dyn FnOnce() -> Result<Tally>>);

fn ci(arguments: &[String]) -> Result<bool> {
    let mut steps: Vec<Step> = Vec::new();
    if !arguments.iter().any(|a| a == "--skip-deps") {
        steps.push(("deps", Box::new(deps)));
    }
    steps.push(("lint", Box::new(lint)));
    steps.push(("build", Box::new(build)));
    steps.push(("test", Box::new(test)));
    steps.push(("loom", Box::new(loom)));
    steps.push(("conformance", Box::new(|| conformance::compare(&[]))));
    steps.push(("apps", Box::new(|| apps(&[]))));
    let direct = ["--attach", "direct", "--mode", "both", "--skip", "soak"].map(String::from);
    steps.push(("apps direct", Box::new(move || apps(&direct))));
    let relay = ["--attach", "relay", "--mode", "both", "--skip", "soak"].map(String::from);
    steps.push(("apps relay", Box::new(move || apps(&relay))));

    let started = Instant::now();
    let mut summary = Vec::new();
    let mut total = Tally::default();
    for (name, step) in steps {
        println!("\n=== {name}");
        let began = Instant::now();
        let tally = step().unwrap_or_else(|error| {
            println!("{error:#}");
            Tally::failure(format!("{error:#}"))
        });
        summary.push(format!("{name:12} {:7.1} s   {tally}", began.elapsed().as_secs_f32()));
        println!("=== {}", summary[summary.len() - 1]);
        summary.extend(tally.told.iter().map(|line| format!("    {line}")));
        let built = name != "build" || tally.failed == 0;
        total = total.and(tally);
        if !built {
            println!("the rest needs the build and was left out");
            break;
        }
    }
    println!("\n=== summary ({:.0} s)", started.elapsed().as_secs_f32());
    summary.iter().for_each(|line| println!("{line}"));
    if total.known > 0 {
        println!(
            "ATTENTION: {} known differences from the plain kernel, see conformance/expected-differences.txt",
            total.known
        );
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(total.failed == 0)
}

fn deps() -> Result<Tally> {
    if !Path::new("/etc/debian_version").exists() {
        println!("not Debian: install what scripts/deps names by hand");
        return Ok(Tally::default());
    }
    run(Command::new("scripts/deps"), 10 * MINUTE)
}

fn lint() -> Result<Tally> {
    let format = run(cargo(&["fmt", "--all", "--check"]), 2 * MINUTE)?;
    let clippy = cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--profile",
        PROFILE,
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]);
    Ok(format.and(run(clippy, 10 * MINUTE)?))
}

fn build() -> Result<Tally> {
    run(cargo(&["build", "--workspace", "--profile", PROFILE]), 15 * MINUTE)
}

fn test() -> Result<Tally> {
    run_counted(
        cargo(&["test", "--workspace", "--profile", PROFILE, "--no-fail-fast"]),
        15 * MINUTE,
        step::count_tests,
    )
}

fn loom() -> Result<Tally> {
    let mut command = cargo(&["test", "--profile", PROFILE, "-p", "netkernel-ring", "--test", "loom"]);
    // A target directory of its own: the flag would make everything else stale.
    command.env("RUSTFLAGS", "--cfg loom").args(["--target-dir", "target/loom"]);
    run_counted(command, 10 * MINUTE, step::count_tests)
}

/// Scenarios that are known to fail, with what is known of the cause.
const KNOWN_FAILURES: &str = "crates/testkit/known-failures.txt";

/// And those that fail in a relay only.
const KNOWN_FAILURES_RELAY: &str = "crates/testkit/known-failures-relay.txt";

/// Runs the unmodified programs. What fails is run once more, alone: what passes then is told as flaky; what fails again
/// fails, unless it stands among the known failures, which are counted as such and never silently.
fn apps(arguments: &[String]) -> Result<Tally> {
    let mut command = Command::new(artifact("apps"));
    // Two at a time: each has its own ports, directory and engine, and most of their time is waiting.
    command.arg("--netkernel").arg(artifact("netkernel")).args(["--jobs", "2"]).args(arguments);
    let (status, lines) = step::capture(command, 20 * MINUTE, true)?;
    let mut tally = step::count_last_line(&lines);
    if !status.success() && tally.failed == 0 {
        tally = tally.and(Tally::failure(format!("apps: {status}")));
    }
    let relay = arguments.windows(2).any(|pair| pair[0] == "--attach" && pair[1] == "relay");
    let mut known = std::fs::read_to_string(KNOWN_FAILURES).context(KNOWN_FAILURES)?;
    if relay {
        known += &std::fs::read_to_string(KNOWN_FAILURES_RELAY).context(KNOWN_FAILURES_RELAY)?;
    }
    for line in &lines {
        // `NAME [MODE]: FAILED 1.2s`
        let Some((name, mode)) = line.split_once("]: FAILED").and_then(|(case, _)| case.split_once(" ["))
        else {
            continue;
        };
        let mut again = Command::new(artifact("apps"));
        again.arg("--netkernel").arg(artifact("netkernel"));
        if let Some(at) = arguments.iter().position(|a| a == "--attach") {
            again.args(&arguments[at..(at + 2).min(arguments.len())]);
        }
        again.args(["--only", name, "--mode", mode]);
        let (status, _) = step::capture(again, 5 * MINUTE, true)?;
        if status.success() {
            let told = format!("FLAKY  {name} [{mode}]: failed, and passed when it was run once more, alone");
            println!("{told}");
            tally.failed -= 1;
            tally.passed += 1;
            tally.told.push(told);
        } else if let Some(reason) = known.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ")) {
            println!("KNOWN  {name} [{mode}]: {reason}");
            tally.failed -= 1;
            tally.known += 1;
        } else {
            tally.told.push(format!("FAILED {name} [{mode}], and again when it was run once more, alone"));
        }
    }
    Ok(tally)
}

/// What is measured is what is shipped.
fn release() -> Result<Tally> {
    run(cargo(&["build", "--workspace", "--release"]), 15 * MINUTE)
}

fn bench(arguments: &[String]) -> Result<Tally> {
    let mut command = Command::new(artifact("../release/netkernel"));
    command.arg("bench").args(arguments);
    run(command, 60 * MINUTE)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Something that the build made.
fn artifact(name: &str) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| "target".into(), PathBuf::from)
        .join(PROFILE)
        .join(name)
}
