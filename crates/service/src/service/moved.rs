//! A guest whose sockets go over to another stack while its programs run.

use std::os::fd::IntoRawFd as _;

use netkernel_abi::socket::state;

use super::bit::{COUNTED, RX_READY};
use super::{Cx, Kind, Service, Violation};
use crate::police::Limits;
use crate::stack::{Handle, Stack, key};

/// Why nothing was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stays {
    /// So many sockets are no descriptors of the kernel, and end with their stack.
    Sockets(usize),
    /// There is no room for so many connections.
    Connections(usize),
}

impl Service {
    /// Takes all sockets from one stack to another; from now on the second one must be given to every call. Both drive
    /// descriptors of the kernel, as far as sockets are open: these keep their names, their peers, and the namespace that they
    /// were made in. `limits`: what the guest may use there. How many sockets went over.
    pub fn move_to(
        &mut self,
        from: &mut dyn Stack,
        to: &mut dyn Stack,
        limits: Limits,
    ) -> Result<Result<usize, Stays>, Violation> {
        let core = &mut self.core;
        let open = |sock: &super::Sock| sock.kind != Kind::Free && sock.handle != Handle::NONE;
        let ids: Vec<u32> = core.socks.iter().filter(|(_, sock)| open(sock)).map(|(id, _)| id).collect();
        let fleeting =
            core.socks.iter().filter(|(_, sock)| open(sock) && from.lasting(sock.handle).is_none());
        let fleeting = fleeting.count();
        if fleeting > 0 {
            return Ok(Err(Stays::Sockets(fleeting)));
        }
        let counted = core.socks.iter().filter(|(_, sock)| sock.bits & COUNTED != 0).count();
        if !exchange(&core.limits, &limits, counted) {
            return Ok(Err(Stays::Connections(counted)));
        }
        core.limits = limits;
        let cx = &mut Cx { region: &self.region, stack: to };
        for &id in &ids {
            let Some(sock) = core.socks.get_mut(id) else { continue };
            let tells = sock.kind != Kind::Stream || sock.state & (state::CONNECTED | state::CONNECTING) != 0;
            let given = from.give(sock.handle);
            let adopted = given.and_then(|fd| cx.stack.adopt(key(core.guest, id), fd, tells));
            sock.handle = adopted.unwrap_or(Handle::NONE);
            sock.bits |= RX_READY;
            if adopted.is_err() {
                sock.error = libc::ECONNRESET;
                core.fail(cx, id, libc::ECONNRESET)?;
            }
            core.enqueue(id);
        }
        Ok(Ok(ids.len()))
    }
}

impl Service {
    /// Whether all open sockets are descriptors of the kernel, which another thread's stack can adopt.
    pub fn can_depart(&self, stack: &dyn Stack) -> bool {
        let open = |sock: &super::Sock| sock.kind != Kind::Free && sock.handle != Handle::NONE;
        !self.core.socks.iter().any(|(_, sock)| open(sock) && stack.lasting(sock.handle).is_none())
    }

    /// Sockets that were handed over are not this service's any more, nor of the one after it.
    pub fn disown_handed(&mut self) {
        let mut at = Some(0);
        while let Some(id) = at {
            at = self.core.socks.next_id(id);
            if let Some(sock) = self.core.socks.get_mut(id).filter(|sock| sock.state & state::HANDED != 0) {
                sock.fd = 0;
            }
        }
    }

    /// After [`Service::write_out`]: takes all sockets out of the stack. Their descriptors stay open, and belong to who recovers
    /// the service.
    pub fn depart(&mut self, stack: &mut dyn Stack) {
        let core = &mut self.core;
        let mut at = Some(0);
        while let Some(id) = at {
            at = core.socks.next_id(id);
            let Some(sock) = core.socks.get_mut(id).filter(|sock| sock.kind != Kind::Free) else { continue };
            let counted = std::mem::take(&mut sock.bits) & COUNTED != 0;
            let handle = std::mem::replace(&mut sock.handle, Handle::NONE);
            if handle != Handle::NONE
                && let Ok(fd) = stack.give(handle)
            {
                let _ = fd.into_raw_fd();
            }
            core.uncount(counted);
        }
    }
}

/// Gives back so many connections, and takes as many; false: there is no room, and nothing has changed.
fn exchange(from: &Limits, to: &Limits, connections: usize) -> bool {
    let give_back = |limits: &Limits, count: usize| {
        (0..count).for_each(|_| limits.connections.iter().for_each(|places| places.give_back()));
    };
    let take = |limits: &Limits| limits.connections.as_ref().is_none_or(|places| places.take());
    give_back(from, connections);
    let taken = (0..connections).take_while(|_| take(to)).count();
    if taken < connections {
        give_back(to, taken);
        (0..connections).for_each(|_| _ = take(from));
    }
    taken == connections
}
