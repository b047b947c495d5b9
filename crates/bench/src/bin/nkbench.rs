//! `netkernel bench` as a program of its own, for work on the benchmarks themselves.

use std::process::ExitCode;

use clap::Parser;
use netkernel_bench::BenchArgs;

/// Measure NetKernel beside the plain kernel.
#[derive(Parser)]
#[command(name = "nkbench", version)]
struct Cli {
    #[command(flatten)]
    bench: BenchArgs,
}

fn main() -> ExitCode {
    let mut args = Cli::parse().bench;
    if args.common.netkernel.is_none() {
        // `netkernel` itself measures itself; this program measures the one that was built with it.
        args.common.netkernel = std::env::current_exe()
            .ok()
            .map(|own| own.with_file_name("netkernel"))
            .filter(|path| path.exists());
    }
    match netkernel_bench::run_as(args, &[]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nkbench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
