//! What the processes of an NSM may not do, whatever somebody makes of a fault in a stack.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::NsmConfig;

/// For good, and for what is cloned: no new privileges, no capabilities but those of sockets, none of the system calls in
/// [`DENIED`] (EPERM). Its user stays the engine's: sockets show it to the host, and agents look at processes with it.
pub(super) fn confine(nsm: &NsmConfig) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let needed = needed(nsm);
    let now = rustix::thread::capabilities(None)?;
    for capability in CapabilitySet::all().difference(needed).iter() {
        // Needs CAP_SETPCAP, which an engine of an ordinary user has not, and has nothing to lose then. What this kernel does
        // not know cannot be removed.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    let left = CapabilitySets {
        effective: now.effective & needed,
        permitted: now.permitted & needed,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, left)?;
    let program = filter().map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

/// Low ports, marks and congestion controls, SO_BINDTODEVICE; other users' programs, and what stands in /proc of their descriptors (agents: who
/// may do the one has nothing to gain by the other); other network namespaces.
fn needed(nsm: &NsmConfig) -> CapabilitySet {
    let mut needed = CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_RAW
        | CapabilitySet::SYS_PTRACE
        | CapabilitySet::DAC_READ_SEARCH;
    if nsm.netns.is_some() {
        needed |= CapabilitySet::SYS_ADMIN;
    }
    needed
}

/// Programs, tracing, file systems, users, the kernel itself.
const DENIED: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_mknodat,
    libc::SYS_fchownat,
    libc::SYS_fchmodat,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_acct,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_reboot,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_syslog,
    libc::SYS_personality,
    libc::SYS_vhangup,
];

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = DENIED.iter().map(|&number| (number, Vec::new())).collect();
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into()?,
    )?
    .try_into()
}
