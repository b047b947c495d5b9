//! memcached and PostgreSQL.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::process::Signal;
use netkernel_testkit::{Cmd, Ctx, Scenario, tools};

use super::{TERM, number_after, says, script};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("memcached/threads", &["memcached", "python3"], memcached),
    Scenario::new(
        "postgresql/pgbench",
        &["postgresql:postgres", "postgresql:initdb", "postgresql:pgbench", "postgresql:psql", "setpriv"],
        pgbench,
    )
    .limit(60),
];

fn memcached(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let user = if is_root() { "-u root" } else { "" };
    let args = format!("-t 4 -l 127.0.0.1,::1 -p {port} -U 0 -m 64 {user}");
    let mut server = ctx.server("memcached")?.line(&args).spawn()?;
    ctx.listening(&mut server, port)?;
    let client = script!(ctx, "memcached_client.py");
    says(&ctx.client("python3")?.arg(client).arg(port.to_string()).run()?, "ok")?;
    server.stop(TERM, &[0, 143])
}

/// PostgreSQL refuses to be root; whoever else runs this is good enough.
fn as_postgres(cmd: Cmd) -> Cmd {
    if !is_root() {
        return cmd;
    }
    cmd.through(&["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups", "--"])
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

fn tool(name: &str) -> Result<String> {
    let path = tools::find(&format!("postgresql:{name}")).with_context(|| format!("no {name}"))?;
    Ok(path.to_string_lossy().into_owned())
}

fn pgbench(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let home = ctx.path("postgres");
    fs::create_dir(&home)?;
    if is_root() {
        ctx.native("chown")?.arg("postgres").arg(&home).run()?;
    }
    let data = home.join("data");
    let initdb = ctx.native(&tool("initdb")?)?.line("-A trust -U postgres -E UTF8 --locale C --no-sync -D");
    as_postgres(initdb.arg(&data).cwd(&home)).run()?;
    let server = ctx.server(&tool("postgres")?)?.arg("-D").arg(&data).cwd(&home);
    let server = server.line(&format!("-p {port} -c listen_addresses=127.0.0.1,::1 -c fsync=off"));
    let mut server = as_postgres(server.args(["-c", "unix_socket_directories="])).spawn()?;
    let psql = |host: &str, sql: &str| -> Result<Cmd> {
        let cmd = ctx.client(&tool("psql")?)?.line(&format!("-h {host} -p {port} -U postgres -XAtq"));
        Ok(cmd.args(["-v", "ON_ERROR_STOP=1", "-c", sql, "postgres"]))
    };
    ctx.until("the database", || {
        server.check_running()?;
        Ok(psql("127.0.0.1", "select 1")?.output()?.code == 0)
    })?;

    let bench = |args: &str| -> Result<Cmd> {
        let cmd = ctx.client(&tool("pgbench")?)?.line(&format!("-h 127.0.0.1 -p {port} -U postgres"));
        Ok(cmd.line(args).arg("postgres"))
    };
    bench("-i -s 1 -q")?.run()?;
    let text = bench("-c 4 -j 2 -T 2")?.run()?.text();
    let done = number_after(&text, "number of transactions actually processed:");
    ensure!(done.is_some_and(|n| n > 20), "pgbench said:\n{text}");
    ensure!(number_after(&text, "number of failed transactions:") == Some(0), "pgbench said:\n{text}");
    // Each transaction added the same to three tables and wrote a line.
    let sums = psql(
        "127.0.0.1",
        "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
                (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history),
                (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history),
                (select count(*) from pgbench_history)",
    )?;
    let sums = sums.run()?.text();
    ensure!(sums.trim() == format!("t|t|t|{}", done.unwrap_or(0)), "the sums: {sums}");
    // A connection for each transaction; then prepared statements, several in flight.
    bench("-c 4 -C -t 10 -S")?.run()?;
    bench("-c 4 -t 50 -M prepared -S")?.run()?;
    // A large answer, a large upload, IPv6, an error's exit code, a query that is cancelled.
    let rows = psql("::1", "copy (select n, md5(n::text) from generate_series(1, 100000) n) to stdout")?;
    let rows = rows.stdout_file(&ctx.path("rows")).run()?.stdout;
    ensure!(rows.iter().filter(|b| **b == b'\n').count() == 100_000, "rows are missing");
    psql("127.0.0.1", "create table copied (n int, t text)")?.run()?;
    psql("127.0.0.1", "copy copied from stdin")?.stdin_file(&ctx.path("rows")).run()?;
    let query = "select count(*), bool_and(t = md5(n::text)) from copied";
    says(&psql("127.0.0.1", query)?.run()?, "100000|t")?;
    let code = psql("127.0.0.1", "select nonsense")?.output()?.code;
    ensure!(code == 1, "an error gave {code}");
    let mut sleeper = psql("127.0.0.1", "select pg_sleep(30)")?.spawn()?;
    let asleep =
        "select count(*) from pg_stat_activity where query = 'select pg_sleep(30)' and state = 'active'";
    ctx.until("the sleeper", || Ok(psql("127.0.0.1", asleep)?.run()?.text().trim() == "1"))?;
    // psql cancels over a connection of its own when it is interrupted.
    sleeper.signal(Signal::INT)?;
    let code = sleeper.wait()?;
    ensure!(
        code != 0 && sleeper.stderr().contains("canceling"),
        "cancelled with {code}: {}",
        sleeper.stderr()
    );
    server.stop(Signal::INT, &[0])
}
