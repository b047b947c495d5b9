//! Which engine a command talks to.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use netkernel_control::{
    Client, ClientError, RUNTIME_DIR_ENV, RuntimeDir, default_socket, fallback_dir, runtime_dir,
};

use crate::sys;

pub const SOCKET_ENV: &str = "NETKERNEL_SOCKET_PATH";
const SYSTEM_SOCKET: &str = "/run/netkernel/engine.sock";

/// Where an engine may listen for this user, the user's own first.
pub fn candidates() -> Vec<PathBuf> {
    if std::env::var_os(RUNTIME_DIR_ENV).is_some() {
        return vec![default_socket()];
    }
    let uid = sys::effective_uid();
    let mut list = Vec::new();
    if uid != 0 {
        if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR") {
            list.push(Path::new(&dir).join("netkernel.sock"));
        }
        list.push(format!("/tmp/netkernel-{uid}/engine.sock").into());
    }
    list.push(SYSTEM_SOCKET.into());
    list
}

/// The engines to ask: the one that was named, which must answer, or all default ones that answer and can be trusted.
pub fn find(named: Option<&Path>) -> Result<Vec<Client>> {
    if let Some(path) = named {
        return Ok(vec![Client::connect(path)?]);
    }
    Ok(candidates().iter().filter_map(|path| Client::connect_trusted(path).ok()).collect())
}

/// The one engine to ask.
pub fn require(named: Option<&Path>) -> Result<Client> {
    match find(named)?.into_iter().next() {
        Some(client) => Ok(client),
        None => bail!(
            "no engine runs (looked at {}): start one with `netkernel up`, or name its socket with --socket",
            candidates().iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Engines of this user that serve one `netkernel run` each.
pub fn private_engines() -> Vec<Client> {
    private_dirs()
        .iter()
        .flat_map(RuntimeDir::private_sockets)
        .filter_map(|path| Client::connect_trusted(&path).ok())
        .collect()
}

/// Where private engines may have put their sockets.
pub fn private_dirs() -> Vec<RuntimeDir> {
    let mut dirs = vec![runtime_dir()];
    if std::env::var_os(RUNTIME_DIR_ENV).is_none() {
        dirs.push(fallback_dir());
    }
    dirs.dedup_by(|a, b| a.path() == b.path());
    dirs
}

/// Takes away what private engines left that were killed.
pub fn sweep() {
    for dir in private_dirs() {
        for path in dir.private_sockets() {
            // Sockets appear listening and under their lock, so a refusal means that the engine is dead.
            if matches!(Client::connect(&path), Err(ClientError::NoEngine(_))) {
                for suffix in ["", ".lock", ".log"] {
                    let mut name = path.clone().into_os_string();
                    name.push(suffix);
                    let _ = std::fs::remove_file(name);
                }
            }
        }
    }
}
