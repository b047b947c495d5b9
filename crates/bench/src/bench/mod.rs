//! The benchmarks: what each measures, what it needs, and what was promised.

mod crowd;
pub(crate) mod forms;
mod idle;
mod iperf3;
pub(crate) mod memory;
mod nginx;
pub(crate) mod redis;
mod two_copies;

use anyhow::Result;
use serde_json::Value;

pub use crowd::{CrowdArgs, crowd};
pub use idle::{idle_client, idle_server};

use crate::process::Process;
use crate::session::{Attach, Engine, Session, Settings, Side};

/// One benchmark: a few figures that are measured together.
pub struct Benchmark {
    pub id: &'static str,
    pub about: String,
    /// Programs that must be installed.
    pub needs: &'static [&'static str],
    pub rows: Vec<Row>,
    /// At most this many rounds, for what is slow and steady.
    pub most_rounds: u32,
    pub start: fn(&Session) -> Result<Box<dyn Live>>,
}

/// One figure.
#[derive(Clone)]
pub struct Row {
    pub id: &'static str,
    pub title: String,
    pub unit: &'static str,
    pub promise: Promise,
}

/// What the figure has to be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Promise {
    /// Under NetKernel at least this many times the native figure.
    RatioAtLeast(f64),
    /// Under NetKernel at most this many times the native figure.
    RatioAtMost(f64),
    /// At most this, whatever it is natively.
    AtMost(f64),
    /// The same in each round.
    AlwaysAtMost(f64),
    /// Nothing is promised.
    None,
}

/// A benchmark whose servers stand.
pub trait Live {
    /// One measurement: a value for each row, NaN where a side has none, and details for the record.
    fn measure(&mut self, session: &Session, side: Side) -> Result<Sample>;
}

pub struct Sample {
    pub values: Vec<f64>,
    pub detail: Value,
    /// What a reader must know to judge the value.
    pub remarks: Vec<String>,
}

impl Sample {
    fn new(values: Vec<f64>, detail: Value) -> Sample {
        Sample { values, detail, remarks: Vec::new() }
    }
}

/// All benchmarks, in the order of the table.
pub fn catalog(settings: &Settings) -> Vec<Benchmark> {
    let mut all = iperf3::benchmarks();
    all.extend(redis::benchmarks());
    all.extend(nginx::benchmarks());
    match settings.attach {
        Attach::Queued => {
            all.extend(idle::benchmarks(settings));
            all.extend(crowd::benchmarks(settings));
        }
        // Idle direct connections are the kernel's, and cost an engine nothing.
        Attach::Direct => {
            for row in all.iter_mut().flat_map(|benchmark| &mut benchmark.rows) {
                row.promise = match (row.id, row.promise) {
                    ("nginx-close", _) => Promise::RatioAtLeast(0.95),
                    ("ab-client", _) => Promise::RatioAtLeast(0.6),
                    (_, Promise::RatioAtLeast(_)) => Promise::RatioAtLeast(0.98),
                    (_, promise) => promise,
                };
            }
        }
        // One more copy and two more threads' wake-ups for the same bytes: what is promised is bulk and pipelines.
        Attach::Relay => {
            for row in all.iter_mut().flat_map(|benchmark| &mut benchmark.rows) {
                row.promise = match row.id {
                    "iperf3-receive" | "iperf3-send" | "nginx-keepalive" => Promise::RatioAtLeast(0.6),
                    "redis-p16" => Promise::RatioAtLeast(0.7),
                    _ => Promise::None,
                };
            }
        }
    }
    all
}

fn row(id: &'static str, title: impl Into<String>, unit: &'static str, promise: Promise) -> Row {
    Row { id, title: title.into(), unit, promise }
}

/// The same server on both sides, each on its own port, idle while the other is measured.
struct Pair {
    engine: Engine,
    native: (Process, u16),
    guest: (Process, u16),
}

impl Pair {
    /// `start` starts the server of one side on a port.
    fn start(
        session: &Session,
        start: impl Fn(&Session, Side, Option<&Engine>, u16) -> Result<Process>,
    ) -> Result<Pair> {
        Pair::start_on(session, session.engine()?, start)
    }

    /// The same with an engine of one's own.
    fn start_on(
        session: &Session,
        engine: Engine,
        start: impl Fn(&Session, Side, Option<&Engine>, u16) -> Result<Process>,
    ) -> Result<Pair> {
        let port = session.port()?;
        let native = (start(session, Side::Native, None, port)?, port);
        let port = session.port()?;
        let guest = (start(session, Side::Netkernel, Some(&engine), port)?, port);
        Ok(Pair { engine, native, guest })
    }

    fn port(&self, side: Side) -> u16 {
        match side {
            Side::Native => self.native.1,
            Side::Netkernel => self.guest.1,
        }
    }

    /// CPU time so far of what serves this side: the server, and under NetKernel the engine.
    fn cpu_s(&self, side: Side) -> f64 {
        match side {
            Side::Native => self.native.0.cpu_s(),
            Side::Netkernel => self.guest.0.cpu_s() + self.engine.process.cpu_s(),
        }
    }
}
