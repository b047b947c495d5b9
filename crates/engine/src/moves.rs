//! Guests that are put on another NSM while their programs run.
//!
//! What ServiceLib serves is the switch thread's work ([`crate::worker`]). What is left is here: may it be, what the guest's agent
//! gives out from then on, and who is told.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use netkernel_agent::{Offer, Processes};
use netkernel_capture::Taps;
use netkernel_service::Stack;
use netkernel_stack_lent::Lent;

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
    /// Puts a guest on another NSM: new sockets are opened there. Those that it has go over as
    /// descriptors of the kernel, with their names and peers; what cannot stays where it is until it ends, or, with
    /// `all_or_nothing`, the guest does. Into a process, and out of one, all that is not in the hands of programs goes, or nothing does.
    /// Errors: it is not known, may not use that NSM, or cannot be moved; then it stays, and the text says why.
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
        let far = {
            let registry = lock(&shared.registry);
            let found = registry.guests.get(&guest).ok_or(EngineError::UnknownGuest(guest))?;
            if !found.tenant.uses(nsm) {
                let tenant = found.tenant.name();
                let why = format!("guest {guest} stays: tenant {tenant} may not use stack {name}");
                return Err(EngineError::Refused(why));
            }
            found.nsm != nsm && (shared.remote(nsm).is_some() || found.worker >= shared.workers.len())
        };
        if far {
            let reason = shared.config.kinds.check(&shared.nsm(nsm));
            reason.map_err(|reason| EngineError::StackUnavailable { name: name.into(), reason })?;
            return self.move_far(guest, nsm, all_or_nothing);
        }
        let _stays = shared.seats.read().unwrap_or_else(PoisonError::into_inner);
        let refused = |why: String| EngineError::Refused(format!("guest {guest} stays: {why}"));
        let (worker, from, agent) = {
            let registry = lock(&shared.registry);
            let found = registry.guests.get(&guest).ok_or(EngineError::UnknownGuest(guest))?;
            (found.worker, found.nsm, found.direct.clone())
        };
        if from == nsm {
            return Ok(MovedGuest::default());
        }
        let unavailable = |reason| EngineError::StackUnavailable { name: name.into(), reason };
        shared.config.kinds.check(&shared.nsm(nsm)).map_err(unavailable)?;
        if all_or_nothing
            && let Some(agent) = &agent
            && let Some(first) = own_sockets(shared, guest, agent, nsm).first()
        {
            let why = format!("{} of its sockets would stay on stack {}: ", first.sockets, first.stack);
            return Err(refused(why + &first.reason));
        }
        let gift = agent.as_ref().map(|agent| Gift::prepare(shared, guest, nsm, agent)).transpose()?;
        let went = shared.ask(worker, |answer| Command::Move(guest, nsm, all_or_nothing, answer))??;
        // One may have come meanwhile.
        let agent = agent.or_else(|| {
            let registry = lock(&shared.registry);
            registry.guests.get(&guest).filter(|guest| guest.agent_nsm != nsm)?.direct.clone()
        });
        if let Some(agent) = &agent
            && let Some(gift) = gift.or_else(|| Gift::prepare(shared, guest, nsm, agent).ok())
        {
            let taps = gift.give(shared, guest, nsm, agent, went.lent);
            if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
                known.direct.iter_mut().for_each(|direct| direct.taps.extend(taps.clone()));
                let before = std::mem::replace(&mut known.agent_nsm, nsm);
                known.agent_before.retain(|other| *other != nsm && *other != before);
                known.agent_before.push(before);
            }
        }
        shared.guest_moved(guest, nsm, went.used, went.used, || ());
        let queued = went.stayed.into_iter().map(|(nsm, sockets, reason)| StayedSockets {
            sockets,
            stack: nsms[nsm].name.clone(),
            reason: reason.into(),
        });
        let own = agent.map_or_else(Vec::new, |agent| own_sockets(shared, guest, &agent, nsm));
        if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
            let has_some = |nsm: &usize| own.iter().any(|left| left.stack == nsms[*nsm].name);
            known.agent_before.retain(has_some);
        }
        Ok(MovedGuest { sockets: went.sockets, stayed: queued.chain(own).collect() })
    }
}

/// What a guest's agent is to work with from now on; all that can fail is done before anything changes.
enum Gift {
    /// Nothing, or what the switch thread lends.
    Nothing,
    Sockets(Offer),
    /// A stack of a relay's own.
    Stack(Box<dyn Stack>),
}

impl Gift {
    fn prepare(shared: &Arc<Shared>, guest: u32, nsm: usize, agent: &Direct) -> Result<Gift, EngineError> {
        let nsm = &shared.config.nsms[nsm];
        let unavailable = |reason| EngineError::StackUnavailable { name: nsm.name.clone(), reason };
        if agent.relay.is_none() {
            // A relay must be told of more calls than the programs' filter tells of, and nobody can change that.
            let offer = direct::offer(shared, guest, nsm).ok_or_else(|| {
                EngineError::Refused(format!(
                    "guest {guest} stays: stack {} has no sockets of the kernel, and the seccomp filter of its programs is for \
                     these only; start it with --attach relay or queued",
                    nsm.name
                ))
            })?;
            return Ok(Gift::Sockets(offer.map_err(unavailable)?));
        }
        if !shared.config.kinds.has_many(nsm) {
            return Ok(Gift::Nothing);
        }
        Ok(Gift::Stack(shared.config.kinds.make(nsm).map_err(unavailable)?))
    }

    /// Who looks on at a relay's own stack.
    fn give(
        self,
        shared: &Shared,
        guest: u32,
        nsm: usize,
        agent: &Direct,
        lent: Option<Lent>,
    ) -> Option<Taps> {
        let (stack, own) = match self {
            Gift::Sockets(offer) => {
                agent.exchange.put(offer);
                return None;
            }
            Gift::Stack(stack) => (stack, true),
            Gift::Nothing => (Box::new(lent?) as Box<dyn Stack>, false),
        };
        let (successor, taps) = relay::successor(shared, guest, nsm, stack, own);
        // A relay that is held up by its guest is not waited for longer.
        let _ = agent.relay.as_ref()?.succeed(successor).recv_timeout(RELAY_ANSWER);
        taps
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
