//! Guests that are put on another NSM while their programs run.
//!
//! What ServiceLib serves is the switch thread's work ([`crate::worker`]). What is left is here: may it be, what the guest's agent
//! gives out from then on, and who is told.

use std::sync::PoisonError;
use std::time::Duration;

use netkernel_agent::Processes;
use netkernel_service::Stack;

use crate::direct::{self, Direct};
use crate::engine::{Command, Shared, lock};
use crate::{Engine, EngineError, relay};

/// How long it is waited until a relay opens sockets in the new stack.
const RELAY_ANSWER: Duration = Duration::from_secs(1);

/// What became of the open sockets of a guest that was moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MovedGuest {
    /// These went over.
    pub sockets: usize,
    pub stayed: Vec<StayedSockets>,
}

/// Sockets that stay where they are until they end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StayedSockets {
    pub sockets: usize,
    /// The stack that serves them.
    pub stack: String,
    /// Why; for people.
    pub reason: String,
}

impl Engine {
    /// Puts a guest on another NSM of the engine's own threads: new sockets are opened there. Those that it has go over as
    /// descriptors of the kernel, with their names and peers; what cannot stays where it is until it ends, or, with
    /// `all_or_nothing`, the guest does. Errors: it is not known, may not use that NSM, or cannot be moved; then it stays, and the
    /// text says why.
    pub fn move_guest(
        &self,
        guest: u32,
        name: &str,
        all_or_nothing: bool,
    ) -> Result<MovedGuest, EngineError> {
        let shared = self.shared();
        let nsms = &shared.config.nsms;
        let nsm = nsms.iter().position(|nsm| nsm.name == name).ok_or_else(|| EngineError::UnknownStack {
            name: name.into(),
            known: nsms.iter().map(|nsm| nsm.name.clone()).collect(),
        })?;
        let _alone = lock(&shared.moves);
        let _stays = shared.seats.read().unwrap_or_else(PoisonError::into_inner);
        let refused = |why: String| EngineError::Refused(format!("guest {guest} stays: {why}"));
        let (worker, from, agent) = {
            let registry = lock(&shared.registry);
            let found = registry.guests.get(&guest).ok_or(EngineError::UnknownGuest(guest))?;
            if !found.tenant.uses(nsm) {
                let tenant = found.tenant.name();
                return Err(refused(format!("tenant {tenant} may not use stack {name}")));
            }
            if shared.remote(nsm).is_some() || found.worker >= shared.workers.len() {
                let why = "an NSM in a process of its own keeps its guests; `nsm swap` changes it";
                return Err(refused(why.into()));
            }
            (found.worker, found.nsm, found.direct.clone())
        };
        if from == nsm {
            return Ok(MovedGuest::default());
        }
        let unavailable = |reason| EngineError::StackUnavailable { name: name.into(), reason };
        shared.config.kinds.check(&shared.nsm(nsm)).map_err(unavailable)?;
        let mut offer = None;
        let mut own_stack = None;
        if let Some(agent) = &agent {
            if all_or_nothing && let Some(first) = own_sockets(shared, guest, agent, nsm).first() {
                let why = format!("{} of its sockets would stay on stack {}: ", first.sockets, first.stack);
                return Err(refused(why + &first.reason));
            }
        }
        if agent.as_ref().is_some_and(|agent| agent.relay.is_some()) {
            let config = &nsms[nsm];
            let make = || shared.config.kinds.make(config).map_err(unavailable);
            own_stack = shared.config.kinds.has_many(config).then(make).transpose()?;
        } else if agent.is_some() {
            // A relay must be told of more calls than the programs' filter tells of, and nobody can change that.
            let none = || {
                refused(format!(
                    "stack {name} has no sockets of the kernel, and the seccomp filter of its programs is for these only; \
                     start it with --attach relay or queued"
                ))
            };
            offer = Some(direct::offer(shared, guest, &nsms[nsm]).ok_or_else(none)?.map_err(unavailable)?);
        }
        let went = shared.ask(worker, |answer| Command::Move(guest, nsm, all_or_nothing, answer))??;
        let mut taps = None;
        if let (Some(offer), Some(agent)) = (offer, &agent) {
            agent.exchange.put(offer);
        }
        let own = own_stack.is_some();
        let stack = own_stack.or_else(|| went.lent.map(|lent| Box::new(lent) as Box<dyn Stack>));
        if let (Some(link), Some(stack)) = (agent.as_ref().and_then(|agent| agent.relay.as_ref()), stack) {
            let (successor, looks_on) = relay::successor(shared, guest, nsm, stack, own);
            taps = looks_on;
            // One that is held up by its guest is not waited for longer.
            let _ = link.succeed(successor).recv_timeout(RELAY_ANSWER);
        }
        if agent.is_some() {
            if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
                known.direct.iter_mut().for_each(|direct| direct.taps.extend(taps.take()));
                let before = std::mem::replace(&mut known.agent_nsm, nsm);
                known.agent_before.retain(|other| *other != nsm && *other != before);
                known.agent_before.push(before);
            }
        }
        shared.guest_moved(guest, nsm, went.used);
        let queued = went.stayed.into_iter().map(|(nsm, sockets, reason)| StayedSockets {
            sockets,
            stack: nsms[nsm].name.clone(),
            reason: reason.into(),
        });
        let own = agent.map_or_else(Vec::new, |agent| own_sockets(shared, guest, &agent, nsm));
        Ok(MovedGuest { sockets: went.sockets, stayed: queued.chain(own).collect() })
    }
}

/// Open sockets of other NSMs that a guest's programs have from the agent, by NSM.
fn own_sockets(shared: &Shared, guest: u32, agent: &Direct, nsm: usize) -> Vec<StayedSockets> {
    let found = lock(&shared.registry).guests.get(&guest).map(|guest| (guest.agent_nsms(), guest.pid));
    let Some((nsms, pid)) = found else { return Vec::new() };
    let census = direct::census(agent, pid, &Processes::look());
    let mut stayed: Vec<StayedSockets> = Vec::new();
    for socket in direct::sockets(shared, guest, &nsms, agent, &census) {
        if socket.stack == shared.config.nsms[nsm].name {
            continue;
        }
        match stayed.iter_mut().find(|left| left.stack == socket.stack) {
            Some(left) => left.sockets += 1,
            None => stayed.push(StayedSockets {
                sockets: 1,
                stack: socket.stack,
                reason: if agent.relay.is_some() {
                    "they are relayed (attachment relay)".into()
                } else {
                    "they are the kernel's own, in the hands of its programs (attachment direct)".into()
                },
            }),
        }
    }
    stayed
}
