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

    #[test]
    fn positions_that_no_peer_can_write_are_corrupt(mine in any::<u32>(), theirs in any::<u32>()) {
        let slots = slots(8);
        let distance = theirs.wrapping_sub(mine);
        // As consumer: the producer's tail is hostile.
        let (head, tail) = (AtomicU32::new(mine), AtomicU32::new(theirs));
        let got = Queue::new(&head, &tail, &slots).pop(&mut { mine });
        prop_assert_eq!(got == Err(Corrupt), distance > 8);
        // As producer: the consumer's head is hostile.
        let (head, tail) = (AtomicU32::new(theirs), AtomicU32::new(mine));
        let put = Queue::new(&head, &tail, &slots).push(&mut { mine }, [0; 4]);
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
