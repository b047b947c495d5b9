//! The fuzz targets under libFuzzer and AddressSanitizer; a nightly compiler is needed, cargo-fuzz is not.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::step::{Tally, run};

const TARGETS: [&str; 6] = ["engine", "journal", "region", "ring", "channel", "control"];
const TRIPLE: &str =
    if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };
/// What cargo-fuzz passes: coverage by counters, comparisons told to the fuzzer, the sanitizer.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address --cfg fuzzing -Ccodegen-units=1";

/// `fuzz [TARGET..] [--seconds N]`: each target for N seconds (60). What it finds stands in fuzz/artifacts.
pub fn fuzz(arguments: &[String]) -> Result<Tally> {
    let mut seconds = 60;
    let mut targets = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--seconds" {
            seconds = match arguments.next().map(|n| n.parse::<u64>()) {
                Some(Ok(n)) if n > 0 => n,
                _ => bail!("--seconds wants a number above 0"),
            };
        } else if TARGETS.contains(&argument.as_str()) {
            targets.push(argument.as_str());
        } else {
            bail!("there is no fuzz target '{argument}': there are {}", TARGETS.join(", "));
        }
    }
    if targets.is_empty() {
        targets.extend(TARGETS);
    }
    let nightly = Command::new("rustc").args(["+nightly", "--version"]).output();
    if !nightly.is_ok_and(|out| out.status.success()) {
        bail!(
            "libFuzzer needs a nightly compiler (rustup toolchain install nightly); the same targets run on stable with: cargo test -p netkernel-fuzz"
        );
    }
    let out = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), std::path::PathBuf::from);
    let out = std::path::absolute(out.join("fuzz"))?;
    // By way of rustup: inside of `cargo xtask` the variables of the stable toolchain are set.
    let mut build = Command::new("rustup");
    build
        .args(["run", "nightly", "cargo", "build", "--release", "--manifest-path", "fuzz/Cargo.toml"])
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&out)
        .env("RUSTFLAGS", FLAGS)
        .env_remove("RUSTC")
        .env_remove("RUSTDOC")
        .env_remove("CARGO");
    let mut tally = run(build, Duration::from_secs(900))?;
    for target in targets {
        let (corpus, artifacts) = (format!("fuzz/corpus/{target}"), format!("fuzz/artifacts/{target}/"));
        std::fs::create_dir_all(&corpus)?;
        std::fs::create_dir_all(Path::new(&artifacts))?;
        let mut fuzzer = Command::new(out.join(TRIPLE).join("release").join(target));
        fuzzer
            .arg(corpus)
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={artifacts}"))
            .args(["-print_final_stats=1", "-verbosity=0", "-rss_limit_mb=4096"]);
        tally = tally.and(run(fuzzer, Duration::from_secs(seconds + 120))?);
    }
    Ok(tally)
}
