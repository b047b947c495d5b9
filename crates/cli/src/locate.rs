//! Which engine a command talks to.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Result, bail};
use netkernel_control::{
    Client, ClientError, RUNTIME_DIR_ENV, RuntimeDir, default_socket, fallback_dir, runtime_dir,
};

use crate::args::RemoteArgs;
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

/// Which engine the command line names, and the token to show.
struct Remote {
    host: Option<String>,
    roots: Option<PathBuf>,
    token: Option<String>,
}

static REMOTE: OnceLock<Remote> = OnceLock::new();

/// Takes down what the command line says, for all later calls.
pub fn remember(args: RemoteArgs) -> Result<()> {
    let token = args.token_file.as_deref().map(crate::config::read_token).transpose()?;
    if args.host.is_some() && token.is_none() {
        bail!("an engine answers over TLS only to who shows a token: name its file with --token-file");
    }
    let _ = REMOTE.set(Remote { host: args.host, roots: args.ca_file, token });
    Ok(())
}

/// Whether an engine on another host was named.
pub fn is_remote() -> bool {
    REMOTE.get().is_some_and(|remote| remote.host.is_some())
}

fn show_token(mut client: Client) -> Client {
    if let Some(token) = REMOTE.get().and_then(|remote| remote.token.clone()) {
        client.show_token(token);
    }
    client
}

/// The engines to ask: the one that was named, which must answer, or all default ones that answer and can be trusted.
pub fn find(named: Option<&Path>) -> Result<Vec<Client>> {
    if let Some(Remote { host: Some(host), roots, .. }) = REMOTE.get() {
        if named.is_some() {
            bail!("--host and --socket name two engines: give one of them");
        }
        return Ok(vec![show_token(Client::connect_tls(host, roots.as_deref())?)]);
    }
    if let Some(path) = named {
        return Ok(vec![show_token(Client::connect(path)?)]);
    }
    let found = candidates().into_iter().filter_map(|path| Client::connect_trusted(&path).ok());
    Ok(found.map(show_token).collect())
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
    if is_remote() {
        return Vec::new();
    }
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
