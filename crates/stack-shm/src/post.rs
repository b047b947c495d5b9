//! Datagram sockets that guests of one engine reach in memory, and what waits in them.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex};

use netkernel_service::{Readiness, Segments};

use crate::allowed::Allowed;
use crate::hub::{Network, Person};
use crate::inbox::{Inbox, lock};

/// What a waiting datagram counts for beside its payload: the kernel's own bookkeeping of a small one (`skb->truesize`), so that
/// as many wait as would there.
const OVERHEAD: usize = 768;
/// What may wait for all sockets of one guest, whatever SO_RCVBUF says.
const GUEST_ROOM: usize = 16 << 20;

const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

/// An address as both families see it, and a port.
pub(crate) type Place = (IpAddr, u16);

/// Bytes of one mailbox that go along when the program is exchanged.
const MOST_WRITTEN: usize = 1 << 20;

/// All mailboxes of one hub.
#[derive(Default)]
pub(crate) struct Post {
    /// More than one at a place only if their names were changed by connections.
    named: Mutex<HashMap<(Network, Place), Named>>,
    /// Another one whenever a name comes or goes: what was found before may not hold.
    generation: AtomicU64,
}

type Named = Vec<(Name, Arc<Mailbox>)>;

/// Under which address a datagram socket is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub network: Network,
    pub address: IpAddr,
    pub port: u16,
    /// `::` of a socket that takes IPv4 too.
    pub both_families: bool,
    /// A connected socket hears this one only.
    pub peer: Option<Place>,
}

/// What one datagram socket has in memory. The fallback's socket has a queue of its own.
pub(crate) struct Mailbox {
    pub person: Person,
    /// Whose guests may send to it in memory.
    pub allowed: Arc<Allowed>,
    pub inbox: Arc<Inbox>,
    pub key: u64,
    pub queue: Mutex<Queue>,
}

#[derive(Default)]
pub(crate) struct Queue {
    letters: VecDeque<Letter>,
    /// What waits counts for so much, and may for so much and one datagram more: SO_RCVBUF, as the kernel counts.
    weight: usize,
    room: usize,
    closed: bool,
    /// Nothing was there to receive; a report is due when that changes.
    wants_read: bool,
    /// How many were put in, taken out, and had no room.
    put: u64,
    taken: u64,
    dropped: u64,
    /// So many of them, from the first one on, go before whatever the fallback has.
    first: u64,
}

/// A datagram.
pub(crate) struct Letter {
    pub from: Place,
    pub data: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    Waits,
    /// There was no room: the datagram is lost, as datagrams are.
    Lost,
    /// Nobody receives there any more.
    Closed,
}

impl Post {
    pub fn generation(&self) -> u64 {
        // SYNC: post-generation
        self.generation.load(Acquire)
    }

    /// Another name for a mailbox, or none.
    pub fn rename(&self, mailbox: &Arc<Mailbox>, old: Option<Name>, new: Option<Name>) {
        let mut named = lock(&self.named);
        if let Some(old) = old
            && let Some(list) = named.get_mut(&old.key())
        {
            list.retain(|(_, other)| !Arc::ptr_eq(other, mailbox));
            if list.is_empty() {
                named.remove(&old.key());
            }
        }
        if let Some(new) = new {
            named.entry(new.key()).or_default().push((new, Arc::clone(mailbox)));
        }
        // SYNC: post-generation - who sees the new one, and asks again, finds the names as they are now.
        self.generation.fetch_add(1, Release);
    }

    /// Whether anybody is reached there.
    pub fn knows(&self, network: Network, (address, port): Place) -> bool {
        let named = lock(&self.named);
        named.contains_key(&(network, (address, port)))
            || ANY.iter().any(|&any| named.contains_key(&(network, (any, port))))
    }

    /// A sender that put something into mailboxes now sends to this port by the fallback, to one of these addresses.
    pub fn goes_first(&self, network: Network, port: u16, addresses: &[IpAddr]) {
        let named = lock(&self.named);
        for &address in addresses.iter().chain(&ANY) {
            for (_, mailbox) in named.get(&(network, (address, port))).into_iter().flatten() {
                mailbox.goes_first();
            }
        }
    }

    /// Who hears a datagram, as `udp_lib_lookup` of the kernel finds it: exactly at the address first, then at any. `None` also
    /// if several would do: which one is the kernel's choice.
    pub fn find(&self, network: Network, (address, port): Place, from: Place) -> Option<Arc<Mailbox>> {
        let named = lock(&self.named);
        let hears = |name: &Name| {
            let family = name.address.is_ipv4() == address.is_ipv4();
            let reached = family || name.both_families && address.is_ipv4();
            reached && name.peer.is_none_or(|peer| peer == from)
        };
        let only = |addresses: &[IpAddr]| {
            let lists = addresses.iter().filter_map(|&address| named.get(&(network, (address, port))));
            let mut found = lists.flatten().filter(|(name, _)| hears(name));
            found.next().map(|(_, mailbox)| (mailbox, found.next().is_none()))
        };
        match only(&[address]).or_else(|| only(&ANY)) {
            Some((mailbox, true)) => Some(Arc::clone(mailbox)),
            _ => None,
        }
    }
}

impl Name {
    fn key(&self) -> (Network, Place) {
        (self.network, (self.address, self.port))
    }
}

impl Mailbox {
    /// The policy: may this guest send here in memory? An error is the reason, for people.
    pub fn admits(&self, person: &Person) -> Result<(), String> {
        self.allowed.admits(&self.person, person, "receiver")
    }

    /// How much may wait: SO_RCVBUF.
    pub fn set_room(&self, bytes: usize) {
        lock(&self.queue).room = bytes;
    }

    /// A copy of the datagram waits, if there is room.
    pub fn put(&self, from: Place, data: &Segments) -> Put {
        let weight = data.len() + OVERHEAD;
        let mut queue = lock(&self.queue);
        if queue.closed {
            return Put::Closed;
        }
        // As the kernel has it: who was not above the limit before gets one more.
        if queue.weight > queue.room || !self.charge(weight) {
            queue.dropped += 1;
            return Put::Lost;
        }
        let mut bytes = vec![0; data.len()];
        data.copy_to(&mut bytes);
        queue.letters.push_back(Letter { from, data: bytes });
        queue.weight += weight;
        queue.put += 1;
        let tell = std::mem::take(&mut queue.wants_read);
        drop(queue);
        if tell {
            self.inbox.report(self.key, Readiness::READ);
        }
        Put::Waits
    }

    /// What its guest may have waiting is bounded, whatever its sockets say.
    fn charge(&self, weight: usize) -> bool {
        let waiting = &self.person.mail;
        let more = |now: usize| (now + weight <= GUEST_ROOM).then_some(now + weight);
        waiting.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    /// The oldest. After `None` there is a report when one comes.
    pub fn take(&self) -> Option<Letter> {
        let mut queue = lock(&self.queue);
        let Some(letter) = queue.letters.pop_front() else {
            queue.wants_read = true;
            return None;
        };
        let weight = letter.data.len() + OVERHEAD;
        queue.weight -= weight;
        queue.taken += 1;
        drop(queue);
        self.person.mail.fetch_sub(weight, Relaxed);
        Some(letter)
    }

    /// Bytes of the oldest.
    pub fn next(&self) -> Option<usize> {
        lock(&self.queue).letters.front().map(|letter| letter.data.len())
    }

    /// What waits now goes before what the fallback gets from now on: a sender changes over to it.
    pub fn goes_first(&self) {
        let mut queue = lock(&self.queue);
        queue.first = queue.put;
    }

    /// Whether the oldest goes before what the fallback has.
    pub fn is_first(&self) -> bool {
        let queue = lock(&self.queue);
        queue.taken < queue.first
    }

    /// Nobody receives any more.
    pub fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        self.person.mail.fetch_sub(queue.weight, Relaxed);
        queue.weight = 0;
        queue.letters = VecDeque::new();
    }

    /// What waits, as far as that is not much, and how many of them go before what the fallback has. The rest is lost, as datagrams are.
    pub fn written(&self) -> (Vec<(Place, Vec<u8>)>, usize) {
        let queue = lock(&self.queue);
        let mut bytes = 0;
        let few = queue.letters.iter().take_while(|letter| {
            bytes += letter.data.len() + OVERHEAD;
            bytes <= MOST_WRITTEN
        });
        let letters: Vec<_> = few.map(|letter| (letter.from, letter.data.clone())).collect();
        let first = queue.first.saturating_sub(queue.taken).min(letters.len() as u64) as usize;
        (letters, first)
    }

    /// What waited for one that is no more, and how many of them go first.
    pub fn resume(&self, letters: Vec<(Place, Vec<u8>)>, first: usize) {
        let mut queue = lock(&self.queue);
        for (from, data) in letters {
            let weight = data.len() + OVERHEAD;
            if !self.charge(weight) {
                break;
            }
            queue.letters.push_back(Letter { from, data });
            queue.weight += weight;
            queue.put += 1;
        }
        queue.first = queue.put.min(first as u64);
    }

    /// How many came, and how many there was no room for.
    pub fn counts(&self) -> (u64, u64) {
        let queue = lock(&self.queue);
        (queue.taken, queue.dropped)
    }
}

impl Queue {
    /// With a report for the first one.
    pub fn new(room: usize) -> Mutex<Queue> {
        Mutex::new(Queue { room, wants_read: true, ..Queue::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORK: Network = Network(1, 2);

    fn mailbox(room: usize) -> Arc<Mailbox> {
        let inbox = Arc::new(Inbox::new().unwrap());
        let (person, queue) = (Person::unknown(), Queue::new(room));
        let allowed = Arc::new(Allowed { everybody: true, ..Allowed::default() });
        Arc::new(Mailbox { person, allowed, inbox, key: 7, queue })
    }

    fn at(address: &str) -> Name {
        let address: IpAddr = address.parse().unwrap();
        Name { network: NETWORK, address, port: 9, both_families: false, peer: None }
    }

    fn place(address: &str, port: u16) -> Place {
        (address.parse().unwrap(), port)
    }

    fn put(mailbox: &Mailbox, bytes: &[u8]) -> Put {
        let mut copy = bytes.to_vec();
        // SAFETY: the copy lives longer than the call.
        let first = unsafe { netkernel_service::GuestBytes::new(copy.as_mut_ptr(), copy.len()) };
        let second = netkernel_service::GuestBytes::EMPTY;
        mailbox.put(place("127.0.0.1", 1), &Segments { first, second })
    }

    fn reports(mailbox: &Mailbox) -> usize {
        let mut out = Vec::new();
        mailbox.inbox.take(&mut out, 99);
        assert!(out.iter().all(|ready| ready.key == 7));
        out.len()
    }

    #[test]
    fn the_most_specific_hears_and_who_is_connected_hears_its_peer() {
        let post = Post::default();
        let names = [at("127.0.0.1"), at("0.0.0.0"), at("::1"), Name { both_families: true, ..at("::") }];
        let [exact, any, six, both] = names.map(|name| {
            let mailbox = mailbox(9999);
            post.rename(&mailbox, None, Some(name));
            (mailbox, name)
        });
        let found = |address: &str, network, port| {
            post.find(network, place(address, port), place("127.0.0.1", 1)).map(|found| Arc::as_ptr(&found))
        };
        let is = |mailbox: &Arc<Mailbox>| Some(Arc::as_ptr(mailbox));
        assert_eq!(found("127.0.0.1", NETWORK, 9), is(&exact.0));
        assert_eq!(found("::1", NETWORK, 9), is(&six.0));
        assert_eq!(found("::2", NETWORK, 9), is(&both.0));
        assert_eq!(found("127.0.0.2", NETWORK, 9), None, "two would do");
        post.rename(&both.0, Some(both.1), None);
        assert_eq!(found("127.0.0.2", NETWORK, 9), is(&any.0));
        assert_eq!((found("127.0.0.1", NETWORK, 8), found("127.0.0.1", Network(1, 3), 9)), (None, None));
        // Connected: the next best hears all others.
        let name = Name { peer: Some(place("127.0.0.1", 1)), ..exact.1 };
        let before = post.generation();
        post.rename(&exact.0, Some(exact.1), Some(name));
        assert_ne!(post.generation(), before);
        assert_eq!(found("127.0.0.1", NETWORK, 9), is(&exact.0));
        let stranger = post.find(NETWORK, place("127.0.0.1", 9), place("127.0.0.1", 2));
        assert!(Arc::ptr_eq(&stranger.unwrap(), &any.0));
        for (mailbox, name) in [(&exact.0, name), (&any.0, any.1), (&six.0, six.1)] {
            post.rename(mailbox, Some(name), None);
        }
        assert!(!post.knows(NETWORK, place("127.0.0.1", 9)) && lock(&post.named).is_empty());
    }

    #[test]
    fn what_waits_is_told_once_and_bounded() {
        let mailbox = mailbox(2 * OVERHEAD + 1);
        assert_eq!([0, 1, 2, 3].map(|n| put(&mailbox, &vec![n; n.into()])), {
            // The third one is above, the fourth finds it so.
            [Put::Waits, Put::Waits, Put::Waits, Put::Lost]
        });
        assert_eq!((reports(&mailbox), mailbox.next(), mailbox.counts()), (1, Some(0), (0, 1)));
        assert!(!mailbox.is_first());
        mailbox.goes_first();
        for n in 0..3 {
            assert!(mailbox.is_first());
            assert_eq!(mailbox.take().unwrap().data, vec![n; n.into()]);
        }
        assert_eq!(put(&mailbox, b"not told of: nobody asked"), Put::Waits);
        assert!(reports(&mailbox) == 0 && mailbox.take().is_some() && mailbox.take().is_none());
        assert!(!mailbox.is_first());
        assert_eq!((put(&mailbox, b"told"), reports(&mailbox)), (Put::Waits, 1));
        assert_ne!(mailbox.person.mail.load(Relaxed), 0);
        mailbox.close();
        assert_eq!((mailbox.person.mail.load(Relaxed), put(&mailbox, b"x")), (0, Put::Closed));
        assert!(mailbox.take().is_none());
    }
}
