//! Epoll instances with guest sockets in them.
//!
//! The program's epoll descriptor is a real one and holds the kernel's descriptors; guest sockets stand in an interest
//! list here. The engine's events come in through a receive ring; its doorbell (an eventfd) and the engine's channel stand in the
//! real set, so that one `epoll_pwait` sleeps on everything and signals, masks and time-outs are the kernel's own.

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use std::collections::VecDeque;

use libc::{EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLONESHOT, EPOLLOUT, epoll_event};
use netkernel_abi::control::{Message, kind};
use netkernel_abi::socket::WATCHERS;
use netkernel_abi::{Nqe, SocketEntry};
use netkernel_shm::fds;

use crate::guest::{self, Guest, Lock};
use crate::next::next;
use crate::pair::Pair;
use crate::socket;
use crate::sys::{self, raw};
use crate::table::{self, Slot};
use crate::{queue, wait};

const NONE: u32 = u32::MAX;
/// Bits of an event mask that are not conditions.
const MODE_BITS: u32 =
    EPOLLET as u32 | EPOLLONESHOT as u32 | libc::EPOLLEXCLUSIVE as u32 | libc::EPOLLWAKEUP as u32;

/// One guest socket (or nested instance) of an interest list.
#[derive(Clone, Copy)]
struct Interest {
    /// Descriptor it was added under, -1 when that was closed while others for the socket stayed open.
    fd: i32,
    /// Socket id, or NONE for a nested instance.
    socket: u32,
    /// Nested instance's index, or NONE.
    nested: u32,
    events: u32,
    data: u64,
    queued: bool,
    live: bool,
    /// Has a [`Watch`].
    paired: bool,
    /// Next interest of the same socket.
    next: u32,
}

/// What an instance has seen of a connection of a pair, whose changes come without an event of the engine.
#[derive(Clone, Copy)]
struct Watch {
    slot: u32,
    entry: &'static SocketEntry,
    pair: Pair,
    state: u32,
    tail: u32,
    /// Of [`PairEnd::full`](netkernel_abi::pair::PairEnd::full), when it was writable last.
    full: u32,
}

impl Watch {
    #[inline]
    fn has_moved(&self) -> bool {
        self.pair.theirs.tail.load(Ordering::Acquire) != self.tail
            || self.entry.state.load(Ordering::Acquire) != self.state
            || self.pair.mine.full.load(Ordering::Relaxed) != self.full && self.pair.writable()
    }
}

struct Inner {
    interests: Vec<Interest>,
    pairs: Vec<Watch>,
    free: Vec<u32>,
    /// By descriptor, by socket: first interest + 1.
    by_fd: Vec<u32>,
    by_socket: Vec<u32>,
    ready: VecDeque<u32>,
    nested: Vec<u32>,
    /// The receive ring, and the process that it belongs to.
    queue_set: u32,
    tag: u32,
    doorbell: i32,
    /// Descriptors of the kernel's in the real set (a hint: it may be too high).
    kernel: u32,
    last_kernel_poll_ns: u64,
    /// The last call was filled by guest sockets: the kernel's descriptors come first now.
    kernel_turn: bool,
    /// Descriptors of this process for the instance.
    references: u32,
}

pub struct Epoll {
    inner: Lock<Inner>,
    /// Threads that sleep in the real set, to be woken when another thread adds something ready.
    sleepers: AtomicU32,
    /// Another epoll instance or a poll looks at this one's descriptor: the doorbell stays armed.
    watched: AtomicU32,
}

static ALL: Lock<Vec<&'static Epoll>> = Lock::new(Vec::new());

fn by_index(index: u32) -> Option<&'static Epoll> {
    ALL.lock().get(index as usize).copied()
}

/// The instance behind `epfd`, if it has guest sockets.
pub fn find(epfd: i32) -> Option<&'static Epoll> {
    match table::slot(epfd) {
        Slot::Epoll(index) => by_index(index),
        _ => None,
    }
}

/// Another descriptor for the same instance.
pub fn duplicated(index: u32) {
    if let Some(e) = by_index(index) {
        e.inner.lock().references += 1;
    }
}

/// A descriptor for the instance was closed; with the last one its receive ring is given back.
pub fn closed(index: u32) {
    let Some(e) = by_index(index) else { return };
    let mut inner = e.inner.lock();
    inner.references = inner.references.saturating_sub(1);
    if inner.references == 0 {
        inner.dissolve();
    }
}

/// The program closed `fd`, a descriptor of socket `id`.
pub fn socket_closed(fd: i32, id: u32) {
    let last = table::references(id) == 0;
    let all: usize = ALL.lock().len();
    for index in 0..all as u32 {
        let Some(e) = by_index(index) else { continue };
        let mut inner = e.inner.lock();
        if inner.references == 0 {
            continue;
        }
        if last {
            inner.remove_socket(id);
        } else if let Some(slot) = inner.slot_of_fd(fd) {
            // Another descriptor keeps the description open: Linux goes on reporting.
            inner.by_fd[fd as usize] = 0;
            inner.interests[slot as usize].fd = -1;
        }
    }
}

/// An interest that leaves with its socket: the instance, the descriptor that was watched, and the event.
pub type Left = (u32, i32, epoll_event);

/// Socket `id` leaves the queues: takes it out of all instances.
pub fn leave(id: u32) -> Vec<Left> {
    let mut left = Vec::new();
    let all = ALL.lock().len();
    for index in 0..all as u32 {
        let Some(e) = by_index(index) else { continue };
        let mut inner = e.inner.lock();
        for i in inner.interests.iter().filter(|i| i.live && i.socket == id && i.fd >= 0) {
            left.push((index, i.fd, epoll_event { events: i.events, u64: i.data }));
        }
        inner.remove_socket(id);
    }
    left
}

/// Puts what left into the kernel's own sets, where its descriptors are the kernel's sockets now.
pub fn rejoin(left: Vec<Left>) {
    for (index, fd, event) in left {
        let mut epfd = -1;
        table::for_each(0, i32::MAX, |number, slot| {
            if slot == Slot::Epoll(index) {
                epfd = number;
            }
        });
        if let (Some(e), true) = (by_index(index), epfd >= 0) {
            raw!(libc::SYS_epoll_ctl, epfd, libc::EPOLL_CTL_ADD, fd, &event as *const epoll_event);
            e.inner.lock().kernel += 1;
        }
    }
}

pub fn has_instances() -> bool {
    !ALL.lock().is_empty()
}

/// The instance behind `epfd`, made if there is none: at epoll_create, so that duplicates are known as such, or late,
/// for a descriptor that came from elsewhere.
pub fn instance_for(epfd: i32) -> &'static Epoll {
    if let Some(e) = find(epfd) {
        return e;
    }
    let mut all = ALL.lock();
    if let Slot::Epoll(index) = table::slot(epfd) {
        return all[index as usize];
    }
    let inner = Inner {
        interests: Vec::new(),
        pairs: Vec::new(),
        free: Vec::new(),
        by_fd: Vec::new(),
        by_socket: Vec::new(),
        ready: VecDeque::new(),
        nested: Vec::new(),
        queue_set: NONE,
        tag: 0,
        doorbell: -1,
        kernel: 0,
        last_kernel_poll_ns: 0,
        kernel_turn: false,
        references: 1,
    };
    // Reuse the place of an instance that is gone.
    for (index, e) in all.iter().enumerate() {
        let mut old = e.inner.lock();
        if old.references == 0 {
            *old = inner;
            e.watched.store(0, Ordering::Relaxed);
            table::set(epfd, Slot::Epoll(index as u32));
            drop(old);
            return e;
        }
    }
    let e: &'static Epoll = Box::leak(Box::new(Epoll {
        inner: Lock::new(inner),
        sleepers: AtomicU32::new(0),
        watched: AtomicU32::new(0),
    }));
    all.push(e);
    table::set(epfd, Slot::Epoll(all.len() as u32 - 1));
    e
}

impl Inner {
    /// Gets a receive ring and a doorbell for the calling process.
    fn join(&mut self, guest: &'static Guest, epfd: i32) -> Result<(), i32> {
        let tag = guest.process()?;
        if self.tag == tag {
            return Ok(());
        }
        let doorbell = fds::eventfd().map_err(|e| e.raw_os_error().unwrap_or(libc::EMFILE))?;
        let q = queue::claim(guest)?;
        guest.channel_send(Message { kind: kind::DOORBELL, a: q, ..Message::default() }, &doorbell)?;
        // A doorbell of the process that we were forked from stays in the shared set: edge-triggered, harmless.
        self.doorbell = table::move_high(doorbell);
        let mut event = epoll_event { events: (EPOLLIN | EPOLLET) as u32, u64: guest.magic };
        raw!(libc::SYS_epoll_ctl, epfd, libc::EPOLL_CTL_ADD, self.doorbell, &mut event as *mut epoll_event);
        let channel = guest.channel.load(Ordering::Relaxed);
        let mut event = epoll_event { events: (EPOLLET | libc::EPOLLRDHUP) as u32, u64: guest.magic };
        raw!(libc::SYS_epoll_ctl, epfd, libc::EPOLL_CTL_ADD, channel, &mut event as *mut epoll_event);
        self.queue_set = q;
        self.tag = tag;
        let sockets: Vec<u32> =
            self.interests.iter().filter(|i| i.live && i.socket != NONE).map(|i| i.socket).collect();
        for id in sockets {
            if let Some(entry) = guest.region.socket(id) {
                watch(entry, q);
            }
        }
        for slot in 0..self.interests.len() as u32 {
            self.queue_up(slot);
        }
        Ok(())
    }

    fn dissolve(&mut self) {
        let Some(guest) = guest::guest() else { return };
        let sockets: Vec<u32> =
            self.interests.iter().filter(|i| i.live && i.socket != NONE).map(|i| i.socket).collect();
        if self.tag == guest::tag() && self.queue_set != NONE {
            for id in sockets {
                if let Some(entry) = guest.region.socket(id) {
                    unwatch(entry, self.queue_set);
                }
            }
            queue::release(guest, self.queue_set);
        }
        if self.doorbell >= 0 {
            table::forget(self.doorbell);
            sys::close(self.doorbell);
        }
        self.doorbell = -1;
        self.queue_set = NONE;
        self.tag = 0;
        self.interests.clear();
        self.pairs.clear();
        self.free.clear();
        self.by_fd.clear();
        self.by_socket.clear();
        self.ready.clear();
        self.nested.clear();
    }

    fn slot_of_fd(&self, fd: i32) -> Option<u32> {
        match self.by_fd.get(fd as usize) {
            Some(&s) if s > 0 => Some(s - 1),
            _ => None,
        }
    }

    fn queue_up(&mut self, slot: u32) {
        self.watch_pair(slot);
        let i = &mut self.interests[slot as usize];
        if i.live && !i.queued {
            i.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// Begins to look at the memory of a connection of a pair.
    fn watch_pair(&mut self, slot: u32) {
        let i = self.interests[slot as usize];
        if i.paired || !i.live || i.socket == NONE {
            return;
        }
        let Some(sock) = socket::by_id(i.socket, i.fd) else { return };
        let state = sock.state();
        let Some(pair) = sock.pair() else { return };
        self.interests[slot as usize].paired = true;
        let (tail, full) = (pair.theirs.tail.load(Ordering::Acquire), pair.mine.full.load(Ordering::Relaxed));
        let full = full.wrapping_sub(1);
        self.pairs.push(Watch { slot, entry: sock.entry, pair, state, tail, full });
    }

    /// Looks for changes that the other ends of pairs made. True: there was one.
    fn look_at_pairs(&mut self) -> bool {
        let mut moved = false;
        let mut n = 0;
        while let Some(w) = self.pairs.get_mut(n) {
            n += 1;
            if !w.has_moved() {
                continue;
            }
            w.state = w.entry.state.load(Ordering::Acquire);
            w.tail = w.pair.theirs.tail.load(Ordering::Acquire);
            let full = w.pair.mine.full.load(Ordering::Relaxed);
            if w.pair.writable() {
                w.full = full;
            }
            moved = true;
            let slot = w.slot;
            if !self.is_current(n - 1) {
                n -= 1;
                self.pairs.swap_remove(n);
                self.interests[slot as usize].paired = false;
            }
            self.queue_up(slot);
        }
        moved
    }

    /// Whether the socket still is that connection (it may have been disconnected).
    fn is_current(&self, n: usize) -> bool {
        let w = &self.pairs[n];
        let i = &self.interests[w.slot as usize];
        let now = socket::by_id(i.socket, i.fd).and_then(|sock| sock.pair());
        now.is_some_and(|now| core::ptr::eq(now.mine, w.pair.mine))
    }

    /// Before somebody sleeps: the other ends of pairs are to tell of what they change.
    fn arm_pairs(&mut self) {
        for w in &self.pairs {
            let events = self.interests[w.slot as usize].events;
            if events & !MODE_BITS & !(EPOLLOUT as u32) != 0 {
                w.pair.want_data(false);
            }
            if events & EPOLLOUT as u32 != 0 && !w.pair.writable() {
                w.pair.want_space();
            }
        }
        // SYNC: pair-sleep - who changed something before it could see these flags is seen by the look that follows.
        fence(Ordering::SeqCst);
    }

    fn queue_socket(&mut self, id: u32) {
        let mut slot = self.by_socket.get(id as usize).copied().unwrap_or(0);
        while slot > 0 {
            // What an event says of a pair is seen there, once.
            if !self.interests[slot as usize - 1].paired {
                self.queue_up(slot - 1);
            }
            slot = self.interests[slot as usize - 1].next;
        }
    }

    /// Takes the engine's events in.
    fn drain(&mut self, guest: &Guest) {
        if self.queue_set == NONE {
            return;
        }
        let (Some(ring), Some(set)) =
            (guest.region.receive(self.queue_set), guest.region.queue_set(self.queue_set))
        else {
            return;
        };
        let mut head = ring.head();
        while let Ok(Some(words)) = ring.pop(&mut head) {
            let event = Nqe::from_words(words);
            if let Some(entry) = guest.region.socket(event.socket) {
                clear_pending(entry, self.queue_set);
                self.queue_socket(event.socket);
            }
        }
        if set.overflow.load(Ordering::Relaxed) != 0 && set.overflow.swap(0, Ordering::SeqCst) != 0 {
            let sockets: Vec<u32> =
                self.interests.iter().filter(|i| i.live && i.socket != NONE).map(|i| i.socket).collect();
            for id in sockets {
                if let Some(entry) = guest.region.socket(id) {
                    clear_pending(entry, self.queue_set);
                }
                self.queue_socket(id);
            }
        }
        self.look_at_pairs();
        if guest::engine_gone() {
            for slot in 0..self.interests.len() as u32 {
                self.queue_up(slot);
            }
        }
    }

    fn readiness(&self, slot: u32) -> u32 {
        let i = &self.interests[slot as usize];
        let wanted = (i.events & !MODE_BITS) | (EPOLLERR | EPOLLHUP) as u32;
        if i.events & !MODE_BITS == 0 && i.events & EPOLLONESHOT as u32 != 0 {
            return 0;
        }
        if i.nested != NONE {
            let ready = by_index(i.nested).is_some_and(|e| e.has_ready(i.fd));
            return if ready { EPOLLIN as u32 & wanted } else { 0 };
        }
        let Some(sock) = socket::by_id(i.socket, i.fd) else { return 0 };
        let mut mask = sock.readiness() & wanted;
        if wanted & EPOLLOUT as u32 != 0 && mask & EPOLLOUT as u32 == 0 {
            match sock.pair() {
                Some(pair) => _ = pair.mine.full.fetch_add(1, Ordering::Relaxed),
                None => sock.want_space(),
            }
            fence(Ordering::SeqCst);
            mask = sock.readiness() & wanted;
        }
        mask
    }

    /// Reports up to `out.len()` ready guest sockets, oldest first; level-triggered ones go to the end of the line.
    fn collect(&mut self, out: &mut [epoll_event]) -> usize {
        for n in 0..self.nested.len() {
            let slot = self.nested[n];
            self.queue_up(slot);
        }
        let mut count = 0;
        let mut again = Vec::new();
        for _ in 0..self.ready.len() {
            if count == out.len() {
                break;
            }
            let Some(slot) = self.ready.pop_front() else { break };
            self.interests[slot as usize].queued = false;
            if !self.interests[slot as usize].live {
                continue;
            }
            let mask = self.readiness(slot);
            if mask == 0 {
                continue;
            }
            let i = &mut self.interests[slot as usize];
            out[count] = epoll_event { events: mask, u64: i.data };
            count += 1;
            if i.events & EPOLLONESHOT as u32 != 0 {
                i.events &= MODE_BITS;
            } else if i.events & EPOLLET as u32 == 0 {
                again.push(slot);
            }
        }
        for slot in again {
            self.queue_up(slot);
        }
        count
    }

    fn any_ready(&mut self) -> bool {
        for n in 0..self.nested.len() {
            let slot = self.nested[n];
            self.queue_up(slot);
        }
        let mut n = self.ready.len();
        while n > 0 {
            n -= 1;
            let Some(slot) = self.ready.pop_front() else { break };
            self.interests[slot as usize].queued = false;
            if self.interests[slot as usize].live && self.readiness(slot) != 0 {
                self.queue_up(slot);
                return true;
            }
        }
        false
    }

    fn add(&mut self, fd: i32, socket: u32, nested: u32, event: epoll_event) -> u32 {
        let interest = Interest {
            fd,
            socket,
            nested,
            events: event.events,
            data: event.u64,
            queued: false,
            live: true,
            paired: false,
            next: 0,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                let queued = self.interests[slot as usize].queued;
                self.interests[slot as usize] = Interest { queued, ..interest };
                slot
            }
            None => {
                self.interests.push(interest);
                self.interests.len() as u32 - 1
            }
        };
        grow(&mut self.by_fd, fd as usize);
        self.by_fd[fd as usize] = slot + 1;
        if socket != NONE {
            grow(&mut self.by_socket, socket as usize);
            self.interests[slot as usize].next = self.by_socket[socket as usize];
            self.by_socket[socket as usize] = slot + 1;
        } else {
            self.nested.push(slot);
        }
        slot
    }

    fn remove(&mut self, slot: u32) {
        let i = self.interests[slot as usize];
        if !i.live {
            return;
        }
        if i.fd >= 0 && self.by_fd.get(i.fd as usize) == Some(&(slot + 1)) {
            self.by_fd[i.fd as usize] = 0;
        }
        if i.socket != NONE {
            let mut at = self.by_socket[i.socket as usize];
            if at == slot + 1 {
                self.by_socket[i.socket as usize] = i.next;
            } else {
                while at > 0 {
                    let next = self.interests[at as usize - 1].next;
                    if next == slot + 1 {
                        self.interests[at as usize - 1].next = i.next;
                        break;
                    }
                    at = next;
                }
            }
        } else {
            self.nested.retain(|&n| n != slot);
        }
        self.interests[slot as usize].live = false;
        if i.paired {
            self.pairs.retain(|w| w.slot != slot);
        }
        // A slot that stands in the ready line keeps its mark; add() keeps it, too.
        self.free.push(slot);
    }

    fn remove_socket(&mut self, id: u32) {
        loop {
            let slot = self.by_socket.get(id as usize).copied().unwrap_or(0);
            if slot == 0 {
                break;
            }
            self.remove(slot - 1);
        }
    }
}

fn grow(v: &mut Vec<u32>, index: usize) {
    if v.len() <= index {
        v.resize((index + 1).next_power_of_two().max(64), 0);
    }
}

/// Enters queue set `q` among the socket's watchers.
fn watch(entry: &SocketEntry, q: u32) {
    let value = q as u16 + 1;
    // A bit that is set may be of a watcher before (a process that ended): nobody would clear it.
    if entry.watchers.iter().any(|w| w.load(Ordering::Relaxed) == value) {
        return clear_pending(entry, q);
    }
    for w in &entry.watchers {
        if w.load(Ordering::Relaxed) == 0
            && w.compare_exchange(0, value, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        {
            return clear_pending(entry, q);
        }
    }
    entry.broadcast.store(1, Ordering::SeqCst);
}

fn unwatch(entry: &SocketEntry, q: u32) {
    for (i, w) in entry.watchers.iter().enumerate() {
        if w.compare_exchange(q as u16 + 1, 0, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
            entry.event_pending.fetch_and(!(1 << i), Ordering::SeqCst);
        }
    }
}

fn clear_pending(entry: &SocketEntry, q: u32) {
    for (i, w) in entry.watchers.iter().enumerate().take(WATCHERS) {
        if AtomicU16::load(w, Ordering::Relaxed) == q as u16 + 1 {
            entry.event_pending.fetch_and(!(1 << i), Ordering::SeqCst);
        }
    }
}

/// `epoll_ctl` where `fd` is a guest socket or an instance with guest sockets. `None`: the kernel's business.
pub fn ctl(epfd: i32, op: i32, fd: i32, event: *mut epoll_event) -> Option<Result<(), i32>> {
    let guest = guest::guest()?;
    let (socket, nested) = match table::slot(fd) {
        Slot::Socket(id) => (id, NONE),
        Slot::Epoll(index) => (NONE, index),
        Slot::Internal => return Some(Err(libc::EBADF)),
        Slot::None => {
            if let Some(e) = find(epfd)
                && op == libc::EPOLL_CTL_ADD
            {
                e.inner.lock().kernel += 1;
            }
            return None;
        }
    };
    if epfd == fd {
        return Some(Err(libc::EINVAL));
    }
    Some(ctl_guest(guest, epfd, op, fd, event, socket, nested))
}

fn ctl_guest(
    guest: &'static Guest,
    epfd: i32,
    op: i32,
    fd: i32,
    event: *mut epoll_event,
    socket: u32,
    nested: u32,
) -> Result<(), i32> {
    // Only a real epoll descriptor can hold interests.
    if find(epfd).is_none() {
        let mut none = epoll_event { events: 0, u64: 0 };
        // A descriptor that cannot be in the set: ENOENT says that epfd is an epoll descriptor.
        let probe = raw!(libc::SYS_epoll_ctl, epfd, libc::EPOLL_CTL_MOD, fd, &mut none as *mut epoll_event);
        if probe != -(libc::ENOENT as isize) && probe != 0 {
            return Err(-probe as i32);
        }
    }
    let wanted = if op == libc::EPOLL_CTL_DEL {
        epoll_event { events: 0, u64: 0 }
    } else if event.is_null() {
        return Err(libc::EFAULT);
    } else {
        // SAFETY: the caller's event, not null, read as the packed struct that it is.
        unsafe { event.read_unaligned() }
    };
    const EXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;
    const WITH_EXCLUSIVE: u32 =
        EXCLUSIVE | (EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLET | libc::EPOLLWAKEUP) as u32;
    if wanted.events & EXCLUSIVE != 0
        && (op == libc::EPOLL_CTL_MOD || wanted.events & !WITH_EXCLUSIVE != 0 || nested != NONE)
    {
        return Err(libc::EINVAL);
    }
    let e = instance_for(epfd);
    let mut inner = e.inner.lock();
    let first = inner.queue_set == NONE;
    inner.join(guest, epfd)?;
    if first
        && e.watched.load(Ordering::Relaxed) > 0
        && let Some(set) = guest.region.queue_set(inner.queue_set)
    {
        set.armed.store(1, Ordering::SeqCst);
    }
    let existing = inner.slot_of_fd(fd).filter(|&s| {
        let i = &inner.interests[s as usize];
        i.live && i.socket == socket && i.nested == nested
    });
    match op {
        libc::EPOLL_CTL_ADD => {
            if existing.is_some() {
                return Err(libc::EEXIST);
            }
            if nested != NONE
                && let Some(other) = by_index(nested)
            {
                if core::ptr::eq(other, e) {
                    return Err(libc::EINVAL);
                }
                // For the wake-up only; what is ready is looked at here.
                let mut real = epoll_event { events: (EPOLLIN | EPOLLET) as u32, u64: guest.magic };
                let r =
                    raw!(libc::SYS_epoll_ctl, epfd, libc::EPOLL_CTL_ADD, fd, &mut real as *mut epoll_event);
                if r < 0 {
                    return Err(-r as i32);
                }
                other.watched.fetch_add(1, Ordering::SeqCst);
                other.arm(guest);
            }
            let q = inner.queue_set;
            let slot = inner.add(fd, socket, nested, wanted);
            if let Some(entry) = guest.region.socket(socket) {
                watch(entry, q);
            }
            fence(Ordering::SeqCst);
            inner.queue_up(slot);
        }
        libc::EPOLL_CTL_MOD => {
            let slot = existing.ok_or(libc::ENOENT)?;
            if inner.interests[slot as usize].events & EXCLUSIVE != 0 {
                return Err(libc::EINVAL);
            }
            inner.interests[slot as usize].events = wanted.events;
            inner.interests[slot as usize].data = wanted.u64;
            inner.queue_up(slot);
        }
        libc::EPOLL_CTL_DEL => {
            let slot = existing.ok_or(libc::ENOENT)?;
            let q = inner.queue_set;
            inner.remove(slot);
            if socket != NONE {
                if inner.by_socket.get(socket as usize).copied().unwrap_or(0) == 0
                    && let Some(entry) = guest.region.socket(socket)
                {
                    unwatch(entry, q);
                }
            } else {
                let mut none = epoll_event { events: 0, u64: 0 };
                raw!(libc::SYS_epoll_ctl, epfd, libc::EPOLL_CTL_DEL, fd, &mut none as *mut epoll_event);
            }
            return Ok(());
        }
        _ => return Err(libc::EINVAL),
    }
    // Threads that went to sleep before there were guest sockets are in the kernel, uncounted.
    let wake = first
        || (e.sleepers.load(Ordering::SeqCst) > 0 || e.watched.load(Ordering::Relaxed) > 0) && {
            inner.arm_pairs();
            inner.look_at_pairs();
            inner.any_ready()
        };
    let doorbell = inner.doorbell;
    drop(inner);
    if wake {
        ring_bell(doorbell);
    }
    Ok(())
}

fn ring_bell(doorbell: i32) {
    let one = 1u64;
    raw!(libc::SYS_write, doorbell, &one as *const u64, 8);
}

fn empty_doorbell(doorbell: i32) {
    let mut count = 0u64;
    raw!(libc::SYS_read, doorbell, &mut count as *mut u64, 8);
}

impl Epoll {
    /// Asks the engine to ring when something comes.
    fn arm(&self, guest: &Guest) {
        let mut inner = self.inner.lock();
        inner.arm_pairs();
        if let Some(set) = guest.region.queue_set(inner.queue_set) {
            set.armed.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// Would `epoll_wait` on this instance return something now? `epfd`: its descriptor.
    pub fn has_ready(&self, epfd: i32) -> bool {
        let Some(guest) = guest::guest() else { return false };
        let mut inner = self.inner.lock();
        if inner.queue_set != NONE {
            if inner.join(guest, epfd).is_err() {
                return false;
            }
            if self.watched.load(Ordering::Relaxed) > 0
                && let Some(set) = guest.region.queue_set(inner.queue_set)
            {
                set.armed.store(1, Ordering::SeqCst);
                inner.arm_pairs();
            }
            inner.drain(guest);
            if inner.any_ready() {
                return true;
            }
            empty_doorbell(inner.doorbell);
        }
        let mut p = libc::pollfd { fd: epfd, events: libc::POLLIN, revents: 0 };
        raw!(libc::SYS_poll, &mut p as *mut libc::pollfd, 1, 0) == 1
    }

    /// Before somebody polls the real descriptor: true when there is nothing ready and the doorbell will ring.
    pub fn prepare_poll(&self, epfd: i32) -> bool {
        let Some(guest) = guest::guest() else { return true };
        self.arm(guest);
        !self.has_ready(epfd)
    }

    /// `epoll_pwait2(2)`; `timeout_ns` negative: for ever.
    pub fn wait(
        &self,
        epfd: i32,
        out: &mut [epoll_event],
        timeout_ns: i64,
        mask: *const libc::sigset_t,
    ) -> Result<usize, i32> {
        let Some(guest) = guest::guest() else { return Err(libc::EBADF) };
        let begin = sys::now_ns();
        // Who gave whole milliseconds may live in a sandbox that does not know epoll_pwait2.
        let unit = if timeout_ns % 1_000_000 == 0 { 1_000_000 } else { 1 };
        let left = || match timeout_ns {
            ..0 => -1,
            _ => (timeout_ns - (sys::now_ns() - begin) as i64).max(0).unsigned_abs().next_multiple_of(unit)
                as i64,
        };
        let mut polled = false;
        loop {
            if self.inner.lock().queue_set == NONE {
                let left = left();
                let n = self.kernel_events(guest, epfd, out, left, mask)?;
                if n == 0 && self.inner.lock().queue_set != NONE && left != 0 {
                    continue;
                }
                return Ok(n);
            }
            let mut count;
            let (q, kernel_due);
            {
                let mut inner = self.inner.lock();
                inner.join(guest, epfd)?;
                inner.drain(guest);
                let mut first = 0;
                if inner.kernel_turn {
                    inner.kernel_turn = false;
                    first = self.kernel_events(guest, epfd, out, 0, core::ptr::null())?;
                }
                count = first + inner.collect(&mut out[first..]);
                inner.kernel_turn = first == 0 && count == out.len() && inner.kernel > 0;
                if count > 0 {
                    self.pass_on(&mut inner);
                }
                q = inner.queue_set;
                let now = sys::now_ns();
                kernel_due =
                    inner.kernel > 0 && count < out.len() && now - inner.last_kernel_poll_ns > 50_000;
                if kernel_due {
                    inner.last_kernel_poll_ns = now;
                }
            }
            if count > 0 {
                if kernel_due {
                    count += self.kernel_events(guest, epfd, &mut out[count..], 0, core::ptr::null())?;
                }
                if polled {
                    queue::with_spin(guest, |s| s.waited(sys::now_ns() - begin));
                }
                return Ok(count);
            }
            let left = left();
            let (ring, set) = match (guest.region.receive(q), guest.region.queue_set(q)) {
                (Some(ring), Some(set)) => (ring, set),
                _ => return Err(libc::EBADF),
            };
            if left != 0 && !polled {
                polled = true;
                // The kernel's descriptors come first: polling must not delay them.
                let n = self.kernel_events(guest, epfd, out, 0, core::ptr::null())?;
                if n > 0 {
                    return Ok(n);
                }
                // Without the lock: a signal handler must not find it held by who it interrupted.
                let seen: Vec<Watch> = self.inner.lock().pairs.clone();
                let moved = || !ring.is_empty() || seen.iter().any(Watch::has_moved);
                if mask.is_null() && wait::spin(guest, moved) {
                    continue;
                }
            }
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            set.armed.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let missed = !ring.is_empty() || set.overflow.load(Ordering::SeqCst) != 0 || {
                let mut inner = self.inner.lock();
                inner.arm_pairs();
                inner.look_at_pairs();
                inner.any_ready()
            };
            let result = self.kernel_events(guest, epfd, out, if missed { 0 } else { left }, mask);
            // The doorbell has woken one thread; it stays armed for the others.
            let others = self.sleepers.fetch_sub(1, Ordering::SeqCst) > 1;
            if others {
                set.armed.store(1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
            } else if self.watched.load(Ordering::Relaxed) == 0 {
                set.armed.store(0, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                if self.sleepers.load(Ordering::SeqCst) > 0 {
                    // One more lay down meanwhile.
                    set.armed.store(1, Ordering::SeqCst);
                    ring_bell(self.inner.lock().doorbell);
                }
            }
            let n = match result {
                Ok(n) => n,
                Err(e) => {
                    if others {
                        ring_bell(self.inner.lock().doorbell);
                    }
                    return Err(e);
                }
            };
            queue::with_spin(guest, |s| s.waited(sys::now_ns() - begin));
            if n > 0 {
                let mut inner = self.inner.lock();
                inner.drain(guest);
                let n = n + inner.collect(&mut out[n..]);
                self.pass_on(&mut inner);
                return Ok(n);
            }
            let over = timeout_ns >= 0 && (sys::now_ns() - begin) as i64 >= timeout_ns;
            if over {
                let mut inner = self.inner.lock();
                inner.drain(guest);
                let n = inner.collect(out);
                self.pass_on(&mut inner);
                return Ok(n);
            }
        }
    }

    /// This thread goes with its events; what is still ready is another's, as ep_done_scan wakes it on Linux.
    fn pass_on(&self, inner: &mut Inner) {
        if self.sleepers.load(Ordering::SeqCst) > 0 && inner.any_ready() {
            ring_bell(inner.doorbell);
        }
    }

    /// Real events, without GuestLib's own.
    fn kernel_events(
        &self,
        guest: &Guest,
        epfd: i32,
        out: &mut [epoll_event],
        timeout_ns: i64,
        mask: *const libc::sigset_t,
    ) -> Result<usize, i32> {
        if out.is_empty() {
            return Ok(0);
        }
        let n = if timeout_ns <= 0 || timeout_ns % 1_000_000 == 0 {
            let ms = if timeout_ns < 0 { -1 } else { (timeout_ns / 1_000_000).min(i32::MAX as i64) as i32 };
            next!(epoll_pwait(epfd => i32, out.as_mut_ptr() => *mut epoll_event, out.len().min(1 << 16) as i32 => i32,
                ms => i32, mask => *const libc::sigset_t) -> i32)
        } else {
            let t =
                libc::timespec { tv_sec: timeout_ns / 1_000_000_000, tv_nsec: timeout_ns % 1_000_000_000 };
            let r = raw!(
                libc::SYS_epoll_pwait2,
                epfd,
                out.as_mut_ptr(),
                out.len().min(1 << 16),
                &t as *const libc::timespec,
                mask,
                8
            );
            if r < 0 {
                sys::set_errno(-r as i32);
                -1
            } else {
                r as i32
            }
        };
        if n < 0 {
            return Err(sys::errno());
        }
        let mut kept = 0;
        for i in 0..n as usize {
            let event = out[i];
            if { event.u64 } == guest.magic {
                if event.events & (EPOLLHUP | EPOLLERR | libc::EPOLLRDHUP) as u32 != 0 {
                    guest::engine_is_gone();
                }
                continue;
            }
            out[kept] = event;
            kept += 1;
        }
        if kept == 0 && n > 0 && timeout_ns == 0 {
            // Ours took the places of the program's; they are edge-triggered and gone now.
            return self.kernel_events(guest, epfd, out, 0, mask);
        }
        Ok(kept)
    }
}

/// For poll: the instance's view as a poll mask.
pub fn poll_mask(e: &Epoll, epfd: i32) -> i16 {
    if e.has_ready(epfd) { libc::POLLIN | libc::POLLRDNORM } else { 0 }
}
