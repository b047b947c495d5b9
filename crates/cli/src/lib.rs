//! The `netkernel` command. Exit codes are those of env(1): 125 when netkernel itself failed, 126 when the program is
//! not executable, 127 when it is not there, 2 for wrong usage, else the program's own.

mod args;
mod catalog;
mod config;
mod doctor;
mod engine;
mod explain;
mod guest;
mod library;
mod locate;
mod logger;
mod meter;
mod metrics;
mod nsm;
mod pages;
mod pcap;
mod private;
mod program;
mod restart;
mod run;
mod show;
mod smoltcp;
mod ss;
mod sys;
mod tenants;
mod top;
mod units;
mod up;
mod usage;

use clap::Parser as _;

use args::{Cli, Command};
pub use pages::commands;

/// Exit codes of the command's own.
pub mod exit {
    /// netkernel itself failed.
    pub const FAILED: i32 = 125;
    /// The program is there but cannot be executed.
    pub const NOT_EXECUTABLE: i32 = 126;
    pub const NOT_FOUND: i32 = 127;
}

/// An error with its exit code.
#[derive(Debug)]
pub struct Exit(pub i32, pub String);

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for Exit {}

pub fn main() -> i32 {
    let cli = Cli::parse();
    match locate::remember(cli.remote).and_then(|()| dispatch(cli.command)) {
        Ok(code) => code,
        Err(error) => {
            // A reader that went away (`netkernel ps | head`) is no failure of ours.
            if error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
            {
                return 0;
            }
            logger::fatal(&error);
            error.downcast_ref::<Exit>().map_or(exit::FAILED, |e| e.0)
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<i32> {
    match command {
        Command::Up(args) => up::up(&args).map(|()| 0),
        Command::Run(args) => run::run(&args),
        Command::Stacks(args) => show::stacks(&args).map(|()| 0),
        Command::Ps(args) => show::ps(&args).map(|()| 0),
        Command::Explain(args) => explain::explain(&args).map(|()| 0),
        Command::Sockets(args) => show::sockets(&args).map(|()| 0),
        Command::Top(args) => top::top(&args).map(|()| 0),
        Command::Pcap(args) => pcap::pcap(&args).map(|()| 0),
        Command::Ss(args) => ss::ss(&args).map(|()| 0),
        Command::Catalog(args) => tenants::catalog(&args).map(|()| 0),
        Command::Tenants(args) => tenants::list(&args).map(|()| 0),
        Command::Tenant(args) => tenants::change(&args).map(|()| 0),
        Command::Reload(args) => tenants::reload(&args).map(|()| 0),
        Command::Restart(args) => restart::restart(&args).map(|()| 0),
        Command::Usage(args) => usage::usage(&args).map(|()| 0),
        Command::Stop(args) => show::stop(&args).map(|()| 0),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Bench(args) => netkernel_bench::run(args).map(|()| 0),
        Command::Completions(args) => {
            pages::completions(&args);
            Ok(0)
        }
        Command::Man(args) => pages::man(&args).map(|()| 0),
        Command::PrivateEngine(args) => private::serve(&args),
        Command::Guest(command) => guest::command(&command).map(|()| 0),
        Command::Nsm(command) => nsm::command(&command).map(|()| 0),
        Command::NsmProcess(args) => nsm::process(&args),
        Command::Heir(args) => nsm::heir(&args),
    }
}
