//! Who goes next: packets that wait for their tenant's rates.

use std::collections::{HashMap, VecDeque};

use netkernel_hold::{Flow, Packet};

use crate::tenants::Caps;

/// It is not worth waiting for more than this, of a packet that is larger: the rest is owed.
const ENOUGH: u64 = 4096;

/// Connections and datagram sockets of some tenants, and their packets in order.
#[derive(Default)]
pub(super) struct Line {
    flows: HashMap<Flow, State>,
    /// By tenant: who waits, in turn.
    turns: HashMap<usize, VecDeque<Flow>>,
}

#[derive(Default)]
struct State {
    packets: VecDeque<Packet>,
    /// Up to where the peer was told that its bytes are here.
    acknowledged: Option<u32>,
}

impl State {
    /// How many of the peer's bytes the packet acknowledges for the first time: so many more it may send.
    fn advance(&self, packet: &Packet) -> u64 {
        let new = packet.acknowledges.zip(self.acknowledged).map(|(now, before)| now.wrapping_sub(before));
        new.filter(|&new| new < 1 << 31).unwrap_or(0).into()
    }

    fn passed(&mut self, packet: &Packet) {
        if self.acknowledged.is_none() || self.advance(packet) > 0 {
            self.acknowledged = packet.acknowledges.or(self.acknowledged);
        }
    }
}

impl Line {
    pub fn add(&mut self, packet: Packet, tenant: usize) {
        let state = self.flows.entry(packet.flow).or_default();
        if state.packets.is_empty() {
            self.turns.entry(tenant).or_default().push_back(packet.flow);
        }
        state.packets.push_back(packet);
    }

    /// Lets go what may go now. Returns when something may go again, in nanoseconds of the same clock. A tenant without caps is not held.
    pub fn go(
        &mut self,
        now_ns: u64,
        caps: impl Fn(usize) -> Option<Caps>,
        mut release: impl FnMut(u32),
    ) -> Option<u64> {
        let mut again: Option<u64> = None;
        for (tenant, turns) in &mut self.turns {
            let caps = caps(*tenant);
            let mut waiting = VecDeque::new();
            // Who has to wait for one of both does not hold up who needs the other.
            let (mut sends, mut receives) = (true, true);
            while let Some(flow) = turns.pop_front() {
                let Some(state) = self.flows.get_mut(&flow) else { continue };
                let Some(packet) = state.packets.front().copied() else { continue };
                let advance = state.advance(&packet);
                if let Some(caps) = &caps {
                    let mut may = |police: &netkernel_service::Police, bytes: u64, open: &mut bool| {
                        if bytes == 0 {
                            return true;
                        }
                        if *open && let Err(at) = police.allow(bytes.min(ENOUGH), now_ns) {
                            *open = false;
                            again = Some(again.map_or(at, |again| again.min(at)));
                        }
                        *open
                    };
                    let payload = u64::from(packet.payload);
                    if !may(&caps.send, payload, &mut sends) || !may(&caps.receive, advance, &mut receives) {
                        waiting.push_back(flow);
                        continue;
                    }
                    caps.send.pay(payload, now_ns);
                    caps.receive.pay(advance, now_ns);
                }
                state.passed(&packet);
                state.packets.pop_front();
                release(packet.id);
                if !state.packets.is_empty() {
                    turns.push_back(flow);
                }
            }
            *turns = waiting;
        }
        self.turns.retain(|_, turns| !turns.is_empty());
        again
    }

    /// Forgets those that are not there any more, and do not wait.
    pub fn keep(&mut self, is_there: impl Fn(&Flow) -> bool) {
        self.flows.retain(|flow, state| !state.packets.is_empty() || is_there(flow));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use netkernel_service::{Bucket, Police, UNLIMITED};

    use super::*;

    const MS: u64 = 1_000_000;
    const START: u64 = 1_000_000 * MS;

    fn caps(send: u64, receive: u64) -> Caps {
        let of = |rate| Police::new(vec![Arc::new(Bucket::new(rate))]);
        Caps { send: of(send), receive: of(receive), receive_rate: receive }
    }

    fn packet(id: u32, port: u16, payload: u32, acknowledges: Option<u32>) -> Packet {
        let flow =
            Flow { protocol: 6, local: ([127, 0, 0, 1], port).into(), peer: ([127, 0, 0, 1], 9).into() };
        Packet { id, flow, payload, acknowledges, begins: false }
    }

    /// Packets that go in a second from `from`, of a sender that always has some more; `next` makes them.
    fn second(line: &mut Line, caps: &Caps, from: u64, mut next: impl FnMut(u32) -> Packet) -> u32 {
        let mut passed = 0;
        let mut now = from;
        (0..64).for_each(|id| line.add(next(id), 0));
        while now < from + 1000 * MS {
            let mut released = Vec::new();
            line.go(now, |_| Some(caps.clone()), |id| released.push(id));
            passed += released.len() as u32;
            for id in released {
                line.add(next(id), 0);
            }
            now += MS;
        }
        passed
    }

    #[test]
    fn what_is_sent_and_what_is_acknowledged_keep_the_rates_whatever_the_pieces() {
        for piece in [1448, 65_483] {
            let send = caps(12_500_000, UNLIMITED);
            let mut line = Line::default();
            let sent = second(&mut line, &send, START, |id| packet(id, 1, piece, Some(5)));
            let rate = f64::from(sent) * f64::from(piece);
            assert!((rate / 12_500_000.0 - 1.0).abs() < 0.03, "sent {rate} in pieces of {piece}");

            let receive = caps(UNLIMITED, 12_500_000);
            let mut line = Line::default();
            // Numbers of TCP begin again at 0.
            let mut at = u32::MAX - 1_000_000;
            line.add(packet(1, 1, 0, Some(at)), 0);
            let count = second(&mut line, &receive, START, |id| {
                at = at.wrapping_add(piece);
                packet(id, 1, 0, Some(at))
            });
            let rate = f64::from(count) * f64::from(piece);
            assert!((rate / 12_500_000.0 - 1.0).abs() < 0.03, "received {rate} in pieces of {piece}");
        }
    }

    #[test]
    fn order_is_kept_turns_are_taken_and_who_needs_the_other_rate_does_not_wait() {
        let caps = caps(1_000_000, 1_000_000);
        let mut line = Line::default();
        // The first packets say where acknowledgements begin.
        (1..=3).for_each(|port| line.add(packet(port.into(), port, 0, Some(0)), 0));
        let mut released = Vec::new();
        line.go(START, |_| Some(caps.clone()), |id| released.push(id));
        assert_eq!(released, [1, 2, 3]);
        // Two that send much; one that only acknowledges.
        for (id, port, payload, acknowledges) in
            [(10, 1, 60_000, 0), (11, 1, 60_000, 0), (20, 2, 60_000, 0), (30, 3, 0, 1000), (31, 3, 0, 2000)]
        {
            line.add(packet(id, port, payload, Some(acknowledges)), 0);
        }
        released.clear();
        let again = line.go(START, |_| Some(caps.clone()), |id| released.push(id)).unwrap();
        assert_eq!(released, [10, 30, 31], "one packet of 60 ms, and what is received");
        released.clear();
        line.go(again, |_| Some(caps.clone()), |id| released.push(id));
        assert_eq!(released, [20], "the other's turn");
        // The limit is lifted.
        released.clear();
        assert_eq!(line.go(again, |_| None, |id| released.push(id)), None);
        assert_eq!(released, [11]);
        line.keep(|_| false);
        assert!(line.flows.is_empty() && line.turns.is_empty());
    }

    #[test]
    fn an_acknowledgement_that_repeats_or_goes_back_costs_nothing() {
        let caps = caps(UNLIMITED, 1000);
        let mut line = Line::default();
        for (id, acknowledges) in [(1, 50_000), (2, 80_000), (3, 80_000)] {
            line.add(packet(id, 1, 0, Some(acknowledges)), 0);
        }
        let mut released = Vec::new();
        line.go(START, |_| Some(caps.clone()), |id| released.push(id));
        assert_eq!(released, [1, 2, 3]);
        line.add(packet(4, 1, 0, Some(70_000)), 0);
        line.add(packet(5, 1, 0, Some(90_000)), 0);
        line.go(START, |_| Some(caps.clone()), |id| released.push(id));
        assert_eq!(released, [1, 2, 3, 4], "the fifth waits for what the second took");
    }
}
