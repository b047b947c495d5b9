//! Kernel sockets that are given away: direct attachment.

use std::os::fd::OwnedFd;

use netkernel_agent::{SocketRequest, Sockets};

use crate::KernelConfig;
use crate::host::{self, Namespace};

/// Makes sockets in the module's namespace, with its congestion control, and keeps none of them. What a program does with
/// them afterwards is between it and the kernel; sockets that it accepts inherit both.
pub struct DirectSockets {
    config: KernelConfig,
    namespace: Namespace,
}

impl DirectSockets {
    pub fn new(config: KernelConfig) -> Result<DirectSockets, String> {
        let namespace = Namespace::open(config.netns.as_deref())?;
        Ok(DirectSockets { config, namespace })
    }
}

impl Sockets for DirectSockets {
    fn socket(&mut self, request: &SocketRequest) -> Result<OwnedFd, i32> {
        let flags = if request.nonblocking { libc::SOCK_NONBLOCK } else { 0 };
        let made = self.namespace.within(|| {
            host::kernel_socket(request.domain, request.kind | flags | libc::SOCK_CLOEXEC, request.protocol)
        });
        let fd = match made {
            Ok(made) => made.map_err(|error| error.raw_os_error().unwrap_or(libc::ENETDOWN))?,
            // The namespace cannot be entered any more.
            Err(_) => return Err(libc::ENETDOWN),
        };
        let tcp = request.kind == libc::SOCK_STREAM && matches!(request.protocol, 0 | libc::IPPROTO_TCP);
        if tcp && let Some(name) = &self.config.congestion_control {
            // The module was checked when the guest came; unloaded since, or no longer allowed.
            host::set_congestion(&fd, name).map_err(|_| libc::ENETDOWN)?;
        }
        host::mark_and_pace(&fd, &self.config).map_err(|_| libc::ENETDOWN)?;
        Ok(fd)
    }

    fn congestion_control(&self) -> Option<&str> {
        self.config.congestion_control.as_deref()
    }

    fn owns(&self, option: i32) -> bool {
        match option {
            libc::SO_MARK => self.config.mark.is_some(),
            libc::SO_MAX_PACING_RATE => self.config.pacing.is_some(),
            _ => false,
        }
    }

    fn knows(&mut self, congestion_control: &[u8]) -> bool {
        host::available_congestion_controls().iter().any(|name| name.as_bytes() == congestion_control)
    }

    fn within(&self, work: &mut dyn FnMut()) {
        let _ = self.namespace.within(work);
    }
}
