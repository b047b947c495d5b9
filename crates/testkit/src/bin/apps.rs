//! The application tests: `apps --netkernel target/release/netkernel`, `apps --native`, `apps --list`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

#[path = "../apps/mod.rs"]
mod apps;

fn main() -> ExitCode {
    netkernel_testkit::runner::main(&apps::all())
}
