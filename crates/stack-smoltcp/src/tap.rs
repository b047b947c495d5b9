//! A TAP device: an Ethernet cable of which one end is a descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use netkernel_service::{namespace_path, now_ns};

const TUN: &str = "/dev/net/tun";

/// Opens the device `name` in the network namespace `netns`, makes it if there is none, and sets it up. Errors are
/// sentences for the operator.
pub fn open(name: &str, netns: Option<&str>) -> Result<File, String> {
    within(netns, || {
        let file = tun()?;
        attach(&file, name).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => format!(
                "the TAP device `{name}` is busy: another program has it, or another switch thread of this engine (a smoltcp \
                 stack needs switch_threads = 1)"
            ),
            Some(libc::EPERM) => format!(
                "the TAP device `{name}` may not be used: run the engine as root, or make the device for its user with `ip tuntap \
                 add dev {name} mode tap user NAME`"
            ),
            Some(libc::EINVAL) => format!("`{name}` is no TAP device: there is another device of this name"),
            _ => format!("the TAP device `{name}`: {error}"),
        })?;
        up(name).map_err(|error| format!("the TAP device `{name}` cannot be set up: {error}"))?;
        Ok(file)
    })
}

/// Says why no device can be opened at all.
pub fn possible(netns: Option<&str>) -> Result<(), String> {
    within(netns, || tun().map(drop))
}

fn tun() -> Result<File, String> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(TUN).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                format!("the host has no {TUN}: load the kernel module `tun`")
            }
            Some(libc::EACCES | libc::EPERM) => {
                format!(
                    "{TUN} may not be opened: run the engine as root, or give its user access to the file"
                )
            }
            _ => format!("{TUN}: {error}"),
        }
    })
}

/// Runs `f` on a thread of its own, in the network namespace: that of the caller's thread must not change.
fn within<R: Send>(netns: Option<&str>, f: impl FnOnce() -> Result<R, String> + Send) -> Result<R, String> {
    let Some(name) = netns else { return f() };
    let path = namespace_path(name);
    std::thread::scope(|scope| {
        let inside = || {
            let namespace = File::open(&path).map_err(|error| {
                format!("network namespace `{name}`: {path}: {error} (make it with `ip netns add`)")
            })?;
            // SAFETY: plain system call on an open descriptor; it changes the calling thread, which ends soon, only.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                let error = io::Error::last_os_error();
                return Err(format!(
                    "network namespace `{name}`: {error} (entering one needs CAP_SYS_ADMIN: run the engine as root)"
                ));
            }
            f()
        };
        let thread = std::thread::Builder::new().name("netkernel-tap".into()).spawn_scoped(scope, inside);
        let thread = thread.map_err(|error| format!("no thread to open a device with: {error}"))?;
        thread.join().unwrap_or_else(|_| Err("opening the device failed".into()))
    })
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid value of that plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request.ifr_name[..15].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is valid for reads and writes, and its name ends with a 0.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
}

/// Sets the device up, unless it is.
fn up(name: &str) -> io::Result<()> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: new and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut request = request(name);
    // SAFETY: as in attach.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) })?;
    // SAFETY: the call has just written the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & libc::IFF_UP as libc::c_short != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: as in attach.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) })
}

pub fn random() -> u64 {
    let mut value = 0u64;
    // SAFETY: eight bytes, valid for writes. Nothing is written when it fails, which it does not for so few bytes.
    unsafe { libc::getrandom((&raw mut value).cast(), 8, 0) };
    value ^ now_ns()
}
