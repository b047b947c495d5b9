//! `getsockopt`, `setsockopt`, `ioctl` and `fcntl` on guest sockets: what is answered here and what asks the stack.

use core::sync::atomic::Ordering;

use libc::{IPPROTO_TCP, SOL_SOCKET};
use netkernel_abi::socket::{gflag, state};
use netkernel_abi::{Nqe, Op};

use crate::queue;
use crate::socket::{Result, SIOCATMARK, Sock};

const SO_RCVTIMEO_NEW: i32 = 66;
const SO_SNDTIMEO_NEW: i32 = 67;

/// Options whose setting cannot fail for a valid value, so that nobody needs to wait for the stack.
fn needs_no_answer(sock: &Sock, level: i32, name: i32) -> bool {
    match level {
        SOL_SOCKET => {
            matches!(name, libc::SO_REUSEADDR | libc::SO_KEEPALIVE | libc::SO_BROADCAST | libc::SO_OOBINLINE)
        }
        IPPROTO_TCP => {
            !sock.is_datagram() && matches!(name, libc::TCP_NODELAY | libc::TCP_CORK | libc::TCP_QUICKACK)
        }
        _ => false,
    }
}

/// `setsockopt(2)`; `value` is the caller's copy.
pub fn set(sock: &Sock, level: i32, name: i32, value: &[u8]) -> Result<()> {
    let int = || -> Result<i32> {
        if value.len() < 4 {
            Err(libc::EINVAL)
        } else {
            Ok(i32::from_ne_bytes([value[0], value[1], value[2], value[3]]))
        }
    };
    if level == SOL_SOCKET {
        match name {
            libc::SO_RCVTIMEO | SO_RCVTIMEO_NEW => {
                sock.entry.rcv_timeout_us.store(timeval(value)?, Ordering::Relaxed);
                return Ok(());
            }
            libc::SO_SNDTIMEO | SO_SNDTIMEO_NEW => {
                sock.entry.snd_timeout_us.store(timeval(value)?, Ordering::Relaxed);
                return Ok(());
            }
            libc::SO_RCVLOWAT => {
                let v = int()?;
                let v = if v < 0 { i32::MAX } else { v.max(1) };
                sock.entry.rcv_low_water.store(v as u32, Ordering::Relaxed);
                return Ok(());
            }
            libc::SO_BROADCAST => sock.set_flag(gflag::BROADCAST, int()? != 0),
            libc::SO_SNDLOWAT => return Err(libc::ENOPROTOOPT),
            libc::SO_OOBINLINE => sock.set_flag(gflag::OOB_INLINE, int()? != 0),
            libc::SO_TYPE | libc::SO_DOMAIN | libc::SO_PROTOCOL | libc::SO_ERROR | libc::SO_ACCEPTCONN => {
                return Err(libc::ENOPROTOOPT);
            }
            _ => {}
        }
    }
    if needs_no_answer(sock, level, name) {
        let v = int()?;
        queue::post(sock.guest, Op::SetOption, sock.id, Nqe::option_data(level, name, v));
        return Ok(());
    }
    if value.len() > 256 {
        return Err(libc::EINVAL);
    }
    let v = if value.len() == 4 { int()? } else { 0 };
    let (argument, data): (&[u8], u64) =
        if value.len() == 4 && (level != IPPROTO_TCP || name != libc::TCP_CONGESTION) {
            (&[], Nqe::option_data(level, name, v))
        } else {
            (value, Nqe::option_data(level, name, 0))
        };
    if argument.is_empty() && value.is_empty() {
        return Err(libc::EINVAL);
    }
    sock.option_job(Op::SetOption, data, argument, 0, &mut []).map(|_| ())
}

fn timeval(value: &[u8]) -> Result<u64> {
    if value.len() < 16 {
        return Err(libc::EINVAL);
    }
    let word = |i: usize| {
        let mut b = [0; 8];
        b.copy_from_slice(&value[i..i + 8]);
        i64::from_ne_bytes(b)
    };
    let (sec, usec) = (word(0), word(8));
    if !(0..1_000_000).contains(&usec) {
        return Err(libc::EDOM);
    }
    if sec < 0 {
        // As Linux: no waiting at all.
        return Ok(1);
    }
    Ok((sec as u64).saturating_mul(1_000_000).saturating_add(usec as u64).min(1 << 60))
}

/// `getsockopt(2)`: the option's bytes, at most `wanted`.
pub fn get(sock: &Sock, level: i32, name: i32, wanted: usize) -> Result<Vec<u8>> {
    let int = |v: i32| Ok(v.to_ne_bytes()[..wanted.min(4)].to_vec());
    let kind = sock.entry.kind.load(Ordering::Relaxed);
    if level == SOL_SOCKET {
        match name {
            libc::SO_TYPE => {
                return int(if sock.is_datagram() { libc::SOCK_DGRAM } else { libc::SOCK_STREAM });
            }
            libc::SO_DOMAIN => return int((kind >> 16) as i32),
            libc::SO_PROTOCOL => {
                return int(if sock.is_datagram() { libc::IPPROTO_UDP } else { IPPROTO_TCP });
            }
            libc::SO_ERROR => return int(sock.take_error()),
            libc::SO_ACCEPTCONN => return int((sock.state() & state::LISTENING != 0) as i32),
            libc::SO_RCVTIMEO | SO_RCVTIMEO_NEW => {
                return Ok(time(sock.entry.rcv_timeout_us.load(Ordering::Relaxed), wanted));
            }
            libc::SO_SNDTIMEO | SO_SNDTIMEO_NEW => {
                return Ok(time(sock.entry.snd_timeout_us.load(Ordering::Relaxed), wanted));
            }
            libc::SO_SNDLOWAT => return int(1),
            libc::SO_RCVLOWAT => return int(sock.entry.rcv_low_water.load(Ordering::Relaxed).max(1) as i32),
            _ => {}
        }
    }
    let known =
        [SOL_SOCKET, libc::IPPROTO_IP, IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_IPV6, libc::IPPROTO_RAW];
    if !known.contains(&level) {
        return Err(libc::EOPNOTSUPP);
    }
    let mut out = [0u8; 512];
    let size = wanted.min(out.len());
    let n =
        sock.option_job(Op::GetOption, Nqe::option_data(level, name, 0), &[], size as u32, &mut out[..size])?;
    Ok(out[..n].to_vec())
}

fn time(us: u64, wanted: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    out.extend_from_slice(&((us / 1_000_000) as i64).to_ne_bytes());
    out.extend_from_slice(&((us % 1_000_000) as i64).to_ne_bytes());
    out.truncate(wanted);
    out
}

/// What an ioctl on a guest socket comes to.
pub enum Ioctl {
    /// Store this int through the argument.
    Int(i32),
    Done,
    /// The kernel answers for the placeholder (interface queries).
    Bypass,
}

/// `ioctl(2)`; `argument` is read for FIONBIO and FIOASYNC only.
pub fn ioctl(sock: &Sock, request: u64, argument: *mut i32) -> Result<Ioctl> {
    let on = || {
        if argument.is_null() {
            return Err(libc::EFAULT);
        }
        // SAFETY: the caller passes an int, as these requests demand.
        Ok(unsafe { *argument } != 0)
    };
    const SIOCOUTQNSD: u64 = 0x894B;
    match request {
        libc::FIONBIO => {
            sock.set_flag(gflag::NONBLOCK, on()?);
            Ok(Ioctl::Done)
        }
        libc::FIOASYNC => {
            sock.set_flag(gflag::ASYNC, on()?);
            Ok(Ioctl::Bypass)
        }
        // FIOSETOWN, SIOCSPGRP
        0x8901 | 0x8902 => {
            sock.set_flag(gflag::OWNED, on()?);
            Ok(Ioctl::Bypass)
        }
        // FIOGETOWN, SIOCGPGRP
        0x8903 | 0x8904 => Ok(Ioctl::Bypass),
        libc::FIONREAD => {
            if sock.state() & state::LISTENING != 0 {
                return Err(libc::EINVAL);
            }
            Ok(Ioctl::Int(if sock.is_datagram() { sock.next_datagram() } else { sock.rx_used() as i32 }))
        }
        libc::TIOCOUTQ => {
            if sock.state() & state::LISTENING != 0 {
                return Err(libc::EINVAL);
            }
            Ok(Ioctl::Int(sock.ioctl_job(request)?))
        }
        SIOCOUTQNSD => Ok(Ioctl::Int(sock.ioctl_job(request)?.saturating_add(sock.tx_used() as i32))),
        SIOCATMARK => Ok(Ioctl::Int(sock.at_mark() as i32)),
        libc::FIOCLEX | libc::FIONCLEX => Ok(Ioctl::Bypass),
        // Queries of interfaces work on any socket.
        0x8910..=0x8970 => Ok(Ioctl::Bypass),
        _ => Err(libc::ENOTTY),
    }
}
