//! openssl, git, socat, perl: programs that stand in pipes and scripts.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::{Ctx, Scenario, same_bytes, tools};

use super::{TERM, certificate, http_server, says, script, together};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("openssl/file", &["openssl"], openssl_file),
    Scenario::new("openssl/reverse", &["openssl"], openssl_reverse),
    Scenario::new("git/clone-dumb", &["git", "python3"], git_dumb),
    Scenario::new("git/clone-and-push", &["git", "python3"], git_smart),
    Scenario::new("socat/fork-exec", &["socat"], socat_fork),
    Scenario::new("socat/relay", &["socat"], socat_relay),
    Scenario::new("perl/fork-and-select", &["perl"], perl),
];

fn openssl_file(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (certificate, key) = certificate(ctx)?;
    let file = ctx.noise("www/file.bin", 5 << 20)?;
    let server = ctx.server("openssl")?.line(&format!("s_server -accept 127.0.0.1:{port} -WWW -quiet -cert"));
    let mut server = server.arg(&certificate).arg("-key").arg(key).cwd(&ctx.path("www")).spawn()?;
    ctx.listening(&mut server, port)?;
    for version in ["-tls1_2", "-tls1_3"] {
        let client =
            ctx.client("openssl")?.line(&format!("s_client -connect 127.0.0.1:{port} -quiet {version}"));
        let client = client.line("-verify_return_error -verify_hostname localhost -CAfile").arg(&certificate);
        let answer = client.stdin_text("GET /file.bin HTTP/1.0\r\n\r\n")?.run()?.stdout;
        let head = answer.windows(4).position(|w| w == b"\r\n\r\n").context("no answer")?;
        same_bytes(&fs::read(&file)?, &answer[head + 4..])?;
    }
    server.stop(TERM, &[143])
}

fn openssl_reverse(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (certificate, key) = certificate(ctx)?;
    let server = ctx.server("openssl")?.line(&format!("s_server -accept 127.0.0.1:{port} -rev -quiet -cert"));
    let mut server = server.arg(&certificate).arg("-key").arg(key).spawn()?;
    ctx.listening(&mut server, port)?;
    for n in 0..4 {
        let client =
            ctx.client("openssl")?.line(&format!("s_client -connect 127.0.0.1:{port} -quiet -CAfile"));
        // -rev ends the connection after this word.
        let client = client.arg(&certificate).stdin_text(&format!("hello {n}\nnetkernel\nCLOSE\n"))?;
        let text = client.run()?.text();
        ensure!(text == format!("{n} olleh\nlenrekten\n"), "the answer: {text}");
    }
    server.stop(TERM, &[143])
}

/// A repository with some history, small files and a big one.
fn repository(ctx: &Ctx) -> Result<String> {
    let files: String = (0..200).map(|n| format!("echo content {n} > file{n}.txt; ")).collect();
    ctx.noise("work/big.bin", 3 << 20)?;
    let line = format!(
        "{IDENTITY}; cd work && git init -q -b main . && {files} git add . && git commit -qm first && \
         for n in 1 2 3 4 5; do echo $n >> file0.txt; git commit -qam $n; done && \
         git clone -q --bare . ../www/repo.git && git -C ../www/repo.git update-server-info && \
         git -C ../www/repo.git config http.receivepack true && git rev-parse HEAD"
    );
    fs::create_dir_all(ctx.path("www"))?;
    Ok(ctx.native("sh")?.arg("-c").arg(line).run()?.text().trim().to_owned())
}

const IDENTITY: &str = "export GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.com \
                        GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.com";

fn check_clone(ctx: &Ctx, dir: &str, head: &str) -> Result<()> {
    let cloned = ctx.native("git")?.line(&format!("-C {dir} rev-parse HEAD")).run()?;
    ensure!(cloned.text().trim() == head, "another commit: {}", cloned.text());
    ctx.native("git")?.line(&format!("-C {dir} fsck --strict")).run()?;
    ctx.same_files(&ctx.path("work/big.bin"), &ctx.path(&format!("{dir}/big.bin")))
}

fn git_dumb(ctx: &mut Ctx) -> Result<()> {
    let head = repository(ctx)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let url = format!("http://127.0.0.1:{port}/repo.git");
    ctx.client("git")?.line("clone -q").args([&url, "clone"]).env("GIT_SMART_HTTP", "0").run()?;
    check_clone(ctx, "clone", &head)?;
    server.stop(TERM, &[0])
}

fn git_smart(ctx: &mut Ctx) -> Result<()> {
    let head = repository(ctx)?;
    let port = ctx.port()?;
    let git = tools::find("git").context("no git")?;
    let server = ctx.server("python3")?.arg(script!(ctx, "git_server.py")).arg(port.to_string());
    let mut server = server.arg(ctx.path("www")).arg(git).spawn()?;
    ctx.listening(&mut server, port)?;
    let url = format!("http://127.0.0.1:{port}/repo.git");
    ctx.client("git")?.line("clone -q").args([&url, "clone"]).run()?;
    check_clone(ctx, "clone", &head)?;
    ctx.client("git")?.line("clone -q --depth 1").args([&url, "shallow"]).run()?;
    // A change that goes there and comes back; it is larger than git's buffer for a request.
    let change = format!(
        "{IDENTITY}; cp big.bin copy.bin && echo x >> copy.bin && git add . && git commit -qm change"
    );
    ctx.native("sh")?.arg("-c").arg(change).cwd(&ctx.path("clone")).run()?;
    ctx.client("git")?.line("-C clone push -q origin main").run()?;
    ctx.client("git")?.line("-C shallow pull -q --ff-only").run()?;
    ctx.same_files(&ctx.path("clone/copy.bin"), &ctx.path("shallow/copy.bin"))?;
    server.stop(TERM, &[0])
}

fn socat_fork(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("file.bin", 8 << 20)?;
    let listen = format!("TCP-LISTEN:{port},fork,reuseaddr,bind=127.0.0.1");
    let mut server = ctx.server("socat")?.args(["-t", "15", &listen, "EXEC:cat"]).spawn()?;
    ctx.listening(&mut server, port)?;
    let to = format!("TCP:127.0.0.1:{port}");
    let mut clients = Vec::new();
    for n in 0..3 {
        let out = ctx.path(&format!("out{n}"));
        clients.push(ctx.client("socat")?.args(["-t", "15", "-", &to]).stdin_file(&file).stdout_file(&out));
    }
    together(clients)?;
    for n in 0..3 {
        ctx.same_files(&file, &ctx.path(&format!("out{n}")))?;
    }
    // A program whose standard input and output are the socket itself, without socat between them.
    let direct = ctx.port()?;
    let listen = format!("TCP-LISTEN:{direct},fork,reuseaddr,bind=127.0.0.1");
    ctx.write("hello.sh", "read name; echo hello $name\n")?;
    let mut second = ctx.server("socat")?.args([&listen, "EXEC:sh hello.sh,nofork"]).spawn()?;
    ctx.listening(&mut second, direct)?;
    let to = format!("TCP:127.0.0.1:{direct}");
    for name in ["one", "two"] {
        let client = ctx.client("socat")?.args(["-t", "15", "-", &to]).stdin_text(&format!("{name}\n"))?;
        says(&client.run()?, &format!("hello {name}"))?;
    }
    second.stop(TERM, &[143])?;
    server.stop(TERM, &[143])
}

/// From a Unix socket to TCP to a file: three kinds of descriptors in one select.
fn socat_relay(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let file = ctx.noise("file.bin", 8 << 20)?;
    let sink = format!("TCP6-LISTEN:{port},bind=[::1]");
    let mut server = ctx.server("socat")?.args(["-u", &sink, "OPEN:sink.bin,creat,trunc"]).spawn()?;
    ctx.listening(&mut server, port)?;
    let to = format!("TCP6:[::1]:{port}");
    let relay = ctx.client("socat")?.args(["-u", "UNIX-LISTEN:relay.sock", &to]).spawn()?;
    ctx.until("the relay", || Ok(ctx.path("relay.sock").exists()))?;
    ctx.native("socat")?.args(["-u", "OPEN:file.bin", "UNIX-CONNECT:relay.sock"]).run()?;
    relay.finish()?;
    server.finish()?;
    ctx.same_files(&file, &ctx.path("sink.bin"))
}

fn perl(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "server.pl"), script!(ctx, "client.pl"));
    let mut server = ctx.server("perl")?.arg(server).arg(port.to_string()).spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("perl")?.arg(client).arg(port.to_string()).run()?, "ok")?;
    server.stop(TERM, &[0])
}
