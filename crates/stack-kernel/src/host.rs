//! What the host offers, and its network namespaces.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use netkernel_service::{TcpCounts, namespace_path};

use crate::KernelConfig;

/// The congestion controls that the host's kernel has, in its own order. Some may be refused to unprivileged users; see
/// [`check`].
pub fn available_congestion_controls() -> Vec<String> {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control")
        .map(|text| text.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

/// Says in one sentence why a module with this configuration cannot work here.
pub fn check(config: &KernelConfig) -> Result<(), String> {
    // On a thread of its own: the namespace of the caller's thread must not change.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netkernel-check".into()).spawn_scoped(scope, || {
            let namespace = Namespace::open(config.netns.as_deref())?;
            namespace.within(|| {
                probe(config.congestion_control.as_deref())?;
                let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0)
                    .map_err(|e| format!("the kernel makes no TCP socket: {e}"))?;
                mark_and_pace(&fd, config).map_err(|e| {
                    format!("`pacing` or `mark` cannot be set: {e} (a mark needs CAP_NET_ADMIN: run the engine as root)")
                })
            })?
        });
        match thread {
            Ok(handle) => handle.join().unwrap_or_else(|_| Err("the check itself failed".into())).map(|_| ()),
            Err(error) => Err(format!("no thread to check it with: {error}")),
        }
    })
}

/// Makes a TCP socket with the wanted congestion control; returns the default one's name.
pub(crate) fn probe(wanted: Option<&str>) -> Result<String, String> {
    let fd =
        socket(libc::AF_INET, libc::SOCK_STREAM, 0).or_else(|_| socket(libc::AF_INET6, libc::SOCK_STREAM, 0));
    let fd = fd.map_err(|e| format!("the kernel makes no TCP socket: {e}"))?;
    let mut name = [0u8; 16];
    let mut len = name.len() as libc::socklen_t;
    // SAFETY: name and len are valid for writes, len is name's size.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_CONGESTION,
            name.as_mut_ptr().cast(),
            &mut len,
        )
    };
    let default = if r == 0 { text(&name[..len as usize]) } else { String::new() };
    if let Some(wanted) = wanted {
        set_congestion(&fd, wanted).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => format!(
                "the host's kernel has no congestion control `{wanted}`; it has: {} (load its module, or choose one of these)",
                available_congestion_controls().join(", ")
            ),
            Some(libc::EPERM) => format!(
                "congestion control `{wanted}` is not allowed to this user: run as root, or add it to the sysctl net.ipv4.tcp_allowed_congestion_control"
            ),
            _ => format!("congestion control `{wanted}`: {error}"),
        })?;
    }
    Ok(default)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub(crate) fn set_congestion(fd: &OwnedFd, name: &str) -> io::Result<()> {
    // SAFETY: the name is valid for reads of its length.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_CONGESTION,
            name.as_ptr().cast(),
            name.len() as libc::socklen_t,
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the module sets on each socket besides the congestion control; accepted sockets inherit it.
pub(crate) fn mark_and_pace(fd: &OwnedFd, config: &KernelConfig) -> io::Result<()> {
    let set = |name: i32, value: &[u8]| {
        // SAFETY: the value is valid for reads of its length.
        let r = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                value.as_ptr().cast(),
                value.len() as libc::socklen_t,
            )
        };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    if let Some(mark) = config.mark {
        set(libc::SO_MARK, &mark.to_ne_bytes())?;
    }
    if let Some(rate) = config.pacing {
        set(libc::SO_MAX_PACING_RATE, &rate.to_ne_bytes())?;
    }
    Ok(())
}

pub(crate) fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    kernel_socket(domain, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol)
}

/// A socket of exactly this type, flags included.
pub(crate) fn kernel_socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::socket(domain, kind, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A network namespace to make sockets in, and the way back.
pub(crate) struct Namespace {
    /// The namespace and the thread's own; `None`: they are the same.
    there_and_back: Option<(OwnedFd, OwnedFd)>,
}

impl Namespace {
    pub fn open(name: Option<&str>) -> Result<Namespace, String> {
        let Some(name) = name else { return Ok(Namespace { there_and_back: None }) };
        let path = namespace_path(name);
        let there = open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                format!("there is no network namespace `{name}` ({path} does not exist): make it with `ip netns add`")
            }
            _ => format!("network namespace `{name}`: {path}: {error}"),
        })?;
        let back = open("/proc/thread-self/ns/net")
            .map_err(|e| format!("the engine's own network namespace: {e}"))?;
        let namespace = Namespace { there_and_back: Some((there, back)) };
        namespace.within(|| ()).map_err(|error| {
            format!("network namespace `{name}`: {error} (entering one needs CAP_SYS_ADMIN: run the engine as root)")
        })?;
        Ok(namespace)
    }

    /// Runs `f` in the namespace.
    pub fn within<R>(&self, f: impl FnOnce() -> R) -> Result<R, String> {
        let Some((there, back)) = &self.there_and_back else { return Ok(f()) };
        enter(there).map_err(|e| format!("cannot be entered: {e}"))?;
        let result = f();
        if let Err(error) = enter(back) {
            // Everything that this thread did afterwards would happen in the wrong namespace.
            log::error!("cannot return from a network namespace: {error}");
            std::process::abort();
        }
        Ok(result)
    }
}

/// What the kernel counted of a connection (struct tcp_info in include/uapi/linux/tcp.h). `None`: it is no TCP socket.
pub(crate) fn tcp_counts(fd: RawFd) -> Option<TcpCounts> {
    // tcpi_rtt, tcpi_total_retrans and tcpi_segs_out.
    const RTT: usize = 68;
    const RETRANSMITTED: usize = 100;
    const SEGMENTS: usize = 136;
    let mut bytes = [0u8; SEGMENTS + 4];
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: the buffer and its length are valid for writes.
    let told = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, bytes.as_mut_ptr().cast(), &mut length)
    };
    let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    // A kernel before 4.2 tells of no segments.
    if told != 0 || (length as usize) < bytes.len() {
        return None;
    }
    Some(TcpCounts { segments: word(SEGMENTS)?, retransmitted: word(RETRANSMITTED)?, rtt_us: word(RTT)? })
}

fn open(path: &str) -> io::Result<OwnedFd> {
    let path = CString::new(path)?;
    // SAFETY: path is a C string; the result is checked.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn enter(namespace: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain system call on an owned descriptor; changes the calling thread only.
    let r = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
