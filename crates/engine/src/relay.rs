//! Guests with a relay: Unix sockets that behave as the INET sockets of their stack.
//!
//! The relay has a stack of its own where the kind allows several; else it borrows the switch thread's, in which its sockets
//! are the guest's beside those of the queues.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use netkernel_agent::notify::Listener;
use netkernel_agent::{Counters, Settings};
use netkernel_capture::{Tap, Taps};
use netkernel_relay::{Link, Relay, RelaySocket, Start, Successor, reset_left};
use netkernel_service::{Observed, Policed, RELAYED, Stack, key};
use netkernel_shm::fds;
use netkernel_stack_lent::{Lender, lend};

use crate::NsmConfig;
use crate::direct::Direct;
use crate::engine::Shared;
use crate::status::SocketStatus;

/// What a relay's stack takes its guest for, in keys.
pub(crate) const RELAY_SLOT: u32 = 1;
/// How long a control call waits for a relay, which its guest may have stopped.
const ANSWER: Duration = Duration::from_secs(1);

/// Starts the relay's thread, which is the guest's agent too. Returns the end of a pair that hangs up when the thread
/// ends; closing it ends the thread and resets the guest's connections. A lender is what the calling switch thread serves.
/// `left`: what a relay of the program before stood still with.
#[allow(clippy::too_many_arguments)]
pub(crate) fn start(
    shared: &Arc<Shared>,
    guest: u32,
    slot: u32,
    nsm: &NsmConfig,
    listener: Listener,
    settings: Settings,
    behind_preload: bool,
    left: Option<OwnedFd>,
) -> io::Result<(OwnedFd, Direct, Option<Lender>)> {
    let (ours, end) = fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC)?;
    let counters = Arc::new(Counters::default());
    let link = Link::new()?;
    let start = Start {
        guest,
        listener,
        end,
        settings,
        stack: nsm.name.clone(),
        counters: Arc::clone(&counters),
        privileged: shared.is_privileged(guest),
        spin_ns: shared.config.spin_us.saturating_mul(1000),
    };
    let limits = shared.limits(guest);
    let taps = Taps::of_one(RELAY_SLOT);
    let mut number = 0;
    if let Some((tenant, uid, nsm)) = shared.whose(guest) {
        number = nsm as u32;
        for session in shared.captures.running() {
            if session.target.is(guest, &tenant, uid) {
                taps.begin(&session, &[(RELAY_SLOT, Vec::new())]);
            }
        }
    }
    let tap = Tap::new(taps.clone(), number);
    let (lender, lent) = if shared.config.kinds.has_many(nsm) {
        (None, None)
    } else {
        let (lender, lent) = lend(key(slot, RELAYED))?;
        (Some(lender), Some(lent))
    };
    // Of a stack that is lent, the switch thread's own sees all.
    let taps = lent.is_none().then_some(taps).into_iter().collect();
    let (kinds, nsm, own) = (shared.config.kinds.clone(), nsm.clone(), link.clone());
    std::thread::Builder::new().name("nk-relay".into()).stack_size(512 << 10).spawn(move || {
        // What goes wrong here closes the listener: the guest's sockets fail, and nothing waits.
        let stack = match lent {
            Some(lent) => Ok(Box::new(lent) as Box<dyn Stack>),
            None => {
                kinds.make(&nsm).map(|stack| Box::new(Observed { stack, observer: tap }) as Box<dyn Stack>)
            }
        };
        let relay = match (stack, left) {
            (Ok(stack), left) => {
                let (stack, link) = (Box::new(Policed::new(stack, limits)), own.clone());
                let relay = match left {
                    Some(left) => Relay::resume(start, stack, link, left),
                    None => Relay::new(start, stack, link),
                };
                relay.map_err(|error| format!("no descriptors: {error}"))
            }
            (Err(reason), left) => {
                left.iter().for_each(reset_left);
                Err(reason)
            }
        };
        match relay {
            Ok(relay) => relay.run(),
            Err(reason) => log::error!(guest; "guest {guest}: no relay, so that it has no sockets: {reason}"),
        }
        own.over();
    })?;
    let exchange = Arc::default();
    Ok((ours, Direct { counters, behind_preload, relay: Some(link), taps, exchange }, lender))
}

/// What a relay is given when its guest is put on another NSM, and who looks on at it.
pub(crate) fn successor(
    shared: &Shared,
    guest: u32,
    nsm: usize,
    stack: Box<dyn Stack>,
    own: bool,
) -> (Successor, Option<Taps>) {
    let config = &shared.config.nsms[nsm];
    let taps = Taps::of_one(RELAY_SLOT);
    if let Some((tenant, uid, _)) = shared.whose(guest).filter(|_| own) {
        for session in shared.captures.running() {
            if session.target.is(guest, &tenant, uid) {
                taps.begin(&session, &[(RELAY_SLOT, Vec::new())]);
            }
        }
    }
    let stack =
        if own { Box::new(Observed { stack, observer: Tap::new(taps.clone(), nsm as u32) }) } else { stack };
    let stack = Box::new(Policed::new(stack, shared.limits_on(guest, nsm)));
    (Successor { name: config.name.clone(), stack, policy: config.congestion_policy }, own.then_some(taps))
}

/// The sockets of a relay; none when it does not answer in time.
pub(crate) fn sockets(shared: &Shared, guest: u32, nsm: &NsmConfig, direct: &Direct) -> Vec<SocketStatus> {
    let Some(link) = &direct.relay else { return Vec::new() };
    let found = link.sockets().recv_timeout(ANSWER).unwrap_or_default();
    let past = if direct.behind_preload {
        "made past the preloaded library"
    } else {
        "the guest has no preloaded library"
    };
    let why = if !shared.config.kinds.has_direct(nsm) {
        ", and the stack has no kernel sockets to give"
    } else if shared.needs_queues(guest) {
        ", and kernel sockets would pass the tenant's limits by"
    } else {
        ""
    };
    let reason = format!("{past}{why}");
    found.into_iter().map(|socket| status(guest, socket, &reason)).collect()
}

fn status(guest: u32, socket: RelaySocket, reason: &str) -> SocketStatus {
    let reason = match &socket.way {
        Some(way) => format!("{reason}; {way}"),
        None => reason.to_owned(),
    };
    SocketStatus {
        guest,
        stack: socket.stack,
        id: socket.inode as u32,
        attachment: "relay",
        reason: reason.into(),
        kind: socket.kind,
        state: socket.state,
        local: socket.local.map(|name| name.to_string()),
        peer: socket.peer.map(|name| name.to_string()),
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
        receive_queue: socket.receive_queue,
        send_queue: socket.send_queue,
        tcp: socket.tcp,
        ..SocketStatus::default()
    }
}
