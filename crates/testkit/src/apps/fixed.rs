//! Programs that no library can be preloaded to: static ones, and Go.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use netkernel_testkit::{Ctx, Scenario};

use super::{TERM, says, script};

pub const SCENARIOS: &[Scenario] =
    &[Scenario::new("go/http", &["go"], go_http), Scenario::new("busybox/httpd-wget", &["busybox"], busybox)];

/// Builds a Go program of ours. The compiler's cache stands beside this program, so that only the first build takes long.
fn go_build(ctx: &Ctx, source: &std::path::Path) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let cache = own.parent().context("no directory")?.join("go-cache");
    let program = ctx.path("program");
    let go = ctx.native("go")?.env("GOCACHE", &cache).env("GOPATH", cache.join("path"));
    go.env("CGO_ENABLED", "0").env("GO111MODULE", "off").line("build -o").args([&program, source]).run()?;
    Ok(program)
}

fn go_http(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("file.bin", 1 << 20)?;
    let source = script!(ctx, "http.go");
    let program = go_build(ctx, &source)?;
    let program = program.to_str().context("an odd path")?;
    let port_text = port.to_string();
    let mut server = ctx.server(program)?.args(["server", &port_text]).arg(&file).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client(program)?.args(["client", &port_text]).arg(&file).run()?, "ok")?;
    server.stop(TERM, &[0])
}

fn busybox(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("www/file.bin", 5 << 20)?;
    let at = format!("127.0.0.1:{port}");
    let mut server =
        ctx.server("busybox")?.args(["httpd", "-f", "-p", &at, "-h"]).arg(ctx.path("www")).spawn()?;
    ctx.listening(&mut server, port)?;
    let out = ctx.path("out");
    ctx.client("busybox")?.args(["wget", "-q", "-O"]).arg(&out).arg(format!("http://{at}/file.bin")).run()?;
    ctx.same_files(&file, &out)?;
    // A shell of its own: a dynamic program in the pipeline of a static one, and the other way round.
    let line = format!("busybox wget -q -O - http://{at}/file.bin | cat | busybox sha256sum");
    let sum = super::sha256(ctx, &file)?;
    says(&ctx.client("sh")?.args(["-c", &line]).run()?, &sum)?;
    says(&ctx.client("busybox")?.args(["sh", "-c", &line]).run()?, &sum)?;
    server.stop(TERM, &[0, 143])
}
