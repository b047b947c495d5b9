//! python3: threads, an event loop, TLS, processes made in every way that it knows.

use anyhow::{Result, ensure};
use netkernel_testkit::{Ctx, Scenario};

use super::{TERM, certificate, http_server, says, script};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("python/http.server", &["python3"], http_server_module),
    Scenario::new("python/threads", &["python3"], threads),
    Scenario::new("python/asyncio", &["python3"], asyncio),
    Scenario::new("python/ssl", &["python3", "openssl"], ssl),
    Scenario::new("python/multiprocessing-fork", &["python3"], |ctx| multiprocessing(ctx, "fork")),
    Scenario::new("python/multiprocessing-spawn", &["python3"], |ctx| multiprocessing(ctx, "spawn")),
    Scenario::new("python/multiprocessing-pass", &["python3"], |ctx| multiprocessing(ctx, "pass")),
    Scenario::new("python/subprocess", &["python3"], subprocess),
    Scenario::new("python/socketserver-forking", &["python3"], forking),
    Scenario::new("python/udp", &["python3"], udp),
];

fn http_server_module(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 2 << 20)?;
    let port = ctx.port()?;
    let args = format!("-m http.server {port} --bind 127.0.0.1 --directory www");
    let mut server = ctx.server("python3")?.line(&args).spawn()?;
    ctx.listening(&mut server, port)?;
    let client = script!(ctx, "http_client.py");
    let args = format!("{port} /file.bin {} 4 3", file.display());
    says(&ctx.client("python3")?.arg(client).line(&args).run()?, "ok 12")?;
    server.stop(TERM, &[143])
}

fn threads(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 200_000)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let client = script!(ctx, "http_client.py");
    let args = format!("{port} /file.bin {} 16 20", file.display());
    says(&ctx.client("python3")?.arg(client).line(&args).run()?, "ok 320")?;
    server.stop(TERM, &[0])
}

fn asyncio(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "asyncio_server.py"), script!(ctx, "asyncio_client.py"));
    let mut server = ctx.server("python3")?.arg(server).arg(port.to_string()).spawn()?;
    ctx.listening(&mut server, port)?;
    let args = format!("{port} 100 10");
    says(&ctx.client("python3")?.arg(client).line(&args).run()?, "ok 100")?;
    server.signal(TERM)?;
    says(&server.finish()?, "served 100")
}

fn ssl(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (certificate, key) = certificate(ctx)?;
    let (server, client) = (script!(ctx, "ssl_server.py"), script!(ctx, "ssl_client.py"));
    let server = ctx.server("python3")?.arg(server).arg(port.to_string());
    let mut server = server.args([&certificate, &key]).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("python3")?.arg(client).arg(port.to_string()).arg(certificate).run()?, "ok")?;
    server.stop(TERM, &[0])
}

fn multiprocessing(ctx: &mut Ctx, how: &str) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "mp_server.py"), script!(ctx, "echo_client.py"));
    let mut server = ctx.server("python3")?.arg(server).arg(port.to_string()).arg(how).spawn()?;
    ctx.until("three workers", || {
        server.check_running()?;
        Ok(server.stdout().contains("ready"))
    })?;
    let args = format!("{port} 3 {} 20", if how == "pass" { 3 } else { 12 });
    says(&ctx.client("python3")?.arg(client).line(&args).run()?, "ok 3")?;
    server.stop(TERM, &[0])
}

fn subprocess(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "subprocess_server.py"), script!(ctx, "subprocess_client.py"));
    let mut server = ctx.server("python3")?.arg(server).arg(port.to_string()).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("python3")?.arg(client).arg(port.to_string()).run()?, "ok")?;
    ensure!(server.stderr().is_empty(), "the server complains:\n{}", server.stderr());
    server.stop(TERM, &[0])
}

fn forking(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "forking_server.py"), script!(ctx, "echo_client.py"));
    let mut server = ctx.server("python3")?.arg(server).arg(port.to_string()).spawn()?;
    ctx.listening(&mut server, port)?;
    let args = format!("{port} 8 12 20");
    says(&ctx.client("python3")?.arg(client).line(&args).run()?, "ok 8")?;
    server.stop(TERM, &[0])
}

fn udp(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "udp_server.py"), script!(ctx, "udp_client.py"));
    let mut server = ctx.server("python3")?.arg(server).arg(port.to_string()).spawn()?;
    ctx.bound_udp(&mut server, port)?;
    says(&ctx.client("python3")?.arg(client).arg(port.to_string()).run()?, "ok")?;
    server.stop(TERM, &[0])
}
