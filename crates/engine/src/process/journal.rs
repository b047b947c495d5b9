//! What the worker must not forget when it dies, besides its services: whose descriptors are which.
//!
//! The *root* lists the guests; the holder makes it. Each guest has a journal of its own: its service's part first, then its
//! descriptors, each as its number + 1 (0: none). A descriptor is noted after it was opened and forgotten before it is closed,
//! so that a worker that died in between leaves one that is named nowhere, which the next worker closes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use netkernel_abi::Limits;
use netkernel_service::{Fixed, Plain, Service, TenantMemory, take_descriptor};
use netkernel_shm::Journal;

use super::wire::NewGuest;
use crate::engine::lock;
use crate::usage::Usage;
use crate::worker::Departed;

const NAME_BYTES: usize = 124;
/// Processes and channels of a guest, as in `worker`.
const MAX_PROCESSES: usize = 8192;
const MAX_CHANNELS: usize = 1024;

/// The list of guests.
pub struct Root {
    journal: Arc<Journal>,
    slots: Mutex<Fixed<Slot>>,
    /// 1: the worker stopped between two turns, and nothing was under way.
    exact: Mutex<Fixed<u8>>,
}

const MAX_SLOTS: usize = 65_536;
/// Where the slots begin.
const SLOTS_AT: usize = 64;

/// States of a slot; 0: free.
const USED: u32 = 1;
/// Its guest is lost: the next worker resets what it had.
const DOOMED: u32 = 2;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Slot {
    /// Written last, and first when it is given back.
    used: u32,
    id: u32,
    pid: i32,
    uid: u32,
    privileged: u32,
    sockets: u32,
    queue_sets: u32,
    region: i32,
    doorbell: i32,
    journal: i32,
    /// Of its tenant: the same for all its guests.
    memory: i32,
    region_bytes: u64,
    name: Name,
    tenant: Name,
}

/// As much of a name as there is room for.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Name {
    len: u32,
    bytes: [u8; NAME_BYTES],
}

impl Default for Name {
    fn default() -> Name {
        Name { len: 0, bytes: [0; NAME_BYTES] }
    }
}

impl Name {
    /// Cut where a character begins.
    fn new(text: &str) -> Name {
        let mut name = Name::default();
        let len = (0..=text.len().min(NAME_BYTES)).rev().find(|n| text.is_char_boundary(*n)).unwrap_or(0);
        name.bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        name.len = len as u32;
        name
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..(self.len as usize).min(NAME_BYTES)]).into_owned()
    }
}

// SAFETY: plain numbers.
unsafe impl Plain for Slot {}

/// A guest that an earlier worker left.
pub struct Left {
    pub guest: NewGuest,
    /// Its NSM, by number, and what it may use.
    pub nsm: usize,
    pub may_use: netkernel_service::Limits,
    /// Of its tenant; `None`: this process has it.
    pub memory: Option<TenantMemory>,
    pub region: OwnedFd,
    pub doorbell: OwnedFd,
    pub journal: GuestJournal,
    /// Ends of placeholders that a keeper had ([`crate::keeper::copies`]); -1 stands for each in the journal.
    pub kept: Option<OwnedFd>,
    /// It comes from another switch thread of this process.
    pub departed: Option<Box<Departed>>,
    pub of_stack: OfStack,
}

impl Left {
    /// One of which nothing is anywhere but in its journal.
    pub(crate) fn new(
        guest: NewGuest,
        nsm: usize,
        may_use: netkernel_service::Limits,
        (region, doorbell): (OwnedFd, OwnedFd),
        journal: GuestJournal,
    ) -> Left {
        Left {
            guest,
            nsm,
            may_use,
            memory: None,
            region,
            doorbell,
            journal,
            kept: None,
            departed: None,
            of_stack: OfStack::default(),
        }
    }
}

/// What of a guest's sockets stood in its stack only, in a program before this one.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct OfStack {
    /// For its stack; `None`: nothing.
    pub left: Option<String>,
    /// That the text names.
    pub descriptors: Vec<RawFd>,
    /// What was counted of its pairs.
    pub counted: Vec<(u32, u64, u64)>,
}

impl Root {
    pub fn create(max_guests: usize) -> io::Result<Root> {
        let slots = max_guests.min(MAX_SLOTS);
        Root::of(Journal::create(c"netkernel-nsm", SLOTS_AT + slots * size_of::<Slot>())?, slots)
    }

    /// That of another holder, which served as many guests.
    pub fn open(memory: OwnedFd, max_guests: usize) -> io::Result<Root> {
        let slots = max_guests.min(MAX_SLOTS);
        Root::of(Journal::open(memory, SLOTS_AT + slots * size_of::<Slot>())?, slots)
    }

    fn of(journal: Journal, slots: usize) -> io::Result<Root> {
        let journal = Arc::new(journal);
        let slots = Fixed::kept(&journal, SLOTS_AT, slots, false).ok_or_else(damaged)?;
        let exact = Mutex::new(Fixed::kept(&journal, 0, 1, false).ok_or_else(damaged)?);
        Ok(Root { journal, slots: Mutex::new(slots), exact })
    }

    pub fn fd(&self) -> RawFd {
        self.journal.fd()
    }

    /// The same list in memory of its own.
    pub fn copy(&self) -> io::Result<Journal> {
        self.journal.copy(c"netkernel-nsm")
    }

    /// A part of what tells two layouts apart.
    pub fn slot_bytes() -> usize {
        size_of::<Slot>() + size_of::<Usage>() + size_of::<AgentNote>()
    }

    /// Notes a guest; `memory`: its tenant's. False: there is no room.
    pub fn add(
        &self,
        guest: &NewGuest,
        region: RawFd,
        doorbell: RawFd,
        memory: Option<BorrowedFd<'_>>,
        journal: &GuestJournal,
    ) -> bool {
        let mut slots = lock(&self.slots);
        let Some(slot) = slots.iter_mut().find(|slot| slot.used == 0) else { return false };
        let (region_bytes, sockets, queue_sets) = guest.limits;
        *slot = Slot {
            used: 0,
            id: guest.id,
            pid: guest.pid,
            uid: guest.uid,
            privileged: u32::from(guest.privileged),
            sockets,
            queue_sets,
            region: region + 1,
            doorbell: doorbell + 1,
            journal: journal.memory.fd() + 1,
            memory: memory.map_or(0, |memory| memory.as_raw_fd() + 1),
            region_bytes,
            name: Name::new(&guest.name),
            tenant: Name::new(&guest.tenant),
        };
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        slot.used = USED;
        true
    }

    pub fn remove(&self, id: u32) {
        if let Some(slot) = lock(&self.slots).iter_mut().find(|slot| slot.used == USED && slot.id == id) {
            slot.used = 0;
        }
    }

    /// From now on these are a guest's region and journal, besides the ones before, which are open still.
    pub fn exchange(&self, id: u32, region: RawFd, journal: &GuestJournal) {
        if let Some(slot) = lock(&self.slots).iter_mut().find(|slot| slot.used == USED && slot.id == id) {
            slot.region = region + 1;
            std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
            slot.journal = journal.memory.fd() + 1;
            std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        }
    }

    /// A guest cannot be gone on with.
    pub fn doom(&self, id: u32) {
        if let Some(slot) = lock(&self.slots).iter_mut().find(|slot| slot.used == USED && slot.id == id) {
            slot.used = DOOMED;
        }
    }

    /// None can.
    pub fn doom_all(&self) {
        lock(&self.slots).iter_mut().filter(|slot| slot.used == USED).for_each(|slot| slot.used = DOOMED);
    }

    /// The stacks' sockets of guests that are lost, which are forgotten with this.
    pub fn lost(&self) -> Vec<RawFd> {
        let mut lost = Vec::new();
        for slot in lock(&self.slots).iter_mut().filter(|slot| slot.used == DOOMED) {
            if let Ok(journal) = GuestJournal::reopen(slot.journal - 1, slot.limits()) {
                lost.extend(Service::journal_descriptors(&journal.memory, slot.limits()));
            }
            slot.used = 0;
        }
        lost
    }

    /// The worker ends between two turns.
    pub fn stopped(&self) {
        lock(&self.exact)[0] = 1;
    }

    /// Whether the one before did. From now on, no more.
    pub fn was_stopped(&self) -> bool {
        std::mem::take(&mut lock(&self.exact)[0]) == 1
    }

    /// Every descriptor that is named anywhere. What cannot be read is left out, and so are its descriptors.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut all = vec![self.journal.fd()];
        for slot in lock(&self.slots).iter().filter(|slot| slot.used == USED) {
            let Ok(journal) = GuestJournal::reopen(slot.journal - 1, slot.limits()) else { continue };
            all.extend([slot.region - 1, slot.doorbell - 1, slot.journal - 1, slot.memory - 1]);
            all.extend(journal.descriptors(slot.limits()));
        }
        all.retain(|fd| *fd >= 0);
        all
    }

    /// The guests that an earlier worker left, with their descriptors. Once, and before others are added.
    pub fn take(&self) -> Vec<Left> {
        let mut left = Vec::new();
        let mut memories: HashMap<i32, Option<TenantMemory>> = HashMap::new();
        for slot in lock(&self.slots).iter_mut().filter(|slot| slot.used == USED) {
            // Guests of one tenant have one.
            let open = || take_descriptor(slot.memory).and_then(|fd| TenantMemory::open(fd).ok());
            let memory = memories.entry(slot.memory).or_insert_with(open).clone();
            let parts =
                (take_descriptor(slot.region), take_descriptor(slot.doorbell), take_descriptor(slot.journal));
            let (Some(region), Some(doorbell), Some(journal), Some(_)) = (parts.0, parts.1, parts.2, &memory)
            else {
                slot.used = 0;
                continue;
            };
            match GuestJournal::open(journal, slot.limits()) {
                Ok(journal) => {
                    let (guest, may_use) = (slot.guest(), netkernel_service::Limits::default());
                    left.push(Left { memory, ..Left::new(guest, 0, may_use, (region, doorbell), journal) });
                }
                Err(_) => slot.used = 0,
            }
        }
        left
    }
}

impl Slot {
    fn limits(&self) -> Limits {
        Limits { region_bytes: self.region_bytes, sockets: self.sockets, queue_sets: self.queue_sets }
    }

    fn guest(&self) -> NewGuest {
        NewGuest {
            id: self.id,
            name: self.name.text(),
            tenant: self.tenant.text(),
            pid: self.pid,
            uid: self.uid,
            privileged: self.privileged != 0,
            limits: (self.region_bytes, self.sockets, self.queue_sets),
        }
    }
}

/// The journal of one guest.
pub struct GuestJournal {
    pub memory: Arc<Journal>,
    pub channels: Fixed<i32>,
    /// Tag and descriptor.
    pub processes: Fixed<[u32; 2]>,
    /// By queue set.
    pub bells: Fixed<i32>,
    /// Ends of placeholders, by socket.
    pub ends: Fixed<i32>,
    /// One, if the guest has an agent.
    pub agent: Fixed<AgentNote>,
    /// One: what was told last of what it used, besides what the service counts.
    pub carried: Fixed<Usage>,
}

// SAFETY: plain numbers.
unsafe impl Plain for Usage {}

/// What an agent is started with. Descriptors as everywhere here.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct AgentNote {
    pub listener: i32,
    /// Where the number of the call stands that was received last.
    pub last: i32,
    /// What its relay stands still with.
    pub relay: i32,
    /// Of the guest's message.
    pub arguments: [u32; 3],
}

// SAFETY: plain numbers.
unsafe impl Plain for AgentNote {}

impl GuestJournal {
    pub fn create(limits: Limits) -> io::Result<GuestJournal> {
        let memory = Journal::create(c"netkernel-journal", bytes(limits))?;
        GuestJournal::of(Arc::new(memory), limits)
    }

    pub fn open(memory: OwnedFd, limits: Limits) -> io::Result<GuestJournal> {
        GuestJournal::of(Arc::new(Journal::open(memory, bytes(limits))?), limits)
    }

    /// By a number that stays somebody else's.
    pub fn reopen(memory: RawFd, limits: Limits) -> io::Result<GuestJournal> {
        // SAFETY: a number that is not open is an error of the call that copies it; the borrow ends with this statement.
        let copy = unsafe { std::os::fd::BorrowedFd::borrow_raw(memory.max(0)) }.try_clone_to_owned()?;
        GuestJournal::open(copy, limits)
    }

    /// With what stands in that of another process, which is not to be trusted. Errors: it is no journal of such a guest.
    pub fn read(from: &OwnedFd, limits: Limits) -> io::Result<GuestJournal> {
        let memory = Arc::new(Journal::read(c"netkernel-journal", from, bytes(limits))?);
        if !Service::journal_is_sound(&memory, limits) {
            return Err(damaged());
        }
        GuestJournal::of(memory, limits)
    }

    /// Names all descriptors by other numbers. False: `other` does not know one, and some may have changed.
    pub fn renumber(&mut self, limits: Limits, other: &dyn Fn(RawFd) -> Option<RawFd>) -> bool {
        let agent = &mut self.agent[0];
        let processes = self.processes.iter_mut().map(|process| &mut process[1]);
        let mut all = true;
        for place in processes.filter(|place| **place > 0) {
            match other(*place as i32 - 1) {
                Some(number) => *place = number as u32 + 1,
                None => all = false,
            }
        }
        let lists = [&mut self.channels, &mut self.bells, &mut self.ends];
        let lists = lists.into_iter().flat_map(|list| list.iter_mut());
        let agent = [&mut agent.listener, &mut agent.last, &mut agent.relay];
        for place in lists.chain(agent).filter(|place| **place > 0) {
            match other(*place - 1) {
                Some(number) => *place = number + 1,
                None => all = false,
            }
        }
        all && Service::renumber_journal(&self.memory, limits, other)
    }

    /// The descriptors that are noted, those of the stack's sockets first. Some may be -1 or less.
    pub fn descriptors(&self, limits: Limits) -> Vec<RawFd> {
        let mut all = Service::journal_descriptors(&self.memory, limits);
        let processes = self.processes.iter().map(|process| process[1] as i32);
        let lists = [&self.channels, &self.bells, &self.ends];
        all.extend(self.agent.iter().flat_map(|agent| [agent.listener - 1, agent.last - 1, agent.relay - 1]));
        all.extend(lists.into_iter().flat_map(|list| list.iter().copied()).chain(processes).map(|n| n - 1));
        all
    }

    fn of(memory: Arc<Journal>, limits: Limits) -> io::Result<GuestJournal> {
        let (sockets, queue_sets) = (limits.sockets as usize, limits.queue_sets as usize);
        let at = Service::journal_bytes(limits);
        let processes = at + 4 * MAX_CHANNELS;
        let bells = processes + 8 * MAX_PROCESSES;
        let ends = bells + 4 * queue_sets;
        let agent = ends + 4 * sockets;
        let carried = (agent + size_of::<AgentNote>()).next_multiple_of(8);
        Ok(GuestJournal {
            channels: Fixed::kept(&memory, at, MAX_CHANNELS, false).ok_or_else(damaged)?,
            processes: Fixed::kept(&memory, processes, MAX_PROCESSES, false).ok_or_else(damaged)?,
            bells: Fixed::kept(&memory, bells, queue_sets, false).ok_or_else(damaged)?,
            ends: Fixed::kept(&memory, ends, sockets, false).ok_or_else(damaged)?,
            agent: Fixed::kept(&memory, agent, 1, false).ok_or_else(damaged)?,
            carried: Fixed::kept(&memory, carried, 1, false).ok_or_else(damaged)?,
            memory,
        })
    }
}

fn bytes(limits: Limits) -> usize {
    let (sockets, queue_sets) = (limits.sockets as usize, limits.queue_sets as usize);
    let lists = 4 * MAX_CHANNELS + 8 * MAX_PROCESSES + 4 * queue_sets + 4 * sockets;
    Service::journal_bytes(limits) + lists + size_of::<AgentNote>() + 8 + size_of::<Usage>()
}

fn damaged() -> io::Error {
    io::Error::other("the journal is damaged")
}

/// Notes a descriptor in a list.
pub fn note(list: Option<&mut Fixed<i32>>, index: usize, fd: Option<&OwnedFd>) {
    if let Some(place) = list.and_then(|list| list.get_mut(index)) {
        *place = fd.map_or(0, |fd| fd.as_raw_fd() + 1);
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    }
}
