//! node: http, net, child processes, cluster.

use anyhow::Result;
use netkernel_testkit::{Ctx, Scenario};

use super::{TERM, says, script};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("node/http", &["node"], http),
    Scenario::new("node/net-and-children", &["node"], net),
    Scenario::new("node/cluster", &["node"], |ctx| cluster(ctx, "deal")),
    Scenario::new("node/cluster-shared", &["node"], |ctx| cluster(ctx, "none")),
];

fn http(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("file.bin", 5 << 20)?;
    let (server, client) = (script!(ctx, "http_server.js"), script!(ctx, "http_client.js"));
    let mut server = ctx.server("node")?.arg(server).arg(port.to_string()).arg(&file).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("node")?.arg(client).arg(port.to_string()).arg(&file).run()?, "ok")?;
    server.stop(TERM, &[0])
}

fn net(ctx: &mut Ctx) -> Result<()> {
    let ports = [ctx.port()?, ctx.port()?];
    let (server, client) = (script!(ctx, "net_server.js"), script!(ctx, "net_client.js"));
    let mut server = ctx.server("node")?.arg(server).args(ports.map(|p| p.to_string())).spawn()?;
    for port in ports {
        ctx.listening(&mut server, port)?;
    }
    says(&ctx.client("node")?.arg(client).args(ports.map(|p| p.to_string())).run()?, "ok")?;
    server.stop(TERM, &[0])
}

fn cluster(ctx: &mut Ctx, how: &str) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "cluster_server.js"), script!(ctx, "cluster_client.js"));
    let mut server = ctx.server("node")?.arg(server).arg(port.to_string()).arg(how).spawn()?;
    ctx.until("two workers", || {
        server.check_running()?;
        Ok(server.stdout().contains("ready"))
    })?;
    says(&ctx.client("node")?.arg(client).arg(port.to_string()).run()?, "ok")?;
    server.stop(TERM, &[0])
}
