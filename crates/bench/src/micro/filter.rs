//! What the agent's filter costs a system call that it lets pass: all that direct attachment adds to the data path.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow};
use netkernel_agent::filter::{self, Watch};

use super::{Case, Limits, Row};
use crate::report::Outcome;

pub struct Filter {
    rows: Vec<Row>,
    count: u32,
}

impl Filter {
    pub fn new(quick: bool) -> Filter {
        let row =
            Row::new("filter", "a system call that does nothing, behind the filter", "ns", Limits::default());
        Filter { rows: vec![row], count: if quick { 20_000 } else { 200_000 } }
    }
}

impl Case for Filter {
    fn about(&self) -> &'static str {
        "filter"
    }

    fn rows(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    fn measure(&mut self, _: u32) -> Result<()> {
        let [row] = &mut self.rows[..] else { return Ok(()) };
        let count = self.count;
        // A filter is its thread's, and for good.
        let measured = thread::spawn(move || {
            let plain = call_ns(count);
            filter::install(Watch::Direct).map(|_listener| [plain, call_ns(count)])
        });
        match measured.join().map_err(|_| anyhow!("the thread with the filter ended"))? {
            Ok([plain, ours]) => {
                row.plain.push(plain);
                row.ours.push(ours);
            }
            Err(error) => row.outcome = Outcome::NotRun(format!("not run: no filter can be put on: {error}")),
        }
        Ok(())
    }
}

/// Nanoseconds of one getppid(2).
fn call_ns(count: u32) -> f64 {
    let began = Instant::now();
    for _ in 0..count {
        black_box(std::os::unix::process::parent_id());
    }
    began.elapsed().as_nanos() as f64 / f64::from(count)
}
