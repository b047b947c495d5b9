//! fork, exec and spawn: the guest's identity must reach every program that it starts.

use core::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};

use netkernel_abi::control::env;

use crate::next::next;
use crate::sys::raw;
use crate::{guest, handover, spare, table, target};

unsafe extern "C" {
    static mut environ: *mut *mut c_char;
}

type Strings = *const *mut c_char;

/// The environment for a new program: as given, with GuestLib's variables put back where they are missing.
///
/// # Safety
/// `envp` must be null or a null-terminated array of C strings.
unsafe fn complete(envp: Strings) -> Option<(Vec<*mut c_char>, Vec<Vec<u8>>)> {
    guest::guest()?;
    let mut list = Vec::new();
    let mut preload: Option<(usize, &CStr)> = None;
    let names = [env::FDS, env::SOCKET, env::TOKEN, env::LIBRARY, env::UNATTACHED];
    let mut present = [false; 5];
    let mut at = envp;
    // SAFETY: the caller vouches for the array.
    unsafe {
        while !at.is_null() && !(*at).is_null() {
            let text = CStr::from_ptr(*at);
            let bytes = text.to_bytes();
            for (name, there) in names.iter().zip(present.iter_mut()) {
                *there |= bytes.starts_with(name.as_bytes()) && bytes.get(name.len()) == Some(&b'=');
            }
            if bytes.starts_with(env::BYPASS.as_bytes()) && bytes.get(env::BYPASS.len()) == Some(&b'=') {
                return None;
            }
            if bytes.starts_with(b"LD_PRELOAD=") {
                preload = Some((list.len(), text));
            }
            list.push(*at);
            at = at.add(1);
        }
    }
    let library = guest::variable(env::LIBRARY)?;
    let mut made: Vec<Vec<u8>> = Vec::new();
    for (name, there) in names.iter().zip(present) {
        if !there && let Some(value) = guest::variable(name) {
            made.push(format!("{name}={value}\0").into_bytes());
            list.push(core::ptr::null_mut());
        }
    }
    let first_made = list.len() - made.len();
    match preload {
        Some((_, text)) if text.to_bytes().windows(library.len()).any(|w| w == library.as_bytes()) => {
            if made.is_empty() {
                return None;
            }
        }
        Some((index, text)) => {
            let old = &text.to_bytes()[b"LD_PRELOAD=".len()..];
            let mut new = format!("LD_PRELOAD={library}").into_bytes();
            if !old.is_empty() {
                new.push(b':');
                new.extend_from_slice(old);
            }
            new.push(0);
            list[index] = new.as_mut_ptr().cast();
            let n = made.len();
            for (i, text) in made.iter_mut().enumerate().take(n) {
                list[first_made + i] = text.as_mut_ptr().cast();
            }
            list.push(core::ptr::null_mut());
            made.push(new);
            return Some((list, made));
        }
        None => {
            made.push(format!("LD_PRELOAD={library}\0").into_bytes());
            list.push(core::ptr::null_mut());
        }
    }
    for (i, text) in made.iter_mut().enumerate() {
        list[first_made + i] = text.as_mut_ptr().cast();
    }
    list.push(core::ptr::null_mut());
    Some((list, made))
}

/// Runs `f` with the completed environment.
///
/// # Safety
/// As for [`complete`].
unsafe fn with_environment(envp: Strings, f: impl FnOnce(Strings) -> c_int) -> c_int {
    // SAFETY: the same contract.
    match unsafe { complete(envp) } {
        Some((list, made)) => {
            let r = f(list.as_ptr());
            drop(made);
            r
        }
        None => f(envp),
    }
}

/// Before an exec: a program without this library gets kernel sockets in the place of placeholders.
///
/// # Safety
/// `path` must be null or a C string.
unsafe fn leaving(dir: c_int, path: *const c_char, flags: c_int) {
    crate::queue::settle();
    if guest::guest().is_none() || path.is_null() || !table::any_sockets() {
        return;
    }
    // SAFETY: the caller vouches for the string.
    let path = unsafe { CStr::from_ptr(path) };
    let served = if path.is_empty() && flags & libc::AT_EMPTY_PATH != 0 {
        target::descriptor_will_be_served(dir)
    } else {
        target::will_be_served(dir, path)
    };
    if !served {
        handover::before_exec(path);
    }
}

/// Before a spawn: the same, in the parent.
///
/// # Safety
/// `path` must be null or a C string, `actions` null or initialised by libc.
unsafe fn spawning(path: *const c_char, actions: Actions) {
    if guest::guest().is_none() || path.is_null() || !table::any_sockets() {
        return;
    }
    // SAFETY: the caller vouches for both.
    let (path, given) = unsafe { (CStr::from_ptr(path), handover::duplicated_by(actions)) };
    if !target::will_be_served(libc::AT_FDCWD, path) {
        handover::before_spawn(path, |fd| given.contains(&fd));
    }
}

/// Runs `f` with the file that a search along PATH finds.
///
/// # Safety
/// `file` must be null or a C string.
unsafe fn with_program(file: *const c_char, f: impl FnOnce(&CStr)) {
    if guest::guest().is_none() || file.is_null() || !table::any_sockets() {
        return;
    }
    // SAFETY: the caller vouches for the string.
    if let Some(path) = target::search(unsafe { CStr::from_ptr(file) }) {
        f(&path);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_execve(path: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the program's own string.
    unsafe { leaving(libc::AT_FDCWD, path, 0) };
    // SAFETY: the program's own arrays.
    unsafe {
        with_environment(
            envp,
            |envp| next!(execve(path => *const c_char, argv => Strings, envp => Strings) -> c_int),
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nk_execvpe(file: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the program's own string.
    unsafe { with_program(file, |path| leaving(libc::AT_FDCWD, path.as_ptr(), 0)) };
    // SAFETY: the program's own arrays.
    unsafe {
        with_environment(
            envp,
            |envp| next!(execvpe(file => *const c_char, argv => Strings, envp => Strings) -> c_int),
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn execve(path: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the same contract.
    unsafe { nk_execve(path, argv, envp) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn execv(path: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the same contract, with the process's environment.
    unsafe { nk_execve(path, argv, environ.cast_const()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn execvp(file: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the same contract, with the process's environment.
    unsafe { nk_execvpe(file, argv, environ.cast_const()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn execvpe(file: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the same contract.
    unsafe { nk_execvpe(file, argv, envp) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fexecve(fd: c_int, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: an empty C string.
    unsafe { leaving(fd, c"".as_ptr(), libc::AT_EMPTY_PATH) };
    // SAFETY: the program's own arrays.
    unsafe {
        with_environment(envp, |envp| next!(fexecve(fd => c_int, argv => Strings, envp => Strings) -> c_int))
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn execveat(
    dir: c_int,
    path: *const c_char,
    argv: Strings,
    envp: Strings,
    flags: c_int,
) -> c_int {
    // SAFETY: the program's own string.
    unsafe { leaving(dir, path, flags) };
    // SAFETY: the program's own arrays.
    unsafe {
        with_environment(
            envp,
            |envp| next!(execveat(dir => c_int, path => *const c_char, argv => Strings, envp => Strings, flags => c_int) -> c_int),
        )
    }
}

type Actions = *const libc::posix_spawn_file_actions_t;
type Attributes = *const libc::posix_spawnattr_t;

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_spawn(
    pid: *mut libc::pid_t,
    path: *const c_char,
    actions: Actions,
    attributes: Attributes,
    argv: Strings,
    envp: Strings,
) -> c_int {
    // SAFETY: the program's own string and actions.
    unsafe { spawning(path, actions) };
    // SAFETY: the program's own arrays.
    unsafe {
        copying(|| {
            with_environment(envp, |envp| {
                next!(posix_spawn(pid => *mut libc::pid_t, path => *const c_char, actions => Actions,
                attributes => Attributes, argv => Strings, envp => Strings) -> c_int)
            })
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_spawnp(
    pid: *mut libc::pid_t,
    file: *const c_char,
    actions: Actions,
    attributes: Attributes,
    argv: Strings,
    envp: Strings,
) -> c_int {
    // SAFETY: the program's own string and actions.
    unsafe { with_program(file, |path| spawning(path.as_ptr(), actions)) };
    // SAFETY: the program's own arrays.
    unsafe {
        copying(|| {
            with_environment(envp, |envp| {
                next!(posix_spawnp(pid => *mut libc::pid_t, file => *const c_char, actions => Actions,
                attributes => Attributes, argv => Strings, envp => Strings) -> c_int)
            })
        })
    }
}

/// A call that starts a program with copies of this process's descriptors, past the handlers of fork.
fn copying<R>(call: impl FnOnce() -> R) -> R {
    spare::before_fork();
    let r = call();
    spare::after_fork();
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn system(command: *const c_char) -> c_int {
    copying(|| next!(system(command => *const c_char) -> c_int))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn popen(command: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    copying(|| next!(popen(command => *const c_char, mode => *const c_char) -> *mut libc::FILE))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn wordexp(words: *const c_char, result: *mut c_void, flags: c_int) -> c_int {
    copying(|| next!(wordexp(words => *const c_char, result => *mut c_void, flags => c_int) -> c_int))
}

/// libc's own, which has as many arguments as its flags say: it is gone on with as it was called.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn clone() {
    core::arch::naked_asm!(
        "push rdi", "push rsi", "push rdx", "push rcx", "push r8", "push r9", "sub rsp, 8",
        "call {before}",
        "add rsp, 8", "pop r9", "pop r8", "pop rcx", "pop rdx", "pop rsi", "pop rdi",
        "jmp rax",
        before = sym before_clone,
    )
}

/// Where `clone` goes on.
extern "C" fn before_clone(_: usize, _: usize, flags: c_int) -> usize {
    static CLONE: crate::next::Symbol = crate::next::Symbol::new(b"clone\0");
    if flags & libc::CLONE_FILES == 0 {
        spare::never_again();
    }
    CLONE.address()
}

/// Sandboxes: what GuestLib needs beyond them is fetched before they close.
#[unsafe(no_mangle)]
unsafe extern "C" fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int {
    if option == libc::PR_SET_SECCOMP {
        guest::before_confinement(true);
    }
    next!(prctl(option => c_int, a => c_ulong, b => c_ulong, c => c_ulong, d => c_ulong) -> c_int)
}

type Limit = *const libc::rlimit;

unsafe fn before_limit(resource: c_uint, limit: Limit) {
    if resource == libc::RLIMIT_NOFILE {
        spare::limit_changes();
    }
    // SAFETY: the program's own limit, or null.
    if resource == libc::RLIMIT_NOFILE && unsafe { limit.as_ref() }.is_some_and(|l| l.rlim_cur < 64) {
        guest::before_confinement(false);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn setrlimit(resource: c_uint, limit: Limit) -> c_int {
    // SAFETY: the same contract.
    unsafe { before_limit(resource, limit) };
    next!(setrlimit(resource => c_uint, limit => Limit) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn setrlimit64(resource: c_uint, limit: Limit) -> c_int {
    // SAFETY: the same contract.
    unsafe { before_limit(resource, limit) };
    next!(setrlimit64(resource => c_uint, limit => Limit) -> c_int)
}

type LimitOut = *mut libc::rlimit;

#[unsafe(no_mangle)]
unsafe extern "C" fn prlimit(pid: libc::pid_t, resource: c_uint, new: Limit, old: LimitOut) -> c_int {
    // SAFETY: the same contract.
    unsafe { before_limit(resource, new) };
    next!(prlimit(pid => libc::pid_t, resource => c_uint, new => Limit, old => LimitOut) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn prlimit64(pid: libc::pid_t, resource: c_uint, new: Limit, old: LimitOut) -> c_int {
    // SAFETY: the same contract.
    unsafe { before_limit(resource, new) };
    next!(prlimit64(pid => libc::pid_t, resource => c_uint, new => Limit, old => LimitOut) -> c_int)
}

/// The end of a process without the destructors' turn.
#[unsafe(no_mangle)]
unsafe extern "C" fn _exit(status: c_int) -> ! {
    crate::queue::settle();
    loop {
        raw!(libc::SYS_exit_group, status);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _Exit(status: c_int) -> ! {
    // SAFETY: no obligations.
    unsafe { _exit(status) }
}

/// A vfork child shares the parent's memory, the descriptor table here included, while its descriptors are its own. A
/// plain fork keeps the two apart; POSIX allows it.
#[unsafe(no_mangle)]
unsafe extern "C" fn vfork() -> libc::pid_t {
    // SAFETY: no obligations.
    unsafe { libc::fork() }
}
