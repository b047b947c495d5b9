//! Direct sockets of tenants with a cap: held to it, however long they have been there.
//!
//! A socket that was given to a program cannot be taken back, and its program's filter cannot be exchanged: what a running program makes,
//! too, stays the kernel's own. So their packets wait, on their way out of the host's stack, until the tenant's rates let them go: the
//! same buckets that its queued and relayed sockets share. What is sent stays in the socket's send buffer meanwhile. What is received
//! is slowed by its acknowledgements: each lets the peer send as much more as it acknowledges. Nothing is dropped.
//!
//! There is one thread, while there are tenants with a cap and guests with an agent. It looks at the sockets that there are, and sees
//! the first packet of each connection that is made. ADR 6 has the reasons, and what was tried.

mod line;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netkernel_agent::ledger::cookie;
use netkernel_agent::{Ahead, Known, Ledger, Processes, Sockets, memory};
use netkernel_hold::{Flow, Hold, Packet};
use netkernel_service::{UNLIMITED, now_ns};
use netkernel_shm::fds;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::direct::{self, Direct, Namespace, namespace_of};
use crate::engine::{Registered, Shared, lock};
use crate::tenants::{Caps, Tenant};
use line::Line;

/// Between two looks at which sockets there are, at least; and this many times as long as a look takes.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_SHARE: u32 = 20;
/// In the process of an NSM, which nobody tells: between two looks at whether there is a cap.
const REST: Duration = Duration::from_millis(200);
/// Packets that are released together, at least. Buckets hold more.
const PIECE_NS: u64 = 500_000;
const BATCH: usize = 512;
/// What all peers of a tenant may send ahead together: as much as the rate is for as long. It is well below the least time after which
/// TCP sends again what is not acknowledged (200 ms), which many connections with windows of their own would not be. No connection's window is
/// less than so many of its segments, which on loopback are of 64 KiB.
const AHEAD_MS: u64 = 50;
const LEAST_SEGMENTS: u64 = 2;
const MOST_AHEAD: u64 = 16 << 20;
/// In the low bits of a window that was set here: the next program knows it by that.
const OWN_BITS: u32 = 0xfff;
const OWN: u32 = 0x4b3;
/// How often the process of a connection is looked for that is not there, or may not be looked at.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The thread, and what it does.
#[derive(Default)]
pub(crate) struct Held(Mutex<State>);

#[derive(Default)]
struct State {
    wake: Option<Arc<OwnedFd>>,
    thread: Option<JoinHandle<()>>,
    /// It is to end, and none begins.
    stopped: bool,
    /// Of guests whose tenants have a cap: why their sockets are not held to it, if so.
    guests: HashMap<u32, Option<String>>,
}

impl Held {
    /// To be called when a tenant has, or has no more, a cap, or a guest an agent.
    pub fn look(&self, shared: &Arc<Shared>) {
        let mut state = lock(&self.0);
        if let Some(wake) = &state.wake {
            signal(wake);
            return;
        }
        if state.stopped || !is_needed(shared) {
            return;
        }
        let started = fds::eventfd().and_then(|wake| {
            let (wake, weak) = (Arc::new(wake), Arc::downgrade(shared));
            let own = Arc::clone(&wake);
            let thread =
                std::thread::Builder::new().name("nk-held".into()).spawn(move || run(&weak, &own))?;
            Ok((wake, thread))
        });
        match started {
            Ok((wake, thread)) => (state.wake, state.thread) = (Some(wake), Some(thread)),
            Err(error) => log::error!("direct sockets are not held to their tenants' rates: {error}"),
        }
    }

    /// Lets all go that waits. Nothing is held before [`Held::go_on`].
    pub fn stop(&self) {
        let thread = {
            let mut state = lock(&self.0);
            state.stopped = true;
            state.wake.iter().for_each(|wake| signal(wake));
            state.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    pub fn go_on(&self, shared: &Arc<Shared>) {
        lock(&self.0).stopped = false;
        self.look(shared);
    }

    /// How a guest's direct sockets are held; `None`: they need not be.
    pub fn says(&self, guest: u32) -> Option<String> {
        Some(match lock(&self.0).guests.get(&guest)? {
            None => "held to the tenant's rates: its packets wait in the kernel".into(),
            Some(reason) => format!("not held to the tenant's rates: {reason}"),
        })
    }
}

/// An engine that stands still. It goes on when this is dropped.
pub(crate) struct Stopped<'a>(&'a Arc<Shared>);

impl<'a> Stopped<'a> {
    pub fn new(shared: &'a Arc<Shared>) -> Stopped<'a> {
        shared.held.stop();
        Stopped(shared)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.held.go_on(self.0);
    }
}

fn signal(wake: &OwnedFd) {
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

/// A guest with direct sockets whose tenant has a cap.
struct Capped {
    tenant: Arc<Tenant>,
    caps: Caps,
    nsms: Vec<usize>,
    pid: i32,
    direct: Direct,
}

fn capped(shared: &Shared) -> HashMap<u32, Capped> {
    let registry = lock(&shared.registry);
    let of = |(id, guest): (&u32, &Registered)| {
        let direct = guest.direct.clone().filter(|direct| direct.relay.is_none())?;
        let (tenant, caps) = (Arc::clone(&guest.tenant), guest.tenant.caps()?);
        Some((*id, Capped { tenant, caps, nsms: guest.agent_nsms(), pid: guest.pid, direct }))
    };
    registry.guests.iter().filter_map(of).collect()
}

/// Whether the thread has, or may have without being told, something to do.
fn is_needed(shared: &Shared) -> bool {
    let has_direct = || {
        let registry = lock(&shared.registry);
        let of = |guest: &Registered| guest.direct.as_ref().is_some_and(|direct| direct.relay.is_none());
        registry.guests.values().any(of)
    };
    shared.is_process() && has_direct() || !capped(shared).is_empty()
}

/// This thread is never behind others: it does little, and everybody waits for it. Rates that it is late for are lost. Fails without
/// CAP_SYS_NICE, and then it is as others are.
fn go_first() {
    const FIRST: libc::c_int = -20;
    let mut own = libc::sched_param { sched_priority: 0 };
    // SAFETY: takes integers, and a valid structure that outlives the call. 0 is the calling thread.
    unsafe {
        match libc::sched_getscheduler(0) {
            // Of an engine that is scheduled in real time.
            policy @ (libc::SCHED_RR | libc::SCHED_FIFO) if libc::sched_getparam(0, &mut own) == 0 => {
                own.sched_priority += 1;
                libc::sched_setscheduler(0, policy, &own);
            }
            _ => _ = libc::setpriority(libc::PRIO_PROCESS, 0, FIRST),
        }
    }
}

fn run(shared: &Weak<Shared>, wake: &OwnedFd) {
    go_first();
    let mut spaces: HashMap<Namespace, Space> = HashMap::new();
    let mut failed: HashMap<Namespace, String> = HashMap::new();
    let (mut guests, mut caps) = (HashMap::new(), HashMap::new());
    let mut next_look = Instant::now();
    loop {
        let now = Instant::now();
        if now >= next_look {
            let Some(shared) = shared.upgrade() else { break };
            guests = capped(&shared);
            caps = guests.values().map(|guest| (guest.tenant.index(), guest.caps.clone())).collect();
            let is_over = |state: &State| state.stopped || !is_needed(&shared);
            if is_over(&lock(&shared.held.0)) {
                // Before another thread may begin to set what is restored here.
                spaces.drain().for_each(|(_, mut space)| space.end());
                let mut state = lock(&shared.held.0);
                if is_over(&state) {
                    (state.wake, state.guests) = (None, HashMap::new());
                    return;
                }
            }
            look(&shared, &guests, &mut spaces, &mut failed);
            let pause = if guests.is_empty() { REST } else { LOOK.max(now.elapsed() * LOOK_SHARE) };
            next_look = now + pause;
        }
        let mut again: Option<u64> = None;
        for space in spaces.values_mut() {
            space.receive(shared, &guests);
            again = again.into_iter().chain(space.go(&caps)).min();
        }
        let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(wake, PollFlags::IN)];
        polled
            .extend(spaces.values().map(|space| PollFd::from_borrowed_fd(space.hold.as_fd(), PollFlags::IN)));
        let mut until = next_look.saturating_duration_since(Instant::now());
        if let Some(at) = again {
            until = until.min(Duration::from_nanos(at.saturating_sub(now_ns()).max(PIECE_NS)));
        }
        let until = Timespec { tv_sec: until.as_secs() as i64, tv_nsec: until.subsec_nanos().into() };
        if poll(&mut polled, Some(&until)).is_ok() && !polled[0].revents().is_empty() {
            let _ = rustix::io::read(wake, &mut [0; 8]);
            next_look = Instant::now();
        }
    }
    spaces.values_mut().for_each(Space::end);
}

fn look(
    shared: &Arc<Shared>,
    guests: &HashMap<u32, Capped>,
    spaces: &mut HashMap<Namespace, Space>,
    failed: &mut HashMap<Namespace, String>,
) {
    let mut states: HashMap<u32, Option<String>> = HashMap::new();
    let nsms: BTreeSet<usize> = guests.values().flat_map(|guest| guest.nsms.iter().copied()).collect();
    for nsm in nsms {
        let config = &shared.config.nsms[nsm];
        let Some(Ok(maker)) = shared.config.kinds.direct(config) else { continue };
        let namespace = namespace_of(&*maker);
        let whose = guests.iter().filter(|(_, guest)| guest.nsms.contains(&nsm)).map(|(id, _)| *id);
        if !spaces.contains_key(&namespace) && !failed.contains_key(&namespace) {
            match Space::open(&config.name, maker) {
                Ok(space) => _ = spaces.insert(namespace, space),
                Err(error) => {
                    let stack = &config.name;
                    log::warn!(
                        nsm:% = stack;
                        "stack {stack}: direct sockets are not held to their tenants' rates, which needs CAP_NET_ADMIN and a kernel with nfnetlink_queue: {error}"
                    );
                    failed.insert(namespace, error.to_string());
                }
            }
        }
        for guest in whose {
            let state = states.entry(guest).or_default();
            *state = state.take().or_else(|| failed.get(&namespace).cloned());
        }
    }
    // Of a process that goes on looking. What fails now may do later: when there is a cap again.
    if guests.is_empty() {
        failed.clear();
        spaces.drain().for_each(|(_, mut space)| space.end());
    }
    let mut processes = None;
    for (namespace, space) in spaces.iter_mut() {
        space.look(shared, *namespace, guests, &mut processes);
    }
    lock(&shared.held.0).guests = states;
}

/// The sockets of one network namespace.
struct Space {
    /// One of the stacks that give sockets there.
    nsm: String,
    maker: Box<dyn Sockets>,
    ledger: Option<Arc<Ledger>>,
    hold: Hold,
    line: Line,
    /// Of which guest they are: by both names, and by their own name, of what listens or is not connected.
    exact: HashMap<Flow, u32>,
    open: HashMap<(u8, u16), Vec<(IpAddr, u32)>>,
    ports: BTreeSet<(u8, u16)>,
    /// Connections with a window that was set here, by cookie.
    windows: HashMap<u64, Window>,
    /// What they had received at the last look.
    received: HashMap<u64, u64>,
    tried: Option<Instant>,
    /// Of which guest sockets are that nobody here gave away, by inode, and as of when.
    adopted: HashMap<u64, u32>,
    adopted_at: Option<Instant>,
    /// Where the holders of windows are looked for.
    programs: HashMap<u32, (Direct, i32)>,
}

/// A window that was set here.
#[derive(Clone, Copy)]
struct Window {
    guest: u32,
    inode: u64,
    before: Ahead,
    now: u32,
}

impl Space {
    fn open(nsm: &str, maker: Box<dyn Sockets>) -> io::Result<Space> {
        let mut opened = Err(io::ErrorKind::NotFound.into());
        maker.within(&mut || opened = Hold::open());
        Ok(Space {
            nsm: nsm.to_owned(),
            hold: opened?,
            maker,
            ledger: None,
            line: Line::default(),
            exact: HashMap::new(),
            open: HashMap::new(),
            ports: BTreeSet::new(),
            windows: HashMap::new(),
            received: HashMap::new(),
            tried: None,
            adopted: HashMap::new(),
            adopted_at: None,
            programs: HashMap::new(),
        })
    }

    /// Which sockets there are, and whose. `processes`: of this host, looked at when they are needed.
    fn look(
        &mut self,
        shared: &Shared,
        namespace: Namespace,
        guests: &HashMap<u32, Capped>,
        processes: &mut Option<Processes>,
    ) {
        if self.ledger.is_none() {
            // Of the process of an NSM: opened with the first socket that it gives away.
            self.ledger = shared
                .ledgers
                .at(namespace)
                .or_else(|| shared.is_process().then(|| shared.ledgers.of(&self.nsm, &*self.maker))?);
        }
        let Some(ledger) = self.ledger.clone() else { return };
        self.adopt(shared, guests, processes);
        let handed = shared.ledgers.handed();
        let adopted = &self.adopted;
        let besides =
            |cookie: u64, inode: u64| handed.guest_of(cookie).or_else(|| adopted.get(&inode).copied());
        let mut known = Err(io::ErrorKind::NotFound.into());
        self.maker.within(&mut || known = ledger.known(besides));
        let known = match known {
            Ok(known) => known,
            Err(error) => {
                log::debug!("the kernel's list of sockets: {error}");
                return;
            }
        };
        let known: Vec<Known> =
            known.into_iter().filter(|socket| guests.contains_key(&socket.guest)).collect();
        self.exact.clear();
        self.open.clear();
        self.ports.clear();
        for socket in known.iter().filter(|socket| socket.local.port() != 0) {
            let local = canonical(socket.local);
            self.ports.insert((socket.protocol, local.port()));
            match socket.peer.map(canonical) {
                Some(peer) => {
                    let flow = Flow { protocol: socket.protocol, local, peer };
                    self.exact.insert(flow, socket.guest);
                }
                None => {
                    let open = self.open.entry((socket.protocol, local.port())).or_default();
                    open.push((local.ip(), socket.guest));
                }
            }
        }
        self.watch();
        let (exact, open) = (&self.exact, &self.open);
        self.line
            .keep(|flow| exact.contains_key(flow) || open.contains_key(&(flow.protocol, flow.local.port())));
        self.set_windows(&known, guests, processes);
    }

    /// The process of an NSM does not know what the one before it gave away: it is what its guests' programs have.
    fn adopt(&mut self, shared: &Shared, guests: &HashMap<u32, Capped>, processes: &mut Option<Processes>) {
        if !shared.is_process() || self.adopted_at.is_some_and(|at| at.elapsed() < TRY_AGAIN) {
            return;
        }
        self.adopted_at = Some(Instant::now());
        let processes = processes.get_or_insert_with(Processes::look);
        let of = |(id, guest): (&u32, &Capped)| {
            let inodes = direct::census(&guest.direct, guest.pid, processes).inodes();
            inodes.into_keys().map(|inode| (inode, *id)).collect::<Vec<_>>()
        };
        self.adopted = guests.iter().flat_map(of).collect();
    }

    fn watch(&mut self) {
        if let Err(error) = self.hold.watch(&self.ports) {
            log::warn!("direct sockets are not held to their tenants' rates: {error}");
        }
    }

    /// What a peer may send ahead is bounded, as long as its rate is: what waits to be acknowledged was received already.
    fn set_windows(
        &mut self,
        known: &[Known],
        guests: &HashMap<u32, Capped>,
        processes: &mut Option<Processes>,
    ) {
        let is_connection =
            |socket: &&Known| i32::from(socket.protocol) == libc::IPPROTO_TCP && socket.peer.is_some();
        let rate = |guest: u32| {
            guests.get(&guest).map(|guest| guest.caps.receive_rate).filter(|&rate| rate != UNLIMITED)
        };
        let connections: Vec<Known> = known.iter().filter(is_connection).copied().collect();
        // By tenant: connections on which something came since the last look.
        let mut busy: HashMap<usize, u64> = HashMap::new();
        for socket in &connections {
            let before = self.received.insert(socket.cookie, socket.bytes_in);
            if let Some(guest) = guests.get(&socket.guest)
                && before != Some(socket.bytes_in)
            {
                *busy.entry(guest.tenant.index()).or_default() += 1;
            }
        }
        let there: HashSet<u64> = connections.iter().map(|socket| socket.cookie).collect();
        self.received.retain(|cookie, _| there.contains(cookie));
        let wanted = |socket: &Known| {
            let tenant = guests.get(&socket.guest)?.tenant.index();
            let among = busy.get(&tenant).copied().unwrap_or(1);
            Some(ahead(rate(socket.guest)?, among, socket.segment_bytes))
        };
        // Those of guests without a cap are not known any more.
        let lifted = self.windows.values().any(|window| rate(window.guest).is_none());
        let is_late = self.tried.is_none_or(|tried| tried.elapsed() > TRY_AGAIN);
        let change_of = |socket: &Known| {
            let want = wanted(socket)?;
            // Each change is a look at what processes hold: not for little.
            let is_near = |now: u32| now / 2 <= want && want / 2 <= now;
            let now = self.windows.get(&socket.cookie).map(|window| window.now);
            now.is_none_or(|now| !is_near(now)).then_some(want)
        };
        let changes: Vec<(Known, u32)> =
            connections.iter().filter_map(|socket| Some((*socket, change_of(socket)?))).collect();
        if !lifted && (changes.is_empty() || !is_late) {
            return;
        }
        self.tried = Some(Instant::now());
        for (id, guest) in guests {
            self.programs.insert(*id, (guest.direct.clone(), guest.pid));
        }
        let holders = self.holders(processes.get_or_insert_with(Processes::look));
        let mut all = true;
        for (socket, want) in changes {
            let (cookie, guest, inode) = (socket.cookie, socket.guest, socket.inode);
            let before = self.windows.get(&cookie).map(|window| window.before);
            match change(holders.get(&inode).copied(), cookie, want, before) {
                Some(before) => {
                    self.windows.insert(cookie, Window { guest, inode, before, now: want });
                }
                None => all = false,
            }
        }
        if all {
            self.tried = None;
        }
        self.windows.retain(|cookie, window| {
            let is_capped = rate(window.guest).is_some();
            if !is_capped {
                restore(holders.get(&window.inode).copied(), *cookie, window.before);
            }
            is_capped && there.contains(cookie)
        });
        self.programs.retain(|guest, _| guests.contains_key(guest));
    }

    /// By inode: a process that has the socket, and as which descriptor.
    fn holders(&self, processes: &Processes) -> BTreeMap<u64, (u32, u32)> {
        let of = |(direct, pid): &(Direct, i32)| direct::census(direct, *pid, processes).inodes();
        self.programs.values().flat_map(of).collect()
    }

    /// Takes what waits in the kernel's queue into the line.
    fn receive(&mut self, shared: &Weak<Shared>, guests: &HashMap<u32, Capped>) {
        let mut packets = Vec::new();
        self.hold.receive(BATCH, |packet| packets.push(packet));
        for packet in packets {
            let whose = self.guest_of(&packet).or_else(|| self.begun(shared, guests, &packet));
            match whose.and_then(|guest| guests.get(&guest)) {
                Some(guest) => self.line.add(packet, guest.tenant.index()),
                None => self.hold.release(packet.id),
            }
        }
    }

    fn guest_of(&self, packet: &Packet) -> Option<u32> {
        let flow = &packet.flow;
        self.exact.get(flow).copied().or_else(|| {
            let open = self.open.get(&(flow.protocol, flow.local.port()))?;
            let is_it = |ip: &IpAddr| ip.is_unspecified() || *ip == flow.local.ip();
            open.iter().find(|(ip, _)| is_it(ip)).map(|(_, guest)| *guest)
        })
    }

    /// The first packet of a connection, of which nothing was known: its next ones come here, too.
    fn begun(
        &mut self,
        shared: &Weak<Shared>,
        guests: &HashMap<u32, Capped>,
        packet: &Packet,
    ) -> Option<u32> {
        let (shared, ledger) = (shared.upgrade()?, self.ledger.clone()?);
        if !packet.begins {
            return None;
        }
        let Flow { protocol, local, peer } = packet.flow;
        let mut owner = None;
        let handed = shared.ledgers.handed();
        self.maker.within(&mut || owner = ledger.owner(local, peer, |cookie, _| handed.guest_of(cookie)));
        let owner = owner.filter(|owner| guests.contains_key(owner))?;
        self.exact.insert(packet.flow, owner);
        if self.ports.insert((protocol, local.port())) {
            self.watch();
        }
        Some(owner)
    }

    fn go(&mut self, caps: &HashMap<usize, Caps>) -> Option<u64> {
        let hold = &mut self.hold;
        let again = self.line.go(now_ns(), |tenant| caps.get(&tenant).cloned(), |id| hold.release(id));
        self.hold.flush();
        again
    }

    /// Everything goes as if it had never been held.
    fn end(&mut self) {
        self.ports.clear();
        self.watch();
        let hold = &mut self.hold;
        self.line.go(0, |_| None, |id| hold.release(id));
        let mut more = true;
        while more {
            let mut packets = Vec::new();
            self.hold.receive(BATCH, |packet| packets.push(packet.id));
            more = !packets.is_empty();
            packets.into_iter().for_each(|id| self.hold.release(id));
            self.hold.flush();
        }
        if !self.windows.is_empty() {
            let holders = self.holders(&Processes::look());
            for (cookie, window) in self.windows.drain() {
                restore(holders.get(&window.inode).copied(), cookie, window.before);
            }
        }
    }
}

/// What a peer may send ahead, of so many that share the rate.
fn ahead(rate: u64, among: u64, segment_bytes: u32) -> u32 {
    let least = LEAST_SEGMENTS * u64::from(segment_bytes).max(1500);
    let bytes = (rate / 1000).saturating_mul(AHEAD_MS) / among.max(1);
    bytes.clamp(least, MOST_AHEAD) as u32 & !OWN_BITS | OWN
}

/// Bounds a window, through a duplicate that lives as long as this, unless it is smaller already: a program's own is its own. Returns
/// what it was before anybody bounded it here, which may be known; `None`: the connection cannot be reached.
fn change(holder: Option<(u32, u32)>, its: u64, want: u32, known: Option<Ahead>) -> Option<Ahead> {
    let socket = reach(holder, its)?;
    let now = Ahead::of(&socket).ok()?;
    // Of a program of this engine before this one.
    let before = known.unwrap_or(if now.window & OWN_BITS == OWN { Ahead::open() } else { now });
    if before.window > want {
        before.bounded(want).apply(&socket).ok()?;
    }
    Some(before)
}

fn restore(holder: Option<(u32, u32)>, its: u64, before: Ahead) {
    if let Some(socket) = reach(holder, its) {
        let _ = before.apply(&socket);
    }
}

fn reach(holder: Option<(u32, u32)>, its: u64) -> Option<OwnedFd> {
    let (pid, fd) = holder?;
    memory::duplicate(pid, fd as i32).filter(|socket| cookie(socket) == Some(its))
}

/// An IPv4 address is one, also in a socket of IPv6.
fn canonical(name: SocketAddr) -> SocketAddr {
    SocketAddr::new(name.ip().to_canonical(), name.port())
}
