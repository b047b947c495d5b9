//! Real programs, one module for each; the scripts that they run stand in `scripts/`.

mod databases;
mod fixed;
mod haproxy;
mod http;
mod nginx;
mod node;
mod pipes;
mod python;
mod redis;
mod soak;
mod ssh;
mod throughput;

use anyhow::{Result, ensure};
use netkernel_testkit::{Cmd, Ctx, Output, Proc, Scenario};

pub fn all() -> Vec<Scenario> {
    [
        http::SCENARIOS,
        fixed::SCENARIOS,
        python::SCENARIOS,
        nginx::SCENARIOS,
        redis::SCENARIOS,
        databases::SCENARIOS,
        haproxy::SCENARIOS,
        node::SCENARIOS,
        throughput::SCENARIOS,
        pipes::SCENARIOS,
        ssh::SCENARIOS,
        soak::SCENARIOS,
    ]
    .concat()
}

/// A script of ours, written into the run's directory.
macro_rules! script {
    ($ctx:expr, $name:literal) => {
        $ctx.write(concat!("scripts/", $name), include_str!(concat!("scripts/", $name)))?
    };
}
pub(crate) use script;

const TERM: netkernel_testkit::process::Signal = netkernel_testkit::process::Signal::TERM;

/// Whole words of a program's output that must be there.
fn says(output: &Output, what: &str) -> Result<()> {
    let text = output.text();
    ensure!(text.contains(what), "'{what}' is not in what it said:\n{text}");
    Ok(())
}

/// The script server that most clients are tried with; it listens when this returns.
fn http_server(ctx: &mut Ctx, dir: &std::path::Path) -> Result<(Proc, u16)> {
    let port = ctx.port()?;
    let script = script!(ctx, "http_server.py");
    let mut server = ctx.server("python3")?.arg(script).arg(port.to_string()).arg(dir).spawn()?;
    ctx.listening(&mut server, port)?;
    Ok((server, port))
}

/// Runs several programs at the same time, all to a good end.
fn together(commands: Vec<Cmd>) -> Result<Vec<Output>> {
    let running = commands.into_iter().map(Cmd::spawn).collect::<Result<Vec<_>>>()?;
    running.into_iter().map(Proc::finish).collect()
}

fn sha256(ctx: &Ctx, path: &std::path::Path) -> Result<String> {
    let output = ctx.native("sha256sum")?.arg(path).run()?;
    Ok(output.text().split_whitespace().next().unwrap_or_default().to_owned())
}

/// A certificate for localhost and its key.
fn certificate(ctx: &Ctx) -> Result<(std::path::PathBuf, std::path::PathBuf)> {
    let (certificate, key) = (ctx.path("certificate.pem"), ctx.path("key.pem"));
    ctx.native("openssl")?
        .line("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost")
        .line("-addext subjectAltName=DNS:localhost,IP:127.0.0.1")
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .run()?;
    Ok((certificate, key))
}

/// The number after a label, as in `Failed requests:        0`.
fn number_after(text: &str, label: &str) -> Option<u64> {
    let rest = &text[text.find(label)? + label.len()..];
    rest.split_whitespace().next()?.parse().ok()
}
