//! The engine of one run: `netkernel up`, looked at through `netkernel ps`.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process::{self, Signal};

/// Descriptors that idle threads of the control API may keep.
const IDLE_CONTROL: usize = 4;
/// Opened once, with the first agent: the ledger of direct sockets in its network namespace, and the way to the heir.
const WITH_FIRST_AGENT: usize = 5;

#[derive(Debug)]
pub struct Engine {
    child: Child,
    netkernel: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    /// Before the first guest.
    descriptors: usize,
}

/// What `ps` says of one guest.
#[derive(Clone, Debug)]
pub struct Guest {
    pub id: u64,
    pub name: String,
    pub sockets: u64,
}

/// What `ps` says.
#[derive(Clone, Debug)]
pub struct State {
    pub guests: Vec<Guest>,
    /// Rules of the ring protocol that guests broke. Real programs break none.
    pub violations: u64,
}

impl Engine {
    pub fn start(netkernel: &Path, dir: &Path) -> Result<Engine> {
        let socket = dir.join("engine.sock");
        let log = dir.join("engine.log");
        let out = File::create(&log)?;
        let child = Command::new(netkernel)
            .arg("up")
            .arg("--socket")
            .arg(&socket)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("cannot start {}", netkernel.display()))?;
        let mut engine = Engine { child, netkernel: netkernel.to_owned(), socket, log, descriptors: 0 };
        let until = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(&engine.socket).is_err() {
            if let Some(status) = engine.child.try_wait()? {
                bail!("`netkernel up` ended ({status}): {}", engine.log_tail());
            }
            if Instant::now() > until {
                bail!("`netkernel up` does not answer: {}", engine.log_tail());
            }
            sleep(Duration::from_millis(5));
        }
        // An answer means that the start is over.
        engine.guests()?;
        engine.descriptors = process::open_descriptors(engine.pid()).unwrap_or(0);
        Ok(engine)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn guests(&self) -> Result<Vec<Guest>> {
        Ok(self.state()?.guests)
    }

    /// The one place that knows what `ps --json` looks like:
    /// `{"engines": [{"guests": [{"id": 1, "name": "curl", "sockets": 0}], "counters": {"violations": 0}}]}`.
    pub fn state(&self) -> Result<State> {
        let text = self.ask("ps")?;
        let value: Value =
            serde_json::from_str(&text).with_context(|| format!("`ps --json` said: {text}"))?;
        let engine = value.pointer("/engines/0").unwrap_or(&value);
        let Some(list) = engine.get("guests").and_then(Value::as_array) else {
            bail!("`ps --json` names no guests: {text}");
        };
        let guests = list
            .iter()
            .map(|guest| {
                let number = |key: &str| {
                    guest.get(key).and_then(Value::as_u64).with_context(|| format!("no `{key}` in {guest}"))
                };
                let name = guest.get("name").and_then(Value::as_str).unwrap_or("?").to_owned();
                Ok(Guest { id: number("id")?, name, sockets: number("sockets")? })
            })
            .collect::<Result<_>>()?;
        let violations = engine.pointer("/counters/violations").and_then(Value::as_u64).unwrap_or(0);
        Ok(State { guests, violations })
    }

    fn ask(&self, what: &str) -> Result<String> {
        let mut child = Command::new(&self.netkernel)
            .arg(what)
            .arg("--socket")
            .arg(&self.socket)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        // The answer is smaller than a pipe: it cannot block before its end.
        let until = Instant::now() + Duration::from_secs(10);
        while child.try_wait()?.is_none() {
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                bail!("`netkernel {what}` hangs");
            }
            sleep(Duration::from_millis(2));
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("`netkernel {what}`: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// After the end of all guests: no socket and no descriptor may be left.
    pub fn check_empty(&mut self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(8);
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("the engine died ({status})");
            }
            let State { guests, violations } = self.state()?;
            if violations > 0 {
                bail!("the engine counts {violations} violations of the protocol");
            }
            let sockets: u64 = guests.iter().map(|g| g.sockets).sum();
            let descriptors = process::open_descriptors(self.pid()).unwrap_or(0);
            let room = self.descriptors + IDLE_CONTROL + WITH_FIRST_AGENT;
            if guests.is_empty() && descriptors <= room {
                return Ok(());
            }
            if Instant::now() > until {
                if sockets > 0 {
                    bail!("the engine still holds {sockets} sockets of ended guests: {guests:?}");
                }
                if !guests.is_empty() {
                    bail!("the engine still has ended guests: {guests:?}");
                }
                bail!(
                    "the engine has {descriptors} descriptors, {} before the first guest",
                    self.descriptors
                );
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Asks it to end, and sees it end.
    pub fn stop(&mut self) -> Result<()> {
        process::signal(self.pid(), Signal::TERM);
        match self.wait(Duration::from_secs(8))? {
            Some(status) if status.success() => {}
            Some(status) => bail!("the engine ended with {status} when asked to end: {}", self.log_tail()),
            None => bail!("the engine does not end when asked to"),
        }
        if self.socket.exists() {
            bail!("the engine left its socket in the file system");
        }
        Ok(())
    }

    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(Some(status)),
                None if Instant::now() > until => return Ok(None),
                None => sleep(Duration::from_millis(5)),
            }
        }
    }

    pub fn log_tail(&self) -> String {
        crate::cmd::tail(&fs::read(&self.log).unwrap_or_default(), 15)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
