//! The answering side: a thread per connection, few of them, none for long.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use netkernel_meter::Row;
use netkernel_shm::fds;
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::{self, METRICS_TYPE, Role};
use crate::caller::{Access, Caller, caller_of, check};
use crate::door::{Closed, Door, Entered};
use crate::http::{self, ReadError, Reply};
use crate::peer::{Peer, peer_of};
use crate::places::{Limits, Places};
use crate::wire::{Timed, Wire};
use crate::{
    ApiError, Attached, CaptureInfo, Destination, Endpoint, EngineChange, ErrorCode, GuestInfo, Moved,
    NewCapture, NewGuest, NsmInfo, Request, Restarted, SocketInfo, StackChange, Status, TenantChange,
    TenantInfo, UsageQuery, VersionInfo, parse_token, token_hex,
};

/// Connections at a time. Two of each tenant or user find a place however many others there are, up to 1,000 of them.
pub(crate) const LIMITS: Limits = Limits { each: 32, all: 256, kept: 2, most: 2304 };
/// A request must be complete this long after its connection or the last reply, and its reply taken as soon.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that has no answer yet delays the end of the program.
const UNANSWERED: Duration = Duration::from_secs(2);

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
    /// The tenant that a process belongs to; without `uid` by its control group and network namespace only.
    fn tenant_of(&self, pid: i32, uid: Option<u32>) -> Option<String>;
    /// Whose token it is.
    fn by_token(&self, token: &str) -> Option<Caller>;
    /// Names of the NSMs that a tenant may use; `None`: all.
    fn nsms_of(&self, tenant: &str) -> Option<Vec<String>>;
    /// Sockets of guests; those that ended in between have none.
    fn sockets(&self, guests: &[u32]) -> Result<Vec<SocketInfo>, ApiError>;
    fn end_guest(&self, guest: u32) -> Result<(), ApiError>;
    /// Puts a guest on another stack.
    fn move_guest(&self, _guest: u32, _to: &Destination) -> Result<Moved, ApiError> {
        Err(ApiError::new(ErrorCode::BadRequest, "this engine has one stack only"))
    }
    /// Exchanges the process of a stack under its guests.
    fn restart_stack(&self, _name: &str) -> Result<Restarted, ApiError> {
        Err(ApiError::new(ErrorCode::BadRequest, "this engine has no stacks in processes of their own"))
    }
    /// The same for another program or configuration.
    fn swap_stack(&self, _name: &str, _change: StackChange) -> Result<Restarted, ApiError> {
        Err(ApiError::new(ErrorCode::BadRequest, "this engine has no stacks in processes of their own"))
    }
    /// Asks the engine's process to end; returns at once.
    fn stop(&self);
    /// What the caller may see of the usage.
    fn usage(&self, query: &UsageQuery, caller: &Caller) -> Result<Vec<Row>, ApiError>;
    /// The end of a pipe with pcapng: of what guests of the user with this uid, or of all, send and receive.
    fn capture(&self, capture: NewCapture, of: Option<u32>) -> Result<(OwnedFd, CaptureInfo), ApiError>;
    fn tenants(&self) -> Vec<TenantInfo>;
    fn change_tenant(&self, name: &str, change: TenantChange) -> Result<(), ApiError>;
    /// Reads the configuration file again.
    fn reload(&self) -> Result<(), ApiError>;
    /// Whether the engine's program can be exchanged; [`EngineApi::restart_now`] does it.
    fn can_restart(&self, _change: EngineChange) -> Result<(), ApiError> {
        Err(ApiError::new(ErrorCode::BadRequest, "this engine cannot be exchanged under its guests"))
    }
    /// What was asked last; returns at once.
    fn restart_now(&self) {}
    /// Counters in the text format of OpenMetrics.
    fn metrics(&self) -> String;
}

/// A running control server. Dropping it closes the endpoint; replies under way are finished.
#[derive(Debug)]
pub struct Server {
    stop: OwnedFd,
    door: Arc<Door>,
    acceptor: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub fn start(endpoint: Endpoint, api: Arc<dyn EngineApi>, access: Access) -> io::Result<Server> {
        let shared = Arc::new(Shared { api, access, places: Places::new(LIMITS) });
        Server::run("control", move |stopped, door| accept_loop(&endpoint, stopped, door, &shared))
    }

    /// Lets nobody in until the value is dropped: who connects waits. Those inside get their first answer before, for at most two seconds.
    pub fn close(&self) -> Closed<'_> {
        self.door.close(UNANSWERED)
    }

    /// Runs a loop that ends when the descriptor is readable.
    pub(crate) fn run(
        name: &str,
        accept: impl FnOnce(&OwnedFd, &Arc<Door>) + Send + 'static,
    ) -> io::Result<Server> {
        let stop = fds::eventfd()?;
        let stopped = stop.try_clone()?;
        let door = Arc::new(Door::default());
        let inner = Arc::clone(&door);
        let acceptor = thread::Builder::new().name(name.into()).spawn(move || accept(&stopped, &inner))?;
        Ok(Server { stop, door, acceptor: Some(acceptor) })
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
    places: Arc<Places<Caller>>,
}

fn accept_loop(endpoint: &Endpoint, stopped: &OwnedFd, door: &Arc<Door>, shared: &Arc<Shared>) {
    loop {
        let mut waiting =
            [PollFd::new(endpoint.listener(), PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::error!("control socket: poll: {e}; no more requests are taken");
                return;
            }
        }
        if waiting[1].revents().contains(PollFlags::IN) {
            return;
        }
        let entered = door.enter();
        match endpoint.listener().accept() {
            Ok((stream, _)) => serve_on_thread(stream, entered, shared),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                // Out of descriptors or memory: the connection waits in the backlog; do not spin on it.
                log::error!("control socket: accept: {e}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve_on_thread(stream: UnixStream, entered: Entered, shared: &Arc<Shared>) {
    let Ok(peer) = peer_of(&stream) else { return };
    let _ = stream.set_nonblocking(false);
    let caller = shared.access.of_peer(peer, &*shared.api);
    // The provider always gets in: nobody else can take the last places.
    let always = caller.is_provider();
    let place = shared.places.take(caller, always);
    let mut wire = Timed::new(stream, REQUEST_TIMEOUT);
    let Some(place) = place else {
        let error =
            ApiError::new(ErrorCode::Limit, "the engine serves too many control connections: try again");
        let _ = http::write_reply(&mut wire, &error_reply(&error), true, &[], Duration::from_millis(10));
        return;
    };
    let shared = shared.clone();
    spawn(move || {
        let _ = serve(&mut wire, Some(peer), entered, &*shared.api, &shared.access, |_| Ok(()));
        drop(place);
    });
}

/// Runs a connection on a thread of its own.
pub(crate) fn spawn(run: impl FnOnce() + Send + 'static) {
    let thread = thread::Builder::new().name("control-client".into()).stack_size(256 * 1024);
    if let Err(e) = thread.spawn(run) {
        log::error!("control socket: no thread for a connection: {e}");
    }
}

/// Answers what comes. `admit` is asked before each answer.
pub(crate) fn serve(
    wire: &mut dyn Wire,
    peer: Option<Peer>,
    entered: Entered,
    api: &dyn EngineApi,
    access: &Access,
    mut admit: impl FnMut(&Caller) -> Result<(), ApiError>,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut entered = Some(entered);
    loop {
        let (mut stop, mut restart) = (false, false);
        let request = match http::read_request(wire, &mut buffer, REQUEST_TIMEOUT) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(ReadError::Io(error)) => return Err(error),
            Err(ReadError::Refused(status, text)) => {
                let error = ApiError::new(ErrorCode::BadRequest, text);
                let reply = Reply { status, ..error_reply(&error) };
                return http::write_reply(wire, &reply, true, &[], REQUEST_TIMEOUT);
            }
        };
        // Who is not known learns nothing, not even which paths there are.
        let answered = caller_of(peer, request.token.as_deref(), access, api).and_then(|caller| {
            admit(&caller)?;
            let (asked, role) = api::decode(&request.method, &request.target, &request.body)?;
            stop = asked == Request::Stop;
            restart = matches!(asked, Request::RestartEngine(_));
            let shown = request.token.filter(|_| !caller.is_provider());
            answer(asked, role, &Asker { caller, peer, token: shown }, api, access)
        });
        let (reply, descriptors) = answered.unwrap_or_else(|error| {
            (stop, restart) = (false, false);
            (error_reply(&error), Vec::new())
        });
        let fds: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        http::write_reply(wire, &reply, request.last, &fds, REQUEST_TIMEOUT)?;
        drop(entered.take());
        if stop {
            // After the answer: the process may be gone at once.
            api.stop();
        }
        if restart {
            api.restart_now();
        }
        if request.last {
            return Ok(());
        }
    }
}

/// Who asks.
struct Asker {
    caller: Caller,
    /// `None`: over TCP.
    peer: Option<Peer>,
    /// What it showed, if that is a tenant's.
    token: Option<String>,
}

fn error_reply(error: &ApiError) -> Reply {
    let body = json!({ "error": error }).to_string().into_bytes();
    Reply { status: error.code.http_status(), content_type: "application/json", body }
}

fn answer(
    request: Request,
    role: Role,
    asker: &Asker,
    api: &dyn EngineApi,
    access: &Access,
) -> Result<(Reply, Vec<OwnedFd>), ApiError> {
    let caller = &asker.caller;
    let text = match request {
        Request::Stop => "only the engine's user and root may stop it",
        _ => "this is for the engine's user and root only",
    };
    check(role, caller, text)?;
    match request {
        Request::Version => done(&api.version()),
        Request::CreateGuest(mut guest) => {
            let peer = asker.peer.ok_or_else(no_descriptors)?;
            if !access.may_create(caller) {
                return Err(denied(format!(
                    "uid {} may not create guests on this engine: ask its operator to list you in allow_users, or start \
                     a private engine with `netkernel run --private`",
                    peer.uid
                )));
            }
            guest.tenant_token = guest.tenant_token.or_else(|| asker.token.clone());
            granted(api.create_guest(guest, peer)?)
        }
        Request::Attach(token) => {
            asker.peer.ok_or_else(no_descriptors)?;
            let token = parse_token(&token.token)
                .ok_or_else(|| ApiError::new(ErrorCode::BadToken, "a token is 32 hexadecimal digits"))?;
            granted(api.attach(token)?)
        }
        Request::Status => {
            let mut status = api.status();
            status.guests.retain(|guest| caller.sees(guest));
            if !caller.is_provider() {
                // Of all tenants together.
                status.details.clear();
            }
            done(&status)
        }
        Request::Stacks => done(&stacks(caller, api)),
        Request::Sockets(query) => {
            let wanted = |g: &GuestInfo| {
                let tenant = g.details.get("tenant").and_then(Value::as_str);
                caller.sees(g)
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
            let known = api.status().guests.iter().any(|g| g.id == guest && caller.sees(g));
            if !known {
                return Err(unknown_guest(guest));
            }
            api.end_guest(guest)?;
            done(&())
        }
        Request::MoveGuest { guest, to } => {
            if !api.status().guests.iter().any(|g| g.id == guest && caller.sees(g)) {
                return Err(unknown_guest(guest));
            }
            done(&api.move_guest(guest, &to)?)
        }
        Request::RestartNsm { nsm } => done(&api.restart_stack(&nsm)?),
        Request::SwapNsm { nsm, change } => done(&api.swap_stack(&nsm, change)?),
        Request::Stop => done(&()),
        Request::Capture(capture) => {
            asker.peer.ok_or_else(no_descriptors)?;
            if let Some(id) = capture.guest
                && !api.status().guests.iter().any(|g| g.id == id && caller.sees(g))
            {
                return Err(unknown_guest(id));
            }
            let (capture, of) = caller.captures(capture)?;
            let (pipe, info) = api.capture(capture, of)?;
            let (reply, _) = done(&info)?;
            Ok((reply, vec![pipe]))
        }
        Request::Tenants => {
            let mut tenants = api.tenants();
            tenants.retain(|tenant| match caller {
                Caller::Provider => true,
                Caller::Tenant(name) => tenant.name == *name,
                Caller::User(_) => false,
            });
            done(&tenants)
        }
        Request::ChangeTenant { name, change } => done(&api.change_tenant(&name, change)?),
        Request::RestartEngine(change) => done(&api.can_restart(change)?),
        Request::Reload => done(&api.reload()?),
        Request::Usage(query) => done(&api.usage(&query, caller)?),
        Request::Metrics => {
            let body = api.metrics().into_bytes();
            Ok((Reply { status: 200, content_type: METRICS_TYPE, body }, Vec::new()))
        }
        Request::OpenApi => done(&crate::openapi()),
    }
}

/// Those that the caller may use, with its own guests counted.
fn stacks(caller: &Caller, api: &dyn EngineApi) -> Vec<NsmInfo> {
    let mut stacks = api.stacks();
    if caller.is_provider() {
        return stacks;
    }
    let own: Vec<GuestInfo> = api.status().guests.into_iter().filter(|g| caller.sees(g)).collect();
    if let Caller::Tenant(name) = caller
        && let Some(allowed) = api.nsms_of(name)
    {
        stacks.retain(|nsm| allowed.contains(&nsm.name));
    }
    for nsm in &mut stacks {
        nsm.guests = own.iter().filter(|guest| guest.stack == nsm.name).count() as u64;
    }
    stacks
}

fn no_descriptors() -> ApiError {
    denied(
        "guests and captures are made on the engine's Unix socket only: descriptors do not go over TCP"
            .into(),
    )
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
