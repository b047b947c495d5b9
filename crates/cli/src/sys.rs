//! The system calls that have no safe wrapper in the standard library.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether our caller had SIGPIPE ignored: Rust's start-up code ignores it, and a program that we execute must find what
/// it would have found without us.
static SIGPIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

extern "C" fn remember_sigpipe() {
    // SAFETY: an all-zero sigaction is a valid value of that plain C struct.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; old is valid for writes.
    if unsafe { libc::sigaction(libc::SIGPIPE, std::ptr::null(), &mut old) } == 0 {
        SIGPIPE_WAS_IGNORED.store(old.sa_sigaction == libc::SIG_IGN, Ordering::Relaxed);
    }
}

#[used]
// SAFETY: .init_array holds pointers to functions that are called once before main; this one only reads a signal's action.
#[unsafe(link_section = ".init_array")]
static REMEMBER_SIGPIPE: extern "C" fn() = remember_sigpipe;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Seccomp filters of this thread. `None`: before Linux 5.9, or without /proc.
pub fn seccomp_filters() -> Option<u32> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?.trim().parse().ok()
}

pub fn effective_uid() -> u32 {
    // SAFETY: cannot fail and touches no memory.
    unsafe { libc::geteuid() }
}

pub fn effective_gid() -> u32 {
    // SAFETY: cannot fail and touches no memory.
    unsafe { libc::getegid() }
}

/// Soft and hard RLIMIT of `resource`; `u64::MAX` is no limit.
pub fn limit(resource: libc::__rlimit_resource_t) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for writes.
    check(unsafe { libc::getrlimit(resource, &mut limit) })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Raises the soft limit on descriptors to the hard one; the engine holds two for each guest socket.
pub fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = limit(libc::RLIMIT_NOFILE)
        && soft < hard
    {
        let limit = libc::rlimit { rlim_cur: hard, rlim_max: hard };
        // SAFETY: limit is a live value. What is refused leaves the soft limit, which doctor reports.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    }
}

/// Duplicates `fd` to the lowest free number from `at_least` on, open across exec.
pub fn duplicate_for_exec(fd: BorrowedFd<'_>, at_least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call on an open descriptor.
    let new = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, at_least) })?;
    // SAFETY: new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Sets or clears close-on-exec.
pub fn set_close_on_exec(fd: RawFd, on: bool) -> io::Result<()> {
    // SAFETY: plain system call; a bad descriptor is an error.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, if on { libc::FD_CLOEXEC } else { 0 }) }).map(drop)
}

/// Takes over a descriptor that was named on the command line.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    set_close_on_exec(fd, true)?;
    // SAFETY: open, as just seen; our caller handed it to this process for this use alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The listening socket that a service manager started us with (sd_listen_fds(3)), if it did. To be called once, before there
/// are threads: programs that we start do not find the variables.
pub fn inherited_socket() -> io::Result<Option<OwnedFd>> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let (pid, count) = (number("LISTEN_PID"), number("LISTEN_FDS"));
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // SAFETY: there is no other thread that could read the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
    if pid != Some(std::process::id()) {
        return Ok(None);
    }
    match count {
        None | Some(0) => Ok(None),
        Some(1) => adopt(3).map(Some),
        Some(n) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{n} sockets were handed over, but the engine has one control socket"),
        )),
    }
}

/// Closes every descriptor from 3 on, except `keep`.
pub fn close_inherited(keep: RawFd) {
    let range = |first: u32, last: u32| {
        // SAFETY: called at the start of a process that owns no descriptors of its own yet but `keep`.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }
    };
    let keep = keep.max(3) as u32;
    if keep > 3 {
        range(3, keep - 1);
    }
    range(keep + 1, u32::MAX);
}

/// For this process and those that it starts. To be called before there are threads.
pub fn set_environment(name: &str, value: &str) {
    // SAFETY: nobody reads the environment meanwhile, as there are no other threads.
    unsafe { std::env::set_var(name, value) };
}

/// A variable, which programs that we start do not find. To be called before there are threads.
pub fn take_environment(name: &str) -> Option<std::ffi::OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: there is no other thread that could read the environment meanwhile.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

/// Makes standard error go to `file`.
pub fn redirect_stderr(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: both are open; what was standard error is closed by this, and nobody owns it.
    check(unsafe { libc::dup2(file.as_raw_fd(), 2) }).map(drop)
}

/// Leaves the caller's session and process tree: a new session, then a second process that is no session leader. Returns
/// in that process only. Must be called before there are threads.
pub fn detach() -> io::Result<()> {
    // SAFETY: the process has one thread.
    check(unsafe { libc::setsid() })?;
    // SAFETY: one thread, so the child may go on with everything.
    if check(unsafe { libc::fork() })? != 0 {
        // SAFETY: ends this process without running anything of the other's.
        unsafe { libc::_exit(0) };
    }
    std::env::set_current_dir("/")
}

/// Blocks SIGTERM, SIGINT, SIGHUP for this thread and those it starts, and returns a signalfd for them.
pub fn termination_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is valid and is initialised by sigemptyset.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: set is valid for writes; the signal numbers are valid.
    unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGHUP);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
    // SAFETY: set is initialised; the result is checked.
    let fd = check(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sleeps until one of the descriptors can be read or its other end is closed.
pub fn wait_readable(fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut list: Vec<_> =
        fds.iter().map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }).collect();
    loop {
        // SAFETY: list is live and its length is true.
        match check(unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, -1) }) {
            Ok(_) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether the descriptor can be read now, or its other end is closed.
pub fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut one = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, valid for reads and writes.
    unsafe { libc::poll(&mut one, 1, 0) > 0 }
}

/// Replaces this process by `program`, as execvp does once the path is known. Returns only if that fails.
pub fn execute(program: &std::path::Path, arguments: &[CString], environment: &[CString]) -> io::Error {
    let Ok(path) = CString::new(program.as_os_str().as_bytes()) else {
        return io::Error::from_raw_os_error(libc::ENOENT);
    };
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    let disposition = if SIGPIPE_WAS_IGNORED.load(Ordering::Relaxed) { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: a valid signal and disposition.
    unsafe { libc::signal(libc::SIGPIPE, disposition) };
    // SAFETY: all three are null-terminated and outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOEXEC) {
        // A script without a first line that names its interpreter: the shell's, as execvp has it.
        let shell = c"/bin/sh";
        let mut argv = vec![shell.as_ptr(), path.as_ptr()];
        argv.extend(arguments.iter().skip(1).map(|s| s.as_ptr()).chain([std::ptr::null()]));
        // SAFETY: as above.
        unsafe { libc::execve(shell.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    }
    error
}

/// Executes `program` in place of this process, which goes on if that fails; nothing else is changed before.
pub fn execute_again(program: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: all three are null-terminated and outlive the call.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Whether this process may execute the file.
pub fn may_execute(path: &std::path::Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: a valid C string.
    unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) == 0 }
}

/// Whether the file carries capabilities (the security.capability attribute).
pub fn has_file_capabilities(path: &std::path::Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: valid C strings; a null buffer of size 0 asks for the attribute's size.
    unsafe { libc::getxattr(path.as_ptr(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

/// Whether set-user-id bits have no effect there (mount option nosuid).
pub fn on_nosuid_mount(path: &std::path::Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: an all-zero statvfs is a valid value of that plain C struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a valid C string and a buffer that is valid for writes.
    unsafe { libc::statvfs(path.as_ptr(), &mut stat) == 0 && stat.f_flag & libc::ST_NOSUID != 0 }
}

/// The uid of a user's name.
pub fn uid_of(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: an all-zero passwd is a valid value of that plain C struct.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut buffer = vec![0 as libc::c_char; 16 * 1024];
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are valid and the buffer's length is true.
    let result =
        unsafe { libc::getpwnam_r(name.as_ptr(), &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    (result == 0 && !found.is_null()).then_some(entry.pw_uid)
}

/// Name of a user; `None`: the host has no name for it.
pub fn user_name(uid: u32) -> Option<String> {
    // SAFETY: an all-zero passwd is a valid value of that plain C struct.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut buffer = vec![0 as libc::c_char; 16 * 1024];
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are valid and the buffer's length is true; the name is a C string in the buffer.
    unsafe {
        let result = libc::getpwuid_r(uid, &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found);
        if result != 0 || found.is_null() {
            return None;
        }
        std::ffi::CStr::from_ptr(entry.pw_name).to_str().ok().map(str::to_owned)
    }
}

/// Whether memory can be shared in the way that regions need.
pub fn try_sealed_memfd() -> io::Result<()> {
    // SAFETY: a valid C string and flags; the result is checked.
    let fd = check(unsafe {
        libc::memfd_create(c"netkernel-doctor".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    })?;
    // SAFETY: new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain system call on an owned descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) })
        .map(drop)
}

/// Whether processes can be held by descriptors.
pub fn try_pidfd() -> io::Result<()> {
    // SAFETY: plain system call about this very process; the result is checked.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) } as libc::c_int)?;
    // SAFETY: new and owned by nobody else.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// The kernel's version, as `uname -r` prints it.
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map(|s| s.trim().to_owned()).unwrap_or_default()
}

pub fn c_string(text: &OsStr) -> Option<CString> {
    CString::new(text.as_bytes()).ok()
}
