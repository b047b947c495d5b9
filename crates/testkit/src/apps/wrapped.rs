//! Programs that start, watch or stand in front of others: inetd, netcat, tracers, debuggers.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::{Ctx, Scenario, tools};

use super::{TERM, http_server, says, script, sha256};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("inetd/services", &["inetd", "busybox", "curl", "socat"], inetd),
    Scenario::new("nc/exec", &["nc.traditional", "busybox", "socat"], netcat),
    Scenario::new("ncat/exec", &["ncat", "busybox"], ncat),
    Scenario::new("strace/python", &["strace", "python3", "curl"], strace),
    Scenario::new("gdb/curl", &["gdb", "python3", "curl"], gdb),
    Scenario::new("sh/pipeline", &["busybox", "curl", "python3"], pipeline),
];

/// inetd starts dynamic and static programs with a connection as standard input and output, or with the listener; clients
/// speak first, so that bytes are there before the program is.
fn inetd(ctx: &mut Ctx) -> Result<()> {
    let ports = [ctx.port()?, ctx.port()?, ctx.port()?, ctx.port()?];
    let busybox = tools::find("busybox").context("no busybox")?;
    let user = ctx.native("id")?.arg("-un").run()?.text();
    let file = ctx.noise("www/file.bin", 1 << 20)?;
    let at = |port: u16, how: &str, program: &str| {
        format!("127.0.0.1:{port} stream tcp {how} {} {program}\n", user.trim())
    };
    let busybox = busybox.display();
    let hello = ctx.write("hello.sh", "read name; echo hello $name\n")?;
    let text = [
        at(ports[0], "nowait", "/bin/cat cat"),
        at(ports[1], "nowait", &format!("{busybox} busybox cat")),
        at(ports[2], "nowait", &format!("{busybox} busybox httpd -i -h {}", ctx.path("www").display())),
        at(ports[3], "nowait", &format!("/bin/sh sh {}", hello.display())),
    ]
    .concat();
    let config = ctx.write("inetd.conf", &text)?;
    let mut server = ctx.server("inetd")?.arg("-i").arg(config).spawn()?;
    for port in ports {
        ctx.listening(&mut server, port)?;
    }
    for round in 0..3 {
        for port in &ports[..2] {
            let out = ctx.path(&format!("out{round}-{port}"));
            let to = format!("TCP:127.0.0.1:{port}");
            ctx.client("socat")?.args(["-t", "20", "-", &to]).stdin_file(&file).stdout_file(&out).run()?;
            ctx.same_files(&file, &out)?;
        }
        let out = ctx.path(&format!("page{round}"));
        let url = format!("http://127.0.0.1:{}/file.bin", ports[2]);
        ctx.client("curl")?.line("-sS --fail --max-time 20 -o").arg(&out).arg(url).run()?;
        ctx.same_files(&file, &out)?;
        let to = format!("TCP:127.0.0.1:{}", ports[3]);
        let answer = ctx.client("socat")?.args(["-t", "20", "-", &to]).stdin_text("you\n")?.run()?;
        says(&answer, "hello you")?;
    }
    server.stop(TERM, &[0, 143])
}

/// It becomes a dynamic or a static program with the connection as standard input and output.
fn netcat(ctx: &mut Ctx) -> Result<()> {
    let busybox = tools::find("busybox").context("no busybox")?;
    let file = ctx.noise("file.bin", 1 << 20)?;
    let fixed = ctx.path("cat");
    std::os::unix::fs::symlink(busybox, &fixed)?;
    for served in ["/bin/cat", fixed.to_str().context("an odd path")?] {
        let port = ctx.port()?;
        let command = ctx.server("nc.traditional")?.args(["-l", "-p", &port.to_string(), "-e", served]);
        let mut server = command.spawn()?;
        ctx.listening(&mut server, port)?;
        let out = ctx.path(&format!("out-{port}"));
        let to = format!("TCP:127.0.0.1:{port}");
        ctx.client("socat")?.args(["-t", "20", "-", &to]).stdin_file(&file).stdout_file(&out).run()?;
        ctx.same_files(&file, &out)?;
        server.finish()?;
    }
    Ok(())
}

/// It moves the bytes between a connection and a dynamic or a static program.
fn ncat(ctx: &mut Ctx) -> Result<()> {
    let busybox = tools::find("busybox").context("no busybox")?;
    for interpreter in ["/bin/sh".to_owned(), format!("{} sh", busybox.display())] {
        let port = ctx.port()?;
        let script = ctx.write("hello", &format!("#!{interpreter}\nread name; echo hello $name\n"))?;
        make_executable(&script)?;
        let server = ctx.server("ncat")?.args(["-l", "-k", "127.0.0.1", &port.to_string(), "-e"]);
        let mut server = server.arg(script).spawn()?;
        ctx.listening(&mut server, port)?;
        for _ in 0..3 {
            // It would end the program when its client has no more to say.
            let client = ctx.client("ncat")?.args(["--no-shutdown", "127.0.0.1", &port.to_string()]);
            says(&client.stdin_text("you\n")?.run()?, "hello you")?;
        }
        server.stop(TERM, &[143])?;
    }
    Ok(())
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}

/// A server with processes of its own, all traced.
fn strace(ctx: &mut Ctx) -> Result<()> {
    let port = ctx.port()?;
    let (server, client) = (script!(ctx, "forking_server.py"), script!(ctx, "echo_client.py"));
    let python = tools::find("python3").context("no python3")?;
    let log = ctx.path("strace.log");
    let mut traced = ctx.server("strace")?.args(["-f", "-o"]).arg(&log).arg(python).arg(server);
    traced = traced.arg(port.to_string());
    let mut server = traced.spawn()?;
    ctx.listening(&mut server, port)?;
    says(&ctx.client("python3")?.arg(client).line(&format!("{port} 4 3 5")).run()?, "ok 4")?;
    // A tracer passes the signal on only when it is its own.
    let pid = server.pid()?;
    let traced = netkernel_testkit::process::children(pid);
    let program = traced.iter().find(|p| p.name.starts_with("python")).context("nothing is traced")?;
    netkernel_testkit::process::signal(program.pid, TERM);
    ensure!([0, 143].contains(&server.wait()?), "strace does not end as its program does");
    let text = std::fs::read_to_string(log)?;
    ensure!(text.contains("execve(") && text.contains("exited with 0"), "it saw too little");
    // And clients.
    let file = ctx.noise("www/file.bin", 1 << 20)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let curl = tools::find("curl").context("no curl")?;
    let out = ctx.path("traced.bin");
    let traced = ctx.client("strace")?.args(["-f", "-o", "/dev/null"]).arg(curl);
    traced.line("-sS --fail -o").arg(&out).arg(format!("http://127.0.0.1:{port}/file.bin")).run()?;
    ctx.same_files(&file, &out)?;
    server.stop(TERM, &[0])
}

/// A breakpoint, a backtrace, and the program goes on to a good end.
fn gdb(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 1 << 20)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let curl = tools::find("curl").context("no curl")?;
    let out = ctx.path("debugged.bin");
    let gdb = ctx.client("gdb")?.args(["-q", "-nx", "-batch"]).args(["-ex", "set breakpoint pending on"]);
    let gdb = gdb.args([
        "-ex",
        "break connect",
        "-ex",
        "run",
        "-ex",
        "backtrace",
        "-ex",
        "delete",
        "-ex",
        "continue",
    ]);
    let gdb = gdb.arg("--args").arg(curl).line("-sS --fail -o").arg(&out);
    let said = gdb.arg(format!("http://127.0.0.1:{port}/file.bin")).run()?;
    ctx.same_files(&file, &out)?;
    says(&said, "Breakpoint 1")?;
    says(&said, "#1 ")?;
    says(&said, "exited normally")?;
    server.stop(TERM, &[0])
}

/// Dynamic and static programs in one pipeline, by a dynamic shell and a static one.
fn pipeline(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 3 << 20)?;
    let sum = sha256(ctx, &file)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let url = format!("http://127.0.0.1:{port}/file.bin");
    for line in [
        format!("curl -sS {url} | busybox cat | cat | busybox sha256sum"),
        format!("busybox wget -q -O - {url} | cat | sha256sum"),
        format!(
            "busybox wget -q -O - {url} | curl -sS -T - file://$PWD/copy.bin && busybox sha256sum < copy.bin"
        ),
        format!(
            "(busybox wget -q -O - {url} & curl -sS -o second.bin {url}; wait) | sha256sum; cat second.bin | busybox sha256sum"
        ),
    ] {
        for shell in [&["sh"][..], &["busybox", "sh"]] {
            let said = ctx.client(shell[0])?.args(&shell[1..]).args(["-c", &line]).run()?;
            says(&said, &sum)?;
        }
    }
    server.stop(TERM, &[0])
}
