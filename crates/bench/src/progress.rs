//! A bar on standard error, for people: nothing where it is no terminal, and nothing with `--quiet`.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub fn new(steps: u64, quiet: bool) -> Progress {
        // Hides itself where standard error is no terminal.
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        if let Ok(style) =
            ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed}, {eta} left  {msg:18}")
        {
            bar.set_style(style);
        }
        Progress { bar }
    }

    /// What is measured now.
    pub fn start(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        self.bar.tick();
    }

    pub fn step(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// Something went wrong: for everybody.
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
