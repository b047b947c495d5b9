//! What a stack says of a socket when it is asked, as getsockopt and ioctl would.

use netkernel_agent::{TCP_INFO_BYTES, TcpInfo};
use netkernel_service::{Handle, Stack};

/// What does not apply, or what the stack does not know, is `None` or 0.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    pub tcp: Option<TcpInfo>,
    pub congestion_control: Option<String>,
    /// As `ss` shows them, in bytes; of a listener, in connections: those that wait, and the backlog.
    pub receive_queue: u32,
    pub send_queue: u32,
}

/// Asks `stack` about `handle`; `kind` is "stream", "listener" or "datagram".
pub fn ask(stack: &mut dyn Stack, handle: Handle, kind: &str) -> Asked {
    let mut asked = Asked::default();
    if kind != "datagram" {
        let mut bytes = [0; TCP_INFO_BYTES];
        let told = stack.option(handle, libc::IPPROTO_TCP, libc::TCP_INFO, &mut bytes);
        asked.tcp = told.ok().and_then(|n| TcpInfo::parse(&bytes[..n]));
        let mut name = [0; 16];
        if let Ok(n) = stack.option(handle, libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name) {
            let name = name[..n].split(|&byte| byte == 0).next().unwrap_or_default();
            asked.congestion_control = Some(String::from_utf8_lossy(name).into_owned());
        }
    }
    if kind == "listener" {
        if let Some(tcp) = &asked.tcp {
            (asked.receive_queue, asked.send_queue) = (tcp.unacknowledged, tcp.selectively_acknowledged);
        }
        return asked;
    }
    let mut bytes =
        |request| stack.ioctl(handle, request).map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX));
    asked.receive_queue = bytes(libc::FIONREAD);
    asked.send_queue = bytes(libc::TIOCOUTQ);
    asked
}
