//! `netkernel doctor`: what this host offers, and whether a program can be served.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::catalog::CongestionControls;
use crate::config::Config;
use crate::program::{self, Kind, Report};
use crate::{catalog, library, locate, show, sys};

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    /// In plain words.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// NetKernel works, less well.
    Warn,
    /// Something does not work without it.
    Missing,
}

#[derive(Debug, Serialize)]
struct ProgramFinding {
    #[serde(flatten)]
    report: Report,
    served: bool,
    /// `preload`, `direct`, or nothing.
    how: Option<&'static str>,
    /// The same on stacks that are not the kernel's: `preload`, `relay`, or nothing.
    how_elsewhere: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Exit code 0: everything needed is there (and the program can be served); 1 otherwise.
pub fn doctor(args: &DoctorArgs) -> Result<i32> {
    let program = match args.program.first() {
        Some(name) => Some(examine(program::resolve(name)?)),
        None => None,
    };
    let host = if program.is_some() { Vec::new() } else { host(args) };
    let well = host.iter().all(|f| f.state != State::Missing) && program.as_ref().is_none_or(|p| p.served);
    if args.json {
        show::print_json(&serde_json::json!({ "ok": well, "host": host, "program": program }))?;
    } else if let Some(program) = &program {
        print_program(program)?;
    } else {
        print_host(&host)?;
    }
    Ok(i32::from(!well))
}

fn examine(program: program::Program) -> ProgramFinding {
    let report = program::inspect(&program);
    let reason = report.verdict().err();
    let how = match &reason {
        None => Some("preload"),
        Some(_) if report.privileged && sys::effective_uid() != 0 => None,
        Some(_) => netkernel_agent::filter::available().then_some("direct"),
    };
    let how_elsewhere = if how == Some("direct") { Some("relay") } else { how };
    ProgramFinding { report, served: how.is_some(), how, how_elsewhere, reason }
}

fn print_program(program: &ProgramFinding) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let report = &program.report;
    writeln!(out, "program   {}", report.program.display())?;
    for interpreter in &report.interpreters {
        writeln!(out, "script    run by {}", interpreter.display())?;
    }
    let kind = match report.kind {
        Kind::Dynamic => "dynamically linked",
        Kind::Static => "statically linked",
        Kind::Go => "Go",
        Kind::Musl => "dynamically linked with musl",
        Kind::Bits32 => "a 32-bit program",
        Kind::OtherArchitecture => "for another architecture",
        Kind::NotReadable => "not readable by you, so unknown",
        Kind::Unknown => "unknown",
    };
    match &report.loader {
        Some(loader) => {
            writeln!(out, "binary    {} ({kind}, loader {})", report.binary.display(), loader.display())?
        }
        None => writeln!(out, "binary    {} ({kind})", report.binary.display())?,
    }
    if report.privileged {
        writeln!(out, "privilege set-user-id, set-group-id or file capabilities")?;
    }
    match &program.reason {
        Some(reason) if program.how == Some("direct") => writeln!(
            out,
            "verdict   served directly, by the seccomp agent, or by relay if the stack is not the kernel's ({reason}): netkernel run -- {}",
            report.program.display()
        ),
        None => writeln!(out, "verdict   served by preload: netkernel run -- {}", report.program.display()),
        Some(reason) => writeln!(
            out,
            "verdict   not served: {reason}\n          use a dynamically linked build, or run it as root; `netkernel run --fail-open` runs it on the kernel's own stack"
        ),
    }
}

fn print_host(findings: &[Finding]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let width = findings.iter().map(|f| f.what.len()).max().unwrap_or(0);
    for finding in findings {
        let state = match finding.state {
            State::Ok => "ok     ",
            State::Warn => "warn   ",
            State::Missing => "missing",
        };
        writeln!(out, "{state}  {:width$}  {}", finding.what, finding.found)?;
        if let Some(advice) = &finding.advice {
            writeln!(out, "         {:width$}  -> {advice}", "")?;
        }
    }
    Ok(())
}

fn host(args: &DoctorArgs) -> Vec<Finding> {
    vec![
        kernel(),
        processors(),
        library(),
        congestion_controls(),
        stacks(),
        huge_pages(),
        descriptors(),
        locked_memory(),
        memfd(),
        pidfd(),
        seccomp(),
        relay(),
        namespaces(),
        io_uring(),
        shared_sockets(),
        engine(args),
    ]
}

fn ok(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { what, state: State::Ok, found: found.into(), advice: None }
}

fn warn(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { what, state: State::Warn, found: found.into(), advice: Some(advice.into()) }
}

fn missing(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { what, state: State::Missing, found: found.into(), advice: Some(advice.into()) }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

fn read_number(path: &str) -> Option<u64> {
    read(path)?.split_whitespace().next()?.parse().ok()
}

/// Major and minor number.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel() -> Finding {
    let release = sys::kernel_release();
    match version(&release) {
        Some(v) if v >= (5, 11) => ok("kernel", format!("Linux {release}")),
        Some(_) => missing(
            "kernel",
            format!("Linux {release}"),
            "NetKernel needs Linux 5.11 or newer: update the kernel",
        ),
        None => warn("kernel", "its version cannot be read", "mount /proc"),
    }
}

fn processors() -> Finding {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    match count {
        1 => warn("processors", "1", "engine and programs take turns on it; two or more are faster"),
        n => ok("processors", n.to_string()),
    }
}

fn library() -> Finding {
    match library::find() {
        Ok(path) => ok("preload library", path.display().to_string()),
        Err(e) => missing("preload library", "not found", format!("{e:#}")),
    }
}

fn congestion_controls() -> Finding {
    let host = CongestionControls::of_host();
    if host.available.is_empty() {
        return warn("congestion controls", "cannot be read", "mount /proc; stacks that name one may fail");
    }
    let found = format!("{} (default {})", host.available.join(" "), host.default);
    let refused: Vec<_> = host.available.iter().filter(|cc| !host.allowed.contains(cc)).cloned().collect();
    if sys::effective_uid() != 0 && !refused.is_empty() {
        return warn(
            "congestion controls",
            format!("{found}; only for root: {}", refused.join(" ")),
            "run the engine as root, or list them in the sysctl net.ipv4.tcp_allowed_congestion_control",
        );
    }
    ok("congestion controls", found)
}

fn stacks() -> Finding {
    let offered = catalog::of(&Config::default()).and_then(catalog::offered).unwrap_or_default();
    let names: Vec<_> = offered.iter().filter(|s| s.available).map(|s| s.name.as_str()).collect();
    match names.is_empty() {
        false => ok("stacks", names.join(" ")),
        true => {
            missing("stacks", "none of the built-in ones is available", "see the line on congestion controls")
        }
    }
}

fn huge_pages() -> Finding {
    let dir = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    match (read_number(&format!("{dir}/nr_hugepages")), read_number(&format!("{dir}/free_hugepages"))) {
        (Some(all), Some(free)) if free > 0 => ok("huge pages", format!("{free} of {all} free (2 MiB each)")),
        (Some(all), Some(_)) => warn(
            "huge pages",
            format!("0 of {all} free (2 MiB each); regions use ordinary pages"),
            "sysctl vm.nr_hugepages=N, 512 for each guest with a region of 1 GiB",
        ),
        _ => warn(
            "huge pages",
            "this kernel has none of 2 MiB; regions use ordinary pages",
            "nothing is broken by it",
        ),
    }
}

fn descriptors() -> Finding {
    match sys::limit(libc::RLIMIT_NOFILE) {
        Ok((soft, hard)) if hard >= 32768 => {
            ok("descriptors", format!("limit {soft}, the engine may raise it to {hard}"))
        }
        Ok((soft, hard)) => warn(
            "descriptors",
            format!("limit {soft}, at most {hard}"),
            "the engine needs two for each guest socket: raise the hard limit (ulimit -Hn, LimitNOFILE=)",
        ),
        Err(e) => warn("descriptors", format!("limit cannot be read: {e}"), "check ulimit -n"),
    }
}

fn locked_memory() -> Finding {
    match sys::limit(libc::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft == u64::MAX => ok("locked memory", "no limit"),
        Ok((soft, _)) => {
            ok("locked memory", format!("limit {} KiB (not needed: regions are not locked)", soft / 1024))
        }
        Err(e) => warn("locked memory", format!("limit cannot be read: {e}"), "check ulimit -l"),
    }
}

fn memfd() -> Finding {
    match sys::try_sealed_memfd() {
        Ok(()) => ok("shared memory", "memfd with seals works"),
        Err(e) => missing(
            "shared memory",
            format!("memfd with seals fails: {e}"),
            "allow memfd_create and F_ADD_SEALS here",
        ),
    }
}

fn pidfd() -> Finding {
    match sys::try_pidfd() {
        Ok(()) => ok("pidfd", "works"),
        Err(e) => warn("pidfd", format!("fails: {e}"), "programs cannot be relayed without pidfd_open"),
    }
}

fn seccomp() -> Finding {
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions) if actions.split_whitespace().any(|a| a == "user_notif") => {
            ok("seccomp", "user notification is there: static and Go programs can be served")
        }
        _ => warn(
            "seccomp",
            "no user notification",
            "static and Go programs cannot be served: Linux 5.14 or later with CONFIG_SECCOMP_FILTER is needed",
        ),
    }
}

/// What a relay does with its program: it reads its memory and duplicates its descriptors, as a debugger would.
fn relay() -> Finding {
    if !netkernel_agent::filter::available() || sys::try_pidfd().is_err() {
        return warn(
            "relay",
            "static and Go programs are served on no stack but the kernel's, if there",
            "see the lines on seccomp and pidfd",
        );
    }
    match read_number("/proc/sys/kernel/yama/ptrace_scope") {
        Some(scope) if scope > 0 && sys::effective_uid() != 0 => warn(
            "relay",
            format!("kernel.yama.ptrace_scope is {scope}: an engine of yours may not read your programs"),
            "use an engine that runs as root, or sysctl kernel.yama.ptrace_scope=0",
        ),
        _ => ok("relay", "static and Go programs can be served on stacks that are not the kernel's"),
    }
}

fn namespaces() -> Finding {
    let has = |name: &str| Path::new("/proc/self/ns").join(name).exists();
    if !has("net") {
        return warn("namespaces", "no network namespaces", "stacks with `netns` need CONFIG_NET_NS");
    }
    if sys::effective_uid() == 0 {
        return ok("namespaces", "network namespaces work for stacks with `netns`");
    }
    warn("namespaces", "there, but not for you", "stacks with `netns` need an engine that runs as root")
}

fn io_uring() -> Finding {
    let state = match read_number("/proc/sys/kernel/io_uring_disabled") {
        Some(0) => "on",
        Some(1) => "for privileged programs only",
        Some(_) => return ok("io_uring", "off"),
        None => "unknown",
    };
    if netkernel_agent::filter::available() {
        return ok(
            "io_uring",
            format!("{state}; refused to guests, so that their programs use ordinary calls"),
        );
    }
    warn(
        "io_uring",
        format!("{state}: without an agent, programs that use it for sockets pass NetKernel by"),
        "most fall back to ordinary calls when it is off: sysctl kernel.io_uring_disabled=2",
    )
}

fn shared_sockets() -> Finding {
    match netkernel_shm::fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC) {
        Ok(_) => ok("Unix sockets", "pairs work"),
        Err(e) => missing("Unix sockets", format!("a pair cannot be made: {e}"), "allow AF_UNIX here"),
    }
}

fn engine(args: &DoctorArgs) -> Finding {
    match locate::require(args.socket.as_deref()) {
        Ok(mut client) => match client.version() {
            Ok(v) if v.abi_version != netkernel_abi::ABI_VERSION => missing(
                "engine",
                format!("at {} (pid {}) with ABI {}", client.path().display(), v.pid, v.abi_version),
                format!("this command has ABI {}: restart the engine", netkernel_abi::ABI_VERSION),
            ),
            Ok(v) => {
                ok("engine", format!("runs at {} (pid {}, {})", client.path().display(), v.pid, v.program))
            }
            Err(e) => missing("engine", format!("does not answer: {e}"), "end it and start it again"),
        },
        Err(e) if args.socket.is_some() => missing("engine", format!("{e:#}"), "give the right --socket"),
        Err(_) => ok("engine", "none runs; `netkernel run` starts a private one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_read() {
        assert_eq!(version("6.18.2-1-cloud-amd64"), Some((6, 18)));
        assert_eq!(version("5.11"), Some((5, 11)));
        assert_eq!(version("x"), None);
    }

    #[test]
    fn every_line_that_is_not_ok_says_what_to_do() {
        let args = DoctorArgs { socket: None, json: false, program: Vec::new() };
        for finding in host(&args) {
            assert_eq!(finding.state == State::Ok, finding.advice.is_none(), "{finding:?}");
        }
    }
}
