//! The engine's process, exchanged for another program under its guests.
//!
//! The process executes a program in its own place: it keeps its number, its children and its descriptors. All switch threads
//! stop between two turns and write their guests down, each into a journal as that of an NSM's process has it, with descriptors
//! by their numbers; a *document* in a memfd lists the guests. The program reads it, checks that both understand
//! the same memory, and goes on. What cannot be written down is found out before anything stops.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use netkernel_abi::Limits;
use netkernel_agent::Counters;
use netkernel_agent::ledger::{Books, Ledger};
use netkernel_relay::left_descriptors;
use netkernel_service::{journal_format, now_ns, take_descriptor};
use serde::{Deserialize, Serialize};

use self::relays::Relays;
use crate::engine::{Command, LeftNsm, Registered, Shared, lock};
use crate::held;
use crate::process::journal::{GuestJournal, Left, OfStack, Root};
use crate::process::remote::{LeftRunning, Remote, Still, abandon};
use crate::process::wire::{self, NewGuest};
use crate::tenants::{Tenant, Tenants};
use crate::worker::Leaving;
use crate::{Engine, EngineConfig, EngineError, Form, GuestUsage, NsmConfig, Usage};

mod relays;

/// Changes with what the document's fields mean.
const VERSION: u32 = 2;
/// How long a switch thread may take to write its guests down.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which memory a program understands. Two that say the same can follow each other.
pub fn format() -> String {
    let journal = netkernel_service::Service::journal_bytes(Limits::default());
    let of_guests = (Root::slot_bytes(), journal_format(), journal);
    format!(
        "{VERSION}.{}.{}/{}/{}/{}/{:x}/{}",
        netkernel_relay::FORMAT,
        netkernel_stack_shm::FORMAT,
        wire::VERSION,
        netkernel_abi::ABI_VERSION,
        of_guests.0,
        of_guests.1,
        of_guests.2
    )
}

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    format: String,
    /// When the first switch thread stopped, on the monotonic clock.
    stopped_ns: u64,
    last_id: u32,
    guests_created: u64,
    guests_over: u64,
    violations: u64,
    guests: Vec<Written>,
    /// All descriptors that are named anywhere.
    descriptors: Vec<RawFd>,
    /// What joins guests in memory, beside what each of them has.
    hub: Option<String>,
    processes: Vec<LeftRunning>,
    /// What tenants share with these: their names, and descriptors of this very process.
    memories: Vec<(String, RawFd)>,
    ledgers: Vec<LeftLedger>,
    /// Guests that are over and whose usage nobody has asked for.
    over: Vec<GuestUsage>,
    /// The caller's own.
    besides: serde_json::Value,
    /// Guests that lose sockets.
    losing: Vec<u32>,
}

/// A guest of the document. Descriptors are numbers of this very process.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    guest: NewGuest,
    token: [u8; 16],
    nsm: String,
    /// Its switch thread; `None`: its NSM is a process.
    worker: Option<usize>,
    age_ms: u64,
    /// What it used on NSMs before this one, and for how long it is here.
    before: Usage,
    here_ms: u64,
    left: HashMap<String, LeftNsm>,
    /// Of the agent, if it has one; and those of which its programs may have sockets from before.
    agent_nsm: Option<String>,
    agent_before: Vec<String>,
    region: RawFd,
    doorbell: RawFd,
    journal: Option<RawFd>,
    of_stack: OfStack,
    /// Where ends of placeholders are under way.
    kept: Option<RawFd>,
}

impl Written {
    fn of(
        shared: &Shared,
        id: u32,
        known: &Registered,
        limits: Limits,
        (region, doorbell): (RawFd, RawFd),
    ) -> Written {
        Written {
            guest: NewGuest {
                limits: (limits.region_bytes, limits.sockets, limits.queue_sets),
                ..NewGuest::of(id, known)
            },
            token: known.token,
            nsm: shared.nsm(known.nsm).name.clone(),
            worker: Some(known.worker).filter(|&worker| worker < shared.workers.len()),
            age_ms: known.created.elapsed().as_millis() as u64,
            before: known.before,
            here_ms: known.came.elapsed().as_millis() as u64,
            left: known.left.clone(),
            agent_nsm: known.direct.as_ref().map(|_| shared.nsm(known.agent_nsm).name.clone()),
            agent_before: known.agent_before.iter().map(|nsm| shared.nsm(*nsm).name.clone()).collect(),
            region,
            doorbell,
            journal: None,
            of_stack: OfStack::default(),
            kept: None,
        }
    }
}

/// What is known of a stack's direct sockets, and where the kernel tells of them.
#[derive(Debug, Serialize, Deserialize)]
struct LeftLedger {
    nsms: Vec<String>,
    books: Books,
    netlink: RawFd,
}

/// Ledgers that stand still until this is dropped.
#[derive(Default)]
struct Ledgers(Vec<(Arc<Ledger>, Option<LeftLedger>)>);

impl Ledgers {
    fn stop(&mut self, shared: &Shared) -> Result<(), EngineError> {
        for (nsms, ledger) in shared.ledgers.all() {
            let late = || {
                let nsms = nsms.join(", ");
                EngineError::Refused(format!("what sockets of stack {nsms} carried is being counted"))
            };
            let (books, netlink) = ledger.still(PATIENCE).ok_or_else(late)?;
            self.0.push((ledger, Some(LeftLedger { nsms, books, netlink })));
        }
        Ok(())
    }

    fn take(&mut self) -> Vec<LeftLedger> {
        self.0.iter_mut().filter_map(|(_, left)| left.take()).collect()
    }
}

impl Drop for Ledgers {
    fn drop(&mut self) {
        self.0.iter().for_each(|(ledger, _)| ledger.go_on());
    }
}

/// A stopped engine, all of it written down. Dropping this lets it go on.
pub struct Stopped<'a> {
    document: File,
    /// What the next program must find open.
    keep: Vec<RawFd>,
    _guests: Vec<Leaving>,
    /// Told to go on, or closed for the same.
    _go_on: Vec<Sender<()>>,
    _gates: Gates,
    _relays: Relays,
    _processes: Vec<Still<'a>>,
    _ledgers: Ledgers,
    _held: held::Stopped<'a>,
}

/// Of agents that stand still, by guest. Opened when this is dropped.
#[derive(Default)]
struct Gates {
    closed: HashMap<u32, Arc<Counters>>,
    /// Agents that do not stop; what they were asked fails, as if they had died.
    given_up: HashSet<u32>,
}

impl Drop for Gates {
    fn drop(&mut self) {
        self.closed.values().for_each(|agent| agent.gate.open());
    }
}

impl Stopped<'_> {
    /// The document's descriptor.
    pub fn document(&self) -> RawFd {
        self.document.as_raw_fd()
    }

    /// Leaves the descriptors open, or not, to the program that this process executes next.
    pub fn keep(&self, yes: bool) {
        for &fd in self.keep.iter().chain([&self.document.as_raw_fd()]) {
            set_close_on_exec(fd, !yes);
        }
    }
}

/// What came of it, in the program that goes on.
#[derive(Debug)]
pub struct Resumed {
    pub guests: usize,
    /// Guests that could not be gone on with; what they had was reset.
    pub lost: Vec<u32>,
    /// Guests that lost sockets, as was allowed.
    pub reset: Vec<u32>,
    /// For how long nobody served guests.
    pub pause: Duration,
    /// As it was given to [`Engine::stop_for`].
    pub besides: serde_json::Value,
}

impl Engine {
    /// Whether all guests can go on in another program; the error says which one cannot, and why. `lose`: sockets that cannot are
    /// given up.
    pub fn can_be_exchanged(&self, lose: bool) -> Result<(), EngineError> {
        match self.fleeting().into_iter().next() {
            Some((id, name, what)) if !lose => Err(relays::would_lose(id, &name, &what)),
            _ => Ok(()),
        }
    }

    /// Guests with sockets that cannot go on, and what these are.
    fn fleeting(&self) -> Vec<(u32, String, String)> {
        let mut found = Vec::new();
        let (shared, registry) = (&self.shared, lock(&self.shared.registry));
        for (id, guest) in &registry.guests {
            let nsm = shared.nsm(guest.nsm);
            let what = if guest.worker >= shared.workers.len() {
                // It does not even notice.
                continue;
            } else if guest.has_elders() {
                "sockets that stayed on a stack that it was on before".into()
            } else if !shared.config.kinds.lasts(&nsm) || !relays::can_go_on(shared, guest) {
                format!("its sockets of stack {}, whose state is in this process", nsm.name)
            } else {
                continue;
            };
            found.push((*id, guest.name.clone(), what));
        }
        found
    }

    /// The stacks that guests have, or that their agents give sockets of.
    pub fn stacks_in_use(&self) -> Vec<(u32, NsmConfig)> {
        let registry = lock(&self.shared.registry);
        let of = |(id, guest): (&u32, &Registered)| {
            let agent = guest.direct.as_ref().map(|_| guest.agent_nsm);
            let before = guest.agent_before.iter().copied();
            [Some(guest.nsm), agent]
                .into_iter()
                .flatten()
                .chain(before)
                .map(|nsm| (*id, nsm))
                .collect::<Vec<_>>()
        };
        let all = registry.guests.iter().flat_map(of);
        all.map(|(id, nsm)| (id, NsmConfig::clone(&self.shared.nsm(nsm)))).collect()
    }

    /// Stops all switch threads between two turns, and writes everything down. On error all go on.
    /// `lose`: see [`Engine::can_be_exchanged`].
    pub fn stop_for(
        &self,
        lose: bool,
        besides: impl FnOnce() -> serde_json::Value,
    ) -> Result<Stopped<'_>, EngineError> {
        self.can_be_exchanged(lose)?;
        // Who moves a guest may need a process, and the seats.
        let _nobody_moves = lock(&self.shared.moves);
        // These wait for nobody, and nobody waits for them.
        let remotes = self.shared.remotes.iter().flatten();
        let processes = remotes.map(Remote::still).collect::<Result<Vec<_>, _>>()?;
        let _stay = self.shared.seats.write().unwrap_or_else(PoisonError::into_inner);
        // Agents may need switch threads: they stop first.
        let mut gates = Gates::default();
        self.close_gates(&mut gates, lose)?;
        let mut relays = Relays::default();
        relays.look(self, lose)?;
        relays.stop(self, lose)?;
        let resource = |e: io::Error| EngineError::Resource(format!("the state cannot be written down: {e}"));
        let shared = &self.shared;
        let stopped_ns = now_ns();
        let (mut go_on, mut answers) = (Vec::new(), Vec::new());
        for worker in 0..shared.workers.len() {
            let ((answer, answered), (sender, told)) = (channel(), channel());
            shared.tell(worker, Command::Leave(answer, told));
            go_on.push(sender);
            answers.push(answered);
        }
        let mut leaving: Vec<Leaving> = Vec::new();
        for answered in answers {
            leaving.extend(answered.recv_timeout(PATIENCE).map_err(|_| EngineError::Stopped)??);
        }
        // Guests, and agents, that came after the first look.
        self.can_be_exchanged(lose)?;
        self.close_gates(&mut gates, lose)?;
        relays.stop(self, lose)?;
        let held = held::Stopped::new(shared);
        let mut ledgers = Ledgers::default();
        ledgers.stop(shared)?;
        let mut losing = self.fleeting();
        let registry = lock(&shared.registry);
        let mut keep = Vec::new();
        let mut guests = Vec::new();
        for one in &mut leaving {
            let Some(known) = registry.guests.get(&one.id) else { continue };
            relays.note(one, &known.name, lose)?;
            keep.extend(one.journal.descriptors(one.limits).into_iter().filter(|fd| *fd >= 0));
            let remains = one.remains.as_ref().map(|remains| remains.written());
            let (left, descriptors) = remains.unzip();
            let descriptors = descriptors.unwrap_or_default();
            keep.extend(&descriptors);
            let written = Written {
                of_stack: OfStack { left, descriptors, counted: std::mem::take(&mut one.counted) },
                journal: Some(one.journal.memory.fd()),
                kept: one.kept.as_ref().map(AsRawFd::as_raw_fd),
                ..Written::of(shared, one.id, known, one.limits, one.descriptors)
            };
            guests.push(written);
        }
        keep.extend(relays.descriptors());
        let apart = |(_, guest): &(&u32, &Registered)| guest.worker >= shared.workers.len();
        for (id, known) in registry.guests.iter().filter(apart) {
            let descriptors = (known.region.as_raw_fd(), known.doorbell.as_raw_fd());
            guests.push(Written::of(shared, *id, known, known.sizes, descriptors));
        }
        keep.extend(guests.iter().flat_map(|one| [one.region, one.doorbell]));
        keep.extend(guests.iter().flat_map(|one| [one.journal, one.kept]).flatten());
        losing.extend(relays.lost.iter().map(|(id, what)| (*id, String::new(), what.clone())));
        for (guest, _, what) in &losing {
            log::warn!(guest; "guest {guest} loses {what}");
        }
        let (hub, joined) = shared.config.kinds.hub().map(|hub| hub.written()).unzip();
        keep.extend(joined.into_iter().flatten());
        let left: Vec<LeftRunning> = processes.iter().filter_map(|process| process.left(shared)).collect();
        keep.extend(left.iter().map(|process| process.control));
        let memories = shared.tenants.memories();
        keep.extend(memories.iter().map(|(_, memory)| memory));
        let left_ledgers = ledgers.take();
        keep.extend(left_ledgers.iter().map(|ledger| ledger.netlink));
        let document = Document {
            format: format(),
            stopped_ns,
            last_id: registry.last_id,
            guests_created: shared.counters.created.load(Relaxed),
            guests_over: shared.counters.over.load(Relaxed),
            violations: shared.counters.violations.load(Relaxed),
            guests,
            descriptors: keep.clone(),
            hub,
            processes: left,
            memories,
            ledgers: left_ledgers,
            over: lock(&shared.over).iter().cloned().collect(),
            besides: besides(),
            losing: losing.into_iter().map(|(id, ..)| id).collect(),
        };
        drop(registry);
        let document = written(&document).map_err(resource)?;
        Ok(Stopped {
            document,
            keep,
            _guests: leaving,
            _go_on: go_on,
            _gates: gates,
            _relays: relays,
            _processes: processes,
            _ledgers: ledgers,
            _held: held,
        })
    }

    /// Stops the agents between two calls.
    fn close_gates(&self, gates: &mut Gates, lose: bool) -> Result<(), EngineError> {
        let registry = lock(&self.shared.registry);
        let agents = registry.guests.iter().filter_map(|(id, guest)| Some((*id, guest.direct.as_ref()?)));
        let agents: Vec<_> = agents.map(|(id, agent)| (id, Arc::clone(&agent.counters))).collect();
        drop(registry);
        for (id, counters) in agents {
            if gates.given_up.contains(&id) {
                continue;
            }
            if let Entry::Vacant(place) = gates.closed.entry(id) {
                if !counters.gate.close(PATIENCE) {
                    if lose {
                        gates.given_up.insert(id);
                        continue;
                    }
                    return Err(EngineError::Refused(format!("a call of guest {id} is not answered yet")));
                }
                place.insert(counters);
            }
        }
        Ok(())
    }

    /// The last thing before the other program is executed: the heir must not take this process for dead.
    pub fn end_heir(&self) {
        self.shared.heirs.end();
    }

    /// Starts an engine that goes on where this process's program before stopped. `document`: what [`Stopped::document`] said.
    pub fn resume(config: EngineConfig, document: OwnedFd) -> Result<(Arc<Engine>, Resumed), EngineError> {
        let bad = |e: &dyn std::fmt::Display| EngineError::Resource(format!("what was written down: {e}"));
        let mut text = Vec::new();
        File::from(document).read_to_end(&mut text).map_err(|e| bad(&e))?;
        let document: Document = serde_json::from_slice(&text).map_err(|e| bad(&e))?;
        if document.format != format() {
            return Err(bad(&format_args!("it is of format {}, not {}", document.format, format())));
        }
        // Nothing else may inherit them: the first guest's agent starts a process.
        document.descriptors.iter().for_each(|fd| set_close_on_exec(*fd, true));
        let left_open: Vec<LeftOpen> = document.guests.iter().map(LeftOpen::of).collect();
        let taken: Vec<(String, usize)> =
            document.processes.iter().map(|process| (process.nsm.name.clone(), process.place)).collect();
        let engine = Engine::start_with(config, None, None, &taken)?;
        let shared = &engine.shared;
        for (tenant, memory) in document.memories {
            let memory = take_descriptor(memory + 1).ok_or_else(|| io::Error::other("it is not there"));
            let resumed =
                memory.and_then(|fd| shared.tenants.resume(&tenant, fd, &shared.config.nsms, &taken));
            if let Err(error) = resumed {
                log::error!(tenant:%; "what guests of tenant {tenant} in processes use is not known any more: {error}");
            }
        }
        lock(&shared.registry).last_id = document.last_id;
        lock(&shared.over).extend(document.over);
        shared.counters.created.store(document.guests_created, Relaxed);
        shared.counters.over.store(document.guests_over, Relaxed);
        shared.counters.violations.store(document.violations, Relaxed);
        let mut resumed = Resumed {
            guests: 0,
            lost: Vec::new(),
            reset: document.losing,
            pause: Duration::ZERO,
            besides: document.besides,
        };
        let since_ns = now_ns().saturating_sub(document.stopped_ns);
        for ledger in document.ledgers {
            let known = shared.config.nsms.iter().filter(|nsm| ledger.nsms.contains(&nsm.name));
            let sockets = known.filter_map(|nsm| shared.config.kinds.direct(nsm)?.ok()).next();
            if let (Some(sockets), Some(netlink)) = (sockets, take_descriptor(ledger.netlink + 1)) {
                shared.ledgers.resume(ledger.nsms, &*sockets, ledger.books, netlink);
            }
        }
        let hub = shared.config.kinds.hub();
        if let (Some(hub), Some(left)) = (hub, &document.hub) {
            hub.take_up(left);
        }
        for (one, left_open) in document.guests.into_iter().zip(left_open) {
            let (id, name) = (one.guest.id, one.guest.name.clone());
            let of_stack = one.of_stack.left.clone();
            match engine.go_on(one, since_ns / 1_000_000) {
                Ok(()) => resumed.guests += 1,
                Err(error) => {
                    log::error!(guest = id; "guest {id} ({name}) is lost: {error}");
                    left_open.reset();
                    if let (Some(hub), Some(left)) = (hub, of_stack) {
                        hub.lose(&left);
                    }
                    shared.forget(id);
                    resumed.lost.push(id);
                }
            }
        }
        shared.tenants.settle();
        hub.iter().for_each(|hub| hub.settle());
        for process in document.processes {
            engine.go_on_with(process);
        }
        resumed.pause = Duration::from_nanos(now_ns().saturating_sub(document.stopped_ns));
        Ok((engine, resumed))
    }

    fn go_on(&self, written: Written, since_ms: u64) -> Result<(), EngineError> {
        let parts = [written.region, written.doorbell].map(|fd| take_descriptor(fd + 1));
        let [Some(region), Some(doorbell)] = parts else {
            return Err(no_descriptors(io::Error::other("they are not there")));
        };
        if written.worker.is_none() {
            return self.place(&written, region, doorbell, since_ms).map(|_| ());
        }
        let limits = written.guest.sizes();
        let memory = written.journal.and_then(|fd| take_descriptor(fd + 1));
        let memory = memory.ok_or_else(|| no_descriptors(io::Error::other("there is no journal")))?;
        let journal = GuestJournal::open(memory, limits).map_err(no_descriptors)?;
        self.rebuild(written, region, doorbell, journal, since_ms)
    }

    fn rebuild(
        &self,
        written: Written,
        region: OwnedFd,
        doorbell: OwnedFd,
        journal: GuestJournal,
        since_ms: u64,
    ) -> Result<(), EngineError> {
        let copies =
            (region.try_clone().map_err(no_descriptors)?, doorbell.try_clone().map_err(no_descriptors)?);
        let (nsm, seat, tenant) = self.place(&written, copies.0, copies.1, since_ms)?;
        let kept = written.kept.and_then(|fd| take_descriptor(fd + 1));
        let may_use = tenant.limits(nsm);
        let left = Left {
            kept,
            of_stack: written.of_stack,
            ..Left::new(written.guest, nsm, may_use, (region, doorbell), journal)
        };
        self.ask(seat, |answer| Command::Recover(Box::new(left), tenant, true, answer))?
    }

    /// Where an NSM's process goes on to tell of its guests, which do not notice anything.
    fn go_on_with(&self, left: LeftRunning) {
        let shared = &self.shared;
        let name = left.nsm.name.clone();
        let Some(control) = take_descriptor(left.control + 1) else {
            log::error!("stack {name}: its process cannot be reached any more");
            return;
        };
        let nsms = &shared.config.nsms;
        let index = nsms.iter().position(|nsm| nsm.name == name && nsm.form == Form::Process);
        let Some((index, remote)) = index.and_then(|index| Some((index, shared.remote(index)?))) else {
            // It has no guests.
            std::thread::spawn(move || abandon(&left, control));
            return;
        };
        let offered = nsms[index].capacity;
        let as_before = NsmConfig { capacity: offered, ..left.nsm.clone() };
        let text = |nsm: &NsmConfig| serde_json::to_value(nsm).unwrap_or_default();
        if text(&as_before) != text(&nsms[index]) {
            log::warn!(nsm:% = name; "stack {name} goes on as it is, not as it is configured now: its process was not started again");
        }
        shared.set_nsm(index, as_before);
        if let Err(error) = remote.adopt(shared, left, control) {
            log::error!(nsm:% = name; "stack {name} is lost: {error}");
            shared.keep_guests_of(index, &[]);
        }
    }

    /// Makes a guest known; its stack, and its seat.
    fn place(
        &self,
        written: &Written,
        region: OwnedFd,
        doorbell: OwnedFd,
        since_ms: u64,
    ) -> Result<(usize, usize, Arc<Tenant>), EngineError> {
        let shared = &self.shared;
        let index = |name: &str| {
            let nsms = &shared.config.nsms;
            nsms.iter().position(|own| own.name == name).ok_or_else(|| EngineError::UnknownStack {
                name: name.to_owned(),
                known: nsms.iter().map(|own| own.name.clone()).collect(),
            })
        };
        let ago = |ms: u64| {
            let now = Instant::now();
            now.checked_sub(Duration::from_millis(ms + since_ms)).unwrap_or(now)
        };
        let nsm = index(&written.nsm)?;
        let agent_nsm = written.agent_nsm.as_deref().map_or(Ok(nsm), index)?;
        let agent_before = written.agent_before.iter().map(|name| index(name)).collect::<Result<_, _>>()?;
        let threads = shared.workers.len();
        let seat = written.worker.map_or(threads + nsm, |worker| worker % threads);
        let guest = &written.guest;
        let id = guest.id;
        let tenant = self.named_tenant(&guest.tenant);
        shared.tenants.open(&tenant, &shared.config.nsms)?;
        let registered = Registered {
            token: written.token,
            name: guest.name.clone(),
            nsm,
            tenant: Arc::clone(&tenant),
            pid: guest.pid,
            uid: guest.uid,
            created: ago(written.age_ms),
            worker: seat,
            sizes: guest.sizes(),
            region,
            doorbell,
            direct: None,
            begun: true,
            on_the_way: false,
            before: written.before,
            came: ago(written.here_ms),
            agent_nsm,
            agent_before,
            elders: Vec::new(),
            left: written.left.clone(),
        };
        {
            let mut registry = lock(&shared.registry);
            // A limit that is lower now ends nobody.
            let _ = shared.tenants.take_guest(&tenant);
            Tenants::arrive(&shared.tenants, &tenant, nsm, &shared.config.nsms[nsm]);
            registry.tokens.insert(written.token, id);
            registry.guests.insert(id, registered);
        }
        Ok((nsm, seat, tenant))
    }
}

fn no_descriptors(error: io::Error) -> EngineError {
    EngineError::Resource(format!("no descriptors for a guest: {error}"))
}

fn written(document: &Document) -> io::Result<File> {
    // SAFETY: a C string and flags; the result is checked.
    let fd = unsafe { libc::memfd_create(c"netkernel-handover".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&serde_json::to_vec(document)?)?;
    file.rewind()?;
    Ok(file)
}

fn set_close_on_exec(fd: RawFd, on: bool) {
    // SAFETY: plain system call; what is not open is an error.
    unsafe { libc::fcntl(fd, libc::F_SETFD, if on { libc::FD_CLOEXEC } else { 0 }) };
}

/// The sockets that a guest's journal names, and its relay's, each with what tells that its number is not another's by now.
struct LeftOpen(Vec<(RawFd, (u64, u64))>);

impl LeftOpen {
    fn of(one: &Written) -> LeftOpen {
        let limits = one.guest.sizes();
        let journal = one.journal.and_then(|fd| GuestJournal::reopen(fd, limits).ok());
        let Some(journal) = journal else { return LeftOpen(Vec::new()) };
        let mut all = journal.descriptors(limits);
        let relay = journal.agent[0].relay - 1;
        if relay >= 0 {
            // SAFETY: open: the journal names what was kept so, and nobody has taken it over yet.
            all.extend(left_descriptors(unsafe { BorrowedFd::borrow_raw(relay) }));
        }
        all.extend(&one.of_stack.descriptors);
        LeftOpen(all.into_iter().filter_map(|fd| Some((fd, socket_inode(fd)?))).collect())
    }

    /// Closes what is still open of them: peers see a reset, the guest's programs that nobody is there.
    fn reset(&self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let len = size_of::<libc::linger>() as libc::socklen_t;
        for &(fd, inode) in self.0.iter().filter(|(fd, inode)| socket_inode(*fd) == Some(*inode)) {
            let _ = inode;
            // SAFETY: linger is valid for reads of its size. The descriptor is the same socket as before: nobody took it over,
            // since who did closed it.
            unsafe {
                libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len);
                libc::close(fd);
            }
        }
    }
}

fn socket_inode(fd: RawFd) -> Option<(u64, u64)> {
    // SAFETY: an all-zero stat is a valid value of that plain C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: stat is valid for writes; what is not open is an error.
    let known = unsafe { libc::fstat(fd, &mut stat) } == 0;
    (known && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK).then_some((stat.st_dev, stat.st_ino))
}
