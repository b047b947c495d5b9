//! Guests that go over into the process of an NSM, or out of one.
//!
//! A ring has one consumer, and a process of an NSM serves whole guests: so here a guest goes over with all that it has, or not at all.
//! Its switch thread takes it apart between two turns, as for another program ([`crate::handover`]); descriptors and journal
//! go over ([`crate::process::transit`]), and the other side goes on from them. Who serves a guest is decided in one place only:
//! while a worker's list of guests has it, that worker or the one after it does, whoever dies.

use std::os::fd::{AsFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use netkernel_abi::Limits;
use netkernel_agent::{Counters, Processes};
use netkernel_relay::{Link, Still, left_descriptors, left_sockets};
use netkernel_service::{Service, now_ns, take_descriptor};

use crate::engine::{Command, Shared, lock};
use crate::moves::{MovedGuest, StayedSockets};
use crate::placement::{self, Placement};
use crate::process::journal::Left;
use crate::process::transit::{Packed, Used, copy_of_relay};
use crate::tenants::Tenant;
use crate::{Engine, EngineError, Usage, direct, keeper};

/// How long agents, relays and processes may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often somebody who waits for a switch thread looks whether it still runs.
const LOOK: Duration = Duration::from_secs(1);

/// A guest's agent, under no call until this is dropped.
enum Standing {
    Nobody,
    Agent(Arc<Counters>),
    Relay(Option<Still>, Link),
}

impl Standing {
    fn of(shared: &Shared, guest: u32) -> Result<Standing, EngineError> {
        let refused = |why: String| EngineError::Refused(format!("guest {guest} stays: {why}"));
        let agent = lock(&shared.registry).guests.get(&guest).and_then(|guest| guest.direct.clone());
        let Some(agent) = agent else { return Ok(Standing::Nobody) };
        let Some(link) = &agent.relay else {
            if !agent.counters.gate.close(PATIENCE) {
                return Err(refused("a call of it is not answered yet".into()));
            }
            return Ok(Standing::Agent(Arc::clone(&agent.counters)));
        };
        match link.stop().wait(Instant::now() + PATIENCE).map_err(refused)? {
            // It is over, and the guest knows, or soon will.
            None => Ok(Standing::Nobody),
            Some(still) if still.left.bound > 0 => Err(refused(format!(
                "{} of its relayed sockets exist in their stack only, and can go to no other process: close them first",
                still.left.bound
            ))),
            Some(still) => Ok(Standing::Relay(Some(still), link.clone())),
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if let Standing::Agent(counters) = self {
            counters.gate.open();
        }
    }
}

/// What a relay left, in descriptors of its own, until it is noted.
struct Copy(Option<OwnedFd>);

impl Drop for Copy {
    fn drop(&mut self) {
        let named = self.0.iter().flat_map(left_descriptors);
        named.for_each(|fd| drop(take_descriptor(fd + 1)));
    }
}

/// Takes a guest of this process's switch threads apart. On error it stays.
pub(crate) fn pack(shared: &Arc<Shared>, guest: u32) -> Result<(Packed, Usage), EngineError> {
    let resource = |e: std::io::Error| {
        EngineError::Resource(format!("guest {guest} stays: no descriptors to take it apart: {e}"))
    };
    let worker = lock(&shared.registry).guests.get(&guest).map(|known| known.worker);
    let worker = worker.ok_or(EngineError::UnknownGuest(guest))?;
    let mut standing = Standing::of(shared, guest)?;
    let mut copy = Copy(match &standing {
        Standing::Relay(Some(still), _) => Some(copy_of_relay(still.left.memory.as_fd()).map_err(resource)?),
        _ => None,
    });
    let (answer, answered) = channel();
    shared.tell(worker, Command::Pack(guest, !matches!(standing, Standing::Nobody), answer));
    // Not given up while the thread may answer: the guest is in the answer.
    let (mut left, used) = loop {
        match answered.recv_timeout(LOOK) {
            Ok(packed) => break packed?,
            Err(RecvTimeoutError::Timeout) if !shared.stopping.load(Relaxed) => {}
            Err(_) => return Err(EngineError::Stopped),
        }
    };
    if let Some(memory) = copy.0.take() {
        left.journal.agent[0].relay = memory.into_raw_fd() + 1;
    }
    // Its thread ends: with the pair, which the switch thread closed, or at once.
    if let Standing::Relay(still, link) = &mut standing
        && let Some(still) = still.take()
    {
        still.end();
        // Until then its connections count, and the next one's would not.
        let _ = link.is_here().recv_timeout(PATIENCE);
    }
    if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
        known.direct = None;
    }
    if let Err(error) = take_kept(&mut left) {
        let tenant = lock(&shared.registry).guests.get(&guest).map(|known| Arc::clone(&known.tenant));
        if let Some(tenant) = tenant {
            unpack(shared, Packed::new(left), tenant, worker)?;
        }
        return Err(resource(error));
    }
    Ok((Packed::new(left), used))
}

/// Ends that the keeper had are descriptors of this process from now on.
fn take_kept(left: &mut Left) -> std::io::Result<()> {
    if let Some(kept) = &left.kept {
        loop {
            let ends = keeper::copies(kept)?;
            if ends.is_empty() {
                break;
            }
            for (id, end) in ends {
                // What hung up after the copy was made is closed, and its number may be another socket's by now.
                if let Some(place) = left.journal.ends.get_mut(id as usize).filter(|place| **place == -1) {
                    *place = end.into_raw_fd() + 1;
                }
            }
        }
    }
    left.kept = None;
    left.journal.ends.iter_mut().filter(|end| **end == -1).for_each(|end| *end = 0);
    Ok(())
}

/// Has a switch thread go on with a guest. On error it is lost.
pub(crate) fn unpack(
    shared: &Arc<Shared>,
    packed: Packed,
    tenant: Arc<Tenant>,
    thread: usize,
) -> Result<(), EngineError> {
    let left = packed.unpack().ok_or(EngineError::Stopped)?;
    let (answer, answered) = channel();
    shared.tell(thread, Command::Recover(left, tenant, true, answer));
    loop {
        match answered.recv_timeout(LOOK) {
            Ok(came) => return came,
            Err(RecvTimeoutError::Timeout) if !shared.stopping.load(Relaxed) => {}
            Err(_) => return Err(EngineError::Stopped),
        }
    }
}

/// A guest between two NSMs.
struct OnTheWay {
    packed: Packed,
    used: Used,
}

impl Engine {
    /// [`Engine::move_guest`], where one of the two NSMs is a process.
    pub(crate) fn move_far(
        &self,
        guest: u32,
        nsm: usize,
        all_or_nothing: bool,
    ) -> Result<MovedGuest, EngineError> {
        let shared = self.shared();
        let name = &shared.config.nsms[nsm].name;
        let refused = |why: String| EngineError::Refused(format!("guest {guest} stays: {why}"));
        self.listens(guest)?;
        let direct = self.direct_sockets_of(guest);
        if let Some(first) = direct.first().filter(|left| all_or_nothing && left.stack != *name) {
            let why = format!("{} of its sockets would stay on stack {}: ", first.sockets, first.stack);
            return Err(refused(why + &first.reason));
        }
        // Nobody asks where it is, or tells it anything that would be lost.
        let _alone = shared.seats.write().unwrap_or_else(PoisonError::into_inner);
        let (seat, from, tenant, limits) = {
            let mut registry = lock(&shared.registry);
            let known = registry.guests.get_mut(&guest).ok_or(EngineError::UnknownGuest(guest))?;
            let found = (known.worker, known.nsm, Arc::clone(&known.tenant), known.sizes);
            known.on_the_way = true;
            found
        };
        let settle = || {
            if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
                known.on_the_way = false;
            }
        };
        let to = match shared.remote(nsm) {
            Some(remote) => shared.workers.len() + remote.nsm(),
            None if shared.config.placement == Placement::Pack => {
                placement::choose(shared.workers.iter().map(|link| &link.load), now_ns())
            }
            None => guest as usize % shared.workers.len(),
        };
        let taken = self.may_come(guest, nsm, to).and_then(|()| self.take_out(guest, seat));
        let OnTheWay { packed, used } = match taken {
            Ok(taken) => taken,
            Err(error) => {
                settle();
                return Err(error);
            }
        };
        let mut packed = packed;
        let sockets = packed.left().map_or((0, 0), |left| sockets_of(left, limits));
        let before: Vec<usize> = (0..shared.config.nsms.len())
            .filter(|at| direct.iter().any(|left| left.stack == shared.config.nsms[*at].name))
            .collect();
        let goes_on = used.goes_on;
        shared.guest_moved(guest, nsm, used.all, goes_on, || {
            if !used.direct.is_empty() {
                direct::adopt_books(shared, guest, from, used.direct);
            }
        });
        let fits = self.fits(guest, nsm, &mut packed, sockets);
        let came = match fits {
            Ok(()) => self.put_in(guest, to, nsm, &tenant, packed, before.clone()),
            Err(error) => Err((error, Some(packed))),
        };
        let result = match came {
            Ok(()) => {
                let stayed = direct.into_iter().filter(|left| left.stack != *name).collect();
                Ok(MovedGuest { sockets: sockets.0, stayed })
            }
            Err((error, packed)) => {
                shared.guest_moved(guest, from, goes_on, goes_on, || ());
                let back = packed.map(|packed| self.put_in(guest, seat, from, &tenant, packed, before));
                if !matches!(back, Some(Ok(()))) {
                    log::error!(guest; "guest {guest} is lost on the way to stack {name}: {error}");
                    shared.guest_over(guest, goes_on);
                }
                Err(error)
            }
        };
        settle();
        result
    }

    /// A process that hangs would keep everybody waiting: the one after it has the guest, and may be asked again.
    fn listens(&self, guest: u32) -> Result<(), EngineError> {
        let shared = self.shared();
        let seat = lock(&shared.registry).guests.get(&guest).map(|known| known.worker);
        let seat = seat.ok_or(EngineError::UnknownGuest(guest))?;
        let Some(nsm) = seat.checked_sub(shared.workers.len()) else { return Ok(()) };
        let (answer, answered) = channel();
        shared.tell(seat, Command::Sockets(guest, 0, answer));
        if let Err(RecvTimeoutError::Timeout) = answered.recv_timeout(PATIENCE) {
            let name = &shared.config.nsms[nsm].name;
            log::warn!(guest, nsm:% = name; "the process of stack {name} does not answer and is killed");
            shared.remote(nsm).inspect(|remote| remote.kill_worker());
            return Err(EngineError::Refused(format!(
                "guest {guest} stays: the process of stack {name} did not answer, and was started again"
            )));
        }
        Ok(())
    }

    /// What can be known before anything is done.
    fn may_come(&self, guest: u32, nsm: usize, seat: usize) -> Result<(), EngineError> {
        let shared = self.shared();
        if seat < shared.workers.len() {
            return shared.ask(seat, |answer| Command::Prepare(nsm, answer))?;
        }
        let tenant = lock(&shared.registry).guests.get(&guest).map(|known| Arc::clone(&known.tenant));
        let tenant = tenant.ok_or(EngineError::UnknownGuest(guest))?;
        // Its process is to know the tenant's limits.
        shared.tenants.open(&tenant, &shared.config.nsms)?;
        match shared.remote(nsm) {
            Some(remote) => remote.begin(shared),
            None => Err(EngineError::Stopped),
        }
    }

    /// Whether the NSM can do with what has come.
    fn fits(
        &self,
        guest: u32,
        nsm: usize,
        packed: &mut Packed,
        (sockets, connections): (usize, usize),
    ) -> Result<(), EngineError> {
        let shared = self.shared();
        let refused = |why: String| Err(EngineError::Refused(format!("guest {guest} stays: {why}")));
        let config = &shared.config.nsms[nsm];
        let Some(left) = packed.left() else { return Err(EngineError::Stopped) };
        let agent = left.journal.agent[0];
        if sockets > 0 && !shared.config.kinds.lasts(config) {
            return refused(format!(
                "stack {} takes no sockets that are the kernel's, and none can stay behind in another process: close them first",
                config.name
            ));
        }
        if agent.listener != 0 && agent.arguments[2] != 1 && !shared.config.kinds.has_direct(config) {
            return refused(format!(
                "stack {} has no sockets of the kernel, and the seccomp filter of its programs is for these only; start it with \
                 --attach relay or queued",
                config.name
            ));
        }
        // A process looks itself.
        let places = shared.limits_on(guest, nsm).connections.filter(|_| shared.remote(nsm).is_none());
        if !has_room(places.as_ref(), connections) {
            return refused(format!("there is no room for its {connections} connections on the other stack"));
        }
        Ok(())
    }

    fn take_out(&self, guest: u32, seat: usize) -> Result<OnTheWay, EngineError> {
        let shared = self.shared();
        if seat < shared.workers.len() {
            let (packed, used) = pack(shared, guest)?;
            let used = Used { all: used, goes_on: used, ..Used::default() };
            return Ok(OnTheWay { packed, used });
        }
        let remote = shared.remote(seat - shared.workers.len()).ok_or(EngineError::Stopped)?;
        let (left, used) = remote.depart(shared, guest)?;
        Ok(OnTheWay { packed: Packed::new(left), used })
    }

    /// On error the guest is where it was, or, without it, lost.
    fn put_in(
        &self,
        guest: u32,
        seat: usize,
        nsm: usize,
        tenant: &Arc<Tenant>,
        mut packed: Packed,
        before: Vec<usize>,
    ) -> Result<(), (EngineError, Option<Packed>)> {
        let shared = self.shared();
        if let Some(left) = packed.left() {
            (left.nsm, left.may_use) = (nsm, tenant.limits(nsm));
        }
        if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
            known.worker = seat;
            known.agent_nsm = nsm;
            known.agent_before = before.into_iter().filter(|other| *other != nsm).collect();
            known.elders.clear();
        }
        if seat < shared.workers.len() {
            return unpack(shared, packed, Arc::clone(tenant), seat).map_err(|error| (error, None));
        }
        match shared.remote(nsm) {
            Some(remote) => remote.arrive(shared, packed, tenant),
            None => Err((EngineError::Stopped, Some(packed))),
        }
    }

    /// The kernel's own sockets that a guest's programs have, by stack.
    fn direct_sockets_of(&self, guest: u32) -> Vec<StayedSockets> {
        let mut all: Vec<StayedSockets> = Vec::new();
        for socket in self.sockets_without_holders(guest, &Processes::look()) {
            if socket.attachment != "direct" {
                continue;
            }
            match all.iter_mut().find(|left| left.stack == socket.stack) {
                Some(left) => left.sockets += 1,
                None => all.push(StayedSockets {
                    sockets: 1,
                    stack: socket.stack,
                    reason: "they are the kernel's own, in the hands of its programs (attachment direct)"
                        .into(),
                }),
            }
        }
        all
    }
}

/// The sockets of a guest that was taken apart, and those of them that count as connections in its journal.
fn sockets_of(left: &Left, limits: Limits) -> (usize, usize) {
    let (queued, connections) = Service::journal_sockets(&left.journal.memory, limits);
    let relay = left.journal.agent[0].relay - 1;
    // SAFETY: the journal's own; the borrow ends with this statement.
    let relayed = if relay < 0 { 0 } else { left_sockets(unsafe { BorrowedFd::borrow_raw(relay) }) };
    (queued + relayed, connections)
}

/// Whether so many connections may come.
pub(crate) fn has_room(places: Option<&netkernel_service::Places>, connections: usize) -> bool {
    let Some(places) = places else { return true };
    let taken = (0..connections).take_while(|_| places.take()).count();
    (0..taken).for_each(|_| places.give_back());
    taken == connections
}
