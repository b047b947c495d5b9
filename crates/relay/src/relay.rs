//! The loop of a guest's relay, its table of sockets, and the calls that wait.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netkernel_agent::notify::{Listener, Notification};
use netkernel_agent::{Counters, Settings};
use netkernel_ring::spin::{Polling, Spin};
use netkernel_service::{Close, Errno, Handle, Readiness, Ready, Several, Stack, TcpSums, key, now_ns};
use netkernel_shm::fds;

use crate::asked::ask;
use crate::bulk::Pipes;
use crate::caller::Threads;
use crate::left::Left;
use crate::lost::LostAnswers;
use crate::socket::{RelaySocket, Socket, State};
use crate::succession::{Rules, Succession};
use crate::sys::{self, Poll};

/// Calls that are answered between two looks at the sockets.
const CALL_BATCH: usize = 32;
/// Reports of the stack in one turn.
const READY_BATCH: usize = 256;
/// Sockets that go on in one turn.
const RUN_BATCH: usize = 64;
/// Bytes that are read at once; also the most that waits in the relay in each direction of a connection.
pub(crate) const CHUNK: usize = 128 << 10;
/// Sockets of one guest.
const MAX_SOCKETS: usize = 1 << 16;
/// Sockets whose connection broke, that are asked about still.
const MAX_OVER: usize = 1024;
const SWEEP_NS: u64 = 1_000_000_000;
/// How long a closed socket may go on sending when the guest is over.
const LINGER_NS: u64 = 60_000_000_000;
/// The stack reports with this in place of the guest's slot.
const SLOT: u32 = 1;

// What epoll events are about; sockets have their generation in the upper half, which is never this large.
const LISTENER: u64 = u64::MAX;
const END: u64 = u64::MAX - 1;
pub(crate) const STACK: u64 = u64::MAX - 2;
const REQUEST: u64 = u64::MAX - 3;
/// Of an end; EPOLLOUT is added when it is full.
const INTEREST: i32 = libc::EPOLLIN | libc::EPOLLPRI | libc::EPOLLRDHUP | libc::EPOLLET;
/// Each switch between a program and its relay costs some microseconds; this much passes between two of them. The kernel
/// doubles it, for what it needs itself, and cuts it to `net.core.wmem_max`.
const STREAM_BUFFER: i32 = 416 << 10;
/// Of the program's end at first. It is filled when a connect does not wait.
pub(crate) const PROGRAM_BUFFER: i32 = 208 << 10;
/// A Unix socket takes no longer message than twice this, less 32: one byte more than UDP does.
const DATAGRAM_SEND_BUFFER: i32 = 32770;
/// Time between two looks at what the stack counted of a connection that carries something.
const LOOK_EVERY_NS: u64 = 1_000_000_000;
const MAX_GENERATION: u32 = u32::MAX >> 1;

/// What a relay is made of.
pub struct Start {
    /// For the log.
    pub guest: u32,
    pub listener: Listener,
    /// One end of a pair; the engine holds the other. When either end is closed, it is over.
    pub end: OwnedFd,
    pub settings: Settings,
    /// Name of its stack.
    pub stack: String,
    pub counters: Arc<Counters>,
    /// May bind to ports below 1024.
    pub privileged: bool,
    /// How long to poll before sleeping, at most. Nanoseconds.
    pub spin_ns: u64,
}

/// The way to a relay from other threads.
#[derive(Clone)]
pub struct Link {
    requests: Arc<Mutex<Requests>>,
    pub(crate) wake: Arc<OwnedFd>,
    pub(crate) succession: Arc<Succession>,
}

#[derive(Default)]
struct Requests {
    list: VecDeque<Request>,
    /// Nobody answers any more.
    over: bool,
}

/// To write everything down, and to stand still until the other end of the second channel is closed.
pub(crate) struct Stop {
    pub answer: Sender<Result<Left, String>>,
    pub go_on: Receiver<()>,
}

/// What other threads ask of a relay.
pub(crate) enum Request {
    Sockets(Sender<Vec<RelaySocket>>),
    /// Whether it listens.
    Here(Sender<()>),
    Stop(Stop),
}

impl Link {
    pub fn new() -> io::Result<Link> {
        Ok(Link { requests: Arc::default(), wake: Arc::new(fds::eventfd()?), succession: Arc::default() })
    }

    /// Asks for the sockets; nothing comes when the relay is over.
    pub fn sockets(&self) -> Receiver<Vec<RelaySocket>> {
        let (answer, receiver) = channel();
        self.ask(Request::Sockets(answer));
        receiver
    }

    /// Asks whether the relay listens; its guest may have stopped it.
    pub fn is_here(&self) -> Receiver<()> {
        let (answer, receiver) = channel();
        self.ask(Request::Here(answer));
        receiver
    }

    /// A relay that is over drops what it is asked.
    pub(crate) fn ask(&self, request: Request) {
        let mut requests = self.requests();
        if requests.over {
            return;
        }
        requests.list.push_back(request);
        let one = 1u64;
        // SAFETY: eight bytes, valid for reads; the eventfd is non-blocking.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// The relay's thread ends.
    pub fn over(&self) {
        *self.requests() = Requests { list: VecDeque::new(), over: true };
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a call comes to.
#[derive(Debug)]
pub(crate) enum Answer {
    Value(i64),
    /// The kernel makes the call, as if there were no filter.
    Through,
    /// Answered already.
    Done,
    /// When something happens on the socket, at the latest at this time (nanoseconds of CLOCK_MONOTONIC), which means
    /// that errno.
    Later(Option<u64>, Errno),
}

pub(crate) type Answered = Result<Answer, Errno>;

/// A call that is answered later.
pub(crate) struct Waiting {
    pub call: Notification,
    pub socket: u32,
    pub generation: u32,
    pub deadline_ns: u64,
    pub late: Errno,
}

pub struct Relay {
    pub(crate) start: Start,
    pub(crate) stack: Several<Box<dyn Stack>>,
    /// Of the stacks, by their places.
    pub(crate) rules: Vec<Rules>,
    pub(crate) link: Link,
    pub(crate) poll: Poll,
    events: Vec<(u64, i32)>,
    ready: Vec<Ready>,
    pub(crate) sockets: Vec<Option<Box<Socket>>>,
    pub(crate) free: Vec<u32>,
    pub(crate) generation: u32,
    pub(crate) ids: HashMap<u64, u32>,
    pub(crate) threads: Threads,
    /// By thread: a thread is in one call at a time.
    pub(crate) waiting: HashMap<u32, Waiting>,
    lost: LostAnswers,
    pub(crate) run: VecDeque<u32>,
    pub(crate) over: VecDeque<(u32, u32)>,
    pub(crate) scratch: Vec<u8>,
    pub(crate) pipes: Pipes,
    pub(crate) notes: HashMap<Vec<u8>, OwnedFd>,
    /// Nobody has the filter any more; since when.
    pub(crate) over_since_ns: Option<u64>,
    /// Somebody wants it to stand still.
    stops: VecDeque<Stop>,
    next_sweep_ns: u64,
    pub(crate) stack_wakes: bool,
    /// What went on last goes on when the program has run.
    pub(crate) program_next: bool,
    spin: Spin,
    highest: i32,
}

impl Relay {
    pub fn new(start: Start, stack: Box<dyn Stack>, link: Link) -> io::Result<Relay> {
        let poll = Poll::new()?;
        poll.add(start.listener.fd(), libc::EPOLLIN, LISTENER)?;
        poll.add(start.end.as_raw_fd(), libc::EPOLLRDHUP, END)?;
        poll.add(link.wake.as_raw_fd(), libc::EPOLLIN, REQUEST)?;
        let stack_wakes = match stack.wake_fd() {
            Some(fd) => {
                poll.add(fd, libc::EPOLLIN, STACK)?;
                true
            }
            None => false,
        };
        Ok(Relay {
            spin: Spin::new(start.spin_ns),
            rules: vec![Rules { name: start.stack.clone(), policy: start.settings.policy }],
            start,
            stack: Several::new(vec![Some(stack)]),
            link,
            poll,
            events: Vec::new(),
            ready: Vec::new(),
            sockets: Vec::new(),
            free: Vec::new(),
            generation: 0,
            ids: HashMap::new(),
            threads: Threads::default(),
            waiting: HashMap::new(),
            lost: LostAnswers::default(),
            run: VecDeque::new(),
            over: VecDeque::new(),
            scratch: vec![0; CHUNK],
            pipes: Pipes::default(),
            notes: HashMap::new(),
            over_since_ns: None,
            stops: VecDeque::new(),
            next_sweep_ns: 0,
            stack_wakes,
            program_next: false,
            highest: highest_descriptor(),
        })
    }

    /// Serves the guest until nobody has the filter any more and what was sent is on its way, or the engine ends it.
    pub fn run(mut self) {
        let counters = Arc::clone(&self.start.counters);
        let _clock = counters.cpu.of_this_thread();
        sys::give_way();
        loop {
            let worked = self.turn(0);
            if self.is_over() {
                return;
            }
            if worked || !self.run.is_empty() {
                continue;
            }
            if !self.wait() {
                return;
            }
        }
    }

    /// Polls for a while, then sleeps until something happens. False: it is over.
    fn wait(&mut self) -> bool {
        let begin = now_ns();
        self.housekeeping(begin);
        // It may need this core, and takes its time.
        let budget = if self.program_next { 0 } else { self.spin.budget_ns() };
        if budget > 0 {
            let mut polling = Polling::new(budget);
            let mut now = begin;
            loop {
                // The thread that we wait for may need this core.
                std::thread::yield_now();
                if self.turn(0) {
                    self.spin.waited(polling.spent_ns());
                    return !self.is_over();
                }
                let after = now_ns();
                if !polling.looked(after - now) {
                    break;
                }
                now = after;
            }
        }
        let timeout = self.timeout_ms();
        self.turn(timeout);
        self.spin.waited(now_ns() - begin);
        !self.is_over()
    }

    /// One look at everything, and what follows from it. True: something was done.
    fn turn(&mut self, timeout_ms: i32) -> bool {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let timeout_ms = if self.run.is_empty() { timeout_ms } else { 0 };
        self.poll.wait(timeout_ms, &mut events);
        let mut worked = !events.is_empty();
        let mut stack = !self.stack_wakes;
        for &(token, bits) in &events {
            match token {
                LISTENER if bits & libc::EPOLLIN != 0 => self.calls(),
                LISTENER => self.filter_is_gone(),
                END => {
                    self.over_since_ns = Some(0);
                    self.sockets.clear();
                }
                STACK => stack = true,
                REQUEST => {
                    self.requests();
                    self.succeed_all();
                }
                token => self.end_event(token, bits),
            }
        }
        self.events = events;
        // A stack with timers of its own may have something to tell without a descriptor that says so.
        if stack || self.stack.deadline_ns().is_some_and(|deadline| deadline <= now_ns()) {
            worked |= self.poll_stack();
        }
        while let Some(stop) = self.stops.pop_front() {
            self.stand_still(&stop);
        }
        self.program_next &= self.run.is_empty();
        for _ in 0..RUN_BATCH {
            let Some(id) = self.run.pop_front() else { break };
            worked = true;
            self.go_on(id);
        }
        worked
    }

    fn poll_stack(&mut self) -> bool {
        let mut ready = std::mem::take(&mut self.ready);
        ready.clear();
        self.stack.poll(&mut ready, READY_BATCH);
        for report in &ready {
            self.stack_event(report.key as u32, report.readiness);
        }
        let worked = !ready.is_empty();
        self.ready = ready;
        worked
    }

    fn stack_event(&mut self, id: u32, readiness: Readiness) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if readiness.has(Readiness::READ) || readiness.has(Readiness::END) || readiness.has(Readiness::ERROR)
        {
            socket.stack_readable = true;
        }
        if readiness.has(Readiness::URGENT) {
            (socket.stack_urgent, socket.stack_readable) = (true, true);
        }
        socket.stack_error |= readiness.has(Readiness::ERROR);
        if readiness.has(Readiness::WRITE) || readiness.has(Readiness::ERROR) {
            socket.stack_writable = true;
        }
        self.queue(id);
    }

    fn end_event(&mut self, token: u64, bits: i32) {
        let (generation, id) = ((token >> 32) as u32, token as u32);
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if socket.generation != generation {
            return;
        }
        if bits & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
            socket.end_readable = true;
        }
        if bits & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
            socket.end_ended = true;
        }
        if bits & libc::EPOLLPRI != 0 {
            (socket.end_urgent, socket.end_readable) = (true, true);
        }
        if bits & libc::EPOLLHUP != 0 {
            socket.end_hung_up = true;
        }
        if bits & libc::EPOLLOUT != 0 {
            socket.end_writable = true;
        }
        self.queue(id);
    }

    /// Sees what was closed until now: the ends hang up at once, and this thread may not have looked.
    pub(crate) fn settle(&mut self) {
        let mut events = Vec::new();
        self.poll.wait(0, &mut events);
        for (token, bits) in events {
            // The others are reported again.
            if token >> 32 <= u64::from(MAX_GENERATION) {
                self.end_event(token, bits);
            }
        }
        for i in 0..self.run.len() {
            let Some(&id) = self.run.get(i) else { break };
            let Some(Some(socket)) = self.sockets.get(id as usize) else { continue };
            if !socket.end_hung_up {
                continue;
            }
            if socket.is_stream() {
                self.pump(id);
            } else {
                self.pump_datagrams(id);
            }
        }
    }

    /// The socket goes on before the thread sleeps.
    pub(crate) fn queue(&mut self, id: u32) {
        if let Some(Some(socket)) = self.sockets.get_mut(id as usize)
            && !socket.queued
        {
            socket.queued = true;
            self.run.push_back(id);
        }
    }

    fn go_on(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        socket.queued = false;
        let (stream, generation) = (socket.is_stream(), socket.generation);
        if stream {
            self.pump(id);
        } else {
            self.pump_datagrams(id);
        }
        self.count(id);
        self.ask_for_room(id);
        self.retry(id, generation);
    }

    /// Adds what the socket carried to the guest's totals.
    pub(crate) fn count(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        let now = (socket.bytes_in, socket.bytes_out);
        let before = std::mem::replace(&mut socket.counted, now);
        if before != now {
            self.start.counters.bytes_in.fetch_add(now.0 - before.0, Relaxed);
            self.start.counters.bytes_out.fetch_add(now.1 - before.1, Relaxed);
            if socket.is_stream() && now_ns().saturating_sub(socket.tcp_at) > LOOK_EVERY_NS {
                self.look_at_tcp(id);
            }
        }
    }

    /// Counts what the stack knows of a connection.
    fn look_at_tcp(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if !socket.is_stream() || !matches!(socket.state, State::Connected | State::Over) {
            return;
        }
        socket.tcp_at = now_ns();
        if let Some(now) = self.stack.tcp_counts(socket.handle) {
            let mut sums = TcpSums::default();
            sums.note(&mut socket.tcp, now);
            self.start.counters.tcp.add([
                sums.connections,
                sums.segments,
                sums.retransmitted,
                sums.rtt_us,
                sums.rtt_samples,
            ]);
        }
    }

    /// Whoever reads makes room, and would wake this thread each time: that is asked for only when room is missing.
    pub(crate) fn ask_for_room(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        self.program_next |= !socket.end_writable;
        if socket.wants_room == socket.end_writable
            && let Some(end) = &socket.end
        {
            socket.wants_room = !socket.end_writable;
            let interest = if socket.wants_room { INTEREST | libc::EPOLLOUT } else { INTEREST };
            self.poll.change(end.as_raw_fd(), interest, token(socket.generation, id));
        }
    }

    // ---- calls

    fn calls(&mut self) {
        for i in 0..CALL_BATCH {
            if i > 0 && !self.start.listener.has_call() {
                return;
            }
            // An error: the thread that asked is dead, or was interrupted.
            let Ok(call) = self.start.listener.receive() else { continue };
            self.start.counters.remember(call.pid);
            // Whatever this thread waited for was interrupted.
            self.forget_waiting(call.pid);
            let answered = match self.lost.take(&call, now_ns()) {
                Some(answer) => answer.map(Answer::Value),
                None => self.dispatch(&call),
            };
            self.answer(&call, answered);
        }
    }

    fn answer(&mut self, call: &Notification, answered: Answered) {
        let listener = &self.start.listener;
        let (sent, answer) = match answered {
            Ok(Answer::Value(value)) => (listener.succeed(call, value), Ok(value)),
            Err(errno) => (listener.fail(call, errno.0), Err(errno)),
            Ok(Answer::Through) => {
                let _ = listener.let_through(call);
                return;
            }
            Ok(Answer::Done | Answer::Later(..)) => return,
        };
        if sent.is_err() {
            self.lost.keep(call, answer, now_ns());
        }
    }

    /// The call is made again when something happens on the socket.
    pub(crate) fn wait_for(&mut self, call: &Notification, id: u32, deadline_ns: Option<u64>, late: Errno) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        let generation = socket.generation;
        if !socket.waiters.contains(&call.pid) {
            socket.waiters.push(call.pid);
        }
        let deadline_ns = deadline_ns.unwrap_or(u64::MAX);
        let waiting = Waiting { call: *call, socket: id, generation, deadline_ns, late };
        self.waiting.insert(call.pid, waiting);
    }

    fn forget_waiting(&mut self, pid: u32) {
        if self.waiting.is_empty() {
            return;
        }
        if let Some(waiting) = self.waiting.remove(&pid)
            && let Some(Some(socket)) = self.sockets.get_mut(waiting.socket as usize)
        {
            socket.waiters.retain(|&waiter| waiter != pid);
        }
    }

    /// Makes the calls again that wait for this socket.
    pub(crate) fn retry(&mut self, id: u32, generation: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if socket.waiters.is_empty() || socket.generation != generation {
            return;
        }
        for pid in std::mem::take(&mut socket.waiters) {
            let Some(waiting) = self.waiting.remove(&pid) else { continue };
            if waiting.socket != id || waiting.generation != generation {
                self.waiting.insert(pid, waiting);
                continue;
            }
            // Interrupted meanwhile: what it would take is somebody else's.
            if !self.start.listener.is_valid(&waiting.call) {
                continue;
            }
            match self.again(&waiting.call, id) {
                Ok(Answer::Later(..)) => {
                    if let Some(Some(socket)) = self.sockets.get_mut(id as usize) {
                        socket.waiters.push(pid);
                        self.waiting.insert(pid, waiting);
                    }
                }
                answered => self.answer(&waiting.call, answered),
            }
        }
    }

    /// Fails the calls that wait for this socket.
    pub(crate) fn fail_waiting(&mut self, id: u32, errno: Errno) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        for pid in std::mem::take(&mut socket.waiters) {
            if let Some(waiting) = self.waiting.remove(&pid) {
                let _ = self.start.listener.fail(&waiting.call, errno.0);
            }
        }
    }

    // ---- the table

    /// A new socket of the stack, without an end. Errors: Linux's for a process without descriptors.
    pub(crate) fn open(&mut self, domain: i32, kind: i32, protocol: i32) -> Result<u32, Errno> {
        let id = self.vacancy()?;
        match self.stack.open(key(SLOT, id), domain, kind, protocol) {
            Ok(handle) => Ok(self.insert(id, handle, domain, kind)),
            Err(errno) => {
                self.free.push(id);
                Err(errno)
            }
        }
    }

    pub(crate) fn vacancy(&mut self) -> Result<u32, Errno> {
        if let Some(id) = self.free.pop() {
            return Ok(id);
        }
        if self.sockets.len() >= MAX_SOCKETS {
            return Err(Errno(libc::ENFILE));
        }
        self.sockets.push(None);
        Ok(self.sockets.len() as u32 - 1)
    }

    pub(crate) fn no_vacancy(&mut self, id: u32) {
        self.free.push(id);
    }

    pub(crate) fn insert(&mut self, id: u32, handle: Handle, domain: i32, kind: i32) -> u32 {
        self.generation = (self.generation + 1) & MAX_GENERATION;
        self.sockets[id as usize] = Some(Box::new(Socket::new(self.generation, handle, domain, kind)));
        id
    }

    /// The key that the stack tells this socket by.
    pub(crate) fn key(id: u32) -> u64 {
        key(SLOT, id)
    }

    /// Makes the pair of a socket; returns the program's end.
    pub(crate) fn pair(&mut self, id: u32, nonblocking: bool) -> Result<OwnedFd, Errno> {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(Errno(libc::EBADF)) };
        // Datagrams of a stream's kind: their ends hang up, SOCK_DGRAM's do not.
        let kind = if socket.is_stream() { libc::SOCK_STREAM } else { libc::SOCK_SEQPACKET };
        let flags = libc::SOCK_CLOEXEC | if nonblocking { libc::SOCK_NONBLOCK } else { 0 };
        let (end, theirs) = fds::pair(kind | flags).map_err(|_| Errno(libc::ENFILE))?;
        if end.as_raw_fd().max(theirs.as_raw_fd()) >= self.highest {
            return Err(Errno(libc::ENFILE));
        }
        // The two ends are open files of their own. Splice waits where the file does, whatever its flags say.
        sys::set_nonblocking(&end);
        if socket.is_stream() {
            // An urgent byte is never lost, and stops a read that comes to it.
            sys::set_int_option(&end, libc::SO_OOBINLINE, 1);
            sys::set_int_option(&end, libc::SO_SNDBUF, STREAM_BUFFER);
            sys::set_int_option(&theirs, libc::SO_SNDBUF, PROGRAM_BUFFER);
        } else {
            sys::set_int_option(&theirs, libc::SO_SNDBUF, DATAGRAM_SEND_BUFFER);
        }
        let generation = socket.generation;
        if !self.watch(&end, false, (generation, id)) {
            return Err(Errno(libc::ENOBUFS));
        }
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return Err(Errno(libc::EBADF)) };
        let inode = sys::inode(&theirs).ok_or(Errno(libc::ENOBUFS))?;
        socket.end = Some(end);
        socket.inode = inode;
        // An earlier one with this number is long closed.
        self.ids.insert(inode, id);
        Ok(theirs)
    }

    /// What happens at this end is reported from now on, and what is true already.
    pub(crate) fn watch(&self, end: &OwnedFd, room: bool, (generation, id): (u32, u32)) -> bool {
        let interest = if room { INTEREST | libc::EPOLLOUT } else { INTEREST };
        self.poll.add(end.as_raw_fd(), interest, token(generation, id)).is_ok()
    }

    /// Nothing is left of the socket but what the stack sends in the background.
    pub(crate) fn remove(&mut self, id: u32, how: Close) {
        self.fail_waiting(id, Errno(libc::EBADF));
        self.count(id);
        self.look_at_tcp(id);
        let Some(socket) = self.sockets.get_mut(id as usize).and_then(Option::take) else { return };
        for &(id, _) in &socket.returned {
            self.remove(id, Close::Abort);
        }
        self.stack.close(socket.handle, how);
        if self.ids.get(&socket.inode) == Some(&id) {
            self.ids.remove(&socket.inode);
        }
        self.free.push(id);
    }

    // ---- the rest

    fn requests(&mut self) {
        let mut value = 0u64;
        // SAFETY: eight bytes, valid for writes; the eventfd is non-blocking.
        unsafe { libc::read(self.link.wake.as_raw_fd(), (&raw mut value).cast(), 8) };
        let requests = std::mem::take(&mut self.link.requests().list);
        let mut list: Option<Vec<RelaySocket>> = None;
        for request in requests {
            match request {
                Request::Sockets(answer) => {
                    let (sockets, stack, rules) = (&mut self.sockets, &mut self.stack, &self.rules);
                    let describe = |socket: &mut Box<Socket>| describe(stack, rules, socket);
                    let all = || sockets.iter_mut().flatten().map(describe).collect();
                    let _ = answer.send(list.get_or_insert_with(all).clone());
                }
                Request::Here(answer) => _ = answer.send(()),
                // Not amid the events of a look.
                Request::Stop(stop) => self.stops.push_back(stop),
            }
        }
    }

    pub(crate) fn filter_is_gone(&mut self) {
        if self.over_since_ns.is_none() {
            self.over_since_ns = Some(now_ns());
            self.poll.remove(self.start.listener.fd());
            self.next_sweep_ns = 0;
        }
    }

    /// True when there is nobody to serve and nothing to send.
    fn is_over(&self) -> bool {
        let Some(since) = self.over_since_ns else { return false };
        self.sockets.iter().all(Option::is_none)
            || (since > 0 && now_ns() > since + LINGER_NS && self.no_ends())
    }

    fn no_ends(&self) -> bool {
        self.sockets.iter().flatten().all(|socket| socket.end.is_none() || socket.end_hung_up)
    }

    fn timeout_ms(&self) -> i32 {
        let mut until = u64::MAX;
        if !self.waiting.is_empty() {
            until = self.waiting.values().map(|w| w.deadline_ns).min().unwrap_or(u64::MAX);
            until = until.min(self.next_sweep_ns);
        }
        if !self.over.is_empty() || self.over_since_ns.is_some() || self.stack.stacks.len() > 1 {
            until = until.min(self.next_sweep_ns);
        }
        match self.stack.deadline_ns() {
            Some(deadline) => until = until.min(deadline),
            None if !self.stack_wakes && !self.ids.is_empty() => until = until.min(now_ns() + 1_000_000),
            None => {}
        }
        match until {
            u64::MAX => -1,
            until => until.saturating_sub(now_ns()).div_ceil(1_000_000).min(60_000) as i32,
        }
    }

    /// What has a time.
    fn housekeeping(&mut self, now: u64) {
        if !self.waiting.is_empty() {
            let late: Vec<u32> =
                self.waiting.iter().filter(|(_, w)| w.deadline_ns <= now).map(|(&pid, _)| pid).collect();
            for pid in late {
                if let Some(waiting) = self.waiting.get(&pid) {
                    let _ = self.start.listener.fail(&waiting.call, waiting.late.0);
                }
                self.forget_waiting(pid);
            }
        }
        if now < self.next_sweep_ns {
            return;
        }
        self.next_sweep_ns = now + SWEEP_NS;
        let listener = &self.start.listener;
        let gone: Vec<u32> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| !listener.is_valid(&waiting.call))
            .map(|(&pid, _)| pid)
            .collect();
        gone.into_iter().for_each(|pid| self.forget_waiting(pid));
        self.sweep_over();
        if self.stack.stacks.len() > 1 {
            self.leave_elders();
        }
    }

    /// The socket is answered for as long as somebody holds it.
    pub(crate) fn push_over(&mut self, id: u32, generation: u32) {
        if self.over.len() >= MAX_OVER
            && let Some((oldest, generation)) = self.over.pop_front()
            && matches!(self.sockets.get(oldest as usize), Some(Some(s)) if s.generation == generation)
        {
            self.remove(oldest, Close::Graceful);
        }
        self.over.push_back((id, generation));
    }

    /// Forgets broken sockets that their holders closed: a dead pair does not tell.
    fn sweep_over(&mut self) {
        for _ in 0..self.over.len() {
            let Some((id, generation)) = self.over.pop_front() else { break };
            let Some(Some(socket)) = self.sockets.get(id as usize) else { continue };
            if socket.generation != generation {
                continue;
            }
            let (pid, fd) = socket.holder;
            let held = self.over_since_ns.is_none() && sys::socket_of(pid, fd) == Some(socket.inode);
            if held {
                self.over.push_back((id, generation));
            } else {
                self.remove(id, Close::Graceful);
            }
        }
    }

    pub(crate) fn served(&self) {
        self.start.counters.served.fetch_add(1, Relaxed);
    }
}

fn token(generation: u32, id: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(id)
}

fn describe(stack: &mut dyn Stack, rules: &[Rules], socket: &mut Socket) -> RelaySocket {
    let kind = match socket.state {
        State::Listening => "listener",
        _ if socket.is_stream() => "stream",
        _ => "datagram",
    };
    let state = match socket.state {
        State::Fresh if socket.is_stream() => "open",
        State::Fresh => "open",
        State::Listening => "listening",
        State::Connecting { .. } => "connecting",
        State::Connected if socket.down_ended && socket.up_ended => "ending",
        State::Connected if socket.down_ended => "receiving ended",
        State::Connected if socket.up_ended => "sending ended",
        State::Connected => "connected",
        State::Over => "over",
    };
    let asked = ask(stack, socket.handle, kind);
    let (mut receive_queue, mut send_queue) = (asked.receive_queue, asked.send_queue);
    if kind != "listener" {
        // What stands in the program's end for it to read, the kernel does not tell in bytes.
        let written = socket.end.as_ref().map_or(0, sys::unread) as u32;
        receive_queue += socket.down.len() as u32;
        send_queue += socket.up.len() as u32 + written;
    }
    RelaySocket {
        stack: rules.get(socket.handle.place()).map(|rules| rules.name.clone()).unwrap_or_default(),
        inode: socket.inode,
        pid: socket.holder.0,
        fd: socket.holder.1,
        kind,
        state,
        local: stack.local_name(socket.handle).ok().filter(|name| name.port() != 0),
        peer: stack.peer_name(socket.handle).ok(),
        congestion_control: asked.congestion_control,
        bytes_in: socket.bytes_in,
        bytes_out: socket.bytes_out,
        way: stack.way(socket.handle),
        unread_bytes: socket.down.len() as u32,
        unsent_bytes: socket.up.len() as u32,
        receive_queue,
        send_queue,
        tcp: asked.tcp,
    }
}

/// Leaves a sixteenth of the table, at most 256 descriptors, for everything but sockets.
fn highest_descriptor() -> i32 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for writes.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    let limit = i32::try_from(limit.rlim_cur).unwrap_or(i32::MAX);
    limit - (limit / 16).min(256)
}
