//! Sockets that a message on a Unix socket takes to other processes (SCM_RIGHTS).
//!
//! A process with this library finds the placeholder's socket in the region. Any other needs the kernel's socket. What is in
//! flight cannot be exchanged any more, so that the sender looks who has the other end of the Unix socket: unix_diag names it,
//! /proc its holders, and their memory maps tell whether they are processes of this guest. A process that was forked and has
//! not executed anything yet may do so before it receives: it is given the kernel's socket if nothing is lost by that.

use core::ffi::c_int;

use crate::guest::{self, Lock};
use crate::sys::{self, raw};
use crate::table::{self, Slot};
use crate::{handover, socket, spare};

/// How long it is remembered who receives.
const REMEMBERED_NS: u64 = 1_000_000_000;
/// Set in a process's flags until it executes a program (kernel: include/linux/sched.h).
const PF_FORKNOEXEC: u64 = 0x40;
const UNIX_DIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Who has the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receivers {
    /// Processes of this guest that know what to do with a placeholder.
    Ours,
    /// They may be, or it cannot be seen.
    Unknown,
    /// Somebody without the library, or of another guest.
    Others,
}

/// The last socket whose receivers were found to be ours: its inode, its peer's, and until when that counts.
static LAST: Lock<(u64, u32, u64)> = Lock::new((0, 0, 0));

/// Before a message is sent on `over`, which is no guest socket. Errors: a socket in it would be of no use to whoever gets it.
///
/// # Safety
/// `message` must be null or a valid message header.
pub unsafe fn before_sending(over: c_int, message: *const libc::msghdr) -> Result<(), i32> {
    if guest::guest().is_none() {
        return Ok(());
    }
    // SAFETY: the caller vouches for the header.
    match unsafe { message.as_ref() } {
        Some(m) if m.msg_controllen >= size_of::<libc::cmsghdr>() && !m.msg_control.is_null() => {
            // SAFETY: the same header.
            let passed = unsafe { sockets_in(m) };
            passed.iter().filter_map(|&fd| table::socket(fd)).for_each(spare::shared);
            if passed.is_empty() { Ok(()) } else { prepare(over, &passed) }
        }
        _ => Ok(()),
    }
}

/// # Safety
/// `m` must be a valid message header.
unsafe fn sockets_in(m: &libc::msghdr) -> Vec<c_int> {
    let mut found = Vec::new();
    // SAFETY: CMSG_* walk the control buffer within msg_controllen; the descriptors may stand at any address.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(m);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let bytes = ((*cmsg).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                for i in 0..bytes / 4 {
                    let fd = libc::CMSG_DATA(cmsg).cast::<c_int>().add(i).read_unaligned();
                    if matches!(table::slot(fd), Slot::Socket(_)) {
                        found.push(fd);
                    }
                }
            }
            cmsg = libc::CMSG_NXTHDR(m, cmsg);
        }
    }
    found
}

#[cold]
fn prepare(over: c_int, passed: &[c_int]) -> Result<(), i32> {
    let receivers = receivers(over);
    if receivers == Receivers::Ours {
        return Ok(());
    }
    for &fd in passed {
        let Some(sock) = socket::find(fd) else { continue };
        match handover::settle_if(&sock, receivers == Receivers::Unknown) {
            Err(errno) if receivers == Receivers::Others => {
                handover::say_passed(fd, errno);
                return Err(errno);
            }
            _ => {}
        }
    }
    Ok(())
}

fn receivers(over: c_int) -> Receivers {
    // A sandbox may kill who looks around.
    if sys::confined() {
        return Receivers::Unknown;
    }
    let Some(inode) = sys::socket_inode(over) else { return Receivers::Unknown };
    let Some(peer) = peer_of(inode).filter(|&peer| peer != 0) else { return Receivers::Unknown };
    let now = sys::now_ns();
    if matches!(*LAST.lock(), (a, b, until) if a == inode && b == peer && now < until) {
        return Receivers::Ours;
    }
    let found = look(peer);
    if found == Receivers::Ours {
        *LAST.lock() = (inode, peer, now + REMEMBERED_NS);
    }
    found
}

/// The inode of the Unix socket at the other end (unix_diag: include/uapi/linux/unix_diag.h).
fn peer_of(inode: u64) -> Option<u32> {
    let inode = u32::try_from(inode).ok()?;
    let mut request = [0u8; 40];
    request[0..4].copy_from_slice(&40u32.to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[16] = libc::AF_UNIX as u8;
    request[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[24..28].copy_from_slice(&inode.to_ne_bytes());
    request[28..32].copy_from_slice(&UNIX_DIAG_SHOW_PEER.to_ne_bytes());
    // No cookie.
    request[32..40].fill(0xff);
    let fd = raw!(
        libc::SYS_socket,
        libc::AF_NETLINK,
        libc::SOCK_RAW | libc::SOCK_CLOEXEC,
        libc::NETLINK_SOCK_DIAG
    ) as i32;
    if fd < 0 {
        return None;
    }
    let mut answer = [0u8; 512];
    let sent = raw!(libc::SYS_sendto, fd, request.as_ptr(), request.len(), 0, 0, 0);
    let n = if sent == request.len() as isize {
        raw!(libc::SYS_recvfrom, fd, answer.as_mut_ptr(), answer.len(), 0, 0, 0)
    } else {
        -1
    };
    sys::close(fd);
    let answer = answer.get(..usize::try_from(n).ok()?)?;
    let u16_at = |at: usize| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    if u16_at(4)? != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    // Behind nlmsghdr and unix_diag_msg.
    let mut at = 32;
    while at + 4 <= answer.len() {
        let length = usize::from(u16_at(at)?).max(4);
        if u16_at(at + 2)? == UNIX_DIAG_PEER {
            return u32_at(at + 4);
        }
        at += length.next_multiple_of(4);
    }
    None
}

/// Who holds the socket with this inode.
fn look(inode: u32) -> Receivers {
    let link = format!("socket:[{inode}]");
    let Some(region) = region_in("self") else { return Receivers::Unknown };
    let me = raw!(libc::SYS_getpid).to_string();
    let mut found = None;
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        if pid == me || !holds(pid, &link) {
            continue;
        }
        if !has_region(pid, &region) {
            return Receivers::Others;
        }
        let may_exec = flags_of(pid).is_none_or(|flags| flags & PF_FORKNOEXEC != 0);
        if may_exec {
            found = Some(Receivers::Unknown);
        } else {
            found.get_or_insert(Receivers::Ours);
        }
    }
    // Nobody: it is this process's own, or of somebody who cannot be seen.
    found.unwrap_or(if holds(&me, &link) { Receivers::Ours } else { Receivers::Unknown })
}

fn holds(pid: &str, link: &str) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
    descriptors
        .into_iter()
        .flatten()
        .flatten()
        .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == link))
}

/// Device and inode of the region, as they stand in a memory map.
fn region_in(pid: &str) -> Option<String> {
    let guest = guest::guest()?;
    let address = core::ptr::from_ref(guest.region.header()) as u64;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let range = u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?;
        let mut words = rest.split_whitespace().skip(2);
        range.contains(&address).then(|| Some(format!(" {} {} ", words.next()?, words.next()?)))?
    })
}

fn has_region(pid: &str, region: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains(region))
}

fn flags_of(pid: &str) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state, parent, group, session, terminal, its group, flags.
    stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn the_other_end_of_a_pair_is_named() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let inode = |s: &std::os::unix::net::UnixStream| sys::socket_inode(s.as_raw_fd()).unwrap();
        assert_eq!(peer_of(inode(&a)).map(u64::from), Some(inode(&b)));
        let me = std::process::id().to_string();
        assert!(holds(&me, &format!("socket:[{}]", inode(&b))));
        drop(b);
        assert_eq!(peer_of(inode(&a)).unwrap_or(0), 0);
    }

    #[test]
    fn a_process_that_was_executed_is_told_from_one_that_was_forked() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(flags_of(&child.id().to_string()).unwrap() & PF_FORKNOEXEC, 0);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
