//! Sockets that are given away, as descriptors of the kernel.

use super::*;

impl Core {
    pub(super) fn hand_over(
        &mut self,
        cx: &mut Cx,
        id: u32,
        generation: u32,
        soft: bool,
    ) -> Result<Result<OwnedFd, Errno>, Violation> {
        let usable = |sock: &Sock| {
            sock.generation == generation
                && sock.kind != Kind::Free
                && sock.handle != Handle::NONE
                && sock.bits & (CLOSING | UNTAKEN) == 0
        };
        // A placeholder that is used again, and no element named its socket so far.
        let unopened =
            |sock: &Sock| sock.generation == generation && sock.kind == Kind::Free && sock.bits & SPARE != 0;
        if self.socks.get(id).is_some_and(unopened) {
            self.reopen(cx, id)?;
        }
        if !self.socks.get(id).is_some_and(usable) {
            return Ok(Err(Errno(libc::EBADF)));
        }
        self.send(cx, id, false)?;
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else {
            return Ok(Err(Errno(libc::EBADF)));
        };
        if !usable(sock) || sock.state & state::DEAD != 0 {
            return Ok(Err(Errno(libc::EBADF)));
        }
        let unread = match sock.kind {
            // Connections that were accepted ahead cannot go back.
            Kind::Listener if soft && entry.rx_head.load(Acquire) != sock.rx_tail => {
                return Ok(Err(Errno(libc::EBUSY)));
            }
            Kind::Listener => 0,
            _ => bytes::used(entry.rx_head.load(Acquire), sock.rx_tail, sock.rx.size())
                .map_err(|_| Violation("read position of a socket"))?,
        };
        if unread > sock.peeked {
            return Ok(Err(Errno(libc::EBUSY)));
        }
        let tx = if sock.tx.is_none() { Block::NONE } else { replace_tx(entry, sock, Block::NONE) };
        if !sock.tx.is_none() || sock.bits & SHUT_WR != 0 && sock.state & state::TX_END == 0 {
            return Ok(Err(Errno(libc::EAGAIN)));
        }
        self.give_block(tx);
        self.look_at_tcp(cx.stack, id);
        let Some(sock) = self.socks.get_mut(id) else { return Ok(Err(Errno(libc::EBADF))) };
        if sock.peeked > unread && cx.stack.discard(sock.handle, (sock.peeked - unread) as usize).is_err() {
            return Ok(Err(Errno(libc::EIO)));
        }
        sock.peeked = unread;
        let fd = match cx.stack.give(sock.handle) {
            Ok(fd) => fd,
            Err(errno) => return Ok(Err(errno)),
        };
        sock.handle = Handle::NONE;
        sock.error = libc::EBADF;
        let counted = sock.bits & COUNTED != 0;
        sock.bits &= QUEUED | STARVED;
        sock.state |= state::HANDED;
        let (generation, listener) = (sock.generation, sock.kind == Kind::Listener);
        // From now on it is as one that a program got from the agent.
        self.uncount(counted);
        if listener {
            // Connections that the guest has not accepted cannot go back.
            self.drop_untaken(cx, id);
        }
        self.publish_state(cx, id);
        self.events.raise(cx.region, entry, id, generation, IN | OUT, u32::MAX)?;
        Ok(Ok(fd))
    }
}
