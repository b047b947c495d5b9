//! What the TCP connections of guests carried that are the kernel's own, closed ones included.
//!
//! The agent knows each socket that it gives by its cookie (SO_COOKIE). When the kernel has freed a TCP socket it says so, with
//! cookie, names and last TCP_INFO (sock_diag(7), SKNLGRP_INET_TCP_DESTROY): no duplicate is needed, and who closes last is the
//! program. An accepted socket has a cookie of its own, of which nobody was told; it is its listener's guest's, which is known by
//! the address. Sockets that are open are asked for when somebody wants to know.
//!
//! A thread of the ledger reads what the kernel says, at most fifty times a second. What is lost in a flood (the kernel's queue for
//! it is bounded) counts as far as the last look at the open sockets saw it. Counted is what TCP counts: an end of the stream that
//! was received is one byte.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::census::{self, Seen};
use crate::gate::Gate;

/// Listeners that are remembered after their end; connections may live on.
const MAX_LISTENERS: usize = 4096;
/// SKNLGRP_INET_TCP_DESTROY and SKNLGRP_INET6_TCP_DESTROY, as bits.
const DESTROYED: u32 = 1 << 0 | 1 << 2;
/// Bytes of the kernel's queue: some thousand sockets.
static QUEUE: i32 = 4 << 20;
/// Datagram sockets that are given between two looks at which of those before are alive.
const MAX_DATAGRAMS: usize = 4096;
const PAUSE: Duration = Duration::from_millis(20);

/// What one connection, or those of one guest, carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Connections of which the kernel told, segments that they sent, and those of them that were sent again.
    pub connections: u64,
    pub segments: u64,
    pub retransmitted: u64,
    /// Sum of the smoothed round trip times that were seen, in microseconds, and how many: one for each look at an open
    /// connection, and one at its end.
    pub rtt_us: u64,
    pub rtt_samples: u64,
}

impl Carried {
    fn fields(&mut self) -> [&mut u64; 7] {
        let Carried { bytes_in, bytes_out, connections, segments, retransmitted, rtt_us, rtt_samples } = self;
        [bytes_in, bytes_out, connections, segments, retransmitted, rtt_us, rtt_samples]
    }

    pub fn add(&mut self, mut other: Carried) {
        self.fields().into_iter().zip(other.fields()).for_each(|(sum, more)| *sum += *more);
    }

    /// No count falls below what it was.
    fn raise(&mut self, mut to: Carried) {
        self.fields().into_iter().zip(to.fields()).for_each(|(told, now)| *told = (*told).max(*now));
    }

    /// What came on top of `before`, which is an earlier value of the same counts.
    pub fn since(mut self, mut before: Carried) -> Carried {
        self.fields()
            .into_iter()
            .zip(before.fields())
            .for_each(|(now, then)| *now = now.saturating_sub(*then));
        self
    }

    /// Of the connection of which this is the last: with what was seen before.
    fn after(mut self, before: Option<Carried>) -> Carried {
        if let Some(before) = before {
            self.rtt_us += before.rtt_us;
            self.rtt_samples += before.rtt_samples;
        }
        self
    }
}

/// A socket of a guest.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub guest: u32,
    /// SO_COOKIE.
    pub cookie: u64,
    pub inode: u64,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u8,
    pub local: SocketAddr,
    /// `None`: it listens, or is not connected.
    pub peer: Option<SocketAddr>,
    /// Of TCP: the size of the segments that it gets, and what it received so far.
    pub segment_bytes: u32,
    pub bytes_in: u64,
}

/// The connections of one network namespace. Its thread ends with it.
#[derive(Debug)]
pub struct Ledger {
    books: Arc<Mutex<Books>>,
    netlink: Arc<OwnedFd>,
    /// Passed by the thread for each time that it reads.
    gate: Arc<Gate>,
    _end: OwnedFd,
}

/// What guests' connections carried: by guest, and by the name of the stack that the sockets are of. A guest that was moved has
/// sockets of several.
pub type ByGuest = HashMap<u32, HashMap<String, Carried>>;

/// A guest and one of its stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Account {
    guest: u32,
    /// Number in [`Books::stacks`].
    stack: u32,
}

/// As numbers, which can be keys of JSON.
impl Account {
    fn number(self) -> u64 {
        u64::from(self.guest) << 32 | u64::from(self.stack)
    }

    fn of(number: u64) -> Account {
        Account { guest: (number >> 32) as u32, stack: number as u32 }
    }
}

/// What a ledger knows, for the one after it. Accounts are numbers ([`Account::number`]).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Books {
    /// Names of the stacks that gave sockets.
    stacks: Vec<String>,
    /// Open sockets by cookie.
    open: HashMap<u64, Open>,
    /// Of guests that are not over: what their closed connections carried.
    closed: HashMap<u64, Carried>,
    /// What was told of each: it never becomes less.
    told: HashMap<u64, Carried>,
    /// Youngest first.
    listeners: VecDeque<(SocketAddr, u64)>,
    looks: u64,
    /// Datagram sockets by cookie, of which nothing is counted and whose ends nobody tells of: those that were given lately,
    /// and those before, of which the dead are not there any more.
    lately: HashMap<u64, u64>,
    datagrams: HashMap<u64, u64>,
}

/// What is known of one guest's sockets of one stack, on the way to another ledger.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Moved {
    /// Open sockets by cookie, with what each carried.
    open: Vec<(u64, Carried)>,
    closed: Carried,
    /// What was told of all of it.
    told: Carried,
    listeners: Vec<SocketAddr>,
    datagrams: Vec<u64>,
}

impl Moved {
    /// What all of it carried, as it was told last.
    pub fn told(&self) -> Carried {
        self.told
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty() && self.told == Carried::default() && self.datagrams.is_empty()
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Open {
    account: u64,
    carried: Carried,
    /// The look in which it was seen last.
    look: u64,
}

impl Ledger {
    /// To be called in the network namespace. Errors: the kernel has no sock_diag, or no descriptors.
    pub fn open() -> io::Result<Ledger> {
        Ledger::resume(Books::default(), listen()?)
    }

    /// Goes on for another one, see [`Ledger::still`]. To be called in the network namespace.
    pub fn resume(books: Books, netlink: OwnedFd) -> io::Result<Ledger> {
        let mut pair = [0; 2];
        // SAFETY: valid for two descriptors.
        if unsafe {
            libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr())
        } != 0
        {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: new and owned by nobody else.
        let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) };
        let (books, netlink) = (Arc::new(Mutex::new(books)), Arc::new(netlink));
        let gate = Arc::<Gate>::default();
        let own = (Arc::clone(&books), Arc::clone(&netlink), Arc::clone(&gate));
        std::thread::Builder::new()
            .name("nk-ledger".into())
            .stack_size(128 << 10)
            .spawn(move || keep(&own.1, &theirs, &own.0, &own.2))?;
        Ok(Ledger { books, netlink, gate, _end: ours })
    }

    /// Takes no more notice of what the kernel says, which waits in the socket that is returned, with what is known, until
    /// [`Ledger::go_on`]. `None`: the thread is busy for longer than `patience`.
    pub fn still(&self, patience: Duration) -> Option<(Books, RawFd)> {
        self.gate.close(patience).then(|| (lock(&self.books).clone(), self.netlink.as_raw_fd()))
    }

    pub fn go_on(&self) {
        self.gate.open();
    }

    /// A stream socket of this stack is about to be given to a guest.
    pub fn made(&self, socket: &OwnedFd, guest: u32, stack: &str) {
        let Some(cookie) = cookie(socket) else { return };
        let mut books = lock(&self.books);
        let (look, account) = (books.looks, books.account(guest, stack));
        books.closed.entry(account).or_default();
        books.open.insert(cookie, Open { account, carried: Carried::default(), look });
    }

    /// As [`Ledger::made`], of any other socket: it is known whose it is. True: [`Ledger::forget_datagrams`] is to be called.
    pub fn made_datagram(&self, socket: &OwnedFd, guest: u32, stack: &str) -> bool {
        let Some(cookie) = cookie(socket) else { return false };
        let mut books = lock(&self.books);
        let account = books.account(guest, stack);
        books.lately.insert(cookie, account);
        books.lately.len() >= MAX_DATAGRAMS
    }

    /// Forgets those that are no more. To be called in the network namespace.
    pub fn forget_datagrams(&self) {
        let alive: HashSet<u64> =
            census::datagrams().unwrap_or_default().iter().map(|seen| seen.cookie).collect();
        let mut books = lock(&self.books);
        books.datagrams.retain(|cookie, _| alive.contains(cookie));
        // One without a name is in no list: those given lately are left until the next time.
        let lately = std::mem::take(&mut books.lately);
        books.datagrams.extend(lately);
    }

    /// Name of the stack that a guest's socket is of. `None`: it is not known (yet, if it was accepted: [`Ledger::carried`] looks).
    pub fn stack_of(&self, guest: u32, cookie: u64) -> Option<String> {
        let books = lock(&self.books);
        let stream = books.open.get(&cookie).map(|open| open.account);
        let account = Account::of(stream.or_else(|| books.datagram(cookie))?);
        (account.guest == guest).then(|| books.stacks.get(account.stack as usize).cloned())?
    }

    /// The sockets of guests that have a name. `besides`: whose another one is, by its cookie and inode. To be called in the network
    /// namespace.
    pub fn known(&self, besides: impl Fn(u64, u64) -> Option<u32>) -> io::Result<Vec<Known>> {
        let streams = census::connections()?;
        let datagrams = census::datagrams()?;
        let mut books = lock(&self.books);
        books.look(streams.clone());
        let whose = |account: u64| Account::of(account).guest;
        let mut all = Vec::new();
        for (is_stream, seen) in
            streams.iter().map(|seen| (true, seen)).chain(datagrams.iter().map(|seen| (false, seen)))
        {
            let account = if is_stream { books.account_of(seen) } else { books.datagram(seen.cookie) };
            if let Some(guest) = account.map(whose).or_else(|| besides(seen.cookie, seen.inode)) {
                all.push(Known {
                    guest,
                    cookie: seen.cookie,
                    inode: seen.inode,
                    protocol: if is_stream { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP } as u8,
                    local: seen.local,
                    peer: seen.peer,
                    segment_bytes: seen.segment_bytes,
                    bytes_in: seen.carried.bytes_in,
                });
            }
        }
        Ok(all)
    }

    /// Whose the socket of a connection is: of a guest, or `None`. To be called in the network namespace.
    pub fn owner(
        &self,
        local: SocketAddr,
        peer: SocketAddr,
        besides: impl Fn(u64, u64) -> Option<u32>,
    ) -> Option<u32> {
        let cookie = census::find(local, peer).ok()?;
        let account = lock(&self.books).open.get(&cookie).map(|open| open.account);
        account.map(|account| Account::of(account).guest).or_else(|| besides(cookie, 0))
    }

    /// What each guest's connections carried so far. To be called in the network namespace.
    pub fn carried(&self) -> ByGuest {
        let seen = census::connections();
        let mut books = lock(&self.books);
        match seen {
            Ok(seen) => books.look(seen),
            Err(error) => log::debug!("the kernel's list of sockets: {error}"),
        }
        let mut all = books.closed.clone();
        for open in books.open.values() {
            all.entry(open.account).or_default().add(open.carried);
        }
        // One that was freed since the last look, and of which the kernel has not told yet, is missing for a moment.
        for (account, carried) in &mut all {
            let told = books.told.entry(*account).or_default();
            told.raise(*carried);
            *carried = *told;
        }
        let mut by_guest = ByGuest::new();
        for (account, carried) in all {
            books.tell(account, carried, &mut by_guest);
        }
        by_guest
    }

    /// Whether [`Ledger::carried`] can tell more of the guest than [`Ledger::forget`]: it has, or had a moment ago, open sockets.
    pub fn has_open(&self, guest: u32) -> bool {
        lock(&self.books).open.values().any(|open| Account::of(open.account).guest == guest)
    }

    /// What is known of a guest, of all stacks, for the ledger of another process: [`Ledger::adopt`]. To be called in the network
    /// namespace; nothing of it is forgotten.
    pub fn moved(&self, guest: u32) -> Moved {
        drop(self.carried());
        let books = lock(&self.books);
        let own = |account: u64| Account::of(account).guest == guest;
        let mut moved = Moved::default();
        for (account, closed) in books.closed.iter().filter(|(account, _)| own(**account)) {
            moved.closed.add(*closed);
            moved.told.add(books.told.get(account).copied().unwrap_or_default());
        }
        let open = books.open.iter().filter(|(_, open)| own(open.account));
        moved.open = open.map(|(cookie, open)| (*cookie, open.carried)).collect();
        moved.listeners =
            books.listeners.iter().filter(|(_, of)| own(*of)).map(|(local, _)| *local).collect();
        let datagrams = books.lately.iter().chain(&books.datagrams);
        moved.datagrams = datagrams.filter(|(_, of)| own(**of)).map(|(cookie, _)| *cookie).collect();
        moved
    }

    /// Goes on with what another process's ledger knew of a guest's sockets of this stack.
    pub fn adopt(&self, guest: u32, stack: &str, moved: Moved) {
        let mut books = lock(&self.books);
        let (look, account) = (books.looks, books.account(guest, stack));
        books.closed.entry(account).or_default().add(moved.closed);
        books.told.entry(account).or_default().add(moved.told);
        for (cookie, carried) in moved.open {
            books.open.insert(cookie, Open { account, carried, look });
        }
        for local in moved.listeners.into_iter().rev() {
            books.listens(local, account);
        }
        books.lately.extend(moved.datagrams.into_iter().map(|cookie| (cookie, account)));
    }

    /// The guest is over, and nobody will ask for it again. What its closed connections carried, by stack.
    pub fn forget(&self, guest: u32) -> HashMap<String, Carried> {
        let mut books = lock(&self.books);
        let own = |account: u64| Account::of(account).guest == guest;
        let mut last = ByGuest::new();
        let accounts: Vec<u64> = books.closed.keys().copied().filter(|account| own(*account)).collect();
        for account in accounts {
            let mut closed = books.closed.remove(&account).unwrap_or_default();
            closed.raise(books.told.remove(&account).unwrap_or_default());
            books.tell(account, closed, &mut last);
        }
        books.told.retain(|account, _| !own(*account));
        books.open.retain(|_, open| !own(open.account));
        books.listeners.retain(|&(_, of)| !own(of));
        books.lately.retain(|_, account| !own(*account));
        books.datagrams.retain(|_, account| !own(*account));
        last.remove(&guest).unwrap_or_default()
    }
}

impl Books {
    fn datagram(&self, cookie: u64) -> Option<u64> {
        self.lately.get(&cookie).or_else(|| self.datagrams.get(&cookie)).copied()
    }

    fn account(&mut self, guest: u32, stack: &str) -> u64 {
        let known = self.stacks.iter().position(|name| name == stack);
        let number = known.unwrap_or_else(|| {
            self.stacks.push(stack.to_owned());
            self.stacks.len() - 1
        });
        Account { guest, stack: number as u32 }.number()
    }

    fn tell(&self, account: u64, carried: Carried, to: &mut ByGuest) {
        let Account { guest, stack } = Account::of(account);
        if let Some(name) = self.stacks.get(stack as usize) {
            to.entry(guest).or_default().entry(name.clone()).or_default().add(carried);
        }
    }

    /// The kernel's list of open sockets.
    fn look(&mut self, seen: Vec<Seen>) {
        self.looks += 1;
        let (listening, connections): (Vec<Seen>, Vec<Seen>) =
            seen.into_iter().partition(|seen| seen.peer.is_none());
        for seen in listening {
            if let Some(open) = self.open.get_mut(&seen.cookie) {
                open.look = self.looks;
                let account = open.account;
                self.listens(seen.local, account);
            }
        }
        for seen in connections {
            let Some(account) = self.account_of(&seen) else { continue };
            let carried = seen.carried.after(self.open.get(&seen.cookie).map(|open| open.carried));
            self.open.insert(seen.cookie, Open { account, carried, look: self.looks });
        }
        // Not there, and the kernel did not say that it freed them in two looks: that was lost. (Sockets without a name are in
        // no list, and carried nothing.)
        let looks = self.looks;
        let lost = |open: &Open| open.look + 2 < looks && open.carried != Carried::default();
        for open in self.open.values().filter(|open| lost(open)) {
            self.closed.entry(open.account).or_default().add(open.carried);
        }
        self.open.retain(|_, open| !lost(open));
    }

    /// The kernel has freed a socket.
    fn freed(&mut self, seen: &Seen) {
        let Some(account) = self.account_of(seen) else { return };
        let before = self.open.remove(&seen.cookie);
        if seen.peer.is_none() {
            // Connections that it accepted may outlive it.
            self.listens(seen.local, account);
        } else if let Some(closed) = self.closed.get_mut(&account) {
            closed.add(seen.carried.after(before.map(|open| open.carried)));
        }
    }

    fn listens(&mut self, local: SocketAddr, account: u64) {
        if local.port() != 0 && self.listeners.front() != Some(&(local, account)) {
            self.listeners.retain(|listener| *listener != (local, account));
            self.listeners.push_front((local, account));
            self.listeners.truncate(MAX_LISTENERS);
        }
    }

    fn account_of(&self, seen: &Seen) -> Option<u64> {
        let accepted = || {
            let at = |listener: SocketAddr| {
                listener.port() == seen.local.port()
                    && (listener.ip().is_unspecified() || listener.ip() == seen.local.ip())
            };
            let found = self.listeners.iter().find(|(listener, _)| at(*listener));
            found.map(|&(_, account)| account)
        };
        self.open.get(&seen.cookie).map(|open| open.account).or_else(accepted)
    }

    fn knows(&self, seen: &Seen) -> bool {
        self.account_of(seen).is_some()
    }
}

/// The thread.
fn keep(netlink: &OwnedFd, end: &OwnedFd, books: &Mutex<Books>, gate: &Gate) {
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let mut polled = [
            libc::pollfd { fd: netlink.as_raw_fd(), events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: end.as_raw_fd(), events: 0, revents: 0 },
        ];
        // SAFETY: two entries, valid for reads and writes.
        let n = unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
        if n < 0 {
            continue;
        }
        if polled[1].revents != 0 {
            return;
        }
        let passed = gate.pass();
        let mut freed = Vec::new();
        loop {
            // SAFETY: the buffer is valid for writes of its length.
            let n = unsafe {
                libc::recv(netlink.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT)
            };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::ENOBUFS) {
                    // Some were lost; what the last look saw of them counts.
                    continue;
                }
                break;
            }
            census::messages(&buffer[..n as usize], |seen| freed.push(seen));
        }
        if !freed.is_empty() {
            // An unknown one may be of a listener that nobody looked at yet: this runs in the namespace, as it was started there.
            let unknown = freed.iter().any(|seen| !lock(books).knows(seen));
            let listening = if unknown { census::listeners().unwrap_or_default() } else { Vec::new() };
            let mut books = lock(books);
            for seen in listening {
                if let Some(account) = books.open.get(&seen.cookie).map(|open| open.account) {
                    books.listens(seen.local, account);
                }
            }
            // Listeners first: the order in which the kernel frees is not that of the program.
            for seen in freed
                .iter()
                .filter(|seen| seen.peer.is_none())
                .chain(freed.iter().filter(|seen| seen.peer.is_some()))
            {
                books.freed(seen);
            }
        }
        drop(passed);
        std::thread::sleep(PAUSE);
    }
}

/// A socket that the kernel tells of freed TCP sockets.
fn listen() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: takes integers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero address is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_groups = DESTROYED;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_RCVBUF] {
        // SAFETY: the option's value is an int. Without privileges the first fails.
        let set = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const QUEUE).cast(),
                size_of::<i32>() as u32,
            )
        };
        if set == 0 {
            break;
        }
    }
    let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the address is valid for reads of its length.
    if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// The kernel's own name for a socket (SO_COOKIE), which no other one ever has.
pub fn cookie(socket: &OwnedFd) -> Option<u64> {
    let (mut cookie, mut length) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the value and its length are valid for writes.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &mut length,
        )
    };
    (r == 0).then_some(cookie)
}

fn lock(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    fn owned(fd: i32) -> OwnedFd {
        // SAFETY: dup of a live descriptor; the result is ours.
        unsafe { OwnedFd::from_raw_fd(libc::dup(fd)) }
    }

    fn of(all: &ByGuest, guest: u32) -> Carried {
        all.get(&guest).and_then(|all| all.get("one")).copied().unwrap_or_default()
    }

    /// Waits until a guest carried so much.
    fn carried(ledger: &Ledger, guest: u32, done: impl Fn(Carried) -> bool) -> Carried {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let carried = of(&ledger.carried(), guest);
            if done(carried) {
                return carried;
            }
            assert!(Instant::now() < deadline, "never: {carried:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_connections_carried_counts_once_open_and_closed() {
        let ledger = Ledger::open().unwrap();
        // Guest 1 listens, guest 2 connects; a third pair is nobody's.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        ledger.made(&owned(listener.as_raw_fd()), 1, "one");
        let at = listener.local_addr().unwrap();
        let exchange = |mine: bool| {
            // SAFETY: takes integers; the result is checked.
            let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
            assert!(fd >= 0);
            // SAFETY: new and owned by nobody else.
            let client = unsafe { OwnedFd::from_raw_fd(fd) };
            if mine {
                ledger.made(&client, 2, "one");
            }
            drop(client);
        };
        exchange(false);
        let connect = |bytes: usize| {
            // std makes and connects in one step: it is told of while it is open.
            let mut client = TcpStream::connect(at).unwrap();
            ledger.made(&owned(client.as_raw_fd()), 2, "one");
            let (mut server, _) = listener.accept().unwrap();
            client.write_all(&vec![7; bytes]).unwrap();
            server.read_exact(&mut vec![0; bytes]).unwrap();
            server.write_all(&[9; 10]).unwrap();
            client.read_exact(&mut [0; 10]).unwrap();
            (client, server)
        };
        for _ in 0..20 {
            connect(1000);
        }
        let held = connect(500);
        let two = carried(&ledger, 2, |c| c.bytes_out >= 20_500);
        let one = carried(&ledger, 1, |c| c.bytes_in >= 20_500 && c.bytes_out >= 210);
        // Ends of streams count one byte each.
        assert!(two.bytes_out == 20_500 && (210..=231).contains(&two.bytes_in), "{two:?}");
        assert!((20_500..=20_521).contains(&one.bytes_in) && one.bytes_out == 210, "{one:?}");
        drop(held);
        drop(listener);
        // Nothing is counted again when it is closed.
        std::thread::sleep(Duration::from_millis(200));
        let (one, two) = (carried(&ledger, 1, |_| true), carried(&ledger, 2, |_| true));
        assert!(two.bytes_out == 20_500 && one.bytes_out == 210, "{one:?} {two:?}");
        ledger.forget(1);
        assert_eq!(ledger.carried().get(&1), None);
    }
}
