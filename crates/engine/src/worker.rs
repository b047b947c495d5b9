//! A switch thread: its guests, its stacks, and the loop between them.
//!
//! **Who polls, who sleeps.** A wake-up costs the sleeper 20-50 us and the waker about 10 us, so both are avoided while
//! there is traffic. A guest is *hot* while the thread polls its queues; it need not ring its doorbell then. A guest that
//! was silent for [`COOL_NS`] becomes cold: from then on it rings. When a turn found nothing to do, the thread goes on
//! polling for the time that [`Spin`] advises (short when waits were short, none when they were long), giving the
//! processor away after every look, because the guest or its peer may need this very core to produce what the thread waits
//! for. Then all guests are made cold and the thread sleeps in `epoll_wait`, without a timeout unless there is something
//! to sweep or to try again.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, compiler_fence, fence};

use netkernel_abi::control::{Message, kind};
use netkernel_agent::notify::Listener;
use netkernel_agent::{Counters, Settings};
use netkernel_capture::{Known, Session, Tap, Taps};
use netkernel_relay::reset_left;
use netkernel_ring::spin::{Polling, Spin};
use netkernel_service::{
    Host, Limits, Member, Observed, RELAYED, Readiness, Ready, Service, Several, SocketInfo, Stack, Stages,
    Table, TcpSums, Violation, now_ns, take_descriptor,
};
use netkernel_shm::{Region, Word, fds};
use netkernel_stack_lent::Lender;

use crate::EngineError;
use crate::bury::{bury, stays_empty};
use crate::cpu::{Begun, CpuClock, thread_cpu_ns};
use crate::direct;
use crate::engine::{Command, Shared};
use crate::handed::{self, Handed};
use crate::keeper::{Keeper, send_wakes};
use crate::poller::{Poller, Source};
use crate::process::journal::{AgentNote, GuestJournal, Left, note};
use crate::process::wire;
use crate::relay;
use crate::sample::Sample;
use crate::sockets::{self, LIST_BATCH};
use crate::status::{GuestStatus, SocketStatus};
use crate::tenants::Tenant;
use crate::totals::StagesStatus;
use crate::usage::Usage;
use crate::watch::Watch;

mod leave;
mod moved;

pub(crate) use leave::{Departed, Leaving};
pub(crate) use moved::Went;

/// Elements of one guest in one turn.
const GUEST_BATCH: usize = 256;
/// Sockets of one guest that go on in one turn.
const RUN_BATCH: usize = 64;
/// Reports of one stack in one turn.
const READY_BATCH: usize = 256;
/// Channel messages of one guest between two looks at the others.
const CHANNEL_BATCH: usize = 64;
/// Channels of a guest that are read without asking which of them has something.
const FEW_CHANNELS: usize = 2;
/// What one relay asks for that is done between two looks at the others.
const RELAY_BATCH: usize = 64;
/// Turns with work between two looks at the main epoll instance, and what is done between them at most, in bytes (see
/// [`Service::begin_turn`]): guests that are not polled wait for that look.
const EPOLL_EVERY: u32 = 16;
const EPOLL_AFTER: u64 = 512 << 10;
/// What a guest may do in one turn: alone; beside others, if its tenant has the highest weight among them; and at least.
const ALONE: u32 = 512 << 10;
const QUANTUM: u32 = 256 << 10;
const LEAST_QUANTUM: u32 = 16 << 10;
/// Turns of guests with elements between two whose times are taken.
const SAMPLE_EVERY: u32 = 64;
/// Silence after which a guest is no longer polled while others are.
const COOL_NS: u64 = 500_000;
/// Open connections whose counts the stack is asked for in one second: of all guests, and of one at a time.
const LOOK_BATCH: usize = 256;
const LOOK_AT_GUEST: usize = 64;
const SWEEP_NS: u64 = 1_000_000_000;
const RETRY_NS: u64 = 20_000_000;
/// How long the sockets of a guest that is over may go on sending what they hold.
const LINGER_NS: u64 = 60_000_000_000;
/// Processes of one guest.
const MAX_PROCESSES: usize = 8192;
const MAX_CHANNELS: usize = 1024;

pub(crate) struct NewGuest {
    pub id: u32,
    pub region: Region,
    pub nsm: usize,
    pub limits: Limits,
    pub tenant: Arc<Tenant>,
    /// May bind to ports below 1024.
    pub privileged: bool,
    /// The user who asked for it.
    pub owner: u32,
    pub channel: OwnedFd,
    pub doorbell: OwnedFd,
}

struct Guest {
    id: u32,
    nsm: usize,
    /// NSMs that it was on before and that have sockets of it, by the place in their handles, from 1 on.
    elders: Vec<Option<usize>>,
    /// How many of its sockets had ended when it was looked at last which of these have none any more.
    seen_ended: u32,
    service: Service,
    ends: Ends,
    channels: Vec<Option<OwnedFd>>,
    doorbell: OwnedFd,
    processes: Vec<Option<Process>>,
    /// Sockets whose last descriptor was closed, not processed yet.
    hangups: Vec<u32>,
    hot: bool,
    /// Its elements come before its sockets' unfinished work: by turns.
    elements_first: bool,
    tenant: Arc<Tenant>,
    last_active_ns: u64,
    stages: Stages,
    cpu: CpuClock,
    /// What earlier processes told of, besides what the service counts.
    carried: Usage,
    has_agent: bool,
    /// The agent's listener, and where it notes its calls, for the next process; and what the guest said of it.
    agent_kept: Option<(OwnedFd, OwnedFd)>,
    agent_arguments: [u32; 3],
    /// What its agent did, once it has one.
    agent: Option<Arc<Counters>>,
    /// What its relay borrows stacks by, each with its NSM.
    lenders: Vec<(usize, Lender)>,
    /// Sockets that were handed over.
    handed: Handed,
    /// Captures of it that are under way.
    captures: Arc<AtomicU32>,
    /// What the next process must find if this one dies.
    journal: Option<GuestJournal>,
    /// All processes are gone; since when.
    over_since: Option<u64>,
}

impl Guest {
    /// The NSMs of its sockets, by the place in their handles.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let elders = (1..).zip(&self.elders).filter_map(|(place, nsm)| Some((place, (*nsm)?)));
        std::iter::once((0, self.nsm)).chain(elders)
    }

    /// Something of it has ended since the last look at its stacks of before.
    fn may_leave_elders(&self) -> bool {
        !self.elders.is_empty() && self.seen_ended != self.service.ended()
            || self.lenders.len() > 1 && self.lenders.iter().any(|(_, lender)| lender.is_over())
    }

    fn nsm_at(&self, place: usize) -> Option<usize> {
        self.places().find(|(at, _)| *at == place).map(|(_, nsm)| nsm)
    }

    fn nsms(&self) -> Vec<usize> {
        self.places().map(|(_, nsm)| nsm).collect()
    }

    /// The doorbell of a queue set, or none any more.
    fn set_bell(&mut self, q: u32, bell: Bell) -> Bell {
        let fd = if let Bell::Some(fd) = &bell { Some(fd) } else { None };
        note(self.journal.as_mut().map(|j| &mut j.bells), q as usize, fd);
        match self.ends.doorbells.get_mut(q as usize) {
            Some(place) => std::mem::replace(place, bell),
            None => Bell::None,
        }
    }

    fn set_channel(&mut self, number: usize, channel: Option<OwnedFd>) {
        note(self.journal.as_mut().map(|j| &mut j.channels), number, channel.as_ref());
        self.channels[number] = channel;
    }

    /// Keeps what the next process starts an agent with, or no more.
    fn keep_agent(&mut self, arguments: [u32; 3], kept: Option<(OwnedFd, OwnedFd)>) {
        let note = kept.as_ref().map_or_else(AgentNote::default, |(listener, last)| AgentNote {
            listener: listener.as_raw_fd() + 1,
            last: last.as_raw_fd() + 1,
            relay: 0,
            arguments,
        });
        if let Some(journal) = &mut self.journal {
            journal.agent[0] = note;
            compiler_fence(SeqCst);
        }
        // Not before it is noted that there is none.
        self.agent_kept = kept;
        self.agent_arguments = arguments;
    }

    fn note_process(&mut self, number: usize, process: [u32; 2]) {
        if let Some(place) = self.journal.as_mut().and_then(|journal| journal.processes.get_mut(number)) {
            *place = process;
        }
    }
}

struct Process {
    tag: u32,
    /// Its end of life is the hang-up of this pair.
    pair: OwnedFd,
}

/// The engine's end of a placeholder.
#[derive(Default)]
enum End {
    #[default]
    None,
    Here(OwnedFd),
    /// With the keeper, under this serial number.
    Kept(u32),
}

/// What a guest is woken by.
struct Ends {
    placeholders: Table<End>,
    placeholder_count: usize,
    /// Those to be woken by the keeper: serial number and count.
    kept_wakes: Vec<(u32, u32)>,
    /// Guards writes to descriptors that come from the guest.
    watch: Arc<Watch>,
    /// A doorbell would not let go; the guest made it block.
    blocked: bool,
    doorbells: Vec<Bell>,
    rings: u64,
    wakes: u64,
}

/// What rings for a queue set.
enum Bell {
    None,
    /// None so far, but it should have rung: the guest uses a queue set before its message was read.
    Owed,
    Some(OwnedFd),
}

impl Host for Ends {
    fn wake(&mut self, socket: u32, count: u32) {
        match self.placeholders.get(socket) {
            Some(End::Here(fd)) => {
                self.wakes += 1;
                send_wakes(fd.as_raw_fd(), count);
            }
            Some(&End::Kept(serial)) => {
                self.wakes += 1;
                self.kept_wakes.push((serial, count));
            }
            _ => {}
        }
    }

    fn ring(&mut self, queue_set: u32) {
        if self.blocked {
            return;
        }
        match self.doorbells.get_mut(queue_set as usize) {
            Some(Bell::Some(fd)) => {
                self.rings += 1;
                if !self.watch.write(fd.as_raw_fd()) {
                    self.blocked = true;
                }
            }
            Some(bell) => *bell = Bell::Owed,
            None => {}
        }
    }
}

/// A piece of work for one guest, whose time may be measured.
enum Piece {
    Outer(Option<Begun>),
    Inner,
}

/// A stack of this thread, made when its first guest comes.
struct Module {
    stack: Box<dyn Stack>,
    /// There was a capture; who looks on for it.
    taps: Option<Taps>,
    guests: usize,
    /// It has a descriptor that wakes the thread.
    wakes: bool,
}

pub(crate) struct Worker {
    shared: Arc<Shared>,
    index: usize,
    poller: Poller,
    watch: Arc<Watch>,
    /// Placeholder ends in this thread's own table, and how many there may be; the others go to the keeper.
    ends_here: usize,
    most_ends_here: usize,
    keeper: Option<Keeper>,
    modules: Vec<Option<Module>>,
    guests: Vec<Option<Box<Guest>>>,
    /// Slots of the hot guests.
    hot: Vec<u32>,
    /// How many of them each tenant has.
    hot_of: Vec<u32>,
    /// What was done since the last look at the main epoll instance, in bytes.
    done: u64,
    sources: Vec<Source>,
    ready: Vec<Ready>,
    /// Guest slots with hang-ups to process.
    hung: Vec<u32>,
    messages: Vec<fds::Received<32>>,
    spin: Spin,
    now_ns: u64,
    next_sweep_ns: u64,
    next_retry_ns: u64,
    /// When the first of those that wait for a tenant's rate may go on.
    resume_at: u64,
    turns: u64,
    captures: Vec<Arc<Session>>,
    sample: u32,
    /// A piece of a guest's work is under way: what is begun within is a part of it.
    in_piece: bool,
    /// Where the next look at guests' open connections begins.
    tcp_next: usize,
    /// This thread's processor time that was counted, and when.
    cpu_ns: u64,
    swept_ns: u64,
    sleeps: u64,
    stop: bool,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, index: usize) -> io::Result<Worker> {
        let poller = Poller::new()?;
        poller.add_readable(shared.link(index).wake.as_raw_fd(), Source::Control)?;
        let modules = shared.config.nsms.iter().map(|_| None).collect();
        let spin = Spin::new(shared.config.spin_us.saturating_mul(1000));
        let watch = shared.watch(index);
        let most_ends_here = shared.config.placeholders_in_main_table.unwrap_or_else(|| {
            // A quarter of the table for all threads together.
            (descriptor_limit() / 4).min(4096) / shared.config.switch_threads
        });
        Ok(Worker {
            shared,
            index,
            poller,
            watch,
            ends_here: 0,
            most_ends_here,
            keeper: None,
            modules,
            guests: Vec::new(),
            hot: Vec::new(),
            hot_of: Vec::new(),
            done: 0,
            sources: Vec::new(),
            ready: Vec::new(),
            hung: Vec::new(),
            messages: Vec::new(),
            spin,
            now_ns: now_ns(),
            next_sweep_ns: 0,
            next_retry_ns: 0,
            resume_at: u64::MAX,
            turns: 0,
            captures: Vec::new(),
            sample: 0,
            in_piece: false,
            tcp_next: 0,
            cpu_ns: 0,
            swept_ns: now_ns(),
            sleeps: 0,
            stop: false,
        })
    }

    pub fn run(mut self) {
        self.watch.begin();
        let mut since_epoll = 0;
        while !self.stop {
            if self.turn() {
                since_epoll += 1;
                if since_epoll >= EPOLL_EVERY || self.done >= EPOLL_AFTER {
                    since_epoll = 0;
                    self.done = 0;
                    self.look(0);
                    self.now_ns = now_ns();
                    self.cool_silent();
                    self.housekeeping();
                }
                continue;
            }
            since_epoll = 0;
            self.done = 0;
            if !self.look(0) {
                self.idle();
            }
        }
        for slot in 0..self.guests.len() as u32 {
            if let Some(guest) = &mut self.guests[slot as usize]
                && let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders)
            {
                guest.service.flush_all(stacks.get());
            }
            self.remove(slot);
        }
    }

    /// One round over the hot guests and the stacks in use. True: something was done.
    fn turn(&mut self) -> bool {
        self.turns += 1;
        let resumed = self.resume();
        self.begin_turns();
        let served = resumed | self.serve_hot();
        let worked = served | self.poll_stacks(served);
        self.flush_hot();
        worked
    }

    /// Says what each hot guest may do in this turn: tenants by weight, the guests of a tenant share its part.
    fn begin_turns(&mut self) {
        if let [slot] = self.hot[..] {
            if let Some(Some(guest)) = self.guests.get_mut(slot as usize) {
                guest.service.begin_turn(ALONE);
            }
            return;
        }
        self.hot_of.clear();
        let mut heaviest = 1;
        for &slot in &self.hot {
            let Some(Some(guest)) = self.guests.get(slot as usize) else { continue };
            let index = guest.tenant.index();
            if self.hot_of.len() <= index {
                self.hot_of.resize(index + 1, 0);
            }
            self.hot_of[index] += 1;
            heaviest = heaviest.max(guest.tenant.weight());
        }
        for &slot in &self.hot {
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { continue };
            let tenant = &guest.tenant;
            let part = u64::from(QUANTUM) * u64::from(tenant.weight())
                / u64::from(heaviest)
                / u64::from(self.hot_of[tenant.index()].max(1));
            guest.service.begin_turn((part as u32).max(LEAST_QUANTUM));
        }
    }

    fn serve_hot(&mut self) -> bool {
        let mut worked = false;
        let mut i = 0;
        while i < self.hot.len() {
            let slot = self.hot[i];
            worked |= self.serve(slot);
            i += 1;
        }
        worked
    }

    fn flush_hot(&mut self) {
        let mut i = 0;
        while i < self.hot.len() {
            let slot = self.hot[i];
            self.flush(slot);
            i += 1;
        }
    }

    fn flush(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        if !guest.service.owes_wake_ups() && guest.ends.kept_wakes.is_empty() && !guest.ends.blocked {
            return;
        }
        let piece = self.begin_piece(slot);
        self.wake(slot);
        self.end_piece(slot, piece);
    }

    fn wake(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        guest.service.flush(&mut guest.ends);
        if !guest.ends.kept_wakes.is_empty()
            && let Some(keeper) = &self.keeper
        {
            for (serial, count) in guest.ends.kept_wakes.drain(..) {
                keeper.wake(serial, count);
            }
        }
        if guest.ends.blocked {
            self.violation(slot, Violation("a doorbell that blocks"));
        }
    }

    /// Takes what the guest pushed, and goes on with its sockets.
    fn serve(&mut self, slot: u32) -> bool {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return false };
        if self.modules[guest.nsm].is_none() {
            return false;
        }
        let elements = guest.service.has_elements();
        if !elements && !guest.service.has_work() {
            return false;
        }
        let piece = self.begin_piece(slot);
        self.serve_turn(slot, elements);
        self.end_piece(slot, piece);
        true
    }

    fn serve_turn(&mut self, slot: u32, elements: bool) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return };
        guest.last_active_ns = self.now_ns;
        let spent = guest.service.spent();
        // Neither may use up each turn before the other one's time comes.
        guest.elements_first = !guest.elements_first;
        let elements_first = guest.elements_first;
        let guest = &mut **guest;
        self.sample = self.sample.wrapping_add(1);
        let sampled = elements && self.sample.is_multiple_of(SAMPLE_EVERY);
        let mut sample = Sample::begin(sampled, &mut guest.stages);
        let mut taken = 0;
        let result = (|| {
            let mut timed;
            let stack: &mut dyn Stack = match sample.timer() {
                Some(observer) => {
                    timed = Observed { stack: stacks.get(), observer };
                    &mut timed
                }
                None => stacks.get(),
            };
            let mut again = false;
            if elements && elements_first {
                let drained = guest.service.drain(stack, GUEST_BATCH)?;
                (again, taken) = (drained.again, drained.elements);
            }
            if guest.service.has_work() {
                guest.service.run(stack, RUN_BATCH)?;
            }
            if elements && !elements_first {
                let drained = guest.service.drain(stack, GUEST_BATCH)?;
                (again, taken) = (drained.again, drained.elements);
            }
            Ok(again)
        })();
        sample.end(taken);
        self.done += guest.service.spent() - spent;
        match result {
            Ok(again) => {
                if guest.service.has_released() {
                    for q in guest.service.take_released() {
                        guest.set_bell(q, Bell::None);
                    }
                }
                if again {
                    self.catch_up(slot);
                }
            }
            Err(violation) => self.violation(slot, violation),
        }
        self.note_throttle(slot);
        if let Some(Some(guest)) = self.guests.get(slot as usize)
            && guest.tenant.is_promised()
            && guest.service.is_turn_over()
        {
            guest.tenant.fell_behind(guest.nsm, guest.service.left_over());
        }
    }

    /// Remembers when sockets of the guest, or its elements, may go on that wait for its tenant's rate.
    #[inline]
    fn note_throttle(&mut self, slot: u32) {
        if let Some(Some(guest)) = self.guests.get(slot as usize) {
            self.resume_at = self.resume_at.min(guest.service.throttled_until());
        }
    }

    /// Goes on with what waited for a tenant's rate. True: there was something.
    fn resume(&mut self) -> bool {
        if self.resume_at == u64::MAX {
            return false;
        }
        let now = now_ns();
        if now < self.resume_at {
            return false;
        }
        self.now_ns = now;
        self.resume_at = u64::MAX;
        let mut resumed = false;
        for slot in 0..self.guests.len() as u32 {
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { continue };
            if guest.service.throttled_until() <= now {
                guest.service.resume();
                resumed = true;
                self.warm(slot);
            } else {
                self.resume_at = self.resume_at.min(guest.service.throttled_until());
            }
        }
        resumed
    }

    /// An element waits for what stands in channels and hang-ups: all of that first, then the element again.
    fn catch_up(&mut self, slot: u32) {
        if self.read_channels(slot) {
            return self.drain_held(slot);
        }
        let mut sources = std::mem::take(&mut self.sources);
        // Bounded: hang-ups are reported once, and a flood of messages must not keep this thread.
        for _ in 0..64 {
            sources.clear();
            let more = self.poller.wait(0, &mut sources);
            for &source in &sources {
                self.source(source);
            }
            let channels = sources.iter().any(|s| matches!(s, Source::Channel(..)));
            if !more && !channels {
                break;
            }
        }
        self.sources = sources;
        self.close_hung(false);
        self.drain_held(slot);
    }

    /// The element waits for a socket, as the first one of each new socket does: its message is in one of the guest's few channels. False: that
    /// was not it.
    fn read_channels(&mut self, slot: u32) -> bool {
        let channels = match self.guests.get(slot as usize) {
            Some(Some(guest)) if guest.service.awaits_socket() => guest.channels.len(),
            _ => return false,
        };
        if channels > FEW_CHANNELS {
            return false;
        }
        (0..channels as u32).for_each(|number| self.channel(slot, number));
        matches!(self.guests.get(slot as usize), Some(Some(guest)) if !guest.service.awaits_socket())
    }

    fn drain_held(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return };
        if let Err(violation) = guest.service.drain(stacks.get(), 0) {
            self.violation(slot, violation);
        }
    }

    /// `served`: something was done that may have made sockets ready. Otherwise a stack whose descriptor tells all is left to that: to look at
    /// the main epoll instance, which comes next, is to look at that descriptor too.
    fn poll_stacks(&mut self, served: bool) -> bool {
        let mut worked = false;
        for nsm in 0..self.modules.len() {
            let told = |module: &Module| module.wakes && module.stack.wakes_always();
            match &self.modules[nsm] {
                Some(module) if !served && told(module) => {}
                _ => worked |= self.poll_stack(nsm, false),
            }
        }
        worked
    }

    /// `woken`: the stack's descriptor is readable.
    fn poll_stack(&mut self, nsm: usize, woken: bool) -> bool {
        let Some(Some(module)) = self.modules.get_mut(nsm) else { return false };
        // A stack of one's own has work without guests too: what they left behind, and what its neighbours ask.
        if module.guests == 0 && !woken && module.stack.deadline_ns().is_none() {
            return false;
        }
        self.ready.clear();
        module.stack.poll(&mut self.ready, READY_BATCH);
        if self.ready.is_empty() {
            return false;
        }
        let ready = std::mem::take(&mut self.ready);
        for report in &ready {
            let (slot, id) = ((report.key >> 32) as u32, report.key as u32);
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { continue };
            if id & RELAYED != 0 {
                let of_stack = guest.lenders.iter().filter(|(of, _)| *of == nsm);
                of_stack.for_each(|(_, lender)| lender.report(*report));
                continue;
            }
            let piece = self.begin_piece(slot);
            self.report(slot, id, report.readiness);
            self.end_piece(slot, piece);
        }
        self.ready = ready;
        true
    }

    /// A stack's report of one socket.
    fn report(&mut self, slot: u32, id: u32, readiness: Readiness) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return };
        let spent = guest.service.spent();
        let result = guest.service.ready(stacks.get(), id, readiness);
        self.done += guest.service.spent() - spent;
        guest.last_active_ns = self.now_ns;
        self.resume_at = self.resume_at.min(guest.service.throttled_until());
        if !guest.hot {
            self.warm(slot);
        }
        if let Err(violation) = result {
            self.violation(slot, violation);
        }
    }

    /// Looks at the main epoll instance. True: something was done.
    fn look(&mut self, timeout_ms: i32) -> bool {
        let mut sources = std::mem::take(&mut self.sources);
        sources.clear();
        self.poller.wait(timeout_ms, &mut sources);
        // Commands last: by them another guest may come to a slot that the rest is about.
        let commands = |source: &&Source| matches!(source, Source::Control);
        for &source in sources.iter().filter(|source| !commands(source)) {
            self.source(source);
        }
        for &source in sources.iter().filter(commands) {
            self.source(source);
        }
        let mut worked = !sources.is_empty();
        self.sources = sources;
        self.close_hung(true);
        // Stacks that have no descriptor to wake us with.
        for nsm in 0..self.modules.len() {
            if self.modules[nsm].as_ref().is_some_and(|module| !module.wakes) {
                worked |= self.poll_stack(nsm, false);
            }
        }
        worked
    }

    fn source(&mut self, source: Source) {
        match source {
            Source::Control => {
                read_eventfd(self.shared.link(self.index).wake.as_raw_fd());
                for command in self.shared.link(self.index).take() {
                    self.command(command);
                }
            }
            Source::Stack(nsm) => {
                self.poll_stack(nsm as usize, true);
            }
            Source::Doorbell(slot) => {
                // Never read: the guest could make that block. Each write is reported all the same (edge-triggered).
                self.warm(slot);
            }
            Source::Channel(slot, number) => {
                let piece = self.begin_piece(slot);
                self.channel(slot, number);
                self.end_piece(slot, piece);
            }
            Source::Process(slot, number) => self.process_over(slot, number),
            Source::Placeholder(slot, id) => {
                if let Some(Some(guest)) = self.guests.get_mut(slot as usize) {
                    guest.hangups.push(id);
                    self.hung.push(slot);
                }
            }
            Source::Keeper => self.keeper_reports(),
            Source::Relay(slot) => {
                let piece = self.begin_piece(slot);
                self.serve_relay(slot);
                self.end_piece(slot, piece);
            }
        }
    }

    /// Does what a guest's relay asks of the stack.
    fn serve_relay(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        for (nsm, lender) in &mut guest.lenders {
            if let Some(module) = &mut self.modules[*nsm] {
                lender.serve(&mut *module.stack, RELAY_BATCH);
            }
        }
    }

    /// Closes sockets whose placeholders hung up. `drain_first`: what their processes had pushed before comes first.
    fn close_hung(&mut self, drain_first: bool) {
        while let Some(slot) = self.hung.pop() {
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { continue };
            if guest.hangups.is_empty() {
                continue;
            }
            let piece = self.begin_piece(slot);
            self.close_hung_of(slot, drain_first);
            self.end_piece(slot, piece);
        }
    }

    fn close_hung_of(&mut self, slot: u32, drain_first: bool) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        if drain_first && guest.service.has_elements() {
            guest.service.set_urgent(true);
            self.serve(slot);
            if let Some(Some(guest)) = self.guests.get_mut(slot as usize) {
                guest.service.set_urgent(false);
            }
        }
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return };
        let mut result = Ok(());
        for id in std::mem::take(&mut guest.hangups) {
            note(guest.journal.as_mut().map(|j| &mut j.ends), id as usize, None);
            if let Some(end) = guest.ends.placeholders.get_mut(id) {
                match std::mem::take(end) {
                    End::None => continue,
                    End::Here(_) => self.ends_here -= 1,
                    End::Kept(_) => {}
                }
                guest.ends.placeholder_count -= 1;
                guest.handed.close(id);
                result = result.and(guest.service.close(stacks.get(), id));
            }
        }
        self.note_throttle(slot);
        match result {
            Ok(()) => {
                self.warm(slot);
                self.maybe_over(slot);
            }
            Err(violation) => self.violation(slot, violation),
        }
    }

    // ---- idle

    /// Nothing to do: poll for a while, then sleep until something happens.
    fn idle(&mut self) {
        let begin = now_ns();
        self.now_ns = begin;
        self.housekeeping();
        let budget = self.spin.budget_ns();
        if budget > 0 {
            let mut polling = Polling::new(budget);
            loop {
                let look = self.now_ns;
                // The thread that we wait for may need this core.
                std::thread::yield_now();
                if self.served_at_once() || self.look(0) {
                    self.now_ns = now_ns();
                    self.spin.waited(polling.spent_ns());
                    self.flush_hot();
                    return;
                }
                self.now_ns = now_ns();
                if !polling.looked(self.now_ns - look) {
                    break;
                }
            }
        }
        if !self.cool_all() || self.stop {
            return;
        }
        // What a stack did for one of its sockets may have made others of this thread ready.
        if self.poll_stacks(true) {
            self.flush_hot();
            return;
        }
        self.sleeps += 1;
        let timeout = self.timeout_ms();
        self.look(timeout);
        self.now_ns = now_ns();
        self.spin.waited(self.now_ns - begin);
        self.housekeeping();
    }

    /// Serves the hot guests, and what that made ready. True: there was something; the rest of the world is looked at after it.
    fn served_at_once(&mut self) -> bool {
        let served = self.resume() | self.serve_hot();
        if served {
            self.poll_stacks(true);
        }
        served
    }

    /// From now on this guest is polled and need not ring.
    fn warm(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        guest.last_active_ns = self.now_ns;
        if !guest.hot {
            guest.hot = true;
            guest.service.region().header().engine_waiting.store(0, SeqCst);
            self.hot.push(slot);
        }
    }

    /// Makes all guests ring their doorbells. False: one of them pushed something meanwhile, or there is other work.
    fn cool_all(&mut self) -> bool {
        let mut quiet = true;
        self.hot.retain(|&slot| {
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return false };
            let hot = !cool(guest);
            quiet &= !hot;
            hot
        });
        quiet
    }

    /// Stops polling guests that were silent for a while.
    fn cool_silent(&mut self) {
        let now = self.now_ns;
        self.hot.retain(|&slot| {
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return false };
            now.saturating_sub(guest.last_active_ns) < COOL_NS || !cool(guest)
        });
    }

    /// Milliseconds that the thread may sleep; -1: until something happens.
    fn timeout_ms(&self) -> i32 {
        let mut until = self.resume_at;
        for guest in self.guests.iter().flatten() {
            if guest.service.wants_sweep() || guest.over_since.is_some() || guest.may_leave_elders() {
                until = until.min(self.next_sweep_ns);
            }
            if guest.service.is_starved() {
                until = until.min(self.next_retry_ns);
            }
        }
        for module in self.modules.iter().flatten() {
            match module.stack.deadline_ns() {
                Some(deadline) => until = until.min(deadline),
                None if !module.wakes && module.guests > 0 => until = until.min(self.now_ns + 1_000_000),
                None => {}
            }
        }
        match until {
            u64::MAX => -1,
            until => until.saturating_sub(self.now_ns).div_ceil(1_000_000).min(60_000) as i32,
        }
    }

    /// Sweeps and retries, when it is time.
    fn housekeeping(&mut self) {
        let (sweep, retry) = (self.now_ns >= self.next_sweep_ns, self.now_ns >= self.next_retry_ns);
        if !sweep && !retry {
            return;
        }
        if sweep {
            self.next_sweep_ns = self.now_ns + SWEEP_NS;
            let counters = &self.shared.counters;
            counters.turns.fetch_add(std::mem::take(&mut self.turns), Relaxed);
            counters.sleeps.fetch_add(std::mem::take(&mut self.sleeps), Relaxed);
            let cpu_ns = thread_cpu_ns();
            let spent = cpu_ns - std::mem::replace(&mut self.cpu_ns, cpu_ns);
            counters.switch_cpu_ns.fetch_add(spent, Relaxed);
            let elapsed = self.now_ns - std::mem::replace(&mut self.swept_ns, self.now_ns);
            let permille = spent.saturating_mul(1000) / elapsed.max(1);
            self.shared.link(self.index).load.tell(permille.min(1000) as u32, self.now_ns);
        }
        if retry {
            self.next_retry_ns = self.now_ns + RETRY_NS;
        }
        for slot in 0..self.guests.len() as u32 {
            let Some(guest) = &mut self.guests[slot as usize] else { continue };
            let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { continue };
            let mut result = Ok(());
            if sweep && guest.service.wants_sweep() {
                result = guest.service.sweep(stacks.get());
            }
            if guest.service.is_starved() {
                guest.service.retry();
            }
            let work = guest.service.has_work();
            let over = guest.over_since.is_some();
            if let Err(violation) = result {
                self.violation(slot, violation);
                continue;
            }
            if sweep && guest.may_leave_elders() {
                self.leave_elders(slot);
            }
            if work {
                self.warm(slot);
            }
            if over {
                self.maybe_over(slot);
            }
        }
    }

    // ---- control

    fn command(&mut self, command: Command) {
        match command {
            Command::Add(guest, answer) => {
                let result = self.add(*guest);
                let _ = answer.send(result);
            }
            Command::Recover(left, tenant, exact, answer) => {
                let result = self.recover(*left, tenant, exact);
                let _ = answer.send(result);
            }
            Command::Freeze(answer) => {
                self.flush_hot();
                let _ = answer.send(());
                // What is to come is for the process after this one.
                loop {
                    std::thread::park();
                }
            }
            Command::Leave(answer, go_on) => {
                let _ = answer.send(self.leave());
                // Ends with this process, unless nobody comes after it.
                let _ = go_on.recv();
            }
            Command::Depart(id, answer) => {
                let tenant = self.slot(id).and_then(|slot| self.guests[slot as usize].as_ref());
                let tenant = tenant.map(|guest| Arc::clone(&guest.tenant));
                // Nobody waits for it any more: it stays.
                if let Err(error) = answer.send(self.depart(id))
                    && let (Ok(left), Some(tenant)) = (error.0, tenant)
                    && let Err(error) = self.recover(*left, tenant, true)
                {
                    log::error!(guest = id; "guest {id} is lost: {error}");
                }
            }
            Command::Pack(id, agent_stands, answer) => {
                let tenant = self.slot(id).and_then(|slot| self.guests[slot as usize].as_ref());
                let tenant = tenant.map(|guest| Arc::clone(&guest.tenant));
                if let Err(error) = answer.send(self.pack(id, agent_stands))
                    && let (Ok((left, _)), Some(tenant)) = (error.0, tenant)
                    && let Err(error) = self.recover(*left, tenant, true)
                {
                    log::error!(guest = id; "guest {id} is lost: {error}");
                }
            }
            Command::Prepare(nsm, answer) => {
                let _ = answer.send(self.module(nsm));
            }
            Command::Channel(id, channel, answer) => {
                let result = self.add_channel(id, channel);
                let _ = answer.send(result);
            }
            Command::End(id) => {
                if let Some(slot) = self.slot(id) {
                    let name = self.shared.name(id);
                    log::info!(guest = id, name:%; "guest {id} ({name}) was ended on request");
                    self.remove(slot);
                }
            }
            Command::Status(answer) => {
                self.count();
                let _ = answer.send(self.status());
            }
            Command::Usage(answer) => {
                self.count();
                self.look_at_tcp();
                for guest in self.guests.iter_mut().flatten() {
                    let besides = besides(guest);
                    if let Some(journal) = &mut guest.journal {
                        journal.carried[0] = besides;
                    }
                }
                let _ =
                    answer.send(self.guests.iter().flatten().map(|guest| (guest.id, usage(guest))).collect());
            }
            Command::Spent(answer) => {
                let spent = |guest: &Guest| (guest.id, guest.carried.cpu_ns + guest.cpu.spent_ns());
                let _ = answer.send(self.guests.iter().flatten().map(|guest| spent(guest)).collect());
            }
            Command::Sockets(id, first, answer) => {
                let _ = answer.send(self.sockets(id, first));
            }
            Command::Move(id, nsm, all, answer) => {
                let _ = answer.send(self.move_guest(id, nsm, all));
            }
            Command::Capture(session, answer) => {
                self.capture(&session);
                let _ = answer.send(Ok(()));
            }
            Command::Stop => self.stop = true,
        }
    }

    /// Brings all guests' statistics up to date.
    fn count(&mut self) {
        for guest in self.guests.iter_mut().flatten() {
            if let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) {
                guest.service.count(stacks.get());
            }
        }
    }

    /// Asks the stacks what they counted of open connections: of some, others the next time.
    fn look_at_tcp(&mut self) {
        let (guests, mut left) = (self.guests.len(), LOOK_BATCH);
        for _ in 0..guests {
            if left == 0 {
                return;
            }
            self.tcp_next = if self.tcp_next + 1 < guests { self.tcp_next + 1 } else { 0 };
            if let Some(guest) = &mut self.guests[self.tcp_next]
                && guest.service.sockets() > 0
                && let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders)
            {
                left -= guest.service.look_at_tcp(stacks.get(), left.min(LOOK_AT_GUEST));
            }
        }
    }

    /// A piece of work for a guest begins.
    #[inline]
    fn begin_piece(&mut self, slot: u32) -> Piece {
        if self.in_piece {
            return Piece::Inner;
        }
        self.in_piece = true;
        let guest = self.guests.get_mut(slot as usize).and_then(Option::as_mut);
        Piece::Outer(guest.and_then(|guest| guest.cpu.begin(self.now_ns)))
    }

    #[inline]
    fn end_piece(&mut self, slot: u32, piece: Piece) {
        let Piece::Outer(begun) = piece else { return };
        self.in_piece = false;
        if let Some(begun) = begun
            && let Some(Some(guest)) = self.guests.get_mut(slot as usize)
        {
            guest.cpu.end(begun);
        }
    }

    fn slot(&self, id: u32) -> Option<u32> {
        let index =
            self.guests.iter().position(|guest| guest.as_ref().is_some_and(|guest| guest.id == id))?;
        Some(index as u32)
    }

    /// Makes the stack of a module when it is needed first.
    fn module(&mut self, index: usize) -> Result<(), EngineError> {
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors for a new guest: {e}"));
        if self.modules[index].is_none() {
            let nsm = &self.shared.config.nsms[index];
            let unavailable = |reason| EngineError::StackUnavailable { name: nsm.name.clone(), reason };
            let stack = self.shared.config.kinds.make(nsm).map_err(unavailable)?;
            let wakes = stack.wake_fd().is_some();
            if let Some(fd) = stack.wake_fd() {
                self.poller.add_readable(fd, Source::Stack(index as u32)).map_err(resource)?;
            }
            self.modules[index] = Some(Module { stack, taps: None, guests: 0, wakes });
        }
        Ok(())
    }

    fn add(&mut self, new: NewGuest) -> Result<(), EngineError> {
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors for a new guest: {e}"));
        self.module(new.nsm)?;
        let slot = match self.guests.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.guests.push(None);
                self.guests.len() - 1
            }
        };
        let captures = Arc::<AtomicU32>::default();
        if let Some(module) = &mut self.modules[new.nsm] {
            module.stack.guest(slot as u32, new.owner);
            let (tenant, name) = (new.tenant.number(), new.tenant.name().into());
            let limits = new.limits.clone();
            module
                .stack
                .member(slot as u32, Member { tenant, name, limits, captures: Arc::clone(&captures) });
            self.captures.retain(|session| !session.is_over());
        }
        let tenant = new.tenant.name();
        for session in &self.captures {
            if session.target.is(new.id, &tenant, new.owner)
                && let Some(taps) = tapped(&mut self.modules[new.nsm], new.nsm)
            {
                session.mark(&captures);
                taps.begin(session, &[(slot as u32, Vec::new())]);
            }
        }
        let limits = new.region.layout().limits;
        self.poller
            .add_doorbell(new.doorbell.as_raw_fd(), Source::Doorbell(slot as u32))
            .map_err(resource)?;
        self.poller
            .add_readable(new.channel.as_raw_fd(), Source::Channel(slot as u32, 0))
            .map_err(resource)?;
        let mut doorbells = Vec::new();
        doorbells.resize_with(limits.queue_sets as usize, || Bell::None);
        let numbers = (new.region.fd(), new.doorbell.as_raw_fd());
        let mut service = Service::new(new.region, slot as u32, new.privileged);
        service.set_limits(new.limits);
        let mut journal = None;
        if self.shared.root.is_some() {
            let mut kept = GuestJournal::create(limits).map_err(resource)?;
            service
                .keep_in(&kept.memory)
                .ok_or_else(|| resource(io::Error::other("its journal is too small")))?;
            note(Some(&mut kept.channels), 0, Some(&new.channel));
            journal = Some(kept);
        }
        if let (Some(root), Some(journal)) = (&self.shared.root, &journal) {
            let (name, pid, uid) = self.shared.who(new.id);
            let limits = (limits.region_bytes, limits.sockets, limits.queue_sets);
            let privileged = new.privileged;
            let guest = wire::NewGuest { id: new.id, name, tenant, pid, uid, privileged, limits };
            if !root.add(&guest, numbers.0, numbers.1, new.tenant.memory(), journal) {
                return Err(EngineError::Resource("the process of this stack has too many guests".into()));
            }
        }
        self.guests[slot] = Some(Box::new(Guest {
            id: new.id,
            nsm: new.nsm,
            elders: Vec::new(),
            seen_ended: 0,
            service,
            ends: Ends {
                placeholders: Table::new(limits.sockets),
                placeholder_count: 0,
                kept_wakes: Vec::new(),
                watch: Arc::clone(&self.watch),
                blocked: false,
                doorbells,
                rings: 0,
                wakes: 0,
            },
            channels: vec![Some(new.channel)],
            doorbell: new.doorbell,
            processes: Vec::new(),
            hangups: Vec::new(),
            hot: false,
            elements_first: false,
            tenant: new.tenant,
            last_active_ns: self.now_ns,
            stages: Stages::default(),
            cpu: CpuClock::new(new.id),
            carried: Usage::default(),
            has_agent: false,
            agent_kept: None,
            agent_arguments: [0; 3],
            agent: None,
            lenders: Vec::new(),
            handed: Handed::default(),
            captures,
            journal,
            over_since: None,
        }));
        if let Some(module) = &mut self.modules[new.nsm] {
            module.guests += 1;
        }
        Ok(())
    }

    /// Goes on with a guest that a process before this one had.
    fn recover(&mut self, left: Left, tenant: Arc<Tenant>, exact: bool) -> Result<(), EngineError> {
        let resource = |e: io::Error| EngineError::Resource(format!("no descriptors for a guest: {e}"));
        let Left { guest, nsm, may_use, region, doorbell, journal, kept, departed, of_stack, .. } = left;
        self.module(nsm)?;
        let limits = guest.sizes();
        let region = Region::open(region, limits).map_err(|e| EngineError::Resource(e.to_string()))?;
        let slot = vacancy(&mut self.guests);
        let Some(module) = &mut self.modules[nsm] else { return Err(EngineError::Stopped) };
        // As in `add`: before its first socket.
        module.stack.guest(slot as u32, guest.uid);
        let captures = Arc::<AtomicU32>::default();
        let member = Member {
            tenant: tenant.number(),
            name: tenant.name().into(),
            limits: may_use.clone(),
            captures: Arc::clone(&captures),
        };
        module.stack.member(slot as u32, member);
        if let Some(left) = &of_stack.left {
            module.stack.take_up(slot as u32, left);
        }
        let held = |id: u32| journal.ends.get(id as usize).is_some_and(|end| *end != 0);
        let recovered = Service::recover(
            region,
            slot as u32,
            guest.privileged,
            &journal.memory,
            &mut *module.stack,
            &held,
            exact,
            may_use,
        );
        let mut service = match recovered {
            Ok(service) => service,
            Err(violation) => {
                module.stack.guest_over(slot as u32);
                return Err(EngineError::Resource(violation.0.into()));
            }
        };
        service.resume_counts(&of_stack.counted);
        module.guests += 1;
        self.poller.add_doorbell(doorbell.as_raw_fd(), Source::Doorbell(slot as u32)).map_err(resource)?;
        let mut channels = Vec::new();
        for (number, fd) in journal.channels.iter().enumerate() {
            if let Some(fd) = take_descriptor(*fd) {
                let source = Source::Channel(slot as u32, number as u32);
                self.poller.add_readable(fd.as_raw_fd(), source).map_err(resource)?;
                channels.resize_with(number + 1, || None);
                channels[number] = Some(fd);
            }
        }
        let mut processes = Vec::new();
        for (number, [tag, fd]) in journal.processes.iter().enumerate() {
            if let Some(fd) = take_descriptor(*fd as i32) {
                let source = Source::Process(slot as u32, number as u32);
                self.poller.add_hangup(fd.as_raw_fd(), source).map_err(resource)?;
                processes.resize_with(number + 1, || None);
                processes[number] = Some(Process { tag: *tag, pair: fd });
            }
        }
        let mut doorbells = Vec::new();
        doorbells.extend(journal.bells.iter().map(|fd| take_descriptor(*fd).map_or(Bell::None, Bell::Some)));
        let (mut placeholders, mut placeholder_count) = (Table::new(limits.sockets), 0);
        let mut beyond = Vec::new();
        for (id, fd) in journal.ends.iter().enumerate() {
            let Some(fd) = take_descriptor(*fd) else { continue };
            if self.ends_here + placeholder_count >= self.most_ends_here {
                beyond.push((id as u32, fd));
                continue;
            }
            let source = Source::Placeholder(slot as u32, id as u32);
            self.poller.add_hangup(fd.as_raw_fd(), source).map_err(resource)?;
            if let Some(place) = placeholders.make(id as u32) {
                *place = End::Here(fd);
                placeholder_count += 1;
            }
        }
        self.ends_here += placeholder_count;
        self.guests[slot] = Some(Box::new(Guest {
            id: guest.id,
            nsm,
            elders: Vec::new(),
            seen_ended: 0,
            service,
            ends: Ends {
                placeholders,
                placeholder_count,
                kept_wakes: Vec::new(),
                watch: Arc::clone(&self.watch),
                blocked: false,
                doorbells,
                rings: 0,
                wakes: 0,
            },
            channels,
            doorbell,
            processes,
            hangups: Vec::new(),
            hot: false,
            elements_first: false,
            tenant,
            last_active_ns: self.now_ns,
            stages: Stages::default(),
            cpu: CpuClock::new(guest.id),
            carried: journal.carried[0],
            has_agent: false,
            agent_kept: None,
            agent_arguments: [0; 3],
            agent: None,
            lenders: Vec::new(),
            handed: Handed::default(),
            captures,
            journal: Some(journal),
            over_since: None,
        }));
        for (id, end) in beyond {
            if let Err(violation) = self.keep_placeholder(slot as u32, id, end) {
                self.violation(slot as u32, violation);
                return Ok(());
            }
        }
        if let Some(kept) = kept
            && let Err(violation) = self.recover_kept(slot as u32, &kept)
        {
            self.violation(slot as u32, violation);
        }
        self.captures.retain(|session| !session.is_over());
        for session in std::mem::take(&mut self.captures) {
            self.capture_of(&session, Some(slot as u32));
            self.captures.push(session);
        }
        match departed {
            Some(departed) => self.arrive(slot as u32, *departed)?,
            None => self.recover_agent(slot as u32),
        }
        if self.shared.root.is_none()
            && let Some(guest) = &mut self.guests[slot]
        {
            // Written out anew when the engine is exchanged once more. The service's part stays in use.
            guest.journal = None;
        }
        self.warm(slot as u32);
        self.flush(slot as u32);
        self.maybe_over(slot as u32);
        Ok(())
    }

    /// Starts the agent again that a guest had. The calls that the one before had received fail, unless it was a relay that stood
    /// still: it goes on with them.
    fn recover_agent(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        let Some(note) = guest.journal.as_ref().map(|journal| journal.agent[0]) else { return };
        let last = take_descriptor(note.last).and_then(|fd| Word::open(&fd).ok());
        let last = last.map_or(0, |last| last.load(Relaxed));
        let relay = take_descriptor(note.relay);
        let Some(Ok(listener)) = take_descriptor(note.listener).map(Listener::new) else {
            relay.iter().for_each(reset_left);
            return;
        };
        if relay.is_none() {
            listener.settle(last, libc::ENETDOWN);
        }
        guest.keep_agent([0; 3], None);
        let [a, b, c] = note.arguments;
        let message = Message { kind: kind::AGENT, a, b, c, ..Message::default() };
        let nsm = self.shared.agent_nsm(guest.id).unwrap_or(guest.nsm);
        if let Err(violation) = self.agent(slot, message, listener, nsm, relay.map(|relay| (relay, last))) {
            self.violation(slot, violation);
        }
    }

    fn add_channel(&mut self, id: u32, channel: OwnedFd) -> Result<(), EngineError> {
        let slot = self.slot(id).ok_or(EngineError::BadToken)?;
        let Some(guest) = &mut self.guests[slot as usize] else { return Err(EngineError::BadToken) };
        if guest.over_since.is_some() {
            return Err(EngineError::BadToken);
        }
        if guest.channels.iter().flatten().count() >= MAX_CHANNELS {
            return Err(EngineError::Resource("this guest has too many channels".into()));
        }
        let number = vacancy(&mut guest.channels);
        self.poller
            .add_readable(channel.as_raw_fd(), Source::Channel(slot, number as u32))
            .map_err(|e| EngineError::Resource(format!("no descriptors to attach with: {e}")))?;
        guest.set_channel(number, Some(channel));
        Ok(())
    }

    fn status(&self) -> Vec<GuestStatus> {
        let status = |guest: &Guest| {
            let (stats, usage) = (guest.service.stats(), usage(guest));
            GuestStatus {
                id: guest.id,
                processes: guest.processes.iter().flatten().count(),
                sockets: stats.sockets as usize,
                queue_sets: guest.service.queue_sets(),
                bytes_in: usage.bytes_in,
                bytes_out: usage.bytes_out,
                operations: usage.operations,
                connections: usage.connections,
                usage,
                events: stats.events,
                region_bytes: guest.service.region().bytes(),
                ring_bytes: stats.ring_bytes,
                pids: pids(&guest.processes),
                stages: StagesStatus::of(&stages(guest)),
                ..GuestStatus::default()
            }
        };
        self.guests.iter().flatten().map(|guest| status(guest)).collect()
    }

    /// From now on, what the guests that are meant send and receive is captured.
    fn capture(&mut self, session: &Arc<Session>) {
        self.capture_of(session, None);
        self.captures.push(Arc::clone(session));
    }

    /// Of one guest only, if one is named.
    fn capture_of(&mut self, session: &Arc<Session>, only: Option<u32>) {
        let mut wanted: Vec<Vec<(u32, Vec<Known>)>> = self.modules.iter().map(|_| Vec::new()).collect();
        for (slot, guest) in self.guests.iter().enumerate() {
            let Some(guest) = guest else { continue };
            if only.is_some_and(|only| only != slot as u32) {
                continue;
            }
            let uid = self.shared.who(guest.id).2;
            if !session.target.is(guest.id, &guest.tenant.name(), uid) {
                continue;
            }
            let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { continue };
            // First, so that no pair comes up meanwhile that would be missed.
            session.mark(&guest.captures);
            let (list, _) = guest.service.list(stacks.get(), 0, usize::MAX);
            for (place, nsm) in guest.places() {
                let of_stack = list.iter().filter(|socket| socket.handle.place() == place);
                wanted[nsm].push((slot as u32, of_stack.map(crate::capture::known).collect()));
            }
        }
        for (nsm, wanted) in wanted.into_iter().enumerate().filter(|(_, wanted)| !wanted.is_empty()) {
            if let Some(taps) = tapped(&mut self.modules[nsm], nsm) {
                taps.begin(session, &wanted);
            }
        }
    }

    /// Some sockets of a guest, from `first` on; and where to go on.
    fn sockets(&mut self, id: u32, first: u32) -> (Vec<SocketStatus>, Option<u32>) {
        let none = (Vec::new(), None);
        let Some(slot) = self.slot(id) else { return none };
        let Some(guest) = &self.guests[slot as usize] else { return none };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return none };
        let (list, next) = guest.service.list(stacks.get(), first, LIST_BATCH);
        let nsms = &self.shared.config.nsms;
        let told = |socket: SocketInfo| {
            let nsm = guest.nsm_at(socket.handle.place()).unwrap_or(guest.nsm);
            let status = sockets::queued(id, socket, stacks.get());
            SocketStatus { stack: nsms[nsm].name.clone(), ..status }
        };
        (list.into_iter().map(told).collect(), next)
    }

    // ---- channels

    fn channel(&mut self, slot: u32, number: u32) {
        let mut messages = std::mem::take(&mut self.messages);
        let mut left = CHANNEL_BATCH;
        while left > 0 {
            let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { break };
            let Some(Some(channel)) = guest.channels.get(number as usize) else { break };
            // What was received and is not in the journal is lost when this process dies: of a guest that has one, one at a time.
            let most = if guest.journal.is_some() { 1 } else { left.min(fds::MANY) };
            let got = match fds::receive_some(channel.as_raw_fd(), most, &mut messages) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            left -= got;
            let mut received = messages.drain(..);
            let go_on = received.by_ref().all(|message| self.received(slot, number, message));
            for unread in received.filter(|message| !message.descriptors.is_empty()) {
                bury(unread.descriptors);
            }
            if !go_on || got < most {
                break;
            }
        }
        self.messages = messages;
    }

    /// One message of a channel. False: it was the last one.
    fn received(&mut self, slot: u32, number: u32, received: fds::Received<32>) -> bool {
        let mut descriptors = received.descriptors;
        let done = match (received.len, descriptors.pop()) {
            // All processes that had this channel closed it.
            (0, None) => {
                if let Some(Some(guest)) = self.guests.get_mut(slot as usize) {
                    guest.set_channel(number as usize, None);
                }
                self.maybe_over(slot);
                return false;
            }
            (32, None) => self.without_descriptor(slot, Message::from_bytes(&received.bytes)),
            (32, Some(fd)) if descriptors.is_empty() => {
                self.message(slot, Message::from_bytes(&received.bytes), fd)
            }
            (len, fd) => {
                let several = len == 32;
                bury((descriptors, fd));
                Err(Violation(if several {
                    "channel message with more than one descriptor"
                } else {
                    "channel message of a wrong length"
                }))
            }
        };
        if let Err(violation) = done {
            self.violation(slot, violation);
            return false;
        }
        true
    }

    /// Sent without a descriptor, or this process had no room for it: the other end sees that it is closed.
    fn without_descriptor(&mut self, slot: u32, message: Message) -> Result<(), Violation> {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return Ok(()) };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return Ok(()) };
        let (stack, id) = (stacks.get(), message.a);
        match message.kind {
            kind::SOCKET => {
                guest.service.open(stack, id, message.b, message.c, message.d)?;
                guest.service.refuse(stack, id)
            }
            kind::ACCEPTED if guest.service.adopted(id, message.b) => guest.service.refuse(stack, id),
            _ => Ok(()),
        }
    }

    fn message(&mut self, slot: u32, message: Message, fd: OwnedFd) -> Result<(), Violation> {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return Ok(()) };
        if message.kind == kind::DOORBELL {
            if !is_eventfd(fd.as_fd()) {
                bury(fd);
                return Err(Violation("doorbell that is not an eventfd"));
            }
            guest.service.doorbell(message.a)?;
            if matches!(guest.set_bell(message.a, Bell::Some(fd)), Bell::Owed) {
                guest.ends.ring(message.a);
            }
            return Ok(());
        }
        if message.kind == kind::AGENT {
            let listener = Listener::new(fd).map_err(|fd| {
                bury(fd);
                Violation("agent without a seccomp listener")
            })?;
            let nsm = self.guests.get(slot as usize).and_then(Option::as_ref).map_or(0, |guest| guest.nsm);
            return self.agent(slot, message, listener, nsm, None);
        }
        // Nothing but a real Unix stream socket: other descriptors could block this thread.
        if !is_unix(fd.as_fd(), libc::SOCK_STREAM) {
            bury(fd);
            return Err(Violation("channel message with a descriptor that is not a Unix stream socket"));
        }
        if !stays_empty(&fd) {
            bury(fd);
            return Err(Violation("something was sent into the engine's end of a pair"));
        }
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return Ok(()) };
        match message.kind {
            kind::HAND_OVER => {
                // Only who may have such sockets of the agent anyway.
                let fd_of = if guest.has_agent {
                    let service = &mut guest.service;
                    guest.handed.give(message.a, || {
                        service.hand_over(stacks.get(), message.a, message.b, message.c == 1)
                    })?
                } else {
                    Err(libc::EPERM)
                };
                if let Ok(given) = &fd_of {
                    self.shared.direct_tap.gives(&self.shared, given.as_fd(), guest.id);
                    let nsm = &self.shared.config.nsms[guest.nsm];
                    self.shared.ledgers.handed().add(given, guest.id, &nsm.name);
                }
                handed::answer(&fd, fd_of);
            }
            kind::PAIR => {
                let memory = stacks.get().pair_memory(slot, message.a);
                handed::answer(&fd, memory.ok_or(libc::ENOENT));
            }
            kind::PROCESS => {
                if guest.processes.iter().flatten().count() >= MAX_PROCESSES {
                    return Err(Violation("more processes than a guest may have"));
                }
                if message.a == 0 {
                    return Err(Violation("process without a tag"));
                }
                let number = vacancy(&mut guest.processes);
                if self.poller.add_hangup(fd.as_raw_fd(), Source::Process(slot, number as u32)).is_ok() {
                    guest.note_process(number, [message.a, fd.as_raw_fd() as u32 + 1]);
                    guest.processes[number] = Some(Process { tag: message.a, pair: fd });
                }
            }
            kind::SOCKET => {
                let id = message.a;
                guest.service.open(stacks.get(), id, message.b, message.c, message.d)?;
                self.keep_placeholder(slot, id, fd)?;
            }
            kind::ACCEPTED => {
                if guest.service.adopted(message.a, message.b) {
                    self.keep_placeholder(slot, message.a, fd)?;
                }
            }
            _ => return Err(Violation("unknown channel message")),
        }
        Ok(())
    }

    /// Starts the agent of a guest, which gives out sockets of stack `stack`. It holds the guest as a process does.
    fn agent(
        &mut self,
        slot: u32,
        message: Message,
        mut listener: Listener,
        stack: usize,
        left: Option<(OwnedFd, u64)>,
    ) -> Result<(), Violation> {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return Ok(()) };
        if guest.has_agent {
            return Err(Violation("second agent"));
        }
        let nsm = &self.shared.config.nsms[stack];
        let queued_only = self.shared.needs_queues(guest.id);
        let settings = Settings {
            policy: nsm.congestion_policy,
            fail_open: message.a == 1 && !queued_only,
            no_streams: queued_only,
        };
        // What goes wrong here ends the listener: the guest's sockets fail with ENETDOWN (ENOSYS without an heir), and nothing waits.
        let behind_preload = message.b == 1;
        let binary = self.shared.config.process_binary.as_deref();
        // For the next process: of the NSM, or of the engine.
        let kept = listener.duplicate().and_then(|own| Ok((own, listener.share()?))).ok();
        if let Some((_, last)) = &left {
            listener.received(*last);
        }
        if let Some((_, last)) = &kept {
            self.shared.heirs.remember(binary, guest.id, &listener, last);
        }
        let started = if message.c == 1 {
            let left = left.map(|(left, _)| left);
            relay::start(&self.shared, guest.id, slot, nsm, listener, settings, behind_preload, left)
        } else {
            direct::start(&self.shared, guest.id, nsm, listener, settings, behind_preload)
                .map(|(end, agent)| (end, agent, None))
        };
        let (end, agent, lender) = match started {
            Ok(started) => started,
            Err(error) => {
                log::error!(guest = guest.id; "guest {}: its agent cannot start: {error}", guest.id);
                self.shared.heirs.answer(guest.id);
                return Ok(());
            }
        };
        let number = vacancy(&mut guest.processes);
        if self.poller.add_hangup(end.as_raw_fd(), Source::Process(slot, number as u32)).is_ok() {
            guest.processes[number] = Some(Process { tag: 0, pair: end });
            guest.has_agent = true;
            guest.keep_agent([message.a, message.b, message.c], kept);
            // Without the bell the relay would wait for ever: its half is told with the other one's end.
            guest.lenders.extend(
                lender
                    .filter(|lender| self.poller.add_readable(lender.bell(), Source::Relay(slot)).is_ok())
                    .map(|lender| (stack, lender)),
            );
            if message.c != 1 && self.shared.config.kinds.has_direct(nsm) {
                guest.service.prepare_hand_over();
            }
            guest.agent = Some(Arc::clone(&agent.counters));
            self.shared.has_agent(guest.id, stack, agent);
        }
        Ok(())
    }

    /// Holds the engine's end of a placeholder until the guest's last descriptor for it is closed.
    fn keep_placeholder(&mut self, slot: u32, id: u32, fd: OwnedFd) -> Result<(), Violation> {
        let end = if self.ends_here < self.most_ends_here {
            match self.poller.add_hangup(fd.as_raw_fd(), Source::Placeholder(slot, id)) {
                Ok(()) => End::Here(fd),
                Err(_) => End::None,
            }
        } else {
            self.hand_over(slot, id, &fd).map_or(End::None, End::Kept)
        };
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return Ok(()) };
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return Ok(()) };
        match (end, guest.ends.placeholders.make(id)) {
            // No memory or no descriptor for one more.
            (End::None, _) | (_, None) => guest.service.refuse(stacks.get(), id),
            (end, Some(place)) => {
                if let End::Here(fd) = &end {
                    self.ends_here += 1;
                    note(guest.journal.as_mut().map(|j| &mut j.ends), id as usize, Some(fd));
                }
                match std::mem::replace(place, end) {
                    End::None => guest.ends.placeholder_count += 1,
                    End::Here(_) => self.ends_here -= 1,
                    End::Kept(_) => {}
                }
                // Who went to sleep on the placeholder before its other end was here missed what happened meanwhile.
                let entry = guest.service.region().socket(id);
                let waiters = entry.map_or(0, |entry| entry.waiters.load(SeqCst));
                if waiters != 0 {
                    entry.inspect(|entry| _ = entry.wakes.fetch_add(1, SeqCst));
                    guest.ends.wake(id, waiters.min(netkernel_service::MAX_WAKE));
                }
                Ok(())
            }
        }
    }

    /// Gives an end to the keeper, which is started when it is needed first.
    fn hand_over(&mut self, slot: u32, id: u32, fd: &OwnedFd) -> io::Result<u32> {
        if self.keeper.is_none() {
            let keeper = Keeper::start(self.index)?;
            self.poller.add_readable(keeper.wake.as_raw_fd(), Source::Keeper)?;
            self.keeper = Some(keeper);
        }
        match &mut self.keeper {
            Some(keeper) => keeper.add(slot, id, fd),
            None => Err(io::Error::other("no keeper")),
        }
    }

    fn keeper_reports(&mut self) {
        let Some(keeper) = &self.keeper else { return };
        read_eventfd(keeper.wake.as_raw_fd());
        for hangup in keeper.take() {
            let Some(Some(guest)) = self.guests.get_mut(hangup.slot as usize) else { continue };
            // Not an end of a guest that had this slot before.
            let same = |end: &End| matches!(end, End::Kept(serial) if *serial == hangup.serial);
            if !guest.ends.placeholders.get(hangup.id).is_some_and(same) {
                continue;
            }
            if !hangup.refused {
                guest.hangups.push(hangup.id);
                self.hung.push(hangup.slot);
                continue;
            }
            if let Some(end) = guest.ends.placeholders.get_mut(hangup.id) {
                *end = End::None;
                guest.ends.placeholder_count -= 1;
            }
            let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { continue };
            match guest.service.refuse(stacks.get(), hangup.id) {
                Ok(()) => {
                    self.warm(hangup.slot);
                    self.maybe_over(hangup.slot);
                }
                Err(violation) => self.violation(hangup.slot, violation),
            }
        }
    }

    fn process_over(&mut self, slot: u32, number: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        guest.note_process(number as usize, [0; 2]);
        let Some(process) = guest.processes.get_mut(number as usize).and_then(Option::take) else { return };
        if process.tag == 0 {
            self.shared.heirs.answer(guest.id);
            guest.keep_agent([0; 3], None);
        }
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return };
        if let Err(violation) = guest.service.end_process(stacks.get(), process.tag) {
            return self.violation(slot, violation);
        }
        for q in guest.service.take_released() {
            guest.set_bell(q, Bell::None);
        }
        self.warm(slot);
        self.maybe_over(slot);
    }

    // ---- the end of guests

    /// Takes the guest away when nobody can use it any more and its sockets have sent what they held.
    fn maybe_over(&mut self, slot: u32) {
        let Some(Some(guest)) = self.guests.get_mut(slot as usize) else { return };
        let held = guest.channels.iter().any(Option::is_some)
            || guest.processes.iter().any(Option::is_some)
            || guest.ends.placeholder_count > 0
            || !guest.hangups.is_empty();
        if held {
            return;
        }
        let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) else { return };
        if guest.over_since.is_none() {
            guest.over_since = Some(self.now_ns);
            let (id, name) = (guest.id, self.shared.name(guest.id));
            log::info!(guest = id, name:%; "guest {id} ({name}) is over: nobody holds it any more");
            // Accepted connections that nobody took.
            if let Err(violation) = guest.service.close_all(stacks.get()) {
                return self.violation(slot, violation);
            }
        }
        let since = guest.over_since.unwrap_or(self.now_ns);
        if guest.service.sockets() == 0 || self.now_ns.saturating_sub(since) > LINGER_NS {
            self.remove(slot);
        } else {
            self.warm(slot);
        }
    }

    fn violation(&mut self, slot: u32, violation: Violation) {
        let Some(Some(guest)) = self.guests.get(slot as usize) else { return };
        let id = guest.id;
        let name = self.shared.name(id);
        log::warn!(guest = id, name:%; "guest {id} ({name}) broke the protocol and was ended: {}", violation.0);
        self.shared.counters.violations.fetch_add(1, Relaxed);
        self.remove(slot);
    }

    /// Ends a guest now. Its processes, if there are any, see a dead network.
    fn remove(&mut self, slot: u32) {
        let Some(mut guest) = self.guests.get_mut(slot as usize).and_then(Option::take) else { return };
        self.hot.retain(|&hot| hot != slot);
        if guest.has_agent {
            self.shared.heirs.answer(guest.id);
        }
        if let Some(root) = &self.shared.root {
            root.remove(guest.id);
        }
        for (nsm, lender) in &mut guest.lenders {
            self.poller.remove(lender.bell());
            if let Some(module) = &mut self.modules[*nsm] {
                lender.end(&mut *module.stack);
            }
        }
        if let Some(mut stacks) = stacks(&mut self.modules, guest.nsm, &guest.elders) {
            guest.service.end(stacks.get());
        }
        for nsm in guest.nsms() {
            guest_leaves(&mut self.modules[nsm], slot);
        }
        guest.service.say_gone(&mut guest.ends);
        let (mut here, mut kept) = (0, false);
        for (_, end) in guest.ends.placeholders.iter() {
            match end {
                End::None => {}
                End::Here(_) => here += 1,
                End::Kept(_) => kept = true,
            }
        }
        self.ends_here -= here;
        if kept && let Some(keeper) = &self.keeper {
            keeper.remove_slot(slot);
        }
        self.shared.counters.doorbells.fetch_add(guest.ends.rings, Relaxed);
        self.shared.counters.wakes.fetch_add(guest.ends.wakes, Relaxed);
        let (id, usage) = (guest.id, usage(&guest));
        self.shared.keep_stages(guest.nsm, &stages(&guest));
        // Messages that were not read may carry anything.
        bury(std::mem::take(&mut guest.channels));
        // Unmaps the region and closes every end.
        drop(guest);
        self.shared.guest_over(id, usage);
    }
}

/// The stacks that a guest's sockets are of.
enum Stacks<'a> {
    One(&'a mut dyn Stack),
    More(Several<&'a mut dyn Stack>),
}

impl Stacks<'_> {
    #[inline]
    fn get(&mut self) -> &mut dyn Stack {
        match self {
            Stacks::One(stack) => &mut **stack,
            Stacks::More(stacks) => stacks,
        }
    }
}

#[inline]
fn stacks<'a>(modules: &'a mut [Option<Module>], nsm: usize, elders: &[Option<usize>]) -> Option<Stacks<'a>> {
    if elders.is_empty() {
        let module = modules.get_mut(nsm)?.as_mut()?;
        return Some(Stacks::One(&mut *module.stack));
    }
    let places: Vec<Option<usize>> = std::iter::once(Some(nsm)).chain(elders.iter().copied()).collect();
    let mut all: Vec<Option<&mut dyn Stack>> = places.iter().map(|_| None).collect();
    for (nsm, module) in modules.iter_mut().enumerate() {
        let place = places.iter().position(|place| *place == Some(nsm));
        if let (Some(place), Some(module)) = (place, module) {
            all[place] = Some(&mut *module.stack);
        }
    }
    Some(Stacks::More(Several::new(all)))
}

/// A guest has no sockets of this stack any more.
fn guest_leaves(module: &mut Option<Module>, slot: u32) {
    if let Some(module) = module {
        module.taps.iter().for_each(|taps| taps.guest_over(slot));
        module.stack.guest_over(slot);
        module.guests -= 1;
    }
}

/// Who looks on at a module's stack, put there when it is needed first.
fn tapped(place: &mut Option<Module>, nsm: usize) -> Option<&Taps> {
    if let Some(module) = place.take_if(|module| module.taps.is_none()) {
        let taps = Taps::default();
        let observer = Tap::new(taps.clone(), nsm as u32);
        let stack = Box::new(Observed { stack: module.stack, observer });
        *place = Some(Module { stack, taps: Some(taps), ..module });
    }
    place.as_ref()?.taps.as_ref()
}

/// How long the stages took for this guest.
fn stages(guest: &Guest) -> Stages {
    let mut stages = guest.stages.clone();
    stages.queue.add(guest.service.waited());
    stages
}

/// Tag 0 is the agent's, which is the engine's own.
fn pids(processes: &[Option<Process>]) -> Vec<u32> {
    let programs = processes.iter().flatten().filter(|process| process.tag != 0);
    programs.filter_map(|process| sockets::process_of(&process.pair)).collect()
}

/// What went through the queues, and through the relay.
fn usage(guest: &Guest) -> Usage {
    let stats = guest.service.stats();
    let mut usage = Usage {
        bytes_in: stats.bytes_in,
        bytes_out: stats.bytes_out,
        operations: stats.operations,
        connections: stats.connections,
        // How long it lived is known to the registry.
        ..Usage::default()
    }
    .with_tcp(&stats.tcp);
    usage.add(&besides(guest));
    usage
}

/// The part of it that the service does not count, and which processes before this one are not to be forgotten with.
fn besides(guest: &Guest) -> Usage {
    let mut usage = without_agent(guest);
    if let Some(counters) = &guest.agent {
        usage.add(&of_agent(counters));
    }
    usage
}

fn without_agent(guest: &Guest) -> Usage {
    let mut usage = guest.carried;
    usage.cpu_ns += guest.cpu.spent_ns();
    guest.lenders.iter().fold(usage, |usage, (_, lender)| usage.with_tcp(&lender.tcp()))
}

/// What an agent, or a relay, and its sockets used.
pub(crate) fn of_agent(counters: &Counters) -> Usage {
    Usage {
        bytes_in: counters.bytes_in.load(Relaxed),
        bytes_out: counters.bytes_out.load(Relaxed),
        connections: counters.connections.load(Relaxed),
        cpu_ns: counters.cpu.ns(),
        ..Usage::default()
    }
    .with_tcp(&relayed_tcp(counters))
}

/// What the relay's own stack counted.
fn relayed_tcp(counters: &Counters) -> TcpSums {
    let [connections, segments, retransmitted, rtt_us, rtt_samples] = counters.tcp.sums();
    TcpSums { connections, segments, retransmitted, rtt_us, rtt_samples }
}

/// Makes the guest ring its doorbell. False: it pushed something before it could know, or has work.
fn cool(guest: &mut Guest) -> bool {
    // Only guests that are polled are flushed: their sleepers would not wake.
    if guest.service.owes_wake_ups() {
        return false;
    }
    if guest.service.elements_wait() {
        // It need not ring: this thread comes by itself.
        guest.hot = guest.service.has_work();
        return !guest.hot;
    }
    let waiting = &guest.service.region().header().engine_waiting;
    // SYNC: engine-waiting - a guest that pushed before it could see this 1 is seen by the look that follows.
    waiting.store(1, SeqCst);
    fence(SeqCst);
    if guest.service.has_elements() || guest.service.has_work() {
        waiting.store(0, SeqCst);
        return false;
    }
    guest.hot = false;
    // What it does first when it is polled again.
    guest.service.begin_turn(0);
    guest.service.begin_turn(QUANTUM);
    true
}

/// Index of a free place in `list`, made when there is none.
fn vacancy<T>(list: &mut Vec<Option<T>>) -> usize {
    match list.iter().position(Option::is_none) {
        Some(index) => index,
        None => {
            list.push(None);
            list.len() - 1
        }
    }
}

fn descriptor_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for writes.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    usize::try_from(limit.rlim_cur).unwrap_or(1024).clamp(64, 1 << 20)
}

fn read_eventfd(fd: i32) {
    let mut value = 0u64;
    // SAFETY: eight bytes, valid for writes; the descriptor is non-blocking.
    unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
}

pub(crate) fn is_unix(fd: BorrowedFd<'_>, kind: i32) -> bool {
    let value = |name: i32| {
        let mut value = 0i32;
        let mut len = size_of::<i32>() as libc::socklen_t;
        // SAFETY: value and len are valid for writes, len is value's size.
        let r = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &mut len)
        };
        if r == 0 { value } else { -1 }
    };
    value(libc::SO_DOMAIN) == libc::AF_UNIX && value(libc::SO_TYPE) == kind
}

pub(crate) fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}
