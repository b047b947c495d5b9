//! Guests that are put on another NSM, with the sockets that can go along.

use std::sync::Arc;

use netkernel_service::{Member, RELAYED, Stack, Stays, key};
use netkernel_stack_lent::{Lent, lend};

use super::{Source, Worker, guest_leaves, stacks, tapped, usage};
use crate::EngineError;
use crate::usage::Usage;

/// What became of the sockets that ServiceLib serves.
pub(crate) struct Went {
    pub sockets: usize,
    /// By NSM, and why.
    pub stayed: Vec<(usize, usize, &'static str)>,
    /// What the guest used until now.
    pub used: Usage,
    /// The new stack, for its relay.
    pub lent: Option<Lent>,
}

impl Worker {
    /// From now on another NSM serves a guest: new sockets are opened there. Those that cannot go over stay with the NSM that they
    /// are of until they end, or nothing changes if `all` must go.
    pub(super) fn move_guest(&mut self, id: u32, nsm: usize, all: bool) -> Result<Went, EngineError> {
        let slot = self.slot(id).ok_or(EngineError::UnknownGuest(id))?;
        self.module(nsm)?;
        let limits = self.shared.limits_on(id, nsm);
        let owner = self.shared.who(id).2;
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else {
            return Err(EngineError::UnknownGuest(id));
        };
        let refused = |why: String| Err(EngineError::Refused(format!("guest {id} stays: {why}")));
        if guest.nsm == nsm {
            return refused("it is on this stack".into());
        }
        // A relay borrows the new stack, too, if it cannot have one of its own.
        let borrows = guest.has_agent
            && guest.agent_arguments[2] == 1
            && !self.shared.config.kinds.has_many(&self.shared.config.nsms[nsm]);
        let (lender, lent) = if borrows {
            let no_room = |e| EngineError::Resource(format!("no descriptors for a relay: {e}"));
            let (lender, lent) = lend(key(slot, RELAYED)).map_err(no_room)?;
            self.poller.add_readable(lender.bell(), Source::Relay(slot)).map_err(no_room)?;
            (Some(lender), Some(lent))
        } else {
            (None, None)
        };
        // Its NSMs from now on, by the place in handles; those without sockets leave at once.
        let before = guest.nsms();
        let mut nsms = vec![nsm];
        nsms.extend(before.iter().copied().filter(|other| *other != nsm));
        let places: Vec<usize> = (0..=guest.elders.len())
            .map(|place| {
                let of = guest.nsm_at(place);
                nsms.iter().position(|nsm| Some(*nsm) == of).unwrap_or(0)
            })
            .collect();
        if let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders)
            && let Err(violation) = guest.service.accept_all(stacks.get())
        {
            self.violation(slot, violation);
            return Err(EngineError::UnknownGuest(id));
        }
        let comes = !before.contains(&nsm);
        if comes && let Some(new) = &mut self.modules[nsm] {
            new.stack.guest(slot, owner);
            let captures = Arc::clone(&guest.captures);
            let (tenant, name) = (guest.tenant.number(), guest.tenant.name().into());
            new.stack.member(slot, Member { tenant, name, limits: limits.clone(), captures });
            new.guests += 1;
        }
        let mut of_nsm: Vec<Option<&mut dyn Stack>> = self
            .modules
            .iter_mut()
            .map(|module| module.as_mut().map(|module| &mut *module.stack as &mut dyn Stack))
            .collect();
        let mut list: Vec<&mut dyn Stack> = nsms.iter().filter_map(|nsm| of_nsm[*nsm].take()).collect();
        let takes = list.first().is_some_and(|stack| stack.takes());
        let place = |place: usize| places.get(place).copied().unwrap_or(0);
        let moved = guest.service.move_to(&mut list, &place, limits, all);
        let only = if takes {
            "they exist in that stack only"
        } else {
            "the new stack takes no sockets that are the kernel's"
        };
        let went = match moved {
            Ok(Ok(went)) => went,
            Ok(Err(stays)) => {
                if comes {
                    guest_leaves(&mut self.modules[nsm], slot);
                }
                return refused(match stays {
                    Stays::Sockets(1) => format!("a socket of it cannot go over, for {only}: close it first"),
                    Stays::Sockets(count) => {
                        format!("{count} of its sockets cannot go over, for {only}: close them first")
                    }
                    Stays::Connections(count) => {
                        format!("there is no room for its {count} connections on the other stack")
                    }
                });
            }
            Err(violation) => {
                if comes {
                    guest_leaves(&mut self.modules[nsm], slot);
                }
                self.violation(slot, violation);
                return Err(EngineError::UnknownGuest(id));
            }
        };
        let used = usage(guest);
        guest.nsm = nsm;
        guest.lenders.extend(lender.map(|lender| (nsm, lender)));
        guest.elders = nsms[1..].iter().map(|nsm| Some(*nsm)).collect();
        let stayed = nsms.iter().zip(&went.stayed).filter(|(_, count)| **count > 0);
        let stayed = stayed.map(|(nsm, count)| (*nsm, *count, only)).collect();
        let sessions = self.captures.iter().filter(|session| comes && !session.is_over());
        for session in sessions {
            if session.target.is(id, &guest.tenant.name(), owner)
                && let Some(taps) = tapped(&mut self.modules[nsm], nsm)
            {
                taps.begin(session, &[(slot, Vec::new())]);
            }
        }
        self.leave_elders(slot);
        self.warm(slot);
        Ok(Went { sockets: went.sockets, stayed, used, lent })
    }

    /// NSMs that a guest was on before, and that have no socket of it any more, forget it.
    pub(super) fn leave_elders(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        if guest.elders.is_empty() && guest.lenders.len() < 2 {
            return;
        }
        // Relays that have given back what they borrowed.
        for (_, lender) in guest.lenders.extract_if(.., |(_, lender)| lender.is_over()) {
            self.poller.remove(lender.bell());
            guest.carried = guest.carried.with_tcp(&lender.tcp());
        }
        guest.seen_ended = guest.service.ended();
        let counts = guest.service.sockets_at(guest.elders.len() + 1);
        for (elder, _) in guest.elders.iter_mut().zip(&counts[1..]).filter(|(_, count)| **count == 0) {
            if let Some(nsm) = elder.take_if(|nsm| guest.lenders.iter().all(|(of, _)| of != nsm)) {
                guest_leaves(&mut self.modules[nsm], slot);
            }
        }
        while guest.elders.last().is_some_and(Option::is_none) {
            guest.elders.pop();
        }
        let elders = guest.elders.iter().flatten().copied().collect();
        self.shared.has_elders(guest.id, elders);
    }
}
