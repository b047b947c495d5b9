//! Captures of what guests send and receive: who reads them gets the end of a pipe.

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex};

use netkernel_agent::Processes;
use netkernel_capture::{Known, Session, Target, Written, write};
use netkernel_service::SocketInfo;
use netkernel_shm::fds;
use serde::Serialize;

use crate::EngineError;
use crate::direct_capture::mark_held;
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

    pub fn are_there(&self) -> bool {
        lock(&self.0).iter().any(|session| !session.is_over())
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

/// What a capture does not see, of what there was when it began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unseen {
    /// Sockets of the kernel's own that programs hold: direct ones, and those that were handed over.
    pub direct_sockets: u64,
    /// Guests that may make more of them.
    pub direct_guests: u64,
    /// Sockets whose connection two guests move in memory that both map.
    pub paired_sockets: u64,
    /// Why direct sockets are not seen.
    #[serde(skip)]
    pub reason: Option<String>,
}

impl Unseen {
    /// A sentence for people; nothing: all is seen.
    pub fn sentence(&self) -> Option<String> {
        let many = |n: u64, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
        let mut parts = Vec::new();
        if self.direct_sockets > 0 {
            parts.push(many(self.direct_sockets, "direct socket"));
        }
        if self.direct_guests > 0 {
            parts.push(format!(
                "direct sockets that {} may make from now on",
                many(self.direct_guests, "guest")
            ));
        }
        if self.paired_sockets > 0 {
            let pairs = many(self.paired_sockets, "socket");
            parts.push(format!("{pairs} of connections that two guests move in memory that both map"));
        }
        let reason = self.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        (!parts.is_empty()).then(|| format!("Not seen: {}{reason}.", parts.join("; ")))
    }
}

impl Engine {
    /// Captures what the guests that are meant send and receive from now on, those that come later too. pcapng can be read
    /// from the descriptor; the capture is over when it is closed. Connections between guests stay with the engine meanwhile.
    pub fn capture(&self, target: Target, snap: usize) -> Result<(OwnedFd, Unseen), EngineError> {
        // As large as it may be: fewer switches between the two.
        let (reader, writer) = fds::pipe(libc::O_CLOEXEC, Some(1 << 20)).map_err(resource)?;
        let session = self.begin(target, snap)?;
        let unseen = self.unseen(&session.target);
        self.write_capture(session, unseen.sentence(), writer)?;
        Ok((reader, unseen))
    }

    /// The same for who has a pipe already.
    pub(crate) fn capture_into(&self, target: Target, snap: usize, pipe: OwnedFd) -> Result<(), EngineError> {
        let session = self.begin(target, snap)?;
        // Who asked for this marks and counts what it does not see.
        self.write_capture(session, None, pipe)
    }

    fn begin(&self, target: Target, snap: usize) -> Result<Arc<Session>, EngineError> {
        let session = Arc::new(Session::new(target, snap.clamp(64, MAX_SNAP)));
        self.shared().captures.add(&session)?;
        self.begin_capture(&session);
        Ok(session)
    }

    fn write_capture(
        &self,
        session: Arc<Session>,
        unseen: Option<String>,
        pipe: OwnedFd,
    ) -> Result<(), EngineError> {
        let pipe = File::from(pipe);
        let about = unseen.unwrap_or_default();
        let nsms: Vec<String> = self.shared().config.nsms.iter().map(|nsm| nsm.name.clone()).collect();
        let own = Arc::clone(&session);
        let thread = std::thread::Builder::new().name("nk-capture".into()).spawn(move || {
            let result = write(&own, &about, &nsms, &pipe, || is_gone(&pipe));
            if let Ok(Written { packets, lost }) = result {
                log::info!(packets, lost; "a capture ended: {packets} packets, {lost} lost");
            }
        });
        thread.map(drop).map_err(|error| {
            session.end();
            resource(error)
        })
    }

    /// What is past switch threads and relays: direct sockets that there are get their marks. Those that an agent in the
    /// process of an NSM gives from now on get none: it may not use eBPF.
    fn unseen(&self, target: &Target) -> Unseen {
        let (mut unseen, shared) = (Unseen::default(), self.shared());
        let processes = Processes::look();
        let statuses = self.status().guests;
        for guest in shared.guests_of(target) {
            let Some(status) = statuses.iter().find(|status| status.id == guest) else { continue };
            let is_direct = status.attachment.contains("direct");
            let tap = if is_direct { Some(shared.direct_tap.begin(shared)) } else { None };
            let elsewhere = shared.whose(guest).is_some_and(|(.., nsm)| shared.remote(nsm).is_some());
            let reason = match &tap {
                Some(Err(reason)) => Some(reason.clone()),
                Some(Ok(_)) if elsewhere => Some("NSMs in processes may use no eBPF".to_owned()),
                _ => None,
            };
            unseen.direct_guests += u64::from(reason.is_some());
            unseen.reason = reason.or(unseen.reason);
            for socket in self.sockets_without_holders(guest, &processes) {
                unseen.paired_sockets += u64::from(socket.pair);
                let is_seen = match (socket.attachment, &tap) {
                    ("direct", Some(Ok(tap))) => mark_held(tap, &socket).is_ok(),
                    ("direct", _) => false,
                    _ => socket.state != "handed over",
                };
                unseen.direct_sockets += u64::from(!is_seen);
            }
        }
        unseen
    }

    /// Ends the captures: who reads them sees their end.
    pub(crate) fn end_captures(&self) {
        for session in self.shared().captures.running() {
            session.end();
        }
    }
}

fn resource(error: std::io::Error) -> EngineError {
    EngineError::Resource(format!("no capture: {error}"))
}

/// Nobody reads any more.
fn is_gone(writer: &File) -> bool {
    let mut one = libc::pollfd { fd: writer.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd, valid for reads and writes.
    unsafe { libc::poll(&mut one, 1, 0) > 0 && one.revents & libc::POLLERR != 0 }
}

/// What a capture must know of a socket that there is already.
pub(crate) fn known(socket: &SocketInfo) -> Known {
    Known {
        handle: socket.handle.own(),
        stream: socket.kind != "datagram",
        local: socket.local,
        peer: socket.peer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_seen_is_said_in_a_sentence() {
        assert_eq!(Unseen::default().sentence(), None);
        let some =
            Unseen { direct_sockets: 1, direct_guests: 2, paired_sockets: 4, reason: Some("x".into()) };
        let text = some.sentence().unwrap();
        for part in
            ["Not seen: 1 direct socket;", "that 2 guests may make", "; 4 sockets of connections", "(x)."]
        {
            assert!(text.contains(part), "{text}");
        }
    }
}
