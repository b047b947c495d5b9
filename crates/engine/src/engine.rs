use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netkernel_abi::feature;
use netkernel_agent::{ByGuest, Carried, Processes};
use netkernel_capture::{Session, Target};
use netkernel_service::{Limits, now_ns};
use netkernel_shm::{Region, fds};

use crate::capture::Captures;
use crate::direct::{self, Direct};
use crate::direct_capture::DirectTap;
use crate::far;
use crate::heir::Heirs;
use crate::held::Held;
use crate::placement::{self, Load, Placement};
use crate::process::Form;
use crate::process::journal::{Left, Root};
use crate::process::remote::Remote;
use crate::process::transit::Packed;
use crate::process::wire;
use crate::relay::RELAY_SLOT;
use crate::seats;
use crate::sockets;
use crate::status::{Counters, GuestStatus, SocketStatus, StackStatus, Status};
use crate::tenants::{Asker, Tenant, Tenants};
use crate::totals::{self, Finished};
use crate::usage::{GuestUsage, MAX_OVER, Usage};
use crate::watch::{self, Watch};
use crate::worker::{Leaving, NewGuest, Went, Worker};
use crate::{Attained, EngineConfig, EngineError, GuestFds, GuestSpec, TenantConfig, TenantStatus};

/// How long a control call waits for a switch thread, which answers within a turn unless the machine stands still.
const ANSWER: Duration = Duration::from_secs(10);

/// The per-host daemon's core. See the crate's documentation.
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What control threads and switch threads share; never touched on the data path.
pub(crate) struct Shared {
    pub config: EngineConfig,
    /// The NSMs as they are set up now; what of `config.nsms` never changes can be read there.
    nsms: Vec<RwLock<Arc<crate::NsmConfig>>>,
    started: Instant,
    pub registry: Mutex<Registry>,
    changed: Condvar,
    pub workers: Vec<Link>,
    /// Held while it is asked which switch thread a guest is on and this is told something that must not be lost; written when
    /// a guest changes its thread.
    pub seats: RwLock<()>,
    /// Held while a guest is put on another NSM.
    pub moves: Mutex<()>,
    /// By NSM; those in processes of their own. In [`Registered::worker`] they come behind the threads.
    pub remotes: Vec<Option<Remote>>,
    /// Told of each guest that is over, with whether it broke the protocol.
    over_hook: Option<OverHook>,
    /// In the process of an NSM: what the next one must find if this one dies.
    pub root: Option<Arc<Root>>,
    pub stopping: AtomicBool,
    pub counters: SharedCounters,
    /// What guests that ended used, see [`Engine::usage`].
    pub over: Mutex<VecDeque<GuestUsage>>,
    pub tenants: Arc<Tenants>,
    finished: Finished,
    pub ledgers: Arc<direct::Ledgers>,
    pub captures: Captures,
    pub direct_tap: DirectTap,
    pub held: Held,
    watches: Vec<Arc<Watch>>,
    pub heirs: Heirs,
}

pub(crate) type OverHook = Box<dyn Fn(u32, Usage, bool) + Send + Sync>;

#[derive(Default)]
pub(crate) struct SharedCounters {
    pub created: AtomicU64,
    pub over: AtomicU64,
    pub violations: AtomicU64,
    pub turns: AtomicU64,
    pub sleeps: AtomicU64,
    pub doorbells: AtomicU64,
    pub wakes: AtomicU64,
    pub switch_cpu_ns: AtomicU64,
}

#[derive(Default)]
pub(crate) struct Registry {
    pub guests: HashMap<u32, Registered>,
    pub tokens: HashMap<[u8; 16], u32>,
    pub last_id: u32,
}

pub(crate) struct Registered {
    pub token: [u8; 16],
    pub name: String,
    pub nsm: usize,
    pub tenant: Arc<Tenant>,
    pub pid: i32,
    pub uid: u32,
    pub created: Instant,
    pub worker: usize,
    /// Of its region.
    pub sizes: netkernel_abi::Limits,
    pub region: OwnedFd,
    pub doorbell: OwnedFd,
    pub direct: Option<Direct>,
    /// Its switch thread, or process, has it.
    pub begun: bool,
    /// But for a moment, for it goes from one to another.
    pub on_the_way: bool,
    /// What it used on NSMs before this one, and when it came.
    pub before: Usage,
    pub came: Instant,
    /// Of NSMs that it left, by name.
    pub left: HashMap<String, LeftNsm>,
    /// Whose sockets its agent gives to what the queues do not serve, and whose it gave before.
    pub agent_nsm: usize,
    pub agent_before: Vec<usize>,
    /// NSMs that it was on before and whose switch threads' stacks have sockets of it.
    pub elders: Vec<usize>,
}

/// How a guest left an NSM, the last time.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct LeftNsm {
    /// How often it left. What it uses there later is counted anew.
    times: u32,
    /// What its direct sockets from there had carried, which is counted.
    carried: Carried,
}

impl Registered {
    /// Whether stacks that it was on before have sockets of it that only they know.
    pub fn has_elders(&self) -> bool {
        let relay = self.direct.as_ref().and_then(|direct| direct.relay.as_ref());
        !self.elders.is_empty() || relay.is_some_and(netkernel_relay::Link::has_elders)
    }

    /// All NSMs of which its programs may have sockets, the one of which they get new ones first.
    pub fn agent_nsms(&self) -> Vec<usize> {
        std::iter::once(self.agent_nsm).chain(self.agent_before.iter().copied()).collect()
    }
}

/// The way to a switch thread.
pub(crate) struct Link {
    commands: Mutex<VecDeque<Command>>,
    pub wake: OwnedFd,
    pub load: Load,
}

pub(crate) enum Command {
    Add(Box<NewGuest>, Sender<Result<(), EngineError>>),
    /// One more channel of a guest, the engine's end.
    Channel(u32, OwnedFd, Sender<Result<(), EngineError>>),
    /// A guest that a process before this one had; true: that one ended between two turns.
    Recover(Box<Left>, Arc<Tenant>, bool, Sender<Result<(), EngineError>>),
    /// Write all guests down, and do nothing any more unless one is told to go on.
    Leave(Sender<Result<Vec<Leaving>, EngineError>>, Receiver<()>),
    /// Give a guest away: another switch thread is to go on with it.
    Depart(u32, Sender<Result<Box<Left>, EngineError>>),
    /// Take a guest apart, for another process to go on with; true: its agent is under no call.
    Pack(u32, bool, Sender<Result<(Box<Left>, Usage), EngineError>>),
    /// Make the stack of an NSM, if there is none yet.
    Prepare(usize, Sender<Result<(), EngineError>>),
    /// Do nothing any more, and leave everything as it is.
    Freeze(Sender<()>),
    End(u32),
    /// Another NSM serves a guest; true: if all sockets go over.
    Move(u32, usize, bool, Sender<Result<Went, EngineError>>),
    Status(Sender<Vec<GuestStatus>>),
    Usage(Sender<Vec<(u32, Usage)>>),
    /// Processor time so far of each guest, in nanoseconds.
    Spent(Sender<Vec<(u32, u64)>>),
    /// Sockets of a guest from this one on; the answer says where to go on.
    Capture(Arc<Session>, Sender<Result<(), EngineError>>),
    Sockets(u32, u32, Sender<(Vec<SocketStatus>, Option<u32>)>),
    Stop,
}

impl Link {
    fn new() -> io::Result<Link> {
        Ok(Link { commands: Mutex::default(), wake: fds::eventfd()?, load: Load::default() })
    }

    fn send(&self, command: Command) {
        lock(&self.commands).push_back(command);
        write_eventfd(self.wake.as_raw_fd());
    }

    pub fn take(&self) -> VecDeque<Command> {
        std::mem::take(&mut *lock(&self.commands))
    }
}

pub(crate) fn write_eventfd(fd: i32) {
    let one = 1u64;
    // SAFETY: eight bytes, valid for reads.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// Starts the switch threads.
    pub fn start(config: EngineConfig) -> Result<Arc<Engine>, EngineError> {
        Engine::start_with(config, None, None, &[])
    }

    /// `taken`: places of NSMs whose processes run already ([`Tenants::new`]).
    pub(crate) fn start_with(
        config: EngineConfig,
        over_hook: Option<OverHook>,
        root: Option<Arc<Root>>,
        taken: &[(String, usize)],
    ) -> Result<Arc<Engine>, EngineError> {
        if config.nsms.is_empty() {
            return Err(EngineError::Config("no stack is configured: add at least one [[nsm]]".into()));
        }
        for (i, nsm) in config.nsms.iter().enumerate() {
            if config.nsms[..i].iter().any(|other| other.name == nsm.name) {
                return Err(EngineError::Config(format!("two stacks have the name `{}`", nsm.name)));
            }
        }
        if config.switch_threads == 0 || config.switch_threads > 256 {
            return Err(EngineError::Config("switch_threads must be 1 to 256".into()));
        }
        netkernel_abi::Layout::new(config.limits).map_err(|e| EngineError::Config(e.to_string()))?;
        raise_descriptor_limit();
        let resource = |e: io::Error| EngineError::Resource(format!("the engine cannot start: {e}"));
        let workers: Vec<Link> =
            (0..config.switch_threads).map(|_| Link::new()).collect::<Result<_, _>>().map_err(resource)?;
        let watches: Vec<Arc<Watch>> = workers.iter().map(|_| Arc::default()).collect();
        watch::start(&watches).map_err(resource)?;
        let remotes = config.nsms.iter().enumerate();
        let remotes = remotes.map(|(i, nsm)| (nsm.form == Form::Process).then(|| Remote::new(i))).collect();
        let tenants = Arc::new(Tenants::new(&config.tenants, config.strict_tenants, &config.nsms, taken)?);
        Tenants::start(&tenants, &config.nsms).map_err(resource)?;
        let shared = Arc::new(Shared {
            tenants,
            watches,
            seats: RwLock::default(),
            moves: Mutex::default(),
            remotes,
            over_hook,
            root,
            nsms: config.nsms.iter().map(|nsm| RwLock::new(Arc::new(nsm.clone()))).collect(),
            config,
            started: Instant::now(),
            registry: Mutex::default(),
            changed: Condvar::new(),
            workers,
            stopping: AtomicBool::new(false),
            counters: SharedCounters::default(),
            over: Mutex::default(),
            heirs: Heirs::default(),
            finished: Finished::default(),
            ledgers: Arc::default(),
            captures: Captures::default(),
            direct_tap: DirectTap::default(),
            held: Held::default(),
        });
        let mut threads = Vec::new();
        for index in 0..shared.workers.len() {
            let worker = Worker::new(Arc::clone(&shared), index).map_err(resource)?;
            let thread = std::thread::Builder::new()
                .name(format!("nk-switch-{index}"))
                .spawn(move || worker.run())
                .map_err(resource)?;
            threads.push(thread);
        }
        seats::start(&shared).map_err(resource)?;
        Ok(Arc::new(Engine { shared, threads: Mutex::new(threads) }))
    }

    /// Makes a guest. It lives as long as a process holds its channel, or one of its sockets is open.
    pub fn create_guest(&self, spec: GuestSpec) -> Result<GuestFds, EngineError> {
        let shared = &self.shared;
        self.running()?;
        let config = &shared.config;
        let asker = Asker { pid: spec.pid, uid: spec.uid, token: spec.tenant_token.as_deref() };
        let tenant = shared.tenants.of(asker)?;
        let rights = tenant.config();
        let wanted = match (spec.stack.as_str(), rights.nsms.first()) {
            ("", Some(first)) => first.as_str(),
            ("", None) => config.nsms[0].name.as_str(),
            (named, _) => named,
        };
        let known = || -> Vec<String> {
            let names = config.nsms.iter().map(|nsm| nsm.name.clone());
            names.filter(|name| rights.may_use(name)).collect()
        };
        let nsm = config.nsms.iter().position(|nsm| nsm.name == wanted && rights.may_use(wanted));
        let nsm = nsm.ok_or_else(|| EngineError::UnknownStack { name: wanted.to_owned(), known: known() })?;
        config.kinds.check(&config.nsms[nsm]).map_err(|reason| EngineError::StackUnavailable {
            name: config.nsms[nsm].name.clone(),
            reason,
        })?;
        let id = {
            let mut registry = lock(&shared.registry);
            if registry.guests.len() >= config.max_guests {
                return Err(EngineError::TooManyGuests(config.max_guests));
            }
            registry.last_id += 1;
            registry.last_id
        };
        let mut limits = spec.limits.unwrap_or(config.limits);
        if let Some(bytes) = rights.region_bytes {
            limits.region_bytes = limits.region_bytes.min(bytes);
        }
        shared.tenants.take_guest(&tenant)?;
        // Given back with what is dropped before the guest is registered.
        let place = Place(Some(Arc::clone(&tenant)));
        shared.tenants.open(&tenant, &config.nsms)?;
        let huge = spec.huge_pages.unwrap_or(config.huge_pages);
        let spin_ns = u32::try_from(config.spin_us.saturating_mul(1000)).unwrap_or(u32::MAX);
        let region =
            Region::create(limits, id, spin_ns, huge).map_err(|e| EngineError::Resource(e.to_string()))?;
        region.add_features(feature::SPARES);
        if config.nsms[nsm].single_copy {
            region.add_features(feature::SINGLE_COPY);
        }
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors for a new guest: {e}"));
        let (channel_ours, channel_theirs) = channel_pair().map_err(resource)?;
        let doorbell = fds::eventfd().map_err(resource)?;
        // SAFETY: the region owns its descriptor and lives during this statement.
        let region_fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(region.fd()) };
        let fds = GuestFds {
            id,
            token: random_token().map_err(resource)?,
            attach: config.nsms[nsm].attach,
            region: region_fd.try_clone_to_owned().map_err(resource)?,
            channel: channel_theirs,
            doorbell: doorbell.try_clone().map_err(resource)?,
            direct: config.kinds.has_direct(&config.nsms[nsm]) && !tenant.needs_queues(),
        };
        let worker = match &shared.remotes[nsm] {
            Some(remote) => shared.workers.len() + remote.nsm(),
            None if config.placement == Placement::Pack => {
                placement::choose(shared.workers.iter().map(|link| &link.load), now_ns())
            }
            None => id as usize % shared.workers.len(),
        };
        let registered = Registered {
            token: fds.token,
            name: spec.name,
            nsm,
            tenant: Arc::clone(&tenant),
            pid: spec.pid,
            uid: spec.uid,
            created: Instant::now(),
            worker,
            sizes: limits,
            region: region_fd.try_clone_to_owned().map_err(resource)?,
            doorbell: doorbell.try_clone().map_err(resource)?,
            direct: None,
            begun: false,
            on_the_way: false,
            before: Usage::default(),
            came: Instant::now(),
            agent_nsm: nsm,
            agent_before: Vec::new(),
            elders: Vec::new(),
            left: HashMap::new(),
        };
        {
            let mut registry = lock(&shared.registry);
            place.keep();
            shared.tenants.arrive(&tenant, nsm, &config.nsms[nsm]);
            registry.tokens.insert(fds.token, id);
            registry.guests.insert(id, registered);
        }
        // The engine may be allowed more than who asked for the guest.
        let privileged = spec.uid == 0;
        let limits = tenant.limits(nsm);
        let owner = spec.uid;
        let channel = channel_ours;
        let guest = NewGuest { id, region, nsm, limits, tenant, privileged, owner, channel, doorbell };
        let result = self.ask(worker, |answer| Command::Add(Box::new(guest), answer));
        match result.and_then(|r| r) {
            Ok(()) => {
                shared.counters.created.fetch_add(1, Ordering::Relaxed);
                if let Some(guest) = lock(&shared.registry).guests.get_mut(&id) {
                    guest.begun = true;
                }
                Ok(fds)
            }
            Err(error) => {
                shared.forget(id);
                Err(error)
            }
        }
    }

    /// A guest that another engine made, for the process of an NSM.
    pub(crate) fn adopt_guest(
        &self,
        guest: &wire::NewGuest,
        tenant: Arc<Tenant>,
        region: Region,
        channel: OwnedFd,
        doorbell: OwnedFd,
    ) -> Result<(), EngineError> {
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors for a new guest: {e}"));
        // SAFETY: the region owns its descriptor and lives during this statement.
        let region_fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(region.fd()) };
        let registered = Registered {
            token: random_token().map_err(resource)?,
            name: guest.name.clone(),
            tenant: Arc::clone(&tenant),
            nsm: 0,
            pid: guest.pid,
            uid: guest.uid,
            created: Instant::now(),
            worker: 0,
            sizes: region.layout().limits,
            region: region_fd.try_clone_to_owned().map_err(resource)?,
            doorbell: doorbell.try_clone().map_err(resource)?,
            direct: None,
            begun: true,
            on_the_way: false,
            before: Usage::default(),
            came: Instant::now(),
            agent_nsm: 0,
            agent_before: Vec::new(),
            elders: Vec::new(),
            left: HashMap::new(),
        };
        lock(&self.shared.registry).guests.insert(guest.id, registered);
        let owner = guest.uid;
        let limits = tenant.limits(0);
        let new = NewGuest {
            id: guest.id,
            region,
            nsm: 0,
            limits,
            tenant,
            privileged: guest.privileged,
            owner,
            channel,
            doorbell,
        };
        let result = self.ask(0, |answer| Command::Add(Box::new(new), answer)).and_then(|r| r);
        if result.is_err() {
            self.shared.forget(guest.id);
        }
        result
    }

    pub(crate) fn named_tenant(&self, name: &str) -> Arc<Tenant> {
        let tenants = &self.shared.tenants;
        let named = tenants.all().find(|tenant| tenant.name() == name);
        named.map_or_else(|| tenants.others(), Arc::clone)
    }

    /// Goes on with the guests that a process before this one had; says which. An error: one of them cannot be gone on with,
    /// and this process is of no use: the others' descriptors are in nobody's hands.
    /// `place`: this NSM's in tenants' memory.
    pub(crate) fn recover(&self, place: usize) -> Result<Vec<u32>, u32> {
        let Some(root) = &self.shared.root else { return Ok(Vec::new()) };
        let exact = root.was_stopped();
        let mut alive = Vec::new();
        let mut all = root.take().into_iter();
        while let Some(left) = all.next() {
            let id = left.guest.id;
            if let Err(error) = self.recover_one(left, place, exact) {
                log::error!("guest {id} is lost: {error}");
                std::mem::forget(all);
                return Err(id);
            }
            alive.push(id);
        }
        self.shared.tenants.settle();
        Ok(alive)
    }

    fn recover_one(&self, mut left: Left, place: usize, exact: bool) -> Result<(), EngineError> {
        let memory = left.memory.take().ok_or(EngineError::Stopped)?;
        let tenant = self.shared.tenants.join(&left.guest.tenant, memory, place, true);
        left.may_use = tenant.limits(0);
        self.register(&left, &tenant)?;
        self.ask(0, |answer| Command::Recover(Box::new(left), tenant, exact, answer))?
    }

    /// Goes on, in the process of an NSM, with a guest that comes from another process, of which no sooner than that anything
    /// stands in the list of guests. On error it does not stand there.
    pub(crate) fn take_in(&self, mut packed: Packed, tenant: Arc<Tenant>) -> Result<(), EngineError> {
        let (Some(root), Some(left)) = (&self.shared.root, packed.left()) else {
            return Err(EngineError::Stopped);
        };
        let id = left.guest.id;
        self.register(left, &tenant)?;
        let numbers = (left.region.as_raw_fd(), left.doorbell.as_raw_fd());
        if !root.add(&left.guest, numbers.0, numbers.1, tenant.memory(), &left.journal) {
            self.shared.forget(id);
            return Err(EngineError::Resource("the process of this stack has too many guests".into()));
        }
        let come = far::unpack(&self.shared, packed, tenant, 0);
        if come.is_err() {
            root.remove(id);
            self.shared.forget(id);
        }
        come
    }

    /// A guest that another process had is known from now on.
    fn register(&self, left: &Left, tenant: &Arc<Tenant>) -> Result<(), EngineError> {
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors for a guest: {e}"));
        let registered = Registered {
            tenant: Arc::clone(tenant),
            token: random_token().map_err(resource)?,
            name: left.guest.name.clone(),
            nsm: 0,
            pid: left.guest.pid,
            uid: left.guest.uid,
            created: Instant::now(),
            worker: 0,
            sizes: left.guest.sizes(),
            region: left.region.try_clone().map_err(resource)?,
            doorbell: left.doorbell.try_clone().map_err(resource)?,
            direct: None,
            begun: true,
            on_the_way: false,
            before: Usage::default(),
            came: Instant::now(),
            agent_nsm: 0,
            agent_before: Vec::new(),
            elders: Vec::new(),
            left: HashMap::new(),
        };
        lock(&self.shared.registry).guests.insert(left.guest.id, registered);
        Ok(())
    }

    /// The switch thread of the process of an NSM stops where it is.
    pub(crate) fn freeze(&self) {
        self.shared.held.stop();
        let _ = self.ask(0, Command::Freeze);
    }

    /// One more channel of such a guest.
    pub(crate) fn add_channel(&self, id: u32, channel: OwnedFd) -> Result<(), EngineError> {
        self.ask(0, |answer| Command::Channel(id, channel, answer))?
    }

    /// The descriptors of a guest again, with a new channel, for a process that lost them.
    pub fn attach(&self, token: &[u8; 16]) -> Result<GuestFds, EngineError> {
        self.running()?;
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors to attach with: {e}"));
        let _stays = self.shared.seats.read().unwrap_or_else(PoisonError::into_inner);
        let (ours, theirs) = channel_pair().map_err(resource)?;
        let (worker, fds) = {
            let registry = lock(&self.shared.registry);
            let id = *registry.tokens.get(token).ok_or(EngineError::BadToken)?;
            let guest = registry.guests.get(&id).ok_or(EngineError::BadToken)?;
            let fds = GuestFds {
                id,
                token: *token,
                attach: self.shared.config.nsms[guest.nsm].attach,
                region: guest.region.as_fd().try_clone_to_owned().map_err(resource)?,
                channel: theirs,
                doorbell: guest.doorbell.as_fd().try_clone_to_owned().map_err(resource)?,
                direct: self.shared.config.kinds.has_direct(&self.shared.config.nsms[guest.nsm])
                    && !guest.tenant.needs_queues(),
            };
            (guest.worker, fds)
        };
        let id = fds.id;
        self.ask(worker, |answer| Command::Channel(id, ours, answer))??;
        Ok(fds)
    }

    /// Everything about the engine. Costs the switch threads a turn.
    pub fn status(&self) -> Status {
        let shared = &self.shared;
        let mut guests = self.guest_statuses();
        let mut agents = Vec::new();
        let carried = direct::carried(shared);
        let registry = lock(&shared.registry);
        // Those whose process is just started again, or that go from one to another.
        let silent = registry.guests.iter().filter(|(_, guest)| guest.begun).map(|(id, _)| *id);
        let silent: Vec<u32> = silent.filter(|id| guests.iter().all(|told| told.id != *id)).collect();
        guests.extend(silent.into_iter().map(|id| GuestStatus { id, ..GuestStatus::default() }));
        for status in &mut guests {
            if let Some(guest) = registry.guests.get(&status.id) {
                for carried in carried.get(&status.id).into_iter().flat_map(HashMap::values) {
                    status.bytes_in += carried.bytes_in;
                    status.bytes_out += carried.bytes_out;
                }
                // Of the stack that it is on; the rest is the guest's whole life.
                (status.usage, status.elsewhere) = shared.split(guest, status.usage, carried.get(&status.id));
                status.name.clone_from(&guest.name);
                status.tenant = guest.tenant.name();
                status.stack.clone_from(&shared.config.nsms[guest.nsm].name);
                status.pid = guest.pid;
                status.uid = guest.uid;
                status.age_seconds = guest.created.elapsed().as_secs();
                status.switch_thread = guest.worker;
                if guest.worker >= shared.workers.len() {
                    // The rest is told by its process.
                    continue;
                }
                status.attachment = match &guest.direct {
                    None => "queued",
                    Some(Direct { behind_preload: true, relay: None, .. }) => "queued, direct",
                    Some(Direct { behind_preload: true, .. }) => "queued, relay",
                    Some(Direct { relay: None, .. }) => "direct",
                    Some(_) => "relay",
                };
                status.pids.extend(u32::try_from(guest.pid).ok().filter(|pid| !status.pids.contains(pid)));
                if let Some(direct) = &guest.direct {
                    agents.push((status.id, guest.agent_nsms(), guest.pid, direct.clone()));
                }
            }
        }
        drop(registry);
        // Looking through /proc takes a while: not under the lock.
        let processes = if agents.is_empty() { Processes::default() } else { Processes::look() };
        for (id, nsms, pid, direct) in agents {
            let Some(status) = guests.iter_mut().find(|status| status.id == id) else { continue };
            status.direct_served = direct.counters.served.load(Ordering::Relaxed);
            status.direct_refused = direct.counters.refused.load(Ordering::Relaxed);
            status.direct_let_through = direct.counters.let_through.load(Ordering::Relaxed);
            let census = direct::census(&direct, pid, &processes);
            if !direct.behind_preload {
                // The agent's thread stands for the guest on the switch thread.
                status.processes = census.processes.len();
            } else {
                status.processes = status.processes.saturating_sub(1);
            }
            if status.direct_served > 0 {
                let sockets = direct::sockets(shared, id, &nsms, &direct, &census);
                status.sockets += sockets.len();
            }
            status.pids = census.processes.into_iter().collect();
        }
        guests.sort_by_key(|guest| guest.id);
        // What the process of an NSM tells, its sums are for.
        let stages = totals::stages(&mut guests, &shared.finished);
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &shared.counters;
        Status {
            uptime_seconds: shared.started.elapsed().as_secs(),
            switch_threads: shared.workers.len(),
            guests,
            stacks: self.stacks(),
            counters: Counters {
                guests_created: count(&counters.created),
                guests_over: count(&counters.over),
                violations: count(&counters.violations),
                turns: count(&counters.turns),
                sleeps: count(&counters.sleeps),
                doorbells: count(&counters.doorbells),
                wakes: count(&counters.wakes),
                switch_cpu_ns: count(&counters.switch_cpu_ns),
            },
            stages,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Tells all switch threads of a capture, and waits until they know.
    pub(crate) fn begin_capture(&self, session: &Arc<Session>) {
        for worker in self.shared.seats() {
            let _ = self.ask(worker, |answer| Command::Capture(Arc::clone(session), answer));
        }
        let registry = lock(&self.shared.registry);
        for (id, guest) in &registry.guests {
            if session.target.is(*id, &guest.tenant.name(), guest.uid) {
                for taps in guest.direct.iter().flat_map(|direct| &direct.taps) {
                    taps.begin(session, &[(RELAY_SLOT, Vec::new())]);
                }
            }
        }
    }

    pub(crate) fn guests_over(&self) -> u64 {
        self.shared.counters.over.load(Ordering::Relaxed)
    }

    pub(crate) fn finished(&self) -> &Finished {
        &self.shared.finished
    }

    /// What the switch threads say of their guests.
    fn guest_statuses(&self) -> Vec<GuestStatus> {
        let shared = &self.shared;
        let answers: Vec<Receiver<Vec<GuestStatus>>> = shared
            .seats()
            .map(|worker| {
                let (answer, receiver) = channel();
                shared.tell(worker, Command::Status(answer));
                receiver
            })
            .collect();
        let deadline = Instant::now() + ANSWER;
        let mut guests: Vec<GuestStatus> = Vec::new();
        for receiver in answers {
            let left = deadline.saturating_duration_since(Instant::now());
            guests.extend(receiver.recv_timeout(left).unwrap_or_default());
        }
        guests
    }

    /// What guests used so far; those that ended since the last call too, once. For one caller.
    pub fn usage(&self) -> Vec<GuestUsage> {
        let shared = &self.shared;
        let mut all = Vec::new();
        // Once stopped, there are only guests that are over.
        let running = self.running().is_ok();
        let carried = direct::carried(shared);
        for worker in shared.seats().filter(|_| running) {
            // What is told is of the NSM that the guest is on: it stays there meanwhile.
            let _stays = shared.seats.read().unwrap_or_else(PoisonError::into_inner);
            let counts = self.ask(worker, Command::Usage).unwrap_or_default();
            all.extend(
                counts.into_iter().flat_map(|(id, usage)| shared.usage_of(id, usage, &carried, false)),
            );
        }
        // Later: who ended meanwhile must not be told as alive after its end was.
        all.extend(std::mem::take(&mut *lock(&shared.over)));
        all
    }

    pub fn tenants(&self) -> Vec<TenantStatus> {
        self.shared.tenants.all().map(|tenant| tenant.status()).collect()
    }

    /// Name of the tenant whose token it is.
    pub fn tenant_by_token(&self, token: &str) -> Option<String> {
        self.shared.tenants.by_token(token).map(|tenant| tenant.name())
    }

    /// Name of the tenant that a process belongs to, if it is one of the configuration's. Without `uid` only control group
    /// and network namespace count.
    pub fn tenant_of_process(&self, pid: i32, uid: Option<u32>) -> Option<String> {
        self.shared.tenants.by_process(pid, uid).map(|tenant| tenant.name())
    }

    /// Which NSMs a tenant may use, by name; `None`: all.
    pub fn nsms_of(&self, tenant: &str) -> Option<Vec<String>> {
        let found =
            self.shared.tenants.all().map(|known| known.config()).find(|known| known.name == tenant)?;
        (!found.nsms.is_empty()).then_some(found.nsms)
    }

    /// New limits for a tenant, at once and for the connections that there are. Nothing changes when they are refused.
    pub fn change_tenant(
        &self,
        name: &str,
        change: impl FnOnce(&mut TenantConfig),
    ) -> Result<(), EngineError> {
        self.shared.tenants.change(name, &self.shared.config.nsms, change)?;
        self.keep_shares()
    }

    /// New limits for all tenants that there are; the same list of names as before. Nothing changes when they are refused.
    pub fn change_tenants(&self, new: &[TenantConfig]) -> Result<(), EngineError> {
        self.shared.tenants.change_all(new, &self.shared.config.nsms)?;
        self.keep_shares()
    }

    /// There may be something to share, to keep, or to hold, only now.
    fn keep_shares(&self) -> Result<(), EngineError> {
        self.shared.held.look(&self.shared);
        let resource = |e| EngineError::Resource(format!("no thread for the tenants' shares: {e}"));
        Tenants::start(&self.shared.tenants, &self.shared.config.nsms).map_err(resource)
    }

    /// In how many seconds the guarantees of tenants were met, since the engine began.
    pub fn attainment(&self) -> Vec<Attained> {
        self.shared.tenants.attained(&self.shared.config.nsms)
    }

    /// What came on top since the last call. For one caller.
    pub fn take_attained(&self) -> Vec<Attained> {
        self.shared.tenants.take_attained(&self.shared.config.nsms)
    }

    /// The sockets of a guest; empty when there is no such guest.
    pub fn sockets(&self, guest: u32) -> Vec<SocketStatus> {
        self.sockets_of(&[guest])
    }

    /// The sockets of some guests, each with the process that holds it.
    pub fn sockets_of(&self, guests: &[u32]) -> Vec<SocketStatus> {
        let processes = Processes::look();
        // Who holds what, the switch threads know.
        let announced: HashMap<u32, Vec<u32>> =
            self.guest_statuses().into_iter().map(|guest| (guest.id, guest.pids)).collect();
        let mut all = Vec::new();
        for guest in guests {
            let mut sockets = self.sockets_without_holders(*guest, &processes);
            let known = lock(&self.shared.registry).guests.get(guest).map(|guest| {
                let agents = guest.direct.as_ref().map(|direct| direct.counters.processes());
                let mut known: Vec<u32> = agents.into_iter().flatten().collect();
                known.extend(u32::try_from(guest.pid));
                (known, guest.tenant.name(), self.shared.config.nsms[guest.nsm].name.clone())
            });
            let Some((mut known, tenant, stack)) = known else { continue };
            known.extend(announced.get(guest).into_iter().flatten());
            sockets::find_holders(&mut sockets, &processes, &known);
            for socket in &mut sockets {
                socket.tenant.clone_from(&tenant);
                if socket.stack.is_empty() {
                    socket.stack.clone_from(&stack);
                }
            }
            all.append(&mut sockets);
        }
        all
    }

    /// The sockets of a guest, as far as its switch thread, relay or agent knows them.
    pub(crate) fn sockets_without_holders(&self, guest: u32, processes: &Processes) -> Vec<SocketStatus> {
        let known = lock(&self.shared.registry)
            .guests
            .get(&guest)
            .map(|guest| (guest.worker, guest.agent_nsms(), guest.pid, guest.direct.clone()));
        let Some((worker, nsms, pid, direct)) = known else { return Vec::new() };
        let apart = worker >= self.shared.workers.len();
        let mut sockets = Vec::new();
        let mut next = Some(0);
        while let Some(first) = next.take() {
            if let Ok((mut some, more)) = self.ask(worker, |answer| Command::Sockets(guest, first, answer)) {
                sockets.append(&mut some);
                // A guest that makes sockets as fast as they are listed does not keep us.
                next = more.filter(|&more| more > first);
            }
        }
        if let Some(direct) = &direct {
            let census = direct::census(direct, pid, processes);
            sockets.extend(direct::sockets(&self.shared, guest, &nsms, direct, &census));
        }
        if apart && nsms.len() > 1 {
            // Its process sees them, and takes them for its own.
            for socket in direct::of_before(&self.shared, guest, &nsms[1..], pid, processes) {
                sockets.retain(|other| other.attachment != "direct" || other.inode != socket.inode);
                sockets.push(socket);
            }
        }
        sockets
    }

    /// The catalog, each entry checked now.
    pub fn stacks(&self) -> Vec<StackStatus> {
        let shared = &*self.shared;
        let mut guests = vec![0; shared.config.nsms.len()];
        for guest in lock(&shared.registry).guests.values() {
            guests[guest.nsm] += 1;
        }
        let one = |(index, guests): (usize, usize)| {
            let nsm = shared.nsm(index);
            let check = shared.config.kinds.check(&nsm);
            StackStatus {
                name: nsm.name.clone(),
                stack: nsm.stack.clone(),
                congestion_control: nsm.congestion_control.clone(),
                netns: nsm.netns.clone(),
                form: nsm.form,
                attach: nsm.attach,
                capacity: nsm.capacity,
                available: check.is_ok(),
                reason: check.err(),
                guests,
            }
        };
        guests.into_iter().enumerate().map(one).collect()
    }

    /// Who made the guest: its uid.
    pub fn guest_uid(&self, guest: u32) -> Option<u32> {
        lock(&self.shared.registry).guests.get(&guest).map(|guest| guest.uid)
    }

    /// Exchanges the process of an NSM for a new one, which goes on with the sockets of its guests. For how long nobody served
    /// them; `None`: there was no process.
    pub fn restart_nsm(&self, name: &str) -> Result<Option<Duration>, EngineError> {
        self.process_of(name)?.restart()
    }

    /// The same with another configuration, or another program; both stay until the engine ends. What guests were promised and
    /// what says where a stack is cannot change (see [`NsmChange`](crate::NsmChange)). On error everything is as before.
    pub fn swap_nsm(&self, name: &str, change: &crate::NsmChange) -> Result<Option<Duration>, EngineError> {
        let remote = self.process_of(name)?;
        let nsm = change.apply(&self.shared.nsm(remote.nsm()));
        self.shared
            .config
            .kinds
            .check(&nsm)
            .map_err(|reason| EngineError::StackUnavailable { name: name.into(), reason })?;
        remote.swap(&self.shared, change.binary.clone(), &nsm)
    }

    fn process_of(&self, name: &str) -> Result<&Remote, EngineError> {
        let nsms = &self.shared.config.nsms;
        let index =
            nsms.iter().position(|nsm| nsm.name == name).ok_or_else(|| EngineError::UnknownStack {
                name: name.into(),
                known: nsms.iter().map(|nsm| nsm.name.clone()).collect(),
            })?;
        self.shared.remote(index).ok_or_else(|| {
            let text =
                format!("stack `{name}` has no process: give it form = \"process\" in the configuration");
            EngineError::Config(text)
        })
    }

    /// Ends a guest: its sockets are closed, its processes see a dead network.
    pub fn end_guest(&self, guest: u32) -> Result<(), EngineError> {
        let _stays = self.shared.seats.read().unwrap_or_else(PoisonError::into_inner);
        let worker = lock(&self.shared.registry).guests.get(&guest).map(|guest| guest.worker);
        self.shared.tell(worker.ok_or(EngineError::UnknownGuest(guest))?, Command::End(guest));
        Ok(())
    }

    pub fn guest_count(&self) -> usize {
        lock(&self.shared.registry).guests.len()
    }

    /// Waits until there was at least one guest and all guests are over, or the engine was shut down.
    pub fn wait_idle(&self) {
        let mut registry = lock(&self.shared.registry);
        while !self.shared.stopping.load(Ordering::Relaxed)
            && (registry.last_id == 0 || !registry.guests.is_empty())
        {
            registry = self.shared.changed.wait(registry).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`Engine::wait_idle`], at most `timeout`. True: all guests are over.
    pub fn wait_idle_timeout(&self, timeout: Duration) -> bool {
        let registry = lock(&self.shared.registry);
        let busy = |r: &mut Registry| {
            !self.shared.stopping.load(Ordering::Relaxed) && (r.last_id == 0 || !r.guests.is_empty())
        };
        let wait = self.shared.changed.wait_timeout_while(registry, timeout, busy);
        !wait.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Ends the engine in order: guests are told, sockets closed, threads joined. May be called more than once.
    pub fn shutdown(&self) {
        self.end_captures();
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.held.stop();
        for worker in self.shared.seats() {
            self.shared.tell(worker, Command::Stop);
        }
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
        self.shared.remotes.iter().flatten().for_each(Remote::join);
        drop(lock(&self.shared.registry));
        self.shared.changed.notify_all();
    }

    fn running(&self) -> Result<(), EngineError> {
        if self.shared.stopping.load(Ordering::Relaxed) { Err(EngineError::Stopped) } else { Ok(()) }
    }

    pub(crate) fn ask<T>(
        &self,
        worker: usize,
        command: impl FnOnce(Sender<T>) -> Command,
    ) -> Result<T, EngineError> {
        self.shared.ask(worker, command)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    pub fn link(&self, worker: usize) -> &Link {
        &self.workers[worker]
    }

    pub fn watch(&self, worker: usize) -> Arc<Watch> {
        Arc::clone(&self.watches[worker])
    }

    /// Whether the guest may bind to ports below 1024: the engine may be allowed more than who asked for the guest.
    pub fn is_privileged(&self, id: u32) -> bool {
        lock(&self.registry).guests.get(&id).is_some_and(|guest| guest.uid == 0)
    }

    /// All that guests can belong to: switch threads, then processes.
    fn seats(&self) -> impl Iterator<Item = usize> {
        let threads = self.workers.len();
        (0..threads).chain(self.remotes.iter().flatten().map(move |remote| threads + remote.nsm()))
    }

    /// What a switch thread answers.
    pub fn ask<T>(
        self: &Arc<Self>,
        worker: usize,
        command: impl FnOnce(Sender<T>) -> Command,
    ) -> Result<T, EngineError> {
        let (answer, receiver) = channel();
        self.tell(worker, command(answer));
        receiver.recv_timeout(ANSWER).map_err(|_| EngineError::Stopped)
    }

    pub fn tell(self: &Arc<Self>, worker: usize, command: Command) {
        match self.workers.get(worker) {
            Some(link) => link.send(command),
            None => {
                if let Some(remote) = self.remote(worker - self.workers.len()) {
                    remote.send(self, command);
                }
            }
        }
    }

    /// An NSM as it is set up now.
    pub fn nsm(&self, index: usize) -> Arc<crate::NsmConfig> {
        Arc::clone(&self.nsms[index].read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn set_nsm(&self, index: usize, nsm: crate::NsmConfig) {
        *self.nsms[index].write().unwrap_or_else(PoisonError::into_inner) = Arc::new(nsm);
    }

    pub fn remote(&self, nsm: usize) -> Option<&Remote> {
        self.remotes.get(nsm)?.as_ref()
    }

    /// Its tenant's name, its user, and the number of its NSM.
    pub fn whose(&self, id: u32) -> Option<(String, u32, usize)> {
        let registry = lock(&self.registry);
        registry.guests.get(&id).map(|guest| (guest.tenant.name(), guest.uid, guest.nsm))
    }

    /// Guests that a capture is of.
    pub fn guests_of(&self, target: &Target) -> Vec<u32> {
        let registry = lock(&self.registry);
        let is_meant = |(id, guest): &(&u32, &Registered)| target.is(**id, &guest.tenant.name(), guest.uid);
        registry.guests.iter().filter(is_meant).map(|(id, _)| *id).collect()
    }

    /// Whose sockets a guest's agent gives out, or gave out before this program.
    pub fn agent_nsm(&self, id: u32) -> Option<usize> {
        lock(&self.registry).guests.get(&id).map(|guest| guest.agent_nsm)
    }

    /// Whose sockets a guest's agent gave before.
    pub fn agent_before(&self, id: u32) -> Vec<usize> {
        lock(&self.registry).guests.get(&id).map(|guest| guest.agent_before.clone()).unwrap_or_default()
    }

    /// Name, process and user of a guest.
    pub fn who(&self, id: u32) -> (String, i32, u32) {
        let registry = lock(&self.registry);
        registry.guests.get(&id).map_or_else(Default::default, |g| (g.name.clone(), g.pid, g.uid))
    }

    /// Told by the process of an NSM.
    pub fn remote_guest_over(&self, id: u32, usage: Usage, violation: bool) {
        if lock(&self.registry).guests.contains_key(&id) {
            self.counters.violations.fetch_add(u64::from(violation), Ordering::Relaxed);
            self.guest_over(id, usage);
        }
    }

    /// The process of an NSM has these guests; others of it are over.
    pub fn keep_guests_of(&self, nsm: usize, alive: &[u32]) {
        for id in self.missing_of(nsm, alive) {
            let name = self.name(id);
            log::info!(guest = id, name:%; "guest {id} ({name}) is over: the process of its stack is gone");
            self.guest_over(id, Usage::default());
        }
    }

    /// The guests of an NSM in a process that it does not have.
    pub fn missing_of(&self, nsm: usize, alive: &[u32]) -> Vec<u32> {
        let seat = self.workers.len() + nsm;
        let of_nsm = |(id, guest): (&u32, &Registered)| {
            let here = guest.worker == seat && guest.begun && !guest.on_the_way;
            (here && !alive.contains(id)).then_some(*id)
        };
        lock(&self.registry).guests.iter().filter_map(of_nsm).collect()
    }

    /// Samples of a guest that ends.
    pub fn keep_stages(&self, nsm: usize, stages: &netkernel_service::Stages) {
        if !stages.is_empty() {
            self.finished.stages_of(&self.config.nsms[nsm].name, stages);
        }
    }

    /// A guest has an agent now.
    pub fn has_agent(self: &Arc<Shared>, id: u32, nsm: usize, direct: Direct) {
        if let Some(guest) = lock(&self.registry).guests.get_mut(&id) {
            guest.direct = Some(direct);
            guest.agent_nsm = nsm;
        }
        self.held.look(self);
    }

    /// Of an NSM.
    pub fn is_process(&self) -> bool {
        self.over_hook.is_some()
    }

    /// The guest is over and nothing of it is left.
    pub fn guest_over(&self, id: u32, usage: Usage) {
        self.counters.over.fetch_add(1, Ordering::Relaxed);
        let may_have_some = |guest: &Registered| {
            guest.direct.is_some() || !guest.agent_before.is_empty() || !guest.left.is_empty()
        };
        let has_agent = lock(&self.registry).guests.get(&id).is_some_and(may_have_some);
        let mut carried = ByGuest::new();
        if has_agent {
            carried.insert(id, direct::last_carried(self, id));
        }
        if let Some(hook) = &self.over_hook {
            // In the process of an NSM, which is one stack.
            let mut all = usage;
            carried.values().flat_map(HashMap::values).for_each(|carried| all.carry(Some(carried)));
            hook(id, all, self.counters.violations.swap(0, Ordering::Relaxed) != 0);
        }
        let last = self.usage_of(id, usage, &carried, true);
        let tenant = lock(&self.registry).guests.get(&id).map(|guest| guest.tenant.name());
        for row in &last {
            // How long it lived is no sum of these.
            let usage = Usage { lived_ms: 0, ..row.usage };
            self.finished.guest_over(tenant.clone().unwrap_or_default(), row.nsm.clone(), &usage);
        }
        let mut over = lock(&self.over);
        let room = MAX_OVER.saturating_sub(last.len());
        let surplus = over.len().saturating_sub(room);
        over.drain(..surplus);
        over.extend(last);
        drop(over);
        self.forget(id);
    }

    /// Sockets of a guest stay with NSMs that it was on before.
    pub fn has_elders(&self, id: u32, elders: Vec<usize>) {
        if let Some(guest) = lock(&self.registry).guests.get_mut(&id) {
            guest.elders = elders;
        }
    }

    /// What a guest used until now was used on the NSM before. `goes_on`: what the next one counts on from; `adopt`: what was counted
    /// elsewhere of direct sockets is known here from then on.
    pub fn guest_moved(&self, id: u32, nsm: usize, used: Usage, goes_on: Usage, adopt: impl FnOnce()) {
        let carried = direct::carried(self);
        let mut rows = self.usage_of(id, used, &carried, true);
        // The rest goes on: sockets that are open stay with their stacks.
        rows.truncate(1);
        adopt();
        let mut carried = direct::carried(self);
        let mut registry = lock(&self.registry);
        let Some(guest) = registry.guests.get_mut(&id) else { return };
        let before = std::mem::replace(&mut guest.nsm, nsm);
        (guest.before, guest.came) = (goes_on, Instant::now());
        let left = &self.config.nsms[before].name;
        let carried = carried.get_mut(&id).and_then(|carried| carried.remove(left)).unwrap_or_default();
        let times = guest.left.get(left).map_or(0, |left| left.times) + 1;
        guest.left.insert(left.clone(), LeftNsm { times, carried });
        let tenant = Arc::clone(&guest.tenant);
        drop(registry);
        for row in &rows {
            let usage = Usage { lived_ms: 0, ..row.usage };
            self.finished.guest_over(tenant.name(), row.nsm.clone(), &usage);
        }
        lock(&self.over).extend(rows);
        self.tenants.arrive(&tenant, nsm, &self.nsm(nsm));
        self.tenants.leave(&tenant, before);
    }

    /// What a guest used of the NSM that it is on, since it came; and of others, by direct sockets that it has from there.
    /// `used`: all that did not go by direct sockets, in its whole life.
    fn split(
        &self,
        guest: &Registered,
        used: Usage,
        carried: Option<&HashMap<String, Carried>>,
    ) -> (Usage, Vec<(String, Usage)>) {
        let here = &self.config.nsms[guest.nsm].name;
        let mut usage = used.since(&guest.before);
        let mut elsewhere = Vec::new();
        for (nsm, carried) in carried.into_iter().flatten() {
            let new = carried.since(guest.left.get(nsm).copied().unwrap_or_default().carried);
            if nsm == here {
                usage.carry(Some(&new));
            } else if new != Carried::default() {
                elsewhere.push((nsm.clone(), Usage::of_carried(&new)));
            }
        }
        elsewhere.sort_by(|a, b| a.0.cmp(&b.0));
        (usage, elsewhere)
    }

    /// A row for each NSM, the first one of that which the guest is on.
    fn usage_of(&self, id: u32, usage: Usage, carried: &ByGuest, over: bool) -> Vec<GuestUsage> {
        let registry = lock(&self.registry);
        let Some(guest) = registry.guests.get(&id) else { return Vec::new() };
        let (usage, elsewhere) = self.split(guest, usage, carried.get(&id));
        let usage = Usage { lived_ms: guest.came.elapsed().as_millis() as u64, ..usage };
        let tenant = (self.tenants.all().count() > 1).then(|| guest.tenant.name());
        let (name, uid) = (&guest.name, guest.uid);
        let row = |nsm: String, usage: Usage| GuestUsage {
            guest: id,
            name: name.clone(),
            stay: guest.left.get(&nsm).map_or(0, |left| left.times),
            nsm,
            tenant: tenant.clone(),
            uid,
            usage,
            over,
        };
        let here = row(self.config.nsms[guest.nsm].name.clone(), usage);
        std::iter::once(here).chain(elsewhere.into_iter().map(|(nsm, usage)| row(nsm, usage))).collect()
    }

    pub fn forget(&self, id: u32) {
        let mut registry = lock(&self.registry);
        if let Some(guest) = registry.guests.remove(&id) {
            registry.tokens.remove(&guest.token);
            Tenants::guest_over(&guest.tenant);
            self.tenants.leave(&guest.tenant, guest.nsm);
        }
        drop(registry);
        self.changed.notify_all();
    }

    /// What a guest may use of an NSM that it is not on.
    pub fn limits_on(&self, id: u32, nsm: usize) -> Limits {
        let registry = lock(&self.registry);
        registry.guests.get(&id).map(|guest| guest.tenant.limits(nsm)).unwrap_or_default()
    }

    /// What a guest may use.
    pub fn limits(&self, id: u32) -> Limits {
        let registry = lock(&self.registry);
        registry.guests.get(&id).map(|guest| guest.tenant.limits(guest.nsm)).unwrap_or_default()
    }

    /// The tenant of a guest has limits that direct sockets would pass by.
    pub fn needs_queues(&self, id: u32) -> bool {
        lock(&self.registry).guests.get(&id).is_some_and(|guest| guest.tenant.needs_queues())
    }

    /// Name of a guest, for the log.
    pub fn name(&self, id: u32) -> String {
        // Chosen by who asked for the guest: it must not make lines of its own in a log.
        let printable = |name: &String| name.replace(char::is_control, "?");
        lock(&self.registry).guests.get(&id).map(|guest| printable(&guest.name)).unwrap_or_default()
    }
}

/// A tenant's place for a guest, until it is kept.
struct Place(Option<Arc<Tenant>>);

impl Place {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(tenant) = &self.0 {
            Tenants::guest_over(tenant);
        }
    }
}

fn channel_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)
}

fn random_token() -> io::Result<[u8; 16]> {
    let mut token = [0u8; 16];
    // SAFETY: token is valid for writes of its length.
    let n = unsafe { libc::getrandom(token.as_mut_ptr().cast(), token.len(), 0) };
    if n == 16 { Ok(token) } else { Err(io::Error::last_os_error()) }
}

/// Each socket of a guest takes descriptors of the engine: as many as the hard limit allows.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for writes, then for reads.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
