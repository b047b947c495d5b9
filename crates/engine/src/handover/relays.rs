//! Relays that stand still while the program is exchanged.

use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Instant;

use netkernel_relay::{Link, Still, Stopping};

use super::PATIENCE;
use crate::engine::{Registered, Shared, lock};
use crate::worker::{Leaving, of_agent};
use crate::{Engine, EngineError};

/// Those that stand still, by guest, until this is dropped.
#[derive(Default)]
pub(super) struct Relays {
    still: HashMap<u32, Still>,
    /// Those that stand in their guests' journals.
    noted: Vec<u32>,
    /// Guests whose relays did not stop and are lost, and why.
    pub lost: HashMap<u32, String>,
}

/// Whether a guest's relay has sockets that another program can go on with.
pub(super) fn can_go_on(shared: &Shared, guest: &Registered) -> bool {
    let relayed = guest.direct.as_ref().is_some_and(|direct| direct.relay.is_some());
    !relayed || shared.config.kinds.lasts(&shared.nsm(guest.agent_nsm))
}

/// The refusal, and what can be done about it.
pub(super) fn would_lose(id: u32, name: &str, what: &str) -> EngineError {
    EngineError::Refused(format!(
        "guest {id} ({name}) would lose {what}; with --lose they are reset, and everything else goes on"
    ))
}

impl Relays {
    /// Looks for those that do not listen, before the others stand still: these would wait for nothing. `lose`: they are given
    /// up.
    pub fn look(&mut self, engine: &Engine, lose: bool) -> Result<(), EngineError> {
        let until = Instant::now() + PATIENCE;
        let links = self.links(engine);
        let asked: Vec<_> = links.into_iter().map(|(id, name, link)| (id, name, link.is_here())).collect();
        for (id, name, answer) in asked {
            let left = until.saturating_duration_since(Instant::now());
            if answer.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                self.give_up(id, &name, "its relay does not answer", lose)?;
            }
        }
        Ok(())
    }

    /// Relays that neither stand still nor are lost.
    fn links(&self, engine: &Engine) -> Vec<(u32, String, Link)> {
        let registry = lock(&engine.shared.registry);
        let new = |id: &u32| !self.still.contains_key(id) && !self.lost.contains_key(id);
        let links = registry.guests.iter().filter(|(id, _)| new(id)).filter_map(|(id, guest)| {
            let link = guest.direct.as_ref()?.relay.as_ref()?;
            Some((*id, guest.name.clone(), link.clone()))
        });
        links.collect()
    }

    /// Stops those that do not stand still yet. `lose`: those that do not stop are given up.
    pub fn stop(&mut self, engine: &Engine, lose: bool) -> Result<(), EngineError> {
        let until = Instant::now() + PATIENCE / 2;
        let links = self.links(engine);
        let asked: Vec<(u32, String, Stopping)> =
            links.into_iter().map(|(id, name, link)| (id, name, link.stop())).collect();
        for (id, name, stopping) in asked {
            match stopping.wait(until) {
                Ok(still) => self.still.extend(still.map(|still| (id, still))),
                Err(why) => self.give_up(id, &name, &why, lose)?,
            }
        }
        Ok(())
    }

    fn give_up(&mut self, id: u32, name: &str, why: &str, lose: bool) -> Result<(), EngineError> {
        let what = format!("its relayed sockets: {why}");
        if !lose {
            return Err(would_lose(id, name, &what));
        }
        self.lost.insert(id, what);
        Ok(())
    }

    /// Notes a guest's relay in its journal, and what its agent used until now: all of them stand still.
    pub fn note(&mut self, one: &mut Leaving, name: &str, lose: bool) -> Result<(), EngineError> {
        if let Some(counters) = &one.agent {
            one.journal.carried[0].add(&of_agent(counters));
        }
        let Some(still) = self.still.get(&one.id) else { return Ok(()) };
        let note = &mut one.journal.agent[0];
        if note.listener == 0 {
            return self.give_up(one.id, name, "there was no descriptor to pass its calls on with", lose);
        }
        note.relay = still.left.memory.as_raw_fd() + 1;
        self.noted.push(one.id);
        Ok(())
    }

    /// What the next program must find open, besides what journals name. Nobody there would close the others.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let noted = self.noted.iter().filter_map(|id| self.still.get(id));
        noted.flat_map(|still| still.left.descriptors.iter().copied())
    }
}
