//! `netkernel restart`, and both of its ends in the engine's process: the program that leaves and the one that goes on.

use std::ffi::CString;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use netkernel_control::{Client, EngineChange};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::RestartArgs;
use crate::{locate, sys};

/// Where the next program finds what it goes on with: JSON of [`Left`].
const VARIABLE: &str = "NETKERNEL_HANDOVER";
/// How long the program may take to say that it understands the other one's state.
const CHECK: Duration = Duration::from_secs(10);
/// How long the command waits for the new engine's word.
const WAIT: Duration = Duration::from_secs(60);

/// Descriptors that the program before left open.
#[derive(Debug, Serialize, Deserialize)]
pub struct Left {
    pub document: RawFd,
    pub listener: RawFd,
    pub lock: Option<RawFd>,
    pub path: PathBuf,
}

/// What `restart` in the status tells of the last time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// How often since the engine was started.
    pub count: u64,
    /// For how long nobody served guests, in microseconds.
    pub pause_us: u64,
    /// Guests that went on, and those that could not.
    pub guests: usize,
    pub lost: Vec<u32>,
    /// Guests that lost sockets, as was allowed (`--lose`).
    #[serde(default)]
    pub reset: Vec<u32>,
    /// Times that it was begun and did not come about; why, the last time.
    pub failures: u64,
    pub error: Option<String>,
}

pub fn restart(args: &RestartArgs) -> Result<()> {
    let binary = match &args.binary {
        None => None,
        Some(path) => {
            // The engine may be somewhere else.
            let path = path.canonicalize().with_context(|| format!("--binary {}", path.display()))?;
            let text = path.into_os_string().into_string();
            Some(text.map_err(|path| anyhow!("--binary {}: is no text", path.display()))?)
        }
    };
    let mut client = locate::require(args.socket.as_deref())?;
    let socket = client.path().to_owned();
    let before = told(&mut client)?;
    client.restart_engine(EngineChange { binary, lose: args.lose })?;
    let deadline = Instant::now() + WAIT;
    let after = loop {
        // The old program's connection ends with it; the socket stays.
        if let Ok(mut client) = Client::connect(&socket)
            && let Ok(now) = told(&mut client)
            && (now.count != before.count || now.failures != before.failures)
        {
            break now;
        }
        if Instant::now() > deadline {
            bail!("the engine at {} has not come back; its log says why", socket.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if let Some(error) = after.error.filter(|_| after.failures != before.failures) {
        bail!("the engine goes on as it was: {error}");
    }
    if args.json {
        return crate::show::print_json(&serde_json::json!({
            "pause_us": after.pause_us, "guests": after.guests, "lost": after.lost, "reset": after.reset,
        }));
    }
    println!("restarted; {} guests waited {:.1} ms", after.guests, after.pause_us as f64 / 1000.0);
    if !after.reset.is_empty() {
        println!(
            "sockets of guests {:?} could not go on and were reset; the engine's log says why",
            after.reset
        );
    }
    if !after.lost.is_empty() {
        bail!("guests that could not go on: {:?}; the engine's log says why", after.lost);
    }
    Ok(())
}

fn told(client: &mut Client) -> Result<Told> {
    let status = client.status()?;
    let told = status.details.get("restart").cloned().unwrap_or(Value::Null);
    Ok(serde_json::from_value(told).unwrap_or_default())
}

/// Whether a program understands what this one would leave.
pub fn check(binary: &Path) -> Result<()> {
    let format = netkernel_engine::handover::format();
    let mut child = Command::new(binary)
        .args(["up", "--check-handover", &format])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{} cannot be executed", binary.display()))?;
    let deadline = Instant::now() + CHECK;
    loop {
        match child.try_wait().context("cannot wait for it")? {
            Some(status) if status.success() => return Ok(()),
            Some(_) => bail!("{} cannot go on with what this engine leaves ({format})", binary.display()),
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{} does not say whether it can go on", binary.display());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// The other end of [`check`].
pub fn answer_check(format: &str) -> Result<()> {
    let own = netkernel_engine::handover::format();
    if format == own { Ok(()) } else { bail!("this program understands {own}, not {format}") }
}

/// What this process's program before left, if there was one. To be called once, before there are threads.
pub fn left() -> Result<Option<Left>> {
    let Some(text) = sys::take_environment(VARIABLE) else { return Ok(None) };
    let left: Left =
        serde_json::from_slice(&text.into_vec()).with_context(|| format!("{VARIABLE} is damaged"))?;
    Ok(Some(left))
}

/// Takes over one of its descriptors.
pub fn adopt(fd: RawFd) -> Result<OwnedFd> {
    sys::adopt(fd).context("a descriptor that was to be handed over is not open")
}

/// Executes the program in place of this one, with the same arguments. Returns only if that fails; everything is as before then.
pub fn execute(binary: &Path, left: &Left) -> Result<()> {
    let text = |bytes: &[u8]| CString::new(bytes).context("a zero byte");
    let program = text(binary.as_os_str().as_bytes())?;
    let arguments: Vec<CString> = std::env::args_os().map(|a| text(a.as_bytes())).collect::<Result<_>>()?;
    let mut environment = std::env::vars_os()
        .map(|(name, value)| text(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect::<Result<Vec<_>>>()?;
    environment.push(text(format!("{VARIABLE}={}", serde_json::to_string(left)?).as_bytes())?);
    let own = [Some(left.listener), left.lock];
    let set = |on| own.iter().flatten().try_for_each(|fd| sys::set_close_on_exec(*fd, on));
    set(false)?;
    let error = sys::execute_again(&program, &arguments, &environment);
    set(true)?;
    Err(error).with_context(|| format!("{} cannot be executed", binary.display()))
}

/// The configuration as the next program will read it.
pub fn check_config(binary: &Path, file: &Path) -> Result<()> {
    let output = Command::new(binary)
        .args(["up", "--check", "--config"])
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} cannot be executed", binary.display()))?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("netkernel: "))
}
