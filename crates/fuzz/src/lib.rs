//! Fuzz targets: what each side does with any bytes of the other.
//!
//! A target is a function of bytes that must return, whatever they are. `cargo xtask fuzz` runs them under libFuzzer with
//! AddressSanitizer (the thin `fuzz` directory), `cargo test` with some thousand generated inputs each.

mod engine;
mod input;
mod parse;
mod stack;

pub use engine::{Verdict, engine, journal};
pub use parse::{channel, control, region, ring};

/// A fuzz target.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("engine", |data| {
        engine(data);
    }),
    ("journal", |data| {
        journal(data);
    }),
    ("region", region),
    ("ring", ring),
    ("channel", channel),
    ("control", control),
];
