//! The facts about a machine that its figures depend on. No paths, no host names: reports are published.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::session::find_program;

#[derive(Serialize)]
pub struct Machine {
    pub date: String,
    pub kernel: String,
    pub cpus: usize,
    pub cpu: String,
    pub memory_gib: f64,
    pub huge_pages: String,
    pub load_average: String,
    pub netkernel: String,
    pub commit: Option<String>,
    pub programs: BTreeMap<&'static str, String>,
}

impl Machine {
    pub fn look(netkernel: &Path) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = read("/proc/meminfo");
        let kib = field(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
        let programs = [
            ("iperf3", &["--version"][..]),
            ("redis-server", &["--version"]),
            ("redis-benchmark", &["--version"]),
            ("nginx", &["-v"]),
            ("wrk", &["-v"]),
            ("python3", &["--version"]),
        ];
        Machine {
            date: date(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())),
            kernel: read("/proc/sys/kernel/osrelease"),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: field(&read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            memory_gib: kib.unwrap_or(0.0) / f64::from(1 << 20),
            huge_pages: field(&memory, "HugePages_Total").unwrap_or_default(),
            load_average: read("/proc/loadavg"),
            netkernel: first_line(netkernel, &["--version"])
                .unwrap_or_else(|| "netkernel of unknown version".into()),
            commit: commit(netkernel),
            programs: programs
                .into_iter()
                .filter_map(|(name, ask)| Some((name, first_line(&find_program(name)?, ask)?)))
                .collect(),
        }
    }
}

/// The first line that a program says when asked for its version, wherever it says it.
fn first_line(program: &Path, ask: &[&str]) -> Option<String> {
    let output = Command::new(program).args(ask).stdin(Stdio::null()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

/// The commit of NetKernel: given when this was built, or else that of the repository the program was built in.
fn commit(netkernel: &Path) -> Option<String> {
    if let Some(commit) = option_env!("NETKERNEL_COMMIT") {
        return Some(commit.to_owned());
    }
    let root = netkernel.ancestors().find(|directory| directory.join("crates/bench").is_dir())?;
    let git = |words: &[&str]| {
        let output =
            Command::new("git").arg("-C").arg(root).args(words).stdin(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|list| !list.is_empty());
    Some(if changed { format!("{commit} with changes") } else { commit })
}

/// Seconds since 1970 as a date and time of UTC.
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // The calendar begins in March 0000, so that leap days end its years; eras have 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + carry;
    format!("{year}-{month:02}-{of_month:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(date(1_735_689_599), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn a_machine_has_processors() {
        let machine = Machine::look(Path::new("/nonexistent"));
        assert!(machine.cpus > 0 && !machine.kernel.is_empty());
        assert_eq!(machine.commit, None);
    }
}
