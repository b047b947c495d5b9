//! What the engine and the process of an NSM say to each other: JSON in packets of a SEQPACKET pair, with descriptors
//! attached. Requests fit one packet; reports are split.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};

use netkernel_abi::Limits;
use netkernel_capture::Target;
use netkernel_shm::fds;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::NsmConfig;
use crate::engine::Registered;
use crate::status::{GuestStatus, SocketStatus};
use crate::usage::Usage;

/// Changes with what is said: a process may be older, or newer, than the engine that was exchanged over it.
pub const VERSION: u32 = 3;

/// The first packet: what to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    pub nsm: NsmConfig,
    pub spin_us: u64,
    pub max_guests: usize,
    /// Goes on for another holder, whose descriptors come over the socket that is attached.
    pub successor: bool,
    /// Where in tenants' memory what is this NSM's stands.
    pub place: usize,
}

/// Engine to worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    pub serial: u64,
    pub request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// With region, channel, doorbell, and the memory of its tenant.
    Add(NewGuest),
    /// With the engine's end of a channel.
    Channel(u32),
    End(u32),
    Status,
    Usage,
    Sockets(u32),
    /// With the end of a pipe to write to: pcapng of these guests, packets of at most so many bytes.
    Capture(Target, usize),
    /// Give a guest away, over the socket that is attached, if both understand this memory.
    Depart(u32, String),
    /// Go on with a guest that comes over the socket that is attached; with its region, doorbell, and the memory of its tenant.
    Arrive(NewGuest, String),
    /// Stop where you are, and let another worker go on.
    Restart,
    /// The same, but a worker of another holder, which gets the descriptors over the socket that is attached. From then on the
    /// holder is asked: [`Request::Restart`] has it go on after all, anything else ends it.
    Succession,
    /// The engine ends.
    Stop,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewGuest {
    pub id: u32,
    pub name: String,
    pub tenant: String,
    pub pid: i32,
    pub uid: u32,
    pub privileged: bool,
    /// Size of the region, sockets, queue sets. What stands in the region itself can be forged.
    pub limits: (u64, u32, u32),
}

impl NewGuest {
    pub(crate) fn of(id: u32, known: &Registered) -> NewGuest {
        let sizes = known.sizes;
        NewGuest {
            id,
            name: known.name.clone(),
            tenant: known.tenant.name(),
            pid: known.pid,
            uid: known.uid,
            privileged: known.uid == 0,
            limits: (sizes.region_bytes, sizes.sockets, sizes.queue_sets),
        }
    }

    /// Of its region.
    pub fn sizes(&self) -> Limits {
        let (region_bytes, sockets, queue_sets) = self.limits;
        Limits { region_bytes, sockets, queue_sets }
    }
}

/// Worker, or holder, to engine.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Said by the holder that is to succeed another one: what it understands, see `succession::format`.
    Waiting(String),
    /// The worker serves: its process, and guests that it has.
    Ready(u32, Vec<u32>),
    Answer(u64, Answer),
    /// A guest is over; true: it broke the protocol.
    Over(u32, Usage, bool),
    /// The worker died, in whatever way; said by the holder.
    Died(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Done(Result<(), String>),
    Status(Vec<GuestStatus>),
    Usage(Vec<(u32, Usage)>),
    Sockets(Vec<SocketStatus>),
}

/// Payload of one packet.
const CHUNK: usize = 32 << 10;
/// First byte of a packet: more of the same message follows, or not.
const MORE: u8 = 1;
const LAST: u8 = 0;

/// Sends one message; blocks while the other side is behind.
pub fn send(socket: RawFd, message: &impl Serialize, fds: &[RawFd]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let mut chunks = text.chunks(CHUNK).peekable();
    let mut attached = fds;
    while let Some(chunk) = chunks.next() {
        let mut packet = Vec::with_capacity(chunk.len() + 1);
        packet.push(if chunks.peek().is_some() { MORE } else { LAST });
        packet.extend_from_slice(chunk);
        loop {
            match fds::send(socket, &packet, attached, 0) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        attached = &[];
    }
    Ok(())
}

/// Puts messages together.
#[derive(Default)]
pub struct Reader {
    text: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reader {
    /// The next message; `None`: the other side is gone.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        socket: &OwnedFd,
    ) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut packet = vec![0; CHUNK + 1];
        loop {
            let (n, fds) = match fds::receive(socket.as_raw_fd(), &mut packet, 0) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            };
            if n == 0 {
                return Ok(None);
            }
            // A whole message stands in a single packet when its sender died in the middle of the one before.
            if packet[0] == LAST && !self.text.is_empty() && packet[1..n].starts_with(DIED) {
                self.clear();
            }
            self.text.extend_from_slice(&packet[1..n]);
            self.fds.extend(fds);
            if packet[0] == LAST {
                let message = serde_json::from_slice(&self.text)?;
                let fds = std::mem::take(&mut self.fds);
                self.clear();
                return Ok(Some((message, fds)));
            }
        }
    }

    fn clear(&mut self) {
        self.text.clear();
        self.fds.clear();
    }
}

/// How [`Report::Died`] begins. Strings in other messages cannot begin a packet with it: it has an unescaped quote, and a chunk
/// that begins in the middle of a message would have to hold this very object.
const DIED: &[u8] = b"{\"Died\":";

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests of this process count its descriptors: this thread's are not among them.
    fn apart() {
        // SAFETY: the thread goes on with a copy of the table, in which everything has the same number.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
    }

    #[test]
    fn long_messages_are_split_and_descriptors_come_along() {
        apart();
        let (ours, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).unwrap();
        let extra = fds::eventfd().unwrap();
        let list: Vec<u32> = (0..30_000).collect();
        let sender = std::thread::spawn(move || {
            send(theirs.as_raw_fd(), &Report::Ready(1, list), &[extra.as_raw_fd()]).unwrap();
            send(theirs.as_raw_fd(), &Report::Died("why".into()), &[]).unwrap();
        });
        let mut reader = Reader::default();
        let (message, fds) = reader.receive::<Report>(&ours).unwrap().unwrap();
        assert!(matches!(message, Report::Ready(1, list) if list.len() == 30_000));
        assert_eq!(fds.len(), 1);
        let (message, fds) = reader.receive::<Report>(&ours).unwrap().unwrap();
        assert!(matches!(message, Report::Died(why) if why == "why") && fds.is_empty());
        sender.join().unwrap();
        assert!(reader.receive::<Report>(&ours).unwrap().is_none());
    }

    #[test]
    fn a_message_that_broke_off_is_dropped_when_its_sender_died() {
        apart();
        let (ours, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).unwrap();
        fds::send(theirs.as_raw_fd(), b"\x01{\"Ready\":[1,[2,", &[], 0).unwrap();
        send(theirs.as_raw_fd(), &Report::Died(String::new()), &[]).unwrap();
        let (message, _) = Reader::default().receive::<Report>(&ours).unwrap().unwrap();
        assert!(matches!(message, Report::Died(_)));
    }
}
