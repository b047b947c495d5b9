//! The thread that answers a guest's notifications.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::ThreadClock;
use crate::ledger::{self, Ledger};
use crate::memory;
use crate::notify::{Listener, Notification};

/// Processes that are remembered for [`crate::Census`]; the dead are forgotten when there are more.
const MAX_PROCESSES: usize = 4096;
/// Obsolete, but the kernel still knows it.
const SOCK_PACKET: i32 = 10;
/// TCP_CA_NAME_MAX without its end.
const NAME_MAX: usize = 15;
/// The type proper, without SOCK_NONBLOCK and SOCK_CLOEXEC.
const TYPE_MASK: i32 = 0xf;

/// A socket that a program asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketRequest {
    /// AF_INET or AF_INET6.
    pub domain: i32,
    /// Type without flags.
    pub kind: i32,
    pub protocol: i32,
    pub nonblocking: bool,
}

/// What makes the sockets: a module of kernel sockets. Belongs to one agent's thread.
pub trait Sockets: Send {
    /// A kernel socket in the module's namespace, with its congestion control. Errors: a positive errno, Linux's own.
    fn socket(&mut self, request: &SocketRequest) -> Result<OwnedFd, i32>;

    /// The congestion control that the module promises; `None`: whatever the namespace has.
    fn congestion_control(&self) -> Option<&str>;

    /// Whether this option of SOL_SOCKET is the module's, and not the program's to change.
    fn owns(&self, option: i32) -> bool;

    /// Whether the kernel has a congestion control of this name.
    fn knows(&mut self, congestion_control: &[u8]) -> bool;

    /// Does `work` in the module's network namespace.
    fn within(&self, work: &mut dyn FnMut());
}

/// What a program's own `setsockopt(TCP_CONGESTION)` comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    Allow,
    /// It succeeds and changes nothing; `getsockopt` tells the truth.
    Ignore,
    /// EPERM for any other than the module's.
    #[default]
    Refuse,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    pub policy: Policy,
    /// What cannot be served is let through to the host's stack, and counted, instead of refused.
    pub fail_open: bool,
    /// The guest's tenant has limits that a kernel socket would pass by: there are no streams. (Datagrams are left, so that
    /// names can be asked for.)
    pub no_streams: bool,
}

/// Counts, for `netkernel explain`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Sockets that were injected.
    pub served: AtomicU64,
    /// Sockets that were refused, by Linux's rules or because they cannot be served.
    pub refused: AtomicU64,
    /// Sockets that were let through unserved.
    pub let_through: AtomicU64,
    /// What relayed sockets carried: payload bytes that the program was given and that it sent, and connections that were
    /// accepted or made. (What kernel sockets carry, the kernel counts.)
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub connections: AtomicU64,
    /// What the stack knew of relayed TCP connections.
    pub tcp: TcpCounters,
    /// Processor time of the guest's own thread in the engine.
    pub cpu: ThreadClock,
    /// Closed when the agent must stop between two calls.
    pub gate: crate::gate::Gate,
    /// Threads that asked, as far as they are not known to be dead.
    processes: Mutex<BTreeSet<u32>>,
}

/// Connections, segments, retransmitted ones, sum of round trip times in microseconds, and how many these are.
#[derive(Debug, Default)]
pub struct TcpCounters([AtomicU64; 5]);

impl TcpCounters {
    pub fn add(&self, counts: [u64; 5]) {
        for (sum, count) in self.0.iter().zip(counts) {
            sum.fetch_add(count, Relaxed);
        }
    }

    pub fn sums(&self) -> [u64; 5] {
        self.0.each_ref().map(|sum| sum.load(Relaxed))
    }
}

impl Counters {
    /// A thread of the guest asked for something.
    pub fn remember(&self, pid: u32) {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        if processes.insert(pid) && processes.len() > MAX_PROCESSES {
            processes.retain(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
    }

    pub fn processes(&self) -> Vec<u32> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

/// Finds the ledger of the sockets' namespace. `None`: there is none.
pub type OpenLedger = Box<dyn Fn(&dyn Sockets) -> Option<Arc<Ledger>> + Send>;

/// What an agent gives out: sockets of one stack, by its rules.
pub struct Offer {
    /// The stack's name.
    pub stack: String,
    pub sockets: Box<dyn Sockets>,
    pub policy: Policy,
    /// Who is told of each socket; asked for with the first one.
    pub ledger: OpenLedger,
    /// As it was answered.
    found: OnceCell<Option<Arc<Ledger>>>,
}

impl Offer {
    pub fn new(stack: String, sockets: Box<dyn Sockets>, policy: Policy, ledger: OpenLedger) -> Offer {
        Offer { stack, sockets, policy, ledger, found: OnceCell::new() }
    }

    fn ledger(&self) -> Option<&Ledger> {
        self.found.get_or_init(|| (self.ledger)(&*self.sockets)).as_deref()
    }
}

/// Where another thread leaves what an agent is to give out from now on.
#[derive(Default)]
pub struct Exchange(Mutex<Option<Offer>>);

impl Exchange {
    /// Holds for each call that the agent receives after this.
    pub fn put(&self, offer: Offer) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(offer);
    }

    fn take(&self) -> Option<Offer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A guest's agent: dropped or not, its thread ends when no process has the filter any more, or `end` is closed by the
/// other side.
pub struct Agent {
    pub listener: Listener,
    /// One end of a pair; the engine holds the other.
    pub end: OwnedFd,
    pub settings: Settings,
    pub counters: Arc<Counters>,
    pub guest: u32,
    pub exchange: Arc<Exchange>,
}

/// What an agent gives out now, and what it gave out before: programs may have sockets of that.
struct Offers {
    now: Offer,
    before: Vec<Offer>,
}

impl Offers {
    fn exchange(&mut self, new: Offer) {
        let old = std::mem::replace(&mut self.now, new);
        self.before.push(old);
        let stack = &self.now.stack;
        self.before.retain(|offer| offer.stack != *stack);
    }

    /// By whose rules the socket of a call is, its first argument.
    fn of_socket(&mut self, guest: u32, call: &Notification) -> &mut Offer {
        let number = if self.before.is_empty() { None } else { self.find(guest, call) };
        match number {
            Some(number) => &mut self.before[number],
            None => &mut self.now,
        }
    }

    fn find(&self, guest: u32, call: &Notification) -> Option<usize> {
        let socket = memory::duplicate(call.pid, call.arguments[0] as i32)?;
        let cookie = ledger::cookie(&socket)?;
        let all = || std::iter::once(&self.now).chain(&self.before);
        let known = || all().find_map(|offer| offer.ledger()?.stack_of(guest, cookie));
        // One that was accepted is known once it was looked at.
        let stack = known().or_else(|| {
            for offer in all() {
                offer.sockets.within(&mut || drop(offer.ledger().map(Ledger::carried)));
            }
            known()
        })?;
        self.before.iter().position(|offer| offer.stack == stack)
    }
}

impl Agent {
    /// Answers until nobody asks any more. When the listener is closed in the end, a call that waits gets ENOSYS.
    /// `before`: what one before this gave out.
    pub fn run(self, offer: Offer, before: Vec<Offer>) {
        let mut offers = Offers { now: offer, before };
        let counters = Arc::clone(&self.counters);
        let _clock = counters.cpu.of_this_thread();
        loop {
            let mut polled = [
                libc::pollfd { fd: self.listener.fd(), events: libc::POLLIN, revents: 0 },
                libc::pollfd { fd: self.end.as_raw_fd(), events: 0, revents: 0 },
            ];
            // SAFETY: two entries, valid for reads and writes.
            let n = unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
            if n < 0 {
                continue;
            }
            if polled[1].revents != 0 {
                return;
            }
            if polled[0].revents & libc::POLLIN != 0 {
                let _passed = counters.gate.pass();
                // Another one goes on for this one, which waited here.
                if self.is_ended() {
                    return;
                }
                // An error: the thread that asked is dead, or was interrupted.
                if let Ok(notification) = self.listener.receive() {
                    if let Some(offer) = self.exchange.take() {
                        offers.exchange(offer);
                    }
                    self.answer(&mut offers, &notification);
                }
            } else if polled[0].revents != 0 {
                return;
            }
        }
    }

    fn is_ended(&self) -> bool {
        let mut end = libc::pollfd { fd: self.end.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one entry, valid for reads and writes.
        unsafe { libc::poll(&mut end, 1, 0) > 0 }
    }

    fn answer(&self, offers: &mut Offers, call: &Notification) {
        self.counters.remember(call.pid);
        // An answer that fails: nobody waits for it any more.
        let _ = if is_setsockopt(call) {
            self.set_option(offers.of_socket(self.guest, call), call)
        } else if is_socketcall(call) {
            self.multiplexed(call)
        } else {
            self.socket(&mut offers.now, call)
        };
    }

    /// A 32-bit program's way to make sockets of any family.
    fn multiplexed(&self, call: &Notification) -> std::io::Result<()> {
        let (count, said) = if self.settings.fail_open {
            (&self.counters.let_through, "is the host's own (--fail-open)")
        } else {
            (&self.counters.refused, "is refused: use a 64-bit build of it, or --fail-open")
        };
        if count.fetch_add(1, Relaxed) == 0 {
            log::warn!(
                guest = self.guest, process = call.pid;
                "guest {}: process {} is a 32-bit program; its sockets cannot be served, and what it asks for {said}",
                self.guest,
                call.pid
            );
        }
        if self.settings.fail_open {
            self.listener.let_through(call)
        } else {
            self.listener.fail(call, libc::ENOSYS)
        }
    }

    fn socket(&self, offer: &mut Offer, call: &Notification) -> std::io::Result<()> {
        let [domain, kind, protocol] = [0, 1, 2].map(|i| call.arguments[i] as i32);
        let request = SocketRequest {
            domain,
            kind: kind & TYPE_MASK,
            protocol,
            nonblocking: kind & libc::SOCK_NONBLOCK != 0,
        };
        let known = TYPE_MASK | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let made = if kind & !known != 0 {
            Err(libc::EINVAL)
        } else if needs_permission(&request) && !may_use_raw(call.pid, &request) {
            // The kernel asks who makes the socket, and that is the engine.
            Err(if request.kind == libc::SOCK_DGRAM { libc::EACCES } else { libc::EPERM })
        } else if self.settings.no_streams && request.kind == libc::SOCK_STREAM {
            Err(libc::EACCES)
        } else if request.protocol == libc::IPPROTO_MPTCP {
            // Its subflows have a congestion control and paths of their own; programs fall back to TCP.
            Err(libc::EPROTONOSUPPORT)
        } else {
            offer.sockets.socket(&request)
        };
        if let Ok(fd) = &made
            && let Some(ledger) = offer.ledger()
        {
            if request.kind == libc::SOCK_STREAM {
                ledger.made(fd, self.guest, &offer.stack);
            } else if ledger.made_datagram(fd, self.guest, &offer.stack) {
                offer.sockets.within(&mut || ledger.forget_datagrams());
            }
        }
        let failed = match made {
            Ok(fd) => match self.listener.give(call, fd, kind & libc::SOCK_CLOEXEC != 0) {
                Ok(()) => {
                    self.counters.served.fetch_add(1, Relaxed);
                    return Ok(());
                }
                // EMFILE is the program's own limit; ENOENT: it is gone.
                Err(error) => error.raw_os_error().unwrap_or(libc::ENOBUFS),
            },
            Err(errno) => errno,
        };
        // The engine's shortage, not the program's fault, is what fail-open is for.
        if self.settings.fail_open
            && matches!(failed, libc::ENETDOWN | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
        {
            let count = self.counters.let_through.fetch_add(1, Relaxed);
            if count == 0 {
                log::warn!(
                    guest = self.guest, errno = failed;
                    "guest {}: a socket could not be served (errno {failed}) and is the host's own now (--fail-open)",
                    self.guest
                );
            }
            return self.listener.let_through(call);
        }
        self.counters.refused.fetch_add(1, Relaxed);
        self.listener.fail(call, failed)
    }

    fn set_option(&self, offer: &mut Offer, call: &Notification) -> std::io::Result<()> {
        match (call.arguments[1] as i32, call.arguments[2] as i32) {
            (libc::SOL_SOCKET, option) if offer.sockets.owns(option) => self.listener.fail(call, libc::EPERM),
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION) => self.set_congestion(offer, call),
            _ => self.listener.let_through(call),
        }
    }

    fn set_congestion(&self, offer: &mut Offer, call: &Notification) -> std::io::Result<()> {
        let Some(promised) = offer.sockets.congestion_control().map(str::to_owned) else {
            return self.listener.let_through(call);
        };
        match offer.policy {
            Policy::Allow => self.listener.let_through(call),
            Policy::Ignore => self.listener.succeed(call, 0),
            Policy::Refuse => {
                // As the kernel's do_tcp_setsockopt: EINVAL, EFAULT, ENOENT, in this order.
                let length = call.arguments[4] as i32;
                if length < 1 {
                    return self.listener.fail(call, libc::EINVAL);
                }
                let wanted = memory::read(call.pid, call.arguments[3], (length as usize).min(NAME_MAX));
                if !self.listener.is_valid(call) {
                    return Ok(());
                }
                let Some(wanted) = wanted else { return self.listener.fail(call, libc::EFAULT) };
                let name = wanted.split(|&b| b == 0).next().unwrap_or_default();
                if name == promised.as_bytes() {
                    // It has it since it was made.
                    self.listener.succeed(call, 0)
                } else if offer.sockets.knows(name) {
                    self.listener.fail(call, libc::EPERM)
                } else {
                    self.listener.fail(call, libc::ENOENT)
                }
            }
        }
    }
}

/// AUDIT_ARCH_I386.
const I386: u32 = 0x4000_0003;

fn is_setsockopt(call: &Notification) -> bool {
    if call.arch == I386 { call.nr == 366 } else { i64::from(call.nr) == libc::SYS_setsockopt }
}

/// socketcall(2) of i386.
fn is_socketcall(call: &Notification) -> bool {
    call.arch == I386 && call.nr == 102
}

/// What the kernel does not give to everybody.
fn needs_permission(request: &SocketRequest) -> bool {
    let ping = request.kind == libc::SOCK_DGRAM
        && matches!(
            (request.domain, request.protocol),
            (libc::AF_INET, libc::IPPROTO_ICMP) | (libc::AF_INET6, libc::IPPROTO_ICMPV6)
        );
    ping || matches!(request.kind, libc::SOCK_RAW | SOCK_PACKET)
}

/// Whether the kernel would let the thread make a raw or ping socket: CAP_NET_RAW in the engine's user namespace, or a
/// group of net.ipv4.ping_group_range.
fn may_use_raw(pid: u32, request: &SocketRequest) -> bool {
    let namespace =
        |who: &str| std::fs::metadata(format!("/proc/{who}/ns/user")).ok().map(|m| (m.dev(), m.ino()));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let capable = field("CapEff:")
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .is_some_and(|capabilities| capabilities >> 13 & 1 == 1);
    if capable && namespace(&pid.to_string()).is_some_and(|own| Some(own) == namespace("self")) {
        return true;
    }
    if request.kind != libc::SOCK_DGRAM {
        return false;
    }
    let range: Vec<u32> = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range")
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let group: Option<u32> = field("Gid:").and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok());
    matches!((range.as_slice(), group), (&[low, high], Some(group)) if (low..=high).contains(&group))
}
