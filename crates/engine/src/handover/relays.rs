//! Relays that stand still while the program is exchanged.

use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, RawFd};
use std::time::Instant;

use netkernel_relay::{Link, Still, Stopping};

use super::PATIENCE;
use crate::engine::{Registered, Shared, lock};
use crate::worker::{Leaving, of_agent};
use crate::{Engine, EngineError};

/// Those that stand still, by guest, until this is dropped.
#[derive(Default)]
pub(super) struct Relays(HashMap<u32, Still>);

/// Whether a guest's relay has sockets that another program can go on with.
pub(super) fn can_go_on(shared: &Shared, guest: &Registered) -> bool {
    let relayed = guest.direct.as_ref().is_some_and(|direct| direct.relay.is_some());
    !relayed || shared.config.kinds.lasts(&shared.nsm(guest.agent_nsm))
}

impl Relays {
    /// Stops those that do not stand still yet.
    pub fn stop(&mut self, engine: &Engine) -> Result<(), EngineError> {
        let registry = lock(&engine.shared.registry);
        let links = registry.guests.iter().filter_map(|(id, guest)| {
            let link = guest.direct.as_ref()?.relay.as_ref()?;
            Some((*id, guest.name.clone(), link.clone()))
        });
        let links: Vec<(u32, String, Link)> = links.filter(|(id, ..)| !self.0.contains_key(id)).collect();
        drop(registry);
        let until = Instant::now() + PATIENCE;
        let asked: Vec<(u32, String, Stopping)> =
            links.into_iter().map(|(id, name, link)| (id, name, link.stop())).collect();
        for (id, name, stopping) in asked {
            let still = stopping.wait(until).map_err(|why| {
                EngineError::Refused(format!("guest {id} ({name}) would lose its relayed sockets: {why}"))
            })?;
            self.0.extend(still.map(|still| (id, still)));
        }
        Ok(())
    }

    /// Notes a guest's relay in its journal, and what its agent used until now: all of them stand still.
    pub fn note(&self, one: &mut Leaving) -> Result<(), EngineError> {
        if let Some(counters) = &one.agent {
            one.journal.carried[0].add(&of_agent(counters));
        }
        let Some(still) = self.0.get(&one.id) else { return Ok(()) };
        let note = &mut one.journal.agent[0];
        if note.listener == 0 {
            // There was no descriptor for its duplicate.
            let text =
                format!("guest {} would lose its relayed sockets: its calls cannot be passed on", one.id);
            return Err(EngineError::Refused(text));
        }
        note.relay = still.left.memory.as_raw_fd() + 1;
        Ok(())
    }

    /// What the next program must find open, besides what journals name.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.0.values().flat_map(|still| still.left.descriptors.iter().copied())
    }
}
