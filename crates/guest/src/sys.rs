//! Raw system calls: what GuestLib itself needs goes past libc, whose names this library interposes.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

/// One system call with up to six arguments; the result is the kernel's (negative: -errno).
///
/// # Safety
/// As the system call: pointers among the arguments must be valid for what the call does with them.
#[inline]
pub unsafe fn call(n: i64, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the x86-64 Linux calling convention; the caller vouches for the arguments.
    unsafe {
        asm!("syscall", inlateout("rax") n as isize => result,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

macro_rules! raw {
    ($n:expr $(, $arg:expr)*) => {{
        #[allow(unused_mut)]
        let mut a = [0usize; 6];
        let mut _i = 0;
        $( a[_i] = $arg as usize; #[allow(unused_assignments)] { _i += 1; } )*
        // SAFETY: each use passes live buffers with their true lengths, or plain numbers.
        #[allow(unused_unsafe)]
        unsafe { $crate::sys::call($n, a) }
    }};
}
pub(crate) use raw;

pub fn close(fd: i32) {
    raw!(libc::SYS_close, fd);
}

pub fn gettid() -> u32 {
    raw!(libc::SYS_gettid) as u32
}

/// A seccomp filter is in place: only the most usual system calls are made.
pub static CONFINED: AtomicBool = AtomicBool::new(false);

pub fn confined() -> bool {
    CONFINED.load(Ordering::Relaxed)
}

pub fn yield_now() {
    if confined() {
        core::hint::spin_loop();
    } else {
        raw!(libc::SYS_sched_yield);
    }
}

/// Blocks all signals of the calling thread; the mask of before is for [`restore_signals`].
pub fn block_signals() -> u64 {
    let (all, mut before) = (u64::MAX, 0u64);
    raw!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &all as *const u64, &mut before as *mut u64, 8);
    before
}

pub fn restore_signals(mask: u64) {
    raw!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask as *const u64, 0, 8);
}

pub fn now_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: t is valid for writes; the vDSO call cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Inode of an open socket, or `None` when `fd` is not a socket.
pub fn socket_inode(fd: i32) -> Option<u64> {
    // SAFETY: an all-zero stat is a valid value of that plain C struct.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    let r = raw!(libc::SYS_fstat, fd, &mut stat as *mut libc::stat);
    if r == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK { Some(stat.st_ino) } else { None }
}

pub fn set_errno(errno: i32) {
    // SAFETY: libc's errno location is valid for the calling thread.
    unsafe { *libc::__errno_location() = errno };
}

pub fn errno() -> i32 {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}
