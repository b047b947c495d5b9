//! sshd, ssh, scp.

use std::fs;

use anyhow::{Result, ensure};
use netkernel_testkit::{Cmd, Ctx, Proc, Scenario};

use super::{TERM, http_server, says, sha256};

const NEEDS: &[&str] = &["sshd", "ssh", "scp", "ssh-keygen"];

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("ssh/command", NEEDS, command),
    Scenario::new("ssh/scp", NEEDS, scp),
    Scenario::new("ssh/forward", &["sshd", "ssh", "ssh-keygen", "curl", "python3"], forward),
];

/// An sshd of the user who runs this, with keys of its own.
fn start(ctx: &mut Ctx) -> Result<(Proc, u16)> {
    // Where sshd jails its first process; the service's start script makes it at boot.
    let _ = fs::create_dir("/run/sshd");
    let port = ctx.port()?;
    for key in ["host", "user"] {
        ctx.native("ssh-keygen")?.args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", key]).run()?;
    }
    fs::copy(ctx.path("user.pub"), ctx.path("authorized"))?;
    let dir = ctx.dir().display().to_string();
    let config = format!(
        "ListenAddress 127.0.0.1:{port}\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/authorized\nPidFile none\n\
         UsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nUseDNS no\nPrintMotd no\n\
         Subsystem sftp internal-sftp\n"
    );
    let config = ctx.write("sshd_config", &config)?;
    let mut server = ctx.server("sshd")?.line("-D -e -f").arg(config).spawn()?;
    ctx.listening(&mut server, port)?;
    Ok((server, port))
}

fn options(cmd: Cmd) -> Cmd {
    cmd.line("-F none -q -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=known -i user")
}

fn ssh(ctx: &Ctx, port: u16) -> Result<Cmd> {
    Ok(options(ctx.client("ssh")?).args(["-p", &port.to_string()]))
}

fn command(ctx: &mut Ctx) -> Result<()> {
    let (server, port) = start(ctx)?;
    let output = ssh(ctx, port)?.args(["127.0.0.1", "echo to out; echo to err >&2; exit 3"]).output()?;
    ensure!(output.code == 3, "the command's exit code was 3, ssh's {}:\n{}", output.code, {
        String::from_utf8_lossy(&output.stderr).into_owned() + &server.stderr()
    });
    says(&output, "to out")?;
    ensure!(String::from_utf8_lossy(&output.stderr).contains("to err"), "the error output was lost");
    let file = ctx.noise("file.bin", 3 << 20)?;
    let there = ssh(ctx, port)?.args(["127.0.0.1", "sha256sum"]).stdin_file(&file).run()?;
    says(&there, &sha256(ctx, &file)?)?;
    let terminal = ssh(ctx, port)?.args(["-tt", "127.0.0.1", "tty"]).run()?;
    says(&terminal, "/dev/pts/")?;
    server.stop(TERM, &[0, 143, 255])
}

fn scp(ctx: &mut Ctx) -> Result<()> {
    let (server, port) = start(ctx)?;
    let file = ctx.noise("file.bin", 5 << 20)?;
    let dir = ctx.dir().display().to_string();
    let port = port.to_string();
    let there =
        options(ctx.client("scp")?).args(["-P", &port, "file.bin", &format!("127.0.0.1:{dir}/there.bin")]);
    there.run()?;
    ctx.same_files(&file, &ctx.path("there.bin"))?;
    let back =
        options(ctx.client("scp")?).args(["-P", &port, &format!("127.0.0.1:{dir}/there.bin"), "back.bin"]);
    back.run()?;
    ctx.same_files(&file, &ctx.path("back.bin"))?;
    server.stop(TERM, &[0, 143, 255])
}

/// ssh listens, and carries what comes to a server behind sshd.
fn forward(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 3 << 20)?;
    let (web, web_port) = http_server(ctx, &ctx.path("www"))?;
    let (server, port) = start(ctx)?;
    let local = ctx.port()?;
    let forward = format!("127.0.0.1:{local}:127.0.0.1:{web_port}");
    let mut tunnel = ssh(ctx, port)?.args(["-N", "-L", &forward, "127.0.0.1"]).spawn()?;
    ctx.listening(&mut tunnel, local)?;
    let url = format!("http://127.0.0.1:{local}/file.bin");
    ctx.client("curl")?.line("-sS --fail --max-time 20 -o out").arg(url).run()?;
    ctx.same_files(&file, &ctx.path("out"))?;
    tunnel.stop(TERM, &[143, 255, 0])?;
    server.stop(TERM, &[0, 143, 255])?;
    web.stop(TERM, &[0])
}
