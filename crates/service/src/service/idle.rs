//! The ends of a guest's processes, and memory that stands idle.

use super::*;

impl Core {
    pub(super) fn end_process(&mut self, cx: &mut Cx, tag: u32) -> Result<(), Violation> {
        let region = cx.region;
        let mut gone = Vec::new();
        // An element of another process that waits for the channels to be read goes on waiting.
        let waiting = self.held.take();
        // Queue sets that were never heard of are not touched: that would give them memory.
        for q in 0..(self.highest_queue + 8).min(self.events.queues.len() as u32) {
            let Some(set) = region.queue_set(q) else { break };
            if set.owner.load(Acquire) == 0 {
                continue;
            }
            let process = set.process.load(Relaxed);
            if process == tag {
                // At most one ring's worth: who would push is dead.
                for _ in 0..16 {
                    if self.drain_queue(cx, q, &mut 0)? {
                        break;
                    }
                    if let Some((q, nqe)) = self.held.take() {
                        self.element(cx, q, nqe, true)?;
                    }
                }
                if set.owner.load(Relaxed) != 0 {
                    self.release(region, q);
                }
                gone.push(q);
            }
        }
        self.held = waiting;
        self.sweep_wanted = true;
        let mut at = Some(0);
        while let Some(id) = at {
            if let (Some(sock), Some(entry)) = (self.socks.get_mut(id), region.socket(id))
                && sock.kind != Kind::Free
            {
                for (i, watcher) in entry.watchers.iter().enumerate() {
                    let value = watcher.load(Relaxed) as u32;
                    if value != 0
                        && gone.contains(&(value - 1))
                        && watcher.compare_exchange(value as u16, 0, AcqRel, Relaxed).is_ok()
                    {
                        entry.event_pending.fetch_and(!(1 << i), SeqCst);
                    }
                }
                if sock.bits & UNTAKEN != 0 {
                    let listener = sock.link;
                    let record = sock.record;
                    let taken = match (self.socks.get(listener), region.socket(listener)) {
                        (Some(l), Some(e)) if l.kind == Kind::Listener => {
                            let waiting = l.rx_tail.wrapping_sub(e.rx_head.load(Acquire));
                            l.rx_tail.wrapping_sub(record) >= waiting
                        }
                        _ => true,
                    };
                    if taken && let Some(sock) = self.socks.get_mut(id) {
                        sock.bits |= SUSPECT;
                        sock.used_at = self.sweeps;
                        self.suspects = true;
                    }
                }
            }
            at = self.socks.next_id(id);
        }
        Ok(())
    }

    pub(super) fn sweep(&mut self, cx: &mut Cx) -> Result<(), Violation> {
        let region = cx.region;
        self.sweeps = self.sweeps.wrapping_add(1);
        self.suspects = false;
        let mut wanted = false;
        let scarce = !self.starved.is_empty();
        let mut at = Some(0);
        while let Some(id) = at {
            at = self.socks.next_id(id);
            let Some(sock) = self.socks.get_mut(id) else { continue };
            if sock.kind == Kind::Free {
                continue;
            }
            let idle = self.sweeps.wrapping_sub(sock.used_at) > 1;
            if sock.bits & SUSPECT != 0 {
                if idle {
                    self.finish_close(cx, id, Close::Abort);
                } else {
                    self.suspects = true;
                }
                continue;
            }
            if sock.kind == Kind::Listener || sock.rx.is_none() && sock.tx.is_none() {
                continue;
            }
            let Some(entry) = region.socket(id) else { continue };
            wanted = true;
            // Who waits for memory needs it more than who will ask for an empty ring again.
            if !(idle || scarce) || sock.bits & CLOSING != 0 {
                continue;
            }
            if !sock.rx.is_none()
                && entry.rx_head.load(Acquire) == sock.rx_tail
                && sock.bits & RX_STALLED == 0
            {
                entry.rx_size.store(0, Relaxed);
                let block = std::mem::take(&mut sock.rx);
                self.blocks.give(block);
            }
            if !sock.tx.is_none() {
                let old = replace_tx(entry, sock, Block::NONE);
                self.blocks.give(old);
            }
        }
        // A thread that died between claiming a queue set and naming its process.
        for q in 0..(self.highest_queue + 1).min(self.events.queues.len() as u32) {
            let Some(set) = region.queue_set(q) else { break };
            let state = &mut self.events.queues[q as usize];
            if set.owner.load(Relaxed) != 0 && set.process.load(Relaxed) == 0 {
                state.nameless += 1;
                wanted = true;
                if state.nameless > 3 {
                    self.release(region, q);
                }
            } else {
                state.nameless = 0;
            }
        }
        wanted |= self.blocks.sweep(region, 1024);
        self.sweep_wanted = wanted;
        if !self.starved.is_empty() {
            self.retry_starved();
        }
        Ok(())
    }
}
