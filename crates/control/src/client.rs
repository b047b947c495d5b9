//! The asking side.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::api::encode;
use crate::http::{self, Answer};
use crate::peer::peer_of;
use crate::tls;
use crate::wire::{Timed, Wire};
use crate::{
    ApiError, Attached, CaptureInfo, Destination, EngineChange, GuestInfo, Moved, NewCapture, NewGuest,
    NsmInfo, Request, Restarted, SocketInfo, SocketQuery, StackChange, Status, TenantChange, TenantInfo,
    Token, UsageQuery, VersionInfo, token_hex,
};

/// Longest wait for the engine's answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub enum ClientError {
    /// Nothing answers at the path: no file, or a file that no engine listens on.
    NoEngine(PathBuf),
    /// The socket file may not be opened by this user.
    Permission(PathBuf),
    /// An engine answers, but it belongs to somebody else (uid).
    Foreign(PathBuf, u32),
    Io(PathBuf, io::Error),
    /// What came back is not this protocol.
    Protocol(String),
    /// The engine said no.
    Refused(ApiError),
}

impl std::fmt::Display for ClientError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ClientError::NoEngine(path) => {
                write!(f, "no engine answers at {}: start one with `netkernel up`", path.display())
            }
            ClientError::Permission(path) => write!(
                f,
                "no permission to use the engine's socket {}: run as the engine's user or root, or ask its operator to \
                 list you in allow_users",
                path.display()
            ),
            ClientError::Foreign(path, uid) => write!(
                f,
                "the engine at {} belongs to uid {uid}, neither you nor root: name it with --socket if you trust it",
                path.display()
            ),
            ClientError::Io(path, e) => write!(f, "the engine at {} does not answer: {e}", path.display()),
            ClientError::Protocol(text) => f.write_str(text),
            ClientError::Refused(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for ClientError {}

/// A connection to an engine.
#[derive(Debug)]
pub struct Client {
    wire: Box<dyn Wire>,
    /// Whose engine it is, by uid; `None`: the kernel does not say.
    owner: Option<u32>,
    path: PathBuf,
    /// Shown with each request.
    token: Option<String>,
}

impl Client {
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        let stream = UnixStream::connect(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => {
                ClientError::NoEngine(path.into())
            }
            io::ErrorKind::PermissionDenied => ClientError::Permission(path.into()),
            _ => ClientError::Io(path.into(), e),
        })?;
        let owner = Some(peer_of(&stream).map_err(|e| ClientError::Io(path.into(), e))?.uid);
        Ok(Client {
            wire: Box::new(Timed::new(stream, REPLY_TIMEOUT)),
            owner,
            path: path.into(),
            token: None,
        })
    }

    /// As [`Client::connect`], and only if the engine runs as root or as this user: for paths that nobody named.
    pub fn connect_trusted(path: &Path) -> Result<Client, ClientError> {
        let client = Client::connect(path)?;
        match client.owner {
            Some(uid) if uid != 0 && uid != rustix::process::geteuid().as_raw() => {
                Err(ClientError::Foreign(path.into(), uid))
            }
            _ => Ok(client),
        }
    }

    /// Over TLS, to `https://HOST[:PORT]`. `roots`: a file of the certificates that are trusted, instead of the host's.
    pub fn connect_tls(url: &str, roots: Option<&Path>) -> Result<Client, ClientError> {
        let wire =
            tls::connect(url, roots, REPLY_TIMEOUT).map_err(|e| ClientError::Protocol(e.to_string()))?;
        Ok(Client { wire: Box::new(wire), owner: None, path: url.into(), token: None })
    }

    /// Shows a tenant's or the provider's token with each request from now on.
    pub fn show_token(&mut self, token: String) {
        self.token = Some(token);
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn version(&mut self) -> Result<VersionInfo, ClientError> {
        self.ask(&Request::Version).map(|(value, _)| value)
    }

    pub fn create_guest(&mut self, guest: NewGuest) -> Result<(Attached, [OwnedFd; 3]), ClientError> {
        self.ask_descriptors(&Request::CreateGuest(guest))
    }

    pub fn attach(&mut self, token: &[u8; 16]) -> Result<(Attached, [OwnedFd; 3]), ClientError> {
        self.ask_descriptors(&Request::Attach(Token { token: token_hex(token) }))
    }

    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.ask(&Request::Status).map(|(value, _)| value)
    }

    pub fn guests(&mut self) -> Result<Vec<GuestInfo>, ClientError> {
        self.status().map(|status| status.guests)
    }

    pub fn stacks(&mut self) -> Result<Vec<NsmInfo>, ClientError> {
        self.ask(&Request::Stacks).map(|(value, _)| value)
    }

    pub fn sockets(&mut self, guest: Option<u32>) -> Result<Vec<SocketInfo>, ClientError> {
        self.find_sockets(SocketQuery { guest, ..SocketQuery::default() })
    }

    pub fn find_sockets(&mut self, query: SocketQuery) -> Result<Vec<SocketInfo>, ClientError> {
        self.ask(&Request::Sockets(query)).map(|(value, _)| value)
    }

    pub fn end_guest(&mut self, guest: u32) -> Result<(), ClientError> {
        self.ask::<serde_json::Value>(&Request::EndGuest { guest }).map(drop)
    }

    /// `all_or_nothing`: it stays if one of its sockets would.
    pub fn move_guest(
        &mut self,
        guest: u32,
        stack: &str,
        all_or_nothing: bool,
    ) -> Result<Moved, ClientError> {
        let to = Destination { stack: stack.into(), all_or_nothing };
        self.ask(&Request::MoveGuest { guest, to }).map(|(value, _)| value)
    }

    pub fn restart_stack(&mut self, name: &str) -> Result<Restarted, ClientError> {
        self.ask(&Request::RestartNsm { nsm: name.into() }).map(|(value, _)| value)
    }

    pub fn swap_stack(&mut self, name: &str, change: StackChange) -> Result<Restarted, ClientError> {
        self.ask(&Request::SwapNsm { nsm: name.into(), change }).map(|(value, _)| value)
    }

    /// Ends as soon as the engine has begun.
    pub fn restart_engine(&mut self, change: EngineChange) -> Result<(), ClientError> {
        self.ask::<serde_json::Value>(&Request::RestartEngine(change)).map(drop)
    }

    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.ask::<serde_json::Value>(&Request::Stop).map(drop)
    }

    fn ask_descriptors(&mut self, request: &Request) -> Result<(Attached, [OwnedFd; 3]), ClientError> {
        let (value, fds) = self.ask(request)?;
        let count = fds.len();
        let fds = fds.try_into().map_err(|_| {
            ClientError::Protocol(format!(
                "the engine at {} sent {count} descriptors instead of 3: raise RLIMIT_NOFILE (`ulimit -n`) if it is low",
                self.path.display()
            ))
        })?;
        Ok((value, fds))
    }

    pub fn usage(&mut self, query: UsageQuery) -> Result<Vec<netkernel_meter::Row>, ClientError> {
        self.ask(&Request::Usage(query)).map(|(value, _)| value)
    }

    /// The end of a pipe with pcapng; the capture is over when it is closed.
    pub fn capture(&mut self, capture: NewCapture) -> Result<(OwnedFd, CaptureInfo), ClientError> {
        let (info, fds) = self.ask(&Request::Capture(capture))?;
        let pipe = fds.into_iter().next().ok_or_else(|| self.garbled("it sent no descriptor"))?;
        Ok((pipe, info))
    }

    pub fn tenants(&mut self) -> Result<Vec<TenantInfo>, ClientError> {
        self.ask(&Request::Tenants).map(|(value, _)| value)
    }

    pub fn change_tenant(&mut self, name: &str, change: TenantChange) -> Result<(), ClientError> {
        let request = Request::ChangeTenant { name: name.into(), change };
        self.ask::<serde_json::Value>(&request).map(drop)
    }

    pub fn reload(&mut self) -> Result<(), ClientError> {
        self.ask::<serde_json::Value>(&Request::Reload).map(drop)
    }

    /// Counters in the text format of OpenMetrics.
    pub fn metrics(&mut self) -> Result<String, ClientError> {
        let answer = self.exchange(&Request::Metrics)?;
        String::from_utf8(answer.body).map_err(|e| self.garbled(&e.to_string()))
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<(T, Vec<OwnedFd>), ClientError> {
        let answer = self.exchange(request)?;
        let value = serde_json::from_slice(&answer.body).map_err(|e| self.garbled(&e.to_string()))?;
        Ok((value, answer.descriptors))
    }

    fn exchange(&mut self, request: &Request) -> Result<Answer, ClientError> {
        #[derive(Deserialize)]
        struct Refusal {
            error: ApiError,
        }
        let (method, target, body) = encode(request);
        let body = body.map(|value| value.to_string().into_bytes());
        // An engine that refuses at once answers and closes; its answer counts, not our failed write.
        let written = self.write(method, &target, body.as_deref());
        let answer = match (http::read_reply(&mut *self.wire, REPLY_TIMEOUT), written) {
            (Ok(answer), _) => answer,
            (Err(_), Err(error)) => return Err(self.io(error)),
            (Err(error), Ok(())) => {
                return Err(match error.kind() {
                    io::ErrorKind::InvalidData => self.garbled(&error.to_string()),
                    io::ErrorKind::TimedOut => self.io(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("nothing came for {} seconds", REPLY_TIMEOUT.as_secs()),
                    )),
                    _ => self.io(error),
                });
            }
        };
        if answer.status == 200 {
            return Ok(answer);
        }
        let refusal: Refusal =
            serde_json::from_slice(&answer.body).map_err(|e| self.garbled(&e.to_string()))?;
        Err(ClientError::Refused(refusal.error))
    }

    fn write(&mut self, method: &str, target: &str, body: Option<&[u8]>) -> io::Result<()> {
        self.wire.allow(REPLY_TIMEOUT);
        http::write_request(&mut *self.wire, method, target, body, self.token.as_deref())
    }

    fn io(&self, error: io::Error) -> ClientError {
        ClientError::Io(self.path.clone(), error)
    }

    fn garbled(&self, why: &str) -> ClientError {
        ClientError::Protocol(format!(
            "what answers at {} is no netkernel engine of this version ({why})",
            self.path.display()
        ))
    }
}
