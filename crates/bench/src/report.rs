//! Series, what they come to, and how that is told: as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::bench::{Promise, Row};
use crate::machine::Machine;
use crate::micro::Random;
use crate::session::{Placement, Side, Surroundings};
use crate::{output, plot};

/// The value below which the share `q` of the sorted `values` lies.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    match values.len() {
        0 => f64::NAN,
        count => {
            let place = q * (count - 1) as f64;
            let (low, high) = (place.floor() as usize, place.ceil() as usize);
            values[low] + (values[high] - values[low]) * (place - low as f64)
        }
    }
}

/// Median, least and most.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Summary {
    /// Of the values that are there.
    pub fn of(values: &[f64]) -> Option<Summary> {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        Some(Summary { median: quantile(&sorted, 0.5), min, max })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    Measured,
    NotRun(String),
    Failed(String),
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Verdict {
    Pass,
    FallsShort,
    /// Nothing was promised.
    Told,
    Unknown,
}

impl Verdict {
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::FallsShort => "FALLS SHORT",
            Verdict::Told => "-",
            Verdict::Unknown => "NOT SHOWN",
        }
    }
}

/// Draws of [`Record::interval`].
const RESAMPLES: usize = 2000;

pub struct Detail {
    pub round: u32,
    pub side: Side,
    pub detail: Value,
}

/// One figure with its raw series.
pub struct Record {
    pub row: Row,
    pub native: Vec<f64>,
    pub netkernel: Vec<f64>,
    pub details: Vec<Detail>,
    pub remarks: Vec<String>,
    pub outcome: Outcome,
}

impl Record {
    pub fn new(row: Row) -> Record {
        Record {
            row,
            native: Vec::new(),
            netkernel: Vec::new(),
            details: Vec::new(),
            remarks: Vec::new(),
            outcome: Outcome::Measured,
        }
    }

    pub fn add(&mut self, side: Side, value: f64) {
        match side {
            Side::Native => self.native.push(value),
            Side::Netkernel => self.netkernel.push(value),
        }
    }

    /// Median under NetKernel by median of the plain kernel.
    pub fn ratio(&self) -> Option<f64> {
        let (native, netkernel) = (Summary::of(&self.native)?, Summary::of(&self.netkernel)?);
        let ratio = netkernel.median / native.median;
        (native.median > 0.0 && ratio.is_finite()).then_some(ratio)
    }

    /// The ratios of the rounds.
    pub fn ratios(&self) -> Option<Summary> {
        let rounds: Vec<f64> = self.netkernel.iter().zip(&self.native).map(|(b, a)| b / a).collect();
        Summary::of(&rounds)
    }

    /// Between what the ratio lies with 95 %, by resampling the rounds (Efron's bootstrap, percentiles; the same numbers for the same
    /// series). `None` with fewer than five rounds.
    pub fn interval(&self) -> Option<[f64; 2]> {
        let finite = |pair: &(f64, f64)| pair.0.is_finite() && pair.1.is_finite();
        let rounds: Vec<(f64, f64)> =
            self.native.iter().copied().zip(self.netkernel.iter().copied()).filter(finite).collect();
        if rounds.len() < 5 {
            return None;
        }
        let (mut random, count) = (Random(7), rounds.len());
        let mut ratios: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                let drawn: Vec<(f64, f64)> = (0..count).map(|_| rounds[random.below(count)]).collect();
                let side = |of: fn(&(f64, f64)) -> f64| {
                    Summary::of(&drawn.iter().map(of).collect::<Vec<_>>()).map(|summary| summary.median)
                };
                let ratio = side(|round| round.1)? / side(|round| round.0)?;
                ratio.is_finite().then_some(ratio)
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        (!ratios.is_empty()).then(|| [quantile(&ratios, 0.025), quantile(&ratios, 0.975)])
    }

    /// The rounds differ so much that the promise may be kept, though the medians do not show it.
    fn within_noise(&self) -> bool {
        match (self.row.promise, self.interval()) {
            (Promise::RatioAtLeast(least), Some([_, high])) => high >= least,
            (Promise::RatioAtMost(most), Some([low, _])) => low <= most,
            _ => false,
        }
    }

    /// What the table says.
    fn verdict_text(&self) -> String {
        match (&self.outcome, self.verdict()) {
            (Outcome::NotRun(reason) | Outcome::Failed(reason), _) => reason.clone(),
            (Outcome::Measured, Verdict::FallsShort) if self.within_noise() => {
                format!("{}, within noise", Verdict::FallsShort.word())
            }
            (Outcome::Measured, verdict) => verdict.word().to_owned(),
        }
    }

    pub fn verdict(&self) -> Verdict {
        if self.outcome != Outcome::Measured {
            return Verdict::Unknown;
        }
        let kept = match self.row.promise {
            Promise::None => return Verdict::Told,
            Promise::RatioAtLeast(least) => self.ratio().map(|ratio| ratio >= least),
            Promise::RatioAtMost(most) => self.ratio().map(|ratio| ratio <= most),
            Promise::AtMost(most) => Summary::of(&self.netkernel).map(|summary| summary.median <= most),
            Promise::AlwaysAtMost(most) => Summary::of(&self.netkernel).map(|summary| summary.max <= most),
        };
        match kept {
            Some(true) => Verdict::Pass,
            Some(false) => Verdict::FallsShort,
            None => Verdict::Unknown,
        }
    }

    fn promise_text(&self) -> String {
        match self.row.promise {
            Promise::None => "-".into(),
            Promise::RatioAtLeast(least) => format!(">= {least}x"),
            Promise::RatioAtMost(most) => format!("<= {most}x"),
            Promise::AtMost(most) => format!("<= {}", figure(most)),
            Promise::AlwaysAtMost(most) => format!("always <= {}", figure(most)),
        }
    }

    fn json(&self) -> Value {
        let (outcome, reason) = match &self.outcome {
            Outcome::Measured => ("measured", None),
            Outcome::NotRun(reason) => ("not run", Some(reason)),
            Outcome::Failed(reason) => ("failed", Some(reason)),
        };
        let (promise, limit) = match self.row.promise {
            Promise::None => ("none", None),
            Promise::RatioAtLeast(limit) => ("ratio at least", Some(limit)),
            Promise::RatioAtMost(limit) => ("ratio at most", Some(limit)),
            Promise::AtMost(limit) => ("value at most", Some(limit)),
            Promise::AlwaysAtMost(limit) => ("each value at most", Some(limit)),
        };
        let side =
            |values: &[f64]| json!({ "series": values, "summary": Summary::of(values).map(Summary::json) });
        let details: Vec<Value> = self
            .details
            .iter()
            .map(|detail| json!({ "round": detail.round, "side": detail.side, "detail": detail.detail }))
            .collect();
        json!({
            "id": self.row.id,
            "title": self.row.title,
            "unit": self.row.unit,
            "native": side(&self.native),
            "netkernel": side(&self.netkernel),
            "ratio": self.ratio(),
            "ratios_of_rounds": self.ratios().map(Summary::json),
            "promise": promise,
            "limit": limit,
            "interval": self.interval(),
            "within_noise": self.within_noise(),
            "verdict": self.verdict().word(),
            "outcome": outcome,
            "reason": reason,
            "remarks": self.remarks,
            "details": details,
        })
    }
}

/// A whole run.
pub struct Results {
    pub machine: Machine,
    pub surroundings: Surroundings,
    /// What is compared.
    pub sides: [&'static str; 2],
    pub stack: String,
    pub attachment: &'static str,
    pub rounds: u32,
    pub seconds: f64,
    pub records: Vec<Record>,
}

impl output::Results for Results {
    fn table(&self) -> String {
        Results::table(self)
    }

    fn json(&self) -> Value {
        Results::json(self)
    }

    fn svg(&self) -> String {
        plot::svg(self)
    }

    fn all_kept(&self) -> bool {
        Results::all_kept(self)
    }
}

impl Results {
    /// Whether every promise was shown to be kept.
    pub fn all_kept(&self) -> bool {
        self.records.iter().all(|record| matches!(record.verdict(), Verdict::Pass | Verdict::Told))
    }

    /// A line for each fact that figures depend on.
    pub fn facts(&self) -> Vec<String> {
        let Machine { date, cpus, cpu, kernel, memory_gib, netkernel, commit, .. } = &self.machine;
        let commit = commit.as_ref().map_or(String::new(), |commit| format!(", commit {commit}"));
        vec![
            format!("{date}; Linux {kernel}; {cpus} x {cpu}; {memory_gib:.0} GiB"),
            format!(
                "{netkernel}{commit}; stack {}, attachment {}; native: {}; network namespace: {}",
                self.stack,
                self.attachment,
                self.surroundings.native_congestion_control,
                self.surroundings.network_namespace
            ),
            match self.surroundings.placement {
                Placement::Split => {
                    "placement: the program and its engine on one core, its peer on another, on both sides"
                        .into()
                }
                Placement::Free => "placement: the scheduler's".into(),
            },
            format!(
                "{} rounds of {} s, {} and {} by turns; median (min..max); ratio of the medians, and where it lies by 95 %",
                self.rounds, self.seconds, self.sides[0], self.sides[1]
            ),
        ]
    }

    pub fn table(&self) -> String {
        let mut text = String::new();
        for fact in self.facts() {
            let _ = writeln!(text, "{fact}");
        }
        let _ = writeln!(text);
        let [a, b] = self.sides;
        let head = ["", "unit", a, b, "ratio", "95 %", "promise", "verdict"].map(String::from);
        let mut lines = vec![head];
        let mut notes = Vec::new();
        for record in &self.records {
            let side = |values: &[f64]| Summary::of(values).map_or("-".to_owned(), spread);
            lines.push([
                record.row.title.clone(),
                record.row.unit.to_owned(),
                side(&record.native),
                side(&record.netkernel),
                record.ratio().map_or("-".to_owned(), |ratio| format!("{ratio:.2}x")),
                record.interval().map_or("-".to_owned(), |[low, high]| format!("{low:.2}..{high:.2}")),
                record.promise_text(),
                record.verdict_text(),
            ]);
            notes.extend(record.remarks.iter().map(|remark| format!("{}: {remark}", record.row.id)));
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..8).map(width).collect();
        for (n, line) in lines.iter().enumerate() {
            let mut out = String::new();
            for (column, cell) in line.iter().enumerate() {
                let pad = widths[column];
                let _ = match column {
                    0 | 1 | 7 => write!(out, "{cell:pad$}  "),
                    _ => write!(out, "{cell:>pad$}  "),
                };
            }
            let _ = writeln!(text, "{}", out.trim_end());
            if n == 0 {
                let _ = writeln!(text, "{}", "-".repeat(widths.iter().sum::<usize>().min(150) + 12));
            }
        }
        let _ = writeln!(text);
        for note in self.surroundings.warnings.iter().chain(&notes) {
            let _ = writeln!(text, "note: {note}");
        }
        let count = |wanted| self.records.iter().filter(|record| record.verdict() == wanted).count();
        let _ = writeln!(
            text,
            "{} kept, {} fall short, {} not shown",
            count(Verdict::Pass),
            count(Verdict::FallsShort),
            count(Verdict::Unknown)
        );
        text
    }

    pub fn json(&self) -> Value {
        json!({
            "version": 1,
            "machine": self.machine,
            "surroundings": self.surroundings,
            "stack": self.stack,
            "attachment": self.attachment,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "rows": self.records.iter().map(Record::json).collect::<Vec<_>>(),
        })
    }
}

fn spread(summary: Summary) -> String {
    format!("{} ({}..{})", figure(summary.median), figure(summary.min), figure(summary.max))
}

/// Three digits and a multiple, as a reader wants it.
pub fn figure(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size >= 1e6 => format!("{:.2} M", value / 1e6),
        _ if size >= 1e4 => format!("{:.1} k", value / 1e3),
        _ if size >= 100.0 => format!("{value:.0}"),
        _ if size >= 10.0 => format!("{value:.1}"),
        _ if size >= 1.0 || value == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(promise: Promise, native: &[f64], netkernel: &[f64]) -> Record {
        let mut record = Record::new(Row { id: "x", title: "x".into(), unit: "s", promise });
        record.native = native.to_vec();
        record.netkernel = netkernel.to_vec();
        record
    }

    #[test]
    fn an_interval_is_told_and_noise_is_no_proof_of_falling_short() {
        let steady = record(Promise::RatioAtLeast(0.98), &[100.0; 8], &[90.0; 8]);
        assert_eq!(steady.interval(), Some([0.9, 0.9]));
        assert_eq!(steady.verdict_text(), "FALLS SHORT");
        let native = [100.0, 90.0, 110.0, 95.0, 105.0, 100.0, 92.0, 108.0];
        let ours = [97.0, 111.0, 90.0, 104.0, 93.0, 96.0, 107.0, 91.0];
        let noisy = record(Promise::RatioAtLeast(0.98), &native, &ours);
        let [low, high] = noisy.interval().unwrap();
        assert!(low < noisy.ratio().unwrap() && noisy.ratio().unwrap() < high, "{low} {high}");
        assert_eq!(noisy.verdict(), Verdict::FallsShort, "what is promised must be shown");
        assert_eq!(noisy.verdict_text(), "FALLS SHORT, within noise");
        assert_eq!(noisy.interval(), noisy.interval(), "the same for the same series");
        assert_eq!(record(Promise::None, &[1.0; 4], &[1.0; 4]).interval(), None, "too few");
    }

    #[test]
    fn medians_decide() {
        let series = record(Promise::RatioAtLeast(0.8), &[10.0, 11.0, 100.0], &[9.0, 1.0, 9.9]);
        assert_eq!(series.ratio(), Some(9.0 / 11.0));
        assert_eq!(series.verdict(), Verdict::Pass);
        assert_eq!(record(Promise::RatioAtMost(1.3), &[10.0], &[14.0]).verdict(), Verdict::FallsShort);
        assert_eq!(record(Promise::AtMost(1.0), &[f64::NAN], &[0.5, 0.7]).verdict(), Verdict::Pass);
        assert_eq!(record(Promise::AlwaysAtMost(1.0), &[], &[0.5, 0.7, 1.1]).verdict(), Verdict::FallsShort);
        assert_eq!(record(Promise::None, &[1.0], &[9.0]).verdict(), Verdict::Told);
    }

    #[test]
    fn nothing_measured_is_nothing_shown() {
        assert_eq!(record(Promise::RatioAtLeast(0.8), &[], &[]).verdict(), Verdict::Unknown);
        assert_eq!(record(Promise::RatioAtLeast(0.8), &[0.0], &[1.0]).verdict(), Verdict::Unknown);
        let mut failed = record(Promise::RatioAtLeast(0.8), &[1.0], &[1.0]);
        failed.outcome = Outcome::Failed("failed: it broke".into());
        assert_eq!(failed.verdict(), Verdict::Unknown);
    }

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 1.0), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
        assert_eq!(Summary::of(&[f64::NAN, 2.0]), Some(Summary { median: 2.0, min: 2.0, max: 2.0 }));
    }

    #[test]
    fn figures_are_short() {
        assert_eq!(
            [0.0, 0.0123, 2.5, 71.23, 512.4, 71_234.0, 1_040_000.0].map(figure),
            ["0.00", "0.012", "2.50", "71.2", "512", "71.2 k", "1.04 M"]
        );
    }
}
