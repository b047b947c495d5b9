//! The command line, from which help, man page and completions are made.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::logger::Levels;

const EXIT_CODES: &str = "Exit codes: the program's own with `run`; 125 netkernel itself failed, 126 the program cannot be \
executed, 127 the program was not found, 2 wrong usage.";

/// Network stack as a service: runs unmodified programs on a network stack of your choice.
#[derive(Debug, Parser)]
#[command(name = "netkernel", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

/// Which engine is asked, as whom.
#[derive(Clone, Debug, Default, Args)]
pub struct RemoteArgs {
    /// Ask the engine at this address over TLS: https://HOST[:PORT]
    #[arg(
        long,
        value_name = "URL",
        global = true,
        env = "NETKERNEL_HOST",
        help_heading = "Which engine, and as whom"
    )]
    pub host: Option<String>,
    /// Show the token in this file, a tenant's or the provider's
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        env = "NETKERNEL_TOKEN_FILE",
        help_heading = "Which engine, and as whom"
    )]
    pub token_file: Option<PathBuf>,
    /// Trust the certificates in this file (PEM) instead of the host's
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        requires = "host",
        help_heading = "Which engine, and as whom"
    )]
    pub ca_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run an engine until SIGTERM or SIGINT
    Up(UpArgs),
    /// Run a program on a network stack
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// List the stacks that the engine offers
    Stacks(ShowArgs),
    /// List the guests of the engine
    Ps(ShowArgs),
    /// List the sockets of guests
    Sockets(SocketsArgs),
    /// List sockets as ss(8) does, of all stacks and attachments
    ///
    /// Without -l or -a: what is connected. Options are those of ss where they make sense.
    Ss(SsArgs),
    /// Watch tenants, stacks, guests, sockets and latencies live
    Top(TopArgs),
    /// Capture what a tenant, or a guest, sends and receives, as pcapng
    ///
    /// Of its guests only, whatever stack serves them. Headers are synthetic: packets are made from what guests and stacks
    /// exchange, but for direct sockets, whose packets are the kernel's (by eBPF: the engine must be root). Connections that two guests
    /// moved in memory already when the capture began are not seen; later ones go through the engine. What is not seen is said
    /// on standard error.
    Pcap(PcapArgs),
    /// Say of each socket of the guests by which stack it is served, in which way, and why
    Explain(ExplainArgs),
    /// List the stacks with what they can carry and what they cost
    Catalog(ShowArgs),
    /// List the tenants, their limits, and what they use
    Tenants(ShowArgs),
    /// Change a tenant's limits, also for its connections of now
    Tenant(TenantArgs),
    /// Make the engine read its configuration again
    Reload(ReloadArgs),
    /// Exchange the engine's program for another one, or start it anew, under its guests
    Restart(RestartArgs),
    /// Print what was used, and what it costs
    Usage(UsageArgs),
    /// Do something with a running guest
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Exchange network stack modules under their guests
    #[command(subcommand)]
    Nsm(NsmCommand),
    /// End the engine; its guests' connections are reset
    Stop(StopArgs),
    /// Say what this host offers, and whether a program can be served
    Doctor(DoctorArgs),
    /// Measure programs under NetKernel against the plain kernel
    Bench(netkernel_bench::BenchArgs),
    /// Print a completion script
    Completions(CompletionsArgs),
    /// Print a man page (troff), or write all of them
    Man(ManArgs),
    #[command(hide = true)]
    PrivateEngine(PrivateEngineArgs),
    #[command(hide = true)]
    NsmProcess(NsmProcessArgs),
    #[command(hide = true)]
    Heir(HeirArgs),
}

#[derive(Debug, Args)]
pub struct UpArgs {
    /// Configuration (TOML); docs/netkernel.example.toml explains each key. Without it: built-in defaults
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where to listen
    ///
    /// Default: /run/netkernel/engine.sock for root, else $XDG_RUNTIME_DIR/netkernel.sock, else
    /// /tmp/netkernel-UID/engine.sock.
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Stay in the foreground (there is no other mode yet)
    #[arg(long)]
    pub foreground: bool,
    /// Write the socket's path and a newline to this descriptor when ready, then close it
    #[arg(long, value_name = "N")]
    pub ready_fd: Option<i32>,
    /// Only check the configuration
    #[arg(long)]
    pub check: bool,
    /// Only say whether this program understands what another one leaves (`netkernel restart` asks)
    #[arg(long, hide = true)]
    pub check_handover: Option<String>,
    /// Print what --check found, or where the engine listens, as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
}

/// What is logged to standard error, and how.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// What to log: off, error, warn, info, debug or trace; more for parts of the program as in info,netkernel_agent=debug
    /// [default: info]
    #[arg(long, value_name = "LEVEL", env = "NETKERNEL_LOG")]
    pub log_level: Option<Levels>,
    /// text: a line for each record; json: an object with time, level, target, pid, message and fields on each line
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        env = "NETKERNEL_LOG_FORMAT",
        default_value = "text",
        ignore_case = true
    )]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Network stack, by the name that `netkernel stacks` lists [default: the engine's first]
    #[arg(long, value_name = "NAME")]
    pub stack: Option<String>,
    /// Socket of the engine to use
    ///
    /// Default: $NETKERNEL_SOCKET_PATH; else the first that answers of $XDG_RUNTIME_DIR/netkernel.sock,
    /// /tmp/netkernel-UID/engine.sock, /run/netkernel/engine.sock; else a private engine is started.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Show the token in this file to be known as a tenant's guest
    #[arg(long, value_name = "FILE", env = "NETKERNEL_TENANT_TOKEN_FILE")]
    pub tenant_token: Option<PathBuf>,
    /// Name of the guest [default: the program's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Start an engine of its own for this program, even if another one runs; it ends with its guest
    #[arg(long, conflicts_with = "socket")]
    pub private: bool,
    /// Print what is not served and why (`--trace=2`: every socket call), and the private engine's log
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          value_parser = clap::value_parser!(u32).range(0..=2))]
    pub trace: Option<u32>,
    /// How the program's sockets are attached to the stack
    ///
    /// queued: a preloaded library and the engine's queues. direct: a seccomp filter, and sockets of the host's kernel that
    /// the engine makes (in the stack's network namespace, with its congestion control) and gives to the program: native
    /// speed, any program. relay: the same filter, and Unix sockets between which and the stack the engine moves the bytes:
    /// any program, any stack. auto: queued for programs that a library can be preloaded to, with the filter behind it for what
    /// the library does not see; for all others direct, or relay if the stack is not the kernel's.
    /// [default: what the stack's configuration says, else auto]
    #[arg(long, value_enum, value_name = "HOW")]
    pub attach: Option<Attach>,
    /// Refuse what cannot be served: programs, and sockets (the default)
    #[arg(long, conflicts_with = "fail_open")]
    pub fail_closed: bool,
    /// Let what cannot be served use the kernel's own stack, with a warning, instead of refusing
    #[arg(long)]
    pub fail_open: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM [ARGS]")]
    pub program: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attach {
    Auto,
    Queued,
    Direct,
    Relay,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Socket of the engine to ask
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Only the guest that this process belongs to
    pub pid: Option<u32>,
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Socket of the engine to ask
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SocketsArgs {
    #[command(flatten)]
    pub show: ShowArgs,
    /// Only this guest (id as in `netkernel ps`)
    pub guest: Option<u32>,
}

#[derive(Debug, Args)]
pub struct SsArgs {
    #[command(flatten)]
    pub show: ShowArgs,
    /// TCP sockets
    #[arg(short, long)]
    pub tcp: bool,
    /// UDP sockets
    #[arg(short, long)]
    pub udp: bool,
    /// Only sockets that listen
    #[arg(short, long)]
    pub listening: bool,
    /// Sockets that listen, and those that are connected
    #[arg(short, long)]
    pub all: bool,
    /// Do not turn ports into names of services
    #[arg(short, long)]
    pub numeric: bool,
    /// Show which processes hold the sockets
    #[arg(short, long)]
    pub processes: bool,
    /// Show what TCP knows of the connection, as far as its stack tells
    #[arg(short, long)]
    pub info: bool,
    /// No line of heads
    #[arg(short = 'H', long)]
    pub no_header: bool,
    /// Only sockets of this tenant
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// Only sockets of this stack, by the name that `netkernel stacks` lists
    #[arg(long, value_name = "NAME")]
    pub nsm: Option<String>,
    /// Only sockets with this port, local or the peer's
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Only sockets in this state: established, listening, close-wait, ...; may be given more than once
    #[arg(long, value_name = "STATE")]
    pub state: Vec<String>,
}

#[derive(Debug, Args)]
pub struct TopArgs {
    /// Socket of the engine to ask
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Look twice, print what came between, and end
    #[arg(long)]
    pub once: bool,
    /// As --once, everything as JSON
    #[arg(long)]
    pub json: bool,
    /// Between two looks
    #[arg(long, short = 'd', value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// What to show first
    #[arg(long, value_enum, value_name = "VIEW", default_value = "guests")]
    pub view: TopView,
}

impl TopArgs {
    pub fn show(&self) -> ShowArgs {
        ShowArgs { socket: self.socket.clone(), json: self.json }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TopView {
    Tenants,
    Stacks,
    Guests,
    Sockets,
    Latency,
}

#[derive(Debug, Args)]
pub struct PcapArgs {
    /// Socket of the engine to ask
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Where to write to; -: standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub write: PathBuf,
    /// Bytes to keep of each packet, at most [default: all]
    #[arg(short, long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(64..=262_144))]
    pub snaplen: Option<u32>,
    /// A tenant's name, or a guest (its number, as in `netkernel ps`)
    #[arg(value_name = "TENANT|GUEST")]
    pub target: String,
}

#[derive(Debug, Args)]
pub struct TenantArgs {
    #[command(subcommand)]
    pub command: TenantCommand,
}

#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Set limits: rates such as "500 Mbit/s", or "none"
    Set(TenantSetArgs),
}

#[derive(Debug, Args)]
pub struct TenantSetArgs {
    /// Socket of the engine
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    #[arg(long, value_name = "RATE")]
    pub guaranteed_send: Option<String>,
    #[arg(long, value_name = "RATE")]
    pub max_send: Option<String>,
    #[arg(long, value_name = "RATE")]
    pub guaranteed_receive: Option<String>,
    #[arg(long, value_name = "RATE")]
    pub max_receive: Option<String>,
    /// Queue elements per second; 0: none
    #[arg(long, value_name = "N")]
    pub guaranteed_operations: Option<u64>,
    /// Queue elements per second; 0: no limit
    #[arg(long, value_name = "N")]
    pub max_operations: Option<u64>,
    /// At a time; 0: none
    #[arg(long, value_name = "N")]
    pub guaranteed_connections: Option<u64>,
    /// At a time; 0: no limit
    #[arg(long, value_name = "N")]
    pub max_connections: Option<u64>,
    /// At a time; 0: no limit
    #[arg(long, value_name = "N")]
    pub max_guests: Option<u64>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub weight: Option<u32>,
    /// Print the tenant as it is then, as JSON
    #[arg(long)]
    pub json: bool,
    /// The tenant
    pub name: String,
}

#[derive(Debug, Args)]
pub struct ReloadArgs {
    /// Socket of the engine
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Print which engine did, as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct RestartArgs {
    /// Socket of the engine
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// The program to go on with [default: what is now where the engine was started from]
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// Go on although some guests have sockets that cannot: these sockets are reset, the guests and their other sockets go on
    #[arg(long)]
    pub lose: bool,
    /// Print how long guests waited, as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct UsageArgs {
    /// Socket of the engine to ask
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// From when on: 2026-11-01, 2026-11-01T12:00Z, or an age such as 2h or 30d
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Until when, in the same forms [default: now]
    #[arg(long, value_name = "TIME")]
    pub to: Option<String>,
    /// What to tell apart: tenant, nsm, guest, and one of minute, hour, day
    #[arg(long, value_name = "LIST", default_value = "tenant,nsm")]
    pub by: String,
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "table")]
    pub format: UsageFormat,
    /// As --format json
    #[arg(long, conflicts_with = "format")]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UsageFormat {
    Table,
    Json,
    Csv,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Socket of the engine to end
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// End only this guest (id as in `netkernel ps`), not the engine
    #[arg(long, value_name = "ID")]
    pub guest: Option<u32>,
    /// Print what was ended, as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Socket of the engine to look for
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Say whether this program can be served, and how
    #[arg(last = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// For which shell
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write all pages to this directory, such as /usr/local/share/man/man1
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub dir: Option<PathBuf>,
    /// The page of this command, such as `bench micro`
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct PrivateEngineArgs {
    #[arg(long)]
    pub socket: PathBuf,
    /// Where to say "ok" or what went wrong.
    #[arg(long)]
    pub handshake_fd: i32,
    /// Keep standard error for the log.
    #[arg(long)]
    pub log: bool,
}

#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Put a running guest on another stack: new sockets are opened there, open ones go over, and those that cannot stay where
    /// they are until they end
    ///
    /// If one of the two stacks is a process of its own (form = "process"), all sockets go over but those that the kernel gave to the
    /// programs themselves (attachment direct), or none does and the guest stays.
    Move(GuestMoveArgs),
}

#[derive(Debug, Args)]
pub struct GuestMoveArgs {
    /// Socket of the engine
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Change nothing if an open socket would have to stay where it is
    #[arg(long)]
    pub all_or_nothing: bool,
    /// The guest, by the number that `netkernel ps` lists
    pub guest: u32,
    /// The stack, by the name that `netkernel stacks` lists
    pub stack: String,
}

#[derive(Debug, Subcommand)]
pub enum NsmCommand {
    /// Exchange the process of a stack (form = "process") for a new one; its guests' sockets go on
    Restart(NsmRestartArgs),
    /// Exchange it for a process of another program or configuration, until the engine ends; on error nothing changes
    Swap(NsmSwapArgs),
}

#[derive(Debug, Args)]
pub struct NsmSwapArgs {
    /// Socket of the engine
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// A netkernel program to go on with, such as a newer version; without it the engine's own, which may be a newer file by now
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// For all TCP sockets, open ones too
    #[arg(long, value_name = "NAME")]
    pub congestion_control: Option<String>,
    /// What becomes of a program's own choice of one
    #[arg(long, value_name = "POLICY", value_parser = ["allow", "ignore", "refuse"])]
    pub congestion_policy: Option<String>,
    /// Most that each TCP socket sends, or "none"
    #[arg(long, value_name = "RATE")]
    pub pacing: Option<String>,
    /// SO_MARK of each socket; 0: none
    #[arg(long, value_name = "N")]
    pub mark: Option<u32>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The stack, by the name that `netkernel stacks` lists
    pub name: String,
}

#[derive(Debug, Args)]
pub struct NsmRestartArgs {
    /// Socket of the engine
    #[arg(long, value_name = "PATH", env = "NETKERNEL_SOCKET_PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The stack, by the name that `netkernel stacks` lists
    pub name: String,
}

#[derive(Debug, Args)]
pub struct HeirArgs {
    /// The engine is at its other end.
    #[arg(long)]
    pub control_fd: i32,
}

#[derive(Debug, Args)]
pub struct NsmProcessArgs {
    /// The engine is at its other end.
    #[arg(long)]
    pub control_fd: i32,
    /// For people that look at the list of processes.
    pub name: String,
}
