//! Connections that are being made.

use super::*;

impl Core {
    pub(super) fn finish_connect(
        &mut self,
        cx: &mut Cx,
        id: u32,
        readiness: Readiness,
    ) -> Result<(), Violation> {
        let (Some(sock), Some(entry)) = (self.socks.get_mut(id), cx.region.socket(id)) else { return Ok(()) };
        let generation = sock.generation;
        match cx.stack.connected(sock.handle, readiness) {
            Ok(true) => {
                sock.state = (sock.state & !state::CONNECTING) | state::CONNECTED | state::BOUND;
                sock.bits &= !TX_BLOCKED;
                sock.bits |= RX_READY;
                self.totals.connections += 1;
                let paired = paired::begin(cx.stack, entry, sock);
                self.has_pairs |= paired;
                if !paired {
                    self.ensure_tx(cx, id, STREAM_CLASS);
                }
                self.publish_state(cx, id);
                self.events.raise(cx.region, entry, id, generation, OUT, u32::MAX)?;
                if paired {
                    self.pair_turn(cx, id)?;
                }
            }
            // Not over yet: a report that came too early.
            Ok(false) => {}
            Err(errno) => {
                sock.state = (sock.state & !state::CONNECTING) | state::CONNECT_FAILED;
                entry.error.store(errno.0 as u32, Relaxed);
                self.publish_state(cx, id);
                self.events.raise(cx.region, entry, id, generation, IN | OUT | ERR | HUP, u32::MAX)?;
            }
        }
        Ok(())
    }

    pub(super) fn publish_state(&mut self, cx: &Cx, id: u32) {
        if let (Some(sock), Some(entry)) = (self.socks.get(id), cx.region.socket(id)) {
            // SYNC: socket-state - everything that the state implies (rings, error) is visible with it.
            entry.state.store(sock.state, Release);
        }
    }
}
