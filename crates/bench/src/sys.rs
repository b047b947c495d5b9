//! The system calls that the standard library does not offer, behind safe functions. The only unsafe code of the crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Whether somebody asked this process to end.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// From now on an interrupt is noted, so that children and temporary files can be cleaned up before the end.
pub fn note_interrupts() {
    // SAFETY: an all-zero sigaction is a valid value; it is filled in before use, outlives the calls, and the handler
    // only stores to an atomic, which is async-signal-safe. SA_RESTART is left out: waits shall end.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = note_interrupt as extern "C" fn(libc::c_int) as usize;
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Orphans of the measured programs become children of this process, which then can end them.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes one integer and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// The calling thread, and what it spawns, stand in a network namespace of their own until this is dropped.
pub struct PrivateNetns {
    before: File,
}

impl PrivateNetns {
    pub fn enter() -> io::Result<PrivateNetns> {
        let before = File::open("/proc/thread-self/ns/net")?;
        // SAFETY: unshare takes flags only; CLONE_NEWNET changes the calling thread alone.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
        let own = PrivateNetns { before };
        loopback_up()?;
        Ok(own)
    }
}

impl Drop for PrivateNetns {
    fn drop(&mut self) {
        // SAFETY: the descriptor is open and is that of a network namespace; setns touches no memory.
        unsafe { libc::setns(self.before.as_raw_fd(), libc::CLONE_NEWNET) };
    }
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: socket takes integers only.
    let fd = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just created and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero ifreq is a valid value; its name stays terminated; it outlives the call. SIOCSIFFLAGS reads
    // the name and the flags, which are set.
    let result = unsafe {
        let mut request: libc::ifreq = mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request)
    };
    check(result).map(drop)
}

/// The most descriptors a child can be allowed.
pub fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local rlimit that outlives the call.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    limit.rlim_max
}

/// What `command` starts leads a process group, has all the descriptors that are allowed, and is killed when this
/// process dies without cleaning up.
pub fn prepare(command: &mut Command) {
    let hard = descriptor_limit();
    let limit = libc::rlimit { rlim_cur: hard, rlim_max: hard };
    let parent = std::process::id() as libc::pid_t;
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe system calls; it allocates
    // nothing: the limit is copied into it, and the errors are made from errno alone.
    unsafe {
        command.pre_exec(move || {
            check(libc::setpgid(0, 0))?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            if libc::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit)).map(drop)
        });
    }
}

/// Two cores that this process may use; `None` when it has but one.
pub fn two_cores() -> Option<[usize; 2]> {
    // SAFETY: an all-zero cpu_set_t is an empty set; the call writes at most its size to it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        check(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set)).ok()?;
        set
    };
    // SAFETY: CPU_ISSET reads a bit below CPU_SETSIZE of the set.
    let mut cores =
        (0..libc::CPU_SETSIZE as usize).rev().filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) });
    Some([cores.next()?, cores.next()?])
}

/// What `command` starts runs on the core `cpu` only.
pub fn keep_on(command: &mut Command, cpu: usize) {
    // SAFETY: the closure runs between fork and exec, allocates nothing and makes one async-signal-safe system call;
    // `cpu` came from `two_cores`, so that it is below CPU_SETSIZE.
    unsafe {
        command.pre_exec(move || {
            let mut set: libc::cpu_set_t = mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            check(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)).map(drop)
        });
    }
}

pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the descriptor was just created and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A copy of the descriptor `fd` of another process.
pub fn descriptor_of(process: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the descriptor was just created in this process and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn set_congestion(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let size = name.len() as libc::socklen_t;
    // SAFETY: the pointer and the size are those of a string that outlives the call; the kernel copies it.
    check(unsafe {
        let value = name.as_ptr().cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, value, size)
    })
    .map(drop)
}

/// Whether `fd` became readable within `timeout`; an interrupted wait is an error.
pub fn readable(fd: RawFd, timeout: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let millis = timeout.as_millis().min(i32::MAX as u128) as libc::c_int;
    // SAFETY: the pointer is to one local pollfd that outlives the call, and the count says one.
    check(unsafe { libc::poll(&mut entry, 1, millis) }).map(|ready| ready > 0)
}

/// How a child ended, and the CPU time of it and of its own reaped children.
#[derive(Clone, Copy)]
pub struct Exit {
    pub status: i32,
    pub cpu_s: f64,
}

/// Reaps the child `pid` if it has ended.
pub fn reap(pid: i32) -> io::Result<Option<Exit>> {
    let mut status = 0;
    // SAFETY: an all-zero rusage is a valid value.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: both pointers are to locals that outlive the call.
    let reaped = check(unsafe { libc::wait4(pid, &mut status, libc::WNOHANG, &mut usage) })?;
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    let cpu_s = seconds(usage.ru_utime) + seconds(usage.ru_stime);
    Ok((reaped == pid).then_some(Exit { status, cpu_s }))
}

/// Signals a process, or with a negative `pid` a process group. That it is gone already is no error.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: kill takes two integers.
    unsafe { libc::kill(pid, signal) };
}

/// CPU time of a live process, threads that ended included, children not.
pub fn cpu_time_s(pid: i32) -> Option<f64> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to locals that outlive the calls.
    let ok = unsafe {
        libc::clock_getcpuclockid(pid, &mut clock) == 0 && libc::clock_gettime(clock, &mut time) == 0
    };
    ok.then(|| time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

pub fn ticks_per_second() -> f64 {
    // SAFETY: sysconf takes an integer.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) as f64 }
}

/// Closing `fd` resets its connection, so that nothing of it stays behind in the kernel.
pub fn reset_on_close(fd: RawFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = mem::size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the pointer is to a local of the size that is given, which outlives the call.
    check(unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size)
    })
    .map(drop)
}

/// The kernel's epoll, level-triggered, for readability.
pub struct Epoll(OwnedFd);

impl Epoll {
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: epoll_create1 takes an integer.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor was just created and has no other owner.
        Ok(Epoll(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub fn add(&self, fd: RawFd) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: fd as u64 };
        // SAFETY: the event is a local that outlives the call.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) }).map(drop)
    }

    /// The next ready descriptors.
    pub fn wait(&self) -> io::Result<Vec<RawFd>> {
        const MOST: usize = 256;
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; MOST];
        let most = MOST as libc::c_int;
        // SAFETY: the pointer is to a local array of as many events as the count says.
        let count = check(unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), most, -1) })?;
        Ok(events[..count as usize].iter().map(|event| event.u64 as RawFd).collect())
    }
}

/// From now on the calling thread runs on the core `cpu` only. `cpu` is one of [`two_cores`].
pub fn stay_on(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set; CPU_SET checks its bounds; the call reads the set's size of it.
    check(unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    })
    .map(drop)
}

/// Anonymous memory of the same kind as a region's (shared), on pages of 2 MiB or ordinary ones.
pub struct SharedMemory {
    start: *mut u8,
    bytes: usize,
}

impl SharedMemory {
    pub fn new(bytes: usize, huge: bool) -> io::Result<SharedMemory> {
        let huge = if huge { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | huge;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address that the system chooses; the result is checked.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(SharedMemory { start: start.cast(), bytes })
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `bytes` long, zeroed at first, and lives as long as self; only this value leads to it, which
        // is borrowed mutably, and no child process is made while it exists.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps this value's own mapping; nothing borrowed from self can be alive.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

/// An eventfd that blocks readers: a doorbell.
pub fn doorbell() -> io::Result<File> {
    // SAFETY: eventfd takes integers.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?;
    // SAFETY: the descriptor was just created and has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}
