//! `netkernel bench micro`: the published microbenchmarks, with the project's own rings and regions, on this machine.
//!
//! Chunks: a random chunk of a pool is read and copied, between GuestLib's and ServiceLib's mapping of one region, beside a
//! plain memcpy of the same pattern. Elements: what it costs to push, switch, and pop them by batches. Doorbells: rung and
//! suppressed. The agent's filter: what each system call pays for it. Rounds go over all cases by turns; what is quoted are medians.

mod bells;
mod chunks;
mod elements;
mod filter;
mod plot;
mod table;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::machine::Machine;
use crate::output::{self, Output};
use crate::progress::Progress;
use crate::report::{Outcome, Summary, Verdict};
use crate::sys;

/// Measure what single steps cost: chunks of memory, queue elements, doorbells.
#[derive(Args, Debug)]
pub struct MicroArgs {
    /// How often each case is measured [default: 15, with --quick 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,

    /// The pool that chunks are taken from, MiB; twice as much memory is needed. The published system's has 256
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=16384))]
    pub pool: u32,

    #[command(flatten)]
    pub output: Output,
}

/// What a row has to be. All that is there must hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Limits {
    /// At most this many times the plain memcpy.
    pub ratio_at_most: Option<f64>,
    /// Nanoseconds of the published system: ours must be less.
    pub published_ns: Option<f64>,
    pub at_least: Option<f64>,
}

/// One case with its raw series.
#[derive(Debug)]
pub(crate) struct Row {
    pub id: String,
    pub title: String,
    pub unit: &'static str,
    /// The plain memcpy of the same pattern, or the call without a filter.
    pub plain: Vec<f64>,
    pub ours: Vec<f64>,
    pub limits: Limits,
    pub outcome: Outcome,
}

impl Row {
    fn new(id: impl Into<String>, title: impl Into<String>, unit: &'static str, limits: Limits) -> Row {
        let (plain, ours) = (Vec::new(), Vec::new());
        Row { id: id.into(), title: title.into(), unit, plain, ours, limits, outcome: Outcome::Measured }
    }

    pub fn median(&self) -> Option<f64> {
        Summary::of(&self.ours).map(|summary| summary.median)
    }

    pub fn ratio(&self) -> Option<f64> {
        Some(self.median()? / Summary::of(&self.plain)?.median)
    }

    /// A plain memcpy of the same pattern is slower than what was published, and ours is near it: the machine's limit.
    pub fn memory_is_slower(&self) -> bool {
        let Limits { ratio_at_most: Some(most), published_ns: Some(published), .. } = self.limits else {
            return false;
        };
        let plain = Summary::of(&self.plain).map(|summary| summary.median);
        plain.is_some_and(|plain| plain >= published) && self.ratio().is_some_and(|ratio| ratio <= most)
    }

    pub fn verdict(&self) -> Verdict {
        let Limits { ratio_at_most, published_ns, at_least } = self.limits;
        if self.outcome != Outcome::Measured {
            return Verdict::Unknown;
        }
        if self.limits == Limits::default() {
            return Verdict::Told;
        }
        let Some(median) = self.median() else { return Verdict::Unknown };
        let kept = ratio_at_most.is_none_or(|most| self.ratio().is_some_and(|ratio| ratio <= most))
            && published_ns.is_none_or(|published| median < published)
            && at_least.is_none_or(|least| median >= least);
        if kept { Verdict::Pass } else { Verdict::FallsShort }
    }
}

/// Rows that are measured together.
pub(crate) trait Case {
    /// In a word or two.
    fn about(&self) -> &'static str;

    fn rows(&mut self) -> &mut [Row];

    /// Adds one value to each series.
    fn measure(&mut self, round: u32) -> Result<()>;
}

pub(crate) struct Results {
    pub machine: Machine,
    pub rounds: u32,
    pub pool_mib: u32,
    pub rows: Vec<Row>,
}

pub fn run(args: MicroArgs) -> Result<()> {
    args.output.try_files()?;
    sys::note_interrupts();
    let rounds = args.rounds.unwrap_or(if args.output.quick { 3 } else { 15 });
    let program = std::env::current_exe().context("this program's own file")?;
    let machine = Machine::look(&program);
    let cores = sys::two_cores();
    if let Some([core, _]) = cores {
        sys::stay_on(core).context("cannot stay on one core")?;
    }
    let mut cases: Vec<Box<dyn Case>> = chunks::cases(args.pool, args.output.quick)?;
    cases.push(Box::new(elements::Elements::new(args.output.quick)?));
    if let Some([_, other]) = cores {
        cases.push(Box::new(elements::Across::new(other, args.output.quick)?));
    }
    cases.push(Box::new(bells::Bells::new(cores.map(|[_, other]| other), args.output.quick)?));
    cases.push(Box::new(filter::Filter::new(args.output.quick)));
    let progress = Progress::new(u64::from(rounds) * cases.len() as u64, args.output.quiet);
    for round in 0..rounds {
        for case in &mut cases {
            progress.start(case.about());
            case.measure(round)?;
            progress.step(1);
            if sys::interrupted() {
                bail!("interrupted");
            }
        }
    }
    drop(progress);
    let rows = cases.iter_mut().flat_map(|case| take(case.rows())).collect();
    let results = Results { machine, rounds, pool_mib: args.pool, rows };
    args.output.deliver(&results)
}

impl output::Results for Results {
    fn table(&self) -> String {
        table::table(self)
    }

    fn json(&self) -> serde_json::Value {
        table::json(self)
    }

    fn svg(&self) -> String {
        plot::svg(self)
    }

    fn all_kept(&self) -> bool {
        self.rows.iter().all(|row| matches!(row.verdict(), Verdict::Pass | Verdict::Told))
    }
}

fn take(rows: &mut [Row]) -> Vec<Row> {
    let nothing = || Row::new("", "", "", Limits::default());
    rows.iter_mut().map(|row| std::mem::replace(row, nothing())).collect()
}

/// Repeatable random numbers, the same for both sides of a comparison.
#[derive(Clone, Copy)]
pub(crate) struct Random(pub u64);

impl Random {
    #[inline]
    pub fn next(&mut self) -> u32 {
        // A linear congruence: one multiplication, so that the pattern costs next to nothing beside a copy.
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    /// Below `count`, which is small.
    pub fn below(&mut self, count: usize) -> usize {
        self.next() as usize % count.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(limits: Limits, plain: &[f64], ours: &[f64]) -> Row {
        Row { plain: plain.to_vec(), ours: ours.to_vec(), ..Row::new("x", "x", "ns", limits) }
    }

    #[test]
    fn every_limit_must_hold() {
        let limits = Limits { ratio_at_most: Some(1.3), published_ns: Some(8.0), at_least: None };
        assert_eq!(row(limits, &[5.0], &[6.0]).verdict(), Verdict::Pass);
        assert_eq!(row(limits, &[5.0], &[7.0]).verdict(), Verdict::FallsShort);
        assert_eq!(row(limits, &[7.0], &[8.0]).verdict(), Verdict::FallsShort);
        assert_eq!(row(limits, &[], &[8.0]).verdict(), Verdict::FallsShort);
        assert_eq!(row(limits, &[1.0], &[]).verdict(), Verdict::Unknown);
        assert_eq!(row(Limits::default(), &[], &[8.0]).verdict(), Verdict::Told);
        let rate = Limits { at_least: Some(16.0), ..Limits::default() };
        assert_eq!(row(rate, &[], &[15.9, 16.0, 99.0]).verdict(), Verdict::Pass);
        assert_eq!(row(rate, &[], &[15.9]).verdict(), Verdict::FallsShort);
    }

    #[test]
    fn a_case_that_did_not_run_shows_nothing() {
        let mut row = row(Limits { at_least: Some(1.0), ..Limits::default() }, &[], &[2.0]);
        row.outcome = Outcome::NotRun("not run: no huge pages".into());
        assert_eq!(row.verdict(), Verdict::Unknown);
    }
}
