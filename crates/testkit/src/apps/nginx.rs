//! nginx: two workers in the background; reload and binary upgrade while requests run; big files; a proxy. And its
//! usual clients, wrk and ab.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::process::{self, Signal};
use netkernel_testkit::{Ctx, Scenario};

use super::{number_after, together};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("nginx/sendfile", &["nginx", "curl"], sendfile),
    Scenario::new("nginx/reload", &["nginx", "wrk"], reload),
    Scenario::new("nginx/upgrade", &["nginx", "ab"], upgrade),
    Scenario::new("nginx/proxy", &["nginx", "curl", "wrk"], proxy),
    Scenario::new("nginx/tls", &["nginx", "curl", "openssl", "ab"], tls),
    Scenario::new("wrk/keepalive", &["nginx", "wrk"], wrk_keepalive),
    Scenario::new("wrk/close", &["nginx", "wrk"], wrk_close),
    Scenario::new("ab/keepalive", &["nginx", "ab"], |ctx| ab_requests(ctx, true)),
    Scenario::new("ab/close", &["nginx", "ab"], |ctx| ab_requests(ctx, false)),
];

/// An nginx in the background.
pub struct Nginx {
    config: PathBuf,
    pid_file: PathBuf,
    pub port: u16,
}

impl Nginx {
    /// `server` goes into the `server` block, `http` into the `http` block.
    pub fn start(ctx: &mut Ctx, name: &str, http: &str, server: &str) -> Result<Nginx> {
        let port = ctx.port()?;
        ctx.write("www/index.html", &"small page\n".repeat(40))?;
        let dir = ctx.path(name);
        std::fs::create_dir_all(dir.join("tmp"))?;
        let dir = dir.display();
        let user = if is_root() { "user root;" } else { "" };
        let config = format!(
            "{user}
worker_processes 2;
daemon on;
pid {dir}/nginx.pid;
error_log {dir}/error.log notice;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {dir}/tmp/1;
    proxy_temp_path {dir}/tmp/2;
    fastcgi_temp_path {dir}/tmp/3;
    uwsgi_temp_path {dir}/tmp/4;
    scgi_temp_path {dir}/tmp/5;
    {http}
    server {{
        listen 127.0.0.1:{port} backlog=511;
        listen [::1]:{port};
        root {www};
        location = /tiny {{ return 200 \"tiny\\n\"; }}
        {server}
    }}
}}
",
            www = ctx.path("www").display()
        );
        let config = ctx.write(&format!("{name}/nginx.conf"), &config)?;
        let nginx = Nginx { config, pid_file: ctx.path(&format!("{name}/nginx.pid")), port };
        nginx.command(ctx)?.run()?;
        ctx.daemon_listening(port)?;
        ctx.until("two workers", || Ok(nginx.workers(nginx.master(ctx)?).len() == 2))?;
        Ok(nginx)
    }

    fn command(&self, ctx: &Ctx) -> Result<netkernel_testkit::Cmd> {
        let log = self.config.with_file_name("error.log");
        Ok(ctx.server("nginx")?.arg("-c").arg(&self.config).arg("-e").arg(log))
    }

    pub fn master(&self, ctx: &Ctx) -> Result<u32> {
        ctx.pid_file(&self.pid_file)
    }

    fn workers(&self, master: u32) -> Vec<u32> {
        // After USR2 the new master is a child of the old one.
        let is_worker = |pid: &u32| {
            let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            title.contains("worker process")
        };
        process::children(master).iter().map(|i| i.pid).filter(is_worker).collect()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub fn quit(self, ctx: &Ctx) -> Result<()> {
        let master = self.master(ctx)?;
        ctx.stop_daemon(master, Signal::QUIT)?;
        let log = std::fs::read_to_string(self.config.with_file_name("error.log"))?;
        for bad in ["[emerg]", "[alert]", "[crit]", "exited on signal"] {
            let line = log.lines().find(|l| l.contains(bad));
            ensure!(line.is_none(), "nginx's log: {}", line.unwrap_or_default());
        }
        Ok(())
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

fn sendfile(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/big.bin", 48 << 20)?;
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let get = |out: &str, host: &str| -> Result<_> {
        let url = format!("http://{host}:{}/big.bin", nginx.port);
        Ok(ctx.client("curl")?.line("-sS --fail --max-time 30 -o").arg(ctx.path(out)).arg(url))
    };
    together(vec![get("a", "127.0.0.1")?, get("b", "[::1]")?])?;
    ctx.same_files(&file, &ctx.path("a"))?;
    ctx.same_files(&file, &ctx.path("b"))?;
    // The middle of the file; then one that breaks off and goes on where it was.
    let part = ctx.client("curl")?.line("-sS --fail -r 1000000-1999999").arg(nginx.url("/big.bin")).run()?;
    netkernel_testkit::same_bytes(&std::fs::read(&file)?[1_000_000..2_000_000], &part.stdout)?;
    std::fs::write(ctx.path("c"), &std::fs::read(&file)?[..40_000_001])?;
    ctx.client("curl")?.line("-sS --fail -C - -o c").arg(nginx.url("/big.bin")).run()?;
    ctx.same_files(&file, &ctx.path("c"))?;
    // A client that leaves in the middle.
    let head =
        ctx.client("bash")?.arg("-c").arg(format!("curl -sS {} | head -c 100000", nginx.url("/big.bin")));
    ensure!(head.output()?.stdout.len() == 100_000, "a part came short");
    nginx.quit(ctx)
}

/// What wrk says must be without any error.
pub fn check_wrk(text: &str, least: u64) -> Result<u64> {
    for bad in ["Socket errors", "Non-2xx"] {
        let line = text.lines().find(|l| l.contains(bad));
        ensure!(line.is_none(), "wrk: {}", line.unwrap_or_default().trim());
    }
    let line =
        text.lines().find(|l| l.contains(" requests in ")).with_context(|| format!("wrk said:\n{text}"))?;
    let requests: u64 = line.split_whitespace().next().unwrap_or_default().parse()?;
    ensure!(requests >= least, "only {requests} requests");
    Ok(requests)
}

/// What ab says must be without any failure.
pub fn check_ab(text: &str, least: u64) -> Result<()> {
    let complete = number_after(text, "Complete requests:").with_context(|| format!("ab said:\n{text}"))?;
    ensure!(number_after(text, "Failed requests:") == Some(0), "ab: failed requests\n{text}");
    ensure!(!text.contains("Non-2xx"), "ab: answers that are not 2xx\n{text}");
    ensure!(complete >= least, "ab: only {complete} requests");
    Ok(())
}

fn reload(ctx: &mut Ctx) -> Result<()> {
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let master = nginx.master(ctx)?;
    let mut wrk = ctx.client("wrk")?.line("-t 1 -c 8 -d 3s").args(["-H", "Connection: close"]);
    wrk = wrk.arg(nginx.url("/index.html"));
    let mut wrk = wrk.spawn()?;
    for _ in 0..3 {
        let before = nginx.workers(master);
        wrk.check_running()?;
        nginx.command(ctx)?.line("-s reload").run()?;
        ctx.until("new workers", || {
            let now = nginx.workers(master);
            Ok(now.iter().filter(|w| !before.contains(w)).count() == 2 && now.len() == 2)
        })?;
        ensure!(nginx.master(ctx)? == master, "the master changed");
    }
    wrk.check_running().context("the requests were over before the reloads")?;
    check_wrk(&wrk.finish()?.text(), 100)?;
    nginx.quit(ctx)
}

/// A new binary takes over the listeners: USR2, WINCH, QUIT.
fn upgrade(ctx: &mut Ctx) -> Result<()> {
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let old = nginx.master(ctx)?;
    let mut ab =
        ctx.client("ab")?.line("-q -c 8 -t 3 -n 1000000 -s 15").arg(nginx.url("/index.html")).spawn()?;
    process::signal(old, Signal::USR2);
    let mut new = old;
    ctx.until("a new master", || {
        ab.check_running()?;
        new = nginx.master(ctx)?;
        Ok(new != old && nginx.workers(new).len() == 2)
    })?;
    process::signal(old, Signal::WINCH);
    ctx.until("the end of the old workers", || {
        ensure!(process::alive(old), "the old master died");
        Ok(nginx.workers(old).is_empty())
    })?;
    ctx.stop_daemon(old, Signal::QUIT)?;
    ab.check_running().context("the requests were over before the upgrade")?;
    check_ab(&ab.finish()?.text(), 100)?;
    nginx.quit(ctx)
}

fn proxy(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 5 << 20)?;
    let backend = Nginx::start(ctx, "backend", "", "location = /who { return 200 $connection_requests; }")?;
    let upstream = format!("upstream backend {{ server 127.0.0.1:{}; keepalive 8; }}", backend.port);
    let pass =
        "location / { proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection \"\"; }";
    let front = Nginx::start(ctx, "front", &upstream, pass)?;
    let out = ctx.path("out");
    ctx.client("curl")?.line("-sS --fail --max-time 20 -o").arg(&out).arg(front.url("/file.bin")).run()?;
    ctx.same_files(&file, &out)?;
    let wrk = ctx.client("wrk")?.line("-t 1 -c 20 -d 1s").arg(front.url("/index.html")).run()?;
    let requests = check_wrk(&wrk.text(), 50)?;
    // Connections to the backend are kept: the last of these is not the first on its connection.
    let who = front.url("/who");
    let counts = ctx.client("curl")?.line("-sS --fail -w \\n").args([&who, &who, &who]).run()?.text();
    let last: u64 = counts.lines().last().unwrap_or_default().parse()?;
    ensure!(last > 1, "after {requests} requests the connections to the backend served {counts:?}");
    front.quit(ctx)?;
    backend.quit(ctx)
}

fn tls(ctx: &mut Ctx) -> Result<()> {
    let (certificate, key) = super::certificate(ctx)?;
    let file = ctx.noise("www/file.bin", 5 << 20)?;
    let port = ctx.port()?;
    let server = format!(
        "listen 127.0.0.1:{port} ssl http2; ssl_certificate {}; ssl_certificate_key {};",
        certificate.display(),
        key.display()
    );
    let nginx = Nginx::start(ctx, "nginx", "", &server)?;
    for version in ["--http1.1", "--http2"] {
        let out = ctx.path(version);
        let curl = ctx.client("curl")?.line("-sS --fail --max-time 20").arg(version).arg("--cacert");
        let curl =
            curl.arg(&certificate).arg("-o").arg(&out).arg(format!("https://localhost:{port}/file.bin"));
        curl.run()?;
        ctx.same_files(&file, &out)?;
    }
    let url = format!("https://127.0.0.1:{port}/index.html");
    let ab = ctx.client("ab")?.line("-q -c 8 -n 400 -s 15").arg(url).run()?;
    check_ab(&ab.text(), 400)?;
    nginx.quit(ctx)
}

fn wrk_keepalive(ctx: &mut Ctx) -> Result<()> {
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let wrk = ctx.client("wrk")?.line("-t 2 -c 50 -d 1s --latency").arg(nginx.url("/index.html")).run()?;
    check_wrk(&wrk.text(), 500)?;
    nginx.quit(ctx)
}

fn wrk_close(ctx: &mut Ctx) -> Result<()> {
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let wrk = ctx.client("wrk")?.line("-t 2 -c 50 -d 1s").args(["-H", "Connection: close"]);
    check_wrk(&wrk.arg(nginx.url("/tiny")).run()?.text(), 100)?;
    nginx.quit(ctx)
}

fn ab_requests(ctx: &mut Ctx, keepalive: bool) -> Result<()> {
    let nginx = Nginx::start(ctx, "nginx", "", "")?;
    let mut ab = ctx.client("ab")?.line("-q -c 20 -n 3000 -s 15");
    if keepalive {
        ab = ab.arg("-k");
    }
    let text = ab.arg(nginx.url("/index.html")).run()?.text();
    check_ab(&text, 3000)?;
    if keepalive {
        ensure!(number_after(&text, "Keep-Alive requests:") == Some(3000), "not all kept alive\n{text}");
    }
    nginx.quit(ctx)
}
