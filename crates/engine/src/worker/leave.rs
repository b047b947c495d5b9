//! Guests that leave a switch thread: for another program of the engine, or for another thread.

use std::io;
use std::os::fd::{AsRawFd as _, IntoRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use netkernel_agent::Counters;
use netkernel_service::{Remains, Stages, Violation};

use super::{Bell, End, Guest, Process, Source, Worker, note, stages, vacancy};
use crate::EngineError;
use crate::handed::Handed;
use crate::process::journal::{AgentNote, GuestJournal, Left};
use crate::process::wire::NewGuest;
use crate::usage::Usage;

/// A guest as it is written down.
pub(crate) struct Leaving {
    pub id: u32,
    pub limits: netkernel_abi::Limits,
    /// Its region's and its doorbell's, which stay this process's.
    pub descriptors: (RawFd, RawFd),
    pub journal: GuestJournal,
    /// Its ends that the keeper has.
    pub kept: Option<OwnedFd>,
    /// What its agent did is not in the journal: it may not stand still yet.
    pub agent: Option<Arc<Counters>>,
    /// What its stack has of it, to be written when all threads stand still.
    pub remains: Option<Box<dyn Remains>>,
    /// What was counted of its pairs.
    pub counted: Vec<(u32, u64, u64)>,
}

/// What a guest has in this process only, on the way to another switch thread.
pub(crate) struct Departed {
    agent: Option<LiveAgent>,
    handed: Handed,
    stages: Stages,
}

struct LiveAgent {
    pair: OwnedFd,
    counters: Option<Arc<Counters>>,
    kept: Option<(OwnedFd, OwnedFd)>,
    arguments: [u32; 3],
}

/// What a guest that was written down is besides its journal.
struct LetGo {
    nsm: usize,
    doorbell: OwnedFd,
    agent: Option<LiveAgent>,
    handed: Handed,
    stages: Stages,
}

fn no_room(error: io::Error) -> EngineError {
    EngineError::Resource(format!("a guest cannot be written down: {error}"))
}

impl Worker {
    /// Everything of this thread's guests, for the process after this one. Nothing changes by it.
    pub(super) fn leave(&mut self) -> Result<Vec<Leaving>, EngineError> {
        for slot in 0..self.guests.len() as u32 {
            self.wake(slot);
        }
        // Before anything is written: what the keeper reported it has no more.
        let mut kept: Vec<Option<OwnedFd>> = Vec::new();
        for slot in 0..self.guests.len() as u32 {
            kept.push(self.copy_kept(slot).map_err(no_room)?);
        }
        self.keeper_reports();
        self.close_hung(true);
        let mut all = Vec::new();
        for (slot, (guest, kept)) in self.guests.iter_mut().zip(kept).enumerate() {
            let Some(guest) = guest else { continue };
            let mut remains = None;
            if let Some(module) = &mut self.modules[guest.nsm] {
                // Its relay stands still.
                let lenders = guest.lenders.iter_mut().filter(|(nsm, _)| *nsm == guest.nsm);
                lenders.for_each(|(_, lender)| lender.serve_all(&mut *module.stack));
                guest.service.count(&mut *module.stack);
                remains = module.stack.leave(slot as u32);
            }
            let mut journal = written_down(guest)?;
            if let Some((listener, last)) = &guest.agent_kept {
                journal.agent[0] = AgentNote {
                    listener: listener.as_raw_fd() + 1,
                    last: last.as_raw_fd() + 1,
                    arguments: guest.agent_arguments,
                    ..AgentNote::default()
                };
            }
            journal.carried[0] = super::without_agent(guest);
            let limits = guest.service.region().layout().limits;
            let descriptors = (guest.service.region().fd(), guest.doorbell.as_raw_fd());
            let agent = guest.agent.clone();
            let counted = guest.service.counted_pairs();
            all.push(Leaving { id: guest.id, limits, descriptors, journal, kept, agent, remains, counted });
        }
        Ok(all)
    }

    /// Gives a guest away, to go on in another switch thread ([`Worker::arrive`]). Its descriptors stay open and are nobody's
    /// meanwhile but the journal's. On error it stays.
    pub(super) fn depart(&mut self, id: u32) -> Result<Box<Left>, EngineError> {
        let slot = self.slot(id).ok_or(EngineError::UnknownGuest(id))?;
        let stays = |why: &str| Err(EngineError::Refused(format!("guest {id} stays on its thread: {why}")));
        self.wake(slot);
        let kept = self.copy_kept(slot).map_err(no_room)?;
        self.keeper_reports();
        self.close_hung(true);
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else {
            return Err(EngineError::UnknownGuest(id));
        };
        if !guest.elders.is_empty() {
            return stays("sockets of it stayed on a stack that it was on before");
        }
        let Some(module) = &mut self.modules[guest.nsm] else { return Err(EngineError::Stopped) };
        if self.shared.root.is_some() || guest.over_since.is_some() {
            return stays("it is over, or its stack is a process");
        }
        if !guest.lenders.is_empty() {
            return stays("its sockets are lent to a relay");
        }
        if guest.captures.load(Relaxed) != 0 {
            return stays("it is captured");
        }
        if !guest.service.can_depart(&*module.stack) {
            return stays("sockets of it exist in this thread only");
        }
        guest.service.disown_handed();
        let mut journal = written_down(guest)?;
        journal.carried[0] = guest.carried;
        journal.carried[0].cpu_ns += guest.cpu.spent_ns();
        // SAFETY: the region owns its descriptor and lives during this statement.
        let region = unsafe { std::os::fd::BorrowedFd::borrow_raw(guest.service.region().fd()) };
        let region = region.try_clone_to_owned().map_err(no_room)?;
        let limits = guest.service.region().layout().limits;
        let (name, pid, uid) = self.shared.who(id);
        let new = NewGuest {
            id,
            name,
            tenant: guest.tenant.name(),
            pid,
            uid,
            privileged: uid == 0,
            limits: (limits.region_bytes, limits.sockets, limits.queue_sets),
        };
        let may_use = self.shared.limits(id);
        // Nothing fails from here on.
        let guest = self.let_go(slot, kept.is_some()).ok_or(EngineError::UnknownGuest(id))?;
        let (agent, stages) = (guest.agent, guest.stages);
        let departed = Departed { agent, handed: guest.handed, stages };
        Ok(Box::new(Left {
            kept,
            departed: Some(Box::new(departed)),
            ..Left::new(new, guest.nsm, may_use, (region, guest.doorbell), journal)
        }))
    }

    /// Takes all of a guest for another process to go on with, as far as it is descriptors: they stay open, and are nobody's but the
    /// journal's. `agent_stands`: its agent is under no call, and begins none; it ends with this. On error the guest stays.
    pub(super) fn pack(&mut self, id: u32, agent_stands: bool) -> Result<(Box<Left>, Usage), EngineError> {
        let slot = self.slot(id).ok_or(EngineError::UnknownGuest(id))?;
        let stays = |why: String| Err(EngineError::Refused(format!("guest {id} stays: {why}")));
        self.wake(slot);
        let kept = self.copy_kept(slot).map_err(no_room)?;
        self.keeper_reports();
        self.close_hung(true);
        self.leave_elders(slot);
        let may_use = self.shared.limits(id);
        let (name, pid, uid) = self.shared.who(id);
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else {
            return Err(EngineError::UnknownGuest(id));
        };
        let nsms = &self.shared.config.nsms;
        if guest.over_since.is_some() {
            return stays("it is over".into());
        }
        if let Some(elder) = guest.elders.iter().flatten().next() {
            let counts = guest.service.sockets_at(guest.elders.len() + 1);
            let left: usize = counts[1..].iter().sum();
            return stays(format!(
                "{left} of its sockets stayed on stack {}, which it was on before, and can go to no other process: close them first",
                nsms[*elder].name
            ));
        }
        if guest.has_agent && !agent_stands {
            return stays("its agent has only just begun: try again".into());
        }
        let Some(module) = &mut self.modules[guest.nsm] else { return Err(EngineError::Stopped) };
        if let Err(violation) = guest.service.accept_all(&mut *module.stack) {
            self.violation(slot, violation);
            return Err(EngineError::UnknownGuest(id));
        }
        // SAFETY: the region owns its descriptor and lives during this statement.
        let region = unsafe { std::os::fd::BorrowedFd::borrow_raw(guest.service.region().fd()) };
        let region = region.try_clone_to_owned().map_err(no_room)?;
        let limits = guest.service.region().layout().limits;
        let mut journal = GuestJournal::create(limits).map_err(no_room)?;
        guest.service.disown_handed();
        if let Err(bound) = guest.service.pack(&mut *module.stack) {
            let which = match bound {
                1 => "a socket of it exists".into(),
                _ => format!("{bound} of its sockets exist"),
            };
            return stays(format!(
                "{which} in stack {} only, and can go to no other process: close them first",
                nsms[guest.nsm].name
            ));
        }
        // There is room: it was made for this guest.
        write_down(guest, &mut journal)?;
        let used = super::usage(guest);
        journal.carried[0] = super::besides(guest);
        if let Some((listener, last)) = &guest.agent_kept {
            journal.agent[0] = AgentNote {
                listener: listener.as_raw_fd() + 1,
                last: last.as_raw_fd() + 1,
                relay: 0,
                arguments: guest.agent_arguments,
            };
        }
        if let Some(root) = &self.shared.root {
            root.exchange(id, region.as_raw_fd(), &journal);
        }
        let new = NewGuest {
            id,
            name,
            tenant: guest.tenant.name(),
            pid,
            uid,
            privileged: uid == 0,
            limits: (limits.region_bytes, limits.sockets, limits.queue_sets),
        };
        let Some(guest) = self.let_go(slot, kept.is_some()) else {
            return Err(EngineError::UnknownGuest(id));
        };
        self.shared.keep_stages(guest.nsm, &guest.stages);
        if let Some(LiveAgent { pair, kept, .. }) = guest.agent {
            // Named by the journal.
            if let Some((listener, last)) = kept {
                let _ = (listener.into_raw_fd(), last.into_raw_fd());
            }
            self.shared.heirs.forget(id);
            // Its thread ends with this.
            drop(pair);
        }
        let left = Left { kept, ..Left::new(new, guest.nsm, may_use, (region, guest.doorbell), journal) };
        Ok((Box::new(left), used))
    }

    /// Forgets a guest that is written down: its descriptors stay open, and are the journal's.
    fn let_go(&mut self, slot: u32, kept: bool) -> Option<LetGo> {
        let mut guest = *self.guests.get_mut(slot as usize)?.take()?;
        if let Some(module) = &mut self.modules[guest.nsm] {
            guest.service.depart(&mut *module.stack);
        }
        for (nsm, lender) in &mut guest.lenders {
            self.poller.remove(lender.bell());
            if let Some(module) = &mut self.modules[*nsm] {
                lender.end(&mut *module.stack);
            }
        }
        super::guest_leaves(&mut self.modules[guest.nsm], slot);
        self.hot.retain(|&hot| hot != slot);
        let ends: Vec<u32> = guest.ends.placeholders.iter().map(|(id, _)| id).collect();
        for id in ends {
            if let Some(end) = guest.ends.placeholders.get_mut(id)
                && let End::Here(fd) = std::mem::take(end)
            {
                self.poller.remove(fd.as_raw_fd());
                self.ends_here -= 1;
                let _ = fd.into_raw_fd();
            }
        }
        if kept && let Some(keeper) = &self.keeper {
            keeper.remove_slot(slot);
        }
        for bell in guest.ends.doorbells.drain(..) {
            if let Bell::Some(fd) = bell {
                let _ = fd.into_raw_fd();
            }
        }
        for channel in guest.channels.drain(..).flatten() {
            self.poller.remove(channel.as_raw_fd());
            let _ = channel.into_raw_fd();
        }
        let mut agent = None;
        for Process { tag, pair } in guest.processes.drain(..).flatten() {
            self.poller.remove(pair.as_raw_fd());
            if tag == 0 {
                let (counters, kept) = (guest.agent.take(), guest.agent_kept.take());
                agent = Some(LiveAgent { pair, counters, kept, arguments: guest.agent_arguments });
            } else {
                let _ = pair.into_raw_fd();
            }
        }
        self.poller.remove(guest.doorbell.as_raw_fd());
        let counters = &self.shared.counters;
        counters.doorbells.fetch_add(guest.ends.rings, Relaxed);
        counters.wakes.fetch_add(guest.ends.wakes, Relaxed);
        let stages = stages(&guest);
        Some(LetGo { nsm: guest.nsm, doorbell: guest.doorbell, agent, handed: guest.handed, stages })
    }

    /// Goes on with what a guest had in this process only.
    pub(super) fn arrive(&mut self, slot: u32, departed: Departed) -> Result<(), EngineError> {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return Ok(()) };
        guest.handed = departed.handed;
        guest.stages = departed.stages;
        let Some(agent) = departed.agent else { return Ok(()) };
        let number = vacancy(&mut guest.processes);
        let source = Source::Process(slot, number as u32);
        // Without it nobody would see the agent end: it is ended, and new sockets fail.
        if self.poller.add_hangup(agent.pair.as_raw_fd(), source).is_err() {
            self.shared.heirs.answer(guest.id);
            return Ok(());
        }
        guest.processes[number] = Some(Process { tag: 0, pair: agent.pair });
        guest.has_agent = true;
        guest.agent = agent.counters;
        guest.agent_kept = agent.kept;
        guest.agent_arguments = agent.arguments;
        if self.shared.config.kinds.has_direct(&self.shared.config.nsms[guest.nsm]) {
            guest.service.prepare_hand_over();
        }
        Ok(())
    }

    /// Copies of a guest's ends that the keeper has, if it has any.
    fn copy_kept(&self, slot: u32) -> io::Result<Option<OwnedFd>> {
        let Some(Some(guest)) = self.guests.get(slot as usize) else { return Ok(None) };
        let any = guest.ends.placeholders.iter().any(|(_, end)| matches!(end, End::Kept(_)));
        self.keeper.as_ref().filter(|_| any).map(|keeper| keeper.copy_slot(slot)).transpose()
    }

    /// Takes over the ends that a keeper had.
    pub(super) fn recover_kept(&mut self, slot: u32, kept: &OwnedFd) -> Result<(), Violation> {
        loop {
            match crate::keeper::copies(kept) {
                Ok(ends) if ends.is_empty() => break,
                Ok(ends) => {
                    for (id, end) in ends {
                        // What hung up after the copy was made is closed, and its number may be another socket's by now.
                        let noted =
                            self.guests[slot as usize].as_ref().and_then(|guest| guest.journal.as_ref());
                        if noted.is_some_and(|noted| noted.ends.get(id as usize) == Some(&-1)) {
                            self.keep_placeholder(slot, id, end)?;
                        }
                    }
                }
                Err(error) => {
                    log::error!("ends of sockets are lost: {error}");
                    break;
                }
            }
        }
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return Ok(()) };
        let (Some(module), Some(journal)) = (&mut self.modules[guest.nsm], &guest.journal) else {
            return Ok(());
        };
        // Nobody would learn when these are closed.
        for id in (0u32..).zip(&*journal.ends).filter_map(|(id, end)| (*end == -1).then_some(id)) {
            if guest.ends.placeholders.get(id).is_none_or(|end| matches!(end, End::None)) {
                guest.service.refuse(&mut *module.stack, id)?;
            }
        }
        Ok(())
    }
}

/// A journal with the guest's descriptors, without its agent's, and its service's state.
fn written_down(guest: &Guest) -> Result<GuestJournal, EngineError> {
    let limits = guest.service.region().layout().limits;
    let mut journal = GuestJournal::create(limits).map_err(no_room)?;
    write_down(guest, &mut journal)?;
    Ok(journal)
}

fn write_down(guest: &Guest, journal: &mut GuestJournal) -> Result<(), EngineError> {
    let written = guest.service.write_out(&journal.memory);
    written.ok_or_else(|| no_room(io::Error::other("its journal is too small")))?;
    for (number, channel) in guest.channels.iter().enumerate() {
        note(Some(&mut journal.channels), number, channel.as_ref());
    }
    for (number, process) in guest.processes.iter().enumerate() {
        // The agent's pair ends with its thread.
        if let (Some(process), Some(place)) =
            (process.as_ref().filter(|process| process.tag != 0), journal.processes.get_mut(number))
        {
            *place = [process.tag, process.pair.as_raw_fd() as u32 + 1];
        }
    }
    for (q, bell) in guest.ends.doorbells.iter().enumerate() {
        if let Bell::Some(fd) = bell {
            note(Some(&mut journal.bells), q, Some(fd));
        }
    }
    for (id, end) in guest.ends.placeholders.iter() {
        match end {
            End::None => {}
            End::Here(fd) => note(Some(&mut journal.ends), id as usize, Some(fd)),
            End::Kept(_) => {
                if let Some(place) = journal.ends.get_mut(id as usize) {
                    *place = -1;
                }
            }
        }
    }
    Ok(())
}
