//! What all benchmarks share: where they run, the engine, ports, and how each side's programs are started.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::process::{self, Process};
use crate::sys;

/// How long a server may take until it listens, and the engine until it answers.
const START: Duration = Duration::from_secs(20);

/// Which of the two things that are compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// A: on the plain kernel.
    Native,
    /// B: as a guest of NetKernel.
    Netkernel,
}

/// Where the programs run. The scheduler's placement of three busy threads on two cores is a matter of chance, and decides
/// more than anything that is measured; so each side gets the same cores by default.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// What is measured (the program, and its engine) has one core, its peer another.
    Split,
    /// Wherever the scheduler puts them.
    Free,
}

/// How guests are attached: `netkernel run --attach`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    Queued,
    Direct,
    Relay,
}

impl Attach {
    pub fn name(self) -> &'static str {
        match self {
            Attach::Queued => "queued",
            Attach::Direct => "direct",
            Attach::Relay => "relay",
        }
    }
}

/// What a program is in a measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It is what is measured, natively or as a guest, or its engine.
    Measured,
    /// Its peer, always on the plain kernel.
    Peer,
}

/// The choices of the command line that the benchmarks need.
#[derive(Clone)]
pub struct Settings {
    pub netkernel: PathBuf,
    pub stack: String,
    pub seconds: f64,
    pub connections: usize,
    pub placement: Placement,
    pub attach: Attach,
    pub quick: bool,
    /// How this program is asked for one of its hidden helpers.
    pub helper: Vec<String>,
}

/// How the measured programs are kept apart from the rest of the machine.
#[derive(Clone, Serialize)]
pub struct Surroundings {
    /// In a network namespace of their own, or the reason why not.
    pub network_namespace: String,
    /// The congestion control that native servers inherit and native clients ask for.
    pub native_congestion_control: String,
    /// What clients use that ask for none.
    pub default_congestion_control: String,
    pub placement: Placement,
    pub warnings: Vec<String>,
}

// The order of the fields is the order of their ends: the namespace is left last.
pub struct Session {
    pub settings: Settings,
    pub surroundings: Surroundings,
    /// What came to light while measuring.
    pub warnings: RefCell<Vec<String>>,
    /// Why what was measured as a guest was none.
    pub unserved: RefCell<Option<String>>,
    /// The cores of what is measured and of its peer.
    cores: Option<[usize; 2]>,
    directory: tempfile::TempDir,
    next_port: AtomicU16,
    _netns: Option<sys::PrivateNetns>,
}

impl Session {
    pub fn begin(settings: Settings) -> Result<Session> {
        sys::note_interrupts();
        sys::become_subreaper().context("cannot adopt orphans")?;
        let directory =
            tempfile::Builder::new().prefix("nkbench-").tempdir().context("no temporary directory")?;
        let mut warnings = Vec::new();
        let netns = sys::PrivateNetns::enter();
        let network_namespace = match &netns {
            Ok(_) => {
                // Servers stand below this, so that no client's port is ever in their way.
                if let Err(error) = fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10240 65000") {
                    warnings.push(format!("the range of client ports stays as it is: {error}"));
                }
                "private".to_owned()
            }
            Err(error) => {
                warnings.push(format!("no network namespace of its own ({error}): measured in the host's"));
                format!("host ({error})")
            }
        };
        // Guests that are joined in memory have none; TCP is at its fastest with this one.
        let wanted = if settings.stack == "shm" { "cubic" } else { settings.stack.as_str() };
        let default = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
        let default = default.trim().to_owned();
        let available =
            fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap_or_default();
        let native_congestion_control = if available.split_whitespace().any(|name| name == wanted) {
            wanted.to_owned()
        } else {
            default.clone()
        };
        if native_congestion_control != wanted {
            warnings.push(format!(
                "{wanted} is no congestion control of this kernel: the native side uses {native_congestion_control}, \
                 and the figures are not one to one"
            ));
        }
        let cores = match settings.placement {
            Placement::Free => None,
            Placement::Split => sys::two_cores(),
        };
        if settings.placement == Placement::Split && cores.is_none() {
            warnings.push("one core only: what is measured and its peer share it".to_owned());
        }
        let surroundings = Surroundings {
            network_namespace,
            native_congestion_control,
            default_congestion_control: default,
            placement: if cores.is_some() { Placement::Split } else { Placement::Free },
            warnings,
        };
        let next_port = AtomicU16::new(5200);
        Ok(Session {
            settings,
            surroundings,
            warnings: RefCell::default(),
            unserved: RefCell::default(),
            cores,
            directory,
            next_port,
            _netns: netns.ok(),
        })
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A new empty directory.
    pub fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let made = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(self.directory())?;
        Ok(made.keep())
    }

    /// A port that nobody listens on.
    pub fn port(&self) -> Result<u16> {
        for _ in 0..1000 {
            let port = self.next_port.fetch_add(1, Ordering::Relaxed);
            if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return Ok(port);
            }
        }
        bail!("no free port")
    }

    pub fn engine(&self) -> Result<Engine> {
        Engine::start(self, None)
    }

    /// One with a configuration file.
    pub fn engine_with(&self, config: &Path) -> Result<Engine> {
        Engine::start(self, Some(config))
    }

    /// The cores of what is measured and of its peer, if they have some of their own.
    pub fn cores(&self) -> Option<[usize; 2]> {
        self.cores
    }

    /// Starts a program on the core of its role.
    pub fn spawn(&self, name: &str, role: Role, command: Command) -> Result<Process> {
        self.start(name, command, role)
    }

    /// The same with pipes.
    pub fn spawn_piped(&self, name: &str, role: Role, mut command: Command) -> Result<Process> {
        if let Some([measured, peer]) = self.cores {
            sys::keep_on(&mut command, if role == Role::Measured { measured } else { peer });
        }
        Process::start_piped(name, command, self.directory())
    }

    /// `program` on one side; the netkernel side needs an engine.
    pub fn command(&self, side: Side, engine: Option<&Engine>, program: impl AsRef<OsStr>) -> Command {
        match (side, engine) {
            (Side::Netkernel, Some(engine)) => self.guest(engine, &self.settings.stack, program),
            _ => Command::new(program),
        }
    }

    /// `program` as a guest of one of the engine's stacks.
    pub fn guest(&self, engine: &Engine, stack: &str, program: impl AsRef<OsStr>) -> Command {
        self.guest_by(self.settings.attach, engine, stack, program)
    }

    /// The same, attached as said.
    pub fn guest_by(
        &self,
        attach: Attach,
        engine: &Engine,
        stack: &str,
        program: impl AsRef<OsStr>,
    ) -> Command {
        let mut command = Command::new(&self.settings.netkernel);
        command.args(["run", "--attach", attach.name()]);
        command.args(["--stack", stack, "--socket"]).arg(&engine.socket);
        command.arg("--").arg(program);
        command
    }

    /// Starts `command` on the core of its role.
    fn start(&self, name: &str, mut command: Command, role: Role) -> Result<Process> {
        if let Some([measured, peer]) = self.cores {
            sys::keep_on(&mut command, if role == Role::Measured { measured } else { peer });
        }
        Process::start(name, command, self.directory())
    }

    /// Starts a server and waits until something listens on `port`.
    /// A guest's must be the engine's.
    pub fn server(
        &self,
        name: &str,
        role: Role,
        engine: Option<&Engine>,
        command: Command,
        port: u16,
    ) -> Result<Process> {
        let mut server = self.start(name, command, role)?;
        let end = Instant::now() + START;
        let inode = loop {
            if let Some(inode) = listener(port) {
                break inode;
            }
            if Instant::now() > end {
                bail!("{name} does not listen on port {port} after {} s", START.as_secs());
            }
            server.still_runs(Duration::from_millis(10))?;
        };
        if let Some(engine) = engine {
            self.check_served(name, engine, &server, Some(inode));
        }
        Ok(server)
    }

    /// A guest that the engine does not serve runs at native speed and would keep every promise: that is no result.
    fn check_served(&self, name: &str, engine: &Engine, program: &Process, socket: Option<u64>) {
        let reason = match self.settings.attach {
            Attach::Queued | Attach::Relay if !socket.is_some_and(|inode| engine.process.holds(inode)) => {
                "its socket is not the engine's"
            }
            Attach::Direct if !program.is_filtered() => "it has no seccomp filter",
            _ => return,
        };
        self.unserved.replace(Some(format!("not served: {name}: {reason}")));
    }

    /// Runs a guest client of a native server on `port` to its end.
    pub fn guest_client(
        &self,
        name: &str,
        engine: &Engine,
        command: Command,
        port: u16,
        limit: Duration,
    ) -> Result<(String, sys::Exit)> {
        let mut client = self.start(name, command, Role::Measured)?;
        let end = Instant::now() + START;
        let mut socket = connection(port);
        while socket.is_none() && Instant::now() < end && client.still_runs(Duration::from_millis(5)).is_ok()
        {
            socket = connection(port);
        }
        self.check_served(name, engine, &client, socket);
        client.finish(limit)
    }

    /// Starts a native server whose connections use the same congestion control as the guests'. The host's default may be
    /// another one, and making this one a namespace's default takes a setting of the whole machine.
    pub fn native_server(&self, name: &str, command: Command, port: u16) -> Result<Process> {
        let server = self.server(name, Role::Measured, None, command, port)?;
        let inode = listener(port).context("a listener went away")?;
        let wanted = &self.surroundings.native_congestion_control;
        if let Err(error) = server.set_congestion(inode, wanted) {
            let default = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
            self.warnings.borrow_mut().push(format!(
                "the native {name} keeps {} instead of {wanted}, its figures are not one to one: {error:#}",
                default.trim()
            ));
        }
        Ok(server)
    }

    /// Runs a client of the plain kernel to its end and returns what it printed.
    pub fn client(
        &self,
        name: &str,
        role: Role,
        command: Command,
        limit: Duration,
    ) -> Result<(String, sys::Exit)> {
        self.start(name, command, role)?.finish(limit)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        process::end_orphans();
    }
}

/// A long-lived engine.
pub struct Engine {
    pub process: Process,
    pub socket: PathBuf,
}

impl Engine {
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn start(session: &Session, config: Option<&Path>) -> Result<Engine> {
        let socket = session.subdirectory("engine")?.join("engine.sock");
        let mut command = Command::new(&session.settings.netkernel);
        command.args(["up", "--socket"]).arg(&socket);
        if let Some(config) = config {
            command.arg("--config").arg(config);
        }
        let mut process = session.start("engine", command, Role::Measured)?;
        let end = Instant::now() + START;
        while !answers(&socket) {
            if Instant::now() > end {
                bail!("the engine does not answer after {} s", START.as_secs());
            }
            process.still_runs(Duration::from_millis(10))?;
        }
        Ok(Engine { process, socket })
    }
}

fn answers(socket: &Path) -> bool {
    match fs::metadata(socket) {
        Ok(data) if data.file_type().is_socket() => UnixStream::connect(socket).is_ok(),
        other => other.is_ok(),
    }
}

/// The inode of the TCP socket that listens on `port` in this thread's network namespace. Looking does not disturb the
/// server, as a connection would.
fn listener(port: u16) -> Option<u64> {
    find_socket(|socket| socket.state == LISTEN && socket.local == port)
}

/// The inode of a socket connected to `port`.
fn connection(port: u16) -> Option<u64> {
    find_socket(|socket| socket.state == ESTABLISHED && socket.remote == port)
}

fn find_socket(wanted: impl Fn(&Socket) -> bool) -> Option<u64> {
    ["tcp", "tcp6"].iter().find_map(|table| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok()?;
        text.lines().filter_map(Socket::parse).find(&wanted).map(|socket| socket.inode)
    })
}

const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// A line of the kernel's table of sockets.
#[derive(PartialEq, Debug)]
struct Socket {
    local: u16,
    remote: u16,
    state: u8,
    inode: u64,
}

impl Socket {
    fn parse(line: &str) -> Option<Socket> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = |field: usize| u16::from_str_radix(fields.get(field)?.rsplit(':').next()?, 16).ok();
        Some(Socket {
            local: port(1)?,
            remote: port(2)?,
            state: u8::from_str_radix(fields.get(3)?, 16).ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    }
}

/// Where a program of this name is, as a shell would find it; servers' directories are looked into also.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = std::env::split_paths(&path);
    // A system's own interpreter before a version manager's wrapper of it.
    let first = if name == "python3" { Some(PathBuf::from("/usr/bin")) } else { None };
    let more = ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from);
    first.into_iter().chain(own).chain(more).map(|directory| directory.join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_of_sockets() {
        let line = "   0: 0100007F:1450 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0";
        let socket = Socket { local: 0x1450, remote: 0, state: LISTEN, inode: 4711 };
        assert_eq!(Socket::parse(line), Some(socket));
        assert_eq!(
            Socket::parse("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt"),
            None
        );
    }
}
