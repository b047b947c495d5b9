//! The options that this stack has. What it lacks is ENOPROTOOPT, and is not told to be there.

use libc::*;
use netkernel_service::Errno;
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

/// What programs set. Accepted sockets inherit it.
#[derive(Clone, Debug)]
pub struct Options {
    pub reuse_address: bool,
    pub broadcast: bool,
    pub keep_alive: bool,
    /// Seconds.
    pub keep_idle: u32,
    pub no_delay: bool,
    pub linger: [i32; 2],
    pub hop_limit: u8,
    pub v6_only: bool,
    /// Milliseconds, 0: the stack's own.
    pub user_timeout: u32,
}

const SECOND: u64 = 1_000_000_000;
/// What is not acknowledged for so long ends a connection, as on Linux (tcp_retries2).
const RETRIES_NS: u64 = 924 * SECOND;
/// A SYN that nobody answers for so long ends a connect (tcp_syn_retries).
const CONNECT_NS: u64 = 127 * SECOND;
/// The time between probes of a silent peer, and how many of them may stay without an answer (tcp_keepalive_intvl,
/// tcp_keepalive_probes).
const PROBE_NS: u64 = 75 * SECOND;
const PROBES: u64 = 9;

impl Default for Options {
    fn default() -> Options {
        Options {
            reuse_address: false,
            broadcast: false,
            keep_alive: false,
            keep_idle: 7200,
            no_delay: false,
            linger: [0; 2],
            hop_limit: 64,
            v6_only: false,
            user_timeout: 0,
        }
    }
}

impl Options {
    /// Sets one. `stream`, `v6`: of what kind the socket is; `bound`: it has a port.
    pub fn set(
        &mut self,
        stream: bool,
        v6: bool,
        bound: bool,
        level: i32,
        name: i32,
        value: &[u8],
    ) -> Result<(), Errno> {
        let word = |at: usize| -> Result<i32, Errno> {
            let bytes = value.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map(i32::from_ne_bytes).ok_or(Errno(EINVAL))
        };
        match (level, name) {
            (SOL_SOCKET, SO_REUSEADDR) => self.reuse_address = word(0)? != 0,
            (SOL_SOCKET, SO_BROADCAST) => self.broadcast = word(0)? != 0,
            (SOL_SOCKET, SO_KEEPALIVE) => self.keep_alive = word(0)? != 0,
            (SOL_SOCKET, SO_LINGER) => self.linger = [i32::from(word(0)? != 0), word(4)?],
            // Hints on Linux too; what is read afterwards is the truth.
            (SOL_SOCKET, SO_SNDBUF | SO_RCVBUF) => _ = word(0)?,
            // GuestLib's own business.
            (SOL_SOCKET, SO_RCVLOWAT | SO_RCVTIMEO | SO_SNDTIMEO) => {}
            (IPPROTO_TCP, TCP_NODELAY) if stream => self.no_delay = word(0)? != 0,
            (IPPROTO_TCP, TCP_KEEPIDLE) if stream => {
                let seconds = word(0)?;
                if !(1..=32767).contains(&seconds) {
                    return Err(Errno(EINVAL));
                }
                self.keep_idle = seconds as u32;
            }
            (IPPROTO_TCP, TCP_USER_TIMEOUT) if stream => {
                self.user_timeout = u32::try_from(word(0)?).map_err(|_| Errno(EINVAL))?;
            }
            (IPPROTO_IP, IP_TTL) => self.hop_limit = hops(word(0)?)?,
            (IPPROTO_IPV6, IPV6_UNICAST_HOPS) if v6 => self.hop_limit = hops(word(0)?)?,
            (IPPROTO_IPV6, IPV6_V6ONLY) if v6 => {
                if bound {
                    return Err(Errno(EINVAL));
                }
                self.v6_only = word(0)? != 0;
            }
            _ => return Err(Errno(ENOPROTOOPT)),
        }
        Ok(())
    }

    /// The options that are only values here.
    pub fn value(&self, stream: bool, v6: bool, level: i32, name: i32) -> Result<Value, Errno> {
        Ok(Value::Int(match (level, name) {
            (SOL_SOCKET, SO_REUSEADDR) => i32::from(self.reuse_address),
            (SOL_SOCKET, SO_BROADCAST) => i32::from(self.broadcast),
            (SOL_SOCKET, SO_KEEPALIVE) => i32::from(self.keep_alive),
            (SOL_SOCKET, SO_LINGER) => return Ok(Value::Two(self.linger)),
            (SOL_SOCKET, SO_TYPE) => {
                if stream {
                    SOCK_STREAM
                } else {
                    SOCK_DGRAM
                }
            }
            (SOL_SOCKET, SO_DOMAIN) => {
                if v6 {
                    AF_INET6
                } else {
                    AF_INET
                }
            }
            (SOL_SOCKET, SO_PROTOCOL) => {
                if stream {
                    IPPROTO_TCP
                } else {
                    IPPROTO_UDP
                }
            }
            (SOL_SOCKET, SO_SNDBUF | SO_RCVBUF) => crate::stack::BUFFER as i32,
            (IPPROTO_TCP, TCP_NODELAY) if stream => i32::from(self.no_delay),
            (IPPROTO_TCP, TCP_KEEPIDLE) if stream => self.keep_idle as i32,
            (IPPROTO_TCP, TCP_USER_TIMEOUT) if stream => self.user_timeout as i32,
            (IPPROTO_IP, IP_TTL) => i32::from(self.hop_limit),
            (IPPROTO_IPV6, IPV6_UNICAST_HOPS) if v6 => i32::from(self.hop_limit),
            (IPPROTO_IPV6, IPV6_V6ONLY) if v6 => i32::from(self.v6_only),
            _ => return Err(Errno(ENOPROTOOPT)),
        }))
    }

    /// Tells smoltcp.
    pub fn apply(&self, socket: &mut tcp::Socket) {
        socket.set_nagle_enabled(!self.no_delay);
        let idle = Duration::from_secs(u64::from(self.keep_idle));
        socket.set_keep_alive(self.keep_alive.then_some(idle));
        // smoltcp's own would end connections that are only silent: see `patience_ns`.
        socket.set_timeout(None);
        socket.set_hop_limit(Some(self.hop_limit));
    }
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The answer to a SYN.
    Connect,
    /// Data or an end of ours to be acknowledged.
    Acknowledgement,
    /// Nothing.
    Idle,
}

impl Options {
    /// How long the peer may be silent, nanoseconds. `None`: for ever.
    pub fn patience_ns(&self, wait: Wait) -> Option<u64> {
        let user = (self.user_timeout > 0).then_some(u64::from(self.user_timeout) * 1_000_000);
        let idle = u64::from(self.keep_idle) * SECOND;
        match wait {
            Wait::Connect => Some(user.unwrap_or(CONNECT_NS)),
            Wait::Acknowledgement => Some(user.unwrap_or(RETRIES_NS)),
            // One probe at least goes out before TCP_USER_TIMEOUT counts.
            Wait::Idle if self.keep_alive => {
                Some(user.map_or(idle + PROBES * PROBE_NS, |user| user.max(idle + PROBE_NS)))
            }
            Wait::Idle => None,
        }
    }
}

/// An option's value as the program reads it.
pub enum Value {
    Int(i32),
    Two([i32; 2]),
}

impl Value {
    pub fn write(&self, out: &mut [u8]) -> usize {
        let bytes = match *self {
            Value::Int(value) => value.to_ne_bytes().to_vec(),
            Value::Two([a, b]) => [a.to_ne_bytes(), b.to_ne_bytes()].concat(),
        };
        let n = out.len().min(bytes.len());
        out[..n].copy_from_slice(&bytes[..n]);
        n
    }
}

fn hops(value: i32) -> Result<u8, Errno> {
    match value {
        -1 => Ok(64),
        1..=255 => Ok(value as u8),
        _ => Err(Errno(EINVAL)),
    }
}
