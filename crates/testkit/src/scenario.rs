//! What a scenario is.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::Ctx;

/// Which of a scenario's programs are guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// None: the reference.
    Native,
    /// The servers; clients are native.
    Server,
    /// The clients; servers are native.
    Client,
    /// All of them, on one engine.
    Both,
}

impl Mode {
    pub const ALL: [Mode; 4] = [Mode::Native, Mode::Server, Mode::Client, Mode::Both];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Native => "native",
            Mode::Server => "server",
            Mode::Client => "client",
            Mode::Both => "both",
        }
    }
}

impl FromStr for Mode {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Mode> {
        match Mode::ALL.into_iter().find(|m| m.name() == text) {
            Some(mode) => Ok(mode),
            None => bail!("no mode named '{text}': native, server, client or both"),
        }
    }
}

/// One thing that a user does with real programs, and what must be true of it.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// `program/what`.
    pub name: &'static str,
    pub run: fn(&mut Ctx) -> Result<()>,
    /// Programs that must be installed.
    pub needs: &'static [&'static str],
    pub modes: &'static [Mode],
    pub limit: Duration,
    /// Runs only when it is named.
    pub on_request: bool,
}

impl Scenario {
    pub const fn new(
        name: &'static str,
        needs: &'static [&'static str],
        run: fn(&mut Ctx) -> Result<()>,
    ) -> Scenario {
        Scenario { name, run, needs, modes: &Mode::ALL, limit: Duration::from_secs(45), on_request: false }
    }

    /// Server and client are one program: there is nothing between "none" and "all".
    pub const fn alone(mut self) -> Scenario {
        self.modes = &[Mode::Native, Mode::Both];
        self
    }

    pub const fn limit(mut self, seconds: u64) -> Scenario {
        self.limit = Duration::from_secs(seconds);
        self
    }

    pub const fn on_request(mut self) -> Scenario {
        self.on_request = true;
        self
    }

    /// `nginx` selects `nginx/reload`, and so does `nginx/reload`.
    pub fn matches(&self, pattern: &str) -> bool {
        self.name == pattern || self.name.strip_prefix(pattern).is_some_and(|rest| rest.starts_with('/'))
    }
}
