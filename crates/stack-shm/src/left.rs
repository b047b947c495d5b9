//! Connections in memory, when the program of their process is exchanged under them.
//!
//! All threads stand still, then everything is written down: each guest's sockets with what travels to them, and the memories
//! that guests map. A link is written with each of its two ends; the first that comes makes it again, and it is forgotten
//! here with the second. What stands in a sender's ring only is offered anew by its next `send`.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use netkernel_service::{Close, Errno, Handle, Readiness, Remains, SocketAddress, take_descriptor};
use serde::{Deserialize, Serialize};

use crate::hub::{Hub, Listener, Waiting};
use crate::inbox::lock;
use crate::link::{Link, Side};
use crate::pairs::{LeftMemory, Serial};
use crate::post::Mailbox;
use crate::stack::{Joined, ShmStack, Socket};

/// Changes with what the fields of these texts mean.
pub const FORMAT: u32 = 1;

/// What the hub itself leaves.
#[derive(Debug, Serialize, Deserialize)]
struct LeftHub {
    serials: u64,
    numbers: u32,
    memories: Vec<LeftMemory>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftGuest {
    serial: u64,
    sockets: Vec<LeftSocket>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftSocket {
    /// The lower half.
    key: u32,
    domain: i32,
    kind: i32,
    protocol: i32,
    shadow: Option<RawFd>,
    options: Vec<(i32, i32, Vec<u8>)>,
    joined: Option<LeftJoined>,
    listener: Option<LeftListener>,
    adopted: bool,
    error: Option<i32>,
    way: Option<String>,
    mail: Option<LeftMail>,
}

/// Of a datagram socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LeftMail {
    /// Why what it sends, and what comes to it, is the fallback's.
    pub sends: Option<String>,
    pub comes: Option<String>,
    pub was_anywhere: bool,
    pub sent: u64,
    /// What waits, and from where.
    pub letters: Vec<((IpAddr, u16), Vec<u8>)>,
    /// So many of them go before what the fallback has.
    pub first: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftJoined {
    link: LeftLink,
    server: bool,
    local: Vec<u8>,
    peer: Vec<u8>,
    bound_here: bool,
    connecting: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftListener {
    backlog: usize,
    established: usize,
    waiting: Vec<LeftWaiting>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftWaiting {
    link: LeftLink,
    client: (IpAddr, u16),
    server: (IpAddr, u16),
}

/// A link, by where it stood in the memory of the program that left it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct LeftLink {
    pub id: u64,
    pub established: bool,
    /// The client's and the server's.
    pub ends: [LeftEnd; 2],
    /// Number of the memory, and slot.
    pub pair: Option<(u32, u32)>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct LeftEnd {
    /// Bytes as text.
    pub queue: String,
    pub taken: usize,
    pub received: u64,
    /// Position, byte, and whether it was asked for.
    pub urgent: Option<(u64, Option<u8>, bool)>,
    pub inline: bool,
    pub fin: bool,
    pub shut: bool,
    pub shut_read: bool,
    pub over: bool,
    pub error: Option<i32>,
    pub closed: bool,
    pub wants_read: bool,
    pub wants_write: bool,
}

pub(crate) fn to_text(bytes: impl Iterator<Item = u8>) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.flat_map(|b| [b >> 4, b & 15]).map(|n| char::from(DIGITS[usize::from(n)])).collect()
}

pub(crate) fn from_text(text: &str) -> VecDeque<u8> {
    let digit = |c: u8| char::from(c).to_digit(16).unwrap_or(0) as u8;
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// What has come so far.
#[derive(Default)]
pub(crate) struct Remade {
    /// Links that were made again, and whose other end has not come.
    links: Mutex<HashMap<u64, Arc<Link>>>,
    /// Guests, by serial.
    guests: Mutex<HashSet<u64>>,
}

impl Hub {
    /// What the next program needs besides what each guest leaves, and the descriptors that it names.
    pub fn written(&self) -> (String, Vec<RawFd>) {
        let (serials, numbers, memories) = self.pairs.written();
        let descriptors = memories.iter().map(|memory| memory.fd).collect();
        let left = LeftHub { serials, numbers, memories };
        (serde_json::to_string(&left).unwrap_or_default(), descriptors)
    }

    /// Before the first guest that was left comes.
    pub fn take_up(&self, left: &str) {
        if let Ok(left) = serde_json::from_str::<LeftHub>(left) {
            self.pairs.take_up(left.serials, left.numbers, left.memories);
        }
    }

    /// All guests that were left have come, or are lost.
    pub fn settle(&self) {
        self.pairs.settle();
        lock(&self.remade.guests).clear();
    }

    /// A guest is lost: if no stack took up what it left, its connections are reset.
    pub fn lose(&self, left: &str) {
        let Ok(left) = serde_json::from_str::<LeftGuest>(left) else { return };
        if !lock(&self.remade.guests).insert(left.serial) {
            return;
        }
        for socket in left.sockets {
            if let Some(joined) = &socket.joined {
                self.lose_link(&joined.link, if joined.server { Side::Server } else { Side::Client });
            }
            let waiting = socket.listener.into_iter().flat_map(|listener| listener.waiting);
            waiting.for_each(|waiting| self.lose_link(&waiting.link, Side::Server));
            // Nobody has it yet.
            drop(socket.shadow.and_then(|fd| take_descriptor(fd + 1)));
        }
        self.pairs.over(Serial(left.serial));
    }

    fn lose_link(&self, left: &LeftLink, side: Side) {
        if let Some(link) = self.link(left) {
            link.close(side, Close::Abort);
        }
    }

    /// The link of one of its ends. `None`: the memory of its payload is not there.
    fn link(&self, left: &LeftLink) -> Option<Arc<Link>> {
        let mut remade = lock(&self.remade.links);
        if let Some(link) = remade.remove(&left.id) {
            return Some(link);
        }
        let slot = match left.pair {
            Some((number, index)) => Some(self.pairs.slot(number, index)?),
            None => None,
        };
        let link = Arc::new(Link::remake(left, slot));
        if left.ends.iter().all(|end| !end.closed) {
            remade.insert(left.id, Arc::clone(&link));
        }
        Some(link)
    }
}

/// What one guest leaves.
struct Guest {
    serial: Serial,
    sockets: Vec<Found>,
}

/// A socket as it is, without what other threads may change still.
struct Found {
    left: LeftSocket,
    joined: Option<(Arc<Link>, Side)>,
    listener: Option<Arc<Listener>>,
    mailbox: Option<Arc<Mailbox>>,
}

impl Remains for Guest {
    fn written(&self) -> (String, Vec<RawFd>) {
        let mut sockets = Vec::new();
        for found in &self.sockets {
            let left = &found.left;
            let link = found.joined.as_ref().map(|(link, _)| link.written());
            let joined = left.joined.as_ref().zip(link).map(|(joined, link)| LeftJoined {
                link,
                server: joined.server,
                local: joined.local.clone(),
                peer: joined.peer.clone(),
                bound_here: joined.bound_here,
                connecting: joined.connecting,
            });
            sockets.push(LeftSocket {
                joined,
                listener: found.listener.as_ref().map(|listener| listener.written()),
                options: left.options.clone(),
                way: left.way.clone(),
                mail: left.mail.clone().zip(found.mailbox.as_ref()).map(|(mail, mailbox)| {
                    let (letters, first) = mailbox.written();
                    LeftMail { letters, first, ..mail }
                }),
                ..*left
            });
        }
        let descriptors = sockets.iter().filter_map(|socket| socket.shadow).collect();
        let left = LeftGuest { serial: self.serial.0, sockets };
        (serde_json::to_string(&left).unwrap_or_default(), descriptors)
    }
}

/// Sockets that a stack before this one left, by guest and lower half of their keys.
#[derive(Default)]
pub(crate) struct LeftSockets(HashMap<(u32, u32), (LeftSocket, Option<OwnedFd>)>);

impl ShmStack {
    pub(crate) fn remains(&self, guest: u32) -> Option<Box<dyn Remains>> {
        let person = self.people.get(guest as usize)?;
        let sockets = self.sockets.iter().flatten().filter(|socket| (socket.key >> 32) as u32 == guest);
        let sockets = sockets.map(|socket| self.found(socket)).collect();
        Some(Box::new(Guest { serial: person.serial, sockets }))
    }

    fn found(&self, socket: &Socket) -> Found {
        let bytes = |name: &SocketAddress| name.as_bytes().to_vec();
        let joined = socket.joined.as_ref();
        Found {
            left: LeftSocket {
                key: socket.key as u32,
                domain: socket.domain,
                kind: socket.kind,
                protocol: socket.protocol,
                shadow: socket.shadow.and_then(|shadow| self.fallback.lasting(shadow)),
                options: socket.options.clone(),
                joined: joined.map(|joined| LeftJoined {
                    // Known when all stand still.
                    link: LeftLink::default(),
                    server: joined.side == Side::Server,
                    local: bytes(&joined.local),
                    peer: bytes(&joined.peer),
                    bound_here: joined.bound_here,
                    connecting: joined.connecting,
                }),
                listener: None,
                adopted: socket.adopted,
                error: socket.error.map(|errno| errno.0),
                way: socket.way.clone(),
                mail: socket.mail.as_ref().map(|mail| mail.left()),
            },
            mailbox: socket.mail.as_ref().map(|mail| mail.mailbox()),
            joined: joined.map(|joined| (Arc::clone(&joined.link), joined.side)),
            listener: socket.listener.clone(),
        }
    }

    pub(crate) fn take_up_guest(&mut self, guest: u32, left: &str) {
        let Ok(left) = serde_json::from_str::<LeftGuest>(left) else { return };
        if let Some(person) = self.people.get_mut(guest as usize) {
            // The memories that it is part of know it by this.
            person.serial = Serial(left.serial);
        }
        lock(&self.hub.remade.guests).insert(left.serial);
        for socket in left.sockets {
            let shadow = socket.shadow.and_then(|fd| take_descriptor(fd + 1));
            self.left.0.insert((guest, socket.key), (socket, shadow));
        }
    }

    /// What nobody went on with.
    pub(crate) fn drop_left(&mut self, guest: u32) {
        let all = self.left.0.extract_if(|(of, _), _| *of == guest);
        for (_, (socket, _)) in all {
            if let Some(joined) = &socket.joined {
                self.hub.lose_link(&joined.link, if joined.server { Side::Server } else { Side::Client });
            }
            let waiting = socket.listener.into_iter().flat_map(|listener| listener.waiting);
            waiting.for_each(|waiting| self.hub.lose_link(&waiting.link, Side::Server));
        }
    }

    pub(crate) fn resume_socket(&mut self, key: u64, tells: bool) -> Result<Handle, Errno> {
        const LOST: Errno = Errno(libc::ECONNRESET);
        let at = ((key >> 32) as u32, key as u32);
        let (left, shadow) = self.left.0.remove(&at).ok_or(LOST)?;
        // Beside a connection in memory it stands for a port only.
        let tells = tells && left.joined.is_none();
        let shadow = shadow.map(|fd| self.fallback.adopt(key, fd, tells));
        if left.shadow.is_some() && !matches!(shadow, Some(Ok(_))) {
            return Err(LOST);
        }
        let mut joined = None;
        if let Some(one) = &left.joined {
            let side = if one.server { Side::Server } else { Side::Client };
            let link = self.hub.link(&one.link).ok_or(LOST)?;
            link.attach(side, Arc::clone(&self.inbox), key);
            let [local, peer] = [&one.local, &one.peer].map(|name| SocketAddress::from_bytes(name));
            let (bound_here, connecting) = (one.bound_here, one.connecting);
            joined = Some(Joined { link, side, local, peer, bound_here, connecting });
        }
        let mail = left.mail.is_some().then(|| self.new_mail(key));
        let handle = self.insert(Socket {
            key,
            domain: left.domain,
            kind: left.kind,
            protocol: left.protocol,
            shadow: shadow.and_then(Result::ok),
            options: left.options,
            joined,
            listener: None,
            adopted: left.adopted,
            error: left.error.map(Errno),
            way: left.way,
            mail,
        });
        if let Some(mail) = left.mail {
            self.resume_mail(handle, mail);
        }
        if let Some(one) = left.listener {
            self.resume_listener(handle, one);
        }
        Ok(handle)
    }

    fn resume_listener(&mut self, handle: Handle, left: LeftListener) {
        let mut waiting = VecDeque::new();
        let mut established = left.established;
        for (n, one) in left.waiting.into_iter().enumerate() {
            match self.hub.link(&one.link) {
                Some(link) => waiting.push_back(Waiting { link, client: one.client, server: one.server }),
                None => established -= usize::from(n < left.established),
            }
        }
        match self.make_listener(handle) {
            Ok(Some(listener)) => {
                listener.resume((left.backlog, established, waiting));
                self.publish(handle, listener);
            }
            _ => waiting.iter().for_each(|waiting| waiting.link.close(Side::Server, Close::Abort)),
        }
    }
}

impl Listener {
    fn written(&self) -> LeftListener {
        let queue = lock(&self.queue);
        let waiting = queue.waiting.iter().map(|one| LeftWaiting {
            link: one.link.written(),
            client: one.client,
            server: one.server,
        });
        LeftListener { backlog: queue.backlog, established: queue.established, waiting: waiting.collect() }
    }

    fn resume(&self, (backlog, established, waiting): (usize, usize, VecDeque<Waiting>)) {
        let mut queue = lock(&self.queue);
        (queue.backlog, queue.established, queue.waiting) = (backlog, established, waiting);
        drop(queue);
        self.inbox.report(self.key, Readiness::READ);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::Inbox;
    use netkernel_service::{GuestBytes, Segments};

    fn segments(bytes: &mut [u8]) -> Segments {
        // SAFETY: valid for as long as the caller's vector, which outlives the link's use of it in these tests.
        let first = unsafe { GuestBytes::new(bytes.as_mut_ptr(), bytes.len()) };
        Segments { first, second: GuestBytes::EMPTY }
    }

    #[test]
    fn a_link_that_is_made_again_gives_each_byte_once() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let link = Arc::new(Link::new(Arc::clone(&inbox), 1, false, None));
        assert!(link.establish());
        link.accepted(Arc::clone(&inbox), 2, false);
        let mut data: Vec<u8> = (0..20_100u32).map(|n| (n % 251) as u8).collect();
        let mut got = vec![0; data.len()];
        let (queued, offered) = data.split_at_mut(100);
        assert_eq!(link.send(Side::Client, &segments(queued), false), Ok(100));
        assert_eq!(link.send(Side::Client, &segments(offered), false), Err(Errno::AGAIN));
        // All of the queue, and the first of what stands in the sender's memory.
        assert_eq!(link.recv(Side::Server, &segments(&mut got[..150])).unwrap().bytes, 150);
        assert_eq!(link.shutdown(Side::Server, netkernel_service::Shutdown::Write), Ok(()));
        let text = serde_json::to_string(&link.written()).unwrap();
        drop(link);
        let link = Arc::new(Link::remake(&serde_json::from_str(&text).unwrap(), None));
        let mut ready = Vec::new();
        inbox.take(&mut ready, 100);
        ready.clear();
        link.attach(Side::Client, Arc::clone(&inbox), 1);
        link.attach(Side::Server, Arc::clone(&inbox), 2);
        inbox.take(&mut ready, 100);
        let told =
            |key: u64, what| ready.iter().any(|report| report.key == key && report.readiness.has(what));
        assert!(told(1, Readiness::WRITE) && told(1, Readiness::END) && told(2, Readiness::READ));
        assert_eq!(link.recv(Side::Server, &segments(&mut got[150..])), Err(Errno::AGAIN), "nothing twice");
        assert_eq!(link.send(Side::Client, &segments(offered), false), Ok(50), "what was taken before");
        assert_eq!(link.recv(Side::Server, &segments(&mut got[150..])).unwrap().bytes, 19_950);
        assert_eq!(link.recv(Side::Client, &segments(&mut [0; 1])).unwrap().bytes, 0);
        assert!(got == data);
    }

    #[test]
    fn bytes_survive_as_text() {
        let bytes: VecDeque<u8> = (0..=255).collect();
        assert_eq!(from_text(&to_text(bytes.iter().copied())), bytes);
    }

    /// The second of two ends finds what the first one made, and what it did meanwhile.
    #[test]
    fn an_end_that_comes_late_finds_what_the_other_one_did() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let link = Arc::new(Link::new(Arc::clone(&inbox), 1, false, None));
        assert!(link.establish());
        link.accepted(Arc::clone(&inbox), 2, false);
        let left = link.written();
        let hub = Hub::default();
        let first = hub.link(&left).unwrap();
        assert_eq!(first.send(Side::Client, &segments(&mut [7]), false), Ok(1));
        first.close(Side::Client, Close::Graceful);
        drop(first);
        let second = hub.link(&left).unwrap();
        let mut byte = [0; 2];
        assert_eq!(second.recv(Side::Server, &segments(&mut byte)).unwrap().bytes, 1);
        assert_eq!(byte[0], 7);
        assert_eq!(second.recv(Side::Server, &segments(&mut byte)).unwrap().bytes, 0);
        assert!(lock(&hub.remade.links).is_empty());
    }
}
