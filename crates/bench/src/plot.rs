//! The ratios as a picture.

use std::fmt::Write;

use crate::bench::Promise;
use crate::report::{Outcome, Record, Results, Summary, Verdict, figure};

const WIDTH: f64 = 1040.0;
/// Where the bars begin and end.
const LEFT: f64 = 390.0;
const RIGHT: f64 = 760.0;
const LINE: f64 = 30.0;
const TOP: f64 = 96.0;

/// A bar for each ratio, with the spread of the rounds and a mark at what was promised; figures without a ratio as text.
pub fn svg(results: &Results) -> String {
    let (bars, words): (Vec<&Record>, Vec<&Record>) =
        results.records.iter().partition(|record| record.ratio().is_some());
    let most = bars.iter().filter_map(|record| record.ratio()).fold(1.6, f64::max).min(3.0) * 1.05;
    let x = |ratio: f64| LEFT + (RIGHT - LEFT) * ratio.clamp(0.0, most) / most;
    let bottom = TOP + LINE * bars.len() as f64;
    let facts = results.facts();
    let height = bottom + 50.0 + 20.0 * (words.len() + facts.len()) as f64;

    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>"
    );
    let mut text = |x: f64, y: f64, anchor: &str, style: &str, text: &str| {
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{}</text>",
            escaped(text)
        );
    };
    text(20.0, 32.0, "start", "font-size=\"19\" font-weight=\"bold\"", "NetKernel beside the plain kernel");
    text(
        20.0,
        54.0,
        "start",
        "fill=\"#555555\"",
        "ratio of the medians; thin line: the rounds' least and most; dark mark: what was promised",
    );
    let mut shapes = String::new();
    for tick in 0..=(most / 0.25) as u32 {
        let ratio = f64::from(tick) * 0.25;
        let color = if ratio == 1.0 { "#888888" } else { "#e4e4e4" };
        line(&mut shapes, (x(ratio), TOP - 8.0), (x(ratio), bottom), color, 1.0);
        if tick % 2 == 0 {
            text(x(ratio), TOP - 14.0, "middle", "fill=\"#555555\" font-size=\"11\"", &format!("{ratio}x"));
        }
    }
    for (n, record) in bars.iter().enumerate() {
        let y = TOP + LINE * n as f64;
        let middle = y + LINE / 2.0;
        let ratio = record.ratio().unwrap_or_default();
        // Blue and orange are told apart by everybody; the word stands beside them.
        let color = match record.verdict() {
            Verdict::Pass => "#3b7dd8",
            Verdict::FallsShort => "#e07b1a",
            Verdict::Told | Verdict::Unknown => "#b5b5b5",
        };
        let _ = writeln!(
            shapes,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{color}\"/>",
            y + 6.0,
            x(ratio) - LEFT,
            LINE - 12.0
        );
        if let Some(Summary { min, max, .. }) = record.ratios() {
            line(&mut shapes, (x(min), middle), (x(max), middle), "#222222", 1.5);
        }
        if let Promise::RatioAtLeast(limit) | Promise::RatioAtMost(limit) = record.row.promise {
            line(&mut shapes, (x(limit), y + 2.0), (x(limit), y + LINE - 2.0), "#111111", 3.0);
        }
        text(LEFT - 10.0, middle + 4.0, "end", "", &record.row.title);
        let promise = match record.row.promise {
            Promise::RatioAtLeast(limit) => format!(", at least {limit}x: {}", record.verdict().word()),
            Promise::RatioAtMost(limit) => format!(", at most {limit}x: {}", record.verdict().word()),
            Promise::AtMost(_) | Promise::AlwaysAtMost(_) | Promise::None => String::new(),
        };
        text(RIGHT + 12.0, middle + 4.0, "start", "", &format!("{ratio:.2}x{promise}"));
    }
    let mut y = bottom + 30.0;
    for record in words {
        let value = match (&record.outcome, Summary::of(&record.netkernel)) {
            (Outcome::NotRun(reason) | Outcome::Failed(reason), _) => reason.clone(),
            (Outcome::Measured, Some(summary)) => {
                let promise = match record.row.promise {
                    Promise::AtMost(most) | Promise::AlwaysAtMost(most) => {
                        format!(", at most {}: {}", figure(most), record.verdict().word())
                    }
                    _ => String::new(),
                };
                format!("{} {}{promise}", figure(summary.median), record.row.unit)
            }
            (Outcome::Measured, None) => "nothing measured".to_owned(),
        };
        text(LEFT - 10.0, y, "end", "", &record.row.title);
        text(LEFT, y, "start", "", &value);
        y += 20.0;
    }
    y += 6.0;
    for fact in facts {
        text(20.0, y, "start", "fill=\"#555555\" font-size=\"11\"", &fact);
        y += 16.0;
    }
    out + &shapes + "</svg>\n"
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), color: &str, width: f64) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{color}\" stroke-width=\"{width}\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
