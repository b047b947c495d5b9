//! Servers that stay up for as long as one likes, while clients come and go: `apps --only soak --seconds 3600`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netkernel_testkit::process;
use netkernel_testkit::{Ctx, Engine, Scenario};

use super::nginx::{Nginx, check_ab, check_wrk};
use super::redis::Redis;
use super::{TERM, says, script};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "soak/servers",
    &["nginx", "redis-server", "redis-cli", "redis-benchmark", "python3", "curl", "wrk", "ab"],
    soak,
)
.on_request()];

/// What may not grow.
#[derive(Debug)]
struct Usage {
    descriptors: usize,
    resident_kib: u64,
}

fn usage(engine: &Engine) -> Usage {
    Usage {
        descriptors: process::open_descriptors(engine.pid()).unwrap_or(0),
        resident_kib: process::resident_kib(engine.pid()).unwrap_or(0),
    }
}

fn soak(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 4 << 20)?;
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let redis = Redis::start(ctx, "redis", "")?;
    let echo_port = ctx.port()?;
    let (server, client) = (script!(ctx, "asyncio_server.py"), script!(ctx, "asyncio_client.py"));
    let mut echo = ctx.server("python3")?.arg(server).arg(echo_port.to_string()).spawn()?;
    ctx.listening(&mut echo, echo_port)?;

    let until = Instant::now() + Duration::from_secs(ctx.seconds);
    let mut rounds: u64 = 0;
    let mut first = None;
    while Instant::now() < until {
        let wrk = ctx.client("wrk")?.line("-t 1 -c 20 -d 1s").arg(nginx.url("/index.html")).spawn()?;
        let bench = redis.benchmark(ctx, "-c 10 -n 5000 -P 4 -t incr")?.spawn()?;
        let echoes = ctx.client("python3")?.arg(&client).line(&format!("{echo_port} 50 5")).spawn()?;
        check_wrk(&wrk.finish()?.text(), 20)?;
        bench.finish()?;
        says(&echoes.finish()?, "ok 50")?;
        check_ab(&ctx.client("ab")?.line("-q -c 8 -n 500 -s 15").arg(nginx.url("/tiny")).run()?.text(), 500)?;
        ctx.client("curl")?.line("-sS --fail --max-time 20 -o out").arg(nginx.url("/file.bin")).run()?;
        ctx.same_files(&file, &ctx.path("out"))?;
        rounds += 1;
        let counter = redis.ask(ctx, &["get", "counter:__rand_int__"])?;
        ensure!(counter == (rounds * 5000).to_string(), "round {rounds}: the counter is {counter}");
        // The first rounds fill pools and caches.
        if rounds == 5 {
            first = ctx.engine().map(usage);
        }
    }
    if let (Some(first), Some(engine)) = (first, ctx.engine()) {
        let last = usage(engine);
        ensure!(last.descriptors <= first.descriptors + 8, "descriptors grew: {first:?}, then {last:?}");
        let most = first.resident_kib + first.resident_kib / 4 + 8192;
        ensure!(last.resident_kib <= most, "memory grew in {rounds} rounds: {first:?}, then {last:?}");
    }
    echo.stop(TERM, &[0])?;
    redis.stop()?;
    nginx.quit(ctx)
}
