//! haproxy in front of other servers.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::process::{self, Signal};
use netkernel_testkit::{Ctx, Scenario};

use super::nginx::{Nginx, check_wrk};
use super::{http_server, says, sha256};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("haproxy/tcp", &["haproxy", "python3", "curl"], tcp),
    Scenario::new("haproxy/http", &["haproxy", "nginx", "curl", "wrk"], http),
    Scenario::new("haproxy/reload-sf", &["haproxy", "nginx", "wrk"], reload_sf),
    Scenario::new("haproxy/reload-master", &["haproxy", "nginx", "wrk"], reload_master),
];

fn config(ctx: &Ctx, mode: &str, port: u16, backends: &[u16]) -> Result<std::path::PathBuf> {
    let servers: String = backends
        .iter()
        .enumerate()
        .map(|(n, port)| format!("    server s{n} 127.0.0.1:{port} check inter 500\n"))
        .collect();
    let text = format!(
        "global
    maxconn 400
    nbthread 2
    stats socket {dir}/stats.sock mode 600 level admin expose-fd listeners
defaults
    mode {mode}
    timeout connect 10s
    timeout client 20s
    timeout server 20s
frontend front
    bind 127.0.0.1:{port}
    bind ::1:{port}
    default_backend back
backend back
    balance roundrobin
{servers}",
        dir = ctx.dir().display()
    );
    ctx.write("haproxy.cfg", &text)
}

/// Waits until haproxy knows that its clients are gone. haproxy 2.6 that is told to end in the same moment as its last
/// clients leave dies by SIGSEGV in `_fd_delete_orphan`, on the plain kernel too (10 of 60 tries).
fn clients_gone(ctx: &Ctx) -> Result<()> {
    let stats = ctx.path("stats.sock");
    ctx.until("the end of haproxy's clients", || {
        let mut stream = UnixStream::connect(&stats).context("haproxy's stats socket")?;
        stream.write_all(b"show stat -1 1 -1\n")?;
        let mut table = String::new();
        stream.read_to_string(&mut table)?;
        let front = table
            .lines()
            .find(|i| i.starts_with("front,FRONTEND,"))
            .context("no frontend in haproxy's table")?;
        // pxname, svname, qcur, qmax, scur: the current sessions.
        Ok(front.split(',').nth(4) == Some("0"))
    })
}

fn tcp(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 10 << 20)?;
    let (server, backend) = http_server(ctx, &ctx.path("www"))?;
    let port = ctx.port()?;
    let config = config(ctx, "tcp", port, &[backend])?;
    let mut haproxy = ctx.server("haproxy")?.arg("-db").arg("-f").arg(config).spawn()?;
    ctx.listening(&mut haproxy, port)?;
    for host in ["127.0.0.1", "[::1]"] {
        let url = format!("http://{host}:{port}/file.bin");
        ctx.client("curl")?.line("-sS --fail --max-time 20 -o out").arg(url).run()?;
        ctx.same_files(&file, &ctx.path("out"))?;
    }
    let url = format!("http://127.0.0.1:{port}/");
    let answer = ctx.client("curl")?.line("-sS --fail --max-time 20 -T").arg(&file).arg(url).run()?;
    says(&answer, &sha256(ctx, &file)?)?;
    clients_gone(ctx)?;
    haproxy.stop(Signal::USR1, &[0])?;
    server.stop(super::TERM, &[0])
}

fn http(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 5 << 20)?;
    let one = Nginx::start(ctx, "one", "", "location = /who { return 200 one; }")?;
    let two = Nginx::start(ctx, "two", "", "location = /who { return 200 two; }")?;
    let port = ctx.port()?;
    let config = config(ctx, "http", port, &[one.port, two.port])?;
    let mut haproxy = ctx.server("haproxy")?.arg("-db").arg("-f").arg(config).spawn()?;
    ctx.listening(&mut haproxy, port)?;
    let url = format!("http://127.0.0.1:{port}");
    ctx.client("curl")?.line("-sS --fail --max-time 20 -o out").arg(format!("{url}/file.bin")).run()?;
    ctx.same_files(&file, &ctx.path("out"))?;
    let who = format!("{url}/who");
    let answers =
        ctx.client("curl")?.line("-sS --fail --max-time 20").args([&who, &who, &who, &who]).run()?.text();
    ensure!(answers.contains("one") && answers.contains("two"), "the backends that answered: {answers}");
    let wrk = ctx.client("wrk")?.line("-t 1 -c 20 -d 1s").arg(format!("{url}/index.html")).run()?;
    check_wrk(&wrk.text(), 50)?;
    clients_gone(ctx)?;
    haproxy.stop(Signal::USR1, &[0])?;
    one.quit(ctx)?;
    two.quit(ctx)
}

/// A user's reload by hand: a new haproxy gets the listeners from the old one (-x) and asks it to finish (-sf).
fn reload_sf(ctx: &mut Ctx) -> Result<()> {
    let backend = Nginx::start(ctx, "backend", "", "")?;
    let port = ctx.port()?;
    let config = config(ctx, "http", port, &[backend.port])?;
    let pid_file = ctx.path("haproxy.pid");
    let haproxy = netkernel_testkit::tools::find("haproxy").context("no haproxy")?;
    let start = format!("{} -D -f {} -p {}", haproxy.display(), config.display(), pid_file.display());
    // Both are started from one shell: they belong to one guest.
    let mut shell = ctx.server("sh")?.shell()?;
    shell.run(&start)?;
    ctx.daemon_listening(port)?;
    let wrk = ctx.client("wrk")?.line("-t 1 -c 8 -d 3s").args(["-H", "Connection: close"]);
    let mut wrk = wrk.arg(format!("http://127.0.0.1:{port}/index.html")).spawn()?;
    for _ in 0..3 {
        let old = ctx.pid_file(&pid_file)?;
        wrk.check_running()?;
        shell.run(&format!("{start} -x {} -sf {old}", ctx.path("stats.sock").display()))?;
        ctx.until("the end of the old haproxy", || Ok(!process::alive(old)))?;
        ensure!(ctx.pid_file(&pid_file)? != old, "the same process");
    }
    wrk.check_running().context("the requests were over before the reloads")?;
    check_wrk(&wrk.finish()?.text(), 50)?;
    ctx.stop_daemon(ctx.pid_file(&pid_file)?, Signal::USR1)?;
    shell.leave()?;
    backend.quit(ctx)
}

/// The master executes itself anew and gives the listeners to new workers.
fn reload_master(ctx: &mut Ctx) -> Result<()> {
    let backend = Nginx::start(ctx, "backend", "", "")?;
    let port = ctx.port()?;
    let config = config(ctx, "http", port, &[backend.port])?;
    let mut haproxy = ctx.server("haproxy")?.arg("-W").arg("-db").arg("-f").arg(config).spawn()?;
    ctx.listening(&mut haproxy, port)?;
    let master = haproxy.pid()?;
    let workers = || -> Vec<u32> { process::children(master).iter().map(|i| i.pid).collect() };
    ctx.until("a worker", || Ok(workers().len() == 1))?;
    let wrk = ctx.client("wrk")?.line("-t 1 -c 8 -d 3s").args(["-H", "Connection: close"]);
    let mut wrk = wrk.arg(format!("http://127.0.0.1:{port}/index.html")).spawn()?;
    for _ in 0..2 {
        let before = workers();
        wrk.check_running()?;
        // After it has started a worker the master executes itself anew; a signal that comes meanwhile it may forget.
        ctx.until("the master's handler", || Ok(process::takes(master, Signal::USR2)))?;
        process::signal(master, Signal::USR2);
        ctx.until("a new worker instead of the old one", || {
            haproxy.check_running()?;
            let now = workers();
            Ok(now.len() == 1 && !before.contains(&now[0]))
        })?;
    }
    wrk.check_running().context("the requests were over before the reloads")?;
    check_wrk(&wrk.finish()?.text(), 50)?;
    haproxy.stop(Signal::USR1, &[0])?;
    backend.quit(ctx)
}
