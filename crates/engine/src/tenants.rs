//! Tenants: who they are, what they may use, and how what is left of a module is shared among them.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use netkernel_service::{
    Bucket, Limits, MAX_PLACES, Places, Police, Quota, Seats, TenantMemory, Terms, Told, UNLIMITED,
    namespace_path, now_ns,
};

use crate::engine::lock;
use crate::shares::{Attained, Demand, OPERATIONS, RESOURCES, Rounds, start};
use crate::{EngineError, Form, NsmConfig};

/// How often shares are computed anew.
const SHARE_EVERY: Duration = Duration::from_millis(10);

/// Rates of one direction, in bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rates {
    /// What the tenant gets whatever others do; 0: nothing.
    pub guaranteed: u64,
    /// What it never gets more than; `None`: no limit.
    pub most: Option<u64>,
}

/// How a tenant's guests are known. What is given counts by what the kernel says of who asks; one match is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recognise {
    pub users: Vec<u32>,
    /// Paths in the cgroup file system, such as `/system.slice/web.service`; what is below counts too.
    pub cgroups: Vec<String>,
    /// Network namespaces: names in `/run/netns`, or paths.
    pub netns: Vec<String>,
    /// Whoever shows it.
    pub token: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantConfig {
    pub name: String,
    pub recognise: Recognise,
    /// NSMs that it may use, the first one is its default; empty: all.
    pub nsms: Vec<String>,
    pub send: Rates,
    pub receive: Rates,
    /// Queue elements per second: what it gets whatever others do, and never more than.
    pub guaranteed_operations: u64,
    pub operations: Option<u64>,
    /// Connections at a time, the same.
    pub guaranteed_connections: u64,
    pub connections: Option<u64>,
    /// Guests at a time.
    pub guests: Option<u64>,
    /// Bytes of each guest's region.
    pub region_bytes: Option<u64>,
    /// Its part of what is left over, in relation to the others' weights.
    pub weight: u32,
}

impl TenantConfig {
    pub fn new(name: &str) -> TenantConfig {
        TenantConfig {
            name: name.into(),
            recognise: Recognise::default(),
            nsms: Vec::new(),
            send: Rates::default(),
            receive: Rates::default(),
            guaranteed_operations: 0,
            operations: None,
            guaranteed_connections: 0,
            connections: None,
            guests: None,
            region_bytes: None,
            weight: 1,
        }
    }

    /// Whether it may use the NSM.
    pub fn may_use(&self, nsm: &str) -> bool {
        self.nsms.is_empty() || self.nsms.iter().any(|own| own == nsm)
    }
}

/// What an NSM can carry; `None`: not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Capacity {
    /// Bytes per second, in each direction.
    pub rate: Option<u64>,
    /// Queue elements per second.
    pub operations: Option<u64>,
    pub connections: Option<u64>,
}

/// Who asks for a guest, as the kernel says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker<'a> {
    pub pid: i32,
    pub uid: u32,
    pub token: Option<&'a str>,
}

/// A tenant at work.
pub(crate) struct Tenant {
    config: Mutex<TenantConfig>,
    guests: Quota,
    /// Place in the list of tenants.
    index: usize,
    /// Of its configuration: what is asked for often.
    weight: AtomicU32,
    promised: AtomicBool,
    queued_only: AtomicBool,
    /// In an NSM's process: where the engine says the same.
    told: Option<Told>,
    /// For each NSM: a guarantee holds there.
    may_use: Vec<AtomicBool>,
    means: OnceLock<Means>,
}

/// A tenant's most rates.
#[derive(Clone, Debug)]
pub(crate) struct Caps {
    pub send: Police,
    pub receive: Police,
    /// Bytes per second, or [`UNLIMITED`].
    pub receive_rate: u64,
}

/// What a tenant uses. Made for its first guest: thousands that have none take no memory.
struct Means {
    memory: TenantMemory,
    send: Arc<Bucket>,
    receive: Arc<Bucket>,
    operations: Arc<Bucket>,
    connections: Arc<Quota>,
    /// For each NSM: of sending, of receiving, and of operations.
    shares: Vec<[Arc<Bucket>; RESOURCES]>,
    /// For each NSM that counts its connections.
    seats: Vec<Option<Arc<Seats>>>,
}

impl Means {
    /// `inherits`: connections that a program before this one counted are still there.
    fn new(memory: TenantMemory, nsms: &Nsms, shared: &[Arc<Quota>], inherits: bool) -> Means {
        let [send, receive, operations] = memory.buckets(Terms::Own).map(Arc::new);
        let connections = memory.connections(None, Terms::Own, inherits);
        connections.set_parts(nsms.parts());
        let private = || [Bucket::new(UNLIMITED), Bucket::new(UNLIMITED), Bucket::of_operations()];
        let shares = nsms.places.iter().map(|place| match place {
            Some(place) if memory.fd().is_some() => memory.shares(*place, Terms::Own).map(Arc::new),
            _ => private().map(Arc::new),
        });
        let seats = nsms.counted.iter().zip(shared).zip(&nsms.places);
        let seats = seats.map(|((counted, shared), place)| {
            (*counted && place.is_none()).then(|| Arc::new(Seats::new(0, Arc::clone(shared))))
        });
        Means {
            send,
            receive,
            operations,
            connections: Arc::new(connections),
            shares: shares.collect(),
            seats: seats.collect(),
            memory,
        }
    }

    /// In the process of an NSM that has the place.
    fn told(memory: TenantMemory, place: usize, shared: &Arc<Quota>, inherits: bool) -> Means {
        let [send, receive, operations] = memory.buckets(Terms::Told).map(Arc::new);
        Means {
            send,
            receive,
            operations,
            connections: Arc::new(memory.connections(Some(place), Terms::Told, inherits)),
            shares: vec![memory.shares(place, Terms::Told).map(Arc::new)],
            seats: vec![Some(Arc::new(memory.seats(place, Arc::clone(shared))))],
            memory,
        }
    }

    fn apply(&self, config: &TenantConfig) {
        self.send.set_rate(config.send.most.unwrap_or(UNLIMITED));
        self.receive.set_rate(config.receive.most.unwrap_or(UNLIMITED));
        self.operations.set_rate(config.operations.unwrap_or(UNLIMITED));
        self.connections.set_most(config.connections.unwrap_or(u64::MAX));
        self.memory.say(config.weight.max(1), config.is_promised(), config.needs_queues());
    }
}

impl TenantConfig {
    /// True when kernel sockets that are given away would pass its limits by.
    fn needs_queues(&self) -> bool {
        self.send.most.is_some() || self.receive.most.is_some() || self.connections.is_some()
    }

    /// True when a rate is guaranteed to it.
    fn is_promised(&self) -> bool {
        [self.send.guaranteed, self.receive.guaranteed, self.guaranteed_operations]
            .iter()
            .any(|&rate| rate > 0)
    }
}

impl Tenant {
    fn new(config: TenantConfig, index: usize, nsms: &[NsmConfig]) -> Tenant {
        let tenant = Tenant {
            index,
            weight: AtomicU32::new(1),
            promised: AtomicBool::new(false),
            queued_only: AtomicBool::new(false),
            told: None,
            may_use: nsms.iter().map(|nsm| AtomicBool::new(config.may_use(&nsm.name))).collect(),
            guests: Quota::new(u64::MAX),
            means: OnceLock::new(),
            config: Mutex::new(config),
        };
        tenant.apply();
        tenant
    }

    pub fn config(&self) -> TenantConfig {
        lock(&self.config).clone()
    }

    pub fn name(&self) -> String {
        lock(&self.config).name.clone()
    }

    fn set(&self, config: TenantConfig, nsms: &[NsmConfig]) {
        for (may, nsm) in self.may_use.iter().zip(nsms) {
            may.store(config.may_use(&nsm.name), Relaxed);
        }
        *lock(&self.config) = config;
        self.apply();
    }

    fn apply(&self) {
        let config = lock(&self.config);
        self.queued_only.store(config.needs_queues(), Relaxed);
        self.promised.store(config.is_promised(), Relaxed);
        self.weight.store(config.weight.max(1), Relaxed);
        self.guests.set_most(config.guests.unwrap_or(u64::MAX));
        self.means.get().inspect(|means| means.apply(&config));
    }

    /// What a guest of this tenant may use of an NSM.
    pub fn limits(&self, nsm: usize) -> Limits {
        let Some(means) = self.means.get() else { return Limits::default() };
        let of = |own: &Arc<Bucket>, resource: usize| {
            Police::new(vec![Arc::clone(own), Arc::clone(&means.shares[nsm][resource])])
        };
        Limits {
            send: of(&means.send, 0),
            receive: of(&means.receive, 1),
            operations: of(&means.operations, OPERATIONS),
            connections: Some(Places {
                tenant: Arc::clone(&means.connections),
                nsm: means.seats.get(nsm).cloned().flatten(),
            }),
        }
    }

    /// Of sending and of receiving, if it may not have as much as it likes of both: what holds for the tenant as a whole.
    pub fn caps(&self) -> Option<Caps> {
        let means = self.means.get().filter(|means| means.send.is_limited() || means.receive.is_limited())?;
        let of = |bucket: &Arc<Bucket>| Police::new(vec![Arc::clone(bucket)]);
        Some(Caps { send: of(&means.send), receive: of(&means.receive), receive_rate: means.receive.rate() })
    }

    /// Its part of a resource of an NSM, once it had a guest.
    pub fn share(&self, nsm: usize, resource: usize) -> Option<&Bucket> {
        Some(&self.means.get()?.shares.get(nsm)?[resource])
    }

    /// With which processes of NSMs map what it uses.
    pub fn memory(&self) -> Option<BorrowedFd<'_>> {
        self.means.get()?.memory.fd()
    }

    /// Which one of the configuration's it is; `None`: the one of those that it does not name.
    pub fn number(&self) -> Option<u32> {
        (lock(&self.config).name != OTHERS).then_some(self.index as u32)
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn weight(&self) -> u32 {
        self.told.as_ref().map_or_else(|| self.weight.load(Relaxed), Told::weight)
    }

    /// True when kernel sockets that are given away would pass its limits by.
    pub fn needs_queues(&self) -> bool {
        self.told.as_ref().map_or_else(|| self.queued_only.load(Relaxed), Told::needs_queues)
    }

    /// True when a rate is guaranteed to it.
    pub fn is_promised(&self) -> bool {
        self.told.as_ref().map_or_else(|| self.promised.load(Relaxed), Told::is_promised)
    }

    /// What it may have of a resource of an NSM. It wants nothing.
    pub fn terms(&self, nsm: usize, resource: usize) -> Demand {
        let config = lock(&self.config);
        let rates = match resource {
            0 => config.send,
            1 => config.receive,
            _ => Rates { guaranteed: config.guaranteed_operations, most: config.operations },
        };
        let guaranteed = if self.uses(nsm) { rates.guaranteed } else { 0 };
        Demand { guaranteed, most: rates.most.unwrap_or(UNLIMITED), weight: config.weight.max(1), wanted: 0 }
    }

    pub fn uses(&self, nsm: usize) -> bool {
        self.may_use.get(nsm).is_some_and(|may| may.load(Relaxed))
    }

    /// A turn of a switch thread was over before what it had to send, to receive, and its elements were done.
    pub fn fell_behind(&self, nsm: usize, what: [bool; RESOURCES]) {
        for resource in (0..RESOURCES).filter(|&resource| what[resource]) {
            self.share(nsm, resource).inspect(|share| share.fell_behind());
        }
    }

    pub fn status(&self) -> TenantStatus {
        let config = self.config();
        let means = self.means.get();
        let used = |bucket: fn(&Means) -> &Bucket| means.map_or(0, |means| bucket(means).used());
        TenantStatus {
            name: config.name,
            weight: config.weight,
            send: config.send,
            receive: config.receive,
            guaranteed_operations: config.guaranteed_operations,
            operations_per_second: config.operations,
            guaranteed_connections: config.guaranteed_connections,
            most_connections: config.connections,
            guests: self.guests.now(),
            connections: means.map_or(0, |means| means.connections.now()),
            bytes_out: used(|means| &means.send),
            bytes_in: used(|means| &means.receive),
            operations: used(|means| &means.operations),
        }
    }
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct TenantStatus {
    pub name: String,
    pub weight: u32,
    pub send: Rates,
    pub receive: Rates,
    pub guaranteed_operations: u64,
    pub operations_per_second: Option<u64>,
    pub guaranteed_connections: u64,
    pub most_connections: Option<u64>,
    pub guests: u64,
    pub connections: u64,
    /// Payload that its queued sockets sent and received, all guests that ever were.
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub operations: u64,
}

const TOO_MANY: &str = "at most 63 stacks of an engine can have form = \"process\"";
const _: () = assert!(MAX_PLACES == 63);

/// What tenants must know of the NSMs.
struct Nsms {
    /// Places in the tenants' memory, of those in processes.
    places: Vec<Option<usize>>,
    /// Those that count their connections.
    counted: Vec<bool>,
}

impl Nsms {
    /// `taken`: places of those whose processes run already, by name.
    fn new(nsms: &[NsmConfig], taken: &[(String, usize)]) -> Result<Nsms, EngineError> {
        // What is configured no more has no guests.
        let is_one = |name: &str| nsms.iter().any(|nsm| nsm.form == Form::Process && nsm.name == name);
        let taken = |of: &dyn Fn(&(String, usize)) -> bool| {
            taken.iter().filter(|(name, _)| is_one(name)).find(|one| of(one))
        };
        let mut free = (0..MAX_PLACES).filter(|place| taken(&|(_, other)| other == place).is_none());
        let mut place = |nsm: &NsmConfig| {
            let place = taken(&|(name, _)| *name == nsm.name).map(|&(_, place)| place);
            let place = place.filter(|&place| place < MAX_PLACES).or_else(|| free.next());
            place.ok_or_else(|| EngineError::Config(TOO_MANY.into()))
        };
        let places = nsms.iter().map(|nsm| match nsm.form {
            Form::Engine => Ok(None),
            Form::Process => place(nsm).map(Some),
        });
        let counted = nsms.iter().map(|nsm| nsm.capacity.connections.is_some()).collect();
        Ok(Nsms { places: places.collect::<Result<_, _>>()?, counted })
    }

    /// Who counts connections: the engine, and all up to the last place.
    fn parts(&self) -> usize {
        self.places.iter().flatten().max().map_or(1, |last| last + 2)
    }

    /// Processes share what tenants use.
    fn are_apart(&self) -> bool {
        self.places.iter().any(Option::is_some)
    }
}

/// All tenants of an engine. Without a configuration there is one that may do everything.
pub(crate) struct Tenants {
    list: Vec<Arc<Tenant>>,
    strict: bool,
    stop: Arc<AtomicBool>,
    started: AtomicBool,
    nsms: Nsms,
    /// Held while what tenants may use is changed, or made.
    changing: Mutex<()>,
    /// In the process of an NSM: those that its engine has let in.
    joined: Mutex<Vec<Weak<Tenant>>>,
    /// Of all weights.
    weights: AtomicU64,
    /// By NSM.
    present: Vec<Mutex<Present>>,
    /// By NSM: connections beyond all guarantees.
    seats: Vec<Arc<Quota>>,
    rounds: Mutex<Rounds>,
}

/// Name of the tenant of those that no configuration names.
pub const OTHERS: &str = "others";

impl Tenants {
    /// `taken`: see [`Nsms::new`].
    pub fn new(
        configs: &[TenantConfig],
        strict: bool,
        nsms: &[NsmConfig],
        taken: &[(String, usize)],
    ) -> Result<Tenants, EngineError> {
        admit(configs.iter(), nsms)?;
        let seats: Vec<Arc<Quota>> = nsms.iter().map(|_| Arc::new(Quota::new(u64::MAX))).collect();
        let others = TenantConfig::new(OTHERS);
        let list = configs.iter().chain([&others]).enumerate();
        let list = list.map(|(i, config)| Arc::new(Tenant::new(config.clone(), i, nsms))).collect();
        let tenants = Tenants {
            list,
            strict,
            stop: Arc::default(),
            started: AtomicBool::new(false),
            nsms: Nsms::new(nsms, taken)?,
            changing: Mutex::default(),
            joined: Mutex::default(),
            weights: AtomicU64::new(0),
            present: nsms.iter().map(|_| Mutex::default()).collect(),
            seats,
            rounds: Mutex::default(),
        };
        tenants.begin(nsms);
        Ok(tenants)
    }

    /// Makes what a tenant uses, before its first guest.
    pub fn open(&self, tenant: &Tenant, nsms: &[NsmConfig]) -> Result<(), EngineError> {
        let _alone = lock(&self.changing);
        if tenant.means.get().is_some() {
            return Ok(());
        }
        let memory = if self.nsms.are_apart() { TenantMemory::create() } else { Ok(TenantMemory::private()) };
        let memory = memory.map_err(|error| {
            EngineError::Resource(format!("no memory that the processes of stacks share: {error}"))
        })?;
        self.open_in(tenant, nsms, memory, false);
        Ok(())
    }

    fn open_in(&self, tenant: &Tenant, nsms: &[NsmConfig], memory: TenantMemory, inherits: bool) {
        let means = Means::new(memory, &self.nsms, &self.seats, inherits);
        // Under the lock: nobody says something else meanwhile.
        let config = lock(&tenant.config);
        means.apply(&config);
        let _ = tenant.means.set(means);
        drop(config);
        for (i, nsm) in nsms.iter().enumerate() {
            self.begin_one(tenant, i, nsm);
            self.say_seats(tenant, i, nsm);
        }
    }

    /// Goes on with what a program before this one shared with processes of NSMs that still run. A tenant that there is no more
    /// has no limits: its guests are others'.
    pub fn resume(
        &self,
        name: &str,
        fd: OwnedFd,
        nsms: &[NsmConfig],
        taken: &[(String, usize)],
    ) -> io::Result<()> {
        let memory = TenantMemory::open(fd)?;
        for place in (0..MAX_PLACES).filter(|place| taken.iter().all(|(_, other)| other != place)) {
            memory.forget_connections(place);
        }
        let _alone = lock(&self.changing);
        match self.list.iter().find(|tenant| tenant.name() == name) {
            Some(tenant) => self.open_in(tenant, nsms, memory, true),
            None => {
                let means = Means::new(memory, &self.nsms, &self.seats, false);
                means.apply(&TenantConfig::new(name));
                means.shares.iter().flatten().for_each(|share| share.set_rate(UNLIMITED));
                for &place in self.nsms.places.iter().flatten() {
                    means.memory.say_seats(place, u64::MAX, 0);
                }
            }
        }
        Ok(())
    }

    /// What another program goes on with: names of tenants, and descriptors of what they share with processes of NSMs.
    pub fn memories(&self) -> Vec<(String, RawFd)> {
        let of = |tenant: &Arc<Tenant>| Some((tenant.name(), tenant.memory()?.as_raw_fd()));
        self.list.iter().filter_map(of).collect()
    }

    /// All connections that there were before are counted, or gone.
    pub fn settle(&self) {
        let joined = lock(&self.joined);
        let joined = joined.iter().filter_map(Weak::upgrade);
        let all = self.list.iter().map(Arc::clone).chain(joined);
        all.for_each(|tenant| tenant.means.get().into_iter().for_each(|means| means.connections.settle()));
    }

    /// In the process of an NSM: the tenant whose memory this is. `inherits`: guests of it were there before this process.
    pub fn join(&self, name: &str, memory: TenantMemory, place: usize, inherits: bool) -> Arc<Tenant> {
        let mut joined = lock(&self.joined);
        let is_it = |tenant: &Arc<Tenant>| {
            let means = tenant.means.get();
            means.zip(memory.fd()).is_some_and(|(means, fd)| means.memory.is_in(fd))
        };
        if let Some(tenant) = joined.iter().filter_map(Weak::upgrade).find(is_it) {
            return tenant;
        }
        let free = joined.iter().position(|other| other.strong_count() == 0);
        let index = free.unwrap_or(joined.len());
        let told = Some(memory.told());
        let means = OnceLock::from(Means::told(memory, place, &self.seats[0], inherits));
        let tenant = Tenant::new(TenantConfig::new(name), self.list.len() + index, &[]);
        let tenant = Arc::new(Tenant { told, means, ..tenant });
        match free {
            Some(index) => joined[index] = Arc::downgrade(&tenant),
            None => joined.push(Arc::downgrade(&tenant)),
        }
        tenant
    }

    /// Where the process of an NSM finds what is its.
    pub fn place(&self, nsm: usize) -> Option<usize> {
        self.nsms.places.get(nsm).copied().flatten()
    }

    /// Nothing runs any more of an NSM's process: nobody gives back what it counted.
    pub fn process_is_gone(&self, nsm: usize) {
        self.forget_connections(nsm, |_| true);
    }

    /// The process of an NSM was started again: what the one before counted for tenants that have no guest there any more, the new
    /// one does not know of.
    pub fn process_is_back(&self, nsm: usize) {
        // Held, so that none comes meanwhile.
        let Some(present) = self.present.get(nsm).map(lock) else { return };
        self.forget_connections(nsm, |tenant| !present.guests.contains_key(&tenant.index));
    }

    fn forget_connections(&self, nsm: usize, of: impl Fn(&Tenant) -> bool) {
        let Some(place) = self.place(nsm) else { return };
        for tenant in self.list.iter().filter(|tenant| of(tenant)) {
            tenant.means.get().into_iter().for_each(|means| means.memory.forget_connections(place));
        }
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.list.iter()
    }

    /// The tenant of those that no configuration names; it has no limits.
    pub fn others(&self) -> Arc<Tenant> {
        Arc::clone(&self.list[self.list.len() - 1])
    }

    /// The tenant of who asks.
    pub fn of(&self, asker: Asker) -> Result<Arc<Tenant>, EngineError> {
        // Who shows a token means it.
        let shown = asker.token.and_then(|token| self.by_token(token));
        let known = shown.or_else(|| self.by_process(asker.pid, Some(asker.uid)));
        match (known, self.list.last()) {
            (Some(tenant), _) => Ok(Arc::clone(tenant)),
            (None, Some(others)) if !self.strict => Ok(Arc::clone(others)),
            _ => Err(EngineError::Refused(format!(
                "uid {} (pid {}) belongs to no tenant of this engine: ask its provider for a [[tenant]], or show a token (--tenant-token FILE)",
                asker.uid, asker.pid
            ))),
        }
    }

    /// The tenant whose token it is.
    pub fn by_token(&self, token: &str) -> Option<&Arc<Tenant>> {
        let own = |tenant: &&Arc<Tenant>| {
            let config = lock(&tenant.config);
            config.recognise.token.as_ref().is_some_and(|own| same(own, token))
        };
        self.list.iter().find(own)
    }

    /// The tenant that a process belongs to by its user, control group or network namespace; without `uid` the user does
    /// not count.
    pub fn by_process(&self, pid: i32, uid: Option<u32>) -> Option<&Arc<Tenant>> {
        let process = Process::new(pid);
        self.list.iter().find(|tenant| {
            let config = lock(&tenant.config);
            uid.is_some_and(|uid| config.recognise.users.contains(&uid)) || process.is_in(&config.recognise)
        })
    }

    /// Takes a place for a guest; [`Tenants::guest_over`] gives it back.
    pub fn take_guest(&self, tenant: &Tenant) -> Result<(), EngineError> {
        if tenant.guests.take() {
            return Ok(());
        }
        Err(EngineError::Refused(format!(
            "tenant '{}' has {} guests already, as many as it may have",
            tenant.name(),
            tenant.guests.most()
        )))
    }

    pub fn guest_over(tenant: &Tenant) {
        tenant.guests.give_back();
    }

    /// New limits for a tenant, for its connections of now too. Nothing changes when they are refused.
    pub fn change(
        &self,
        name: &str,
        nsms: &[NsmConfig],
        change: impl FnOnce(&mut TenantConfig),
    ) -> Result<(), EngineError> {
        let tenant = self.list.iter().find(|tenant| lock(&tenant.config).name == name).ok_or_else(|| {
            let known: Vec<String> = self.list.iter().map(|t| t.name()).collect();
            EngineError::Refused(format!("there is no tenant '{name}'; there are {}", known.join(", ")))
        })?;
        let mut new = tenant.config();
        change(&mut new);
        let others: Vec<TenantConfig> =
            self.list.iter().map(|other| other.config()).filter(|other| other.name != name).collect();
        admit(others.iter().chain([&new]), nsms)?;
        tenant.set(new, nsms);
        self.begin(nsms);
        Ok(())
    }

    /// New configurations for all tenants, or none.
    pub fn change_all(&self, new: &[TenantConfig], nsms: &[NsmConfig]) -> Result<(), EngineError> {
        let names = |list: &[TenantConfig]| list.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        let old: Vec<TenantConfig> =
            self.list.iter().map(|t| t.config()).filter(|t| t.name != OTHERS).collect();
        if names(&old) != names(new) {
            let there = if old.is_empty() { "none".into() } else { names(&old).join(", ") };
            return Err(EngineError::Config(format!(
                "tenants cannot be added, removed or put in another order by a reload, but by `netkernel restart`: there are {there}"
            )));
        }
        admit(new.iter(), nsms)?;
        for (tenant, config) in self.list.iter().zip(new) {
            tenant.set(config.clone(), nsms);
        }
        self.begin(nsms);
        Ok(())
    }

    /// Computes shares again and again from now on, as long as the engine lives, if there is something to share or to keep.
    pub fn start(tenants: &Arc<Tenants>, nsms: &[NsmConfig]) -> std::io::Result<()> {
        let needed = nsms.iter().any(|nsm| nsm.capacity.rate.is_some() || nsm.capacity.operations.is_some())
            || tenants.list.iter().any(|tenant| tenant.is_promised());
        if !needed || tenants.started.swap(true, Relaxed) {
            return Ok(());
        }
        let (stop, nsms) = (Arc::clone(&tenants.stop), nsms.to_vec());
        let tenants: Weak<Tenants> = Arc::downgrade(tenants);
        std::thread::Builder::new().name("nk-shares".into()).spawn(move || {
            let mut rounds = 1;
            while !stop.load(Relaxed) {
                std::thread::sleep(SHARE_EVERY * rounds);
                let Some(tenants) = tenants.upgrade() else { return };
                tenants.round(&nsms, now_ns());
                rounds = lock(&tenants.rounds).rest();
            }
        })?;
        Ok(())
    }

    /// One division of all capacities.
    fn round(&self, nsms: &[NsmConfig], now_ns: u64) {
        let mut rounds = lock(&self.rounds);
        let elapsed_ns = rounds.begin(now_ns);
        let second = rounds.is_second_over(now_ns);
        let weights = self.weights.load(Relaxed);
        for (i, nsm) in nsms.iter().enumerate() {
            let Some(present) = self.present.get(i) else { continue };
            let present = lock(present);
            rounds.share(i, &nsm.capacity, &self.list, &present.tenants, weights, elapsed_ns);
            if second {
                rounds.second(i, &self.list, &present.tenants);
            }
        }
    }

    /// What all may begin with, after limits changed.
    fn begin(&self, nsms: &[NsmConfig]) {
        let _alone = lock(&self.changing);
        let weights = self.list.iter().map(|tenant| u64::from(tenant.weight())).sum();
        self.weights.store(weights, Relaxed);
        for (i, nsm) in nsms.iter().enumerate() {
            for tenant in &self.list {
                self.begin_one(tenant, i, nsm);
            }
            if let Some(most) = nsm.capacity.connections {
                let guaranteed = self.list.iter().map(|tenant| guaranteed_connections(tenant, nsm));
                let kept = guaranteed.fold(0u64, u64::saturating_add);
                self.seats[i].set_most(most.saturating_sub(kept));
            }
            self.list.iter().for_each(|tenant| self.say_seats(tenant, i, nsm));
        }
    }

    /// Which of an NSM's connections are the tenant's own.
    fn say_seats(&self, tenant: &Tenant, i: usize, nsm: &NsmConfig) {
        let Some(means) = tenant.means.get() else { return };
        let counted = nsm.capacity.connections.is_some();
        let guaranteed = if counted { guaranteed_connections(tenant, nsm) } else { u64::MAX };
        means.seats[i].iter().for_each(|seats| seats.set_guaranteed(guaranteed));
        if let Some(place) = self.place(i) {
            means.memory.say_seats(place, guaranteed, self.seats[i].most());
        }
    }

    fn begin_one(&self, tenant: &Tenant, i: usize, nsm: &NsmConfig) {
        for resource in 0..RESOURCES {
            let Some(share) = tenant.share(i, resource) else { return };
            let capacity = nsm.capacity.of(resource);
            let rate = capacity.map_or(UNLIMITED, |capacity| {
                start(capacity, self.weights.load(Relaxed), &tenant.terms(i, resource))
            });
            share.set_rate(rate);
        }
    }

    /// A guest of the tenant uses the NSM from now on.
    pub fn arrive(&self, tenant: &Tenant, i: usize, nsm: &NsmConfig) {
        if let Some(present) = self.present.get(i)
            && lock(present).arrive(tenant.index)
        {
            self.begin_one(tenant, i, nsm);
        }
    }

    pub fn leave(&self, tenant: &Tenant, nsm: usize) {
        if let Some(present) = self.present.get(nsm) {
            lock(present).leave(tenant.index);
        }
    }

    /// In how many seconds guarantees were met, since the engine began.
    pub fn attained(&self, nsms: &[NsmConfig]) -> Vec<Attained> {
        let all: Vec<_> = lock(&self.rounds).attained().collect();
        self.named(nsms, all)
    }

    /// The same, since the last call. For one caller.
    pub fn take_attained(&self, nsms: &[NsmConfig]) -> Vec<Attained> {
        let new = lock(&self.rounds).take_attained();
        self.named(nsms, new)
    }

    fn named(&self, nsms: &[NsmConfig], all: Vec<((usize, usize), (u64, u64))>) -> Vec<Attained> {
        let one = |((tenant, nsm), (seconds, met)): ((usize, usize), (u64, u64))| {
            let (tenant, nsm) = (self.list.get(tenant)?.name(), nsms.get(nsm)?.name.clone());
            Some(Attained { tenant, nsm, seconds, met })
        };
        all.into_iter().filter_map(one).collect()
    }
}

fn guaranteed_connections(tenant: &Tenant, nsm: &NsmConfig) -> u64 {
    let config = lock(&tenant.config);
    if config.may_use(&nsm.name) { config.guaranteed_connections } else { 0 }
}

/// The tenants that have guests on an NSM.
#[derive(Default)]
struct Present {
    tenants: Vec<usize>,
    guests: HashMap<usize, u64>,
}

impl Present {
    /// True: it is the tenant's first.
    fn arrive(&mut self, tenant: usize) -> bool {
        let guests = self.guests.entry(tenant).or_default();
        *guests += 1;
        if *guests == 1 {
            self.tenants.push(tenant);
        }
        *guests == 1
    }

    fn leave(&mut self, tenant: usize) {
        let Some(guests) = self.guests.get_mut(&tenant) else { return };
        *guests -= 1;
        if *guests == 0 {
            self.guests.remove(&tenant);
            self.tenants.retain(|&other| other != tenant);
        }
    }
}

impl Drop for Tenants {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// A promise that cannot be kept, and whose fault that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unkept {
    /// The tenant whose configuration says it; `None`: the NSM's does.
    pub tenant: Option<String>,
    pub nsm: Option<String>,
    /// In the configuration file.
    pub key: &'static str,
    pub why: String,
}

impl From<Unkept> for EngineError {
    fn from(unkept: Unkept) -> EngineError {
        EngineError::Config(unkept.why)
    }
}

/// What is guaranteed, and at most, to a tenant; what an NSM has of it, and how it is said.
struct Promise {
    what: &'static str,
    guaranteed_key: &'static str,
    capacity_key: &'static str,
    guaranteed: fn(&TenantConfig) -> u64,
    most: fn(&TenantConfig) -> Option<u64>,
    capacity: fn(&Capacity) -> Option<u64>,
    say: fn(u64) -> String,
}

const PROMISES: [Promise; 4] = [
    Promise {
        what: "send",
        guaranteed_key: "guaranteed_send",
        capacity_key: "capacity",
        guaranteed: |tenant| tenant.send.guaranteed,
        most: |tenant| tenant.send.most,
        capacity: |capacity| capacity.rate,
        say: bits,
    },
    Promise {
        what: "receive",
        guaranteed_key: "guaranteed_receive",
        capacity_key: "capacity",
        guaranteed: |tenant| tenant.receive.guaranteed,
        most: |tenant| tenant.receive.most,
        capacity: |capacity| capacity.rate,
        say: bits,
    },
    Promise {
        what: "operations",
        guaranteed_key: "guaranteed_operations",
        capacity_key: "capacity_operations",
        guaranteed: |tenant| tenant.guaranteed_operations,
        most: |tenant| tenant.operations,
        capacity: |capacity| capacity.operations,
        say: |n| format!("{n} operations/s"),
    },
    Promise {
        what: "connections",
        guaranteed_key: "guaranteed_connections",
        capacity_key: "capacity_connections",
        guaranteed: |tenant| tenant.guaranteed_connections,
        most: |tenant| tenant.connections,
        capacity: |capacity| capacity.connections,
        say: |n| format!("{n} connections"),
    },
];

/// Promises that cannot be kept are not made. Operations and connections as rates.
pub fn admit<'a>(
    tenants: impl Iterator<Item = &'a TenantConfig> + Clone,
    nsms: &[NsmConfig],
) -> Result<(), Unkept> {
    let names: HashSet<&str> = nsms.iter().map(|nsm| nsm.name.as_str()).collect();
    if let Some(nsm) = nsms.iter().filter(|nsm| nsm.form == Form::Process).nth(MAX_PLACES) {
        let (nsm, why) = (Some(nsm.name.clone()), TOO_MANY.into());
        return Err(Unkept { tenant: None, nsm, key: "name", why });
    }
    for tenant in tenants.clone() {
        let own = |key, why| Unkept { tenant: Some(tenant.name.clone()), nsm: None, key, why };
        if let Some(unknown) = tenant.nsms.iter().find(|name| !names.contains(name.as_str())) {
            let why = format!("tenant '{}' may use '{unknown}', but there is no such [[nsm]]", tenant.name);
            return Err(own("nsms", why));
        }
        for promise in &PROMISES {
            let (guaranteed, most) = ((promise.guaranteed)(tenant), (promise.most)(tenant));
            if let Some(most) = most.filter(|&most| most < guaranteed) {
                let why = format!(
                    "tenant '{}': {} is guaranteed {} but at most {}",
                    tenant.name,
                    promise.what,
                    (promise.say)(guaranteed),
                    (promise.say)(most)
                );
                return Err(own(promise.guaranteed_key, why));
            }
        }
    }
    for nsm in nsms {
        for promise in &PROMISES {
            let Some(capacity) = (promise.capacity)(&nsm.capacity) else { continue };
            let promised: Vec<(&str, u64)> = tenants
                .clone()
                .filter(|tenant| tenant.may_use(&nsm.name))
                .map(|tenant| (tenant.name.as_str(), (promise.guaranteed)(tenant)))
                .filter(|(_, rate)| *rate > 0)
                .collect();
            let sum = promised.iter().fold(0u64, |sum, (_, rate)| sum.saturating_add(*rate));
            if sum > capacity {
                let why = format!(
                    "NSM '{}' can carry {}, but {} is guaranteed {} = {}: lower a guarantee, raise `{}`, or let fewer tenants use it",
                    nsm.name,
                    (promise.say)(capacity),
                    promise.what,
                    terms(&promised, promise.say),
                    (promise.say)(sum),
                    promise.capacity_key
                );
                return Err(Unkept {
                    tenant: None,
                    nsm: Some(nsm.name.clone()),
                    key: promise.capacity_key,
                    why,
                });
            }
        }
    }
    Ok(())
}

/// The sum's terms; of many, the largest.
fn terms(promised: &[(&str, u64)], say: fn(u64) -> String) -> String {
    const SHOWN: usize = 10;
    let mut largest = promised.to_vec();
    if largest.len() > SHOWN {
        largest.sort_by_key(|&(_, rate)| std::cmp::Reverse(rate));
    }
    let mut terms: Vec<String> =
        largest.iter().take(SHOWN).map(|(name, rate)| format!("{name} {}", say(*rate))).collect();
    if largest.len() > SHOWN {
        let rest = largest[SHOWN..].iter().fold(0u64, |sum, (_, rate)| sum.saturating_add(*rate));
        terms.push(format!("{} more {}", largest.len() - SHOWN, say(rest)));
    }
    terms.join(" + ")
}

/// Bytes per second as people say it.
pub fn bits(rate: u64) -> String {
    let bits = rate as f64 * 8.0;
    let (value, unit) = match bits {
        b if b >= 1e9 => (b / 1e9, "Gbit/s"),
        b if b >= 1e6 => (b / 1e6, "Mbit/s"),
        b if b >= 1e3 => (b / 1e3, "kbit/s"),
        b => (b, "bit/s"),
    };
    let text = format!("{value:.3}");
    format!("{} {unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Where a process is, looked up once however many tenants are compared with it, and only if one is.
struct Process {
    pid: i32,
    cgroups: OnceCell<String>,
    netns: OnceCell<Option<(u64, u64)>>,
}

impl Process {
    fn new(pid: i32) -> Process {
        Process { pid, cgroups: OnceCell::new(), netns: OnceCell::new() }
    }

    fn is_in(&self, by: &Recognise) -> bool {
        by.cgroups.iter().any(|wanted| self.in_cgroup(wanted))
            || by.netns.iter().any(|name| self.in_netns(name))
    }

    fn in_cgroup(&self, wanted: &str) -> bool {
        let read = || std::fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let wanted = wanted.trim_end_matches('/');
        self.cgroups
            .get_or_init(read)
            .lines()
            .filter_map(|line| line.splitn(3, ':').nth(2))
            .any(|path| path == wanted || path.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('/')))
    }

    fn in_netns(&self, name: &str) -> bool {
        let inode = |path: PathBuf| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        let own = self.netns.get_or_init(|| inode(format!("/proc/{}/ns/net", self.pid).into()));
        own.is_some() && *own == inode(namespace_path(name).into())
    }
}

/// Whether two tokens are the same. Takes as long for wrong bytes as for right ones.
pub fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_that_cannot_be_kept_are_refused_with_the_arithmetic() {
        let mut nsm = NsmConfig::kernel("bbr", None);
        nsm.capacity.rate = Some(1_250_000_000);
        let tenant = |name: &str, gbit: u64| TenantConfig {
            send: Rates { guaranteed: gbit * 125_000_000, most: None },
            ..TenantConfig::new(name)
        };
        let (a, b) = (tenant("a", 6), tenant("b", 5));
        let refused = |tenants: &[TenantConfig], nsms: &[NsmConfig]| admit(tenants.iter(), nsms).unwrap_err();
        let error = refused(&[a.clone(), b.clone()], &[nsm.clone()]).why;
        assert!(
            error.contains("'bbr' can carry 10 Gbit/s")
                && error.contains("a 6 Gbit/s + b 5 Gbit/s = 11 Gbit/s"),
            "{error}"
        );
        let elsewhere = TenantConfig { nsms: vec!["cubic".into()], ..b };
        let cubic = NsmConfig::kernel("cubic", None);
        assert_eq!(admit([&a, &elsewhere].into_iter(), &[nsm.clone(), cubic]), Ok(()));
        let unknown = TenantConfig { nsms: vec!["reno".into()], ..a };
        assert!(refused(&[unknown], &[nsm]).why.contains("no such [[nsm]]"));
    }

    #[test]
    fn operations_and_connections_are_admitted_as_rates_are() {
        let mut nsm = NsmConfig::kernel("bbr", None);
        nsm.capacity = Capacity { rate: None, operations: Some(1_000_000), connections: Some(100) };
        let tenant = |name: &str, operations, connections| TenantConfig {
            guaranteed_operations: operations,
            guaranteed_connections: connections,
            ..TenantConfig::new(name)
        };
        let check = |tenants: &[TenantConfig]| admit(tenants.iter(), std::slice::from_ref(&nsm));
        assert_eq!(check(&[tenant("a", 600_000, 60), tenant("b", 400_000, 40)]), Ok(()));
        let unkept = check(&[tenant("a", 600_000, 0), tenant("b", 400_001, 0)]).unwrap_err();
        assert_eq!((unkept.nsm.as_deref(), unkept.key), (Some("bbr"), "capacity_operations"));
        let sum = "a 600000 operations/s + b 400001 operations/s = 1000001 operations/s";
        assert!(unkept.why.contains(sum), "{}", unkept.why);
        let unkept = check(&[tenant("a", 0, 60), tenant("b", 0, 41)]).unwrap_err();
        assert_eq!(unkept.key, "capacity_connections");
        assert!(
            unkept.why.contains("a 60 connections + b 41 connections = 101 connections"),
            "{}",
            unkept.why
        );
        let capped = TenantConfig { operations: Some(5), ..tenant("a", 6, 0) };
        let unkept = check(&[capped]).unwrap_err();
        assert_eq!((unkept.tenant.as_deref(), unkept.key), (Some("a"), "guaranteed_operations"));
        // Of a thousand the largest are named.
        let many: Vec<TenantConfig> = (0..1000).map(|i| tenant(&format!("t{i}"), 1001 + i, 0)).collect();
        let why = check(&many).unwrap_err().why;
        assert!(
            why.contains("t999 2000 operations/s") && why.contains(" + 990 more ") && why.len() < 1000,
            "{why}"
        );
    }

    /// Rounds of 10 ms, and what each of two tenants wants in one of them.
    #[test]
    fn a_second_in_which_the_engine_gives_less_than_it_promised_is_not_met() {
        let mut nsm = NsmConfig::kernel("bbr", None);
        nsm.capacity.operations = Some(1_000_000);
        let promised = TenantConfig { guaranteed_operations: 100_000, ..TenantConfig::new("a") };
        let nsms = [nsm];
        let tenants = Tenants::new(&[promised, TenantConfig::new("b")], false, &nsms, &[]).unwrap();
        let (a, b) = (Arc::clone(&tenants.list[0]), Arc::clone(&tenants.list[1]));
        for tenant in [&a, &b] {
            tenants.open(tenant, &nsms).unwrap();
            tenants.arrive(tenant, 0, &nsms[0]);
        }
        let mut now_ns = 1;
        let mut second = |operations: u64, behind: bool| {
            for _ in 0..100 {
                for tenant in [&a, &b] {
                    tenant.share(0, OPERATIONS).unwrap().take(operations, now_ns);
                    if behind {
                        tenant.fell_behind(0, [false, false, true]);
                    }
                }
                now_ns += 10_000_000;
                tenants.round(&nsms, now_ns);
            }
        };
        second(1, false);
        second(1000, true);
        second(10, true);
        second(1, false);
        let attained = tenants.attained(&nsms);
        // There is nothing to keep for the other one.
        assert_eq!((attained.len(), attained[0].tenant.as_str(), attained[0].nsm.as_str()), (1, "a", "bbr"));
        assert!((3..=4).contains(&attained[0].seconds), "{attained:?}");
        assert_eq!(attained[0].seconds - attained[0].met, 1, "{attained:?}");
        assert_eq!(tenants.take_attained(&nsms), attained);
        assert!(tenants.take_attained(&nsms).is_empty(), "told once");
        tenants.leave(&a, 0);
        second(10, true);
        assert!(tenants.take_attained(&nsms).is_empty(), "without a guest there is nothing to keep");
    }

    #[test]
    fn tenants_are_known_by_what_the_kernel_says() {
        let own = Asker { pid: std::process::id() as i32, uid: 1234, token: None };
        let recognises = |recognise: &Recognise, asker: Asker| {
            let config = TenantConfig { recognise: recognise.clone(), ..TenantConfig::new("a") };
            let tenants = Tenants::new(&[config], true, &[], &[]).unwrap();
            tenants.of(asker).is_ok()
        };
        let by = |recognise: Recognise| recognises(&recognise, own);
        assert!(!by(Recognise::default()));
        assert!(by(Recognise { users: vec![7, 1234], ..Recognise::default() }));
        assert!(by(Recognise { netns: vec!["/proc/self/ns/net".into()], ..Recognise::default() }));
        assert!(!by(Recognise { netns: vec!["no-such".into()], ..Recognise::default() }));
        assert!(by(Recognise { cgroups: vec!["/".into()], ..Recognise::default() }));
        assert!(!by(Recognise { cgroups: vec!["/no/such".into()], ..Recognise::default() }));
        let with = Recognise { token: Some("secret".into()), ..Recognise::default() };
        assert!(recognises(&with, Asker { token: Some("secret"), ..own }));
        for wrong in [None, Some(""), Some("secreT"), Some("secret2")] {
            assert!(!recognises(&with, Asker { token: wrong, ..own }), "{wrong:?}");
        }
    }

    #[test]
    fn rates_are_told_as_people_say_them() {
        for (rate, text) in [
            (125_000_000, "1 Gbit/s"),
            (62_500_000, "500 Mbit/s"),
            (187_500_000, "1.5 Gbit/s"),
            (1, "8 bit/s"),
        ] {
            assert_eq!(bits(rate), text);
        }
    }
}
