//! Runs one command of a step: shown, limited in time, counted.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// What passed and what did not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    /// Differences that are known and explained.
    pub known: u64,
    /// A line for each failure, and for each flaky success: told again in the end, since a log that was cut has its end.
    pub told: Vec<String>,
}

impl Tally {
    pub fn passed(passed: u64) -> Tally {
        Tally { passed, ..Tally::default() }
    }

    /// One failure, and what to say of it.
    pub fn failure(told: impl Into<String>) -> Tally {
        Tally { failed: 1, told: vec![told.into()], ..Tally::default() }
    }

    pub fn and(mut self, other: Tally) -> Tally {
        self.told.extend(other.told);
        Tally {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            known: self.known + other.known,
            told: self.told,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.known > 0 {
            write!(f, " ({} known differences)", self.known)?;
        }
        Ok(())
    }
}

/// Of a command line.
const SHOWN_WORDS: usize = 20;

/// Runs a command that passes or fails as one.
pub fn run(mut command: Command, limit: Duration) -> Result<Tally> {
    let shown = show(&command);
    let began = Instant::now();
    let mut child = start(&mut command)?;
    let status = wait(&mut child, limit, &shown)?;
    println!("--- {shown}: {status} after {:.1} s", began.elapsed().as_secs_f32());
    Ok(if status.success() { Tally::passed(1) } else { Tally::failure(format!("{shown}: {status}")) })
}

/// Runs a command whose output lines tell what passed; a bad exit code alone counts as one failure.
pub fn run_counted(command: Command, limit: Duration, count: fn(&[String]) -> Tally) -> Result<Tally> {
    let shown = show(&command);
    let (status, lines) = capture(command, limit, true)?;
    let mut tally = count(&lines);
    if !status.success() && tally.failed == 0 {
        tally = tally.and(Tally::failure(format!("{shown}: {status}")));
    }
    if tally == Tally::default() {
        tally = Tally::failure(format!("{shown}: it does not say what passed"));
    }
    tally.told.iter().for_each(|line| println!("--- {line}"));
    Ok(tally)
}

/// Runs a command and returns its standard output, which is also passed on if `pass_on`.
pub fn capture(mut command: Command, limit: Duration, pass_on: bool) -> Result<(ExitStatus, Vec<String>)> {
    let shown = show(&command);
    let began = Instant::now();
    let mut child = start(command.stdout(Stdio::piped()))?;
    let out = child.stdout.take().context("no pipe")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(out);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            if pass_on {
                println!("{text}");
            }
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    let status = wait(&mut child, limit, &shown)?;
    // What is left in the pipe. A process that stayed behind may hold it open: it is not waited for.
    let mut lines = Vec::new();
    while let Ok(line) = receiver.recv_timeout(Duration::from_secs(2)) {
        lines.push(line);
    }
    println!("--- {shown}: {status} after {:.1} s", began.elapsed().as_secs_f32());
    Ok((status, lines))
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    // Hundreds of cases by name tell nobody anything.
    match words.len().checked_sub(SHOWN_WORDS) {
        Some(more) if more > 0 => format!("{} and {more} more", words[..SHOWN_WORDS].join(" ")),
        _ => words.join(" "),
    }
}

/// In a process group of its own, so that the watchdog ends everything.
fn start(command: &mut Command) -> Result<Child> {
    let shown = show(command);
    println!("+++ {shown}");
    command.process_group(0).stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {shown}"))
}

fn wait(child: &mut Child, limit: Duration, shown: &str) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            // The shell's own kill: a small system may have no other.
            let _ = Command::new("sh").args(["-c", &format!("kill -KILL -{}", child.id())]).status();
            let _ = child.wait();
            bail!("{shown} was ended after {} s: it hangs, or the machine is too slow", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Adds up cargo's `test result: ok. 5 passed; 1 failed; ...`, and takes what it says of each failure: the line that says
/// where a test panicked, and its name.
pub fn count_tests(lines: &[String]) -> Tally {
    let mut tally = Tally::default();
    let says = |line: &&String| {
        (line.starts_with("test ") && line.ends_with("... FAILED"))
            || (line.starts_with("thread '") && line.contains(" panicked at "))
            || line.starts_with("error: test failed")
    };
    for line in lines.iter().filter(|l| l.starts_with("test result: ")) {
        let words: Vec<&str> = line.split([' ', ';']).collect();
        for pair in words.windows(2) {
            match (pair[0].parse::<u64>(), pair[1]) {
                (Ok(n), "passed") => tally.passed += n,
                (Ok(n), "failed") => tally.failed += n,
                _ => {}
            }
        }
    }
    if tally.failed > 0 {
        tally.told = lines.iter().filter(says).cloned().collect();
    }
    tally
}

/// Reads `N passed, N failed` from the last line that has it.
pub fn count_last_line(lines: &[String]) -> Tally {
    let found = lines.iter().rev().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.windows(4).find_map(|w| match (w[0].parse(), w[1], w[2].parse(), w[3]) {
            (Ok(passed), "passed,", Ok(failed), last) if last.starts_with("failed") => Some((passed, failed)),
            _ => None,
        })
    });
    let (passed, failed) = found.unwrap_or_default();
    Tally { passed, failed, ..Tally::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn counts_are_read() {
        let text = "running 2 tests\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n\
                    test result: FAILED. 3 passed; 4 failed; 1 ignored; finished in 0.1s";
        assert_eq!(count_tests(&lines(text)), Tally { passed: 5, failed: 4, ..Tally::default() });
        assert_eq!(
            count_last_line(&lines("x\napps: 7 passed, 2 failed, 1 skipped\nbye")),
            Tally { passed: 7, failed: 2, ..Tally::default() }
        );
        assert_eq!(count_last_line(&lines("nothing")), Tally::default());
    }

    #[test]
    fn failures_are_named() {
        let text = "test a ... ok\ntest b::c ... FAILED\nthread 'b::c' (7) panicked at x.rs:1:2:\nhello\n\
                    test result: FAILED. 1 passed; 1 failed; 0 ignored";
        let told = count_tests(&lines(text)).told;
        assert_eq!(told, ["test b::c ... FAILED", "thread 'b::c' (7) panicked at x.rs:1:2:"]);
        let passes = "thread 'b' panicked at x.rs:1:2:\ntest b ... ok\ntest result: ok. 1 passed; 0 failed";
        assert!(count_tests(&lines(passes)).told.is_empty(), "a test that has to panic is none");
    }

    #[test]
    fn what_hangs_is_ended_with_its_children() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 60 & sleep 60"]);
        let error = run(command, Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().contains("was ended after"), "{error}");
    }
}
