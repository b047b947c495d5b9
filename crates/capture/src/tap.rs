//! Looks on at a stack and makes packets of what captured guests do.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netkernel_service::{Close, Event, Handle, Observer, Payload, Segments, Shutdown, SocketAddress, Stack};

use crate::packet::{Header, MOST_PAYLOAD, Way, flag, packet};
use crate::session::Session;

/// Most bytes of a stream in one packet.
const PIECE: usize = 32 << 10;

/// The captures of one stack of one thread. Costs a load for each call of the stack while there are none.
#[derive(Clone, Default)]
pub struct Taps {
    active: Arc<AtomicBool>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// With the upper halves of the keys of the captured guests' sockets.
    sessions: Vec<(Arc<Session>, HashSet<u32>)>,
    flows: HashMap<u32, Flow>,
    /// The stack has no other guest than this one: every socket is its own.
    only: Option<u32>,
}

/// A socket that there was when the capture began.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub handle: Handle,
    pub stream: bool,
    pub local: Option<SocketAddress>,
    pub peer: Option<SocketAddress>,
}

/// What is known of a captured guest's socket.
#[derive(Clone, Copy, Debug)]
struct Flow {
    /// Whose it is.
    guest: u32,
    local: Option<SocketAddr>,
    peer: Option<SocketAddr>,
    /// The next bytes, of this side and of the peer.
    own: u32,
    other: u32,
    /// The handshake was told.
    begun: bool,
    own_ended: bool,
    other_ended: bool,
}

impl Flow {
    fn new(guest: u32) -> Flow {
        Flow {
            guest,
            local: None,
            peer: None,
            own: 1,
            other: 1,
            begun: false,
            own_ended: false,
            other_ended: false,
        }
    }
}

impl Taps {
    /// For a stack of one guest's own.
    pub fn of_one(guest: u32) -> Taps {
        let taps = Taps::default();
        taps.state().only = Some(guest);
        taps
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A capture of these guests begins, who have these sockets.
    pub fn begin(&self, session: &Arc<Session>, guests: &[(u32, Vec<Known>)]) {
        let mut state = self.state();
        state.sessions.retain(|(session, _)| !session.is_over());
        for (guest, sockets) in guests {
            for known in sockets.iter().filter(|known| known.handle != Handle::NONE) {
                let std = |name: Option<SocketAddress>| name.and_then(|name| name.to_std());
                let begun = known.stream && known.peer.is_some();
                let flow =
                    Flow { local: std(known.local), peer: std(known.peer), begun, ..Flow::new(*guest) };
                state.flows.entry(known.handle.0).or_insert(flow);
            }
        }
        state.sessions.push((Arc::clone(session), guests.iter().map(|(guest, _)| *guest).collect()));
        self.active.store(true, Relaxed);
    }

    /// A guest came; `wanted` says of which sessions it is.
    pub fn guest(&self, guest: u32, wanted: impl Fn(&Session) -> bool) {
        if self.active.load(Relaxed) {
            for (session, guests) in &mut self.state().sessions {
                if wanted(session) {
                    guests.insert(guest);
                }
            }
        }
    }

    /// A guest is over; its place may be another's soon.
    pub fn guest_over(&self, guest: u32) {
        if self.active.load(Relaxed) {
            let mut state = self.state();
            state.sessions.iter_mut().for_each(|(_, guests)| _ = guests.remove(&guest));
            state.flows.retain(|_, flow| flow.guest != guest);
        }
    }
}

/// The observer.
pub struct Tap {
    taps: Taps,
    /// Number of the stack's NSM.
    nsm: u32,
}

impl Tap {
    pub fn new(taps: Taps, nsm: u32) -> Tap {
        Tap { taps, nsm }
    }
}

impl Observer for Tap {
    fn wants_payload(&self) -> bool {
        self.taps.active.load(Relaxed)
    }

    fn saw(&mut self, stack: &mut dyn Stack, handle: Handle, event: Event<'_>) {
        if self.taps.active.load(Relaxed) {
            self.look(stack, handle, event);
        }
    }
}

fn std_name(name: Result<SocketAddress, netkernel_service::Errno>) -> Option<SocketAddr> {
    name.ok().and_then(|name| name.to_std())
}

impl Tap {
    #[cold]
    fn look(&self, stack: &mut dyn Stack, handle: Handle, event: Event<'_>) {
        let mut state = self.taps.state();
        let State { sessions, flows, only } = &mut *state;
        sessions.retain(|(session, _)| !session.is_over());
        if sessions.is_empty() {
            flows.clear();
            self.taps.active.store(false, Relaxed);
            return;
        }
        let captured = |guest: u32| sessions.iter().any(|(_, guests)| guests.contains(&guest));
        match event {
            Event::Opened(key) => {
                flows.remove(&handle.0);
                let guest = (key >> 32) as u32;
                if captured(guest) {
                    flows.insert(handle.0, Flow::new(guest));
                }
                return;
            }
            Event::Accepted(key, accepted) => {
                flows.remove(&handle.0);
                let guest = (key >> 32) as u32;
                if captured(guest) {
                    let (peer, local) = (accepted.peer.to_std(), std_name(stack.local_name(handle)));
                    flows.insert(handle.0, Flow { peer, local, ..Flow::new(guest) });
                }
            }
            _ => {}
        }
        if let Some(guest) = *only
            && !flows.contains_key(&handle.0)
        {
            // It was there before the capture.
            let peer = std_name(stack.peer_name(handle));
            let begun = peer.is_some() && !matches!(event, Event::Connected(_));
            flows.insert(
                handle.0,
                Flow { peer, local: std_name(stack.local_name(handle)), begun, ..Flow::new(guest) },
            );
        }
        let Some(flow) = flows.get_mut(&handle.0) else { return };
        let guest = flow.guest;
        let emit = |data: Vec<u8>| {
            for (session, _) in sessions.iter().filter(|(_, guests)| guests.contains(&guest)) {
                session.packet(self.nsm, data.clone());
            }
        };
        let over = matches!(event, Event::Closing(_) | Event::Giving);
        told(flow, stack, handle, event, &emit);
        if over {
            flows.remove(&handle.0);
        }
    }
}

/// Makes packets of an event.
fn told(flow: &mut Flow, stack: &mut dyn Stack, handle: Handle, event: Event<'_>, emit: &dyn Fn(Vec<u8>)) {
    match event {
        Event::Accepted(..) => {
            flow.begun = true;
            handshake(flow, false, emit);
        }
        Event::Connected(peer) => {
            flow.peer = peer.to_std();
            flow.local = std_name(stack.local_name(handle));
        }
        Event::Bound => flow.local = std_name(stack.local_name(handle)),
        Event::Sent(data) => {
            begin(flow, emit);
            stream(flow, true, data, emit);
        }
        Event::Received(data) => {
            begin(flow, emit);
            stream(flow, false, data, emit);
        }
        Event::Ended => {
            begin(flow, emit);
            end(flow, false, emit);
        }
        Event::ShutDown(Shutdown::Write | Shutdown::Both) if flow.peer.is_some() => {
            begin(flow, emit);
            end(flow, true, emit);
        }
        Event::Closing(Close::Graceful) if flow.begun => end(flow, true, emit),
        Event::Closing(Close::Abort) if flow.begun => reset(flow, true, emit),
        Event::Broke if flow.begun => reset(flow, false, emit),
        Event::SentDatagrams(datagrams) => {
            let local = std_name(stack.local_name(handle)).or(flow.local);
            for datagram in datagrams {
                let to = datagram.to.to_std().or(flow.peer);
                if let (Some(from), Some(to)) = (local, to) {
                    emit(packet(Way { from, to }, None, &copy(&datagram.data)));
                }
            }
        }
        Event::ReceivedDatagram(payload, from) => {
            let local = std_name(stack.local_name(handle)).or(flow.local);
            if let (Some(from), Some(to)) = (from.to_std().or(flow.peer), local) {
                let data = match payload {
                    Payload::Guest(data) => copy(&data),
                    Payload::Bytes(data) => data.to_vec(),
                };
                emit(packet(Way { from, to }, None, &data));
            }
        }
        _ => {}
    }
}

fn copy(data: &Segments) -> Vec<u8> {
    let mut bytes = vec![0; data.len().min(MOST_PAYLOAD)];
    let n = data.copy_to(&mut bytes);
    bytes.truncate(n);
    bytes
}

fn segment(flow: &Flow, own: bool, flags: u8, sequence: u32, payload: &[u8], emit: &dyn Fn(Vec<u8>)) {
    let (Some(local), Some(peer)) = (flow.local, flow.peer) else { return };
    let way = if own { Way { from: local, to: peer } } else { Way { from: peer, to: local } };
    let acknowledged = if flags & flag::ACK == 0 {
        0
    } else if own {
        flow.other
    } else {
        flow.own
    };
    emit(packet(way, Some(Header { sequence, acknowledged, flags }), payload));
}

/// Who connected is seen to be connected by the first thing that happens.
fn begin(flow: &mut Flow, emit: &dyn Fn(Vec<u8>)) {
    if !std::mem::replace(&mut flow.begun, true) {
        handshake(flow, true, emit);
    }
}

/// `own`: this side connected.
fn handshake(flow: &Flow, own: bool, emit: &dyn Fn(Vec<u8>)) {
    segment(flow, own, flag::SYN, 0, &[], emit);
    segment(flow, !own, flag::SYN | flag::ACK, 0, &[], emit);
    segment(flow, own, flag::ACK, 1, &[], emit);
}

fn stream(flow: &mut Flow, own: bool, data: &Segments, emit: &dyn Fn(Vec<u8>)) {
    let mut done = 0;
    while done < data.len() {
        let piece = copy(&data.slice(done, PIECE));
        if piece.is_empty() {
            return;
        }
        let sequence = if own { flow.own } else { flow.other };
        segment(flow, own, flag::PSH | flag::ACK, sequence, &piece, emit);
        let next = sequence.wrapping_add(piece.len() as u32);
        *(if own { &mut flow.own } else { &mut flow.other }) = next;
        done += piece.len();
    }
}

fn end(flow: &mut Flow, own: bool, emit: &dyn Fn(Vec<u8>)) {
    let ended = if own { &mut flow.own_ended } else { &mut flow.other_ended };
    if std::mem::replace(ended, true) {
        return;
    }
    let sequence = if own { flow.own } else { flow.other };
    segment(flow, own, flag::FIN | flag::ACK, sequence, &[], emit);
    *(if own { &mut flow.own } else { &mut flow.other }) = sequence.wrapping_add(1);
    // Acknowledged by the other side.
    let answer = if own { flow.other } else { flow.own };
    segment(flow, !own, flag::ACK, answer, &[], emit);
}

fn reset(flow: &mut Flow, own: bool, emit: &dyn Fn(Vec<u8>)) {
    let sequence = if own { flow.own } else { flow.other };
    segment(flow, own, flag::RST | flag::ACK, sequence, &[], emit);
    flow.begun = false;
    flow.peer = None;
}
