//! Guests with an agent: sockets that are the kernel's own, given to programs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use netkernel_agent::notify::Listener;
use std::collections::HashMap;
use std::sync::Mutex;

use netkernel_agent::ledger::Books;
use netkernel_agent::{Agent, Carried, Census, Counters, DirectSocket, Ledger, Processes, Settings, Sockets};
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
    /// Who looks on at the relay's stack, for captures.
    pub taps: Option<netkernel_capture::Taps>,
}

/// What direct sockets carried: a ledger for each NSM that ever gave some away.
#[derive(Debug, Default)]
pub(crate) struct Ledgers(Mutex<HashMap<String, Option<Arc<Ledger>>>>);

impl Ledgers {
    fn of(&self, nsm: &str, sockets: &dyn Sockets) -> Option<Arc<Ledger>> {
        let mut all = lock(&self.0);
        let open = || {
            let mut opened = None;
            sockets.within(&mut || opened = Some(Ledger::open()));
            match opened {
                Some(Ok(ledger)) => Some(Arc::new(ledger)),
                other => {
                    log::warn!(nsm:%; "{nsm}: what direct sockets carry is not counted: {other:?}");
                    None
                }
            }
        };
        all.entry(nsm.to_owned()).or_insert_with(open).clone()
    }

    /// Those that there are, by stack.
    pub fn all(&self) -> Vec<(String, Arc<Ledger>)> {
        let all = lock(&self.0);
        all.iter().filter_map(|(nsm, ledger)| Some((nsm.clone(), ledger.clone()?))).collect()
    }

    /// Goes on with what a program before this one knew of a stack's sockets.
    pub fn resume(&self, nsm: &str, sockets: &dyn Sockets, books: Books, netlink: OwnedFd) {
        let mut left = Some((books, netlink));
        sockets.within(&mut || {
            let resumed = left.take().map(|(books, netlink)| Ledger::resume(books, netlink));
            match resumed {
                Some(Ok(ledger)) => _ = lock(&self.0).insert(nsm.to_owned(), Some(Arc::new(ledger))),
                other => {
                    log::error!(nsm:%; "{nsm}: what direct sockets carried is not counted any more: {other:?}");
                }
            }
        });
    }

    fn existing(&self, nsm: &str) -> Option<Arc<Ledger>> {
        lock(&self.0).get(nsm).cloned().flatten()
    }
}

/// What the direct sockets of each guest carried, closed ones included, by guest.
pub(crate) fn carried(shared: &Shared) -> HashMap<u32, Carried> {
    let mut all = HashMap::new();
    for nsm in &shared.config.nsms {
        let Some(ledger) = shared.ledgers.existing(&nsm.name) else { continue };
        let Some(Ok(maker)) = shared.config.kinds.direct(nsm) else { continue };
        maker.within(&mut || all.extend(ledger.carried()));
    }
    all
}

/// What one guest's did; it is over.
pub(crate) fn last_carried(shared: &Shared, nsm: &NsmConfig, guest: u32) -> Carried {
    let Some(ledger) = shared.ledgers.existing(&nsm.name) else { return Carried::default() };
    // The kernel's list is long on a host with many connections, and this is a switch thread: only if it is needed.
    if ledger.has_open(guest)
        && let Some(Ok(maker)) = shared.config.kinds.direct(nsm)
    {
        maker.within(&mut || drop(ledger.carried()));
    }
    ledger.forget(guest)
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
    let (ledgers, name) = (Arc::clone(&shared.ledgers), nsm.name.clone());
    let ledger = Box::new(move |sockets: &dyn Sockets| ledgers.of(&name, sockets));
    let agent = Agent { listener, end, settings, counters: Arc::clone(&counters), ledger, guest };
    let (kinds, nsm, weak) = (shared.config.kinds.clone(), nsm.clone(), Arc::downgrade(shared));
    std::thread::Builder::new().name("nk-agent".into()).stack_size(256 << 10).spawn(move || {
        match kinds.direct(&nsm) {
            Some(Ok(sockets)) => agent.run(Box::new(Shown { sockets, shared: weak, guest })),
            Some(Err(reason)) => log::error!(
                guest;
                "guest {guest}: no sockets for programs that the preloaded library cannot serve: {reason}"
            ),
            None => log::error!(
                guest, nsm:% = nsm.name;
                "guest {guest}: stack {} cannot serve programs that the preloaded library cannot: use a kernel stack",
                nsm.name
            ),
        }
    })?;
    Ok((ours, Direct { counters, behind_preload, relay: None, taps: None }))
}

/// The guest's processes, found from the one that made it and those that asked for a socket.
pub(crate) fn census(direct: &Direct, first: i32, processes: &Processes) -> Census {
    processes.of(direct.counters.processes().into_iter().chain(u32::try_from(first)))
}

/// Kernel sockets of a guest.
pub(crate) fn sockets(
    shared: &Shared,
    guest: u32,
    nsm: &NsmConfig,
    direct: &Direct,
    census: &Census,
) -> Vec<SocketStatus> {
    if direct.relay.is_some() {
        return relay::sockets(shared, guest, nsm, direct);
    }
    let Some(Ok(maker)) = shared.config.kinds.direct(nsm) else { return Vec::new() };
    let mut found = Vec::new();
    maker.within(&mut || match census.sockets() {
        Ok(sockets) => found = sockets,
        Err(error) => log::warn!(guest; "guest {guest}: the kernel's list of sockets: {error}"),
    });
    let reason = if direct.behind_preload {
        "made past the preloaded library"
    } else {
        "the guest has no preloaded library"
    };
    found.into_iter().map(|socket| status(guest, socket, reason)).collect()
}

fn status(guest: u32, socket: DirectSocket, reason: &'static str) -> SocketStatus {
    let listens = socket.kind == "listener";
    SocketStatus {
        guest,
        id: socket.inode as u32,
        attachment: "direct",
        reason: reason.into(),
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
