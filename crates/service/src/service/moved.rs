//! A guest whose sockets go over to another stack while its programs run.

use std::os::fd::IntoRawFd as _;

use netkernel_abi::socket::state;

use super::bit::{COUNTED, RX_READY};
use super::{Ahead, Cx, Kind, Service, Violation};
use crate::journal::take_descriptor;
use crate::police::Limits;
use crate::stack::{Close, Errno, Handle, Stack, key};

/// Why nothing was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stays {
    /// So many sockets are no descriptors of the kernel, and end with their stack.
    Sockets(usize),
    /// There is no room for so many connections.
    Connections(usize),
}

/// What became of the open sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Went {
    /// So many are of the new stack.
    pub sockets: usize,
    /// So many stay with each of the stacks, by its place.
    pub stayed: Vec<usize>,
}

fn is_open(sock: &super::Sock) -> bool {
    sock.kind != Kind::Free && sock.handle != Handle::NONE
}

impl Service {
    /// Takes what waits at listeners, as far ahead as they accept: it is no descriptor that could go over.
    pub fn accept_all(&mut self, stack: &mut dyn Stack) -> Result<(), Violation> {
        let cx = &mut Cx { region: &self.region, stack };
        let mut at = Some(0);
        while let Some(id) = at {
            at = self.core.socks.next_id(id);
            let Some(sock) = self.core.socks.get_mut(id) else { continue };
            if sock.kind == Kind::Listener && is_open(sock) && sock.state & state::ON_DEMAND == 0 {
                sock.bits |= RX_READY;
                self.core.accept_ahead(cx, id, Ahead::Usual)?;
            }
        }
        Ok(())
    }

    /// Puts the guest on the first of these stacks; from now on they must be given to every call as [`Several`](crate::Several).
    /// `place`: where in the list the stack is that was at a place until now. Sockets that are descriptors of the kernel go over, and
    /// keep their names, their peers, and the namespace that they were made in. What cannot go over stays, or nothing goes if
    /// `all` must. `limits`: what the guest may use from now on.
    pub fn move_to(
        &mut self,
        stacks: &mut [&mut dyn Stack],
        place: &dyn Fn(usize) -> usize,
        limits: Limits,
        all: bool,
    ) -> Result<Result<Went, Stays>, Violation> {
        let core = &mut self.core;
        let [first, ..] = &*stacks else { return Ok(Err(Stays::Sockets(0))) };
        let takes = first.takes();
        let ids: Vec<u32> = core.socks.iter().filter(|(_, sock)| is_open(sock)).map(|(id, _)| id).collect();
        let goes = |handle: Handle| {
            let at = place(handle.place());
            at == 0 || takes && stacks.get(at).is_some_and(|stack| stack.movable(handle.own()))
        };
        let left = ids.iter().filter_map(|id| core.socks.get(*id)).filter(|sock| !goes(sock.handle)).count();
        if all && left > 0 {
            return Ok(Err(Stays::Sockets(left)));
        }
        let counted = core.socks.iter().filter(|(_, sock)| sock.bits & COUNTED != 0).count();
        if !exchange(&core.limits, &limits, counted) {
            return Ok(Err(Stays::Connections(counted)));
        }
        core.limits = limits;
        let mut went = Went { sockets: 0, stayed: vec![0; stacks.len()] };
        for &id in &ids {
            let Some(sock) = core.socks.get_mut(id) else { continue };
            let (at, own) = (place(sock.handle.place()), sock.handle.own());
            if at == 0 {
                sock.handle = own;
                went.sockets += 1;
                continue;
            }
            let given = match stacks.get_mut(at) {
                Some(stack) if takes => stack.part(own),
                _ => Err(Errno(libc::EOPNOTSUPP)),
            };
            let Ok(fd) = given else {
                sock.handle = own.at(at).unwrap_or(Handle::NONE);
                went.stayed[at] += 1;
                continue;
            };
            let tells = sock.kind != Kind::Stream || sock.state & (state::CONNECTED | state::CONNECTING) != 0;
            let cx = &mut Cx { region: &self.region, stack: &mut *stacks[0] };
            let adopted = cx.stack.adopt(key(core.guest, id), fd, tells);
            // What a handle cannot tell from one of another stack is of no use.
            let adopted = adopted.and_then(|handle| match handle.place() {
                0 => Ok(handle),
                _ => {
                    cx.stack.close(handle, Close::Abort);
                    Err(Errno(libc::ENFILE))
                }
            });
            sock.handle = adopted.unwrap_or(Handle::NONE);
            sock.fd = adopted.map_or(0, |handle| super::lasting(cx.stack, handle));
            sock.bits |= RX_READY;
            went.sockets += 1;
            if adopted.is_err() {
                sock.error = libc::ECONNRESET;
                core.fail(cx, id, libc::ECONNRESET)?;
            }
            core.enqueue(id);
        }
        Ok(Ok(went))
    }

    /// So many sockets the stack at each place has, of so many.
    pub fn sockets_at(&self, places: usize) -> Vec<usize> {
        let mut counts = vec![0; places];
        for (_, sock) in self.core.socks.iter().filter(|(_, sock)| is_open(sock)) {
            if let Some(count) = counts.get_mut(sock.handle.place()) {
                *count += 1;
            }
        }
        counts
    }
}

impl Service {
    /// Whether all open sockets are descriptors of the kernel, which another thread's stack can adopt.
    pub fn can_depart(&self, stack: &dyn Stack) -> bool {
        let open = |sock: &super::Sock| sock.kind != Kind::Free && sock.handle != Handle::NONE;
        !self.core.socks.iter().any(|(_, sock)| open(sock) && stack.lasting(sock.handle).is_none())
    }

    /// How many open sockets are more than descriptors of the kernel, and can go to no other process.
    pub fn bound_here(&self, stack: &dyn Stack) -> usize {
        let stays = |sock: &super::Sock| is_open(sock) && !stack.movable(sock.handle);
        self.core.socks.iter().filter(|(_, sock)| stays(sock)).count()
    }

    /// Takes all sockets out of the stack, for another process to [recover](Service::recover): from now on only what
    /// [`Service::write_out`] writes knows their descriptors, which stay open. An error: so many cannot go, and nothing has changed.
    pub fn pack(&mut self, stack: &mut dyn Stack) -> Result<(), usize> {
        let bound = self.bound_here(stack);
        if bound > 0 {
            return Err(bound);
        }
        let core = &mut self.core;
        let ids: Vec<u32> = core.socks.iter().filter(|(_, sock)| is_open(sock)).map(|(id, _)| id).collect();
        for (n, &id) in ids.iter().enumerate() {
            let Some(sock) = core.socks.get_mut(id) else { continue };
            let Ok(fd) = stack.part(sock.handle) else {
                // Somebody came meanwhile.
                self.unpack(stack, &ids[..n]);
                return Err(1);
            };
            sock.handle = Handle::NONE;
            sock.fd = fd.into_raw_fd() + 1;
        }
        Ok(())
    }

    /// Gives sockets back to the stack that they were taken out of.
    fn unpack(&mut self, stack: &mut dyn Stack, ids: &[u32]) {
        for &id in ids {
            let Some(sock) = self.core.socks.get_mut(id) else { continue };
            let tells = sock.kind != Kind::Stream || sock.state & (state::CONNECTED | state::CONNECTING) != 0;
            let adopted =
                take_descriptor(sock.fd).and_then(|fd| stack.adopt(key(self.core.guest, id), fd, tells).ok());
            sock.handle = adopted.unwrap_or(Handle::NONE);
            sock.fd = adopted.map_or(0, |handle| super::lasting(stack, handle));
            sock.bits |= RX_READY;
            self.core.enqueue(id);
        }
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
