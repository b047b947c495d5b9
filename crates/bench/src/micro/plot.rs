//! Chunks beside the published figures, and the switching rate, as a picture.

use std::fmt::Write;

use super::chunks::PUBLISHED;
use super::elements::BATCHES;
use super::table::facts;
use super::{Results, Row};
use crate::report::{Summary, figure};

const WIDTH: f64 = 1080.0;
const HEIGHT: f64 = 500.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = 400.0;

/// A diagram: where it stands, and what its logarithmic axis spans.
struct Panel {
    left: f64,
    right: f64,
    low: f64,
    high: f64,
    places: usize,
}

impl Panel {
    fn x(&self, place: usize) -> f64 {
        let step = (self.right - self.left) / self.places as f64;
        self.left + step * (place as f64 + 0.5)
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        BOTTOM - (BOTTOM - TOP) * share.clamp(0.0, 1.0)
    }
}

struct Drawing(String);

impl Drawing {
    fn text(&mut self, x: f64, y: f64, anchor: &str, style: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{text}</text>"
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        let _ = writeln!(
            self.0,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
            from.0, from.1, to.0, to.1
        );
    }

    fn axis(&mut self, panel: &Panel, title: &str, ticks: &[f64], names: &[String]) {
        self.text(panel.left, TOP - 20.0, "start", "font-weight=\"bold\"", title);
        for &tick in ticks {
            let y = panel.y(tick);
            self.line((panel.left, y), (panel.right, y), "stroke=\"#e4e4e4\"");
            let style = "fill=\"#555555\" font-size=\"11\"";
            self.text(panel.left - 6.0, y + 4.0, "end", style, &figure(tick));
        }
        for (place, name) in names.iter().enumerate() {
            self.text(panel.x(place), BOTTOM + 18.0, "middle", "font-size=\"12\"", name);
        }
    }

    /// The medians of `rows` with their spread, joined by lines; nothing where a row was not measured.
    fn series(&mut self, panel: &Panel, values: &[Option<Summary>], color: &str) {
        let at = |(place, value): (usize, &Option<Summary>)| {
            value.map(|summary| (panel.x(place), panel.y(summary.median), summary))
        };
        let points: Vec<_> = values.iter().enumerate().map(at).collect();
        for pair in points.windows(2) {
            if let [Some(a), Some(b)] = pair {
                self.line((a.0, a.1), (b.0, b.1), &format!("stroke=\"{color}\" stroke-width=\"2\""));
            }
        }
        for (x, y, summary) in points.into_iter().flatten() {
            let spread = ((x, panel.y(summary.min)), (x, panel.y(summary.max)));
            self.line(spread.0, spread.1, &format!("stroke=\"{color}\""));
            let _ = writeln!(self.0, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{color}\"/>");
        }
    }
}

pub fn svg(results: &Results) -> String {
    let mut out = Drawing(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    ));
    out.text(20.0, 32.0, "start", "font-size=\"19\" font-weight=\"bold\"", "NetKernel's microbenchmarks");
    out.text(20.0, 54.0, "start", "fill=\"#555555\"", "medians; thin line: the rounds' least and most");

    let find = |id: String| results.rows.iter().find(|row| row.id == id);
    let chunks = Panel { left: 70.0, right: 560.0, low: 1.0, high: 2000.0, places: PUBLISHED.len() };
    let names = PUBLISHED.map(|(bytes, _)| match bytes {
        0..1024 => format!("{bytes} B"),
        _ => format!("{} KiB", bytes / 1024),
    });
    out.axis(&chunks, "read a random chunk, ns, by size (2 MiB pages)", &[1.0, 10.0, 100.0, 1000.0], &names);
    let of = |pages: &str, pick: fn(&Row) -> &[f64]| {
        PUBLISHED.map(|(bytes, _)| Summary::of(pick(find(format!("read-{pages}-{bytes}"))?)))
    };
    let published = PUBLISHED.map(|(_, ns)| Some(Summary { median: ns, min: ns, max: ns }));
    let series = [
        ("published", "#888888", published),
        ("in the pool, plain memcpy", "#7fb58a", of("pool-huge", |row| &row.plain)),
        ("in the pool, NetKernel", "#3b7dd8", of("pool-huge", |row| &row.ours)),
        ("in the pool, NetKernel, 4 KiB pages", "#e07b1a", of("pool-small", |row| &row.ours)),
        ("in one ring, plain memcpy", "#b9a6d3", of("ring-huge", |row| &row.plain)),
        ("in one ring, NetKernel", "#6b3fa0", of("ring-huge", |row| &row.ours)),
    ];
    for (n, (name, color, values)) in series.iter().enumerate() {
        out.series(&chunks, values, color);
        let y = TOP + 8.0 + 18.0 * n as f64;
        out.line((90.0, y - 4.0), (112.0, y - 4.0), &format!("stroke=\"{color}\" stroke-width=\"3\""));
        out.text(118.0, y, "start", "font-size=\"12\"", name);
    }

    let rates = Panel { left: 650.0, right: 1050.0, low: 1.0, high: 2000.0, places: BATCHES.len() };
    let names = BATCHES.map(|batch| batch.to_string());
    let title = "elements switched on one core, M/s, by batch";
    out.axis(&rates, title, &[1.0, 10.0, 100.0, 1000.0], &names);
    let rows = BATCHES.map(|batch| find(format!("switch-{batch}")));
    out.series(&rates, &rows.map(|row| Summary::of(&row?.ours)), "#3b7dd8");
    for (place, row) in rows.iter().enumerate() {
        if let Some(least) = row.and_then(|row| row.limits.at_least) {
            let (x, y) = (rates.x(place), rates.y(least));
            out.line((x - 14.0, y), (x + 14.0, y), "stroke=\"#111111\" stroke-width=\"3\"");
        }
    }
    out.line((670.0, TOP + 4.0), (692.0, TOP + 4.0), "stroke=\"#111111\" stroke-width=\"3\"");
    out.text(698.0, TOP + 8.0, "start", "font-size=\"12\"", "what was promised");
    for (n, fact) in facts(results).iter().enumerate() {
        let y = BOTTOM + 50.0 + 16.0 * n as f64;
        out.text(20.0, y, "start", "fill=\"#555555\" font-size=\"11\"", fact);
    }
    out.0 + "</svg>\n"
}
