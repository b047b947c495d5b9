//! Guests with an agent: sockets that are the kernel's own, given to programs.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};

use netkernel_agent::ledger::{Books, Moved, cookie};
use netkernel_agent::notify::Listener;
use netkernel_agent::{
    Agent, ByGuest, Carried, Census, Counters, DirectSocket, Exchange, Ledger, Offer, Processes, Settings,
    Sockets,
};
use netkernel_shm::fds;

use crate::NsmConfig;
use crate::direct_capture::Shown;
use crate::engine::{Shared, lock};
use crate::relay;
use crate::status::SocketStatus;

/// What is known of a guest's agent.
#[derive(Clone)]
pub(crate) struct Direct {
    pub counters: Arc<Counters>,
    /// There is a preloaded library, which serves what it sees; the agent has the rest.
    pub behind_preload: bool,
    /// The sockets that it gives are relayed; `None`: they are the kernel's.
    pub relay: Option<netkernel_relay::Link>,
    /// Who looks on at the relay's own stacks, for captures.
    pub taps: Vec<netkernel_capture::Taps>,
    /// Where it is told to give sockets of another stack.
    pub exchange: Arc<Exchange>,
}

/// A network namespace, by device and inode.
pub(crate) type Namespace = (u64, u64);

/// What direct sockets carried: a ledger for each network namespace in which some were ever given away.
#[derive(Debug, Default)]
pub(crate) struct Ledgers(Mutex<HashMap<Namespace, Kept>>, Handed);

/// Sockets that were taken out of a stack and given to programs, by cookie: of which guest and stack they are. What they carry is
/// not counted.
#[derive(Debug, Default)]
pub(crate) struct Handed(Mutex<HashMap<u64, (u32, String)>>);

/// No more of them are remembered.
const MAX_HANDED: usize = 65_536;

impl Handed {
    pub fn add(&self, socket: &OwnedFd, guest: u32, nsm: &str) {
        let mut all = lock(&self.0);
        if all.len() < MAX_HANDED
            && let Some(cookie) = cookie(socket)
        {
            all.insert(cookie, (guest, nsm.to_owned()));
        }
    }

    pub fn guest_of(&self, cookie: u64) -> Option<u32> {
        lock(&self.0).get(&cookie).map(|(of, _)| *of)
    }

    fn stack_of(&self, guest: u32, cookie: u64) -> Option<String> {
        lock(&self.0).get(&cookie).filter(|(of, _)| *of == guest).map(|(_, nsm)| nsm.clone())
    }
}

#[derive(Debug)]
struct Kept {
    /// Names of stacks that are in the namespace.
    nsms: Vec<String>,
    ledger: Option<Arc<Ledger>>,
}

pub(crate) fn namespace_of(sockets: &dyn Sockets) -> Namespace {
    let mut found = (0, 0);
    sockets.within(&mut || {
        if let Ok(file) = std::fs::metadata("/proc/thread-self/ns/net") {
            found = (file.dev(), file.ino());
        }
    });
    found
}

impl Ledgers {
    pub fn of(&self, nsm: &str, sockets: &dyn Sockets) -> Option<Arc<Ledger>> {
        let namespace = namespace_of(sockets);
        let mut all = lock(&self.0);
        let kept = all.entry(namespace).or_insert_with(|| {
            let mut opened = None;
            sockets.within(&mut || opened = Some(Ledger::open()));
            let ledger = match opened {
                Some(Ok(ledger)) => Some(Arc::new(ledger)),
                other => {
                    log::warn!(nsm:%; "{nsm}: what direct sockets carry is not counted: {other:?}");
                    None
                }
            };
            Kept { nsms: Vec::new(), ledger }
        });
        if !kept.nsms.iter().any(|name| name == nsm) {
            kept.nsms.push(nsm.to_owned());
        }
        kept.ledger.clone()
    }

    pub fn handed(&self) -> &Handed {
        &self.1
    }

    /// Those that there are, each with the stacks that gave sockets there.
    pub fn all(&self) -> Vec<(Vec<String>, Arc<Ledger>)> {
        let all = lock(&self.0);
        all.values().filter_map(|kept| Some((kept.nsms.clone(), kept.ledger.clone()?))).collect()
    }

    /// Goes on with what a program before this one knew of the sockets of these stacks.
    pub fn resume(&self, nsms: Vec<String>, sockets: &dyn Sockets, books: Books, netlink: OwnedFd) {
        let namespace = namespace_of(sockets);
        let mut left = Some((books, netlink));
        sockets.within(&mut || {
            let resumed = left.take().map(|(books, netlink)| Ledger::resume(books, netlink));
            match resumed {
                Some(Ok(ledger)) => {
                    let kept = Kept { nsms: nsms.clone(), ledger: Some(Arc::new(ledger)) };
                    lock(&self.0).insert(namespace, kept);
                }
                other => {
                    let nsm = nsms.join(", ");
                    log::error!(nsm:%; "{nsm}: what direct sockets carried is not counted any more: {other:?}");
                }
            }
        });
    }

    fn existing(&self, sockets: &dyn Sockets) -> Option<Arc<Ledger>> {
        self.at(namespace_of(sockets))
    }

    pub fn at(&self, namespace: Namespace) -> Option<Arc<Ledger>> {
        lock(&self.0).get(&namespace)?.ledger.clone()
    }
}

/// Does `work` with each ledger, in its namespace.
fn with_ledgers(shared: &Shared, mut work: impl FnMut(&Ledger)) {
    for (nsms, ledger) in shared.ledgers.all() {
        let known = shared.config.nsms.iter().filter(|nsm| nsms.contains(&nsm.name));
        let maker = known.filter_map(|nsm| shared.config.kinds.direct(nsm)?.ok()).next();
        if let Some(maker) = maker {
            maker.within(&mut || work(&ledger));
        }
    }
}

/// What the direct sockets of each guest carried, closed ones included.
pub(crate) fn carried(shared: &Shared) -> ByGuest {
    let mut all = ByGuest::new();
    with_ledgers(shared, |ledger| {
        for (guest, carried) in ledger.carried() {
            let sums = all.entry(guest).or_default();
            carried.into_iter().for_each(|(nsm, carried)| sums.entry(nsm).or_default().add(carried));
        }
    });
    all
}

/// What the process of an NSM knew of a guest's direct sockets, when it gave the guest away: it is counted here from now on.
pub(crate) fn adopt_books(shared: &Shared, guest: u32, nsm: usize, moved: Moved) {
    let nsm = &shared.config.nsms[nsm];
    let Some(Ok(sockets)) = shared.config.kinds.direct(nsm) else { return };
    if let Some(ledger) = shared.ledgers.of(&nsm.name, &*sockets) {
        ledger.adopt(guest, &nsm.name, moved);
    }
}

/// For the engine: what is known here of the direct sockets of a guest, which leaves this process; and what they carried.
pub(crate) fn moved_books(shared: &Shared, guest: u32) -> (Moved, Carried) {
    let mut moved = Moved::default();
    // One NSM has one namespace.
    with_ledgers(shared, |ledger| moved = ledger.moved(guest));
    let told = moved.told();
    (moved, told)
}

/// What one guest's did, by stack; it is over.
pub(crate) fn last_carried(shared: &Shared, guest: u32) -> HashMap<String, Carried> {
    lock(&shared.ledgers.handed().0).retain(|_, (of, _)| *of != guest);
    let mut all: HashMap<String, Carried> = HashMap::new();
    for (_, ledger) in shared.ledgers.all() {
        // The kernel's list is long on a host with many connections, and this is a switch thread: only if it is needed.
        if ledger.has_open(guest) {
            with_ledgers(shared, |other| {
                if std::ptr::eq(other, &*ledger) {
                    drop(ledger.carried());
                }
            });
        }
        ledger.forget(guest).into_iter().for_each(|(nsm, carried)| all.entry(nsm).or_default().add(carried));
    }
    all
}

/// What an agent gives out that gives sockets of this stack. `None`: the stack has none to give.
pub(crate) fn offer(shared: &Arc<Shared>, guest: u32, nsm: &NsmConfig) -> Option<Result<Offer, String>> {
    let (ledgers, name) = (Arc::clone(&shared.ledgers), nsm.name.clone());
    let ledger = Box::new(move |sockets: &dyn Sockets| ledgers.of(&name, sockets));
    let weak = Arc::downgrade(shared);
    Some(shared.config.kinds.direct(nsm)?.map(|sockets| {
        let shown = Box::new(Shown { sockets, shared: weak, guest });
        Offer::new(nsm.name.clone(), shown, nsm.congestion_policy, ledger)
    }))
}

/// Starts the agent's thread. Returns the end of a pair that hangs up when the thread ends; closing it ends the thread.
pub(crate) fn start(
    shared: &Arc<Shared>,
    guest: u32,
    nsm: &NsmConfig,
    listener: Listener,
    settings: Settings,
    behind_preload: bool,
) -> io::Result<(OwnedFd, Direct)> {
    let (ours, end) = fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC)?;
    let counters = Arc::new(Counters::default());
    let exchange = Arc::<Exchange>::default();
    let agent = Agent {
        listener,
        end,
        settings,
        counters: Arc::clone(&counters),
        guest,
        exchange: Arc::clone(&exchange),
    };
    // What goes wrong closes the listener.
    let now = offer(shared, guest, nsm);
    // Programs may have sockets of an agent before this one.
    let before = shared.agent_before(guest).into_iter();
    let before = before.filter_map(|nsm| offer(shared, guest, &shared.config.nsms[nsm])?.ok()).collect();
    let name = nsm.name.clone();
    std::thread::Builder::new().name("nk-agent".into()).stack_size(256 << 10).spawn(move || match now {
        Some(Ok(offer)) => agent.run(offer, before),
        Some(Err(reason)) => log::error!(
            guest;
            "guest {guest}: no sockets for programs that the preloaded library cannot serve: {reason}"
        ),
        None => log::error!(
            guest, nsm:% = name;
            "guest {guest}: stack {name} cannot serve programs that the preloaded library cannot: use a kernel stack"
        ),
    })?;
    Ok((ours, Direct { counters, behind_preload, relay: None, taps: Vec::new(), exchange }))
}

/// The guest's processes, found from the one that made it and those that asked for a socket.
pub(crate) fn census(direct: &Direct, first: i32, processes: &Processes) -> Census {
    processes.of(direct.counters.processes().into_iter().chain(u32::try_from(first)))
}

/// Kernel sockets of a guest, whose agent gives sockets of the first of these stacks and gave some of the others.
pub(crate) fn sockets(
    shared: &Shared,
    guest: u32,
    nsms: &[usize],
    direct: &Direct,
    census: &Census,
) -> Vec<SocketStatus> {
    let nsms: Vec<&NsmConfig> = nsms.iter().map(|nsm| &shared.config.nsms[*nsm]).collect();
    let [now, before @ ..] = &nsms[..] else { return Vec::new() };
    if direct.relay.is_some() {
        return relay::sockets(shared, guest, now, direct);
    }
    let reason = if direct.behind_preload {
        "made past the preloaded library"
    } else {
        "the guest has no preloaded library"
    };
    let held = shared.held.says(guest);
    let mut all: Vec<SocketStatus> = Vec::new();
    for nsm in &nsms {
        let Some(Ok(maker)) = shared.config.kinds.direct(nsm) else { continue };
        // Two stacks may be in one namespace.
        let ledger = if before.is_empty() { None } else { shared.ledgers.existing(&*maker) };
        let mut found = Vec::new();
        maker.within(&mut || {
            // Accepted sockets are their listeners': it looks whose they are.
            ledger.iter().for_each(|ledger| drop(ledger.carried()));
            match census.sockets() {
                Ok(sockets) => found = sockets,
                Err(error) => log::warn!(guest; "guest {guest}: the kernel's list of sockets: {error}"),
            }
        });
        for socket in found {
            if !all.iter().any(|other| other.inode == socket.inode) {
                let known = ledger.as_ref().and_then(|ledger| ledger.stack_of(guest, socket.cookie));
                let of = known.or_else(|| shared.ledgers.handed().stack_of(guest, socket.cookie));
                let stack = of.unwrap_or_else(|| nsm.name.clone());
                all.push(status(guest, socket, stack, reason, held.as_deref()));
            }
        }
    }
    all
}

/// Kernel sockets of a guest in a process that it has from NSMs of before: these are counted here.
pub(crate) fn of_before(
    shared: &Shared,
    guest: u32,
    nsms: &[usize],
    first: i32,
    processes: &Processes,
) -> Vec<SocketStatus> {
    let census = processes.of(u32::try_from(first));
    let held = shared.held.says(guest);
    let mut all: Vec<SocketStatus> = Vec::new();
    for nsm in nsms.iter().map(|nsm| &shared.config.nsms[*nsm]) {
        let Some(Ok(maker)) = shared.config.kinds.direct(nsm) else { continue };
        let Some(ledger) = shared.ledgers.existing(&*maker) else { continue };
        let mut found = Vec::new();
        maker.within(&mut || {
            drop(ledger.carried());
            found = census.sockets().unwrap_or_default();
        });
        for socket in found {
            if ledger.stack_of(guest, socket.cookie).as_ref() == Some(&nsm.name) {
                all.push(status(
                    guest,
                    socket,
                    nsm.name.clone(),
                    "made on a stack that the guest was on before",
                    held.as_deref(),
                ));
            }
        }
    }
    all
}

fn status(
    guest: u32,
    socket: DirectSocket,
    stack: String,
    reason: &'static str,
    held: Option<&str>,
) -> SocketStatus {
    let listens = socket.kind == "listener";
    let reason = match held {
        None => reason.into(),
        Some(held) if socket.kind == "datagram" => {
            format!("{reason}; what it sends is {held}; what it receives is not held").into()
        }
        Some(held) => format!("{reason}; {held}").into(),
    };
    SocketStatus {
        guest,
        id: socket.inode as u32,
        stack,
        attachment: "direct",
        reason,
        kind: socket.kind,
        state: socket.state,
        local: socket.local,
        peer: socket.peer,
        receive_ring_bytes: 0,
        send_ring_bytes: 0,
        unread_bytes: socket.unread_bytes,
        unsent_bytes: socket.unsent_bytes,
        congestion_control: socket.congestion_control,
        bytes_in: socket.bytes_in,
        bytes_out: socket.bytes_out,
        pid: socket.pid,
        fd: socket.fd,
        inode: socket.inode,
        receive_queue: if listens { socket.waiting } else { socket.unread_bytes },
        send_queue: if listens { socket.backlog } else { socket.unsent_bytes },
        tcp: socket.tcp,
        ..SocketStatus::default()
    }
}
