//! The engine's log: one line per event on standard error. `$NETKERNEL_LOG` sets the level: off, error, warn, info, debug,
//! trace.

use std::io::Write as _;

use log::{LevelFilter, Log, Metadata, Record};

struct Lines;

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // In one write, so that lines of several threads do not mix.
            let line = format!("netkernel: {}: {}\n", record.level().as_str().to_lowercase(), record.args());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

pub fn start(level: LevelFilter) {
    let level = std::env::var("NETKERNEL_LOG").ok().and_then(|text| text.parse().ok()).unwrap_or(level);
    if log::set_logger(&Lines).is_ok() {
        log::set_max_level(level);
    }
}
