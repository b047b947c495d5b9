//! A network namespace of one test's own, with one end of a cable whose other end a stack of the engine has.

use std::process::{Command, Stdio};

use super::is_root;

/// It has 10.9.0.1 and fd00:9::1 on the TAP device `nk0`, and ends with the value.
pub struct Namespace(pub String);

impl Namespace {
    /// Needs root.
    pub fn new(name: &str) -> Namespace {
        let namespace = Namespace(format!("nkt-{}-{name}", std::process::id()));
        let at = namespace.0.clone();
        ip(&["netns", "add", &at]);
        ip(&["-n", &at, "link", "set", "lo", "up"]);
        ip(&["-n", &at, "tuntap", "add", "dev", "nk0", "mode", "tap"]);
        ip(&["-n", &at, "address", "add", "10.9.0.1/24", "dev", "nk0"]);
        ip(&["-n", &at, "-6", "address", "add", "fd00:9::1/64", "dev", "nk0", "nodad"]);
        ip(&["-n", &at, "link", "set", "nk0", "up"]);
        namespace
    }

    /// A native command in the namespace.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).args(words).stdin(Stdio::null());
        command
    }

    /// The NSM `small`, smoltcp at 10.9.0.2 and fd00:9::2 on the other end.
    pub fn config(&self) -> String {
        format!(
            "[[nsm]]\nname = \"small\"\nstack = \"smoltcp\"\ntap = \"nk0\"\nnetns = \"{}\"\n\
             addresses = [\"10.9.0.2/24\", \"fd00:9::2/64\"]\ngateways = [\"10.9.0.1\"]\n",
            self.0
        )
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub fn ip(words: &[&str]) {
    let status = Command::new("ip").args(words).status().expect("the command `ip` (Debian: iproute2)");
    assert!(status.success(), "ip {words:?}: {status}");
}

/// Whether namespaces can be made here; says so when they cannot.
pub fn can_run() -> bool {
    if !is_root() {
        println!("not run: network namespaces need root");
    }
    is_root()
}
