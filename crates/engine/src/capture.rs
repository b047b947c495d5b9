//! Captures of what guests send and receive: who reads them gets the end of a pipe.

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex};

use netkernel_capture::{Known, Session, Target, write};
use netkernel_service::SocketInfo;
use netkernel_shm::fds;

use crate::EngineError;
use crate::engine::{Engine, lock};

/// At a time.
const MAX_CAPTURES: usize = 8;
/// Bytes kept of a packet, at most.
pub const MAX_SNAP: usize = 262_144;

/// The captures that are under way.
#[derive(Default)]
pub(crate) struct Captures(Mutex<Vec<Arc<Session>>>);

impl Captures {
    pub fn running(&self) -> Vec<Arc<Session>> {
        let mut list = lock(&self.0);
        list.retain(|session| !session.is_over());
        list.clone()
    }

    fn add(&self, session: &Arc<Session>) -> Result<(), EngineError> {
        let mut list = lock(&self.0);
        list.retain(|session| !session.is_over());
        if list.len() >= MAX_CAPTURES {
            return Err(EngineError::Resource(format!(
                "{MAX_CAPTURES} captures are under way, as many as there may be: end one of them"
            )));
        }
        list.push(Arc::clone(session));
        Ok(())
    }
}

impl Engine {
    /// Captures what the guests that are meant send and receive from now on, those that come later too. pcapng can be read
    /// from the descriptor; the capture is over when it is closed.
    pub fn capture(&self, target: Target, snap: usize) -> Result<OwnedFd, EngineError> {
        let resource = |e: std::io::Error| EngineError::Resource(format!("no capture: {e}"));
        // As large as it may be: fewer switches between the two.
        let (reader, writer) = fds::pipe(libc::O_CLOEXEC, Some(1 << 20)).map_err(resource)?;
        let writer = File::from(writer);
        let session = Arc::new(Session::new(target, snap.clamp(64, MAX_SNAP)));
        let shared = Arc::clone(self.shared());
        shared.captures.add(&session)?;
        self.begin_capture(&session);
        let nsms: Vec<String> = shared.config.nsms.iter().map(|nsm| nsm.name.clone()).collect();
        let own = Arc::clone(&session);
        let thread = std::thread::Builder::new().name("nk-capture".into()).spawn(move || {
            let result = write(&own, &nsms, &writer, || is_gone(&writer));
            if let Ok(written) = result {
                log::info!(packets = written.packets, lost = written.lost; "a capture ended: {} packets, {} lost", written.packets, written.lost);
            }
        });
        thread.map(drop).map_err(|error| {
            session.end();
            resource(error)
        })?;
        Ok(reader)
    }

    /// Ends the captures: who reads them sees their end.
    pub(crate) fn end_captures(&self) {
        for session in self.shared().captures.running() {
            session.end();
        }
    }
}

/// Nobody reads any more.
fn is_gone(writer: &File) -> bool {
    let mut one = libc::pollfd { fd: writer.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd, valid for reads and writes.
    unsafe { libc::poll(&mut one, 1, 0) > 0 && one.revents & libc::POLLERR != 0 }
}

/// What a capture must know of a socket that there is already.
pub(crate) fn known(socket: &SocketInfo) -> Known {
    Known { handle: socket.handle, stream: socket.kind != "datagram", local: socket.local, peer: socket.peer }
}
