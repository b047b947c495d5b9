//! redis-server, redis-cli, redis-benchmark.

use anyhow::{Result, ensure};
use netkernel_testkit::{Cmd, Ctx, Proc, Scenario};

use super::{TERM, says};

const NEEDS: &[&str] = &["redis-server", "redis-cli", "redis-benchmark"];

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("redis/benchmark", NEEDS, benchmark),
    Scenario::new("redis/bgsave", NEEDS, bgsave),
    Scenario::new("redis/io-threads", NEEDS, io_threads),
    Scenario::new("redis/pubsub", NEEDS, pubsub),
    Scenario::new("redis/replication", NEEDS, replication),
    Scenario::new("redis/unix-and-tcp", NEEDS, unix_and_tcp),
];

pub struct Redis {
    server: Proc,
    pub port: u16,
}

impl Redis {
    /// `name` is the server's directory.
    pub fn start(ctx: &mut Ctx, name: &str, more: &str) -> Result<Redis> {
        let port = ctx.port()?;
        let dir = ctx.path(name);
        std::fs::create_dir_all(&dir)?;
        let args = format!(
            "--port {port} --bind 127.0.0.1 ::1 --daemonize no --enable-debug-command yes --repl-diskless-sync-delay 0"
        );
        let server = ctx.server("redis-server")?.cwd(&dir).line(&args).args(["--save", ""]).line(more);
        let mut server = server.spawn()?;
        ctx.listening(&mut server, port)?;
        Ok(Redis { server, port })
    }

    fn cli(&self, ctx: &Ctx) -> Result<Cmd> {
        Ok(ctx.client("redis-cli")?.line(&format!("-h 127.0.0.1 -p {}", self.port)))
    }

    pub fn ask(&self, ctx: &Ctx, words: &[&str]) -> Result<String> {
        Ok(self.cli(ctx)?.args(words).run()?.text().trim().to_owned())
    }

    pub fn benchmark(&self, ctx: &Ctx, args: &str) -> Result<Cmd> {
        Ok(ctx.client("redis-benchmark")?.line(&format!("-h 127.0.0.1 -p {} --csv", self.port)).line(args))
    }

    fn info(&self, ctx: &Ctx, section: &str, key: &str) -> Result<String> {
        let text = self.ask(ctx, &["info", section])?;
        let value = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        Ok(value.unwrap_or_default().trim().to_owned())
    }

    pub fn stop(self) -> Result<()> {
        self.server.stop(TERM, &[0])
    }
}

fn benchmark(ctx: &mut Ctx) -> Result<()> {
    let redis = Redis::start(ctx, "redis", "")?;
    let output = redis.benchmark(ctx, "-c 20 -n 40000 -P 16 -t set,get,incr,lpush,rpop,mset")?.run()?;
    for test in ["SET", "GET", "INCR", "LPUSH", "MSET (10 keys)"] {
        says(&output, &format!("\"{test}\""))?;
    }
    redis.benchmark(ctx, "-c 20 -n 5000 -t incr,lpush,set -d 3000")?.run()?;
    let counter = redis.ask(ctx, &["get", "counter:__rand_int__"])?;
    ensure!(counter == "45000", "the counter is {counter}");
    let length = redis.ask(ctx, &["llen", "mylist"])?;
    ensure!(length == "5000", "the list has {length} elements");
    ensure!(redis.ask(ctx, &["strlen", "key:__rand_int__"])? == "3000", "the value was cut off");
    // Many commands through one connection, and one large value there and back.
    let commands: String = (0..5000).map(|n| format!("SET n:{n} value-{n}\r\n")).collect();
    says(&redis.cli(ctx)?.arg("--pipe").stdin_text(&commands)?.run()?, "errors: 0, replies: 5000")?;
    ensure!(redis.ask(ctx, &["get", "n:4711"])? == "value-4711", "a value differs");
    let big = "abcdefghij".repeat(300_000);
    redis.cli(ctx)?.line("-x set big").stdin_text(&big)?.run()?;
    ensure!(redis.ask(ctx, &["get", "big"])? == big, "the large value differs");
    redis.stop()
}

fn bgsave(ctx: &mut Ctx) -> Result<()> {
    let redis = Redis::start(ctx, "redis", "")?;
    redis.ask(ctx, &["debug", "populate", "100000", "key", "200"])?;
    let mut load = redis.benchmark(ctx, "-c 10 -n 60000 -P 4 -r 50000 -t set,incr")?.spawn()?;
    for round in 0..3 {
        ensure!(redis.ask(ctx, &["bgsave"])?.contains("saving started"), "no save {round}");
        ctx.until("the save", || Ok(redis.info(ctx, "persistence", "rdb_bgsave_in_progress")? == "0"))?;
        let status = redis.info(ctx, "persistence", "rdb_last_bgsave_status")?;
        ensure!(status == "ok", "save {round}: {status}");
    }
    load.check_running().ok();
    load.finish()?;
    ensure!(redis.ask(ctx, &["bgsave"])?.contains("saving started"), "no last save");
    ctx.until("the save", || Ok(redis.info(ctx, "persistence", "rdb_bgsave_in_progress")? == "0"))?;
    let (size, digest) = (redis.ask(ctx, &["dbsize"])?, redis.ask(ctx, &["debug", "digest"])?);
    redis.stop()?;
    // The file holds what the server held.
    let again = Redis::start(ctx, "redis", "")?;
    ctx.until("the file", || Ok(again.info(ctx, "persistence", "loading")? == "0"))?;
    let (size2, digest2) = (again.ask(ctx, &["dbsize"])?, again.ask(ctx, &["debug", "digest"])?);
    ensure!(
        (&size, &digest) == (&size2, &digest2),
        "{size} keys were saved, {size2} loaded; {digest} {digest2}"
    );
    again.stop()
}

fn io_threads(ctx: &mut Ctx) -> Result<()> {
    let redis = Redis::start(ctx, "redis", "--io-threads 2 --io-threads-do-reads yes")?;
    redis.benchmark(ctx, "-c 50 -n 30000 -P 8 --threads 2 -t set,get,incr -d 200")?.run()?;
    let counter = redis.ask(ctx, &["get", "counter:__rand_int__"])?;
    ensure!(counter == "30000", "the counter is {counter}");
    redis.stop()
}

fn pubsub(ctx: &mut Ctx) -> Result<()> {
    let redis = Redis::start(ctx, "redis", "")?;
    let mut subscribers = Vec::new();
    for pattern in [["subscribe", "news"], ["subscribe", "news"], ["psubscribe", "n*"]] {
        subscribers.push(redis.cli(ctx)?.args(pattern).spawn()?);
    }
    ctx.until("three subscribers", || {
        let direct = redis.ask(ctx, &["pubsub", "numsub", "news"])?;
        Ok(direct.ends_with('2') && redis.ask(ctx, &["pubsub", "numpat"])? == "1")
    })?;
    let commands: String = (0..1000).map(|n| format!("PUBLISH news message-{n}.\r\n")).collect();
    says(&redis.cli(ctx)?.arg("--pipe").stdin_text(&commands)?.run()?, "replies: 1000")?;
    for subscriber in subscribers {
        ctx.until("the last message", || Ok(subscriber.stdout().contains("message-999.")))?;
        let text = subscriber.stdout();
        let got: Vec<&str> = text.lines().filter(|l| l.starts_with("message-")).collect();
        let sent: Vec<String> = (0..1000).map(|n| format!("message-{n}.")).collect();
        ensure!(got == sent, "{} of 1000 messages, or in another order", got.len());
        subscriber.stop(TERM, &[143, 0])?;
    }
    redis.stop()
}

/// A full synchronisation in both ways, and changes after it.
fn replication(ctx: &mut Ctx) -> Result<()> {
    let master = Redis::start(ctx, "master", "")?;
    master.ask(ctx, &["debug", "populate", "30000", "key", "300"])?;
    master.benchmark(ctx, "-c 10 -n 20000 -P 8 -r 10000 -t set,lpush,hset")?.run()?;
    let of = format!("--replicaof 127.0.0.1 {}", master.port);
    let first = Redis::start(ctx, "first", &of)?;
    master.ask(ctx, &["config", "set", "repl-diskless-sync", "no"])?;
    let second = Redis::start(ctx, "second", "")?;
    second.ask(ctx, &["replicaof", "127.0.0.1", &master.port.to_string()])?;
    for replica in [&first, &second] {
        ctx.until("the synchronisation", || {
            Ok(replica.info(ctx, "replication", "master_link_status")? == "up")
        })?;
    }
    master.benchmark(ctx, "-c 10 -n 10000 -P 8 -r 10000 -t set,incr")?.run()?;
    master.ask(ctx, &["set", "last", "word"])?;
    ctx.until("the replicas", || Ok(second.ask(ctx, &["get", "last"])? == "word"))?;
    ctx.until("the replicas", || Ok(first.ask(ctx, &["get", "last"])? == "word"))?;
    let digest = master.ask(ctx, &["debug", "digest"])?;
    for (name, replica) in [("first", &first), ("second", &second)] {
        let copy = replica.ask(ctx, &["debug", "digest"])?;
        ensure!(copy == digest, "the {name} replica differs: {copy}, the master has {digest}");
    }
    second.stop()?;
    first.stop()?;
    master.stop()
}

fn unix_and_tcp(ctx: &mut Ctx) -> Result<()> {
    let path = ctx.path("redis.sock");
    let redis = Redis::start(ctx, "redis", &format!("--unixsocket {}", path.display()))?;
    ctx.client("redis-benchmark")?.arg("-s").arg(&path).line("--csv -c 10 -n 10000 -t incr").run()?;
    redis.benchmark(ctx, "-c 10 -n 10000 -t incr")?.run()?;
    let unix = ctx.client("redis-cli")?.arg("-s").arg(&path).line("get counter:__rand_int__").run()?;
    ensure!(unix.text().trim() == "20000", "the counter is {}", unix.text().trim());
    let v6 =
        ctx.client("redis-cli")?.line(&format!("-h ::1 -p {} get counter:__rand_int__", redis.port)).run()?;
    ensure!(v6.text().trim() == "20000", "over IPv6 the counter is {}", v6.text().trim());
    redis.stop()
}
