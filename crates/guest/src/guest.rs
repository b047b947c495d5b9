//! The process's view of its guest: region, channel, doorbell, and what of it a fork invalidates.

use core::cell::UnsafeCell;
use core::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use std::os::fd::{FromRawFd, OwnedFd};

use netkernel_abi::control::{Message, env, kind};
use netkernel_abi::feature;
use netkernel_shm::{Region, fds};

use crate::spare;
use crate::sys::{self, raw};
use crate::table::{self, Slot};

/// Everything that stays the same in all processes that share this memory image.
pub struct Guest {
    pub region: Region,
    pub channel: AtomicI32,
    pub doorbell: AtomicI32,
    /// Data word of GuestLib's own entries in real epoll sets; random, so that a program's own data never equals it.
    pub magic: u64,
    pub spin_ns: u64,
    /// Whether the guests that this one shares memory with are to be trusted ([`feature::SINGLE_COPY`]).
    pub single_copy: bool,
}

static GUEST: AtomicPtr<Guest> = AtomicPtr::new(core::ptr::null_mut());
static ENGINE_GONE: AtomicBool = AtomicBool::new(false);
pub static TRACE: AtomicU32 = AtomicU32::new(0);

/// The guest, if this process is one.
#[inline]
pub fn guest() -> Option<&'static Guest> {
    let pointer = GUEST.load(Ordering::Acquire);
    // SAFETY: the pointer is null or a leaked box that is never freed.
    unsafe { pointer.as_ref() }
}

/// A page that the kernel zeroes in every child of a fork, however the fork was made (MADV_WIPEONFORK).
#[repr(C)]
struct PerProcess {
    tag: AtomicU32,
    lock: AtomicU32,
    liveness: AtomicI32,
    pid: AtomicU32,
    /// Writers of pairs that proved to be who they are ([`crate::offer`]): number of the memory << 32 | process.
    proved: [AtomicU64; PROVED],
}

const PROVED: usize = 64;
const _: () = assert!(size_of::<PerProcess>() <= 4096);

static PER_PROCESS: AtomicUsize = AtomicUsize::new(0);

fn per_process() -> &'static PerProcess {
    // SAFETY: set once, before GUEST, to a page that is never unmapped; its fields are atomics.
    unsafe { &*(PER_PROCESS.load(Ordering::Relaxed) as *const PerProcess) }
}

/// The calling process's tag, 0 when it has not announced itself yet (a fork child, or no socket so far).
#[inline]
pub fn tag() -> u32 {
    per_process().tag.load(Ordering::Acquire)
}

/// The calling process's number, without a system call but for the first time.
#[inline]
pub fn pid() -> u32 {
    if PER_PROCESS.load(Ordering::Relaxed) == 0 {
        return raw!(libc::SYS_getpid) as u32;
    }
    let page = per_process();
    match page.pid.load(Ordering::Relaxed) {
        0 => {
            let pid = raw!(libc::SYS_getpid) as u32;
            page.pid.store(pid, Ordering::Relaxed);
            pid
        }
        pid => pid,
    }
}

/// Where this process notes who writes to memory `number`. A fork child does not know it.
pub fn proved(number: u32) -> Option<&'static AtomicU64> {
    (PER_PROCESS.load(Ordering::Relaxed) != 0).then(|| &per_process().proved[number as usize % PROVED])
}

impl Guest {
    /// The tag of the calling process; announces the process to the engine the first time.
    #[inline]
    pub fn process(&self) -> Result<u32, i32> {
        match tag() {
            0 => self.announce(),
            tag => Ok(tag),
        }
    }

    #[cold]
    fn announce(&self) -> Result<u32, i32> {
        let page = per_process();
        while page.lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            sys::yield_now();
        }
        let mut tag = page.tag.load(Ordering::Acquire);
        let mut result = Ok(tag);
        if tag == 0 {
            tag = random32() | 1;
            result = fds::pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC)
                .map_err(|e| e.raw_os_error().unwrap_or(libc::ENOBUFS))
                .and_then(|(ours, theirs)| {
                    let pid = pid();
                    let message = Message { kind: kind::PROCESS, a: tag, b: pid, ..Message::default() };
                    self.channel_send(message, &theirs)?;
                    let liveness = table::move_high(ours);
                    page.liveness.store(liveness, Ordering::Relaxed);
                    LIVENESS_MIRROR.store(liveness, Ordering::Relaxed);
                    page.tag.store(tag, Ordering::Release);
                    Ok(tag)
                });
        }
        page.lock.store(0, Ordering::Release);
        result
    }

    /// Sends one control message with its descriptor.
    pub fn channel_send(&self, message: Message, fd: &OwnedFd) -> Result<(), i32> {
        use std::os::fd::AsRawFd;
        if engine_gone() {
            return Err(libc::ENETDOWN);
        }
        loop {
            match fds::send(self.channel.load(Ordering::Relaxed), &message.to_bytes(), &[fd.as_raw_fd()], 0) {
                Ok(_) => return Ok(()),
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::ECONNREFUSED) => {
                        engine_is_gone();
                        return Err(libc::ENETDOWN);
                    }
                    Some(e @ (libc::ETOOMANYREFS | libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                        return Err(e);
                    }
                    _ => return Err(libc::ENOBUFS),
                },
            }
        }
    }

    /// Wakes the engine if it does not poll this guest.
    #[inline]
    pub fn ring_doorbell(&self) {
        if netkernel_ring::bell::must_ring(&self.region.header().engine_waiting) {
            let one = 1u64;
            raw!(libc::SYS_write, self.doorbell.load(Ordering::Relaxed), &one as *const u64, 8);
        }
    }

    /// The other end of a placeholder is closed. Most likely the engine is dead, which the channel tells as well, if a little
    /// later; but an engine without descriptors refuses single sockets.
    #[cold]
    pub fn placeholder_hung_up(&self) {
        if self.check_engine() {
            let mut p = libc::pollfd { fd: self.channel.load(Ordering::Relaxed), events: 0, revents: 0 };
            raw!(libc::SYS_poll, &mut p as *mut libc::pollfd, 1, 100);
            self.check_engine();
        }
    }

    /// Asks the kernel whether the engine still holds its end of the channel.
    pub fn check_engine(&self) -> bool {
        if engine_gone() {
            return false;
        }
        let mut p = libc::pollfd { fd: self.channel.load(Ordering::Relaxed), events: 0, revents: 0 };
        let n = raw!(libc::SYS_poll, &mut p as *mut libc::pollfd, 1, 0);
        if n > 0 && p.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0 {
            engine_is_gone();
            return false;
        }
        if self.region.header().engine_gone.load(Ordering::Relaxed) != 0 {
            engine_is_gone();
            return false;
        }
        true
    }
}

/// True once the engine was seen dead: every guest socket then is, too.
#[inline]
pub fn engine_gone() -> bool {
    ENGINE_GONE.load(Ordering::Relaxed)
}

/// The process is about to give up system calls (seccomp) or descriptors: what GuestLib needs of either comes now, and
/// from here on it stays with calls that sandboxes allow. sshd's is the measure: read, write, poll, futex.
#[cold]
pub fn before_confinement(seccomp: bool) {
    let Some(guest) = guest() else { return };
    let _ = guest.process();
    crate::queue::prepare(guest);
    crate::pair::before_confinement(guest);
    if seccomp {
        sys::CONFINED.store(true, Ordering::Relaxed);
    }
}

pub fn engine_is_gone() {
    ENGINE_GONE.store(true, Ordering::SeqCst);
}

/// After fork, in the child: the parent's life must not seem to go on because the child holds its liveness pair.
pub extern "C" fn after_fork_in_child() {
    // The page was wiped; the descriptor's number is remembered in the (inherited) mirror.
    let liveness = LIVENESS_MIRROR.swap(-1, Ordering::Relaxed);
    if liveness >= 0 {
        table::forget(liveness);
        sys::close(liveness);
    }
}

pub static LIVENESS_MIRROR: AtomicI32 = AtomicI32::new(-1);

pub fn random32() -> u32 {
    let mut value = 0u32;
    let r = raw!(libc::SYS_getrandom, &mut value as *mut u32, 4, 0);
    if r == 4 { value } else { (sys::now_ns() as u32) ^ (raw!(libc::SYS_getpid) as u32).rotate_left(16) }
}

/// What becomes of INET sockets of a program that should be a guest's and could not attach ([`env::UNATTACHED`]).
static UNATTACHED: AtomicU8 = AtomicU8::new(NO);
static WHY: Lock<String> = Lock::new(String::new());
const NO: u8 = 0;
const REFUSE: u8 = 1;
const WARN: u8 = 2;
/// As [`WARN`], and it was said.
const WARNED: u8 = 3;

/// Whether a program without a guest may make an INET socket. It is said once in a program that it may not, or should not.
#[inline]
pub fn may_be_unserved() -> Result<(), i32> {
    match UNATTACHED.load(Ordering::Relaxed) {
        NO | WARNED => Ok(()),
        state => say_unattached(state),
    }
}

#[cold]
fn say_unattached(state: u8) -> Result<(), i32> {
    let what = match state {
        WARN => "warning: this program's sockets are the host's own (--fail-open)",
        _ => "this program gets no INET sockets (ENETDOWN)",
    };
    let why = core::mem::take(&mut *WHY.lock());
    if !why.is_empty() {
        say(&format!("{what}: {why}"));
    }
    if state != WARN {
        return Err(libc::ENETDOWN);
    }
    UNATTACHED.store(WARNED, Ordering::Relaxed);
    Ok(())
}

/// The program should be a guest's: nobody but the agent, if there is one, may serve it in silence.
fn cannot_attach(why: String) {
    trace(1, &format!("not attached: {why}"));
    let state = match variable(env::UNATTACHED) {
        Some("agent") => return,
        Some("warn") => WARN,
        _ => REFUSE,
    };
    *WHY.lock() = why;
    UNATTACHED.store(state, Ordering::Relaxed);
}

/// The guest's region and its three descriptors.
type Parts = (Region, [i32; 3]);

/// What the environment's numbers lead to; nothing if the program was started without them, or closed them.
fn inherited() -> Result<Option<Parts>, String> {
    let Some(list) = variable(env::FDS) else { return Ok(None) };
    let mut numbers = list.split(',').map_while(|n| n.parse::<i32>().ok());
    let (Some(region), Some(channel), Some(doorbell)) = (numbers.next(), numbers.next(), numbers.next())
    else {
        return Ok(None);
    };
    if !is_channel(channel) || !is_memfd(region) || !is_eventfd(doorbell) {
        return Ok(None);
    }
    let copy = raw!(libc::SYS_fcntl, region, libc::F_DUPFD_CLOEXEC, 3) as i32;
    if copy < 0 {
        return Err(format!("no descriptor is left (errno {})", -copy));
    }
    // SAFETY: a descriptor that was just made for us.
    let attached = Region::attach(unsafe { OwnedFd::from_raw_fd(copy) });
    attached.map(|attached| Some((attached, [region, channel, doorbell]))).map_err(|error| error.to_string())
}

/// Reads the environment and joins the guest. Called once by the constructor.
pub fn attach() {
    if let Some(level) = variable(env::TRACE) {
        TRACE.store(level.parse().unwrap_or(0), Ordering::Relaxed);
    }
    crate::offer::init();
    let attached = match inherited() {
        Ok(None) if variable(env::TOKEN).is_some() => attach_by_token().map(Some),
        Ok(None) if variable(env::FDS).is_some() => {
            Err("its descriptors are closed, and it has no token to ask for new ones".to_owned())
        }
        attached => attached,
    };
    match attached {
        Ok(Some(parts)) => join(parts),
        Ok(None) => {}
        Err(why) => cannot_attach(why),
    }
}

fn join((region, [region_fd, channel, doorbell]): Parts) {
    let page = raw!(
        libc::SYS_mmap,
        0,
        4096,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1i64,
        0
    );
    if page < 0 {
        return cannot_attach(format!("no memory (errno {})", -page));
    }
    raw!(libc::SYS_madvise, page, 4096, libc::MADV_WIPEONFORK);
    PER_PROCESS.store(page as usize, Ordering::Relaxed);
    for fd in [region_fd, channel, doorbell] {
        table::set(fd, Slot::Internal);
    }
    // The region's own copy of the descriptor is not needed: the mapping stays.
    sys::close(region.fd());
    let spin_ns = region.header().spin_ns.load(Ordering::Relaxed) as u64;
    let single_copy = region.header().features.load(Ordering::Relaxed) & feature::SINGLE_COPY != 0;
    let guest = Box::new(Guest {
        region,
        channel: AtomicI32::new(channel),
        doorbell: AtomicI32::new(doorbell),
        magic: (random32() as u64) << 32 | random32() as u64,
        spin_ns,
        single_copy,
    });
    GUEST.store(Box::into_raw(guest), Ordering::Release);
    // SAFETY: registers a plain function that only touches atomics and closes a descriptor.
    unsafe {
        libc::pthread_atfork(Some(before_fork_hook), Some(after_fork_hook), Some(after_fork_in_child_hook))
    };
    table::adopt_inherited();
}

unsafe extern "C" fn before_fork_hook() {
    spare::before_fork();
}

unsafe extern "C" fn after_fork_hook() {
    spare::after_fork();
}

unsafe extern "C" fn after_fork_in_child_hook() {
    after_fork_in_child();
    spare::after_fork_in_child();
}

fn is_memfd(fd: i32) -> bool {
    raw!(libc::SYS_fcntl, fd, libc::F_GET_SEALS) >= 0
}

/// The program may have closed a number and opened something of its own under it.
fn is_channel(fd: i32) -> bool {
    let option = |name: i32| {
        let (mut value, mut len) = (0i32, 4u32);
        let r = raw!(
            libc::SYS_getsockopt,
            fd,
            libc::SOL_SOCKET,
            name,
            &mut value as *mut i32,
            &mut len as *mut u32
        );
        if r == 0 { value } else { -1 }
    };
    option(libc::SO_DOMAIN) == libc::AF_UNIX && option(libc::SO_TYPE) == libc::SOCK_SEQPACKET
}

fn is_eventfd(fd: i32) -> bool {
    let path = format!("/proc/self/fd/{fd}\0");
    let mut target = [0u8; 64];
    let n = raw!(libc::SYS_readlink, path.as_ptr(), target.as_mut_ptr(), target.len());
    n > 0 && target[..n as usize].starts_with(b"anon_inode:[eventfd")
}

/// A process whose descriptors were closed asks the engine for new ones.
fn attach_by_token() -> Result<Parts, String> {
    use std::os::fd::AsRawFd;
    let token = variable(env::TOKEN).unwrap_or_default();
    let path = variable(env::SOCKET).ok_or("the engine's socket is not named (NETKERNEL_SOCKET)")?;
    let fd = raw!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) as i32;
    if fd < 0 {
        return Err(format!("no socket to ask the engine with (errno {})", -fd));
    }
    // SAFETY: a descriptor that was just made for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero sockaddr_un is a valid value of that plain C struct.
    let mut address: libc::sockaddr_un = unsafe { core::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    if path.len() >= address.sun_path.len() {
        return Err(format!("{path} is too long for a socket's path"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from as _;
    }
    let connected =
        raw!(libc::SYS_connect, fd.as_raw_fd(), &address as *const _, size_of::<libc::sockaddr_un>());
    if connected < 0 {
        return Err(format!("the engine at {path} does not answer (errno {})", -connected));
    }
    // docs/openapi.json: attach.
    let body = format!("{{\"token\":\"{token}\"}}");
    let request = format!(
        "POST /v1/attach HTTP/1.1\r\nHost: netkernel\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let gone = |_| format!("the engine at {path} ended");
    fds::send(fd.as_raw_fd(), request.as_bytes(), &[], 0).map_err(gone)?;
    let mut reply = [0u8; 4096];
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    if raw!(libc::SYS_poll, &mut poll as *mut libc::pollfd, 1, 5000) != 1 {
        return Err(format!("the engine at {path} did not answer for five seconds"));
    }
    let (n, received) = fds::receive(fd.as_raw_fd(), &mut reply, 0).map_err(gone)?;
    let mut received = received.into_iter();
    let (Some(region_fd), Some(channel), Some(doorbell)) =
        (received.next(), received.next(), received.next())
    else {
        let status = reply[..n].split(|&byte| byte == b'\r').next().unwrap_or_default();
        return Err(format!(
            "the engine at {path} does not know this guest (any more): {}",
            String::from_utf8_lossy(status)
        ));
    };
    let region_copy = region_fd.try_clone().map_err(|error| error.to_string())?;
    let region = Region::attach(region_copy).map_err(|error| error.to_string())?;
    let keep = |fd: OwnedFd| {
        let high = table::move_high(fd);
        raw!(libc::SYS_fcntl, high, libc::F_SETFD, 0);
        high
    };
    let numbers = [region_fd, channel, doorbell].map(keep);
    let list = format!("{},{},{}\0", numbers[0], numbers[1], numbers[2]);
    // SAFETY: both are C strings; the constructor runs before the program has threads.
    unsafe { libc::setenv(c"NETKERNEL_FDS".as_ptr(), list.as_ptr().cast(), 1) };
    Ok((region, numbers))
}

/// An environment variable, read without std's lock.
pub fn variable(name: &str) -> Option<&'static str> {
    let mut buffer = [0u8; 64];
    buffer[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: buffer is a C string; getenv's result is a C string that lives in the environment.
    unsafe {
        let value = libc::getenv(buffer.as_ptr().cast());
        if value.is_null() { None } else { core::ffi::CStr::from_ptr(value).to_str().ok() }
    }
}

/// A lock of process memory. It holds the tag of the process that took it, so that a fork child does not wait for a
/// thread that it does not have.
pub struct Lock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the lock gives one thread at a time access to the value.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    pub const fn new(value: T) -> Lock<T> {
        Lock { word: AtomicU32::new(0), value: UnsafeCell::new(value) }
    }

    pub fn lock(&self) -> LockGuard<'_, T> {
        let me = if PER_PROCESS.load(Ordering::Relaxed) == 0 { 1 } else { tag() | 1 };
        let mut turns = 0u32;
        loop {
            match self.word.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break,
                // Held by a thread of the process that this one was forked from (1: taken before a process had a tag).
                Err(holder)
                    if holder != me
                        && holder != 1
                        && self
                            .word
                            .compare_exchange(holder, me, Ordering::Acquire, Ordering::Relaxed)
                            .is_ok() =>
                {
                    break;
                }
                Err(_) => {}
            }
            turns += 1;
            if turns.is_multiple_of(64) {
                sys::yield_now();
            } else {
                core::hint::spin_loop();
            }
        }
        LockGuard { lock: self }
    }
}

pub struct LockGuard<'a, T> {
    lock: &'a Lock<T>,
}

impl<T> core::ops::Deref for LockGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> core::ops::DerefMut for LockGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for LockGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.word.store(0, Ordering::Release);
    }
}

/// Says something on stderr when NETKERNEL_TRACE is at least `level`.
pub fn trace(level: u32, text: &str) {
    if TRACE.load(Ordering::Relaxed) >= level {
        say(text);
    }
}

/// Says something on stderr.
fn say(text: &str) {
    let line = format!("netkernel[{}]: {text}\n", raw!(libc::SYS_getpid));
    raw!(libc::SYS_write, 2, line.as_ptr(), line.len());
}
