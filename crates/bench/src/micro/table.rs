//! What was measured, as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{Results, Row};
use crate::report::{Outcome, Summary, Verdict, figure};

pub fn facts(results: &Results) -> [String; 3] {
    let machine = &results.machine;
    let commit = machine.commit.as_ref().map_or(String::new(), |commit| format!(", commit {commit}"));
    [
        format!(
            "{}; Linux {}; {} x {}; {:.0} GiB; huge pages: {}",
            machine.date, machine.kernel, machine.cpus, machine.cpu, machine.memory_gib, machine.huge_pages
        ),
        format!("{}{commit}; chunks of a pool of {} MiB", machine.netkernel, results.pool_mib),
        format!(
            "{} rounds, all cases by turns, on one core; median (min..max); plain: memcpy, and no filter",
            results.rounds
        ),
    ]
}

pub fn table(results: &Results) -> String {
    let mut text = String::new();
    for fact in facts(results) {
        let _ = writeln!(text, "{fact}");
    }
    let _ = writeln!(text);
    let head = ["", "unit", "plain", "NetKernel", "ratio", "published", "promise", "verdict"];
    let mut lines = vec![head.map(String::from)];
    for row in &results.rows {
        let verdict = match (&row.outcome, row.verdict()) {
            (Outcome::NotRun(reason) | Outcome::Failed(reason), _) => reason.clone(),
            (Outcome::Measured, Verdict::FallsShort) if row.memory_is_slower() => {
                format!("{}, as memcpy does", Verdict::FallsShort.word())
            }
            (Outcome::Measured, verdict) => verdict.word().to_owned(),
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        lines.push([
            row.title.clone(),
            row.unit.to_owned(),
            or_dash(spread(&row.plain)),
            or_dash(spread(&row.ours)),
            or_dash(row.ratio().map(|ratio| format!("{ratio:.2}x"))),
            or_dash(row.limits.published_ns.map(figure)),
            promise(row),
            verdict,
        ]);
    }
    let widths: [usize; 8] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    for (n, line) in lines.iter().enumerate() {
        let mut out = String::new();
        for (column, (cell, pad)) in line.iter().zip(widths).enumerate() {
            let _ = match column {
                0 | 1 | 7 => write!(out, "{cell:pad$}  "),
                _ => write!(out, "{cell:>pad$}  "),
            };
        }
        let _ = writeln!(text, "{}", out.trim_end());
        if n == 0 {
            let _ = writeln!(text, "{}", "-".repeat(widths.iter().sum::<usize>().min(150) + 14));
        }
    }
    let count = |wanted| results.rows.iter().filter(|row| row.verdict() == wanted).count();
    let _ = writeln!(
        text,
        "\n{} kept, {} fall short, {} not shown",
        count(Verdict::Pass),
        count(Verdict::FallsShort),
        count(Verdict::Unknown)
    );
    text
}

fn promise(row: &Row) -> String {
    let ratio = row.limits.ratio_at_most.map(|most| format!("<= {most}x"));
    let published = row.limits.published_ns.map(|_| "< published".to_owned());
    let least = row.limits.at_least.map(|least| format!(">= {}", figure(least)));
    let all: Vec<String> = [ratio, published, least].into_iter().flatten().collect();
    if all.is_empty() { "-".into() } else { all.join(", ") }
}

fn spread(values: &[f64]) -> Option<String> {
    let Summary { median, min, max } = Summary::of(values)?;
    Some(format!("{} ({}..{})", figure(median), figure(min), figure(max)))
}

pub fn json(results: &Results) -> Value {
    let side = |values: &[f64]| {
        let summary = Summary::of(values)
            .map(|Summary { median, min, max }| json!({ "median": median, "min": min, "max": max }));
        json!({ "series": values, "summary": summary })
    };
    let row = |row: &Row| {
        let (outcome, reason) = match &row.outcome {
            Outcome::Measured => ("measured", None),
            Outcome::NotRun(reason) => ("not run", Some(reason)),
            Outcome::Failed(reason) => ("failed", Some(reason)),
        };
        json!({
            "id": row.id,
            "title": row.title,
            "unit": row.unit,
            "plain": side(&row.plain),
            "netkernel": side(&row.ours),
            "ratio": row.ratio(),
            "ratio_at_most": row.limits.ratio_at_most,
            "published_ns": row.limits.published_ns,
            "at_least": row.limits.at_least,
            "verdict": row.verdict().word(),
            "outcome": outcome,
            "reason": reason,
        })
    };
    json!({
        "version": 1,
        "machine": results.machine,
        "rounds": results.rounds,
        "pool_mib": results.pool_mib,
        "rows": results.rows.iter().map(row).collect::<Vec<_>>(),
    })
}
