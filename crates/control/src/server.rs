//! The answering side: a thread per connection, few of them, none for long.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use netkernel_meter::Row;
use netkernel_shm::fds;
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::{self, METRICS_TYPE, Role};
use crate::http::{self, ReadError, Reply};
use crate::peer::{Peer, peer_of};
use crate::{
    ApiError, Attached, Endpoint, ErrorCode, GuestInfo, NewCapture, NewGuest, NsmInfo, Request, SocketInfo,
    Status, TenantChange, TenantInfo, UsageQuery, VersionInfo, parse_token, token_hex,
};

/// Connections at a time, in all and of one user who is neither the engine's nor root.
const MAX_CONNECTIONS: usize = 256;
const MAX_CONNECTIONS_PER_USER: usize = 32;
/// A request must be complete this long after its connection or the last reply.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What a guest gets.
#[derive(Debug)]
pub struct Grant {
    pub id: u32,
    pub token: [u8; 16],
    /// How the stack wants programs to be attached.
    pub attach: String,
    pub region: OwnedFd,
    pub channel: OwnedFd,
    pub doorbell: OwnedFd,
    pub direct: bool,
}

/// What the control server needs of an engine. Permissions are checked before these are called.
pub trait EngineApi: Send + Sync {
    fn version(&self) -> VersionInfo;
    fn create_guest(&self, guest: NewGuest, peer: Peer) -> Result<Grant, ApiError>;
    fn attach(&self, token: [u8; 16]) -> Result<Grant, ApiError>;
    fn status(&self) -> Status;
    fn stacks(&self) -> Vec<NsmInfo>;
    /// Sockets of guests; those that ended in between have none.
    fn sockets(&self, guests: &[u32]) -> Result<Vec<SocketInfo>, ApiError>;
    fn end_guest(&self, guest: u32) -> Result<(), ApiError>;
    /// Asks the engine's process to end; returns at once.
    fn stop(&self);
    /// Usage of the user with this uid, or of all.
    fn usage(&self, query: &UsageQuery, of: Option<u32>) -> Result<Vec<Row>, ApiError>;
    /// The end of a pipe with pcapng: of what guests of the user with this uid, or of all, send and receive.
    fn capture(&self, capture: NewCapture, of: Option<u32>) -> Result<OwnedFd, ApiError>;
    fn tenants(&self) -> Vec<TenantInfo>;
    fn change_tenant(&self, name: &str, change: TenantChange) -> Result<(), ApiError>;
    /// Reads the configuration file again.
    fn reload(&self) -> Result<(), ApiError>;
    /// Counters in the text format of OpenMetrics.
    fn metrics(&self) -> String;
}

/// Who may do what. The engine's own user and root may do everything.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The engine's user.
    pub owner: u32,
    /// Others who may create guests, and see and end their own.
    pub users: Vec<u32>,
    pub everybody: bool,
}

impl Access {
    pub fn is_operator(&self, uid: u32) -> bool {
        uid == self.owner || uid == 0
    }

    pub fn may_create(&self, uid: u32) -> bool {
        self.is_operator(uid) || self.everybody || self.users.contains(&uid)
    }
}

/// A running control server. Dropping it closes the endpoint; replies under way are finished.
#[derive(Debug)]
pub struct Server {
    stop: OwnedFd,
    acceptor: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub fn start(endpoint: Endpoint, api: Arc<dyn EngineApi>, access: Access) -> io::Result<Server> {
        let stop = fds::eventfd()?;
        let stopped = stop.try_clone()?;
        let acceptor = thread::Builder::new().name("control".into()).spawn(move || {
            let shared = Arc::new(Shared { api, access, open: Mutex::new(Open::default()) });
            accept_loop(&endpoint, &stopped, &shared);
        })?;
        Ok(Server { stop, acceptor: Some(acceptor) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

struct Shared {
    api: Arc<dyn EngineApi>,
    access: Access,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    all: usize,
    by_user: HashMap<u32, usize>,
}

/// A connection's place in the count.
struct Place {
    shared: Arc<Shared>,
    uid: u32,
}

impl Shared {
    fn take_place(self: &Arc<Self>, uid: u32) -> Option<Place> {
        let mut open = self.open.lock().unwrap_or_else(|e| e.into_inner());
        let operator = self.access.is_operator(uid);
        let of_user = open.by_user.get(&uid).copied().unwrap_or(0);
        // The operator always gets in: nobody else can take the last places.
        if !operator && (open.all >= MAX_CONNECTIONS || of_user >= MAX_CONNECTIONS_PER_USER) {
            return None;
        }
        if of_user >= MAX_CONNECTIONS {
            return None;
        }
        open.all += 1;
        *open.by_user.entry(uid).or_default() += 1;
        Some(Place { shared: self.clone(), uid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.shared.open.lock().unwrap_or_else(|e| e.into_inner());
        open.all -= 1;
        if let Some(count) = open.by_user.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                open.by_user.remove(&self.uid);
            }
        }
    }
}

fn accept_loop(endpoint: &Endpoint, stopped: &OwnedFd, shared: &Arc<Shared>) {
    loop {
        let mut waiting =
            [PollFd::new(endpoint.listener(), PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                eprintln!("netkernel: control socket: poll: {e}; no more requests are taken");
                return;
            }
        }
        if waiting[1].revents().contains(PollFlags::IN) {
            return;
        }
        match endpoint.listener().accept() {
            Ok((stream, _)) => serve_on_thread(stream, shared),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                // Out of descriptors or memory: the connection waits in the backlog; do not spin on it.
                eprintln!("netkernel: control socket: accept: {e}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve_on_thread(stream: UnixStream, shared: &Arc<Shared>) {
    let Ok(peer) = peer_of(&stream) else { return };
    let _ = stream.set_nonblocking(false);
    let Some(place) = shared.take_place(peer.uid) else {
        let _ = stream.set_write_timeout(Some(Duration::from_millis(10)));
        let error =
            ApiError::new(ErrorCode::Limit, "the engine serves too many control connections: try again");
        let _ = http::write_reply(&stream, &error_reply(&error), true, &[]);
        return;
    };
    let started =
        thread::Builder::new().name("control-client".into()).stack_size(256 * 1024).spawn(move || {
            let shared = place.shared.clone();
            let _ = serve(&stream, peer, &shared);
            drop(place);
        });
    if let Err(e) = started {
        eprintln!("netkernel: control socket: no thread for a connection: {e}");
    }
}

fn serve(stream: &UnixStream, peer: Peer, shared: &Shared) -> io::Result<()> {
    stream.set_write_timeout(Some(REQUEST_TIMEOUT))?;
    let mut buffer = Vec::new();
    loop {
        let mut stop = false;
        let request = match http::read_request(stream, &mut buffer, REQUEST_TIMEOUT) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(ReadError::Io(error)) => return Err(error),
            Err(ReadError::Refused(status, text)) => {
                let error = ApiError::new(ErrorCode::BadRequest, text);
                let reply = Reply { status, ..error_reply(&error) };
                return http::write_reply(stream, &reply, true, &[]);
            }
        };
        let answered =
            api::decode(&request.method, &request.target, &request.body).and_then(|(asked, role)| {
                stop = asked == Request::Stop;
                answer(asked, role, peer, shared)
            });
        match answered {
            Ok((reply, descriptors)) => {
                let fds: Vec<_> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
                http::write_reply(stream, &reply, request.last, &fds)?;
            }
            Err(error) => {
                stop = false;
                http::write_reply(stream, &error_reply(&error), request.last, &[])?;
            }
        }
        if stop {
            // After the answer: the process may be gone at once.
            shared.api.stop();
        }
        if request.last {
            return Ok(());
        }
    }
}

fn error_reply(error: &ApiError) -> Reply {
    let body = json!({ "error": error }).to_string().into_bytes();
    Reply { status: error.code.http_status(), content_type: "application/json", body }
}

fn answer(
    request: Request,
    role: Role,
    peer: Peer,
    shared: &Shared,
) -> Result<(Reply, Vec<OwnedFd>), ApiError> {
    let Shared { api, access, .. } = shared;
    let operator = access.is_operator(peer.uid);
    if role == Role::Provider && !operator {
        return Err(denied(match request {
            Request::Stop => "only the engine's user and root may stop it".into(),
            _ => "this is for the engine's user and root only".into(),
        }));
    }
    match request {
        Request::Version => done(&api.version()),
        Request::CreateGuest(guest) => {
            if !access.may_create(peer.uid) {
                return Err(denied(format!(
                    "uid {} may not create guests on this engine: ask its operator to list you in allow_users, or start \
                     a private engine with `netkernel run --private`",
                    peer.uid
                )));
            }
            granted(api.create_guest(guest, peer)?)
        }
        Request::Attach(token) => {
            let token = parse_token(&token.token)
                .ok_or_else(|| ApiError::new(ErrorCode::BadToken, "a token is 32 hexadecimal digits"))?;
            granted(api.attach(token)?)
        }
        Request::Status => {
            let mut status = api.status();
            status.guests.retain(|g| operator || g.uid == peer.uid);
            if !operator {
                // Of all tenants together.
                status.details.remove("stages");
            }
            done(&status)
        }
        Request::Stacks => done(&api.stacks()),
        Request::Sockets(query) => {
            let wanted = |g: &GuestInfo| {
                let tenant = g.details.get("tenant").and_then(Value::as_str);
                (operator || g.uid == peer.uid)
                    && query.guest.is_none_or(|id| id == g.id)
                    && query.nsm.as_ref().is_none_or(|nsm| *nsm == g.stack)
                    && query.tenant.as_deref().is_none_or(|wanted| tenant == Some(wanted))
            };
            let guests: Vec<u32> = api.status().guests.iter().filter(|g| wanted(g)).map(|g| g.id).collect();
            if let Some(id) = query.guest.filter(|_| guests.is_empty()) {
                return Err(unknown_guest(id));
            }
            let mut found = api.sockets(&guests)?;
            let has = |s: &SocketInfo, key: &str| query.has_port(s.details.get(key));
            found.retain(|s| has(s, "local") || has(s, "peer"));
            done(&found)
        }
        Request::EndGuest { guest } => {
            let known = api.status().guests.iter().any(|g| g.id == guest && (operator || g.uid == peer.uid));
            if !known {
                return Err(unknown_guest(guest));
            }
            api.end_guest(guest)?;
            done(&())
        }
        Request::Stop => done(&()),
        Request::Capture(capture) => {
            if capture.tenant.is_none() && capture.guest.is_none() {
                return Err(ApiError::new(ErrorCode::BadRequest, "name a tenant or a guest to capture"));
            }
            // Only their own guests, whatever they name.
            let of = (!operator).then_some(peer.uid);
            if let Some(id) = capture.guest
                && !api.status().guests.iter().any(|g| g.id == id && of.is_none_or(|uid| uid == g.uid))
            {
                return Err(unknown_guest(id));
            }
            let (reply, _) = done(&())?;
            Ok((reply, vec![api.capture(capture, of)?]))
        }
        Request::Tenants => done(&api.tenants()),
        Request::ChangeTenant { name, change } => done(&api.change_tenant(&name, change)?),
        Request::Reload => done(&api.reload()?),
        Request::Usage(query) => done(&api.usage(&query, (!operator).then_some(peer.uid))?),
        Request::Metrics => {
            let body = api.metrics().into_bytes();
            Ok((Reply { status: 200, content_type: METRICS_TYPE, body }, Vec::new()))
        }
        Request::OpenApi => done(&crate::openapi()),
    }
}

fn done<T: Serialize>(value: &T) -> Result<(Reply, Vec<OwnedFd>), ApiError> {
    let body = serde_json::to_vec(value).map_err(|e| ApiError::new(ErrorCode::Engine, e.to_string()))?;
    Ok((Reply { status: 200, content_type: "application/json", body }, Vec::new()))
}

fn granted(grant: Grant) -> Result<(Reply, Vec<OwnedFd>), ApiError> {
    let attached = Attached {
        id: grant.id,
        token: token_hex(&grant.token),
        attach: grant.attach.clone(),
        direct: grant.direct,
    };
    let (reply, _) = done(&attached)?;
    Ok((reply, vec![grant.region, grant.channel, grant.doorbell]))
}

fn denied(message: String) -> ApiError {
    ApiError::new(ErrorCode::Permission, message)
}

/// The same words for a guest that is not there and one of somebody else.
fn unknown_guest(id: u32) -> ApiError {
    ApiError::new(ErrorCode::UnknownGuest, format!("no guest {id}: `netkernel ps` lists them"))
}
