//! What every benchmark does with its results.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

#[derive(Args, Debug, Clone)]
pub struct Output {
    /// Write the raw series, the results and the facts about the machine to this file; without one, or to -: to standard
    /// output, instead of the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,

    /// Draw the results to this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,

    /// Fewer, shorter measurements: a look, not a result
    #[arg(long)]
    pub quick: bool,

    /// Exit with 1 unless every promise is kept and nothing was left out
    #[arg(long)]
    pub check: bool,

    /// Show no progress on the terminal
    #[arg(long, short)]
    pub quiet: bool,
}

/// Results in the forms that they can be asked for.
pub(crate) trait Results {
    fn table(&self) -> String;
    fn json(&self) -> Value;
    fn svg(&self) -> String;
    fn all_kept(&self) -> bool;
}

impl Output {
    /// Whether JSON goes to standard output.
    pub fn prints_json(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }

    /// Fails if a file cannot be written: found out now, not after ten minutes.
    pub fn try_files(&self) -> Result<()> {
        let json = self.json.iter().filter(|_| !self.prints_json());
        for file in json.chain(&self.plot) {
            let opened = std::fs::OpenOptions::new().append(true).create(true).open(file);
            opened.with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }

    pub(crate) fn deliver(&self, results: &impl Results) -> Result<()> {
        if self.prints_json() {
            print_json(&results.json())?;
        } else {
            print!("{}", results.table());
        }
        if let Some(file) = self.json.iter().find(|_| !self.prints_json()) {
            let text = serde_json::to_string_pretty(&results.json())? + "\n";
            std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        if let Some(file) = &self.plot {
            std::fs::write(file, results.svg())
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        if self.check && !results.all_kept() {
            bail!("not every promise was shown to be kept");
        }
        Ok(())
    }
}

pub(crate) fn print_json(value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
