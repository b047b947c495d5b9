//! The socket test program: its native output is the expected output.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::step::{Tally, capture, run};
use crate::{MINUTE, artifact};

const PROGRAM: &str = "conformance/build/socktest";
const EXPECTED: &str = "conformance/expected-differences.txt";
/// A relay differs in other cases.
const EXPECTED_RELAY: &str = "conformance/expected-differences-relay.txt";
const EXPECTED_SHM: &str = "conformance/expected-differences-shm.txt";
/// What the reason of a case begins with that is not run, since it would wait until its limit.
const HANGS: &str = "hangs";

/// Builds the program, runs it natively and as a guest, and compares line by line.
pub fn compare(cases: &[String]) -> Result<Tally> {
    let mut make = Command::new("make");
    make.args(["-C", "conformance", "--quiet"]);
    let built = run(make, 5 * MINUTE)?;
    if built.failed > 0 {
        return Ok(built);
    }
    let mut tally = built;
    let native = natively(cases, &mut tally)?;
    let runs = [
        ("auto", "cubic", &[EXPECTED][..]),
        ("direct", "cubic", &[EXPECTED]),
        ("relay", "cubic", &[EXPECTED_RELAY]),
        ("auto", "shm", &[EXPECTED, EXPECTED_SHM]),
        ("auto", PROCESS, &[EXPECTED]),
    ];
    for (attach, stack, files) in runs {
        let mut expected = Cases::new();
        for file in files {
            let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
            expected.extend(parse_expected(&text).with_context(|| (*file).to_owned())?);
        }
        let hangs = |name: &str| expected.get(name).is_some_and(|reason| reason.starts_with(HANGS));
        let mut run = native.clone();
        run.retain(|name, _| !hangs(name));
        let left_out = native.len() - run.len();
        // Without names the program runs all of its cases.
        let names: Vec<String> = if left_out == 0 { cases.to_vec() } else { run.keys().cloned().collect() };
        tally = tally.and(attached(&run, &expected, &names, attach, stack)?);
        tally.known += left_out as u64;
    }
    Ok(tally)
}

/// Runs the program on the plain kernel.
fn natively(cases: &[String], tally: &mut Tally) -> Result<Cases> {
    let mut native = run_natively(cases)?;
    let bad = |native: &Cases| {
        native.iter().filter(|(_, seen)| !is_good(seen)).map(|(name, _)| name.clone()).collect()
    };
    tally.told.extend(again(&mut native, "natively", bad, run_natively)?);
    Ok(native)
}

fn run_natively(cases: &[String]) -> Result<Cases> {
    let mut native = Command::new(PROGRAM);
    native.arg("run").args(cases);
    Ok(parse(&capture(native, 10 * MINUTE, false)?.1))
}

/// How often what is not as it should be is run again.
const AGAIN: usize = 2;

/// Runs what is not as it should be again, without the rest: what differs then is told as flaky, and returned. With this
/// many of them, no busy machine is the reason.
fn again(
    seen: &mut Cases,
    how: &str,
    wrong: impl Fn(&Cases) -> Vec<String>,
    run: impl Fn(&[String]) -> Result<Cases>,
) -> Result<Vec<String>> {
    let mut told = Vec::new();
    for _ in 0..AGAIN {
        let wrong = wrong(seen);
        if wrong.is_empty() || wrong.len() >= 12 {
            break;
        }
        for (name, now) in run(&wrong)? {
            if let Some(before) = seen.insert(name.clone(), now.clone())
                && before != now
            {
                told.push(format!("FLAKY  {name} ({how}): first {before}, then {now}"));
            }
        }
    }
    told.iter().for_each(|line| println!("{line}"));
    Ok(told)
}

/// Runs the program as a guest and compares.
fn attached(native: &Cases, expected: &Cases, cases: &[String], attach: &str, stack: &str) -> Result<Tally> {
    let mut served = parse(&serve(cases, attach, stack)?);
    // What has no line at all has to be run again as well.
    for name in native.keys() {
        served.entry(name.clone()).or_insert_with(|| NO_LINE.to_owned());
    }
    let how = format!("--attach {attach} --stack {stack}");
    let wrong = |native: &Cases, served: &Cases| -> Vec<String> {
        let differs = |(name, seen): &(&String, &String)| {
            native.get(*name).is_some_and(|want| want != *seen) && !expected.contains_key(*name)
        };
        served.iter().filter(differs).map(|(name, _)| name.clone()).collect()
    };
    let serve = |cases: &[String]| Ok(parse(&serve(cases, attach, stack)?));
    let mut flaky = again(&mut served, &how, |served| wrong(native, served), serve)?;
    // What the plain kernel shows may depend on time as well.
    let mut native = native.clone();
    flaky.extend(again(&mut native, "natively", |native| wrong(native, &served), run_natively)?);
    let report = judge(&native, &served, expected);
    println!("--- conformance, {how}");
    report.lines.iter().for_each(|line| println!("{line}"));
    let bad = report.lines.iter().filter(|line| line.starts_with("DIFFER") || line.starts_with("NATIVE"));
    let told = flaky.into_iter().chain(bad.map(|line| format!("{line}\n         ({how})"))).collect();
    Ok(report.tally.and(Tally { told, ..Tally::default() }))
}

/// Runs cases as a guest.
fn serve(cases: &[String], attach: &str, stack: &str) -> Result<Vec<String>> {
    let engine = if stack == PROCESS { Some(ProcessEngine::start()?) } else { None };
    let mut served = Command::new(artifact("netkernel"));
    served.args(["run", "--attach", attach, "--name", "socktest"]);
    match &engine {
        Some(engine) => served.arg("--socket").arg(engine.socket()),
        None => served.args(["--private", "--stack", stack]),
    };
    served.args(["--", PROGRAM, "run"]).args(cases);
    Ok(capture(served, 10 * MINUTE, false)?.1)
}

/// The stack of an engine whose code runs in a process of its own.
const PROCESS: &str = "process";

/// That engine, which ends with the value.
struct ProcessEngine {
    child: Child,
    dir: PathBuf,
}

impl ProcessEngine {
    fn start() -> Result<ProcessEngine> {
        let dir = std::env::temp_dir().join(format!("netkernel-conformance-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let config = dir.join("engine.toml");
        let nsm = "[[nsm]]\nname = \"process\"\nform = \"process\"\ncongestion_control = \"cubic\"\n";
        std::fs::write(&config, nsm)?;
        let mut command = Command::new(artifact("netkernel"));
        command.arg("up").arg("--config").arg(config).arg("--socket").arg(dir.join("engine.sock"));
        let child = command.stdout(Stdio::null()).spawn().context("the engine does not start")?;
        let engine = ProcessEngine { child, dir };
        let until = Instant::now() + Duration::from_secs(20);
        while !engine.socket().exists() {
            if Instant::now() > until {
                bail!("the engine is not ready after 20 s");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(engine)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("engine.sock")
    }
}

impl Drop for ProcessEngine {
    fn drop(&mut self) {
        // Its processes end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

type Cases = BTreeMap<String, String>;

/// What is seen of a case whose program ended before it.
const NO_LINE: &str = "(no line)";

fn is_good(seen: &str) -> bool {
    !["FAIL", "HANG", "SIGNAL"].iter().any(|bad| seen.starts_with(bad))
}

/// `NAME: what was seen`.
fn parse(lines: &[String]) -> Cases {
    lines
        .iter()
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
        .map(|(name, seen)| (name.to_owned(), seen.trim_end().to_owned()))
        .collect()
}

/// `NAME: reason` on each line; `#` begins a comment line.
fn parse_expected(text: &str) -> Result<Cases> {
    let mut cases = Cases::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        match line.split_once(": ") {
            Some((name, reason)) if !reason.trim().is_empty() => {
                cases.insert(name.trim().to_owned(), reason.trim().to_owned());
            }
            _ => bail!("line {}: write `CASE: reason`", i + 1),
        }
    }
    Ok(cases)
}

struct Report {
    tally: Tally,
    lines: Vec<String>,
}

fn judge(native: &Cases, served: &Cases, expected: &Cases) -> Report {
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    if native.is_empty() {
        tally.failed += 1;
        lines.push("the native run printed no case".into());
    }
    for (name, want) in native {
        let got = served.get(name).map_or(NO_LINE, String::as_str);
        if !is_good(want) {
            tally.failed += 1;
            lines.push(format!("NATIVE {name}: {want}"));
        } else if got == want {
            tally.passed += 1;
            if let Some(reason) = expected.get(name) {
                lines.push(format!(
                    "NOTE   {name}: as on the plain kernel now; was expected to differ: {reason}"
                ));
            }
        } else if let Some(reason) = expected.get(name) {
            tally.known += 1;
            lines.push(format!("KNOWN  {name}: {reason}\n         native: {want}\n         served: {got}"));
        } else {
            tally.failed += 1;
            lines.push(format!("DIFFER {name}\n         native: {want}\n         served: {got}"));
        }
    }
    for name in served.keys().filter(|name| !native.contains_key(*name)) {
        tally.failed += 1;
        lines.push(format!("DIFFER {name}: only when served"));
    }
    lines.push(format!("conformance: {tally}"));
    Report { tally, lines }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases(text: &str) -> Cases {
        parse(&text.lines().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn lines_are_compared() {
        let native = cases("a: ok 1\nb: ok\nc: ok IN|OUT\nd: FAIL x.c:3 got 1\ne: ok\n12 cases in 3 s: good");
        let served = cases("a: ok 1\nb: FAIL y\nc: ok IN\nd: ok\nf: ok");
        let expected = parse_expected("# why\n\nc: the order of events differs\na: was different\n").unwrap();
        let report = judge(&native, &served, &expected);
        assert_eq!(
            report.tally,
            Tally { passed: 1, failed: 4, known: 1, told: Vec::new() },
            "{:#?}",
            report.lines
        );
    }

    #[test]
    fn a_difference_needs_a_reason() {
        assert!(parse_expected("accept_queue\n").is_err());
        assert!(parse_expected("accept_queue: \n").is_err());
    }

    #[test]
    fn nothing_is_not_a_success() {
        assert_eq!(judge(&Cases::new(), &Cases::new(), &Cases::new()).tally.failed, 1);
    }
}
