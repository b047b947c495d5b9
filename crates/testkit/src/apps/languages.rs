//! Java, ruby, PHP, perl: the sockets of other runtimes and their standard libraries.

use anyhow::Result;
use netkernel_testkit::{Ctx, Proc, Scenario};

use super::{TERM, compiled, says, script};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("java/http", &["java", "javac"], java_http),
    Scenario::new("java/nio", &["java", "javac"], java_nio),
    Scenario::new("ruby/http", &["ruby"], ruby),
    Scenario::new("php/http", &["php"], php),
    Scenario::new("perl/lwp", &["perl"], perl),
];

/// The directory of the compiled classes.
fn java_classes(ctx: &Ctx) -> Result<std::path::PathBuf> {
    let source = script!(ctx, "Http.java");
    compiled(ctx, "java", include_str!("scripts/Http.java"), |to| {
        ctx.native("javac")?.arg("-d").args([to, &source]).run().map(drop)
    })
}

/// `java` with little memory and few threads of its own.
fn java(
    cmd: netkernel_testkit::Cmd,
    classes: &std::path::Path,
    how: &str,
    port: u16,
) -> netkernel_testkit::Cmd {
    let cmd = cmd.line("-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xshare:auto -Xmx256m -cp").arg(classes);
    cmd.args(["Http", how, &port.to_string()])
}

fn java_http(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("file.bin", 500_000)?;
    let classes = java_classes(ctx)?;
    let mut server = java(ctx.server("java")?, &classes, "server", port).arg(&file).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&java(ctx.client("java")?, &classes, "client", port).arg(&file).run()?, "ok")?;
    server.stop(TERM, &[143])
}

fn java_nio(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let classes = java_classes(ctx)?;
    let mut server = java(ctx.server("java")?, &classes, "nio-server", port).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&java(ctx.client("java")?, &classes, "nio-client", port).run()?, "ok")?;
    server.stop(TERM, &[143])
}

fn ruby(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (file, script) = (ctx.noise("file.bin", 300_000)?, script!(ctx, "http.rb"));
    let mut server =
        ctx.server("ruby")?.arg(&script).args(["server", &port.to_string()]).arg(&file).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("ruby")?.arg(&script).args(["client", &port.to_string()]).arg(&file).run()?, "ok")?;
    server.stop(TERM, &[0])
}

/// PHP's own server, with several processes that accept from one listener, and its streams as a client.
fn php(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("file.bin", 300_000)?;
    let (router, client) = (script!(ctx, "router.php"), script!(ctx, "client.php"));
    for workers in ["1", "4"] {
        let port = ctx.port()?;
        let at = format!("127.0.0.1:{port}");
        let server = ctx.server("php")?.args(["-d", "post_max_size=8M", "-S", &at]).arg(&router);
        let mut server = server.env("PHP_CLI_SERVER_WORKERS", workers).env("FILE", &file).spawn()?;
        ctx.listening(&mut server, port)?;
        says(&ctx.client("php")?.arg(&client).arg(port.to_string()).arg(&file).run()?, "ok")?;
        end_with_children(ctx, server)?;
    }
    Ok(())
}

/// Its workers do not end with it when a signal ends it.
fn end_with_children(ctx: &Ctx, mut server: Proc) -> Result<()> {
    let pid = server.pid()?;
    let children = netkernel_testkit::process::children(pid);
    server.stop(TERM, &[0, 143])?;
    for child in children {
        ctx.stop_daemon(child.pid, TERM)?;
    }
    Ok(())
}

/// HTTP::Daemon with a process for each connection, and LWP.
fn perl(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("file.bin", 300_000)?;
    let (server, client) = (script!(ctx, "daemon.pl"), script!(ctx, "lwp.pl"));
    let mut server = ctx.server("perl")?.arg(server).arg(port.to_string()).arg(&file).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("perl")?.arg(client).arg(port.to_string()).arg(&file).run()?, "ok")?;
    server.stop(TERM, &[0])
}
