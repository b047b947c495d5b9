//! The filter: which system calls go to the agent. Classic BPF (seccomp(2), kernel: include/uapi/linux/seccomp.h).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Protocol families that would be a way around a guest's stack, and have no place in a container: SMC falls back to the
/// host's TCP, RDS and TIPC run over it.
const REFUSED_FAMILIES: [u32; 3] = [43, 21, 30];

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = AUDIT_ARCH_X86_64;
/// AUDIT_ARCH_AARCH64.
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;
/// Set in the numbers of the x32 ABI.
const X32: u32 = 0x4000_0000;

/// i386 (arch/x86/entry/syscalls/syscall_32.tbl).
const I386_SOCKETCALL: u32 = 102;
const I386_SOCKET: u32 = 359;
const I386_SETSOCKOPT: u32 = 366;
const I386_IO_URING_SETUP: u32 = 425;

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
const fn low(argument: u32) -> u32 {
    16 + 8 * argument
}

const RET_NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
const RET_ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const fn refuse(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

type Instruction = libc::sock_filter;

/// What a guest's agent has to be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Sockets that are made, and the congestion control that a program wants: what follows is the kernel's.
    Direct,
    /// Also names, options and whatever carries an address: the descriptor is a Unix socket and must not look like one.
    /// Bytes move without a word. A signal interrupts a call that waits for the agent, as it would without a filter.
    Relay,
}

/// Options of SOL_SOCKET that a Unix socket has and means as an INET socket does.
const OWN_OPTIONS: [i32; 8] = [
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    SO_RCVTIMEO_NEW,
    SO_SNDTIMEO_NEW,
    libc::SO_RCVLOWAT,
    libc::SO_SNDLOWAT,
    libc::SO_PEEK_OFF,
    libc::SO_OOBINLINE,
];
const SO_RCVTIMEO_NEW: i32 = 66;
const SO_SNDTIMEO_NEW: i32 = 67;

/// Calls that a relay is told of whatever their arguments are. Whether the descriptor is a socket of the relay is seen by
/// the agent; any other goes on in the kernel.
const RELAYED: [i64; 12] = [
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

fn load(offset: u32) -> Instruction {
    Instruction { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

fn give(value: u32) -> Instruction {
    Instruction { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: value }
}

/// Skips `otherwise` instructions unless the accumulator is `value`.
fn unless(value: u32, otherwise: u8) -> Instruction {
    Instruction { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: otherwise, k: value }
}

/// Skips `otherwise` instructions unless the accumulator has one of the bits.
fn unless_bits(bits: u32, otherwise: u8) -> Instruction {
    Instruction { code: (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16, jt: 0, jf: otherwise, k: bits }
}

/// `if accumulator == number { block }`.
fn call(program: &mut Vec<Instruction>, number: u32, block: Vec<Instruction>) {
    program.push(unless(number, block.len() as u8));
    program.extend(block);
}

/// socket(): INET families to the agent.
fn socket_block() -> Vec<Instruction> {
    let mut block = vec![load(low(0))];
    for family in [libc::AF_INET, libc::AF_INET6] {
        call(&mut block, family as u32, vec![give(RET_NOTIFY)]);
    }
    for family in REFUSED_FAMILIES {
        call(&mut block, family, vec![give(refuse(libc::EAFNOSUPPORT))]);
    }
    block.push(give(RET_ALLOW));
    block
}

/// setsockopt(): the congestion control, the pacing rate and the mark are the module's business.
fn setsockopt_block() -> Vec<Instruction> {
    let mut block = vec![load(low(1))];
    for (level, options) in [
        (libc::IPPROTO_TCP, &[libc::TCP_CONGESTION][..]),
        (libc::SOL_SOCKET, &[libc::SO_MAX_PACING_RATE, libc::SO_MARK]),
    ] {
        let mut inner = vec![load(low(2))];
        for &option in options {
            call(&mut inner, option as u32, vec![give(RET_NOTIFY)]);
        }
        inner.push(give(RET_ALLOW));
        call(&mut block, level as u32, inner);
    }
    block.push(give(RET_ALLOW));
    block
}

/// sendto() and recvfrom(), with an address, or with flags that a Unix socket does not know.
fn addressed_block() -> Vec<Instruction> {
    let mut block = vec![load(low(3)), unless_bits(libc::MSG_ERRQUEUE as u32, 1), give(RET_NOTIFY)];
    for half in [low(4), low(4) + 4] {
        block.push(load(half));
        block.push(unless(0, 1));
        block.push(Instruction { code: (libc::BPF_JMP | libc::BPF_JA) as u16, jt: 0, jf: 0, k: 1 });
        block.push(give(RET_NOTIFY));
    }
    block.push(give(RET_ALLOW));
    block
}

/// setsockopt() and getsockopt().
fn options_block(set: bool) -> Vec<Instruction> {
    let mut block = vec![load(low(1))];
    if set {
        // Web servers set and clear it around each response. What is written together is sent together anyway.
        let mut tcp = vec![load(low(2))];
        call(&mut tcp, libc::TCP_CORK as u32, vec![give(libc::SECCOMP_RET_ERRNO)]);
        tcp.push(give(RET_NOTIFY));
        call(&mut block, libc::IPPROTO_TCP as u32, tcp);
    }
    let mut own = vec![load(low(2))];
    for name in OWN_OPTIONS {
        call(&mut own, name as u32, vec![give(RET_ALLOW)]);
    }
    own.push(give(RET_NOTIFY));
    call(&mut block, libc::SOL_SOCKET as u32, own);
    block.push(give(RET_NOTIFY));
    block
}

/// The program. Calls of every ABI that the kernel may offer are looked at; what cannot be judged (socketcall of i386, whose
/// arguments stand in memory; x32; a foreign architecture) makes no socket.
pub fn program(watch: Watch) -> Vec<libc::sock_filter> {
    let mut native = vec![load(NR)];
    if NATIVE == AUDIT_ARCH_X86_64 {
        native.push(unless_bits(X32, 1));
        native.push(give(refuse(libc::ENOSYS)));
    }
    if watch == Watch::Relay {
        // The calls for bytes first: they are the frequent ones.
        for nr in [libc::SYS_recvfrom, libc::SYS_sendto] {
            call(&mut native, nr as u32, addressed_block());
        }
    }
    call(&mut native, libc::SYS_socket as u32, socket_block());
    match watch {
        Watch::Direct => call(&mut native, libc::SYS_setsockopt as u32, setsockopt_block()),
        Watch::Relay => {
            call(&mut native, libc::SYS_setsockopt as u32, options_block(true));
            call(&mut native, libc::SYS_getsockopt as u32, options_block(false));
            for nr in RELAYED {
                call(&mut native, nr as u32, vec![give(RET_NOTIFY)]);
            }
        }
    }
    // Its rings can make and use sockets that no filter sees.
    call(&mut native, libc::SYS_io_uring_setup as u32, vec![give(refuse(libc::ENOSYS))]);
    native.push(give(RET_ALLOW));

    let mut program = vec![load(ARCH)];
    call(&mut program, NATIVE, native);
    if NATIVE == AUDIT_ARCH_X86_64 {
        let mut i386 = vec![load(NR)];
        call(&mut i386, I386_SOCKET, socket_block());
        call(&mut i386, I386_SETSOCKOPT, setsockopt_block());
        call(&mut i386, I386_IO_URING_SETUP, vec![give(refuse(libc::ENOSYS))]);
        // SYS_SOCKET: its arguments stand in memory, which can change after they were judged. The agent refuses it, and says so.
        let mut multiplexed = vec![load(low(0))];
        call(&mut multiplexed, 1, vec![give(RET_NOTIFY)]);
        multiplexed.push(give(RET_ALLOW));
        call(&mut i386, I386_SOCKETCALL, multiplexed);
        i386.push(give(RET_ALLOW));
        call(&mut program, AUDIT_ARCH_I386, i386);
    }
    program.push(give(refuse(libc::ENOSYS)));
    program
}

/// Why the filter cannot be put on, in one sentence that says what to do.
#[derive(Debug)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// Puts the filter on the calling thread and all that it becomes and starts; returns the descriptor to be notified by
/// (close-on-exec). There is no way back. Without CAP_SYS_ADMIN the thread gives up ever to gain privileges by exec
/// (PR_SET_NO_NEW_PRIVS). The process must have one thread only.
pub fn install(watch: Watch) -> Result<OwnedFd, Refused> {
    let program = program(watch);
    let length = program.len() as u16;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // Signals that do not kill wait until the agent has answered (Linux 5.19); Go preempts its threads by signals.
    // Without SPEC_ALLOW, kernels before 5.16 slow a filtered process down by their protection against speculation.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // A relay answers late, when there is a connection or a datagram: signals must be able to interrupt that.
    let killable = match watch {
        Watch::Direct => libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
        Watch::Relay => 0,
    };
    let mut result = set_filter(flags | killable, &program);
    if matches!(&result, Err(e) if e.raw_os_error() == Some(libc::EINVAL)) {
        result = set_filter(flags, &program);
    }
    if matches!(&result, Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM))) {
        // SAFETY: takes integers only.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        result = set_filter(flags | killable, &program).or_else(|_| set_filter(flags, &program));
    }
    result.map_err(|error| {
        Refused(match error.raw_os_error() {
            Some(libc::EBUSY) => "the seccomp filter cannot be put on: another agent watches this process already (a guest inside a guest, or a container runtime); use --attach queued".into(),
            Some(libc::ENOSYS | libc::EINVAL) => "this kernel has no seccomp notifications (Linux 5.14 is needed); use --attach queued".into(),
            _ => format!("the seccomp filter cannot be put on ({error}), a sandbox around this process may forbid it; use --attach queued"),
        })
    })
}

fn set_filter(flags: libc::c_ulong, program: &libc::sock_fprog) -> io::Result<OwnedFd> {
    // SAFETY: the program and its instructions live during the call, which copies them.
    let fd = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(program))
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether this kernel can notify at all.
pub fn available() -> bool {
    let action = RET_NOTIFY;
    // SAFETY: the kernel reads four bytes of `action`.
    let r = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, std::ptr::from_ref(&action))
    };
    r == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel does, for the instructions that it is made of.
    fn verdict(arch: u32, nr: u32, arguments: [u32; 3]) -> u32 {
        run(Watch::Direct, arch, nr, &arguments)
    }

    fn run(watch: Watch, arch: u32, nr: u32, arguments: &[u32]) -> u32 {
        let program = program(watch);
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            match u32::from(code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = match k {
                        NR => nr,
                        ARCH => arch,
                        k if (k - 16) % 8 == 4 => 0,
                        k => arguments.get((k as usize - 16) / 8).copied().unwrap_or(0),
                    }
                }
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    at += usize::from(if accumulator == k { jt } else { jf });
                }
                code if code == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
                code if code == libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K => {
                    at += usize::from(if accumulator & k != 0 { jt } else { jf });
                }
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn inet_sockets_go_to_the_agent_and_nothing_else() {
        let socket = libc::SYS_socket as u32;
        for family in [libc::AF_INET, libc::AF_INET6] {
            assert_eq!(verdict(NATIVE, socket, [family as u32, 1, 0]), RET_NOTIFY);
        }
        for family in [libc::AF_UNIX, libc::AF_NETLINK, libc::AF_VSOCK] {
            assert_eq!(verdict(NATIVE, socket, [family as u32, 1, 0]), RET_ALLOW);
        }
        for family in REFUSED_FAMILIES {
            assert_eq!(verdict(NATIVE, socket, [family, 1, 0]), refuse(libc::EAFNOSUPPORT));
        }
        for nr in [libc::SYS_read, libc::SYS_connect, libc::SYS_accept4, libc::SYS_sendmsg, libc::SYS_execve]
        {
            assert_eq!(verdict(NATIVE, nr as u32, [2, 2, 2]), RET_ALLOW);
        }
    }

    #[test]
    fn a_congestion_control_is_asked_for() {
        let set = libc::SYS_setsockopt as u32;
        assert_eq!(verdict(NATIVE, set, [3, 6, libc::TCP_CONGESTION as u32]), RET_NOTIFY);
        assert_eq!(verdict(NATIVE, set, [3, 6, libc::TCP_NODELAY as u32]), RET_ALLOW);
        assert_eq!(verdict(NATIVE, set, [3, 1, libc::TCP_CONGESTION as u32]), RET_ALLOW);
        assert_eq!(verdict(NATIVE, set, [3, 1, libc::SO_MAX_PACING_RATE as u32]), RET_NOTIFY);
        assert_eq!(verdict(NATIVE, set, [3, 1, libc::SO_MARK as u32]), RET_NOTIFY);
        assert_eq!(verdict(NATIVE, set, [3, 6, libc::SO_MARK as u32]), RET_ALLOW);
    }

    #[test]
    fn a_relay_is_told_of_names_and_options_but_of_no_bytes() {
        let verdict = |nr: i64, arguments: &[u32]| run(Watch::Relay, NATIVE, nr as u32, arguments);
        for nr in RELAYED {
            assert_eq!(verdict(nr, &[5]), RET_NOTIFY, "{nr}");
        }
        for nr in [libc::SYS_sendto, libc::SYS_recvfrom] {
            assert_eq!(verdict(nr, &[5, 1, 1, 0, 0, 0]), RET_ALLOW);
            assert_eq!(verdict(nr, &[5, 1, 1, 0, 0x1000, 16]), RET_NOTIFY);
            assert_eq!(verdict(nr, &[5, 1, 1, libc::MSG_ERRQUEUE as u32, 0, 0]), RET_NOTIFY);
        }
        for nr in [libc::SYS_setsockopt, libc::SYS_getsockopt] {
            assert_eq!(verdict(nr, &[5, libc::SOL_SOCKET as u32, libc::SO_ERROR as u32]), RET_NOTIFY);
            assert_eq!(verdict(nr, &[5, libc::SOL_SOCKET as u32, libc::SO_RCVTIMEO as u32]), RET_ALLOW);
            assert_eq!(verdict(nr, &[5, libc::IPPROTO_TCP as u32, libc::SO_RCVTIMEO as u32]), RET_NOTIFY);
        }
        for nr in [libc::SYS_read, libc::SYS_write, libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_dup] {
            assert_eq!(verdict(nr, &[5, 5, 5]), RET_ALLOW);
        }
        let cork = [5, libc::IPPROTO_TCP as u32, libc::TCP_CORK as u32];
        assert_eq!(verdict(libc::SYS_setsockopt, &cork), libc::SECCOMP_RET_ERRNO);
        assert_eq!(verdict(libc::SYS_getsockopt, &cork), RET_NOTIFY);
        assert_eq!(verdict(libc::SYS_socket, &[libc::AF_INET6 as u32, 1, 0]), RET_NOTIFY);
        assert_eq!(verdict(libc::SYS_io_uring_setup, &[]), refuse(libc::ENOSYS));
    }

    #[test]
    fn no_way_around() {
        assert_eq!(verdict(NATIVE, libc::SYS_io_uring_setup as u32, [0; 3]), refuse(libc::ENOSYS));
        assert_eq!(verdict(0x1234, 0, [0; 3]), refuse(libc::ENOSYS));
        #[cfg(target_arch = "x86_64")]
        {
            assert_eq!(verdict(NATIVE, X32 | libc::SYS_socket as u32, [2, 1, 0]), refuse(libc::ENOSYS));
            assert_eq!(verdict(AUDIT_ARCH_I386, I386_SOCKET, [2, 1, 0]), RET_NOTIFY);
            assert_eq!(verdict(AUDIT_ARCH_I386, I386_SOCKETCALL, [1, 0, 0]), RET_NOTIFY);
            assert_eq!(verdict(AUDIT_ARCH_I386, I386_SOCKETCALL, [2, 0, 0]), RET_ALLOW);
        }
    }
}
