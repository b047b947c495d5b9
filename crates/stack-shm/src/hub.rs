use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use netkernel_service::{Close, Limits, Readiness, SocketAddress};

use crate::allowed::Allowed;
use crate::inbox::{Inbox, lock};
use crate::left::Remade;
use crate::link::{Link, Side};
use crate::pairs::{Pairs, Serial, Slot};
use crate::post::Post;

/// A network namespace: addresses mean something inside one only. Device and inode of its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Network(pub u64, pub u64);

/// Owner of guests that nobody told of.
pub(crate) const NOBODY: u32 = u32::MAX;

/// All listeners and datagram sockets of guests of one engine.
#[derive(Default)]
pub struct Hub {
    listeners: Mutex<Listeners>,
    pub(crate) pairs: Pairs,
    pub(crate) post: Post,
    pub(crate) remade: Remade,
}

/// A guest, as the policy sees it.
#[derive(Clone)]
pub(crate) struct Person {
    /// The user whose it is.
    pub owner: u32,
    /// `None`: of none that the configuration names.
    pub tenant: Option<u32>,
    /// Its tenant's name.
    pub name: Arc<str>,
    /// What its tenant may use; `None`: it is not served by queues, so that it cannot have pairs.
    pub limits: Option<Limits>,
    /// Captures of it that are under way.
    pub captures: Arc<AtomicU32>,
    pub serial: Serial,
    /// What its waiting datagrams count for, of all its sockets.
    pub mail: Arc<AtomicUsize>,
}

impl Person {
    /// Nobody told of this one.
    pub fn unknown() -> Person {
        let (captures, mail, name) = (Arc::default(), Arc::default(), Arc::from(""));
        Person { owner: NOBODY, tenant: None, name, limits: None, captures, serial: Serial(0), mail }
    }

    pub fn is_one_with(&self, other: &Person) -> bool {
        self.owner != NOBODY
            && other.owner != NOBODY
            && self.tenant == other.tenant
            && (self.tenant.is_some() || self.owner == other.owner)
    }

    fn is_captured(&self) -> bool {
        self.captures.load(Relaxed) > 0
    }

    /// Nothing would hold it back.
    fn is_free(&self) -> bool {
        self.limits.as_ref().is_some_and(Limits::are_idle)
    }
}

#[derive(Default)]
struct Listeners {
    at: HashMap<(Network, u16), Vec<Arc<Listener>>>,
    /// Takes turns among the listeners of one port (SO_REUSEPORT).
    turn: usize,
}

pub(crate) struct Listener {
    pub network: Network,
    pub address: IpAddr,
    pub port: u16,
    /// `::` of a socket that takes IPv4 too.
    pub both_families: bool,
    pub person: Person,
    /// Whose guests may be joined with this one.
    pub allowed: Arc<Allowed>,
    /// Connections may be pairs.
    pub pair: bool,
    /// Whose guests' sockets these are: for the reason that people are told.
    pub guest: u32,
    pub inbox: Arc<Inbox>,
    pub key: u64,
    pub queue: Mutex<Queue>,
}

#[derive(Default)]
pub(crate) struct Queue {
    pub backlog: usize,
    closed: bool,
    pub waiting: VecDeque<Waiting>,
    /// So many of them, the oldest, are established.
    pub established: usize,
    /// Length at which those whose client left before they were established are taken out.
    tidy_at: usize,
}

/// A connection that was not accepted.
pub(crate) struct Waiting {
    pub link: Arc<Link>,
    /// Addresses of the client and of this end.
    pub client: (IpAddr, u16),
    pub server: (IpAddr, u16),
}

impl Hub {
    pub(crate) fn add(&self, listener: Arc<Listener>) {
        let mut listeners = lock(&self.listeners);
        listeners.at.entry((listener.network, listener.port)).or_default().push(listener);
    }

    pub(crate) fn remove(&self, listener: &Arc<Listener>) {
        let key = (listener.network, listener.port);
        let mut listeners = lock(&self.listeners);
        if let Some(list) = listeners.at.get_mut(&key) {
            list.retain(|other| !Arc::ptr_eq(other, listener));
            if list.is_empty() {
                listeners.at.remove(&key);
            }
        }
    }

    /// Who listens at an address: exactly there first, as the kernel looks it up.
    pub(crate) fn find(&self, network: Network, address: IpAddr, port: u16) -> Option<Arc<Listener>> {
        let mut listeners = lock(&self.listeners);
        listeners.turn = listeners.turn.wrapping_add(1);
        let turn = listeners.turn;
        let list = listeners.at.get(&(network, port))?;
        let pick = |matches: &dyn Fn(&Listener) -> bool| {
            let n = list.iter().filter(|l| matches(l)).count();
            list.iter().filter(|l| matches(l)).nth(turn.checked_rem(n)?).cloned()
        };
        pick(&|l| l.address == address)
            .or_else(|| pick(&|l| l.address.is_unspecified() && l.address.is_ipv4() == address.is_ipv4()))
            .or_else(|| pick(&|l| l.both_families && address.is_ipv4()))
    }
}

impl Listener {
    pub fn set_backlog(&self, backlog: i32) {
        // Linux takes one connection more than the backlog says; a negative one means all that it allows.
        lock(&self.queue).backlog = usize::try_from(backlog).unwrap_or(4096).min(4096) + 1;
        self.establish();
    }

    /// The policy: may this guest be joined with the listener's? An error is the reason, for people.
    pub fn admits(&self, person: &Person) -> Result<(), String> {
        self.allowed.admits(&self.person, person, "listener")
    }

    /// The policy: may the two guests map the same memory? An error is the reason, for people.
    pub fn pairs_with(&self, person: &Person, pairs: &Pairs) -> Result<Slot, &'static str> {
        if !person.is_one_with(&self.person) {
            return Err("they belong to different tenants");
        }
        if !person.is_free() || !self.person.is_free() {
            return Err("their tenant's rates are limited");
        }
        if person.is_captured() || self.person.is_captured() {
            return Err("one of them is captured, and the engine sees nothing of memory that both map");
        }
        pairs.take(person.serial, self.person.serial)
    }

    /// A new connection. `false`: the listener is closed.
    pub fn enter(&self, waiting: Waiting) -> bool {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return false;
        }
        if queue.waiting.len() >= queue.tidy_at {
            queue.waiting.retain(|waiting| waiting.link.is_established() || !waiting.link.client_left());
            queue.tidy_at = (2 * queue.waiting.len()).max(64);
        }
        queue.waiting.push_back(waiting);
        drop(queue);
        self.establish();
        true
    }

    /// Establishes as many connections as the backlog allows.
    fn establish(&self) {
        let mut queue = lock(&self.queue);
        let mut new = false;
        while queue.established < queue.backlog
            && let Some(waiting) = queue.waiting.get(queue.established)
        {
            if !waiting.link.establish() {
                // Its client gave up.
                let at = queue.established;
                queue.waiting.remove(at);
                continue;
            }
            queue.established += 1;
            new = true;
        }
        drop(queue);
        if new {
            self.inbox.report(self.key, Readiness::READ);
        }
    }

    pub fn acceptable(&self) -> bool {
        lock(&self.queue).established > 0
    }

    /// The oldest connection.
    pub fn take(&self) -> Option<Waiting> {
        let mut queue = lock(&self.queue);
        if queue.established == 0 {
            return None;
        }
        let waiting = queue.waiting.pop_front()?;
        queue.established -= 1;
        drop(queue);
        self.establish();
        Some(waiting)
    }

    /// Nobody waits.
    pub fn is_idle(&self) -> bool {
        lock(&self.queue).waiting.is_empty()
    }

    /// Nobody can come any more. False: somebody has, and nothing has changed.
    pub fn close_if_idle(&self) -> bool {
        let mut queue = lock(&self.queue);
        queue.closed |= queue.waiting.is_empty();
        queue.closed
    }

    /// Nobody accepts any more.
    pub fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        for waiting in queue.waiting.drain(..) {
            if waiting.link.is_established() {
                waiting.link.close(Side::Server, Close::Abort);
            } else {
                waiting.link.refuse();
            }
        }
    }
}

/// Address and port; `::` and IPv4 in IPv6 as what they mean. `None`: no address of the internet.
pub(crate) fn canonical(address: &SocketAddress) -> Option<(IpAddr, u16)> {
    let address = address.to_std()?;
    Some((address.ip().to_canonical(), address.port()))
}

/// The address as a socket of `domain` sees it.
pub(crate) fn of_domain(domain: i32, (ip, port): (IpAddr, u16)) -> SocketAddress {
    let ip = match ip {
        IpAddr::V4(v4) if domain == libc::AF_INET6 => IpAddr::V6(v4.to_ipv6_mapped()),
        ip => ip,
    };
    SocketAddress::from(std::net::SocketAddr::from((ip, port)))
}

/// Where a connect to this address leads: the unspecified one means the host itself.
pub(crate) fn destination(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}
