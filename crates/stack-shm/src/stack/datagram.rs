//! Datagram sockets: what goes to guests of this engine is put into their mailboxes, everything else is the fallback's.
//!
//! A mailbox is known to the hub under the name that the shadow has. Only a shadow that has its port for itself is: whom the kernel
//! would choose is then no question. A sender or a receiver with something that only the kernel can do is the fallback's from
//! then on and for good, so that the order of what one sends to the other is kept: what waits in memory is older.

use std::borrow::Cow;
use std::sync::Weak;

use netkernel_service::now_ns;

use super::*;
use crate::left::LeftMail;
use crate::post::{Mailbox, Name, Place, Put, Queue};

/// For so long it is believed that an address is, or is not, the host's.
const BELIEF_NS: u64 = 1_000_000_000;
/// Known addresses above which those are forgotten that are not believed any more.
const ADDRESSES: usize = 1024;
/// Addresses that one guest may have asked for in that time; what it sends to more of them is the fallback's.
const QUESTIONS: u32 = 64;
/// SO_RCVBUF of a fallback that does not tell.
const ROOM: usize = 212_992;
/// Datagrams that the fallback may get between a bind and the moment when the hub knows of it; more are not believed to be that old.
const OLDER: u32 = 64;
/// Longest payloads: what the lengths in the headers of IPv4 and IPv6 can say.
const LONGEST: usize = 65507;
const LONGEST_V6: usize = 65527;

type Reason = Cow<'static, str>;

/// What a datagram socket has beside its shadow.
pub(crate) struct Mail {
    hub: Arc<Hub>,
    mailbox: Arc<Mailbox>,
    /// Under which the hub knows the mailbox.
    name: Option<Name>,
    /// The shadow's names. `None`: it has no port, is not connected.
    local: Option<Place>,
    peer: Option<SocketAddress>,
    only_v6: bool,
    /// It was connected while it was bound to no address.
    was_anywhere: bool,
    /// Why all that it sends, and all that comes to it, is the fallback's.
    sends: Option<Reason>,
    comes: Option<Reason>,
    route: Option<Route>,
    /// Datagrams that it put into mailboxes.
    sent: u64,
    /// The fallback may have something for it.
    fallback_ready: bool,
    /// So many that the fallback has may be older than what the mailbox has.
    fallback_older: u32,
    /// Receive from the fallback first, the next time.
    fallback_first: bool,
    /// Whose datagram comes next, as `next_datagram` said.
    next: Option<Way>,
}

/// Where the last datagram went.
struct Route {
    to: SocketAddress,
    /// Of the hub, and a time: after which it must be found again.
    generation: u64,
    until_ns: u64,
    way: Result<(Weak<Mailbox>, Place), Reason>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Memory,
    Fallback,
}

impl Mail {
    /// Whether a datagram goes by memory is asked for again.
    fn forget_route(&mut self) {
        if let Some(route) = &mut self.route {
            route.until_ns = 0;
        }
    }

    fn sends_by_fallback(&mut self, why: impl Into<Reason>) {
        self.sends.get_or_insert_with(|| why.into());
        self.forget_route();
    }

    fn rename(&mut self, name: Option<Name>) {
        if name == self.name {
            return;
        }
        self.hub.post.rename(&self.mailbox, self.name, name);
        match (self.name, name) {
            // What came before the hub knew it.
            (None, Some(_)) => (self.fallback_older, self.fallback_ready) = (OLDER, true),
            (Some(_), None) => self.mailbox.goes_first(),
            _ => {}
        }
        self.name = name;
        self.forget_route();
    }

    /// In which order to look for the next datagram.
    fn order(&self) -> [Way; 2] {
        let fallback_first = match self.next {
            Some(way) => way == Way::Fallback,
            None if self.mailbox.is_first() => false,
            None => self.fallback_older > 0 || self.fallback_first,
        };
        if fallback_first { [Way::Fallback, Way::Memory] } else { [Way::Memory, Way::Fallback] }
    }

    /// As [`Mail::order`], to receive now; the next time it is the other's turn.
    fn take_order(&mut self) -> [Way; 2] {
        let order = self.order();
        self.next = None;
        self.fallback_first = order[0] == Way::Memory;
        order
    }

    /// The fallback has nothing, and reports what comes.
    fn fallback_is_empty(&mut self) {
        (self.fallback_ready, self.fallback_older) = (false, 0);
    }
}

impl Drop for Mail {
    fn drop(&mut self) {
        self.rename(None);
        self.mailbox.close();
    }
}

/// What an option means for the ways of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// It changes nothing between guests of one host.
    Nothing,
    /// What is received, or sent, is the fallback's.
    Comes,
    Sends,
    Both,
}

impl Mail {
    pub(crate) fn mailbox(&self) -> Arc<Mailbox> {
        Arc::clone(&self.mailbox)
    }

    /// What the next program is told, but for what waits: others may put something in still.
    pub(crate) fn left(&self) -> LeftMail {
        let text = |why: &Option<Reason>| why.as_ref().map(|why| why.to_string());
        LeftMail {
            sends: text(&self.sends),
            comes: text(&self.comes),
            was_anywhere: self.was_anywhere,
            sent: self.sent,
            ..LeftMail::default()
        }
    }
}

impl ShmStack {
    /// Goes on with what another program left; the socket is there.
    pub(crate) fn resume_mail(&mut self, handle: Handle, left: LeftMail) {
        let Some(mail) = self.mail(handle) else { return };
        mail.sends = left.sends.map(Cow::Owned);
        mail.comes = left.comes.map(Cow::Owned);
        (mail.was_anywhere, mail.sent) = (left.was_anywhere, left.sent);
        mail.mailbox.resume(left.letters, left.first);
        let key = mail.mailbox.key;
        self.by_key.insert(key, handle.0);
        self.mail_named(handle);
    }

    fn mail(&mut self, handle: Handle) -> Option<&mut Mail> {
        self.sockets.get_mut(handle.0 as usize)?.as_mut()?.mail.as_deref_mut()
    }

    /// For a new datagram socket.
    pub(crate) fn new_mail(&mut self, key: u64) -> Box<Mail> {
        let person = self.person(key);
        let unknown = (person.owner == NOBODY).then_some(Cow::Borrowed("whose guest this is, is not known"));
        let mailbox = Arc::new(Mailbox {
            person,
            allowed: Arc::clone(&self.settings.allowed),
            inbox: Arc::clone(&self.inbox),
            key,
            queue: Queue::new(ROOM),
        });
        Box::new(Mail {
            hub: Arc::clone(&self.hub),
            mailbox,
            name: None,
            local: None,
            peer: None,
            only_v6: false,
            was_anywhere: false,
            sends: unknown.clone(),
            comes: unknown,
            route: None,
            sent: 0,
            fallback_ready: true,
            fallback_older: 0,
            fallback_first: false,
            next: None,
        })
    }

    /// The shadow has other names, or may have: the hub is told.
    pub(super) fn mail_named(&mut self, handle: Handle) {
        let network = self.settings.network;
        if self.mail(handle).is_none() {
            return;
        }
        let Ok(domain) = self.socket(handle).map(|socket| socket.domain) else { return };
        let Ok(shadow) = self.shadow(handle) else { return };
        let local = self.fallback.local_name(shadow).ok();
        let local = local.and_then(|name| canonical(&name)).filter(|&(_, port)| port != 0);
        let peer = self.fallback.peer_name(shadow).ok();
        let only_v6 = domain == libc::AF_INET6
            && self.int_option(shadow, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY).is_some_and(|only| only != 0);
        let Some(mail) = self.mail(handle) else { return };
        if peer.is_some() {
            mail.was_anywhere |= mail.local.is_some_and(|(ip, _)| ip.is_unspecified());
        } else if mail.peer.is_some() && domain == libc::AF_INET6 {
            // Linux keeps the old peer's address (`sk_v6_daddr`), and goes on to compare it.
            mail.comes.get_or_insert(Cow::Borrowed(
                "it was connected, and only the kernel knows what it hears since",
            ));
        } else if local.is_none() {
            mail.was_anywhere = false;
        } else if mail.was_anywhere {
            // While it was connected, others could bind to the port at single addresses.
            mail.comes.get_or_insert(Cow::Borrowed("it was connected, and may share its port since"));
        }
        (mail.local, mail.peer, mail.only_v6) = (local, peer, only_v6);
        mail.forget_route();
        let name = match local {
            Some((address, port)) if mail.comes.is_none() && !is_link_local(address) => Some(Name {
                network,
                address,
                port,
                both_families: domain == libc::AF_INET6 && address.is_unspecified() && !only_v6,
                peer: mail.peer.as_ref().and_then(canonical),
            }),
            _ => None,
        };
        mail.rename(name);
        if name.is_some() {
            self.make_room(handle, shadow);
        }
    }

    pub(super) fn mail_connected(&mut self, handle: Handle, succeeded: bool) {
        if !succeeded
            && let Some(mail) = self.mail(handle)
            && mail.peer.is_some()
        {
            // Linux sends some of what follows to the new address (`inet->cork.fl`).
            mail.sends_by_fallback(
                "a later connect failed, and only the kernel knows where it sends to since",
            );
        }
        self.mail_named(handle);
    }

    /// As much may wait as the shadow's SO_RCVBUF says.
    fn make_room(&mut self, handle: Handle, shadow: Handle) {
        let room = self.int_option(shadow, libc::SOL_SOCKET, libc::SO_RCVBUF);
        let room = room.and_then(|room| usize::try_from(room).ok()).unwrap_or(ROOM);
        if let Some(mail) = self.mail(handle) {
            mail.mailbox.set_room(room);
        }
    }

    fn int_option(&mut self, shadow: Handle, level: i32, name: i32) -> Option<i32> {
        let mut value = [0; 4];
        self.fallback.option(shadow, level, name, &mut value).ok()?;
        Some(i32::from_ne_bytes(value))
    }

    /// The fallback took an option.
    pub(super) fn mail_option(&mut self, handle: Handle, level: i32, name: i32, value: &[u8]) {
        if (level, name) == (libc::SOL_SOCKET, libc::SO_RCVBUF)
            && let Ok(shadow) = self.shadow(handle)
        {
            self.make_room(handle, shadow);
        }
        let meaning = meaning(level, name, value);
        let Some(mail) = self.mail(handle) else { return };
        let why = || -> Reason { format!("option {name} of level {level} is set").into() };
        if matches!(meaning, Meaning::Sends | Meaning::Both) {
            mail.sends_by_fallback(why());
        }
        if matches!(meaning, Meaning::Comes | Meaning::Both) {
            let shares = level == libc::SOL_SOCKET && matches!(name, libc::SO_REUSEADDR | libc::SO_REUSEPORT);
            let why = if shares {
                "others may have its port too (SO_REUSEADDR, SO_REUSEPORT)".into()
            } else {
                why()
            };
            self.comes_by_fallback(handle, why);
        }
    }

    fn comes_by_fallback(&mut self, handle: Handle, why: Reason) {
        if let Some(mail) = self.mail(handle) {
            mail.comes.get_or_insert(why);
            mail.rename(None);
        }
    }

    pub(super) fn mail_shut(&mut self, handle: Handle, how: Shutdown) {
        let why = "it was shut down";
        if how != Shutdown::Read
            && let Some(mail) = self.mail(handle)
        {
            mail.sends_by_fallback(why);
        }
        if how != Shutdown::Write {
            self.comes_by_fallback(handle, why.into());
        }
        if let Some(mail) = self.mail(handle) {
            mail.fallback_ready = true;
        }
    }

    /// Reports of the fallback.
    pub(super) fn mail_reported(&mut self, reports: &[Ready]) {
        for report in reports {
            if let Some(&handle) = self.by_key.get(&report.key)
                && let Some(mail) = self.mail(Handle(handle))
            {
                mail.fallback_ready = true;
            }
        }
    }

    pub(super) fn send_mail(&mut self, handle: Handle, datagrams: &[Datagram]) -> Result<usize, Errno> {
        let now = now_ns();
        // The first one that is the fallback's and was not sent.
        let mut start = 0;
        for (at, datagram) in datagrams.iter().enumerate() {
            let Some((mailbox, from)) = self.receiver(handle, datagram, now) else { continue };
            if start < at {
                let sent = self.send_by_fallback(handle, &datagrams[start..at], start)?;
                if sent < at {
                    return Ok(sent);
                }
            }
            start = at;
            let put = mailbox.put(from, &datagram.data);
            let Some(mail) = self.mail(handle) else { continue };
            if put == Put::Closed {
                // The fallback tells what that means.
                mail.forget_route();
            } else {
                mail.sent += 1;
                start += 1;
            }
        }
        if start < datagrams.len() {
            return self.send_by_fallback(handle, &datagrams[start..], start);
        }
        Ok(start)
    }

    /// `done`: so many before them are sent. How many are then.
    fn send_by_fallback(
        &mut self,
        handle: Handle,
        datagrams: &[Datagram],
        done: usize,
    ) -> Result<usize, Errno> {
        let shadow = self.shadow(handle)?;
        let sent = self.fallback.send_datagrams(shadow, datagrams);
        if self.mail(handle).is_some_and(|mail| mail.local.is_none()) {
            // It has a port now.
            self.mail_named(handle);
        }
        match sent {
            Ok(sent) => Ok(done + sent),
            // Told again when these are the first.
            Err(_) if done > 0 => Ok(done),
            Err(errno) => Err(errno),
        }
    }

    /// Who hears a datagram in memory, and where it comes from. `None`: it is the fallback's.
    fn receiver(&mut self, handle: Handle, datagram: &Datagram, now: u64) -> Option<(Arc<Mailbox>, Place)> {
        let network = self.settings.network;
        let mail = self.mail(handle)?;
        if !datagram.control.is_empty() {
            mail.sends_by_fallback("it sent control messages");
        }
        let to = if datagram.to.is_empty() { mail.peer? } else { datagram.to };
        let way = if mail.sends.is_none() { self.way(handle, to, now) } else { None };
        let fits = |from: Place| datagram.data.len() <= if from.0.is_ipv4() { LONGEST } else { LONGEST_V6 };
        let way = way.filter(|(_, from)| fits(*from));
        let mail = self.mail(handle)?;
        if way.is_none() && mail.sent > 0 {
            // The first ones are where it may go if it names no address.
            let local = mail.local.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |local| local.0);
            let there = canonical(&to).map_or(local, |place| place.0);
            let all = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), local, there];
            mail.hub.post.goes_first(network, to.port(), &all);
        }
        way
    }

    fn way(&mut self, handle: Handle, to: SocketAddress, now: u64) -> Option<(Arc<Mailbox>, Place)> {
        let generation = self.hub.post.generation();
        let known = |route: &Route| {
            let holds = route.until_ns == u64::MAX || now < route.until_ns;
            route.to == to && route.generation == generation && holds
        };
        if self.mail(handle)?.route.as_ref().is_none_or(|route| !known(route)) {
            let route = self.find_way(handle, to, now);
            self.mail(handle)?.route = Some(route);
        }
        let (mailbox, from) = self.mail(handle)?.route.as_ref()?.way.as_ref().ok()?;
        Some((mailbox.upgrade()?, *from))
    }

    fn find_way(&mut self, handle: Handle, to: SocketAddress, now: u64) -> Route {
        let mut route = Route { to, generation: 0, until_ns: u64::MAX, way: Err(Cow::Borrowed("")) };
        route.way = self.way_to(handle, now, &mut route);
        route
    }

    /// Fills in for how long the answer holds. An error is the reason, for people.
    fn way_to(
        &mut self,
        handle: Handle,
        now: u64,
        route: &mut Route,
    ) -> Result<(Weak<Mailbox>, Place), Reason> {
        let no = |why: &'static str| Err(Cow::Borrowed(why));
        const NOBODY_THERE: &str = "no guest of this engine receives there";
        route.generation = self.hub.post.generation();
        let network = self.settings.network;
        let domain = self.socket(handle).map_or(0, |socket| socket.domain);
        let Some(place) = plain(&route.to, domain) else {
            // May be the same socket as another address is.
            let why = "it sent to an address that is more than one socket's, or needs an interface";
            if let Some(mail) = self.mail(handle) {
                mail.sends = Some(why.into());
            }
            return no(why);
        };
        if !self.hub.post.knows(network, place) {
            return no(NOBODY_THERE);
        }
        let bound = self.mail(handle).is_some_and(|mail| mail.local.is_some());
        if !bound {
            // As the kernel does it for who sends first.
            let any: IpAddr = match domain {
                libc::AF_INET => Ipv4Addr::UNSPECIFIED.into(),
                _ => Ipv6Addr::UNSPECIFIED.into(),
            };
            let any = SocketAddress::from(std::net::SocketAddr::from((any, 0)));
            let shadow = self.shadow(handle).map_err(|_| Cow::Borrowed("there is no socket"))?;
            if self.fallback.bind(shadow, &any).is_err() {
                return no("there is no port");
            }
            self.mail_named(handle);
            route.generation = self.hub.post.generation();
        }
        let Some(from) = self.comes_from(handle, place, now, &mut route.until_ns) else {
            return no("the address is not one of this host, or not one for it");
        };
        let Some(mailbox) = self.hub.post.find(network, place, from) else { return no(NOBODY_THERE) };
        let Some(mail) = self.mail(handle) else { return no(NOBODY_THERE) };
        mailbox.admits(&mail.mailbox.person)?;
        Ok((Arc::downgrade(&mailbox), from))
    }

    /// Where what this socket sends to a place of this host comes from.
    fn comes_from(&mut self, handle: Handle, to: Place, now: u64, until_ns: &mut u64) -> Option<Place> {
        let mail = self.mail(handle)?;
        let (local, only_v6, key) = (mail.local?, mail.only_v6, mail.mailbox.key);
        if only_v6 && to.0.is_ipv4() {
            return None;
        }
        let source = self.local_source(key, to.0, now, until_ns)?;
        if local.0.is_unspecified() {
            // `::ffff:0.0.0.0` reaches IPv4 only.
            let reaches = local.0.is_ipv6() || source.is_ipv4();
            return reaches.then_some((source, local.1));
        }
        // What is sent from a broadcast address does not come from there.
        let usable = local.0.is_ipv4() == source.is_ipv4() && !is_link_local(local.0);
        (usable && self.local_source(key, local.0, now, until_ns).is_some()).then_some(local)
    }

    /// As [`ShmStack::source`] says, at most a second ago.
    fn local_source(&mut self, key: u64, ip: IpAddr, now: u64, until_ns: &mut u64) -> Option<IpAddr> {
        let known = self.addresses.get(&ip).copied().filter(|&(until, _)| now < until);
        let (until, source) = match known {
            Some(known) => known,
            None => {
                if !self.may_ask(key, now) {
                    *until_ns = 0;
                    return None;
                }
                let found = (now + BELIEF_NS, self.probe(ip));
                if self.addresses.len() >= self.most_addresses {
                    self.addresses.retain(|_, (until, _)| now < *until);
                    self.most_addresses = (2 * self.addresses.len()).max(ADDRESSES);
                }
                self.addresses.insert(ip, found);
                found
            }
        };
        *until_ns = until.min(*until_ns);
        source
    }

    /// Whether a guest may make the fallback be asked for an address once more: that is two sockets.
    fn may_ask(&mut self, key: u64, now: u64) -> bool {
        let asked = self.asked.entry((key >> 32) as u32).or_default();
        if now >= asked.0 {
            *asked = (now + BELIEF_NS, 0);
        }
        asked.1 += 1;
        asked.1 <= QUESTIONS
    }

    pub(super) fn recv_letter(
        &mut self,
        handle: Handle,
        into: &Segments,
        control: &mut [u8],
    ) -> Result<ReceivedDatagram, Errno> {
        let shadow = self.shadow(handle)?;
        let socket = without_error(&mut self.sockets, handle)?;
        let domain = socket.domain;
        let Some(mail) = &mut socket.mail else {
            return self.fallback.recv_datagram(shadow, into, control);
        };
        for way in mail.take_order() {
            if way == Way::Memory {
                if let Some(letter) = mail.mailbox.take() {
                    let bytes = into.copy_from(&letter.data);
                    return Ok(ReceivedDatagram { bytes, from: of_domain(domain, letter.from), control: 0 });
                }
            } else if mail.fallback_ready {
                match self.fallback.recv_datagram(shadow, into, control) {
                    Err(errno) if errno.would_block() => mail.fallback_is_empty(),
                    other => {
                        mail.fallback_older = mail.fallback_older.saturating_sub(1);
                        return other;
                    }
                }
            }
        }
        Err(Errno::AGAIN)
    }

    pub(super) fn recv_letters(
        &mut self,
        handle: Handle,
        most: usize,
        take: &mut TakeDatagram<'_>,
    ) -> Result<usize, Errno> {
        let shadow = self.shadow(handle)?;
        let socket = without_error(&mut self.sockets, handle)?;
        let domain = socket.domain;
        let Some(mail) = &mut socket.mail else { return self.fallback.recv_datagrams(shadow, most, take) };
        let mut got = 0;
        for way in mail.take_order() {
            if way == Way::Memory {
                while got < most
                    && let Some(letter) = mail.mailbox.take()
                {
                    take(&letter.data, of_domain(domain, letter.from), &[]);
                    got += 1;
                }
            } else if mail.fallback_ready && got < most {
                match self.fallback.recv_datagrams(shadow, most - got, take) {
                    Ok(n) => {
                        mail.fallback_older = mail.fallback_older.saturating_sub(n as u32);
                        if n < most - got {
                            mail.fallback_is_empty();
                        }
                        got += n;
                    }
                    Err(errno) if errno.would_block() => mail.fallback_is_empty(),
                    Err(errno) if got == 0 => return Err(errno),
                    Err(errno) => {
                        socket.error = Some(errno);
                        self.inbox.report(socket.key, Readiness::READ);
                    }
                }
            }
        }
        if got == 0 { Err(Errno::AGAIN) } else { Ok(got) }
    }

    /// Says which one comes next, too.
    pub(super) fn next_letter(&mut self, handle: Handle) -> Result<usize, Errno> {
        let shadow = self.shadow(handle)?;
        let Some(mail) = &mut find(&mut self.sockets, handle)?.mail else {
            return self.fallback.next_datagram(shadow);
        };
        for way in mail.order() {
            let bytes = match way {
                Way::Memory => mail.mailbox.next(),
                // Of one without bytes nothing is said.
                Way::Fallback if !mail.fallback_ready => None,
                Way::Fallback => Some(self.fallback.next_datagram(shadow)?).filter(|&bytes| bytes > 0),
            };
            if let Some(bytes) = bytes {
                mail.next = Some(way);
                return Ok(bytes);
            }
        }
        Ok(0)
    }

    /// May the shadow be given away? What waits in memory would not go along.
    pub(super) fn may_give_mail(&mut self, handle: Handle) -> Result<(), Errno> {
        let Some(mail) = self.mail(handle) else { return Ok(()) };
        let name = mail.name;
        mail.rename(None);
        if mail.mailbox.next().is_none() {
            return Ok(());
        }
        mail.rename(name);
        Err(Errno(libc::EBUSY))
    }

    /// For people.
    pub(super) fn mail_way(&mut self, handle: Handle) -> Option<String> {
        let mail = self.mail(handle)?;
        let ((received, dropped), sent) = (mail.mailbox.counts(), mail.sent);
        if let (Some(why), Some(_), 0, 0) = (&mail.sends, &mail.comes, sent, received) {
            return Some(format!("by the fallback stack: {why}"));
        }
        let mut way = format!(
            "guests that may are reached in memory ({sent} sent, {received} received, {dropped} dropped), all others by the fallback stack"
        );
        match (&mail.sends, &mail.route) {
            (Some(why), _) => way += &format!("; so is what it sends: {why}"),
            (None, Some(Route { way: Err(why), .. })) => way += &format!("; so was the last one sent: {why}"),
            _ => {}
        }
        if let Some(why) = &mail.comes {
            way += &format!("; so is what comes to it: {why}");
        }
        Some(way)
    }
}

/// A destination that means one socket of this host, if it is the host's. `None`: only the fallback knows.
fn plain(to: &SocketAddress, domain: i32) -> Option<Place> {
    let family = i32::from(to.family());
    if family != domain && (family, domain) != (libc::AF_INET, libc::AF_INET6) {
        return None;
    }
    if let std::net::SocketAddr::V6(v6) = to.to_std()?
        && (v6.scope_id() != 0 || v6.flowinfo() != 0)
    {
        return None;
    }
    canonical(to).filter(|(ip, _)| !ip.is_unspecified() && !ip.is_multicast() && !is_link_local(*ip))
}

/// Means something together with an interface only.
fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80)
}

/// What is not named here is the fallback's, both ways.
fn meaning(level: i32, name: i32, value: &[u8]) -> Meaning {
    use libc::*;
    const SO_TIMESTAMP_NEW: i32 = 63;
    const SO_TIMESTAMPNS_NEW: i32 = 64;
    const SO_TXREHASH: i32 = 74;
    const IP_CHECKSUM: i32 = 23;
    const IP_RECVFRAGSIZE: i32 = 25;
    const MCAST: std::ops::RangeInclusive<i32> = 42..=48;
    const IPV6_2292PKTINFO: i32 = 2;
    const IPV6_2292HOPLIMIT: i32 = 8;
    const IPV6_FLOWINFO: i32 = 11;
    const IPV6_MULTICAST_ALL: i32 = 29;
    const IPV6_MINHOPCOUNT: i32 = 73;
    const IPV6_RECVFRAGSIZE: i32 = 77;
    const UDP_CORK: i32 = 1;
    const UDP_SEGMENT: i32 = 103;
    const UDP_GRO: i32 = 104;
    let meaning = match (level, name) {
        // Sizes, and what matters on a wire, to multicast, or among sockets of one port.
        (
            SOL_SOCKET,
            SO_SNDBUF | SO_RCVBUF | SO_KEEPALIVE | SO_OOBINLINE | SO_LINGER | SO_PRIORITY
            | SO_MAX_PACING_RATE | SO_NO_CHECK | SO_INCOMING_CPU | SO_TXREHASH | SO_RCVLOWAT | SO_RCVTIMEO
            | SO_SNDTIMEO,
        ) => Meaning::Nothing,
        // Seen by receivers that ask for it, which are the fallback's; errors come of what goes by the fallback.
        (IPPROTO_IP, IP_TOS | IP_TTL | IP_RECVERR) => Meaning::Nothing,
        (IPPROTO_IPV6, IPV6_UNICAST_HOPS | IPV6_TCLASS | IPV6_RECVERR | IPV6_V6ONLY) => Meaning::Nothing,
        (
            IPPROTO_IP,
            IP_MULTICAST_IF
            | IP_MULTICAST_TTL
            | IP_MULTICAST_LOOP
            | IP_ADD_MEMBERSHIP
            | IP_DROP_MEMBERSHIP
            | IP_ADD_SOURCE_MEMBERSHIP
            | IP_DROP_SOURCE_MEMBERSHIP
            | IP_BLOCK_SOURCE
            | IP_UNBLOCK_SOURCE
            | IP_MULTICAST_ALL,
        ) => Meaning::Nothing,
        (
            IPPROTO_IPV6,
            IPV6_MULTICAST_IF | IPV6_MULTICAST_HOPS | IPV6_MULTICAST_LOOP | IPV6_ADD_MEMBERSHIP
            | IPV6_DROP_MEMBERSHIP | IPV6_MULTICAST_ALL,
        ) => Meaning::Nothing,
        (IPPROTO_IP | IPPROTO_IPV6, name) if MCAST.contains(&name) => Meaning::Nothing,
        (
            SOL_SOCKET,
            SO_REUSEADDR | SO_REUSEPORT | SO_TIMESTAMP | SO_TIMESTAMPNS | SO_TIMESTAMP_NEW
            | SO_TIMESTAMPNS_NEW | SO_RXQ_OVFL,
        ) => Meaning::Comes,
        (
            IPPROTO_IP,
            IP_PKTINFO | IP_RECVTTL | IP_RECVTOS | IP_RECVORIGDSTADDR | IP_RECVFRAGSIZE | IP_CHECKSUM
            | IP_MINTTL,
        ) => Meaning::Comes,
        (
            IPPROTO_IPV6,
            IPV6_RECVTCLASS | IPV6_RECVPKTINFO | IPV6_2292PKTINFO | IPV6_2292HOPLIMIT | IPV6_FLOWINFO
            | IPV6_RECVORIGDSTADDR | IPV6_RECVFRAGSIZE | IPV6_RECVHOPLIMIT | IPV6_MINHOPCOUNT,
        ) => Meaning::Comes,
        (IPPROTO_UDP, UDP_GRO) => Meaning::Comes,
        // What is sent to all may be heard by who is sent to, too.
        (SOL_SOCKET, SO_DONTROUTE | SO_BROADCAST) => Meaning::Sends,
        (IPPROTO_IP, IP_MTU_DISCOVER) => Meaning::Sends,
        (IPPROTO_IPV6, IPV6_MTU_DISCOVER | IPV6_DONTFRAG) => Meaning::Sends,
        (IPPROTO_UDP, UDP_CORK | UDP_SEGMENT) => Meaning::Sends,
        _ => Meaning::Both,
    };
    // Turned off it asks for nothing.
    let off = value.iter().all(|&byte| byte == 0);
    if off && matches!(meaning, Meaning::Comes | Meaning::Sends) { Meaning::Nothing } else { meaning }
}
