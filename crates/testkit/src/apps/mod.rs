//! Real programs, one module for each; the scripts that they run stand in `scripts/`.

mod browser;
mod databases;
mod fixed;
mod haproxy;
mod http;
mod languages;
mod nginx;
mod node;
mod pipes;
mod python;
mod redis;
mod soak;
mod ssh;
mod throughput;
mod wrapped;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
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
        languages::SCENARIOS,
        wrapped::SCENARIOS,
        browser::SCENARIOS,
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

/// What `build` makes of a source, kept beside this program: only the first build takes long.
fn compiled(ctx: &Ctx, name: &str, source: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let mut hash = DefaultHasher::new();
    source.hash(&mut hash);
    let own = std::env::current_exe()?;
    let cache = own.parent().context("no directory")?.join("programs");
    let kept = cache.join(format!("{name}-{:016x}", hash.finish()));
    if !kept.exists() {
        std::fs::create_dir_all(&cache)?;
        // Whole or not at all, whoever else builds it.
        let made = tempfile::Builder::new().prefix(name).tempdir_in(&cache)?;
        let result = made.path().join("made");
        build(&result)?;
        if let Err(error) = std::fs::rename(&result, &kept)
            && !kept.exists()
        {
            return Err(error).context("cannot keep what was built");
        }
    }
    // A copy, which users without a way to ours can reach.
    let copy = ctx.path(name);
    ctx.native("cp")?.arg("-r").args([&kept, &copy]).run()?;
    Ok(copy)
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
