//! Programs that no library can be preloaded to: static ones, and Go.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::{Ctx, Scenario};

use super::{TERM, compiled, nginx, says, script};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("go/http", &["go"], go_http),
    Scenario::new("go/hey", &["hey", "nginx"], hey),
    Scenario::new("busybox/httpd-wget", &["busybox"], busybox),
    Scenario::new("c/static", &["cc"], |ctx| echo(ctx, "cc", &["-static"])),
    Scenario::new("c/musl-static", &["musl-gcc"], |ctx| echo(ctx, "musl-gcc", &["-static"])),
    Scenario::new("c/musl-dynamic", &["musl-gcc"], |ctx| echo(ctx, "musl-gcc", &[])),
    Scenario::new("rust/static", &["rustc"], rust),
];

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

fn echo(ctx: &mut Ctx, compiler: &str, flags: &[&str]) -> Result<()> {
    let port = ctx.port()?.to_string();
    let source = script!(ctx, "echo.c");
    let name = format!("{compiler}{}", flags.concat());
    let program = compiled(ctx, &name, include_str!("scripts/echo.c"), |to| {
        let cc = ctx.native(compiler)?.args(["-O1", "-pthread", "-w"]).args(flags);
        cc.arg("-o").args([to, &source]).run().map(drop)
    })?;
    converse(ctx, &program, &port)
}

/// Static with musl, or, where that is not installed for the compiler, with glibc.
fn rust(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?.to_string();
    let source = script!(ctx, "echo.rs");
    let program = compiled(ctx, "rust", include_str!("scripts/echo.rs"), |to| {
        let build = |flags: &[&str]| -> Result<i32> {
            let home = std::env::var_os("HOME").unwrap_or_default();
            // rustup's own settings stand in the true home.
            let rustc = ctx.native("rustc")?.env("HOME", home).args(["--edition", "2021", "-O"]).args(flags);
            Ok(rustc.arg("-o").args([to, &source]).output()?.code)
        };
        let musl = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
        if build(&["--target", &musl])? == 0 {
            return Ok(());
        }
        ensure!(build(&["-C", "target-feature=+crt-static"])? == 0, "rustc builds no static program");
        Ok(())
    })?;
    converse(ctx, &program, &port)
}

fn converse(ctx: &mut Ctx, program: &std::path::Path, port: &str) -> Result<()> {
    let program = program.to_str().context("an odd path")?;
    let mut server = ctx.server(program)?.args(["server", port]).spawn()?;
    ctx.listening(&mut server, port.parse()?)?;
    for _ in 0..2 {
        says(&ctx.client(program)?.args(["client", port]).run()?, "ok")?;
    }
    server.stop(TERM, &[0, 143])
}

/// A Go load generator of others, with kept connections and with one for each request.
fn hey(ctx: &mut Ctx) -> Result<()> {
    let nginx = nginx::Nginx::start(ctx, "nginx", "", "")?;
    for how in [&["-n", "3000", "-c", "20"][..], &["-n", "1000", "-c", "10", "-disable-keepalive"]] {
        let said = ctx.client("hey")?.args(how).arg(nginx.url("/index.html")).run()?;
        says(&said, &format!("[200]\t{} responses", how[1]))?;
        ensure!(!said.text().contains("Error distribution"), "{}", said.text());
    }
    nginx.quit(ctx)
}
