//! Captures of direct sockets: what the kernel does with them is seen by an eBPF program, which knows them by a mark.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use netkernel_agent::{SocketRequest, Sockets};
use netkernel_capture::{Session, pcapng};
use netkernel_socket_tap::{Ring, SocketTap};

use crate::engine::{Shared, lock};
use crate::status::SocketStatus;

/// How soon the end of all captures is noticed.
const LOOK: Duration = Duration::from_millis(200);
/// Packets between two looks at which captures there are.
const BATCH: usize = 256;

/// The one program of this engine, while there are captures.
#[derive(Default)]
pub(crate) struct DirectTap(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    None,
    There(Arc<SocketTap>),
    /// It cannot be had, and why.
    Never(String),
}

impl DirectTap {
    /// Begins to look on, unless it did. To be called when a capture was added. An error is the reason, for people.
    pub fn begin(&self, shared: &Arc<Shared>) -> Result<Arc<SocketTap>, String> {
        let mut state = lock(&self.0);
        match &*state {
            State::There(tap) => return Ok(Arc::clone(tap)),
            State::Never(reason) => return Err(reason.clone()),
            State::None => {}
        }
        let started = SocketTap::start().and_then(|(tap, ring)| {
            let tap = Arc::new(tap);
            let (own, weak) = (Arc::clone(&tap), Arc::downgrade(shared));
            std::thread::Builder::new()
                .name("nk-direct-tap".into())
                .spawn(move || read(&weak, &own, ring))?;
            Ok(tap)
        });
        match started {
            Ok(tap) => {
                *state = State::There(Arc::clone(&tap));
                Ok(tap)
            }
            Err(error) => {
                let reason = format!("eBPF is needed for that: {error}");
                *state = State::Never(reason.clone());
                Err(reason)
            }
        }
    }

    /// A program gets this socket of the kernel's.
    pub fn gives(&self, shared: &Arc<Shared>, socket: BorrowedFd<'_>, guest: u32) {
        if shared.captures.are_there()
            && let Ok(tap) = self.begin(shared)
            && let Err(error) = tap.mark(socket, guest)
        {
            log::warn!(guest; "guest {guest}: a direct socket is not captured: {error}");
        }
    }
}

/// Marks a socket that a program has already. An error is the reason, for people.
pub(crate) fn mark_held(tap: &SocketTap, socket: &SocketStatus) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let process = netkernel_relay::open_thread(socket.pid).map_err(text)?;
    let held = netkernel_relay::duplicate_of(&process, socket.fd).map_err(text)?;
    let file = std::fs::File::from(held);
    // The number may be another file's by now.
    if file.metadata().map_err(text)?.ino() != socket.inode {
        return Err("it was closed".into());
    }
    tap.mark(file.as_fd(), socket.guest).map_err(text)
}

/// Takes packets, until there is no capture any more.
fn read(shared: &Weak<Shared>, tap: &Arc<SocketTap>, mut ring: Ring) {
    let mut lost = 0;
    // Tenant, user and NSM of a guest, as of the last look.
    let mut whose: HashMap<u32, Option<(String, u32, usize)>> = HashMap::new();
    loop {
        ring.wait(LOOK);
        whose.clear();
        let Some(shared) = shared.upgrade() else { return };
        let sessions = shared.captures.running();
        if sessions.is_empty() {
            let mut state = lock(&shared.direct_tap.0);
            // Who adds a capture asks for the program only then.
            if !shared.captures.are_there() {
                *state = State::None;
                return;
            }
            continue;
        }
        for _ in 0..BATCH {
            let Some(packet) = ring.take() else { break };
            let owner = whose.entry(packet.mark).or_insert_with(|| shared.whose(packet.mark));
            let Some((tenant, uid, nsm)) = owner else { continue };
            let at_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
            for session in sessions.iter().filter(|session| session.target.is(packet.mark, tenant, *uid)) {
                let (length, data) = (packet.length, packet.data.as_slice());
                session.taken(*nsm as u32, pcapng::Packet { at_ns, length, data });
            }
        }
        let now = tap.lost();
        sessions.iter().for_each(|session: &Arc<Session>| session.lose(now - lost));
        lost = now;
    }
}

/// Makes sockets, and lets captures know.
pub(crate) struct Shown {
    pub sockets: Box<dyn Sockets>,
    pub shared: Weak<Shared>,
    pub guest: u32,
}

impl Sockets for Shown {
    fn socket(&mut self, request: &SocketRequest) -> Result<OwnedFd, i32> {
        let socket = self.sockets.socket(request)?;
        if let Some(shared) = self.shared.upgrade() {
            shared.direct_tap.gives(&shared, socket.as_fd(), self.guest);
        }
        Ok(socket)
    }

    fn congestion_control(&self) -> Option<&str> {
        self.sockets.congestion_control()
    }

    fn owns(&self, option: i32) -> bool {
        self.sockets.owns(option)
    }

    fn knows(&mut self, congestion_control: &[u8]) -> bool {
        self.sockets.knows(congestion_control)
    }

    fn within(&self, work: &mut dyn FnMut()) {
        self.sockets.within(work);
    }
}
