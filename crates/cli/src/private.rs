//! Private engines: `netkernel run` starts one when none runs. A private engine is nobody's child, holds nothing of its
//! caller's, and ends with its last guest.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use log::LevelFilter;
use netkernel_abi::control::env;
use netkernel_control::{Access, Endpoint, RuntimeDir, Server};
use netkernel_shm::fds;

use crate::args::PrivateEngineArgs;
use crate::config::Config;
use crate::engine::Adapter;
use crate::{locate, sys};

/// The engine ends when nobody made a guest this long after its start.
const FIRST_GUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Starts a private engine and returns its socket once it listens. `log`: keep our standard error for its log.
pub fn start(log: bool) -> Result<PathBuf> {
    let dir = directory()?;
    locate::sweep();
    let socket = dir.private_socket(&format!("{}-{:08x}", std::process::id(), random()?));
    let executable = std::env::current_exe().context("cannot find the netkernel executable")?;
    let (answer, handshake) = fds::pipe(libc::O_CLOEXEC, None).context("cannot make a pipe")?;
    sys::set_close_on_exec(handshake.as_raw_fd(), false)?;
    let mut command = Command::new(&executable);
    command.arg("private-engine").arg("--socket").arg(&socket);
    command.arg("--handshake-fd").arg(handshake.as_raw_fd().to_string());
    if log {
        command.arg("--log");
    } else {
        command.stderr(Stdio::null());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // The engine must not become a guest itself.
    for name in env::ALL.into_iter().chain(["LD_PRELOAD"]) {
        command.env_remove(name);
    }
    // Started from inside a guest, it would get all that back from GuestLib.
    command.env(env::BYPASS, "1");
    let mut child = command.spawn().with_context(|| format!("cannot start {}", executable.display()))?;
    drop(handshake);
    let mut text = String::new();
    File::from(answer).read_to_string(&mut text).context("the private engine does not answer")?;
    // Only the half-way process, which has ended.
    let _ = child.wait();
    match text.trim_end().split_once(' ').unwrap_or((text.trim_end(), "")) {
        ("ok", _) => Ok(socket),
        ("error", message) => bail!("{message}"),
        _ => bail!("the private engine ended without a word: run with --trace to see why"),
    }
}

fn directory() -> Result<RuntimeDir> {
    let dir = netkernel_control::runtime_dir();
    if dir.ensure().is_ok() && dir.is_writable() {
        return Ok(dir);
    }
    let dir = netkernel_control::fallback_dir();
    dir.ensure()
        .with_context(|| format!("no place for a private engine's socket in {}", dir.path().display()))?;
    Ok(dir)
}

fn random() -> Result<u32> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(u32::from_ne_bytes(bytes))
}

/// The hidden subcommand.
pub fn serve(args: &PrivateEngineArgs) -> Result<i32> {
    sys::close_inherited(args.handshake_fd);
    let mut handshake = File::from(sys::adopt(args.handshake_fd).context("bad --handshake-fd")?);
    match start_detached(args) {
        Ok(running) => {
            let _ = handshake.write_all(b"ok\n");
            drop(handshake);
            running.until_done();
            Ok(0)
        }
        Err(e) => {
            let _ = handshake.write_all(format!("error {e:#}\n").as_bytes());
            Ok(crate::exit::FAILED)
        }
    }
}

struct Running {
    server: Server,
    engine: Arc<Adapter>,
    signals: std::os::fd::OwnedFd,
    log: Option<PathBuf>,
}

fn start_detached(args: &PrivateEngineArgs) -> Result<Running> {
    sys::detach().context("cannot leave the caller's session")?;
    let signals = sys::termination_signals().context("cannot take signals")?;
    let log = if args.log { None } else { Some(open_log(&args.socket)?) };
    sys::raise_descriptor_limit();
    crate::logger::start_inherited(if args.log { LevelFilter::Info } else { LevelFilter::Warn });
    let endpoint = Endpoint::bind(&args.socket)?;
    let config = Config::default();
    let engine = Adapter::start(&config, &args.socket, true, None)?;
    let access = Access { owner: sys::effective_uid(), ..Access::default() };
    let server =
        Server::start(endpoint, engine.clone(), access).map_err(|e| anyhow!("no control thread: {e}"))?;
    engine.stop_when_unused(FIRST_GUEST_TIMEOUT)?;
    Ok(Running { server, engine, signals, log })
}

impl Running {
    fn until_done(self) {
        let _ = sys::wait_readable(&[self.signals.as_fd(), self.engine.stop_requested()]);
        drop(self.server);
        self.engine.shutdown();
        if let Some(log) = self.log
            && std::fs::metadata(&log).is_ok_and(|m| m.len() == 0)
        {
            let _ = std::fs::remove_file(log);
        }
    }
}

/// The log stands beside the socket while there is something in it.
fn open_log(socket: &Path) -> Result<PathBuf> {
    let mut name = socket.as_os_str().to_owned();
    name.push(".log");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&name)
        .context("cannot open the private engine's log")?;
    sys::redirect_stderr(&file)?;
    Ok(name.into())
}
