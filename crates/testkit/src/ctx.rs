//! What a scenario has at hand.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{self, Signal};
use crate::{Cmd, Engine, Mode, Proc, net, tools};

#[derive(Debug)]
pub struct Ctx {
    pub mode: Mode,
    /// How long a scenario that has no end of its own goes on.
    pub seconds: u64,
    pub(crate) dir: PathBuf,
    pub(crate) guests: Option<Guests>,
    pub(crate) next_port: u16,
    pub(crate) last_port: u16,
    pub(crate) started: Cell<u32>,
    pub(crate) limit: Instant,
}

/// How programs become guests.
#[derive(Debug)]
pub(crate) struct Guests {
    pub engine: Engine,
    pub netkernel: PathBuf,
    pub stack: String,
    /// `netkernel run --attach`.
    pub attach: String,
}

impl Ctx {
    /// A program in the role of the server.
    pub fn server(&self, program: &str) -> Result<Cmd> {
        self.cmd(program, matches!(self.mode, Mode::Server | Mode::Both))
    }

    /// A program in the role of the client.
    pub fn client(&self, program: &str) -> Result<Cmd> {
        self.cmd(program, matches!(self.mode, Mode::Client | Mode::Both))
    }

    /// A program that is never a guest.
    pub fn native(&self, program: &str) -> Result<Cmd> {
        self.cmd(program, false)
    }

    fn cmd(&self, program: &str, guest: bool) -> Result<Cmd> {
        let path = if program.contains('/') {
            program.into()
        } else {
            tools::find(program).with_context(|| format!("{program} is not installed"))?
        };
        let n = self.started.get();
        self.started.set(n + 1);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = |suffix: &str| self.dir.join(format!("log/{n:03}-{name}.{suffix}"));
        let mut wrapper: Vec<OsString> = Vec::new();
        if let (true, Some(guests)) = (guest, &self.guests) {
            wrapper.extend([guests.netkernel.clone().into(), "run".into(), "--socket".into()]);
            wrapper.push(guests.engine.socket().into());
            wrapper.extend(["--stack".into(), OsString::from(&guests.stack)]);
            wrapper.extend(["--attach".into(), OsString::from(&guests.attach), "--".into()]);
        }
        Ok(Cmd::new(&path, wrapper, &self.dir, (file("out"), file("err")), self.limit))
    }

    pub fn engine(&self) -> Option<&Engine> {
        self.guests.as_ref().map(|g| &g.engine)
    }

    /// A free port that no client's socket can get.
    pub fn port(&mut self) -> Result<u16> {
        while self.next_port < self.last_port {
            let port = self.next_port;
            self.next_port += 1;
            if net::is_free(port) {
                return Ok(port);
            }
        }
        bail!("no free port left");
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the run's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, text).with_context(|| format!("cannot write {name}"))?;
        Ok(path)
    }

    /// A file of bytes that do not compress and do not repeat.
    pub fn noise(&self, name: &str, len: usize) -> Result<PathBuf> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ len as u64;
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(len);
        let path = self.dir.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, bytes)?;
        Ok(path)
    }

    pub fn same_files(&self, a: &Path, b: &Path) -> Result<()> {
        same_bytes(&fs::read(a)?, &fs::read(b).with_context(|| format!("cannot read {}", b.display()))?)
    }

    /// Waits until something is true; the watchdog ends it.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let mut pause = Duration::from_millis(1);
        while !done()? {
            ensure!(Instant::now() < self.limit, "waited in vain (watchdog): {what}");
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until the server listens on its TCP port.
    pub fn listening(&self, server: &mut Proc, port: u16) -> Result<()> {
        self.until(&format!("a listener on port {port}"), || {
            server.check_running()?;
            Ok(net::listens_tcp(port))
        })
    }

    /// The same for a server that went into the background.
    pub fn daemon_listening(&self, port: u16) -> Result<()> {
        self.until(&format!("a listener on port {port}"), || Ok(net::listens_tcp(port)))
    }

    pub fn bound_udp(&self, server: &mut Proc, port: u16) -> Result<()> {
        self.until(&format!("UDP port {port}"), || {
            server.check_running()?;
            Ok(net::bound_udp(port))
        })
    }

    /// The process that a pid file names, once it does.
    pub fn pid_file(&self, path: &Path) -> Result<u32> {
        let mut pid = None;
        self.until(&format!("{}", path.display()), || {
            pid = process::read_pid_file(path);
            Ok(pid.is_some())
        })?;
        pid.context("no pid")
    }

    /// Asks a background process to end, and sees it end.
    pub fn stop_daemon(&self, pid: u32, signal: Signal) -> Result<()> {
        process::signal(pid, signal);
        self.until(&format!("the end of process {pid}"), || Ok(!process::alive(pid)))
    }

    /// What is left of the run's time.
    pub fn remaining(&self) -> Duration {
        self.limit.saturating_duration_since(Instant::now())
    }
}

/// An error that says where they begin to differ.
pub fn same_bytes(a: &[u8], b: &[u8]) -> Result<()> {
    if a == b {
        return Ok(());
    }
    let at = a.iter().zip(b).position(|(x, y)| x != y);
    match at {
        Some(at) => bail!("contents differ from byte {at} on ({} and {} bytes)", a.len(), b.len()),
        None => bail!("contents differ in length: {} and {} bytes", a.len(), b.len()),
    }
}
