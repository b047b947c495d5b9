//! `netkernel man` and `completions`: made of the definition of the command line.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, anyhow};
use clap::{Command, CommandFactory as _};

use crate::args::{Cli, CompletionsArgs, ManArgs};

/// The commands that people give, each with the words that lead to it: of `netkernel` itself, none.
pub fn commands() -> Vec<(Vec<String>, Command)> {
    let mut root = Cli::command();
    // Options and names that subcommands have of those above.
    root.build();
    let mut found = Vec::new();
    walk(&mut found, Vec::new(), &root);
    found
}

fn walk(found: &mut Vec<(Vec<String>, Command)>, words: Vec<String>, command: &Command) {
    found.push((words.clone(), command.clone()));
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        walk(found, [words.clone(), vec![sub.get_name().to_owned()]].concat(), sub);
    }
}

pub fn man(args: &ManArgs) -> Result<()> {
    let mut pages = commands();
    match &args.dir {
        None => {
            let page = pages.into_iter().find(|(words, _)| *words == args.command);
            let (words, command) =
                page.ok_or_else(|| anyhow!("no command '{}': see netkernel --help", args.command.join(" ")))?;
            io::stdout().write_all(&render(&words, command)?)?;
        }
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
            for (words, command) in pages.drain(..) {
                let file = dir.join(format!("{}.1", name(&words)));
                std::fs::write(&file, render(&words, command)?)
                    .with_context(|| format!("cannot write {}", file.display()))?;
            }
        }
    }
    Ok(())
}

/// As git's: of `netkernel bench micro`, netkernel-bench-micro.
fn name(words: &[String]) -> String {
    std::iter::once("netkernel").chain(words.iter().map(String::as_str)).collect::<Vec<_>>().join("-")
}

fn render(words: &[String], command: Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    // Without that, subcommands would have none.
    let command = command.version(env!("CARGO_PKG_VERSION"));
    clap_mangen::Man::new(command).title(name(words)).manual("NetKernel").render(&mut page)?;
    Ok(page)
}

pub fn completions(args: &CompletionsArgs) {
    let mut command = visible(&Cli::command()).version(env!("CARGO_PKG_VERSION"));
    clap_complete::generate(args.shell, &mut command, "netkernel", &mut io::stdout());
}

/// The command without what is hidden, which shells would offer.
fn visible(command: &Command) -> Command {
    // Names live as long as the program, which ends with this.
    let name: &'static str = command.get_name().to_owned().leak();
    let mut copy = Command::new(name).args(command.get_arguments().cloned());
    if let Some(about) = command.get_about() {
        copy = copy.about(about.clone());
    }
    copy.subcommands(command.get_subcommands().filter(|sub| !sub.is_hide_set()).map(visible))
}
