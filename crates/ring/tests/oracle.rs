//! The queue and the byte arithmetic against models that cannot be wrong.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64};

use netkernel_ring::queue::Queue;
use netkernel_ring::{Corrupt, bytes};
use proptest::prelude::*;

fn slots(n: usize) -> Vec<[AtomicU64; 4]> {
    (0..n).map(|_| Default::default()).collect()
}

proptest! {
    #[test]
    fn queue_is_a_bounded_fifo(power in 0u32..6, start in any::<u32>(), steps in prop::collection::vec(any::<bool>(), 0..400)) {
        let (head, tail) = (AtomicU32::new(start), AtomicU32::new(start));
        let slots = slots(1 << power);
        let queue = Queue::new(&head, &tail, &slots);
        let (mut model, mut next) = (VecDeque::new(), 0u64);
        let (mut pop_at, mut push_at) = (start, start);
        for push in steps {
            if push {
                let element = [next, !next, next << 7, 3];
                let fits = model.len() < slots.len();
                prop_assert_eq!(queue.push(&mut push_at, element), Ok(fits));
                if fits {
                    model.push_back(element);
                }
                next += 1;
            } else {
                prop_assert_eq!(queue.pop(&mut pop_at), Ok(model.pop_front()));
            }
            prop_assert_eq!(queue.len(), model.len());
        }
    }

    /// Runs of pushes (positive) and pops, as batches: the same queue. A batch may be left before its end.
    #[test]
    fn batches_are_runs_of_single_steps(power in 0u32..6, start in any::<u32>(), steps in prop::collection::vec((-80i32..80, 0u32..80), 0..200)) {
        let (head, tail) = (AtomicU32::new(start), AtomicU32::new(start));
        let slots = slots(1 << power);
        let queue = Queue::new(&head, &tail, &slots);
        let (mut model, mut next) = (VecDeque::new(), 0u64);
        let (mut pop_at, mut push_at) = (start, start);
        for (step, take) in steps {
            if step >= 0 {
                let fits = (step as usize).min(slots.len() - model.len());
                let mut elements = (next..next + step as u64).map(|n| [n, !n, n << 7, 3]);
                prop_assert_eq!(queue.push_all(&mut push_at, &mut elements), Ok(fits as u32));
                // What did not fit was not taken.
                prop_assert_eq!(elements.next().map(|element| element[0]), (fits < step as usize).then_some(next + fits as u64));
                model.extend((next..next + fits as u64).map(|n| [n, !n, n << 7, 3]));
                next += fits as u64;
            } else {
                let mut batch = queue.batch(pop_at, step.unsigned_abs()).unwrap();
                let most = (step.unsigned_abs() as usize).min(model.len());
                for _ in 0..most.min(take as usize) {
                    prop_assert_eq!(batch.next(), model.pop_front());
                }
                if take as usize >= most {
                    prop_assert_eq!(batch.next(), None);
                }
                pop_at = batch.finish();
            }
            prop_assert_eq!(queue.len(), model.len());
        }
    }

    /// From ring to ring, of different sizes, with some elements refused: order is kept, nothing is lost or doubled.
    #[test]
    fn transfer_moves_what_is_routed(
        powers in (0u32..6, 0u32..6),
        start in (any::<u32>(), any::<u32>()),
        steps in prop::collection::vec((0u32..40, 0u32..40, 0u32..40), 0..100),
    ) {
        let (from_head, from_tail) = (AtomicU32::new(start.0), AtomicU32::new(start.0));
        let (to_head, to_tail) = (AtomicU32::new(start.1), AtomicU32::new(start.1));
        let (from_slots, to_slots) = (slots(1 << powers.0), slots(1 << powers.1));
        let from = Queue::new(&from_head, &from_tail, &from_slots);
        let to = Queue::new(&to_head, &to_tail, &to_slots);
        let (mut from_model, mut to_model, mut next) = (VecDeque::new(), VecDeque::new(), 0u64);
        let (mut push_at, mut take_at) = (start.0, start.0);
        let (mut give_at, mut pop_at) = (start.1, start.1);
        for (push, most, pop) in steps {
            let fits = (push as usize).min(from_slots.len() - from_model.len());
            from.push_all(&mut push_at, &mut (next..next + fits as u64).map(|n| [n; 4])).unwrap();
            from_model.extend(next..next + fits as u64);
            next += fits as u64;

            let room = to_slots.len() - to_model.len();
            let n = (most as usize).min(from_model.len()).min(room);
            let route = |element: [u64; 4]| (!element[0].is_multiple_of(5)).then(|| element.map(|word| !word));
            prop_assert_eq!(from.transfer(&mut take_at, &to, &mut give_at, most, route), Ok(n as u32));
            to_model.extend(from_model.drain(..n).filter(|n| !n.is_multiple_of(5)).map(|n| [!n; 4]));
            prop_assert_eq!((from.len(), to.len()), (from_model.len(), to_model.len()));

            let mut batch = to.batch(pop_at, pop).unwrap();
            for element in batch.by_ref() {
                prop_assert_eq!(Some(element), to_model.pop_front());
            }
            pop_at = batch.finish();
        }
    }

    #[test]
    fn positions_that_no_peer_can_write_are_corrupt(mine in any::<u32>(), theirs in any::<u32>()) {
        let slots = slots(8);
        let distance = theirs.wrapping_sub(mine);
        // As consumer: the producer's tail is hostile.
        let (head, tail) = (AtomicU32::new(mine), AtomicU32::new(theirs));
        let got = Queue::new(&head, &tail, &slots).pop(&mut { mine });
        prop_assert_eq!(got == Err(Corrupt), distance > 8);
        let batch = Queue::new(&head, &tail, &slots).batch(mine, 8);
        prop_assert_eq!(batch.is_err(), distance > 8);
        let (good, other_slots) = ((AtomicU32::new(0), AtomicU32::new(0)), self::slots(8));
        let other = Queue::new(&good.0, &good.1, &other_slots);
        let moved = Queue::new(&head, &tail, &slots).transfer(&mut { mine }, &other, &mut 0, 8, Some);
        prop_assert_eq!(moved == Err(Corrupt), distance > 8);
        let (good, other_slots) = ((AtomicU32::new(0), AtomicU32::new(0)), self::slots(8));
        let other = Queue::new(&good.0, &good.1, &other_slots);
        // As producer: the consumer's head is hostile.
        let (head, tail) = (AtomicU32::new(theirs), AtomicU32::new(mine));
        let put = Queue::new(&head, &tail, &slots).push(&mut { mine }, [0; 4]);
        prop_assert_eq!(put == Err(Corrupt), mine.wrapping_sub(theirs) > 8);
        let moved = other.transfer(&mut 0, &Queue::new(&head, &tail, &slots), &mut { mine }, 8, Some);
        prop_assert_eq!(moved == Err(Corrupt), mine.wrapping_sub(theirs) > 8);
        let put = Queue::new(&head, &tail, &slots).push_all(&mut { mine }, &mut std::iter::once([0; 4]));
        prop_assert_eq!(put == Err(Corrupt), mine.wrapping_sub(theirs) > 8);
    }

    #[test]
    fn segments_are_the_bytes_of_the_ring(base in any::<u32>(), at in any::<u32>(), len in any::<u32>(), power in 0u32..12) {
        let size = 1u32 << power;
        let s = bytes::segments(base, at, len, size);
        let mut seen = Vec::new();
        for (offset, n) in [s.first, s.second] {
            prop_assert!(offset + n <= size);
            seen.extend(offset..offset + n);
        }
        let want: Vec<u32> =
            (0..len.min(size)).map(|i| at.wrapping_add(i).wrapping_sub(base) & (size - 1)).collect();
        prop_assert_eq!(seen, want);
    }

    #[test]
    fn used_refuses_more_than_the_ring_holds(head in any::<u32>(), tail in any::<u32>(), power in 0u32..31) {
        let size = 1u32 << power;
        let distance = tail.wrapping_sub(head);
        prop_assert_eq!(bytes::used(head, tail, size), if distance <= size { Ok(distance) } else { Err(Corrupt) });
    }
}
